"""ROME: one exact rank-one change of one down-projection.

    D = r (C^-1 k)' / (k' C^-1 k),   r = v* - W k

k is the mean key at the subject's last token over the bare prompt, the prefixed ones and the paraphrases; v* = the MLP's output
there plus the solved shift. Source: arXiv 2202.05262. Differs from: one key throughout (r-ROME, arXiv 2403.07175: two keys explode);
BOS in front; prefixes are sampled from the model by seed and kept in the record.
"""

from collections.abc import Sequence

import torch
from pydantic import Field

from workbench import closed_form, moments
from workbench.activations import recorded
from workbench.deltas import Change, WeightDelta
from workbench.editing import target_vectors
from workbench.editing.records import Numbers, Resources, record_of
from workbench.facts import BadInput, EditRequest
from workbench.models import Model


class HParams(Numbers):
    """Numbers of ROME. Published for GPT-2 XL: layer 17, lr .5, 20 steps, decay .5, clamp 4, KL .0625 (arXiv 2202.05262)."""

    layers: tuple[int, ...] = Field(min_length=1, max_length=1)  # block index
    steps: int = Field(20, ge=1)  # updates of the target vector at most
    learning_rate: float = Field(0.5, gt=0)  # Adam's, in units of the hidden state
    weight_decay: float = Field(0.5, ge=0)  # on |shift| / |v_0|^2
    clamp: float = Field(4.0, gt=0)  # |shift| <= clamp |v_0|
    kl_weight: float = Field(0.0625, ge=0)  # of the KL at "{subject} is a"
    stop_loss: float = Field(0.05, ge=0)  # nats; a fact stops below it
    prefixes: int = Field(20, ge=0)  # sampled texts before the prompt
    moment_tokens: int = Field(0, ge=0)  # tokens for C; 0 = 10 a key dimension


def prepare(model: Model, hparams: HParams, corpus: str = "world", training_requests=None, seed: int = 0) -> Resources:
    """Second moments of the edited layer's keys, and the sampled prefixes."""
    found = moments.second_moments(model, hparams.layers, corpus, hparams.moment_tokens)
    prefixes = target_vectors.sample_prefixes(model, hparams.prefixes, seed)
    return Resources(moments=found, prefixes=prefixes)


def edit(model: Model, requests: Sequence[EditRequest], hparams: HParams, resources: Resources, seed: int = 0) -> WeightDelta:
    """A rank-one change for one request; for n, the smallest change that fits all n exactly (EMMET), rank n."""
    layer = model.check_layers(hparams.layers)[0]
    if layer not in resources.moments:
        raise BadInput(f"the resources hold moments of layers {sorted(resources.moments)}, not of {layer}; prepare again with these layers")
    solution = target_vectors.solve(
        model,
        requests,
        layer,
        site="mlp",
        prefixes=resources.prefixes,
        steps=hparams.steps,
        learning_rate=hparams.learning_rate,
        weight_decay=hparams.weight_decay,
        clamp=hparams.clamp,
        kl_weight=hparams.kl_weight,
        stop_loss=hparams.stop_loss,
    )
    keys, outputs, bare_outputs = keys_and_outputs(model, requests, layer, resources.prefixes)
    residuals = bare_outputs + solution.shift.cpu().double() - outputs  # (n, d_out): v* - W k (- bias)
    moment = resources.moments[layer]
    if moment.tokens < len(moment.matrix):  # float32 rounding would hide it from the factorisation
        raise BadInput(f"layer {layer}: {moment.tokens} tokens leave the second moment singular; collect at least {len(moment.matrix)}")
    try:
        factor = closed_form.factorised(moment.matrix, f"the second moment of layer {layer}")
        left, right = closed_form.constrained_update(keys.T, residuals.T, factor)
    except closed_form.Singular as error:
        raise BadInput(f"layer {layer}: {error}") from None
    return WeightDelta(
        changes={model.down_projection_name(layer): Change(left=left.float(), right=right.float())},
        model=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        record=record_of("rome", hparams, requests, seed)
        | {
            "prefixes": list(resources.prefixes),
            "moments": moment.fingerprint,
            "p_target": solution.p_target.tolist(),
            "steps": solution.steps.tolist(),
        },
    )


@torch.no_grad()
def keys_and_outputs(model: Model, requests: Sequence[EditRequest], layer: int, prefixes: Sequence[str]):
    """Mean key k (n, d_in), mean MLP output W k + b (n, d_out) and the bare prompt's output (n, d_out), float64, at the subject's last token."""
    rows = target_vectors.build_rows(model, requests, prefixes, kl=False)
    n, owner = len(requests), rows.owner
    projection = model.down_projection(layer)
    keys, outputs = [], []
    for batch in torch.arange(len(owner)).split(256):
        part = rows.encoded.rows(batch.tolist()).to(model.device)
        with recorded({"key": projection}, inputs=True) as seen, recorded({"out": projection}) as out:
            model.network(input_ids=part.input_ids, attention_mask=part.attention_mask, logits_to_keep=1, use_cache=False)
        place = (torch.arange(len(batch)), rows.subject[batch])
        keys.append(seen["key"][place].double().cpu())
        outputs.append(out["out"][place].double().cpu())
    keys, outputs = torch.cat(keys), torch.cat(outputs)
    if not torch.isfinite(keys).all():
        raise BadInput(f"layer {layer}: keys are NaN or infinite; load the model in float32")
    bare = torch.tensor([(owner == number).nonzero()[0, 0].item() for number in range(n)])
    count = torch.bincount(owner, minlength=n)[:, None]
    mean_key = torch.zeros(n, keys.shape[1], dtype=torch.float64).index_add(0, owner, keys) / count
    mean_output = torch.zeros(n, outputs.shape[1], dtype=torch.float64).index_add(0, owner, outputs) / count
    return mean_key, mean_output, outputs[bare]
