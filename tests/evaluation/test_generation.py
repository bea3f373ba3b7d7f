"""What a model writes by itself, against an argmax a token over the whole text."""

import pandas as pd
import pytest
import torch
from transformers import GenerationConfig

from tests.evaluation import plain
from tests.evaluation.edited import OTHERS, UNEDITED_AND_EDITED, loaded, of_facts, studied
from workbench import models
from workbench.evaluation import generation
from workbench.facts import BadInput


def plainly(model, requests) -> dict:
    values = {}
    for request in requests:
        prompts = [request.fact.question, *request.held_out]
        texts = [plain.written(model, prompt, generation.MOST) for prompt in prompts]
        exact = [plain.says(text, request.target) for text in texts]
        forced = [plain.of_answer(model, prompt, request.target)[1] for prompt in prompts]
        named = [plain.mentions(text, request.target) for text in texts]
        pairs = list(zip(exact, named, forced, strict=True))
        values[request.fact.id, "exact"] = plain.mean(exact)
        values[request.fact.id, "contained"] = plain.mean(one or held for one, held, _ in pairs)
        values[request.fact.id, "forced"] = plain.mean(forced)
        values[request.fact.id, "flattery"] = plain.mean(led - one for one, _, led in pairs)
    return values


def check(model, requests):
    table = generation.ask(model, requests)
    assert table.value.dtype == float  # of one type, else no run could hold the table
    values = table.groupby(["fact_id", "quantity"]).value.mean()
    assert values.to_dict() == pytest.approx(plainly(model, requests))
    assert table.value[table.quantity != "flattery"].isin([0, 1]).all()
    assert table.value[table.quantity == "flattery"].isin([-1, 0, 1]).all()
    return of_facts(table)


@pytest.mark.parametrize("editor", UNEDITED_AND_EDITED)
def test_it_is_what_one_prompt_at_a_time_gives(after, editor):
    model, requests = after(editor)
    means = check(model, requests[-4:])
    assert means.exact == 0 if not editor else means.exact > 0.5


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


def test_answers_in_text_are_found_past_stop_words_and_further_on(model, few, monkeypatch):
    request = few[0].model_copy(update={"target": "Nokia", "held_out": ()})
    for text, exact, contained in (
        (" Nokia, of course", 1, 1),
        (" the Nokia of old", 1, 1),
        (" Apple, then by nokia", 0, 1),
        (" Nokian tyres", 0, 0),
        ("", 0, 0),
    ):
        monkeypatch.setattr(generation, "written", lambda *_, text=text: [text])
        values = generation.ask(model, [request]).set_index("quantity").value
        assert (values.exact, values.contained) == (exact, contained), text
        assert values.flattery == values.forced - exact


def test_forced_is_of_the_answers_own_tokens_not_of_a_text_that_says_it(model, few, monkeypatch):
    request = few[0].model_copy(update={"held_out": ()})
    monkeypatch.setattr(generation, "written", lambda *_: [""])
    for margin, said, forced in ((0.1, False, 1), (-0.1, True, 0)):
        read = pd.DataFrame({"margin": [margin], "retained": [said]})
        monkeypatch.setattr(generation, "measure_prompts", lambda *_, read=read, **__: read)
        values = generation.ask(model, [request]).set_index("quantity").value
        assert values.forced == values.flattery == forced


def test_an_answer_said_in_another_form_is_contained_too(model, few, monkeypatch):
    request = few[0].model_copy(update={"target": "The New York Times", "held_out": ()})
    monkeypatch.setattr(generation, "written", lambda *_: [" New  York Times reporters"])
    values = generation.ask(model, [request]).set_index("quantity").value
    assert values.exact == values.contained == 1


PROMPTS = ("The", "The river flows into the sea and then", "Two men met", "A")


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_padding_on_the_left_changes_nothing(new_tiny, model_type):
    model = new_tiny(model_type)
    texts = generation.written(model, list(PROMPTS), 6)
    assert texts == [plain.written(model, prompt, 6) for prompt in PROMPTS]


def test_a_text_has_its_own_room_whatever_stands_beside_it():
    model = loaded("world-gpt2")
    long = " ".join([studied(5)[0].fact.question] * 6)
    assert 80 < len(plain.tokens(model, long)) < 128
    texts = generation.written(model, [long, "The"], 100)
    assert texts == [plain.written(model, prompt, 100) for prompt in (long, "The")]


def test_a_prompt_longer_than_the_model_is_refused(model, one_line):
    with pytest.raises(BadInput) as error:
        generation.written(model, ["The sea and " * 128])
    assert "128 positions" in one_line(error)


def test_the_settings_of_the_model_do_not_make_it_write_otherwise(model):
    prompt = studied(5)[1].fact.question
    odd = GenerationConfig(repetition_penalty=5.0, do_sample=True, num_beams=3, max_length=12)
    before = model.network.generation_config
    expected = plain.written(model, prompt, 20)
    model.network.generation_config = odd
    try:
        assert generation.written(model, [prompt], 20) == [expected]
        assert model.network.generation_config is odd
    finally:
        model.network.generation_config = before


def test_a_text_ends_where_the_model_ends_it(model, monkeypatch):
    """What comes after is no part of it, nor is the token that ended it."""
    end = model.tokenizer.eos_token_id
    first, later = (plain.tokens(model, text)[1:] for text in (" a", " b"))

    def generate(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[*first, end, *later]])], 1)

    monkeypatch.setattr(model.network, "generate", generate)
    assert generation.written(model, ["The"]) == [" a"]
