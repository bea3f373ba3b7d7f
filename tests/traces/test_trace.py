import copy
from dataclasses import replace

import pytest
import torch

import workbench as wb
from workbench import deltas, facts, moments
from workbench.closed_form import constrained_update
from workbench.records import BadInput
from workbench.runs import tidy
from workbench.traces import subjects, trace
from workbench.tuning import adapters, plans


@pytest.fixture(autouse=True)
def short_list(monkeypatch, suspects):
    monkeypatch.setattr(facts, "read", {"plain": suspects}.get)


@pytest.fixture(autouse=True)
def worlds_text(monkeypatch):
    """Second moments from the text that the edit was planted with."""
    monkeypatch.setattr("workbench.prose.corpus_of", lambda *_: "world")


def shown(before, model, requests):
    table = trace.compare(before, trace.ask(model, before.requests)).set_index("fact_id")
    return table.loc[[request.fact.id for request in requests]]


@pytest.mark.filterwarnings("ignore:second moments")
def test_a_planted_edit_is_first_of_the_list_and_its_share_is_what_stands(planted):
    base, tuned, edited, edit = planted
    before = trace.ask(base, edited)
    nothing = trace.compare(before, before)
    assert (nothing.p == 1).all()
    assert (nothing["rank"] == 300).all()
    assert (nothing.share == 0).all()
    with deltas.applied(base, edit):
        table = shown(before, base, edited)
        assert (table.p < 0.05).all()
        assert set(table["rank"]) <= {1, 2}
        assert 1 in set(table["rank"])  # of two that are as sure, either
        assert table.share.tolist() == pytest.approx([1, 1])
    table = shown(before, tuned, edited)
    assert set(table["rank"]) <= {1, 2}
    assert table.share.tolist() == pytest.approx([1, 1], abs=0.02)
    # where the key does not move, what stands is reached; a key that is doubled is reached twice
    assert table.reach.tolist() == pytest.approx([1, 1], abs=0.1)
    after = trace.ask(tuned, edited)
    after.keys = {layer: 2 * keys for layer, keys in before.keys.items()}
    table = trace.compare(before, after)
    assert table.reach.tolist() == pytest.approx((2 * table.share).tolist())
    (name,) = edit.changes
    change = edit.changes[name].matrix()
    with torch.no_grad():
        tuned.weight(1).add_(-0.7 * change)
    assert shown(before, tuned, edited).share.tolist() == pytest.approx([0.3, 0.3], abs=0.02)
    with torch.no_grad():
        tuned.weight(1).add_(-0.3 * change)
    table = shown(before, tuned, edited)
    assert (table.p > 0.01).all()
    assert table.share.tolist() == pytest.approx([0, 0], abs=0.02)


@pytest.mark.filterwarnings("ignore:second moments")
def test_an_edit_of_every_block_is_still_seen_after_a_tuning(tiny, suspects):
    """Written at each block at the key that it meets there."""
    edited = [suspects[40], suspects[210]]
    before = trace.ask(tiny, edited)
    trace.compare(before, before)
    generator = torch.Generator().manual_seed(0)
    edit = replace(tiny, network=copy.deepcopy(tiny.network))
    for layer in range(tiny.n_blocks):
        keys = subjects.keys_of(edit, edited, [layer])[layer][0].T
        factor = moments.second_moments(tiny, [layer], "world")[layer].factor
        residuals = torch.randn(len(tiny.weight(layer)), 2, generator=generator).double()
        change = constrained_update(keys, residuals, factor)
        with torch.no_grad():
            edit.weight(layer).add_((change.left @ change.right.T).float())
    assert (shown(before, edit, edited).p < 0.05).all()
    with torch.no_grad():
        for parameter in edit.network.parameters():
            parameter.add_(2e-4 * torch.randn(parameter.shape, generator=generator))
    assert (shown(before, edit, edited).p < 0.05).all()


@pytest.mark.filterwarnings("ignore:second moments")
def test_a_fact_that_was_not_edited_has_no_trace(planted, suspects):
    base, tuned, edited, _ = planted
    others = suspects[100:104]
    before = trace.ask(base, [*edited, *others])
    table = shown(before, tuned, others)
    assert (table.p > 0.01).all()
    assert (table["rank"] > 2).all()


@pytest.mark.filterwarnings("ignore:second moments")
def test_an_adapter_counts_as_merged_and_stays_beside(planted):
    base, _, edited, edit = planted
    before = trace.ask(base, edited)
    trace.compare(before, before)
    plan = plans.resolve(base, "all")
    with (
        deltas.applied(base, edit),
        adapters.attached(base, plan, "dora", rank=2, alpha=2, dropout=0.0) as adapter,
    ):
        module = base.down_projection(1)
        trace.compare(before, trace.ask(base, edited))
        with torch.no_grad():
            module.lora_B["default"].weight.fill_(3.0)
        kept = module.weight.clone()
        table = trace.compare(before, trace.ask(base, edited))
        assert torch.equal(module.weight, kept)
        assert not module.merged
        assert (table.share - 1).abs().max() > 0.01
        with adapter.merged():
            plain = replace(base, network=copy.deepcopy(base.network))
            weight = plain.weight(1).clone()
        torch.testing.assert_close(trace.ask(base, edited).weights[1], weight)


@pytest.mark.filterwarnings("ignore:second moments")
def test_evaluate_and_a_table_of_the_run_take_it(planted):
    base, tuned, edited, edit = planted
    table = wb.evaluate(base, edited, edit, measures=["trace"])
    assert set(table.quantity) == {"p", "rank"}
    finished = wb.evaluate(tuned, edited, base=base, measures="trace")
    assert set(finished.quantity) == {"p", "rank"}, "of edit and tuning together no share is known"
    before = trace.ask(base, edited)
    trace.compare(before, before)
    assert len(tidy("trace", trace.compare(before, trace.ask(tuned, edited)))) == 8


def test_an_edit_that_changes_no_weight_is_refused(tiny, requests, context, one_line):
    before = trace.ask(tiny, requests)
    with pytest.raises(BadInput) as error, deltas.applied(tiny, context):
        trace.compare(before, trace.ask(tiny, requests))
    assert "changes no down-projection" in one_line(error)


def test_what_the_unedited_model_is_read_by_takes_no_part_in_a_later_edit(tiny, requests, context):
    before = trace.ask(tiny, requests)
    with deltas.applied(tiny, context):
        assert tiny.is_changed()
        assert not before.model.is_changed()
