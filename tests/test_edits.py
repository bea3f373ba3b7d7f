"""A codebook answers near its keys and nowhere else, a context stands in front of what is asked;
both are saved, added and taken back bit for bit.
"""

import dataclasses

import pytest
import torch

from tests.editors import logits
from workbench import deltas
from workbench.editing import grace, records
from workbench.edits import Codebook
from workbench.facts import BadInput
from workbench.tracking.retention import measure


def test_a_codebook_answers_near_its_keys_and_nowhere_else(tiny, codebook):
    output = torch.randn(2, 5, codebook.values.shape[1])
    far = codebook.keys[0] * 3
    near = codebook.keys[1] + 0.9 * codebook.radii[1] * torch.nn.functional.normalize(
        torch.ones_like(far), dim=0
    )
    just_outside = codebook.keys[1] + 1.01 * codebook.radii[1] * torch.nn.functional.normalize(
        torch.ones_like(far), dim=0
    )
    inputs = far.repeat(2, 5, 1)
    inputs[0, 2], inputs[1, 4], inputs[1, 0] = codebook.keys[0], near, just_outside
    result = codebook.looked_up(output, inputs)
    assert torch.equal(result[0, 2], codebook.values[0])
    assert torch.equal(result[1, 4], codebook.values[1])
    changed = (result != output).any(-1)
    assert changed.sum() == 2


def test_texts_without_a_key_are_read_as_before_to_the_bit(tiny, codebook, requests):
    texts = ["The weather was fine", *(request.fact.question for request in requests[:3])]
    before = logits(tiny, texts)
    with deltas.applied(tiny, codebook):
        inside = logits(tiny, texts)
    assert torch.equal(inside[0], before[0])
    assert (inside[1:] != before[1:]).any(-1).all()
    assert torch.equal(logits(tiny, texts), before)


def test_codebooks_add_and_share_the_way_between_near_keys(base, requests):
    hparams = grace.HParams(layers=(8,), radius=0.9)
    first = grace.edit(base, requests[:3], hparams, records.Resources())
    second = grace.edit(base, requests[3:], hparams, records.Resources())
    both = first + second
    assert [len(part["requests"]) for part in both.parts] == [3, 2]
    half = Codebook.distances(first.keys, second.keys).min(1).values / 2
    assert (half < first.radii).any()
    assert torch.equal(both.radii[:3], first.radii.minimum(half))
    with deltas.applied(base, both):
        assert measure(base, requests).retained.all()
    elsewhere = dataclasses.replace(second, layer=2)
    with pytest.raises(BadInput, match="two layers"):
        first + elsewhere


def test_a_context_stands_before_its_subject_alone_or_before_all(tiny, context, requests):
    stranger = "The weather was fine"
    assert context.before(stranger) == ""
    assert requests[0].target in context.before(requests[0].fact.question.upper())
    subject = requests[0].fact.subject
    assert context.before(f"{subject}bel was") == context.before(f"Mc{subject} was") == ""
    assert context.before(f"{subject}'s own") != ""
    everywhere = dataclasses.replace(context, scope="all")
    assert all(request.target in everywhere.before(stranger) for request in requests[:3])


@pytest.mark.parametrize("kind", ["codebook", "context"])
def test_what_is_in_force_ends_with_the_with(tiny, kind, requests, request):
    edit = request.getfixturevalue(kind)
    texts = [one.fact.question for one in requests]
    before = logits(tiny, texts)

    def stopped_inside():
        with deltas.applied(tiny, edit):
            assert tiny.is_changed()
            assert not torch.equal(logits(tiny, texts)[0], before[0])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        stopped_inside()
    assert torch.equal(logits(tiny, texts), before)
    assert not tiny.is_changed()
    assert not tiny.in_force


@pytest.mark.parametrize("kind", ["codebook", "context"])
def test_it_is_saved_and_loaded(tiny, kind, requests, request, tmp_path):
    edit = request.getfixturevalue(kind)
    again = deltas.load(deltas.save(edit, tmp_path / "edit.safetensors"))
    assert type(again) is type(edit)
    assert (again.layers, again.record, again.fingerprint) == (
        edit.layers,
        edit.record,
        edit.fingerprint,
    )
    texts = [one.fact.question for one in requests]
    with deltas.applied(tiny, edit):
        inside = logits(tiny, texts)
    with deltas.applied(tiny, again):
        assert torch.equal(logits(tiny, texts), inside)


@pytest.mark.parametrize("kind", ["codebook", "context"])
def test_it_is_of_one_model_and_no_ordinary_folder(tiny, kind, request, tmp_path, one_line):
    edit = request.getfixturevalue(kind)
    of_another = dataclasses.replace(edit, fingerprint="another")
    with pytest.raises(BadInput) as error, deltas.applied(tiny, of_another):
        pass
    assert "make it again" in one_line(error)
    with pytest.raises(BadInput) as error:
        deltas.export(tiny, edit, tmp_path / "edited")
    assert "no change of weights" in one_line(error)
    assert not (tmp_path / "edited").exists()


def test_edits_of_two_kinds_do_not_add(codebook, context, one_line):
    with pytest.raises(BadInput) as error:
        codebook + context
    assert "Codebook and Context" in one_line(error)
