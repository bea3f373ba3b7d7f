"""How far the edit moved what it was to leave alone, as distributions.

neighbourhood: KL(unedited || edited) of the next token after the neighbours' prompts; text: the
same, the mean over every token of unrelated text, whose rows count as facts. In nats, from 0, which
is no change. Accuracy hides drift that has not yet changed the likeliest token. Source: the
locality term of arXiv 2110.11309, as a measure.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.evaluation.ability import real_text
from workbench.evaluation.counterfact import near
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode, padded, tokens_at_once
from workbench.tracking.retention import next_logits

ROWS = 4  # of unrelated text


@torch.no_grad()
def ask(model: Model, requests: Requests) -> list[tuple[str, str, Tensor]]:
    """(fact, quantity, log-probabilities of the next token): (vocab,) at a prompt, (length, vocab)
    of a row of text.
    """
    pairs = [(request.fact.id, prompt) for request, prompt, _ in near(requests)]
    encoded = encode(model, [prompt.rstrip() for _, prompt in pairs])
    after_prompts = torch.zeros(len(pairs), len(model.unembedding.weight))
    for batch in encoded.batches(tokens_at_once(model)):
        after_prompts[batch] = next_logits(model, encoded.rows(batch)).log_softmax(1).cpu()
    rows = [(pair[0], "neighbourhood", one) for pair, one in zip(pairs, after_prompts, strict=True)]
    for number, ids in enumerate(real_text(model, ROWS)):
        text = padded([ids]).to(model.device)
        logits = model.network(**text.arguments(), use_cache=False).logits[0]
        rows.append((f"text {number}", "text", logits.float().log_softmax(1).cpu()))
    return rows


def compare(before: list, after: list) -> pd.DataFrame:
    rows = []
    for (owner, quantity, old), (*_, new) in zip(before, after, strict=True):
        drift = F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
        rows.append((owner, quantity, drift.mean().clamp(min=0).item()))
    return pd.DataFrame(rows, columns=["fact_id", "quantity", "value"])
