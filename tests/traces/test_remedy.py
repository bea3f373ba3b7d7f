import copy
from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench import deltas
from workbench.models import load
from workbench.positions import encode
from workbench.records import BadInput
from workbench.traces import remedy, subjects
from workbench.tracking.retention import next_logits


def logits(model, requests):
    return next_logits(model, encode(model, [one.fact.question for one in requests]))


def bits(model):
    return {name: weight.clone() for name, weight in model.network.state_dict().items()}


def test_what_was_written_is_taken_out_and_tuning_stays(planted):
    base, tuned, edited, _ = planted
    before = bits(tuned)
    plain, spoilt = logits(base, edited), logits(tuned, edited)
    assert (spoilt - plain).norm() > 0.3 * plain.norm()
    with deltas.applied(tuned, wb.traces.removed(tuned, base)):
        assert (logits(tuned, edited) - plain).norm() < 0.03 * plain.norm()
        left = tuned.weight(1) - base.weight(1)
        assert left.norm() == pytest.approx(2e-4 * left.numel() ** 0.5, rel=0.1)  # the tuning
    after = bits(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_of_two_is_taken_out_alone(planted):
    base, tuned, edited, _ = planted
    keys = subjects.keys_of(base, edited, [1])[1][0].float()  # (2, d_in)
    first, second = ((tuned.weight(1) - base.weight(1)) @ keys.T).T.clone()
    with deltas.applied(tuned, wb.traces.removed(tuned, base, edited[:1], corpus="world")):
        shifts = ((tuned.weight(1) - base.weight(1)) @ keys.T).T
        assert shifts[0].norm() < 0.02 * first.norm()
    overlap = abs(torch.nn.functional.cosine_similarity(keys[0], keys[1], dim=0).item())
    assert (shifts[1] - second).norm() < max(0.5, overlap) * (first.norm() + second.norm())


def test_facts_of_one_subject_and_whole_lists_are_taken(planted, suspects):
    """The list that `inspect` takes, of which the named are meant; several facts of a subject."""
    base, tuned, edited, edit = planted
    (name,) = edit.changes
    whole = wb.traces.removed(tuned, base, corpus="world").changes[name].matrix()
    for facts in (suspects, [*edited, edited[0]]):
        part = wb.traces.removed(tuned, base, facts, corpus="world").changes[name].matrix()
        assert (part - whole).norm() < 0.05 * whole.norm()


def test_what_was_written_at_the_prompts_end_is_taken_out_there(tiny, suspects):
    """As MALMEN writes; at the subject nothing would be taken out."""
    edited = [suspects[40], suspects[210]]
    keys = subjects.keys_of(tiny, edited, [1])[1][1].float()  # (2, d_in)
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(tiny.weight(1).shape[0], 2, generator=generator)
    tuned = replace(tiny, network=copy.deepcopy(tiny.network))
    with torch.no_grad():
        tuned.weight(1).add_(residuals @ torch.linalg.pinv(keys.T))
        for parameter in tuned.network.parameters():
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=generator))
    for facts in (edited, suspects):
        with deltas.applied(tuned, wb.traces.removed(tuned, tiny, facts, corpus="world")):
            left = (tuned.weight(1) - tiny.weight(1)) @ keys.T
            assert left.norm() < 0.05 * residuals.norm()


def test_what_a_change_may_cost_is_asked_of_others_that_are_known(tiny, suspects, monkeypatch):
    def answers(base, requests, against):
        known = [not request.fact.id.endswith("a") for request in requests]
        return pd.DataFrame({"retained": known})

    monkeypatch.setattr(remedy, "measure", answers)
    monkeypatch.setattr(remedy, "read", lambda source: suspects)
    watched = remedy.known(tiny, suspects[:150])
    assert watched
    assert len(watched) <= remedy.WATCHED
    assert not {one.fact.subject for one in watched} & {one.fact.subject for one in suspects[:150]}
    assert not any(one.fact.id.endswith("a") for one in watched)


def test_what_was_not_written_is_not_taken_out(planted, suspects, one_line):
    base, tuned, edited, _ = planted
    others = [one for one in suspects if one not in edited]
    for facts, said in ((others[5:7], "was not written there"), (others, "nobody of the list")):
        with pytest.raises(BadInput) as error:
            wb.traces.removed(tuned, base, facts, corpus="world")
        assert said in one_line(error)
    with pytest.raises(BadInput) as error:
        wb.traces.restored(tuned, base, strength=float("nan"))
    assert "finite" in one_line(error)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_strength_is_in_units_of_what_is_there(planted, strength):
    base, tuned, _, edit = planted
    (name,) = edit.changes
    change = wb.traces.restored(tuned, base, strength=strength).changes[name].matrix()
    planted_change = edit.changes[name].matrix()
    error = (change - strength * planted_change).norm()
    assert error < 0.02 * strength * planted_change.norm()


def test_where_nothing_stands_out_there_is_nothing_to_take_out(tiny, one_line):
    base = load(tiny.name, device="cpu")
    with torch.no_grad():
        for parameter in tiny.network.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    with pytest.raises(BadInput) as error:
        wb.traces.removed(tiny, base)
    assert "stands out" in one_line(error)


def test_what_is_said_under_each_change_stands_side_by_side(planted):
    base, tuned, edited, edit = planted
    changes = {"as it is": None, "edited": edit}
    table = wb.traces.compared(base, changes, edited, edited[:1])
    assert list(table.index) == list(changes)
    for name, change in changes.items():
        with deltas.applied(base, change) if change else nullcontext():
            for column, requests, against in (
                ("new", edited, "target"),
                ("true", edited, "object"),
                ("watched", edited[:1], "object"),
            ):
                said = wb.retention(base, requests, against=against).retained.mean()
                assert table.loc[name, column] == said
    assert list(wb.traces.compared(tuned, {"tuned": None}, edited)) == ["new", "true"]
