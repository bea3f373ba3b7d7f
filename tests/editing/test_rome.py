import pytest
import torch

from tests.editors import edited
from workbench import facts
from workbench.editing import rome, target_vectors


def test_rome_puts_out_exactly_the_solved_value(tiny, requests):
    """(W + D) k = v* for the key that the edit used."""
    hparams = rome.HParams(layers=(1,), steps=5, prefixes=4)
    resources = rome.prepare(tiny, hparams)
    delta = rome.edit(tiny, requests[:1], hparams, resources)
    keys, outputs, _, bare = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)
    solution = target_vectors.solve(tiny, requests[:1], 1, "mlp", resources.prefixes, hparams)
    (change,) = delta.changes.values()
    moved = outputs + keys @ change.matrix().double().T
    assert torch.allclose(moved, bare + solution.shift.double(), atol=1e-4)
    assert not torch.allclose(outputs, bare + solution.shift.double(), atol=1e-2)
    assert torch.linalg.matrix_rank(change.matrix()) == 1


def test_rome_without_moments_needs_none(tiny, requests):
    """C = I: the change lies along the key."""
    hparams = rome.HParams(layers=(1,), steps=5, prefixes=2, moments="identity")
    resources = rome.prepare(tiny, hparams)
    assert not resources.moments
    (change,) = rome.edit(tiny, requests[:1], hparams, resources).changes.values()
    key = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)[0][0].float()
    assert torch.cosine_similarity(change.right[:, 0], key, dim=0) > 1 - 1e-6


def test_the_bare_prompt_may_have_a_share_of_romes_key(tiny, requests):
    hparams = rome.HParams(layers=(1,), steps=5, prefixes=4, bare_share=1.0)
    resources = rome.prepare(tiny, hparams)
    (change,) = rome.edit(tiny, requests[:1], hparams, resources).changes.values()
    _, _, key, out = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)
    solution = rome.targets(tiny, requests[:1], hparams, resources)
    moved = out + key @ change.matrix().double().T
    assert torch.allclose(
        moved, out + solution.shift.double(), atol=1e-4
    )  # met at the bare prompt itself
    mean = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)[0]
    half = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes, 0.5)[0]
    others = (mean * 5 - key) / 4
    assert torch.allclose(half, key / 2 + others / 2, rtol=1e-6)


def test_more_facts_than_fit_exactly_are_refused(tiny, one_line):
    many = [request for request in facts.read("world") if request.fact.split == "study"][:300]
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "rome", many)
    assert "300 facts" in one_line(error)
