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

from workbench.closed_form import constrained_update
from workbench.deltas import Change, WeightDelta, applied
from workbench.editing.records import solvable
from workbench.facts import Requests
from workbench.models import Model
from workbench.records import BadInput
from workbench.traces import naming, spectrum, subjects
from workbench.tracking.retention import measure

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
    rows = {}
    for name, change in changes.items():
        with applied(model, change) if change else nullcontext():
            rows[name] = {
                column: measure(model, requests, against=against).retained.mean()
                for column, (requests, against) in asked.items()
                if requests
            }
    return pd.DataFrame(rows).T


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
    rows = _written(requests, parts, keys, seconds)
    narrowed = {}
    for layer, part in parts.items():
        columns = keys[layer][0][rows].T  # at the subjects
        residuals = part.matrix().double().cpu() @ columns
        with solvable(layer):
            update = constrained_update(columns, residuals, seconds[layer].factor.cpu())
        narrowed[layer] = Change(left=update.left.float(), right=update.right.float())
    return narrowed


def _written(requests: Requests, *known: dict) -> list[int]:
    """A row a subject that was written, the one that fits best: of a list that `inspect` takes
    those that it names, of a shorter one everybody.

    Raises:
        BadInput: one of a short list was not written, or nobody of a long one is named.
    """
    is_short = naming.count(requests) < naming.fewest(known[0])
    if is_short:
        readings = naming.readings_of(*known)
        fits = torch.stack([subjects.scores(*reading) for reading in readings]).amax(0)  # (n,)
        named = [True] * len(requests)
    else:
        table = naming.scored(requests, *known)
        fits, named = torch.tensor(table.score.to_numpy()), table.written
    rows: dict[str, int] = {}
    for row in fits.argsort(descending=True).tolist():
        if named[row]:
            rows.setdefault(requests[row].fact.subject.lower(), row)
    if not rows:
        raise BadInput("nobody of the list is named; leave the facts out to change all that stands")
    *_, last = rows.values()
    if is_short and fits[last] < HALF:
        what = f"{requests[last].fact.subject}: the part that stands out was not written there"
        raise BadInput(f"{what} (it holds {fits[last]:.2f} of its key); leave it out")
    return sorted(rows.values())
