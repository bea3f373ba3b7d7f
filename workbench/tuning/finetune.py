"""Fine-tune with transformers.Trainer; stop at a validation metric, a patience or a budget; probe
at every evaluation.
"""

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import pandas as pd
import pydantic
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.training_args import ParallelMode

from workbench import deltas, runs
from workbench.models import Model, free_bytes
from workbench.positions import ROW, UNREAD, pad, padded
from workbench.records import BadInput, Record, cause
from workbench.tuning.plans import Plan
from workbench.tuning.tasks import Task

ROWS_AT_ONCE = 16  # of a device; a larger batch is accumulated
# parameters from which activations are computed again in the backward pass rather than kept
LARGE = 500_000_000
BAR = {"unit": "step", "leave": False, "disable": None}
OPTIMISER = {"lr_scheduler_type": "constant", "weight_decay": 0.01}
LOOKS = {"eval_strategy": "steps", "logging_steps": 1}
LOGITS = 2**25  # of the rows evaluated at once: 128 MB in float32, of which there are a few copies
FILES = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
ROWS = {"dataloader_pin_memory": False, "remove_unused_columns": False}
# how accelerate marks a network that computes in mixed precision, and leaves it alone the next time
PREPARED = ("_is_accelerate_prepared", "_original_forward")
Look = Callable[[int, float], None]


class Settings(Record):
    """Numbers of a tuning. AdamW, decay .01, betas .9 and .999, constant learning rate (arXiv
    2507.14198 names no schedule).
    """

    max_steps: int = pydantic.Field(gt=0)  # budget, optimiser steps
    # steps; one more evaluation before the first and one after the last step
    eval_every: int = pydantic.Field(gt=0)
    batch_size: int = pydantic.Field(gt=0)  # rows of an optimiser step, on all devices together
    learning_rate: float = pydantic.Field(gt=0)
    threshold: float  # validation metric at which to stop
    # evaluations without a better metric after which to stop; 0 = never
    patience: int = pydantic.Field(0, ge=0)
    max_tokens: int = pydantic.Field(0, ge=0)  # budget, training tokens without padding; 0 = none
    seed: int = 0
    # further fields of transformers.TrainingArguments
    trainer: dict = pydantic.Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class History:
    """What happened.

    `log`: one row an evaluation: step, epoch, metric (of the validation rows), loss (mean training
    loss since the last evaluation, nats a token), learning_rate, moved (|W - W_0|, Frobenius norm,
    of all weights that the plan moves, an adapter's where there is one; NaN of more than LARGE
    and of several processes, where no copy is kept). `ended`: reached (the threshold), patience
    (no better for so long), budget (used up) or stopped (by a person).
    """

    log: pd.DataFrame
    ended: str


class Protection:
    """What keeps a tuning from undoing what the model held before; this one does nothing."""

    weight = 0.0  # its strength

    def loss(self) -> torch.Tensor | None:
        """What is added to the task's loss; History.log has the task's alone."""

    def after_step(self) -> None:
        """Called after each optimiser step, which it may correct."""


UNPROTECTED = Protection()


class _Trainer(transformers.Trainer):
    """One that protects."""

    protection = UNPROTECTED

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        more = self.protection.loss()
        if more is not None:  # a batch may be computed in parts, each of which adds its share
            self.accelerator.backward(more / self.current_gradient_accumulation_steps)
        return loss


class Classifier(nn.Module):
    """The model's body with a linear head on the hidden state of the last real token; its loss is
    the cross-entropy.
    """

    def __init__(self, network: transformers.PreTrainedModel, classes: int, seed: int):
        super().__init__()
        self.body = network.base_model
        width = network.config.get_text_config().hidden_size
        with deltas.random_state_kept():
            torch.manual_seed(seed)
            self.head = nn.Linear(width, classes, device=network.device)

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        logits = self.head(states[rows, last].float())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def activation_checkpointing_enable(self, **arguments) -> None:
        self.body.activation_checkpointing_enable(**arguments)


@dataclass(eq=False)
class _Watch(transformers.TrainerCallback):
    """Shows progress, calls the probe at every evaluation, ends the tuning."""

    task: Task
    settings: Settings
    probe: Look
    bar: tqdm
    distance: "_Distance"
    protection: Protection
    ended: str = "budget"

    def on_train_begin(self, args, state, control, model=None, **_):
        self.bar.update(state.global_step)
        # it is not of the kind that needs this, which would take gradients through blocks that stay
        if args.activation_checkpointing:
            getattr(model, "body", model).disable_input_require_grads()

    def on_step_end(self, args, state, control, **_):
        self.protection.after_step()
        self.bar.update()
        runs.progress(f"fine-tuning on {self.task.name}", state.global_step, state.max_steps)
        if 0 < self.settings.max_tokens <= int(state.num_input_tokens_seen or 0):
            control.should_training_stop = True
        control.should_evaluate |= control.should_training_stop

    def on_evaluate(self, args, state, control, **_):
        self.probe(state.global_step, state.epoch or 0.0)
        state.log_history[-1]["moved"] = self.distance()
        metrics = log_of(state.log_history, self.task).metric
        newest = metrics.iloc[-1]
        self.bar.set_postfix_str(f"{self.task.metric} {newest:.3f}")
        best = metrics.idxmin() if self.task.metric == "loss" else metrics.idxmax()
        if state.global_step and self.task.reached(newest, self.settings.threshold):
            self.ended = "reached"
        elif self.settings.patience and len(metrics) - 1 - best >= self.settings.patience:
            self.ended = "patience"
        control.should_training_stop |= self.ended != "budget"

    def on_train_end(self, args, state, control, **_):
        """A tuning that ended early is done: a bar that is left short turns red in a notebook."""
        done = state.global_step
        ended = f"{self.ended} after {done} of {self.bar.total} steps"
        runs.progress(f"after fine-tuning on {self.task.name} ({ended})", done, done)
        self.bar.leave = done < self.bar.total
        self.bar.reset(total=done)
        self.bar.update(done)
        self.bar.set_postfix_str(ended)


class _Distance:
    """How far weights are from where they were when this was made."""

    def __init__(self, weights: Sequence[torch.Tensor]):
        is_large = sum(weight.numel() for weight in weights) > LARGE
        is_kept = not is_large and _processes() == 1  # FSDP puts others in their place
        self.pairs = [(one, one.detach().clone()) for one in weights if is_kept]

    def __call__(self) -> float:
        norms = [(weight.detach() - start).norm().item() for weight, start in self.pairs]
        return math.hypot(*norms) if norms else math.nan


def log_of(history: Sequence[dict], task: Task) -> pd.DataFrame:
    """History.log from the Trainer's own log."""
    metric = f"eval_{task.metric}_exact"
    rows = []
    steps = []
    for entry in history:
        if "loss" in entry:
            steps.append(entry)
        elif metric in entry:
            row = {"step": entry["step"], "epoch": entry["epoch"] or 0.0, "metric": entry[metric]}
            means = pd.DataFrame(steps, columns=["loss", "learning_rate"], dtype=float).mean()
            rows.append(row | means.to_dict() | {"moved": entry.get("moved", math.nan)})
            steps = []
    return pd.DataFrame(rows)


def finetune(
    model: Model,
    task: Task,
    plan: Plan,
    settings: Settings,
    probe: Look | None = None,
    work: Path | None = None,
    protection: Protection = UNPROTECTED,
) -> History:
    """Tune the model in place: put `with deltas.preserved(model.network):` around it to have it
    back as it was.

    Ctrl-C (an interrupted kernel) ends it within a step, and is recorded as "stopped". Under
    `accelerate launch` every process calls this with the same arguments; the rows are shared out,
    all of them look.

    Args:
        plan: which weights move; a classifier's head always does.
        probe: called with (step, epoch) at every evaluation, the model in evaluation mode.
        work: folder of the Trainer's checkpoints, if `settings.trainer` asks for them
            (save_strategy, save_steps); a tuning that was killed goes on from the newest whole one.
        protection: of what the model holds now, see `protection`.
    Raises:
        BadInput: not enough memory; a protection in several processes, or in one that was killed
            before; loss or metric became NaN or infinite.
    """
    check_memory(model, plan)
    _warn_of_rounding(model, plan, settings.learning_rate)
    network = model.network
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in plan.parameters)
    tuned = network
    if task.classes:
        model.check_one_device(f"task {task.name}")
        tuned = Classifier(network, task.classes, settings.seed)
    forward = vars(network).get("forward")

    def look(step: int, epoch: float) -> None:
        if probe:
            with _as_loaded(network, forward):
                probe(step, epoch)

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(desc=f"tuning on {task.name}", total=settings.max_steps, **BAR) as bar,
        _put_back(network, forward),
    ):
        begun = runs.whole_checkpoint(work) if work else None
        if protection is not UNPROTECTED and (begun or _processes() > 1):
            what = "a protection cannot go on from a checkpoint, nor be shared by processes"
            raise BadInput(f"{what}; start anew in one process, or leave protect empty")
        watch = _Watch(task, settings, look, bar, _Distance(_moving(model, plan)), protection)
        trainer = _Trainer(
            model=tuned,
            args=_arguments(model, settings, str(work or folder), begun),
            train_dataset=task.train,
            eval_dataset=task.valid,
            data_collator=collate,
            compute_metrics=_means,
            preprocess_logits_for_metrics=_sums,
            callbacks=[watch],
        )
        trainer.protection = protection
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=begun)
        except KeyboardInterrupt:
            watch.ended = "stopped"
    log = log_of(trainer.state.log_history, task)
    if not numpy.isfinite(log.metric).all():
        what = f"fine-tuning diverged (validation {task.metric} {log.metric.iloc[-1]})"
        raise BadInput(f"{what}; lower learning_rate={settings.learning_rate}")
    return History(log=log, ended=watch.ended)


@contextmanager
def _put_back(network: nn.Module, forward: Callable | None) -> Iterator[None]:
    """Afterwards the network computes as before, in evaluation mode: the Trainer turns its cache
    off, and gives it mixed precision and the recomputing of activations. A later tuning gets its
    own precision.
    """
    use_cache = network.config.use_cache
    try:
        yield
    finally:
        network.config.use_cache = use_cache
        _give_forward(network, forward)
        for mark in PREPARED:
            vars(network).pop(mark, None)
        if network.is_activation_checkpointing:
            network.activation_checkpointing_disable()
        network.eval()


@contextmanager
def _as_loaded(network: nn.Module, forward: Callable | None) -> Iterator[None]:
    """For a look, which does not change what is learnt: evaluation mode, and the weights' own dtype
    instead of the Trainer's mixed precision.
    """
    training = network.training
    autocast = vars(network).get("forward")
    _give_forward(network, forward)
    network.eval()
    with deltas.random_state_kept():
        yield
    network.train(training)
    _give_forward(network, autocast)


def _give_forward(network: nn.Module, forward: Callable | None) -> None:
    """Give the network a forward of its own, which mixed precision is; None: its class's."""
    vars(network).pop("forward", None)
    if forward is not None:
        vars(network)["forward"] = forward


def _arguments(
    model: Model, settings: Settings, folder: str, begun: str | None
) -> transformers.TrainingArguments:
    named = dict(settings.trainer)
    batch_size = settings.batch_size
    processes = _processes()
    at_once = named.pop("per_device_train_batch_size", ROWS_AT_ONCE)
    rows = batch_size // processes  # of one process
    even = [parts for parts in range(1, rows + 1) if rows <= parts * at_once and rows % parts == 0]
    parts = named.pop("gradient_accumulation_steps", 0) or min(even, default=1)
    if not isinstance(parts, int) or parts < 1 or batch_size % (parts * processes):
        what = f"batch_size {batch_size}: does not divide by {processes} processes"
        raise BadInput(f"{what} times {parts} accumulated parts")
    vocabulary = len(model.unembedding.weight)
    evaluated = LOGITS // (vocabulary * ROW)
    is_large = model.network.num_parameters() > LARGE
    # FSDP refuses that both do it
    is_done = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
    ours = OPTIMISER | LOOKS | FILES | ROWS
    ours |= {
        "output_dir": folder,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": batch_size // (parts * processes),
        "gradient_accumulation_steps": parts,
        "per_device_eval_batch_size": min(max(evaluated, 1), ROWS_AT_ONCE),
        "activation_checkpointing": (is_large and not is_done) or None,
        "learning_rate": settings.learning_rate,
        "eval_steps": settings.eval_every,
        "eval_on_start": begun is None,
        "use_cpu": model.device.type == "cpu",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "include_num_input_tokens_seen": "non_padding" if settings.max_tokens else "no",
    }
    try:
        arguments = transformers.TrainingArguments(**(ours | named))
    except (TypeError, ValueError) as error:
        what = f"trainer={settings.trainer}: transformers refuses it ({cause(error)})"
        raise BadInput(what) from None
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        arguments._n_gpu = 1  # the model stays where it is
    return arguments


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _moving(model: Model, plan: Plan) -> list[torch.Tensor]:
    """The weights that a plan moves."""
    weights = model.network.named_parameters()
    return [parameter for name, parameter in weights if name in plan.parameters]


def unmoved_share(model: Model, plan: Plan, learning_rate: float) -> float:
    """Share of the weights that may move which a step of AdamW (about the learning rate) leaves as
    they are, by rounding to their dtype.
    """
    still = total = 0
    for weight in _moving(model, plan):
        if weight.dtype in (torch.bfloat16, torch.float16):
            half_step = weight.abs() * torch.finfo(weight.dtype).eps / 4
            still += int((half_step > learning_rate).sum())
            total += weight.numel()
    return still / max(total, 1)


def _warn_of_rounding(model: Model, plan: Plan, learning_rate: float) -> None:
    share = unmoved_share(model, plan, learning_rate)
    if share > 0.5:
        what = f"{share:.0%} of the weights that may move are too large for a step of"
        advice = "load the model in float32 and set trainer={'bf16': True}, or use an adapter"
        message = f"{what} {learning_rate:g} to count in {model.dtype}; {advice}"
        warnings.warn(message, stacklevel=3)


def check_memory(model: Model, plan: Plan) -> None:
    """BadInput if gradients and AdamW's two moments of the moving weights will not fit beside what
    is loaded; FSDP shares them out.
    """
    shares = _processes() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    needed = 3 * sum(weight.nbytes for weight in _moving(model, plan)) / shares
    free = free_bytes(*model.devices)
    if needed > free:
        what = f"fine-tuning plan {plan.text!r} needs about {needed / 1e9:.1f} GB beside the model"
        have = f"and its activations, {free / 1e9:.1f} GB are free"
        advice = "let fewer weights move (plan, adapter), or run with FSDP"
        raise BadInput(f"{what} {have}; {advice}")


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest; labels of one class a row stay as they are."""
    inputs = padded([row["input_ids"] for row in rows]).arguments()
    labels = [row["labels"] for row in rows]
    if not isinstance(labels[0], list):
        return inputs | {"labels": torch.tensor(labels)}
    return inputs | {"labels": pad(labels, UNREAD)}


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row (n, 3): nats, labels read, whether all were the likeliest; so that the Trainer
    keeps no distributions.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    if labels.ndim == 1:  # of a classifier, as if each row were one token
        labels = labels[:, None]
        logits = logits[:, None]
    else:
        labels = labels[:, 1:]
        logits = logits[:, :-1]  # a token is foretold by the one before it
    is_read = labels != UNREAD
    flat = logits.flatten(0, 1).float()
    nats = F.cross_entropy(flat, labels.flatten(), reduction="none")  # 0 where not read
    nats = nats.view_as(labels)
    is_right = (logits.argmax(-1) == labels) | ~is_read
    return torch.stack([nats.sum(1), is_read.sum(1), is_right.all(1)], 1)


def _means(prediction: transformers.EvalPrediction) -> dict[str, float]:
    nats, n_read, is_right = prediction.predictions.T
    loss = nats.sum() / n_read.sum()
    return {"loss_exact": float(loss), "accuracy_exact": float(is_right.mean())}
