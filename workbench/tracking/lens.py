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
from workbench.positions import encode
from workbench.tracking.retention import next_logits, token_text


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Next-token distributions of one prompt, layer by layer.

    `probs` (n_blocks, vocab), float32; `tokens`: the prompt's tokens, what stands in front of them
    first; `position`: where the distribution was read.
    """

    probs: Tensor
    tokens: tuple[str, ...]
    position: int = -1


@torch.no_grad()
def trajectory(model: Model, prompt: str) -> Trajectory:
    """The lens after one prompt, in one pass of the network."""
    encoded = encode(model, [prompt])
    with recorded(dict(enumerate(model.blocks))) as states:
        last = next_logits(model, encoded)
    logits = read(model, states, torch.tensor([0]), encoded.lengths - 1)
    logits[:, -1] = last  # bit for bit
    tokens = [token_text(model.tokenizer, token) for token in encoded.input_ids[0].tolist()]
    return Trajectory(probs=logits[0].softmax(-1).cpu(), tokens=tuple(tokens))


def read(model: Model, states: Mapping[int, Tensor], rows: Tensor, at: Tensor) -> Tensor:
    """Logits (m, n_blocks, vocab), float32, at a position of each of some rows.

    Args:
        states: block -> hidden states after it (n, length, d_model).
        rows, at: (m,).
    """
    device = model.device
    places = rows.to(device), at.to(device)
    hidden = [states[layer].to(device)[places] for layer in range(model.n_blocks)]
    normed = model.final_norm(torch.stack(hidden, dim=1))  # (m, n_blocks, d_model)
    return model.unembedding(normed).float().to(device)


def table(model: Model, lens: Trajectory) -> pd.DataFrame:
    """What each block would say: its likeliest token, that token's probability, the second and the
    third token.
    """
    probs, tokens = lens.probs.topk(3)
    rows = []
    for p, likeliest in zip(probs[:, 0].tolist(), tokens.tolist(), strict=True):
        first, *others = [token_text(model.tokenizer, token).strip() for token in likeliest]
        rows.append((first, p, *others))
    return pd.DataFrame(rows, columns=["likeliest", "p", "second", "third"]).rename_axis("block")
