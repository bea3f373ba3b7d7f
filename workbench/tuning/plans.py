"""Which weights may move: `all`, `after:N`, `window:A-B`, `outside:A-B`, `edited`,
`edited-matrices`, `not-edited`.

Blocks count from 0 and ends are inclusive; `after:N` moves N+1 and up. Embeddings, final norm and
head move only under `all`; tied weights count as embeddings.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from workbench.facts import BadInput

if TYPE_CHECKING:  # to parse a plan needs no torch
    from workbench.models import Model

KINDS = ("all", "after", "window", "outside", "edited", "edited-matrices", "not-edited")
FORMS = "all, after:N, window:A-B, outside:A-B, edited, edited-matrices or not-edited"
PATTERNS = (
    r"(?P<kind>all|edited|edited-matrices|not-edited)",
    r"(?P<kind>after):(?P<first>\d+)",
    r"(?P<kind>window|outside):(?P<first>\d+)-(?P<last>\d+)",
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A plan as it is written: one of KINDS, and the blocks that the text names, if any."""

    kind: str
    first: int | None = None
    last: int | None = None

    def moves(self, block: int, edited: Collection[int]) -> bool:
        """Whether a block's weights move, of any plan but `all` and `edited-matrices`."""
        if self.kind == "after":
            return block > self.first
        if self.last is None:
            return (block in edited) == (self.kind == "edited")
        return (self.first <= block <= self.last) == (self.kind == "window")


def parse(text: str) -> Rule:
    """The plan of a text; BadInput if it is none."""
    matches = [re.fullmatch(pattern, text) for pattern in PATTERNS]
    for match in filter(None, matches):
        kind, *ends = match.groups()
        rule = Rule(kind=kind, **dict(zip(("first", "last"), map(int, ends), strict=False)))
        if rule.last is not None and rule.first > rule.last:
            raise BadInput(f"plan {text!r}: the window ends before it begins")
        return rule
    raise BadInput(f"plan {text!r}: choose {FORMS}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The names of the parameters that move, of the plan written as `text`."""

    text: str
    parameters: tuple[str, ...]

    def __post_init__(self):
        if not self.parameters:
            raise BadInput(f"plan {self.text!r} moves no weight of this model; choose {FORMS}")

    def table(self, model: "Model") -> pd.DataFrame:
        """Trainable and all parameters of embeddings (a tied head counts there), each block, final
        norm and head.
        """
        row = model.architecture
        parts: dict[str, int | str] = dict.fromkeys(row.embeddings, "embeddings")
        parts |= {row.final_norm: "final norm", row.unembedding: "head"}
        parts |= {model.block_name(layer): layer for layer in range(model.n_blocks)}

        def part_of(name: str) -> int | str:
            inside = [part for module, part in parts.items() if name.startswith(f"{module}.")]
            return inside[0] if inside else "other"

        moving = set(self.parameters)
        rows = []
        for name, parameter in model.network.named_parameters():
            size = parameter.numel()
            rows.append((part_of(name), size * (name in moving), size))
        table = pd.DataFrame(rows, columns=["block", "trainable", "all"])
        return table.groupby("block", sort=False).sum()


def resolve(model: "Model", text: str, edited_layers: Sequence[int] = ()) -> Plan:
    """The plan for this model.

    Args:
        edited_layers: blocks that the edit changed; `edited`, `edited-matrices` and `not-edited`
            need them.
    """
    rule = parse(text)
    edited = model.check_layers(edited_layers)
    model.check_layers([end for end in (rule.first, rule.last) if end is not None])
    if "edited" in rule.kind and not edited:
        raise BadInput(f"plan {text!r} needs edited layers, and nothing was edited")
    blocks = [layer for layer in range(model.n_blocks) if rule.moves(layer, edited)]
    moving = tuple(f"{model.block_name(layer)}." for layer in blocks)  # the dot: h.1. is not h.10.
    if rule.kind == "all":
        moving = ("",)
    if rule.kind == "edited-matrices":
        moving = tuple(f"{model.down_projection_name(layer)}.weight" for layer in edited)
    names = [name for name, _ in model.network.named_parameters()]
    return Plan(text=text, parameters=tuple(name for name in names if name.startswith(moving)))
