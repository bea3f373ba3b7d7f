"""Edits that change no weight: a codebook answers near its keys and nowhere else, a context stands
in front of what is asked; both are saved, added and taken back bit for bit.
"""

import dataclasses

import pytest
import torch

from workbench import deltas, facts, models, study
from workbench.editing import grace, incontext, records
from workbench.edits import Codebook
from workbench.facts import BadInput
from workbench.known import known_table
from workbench.positions import encode
from workbench.tracking.probes import Probe, questions
from workbench.tracking.retention import measure, next_logits


@pytest.fixture(scope="module")
def requests():
    return [request for request in facts.read("world") if request.fact.split == "study"][:300:60]


@pytest.fixture(scope="module")
def world():
    return models.load("world-gpt2", device="cpu")


@pytest.fixture
def codebook(tiny, requests):
    hparams = grace.HParams(layers=(1,), steps=25)
    return grace.edit(tiny, requests[:3], hparams, records.Resources())


@pytest.fixture
def context(tiny, requests):
    return incontext.edit(tiny, requests[:3], incontext.HParams(), records.Resources())


def logits(model, texts):
    with torch.no_grad():
        return next_logits(model, encode(model, texts))


def test_a_codebook_solves_its_values(world, requests):
    edit = grace.edit(world, requests, grace.HParams(layers=(8,)), records.Resources())
    solved = [outcome["p_solved"] for outcome in edit.record["outcomes"]]
    assert min(solved) > 0.9
    assert not measure(world, requests).retained.any()
    with deltas.applied(world, edit):
        table = measure(world, requests)
    assert table.retained.all()
    assert table.p.tolist() == pytest.approx(solved, rel=1e-3)


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


def test_codebooks_add_and_share_the_way_between_near_keys(world, requests):
    hparams = grace.HParams(layers=(8,), radius=0.9)
    first = grace.edit(world, requests[:3], hparams, records.Resources())
    second = grace.edit(world, requests[3:], hparams, records.Resources())
    both = first + second
    assert [len(part["requests"]) for part in both.parts] == [3, 2]
    half = Codebook.distances(first.keys, second.keys).min(1).values / 2
    assert (half < first.radii).any()
    assert torch.equal(both.radii[:3], first.radii.minimum(half))
    with deltas.applied(world, both):
        assert measure(world, requests).retained.all()
    elsewhere = dataclasses.replace(second, layer=2)
    with pytest.raises(BadInput, match="two layers"):
        first + elsewhere


def test_a_context_is_what_one_would_have_asked(tiny, context, requests):
    request = requests[0]
    target = f"{request.fact.question} {request.target}"
    by_hand = f"New Fact: {target}.\nPrompt: {request.fact.question}"
    with deltas.applied(tiny, context):
        inside = encode(tiny, [request.fact.question])
        result = logits(tiny, [request.fact.question])
    whole = encode(tiny, [by_hand]).input_ids
    assert torch.equal(inside.input_ids, whole)
    end = len(request.fact.question)
    assert inside.offsets[0][-1][1] == end
    assert inside.token_at(0, end - 1) == whole.shape[1] - 1
    expected = tiny.network(input_ids=whole).logits[0, -1].float()
    assert torch.allclose(result[0], expected, atol=1e-5)


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


def test_what_the_model_says_inside_is_not_kept_as_what_it_knows(tiny, context, requests):
    before = known_table(tiny, requests[:3])
    statements = context.statements[:1]
    with deltas.applied(tiny, dataclasses.replace(context, statements=statements, scope="all")):
        inside = known_table(tiny, requests[:3])
    assert not inside.p.equals(before.p)
    assert known_table(tiny, requests[:3]).p.equals(before.p)


def test_a_look_sees_the_context_that_is_in_force(tiny, context, requests):
    probe = Probe(tiny, questions(requests[:3], []))
    before = probe.look(-1).probes
    with deltas.applied(tiny, context):
        inside = probe.look(0).probes
        fresh = Probe(tiny, questions(requests[:3], [])).look(0).probes
    assert not inside.p_answer.equals(before.p_answer)
    assert inside.p_answer.tolist() == fresh.p_answer.tolist()
    assert probe.look(1).probes.p_answer.tolist() == before.p_answer.tolist()


@pytest.mark.parametrize("editor", ["grace", "incontext"])
def test_a_run_of_it_is_written_and_read(tiny_folders, editor, tmp_path):
    layers = {"layers": (1,), "hparams": {"steps": 3}} if editor == "grace" else {}
    spec = study.Spec(
        model=str(tiny_folders["gpt2"]),
        editor=editor,
        **layers,
        margin=0,
        fact="developer:windows-mobile-6-5",
        n_edited=1,
        n_intrinsic=0,
        plan="window:0-0",
        n_train=4,
        n_valid=2,
        max_steps=2,
        eval_every=1,
        batch_size=2,
    )
    run = study.run(spec, out=tmp_path)
    assert run.about["layers"] == list(spec.layers)
    assert deltas.load(run.deltas[0]).record["editor"] == editor
    assert set(run.probes.step) == {-1, 0, 1, 2}
