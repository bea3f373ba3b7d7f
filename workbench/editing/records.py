"""What every editor shares: hyper-parameters as a record, prepared resources, the delta with the record of how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from workbench.activations import recorded
from workbench.closed_form import NullSpace, Singular
from workbench.deltas import Change, WeightDelta
from workbench.facts import BadInput, EditRequest, Record
from workbench.models import Model
from workbench.moments import SecondMoment
from workbench.positions import Encoded


class Numbers(Record):
    """The numbers of one method; the names follow its paper, units stand beside the fields."""

    layers: tuple[int, ...]  # block indices


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What `prepare` made, once per model. Passed in, never hidden.

    Attributes:
        moments: layer -> second moment of its keys.
        prefixes: texts sampled from the model.
        null_spaces: layer -> AlphaEdit's null space.
        memory: module name -> keys (d_in, m) of earlier edits, AlphaEdit's.
        network: MALMEN's hyper-network.
    """

    moments: Mapping[int, SecondMoment] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    null_spaces: Mapping[int, NullSpace] = field(default_factory=dict)
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)
    network: torch.nn.Module | None = None


def moment_of(model: Model, resources: Resources, layer: int) -> SecondMoment:
    """The layer's second moment; BadInput if there is none, or it is of another model or too few tokens."""
    if layer not in resources.moments:
        raise BadInput(f"the resources hold moments of layers {sorted(resources.moments)}, not of {layer}; prepare again with these layers")
    moment = resources.moments[layer]
    if moment.model != model.fingerprint or len(moment.matrix) != model.weight(layer).shape[1]:
        raise BadInput(f"layer {layer}: the second moment is of another model ({moment.model}), not of {model.name}; prepare again with this model")
    if moment.tokens < len(moment.matrix):  # float32 rounding would hide it from the factorisation
        raise BadInput(f"layer {layer}: {moment.tokens} tokens leave the second moment singular; collect at least {len(moment.matrix)}")
    return moment


def moment_factor(model: Model, resources: Resources, layer: int) -> torch.Tensor:
    """Cholesky factor of the layer's second moment, computed once."""
    try:
        return moment_of(model, resources, layer).factor
    except Singular as error:
        raise BadInput(f"layer {layer}: {error}") from None


def finite(values: torch.Tensor, model: Model, layer: int, encoded: Encoded) -> torch.Tensor:
    """The values, float64 (on the CPU where the device has none), which the texts gave at a layer; BadInput if one is NaN or infinite.

    It names the weights, or the first layer whose activations are so, or the given one if that came of the edit alone.
    """
    if torch.isfinite(values).all():
        return (values.cpu() if values.device.type == "mps" else values).double()
    for name, parameter in model.network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BadInput(f"{model.name}: {name} holds NaN or infinite numbers; load sound weights")
    with torch.no_grad(), recorded(dict(enumerate(model.blocks))) as seen:
        model.network(**encoded.to(model.device).arguments(), use_cache=False)
    first = next((number for number in sorted(seen) if not torch.isfinite(seen[number]).all()), layer)
    raise BadInput(f"{model.name}: NaN or infinite activations at layer {first}; load the model in float32, or lower the learning rate")


def delta_of(
    editor: str,
    model: Model,
    requests: Sequence[EditRequest],
    hparams: Numbers,
    resources: Resources,
    seed: int,
    changes: Mapping[str, Change],
    **about,
) -> WeightDelta:
    """The delta, with everything needed to make it again."""
    record = {
        "editor": editor,
        "hparams": hparams.model_dump(mode="json"),
        "seed": seed,
        "requests": [request.model_dump(mode="json") for request in requests],
        "prefixes": list(resources.prefixes),
        "moments": {str(layer): moment.fingerprint for layer, moment in resources.moments.items()},
        "corpus": sorted({f"{moment.corpus}, {moment.tokens} tokens" for moment in resources.moments.values()}),
    }
    return WeightDelta(changes=changes, model=model.name, revision=model.revision, fingerprint=model.fingerprint, record=record | about)
