import pytest
import torch

from tests.editors import edited, logits
from workbench import deltas, facts
from workbench.editing import incontext, records
from workbench.positions import encode


def test_a_context_is_what_one_would_have_asked(tiny, context, requests):
    request = requests[0]
    target = f"{request.fact.question} {request.target}"
    by_hand = f"New Fact: {target}.\nPrompt: {request.fact.question}"
    with deltas.applied(tiny, context):
        inside = encode(tiny, [request.fact.question])
        result = logits(tiny, [request.fact.question])
    whole = encode(tiny, [by_hand]).input_ids
    assert torch.equal(inside.input_ids, whole)
    end = len(request.fact.question)
    assert inside.offsets[0][-1][1] == end
    assert inside.token_at(0, end - 1) == whole.shape[1] - 1
    expected = tiny.network(input_ids=whole).logits[0, -1].float()
    assert torch.allclose(result[0], expected, atol=1e-5)


def test_a_context_of_a_broken_model_is_refused(tiny, requests, one_line):
    with torch.no_grad():
        tiny.weight(2)[3, 4] = float("nan")
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "incontext", requests[:2])
    assert "NaN" in one_line(error)


def test_every_statement_of_a_fact_stands_in_front_and_no_layer_is_named(tiny, requests, one_line):
    wider = facts.with_paraphrases(requests[0], 3)
    edit = incontext.edit(tiny, [wider], incontext.HParams(scope="all"), records.Resources())
    assert len(edit.statements) == 3
    assert edit.before("The weather was fine").count(f"{wider.target}.") == 3
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "incontext", requests[:1], layers=(1,))
    assert "leave layers out" in one_line(error)
