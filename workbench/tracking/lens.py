"""Logit lens: what each block would say if the model ended after it.

Row i is softmax(head(norm(h_i))), h_i the hidden state after block i; the final norm is applied
once to each, so the last row is the model's own next-token distribution. Source: nostalgebraist
(2020). Differs from: no row for the embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from workbench.activations import recorded
from workbench.models import Model
from workbench.positions import Encoded, encode
from workbench.tracking.retention import token_texts


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Next-token distributions of one prompt, layer by layer.

    `probs` (n_blocks, vocab), float32; `tokens`: the prompt's tokens, what stands in front of them
    first; `position`: where the distribution was read.
    """

    probs: torch.Tensor
    tokens: tuple[str, ...]
    position: int = -1

    def __post_init__(self):
        if self.probs.ndim != 2 or not -len(self.tokens) <= self.position < len(self.tokens):
            raise ValueError(
                f"probs {tuple(self.probs.shape)} at position {self.position} of {len(self.tokens)} tokens"
            )


def trajectory(model: Model, prompt: str, position: int = -1) -> Trajectory:
    """The lens after one prompt, at its last token or another."""
    encoded = encode(model, [prompt])
    length = int(encoded.lengths[0])
    at = torch.tensor([position % length])
    logits = layer_logits(model, encoded, at)[0]
    tokens = tuple(model.tokenizer.decode([token]) for token in encoded.input_ids[0].tolist())
    return Trajectory(probs=logits.softmax(-1).cpu(), tokens=tokens, position=position)


@torch.no_grad()
def layer_logits(model: Model, encoded: Encoded, at: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (n, n_blocks, vocab), float32, at one position of each text (default: the last); one
    pass of the network.
    """
    at = (encoded.lengths - 1 if at is None else at).to(model.device)
    encoded = encoded.to(model.device)
    with recorded(dict(enumerate(model.blocks))) as states:
        last = model.logits_at(encoded.input_ids, encoded.attention_mask, at)
    return read(model, states, torch.arange(len(at)), at, last)


def read(
    model: Model,
    states: Mapping[int, torch.Tensor],
    rows: torch.Tensor,
    at: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """Logits (m, n_blocks, vocab), float32, at a position of each of some rows.

    Args:
        states: block -> hidden states after it (n, length, d_model).
        rows, at: (m,).
        last: (m, vocab), what the model itself says there.
    """
    if model.n_blocks == 1:
        return last[:, None]
    rows, at = rows.to(last.device), at.to(last.device)
    before = torch.stack(
        [states[layer].to(last.device)[rows, at] for layer in range(model.n_blocks - 1)], dim=1
    )
    return torch.cat(
        [model.unembedding(model.final_norm(before)).float().to(last.device), last[:, None]], dim=1
    )


def top_tokens(model: Model, probs: torch.Tensor, k: int = 10) -> list[list[tuple[str, float]]]:
    """For each row of probs (n, vocab) the k likeliest tokens with their probabilities."""
    found, texts = probs.topk(k), token_texts(model.tokenizer)
    return [
        [
            (texts[token] if token < len(texts) else "", p)
            for token, p in zip(tokens, values, strict=True)
        ]
        for tokens, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def table(model: Model, found: Trajectory) -> pd.DataFrame:
    """What each block would say: its likeliest token, that token's probability, the second and the
    third token.
    """
    rows = [
        (row[0][0].strip(), row[0][1], row[1][0].strip(), row[2][0].strip())
        for row in top_tokens(model, found.probs, 3)
    ]
    return pd.DataFrame(rows, columns=["likeliest", "p", "second", "third"]).rename_axis("block")
