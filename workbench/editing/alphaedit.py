"""AlphaEdit: MEMIT whose changes leave alone what the corpus uses, by a projector P onto the null
space of C.

    D_l = R_l K_l' P (K_l K_l' P + K_p K_p' P + a I)^-1,   K_p: keys of all earlier edits

R_l, K_l and the place of paraphrases are MEMIT's. Source: arXiv 2410.02355, eq. 11-14. Differs
from: solved in the dual; the threshold on C's eigenvalues is absolute (as published, so it depends
on the scale of the keys), a fraction of the trace, or a rank; the ridge may be counted in the trace
too; earlier keys are passed in and out: `resources = remember(resources, delta)`.
"""

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator
from tqdm.auto import tqdm

from workbench.closed_form import null_space, projected_update
from workbench.deltas import WeightDelta, with_keys
from workbench.editing import memit, records
from workbench.editing.records import Requests, Resources
from workbench.facts import BadInput
from workbench.models import Model

DEPTHS = memit.DEPTHS
REMEDY = "lower ridge (now {ridge:g}, {ridge_unit}) or protect less by threshold"
REMEDY += " (now {threshold:g}, {null_space})"


class HParams(memit.SeveralLayers):
    """Numbers of AlphaEdit. Published: MEMIT's, threshold 2e-2 and ridge 10."""

    # How `threshold` divides C's eigenvalues: it is an eigenvalue; or the share of the trace given
    # up; or how many eigenvectors are protected.
    null_space: Literal["absolute", "trace", "rank"] = "absolute"
    threshold: float = Field(2e-2, gt=0)
    ridge: float = Field(10.0, gt=0)  # a
    # "trace": a = ridge tr(C), C's trace being E|k|^2.
    ridge_unit: Literal["absolute", "trace"] = "absolute"

    @model_validator(mode="after")
    def _check(self) -> Self:
        number = f"threshold {self.threshold}"
        if self.null_space == "trace" and self.threshold >= 1:
            raise BadInput(f"{number}: a share of the trace is below 1")
        if self.null_space == "rank" and (self.threshold < 1 or self.threshold % 1):
            raise BadInput(f"{number}: a rank is a whole number of eigenvectors, 1 or more")
        return self


def scaled(model: Model) -> dict:
    """Threshold and ridge, where none is published: the published ones are absolute, these are
    shares of C's trace, as heavy as what was chosen for the world's models (ridge .011 to .047).
    """
    return {"null_space": "trace", "threshold": 0.1, "ridge_unit": "trace", "ridge": 0.02}


def prepare(model: Model, hparams: HParams, corpus="", training_requests=None, seed=0) -> Resources:
    """MEMIT's resources, and the null space of each layer's second moment."""
    resources = memit.prepare(model, hparams, corpus, training_requests, seed)
    spaces = {}
    for layer in tqdm(hparams.layers, desc="null spaces", unit="layer", disable=None):
        matrix = records.moment_of(model, resources, layer).matrix
        with records.solvable(layer):
            spaces[layer] = null_space(matrix, hparams.null_space, hparams.threshold)
    return replace(resources, null_spaces=spaces)


def check(model: Model, requests: Requests, hparams: HParams, resources: Resources) -> None:
    """BadInput if the resources are not for this model, these layers and this rule."""
    memit.check(model, requests, hparams, resources)
    rule = (hparams.null_space, hparams.threshold)
    for layer in hparams.layers:
        space = resources.null_spaces.get(layer)
        if space is None or (space.rule, space.threshold) != rule:
            problem = f"the resources hold no null space by {rule[0]} {rule[1]}"
            raise BadInput(f"layer {layer}: {problem}; prepare again")


targets = memit.targets


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed=0, solution=None
) -> WeightDelta:
    """A change of rank n in each edited layer; the delta carries its keys. Without a solution it
    solves for it.

    Peak memory beside the model: MEMIT's, and 4 d_in^2 bytes a layer at most (the thinner basis of
    the null space or of its complement).
    """

    def update(layer, keys, residuals):
        name = model.down_projection_name(layer)
        memory = resources.memory.get(name, keys[:, :0]).to(keys)
        ridge = hparams.ridge
        if hparams.ridge_unit == "trace":
            ridge *= resources.moments[layer].matrix.double().trace().item()
        return projected_update(keys, residuals, resources.null_spaces[layer], ridge, memory)

    check(model, requests, hparams, resources)
    solution = solution or targets(model, requests, hparams, resources)
    changes, keys = memit.spread(model, requests, hparams, resources, update, solution)
    about = {name: memory.shape[1] for name, memory in resources.memory.items()}
    about = {"memory": about} | solution.record()
    delta = WeightDelta.of(model, changes=changes, keys=keys)
    return records.described("alphaedit", model, delta, requests, hparams, resources, seed, **about)


def remember(resources: Resources, delta: WeightDelta) -> Resources:
    """New resources that also hold the keys of this delta, for the edits that follow it.

    Raises:
        BadInput: a delta without keys, or of other weights than the resources.
    """
    fingerprints = {moment.model for moment in resources.moments.values()}
    if not delta.keys or {delta.fingerprint} != fingerprints:
        problem = "only AlphaEdit's deltas for the weights of these resources have keys to remember"
        raise BadInput(f"{problem}; this one is of {delta.model}")
    return replace(resources, memory=with_keys(resources.memory, delta.keys))
