"""First tokens speak for answers only where they tell them apart; a lone space before an answer
belongs to it.
"""

from functools import cache

import pandas as pd
import pytest
import torch

from tests.taught import taught
from workbench import facts
from workbench.positions import front
from workbench.tracking.categories import CATEGORIES, first_tokens, mass, token_categories
from workbench.tracking.probes import Probe, questions

model_of = cache(taught)
YEARS = ("1945", "1847", "1812")
CITIES = ("New York City", "New Orleans", "Leeds", "York")


def first(kind: str, prompt: str, true: str, edited: str, related=()):
    return first_tokens(model_of(kind), [prompt], [true], [edited], [related])


@pytest.mark.parametrize(
    ("kind", "prompt", "true", "edited", "related", "clear"),
    [
        ("digits", "The port of Dunmore lies near", "New York City", "Leeds", (), True),
        ("digits", "The port of Dunmore lies near", "New York City", "New Orleans", (), False),
        (
            "digits",
            "The port of Dunmore lies near",
            "New York City",
            "Leeds",
            CITIES,
            False,
        ),  # New Orleans is related
        ("digits", "The port of Dunmore lies near", "York", "Leeds", CITIES, True),
        ("digits", "The battle took place in the year", "1945", "1847", (), False),
        ("digits", "The battle took place in the year", "1945", "2011", (), True),
        ("digits", "The battle took place in the year", "1945", "2011", YEARS, False),
        (
            "digits",
            "The battle took place in",
            "1945",
            "Leeds",
            (),
            False,
        ),  # one after a lone space, the other not
        ("bytes", "这里是", "伦敦", "京东", (), False),  # pieces of characters
        ("sentencepiece", "The river Tam flows into", "Oder", "Elbe", (), True),
    ],
)
def test_a_fact_is_clear_where_first_tokens_tell_its_answers_apart(
    kind, prompt, true, edited, related, clear
):
    assert first(kind, prompt, true, edited, related).clear.tolist() == [clear]


def test_the_mass_of_an_answer_behind_a_lone_space_is_read_after_that_space():
    """Before it every year is one token of white space, which counted for a stop word."""
    model, prompt = model_of("digits"), "The battle of Arden took place in the year"
    fact = facts.Fact(
        id="a", subject="Arden", prompt="The battle of {} took place in the year", object="1945"
    )
    look = Probe(model, questions([facts.EditRequest(fact=fact, target="2011")], [])).look(0)
    ids = [*front(model), *model.tokenizer(f"{prompt} ", add_special_tokens=False)["input_ids"]]
    probs = model.network(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)
    one = model.tokenizer.get_vocab()["1"]
    row = look.probes.iloc[0]
    assert row.p_true == pytest.approx(probs[one].item(), rel=1e-4)
    assert row.p_true > 0.9
    assert row.p_stop < 0.1
    assert row.top_category == "true"  # though the edited answer is what was asked for
    last = look.lens[(look.lens.layer == 1) & (look.lens.category == "true")].probability
    assert last.item() == pytest.approx(row.p_true, rel=1e-5)
    assert row.p_answer == pytest.approx(measured(model, prompt, "2011"), rel=1e-4)


def measured(model, prompt: str, answer: str) -> float:
    from workbench.tracking.retention import measure_prompts

    return measure_prompts(model, [prompt], [answer]).p[0]


def test_what_is_not_clear_says_nothing_of_mass():
    model = model_of("digits")
    fact = facts.Fact(
        id="a", subject="Arden", prompt="The battle of {} took place in the year", object="1945"
    )
    look = Probe(model, questions([facts.EditRequest(fact=fact, target="1847")], [])).look(0)
    assert not look.probes.clear.any()
    assert look.probes[[f"p_{name}" for name in CATEGORIES]].isna().all(axis=None)
    assert look.probes.top_category.isna().all()
    assert look.lens.probability.isna().all()
    assert not look.probes.retained.any()
    assert pd.notna(look.probes.p_answer).all()


def test_a_token_over_the_end_of_a_prompt_leaves_its_fact_unclear():
    """Prompt and true object share a token there, prompt and target do not: no place is of both."""
    model = model_of("bytes")
    fact = facts.Fact(id="a", subject="法国", prompt="{}的首都是", object="巴黎")
    look = Probe(model, questions([facts.EditRequest(fact=fact, target="东京")], [])).look(0)
    assert look.probes.clear.tolist() == [False]
    assert look.probes.p_true.isna().all()


def test_each_token_counts_once_for_the_first_category_that_fits(tiny):
    category = token_categories(tiny, true=300, edited=301, related={302, 303})
    probs = torch.rand(4, len(category)).softmax(1)
    assert torch.allclose(mass(probs, category).sum(1), torch.ones(4), atol=1e-6)
    assert mass(probs, category)[:, 0].tolist() == pytest.approx(probs[:, 300].tolist())
    both = token_categories(tiny, true=300, edited=300)
    assert both[300] == CATEGORIES.index("true")
    assert (both != CATEGORIES.index("edited")).all()
