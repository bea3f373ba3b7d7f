"""The batched solver for target vectors v*: what a layer should put out at the subject's last token
so that the target follows.

For each request, over the rows j (prompts, prefixed or not) and the target's tokens o_1..o_T, it
minimises over a shift d (d_model,)

    mean_j [ -(1/T) sum_t log p(o_t | x_j, o_<t; h += d) ]  +  kl_weight KL(p_d || p_0)  +
    weight_decay |d| / |v_0|^2

with h the hidden state after the block at the subject's last token, the KL at the subject's last
token of "{subject} is a", and v_0 the unshifted vector in the bare prompt. All requests are solved
at once: the loss is a sum over requests and Adam works number by number, so each gets the solution
it would get alone. Only what d can change is computed again at each step: blocks after the layer,
tokens from the subject's last one on, the head where a target is read, requests that have not
stopped.

Memory beside the model, in bytes (float32), of at most `tokens_at_once` tokens or one request: in
each later block 8 (d_kv + d_model) a token (keys and values, by themselves and as attention takes
them) and 64 d_model + 24 d_in a token from the subject's last on (activations that the gradient
needs); 16 vocab a token that is read. Source: ROME, arXiv 2202.05262, eq. 4; MEMIT, arXiv
2210.07229, eq. 16; stopping at the arg-max after ENCORE, arXiv 2502.01636. Differs from: batched;
`steps` counts updates (the reference code's `steps` count evaluations: convention="reference").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from tqdm.auto import tqdm

from workbench.editing.continuation import Continuation
from workbench.editing.records import Numbers, finite
from workbench.editing.rows import Rows, build_rows
from workbench.facts import EditRequest
from workbench.models import Model

# tokens that keep the machine busy; a batch that has them is closed rather than padded for longer
# rows
WORTHWHILE = 1024


class Solving(Numbers):
    """Numbers of the solver. The defaults are ROME's for GPT-2 XL."""

    UNSOLVED: ClassVar[str] = "where not solved raise steps (now {steps}) or clamp (now {clamp:g})"

    steps: int = Field(20, ge=1)  # updates of the target vector at most
    learning_rate: float = Field(0.5, gt=0)  # Adam's, in units of the hidden state
    weight_decay: float = Field(0.5, ge=0)  # on |shift| / |v_0|^2
    clamp: float = Field(4.0, gt=0)  # |shift| <= clamp |v_0|
    kl_weight: float = Field(0.0625, ge=0)  # of the KL at "{subject} is a"
    stop_loss: float = Field(0.05, ge=0)  # nats; a fact stops below it
    patience: int = Field(
        0, ge=0
    )  # a fact stops when its target was on top in every row at so many evaluations; 0 = never
    prefixes: int = Field(20, ge=0)  # sampled texts before the prompt
    moment_tokens: int = Field(0, ge=0)  # tokens for the second moments; 0 = 10 a key dimension
    convention: Literal["published", "reference"] = (
        "published"  # "reference": as the papers' code counts steps (and see rome)
    )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What the solver reached for each of n requests.

    `shift` (n, d_model); `loss` (n,) at the last evaluation; `p_target` (n,) of all the target's
    tokens after the bare prompt; `steps` (n,) taken.
    """

    shift: torch.Tensor
    loss: torch.Tensor
    p_target: torch.Tensor
    steps: torch.Tensor

    def split(self, sizes: Sequence[int]) -> "list[Solution]":
        """Of so many requests each, in their order."""
        parts = zip(*(tensor.split(sizes) for tensor in vars(self).values()), strict=True)
        return [Solution(**dict(zip(vars(self), part, strict=True))) for part in parts]


def solve(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    site: str,
    prefixes: Sequence[str],
    hparams: Solving,
) -> Solution:
    """Solve v* for all requests.

    Args:
        layer: the shift is added to the residual stream after this block.
        site: whose output is v_0: "mlp" (ROME) or "block" (MEMIT).
        prefixes: texts put before the bare prompt, each one more row.
    Raises:
        BadInput: no requests, a layer that is not there, NaN or infinite numbers.
    """
    model.check_layers([layer])
    rows = build_rows(model, requests, prefixes, kl=hparams.kl_weight > 0)
    parts, chunks, each = [], _chunks(rows, tokens_at_once(model)), _evaluations(hparams)
    with tqdm(
        total=each * len(chunks), desc="target vectors", unit="step", leave=False, disable=None
    ) as bar:
        for number, part in enumerate(chunks, 1):
            parts.append((_solve(model, rows.of(part)[0], layer, site, hparams, bar.update), part))
            bar.update(each * number - bar.n)  # those that were spared
    order = torch.cat([part for _, part in parts]).argsort().to(model.device)
    return Solution(
        **{
            name: torch.cat([getattr(part, name) for part, _ in parts])[order]
            for name in ("shift", "loss", "p_target", "steps")
        }
    )


def _evaluations(hparams: Solving) -> int:
    """Of the loss, at most: one more than updates."""
    return hparams.steps + (hparams.convention == "published")


def tokens_at_once(model: Model) -> int:
    """Of all rows together with their padding, to bound memory; on a CPU fewer, which stay nearer
    to its caches.
    """
    return 4_096 if model.device.type == "cpu" else 16_384


def _chunks(rows: Rows, most: int) -> list[torch.Tensor]:
    """Requests of like length together: little padding, and with it rows of at most so many tokens
    in all, or one request.
    """
    later = rows.encoded.lengths - rows.subject  # tokens that are run at every step
    most_of = torch.zeros(rows.n, dtype=torch.long).scatter_reduce
    longest, before = (
        most_of(0, rows.owner, each, "amax").tolist() for each in (later, rows.subject)
    )
    count = torch.bincount(rows.owner).tolist()
    chunks: list[list[int]] = []
    size = height = ahead = 0  # of the last chunk: tokens, rows, tokens of a row that are run once
    for request in sorted(range(rows.n), key=longest.__getitem__):
        height, ahead = height + count[request], max(ahead, before[request])
        grown = height * (ahead + longest[request])
        if (
            not chunks
            or grown > most
            or (size > WORTHWHILE and longest[request] > 1.25 * longest[chunks[-1][0]])
        ):
            chunks.append([])
            height, ahead = count[request], before[request]
            grown = height * (ahead + longest[request])
        chunks[-1].append(request)
        size = grown
    return [torch.tensor(sorted(chunk)) for chunk in chunks]


class _Objective:
    """The loss of each of n requests as a function of their shifts, and what is read on the way."""

    def __init__(self, model: Model, rows: Rows, rest: Continuation):
        device = model.device
        self.rest, self.n, self.owner = rest, rows.n, rows.owner.to(device)
        self.row, self.at = (rows.labels != -100).to(device).nonzero(as_tuple=True)
        self.labels = rows.labels.to(device)[self.row, self.at]
        self.bare = rows.bare.to(device)
        self.kl_row = rows.is_kl.to(device).nonzero()[:, 0]
        self.kl_at = rows.subject.to(device)[self.kl_row]
        texts = torch.bincount(
            self.owner[self.row.unique()], minlength=self.n
        )  # rows with a target
        self.tokens = torch.bincount(
            self.row, minlength=len(self.owner)
        )  # the target's tokens in each row
        self.weight = 1 / (self.tokens[self.row] * texts[self.owner[self.row]])

    def __call__(
        self, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """From shifts (n, d_model): NLL (n,), log-probabilities (n, vocab) for the KL, p(target)
        (n,), target on top in every row (n,).
        """
        start = self.rest.start
        state = torch.cat(
            [start[:, :1] + shift[self.owner][:, None].to(start.dtype), start[:, 1:]], 1
        )
        logits = self.rest.logits(
            state, torch.cat([self.row, self.kl_row]), torch.cat([self.at, self.kl_at])
        )
        log_probs = logits.log_softmax(1)
        targets = log_probs[: len(self.labels)]
        nll = F.nll_loss(targets, self.labels, reduction="none")
        of = self.owner[self.row]
        loss = torch.zeros(self.n, device=nll.device).index_add(0, of, nll * self.weight)
        with torch.no_grad():
            per_row = torch.zeros(len(self.owner), device=nll.device).index_add(0, self.row, nll)
            p = (-per_row[self.bare]).exp()
            missed = torch.zeros(self.n, device=nll.device).index_add(
                0, of, (targets.argmax(1) != self.labels).float()
            )
        return loss, log_probs[len(self.labels) :], p, missed == 0


def _solve(
    model: Model, rows: Rows, layer: int, site: str, hparams: Solving, told: Callable[[], object]
) -> Solution:
    n, device = rows.n, model.device
    rest = Continuation(
        model, rows.encoded, layer, begin=rows.subject, outputs={"mlp": model.mlp(layer)}
    )
    v0 = (
        (rest.seen["mlp"] if site == "mlp" else rest.start)[rows.bare.to(device), 0]
        .float()
        .norm(dim=1)
    )  # (n,)
    shift = torch.zeros(n, rest.start.shape[-1], device=device, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=hparams.learning_rate)
    objective = _Objective(model, rows, rest)
    live = torch.arange(n, device=device)  # the requests whose rows are still computed
    active = torch.ones(n, dtype=torch.bool, device=device)
    final = {
        name: torch.zeros(n, device=device) for name in ("loss", "p_target", "steps", "settled")
    }
    last = _evaluations(hparams) - 1
    with torch.enable_grad():
        for step in range(last + 1):
            told()
            nll, kl_now, p, on_top = objective(shift[live])
            if step == 0:
                before = kl_now.detach()  # (n, vocab) log-probabilities of the KL rows, unshifted
            loss = nll + hparams.weight_decay * shift[live].norm(dim=1) / v0[live] ** 2
            if hparams.kl_weight:
                loss = loss + hparams.kl_weight * F.kl_div(
                    before[live], kl_now, log_target=True, reduction="none"
                ).sum(1)
            finite(loss.detach(), model, layer, rows.encoded)
            going = active[live]
            final["loss"][live] = torch.where(going, loss.detach(), final["loss"][live])
            final["p_target"][live] = torch.where(going, p, final["p_target"][live])
            final["settled"][live] += on_top
            active[live] &= loss.detach() >= hparams.stop_loss
            if hparams.patience:
                active &= final["settled"] < hparams.patience
            if step == last or not active.any():
                break
            adam.zero_grad()
            loss.sum().backward(inputs=[shift])
            _update(shift, adam, active, hparams.clamp * v0)
            final["steps"] += active
            stopped = (~active[live]).sum()
            if stopped * 8 >= len(live):  # leave the finished ones out of the batch
                part, index = rows.of(active[live].nonzero()[:, 0].cpu())
                rows, rest, live = part, rest.of(index.to(device)), live[active[live]]
                objective = _Objective(model, rows, rest)
    finite(shift.detach(), model, layer, rows.encoded)
    return Solution(
        shift=shift.detach(),
        loss=final["loss"],
        p_target=final["p_target"],
        steps=final["steps"].long(),
    )


@torch.no_grad()
def _update(
    shift: torch.Tensor, adam: torch.optim.Adam, active: torch.Tensor, bound: torch.Tensor
) -> None:
    """One step of Adam within |shift| <= bound (n,); requests that are not active stay where they
    are.
    """
    kept = shift[~active].clone()
    adam.step()
    shift.mul_((bound / shift.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None])
    shift[~active] = kept
