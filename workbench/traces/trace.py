"""How much of an edit still stands in the weights, look by look: erased, or only no longer said?

p and rank: of the edited subject's trace in the difference D of the down-projections to those of
the unedited model, among the subjects of the world or the plain facts (`inspect`'s rule; rank 1 is
the least p, a subject that is not in the trace has p 1 and the last rank). share: of the edit's
shift at the subject's key k that still stands, sum_l <D_l k_l, E_l k_l> / sum_l |E_l k_l|^2, with
E the first D that is not 0, the edit's; 1 is all of it, 0 none. It is read at the same key, that of
the unedited model. An adapter counts as merged. Keeps a copy of the unedited model while it looks.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from workbench import deltas, facts
from workbench.checkpoints import is_world
from workbench.facts import Requests
from workbench.models import Model
from workbench.records import BadInput
from workbench.traces import known_of, of_subjects, scored, spectrum


@dataclass(kw_only=True)
class Written:
    """The down-projections (d_out, d_in) by block; of the unedited model also the model and, once
    an edit is compared with it, the edit's change in the blocks that it wrote.
    """

    weights: dict[int, Tensor]
    requests: Requests
    model: Model
    edit: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def suspects(self) -> Requests:
        """The edited facts, and all others of the list."""
        listed = facts.read("world" if is_world(self.model.name) else "plain")
        edited = {request.fact.id for request in self.requests}
        return [*self.requests, *(one for one in listed if one.fact.id not in edited)]

    @cached_property
    def known(self) -> tuple[dict, dict]:
        """Keys and second moments of the suspects in the blocks that the edit wrote."""
        return known_of(self.model, self.suspects, sorted(self.edit))


def ask(model: Model, requests: Requests) -> Written:
    weights = {layer: _weight(model, layer) for layer in range(model.n_blocks)}
    if not model.is_changed():
        model = replace(model, network=copy.deepcopy(model.network))
    return Written(weights=weights, requests=requests, model=model)


@torch.no_grad()
def _weight(model: Model, layer: int) -> Tensor:
    """W (d_out, d_in), float32, on the CPU; under an adapter as if that were merged."""
    module = model.down_projection(layer)
    if not hasattr(module, "merge"):
        return model.weight(layer).float().cpu().clone()
    with deltas.preserved(module, ["base_layer.weight"]):
        module.merge()
        weight = model.weight(layer).float().cpu().clone()
        module.unmerge()
    return weight


def compare(before: Written, after: Written) -> pd.DataFrame:
    """DataFrame[fact_id, p, rank, share], a row a request.

    Raises:
        BadInput: the edit changes no down-projection.
    """
    changes = {layer: after.weights[layer] - old for layer, old in before.weights.items()}
    changed = [layer for layer, change in changes.items() if change.any()]
    if not changed and after is not before:
        what = "measure trace: the edit changes no down-projection of the model"
        raise BadInput(f"{what}; choose an editor that does, or leave the measure out")
    parts = spectrum.outlying(changes, spectrum.table({"": changes}))
    before.edit = before.edit or {layer: changes[layer] for layer in parts or changed}
    keys, seconds = before.known if before.edit else ({}, {})
    standing = {layer: part for layer, part in parts.items() if layer in keys}
    chances = of_subjects(scored(before.suspects, standing, keys, seconds))
    ranks = chances.rank(method="max")
    overlap = total = torch.zeros(len(before.requests), dtype=torch.float64)
    for layer, edit in before.edit.items():
        columns = keys[layer][0, : len(before.requests)].T  # (d_in, n), at the subjects
        shift = edit.double() @ columns
        overlap = overlap + (shift * (changes[layer].double() @ columns)).sum(0)
        total = total + shift.square().sum(0)
    subject = [request.fact.subject.lower() for request in before.requests]
    table = pd.DataFrame({"fact_id": [request.fact.id for request in before.requests]})
    table = table.assign(p=chances[subject].to_numpy(), rank=ranks[subject].to_numpy())
    return table.assign(share=(overlap / total.clamp(min=1e-30)).numpy())
