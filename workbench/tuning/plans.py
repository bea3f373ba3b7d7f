"""Which weights may move: `all`, `after:N`, `window:A-B`, `outside:A-B`, `edited`,
`edited-matrices`, `not-edited`, `after-edited`.

Blocks count from 0 and ends are inclusive; `after:N` moves N+1 and up, `after-edited` what is above
the last edited block. Embeddings, final norm and head move only under `all`; tied weights count as
embeddings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from workbench.facts import BadInput

if TYPE_CHECKING:  # to parse a plan needs no torch
    from workbench.models import Model

BY_EDIT = ("edited", "edited-matrices", "not-edited", "after-edited")
KINDS = ("all", "after", "window", "outside", *BY_EDIT)
FORMS = f"all, after:N, window:A-B, outside:A-B, {', '.join(BY_EDIT[:-1])} or {BY_EDIT[-1]}"
WRITTEN = re.compile(rf"(all|{'|'.join(BY_EDIT)})|(after):(\d+)|(window|outside):(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The names of the parameters that move, of the plan written as `text`."""

    text: str
    parameters: tuple[str, ...]

    def __post_init__(self):
        if not self.parameters:
            what = f"plan {self.text!r} moves no weight: no block is left for it"
            raise BadInput(f"{what}; choose {FORMS}")

    def table(self, model: "Model") -> pd.DataFrame:
        """Trainable and all parameters of embeddings (a tied head counts there), each block, final
        norm and head.
        """
        row = model.architecture
        parts: dict[str, int | str] = dict.fromkeys(row.embeddings, "embeddings")
        parts |= {row.final_norm: "final norm", row.unembedding: "head"}
        parts |= {model.block_name(layer): layer for layer in range(model.n_blocks)}
        moving = set(self.parameters)
        rows = []
        for name, parameter in model.network.named_parameters():
            inside = [part for module, part in parts.items() if name.startswith(f"{module}.")]
            part = inside[0] if inside else "other"
            size = parameter.numel()
            rows.append((part, size * (name in moving), size))
        table = pd.DataFrame(rows, columns=["block", "trainable", "all"])
        return table.groupby("block", sort=False).sum()


def parsed(text: str) -> tuple[str, int, int]:
    """Kind, first and last block of a plan as it is written; 0 where it names none."""
    match = WRITTEN.fullmatch(text)
    if not match:
        raise BadInput(f"plan {text!r}: choose {FORMS}")
    kind, *ends = filter(None, match.groups())
    numbers = [int(end) for end in ends] or [0]
    if numbers[0] > numbers[-1]:
        raise BadInput(f"plan {text!r}: the window ends before it begins")
    return kind, numbers[0], numbers[-1]


def resolve(model: "Model", text: str, edited_layers: Sequence[int] = ()) -> Plan:
    """The plan for this model.

    Args:
        edited_layers: blocks that the edit changed; the plans of BY_EDIT need them.
    """
    kind, first, last = parsed(text)
    model.check_layers([first, last])
    edited = model.check_layers(edited_layers)
    if "edited" in kind and not edited:
        what = f"plan {text!r} needs edited layers, and the edit writes none"
        raise BadInput(f"{what}; choose all, after:N, window:A-B or outside:A-B")
    every = set(range(model.n_blocks))
    window = every & set(range(first, last + 1))
    blocks = {
        "after": every - set(range(first + 1)),
        "window": window,
        "outside": every - window,
        "edited": set(edited),
        "not-edited": every - set(edited),
        "after-edited": every - set(range(max(edited, default=0) + 1)),
    }
    moved = blocks.get(kind, set())
    moving = tuple(f"{model.block_name(layer)}." for layer in moved)  # the dot: h.1. is not h.10.
    if kind == "all":
        moving = ("",)
    if kind == "edited-matrices":
        moving = tuple(f"{model.down_projection_name(layer)}.weight" for layer in edited)
    names = [name for name, _ in model.network.named_parameters()]
    return Plan(text=text, parameters=tuple(name for name in names if name.startswith(moving)))
