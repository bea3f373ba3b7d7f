"""How much of an edit still stands in the weights, look by look: erased, or only no longer said?

p and rank: of the edited subject's trace in the difference D of the down-projections to those of
the unedited model, among the subjects of the world or the plain facts. The rule is `inspect`'s, but
that only down-projections are compared; where a look came before the edit, those that it wrote are
known and not held against each other. rank: 1 and how many have less p; one that is not in the
trace has p near 1 and the last rank.
share, reach: of the edit's shift E k at the subject's key k, what D still does,
sum_l <E k, D k> / sum_l |E k|^2 over the blocks that were written: share at the key just after the
edit, reach at the key that the model has now, which the tuning of earlier weights moves. E is the
first D that is not 0, so both begin at 1; 0 is nothing. Where no look came before the edit, as in
`evaluate`, what is an edit's and what a tuning's is not known, and both are left out. An adapter
counts as merged. Keeps a copy of the unedited model while it looks.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from workbench import deltas, facts
from workbench.checkpoints import source_of
from workbench.deltas import Change
from workbench.facts import Requests
from workbench.models import Model
from workbench.records import BadInput
from workbench.traces import spectrum, subjects
from workbench.traces.naming import met, of_subjects, readings_of, scored


@dataclass(kw_only=True)
class Written:
    """By block the down-projections (d_out, d_in) and the edited subjects' keys (n, d_in). Of the
    unedited model also the model and, once an edit is compared with it, the edit's change in the
    blocks that it wrote, and the keys just after it.
    """

    weights: dict[int, Tensor]
    keys: dict[int, Tensor]
    requests: Requests
    model: Model
    edit: dict[int, Tensor] = field(default_factory=dict)
    is_followed: bool = False  # from a look before the edit on

    @cached_property
    def suspects(self) -> Requests:
        """The edited facts, and all others of the list."""
        listed = [*facts.read(source_of(self.model.name)), *self.requests]
        return list({request.fact.id: request for request in listed}.values())

    @cached_property
    def known(self) -> tuple[dict, dict]:
        """Keys and second moments of the suspects in the blocks that the edit wrote."""
        parts = {layer: Change(dense=change) for layer, change in self.edit.items()}
        return met(self.model, self.suspects, parts)


def ask(model: Model, requests: Requests) -> Written:
    layers = range(model.n_blocks)
    weights = {layer: _weight(model, layer) for layer in layers}
    keys = subjects.keys_of(model, requests, layers)
    at_subject = {layer: keys[layer][0] for layer in layers}
    if not model.is_changed():
        model = replace(model, network=copy.deepcopy(model.network), in_force=[])
    return Written(weights=weights, keys=at_subject, requests=requests, model=model)


@torch.no_grad()
def _weight(model: Model, layer: int) -> Tensor:
    """W (d_out, d_in), float32, on the CPU; under an adapter as if that were merged."""
    module = model.down_projection(layer)
    if not hasattr(module, "merge"):
        return model.weight(layer).to("cpu", torch.float32, copy=True)
    with deltas.preserved(module, ["base_layer.weight"]):
        module.merge()
        weight = model.weight(layer).to("cpu", torch.float32, copy=True)
        module.unmerge()
    return weight


def compare(before: Written, after: Written) -> pd.DataFrame:
    """DataFrame[fact_id, p, rank, share, reach], a row a request; of followed ones the last two.

    Raises:
        BadInput: the edit changes no down-projection.
    """
    changes = {layer: after.weights[layer] - old for layer, old in before.weights.items()}
    changed = [layer for layer in changes if changes[layer].any()]
    if not changed and after is not before:
        what = "measure trace: the edit changes no down-projection of the model"
        raise BadInput(f"{what}; choose an editor that does, or leave the measure out")
    before.is_followed |= after is before
    edited = before.edit or changed
    rows = spectrum.table({"": changes}, edited=edited if before.is_followed else ())
    parts = spectrum.outlying(changes, rows)
    if not before.edit:
        before.keys = after.keys
        before.edit = {layer: changes[layer] for layer in parts or changed}
    table = pd.DataFrame({"fact_id": [request.fact.id for request in before.requests]})
    keys, seconds = before.known if before.edit else ({}, {})
    standing = {layer: parts[layer] for layer in parts if layer in keys}
    readings = readings_of(standing, keys, seconds)
    chances = of_subjects(scored(before.suspects, standing, readings))
    names = [request.fact.subject.lower() for request in before.requests]
    table["p"] = chances[names].tolist()
    ranks = chances.rank(method="min").mask(chances == 1, len(chances))
    table["rank"] = ranks[names].tolist()
    if before.is_followed:
        whole = _along(before, before.edit, before.keys).clamp(min=1e-30)
        table["share"] = _along(before, changes, before.keys) / whole
        table["reach"] = _along(before, changes, after.keys) / whole
    return table


def _along(before: Written, changes: dict[int, Tensor], keys: dict[int, Tensor]) -> Tensor:
    """What the changes do to the keys along the edit's own shifts (n,): sum_l <E k_0, D k>."""
    total = torch.zeros(len(before.requests), dtype=torch.float64)
    for layer, edit in before.edit.items():
        shift = before.keys[layer] @ edit.double().T  # (n, d_out)
        now = keys[layer] @ changes[layer].double().T
        total += (shift * now).sum(1)
    return total
