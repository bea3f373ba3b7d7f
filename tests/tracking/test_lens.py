import pandas as pd
import pytest
import torch

from workbench import facts
from workbench.positions import encode
from workbench.tracking import lens
from workbench.tracking.categories import CATEGORIES, mass, token_categories
from workbench.tracking.probes import Probe, questions


def check_lens(model, prompt: str) -> None:
    encoded = encode(model, [prompt])
    with torch.no_grad():
        output = model.network(input_ids=encoded.input_ids, output_hidden_states=True)
        states = [
            state[0, -1] for state in output.hidden_states[1:]
        ]  # the last entry is already normed
        oracle = [
            model.unembedding(model.final_norm(state)).softmax(0) for state in states[:-1]
        ] + [model.unembedding(states[-1]).softmax(0)]
    found = lens.trajectory(model, prompt)
    assert found.probs.shape == (model.n_blocks, len(oracle[0]))
    for layer, row in enumerate(oracle):
        assert torch.allclose(found.probs[layer], row, atol=1e-6), layer
    assert torch.allclose(found.probs[-1], output.logits[0, -1].softmax(0), atol=1e-6)
    assert not torch.allclose(found.probs[0], oracle[1], atol=1e-6)  # an off-by-one would show
    assert len(found.tokens) == encoded.input_ids.shape[1]


def test_every_layer_is_the_final_norm_and_head_of_its_hidden_state(tiny):
    check_lens(tiny, facts.read("world")[3].fact.question)


def test_every_layer_of_a_world_model(world):
    check_lens(world, facts.read("world")[3].fact.question)


def test_a_batch_gives_what_single_prompts_give(tiny):
    prompts = [request.fact.question for request in facts.read("world")[:200:40]]
    together = lens.layer_logits(tiny, encode(tiny, prompts))
    alone = torch.cat([lens.layer_logits(tiny, encode(tiny, [prompt])) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-4)


def test_another_position_reads_the_distribution_there(tiny):
    prompt = facts.read("world")[3].fact.question
    whole = tiny.network(input_ids=encode(tiny, [prompt]).input_ids).logits[0].softmax(-1)
    assert torch.allclose(lens.trajectory(tiny, prompt, position=2).probs[-1], whole[2], atol=1e-6)


def test_each_token_counts_once_for_the_first_category_that_fits(tiny):
    vocabulary = len(tiny.tokenizer)
    category = token_categories(
        tiny, vocabulary, true=300, edited=301, related=frozenset({302, 303})
    )
    probs = torch.rand(4, vocabulary).softmax(1)
    assert torch.allclose(mass(probs, category).sum(1), torch.ones(4), atol=1e-6)
    assert mass(probs, category)[:, 0].tolist() == pytest.approx(probs[:, 300].tolist())
    both = token_categories(tiny, vocabulary, true=300, edited=300)
    assert both[300] == CATEGORIES.index("true")
    assert (both != CATEGORIES.index("edited")).all()


@pytest.fixture
def looks(tiny):
    requests = [request for request in facts.read("world") if request.fact.split == "study"][:6]
    asked = questions(requests[:2], requests[2:])
    return asked, Probe(tiny, asked, facts.objects_of(facts.read("world"))).look(0)


def test_a_look_holds_a_row_for_each_question(looks):
    asked, look = looks
    assert look.probes.prompt.tolist() == [question.prompt for question in asked]
    assert set(look.probes.group) == {"edited", "intrinsic", "paraphrase", "neighbourhood"}
    clear = look.probes[look.probes.clear]
    assert len(clear)
    sums = clear[[f"p_{name}" for name in CATEGORIES]].sum(axis=1)
    assert sums.tolist() == pytest.approx([1.0] * len(clear), abs=1e-5)


def test_lens_and_tokens_cover_own_prompts_layer_by_layer(looks, tiny):
    _, look = looks
    assert len(look.lens) == 6 * tiny.n_blocks * len(CATEGORIES)
    assert len(look.tokens) == 6 * tiny.n_blocks * 10
    last = (
        look.lens[(look.lens.layer == tiny.n_blocks - 1) & (look.lens.category == "true")]
        .set_index("fact_id")
        .probability
    )
    own = look.probes[look.probes.group.isin(["edited", "intrinsic"])].set_index("fact_id").p_true
    assert last.sort_index().tolist() == pytest.approx(
        own.sort_index().tolist(), rel=1e-5, nan_ok=True
    )
    assert own.notna().any()


def test_without_a_category_related_is_null_not_zero(tiny):
    fact = facts.Fact(id="mine", subject="Ada", prompt="{} plays the", object="harp")
    request = facts.EditRequest(fact=fact, target="flute")
    look = Probe(tiny, questions([request], [])).look(0)
    assert pd.isna(look.probes.p_related).all()
    assert look.probes.p_other.notna().all()


def test_a_neighbour_that_was_edited_itself_is_not_asked():
    requests = facts.read("world")
    one = next(request for request in requests if request.neighbourhood)
    other = next(
        request for request in requests if request.fact.question == one.neighbourhood[0][0]
    )
    prompts = [
        question.prompt
        for question in questions([one, other], [])
        if question.group == "neighbourhood"
    ]
    assert other.fact.question not in prompts
    assert one.neighbourhood[0][0] in [question.prompt for question in questions([one], [])]
