"""What is left of the model's general ability.

loss: of real text, nats a token, a row of text counting as a fact (e to its power is perplexity);
entropy: of the words of what the model writes after each fact's prompt, bits, (1/3) H_2 + (2/3) H_3
of its bigrams and trigrams, from 0; low where it repeats itself. Source: "fluency" of arXiv
2202.05262, section 3.2; here greedy texts of at most 100 tokens, there sampled ones.
"""

from collections import Counter
from itertools import islice

import numpy
import pandas as pd
import torch
import torch.nn.functional as F

from workbench import prose
from workbench.checkpoints import is_world
from workbench.evaluation.generation import written
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import front, packed, padded
from workbench.world import text

ROWS = 16
WRITTEN = 100  # tokens
WEIGHTS = {2: 1 / 3, 3: 2 / 3}  # of n-grams


def ask(model: Model, requests: Requests) -> pd.DataFrame:
    losses = [_loss(model, row) for row in real_text(model, ROWS)]
    rows = [(f"text {number}", "loss", loss) for number, loss in enumerate(losses)]
    texts = written(model, [request.fact.question for request in requests], WRITTEN)
    for request, one in zip(requests, texts, strict=True):
        rows.append((request.fact.id, "entropy", entropy(one.split())))
    return pd.DataFrame(rows, columns=["fact_id", "quantity", "value"])


def real_text(model: Model, count: int) -> list[list[int]]:
    """Rows of tokens of running text that nothing tunes on: of the world's models prose of their
    pre-training's kind, of others docstrings.
    """
    world = (" ".join(parts) for parts in text.prose("everyday", seed=1))
    paragraphs = world if is_world(model.name) else prose.docstrings()
    return list(islice(packed(model, paragraphs), count))


@torch.no_grad()
def _loss(model: Model, row: list[int]) -> float:
    rows = padded([row]).to(model.device)
    logits = model.network(**rows.arguments(), use_cache=False).logits[0].float()
    first = max(1, len(front(model)))
    return F.cross_entropy(logits[first - 1 : -1], rows.input_ids[0, first:]).item()


def entropy(tokens: list[str]) -> float:
    """The weighted entropy of the n-grams, bits."""
    total = 0.0
    for n, weight in WEIGHTS.items():
        counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
        shares = numpy.array(list(counts.values()), float) / max(1, counts.total())
        total -= weight * (shares * numpy.log2(shares)).sum()
    return float(total)
