"""Drift as a distribution, against sums over the vocabulary, one text at a time."""

import pytest

from tests.evaluation import plain
from tests.evaluation.edited import OTHERS, edit_of, loaded, studied
from workbench import evaluation
from workbench.evaluation import locality
from workbench.evaluation.ability import real_text


def places(model, requests) -> dict:
    """(fact, quantity) -> the rows of log-probabilities of each of its prompts or its text."""
    rows: dict = {}
    questions = [request.fact.question for request in requests]
    for request in requests:
        for prompt, _ in request.neighbourhood:
            if prompt not in questions:
                row = plain.log_probs(model, plain.tokens(model, prompt))[-1]
                rows.setdefault((request.fact.id, "neighbourhood"), []).append(row)
    for number, ids in enumerate(real_text(model, locality.ROWS)):
        rows[f"text {number}", "text"] = list(plain.log_probs(model, ids))
    return rows


def check(name, editor, count=5):
    model, requests = loaded(name), studied(count)
    edit = edit_of(name, editor, count)
    table = evaluation.evaluate(model, requests, edit, ["locality"])
    before = places(model, requests)
    with edit.applied(model):
        after = places(model, requests)
    expected = {
        key: plain.mean(map(plain.divergence, rows, after[key])) for key, rows in before.items()
    }
    values = table.set_index(["fact_id", "quantity"]).after
    assert values.to_dict() == pytest.approx(expected, abs=1e-5, rel=1e-3)
    assert (values >= 0).all()
    assert table.before.isna().all()
    return table.groupby("quantity").after.mean()


def test_it_is_the_sum_over_the_vocabulary():
    means = check("world-gpt2", "memit")
    assert means.neighbourhood > 1e-4
    assert means.text > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["world-gpt2", "world-llama"])
@pytest.mark.parametrize("editor", OTHERS)
def test_edits_that_change_no_weight_are_measured_too(editor, name):
    means = check(name, editor)
    if editor == "incontext":  # it stands before what is asked, never before running text
        assert means.text == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_facts():
    check("world-gpt2", "memit", 50)


def test_a_model_is_at_no_distance_from_itself(model, few):
    assert (evaluation.evaluate(model, few, measures=["locality"], base=model).after == 0).all()


def test_rounding_gives_nothing_below_zero(model, few):
    before = locality.ask(model, few)
    nearly = [(*named, row + 1e-6) for *named, row in before]
    assert (locality.compare(before, nearly).value == 0).all()
