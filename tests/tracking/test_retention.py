import pytest
import torch

from workbench import facts
from workbench.positions import bos_id
from workbench.tracking.retention import GREEDY_TOKENS, expected_tokens, first_words, measure, measure_prompts, next_logits, stop_tokens, stop_words


def slow_first_word(model, prompt: str, expected: int) -> int:
    """One prompt at a time by `generate`, the way a reader would do it by hand."""
    ids = torch.tensor([[bos_id(model.tokenizer), *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    out = model.network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    for token in out[0, ids.shape[1] :].tolist():
        text = model.tokenizer.decode([token])
        special = token in model.tokenizer.all_special_ids
        if token == expected or special or (text.strip().lower() not in stop_words() and any(map(str.isalnum, text))):
            return token
    return token


def agreement(model, requests) -> None:
    prompts = [request.fact.question for request in requests]
    answers = [request.fact.object for request in requests]
    expected = expected_tokens(model.tokenizer, prompts, answers)
    slow = [slow_first_word(model, prompt, token) for prompt, token in zip(prompts, expected, strict=True)]
    table = measure_prompts(model, prompts, answers)
    assert table.retained.tolist() == [found == token for found, token in zip(slow, expected, strict=True)]
    assert table.top_token.tolist() == [model.tokenizer.decode([found]).strip() for found in slow]


def test_batched_greedy_agrees_with_one_by_one_generate(tiny):
    agreement(tiny, facts.read("world")[::80])


def test_batched_greedy_agrees_with_generate_on_200_prompts_of_a_world_model(world):
    agreement(world, facts.read("world")[::17][:200])


def test_the_search_goes_on_past_stop_words_only(tiny):
    encoded_prompts = [request.fact.question for request in facts.read("world")[:40]]
    from workbench.positions import encode

    encoded = encode(tiny.tokenizer, encoded_prompts)
    logits = next_logits(tiny, encoded)
    is_stop = stop_tokens(tiny.tokenizer)
    stopping = torch.zeros_like(logits)
    stopping[:, is_stop.nonzero()[0, 0]] = 100.0  # as if every first token were a stop word
    found = first_words(tiny, encoded, stopping, [-1] * len(encoded_prompts))
    plain = first_words(tiny, encoded, logits, [-1] * len(encoded_prompts))
    assert any(one != other for one, other in zip(found, plain, strict=True))
    assert all(found_at != is_stop.nonzero()[0, 0] or is_stop[found_at] for found_at in found)


def test_an_answer_that_starts_with_a_stop_word_is_judged_by_its_next_word(tiny):
    tokenizer = tiny.tokenizer
    assert expected_tokens(tokenizer, ["It lies in"], ["the Hague"]) == expected_tokens(tokenizer, ["It lies in"], ["Hague"])
    assert expected_tokens(tokenizer, ["It lies in"], ["The"]) == expected_tokens(tokenizer, ["It lies in"], ["The"])


@pytest.mark.parametrize("against", ["target", "object"])
def test_measure_asks_for_the_target_or_the_object(tiny, against):
    requests = facts.read("world")[:5]
    table = measure(tiny, requests, against=against)
    wanted = [request.target if against == "target" else request.fact.object for request in requests]
    assert table.columns.tolist() == ["fact_id", "prompt", "expected", "retained", "top_token", "p", "rank"]
    assert all(answer.startswith(expected) for answer, expected in zip(wanted, table.expected, strict=True))


def test_p_and_rank_are_those_of_the_full_distribution(tiny):
    request = facts.read("world")[0]
    row = measure(tiny, [request], against="object").iloc[0]
    ids = torch.tensor([[bos_id(tiny.tokenizer), *tiny.tokenizer(request.fact.question, add_special_tokens=False)["input_ids"]]])
    probs = tiny.network(input_ids=ids).logits[0, -1].softmax(0)
    token = expected_tokens(tiny.tokenizer, [request.fact.question], [request.fact.object])[0]
    assert row.p == pytest.approx(probs[token].item(), rel=1e-5)
    assert row["rank"] == (probs > probs[token]).sum().item() + 1


def test_an_unknown_measure_is_one_clear_line(tiny, one_line):
    with pytest.raises(facts.BadInput) as error:
        measure(tiny, facts.read("world")[:1], against="answer")
    assert "target or object" in one_line(error)
