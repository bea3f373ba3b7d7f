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

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from workbench import closed_form
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation
from workbench.editing.records import (
    Resources,
    check_distinct,
    delta_of,
    finite,
    moment_factor,
    moment_of,
)
from workbench.editing.rows import build_rows, sample_prefixes
from workbench.editing.target_vectors import Solution, Solving, solve, tokens_at_once
from workbench.facts import BadInput, EditRequest
from workbench.models import Model
from workbench.moments import second_moments

DEPTHS = (17 / 48,)  # of GPT-2 XL, as published
REMEDY = "change bare_share (now {bare_share}) or prefixes (now {prefixes})"


class HParams(Solving):
    """Numbers of ROME. Published for GPT-2 XL: layer 17, lr .5, 20 steps, decay .5, clamp 4, KL
    .0625 (arXiv 2202.05262).
    """

    layers: tuple[int, ...] = Field(min_length=1, max_length=1)  # block index
    bare_share: float | None = Field(
        None, ge=0, le=1
    )  # of the bare prompt in k; None = as any other row
    moments: Literal["corpus", "identity"] = (
        "corpus"  # "identity": C = I, EasyEdit's default, which is no ROME
    )
    at_once: int = Field(
        100, ge=1
    )  # facts of one constrained change at most; each takes one dimension of the keys for good


def prepare(
    model: Model, hparams: HParams, corpus: str = "world", training_requests=None, seed: int = 0
) -> Resources:
    """Second moments of the edited layer's keys, if they are asked for, and the sampled prefixes."""
    found = {}
    if hparams.moments == "corpus":
        found = second_moments(model, hparams.layers, corpus, hparams.moment_tokens)
    return Resources(moments=found, prefixes=sample_prefixes(model, hparams.prefixes, seed))


def check(
    model: Model, requests: Sequence[EditRequest], hparams: HParams, resources: Resources
) -> None:
    """BadInput if the facts are too many, or the resources are not for them."""
    if len(requests) > hparams.at_once:
        raise BadInput(
            f"rome: {len(requests)} facts at once, at most {hparams.at_once} fit exactly; edit them in turn, or raise at_once"
        )
    layer = model.check_layers(hparams.layers)[0]
    if hparams.moments == "corpus":
        moment_of(model, resources, layer)


def targets(
    model: Model, requests: Sequence[EditRequest], hparams: HParams, resources: Resources
) -> Solution:
    """The target vectors, which `edit` takes."""
    return solve(model, requests, hparams.layers[0], "mlp", resources.prefixes, hparams)


def edit(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: HParams,
    resources: Resources,
    seed: int = 0,
    solution: Solution | None = None,
) -> WeightDelta:
    """A rank-one change for one request; for n, the smallest change that fits all n exactly, rank
    n. Without a solution it solves for it.

    Peak memory beside the model: the solver's (see target_vectors), and 28 d_in^2 bytes (C, its
    factor, and while factorising).
    """
    check(model, requests, hparams, resources)
    layer = model.check_layers(hparams.layers)[0]
    factor = None
    if hparams.moments == "corpus":
        factor = moment_factor(model, resources, layer, hparams.convention)
    solution = solution or targets(model, requests, hparams, resources)
    keys, outputs, bare_keys, bare_outputs = keys_and_outputs(
        model, requests, layer, resources.prefixes, hparams.bare_share
    )
    check_distinct(model, requests, keys.T, layer)
    if hparams.convention == "reference":
        residuals, at = solution.shift.to(keys), bare_keys
    else:
        residuals, at = bare_outputs + solution.shift.to(keys) - outputs, keys  # v* - W k (- bias)
    wide = keys.device if factor is None else factor.device
    keys, residuals, at = (tensor.T.to(wide) for tensor in (keys, residuals, at))
    try:
        left, right = closed_form.constrained_update(keys, residuals, factor, at)
    except closed_form.Singular as error:
        raise BadInput(f"layer {layer}: {error}") from None
    changes = {model.down_projection_name(layer): Change(left=left.float(), right=right.float())}
    return delta_of(
        "rome",
        model,
        requests,
        hparams,
        resources,
        seed,
        changes,
        p_solved=solution.p_target.tolist(),
        steps=solution.steps.tolist(),
    )


@torch.no_grad()
def keys_and_outputs(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    prefixes: Sequence[str],
    bare_share: float | None = None,
):
    """Mean key k (n, d_in), mean output W k + b (n, d_out), and both in the bare prompt, float64,
    at the subject's last token.
    """
    rows = build_rows(model, requests, prefixes)
    up, projection, found = rows.up_to_subject(), model.down_projection(layer), {}
    for index in up.batches(tokens_at_once(model)):
        part, place = up.rows(index), (torch.arange(len(index)), rows.subject[index])
        seen = Continuation(
            model, part, layer, last=layer, outputs={"out": projection}, inputs={"key": projection}
        ).seen
        for name in seen:
            values = finite(seen[name][place], model, layer, part)
            found.setdefault(name, torch.zeros(len(rows.owner), values.shape[1]).to(values))[
                index
            ] = values
    weights = rows.context_weights(bare_share)
    return (
        rows.mean(found["key"], weights),
        rows.mean(found["out"], weights),
        found["key"][rows.bare],
        found["out"][rows.bare],
    )
