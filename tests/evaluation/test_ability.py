"""General ability, against the loss a token and counts of n-grams by hand."""

import math

import pytest

from tests.evaluation import plain
from tests.evaluation.edited import OTHERS, UNEDITED_AND_EDITED
from workbench.evaluation import ability
from workbench.positions import front
from workbench.tuning import tasks


def plainly(model, requests) -> dict:
    values = {}
    for number, ids in enumerate(ability.real_text(model, ability.ROWS)):
        rows = plain.log_probs(model, ids)
        first = max(1, len(front(model)))
        losses = [-rows[place - 1, ids[place]].item() for place in range(first, len(ids))]
        values[f"text {number}", "loss"] = plain.mean(losses)
    for request in requests:
        text = plain.written(model, request.fact.question, ability.WRITTEN)
        values[request.fact.id, "entropy"] = plain.entropy(text.split())
    return values


def check(model, requests):
    table = ability.ask(model, requests)
    values = table.set_index(["fact_id", "quantity"]).value
    assert values.to_dict() == pytest.approx(plainly(model, requests), rel=1e-4)
    assert (table.value >= 0).all()
    assert (table.value[table.quantity == "entropy"] <= math.log2(ability.WRITTEN)).all()


@pytest.mark.parametrize("editor", UNEDITED_AND_EDITED)
def test_it_is_what_one_text_at_a_time_gives(after, editor):
    model, requests = after(editor)
    check(model, requests[1:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["world-gpt2", "world-llama"])
@pytest.mark.parametrize("editor", OTHERS)
def test_edits_that_change_no_weight_are_measured_too(after, editor, name):
    check(*after(editor, name))


@pytest.mark.slow
@pytest.mark.parametrize("editor", UNEDITED_AND_EDITED)
@pytest.mark.timeout(1800)
def test_fifty_facts(after, editor):
    check(*after(editor, count=50))


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        ("", 0),
        ("one two", 0),
        ("a a a a a a a a", 0),
        ("a b c d e", math.log2(4) / 3 + 2 * math.log2(3) / 3),
        ("a b a b a", 1 / 3 + 2 / 3 * (math.log2(3) - 2 / 3)),
    ],
)
def test_entropy_of_what_can_be_counted_by_hand(words, bits):
    assert ability.entropy(words.split()) == pytest.approx(bits)


def test_the_text_is_none_that_a_study_tunes_on(model):
    rows = ability.real_text(model, ability.ROWS)
    assert len(rows) == ability.ROWS
    assert all(tuple(row[: len(front(model))]) == front(model) for row in rows)
    data = tasks.Data(n_train=100, n_valid=10)
    task = tasks.TASKS["text"](model, data)
    tuned_on = {tuple(row) for part in (task.train, task.valid) for row in part["input_ids"]}
    assert not tuned_on & {tuple(row) for row in rows}
