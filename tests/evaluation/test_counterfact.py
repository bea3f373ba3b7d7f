"""The scores of CounterFact, against one prompt and one answer at a time."""

import pytest

from tests.evaluation import plain
from tests.evaluation.edited import OTHERS, UNEDITED_AND_EDITED, of_facts
from workbench.evaluation import counterfact
from workbench.facts import BadInput

SHARES = ("efficacy", "paraphrase", "neighbourhood")


def plainly(model, requests) -> dict:
    """(fact, quantity) -> value."""
    values = {}
    questions = [request.fact.question for request in requests]
    for request in requests:
        true, new = request.fact.object, request.target
        near = [pair for pair in request.neighbourhood if pair[0] not in questions]
        asked = {
            "efficacy": [(request.fact.question, new, true)],
            "paraphrase": [(prompt, new, true) for prompt in request.held_out],
            "neighbourhood": [(prompt, answer, new) for prompt, answer in near],
        }
        for quantity, prompts in asked.items():
            if not prompts:
                continue
            wanted = [plain.of_answer(model, prompt, one)[0] for prompt, one, _ in prompts]
            other = [plain.of_answer(model, prompt, one)[0] for prompt, _, one in prompts]
            texts = [plain.written(model, prompt, plain.ANSWER) for prompt, *_ in prompts]
            pairs = list(zip(wanted, other, strict=True))
            said = [plain.says(text, one[1]) for text, one in zip(texts, prompts, strict=True)]
            key = request.fact.id, quantity
            values[key] = plain.mean(a > b for a, b in pairs)
            values[key[0], f"{quantity}_magnitude"] = plain.mean(a - b for a, b in pairs)
            values[key[0], f"{quantity}_exact"] = plain.mean(said)
    return values


def check(model, requests):
    table = counterfact.ask(model, requests)
    values = table.groupby(["fact_id", "quantity"]).value.mean()
    assert values.to_dict() == pytest.approx(plainly(model, requests), abs=1e-5)
    magnitude = table.quantity.str.endswith("_magnitude")
    assert table.value[magnitude].between(-1, 1).all()
    assert table.value[~magnitude].isin([0, 1]).all()
    return of_facts(table)


@pytest.mark.parametrize("editor", UNEDITED_AND_EDITED)
def test_it_is_what_one_prompt_at_a_time_gives(after, editor):
    model, requests = after(editor)
    means = check(model, requests)
    if not editor:
        assert means.efficacy == means.efficacy_exact == 0
        assert means.neighbourhood == means.neighbourhood_exact == 1
    else:
        assert means.efficacy > 0.8


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


def test_a_neighbour_that_is_edited_itself_is_not_asked(model, few):
    first, second = few[0], few[1]
    near = {
        "neighbourhood": ((second.fact.question, second.fact.object), ("Paris is in", "France"))
    }
    first = first.model_copy(update=near)
    prompts = [prompt for _, prompt, _ in counterfact.near([first, second])]
    assert second.fact.question not in prompts
    assert "Paris is in" in prompts
    assert second.fact.question in [prompt for _, prompt, _ in counterfact.near([first])]


def test_a_fact_without_its_true_object_is_refused(model, few, one_line):
    fact = few[0].fact.model_copy(update={"object": ""})
    with pytest.raises(BadInput) as error:
        counterfact.ask(model, [few[0].model_copy(update={"fact": fact})])
    assert "no true object" in one_line(error)
