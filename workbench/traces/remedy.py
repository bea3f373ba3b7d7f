"""Take what stands out of a tuned model's change out of it, or make it stronger; tuning stays.

    E_l = U_r S_r V_r'  of the block's change, see `spectrum`;  removed: -E_l;  restored: s E_l

With requests only what was written at their keys K: the smallest change that does to the keys what
E_l does, E_l K (K' C^-1 K)^-1 (C^-1 K)' (`closed_form.constrained_update`).
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext

import pandas as pd
import torch

from workbench.checkpoints import source_of
from workbench.closed_form import constrained_update
from workbench.deltas import Change, WeightDelta, applied
from workbench.editing.records import solvable
from workbench.facts import EditRequest, Requests, read
from workbench.models import Model
from workbench.records import BadInput
from workbench.traces import naming, spectrum, subjects
from workbench.tracking.retention import measure

WATCHED = 100  # facts that are asked to see what a change costs
HALF = 0.5  # of a key, below which it was not written: of edits of split tuning .88 and more is


def removed(model: Model, base: Model, requests: Requests = (), corpus: str = "") -> WeightDelta:
    """The change that takes an edit out of a model that was tuned after it.

    Args:
        base: the model from before edit and tuning.
        requests: take out only what was written at these subjects, or at those of a list of
            suspects that `inspect` names; () = all that stands out.
        corpus: text of the second moments, where there are requests.
    Raises:
        BadInput: nothing stands out, or was not written at one of the subjects.
    """
    return _scaled(model, base, requests, -1.0, corpus)


def restored(
    model: Model, base: Model, requests: Requests = (), strength: float = 1.0, corpus: str = ""
) -> WeightDelta:
    """The change that adds `strength` times what stands out to what is there of it."""
    if not math.isfinite(strength):
        raise BadInput(f"strength {strength}: give a finite number")
    return _scaled(model, base, requests, strength, corpus)


def compared(
    model: Model,
    changes: Mapping[str, WeightDelta | None],
    edited: Requests,
    watched: Requests = (),
) -> pd.DataFrame:
    """What a model says under each change: the share of edited facts whose new and whose true
    answer is said, and of watched facts.
    """
    asked = {"new": (edited, "target"), "true": (edited, "object"), "watched": (watched, "object")}
    table = pd.DataFrame(index=changes)
    for name, change in changes.items():
        with applied(model, change) if change else nullcontext():
            for column, (requests, against) in asked.items():
                if requests:
                    answers = measure(model, requests, against=against)
                    table.loc[name, column] = answers.retained.mean()
    return table


def known(base: Model, besides: Requests = ()) -> list[EditRequest]:
    """Facts of the world, or plain ones, that the unedited model knows, of other subjects than
    these: what a change of it may cost. Some WATCHED of them.
    """
    names = {request.fact.subject.lower() for request in besides}
    listed = [one for one in read(source_of(base.name)) if one.fact.subject.lower() not in names]
    asked = listed[:: 1 + len(listed) // (2 * WATCHED)]
    is_known = measure(base, asked, against="object").retained
    return [one for one, hit in zip(asked, is_known, strict=True) if hit][:WATCHED]


def _scaled(
    model: Model, base: Model, requests: Requests, factor: float, corpus: str
) -> WeightDelta:
    parts = spectrum.parts(model, base)[1]
    if not parts:
        what = f"{model.name}: no change of a down-projection stands out of the tuning"
        raise BadInput(f"{what}; there is nothing to take out or to bring back")
    if requests:
        parts = _at_subjects(base, requests, parts, corpus)
    changes = {}
    for layer, part in parts.items():
        scaled = Change(left=factor * part.left, right=part.right)
        changes[model.down_projection_name(layer)] = scaled
    return WeightDelta.of(model, changes=changes)


def _at_subjects(
    base: Model, requests: Requests, parts: dict[int, Change], corpus: str
) -> dict[int, Change]:
    """What each part does to the keys of those that were written, and as little else as can be."""
    keys, seconds = naming.met(base, requests, parts, corpus)
    place, rows = _written(requests, parts, keys, seconds)
    narrowed = {}
    for layer, part in parts.items():
        columns = keys[layer][place, rows].T
        residuals = part.matrix().double().cpu() @ columns
        with solvable(layer):
            update = constrained_update(columns, residuals, seconds[layer].factor.cpu())
        narrowed[layer] = Change(left=update.left.float(), right=update.right.float())
    return narrowed


def _written(requests: Requests, *known: dict) -> tuple[int, list[int]]:
    """Which of the keys were written, at the subject (0) or at the prompt's end (1), whichever fit
    better; and a row a subject that was, the one that fits best: of a list that `inspect` takes
    those that it names, of a shorter one everybody.

    Raises:
        BadInput: one of a short list was not written, or nobody of a long one is named.
    """
    readings = naming.readings_of(*known)
    is_short = naming.count(requests) < naming.fewest(known[0])
    hits = list(range(len(requests)))
    if not is_short:
        hits = naming.scored(requests, known[0], readings).query("written").index.tolist()
    if not hits:
        raise BadInput("nobody of the list is named; leave the facts out to change all that stands")
    shares = torch.stack([subjects.scores(*one) for one in readings])
    *at_subject, at_end = shares.unflatten(0, (-1, subjects.METRICS)).amax(0)  # over blocks; (n,)
    fits = torch.stack([torch.stack(at_subject).amax(0), at_end])
    place = int(fits[:, hits].mean(1).argmax())
    rows: dict[str, int] = {}
    for row in sorted(hits, key=lambda row: -fits[place, row]):
        rows.setdefault(requests[row].fact.subject.lower(), row)
    *_, last = rows.values()
    if is_short and fits[place, last] < HALF:
        what = f"{requests[last].fact.subject}: the part that stands out was not written there"
        raise BadInput(f"{what} (it holds {fits[place, last]:.2f} of its key); leave it out")
    return place, sorted(rows.values())
