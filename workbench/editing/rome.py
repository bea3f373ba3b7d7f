"""ROME: one exact rank-one change of one down-projection; for several facts at once its
equality-constrained form, EMMET.

    D = R (K' C^-1 K)^-1 (C^-1 K)',   R = V* - W K;   with one fact   D = r (C^-1 k)' / (k' C^-1 k)

k is the mean key at the subject's last token over the bare prompt, the prefixed ones and the
paraphrases; v* = the MLP's output in the bare prompt plus the solved shift, whose loss is the mean
over the same rows. Where the subject begins the prompt its bare key may lie far from that mean, and
the change then misses it: `bare_share` gives the bare prompt a share of its own. Source: ROME,
arXiv 2202.05262; EMMET, arXiv 2403.14236. Differs from: one key throughout (r-ROME, arXiv
2403.07175: two keys explode; convention="reference" divides by the bare prompt's key, as the first
code did); a floor on C's eigenvalues (see SecondMoment; convention="reference" has none); a front
token; prefixes are sampled by seed in two batches (half of 5 tokens, half of 10) from the 5
likeliest tokens, stripped and kept in the record, where the first code draws 10 of each.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.activations import recorded, stop_after
from workbench.closed_form import constrained_update
from workbench.deltas import Change, WeightDelta
from workbench.editing import records, target_vectors
from workbench.editing.continuation import at
from workbench.editing.records import Requests, Resources, described
from workbench.editing.rows import build_rows, sample_prefixes
from workbench.editing.target_vectors import Solution, Solving, solve, tokens_at_once
from workbench.facts import BadInput
from workbench.models import Model

DEPTHS = (17 / 48,)  # of GPT-2 XL, as published
REMEDY = "change bare_share (now {bare_share}) or prefixes (now {prefixes})"


class HParams(Solving):
    """Numbers of ROME. Published for GPT-2 XL: layer 17, lr .5, 20 steps, decay .5, clamp 4, KL
    .0625 (arXiv 2202.05262).
    """

    layers: tuple[int, ...] = Field(min_length=1, max_length=1)  # block index
    # The bare prompt's share in k; None = that of any other row.
    bare_share: float | None = Field(None, ge=0, le=1)
    # "identity": C = I, EasyEdit's default, which is no ROME.
    moments: Literal["corpus", "identity"] = "corpus"
    # Facts of one constrained change at most; each takes one dimension of the keys for good.
    at_once: int = Field(100, ge=1)


def prepare(model: Model, hparams: HParams, corpus="", training_requests=None, seed=0) -> Resources:
    """Second moments of the layer's keys, if they are asked for, and the sampled prefixes."""
    if hparams.moments == "identity":
        return Resources(prefixes=sample_prefixes(model, hparams.prefixes, seed))
    return target_vectors.prepare(model, hparams, corpus, training_requests, seed)


def check(model: Model, requests: Requests, hparams: HParams, resources: Resources) -> None:
    """BadInput if the facts are too many, or the resources are not for them."""
    if len(requests) > hparams.at_once:
        problem = f"{len(requests)} facts at once, at most {hparams.at_once} fit exactly"
        raise BadInput(f"rome: {problem}; edit them in turn, or raise at_once")
    model.check_layers(hparams.layers)
    if hparams.moments == "corpus":
        records.moment_of(model, resources, hparams.layers[0])


def targets(model: Model, requests: Requests, hparams: HParams, resources: Resources) -> Solution:
    """The target vectors, which `edit` takes."""
    return solve(model, requests, hparams.layers[0], "mlp", resources.prefixes, hparams)


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed=0, solution=None
) -> WeightDelta:
    """A rank-one change for one request; for n, the smallest change that fits all n exactly, rank
    n. Without a solution it solves for it.

    Peak memory beside the model: the solver's (see target_vectors), and 28 d_in^2 bytes (C, its
    factor, and while factorising).
    """
    check(model, requests, hparams, resources)
    layer = hparams.layers[0]
    factor = None
    if hparams.moments == "corpus":
        factor = records.moment_factor(model, resources, layer, hparams.convention)
    solution = solution or targets(model, requests, hparams, resources)
    means = keys_and_outputs(model, requests, layer, resources.prefixes, hparams.bare_share)
    keys, outputs, bare_keys, bare_outputs = means
    records.check_distinct(model, requests, keys.T, layer)
    shift = solution.shift.to(keys)
    if hparams.convention == "reference":
        met_at = bare_keys
        residuals = shift
    else:
        met_at = keys
        residuals = bare_outputs + shift - outputs  # v* - W k (- bias)
    device = keys.device if factor is None else factor.device
    columns = [tensor.T.to(device) for tensor in (keys, residuals, met_at)]
    with records.solvable(layer):
        left, right = constrained_update(columns[0], columns[1], factor, columns[2])
    changes = {model.down_projection_name(layer): Change(left=left.float(), right=right.float())}
    delta = WeightDelta.of(model, changes=changes)
    return described("rome", model, delta, requests, hparams, resources, seed, **solution.record())


@torch.no_grad()
def keys_and_outputs(
    model: Model, requests: Requests, layer: int, prefixes: tuple, bare_share: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean key k (n, d_in), mean output W k + b (n, d_out), and both in the bare prompt, float64,
    at the subject's last token.
    """
    rows = build_rows(model, requests, prefixes)
    texts = rows.up_to_subject()
    d_out, d_in = model.weight(layer).shape
    keys = records.wide(torch.zeros(len(rows.owner), d_in, device=model.device))
    outputs = records.wide(torch.zeros(len(rows.owner), d_out, device=model.device))
    projection = {"projection": model.down_projection(layer)}
    for index in texts.batches(tokens_at_once(model)):
        batch = texts.rows(index).to(model.device)
        inputs = recorded(projection, inputs=True)
        end = stop_after(model.blocks[layer])
        with inputs as batch_keys, recorded(projection) as batch_outputs, end:
            model.network(**batch.arguments(), logits_to_keep=1, use_cache=False)
        for values, record in ((keys, batch_keys), (outputs, batch_outputs)):
            value = at(record["projection"], rows.subject[index]).to(model.device)
            values[index] = records.finite(value, model, layer, batch)
    weights = rows.context_weights(bare_share).to(keys.device)[:, None]
    means = [rows.total(values * weights) for values in (keys, outputs)]
    return *means, keys[rows.bare], outputs[rows.bare]
