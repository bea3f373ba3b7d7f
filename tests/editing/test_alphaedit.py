import dataclasses

import pytest
import torch

from tests.editors import NUMBERS, edited
from workbench import deltas, editing, facts
from workbench.editing import alphaedit


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"null_space": "rank", "threshold": 0.5}, "whole number"),
        ({"null_space": "trace", "threshold": 1.0}, "below 1"),
        ({"ridge": 0}, "ridge"),
    ],
)
def test_thresholds_that_protect_nothing_are_refused(fields, named, one_line):
    with pytest.raises(facts.BadInput) as error:
        editing.EDITORS["alphaedit"].HParams(layers=(1,), **fields)
    assert named in one_line(error)


def test_a_null_space_by_another_rule_is_refused(tiny, requests, one_line):
    module = editing.EDITORS["alphaedit"]
    hparams = module.HParams(**NUMBERS["alphaedit"])
    with pytest.raises(facts.BadInput) as error:
        module.edit(
            tiny,
            requests[:1],
            hparams.model_copy(update={"threshold": 0.2}),
            module.prepare(tiny, hparams),
        )
    assert "trace 0.2" in one_line(error)


def test_only_deltas_with_keys_for_the_same_weights_are_remembered(tiny, requests, one_line):
    hparams = alphaedit.HParams(**NUMBERS["alphaedit"])
    resources = alphaedit.prepare(tiny, hparams)
    delta = alphaedit.edit(tiny, requests[:2], hparams, resources)
    assert alphaedit.remember(resources, delta).memory
    for other in (
        dataclasses.replace(delta, fingerprint="another"),
        edited(tiny, "rome", requests[:1]),
    ):
        with pytest.raises(facts.BadInput) as error:
            alphaedit.remember(resources, other)
        assert "keys to remember" in one_line(error)


def test_a_saved_delta_keeps_the_keys_of_its_edit(tiny, requests, tmp_path):
    delta = edited(tiny, "alphaedit", requests[:2])
    again = deltas.load(deltas.save(delta, tmp_path / "delta.safetensors"))
    assert set(again.keys) == set(delta.keys) == set(delta.changes)
    for name, keys in delta.keys.items():
        assert torch.equal(again.keys[name], keys)
        assert torch.equal(again.changes[name].matrix(), delta.changes[name].matrix())


def test_a_ridge_by_the_trace_is_that_share_of_it(tiny, requests):
    numbers = NUMBERS["alphaedit"] | {"layers": (1,)}
    shared = alphaedit.HParams(**numbers | {"ridge": 0.02, "ridge_unit": "trace"})
    resources = alphaedit.prepare(tiny, shared)
    trace = resources.moments[1].matrix.double().trace().item()
    absolute = shared.model_copy(update={"ridge": 0.02 * trace, "ridge_unit": "absolute"})
    (one,), (other,) = (
        alphaedit.edit(tiny, requests[:2], h, resources).changes.values()
        for h in (shared, absolute)
    )
    assert torch.allclose(one.matrix(), other.matrix(), rtol=1e-5)
    bare = shared.model_copy(update={"ridge_unit": "absolute"})
    (third,) = alphaedit.edit(tiny, requests[:2], bare, resources).changes.values()
    assert not torch.allclose(one.matrix(), third.matrix(), rtol=1e-2)
