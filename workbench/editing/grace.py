"""GRACE: a codebook of keys and values at one block, which answers where the model comes near a key.

    h(x) = v_i  if |x - k_i| <= r_i for the nearest key k_i,  else  W x
    v_i = argmin_v  mean_j [ -(1/T) sum_t log p(o_t | x_ij, o_<t; h <- v) ]
    r_i = min(radius, half the way to the nearest key of another request)

k_ij is what goes into the block's down-projection at the last token of statement j of request i
(its prompt, or a paraphrase); the statements of a request share its value, which starts as the
down-projection's own output in the bare prompt. Source: arXiv 2211.11031. Differs from: the
down-projection is what is replaced; all values are solved at once; a statement adds a key of its
own where the paper widens a radius; the lookup is made at every position, so that it is the same in
whatever batch a text is read; a radius in units of |k_i| (radius_unit="absolute" as published).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from workbench.activations import replaced
from workbench.editing.continuation import Continuation
from workbench.editing.records import Numbers, Resources, described, finite
from workbench.editing.rows import Rows, build_rows
from workbench.edits import Codebook
from workbench.facts import EditRequest
from workbench.models import Model

DEPTHS = (35 / 48,)  # of GPT-2 XL, as published
REMEDY = "raise steps (now {steps}) or learning_rate (now {learning_rate})"


class HParams(Numbers):
    """Numbers of GRACE. Published for GPT-2 XL: layer 35, Adam 1.0, 100 steps, radius 1."""

    layers: tuple[int, ...] = Field(min_length=1, max_length=1)  # block index
    steps: int = Field(100, ge=1)  # updates of the values
    learning_rate: float = Field(1.0, gt=0)  # Adam's
    radius: float = Field(0.2, gt=0)  # around a key
    radius_unit: Literal["norm", "absolute"] = "norm"  # "norm": of the key's own length


def edit(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: HParams,
    resources: Resources,
    seed: int = 0,
) -> Codebook:
    """A key for each statement and a value for each request. Blocks below the layer run once."""
    layer = model.check_layers(hparams.layers)[0]
    rows = build_rows(model, requests)
    last = last_of_prompt(rows).to(model.device)
    projection = model.down_projection(layer)
    rest = Continuation(
        model, rows.encoded, layer - 1, outputs={"value": projection}, inputs={"key": projection}
    )
    row = torch.arange(len(last), device=model.device)
    keys = finite(rest.seen["key"][row, last], model, layer, rows.encoded).float()
    start = finite(rest.seen["value"][row, last], model, layer, rows.encoded).float()
    values, p_solved = solved_values(model, rows, rest, last, start[rows.bare], hparams)
    codebook = Codebook.of(
        model,
        layer=layer,
        keys=keys,
        values=values[rows.owner],
        radii=radii(keys, rows.owner, hparams),
    )
    return described(
        "grace", model, codebook, requests, hparams, resources, seed, p_solved.tolist()
    )


def last_of_prompt(rows: Rows) -> torch.Tensor:
    """Position of the last token before the target in every row, (r,)."""
    return (rows.labels != -100).int().argmax(1)


def solved_values(
    model: Model,
    rows: Rows,
    rest: Continuation,
    last: torch.Tensor,
    start: torch.Tensor,
    hparams: HParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values (n, d_model), float32, from `start` (n, d_model), and the p(target) that each
    reaches (n,): of all tokens, the geometric mean over its statements.
    """
    values = start.clone().requires_grad_()
    owner = rows.owner.to(model.device)
    row = torch.arange(len(last), device=model.device)
    text, position = (rows.labels != -100).nonzero(as_tuple=True)
    labels = rows.labels[text, position].to(model.device)
    text, position = text.to(model.device), position.to(model.device)

    def put(output: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        output = output.view(*rest.start.shape[:2], -1).clone()
        output[row, last] = values[owner].to(output.dtype)
        return output

    adam = torch.optim.Adam([values], lr=hparams.learning_rate)
    with torch.enable_grad(), replaced(model.down_projection(hparams.layers[0]), put):
        for step in range(hparams.steps + 1):
            logits = rest.logits(rest.start, text, position)
            token_loss = F.cross_entropy(logits, labels, reduction="none")
            losses = torch.zeros(len(last), device=model.device).index_add(0, text, token_loss)
            finite(losses.detach(), model, hparams.layers[0], rows.encoded)
            if step == hparams.steps:
                break
            per_token = losses / torch.bincount(text, minlength=len(last))
            per_request = rows.mean(per_token[:, None], rows.context_weights())
            adam.zero_grad()
            per_request.sum().backward(inputs=[values])
            adam.step()
    reached = rows.mean(losses.detach()[:, None], rows.context_weights())[:, 0]
    return values.detach(), (-reached).exp()


def radii(keys: torch.Tensor, owner: torch.Tensor, hparams: HParams) -> torch.Tensor:
    """How far each key (r, d_in) answers, (r,): never half way to a key of another request."""
    length = keys.norm(dim=1) if hparams.radius_unit == "norm" else torch.ones_like(keys[:, 0])
    others = owner[:, None] != owner
    distance = Codebook.distances(keys, keys).masked_fill(~others.to(keys.device), float("inf"))
    return (hparams.radius * length).minimum(distance.min(1).values / 2)
