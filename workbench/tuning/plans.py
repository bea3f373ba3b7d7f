"""Which weights may move: `all`, `after:N`, `window:A-B`, `outside:A-B`, `edited`,
`edited-matrices`, `not-edited`.

Blocks count from 0 and ends are inclusive; `after:N` moves N+1 and up. Embeddings, final norm and
head move only under `all`; tied weights count as embeddings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.facts import BadInput
from workbench.models import Model

FORMS = "all, after:N, window:A-B, outside:A-B, edited, edited-matrices or not-edited"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The names of the parameters that move, of the plan written as `text`."""

    text: str
    parameters: tuple[str, ...]

    def __post_init__(self):
        if not self.parameters:
            raise BadInput(f"plan {self.text!r} moves no weight of this model; choose {FORMS}")

    def table(self, model: Model) -> pd.DataFrame:
        """Trainable and all parameters of embeddings (a tied head counts there), each block, final
        norm and head.
        """
        kinds = {
            f"{model.architecture.unembedding}.": "head",
            f"{model.architecture.final_norm}.": "final norm",
        }
        kinds |= {f"{name}.": "embeddings" for name in model.architecture.embeddings}
        rows = []
        for name, parameter in model.network.named_parameters():
            found = re.match(re.escape(model.architecture.blocks) + r"\.(\d+)\.", name)
            block = (
                int(found[1])
                if found
                else next(
                    (kind for start, kind in kinds.items() if name.startswith(start)), "other"
                )
            )
            rows.append(
                {
                    "block": block,
                    "trainable": parameter.numel() * (name in self.parameters),
                    "all": parameter.numel(),
                }
            )
        return pd.DataFrame(rows).groupby("block", sort=False).sum()


def resolve(model: Model, text: str, edited_layers: Sequence[int] = ()) -> Plan:
    """The plan for this model.

    Args:
        edited_layers: blocks that the edit changed; `edited`, `edited-matrices` and `not-edited`
            need them.
    """
    edited_layers = model.check_layers(edited_layers)
    if not edited_layers and text in ("edited", "edited-matrices", "not-edited"):
        raise BadInput(f"plan {text!r} needs edited layers, and nothing was edited")
    names = [name for name, _ in model.network.named_parameters()]
    if text == "all":
        return Plan(text=text, parameters=tuple(names))
    if text == "edited-matrices":
        matrices = {f"{model.down_projection_name(layer)}.weight" for layer in edited_layers}
        return Plan(text=text, parameters=tuple(name for name in names if name in matrices))
    blocks = _blocks(model, text, edited_layers)
    prefixes = tuple(
        f"{model.block_name(layer)}." for layer in blocks
    )  # with the dot: h.1. is not h.10.
    return Plan(text=text, parameters=tuple(name for name in names if name.startswith(prefixes)))


def _blocks(model: Model, text: str, edited_layers: Sequence[int]) -> list[int]:
    every = range(model.n_blocks)
    if text in ("edited", "not-edited"):
        return [layer for layer in every if (layer in edited_layers) == (text == "edited")]
    if found := re.fullmatch(r"after:(\d+)", text):
        bound = int(found[1])
        model.check_layers([bound])
        return [layer for layer in every if layer > bound]
    if found := re.fullmatch(r"(window|outside):(\d+)-(\d+)", text):
        first, last = int(found[2]), int(found[3])
        model.check_layers([first, last])
        if first > last:
            raise BadInput(f"plan {text!r}: the window ends before it begins")
        return [layer for layer in every if (first <= layer <= last) == (found[1] == "window")]
    raise BadInput(f"plan {text!r}: choose {FORMS}")
