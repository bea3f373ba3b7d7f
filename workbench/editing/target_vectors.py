"""The batched solver for target vectors v*: what a layer should put out at the subject's last token so that the target follows.

For each request, over the rows j (prompts, prefixed or not) and the target's tokens o_1..o_T, it minimises over a shift d (d_model,)

    mean_j [ -(1/T) sum_t log p(o_t | x_j, o_<t; h += d) ]  +  kl_weight KL(p_d || p_0)  +  weight_decay |d| / |v_0|^2

with h the hidden state after the block at the subject's last token, the KL at the subject's last token of "{subject} is a", and v_0
the unshifted vector in the bare prompt. All requests are solved at once: the loss is a sum over requests and Adam works number by
number, so each gets the solution it would get alone. Nothing up to the edited block depends on d, so only later blocks run, and the
head runs at the target's positions only.

Source: ROME, arXiv 2202.05262, eq. 4; MEMIT, arXiv 2210.07229, eq. 16. Differs from: batched; `steps` counts updates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from workbench.activations import calls, hidden, recorded
from workbench.facts import BadInput, EditRequest, fill
from workbench.models import Model
from workbench.positions import Encoded, bos_id, encode, statement, subject_end

TOKENS_AT_ONCE = 32_768  # of all rows together, to bound memory


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts of several requests, ready to run.

    `encoded`: r texts; `owner` (r,): index of the request; `subject` (r,): position of the subject's last token; `labels`
    (r, length): the target's tokens one place before they stand, -100 elsewhere; `is_kl` (r,): rows "{subject} is a".
    """

    encoded: Encoded
    owner: torch.Tensor
    subject: torch.Tensor
    labels: torch.Tensor
    is_kl: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Per request: `shift` (n, d_model), `loss` (n,) at the last evaluation, `p_target` (n,) mean over rows of exp(-NLL), `steps` (n,) taken."""

    shift: torch.Tensor
    loss: torch.Tensor
    p_target: torch.Tensor
    steps: torch.Tensor


def sample_prefixes(model: Model, count: int, seed: int, lengths: Sequence[int] = (5, 10)) -> tuple[str, ...]:
    """Short texts that the model itself says after BOS, sampled from its 5 likeliest tokens; half of each length."""
    texts = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for number, length in enumerate(lengths):
            share = count // len(lengths) + (number < count % len(lengths))
            if not share:
                continue
            start = torch.full((share, 1), bos_id(model.tokenizer), device=model.device)
            out = model.network.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=True,
                top_k=5,
                pad_token_id=bos_id(model.tokenizer),
            )
            texts += [model.tokenizer.decode(row[1:], skip_special_tokens=True).strip() for row in out]
    return tuple(texts)


def build_rows(model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str], kl: bool = True) -> Rows:
    """Each request's prompt bare and after every prefix, its paraphrases bare, and "{subject} is a" where the KL is read.

    Text and target are tokenised as one string; the places come from character offsets.
    """
    if not requests:
        raise BadInput("no request to edit; give at least one")
    texts, owner, ends, starts, is_kl = [], [], [], [], []

    def add(number: int, prefix: str, prompt: str, target: str) -> None:
        lead = f"{prefix}. " if prefix else ""
        filled = fill(prompt, requests[number].fact.subject)
        texts.append(lead + (statement(filled, target) if target else filled))
        owner.append(number)
        ends.append(len(lead) + subject_end(prompt, requests[number].fact.subject))
        starts.append(len(lead) + len(filled.rstrip()) if target else -1)
        is_kl.append(not target)

    for number, request in enumerate(requests):
        for prefix in ("", *prefixes):
            add(number, prefix, request.fact.prompt, request.target)
        for paraphrase in request.paraphrases:
            add(number, "", paraphrase, request.target)
        if kl:
            add(number, "", "{} is a", "")
    encoded = encode(model.tokenizer, texts)
    labels = torch.full_like(encoded.input_ids, -100)
    for row, start in enumerate(starts):
        target_tokens = encoded.tokens_from(row, start) if start >= 0 else []
        if start >= 0 and not target_tokens:
            raise BadInput(f"fact {requests[owner[row]].fact.id}: the target {requests[owner[row]].target!r} has no tokens")
        for token in target_tokens:
            labels[row, token - 1] = encoded.input_ids[row, token]
    subject = torch.tensor([encoded.token_at(row, end) for row, end in enumerate(ends)])
    return Rows(encoded=encoded, owner=torch.tensor(owner), subject=subject, labels=labels, is_kl=torch.tensor(is_kl))


class Continuation:
    """The part of the network after one block, ready to run again from any hidden state of the same rows.

    One pass of the whole network remembers how each later block was called; `layer` = -1 starts before the first block.
    """

    @torch.no_grad()
    def __init__(self, model: Model, encoded: Encoded, layer: int, also: dict | None = None):
        self.model, self.layer = model, layer
        later = {number: model.blocks[number] for number in range(layer + 1, model.n_blocks)}
        encoded = encoded.to(model.device)
        with calls(later) as self.calls, recorded({"at": model.blocks[max(layer, 0)]} | (also or {})) as self.seen:
            model.network(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, logits_to_keep=1, use_cache=False)
        first = self.calls.get(layer + 1)
        self.start = first[0][0] if first else self.seen["at"]  # (r, length, d_model), what goes into the next block

    def logits(self, state: torch.Tensor, row: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits (k, vocab), float32, at the places (row[i], at[i]), of the rows with `state` (r, length, d_model) after the block."""
        for number, (args, kwargs) in self.calls.items():
            state = hidden(self.model.blocks[number](state, *args[1:], **kwargs))
        return self.model.unembedding(self.model.final_norm(state[row, at])).float()


def solve(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    site: str,
    prefixes: Sequence[str],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    clamp: float,
    kl_weight: float,
    stop_loss: float,
) -> Solution:
    """Solve v* for all requests.

    Args:
        layer: the shift is added to the residual stream after this block.
        site: whose output is v_0: "mlp" (ROME) or "block" (MEMIT).
        prefixes: texts put before the bare prompt, each one more row.
        steps: updates at most; a request stops by itself once its loss is below `stop_loss`.
        clamp: |d| <= clamp |v_0| after each step.
    """
    model.check_layers([layer])
    if not requests:
        raise BadInput("no request to edit; give at least one")
    parts = []
    rows_each = 2 + len(prefixes) + max(len(request.paraphrases) for request in requests)
    longest = 24 + max(len(text.split()) for text in (*prefixes, *(request.fact.question for request in requests))) * 3
    at_once = max(1, TOKENS_AT_ONCE // (rows_each * longest))
    for start in range(0, len(requests), at_once):
        rows = build_rows(model, requests[start : start + at_once], prefixes, kl=kl_weight > 0)
        parts.append(_solve(model, rows, layer, site, steps, learning_rate, weight_decay, clamp, kl_weight, stop_loss))
    return Solution(**{name: torch.cat([getattr(part, name) for part in parts]) for name in ("shift", "loss", "p_target", "steps")})


def _solve(model, rows, layer, site, steps, learning_rate, weight_decay, clamp, kl_weight, stop_loss) -> Solution:
    device = model.device
    n = int(rows.owner.max()) + 1
    owner, subject, is_kl = rows.owner.to(device), rows.subject.to(device), rows.is_kl.to(device)
    row = torch.arange(len(owner), device=device)
    rest = Continuation(model, rows.encoded, layer, also={"mlp": model.mlp(layer)})
    bare = torch.tensor([(rows.owner == number).nonzero()[0, 0].item() for number in range(n)], device=device)
    site_output = rest.seen["mlp"] if site == "mlp" else rest.start
    v0 = site_output[bare, subject[bare]].float().norm(dim=1)  # (n,)
    target_row, target_at = (rows.labels != -100).to(device).nonzero(as_tuple=True)
    labels = rows.labels.to(device)[target_row, target_at]
    kl_row = is_kl.nonzero()[:, 0]
    read_row, read_at = torch.cat([target_row, kl_row]), torch.cat([target_at, subject[kl_row]])
    tokens_in_row = torch.bincount(target_row, minlength=len(owner)).clamp(min=1)
    rows_of = torch.bincount(owner[~is_kl], minlength=n)
    shift = torch.zeros(n, rest.start.shape[-1], device=device, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=learning_rate)

    def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = rest.start.index_put((row, subject), shift[owner].to(rest.start.dtype), accumulate=True)
        log_probs = rest.logits(state, read_row, read_at).log_softmax(1)
        nll_token = F.nll_loss(log_probs[: len(labels)], labels, reduction="none") / tokens_in_row[target_row]
        nll_row = torch.zeros(len(owner), device=device).index_add(0, target_row, nll_token)
        nll = torch.zeros(n, device=device).index_add(0, owner[~is_kl], nll_row[~is_kl]) / rows_of
        p = torch.zeros(n, device=device).index_add(0, owner[~is_kl], (-nll_row[~is_kl]).exp().detach()) / rows_of
        return nll, log_probs[len(labels) :], p

    with torch.no_grad():
        kl_before = losses()[1]
    active = torch.ones(n, dtype=torch.bool, device=device)
    taken = torch.zeros(n, dtype=torch.long, device=device)
    with torch.enable_grad():
        for step in range(steps + 1):
            nll, kl_now, p = losses()
            loss = nll + weight_decay * shift.norm(dim=1) / v0**2
            if kl_weight:
                loss = loss + kl_weight * F.kl_div(kl_before, kl_now, log_target=True, reduction="none").sum(1)
            active = active & (loss.detach() >= stop_loss)
            if step == steps or not active.any():
                break
            adam.zero_grad()
            loss.sum().backward()
            if not torch.isfinite(shift.grad).all():
                raise BadInput(f"layer {layer}: NaN or infinite gradient while solving the target vector; load the model in float32")
            before = shift.detach().clone()
            adam.step()
            with torch.no_grad():
                norm = shift.norm(dim=1)
                shift.mul_((clamp * v0 / norm.clamp(min=1e-12)).clamp(max=1)[:, None])
                shift[~active] = before[~active]
            taken += active
    return Solution(shift=shift.detach(), loss=loss.detach(), p_target=p, steps=taken)
