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
from torch import Tensor

from workbench.activations import recorded
from workbench.closed_form import Factors, ridge_update
from workbench.deltas import Change, WeightDelta
from workbench.editing import records, target_vectors
from workbench.editing.continuation import Continuation, at, changed
from workbench.editing.records import Requests, Resources, described
from workbench.editing.rows import Rows, build_rows
from workbench.editing.target_vectors import Solution, Solving, solve, tokens_at_once
from workbench.models import Model

DEPTHS = tuple(layer / 48 for layer in range(13, 18))  # of GPT-2 XL, as published
REMEDY = "lower weight (now {weight:g})"

Update = Callable[[int, Tensor, Tensor], Factors]  # layer, K (d_in, n), R (d_out, n)


class SeveralLayers(Solving):
    """Numbers of a change that is spread over several layers."""

    layers: tuple[int, ...] = Field(min_length=1)  # block indices
    clamp: float = Field(0.75, gt=0)  # |shift| <= clamp |v_0|
    prefixes: int = Field(5, ge=0)  # sampled texts before the prompt


class HParams(SeveralLayers):
    """Numbers of MEMIT. Published for GPT-2 XL: layers 13-17, lr .5, 20 steps, decay .5, clamp .75,
    weight 20000.
    """

    weight: float = Field(15_000, gt=0)  # w: corpus tokens that a request must outweigh


def scaled(model: Model) -> dict:
    """The weight, where none is published.

    E[k' C^-1 k] = d_in, so a request is as heavy as `weight` / d_in of the corpus: .9 (GPT-J), 1.0
    (Llama-3-8B), 1.4 (Llama-2-7B) and 3.1 (GPT-2 XL) as published.
    """
    return {"weight": model.weight(0).shape[1]}


prepare = target_vectors.prepare


def check(model: Model, requests: Requests, hparams: Solving, resources: Resources) -> None:
    """BadInput if the resources are not for this model and these layers."""
    for layer in model.check_layers(hparams.layers):
        records.moment_of(model, resources, layer)


def targets(model: Model, requests: Requests, hparams: Solving, resources: Resources) -> Solution:
    """The target vectors, which `edit` takes."""
    return solve(model, requests, max(hparams.layers), "block", resources.prefixes, hparams)


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed=0, solution=None
) -> WeightDelta:
    """A change of rank n in each edited layer. Without a solution it solves for it.

    Peak memory beside the model: the solver's (see target_vectors) or, if more, 8 d_model bytes a
    token of all rows up to the subject and 20 (d_in + d_model) a request; and 12 d_in^2 bytes a
    layer (C, its factor), 16 more while factorising.
    """

    def update(layer, keys, residuals):
        factor = records.moment_factor(model, resources, layer, hparams.convention)
        return ridge_update(keys, residuals, factor, hparams.weight)

    check(model, requests, hparams, resources)
    solution = solution or targets(model, requests, hparams, resources)
    changes = spread(model, requests, hparams, resources, update, solution)[0]
    delta = WeightDelta.of(model, changes=changes)
    return described("memit", model, delta, requests, hparams, resources, seed, **solution.record())


@torch.no_grad()
def spread(
    model: Model, requests: Requests, hparams, resources: Resources, update: Update, solution
) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Change layer after layer by `update`, each on top of those before it.

    Returns:
        Changes and keys (d_in, n), both by module name.
    """
    layers = model.check_layers(hparams.layers)
    walk = Walk(model, build_rows(model, requests, resources.prefixes), layers)
    changes = {}
    all_keys = {}
    goal = None
    for done, layer in enumerate(layers):
        keys, hidden = walk.read(layer)  # (d_in, n), (d_model, n) after the last edited block
        records.check_distinct(model, requests, keys, layer)
        if goal is None:
            goal = hidden + solution.shift.T.to(hidden)  # z, fixed before anything changes
        residuals = (goal - hidden) / (len(layers) - done)  # R_l = (z - h_now) / (layers left)
        device = resources.moments[layer].matrix.device
        with records.solvable(layer):
            factors = update(layer, keys.to(device), residuals.to(device))
        left, right = (factor.float().to(model.device) for factor in factors)
        name = model.down_projection_name(layer)
        changes[name] = Change(left=left, right=right)
        all_keys[name] = keys
        walk.advance(layer, Factors(left, right))
    return changes, all_keys


class Walk:
    """The prompts of n requests, up to the subject, on their way through the edited blocks.

    They go in batches: the numbers of some rows, and a continuation of the network whose `start` is
    the hidden state before the next edited block.
    """

    def __init__(self, model: Model, rows: Rows, layers: Sequence[int]):
        self.model = model
        self.rows = rows
        self.layers = layers
        self.weights = rows.context_weights(bare_share=0.5)
        self.texts = rows.up_to_subject()
        self.batches = []
        for index in self.texts.batches(tokens_at_once(model)):
            texts = self.texts.rows(index)
            rest = Continuation(model, texts, layers[0] - 1, last=layers[-1])
            self.batches.append((torch.tensor(index), rest))

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The mean keys of the layer (d_in, n) and, in the bare prompts, the hidden states after
        the last edited block (d_model, n).
        """
        matrix = self.model.weight(layer)  # (d_out, d_in)
        keys = self._zeros(matrix.shape[1])
        hidden = self._zeros(matrix.shape[0])
        for index, rest in self.batches:
            with recorded({"key": self.model.down_projection(layer)}, inputs=True) as record:
                after = rest.through(rest.start, layer, layer)
            key = self._at_subject(record["key"], index, layer)
            weight = self.weights[index].to(key)[:, None]
            keys.index_add_(0, self.rows.owner[index].to(key.device), key * weight)
            bare = torch.isin(index, self.rows.bare).nonzero()[:, 0]
            if len(bare):
                end = rest.select(bare).through(after[bare], layer + 1, self.layers[-1])
                hidden[self.rows.owner[index[bare]]] = self._at_subject(end, index[bare], layer)
        return keys.T, hidden.T

    def _zeros(self, width: int) -> Tensor:
        return records.wide(torch.zeros(self.rows.n, width, device=self.model.device))

    def _at_subject(self, output: Tensor, index: Tensor, layer: int) -> Tensor:
        """What a module gave at the last token of the subject in these rows, (b, d)."""
        values = at(output, self.rows.subject[index]).to(self.model.device)
        return records.finite(values, self.model, layer, self.texts)

    def advance(self, layer: int, factors: Factors) -> None:
        """Through the block, now changed, to the state before the next edited one."""
        following = [number for number in self.layers if number > layer]
        if not following:
            return
        with changed(self.model, {layer: factors}):
            for _, rest in self.batches:
                rest.start = rest.through(rest.start, layer, following[0] - 1)
