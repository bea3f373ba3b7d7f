"""AlphaEdit: MEMIT whose changes leave alone what the corpus uses, by a projector P onto the null
space of C.

    D_l = R_l K_l' P (K_l K_l' P + K_p K_p' P + a I)^-1,   K_p: keys of all earlier edits

R_l, K_l and the place of paraphrases are MEMIT's. Source: arXiv 2410.02355, eq. 11-14. Differs
from: solved in the dual; the threshold on C's eigenvalues is absolute (as published, so it depends
on the scale of the keys), a fraction of the trace, or a rank; the ridge may be counted in the trace
too; earlier keys are passed in and out: `resources = remember(resources, delta)`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from tqdm.auto import tqdm

from workbench import closed_form
from workbench.deltas import WeightDelta
from workbench.editing import memit
from workbench.editing.records import Resources, delta_of, moment_of
from workbench.editing.target_vectors import Solution, Solving
from workbench.facts import BadInput, EditRequest
from workbench.models import Model

DEPTHS = memit.DEPTHS
REMEDY = (
    "lower ridge (now {ridge:g}, {ridge_unit}) or protect less by threshold (now {threshold:g}, "
    "{null_space})"
)


class HParams(Solving):
    """Numbers of AlphaEdit. Published: MEMIT's, threshold 2e-2 and ridge 10."""

    layers: tuple[int, ...] = Field(min_length=1)  # block indices
    clamp: float = Field(0.75, gt=0)  # |shift| <= clamp |v_0|
    prefixes: int = Field(5, ge=0)  # sampled texts before the prompt
    null_space: Literal["absolute", "trace", "rank"] = (
        "absolute"  # how `threshold` divides C's eigenvalues
    )
    threshold: float = Field(
        2e-2, gt=0
    )  # an eigenvalue; or the share of the trace given up; or how many eigenvectors are protected
    ridge: float = Field(10.0, gt=0)  # a
    ridge_unit: Literal["absolute", "trace"] = (
        "absolute"  # "trace": a = ridge tr(C), C's trace being E|k|^2
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.null_space == "trace" and self.threshold >= 1:
            raise BadInput(f"threshold {self.threshold}: a share of the trace is below 1")
        if self.null_space == "rank" and (
            self.threshold < 1 or self.threshold != int(self.threshold)
        ):
            raise BadInput(
                f"threshold {self.threshold}: a rank is a whole number of eigenvectors, 1 or more"
            )
        return self


def scaled(model: Model) -> dict:
    """Threshold and ridge, where none is published: the published ones are absolute, these are
    shares of C's trace, as heavy as what was chosen for the world's models (ridge .011 to .047).
    """
    return {"null_space": "trace", "threshold": 0.1, "ridge_unit": "trace", "ridge": 0.02}


def prepare(
    model: Model, hparams: HParams, corpus: str = "world", training_requests=None, seed: int = 0
) -> Resources:
    """MEMIT's resources, and the null space of each layer's second moment."""
    resources = memit.prepare(model, hparams, corpus, training_requests, seed)
    spaces = {}
    for layer in tqdm(hparams.layers, desc="null spaces", unit="layer", disable=None):
        try:
            spaces[layer] = closed_form.null_space(
                moment_of(model, resources, layer).matrix, hparams.null_space, hparams.threshold
            )
        except closed_form.Singular as error:
            raise BadInput(f"layer {layer}: {error}") from None
    return replace(resources, null_spaces=spaces)


def check(
    model: Model, requests: Sequence[EditRequest], hparams: HParams, resources: Resources
) -> None:
    """BadInput if the resources are not for this model, these layers and this rule."""
    memit.check(model, requests, hparams, resources)
    for layer in model.check_layers(hparams.layers):
        space = resources.null_spaces.get(layer)
        if space is None or (space.rule, space.threshold) != (
            hparams.null_space,
            hparams.threshold,
        ):
            raise BadInput(
                f"layer {layer}: the resources hold no null space by {hparams.null_space} {hparams.threshold}; prepare again"
            )


targets = memit.targets


def edit(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: HParams,
    resources: Resources,
    seed: int = 0,
    solution: Solution | None = None,
) -> WeightDelta:
    """A change of rank n in each edited layer; the delta carries its keys. Without a solution it
    solves for it.

    Peak memory beside the model: MEMIT's, and 4 d_in^2 bytes a layer at most (the thinner basis of
    the null space or of its complement).
    """

    check(model, requests, hparams, resources)

    def update(layer, keys, residuals):
        memory = resources.memory.get(model.down_projection_name(layer), keys[:, :0])
        space = resources.null_spaces[layer]
        ridge = hparams.ridge
        if hparams.ridge_unit == "trace":
            ridge *= moment_of(model, resources, layer).matrix.double().trace().item()
        keys, residuals, memory = (
            tensor.to(space.basis.device) for tensor in (keys, residuals, memory)
        )
        return closed_form.projected_update(keys, residuals, space, ridge, memory)

    changes, keys, solved = memit.spread(model, requests, hparams, resources, update, solution)
    earlier = {name: memory.shape[1] for name, memory in resources.memory.items()}
    return replace(
        delta_of(
            "alphaedit",
            model,
            requests,
            hparams,
            resources,
            seed,
            changes,
            memory=earlier,
            **solved,
        ),
        keys=keys,
    )


def remember(resources: Resources, delta: WeightDelta) -> Resources:
    """New resources that also hold the keys of this delta, for the edits that follow it.

    Raises:
        BadInput: a delta without keys, or of other weights than the resources.
    """
    if not delta.keys or {delta.fingerprint} != {
        moment.model for moment in resources.moments.values()
    }:
        raise BadInput(
            f"only AlphaEdit's deltas for the weights of these resources have keys to remember; this one is of {delta.model}"
        )
    memory = dict(resources.memory)
    for name, keys in delta.keys.items():
        memory[name] = (
            torch.cat([memory[name].to(keys.device), keys], 1) if name in memory else keys
        )
    return replace(resources, memory=memory)
