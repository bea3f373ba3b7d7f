"""The editors written plainly, to check and to time ours against: one fact at a time, the whole
network at every step, logits of all places, dense float64 solves, one layer a pass. Same maths,
same numbers; nothing here is used by the workbench.
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F

from workbench import positions
from workbench.activations import recorded, replaced
from workbench.editing.rows import build_rows

FLOOR = 1e-6  # of C's mean diagonal, under its eigenvalues


def target_shift(model, request, layer, site, prefixes, hparams):
    """v* - v_0 of one fact (d_model,), and the updates it took."""
    rows = build_rows(model, [request], prefixes, kl=hparams.kl_weight > 0)
    ids, mask = rows.encoded.input_ids, rows.encoded.attention_mask
    every = torch.arange(len(ids))
    with torch.no_grad(), recorded({"mlp": model.mlp(layer), "block": model.blocks[layer]}) as seen:
        first = model.network(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).logits.log_softmax(-1)
    v0 = seen[site].view(*ids.shape, -1)[0, rows.subject[0]].norm()
    kl_row, kl_at = every[rows.is_kl], rows.subject[rows.is_kl]
    shift = torch.zeros(model.weight(layer).shape[0], requires_grad=True)
    adam = torch.optim.Adam([shift], lr=hparams.learning_rate)
    settled = 0

    def add(out, _):
        moved = out.clone()
        moved[every, rows.subject] += shift
        return moved

    step = 0
    while True:
        with torch.enable_grad(), replaced(model.blocks[layer], add):
            logits = model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probs = logits.log_softmax(-1)
            known = rows.labels != -100
            nll = -log_probs.gather(2, rows.labels.clamp(min=0)[..., None])[..., 0] * known
            told = ~rows.is_kl
            loss = (nll.sum(1) / known.sum(1).clamp(min=1))[
                told
            ].mean() + hparams.weight_decay * shift.norm() / v0**2
            if hparams.kl_weight:
                loss = loss + hparams.kl_weight * F.kl_div(
                    first[kl_row, kl_at], log_probs[kl_row, kl_at], log_target=True, reduction="sum"
                )
        settled += bool((log_probs.argmax(-1) == rows.labels)[known].all())
        stopped = loss.item() < hparams.stop_loss or (
            hparams.patience and settled >= hparams.patience
        )
        if step == hparams.steps or stopped:
            return shift.detach(), step
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if shift.norm() > hparams.clamp * v0:
                shift.mul_(hparams.clamp * v0 / shift.norm())
        step += 1


@torch.no_grad()
def _at_subject(model, request, prefixes, modules, inputs):
    rows = build_rows(model, [request], prefixes)
    with recorded(modules, inputs=inputs) as seen:
        model.network(**rows.encoded.arguments(), use_cache=False)
    shape = rows.encoded.input_ids.shape
    return {
        key: value.view(*shape, -1)[torch.arange(shape[0]), rows.subject].double()
        for key, value in seen.items()
    }


def _key_and_residual(model, request, layer, hparams, resources):
    """(k, the key at which the value is to be met, v* - W k) of one fact, float64."""
    shift, _ = target_shift(model, request, layer, "mlp", resources.prefixes, hparams)
    keys = _at_subject(
        model, request, resources.prefixes, {"k": model.down_projection(layer)}, True
    )["k"]
    out = _at_subject(
        model, request, resources.prefixes, {"o": model.down_projection(layer)}, False
    )["o"]
    if hparams.convention == "reference":
        return keys.mean(0), keys[0], shift.double()
    return keys.mean(0), keys.mean(0), out[0] + shift.double() - out.mean(0)


def _moment(resources, layer, hparams):
    """C (d_in, d_in), float64, its eigenvalues raised by the floor unless the reference is asked
    for.
    """
    C = resources.moments[layer].matrix.double()
    if hparams.convention == "reference":
        return C
    return C + FLOOR * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def rome(model, requests, hparams, resources):
    """One rank-one change a fact: a list of D (d_out, d_in)."""
    (layer,) = hparams.layers
    inverse = torch.linalg.inv(_moment(resources, layer, hparams))
    changes = []
    for request in requests:
        k, at, r = _key_and_residual(model, request, layer, hparams, resources)
        u = inverse @ k
        changes.append(torch.outer(r, u) / (at @ u))
    return changes


def emmet(model, requests, hparams, resources):
    """One change that fits all facts, where their values are to be met: D (d_out, d_in)."""
    (layer,) = hparams.layers
    inverse = torch.linalg.inv(_moment(resources, layer, hparams))
    K, at, R = (
        torch.stack(each, 1)
        for each in zip(
            *(_key_and_residual(model, each, layer, hparams, resources) for each in requests),
            strict=True,
        )
    )
    return R @ torch.linalg.inv(K.T @ inverse @ at) @ K.T @ inverse


def _statements(model, requests):
    """Token ids (1, n), places and ids of the answer's tokens, of each prompt and paraphrase."""
    rows = build_rows(model, requests)
    for ids, mask, labels in zip(
        rows.encoded.input_ids, rows.encoded.attention_mask, rows.labels, strict=True
    ):
        at = (labels != -100).nonzero()[:, 0]
        yield ids[mask.bool()][None], at, labels[at]


def ft(model, requests, hparams):
    """D (d_out, d_in) of one down-projection by Adam, one statement at a time through the whole
    network.
    """
    (layer,) = hparams.layers
    change = torch.zeros_like(model.weight(layer), requires_grad=True)
    adam = torch.optim.Adam([change], lr=hparams.learning_rate)
    statements = list(_statements(model, requests))
    for step in range(hparams.steps + 1):
        adam.zero_grad()
        total = 0.0
        for ids, at, labels in statements:
            with (
                torch.enable_grad(),
                replaced(model.down_projection(layer), lambda out, key: out + key @ change.T),
            ):
                logits = model.network(input_ids=ids, use_cache=False).logits[0]
                places = torch.full_like(at, at.min()) if hparams.convention == "reference" else at
                loss = F.cross_entropy(logits[places], labels) / len(statements)
                loss.backward(inputs=[change])
            total += loss.item()
        if total < hparams.stop_loss or step == hparams.steps:
            return change.detach()
        adam.step()
        if hparams.box:
            with torch.no_grad():
                change.clamp_(-hparams.box, hparams.box)
    return change.detach()


def _wish(network, number, key, gradient):
    """The change (d_out,) of the value of one key (d_in,) with its gradient (d_out,)."""
    z = (torch.cat([key, gradient]) - network.mean[number]) / network.deviation[number]
    z = z.clamp(-10, 10)
    for down, up, scale, shift in zip(
        network.down, network.up, network.scale, network.shift, strict=True
    ):
        z = z + up.T @ (scale[number] * (down.T @ z) + shift[number]).clamp(min=0)
    return -network.rate[number] * (key @ z[: len(key)]) * z[len(key) :]


def malmen(model, requests, hparams, resources):
    """Layer -> D (d_out, d_in): one statement at a time through the whole network, one token at a
    time through the hyper-network.
    """
    layers, network = sorted(hparams.layers), resources.network
    found = {layer: [] for layer in layers}
    for ids, at, labels in _statements(model, requests):
        outputs, projections = {}, {layer: model.down_projection(layer) for layer in layers}

        def watch(layer, outputs=outputs):
            def change(out, key):
                outputs[layer] = (
                    key.detach(),
                    out.clone().requires_grad_() if not out.requires_grad else out.clone(),
                )
                return outputs[layer][1]

            return change

        with torch.enable_grad(), ExitStack() as stack:
            for layer in layers:
                stack.enter_context(replaced(projections[layer], watch(layer)))
            logits = model.network(input_ids=ids, use_cache=False).logits[0]
            loss = F.cross_entropy(logits[at], labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [outputs[layer][1] for layer in layers])
        for layer, gradient in zip(layers, gradients, strict=True):
            for place in at.tolist():
                found[layer].append(
                    (
                        outputs[layer][0].view(-1, model.weight(layer).shape[1])[place],
                        gradient.view(len(logits), -1)[place],
                    )
                )
    changes = {}
    for number, layer in enumerate(layers):
        with torch.no_grad():
            K = torch.stack([key for key, _ in found[layer]], 1).double()
            R = torch.stack(
                [_wish(network, number, key, gradient) for key, gradient in found[layer]], 1
            ).double()
            changes[layer] = torch.linalg.solve(
                K @ K.T + network.weight[number].exp().double() * torch.eye(len(K), dtype=K.dtype),
                K @ R.T,
            ).T
    return changes


def memit(model, requests, hparams, resources, memory=None, projectors=None):
    """Layer -> D (d_out, d_in).

    With dense projectors P by layer it is AlphaEdit; memory: layer -> earlier keys (d_in, m).
    """
    layers = sorted(hparams.layers)
    shifts = [
        target_shift(model, request, layers[-1], "block", resources.prefixes, hparams)[0]
        for request in requests
    ]
    last = {"h": model.blocks[layers[-1]]}
    goals = [
        _at_subject(model, request, (), last, False)["h"][0] + shift.double()
        for request, shift in zip(requests, shifts, strict=True)
    ]
    saved = {layer: model.weight(layer).detach().clone() for layer in layers}
    changes = {}
    for number, layer in enumerate(layers):
        keys, gaps = [], []
        for request, goal in zip(requests, goals, strict=True):
            k = _at_subject(
                model, request, resources.prefixes, {"k": model.down_projection(layer)}, True
            )["k"]
            keys.append(k[0] if len(k) == 1 else k[0] / 2 + k[1:].mean(0) / 2)
            gaps.append(
                (goal - _at_subject(model, request, (), last, False)["h"][0])
                / (len(layers) - number)
            )
        K, R = torch.stack(keys, 1), torch.stack(gaps, 1)
        if projectors is None:
            C = _moment(resources, layer, hparams)
            D = torch.linalg.solve(hparams.weight * C + K @ K.T, K @ R.T).T
        else:
            P, Kp = projectors[layer], (memory or {}).get(layer, K[:, :0])
            D = torch.linalg.solve(
                P @ (K @ K.T + Kp @ Kp.T) + hparams.ridge * torch.eye(len(K), dtype=K.dtype),
                P @ K @ R.T,
            ).T
        changes[layer] = D
        with torch.no_grad():
            model.weight(layer).add_(D.float())
    with torch.no_grad():
        for layer, weight in saved.items():
            model.weight(layer).copy_(weight)
    return changes


def projector(moment, rule, threshold):
    """Dense P (d_in, d_in) by a singular value decomposition."""
    U, S, _ = torch.linalg.svd(moment.double())
    if rule == "absolute":
        small = threshold > S
    elif rule == "trace":
        small = S.flip(0).cumsum(0).flip(0) <= threshold * S.sum()
    else:
        small = torch.arange(len(S)) >= threshold
    return U[:, small] @ U[:, small].T


@torch.no_grad()
def moments(model, layers, rows, tokens):
    """Layer -> C, one pass of the whole network for each layer, 8 rows at a time."""
    found = {}
    for layer in layers:
        total, left = 0, tokens
        for batch in rows.split(8):
            with recorded({"k": model.down_projection(layer)}, inputs=True) as seen:
                model.network(input_ids=batch, use_cache=False)
            k = seen["k"].view(*batch.shape, -1)[:, 1:].flatten(0, 1)[:left]
            total = total + k.T @ k
            left -= len(k)
        found[layer] = total / tokens
    return found


@torch.no_grad()
def answers(model, prompts, stop, at_most=8):
    """The first token outside `stop` under greedy decoding, one prompt at a time, one token at a
    time.
    """
    found = []
    for prompt in prompts:
        ids = positions.encode(model, [prompt]).input_ids
        for _ in range(at_most):
            token = model.network(input_ids=ids, use_cache=False).logits[0, -1].argmax().item()
            if token not in stop:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        found.append(token)
    return found


@torch.no_grad()
def likelihoods(model, prompts, continuations):
    """The probability of each continuation after its prompt, one text at a time, logits of all
    places.
    """
    found = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        before = positions.encode(model, [prompt]).input_ids
        ids = positions.encode(model, [positions.statement(prompt, continuation)]).input_ids
        log_probs = model.network(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        start = before.shape[1]
        found.append(
            log_probs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().exp().item()
        )
    return found
