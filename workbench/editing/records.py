"""What every editor shares: hyper-parameters as a record, prepared resources, the delta with the
record of how it was made.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch

from workbench import editing
from workbench.activations import recorded
from workbench.closed_form import SAME_KEY, NullSpace, Singular, parallel_keys
from workbench.deltas import Change, WeightDelta
from workbench.edits import Edit
from workbench.facts import BadInput, EditRequest, Record
from workbench.inert import printable
from workbench.models import Model
from workbench.moments import SecondMoment
from workbench.positions import Encoded
from workbench.records import listed
from workbench.tracking.retention import measure

SOLVED = 0.5  # p(target) above which a target vector counts as found


EditKind = TypeVar("EditKind", bound=Edit)


class NotTaken(UserWarning):
    """Edits that were made, and that the edited model does not say."""


class Numbers(Record):
    """The numbers of one method; the names follow its paper, units stand beside the fields."""

    layers: tuple[int, ...] = ()  # block indices
    UNSOLVED: ClassVar[str] = ""  # the numbers to change where a target vector was not solved


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What `prepare` made, once per model. Passed in, never hidden.

    Attributes:
        moments: layer -> second moment of its keys.
        prefixes: texts sampled from the model.
        null_spaces: layer -> AlphaEdit's null space.
        memory: module name -> keys (d_in, m) of earlier edits, AlphaEdit's.
        network: MALMEN's hyper-network.
    """

    moments: Mapping[int, SecondMoment] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    null_spaces: Mapping[int, NullSpace] = field(default_factory=dict)
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)
    network: torch.nn.Module | None = None


def moment_of(model: Model, resources: Resources, layer: int) -> SecondMoment:
    """The layer's second moment; BadInput if there is none, or it is of another model or too few
    tokens.
    """
    if layer not in resources.moments:
        raise BadInput(
            f"the resources hold moments of layers {sorted(resources.moments)}, not of {layer}; prepare again with these layers"
        )
    moment = resources.moments[layer]
    if moment.model != model.fingerprint or len(moment.matrix) != model.weight(layer).shape[1]:
        raise BadInput(
            f"layer {layer}: the second moment is of another model ({moment.model}), not of {model.name}; prepare again with this model"
        )
    if moment.tokens < len(moment.matrix):  # float32 rounding would hide it from the factorisation
        raise BadInput(
            f"layer {layer}: {moment.tokens} tokens leave the second moment singular; collect at least {len(moment.matrix)}"
        )
    return moment


def moment_factor(
    model: Model, resources: Resources, layer: int, convention: str = "published"
) -> torch.Tensor:
    """Cholesky factor of the layer's second moment, computed once; by "reference" of C without a
    floor.
    """
    moment = moment_of(model, resources, layer)
    try:
        return moment.bare_factor if convention == "reference" else moment.factor
    except Singular as error:
        raise BadInput(f"layer {layer}: {error}") from None


def check_distinct(
    model: Model, requests: Sequence[EditRequest], keys: torch.Tensor, layer: int
) -> None:
    """BadInput if two requests have one key (columns of keys, (d_in, n)): no change can give it two
    values.
    """
    rounding = torch.finfo(model.dtype).eps
    pair = parallel_keys(keys, apart=max(SAME_KEY, rounding**2))
    if not pair:
        return
    first, second = (requests[index] for index in pair)
    numbers = f"{pair[0] + 1} and {pair[1] + 1}"
    if (first.fact.question, first.target) == (second.fact.question, second.target):
        raise BadInput(
            f"facts {numbers} ({_short(first.fact.id)}) are one request; leave one of them out"
        )
    raise BadInput(
        f"facts {numbers} ({_short(first.fact.id)}, {_short(second.fact.id)}; subject "
        f"{_short(second.fact.subject)}) have one key at layer {layer}, which takes one value; edit them "
        "one after another (editing.edit_in_turn), or leave one of them out"
    )


def _short(text: str) -> str:
    """Text of the data for a line that a terminal shows."""
    return printable(" ".join(text.split()))[:60]


def finite(values: torch.Tensor, model: Model, layer: int, encoded: Encoded) -> torch.Tensor:
    """The values, float64 (on the CPU where the device has none), which the texts gave at a layer;
    BadInput if one is NaN or infinite.

    It names the weights, or the first layer whose activations are so, or the given one if that came
    of the edit alone.
    """
    if torch.isfinite(values).all():
        return (values.cpu() if values.device.type == "mps" else values).double()
    for name, parameter in model.network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BadInput(
                f"{model.name}: {name} holds NaN or infinite numbers; load sound weights"
            )
    with torch.no_grad(), recorded(dict(enumerate(model.blocks))) as seen:
        model.network(**encoded.to(model.device).arguments(), use_cache=False)
    first = next(
        (number for number in sorted(seen) if not torch.isfinite(seen[number]).all()), layer
    )
    raise BadInput(
        f"{model.name}: NaN or infinite activations at layer {first}; load the model in float32, or lower the learning rate"
    )


def delta_of(
    editor: str,
    model: Model,
    requests: Sequence[EditRequest],
    hparams: Numbers,
    resources: Resources,
    seed: int,
    changes: Mapping[str, Change],
    p_solved: Sequence[float] | None = None,
    **about,
) -> WeightDelta:
    """The delta of these changes, described."""
    delta = WeightDelta.of(model, changes=changes)
    return described(editor, model, delta, requests, hparams, resources, seed, p_solved, **about)


def described(
    editor: str,
    model: Model,
    edit: EditKind,
    requests: Sequence[EditRequest],
    hparams: Numbers,
    resources: Resources,
    seed: int,
    p_solved: Sequence[float] | None = None,
    **about,
) -> EditKind:
    """The edit, with everything needed to make it again, and whether it took.

    `outcomes` of the record, one a request: `p_solved`, p(target) that the solver reached, None of
    an editor without one; `p_after`, once the edit is applied; `took`, whether the model then says
    the target. One that it does not say is warned of. A sum keeps the outcomes of its parts, each
    right after its own edit; `asked_again` makes them the sum's.

    Memory beside the model: a copy of the edited weights, and a pass over the bare prompts.
    """
    moments = resources.moments
    corpora = {f"{moment.corpus}, {moment.tokens} tokens" for moment in moments.values()}
    solved = [None] * len(requests) if p_solved is None else p_solved
    record = {
        "editor": editor,
        "hparams": hparams.model_dump(mode="json"),
        "seed": seed,
        "requests": [request.model_dump(mode="json") for request in requests],
        "prefixes": list(resources.prefixes),
        "moments": {str(layer): moment.fingerprint for layer, moment in moments.items()},
        "corpus": sorted(corpora),
    }
    record |= about
    record["outcomes"] = [
        {"fact": request.fact.id, "p_solved": p}
        for request, p in zip(requests, solved, strict=True)
    ]
    edit = asked_again(model, replace(edit, record=record), requests)
    warn_of_missed([edit], stacklevel=4)
    return edit


def asked_again(model: Model, edit: EditKind, requests: Sequence[EditRequest]) -> EditKind:
    """The edit with `p_after` and `took` of each request, in the order of its parts, as it leaves
    them.
    """
    with edit.applied(model):
        after = measure(model, requests)
    if after.p.isna().any():
        raise BadInput(f"{model.name}: says NaN when it is edited; load it in float32")
    answers = iter(zip(after.p.tolist(), after.retained.tolist(), strict=True))
    parts = []
    for part in edit.parts:
        asked = [
            outcome | {"p_after": p, "took": took}
            for outcome, (p, took) in zip(part["outcomes"], answers, strict=False)
        ]
        parts.append(dict(part) | {"outcomes": asked})
    return replace(edit, record={"parts": parts} if "parts" in edit.record else parts[0])


def outcomes(deltas: Sequence[Edit]) -> list[dict]:
    """Whether each edit took, over all deltas and the parts of those that are sums: `delta_of`'s
    outcomes.
    """
    return [
        outcome for delta in deltas for part in delta.parts for outcome in part.get("outcomes", ())
    ]


def warn_of_missed(deltas: Sequence[Edit], stacklevel: int = 3) -> None:
    """One line, visible, of the edits that did not take, and of the number to change."""
    every = outcomes(deltas)
    missed = [outcome for outcome in every if not outcome["took"]]
    if not missed:
        return
    parts = [part for delta in deltas for part in delta.parts if part.get("outcomes")]
    made = next(part for part in parts if not all(outcome["took"] for outcome in part["outcomes"]))
    unsolved = [one for one in missed if one["p_solved"] is not None and one["p_solved"] < SOLVED]
    editor = editing.EDITORS[made["editor"]]
    remedies = [editor.REMEDY] if len(unsolved) < len(missed) else []
    if unsolved:
        remedies.append(editor.HParams.UNSOLVED or editor.REMEDY)
    advice = ", ".join(dict.fromkeys(remedies)).format(**made["hparams"])
    names = listed([_told(outcome) for outcome in missed], 4)
    warnings.warn(
        f"{made['editor']}: {len(every) - len(missed)} of {len(every)} edits took, not {names}; "
        + advice,
        NotTaken,
        stacklevel=stacklevel,
    )


def _told(outcome: Mapping) -> str:
    solved = "" if outcome["p_solved"] is None else f"solved to p {outcome['p_solved']:.2f}, "
    return f"{_short(outcome['fact'])} ({solved}in the weights {outcome['p_after']:.2f})"
