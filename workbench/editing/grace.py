"""GRACE: a codebook of keys and values at one block, which answers near its keys.

    h(x) = v_i  if |x - k_i| <= r_i for the nearest key k_i,  else  W x
    v_i = argmin_v  mean_j [ -(1/T) sum_t log p(o_t | x_ij, o_<t; h <- v) ]
    r_i = min(radius, half the way to the nearest key of another request)

k_ij is what goes into the block's down-projection at the last token of statement j of request i
(its prompt, or a paraphrase); the statements of a request share its value, which starts as the
down-projection's own output in the bare prompt. Source: arXiv 2211.11031. Differs from: the
down-projection is what is replaced; all values are solved at once; a statement adds a key of its
own where the paper widens a radius; the lookup is made at every position, so that it is the same in
whatever batch a text is read; a radius in units of |k_i| (radius_unit="absolute" as published). The
public code replaces GPT-2 XL's first MLP matrix, and its values start at random.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workbench.activations import put, recorded, replaced
from workbench.editing.continuation import Continuation, at
from workbench.editing.records import Numbers, Requests, Resources, described, finite
from workbench.editing.rows import Rows, build_rows
from workbench.edits import Codebook
from workbench.models import Model
from workbench.positions import UNREAD

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
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed: int = 0
) -> Codebook:
    """A key for each statement and a value for each request. Blocks below the layer run once.

    Peak memory beside the model: for all statements at once, a token and block from the layer on,
    64 d_model + 24 d_in bytes, and 16 vocab a token of the target.
    """
    layer = model.check_layers(hparams.layers)[0]
    rows = build_rows(model, requests)
    last = (rows.labels != UNREAD).int().argmax(1)  # (r,), of the prompt
    projection = {"projection": model.down_projection(layer)}
    rest = Continuation(model, rows.encoded, layer - 1)
    with torch.no_grad(), recorded(projection, inputs=True) as into, recorded(projection) as out:
        rest.through(rest.start, layer, layer)
    keys = finite(at(into["projection"], last), model, layer, rows.encoded).float()
    values = finite(at(out["projection"], last), model, layer, rows.encoded).float()
    solved, reached = solve(model, rows, rest, last, values[rows.bare], hparams)
    reach = radii(keys, rows.owner, hparams)
    book = Codebook.of(model, layer=layer, keys=keys, values=solved[rows.owner], radii=reach)
    p_solved = reached.tolist()
    return described("grace", model, book, requests, hparams, resources, seed, p_solved=p_solved)


def solve(
    model: Model, rows: Rows, rest: Continuation, last: Tensor, start: Tensor, hparams: HParams
) -> tuple[Tensor, Tensor]:
    """The values (n, d_model), float32, from `start`, and the p(target) that each reaches (n,): of
    all tokens, the geometric mean over its statements.
    """
    values = start.clone().requires_grad_()
    answers = rows.answers(model.device)
    tokens = torch.bincount(answers.row)[:, None]  # of each statement's target
    weights = rows.context_weights().to(start)[:, None]

    def change(output: Tensor, key: Tensor) -> Tensor:
        return put(last, values[rows.owner], output, key)

    adam = torch.optim.Adam([values], lr=hparams.learning_rate)
    with torch.enable_grad(), replaced(model.down_projection(hparams.layers[0]), change):
        for step in range(hparams.steps + 1):
            logits = rest.answer_logits(answers)
            nll = F.cross_entropy(logits, answers.token, reduction="none")[:, None]
            statements = torch.zeros_like(weights).index_add(0, answers.row, nll)
            finite(statements.detach(), model, hparams.layers[0], rows.encoded)
            if step == hparams.steps:
                break
            adam.zero_grad()
            rows.total(statements / tokens * weights).sum().backward(inputs=[values])
            adam.step()
    reached = rows.total(statements.detach() * weights)[:, 0]
    return values.detach(), (-reached).exp()


def radii(keys: Tensor, owner: Tensor, hparams: HParams) -> Tensor:
    """How far each key (r, d_in) answers, (r,): never half way to a key of another request."""
    size = hparams.radius * torch.ones_like(keys[:, 0])
    if hparams.radius_unit == "norm":
        size = hparams.radius * keys.norm(dim=1)
    same = (owner[:, None] == owner).to(keys.device)
    distance = Codebook.distances(keys, keys).masked_fill(same, float("inf"))
    return size.minimum(distance.min(1).values / 2)
