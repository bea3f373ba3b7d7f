"""How far the edit moved what it was to leave alone, as distributions.

neighbourhood: KL(unedited || edited) of the next token after the neighbours' prompts; text: the
same, the mean over every token of unrelated text, whose rows count as facts. In nats, from 0, which
is no change. Accuracy hides drift that has not yet changed the likeliest token. Source: the
locality term of arXiv 2110.11309, as a measure.
"""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.evaluation.ability import real_text
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode, padded, tokens_at_once
from workbench.tracking.retention import next_logits

ROWS = 4  # of unrelated text


@dataclass(frozen=True, kw_only=True)
class Said:
    """Log-probabilities of the next token: by `owner` at prompts (n, vocab), and of text."""

    owner: list[str]
    near: Tensor
    text: list[Tensor]


@torch.no_grad()
def ask(model: Model, requests: Requests) -> Said:
    pairs = [(one.fact.id, prompt) for one in requests for prompt, _ in one.neighbourhood]
    encoded = encode(model, [prompt.rstrip() for _, prompt in pairs])
    near = torch.zeros(len(pairs), len(model.unembedding.weight))
    for batch in encoded.batches(tokens_at_once(model)):
        near[batch] = next_logits(model, encoded.rows(batch)).log_softmax(1).cpu()
    text = []
    for row in real_text(model, ROWS):
        rows = padded([row]).to(model.device)
        logits = model.network(**rows.arguments(), use_cache=False).logits[0]
        text.append(logits.float().log_softmax(1).cpu())
    return Said(owner=[owner for owner, _ in pairs], near=near, text=text)


def compare(before: Said, after: Said) -> pd.DataFrame:
    drift = F.kl_div(after.near, before.near, log_target=True, reduction="none").sum(1)
    near = pd.DataFrame({"fact_id": before.owner, "value": drift.double()})
    text = []
    for number, (old, new) in enumerate(zip(before.text, after.text, strict=True)):
        drift = F.kl_div(new, old, log_target=True, reduction="batchmean")
        text.append((f"text {number}", drift.item()))
    tables = near, pd.DataFrame(text, columns=["fact_id", "value"])
    named = [one.assign(quantity=name) for one, name in zip(tables, QUANTITIES, strict=True)]
    return pd.concat(named, ignore_index=True)


QUANTITIES = ("neighbourhood", "text")
