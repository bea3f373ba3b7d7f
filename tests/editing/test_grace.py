import pytest
import torch

from workbench import deltas, facts
from workbench.editing import grace, records
from workbench.tracking.retention import measure


def test_a_codebook_solves_its_values(base, requests):
    edit = grace.edit(base, requests, grace.HParams(layers=(8,)), records.Resources())
    solved = [outcome["p_solved"] for outcome in edit.record["outcomes"]]
    assert min(solved) > 0.9
    assert not measure(base, requests).retained.any()
    with deltas.applied(base, edit):
        table = measure(base, requests)
    assert table.retained.all()
    assert table.p.tolist() == pytest.approx(solved, rel=1e-3)


def test_no_key_answers_half_way_to_a_key_of_another_request():
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0]])
    hparams = grace.HParams(layers=(1,), radius=2, radius_unit="absolute")
    assert grace.radii(keys, torch.tensor([0, 1, 2]), hparams).tolist() == [0.5, 0.5, 2]
    assert grace.radii(keys, torch.tensor([0, 0, 1]), hparams).tolist() == [2, 2, 2]


def test_paraphrases_are_keys_with_the_value_of_their_request(tiny, requests):
    wider = facts.with_paraphrases(requests[0], 3)
    edit = grace.edit(
        tiny, [wider, requests[1]], grace.HParams(layers=(1,), steps=2), records.Resources()
    )
    assert len(edit.keys) == 4
    assert torch.equal(edit.values[0], edit.values[2])
    assert not torch.equal(edit.values[0], edit.values[3])
