import pytest
import torch

from tests.editors import edited
from workbench.positions import encode, statement


def test_ft_stays_in_its_box(tiny, requests):
    delta = edited(tiny, "ft", requests[:2], learning_rate=0.01, box=0.004)
    (change,) = delta.changes.values()
    assert change.dense.abs().max() <= 0.004 * (1 + 1e-6)
    (free,) = edited(tiny, "ft", requests[:2], learning_rate=0.01).changes.values()
    assert free.dense.abs().max() > 0.004


def test_ft_descends_on_the_teacher_forced_likelihood(tiny, requests):
    delta = edited(tiny, "ft", requests[:3], learning_rate=0.01)
    losses = delta.record["losses"]
    assert losses[-1] < losses[0]
    by_hand = []
    for request in requests[:3]:
        text = statement(request.fact.question, request.target)
        encoded = encode(tiny, [text])
        wanted = encoded.tokens_from(0, len(request.fact.question))
        log_probs = tiny.network(input_ids=encoded.input_ids).logits[0].log_softmax(-1)
        by_hand.append(
            -torch.stack(
                [log_probs[token - 1, encoded.input_ids[0, token]] for token in wanted]
            ).mean()
        )
    assert losses[0] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
