"""MEMIT: many facts in one change, spread over several layers, each layer's part a ridge regression against the corpus.

    D_l = R_l K_l' (w C_l + K_l K_l')^-1,   R_l = (z - h_now) / (layers left)

z = the hidden state after the last edited block in the bare prompt, plus the solved shift; h_now = the same with the layers below
already changed; K_l = keys at the subject's last token, half the bare prompt's and half the mean over prefixed prompts and
paraphrases, which also enter the loss of the solver. Source: arXiv 2210.07229, eq. 14, 20 and algorithm 1. Differs from: solved in
the dual from one cached factor of C; only the edited blocks run again, up to the subject's last token; BOS in front.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from workbench import closed_form
from workbench.activations import recorded
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation
from workbench.editing.records import Resources, delta_of, finite, moment_factor, moment_of
from workbench.editing.rows import build_rows, sample_prefixes
from workbench.editing.target_vectors import Solution, Solving, solve
from workbench.facts import EditRequest
from workbench.models import Model
from workbench.moments import second_moments

Update = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # layer, K (d_in, n), R (d_out, n) -> left, right


class HParams(Solving):
    """Numbers of MEMIT. Published for GPT-2 XL: layers 13-17, lr .5, 20 steps, decay .5, clamp .75, weight 20000."""

    layers: tuple[int, ...] = Field(min_length=1)  # block indices
    clamp: float = Field(0.75, gt=0)  # |shift| <= clamp |v_0|
    prefixes: int = Field(5, ge=0)  # sampled texts before the prompt
    weight: float = Field(15_000, gt=0)  # w: corpus tokens that a request must outweigh


def prepare(model: Model, hparams: HParams, corpus: str = "world", training_requests=None, seed: int = 0) -> Resources:
    """Second moments of the keys of all edited layers, and the sampled prefixes."""
    found = second_moments(model, hparams.layers, corpus, hparams.moment_tokens)
    return Resources(moments=found, prefixes=sample_prefixes(model, hparams.prefixes, seed))


def check(model: Model, requests: Sequence[EditRequest], hparams: Solving, resources: Resources) -> None:
    """BadInput if the resources are not for this model and these layers."""
    for layer in model.check_layers(hparams.layers):
        moment_of(model, resources, layer)


def targets(model: Model, requests: Sequence[EditRequest], hparams: Solving, resources: Resources) -> Solution:
    """The target vectors, which `edit` takes."""
    return solve(model, requests, max(hparams.layers), "block", resources.prefixes, hparams)


def edit(
    model: Model, requests: Sequence[EditRequest], hparams: HParams, resources: Resources, seed: int = 0, solution: Solution | None = None
) -> WeightDelta:
    """A change of rank n in each edited layer. Without a solution it solves for it.

    Peak memory beside the model: the solver's (see target_vectors) or 16 (d_model + d_in) bytes a token of all rows up to the subject, which
    is more; and 12 d_in^2 bytes a layer (C, its factor), 16 more while factorising.
    """

    def update(layer, keys, residuals):
        factor = moment_factor(model, resources, layer)
        return closed_form.ridge_update(keys.to(factor.device), residuals.to(factor.device), factor, hparams.weight)

    changes, _, solved = spread(model, requests, hparams, resources, update, solution)
    return delta_of("memit", model, requests, hparams, resources, seed, changes, **solved)


@torch.no_grad()
def spread(model: Model, requests: Sequence[EditRequest], hparams: Solving, resources: Resources, update: Update, solution: Solution | None = None):
    """Solve the target vectors unless they are given, then change layer after layer by `update`.

    Returns:
        Changes and keys (d_in, n), both by module name, and what the solver says of each request.
    """
    check(model, requests, hparams, resources)
    layers = model.check_layers(hparams.layers)
    solution = solution or targets(model, requests, hparams, resources)
    rows = build_rows(model, requests, resources.prefixes)
    every = Continuation(model, rows.up_to_subject(), layers[0] - 1, last=layers[-1])
    bare = every.of(rows.bare.to(model.device))
    row, at, weights = torch.arange(len(rows.owner)), rows.subject, rows.context_weights(bare_share=0.5)
    state, goal = every.start, None
    changes, used = {}, {}
    for number, layer in enumerate(layers):
        with recorded({"key": model.down_projection(layer)}, inputs=True) as seen:
            after = every.through(state, layer, layer)
        all_keys = seen["key"].view(*after.shape[:2], -1).to(model.device)
        now = finite(bare.through(after[rows.bare], layer + 1, layers[-1])[row[: rows.n], at[rows.bare]], model, layer)
        goal = now + solution.shift.to(now) if goal is None else goal
        keys = rows.mean(finite(all_keys[row, at], model, layer), weights).T  # (d_in, n)
        residuals = ((goal - now) / (len(layers) - number)).T  # (d_out, n)
        name = model.down_projection_name(layer)
        left, right = (factor.float().to(model.device) for factor in update(layer, keys, residuals))
        changes[name], used[name] = Change(left=left, right=right), keys
        if layer != layers[-1]:  # what the block puts out moves by D k
            state = every.through((after + all_keys.float() @ right @ left.T).to(after.dtype), layer + 1, layers[number + 1] - 1)
    return changes, used, {"p_target": solution.p_target.tolist(), "steps": solution.steps.tolist()}
