"""Ways to edit that promise to last, beside an editor's preset: what `lasting` holds against it.

WAYS name them: `firm` (solved to a tenth of the preset's stop_loss), `flat` (`at_worst`),
`suppress` (`suppressing`), `anchor` (`anchored`), `ahead` (`moved_ahead`), `over` (OVER times the
change), `sharp` (`sharpness_aware`, an editor of its own), or of so many statements.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy
import torch
from torch import Tensor

from workbench import deltas, editing
from workbench.deltas import Change, WeightDelta
from workbench.editing.memit import Walk
from workbench.editing.records import Numbers, Resources
from workbench.editing.rows import build_rows
from workbench.editing.target_vectors import Solution, _Batch
from workbench.edits import Edit
from workbench.facts import EditRequest, with_paraphrases
from workbench.models import Model
from workbench.tuning import tasks
from workbench.tuning.finetune import UNREAD, Classifier, Settings, collate
from workbench.tuning.numbers import usual
from workbench.tuning.tasks import Data, Task

BATCHES = 8  # of the expected step
AHEAD = 20  # expected steps of prose
FLAT = 0.05  # of |v_0|
RIVALS = 10  # likeliest tokens that are suppressed
LEAD = 10  # nats over the likeliest of them, at which a target is let be
OVER = 1.5  # times the preset's change
RANK = 8  # of the adapter
RADIUS = 0.5  # of the ball in which the adapter's loss is to be flat
CONFLICT = 1.0  # weight of the margin over the true answer
STEPS, RATE = 100, 2e-3  # of the adapter; with RADIUS chosen on tuning facts
ANCHORED = ("memit", "alphaedit")
WAYS = ("firm", "flat", "ahead", "suppress", "anchor", "over", "sharp", "3", "10")


def made(
    model: Model,
    editor: str,
    requests: Sequence[EditRequest],
    resources: Resources,
    seed: int,
    how: str = "",
) -> Edit:
    """The edit by the editor's preset, or in one of WAYS."""
    if how and how not in WAYS and not how.isdigit():
        raise ValueError(f"way to edit {how!r}: choose one of {', '.join(WAYS)}")
    if how == "anchor" and editor not in ANCHORED:
        what = f"{editor}'s targets are no hidden states after a block"
        raise ValueError(f"anchor: {what}; choose {' or '.join(ANCHORED)}")
    hparams = editing.preset(editor, model)
    if how == "sharp":
        return sharpness_aware(model, requests, hparams, seed)
    if how == "firm":
        hparams = hparams.model_copy(update={"stop_loss": hparams.stop_loss / 10})
    statements = int(how) if how.isdigit() else 1
    requests = [with_paraphrases(one, statements) for one in requests]
    module = editing.EDITORS[editor]
    solver = _Batch.evaluate
    with (
        patch.object(_Batch, "evaluate", SOLVED[how](solver) if how in SOLVED else solver),
        moved_ahead(model, seed) if how == "ahead" else nullcontext(),
    ):
        others = {}
        if how == "anchor":
            solution = module.targets(model, requests, hparams, resources)
            others["solution"] = anchored(model, requests, hparams, resources, solution)
        edit = module.edit(model, requests, hparams, resources, seed=seed, **others)
    if how != "over":
        return edit
    larger = {name: Change(dense=OVER * one.matrix()) for name, one in edit.changes.items()}
    return replace(edit, changes=larger)


def expected_step(model: Model, task: Task, settings: Settings) -> dict[str, torch.Tensor]:
    """Of each weight, -lr m / (sqrt(v) + eps), m and v the mean of the gradient and of its square
    over BATCHES batches: AdamW's, if the weights stood still.
    """
    network = model.network
    tuned = Classifier(network, task.classes, settings.seed) if task.classes else network
    order = numpy.random.default_rng(settings.seed).permutation(len(task.train))
    weights = dict(network.named_parameters())
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    for batch in numpy.array_split(order[: BATCHES * settings.batch_size], BATCHES):
        rows = collate([task.train[int(row)] for row in batch])
        loss = tuned(**{name: values.to(model.device) for name, values in rows.items()})["loss"]
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                mean[name] += gradient / BATCHES
                square[name] += gradient.square() / BATCHES
    rate = settings.learning_rate
    return {name: -rate * mean[name] / (square[name].sqrt() + 1e-8) for name in weights}


def at_worst(evaluate: Callable) -> Callable:
    """The loss of a target vector where it is worst within FLAT |v_0| of it, to first order: it is
    to lie where the loss is flat. Source: sharpness-aware minimization (arXiv 2010.01412), which
    arXiv 2602.03696 takes for edits; there of an adapter's weights.
    """

    def worst(self, shift, hparams):
        loss = evaluate(self, shift, hparams)[0]
        (gradient,) = torch.autograd.grad(loss.sum(), shift)
        away = torch.nn.functional.normalize(gradient, dim=1)
        return evaluate(self, shift + FLAT * self.v0[:, None] * away, hparams)

    return worst


def suppressing(evaluate: Callable) -> Callable:
    """The loss of a target vector, and how far the target falls short of LEAD over the mean of its
    RIVALS, as a share. Source: targets that are promoted and rivals that are suppressed, of arXiv
    2508.02092; differs in the hinge, which ends at the lead.
    """

    def suppressed(self, shift, hparams):
        loss, *rest = evaluate(self, shift, hparams)
        log_probs = self._log_probs(shift)[: len(self.weight)]
        token = self.answers.token[:, None]
        others = log_probs.scatter(1, token, -torch.inf).topk(RIVALS).values.mean(1)
        short = (1 - (log_probs.gather(1, token)[:, 0] - others) / LEAD).relu()
        return loss + self._total(self.answer_owner, short * self.weight), *rest

    return suppressed


@contextmanager
def moved_ahead(model: Model, seed: int):
    """Inside, the model is AHEAD expected steps of prose further: an edit that is solved there
    holds against them.
    """
    numbers = usual("text", "", model.name)
    task = tasks.TASKS["text"](model, Data(n_train=numbers.n_train, n_valid=8, seed=seed))
    fields = {"max_steps": 1, "eval_every": 1, "threshold": 0.0, "seed": seed}
    fields |= {"batch_size": numbers.batch_size, "learning_rate": numbers.learning_rate}
    step = expected_step(model, task, Settings(**fields))
    with deltas.preserved(model.network):
        with torch.no_grad():
            for name, weight in model.network.named_parameters():
                weight += AHEAD * step[name]
        yield


def anchored(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: Numbers,
    resources: Resources,
    solution: Solution,
) -> Solution:
    """MEMIT's targets, each as long as the hidden state h that it takes the place of: the shift is
    (h + shift) |h| / |h + shift| - h. Source: norm-anchor scaling, of arXiv 2602.02543.
    """
    rows = build_rows(model, requests, resources.prefixes)
    walk = Walk(model, rows, model.check_layers(hparams.layers))
    _, hidden = walk.read(min(hparams.layers))  # (d_model, n), after the last edited block
    hidden = hidden.T.to(solution.shift)
    goal = hidden + solution.shift
    length = hidden.norm(dim=1, keepdim=True) / goal.norm(dim=1, keepdim=True)
    return solution._replace(shift=goal * length - hidden)


def sharpness_aware(
    model: Model, requests: Sequence[EditRequest], hparams: Numbers, seed: int
) -> WeightDelta:
    """An adapter of rank RANK on the down-projections that the editor writes, taught the targets
    where its loss is worst within RADIUS, and to prefer them to the true answers:

        -log p(target) - CONFLICT log s(log p(target) - log p(true)),   s the logistic function

    Source: arXiv 2602.03696, by sharpness-aware minimization (arXiv 2010.01412). Differs from: few
    matrices, as of the other ways, and numbers chosen here.
    """
    asked = [request.fact.question for request in requests]
    answers = [[one.target for one in requests], [one.fact.object for one in requests]]
    rows = [
        collate(tasks.answer_rows(model, list(zip(asked, one, strict=True)))) for one in answers
    ]
    random = torch.Generator().manual_seed(seed)
    names = [model.down_projection_name(layer) for layer in hparams.layers]
    factors = []
    for layer in hparams.layers:
        d_out, d_in = model.weight(layer).shape
        right = torch.randn(d_in, RANK, generator=random) / d_in**0.5
        factors += [torch.zeros(d_out, RANK), right]
    for factor in factors:
        factor.requires_grad_()

    def loss() -> Tensor:
        new, true = (_log_probability(model, one) for one in rows)
        margin = torch.nn.functional.logsigmoid(new - true)
        return -(new + CONFLICT * margin).mean()

    adam = torch.optim.Adam(factors, lr=RATE)
    with _adapted(model, names, factors):
        for _ in range(STEPS):
            gradients = torch.autograd.grad(loss(), factors)
            norm = torch.stack([one.norm() for one in gradients]).norm()
            away = [RADIUS * one / norm for one in gradients]
            with torch.no_grad():
                torch._foreach_add_(factors, away)
            gradients = torch.autograd.grad(loss(), factors)
            with torch.no_grad():
                torch._foreach_sub_(factors, away)
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            adam.step()
    pairs = zip(factors[::2], factors[1::2], strict=True)
    changes = [Change(left=left.detach(), right=right.detach()) for left, right in pairs]
    return WeightDelta.of(model, changes=dict(zip(names, changes, strict=True)))


def _log_probability(model: Model, rows: dict[str, Tensor]) -> Tensor:
    """Of each row's answer (n,)."""
    inputs = {name: values for name, values in rows.items() if name != "labels"}
    logits = model.network(**inputs).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=UNREAD, reduction="none"
    )
    return -nats.sum(1)


@contextmanager
def _adapted(model: Model, names: Sequence[str], factors: Sequence[Tensor]):
    """Inside, the modules put out `left @ right.T` of their inputs too."""

    def added(left, right):
        return lambda _, inputs, output: output + inputs[0] @ right @ left.T

    hooks = []
    try:
        for name, left, right in zip(names, factors[::2], factors[1::2], strict=True):
            module = model.network.get_submodule(name)
            hooks.append(module.register_forward_hook(added(left, right)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


SOLVED = {"flat": at_worst, "suppress": suppressing}
