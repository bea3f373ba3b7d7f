"""How much of an edit still stands in the weights, look by look: erased, or only no longer said?

p and rank: of the edited subject's trace in the difference D of the down-projections to those of
the unedited model, among the subjects of the world or the plain facts (`inspect`'s rule; rank 1 is
the least p, a subject that is not in the trace has p 1 and the last rank). share, reach: of the
edit's shift E k at the subject's key k, what D still does, sum_l <E k, D k> / sum_l |E k|^2 over
the blocks that were written: share at the key just after the edit, reach at the key that the model
has now, which the tuning of earlier weights moves. E is the first D that is not 0, so both begin at
1; 0 is nothing. An adapter counts as merged. Keeps a copy of the unedited model while it looks.
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
from workbench.traces import known_of, of_subjects, scored, spectrum, subjects


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
    keys = subjects.keys_of(model, requests, [*weights])
    at_subject = {layer: both[0] for layer, both in keys.items()}
    if not model.is_changed():
        model = replace(model, network=copy.deepcopy(model.network))
    return Written(weights=weights, keys=at_subject, requests=requests, model=model)


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
    """DataFrame[fact_id, p, rank, share, reach], a row a request.

    Raises:
        BadInput: the edit changes no down-projection.
    """
    changes = {layer: after.weights[layer] - old for layer, old in before.weights.items()}
    changed = [layer for layer, change in changes.items() if change.any()]
    if not changed and after is not before:
        what = "measure trace: the edit changes no down-projection of the model"
        raise BadInput(f"{what}; choose an editor that does, or leave the measure out")
    parts = spectrum.outlying(changes, spectrum.table({"": changes}))
    if not before.edit:
        before.edit = {layer: changes[layer].double() for layer in parts or changed}
        before.keys = after.keys
    keys, seconds = before.known if before.edit else ({}, {})
    standing = {layer: part for layer, part in parts.items() if layer in keys}
    chances = of_subjects(scored(before.suspects, standing, keys, seconds))
    ranks = chances.rank(method="max")
    sums = torch.zeros(3, len(before.requests), dtype=torch.float64)
    for layer, edit in before.edit.items():
        shift = before.keys[layer] @ edit.T  # (n, d_out)
        for total, looked_at in zip(sums, (before, after), strict=False):
            total += (shift * (looked_at.keys[layer] @ changes[layer].double().T)).sum(1)
        sums[2] += shift.square().sum(1)
    subject = [request.fact.subject.lower() for request in before.requests]
    table = pd.DataFrame({"fact_id": [request.fact.id for request in before.requests]})
    table = table.assign(p=chances[subject].to_numpy(), rank=ranks[subject].to_numpy())
    shares = sums[:2] / sums[2].clamp(min=1e-30)
    return table.assign(share=shares[0], reach=shares[1])
