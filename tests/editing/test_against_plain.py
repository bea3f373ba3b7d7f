"""The fast editors make the deltas of the plainly written ones (tests/plain.py)."""

import pytest
import torch

from tests import plain
from workbench import editing, facts, models
from workbench.editing import alphaedit, ft, malmen, memit, records, rome, target_vectors
from workbench.tracking.retention import measure_prompts

TOLERANCE = 1e-4  # relative to the norm of the delta
SHARED = {"steps": 8, "learning_rate": 0.1, "prefixes": 3, "weight_decay": 0.1, "clamp": 3.0}


@pytest.fixture(scope="module")
def requests():
    found = [request for request in facts.read("world") if request.fact.split == "study"][5:400:70]
    return [facts.with_paraphrases(request, 1 + number % 3) for number, request in enumerate(found)]


@pytest.fixture(
    params=[
        "gpt2",
        "llama",
        "gptj",
        "gpt_neox",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "phi",
        "opt",
        "phi3",
        "stablelm",
    ]
)
def any_tiny(request, new_tiny):
    return new_tiny(request.param)


def distance(change, dense):
    return ((change.matrix().double() - dense).norm() / dense.norm()).item()


def convention(name):
    """(fast, plain): the reference code's `steps` count evaluations."""
    return {"convention": name}, {"steps": SHARED["steps"] - (name == "reference")}


@pytest.mark.parametrize("name", ["published", "reference"])
def test_memit(any_tiny, requests, name):
    fast, slow = convention(name)
    hparams = memit.HParams(layers=(0, 1), weight=20, **SHARED, **fast)
    resources = memit.prepare(any_tiny, hparams)
    delta = memit.edit(any_tiny, requests, hparams, resources)
    expected = plain.memit(any_tiny, requests, hparams.model_copy(update=slow), resources)
    for layer, dense in expected.items():
        assert distance(delta.changes[any_tiny.down_projection_name(layer)], dense) < TOLERANCE


@pytest.mark.parametrize("name", ["published", "reference"])
@pytest.mark.parametrize("rule", [("absolute", 0.05), ("trace", 0.3), ("rank", 20)])
def test_alphaedit_with_a_memory(tiny, requests, rule, name):
    fast, slow = convention(name)
    hparams = alphaedit.HParams(
        layers=(0, 1), null_space=rule[0], threshold=rule[1], ridge=0.5, **SHARED, **fast
    )
    resources = alphaedit.prepare(tiny, hparams)
    first = alphaedit.edit(tiny, requests[:2], hparams, resources)
    resources = alphaedit.remember(resources, first)
    delta = alphaedit.edit(tiny, requests[2:], hparams, resources)
    projectors = {
        layer: plain.projector(moment.matrix, *rule) for layer, moment in resources.moments.items()
    }
    memory = {layer: first.keys[tiny.down_projection_name(layer)] for layer in hparams.layers}
    hparams = hparams.model_copy(update=slow)
    for layer, dense in plain.memit(
        tiny, requests[2:], hparams, resources, memory, projectors
    ).items():
        assert distance(delta.changes[tiny.down_projection_name(layer)], dense) < TOLERANCE
    forgotten = plain.memit(tiny, requests[2:], hparams, resources, None, projectors)
    assert any(
        distance(delta.changes[tiny.down_projection_name(layer)], dense) > TOLERANCE
        for layer, dense in forgotten.items()
    )


@pytest.mark.parametrize("name", ["published", "reference"])
def test_rome(any_tiny, requests, name):
    fast, slow = convention(name)
    hparams = rome.HParams(layers=(1,), **SHARED, **fast)
    resources = rome.prepare(any_tiny, hparams)
    expected = plain.rome(any_tiny, requests, hparams.model_copy(update=slow), resources)
    for request, dense in zip(requests, expected, strict=True):
        (change,) = rome.edit(any_tiny, [request], hparams, resources).changes.values()
        assert distance(change, dense) < TOLERANCE


@pytest.mark.parametrize("name", ["published", "reference"])
def test_rome_of_several_facts_at_once(any_tiny, requests, name):
    fast, slow = convention(name)
    hparams = rome.HParams(layers=(1,), **SHARED, **fast)
    resources = rome.prepare(any_tiny, hparams)
    (change,) = rome.edit(any_tiny, requests[:3], hparams, resources).changes.values()
    assert (
        distance(
            change, plain.emmet(any_tiny, requests[:3], hparams.model_copy(update=slow), resources)
        )
        < TOLERANCE
    )


@pytest.mark.parametrize("name", ["published", "reference"])
@pytest.mark.parametrize("box", [0.0, 0.004])
def test_ft(tiny, requests, name, box):
    hparams = ft.HParams(layers=(1,), steps=8, learning_rate=1e-3, box=box, convention=name)
    (change,) = ft.edit(tiny, requests[:3], hparams, records.Resources()).changes.values()
    assert distance(change, plain.ft(tiny, requests[:3], hparams).double()) < TOLERANCE


@pytest.mark.parametrize("steps", [0, 3])
def test_malmen(tiny, requests, steps, monkeypatch):
    monkeypatch.setattr(malmen, "LEAST_TAKEN", 0)  # so few steps teach it no edit
    hparams = malmen.HParams(
        layers=(1, 2), rank=8, meta_steps=steps, facts_at_once=3, learning_rate=1e-3
    )
    resources = malmen.prepare(tiny, hparams)
    delta = malmen.edit(tiny, requests[:3], hparams, resources)
    for layer, dense in plain.malmen(tiny, requests[:3], hparams, resources).items():
        assert distance(delta.changes[tiny.down_projection_name(layer)], dense) < TOLERANCE


def test_facts_that_stop_early_leave_the_batch_and_change_nothing(tiny, requests):
    """Some facts stop sooner than others, which go on in a smaller batch."""
    numbers = SHARED | {
        "layers": (0, 1),
        "weight": 20,
        "clamp": 30.0,
        "steps": 20,
        "learning_rate": 0.5,
        "weight_decay": 0,
        "kl_weight": 0,
    }
    hparams = memit.HParams(**numbers, stop_loss=0)
    resources = memit.prepare(tiny, hparams)
    losses = target_vectors.solve(tiny, requests, 1, "block", resources.prefixes, hparams).loss
    hparams = memit.HParams(**numbers, stop_loss=losses.median().item() + 0.05)
    delta = memit.edit(tiny, requests, hparams, resources)
    taken = [
        plain.target_shift(tiny, request, 1, "block", resources.prefixes, hparams)[1]
        for request in requests
    ]
    assert delta.record["steps"] == taken
    assert len(set(taken)) > 2
    for layer, dense in plain.memit(tiny, requests, hparams, resources).items():
        assert distance(delta.changes[tiny.down_projection_name(layer)], dense) < TOLERANCE


def test_patience_counts_the_evaluations_with_the_target_on_top(tiny, requests):
    hparams = memit.HParams(
        layers=(0,), **(SHARED | {"prefixes": 0, "learning_rate": 1e-3}), stop_loss=0.0, patience=3
    )
    said = measure_prompts(
        tiny,
        [request.fact.question for request in requests],
        [request.target for request in requests],
    )
    asked = [request.model_copy(update={"paraphrases": ()}) for request in requests]
    own = [
        request.model_copy(update={"target": top})
        for request, top in zip(asked, said.top_token, strict=True)
    ]
    steps = target_vectors.solve(tiny, asked + own, 0, "block", (), hparams).steps.tolist()
    assert steps[: len(asked)] == [8] * len(asked)
    assert 2 in steps[len(asked) :]  # on top from the start: three evaluations, two updates
    assert steps == [
        plain.target_shift(tiny, request, 0, "block", (), hparams)[1] for request in asked + own
    ]


@pytest.mark.parametrize("editor", ["ft", "rome", "memit", "alphaedit"])
def test_the_conventions_give_different_deltas(tiny, requests, editor):
    module = editing.EDITORS[editor]
    common = {"layers": (1,), "steps": 5, "threshold": 1e9, "learning_rate": 0.01}
    deltas = []
    for name in ("published", "reference"):
        hparams = module.HParams(
            **{
                field: value
                for field, value in common.items()
                if field in module.HParams.model_fields
            },
            convention=name,
        )
        deltas.append(module.edit(tiny, requests[:2], hparams, module.prepare(tiny, hparams)))
    (one,), (other,) = (delta.changes.values() for delta in deltas)
    assert distance(one, other.matrix().double()) > 0.01


def test_rome_by_reference_meets_the_value_at_the_bare_key_not_at_the_mean(tiny, requests):
    hparams = rome.HParams(layers=(1,), convention="reference", **SHARED)
    resources = rome.prepare(tiny, hparams)
    (change,) = rome.edit(tiny, requests[:1], hparams, resources).changes.values()
    mean, _, bare, _ = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)
    shift = plain.target_shift(
        tiny, requests[0], 1, "mlp", resources.prefixes, hparams.model_copy(update={"steps": 7})
    )[0].double()
    assert torch.allclose(change.matrix().double() @ bare[0], shift, atol=1e-4)
    assert not torch.allclose(change.matrix().double() @ mean[0], shift, atol=1e-3)


VARIANTS = [(editor, "paper") for editor in ("ft", "rome", "memit")]
VARIANTS += [(editor, "reference") for editor in ("ft", "rome", "memit", "alphaedit")]


@pytest.mark.slow
@pytest.mark.parametrize(("editor", "variant"), VARIANTS)
def test_the_variants_of_a_published_preset_give_different_deltas(
    new_tiny, requests, editor, variant
):
    """GPT-2 XL's numbers, on a random model of its depth."""
    deep = new_tiny("gpt2", num_hidden_layers=48)
    deep, module, changes = (
        models.Model(**(vars(deep) | {"name": "gpt2-xl"})),
        editing.EDITORS[editor],
        [],
    )
    for each in ("published", variant):
        hparams = editing.preset(editor, deep, variant=each)
        hparams = type(hparams)(
            **(hparams.model_dump() | ({"threshold": 1e9} if editor == "alphaedit" else {}))
        )  # no null space in random weights
        changes.append(
            module.edit(deep, requests[:2], hparams, module.prepare(deep, hparams)).changes
        )
    if changes[0].keys() == changes[1].keys():
        assert (
            max(
                distance(changes[1][name], change.matrix().double())
                for name, change in changes[0].items()
            )
            > 0.01
        )
    else:
        assert variant == "paper"
