"""What every editor shares: hyper-parameters as a record, prepared resources, the record of an edit, the presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.facts import EditRequest, Record
from workbench.moments import SecondMoment


class Numbers(Record):
    """The numbers of one method; the names follow its paper, units stand beside the fields."""

    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What `prepare` made, once per model: second moments by layer, prefixes. Passed in, never hidden."""

    moments: Mapping[int, SecondMoment] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()


def record_of(editor: str, hparams: Numbers, requests: Sequence[EditRequest], seed: int) -> dict:
    """Everything that says how a delta was made, as plain JSON."""
    return {
        "editor": editor,
        "hparams": hparams.model_dump(mode="json"),
        "seed": seed,
        "requests": [request.model_dump(mode="json") for request in requests],
    }
