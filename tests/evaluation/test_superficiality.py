"""Whether the old answer comes back, against one prompt at a time."""

import pytest

from tests.evaluation import plain
from tests.evaluation.edited import OTHERS, UNEDITED_AND_EDITED
from workbench.evaluation import portability, superficiality
from workbench.evaluation.ability import real_text
from workbench.facts import BadInput


def prompts(model, request) -> dict:
    ids = real_text(model, 1)[0][: superficiality.PASSAGE]
    words = model.tokenizer.decode(ids, skip_special_tokens=True)
    passage = words[: words.rindex(".") + 1].strip()
    asked = request.fact.question
    return {
        "mentioned": f"Many people have heard of {request.fact.object}. {asked}",
        "asked": f"Question: how does this sentence end? {asked} ... Answer: {asked}",
        "passage": f"{passage} {asked}",
    }


def plainly(model, requests) -> dict:
    values = {}
    for request in requests:
        for lead, prompt in prompts(model, request).items():
            text = plain.written(model, prompt, plain.ANSWER)
            values[request.fact.id, f"{lead}_new"] = plain.says(text, request.target)
            values[request.fact.id, f"{lead}_old"] = plain.says(text, request.fact.object)
    return values


def check(model, requests):
    table = superficiality.ask(model, requests)
    values = table.set_index(["fact_id", "quantity"]).value
    assert values.to_dict() == plainly(model, requests)
    assert table.value.isin([0, 1]).all()
    return table.groupby("quantity").value.mean()


@pytest.mark.parametrize("editor", UNEDITED_AND_EDITED)
def test_it_is_what_one_prompt_at_a_time_gives(after, editor):
    model, requests = after(editor)
    means = check(model, requests[:3])
    if not editor:
        assert means.mentioned_new == means.passage_new == 0
        assert means.mentioned_old == means.passage_old == 1


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
    ("text", "passage"),
    [
        (" It rains. It sn", "It rains."),
        (" It rains", "It rains."),  # no sentence of so few tokens ended
    ],
)
def test_what_stands_in_front_is_the_old_answer_or_ends_as_a_sentence(
    model, few, monkeypatch, text, passage
):
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = []
    monkeypatch.setattr(superficiality, "real_text", lambda *_: [ids])
    measured = portability.measure_prompts

    def watched(model, prompts, answers):
        asked.extend(prompts)
        return measured(model, prompts, answers)

    monkeypatch.setattr(portability, "measure_prompts", watched)
    superficiality.ask(model, few[:1])
    assert f"{passage} {few[0].fact.question}" in asked
    lead = f"Many people have heard of {few[0].fact.object}."
    assert f"{lead} {few[0].fact.question}" in asked


def test_a_fact_without_its_true_object_is_refused(model, few, one_line):
    fact = few[0].fact.model_copy(update={"object": ""})
    with pytest.raises(BadInput) as error:
        superficiality.ask(model, [few[0].model_copy(update={"fact": fact})])
    assert "no true object" in one_line(error)
