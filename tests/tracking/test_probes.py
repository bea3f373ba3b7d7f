import pandas as pd
import pytest

from workbench import deltas, facts
from workbench.tracking.categories import CATEGORIES
from workbench.tracking.probes import Probe, questions


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


def test_a_look_sees_the_context_that_is_in_force(tiny, context, requests):
    probe = Probe(tiny, questions(requests[:3], []))
    before = probe.look(-1).probes
    with deltas.applied(tiny, context):
        inside = probe.look(0).probes
        fresh = Probe(tiny, questions(requests[:3], [])).look(0).probes
    assert not inside.p_answer.equals(before.p_answer)
    assert inside.p_answer.tolist() == fresh.p_answer.tolist()
    assert probe.look(1).probes.p_answer.tolist() == before.p_answer.tolist()
