"""Logit lens: what each block would say if the model ended after it.

Row i is softmax(head(norm(h_i))), h_i the hidden state after block i; the final norm is applied
once to each, so the last row is the model's own next-token distribution. Source: nostalgebraist
(2020). Differs from: no row for the embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from workbench.activations import recorded
from workbench.models import Model
from workbench.positions import Encoded, encode
from workbench.tracking.retention import token_text


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Next-token distributions of one prompt, layer by layer.

    `probs` (n_blocks, vocab), float32; `tokens`: the prompt's tokens, what stands in front of them
    first; `position`: where the distribution was read.
    """

    probs: Tensor
    tokens: tuple[str, ...]
    position: int = -1

    def __post_init__(self):
        length = len(self.tokens)
        if self.probs.ndim != 2 or not -length <= self.position < length:
            shape = tuple(self.probs.shape)
            raise ValueError(f"probs {shape} at position {self.position} of {length} tokens")


def trajectory(model: Model, prompt: str, position: int = -1) -> Trajectory:
    """The lens after one prompt, at its last token or another."""
    encoded = encode(model, [prompt])
    ids = encoded.input_ids[0].tolist()
    logits = layer_logits(model, encoded, torch.tensor([position % len(ids)]))
    probs = logits[0].softmax(-1).cpu()
    tokens = tuple(model.tokenizer.decode([token]) for token in ids)
    return Trajectory(probs=probs, tokens=tokens, position=position)


@torch.no_grad()
def layer_logits(model: Model, encoded: Encoded, at: Tensor | None = None) -> Tensor:
    """Logits (n, n_blocks, vocab), float32, at one position of each text (default: the last); one
    pass of the network.
    """
    at = (encoded.lengths - 1 if at is None else at).to(model.device)
    inputs = encoded.to(model.device).arguments()
    with recorded(dict(enumerate(model.blocks))) as states:
        last = model.logits_at(**inputs, positions=at)
    return read(model, states, torch.arange(len(at)), at, last)


def read(
    model: Model, states: Mapping[int, Tensor], rows: Tensor, at: Tensor, last: Tensor
) -> Tensor:
    """Logits (m, n_blocks, vocab), float32, at a position of each of some rows.

    Args:
        states: block -> hidden states after it (n, length, d_model).
        rows, at: (m,).
        last: (m, vocab), what the model itself says there.
    """
    if model.n_blocks == 1:
        return last[:, None]
    device = last.device
    places = rows.to(device), at.to(device)
    hidden = [states[layer].to(device)[places] for layer in range(model.n_blocks - 1)]
    normed = model.final_norm(torch.stack(hidden, dim=1))  # (m, n_blocks - 1, d_model)
    logits = model.unembedding(normed).float().to(device)
    return torch.cat([logits, last[:, None]], dim=1)


def top_tokens(model: Model, probs: Tensor, k: int = 10) -> list[list[tuple[str, float]]]:
    """For each row of probs (n, vocab) the k likeliest tokens with their probabilities."""
    likeliest = probs.topk(k)
    rows = []
    for tokens, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
        texts = [token_text(model.tokenizer, token) for token in tokens]
        rows.append(list(zip(texts, values, strict=True)))
    return rows


def table(model: Model, lens: Trajectory) -> pd.DataFrame:
    """What each block would say: its likeliest token, that token's probability, the second and the
    third token.
    """
    rows = []
    for (first, p), (second, _), (third, _) in top_tokens(model, lens.probs, 3):
        rows.append((first.strip(), p, second.strip(), third.strip()))
    return pd.DataFrame(rows, columns=["likeliest", "p", "second", "third"]).rename_axis("block")
