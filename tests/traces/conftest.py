import copy
from dataclasses import replace

import pytest
import torch

from workbench import deltas, facts, moments
from workbench.closed_form import constrained_update
from workbench.deltas import Change, WeightDelta
from workbench.traces import subjects

LAYER = 1


@pytest.fixture(scope="module")
def suspects():
    """Facts of 300 subjects, all of whose last words differ."""
    by_word = {}
    for request in facts.read("world"):
        by_word.setdefault(request.fact.subject.split()[-1].lower(), request)
    return list(by_word.values())[:300]


@pytest.fixture
def planted(tiny, suspects):
    """(base, tuned, edited facts, the edit): two facts written at block 1 as ROME writes, then all
    weights moved a little.
    """
    edited = [suspects[40], suspects[210]]
    generator = torch.Generator().manual_seed(0)
    keys = subjects.keys_of(tiny, edited, [LAYER])[LAYER][0].T
    residuals = torch.randn(tiny.weight(LAYER).shape[0], 2, generator=generator).double()
    factor = moments.second_moments(tiny, [LAYER], "world")[LAYER].factor
    left, right = constrained_update(keys, 4 * residuals, factor)
    name = tiny.down_projection_name(LAYER)
    edit = WeightDelta.of(tiny, changes={name: Change(left=left.float(), right=right.float())})
    tuned = replace(tiny, network=copy.deepcopy(tiny.network))
    deltas.write(tuned, edit)
    with torch.no_grad():
        for parameter in tuned.network.parameters():
            parameter.add_(2e-4 * torch.randn(parameter.shape, generator=generator))
    return tiny, tuned, edited, edit
