"""What every editor shares: hyper-parameters as a record, prepared resources, the delta with the
record of how it was made.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from workbench import editing
from workbench.activations import recorded
from workbench.closed_form import SAME_KEY, NullSpace, Singular, parallel_keys
from workbench.edits import Edit
from workbench.facts import BadInput, Record, Requests
from workbench.inert import printable
from workbench.models import Model
from workbench.moments import SecondMoment
from workbench.positions import Encoded
from workbench.records import listed
from workbench.tracking.retention import measure

SOLVED = 0.5  # p(target) above which a target vector counts as solved
Kind = TypeVar("Kind", bound=Edit)


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
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    network: torch.nn.Module | None = None


def moment_of(model: Model, resources: Resources, layer: int) -> SecondMoment:
    """The layer's second moment; BadInput if there is none, or it is of another model or too few
    tokens.
    """
    moment = resources.moments.get(layer)
    width = model.weight(layer).shape[1]
    if moment is None:
        problem = f"the resources hold second moments of layers {sorted(resources.moments)}"
    elif moment.model != model.fingerprint or len(moment.matrix) != width:
        problem = f"the second moment is of another model ({moment.model}), not of {model.name}"
    elif moment.tokens < width:  # float32 rounding would hide it from the factorisation
        problem = f"{moment.tokens} tokens leave the second moment singular, {width} are needed"
    else:
        return moment
    raise BadInput(f"layer {layer}: {problem}; prepare again")


def moment_factor(model: Model, resources: Resources, layer: int, convention: str) -> Tensor:
    """Cholesky factor of the layer's second moment, computed once; by "reference" of C without a
    floor.
    """
    moment = moment_of(model, resources, layer)
    with solvable(layer):
        return moment.bare_factor if convention == "reference" else moment.factor


@contextmanager
def solvable(layer: int) -> Iterator[None]:
    """Inside, a system without a single solution is a BadInput that names the layer."""
    try:
        yield
    except Singular as error:
        raise BadInput(f"layer {layer}: {error}") from None


def check_distinct(model: Model, requests: Requests, keys: Tensor, layer: int) -> None:
    """BadInput if two requests have one key (columns of keys, (d_in, n)): no change can give it two
    values.
    """
    rounding = torch.finfo(model.dtype).eps
    pair = parallel_keys(keys, apart=max(SAME_KEY, rounding**2))
    if not pair:
        return
    first, second = (requests[number] for number in pair)
    problem = f"have one key at layer {layer}, which takes one value"
    remedy = "edit them one after another (editing.edit_in_turn), or leave one of them out"
    numbers = f"facts {pair[0] + 1} and {pair[1] + 1}"
    names = f"{_short(first.fact.id)}, {_short(second.fact.id)}"
    subject = f"subject {_short(second.fact.subject)}"
    raise BadInput(f"{numbers} ({names}; {subject}) {problem}; {remedy}")


def _short(text: str) -> str:
    """Text of the data for a line that a terminal shows."""
    return printable(" ".join(text.split()))[:60]


def wide(values: Tensor) -> Tensor:
    """The values in float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def finite(values: Tensor, model: Model, layer: int, encoded: Encoded) -> Tensor:
    """The values, float64, which the texts gave at a layer; BadInput if one is NaN or infinite.

    It names the weights, or the first layer whose activations are so, or the given one if that came
    of the edit alone.
    """
    if torch.isfinite(values).all():
        return wide(values)
    for name, parameter in model.network.named_parameters():
        if not torch.isfinite(parameter).all():
            problem = f"{name} holds NaN or infinite numbers"
            raise BadInput(f"{model.name}: {problem}; load sound weights")
    with torch.no_grad(), recorded(dict(enumerate(model.blocks))) as states:
        model.network(**encoded.to(model.device).arguments(), use_cache=False)
    broken = [number for number, state in states.items() if not torch.isfinite(state).all()]
    problem = f"NaN or infinite activations at layer {min(broken, default=layer)}"
    remedy = "load the model in float32, or lower the learning rate"
    raise BadInput(f"{model.name}: {problem}; {remedy}")


def described(
    editor: str,
    model: Model,
    edit: Kind,
    requests: Requests,
    hparams: Numbers,
    resources: Resources,
    seed: int,
    **about,
) -> Kind:
    """The edit, with everything needed to make it again, and whether it took.

    `outcomes` of the record, one a request: `p_solved`, p(target) that the solver reached, None of
    an editor without one; `p_after`, once the edit is applied; `took`, whether the model then says
    the target. One that it does not say is warned of. A sum keeps the outcomes of its parts, each
    right after its own edit; `asked_again` makes them the sum's.

    Memory beside the model: a copy of the edited weights, and a pass over the bare prompts.
    """
    moments = resources.moments
    corpora = {f"{moment.corpus}, {moment.tokens} tokens" for moment in moments.values()}
    p_solved = about.pop("p_solved", [None] * len(requests))
    pairs = zip(requests, p_solved, strict=True)
    record = {"editor": editor, "hparams": hparams.model_dump(mode="json"), "seed": seed}
    record["requests"] = [request.model_dump(mode="json") for request in requests]
    record["prefixes"] = list(resources.prefixes)
    record["moments"] = {str(layer): moment.fingerprint for layer, moment in moments.items()}
    record["corpus"] = sorted(corpora)
    record |= about
    record["outcomes"] = [{"fact": request.fact.id, "p_solved": p} for request, p in pairs]
    edit = asked_again(model, replace(edit, record=record), requests)
    warn_of_missed([edit], stacklevel=4)
    return edit


def asked_again(model: Model, edit: Kind, requests: Requests) -> Kind:
    """The edit with `p_after` and `took` of each request, in the order of its parts, as it leaves
    them.
    """
    with edit.applied(model):
        answers = measure(model, requests)
    if answers.p.isna().any():
        raise BadInput(f"{model.name}: says NaN when it is edited; load it in float32")
    edit = replace(edit, record=copy.deepcopy(edit.record))
    asked = zip(edit.outcomes, answers.p, answers.retained, strict=True)
    for outcome, p, retained in asked:
        outcome |= {"p_after": p, "took": retained}
    return edit


def warn_of_missed(edits: Sequence[Edit], stacklevel: int = 3) -> None:
    """One line, visible, of the edits that did not take, and of the number to change."""
    asked = [outcome for edit in edits for outcome in edit.outcomes]
    missed = [outcome for outcome in asked if not outcome["took"]]
    if not missed:
        return
    parts = [part for edit in edits for part in edit.parts]
    made = next(part for part in parts if missed[0] in part.get("outcomes", ()))
    took = f"{len(asked) - len(missed)} of {len(asked)} edits took"
    names = listed([_missed(outcome) for outcome in missed], 4)
    remedies = sorted({_remedy(made["editor"], outcome) for outcome in missed})
    remedy = ", ".join(remedies).format(**made["hparams"])
    message = f"{made['editor']}: {took}, not {names}; {remedy}"
    warnings.warn(message, NotTaken, stacklevel=stacklevel)


def _remedy(name: str, outcome: Mapping) -> str:
    editor = editing.EDITORS[name]
    is_solved = outcome["p_solved"] is None or outcome["p_solved"] >= SOLVED
    return editor.REMEDY if is_solved else editor.HParams.UNSOLVED or editor.REMEDY


def _missed(outcome: Mapping) -> str:
    solved = "" if outcome["p_solved"] is None else f"solved to p {outcome['p_solved']:.2f}, "
    return f"{_short(outcome['fact'])} ({solved}in the weights {outcome['p_after']:.2f})"
