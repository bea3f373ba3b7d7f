"""The batched solver for target vectors v*: what a layer should put out at the subject's last token
so that the target follows.

For each request, over the rows j (prompts, prefixed or not) and the target's tokens o_1..o_T, it
minimises over a shift d (d_model,)

    mean_j [ -(1/T) sum_t log p(o_t | x_j, o_<t; h += d) ]  +  kl_weight KL(p_d || p_0)  +
    weight_decay |d| / |v_0|^2

with h the hidden state after the block at the subject's last token, the KL at the subject's last
token of "{subject} is a", and v_0 the unshifted vector in the bare prompt. All requests are solved
at once: the loss is a sum over requests and the optimiser works row by row (see optimisers), so
each gets the solution it would get alone. Only what d can change is computed again at each step:
blocks after the layer, tokens from the subject's last one on, the head where a target is read,
requests that have not stopped.

Memory beside the model, in bytes (float32), of at most `tokens_at_once` tokens or one request: in
each later block 8 (d_kv + d_model) a token (keys and values, by themselves and as attention takes
them) and 64 d_model + 24 d_in a token from the subject's last on (activations that the gradient
needs); 16 vocab a token that is read; of L-BFGS 68 d_model a request. Source: ROME, arXiv
2202.05262, eq. 4; MEMIT, arXiv 2210.07229, eq. 16; stopping at the arg-max after ENCORE, arXiv
2502.01636. Differs from: batched; `steps` counts updates (the reference code's `steps` count
evaluations: convention="reference").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from workbench import positions
from workbench.activations import recorded
from workbench.editing.continuation import Continuation
from workbench.editing.optimisers import LBFGS, Adam
from workbench.editing.records import Numbers, Requests, Resources, finite
from workbench.editing.rows import Rows, build_rows, sample_prefixes
from workbench.models import Model
from workbench.moments import second_moments

# Tokens that keep the machine busy; a chunk that has them is closed rather than padded for longer
# rows.
WORTHWHILE = 1024
RADIUS = 0.25  # of |v_0|: the longest step of L-BFGS


class Solving(Numbers):
    """Numbers of the solver. The defaults are ROME's for GPT-2 XL."""

    UNSOLVED: ClassVar[str] = "where not solved raise steps (now {steps}) or clamp (now {clamp:g})"

    steps: int = Field(20, ge=1)  # updates of the target vector at most
    learning_rate: float = Field(0.5, gt=0)  # Adam's, in units of the hidden state
    weight_decay: float = Field(0.5, ge=0)  # on |shift| / |v_0|^2
    clamp: float = Field(4.0, gt=0)  # |shift| <= clamp |v_0|
    kl_weight: float = Field(0.0625, ge=0)  # of the KL at "{subject} is a"
    stop_loss: float = Field(0.05, ge=0)  # nats; a fact stops below it
    # A fact stops when its target was on top in every row at so many evaluations; 0 = never.
    patience: int = Field(0, ge=0)
    prefixes: int = Field(20, ge=0)  # sampled texts before the prompt
    moment_tokens: int = Field(0, ge=0)  # tokens for the second moments; 0 = 10 a key dimension
    # "lbfgs" has no learning rate; a step that was of no use counts. Worse than Adam for ROME.
    optimiser: Literal["adam", "lbfgs"] = "adam"
    # "reference": as the papers' code counts steps (and see rome).
    convention: Literal["published", "reference"] = "published"

    @property
    def evaluations(self) -> int:
        """Of the loss, at most: one more than updates."""
        return self.steps + (self.convention == "published")


class Solution(NamedTuple):
    """What the solver reached for each of n requests.

    `shift` (n, d_model); `loss` (n,) at the last evaluation; `p_target` (n,) of all the target's
    tokens after the bare prompt; `steps` (n,) taken.
    """

    shift: Tensor
    loss: Tensor
    p_target: Tensor
    steps: Tensor

    def split(self, sizes: Sequence[int]) -> "list[Solution]":
        """Of so many requests each, in their order."""
        columns = [tensor.split(sizes) for tensor in self]
        return [Solution(*part) for part in zip(*columns, strict=True)]

    def record(self) -> dict:
        """What a delta's record says of it."""
        return {"p_solved": self.p_target.tolist(), "steps": self.steps.tolist()}


def prepare(model: Model, hparams: Solving, corpus="", training_requests=None, seed=0) -> Resources:
    """Second moments of the keys of all edited layers, and the sampled prefixes."""
    moments = second_moments(model, hparams.layers, corpus, hparams.moment_tokens)
    return Resources(moments=moments, prefixes=sample_prefixes(model, hparams.prefixes, seed))


def solve(
    model: Model, requests: Requests, layer: int, site: str, prefixes: tuple, hparams: Solving
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
    chunks = _chunks(rows, tokens_at_once(model))
    total = hparams.evaluations * len(chunks)
    solutions = []
    with tqdm(total=total, desc="target vectors", unit="step", leave=False, disable=None) as bar:
        for chunk in chunks:
            solutions.append(_solve(model, rows.select(chunk), layer, site, hparams, bar.update))
            bar.update(hparams.evaluations * len(solutions) - bar.n)  # those that were spared
    order = torch.cat(chunks).argsort().to(model.device)
    columns = zip(*solutions, strict=True)
    return Solution(*(torch.cat(column)[order] for column in columns))


def tokens_at_once(model: Model) -> int:
    """Of all rows together with their padding, to bound memory."""
    return positions.tokens_at_once(model, on_cpu=4096)


def _chunks(rows: Rows, most: int) -> list[Tensor]:
    """Requests of like length together: little padding, and with it rows of at most so many tokens
    in all, or one request.
    """
    later = _longest(rows, rows.encoded.lengths - rows.subject)  # tokens that run at every step
    earlier = _longest(rows, rows.subject)
    count = torch.bincount(rows.owner)
    waiting = later.argsort(stable=True)
    chunks = []
    while len(waiting):
        length = later[waiting]
        height = count[waiting].cumsum(0)
        size = height * (earlier[waiting].cummax(0).values + length)  # of a chunk up to here
        unlike = (size[:-1] > WORTHWHILE) & (length[1:] > 1.25 * length[0])
        closed = (unlike | (size[1:] > most)).nonzero()
        end = 1 + int(closed[0]) if len(closed) else len(waiting)
        chunks.append(waiting[:end].sort().values)
        waiting = waiting[end:]
    return chunks


def _longest(rows: Rows, lengths: Tensor) -> Tensor:
    """Of the rows of each request, (n,)."""
    return torch.zeros(rows.n, dtype=torch.long).scatter_reduce(0, rows.owner, lengths, "amax")


@dataclass
class _Batch:
    """The requests of a chunk whose rows still run, and the loss of each.

    Attributes:
        requests: (k,) their numbers in the chunk.
        v0: (k,) |v_0|.
        before: log-probabilities (k, vocab) where the KL is read, of the unshifted model; None
            until the first evaluation.
    """

    rows: Rows
    rest: Continuation
    requests: Tensor
    v0: Tensor
    before: Tensor | None = None

    def __post_init__(self):
        device = self.v0.device
        self.owner = self.rows.owner.to(device)
        self.answers = self.rows.answers(device)
        self.answer_owner = self.owner[self.answers.row]
        self.kl_row = self.rows.is_kl.to(device).nonzero()[:, 0]
        tokens = torch.bincount(self.answers.row, minlength=len(self.owner))  # of each row's target
        statements = torch.bincount(self.owner[tokens > 0])  # of each request
        self.weight = 1 / (tokens[self.answers.row] * statements[self.answer_owner])

    def evaluate(self, shift: Tensor, hparams: Solving) -> tuple[Tensor, Tensor, Tensor]:
        """From the shifts (k, d_model): the loss (k,), p(target) (k,), and whether the target is on
        top in every row (k,).
        """
        log_probs = self._log_probs(shift)
        after = log_probs[len(self.weight) :]
        log_probs = log_probs[: len(self.weight)]
        if self.before is None:
            self.before = after.detach()
        token = self.answers.token
        token_nll = F.nll_loss(log_probs, token, reduction="none")
        drift = F.kl_div(self.before, after, log_target=True, reduction="none").sum(1)

        nll = self._total(self.answer_owner, token_nll * self.weight)
        decay = hparams.weight_decay * shift.norm(dim=1) / self.v0**2
        kl = hparams.kl_weight * self._total(self.owner[self.kl_row], drift)

        with torch.no_grad():
            row_nll = token_nll.new_zeros(len(self.owner)).index_add(0, self.answers.row, token_nll)
            p_target = (-row_nll[self.rows.bare.to(row_nll.device)]).exp()
            missed = self._total(self.answer_owner, (log_probs.argmax(1) != token).float())
        return nll + decay + kl, p_target, missed == 0

    def _log_probs(self, shift: Tensor) -> Tensor:
        """Where each of the answers' tokens is read, then where the KL is."""
        start = self.rest.start
        subject = start[:, :1] + shift[self.owner][:, None].to(start.dtype)
        state = torch.cat([subject, start[:, 1:]], 1)
        row = torch.cat([self.answers.row, self.kl_row])
        subjects = self.rows.subject.to(row.device)
        place = torch.cat([self.answers.place, subjects[self.kl_row]])
        return self.rest.logits(state, row, place).log_softmax(1)

    def _total(self, owner: Tensor, values: Tensor) -> Tensor:
        """The sum of the values of each request, (k,)."""
        return values.new_zeros(len(self.requests)).index_add(0, owner, values)

    def without(self, finished: Tensor) -> "_Batch":
        """The batch without the finished requests (k,), if they are enough to be worth it."""
        if finished.sum() * 8 < len(finished):
            return self
        moving = ~finished
        numbers = moving.nonzero()[:, 0].cpu()
        rest = self.rest.select(self.rows.indices(numbers))
        before = self.before[moving[self.owner[self.kl_row]]]
        requests = self.requests[moving]
        return _Batch(self.rows.select(numbers), rest, requests, self.v0[moving], before)


def _solve(
    model: Model, rows: Rows, layer: int, site: str, hparams: Solving, step_done: Callable
) -> Solution:
    device = model.device
    with recorded({"mlp": model.mlp(layer)}) as record:
        rest = Continuation(model, rows.encoded, layer, begin=rows.subject)
    output = rest.start if site == "block" else record["mlp"].view(rest.start.shape).to(device)
    v0 = output[rows.bare.to(device), 0].float().norm(dim=1)  # (n,)
    batch = _Batch(rows, rest, torch.arange(rows.n, device=device), v0)
    bound, width = hparams.clamp * v0, rest.start.shape[-1]
    optimiser: Adam | LBFGS = Adam(bound, width, hparams.learning_rate)
    if hparams.optimiser == "lbfgs":
        optimiser = LBFGS(bound, width, RADIUS * v0)
    steps = torch.zeros_like(v0, dtype=torch.long)
    zero = torch.zeros_like(v0)
    solution = Solution(optimiser.shift.clone(), zero, zero.clone(), steps)
    moving = torch.ones_like(steps, dtype=torch.bool)
    on_top_for = torch.zeros_like(steps)  # evaluations
    for evaluation in range(1, hparams.evaluations + 1):
        step_done()
        requests = batch.requests
        shift = optimiser.shift[requests].requires_grad_()
        with torch.enable_grad():
            loss, p_target, on_top = batch.evaluate(shift, hparams)
        read = finite(loss.detach(), model, layer, batch.rows.encoded).to(loss)
        kept = moving[requests] & optimiser.kept(requests, read)
        latest = requests[kept]
        solution.shift[latest] = shift.detach()[kept]
        solution.loss[latest] = read[kept]
        solution.p_target[latest] = p_target[kept]
        on_top_for[latest] += on_top[kept]
        moving[latest] &= read[kept] >= hparams.stop_loss
        if hparams.patience:
            moving &= on_top_for < hparams.patience
        if evaluation == hparams.evaluations or not moving.any():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), shift)
        going = moving[requests]
        optimiser.step(requests[going], read[going], gradient[going])
        steps += moving
        batch = batch.without(~going)
    finite(solution.shift, model, layer, rows.encoded)
    return solution
