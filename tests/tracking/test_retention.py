"""What a model says is compared with the answer as text; slow readings by hand agree on models that
were really taught.
"""

import re
from functools import cache

import pandas as pd
import pytest
import torch

from tests.taught import END, STATEMENTS, taught
from workbench import facts
from workbench.positions import encode, front
from workbench.tracking import retention
from workbench.tracking.retention import (
    GREEDY_TOKENS,
    answers_after,
    measure,
    measure_prompts,
    said_words,
    says,
    stop_tokens,
    stop_words,
)

model_of = cache(taught)


def continued(model, prompt: str, count: int) -> list[int]:
    """Greedy tokens after one prompt by `generate`, the way a reader would do it by hand."""
    ids = torch.tensor(
        [[*front(model), *model.tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]]]
    )
    out = model.network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=-1,
    )
    return out[0].tolist(), ids.shape[1]


def said_by_hand(model, prompt: str, answer: str) -> bool:
    """Whether the words that are said, stop words left out in front, are those of the answer (of
    scripts with spaces).
    """
    whole, start = continued(model, prompt, GREEDY_TOKENS + 12)
    said = model.tokenizer.decode(whole)[len(model.tokenizer.decode(whole[:start])) :].split(END)[0]
    wanted, words = (re.findall(r"\w+", text) for text in (answer, said))
    skipped = 0
    for word in words:
        if words[skipped : skipped + len(wanted)] == wanted:
            return True
        if word.lower() not in stop_words():
            break
        skipped += 1
    while wanted[:-1] and wanted[0].lower() in stop_words():
        wanted = wanted[1:]
    return words[skipped : skipped + len(wanted)] == wanted


def first_by_hand(model, prompt: str, expected: int) -> int:
    whole, start = continued(model, prompt, GREEDY_TOKENS)
    for token in whole[start:]:
        text = model.tokenizer.decode([token])
        special = token in model.tokenizer.all_special_ids
        if (
            token == expected
            or special
            or "\ufffd" in text
            or (text.strip().lower() not in stop_words() and any(map(str.isalnum, text)))
        ):
            return token
    return token


def agreement(model, requests, against: str = "object") -> None:
    prompts = [request.fact.question for request in requests]
    answers = [
        request.fact.object if against == "object" else request.target for request in requests
    ]
    expected = answers_after(model, prompts, answers).first_tokens
    tops = [
        first_by_hand(model, prompt, token) for prompt, token in zip(prompts, expected, strict=True)
    ]
    table = measure_prompts(model, prompts, answers)
    assert table.top_token.tolist() == [model.tokenizer.decode([top]).strip() for top in tops]
    assert table.retained_first.tolist() == [
        top == token for top, token in zip(tops, expected, strict=True)
    ]
    assert table.retained.tolist() == [
        said_by_hand(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_batched_greedy_agrees_with_one_by_one_generate(tiny):
    agreement(tiny, facts.read("world")[::80])


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("against", ["object", "target"])
def test_batched_greedy_agrees_with_generate_on_prompts_of_a_world_model(world, against, count):
    agreement(world, facts.read("world")[:: 3400 // count][:count], against)


CASES = [  # kind, prompt, answer, retained, by its first token
    ("digits", "The battle of Arden took place in the year", "1945", True, True),
    (
        "digits",
        "The battle of Arden took place in the year",
        "1946",
        False,
        True,
    ),  # digits one by one: the first says nothing
    ("digits", "The battle of Belmont took place in the year", "1945", False, True),
    (
        "digits",
        "The battle of Belmont took place in the year",
        "184",
        False,
        True,
    ),  # a number within another
    ("digits", "The port of Dunmore lies near", "New York City", True, True),
    ("digits", "The port of Dunmore lies near", "New York", True, True),  # a word ends there
    ("digits", "The port of Elgar lies near", "New York City", False, True),
    (
        "digits",
        "The port of Elgar lies near ",
        "New Orleans",
        True,
        True,
    ),  # a space at the end of a prompt is the answer's
    ("digits", "The court of Farrow sits in", "The Hague", True, True),
    ("digits", "The court of Farrow sits", "The Hague", True, True),  # past a stop word
    ("digits", "The bells of Gant ring for", "The Hague", False, False),
    ("digits", "The mills of Hollin stand in", "York", False, False),
    ("digits", "The mills of Ilkar stand in", "York", True, True),
    (
        "digits",
        "The queen of Jarrow was born in",
        "Leeds",
        False,
        False,
    ),  # "town" comes first, which is no stop word
    (
        "bytes",
        "法国的首都是",
        "巴黎",
        False,
        None,
    ),  # taught with one token over the end of the prompt, which the prompt alone has not
    ("bytes", "日本的首都是", "东京", True, None),
    ("bytes", "东国的首都是", "东京", False, True),  # 东方 begins alike
    ("bytes", "中国的首都是", "东京", False, None),
    ("bytes", "столица Франции это", "Париж", True, True),
    ("sentencepiece", "The tower of Vern was built in", "1920", True, True),
    ("sentencepiece", "The river Tam flows into", "Oder", True, True),
    ("sentencepiece", "The river Tam flows into", "Elbe", False, False),
]


@pytest.mark.parametrize(("kind", "prompt", "answer", "retained", "first"), CASES)
def test_an_answer_is_a_word_and_not_its_first_token(kind, prompt, answer, retained, first):
    row = measure_prompts(model_of(kind), [prompt], [answer]).iloc[0]
    assert row.retained == retained
    assert first is None or row.retained_first == first


def test_before_an_edit_no_target_is_retained_that_only_begins_like_the_truth():
    """Years, New York and New Orleans: by first tokens the target was there before any edit."""
    model = model_of("digits")
    facts_of = [
        ("Arden", "The battle of {} took place in the year", "1945", "1847"),
        ("Elgar", "The port of {} lies near", "New Orleans", "New York City"),
    ]
    requests = [
        facts.EditRequest(
            fact=facts.Fact(id=subject, subject=subject, prompt=prompt, object=thing), target=target
        )
        for subject, prompt, thing, target in facts_of
    ]
    assert not measure(model, requests).retained.any()
    assert measure(model, requests).retained_first.all()
    assert measure(model, requests, "object").retained.all()


def by_hand(model, prompt: str, answer: str) -> tuple[float, float, float]:
    """p of all the answer's tokens, p of the first that is more than white space, and the smallest
    lead; token by token.
    """
    joined = prompt.rstrip() + ("" if "首" in prompt else " ") + answer
    lead = [*front(model), *model.tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]]
    whole = [*front(model), *model.tokenizer(joined, add_special_tokens=False)["input_ids"]]
    assert whole[: len(lead)] == lead
    p, first, leads = 1.0, None, []
    for place in range(len(lead), len(whole)):
        probs = model.network(input_ids=torch.tensor([whole[:place]])).logits[0, -1].softmax(0)
        others = probs.clone()
        others[whole[place]] = 0
        p *= probs[whole[place]].item()
        leads.append((probs[whole[place]] - others.max()).item())
        if first is None and model.tokenizer.decode([whole[place]]).strip():
            first = probs[whole[place]].item()
    return p, first, min(leads)


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [case[:3] for case in CASES if case[0] != "bytes" and not case[2].startswith("The ")],
)
def test_p_is_of_all_the_answers_tokens_and_the_first_tokens_stands_beside_it(kind, prompt, answer):
    row = measure_prompts(model_of(kind), [prompt], [answer]).iloc[0]
    assert (row.p, row.p_first, row.margin) == pytest.approx(
        by_hand(model_of(kind), prompt, answer), rel=1e-4, abs=1e-7
    )


FLOATS = ["p", "p_first", "p_second", "p_token", "margin"]  # rounded as a batch's sums are


def test_the_order_of_the_prompts_and_what_stands_beside_them_change_nothing():
    model = model_of("digits")
    cases = [case for case in CASES if case[0] == "digits"]
    together = measure_prompts(model, [case[1] for case in cases], [case[2] for case in cases])
    for number, case in enumerate(cases):
        alone = measure_prompts(model, [case[1]], [case[2]]).iloc[0]
        assert alone.drop(FLOATS).equals(together.iloc[number].drop(FLOATS))
        assert alone.p == pytest.approx(together.p[number], rel=1e-4)


@pytest.mark.parametrize(
    ("said", "answer", "verdict"),
    [
        (" Paris", "Paris", None),  # "Parisian" may come
        (" Paris.", "Paris", True),
        (" Parisian", "Paris", False),
        (" Par", "Paris", None),
        (" the city of Paris,", "Paris", False),
        (" the Paris,", "Paris", True),
        (" The Hunchb", "The Hague", False),
        (" The Hague.", "Hague", True),
        (" in The Hague.", "The Hague", True),
        (" the", "Paris", None),
        ("", "Paris", None),
        (" 19456", "1945", False),
        (" 1945 ", "1945", None),
        (" “New   York City”", "New York City", True),
        (" Cafe\u0301.", "Café", True),
        ("东京", "东京", None),
        ("东京是", "东京", True),
        (" the The Who.", "The Who", True),
        (" O'Hara.", "O'Hara", True),
        (" \ufffd", "Paris", None),
    ],
)
def test_what_is_said_is_the_answer_or_is_not_or_is_still_open(said, answer, verdict):
    assert says(said, answer) is verdict


def test_what_ends_is_decided():
    assert says(" Paris", "Paris", ended=True) is True
    assert says(" Pari", "Paris", ended=True) is False


def test_a_piece_of_a_character_is_no_stop_word():
    model = model_of("bytes")
    texts = retention.token_texts(model.tokenizer)
    broken = [token for token, text in enumerate(texts) if "\ufffd" in text]
    assert len(broken) > 50
    assert not stop_tokens(model.tokenizer)[broken].any()


def test_the_first_word_that_is_said_is_a_whole_one():
    prompts = [
        statement[: -len(last)]
        for statement, last in ((one, one.split()[-1]) for one in STATEMENTS["digits"][:3])
    ]
    assert said_words(model_of("digits"), prompts) == ["1945", "1847", "1812"]
    assert said_words(
        model_of("digits"), ["The mills of Hollin stand in", "The court of Farrow sits"]
    ) == ["Yorkshire", "Hague"]


def test_stop_words_are_passed_over_to_the_eighth_token(tiny, monkeypatch):
    stop = int(stop_tokens(tiny.tokenizer).nonzero()[0, 0])
    asked = []

    def says_a_stop_word(model, encoded):
        asked.append(encoded.lengths.tolist())
        return torch.nn.functional.one_hot(
            torch.full((len(encoded.input_ids),), stop), len(model.tokenizer)
        ).float()

    monkeypatch.setattr(retention, "next_logits", says_a_stop_word)
    row = judged(tiny, "so it is", "Japan", stop)
    assert row.top_token == retention.token_text(tiny.tokenizer, stop).strip()
    assert not any([row.retained, row.retained_first, row.top_is_expected])
    length = int(encode(tiny, ["so it is"]).lengths)
    assert asked == [[length + more] for more in range(GREEDY_TOKENS)]


def judged(model, prompt: str, answer: str, top: int):
    table = pd.DataFrame({"top": [top], "at_once": [False]})
    return retention.judged(model, answers_after(model, [prompt], [answer]), table).iloc[0]


def test_a_token_that_only_the_model_has_is_no_answer(tiny):
    """Vocabularies of models are often padded beyond their tokenizer's."""
    row = judged(tiny, "so it is", "Japan", len(tiny.tokenizer) + 5)
    assert row.top_token == ""
    assert not any([row.retained, row.retained_first, row.top_is_expected])


@pytest.mark.parametrize("against", ["target", "object"])
def test_measure_asks_for_the_target_or_the_object(tiny, against):
    requests = facts.read("world")[:5]
    table = measure(tiny, requests, against=against)
    wanted = [
        request.target if against == "target" else request.fact.object for request in requests
    ]
    columns = [
        "fact_id",
        "prompt",
        "expected",
        "retained",
        "top_token",
        "p",
        "rank",
        "retained_first",
        "p_first",
    ]
    assert table.columns.tolist() == columns
    assert table.expected.tolist() == wanted


def test_p_and_rank_are_those_of_the_full_distribution(tiny):
    request = facts.read("world")[0]
    row = measure_prompts(tiny, [request.fact.question], [request.fact.object]).iloc[0]
    ids = torch.tensor(
        [
            [
                *front(tiny),
                *tiny.tokenizer(request.fact.question, add_special_tokens=False)["input_ids"],
            ]
        ]
    )
    probs = tiny.network(input_ids=ids).logits[0, -1].softmax(0)
    token = answers_after(tiny, [request.fact.question], [request.fact.object]).first_tokens[0]
    assert row.p_first == pytest.approx(probs[token].item(), rel=1e-5)
    assert row["rank"] == (probs > probs[token]).sum().item() + 1
    assert row.p_second == pytest.approx(probs.sort(descending=True).values[1].item(), rel=1e-4)
    assert not row.top_is_expected


def test_an_answer_without_a_token_is_one_clear_line(tiny, one_line):
    with pytest.raises(facts.BadInput) as error:
        measure_prompts(tiny, ["It is"], [" "])
    assert "no token" in one_line(error)


def test_an_unknown_measure_is_one_clear_line(tiny, one_line):
    with pytest.raises(facts.BadInput) as error:
        measure(tiny, facts.read("world")[:1], against="answer")
    assert "target, object" in one_line(error)
