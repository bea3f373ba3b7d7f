"""MEMIT: many facts in one change, spread over several layers, each layer's part a ridge regression
against the corpus.

    D_l = R_l K_l' (w C_l + K_l K_l')^-1,   R_l = (z - h_now) / (layers left)

z = the hidden state after the last edited block in the bare prompt, plus the solved shift; h_now =
the same with the layers below already changed; K_l = keys at the subject's last token, half the
bare prompt's and half the mean over prefixed prompts and paraphrases, which also enter the loss of
the solver. Source: arXiv 2210.07229, eq. 14, 20 and algorithm 1. Differs from: solved in the dual
from one cached factor of C; a floor on C's eigenvalues (see SecondMoment; convention="reference"
has none); only the edited blocks run again, up to the subject's last token; a front token; prefixes
are sampled otherwise (see rome).
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from workbench import closed_form
from workbench.activations import recorded
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation, changed
from workbench.editing.records import (
    Resources,
    check_distinct,
    delta_of,
    finite,
    moment_factor,
    moment_of,
)
from workbench.editing.rows import Rows, build_rows, sample_prefixes
from workbench.editing.target_vectors import Solution, Solving, solve, tokens_at_once
from workbench.facts import BadInput, EditRequest
from workbench.models import Model
from workbench.moments import second_moments
from workbench.positions import Encoded

DEPTHS = tuple(layer / 48 for layer in range(13, 18))  # of GPT-2 XL, as published
REMEDY = "lower weight (now {weight:g})"
Update = Callable[
    [int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]  # layer, K (d_in, n), R (d_out, n) -> left, right


class HParams(Solving):
    """Numbers of MEMIT. Published for GPT-2 XL: layers 13-17, lr .5, 20 steps, decay .5, clamp .75,
    weight 20000.
    """

    layers: tuple[int, ...] = Field(min_length=1)  # block indices
    clamp: float = Field(0.75, gt=0)  # |shift| <= clamp |v_0|
    prefixes: int = Field(5, ge=0)  # sampled texts before the prompt
    weight: float = Field(15_000, gt=0)  # w: corpus tokens that a request must outweigh


def scaled(model: Model) -> dict:
    """The weight, where none is published.

    E[k' C^-1 k] = d_in, so a request is as heavy as `weight` / d_in of the corpus: .9 (GPT-J), 1.0
    (Llama-3-8B), 1.4 (Llama-2-7B) and 3.1 (GPT-2 XL) as published.
    """
    return {"weight": model.weight(0).shape[1]}


def prepare(
    model: Model, hparams: HParams, corpus: str = "world", training_requests=None, seed: int = 0
) -> Resources:
    """Second moments of the keys of all edited layers, and the sampled prefixes."""
    found = second_moments(model, hparams.layers, corpus, hparams.moment_tokens)
    return Resources(moments=found, prefixes=sample_prefixes(model, hparams.prefixes, seed))


def check(
    model: Model, requests: Sequence[EditRequest], hparams: Solving, resources: Resources
) -> None:
    """BadInput if the resources are not for this model and these layers."""
    for layer in model.check_layers(hparams.layers):
        moment_of(model, resources, layer)


def targets(
    model: Model, requests: Sequence[EditRequest], hparams: Solving, resources: Resources
) -> Solution:
    """The target vectors, which `edit` takes."""
    return solve(model, requests, max(hparams.layers), "block", resources.prefixes, hparams)


def edit(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: HParams,
    resources: Resources,
    seed: int = 0,
    solution: Solution | None = None,
) -> WeightDelta:
    """A change of rank n in each edited layer. Without a solution it solves for it.

    Peak memory beside the model: the solver's (see target_vectors) or, if more, 8 d_model bytes a
    token of all rows up to the subject and 20 (d_in + d_model) a request; and 12 d_in^2 bytes a
    layer (C, its factor), 16 more while factorising.
    """

    def update(layer, keys, residuals):
        factor = moment_factor(model, resources, layer, hparams.convention)
        return closed_form.ridge_update(
            keys.to(factor.device), residuals.to(factor.device), factor, hparams.weight
        )

    changes, _, solved = spread(model, requests, hparams, resources, update, solution)
    return delta_of("memit", model, requests, hparams, resources, seed, changes, **solved)


@torch.no_grad()
def spread(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: Solving,
    resources: Resources,
    update: Update,
    solution: Solution | None = None,
):
    """Solve the target vectors unless they are given, then change layer after layer by `update`.

    Returns:
        Changes and keys (d_in, n), both by module name, and what the solver says of each request.
    """
    check(model, requests, hparams, resources)
    layers = model.check_layers(hparams.layers)
    solution = solution or targets(model, requests, hparams, resources)
    rows = build_rows(model, requests, resources.prefixes)
    up, weights = rows.up_to_subject(), rows.context_weights(bare_share=0.5)
    parts = [
        _Part(model, rows, weights, up.rows(index), torch.tensor(index), layers)
        for index in up.batches(tokens_at_once(model))
    ]
    changes, used, goal = {}, {}, None
    d_out, d_in = model.weight(layers[0]).shape
    wide = {"dtype": torch.float64, "device": "cpu" if model.device.type == "mps" else model.device}
    for number, layer in enumerate(layers):
        keys, now = torch.zeros(rows.n, d_in, **wide), torch.zeros(rows.n, d_out, **wide)
        for part in parts:
            part.add(layer, keys, now)
        check_distinct(model, requests, keys.T, layer)
        goal = now + solution.shift.to(now) if goal is None else goal
        residuals = ((goal - now) / (len(layers) - number)).T  # (d_out, n)
        name = model.down_projection_name(layer)
        try:
            left, right = (
                factor.float().to(model.device) for factor in update(layer, keys.T, residuals)
            )
        except closed_form.Singular as error:
            raise BadInput(f"layer {layer}: {error}") from None
        changes[name], used[name] = Change(left=left, right=right), keys.T
        if layer != layers[-1]:
            with changed(model, {layer: (left, right)}):
                for part in parts:
                    part.advance(layer, layers[number + 1] - 1)
    return changes, used, {"p_solved": solution.p_target.tolist(), "steps": solution.steps.tolist()}


class _Part:
    """Some of the rows, up to the subject, on their way through the edited blocks; `rest.start` is
    the state before the next edited one.
    """

    def __init__(
        self,
        model: Model,
        rows: Rows,
        weights: torch.Tensor,
        encoded: Encoded,
        index: torch.Tensor,
        layers: Sequence[int],
    ):
        self.model, self.encoded, self.weights = model, encoded, weights[index]
        self.owner, self.subject, self.last = rows.owner[index], rows.subject[index], layers[-1]
        self.bare = torch.isin(index, rows.bare).nonzero()[:, 0]
        self.rest = Continuation(model, encoded, layers[0] - 1, last=layers[-1])
        self.of_bare = self.rest.of(self.bare.to(model.device))

    def add(self, layer: int, keys: torch.Tensor, now: torch.Tensor) -> None:
        """Its share of the mean keys of the layer (n, d_in), and of the hidden states after the
        last block in the bare prompts (n, d_out).
        """
        with recorded({"key": self.model.down_projection(layer)}, inputs=True) as seen:
            after = self.rest.through(self.rest.start, layer, layer)
        key = (
            seen["key"]
            .view(*after.shape[:2], -1)
            .to(self.model.device)[torch.arange(len(self.owner)), self.subject]
        )
        key = finite(key, self.model, layer, self.encoded)
        keys.index_add_(0, self.owner.to(key.device), key * self.weights.to(key)[:, None])
        if len(self.bare):
            end = self.of_bare.through(after[self.bare], layer + 1, self.last)[
                torch.arange(len(self.bare)), self.subject[self.bare]
            ]
            now[self.owner[self.bare]] = finite(end, self.model, layer, self.encoded)

    def advance(self, layer: int, last: int) -> None:
        """Through the block, now changed, to the state before the next edited one."""
        self.rest.start = self.rest.through(self.rest.start, layer, last)
