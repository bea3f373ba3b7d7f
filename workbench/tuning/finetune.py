"""Fine-tune with transformers.Trainer; stop at a validation metric, a patience or a budget; probe
at every evaluation.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pydantic
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.training_args import ParallelMode

from workbench import deltas, runs
from workbench.facts import BadInput, Record
from workbench.models import Model, free_bytes
from workbench.tuning.plans import Plan
from workbench.tuning.tasks import Task

ROWS_AT_ONCE = 16  # of a device; a larger batch is accumulated
# parameters from which activations are computed again in the backward pass rather than kept
LARGE = 500_000_000


class Settings(Record):
    """Numbers of a tuning. AdamW, decay .01, betas .9 and .999, constant learning rate (arXiv
    2507.14198 names no schedule).
    """

    max_steps: int = pydantic.Field(gt=0)  # budget, optimiser steps
    eval_every: int = pydantic.Field(
        gt=0
    )  # steps; one more evaluation before the first and one after the last step
    batch_size: int = pydantic.Field(gt=0)  # rows of an optimiser step, on all devices together
    learning_rate: float = pydantic.Field(gt=0)
    threshold: float  # validation metric at which to stop
    patience: int = pydantic.Field(
        0, ge=0
    )  # evaluations without a better metric after which to stop; 0 = never
    max_tokens: int = pydantic.Field(0, ge=0)  # budget, training tokens without padding; 0 = none
    seed: int = 0
    trainer: dict = pydantic.Field(
        default_factory=dict
    )  # further fields of transformers.TrainingArguments


@dataclass(frozen=True, kw_only=True)
class History:
    """What happened.

    `log`: one row an evaluation: step, epoch, metric (of the validation rows), loss (mean training
    loss since the last evaluation, nats a token), learning_rate. `ended`: reached (the threshold),
    patience (no better for so long), budget (used up) or stopped (by a person).
    """

    log: pd.DataFrame
    ended: str


class Classifier(nn.Module):
    """The model's body with a linear head on the hidden state of the last real token; its loss is
    the cross-entropy.
    """

    def __init__(self, network: transformers.PreTrainedModel, classes: int, seed: int):
        super().__init__()
        self.body = network.base_model
        with deltas.random_state_kept():
            torch.manual_seed(seed)
            self.head = nn.Linear(
                network.config.get_text_config().hidden_size, classes, device=network.device
            )

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        logits = self.head(states[torch.arange(len(last), device=last.device), last].float())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def activation_checkpointing_enable(self, **arguments) -> None:
        self.body.activation_checkpointing_enable(**arguments)


class _Watch(transformers.TrainerCallback):
    """Shows progress, calls the probe at every evaluation, ends the tuning."""

    def __init__(self, task: Task, settings: Settings, probe: Callable[[int, float], None] | None):
        self.task, self.settings, self.probe = task, settings, probe
        self.evaluate: Callable[[], None] | None = None
        self.ended = "budget"

    def on_train_begin(self, args, state, control, model=None, **_):
        # it is not of the kind that needs this, which would take gradients through blocks that stay
        if args.activation_checkpointing:
            getattr(model, "body", model).disable_input_require_grads()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"tuning on {self.task.name}",
            unit="step",
            leave=False,
            disable=None,
        )

    def on_step_end(self, args, state, control, **_):
        self.bar.update()
        runs.progress(f"fine-tuning on {self.task.name}", state.global_step, state.max_steps)
        if 0 < self.settings.max_tokens <= int(state.num_input_tokens_seen or 0):
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **_):
        if self.probe:
            self.probe(state.global_step, state.epoch or 0.0)
        metrics = log_of(state.log_history, self.task).metric
        self.bar.set_postfix_str(f"{self.task.metric} {metrics.iloc[-1]:.3f}")
        best = metrics.idxmin() if self.task.metric == "loss" else metrics.idxmax()
        if state.global_step and self.task.reached(metrics.iloc[-1], self.settings.threshold):
            self.ended = "reached"
        elif self.settings.patience and len(metrics) - 1 - best >= self.settings.patience:
            self.ended = "patience"
        control.should_training_stop |= self.ended != "budget"

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
        looked = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if not looked or looked[-1] != state.global_step:
            self.evaluate()


def log_of(history: Sequence[dict], task: Task) -> pd.DataFrame:
    """History.log from the Trainer's own log."""
    rows, seen = [], []
    for entry in history:
        if "loss" in entry:
            seen.append(entry)
        elif (name := f"eval_{task.metric}_exact") in entry:
            means = pd.DataFrame(seen, columns=["loss", "learning_rate"], dtype=float).mean()
            rows.append(
                {
                    "step": entry["step"],
                    "epoch": entry["epoch"] or 0.0,
                    "metric": entry[name],
                    **means,
                }
            )
            seen = []
    return pd.DataFrame(rows)


def finetune(
    model: Model,
    task: Task,
    plan: Plan,
    settings: Settings,
    probe: Callable[[int, float], None] | None = None,
    work: Path | None = None,
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
    Raises:
        BadInput: not enough memory; loss or metric became NaN or infinite.
    """
    check_memory(model, plan)
    if (still := unmoved_share(model, plan, settings.learning_rate)) > 0.5:
        warnings.warn(
            f"{still:.0%} of the weights that may move are too large for a step of {settings.learning_rate:g} to count in {model.dtype}; load the "
            "model in float32 and set trainer={'bf16': True}, or use an adapter",
            stacklevel=2,
        )
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in plan.parameters)
    if task.classes:
        model.check_one_device(f"task {task.name}")
    tuned = (
        Classifier(model.network, task.classes, settings.seed) if task.classes else model.network
    )
    forward = vars(model.network).get("forward")

    def probing(step: int, epoch: float) -> None:
        training, autocast = model.network.training, _exchanged(model, forward)
        model.network.eval()
        with deltas.random_state_kept():  # a look does not change what is learnt
            probe(step, epoch)
        model.network.train(training)
        _exchanged(model, autocast)

    with tempfile.TemporaryDirectory() as folder:
        begun, use_cache = (
            runs.whole_checkpoint(work) if work else None,
            model.network.config.use_cache,
        )  # which the Trainer turns off
        watch = _Watch(task, settings, probing if probe else None)
        trainer = transformers.Trainer(
            model=tuned,
            args=_arguments(model, settings, str(work or folder), begun),
            train_dataset=task.train,
            eval_dataset=task.valid,
            data_collator=lambda rows: collate(rows, model.tokenizer.pad_token_id or 0),
            compute_metrics=_means,
            preprocess_logits_for_metrics=_sums,
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        watch.evaluate = trainer.evaluate
        try:
            trainer.train(resume_from_checkpoint=begun)
        except KeyboardInterrupt:
            watch.ended = "stopped"
            watch.bar.close()
        finally:
            model.network.config.use_cache = use_cache
            _exchanged(model, forward)
            watch.evaluate = (
                None  # else the trainer and its optimiser would wait for the garbage collector
            )
            if trainer.args.activation_checkpointing:
                model.network.activation_checkpointing_disable()
    model.network.eval()
    log = log_of(trainer.state.log_history, task)
    if not log.metric.map(torch.tensor).map(torch.isfinite).all():
        raise BadInput(
            f"fine-tuning diverged (validation {task.metric} {log.metric.iloc[-1]}); lower learning_rate={settings.learning_rate}"
        )
    return History(log=log, ended=watch.ended)


def _arguments(
    model: Model, settings: Settings, folder: str, begun: str | None
) -> transformers.TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = settings.batch_size // processes  # of one process
    named = dict(settings.trainer)
    parts, at_once = (
        named.pop("gradient_accumulation_steps", 0),
        named.pop("per_device_train_batch_size", ROWS_AT_ONCE),
    )
    parts = parts or next(
        (n for n in range(1, rows + 1) if rows <= n * at_once and not rows % n), 1
    )
    if not isinstance(parts, int) or parts < 1 or settings.batch_size % (parts * processes):
        raise BadInput(
            f"batch_size {settings.batch_size}: does not divide by {processes} processes times {parts} accumulated parts"
        )
    ours = {
        "output_dir": folder,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size // (parts * processes),
        "gradient_accumulation_steps": parts,
        "activation_checkpointing": True
        if model.network.num_parameters() > LARGE and not _fsdp_does()
        else None,
        "per_device_eval_batch_size": ROWS_AT_ONCE,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every,
        "eval_on_start": begun is None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": model.device.type == "cpu",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding" if settings.max_tokens else "no",
    }
    try:
        arguments = transformers.TrainingArguments(**(ours | named))
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"trainer={settings.trainer}: transformers refuses it ({' '.join(str(error).split())[:150]})"
        ) from None
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        arguments._n_gpu = 1  # the model stays where it is
    return arguments


def _exchanged(model: Model, forward: Callable | None) -> Callable | None:
    """Give the network another forward of its own (None: its class's), and return the one it had.

    The Trainer's mixed precision is such a one; looks, and whatever comes after the tuning, compute
    in the weights' own dtype.
    """
    before = vars(model.network).pop("forward", None)
    if forward is not None:
        vars(model.network)["forward"] = forward
    return before


def _fsdp_does() -> bool:
    return os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"  # both at once are refused


def moving_bytes(model: Model, plan: Plan, itemsize: int = 0) -> int:
    """Bytes of the weights that move; `itemsize`: of a weight, if not that of the model's dtype."""
    moving = [
        parameter for name, parameter in model.network.named_parameters() if name in plan.parameters
    ]
    return sum(parameter.numel() * (itemsize or parameter.element_size()) for parameter in moving)


def unmoved_share(model: Model, plan: Plan, learning_rate: float) -> float:
    """Share of the weights that may move which a step of AdamW (about the learning rate) leaves as
    they are, by rounding to their dtype.
    """
    still = total = 0
    for name, parameter in model.network.named_parameters():
        if name in plan.parameters and parameter.dtype in (torch.bfloat16, torch.float16):
            still += int(
                (parameter.abs() * torch.finfo(parameter.dtype).eps / 4 > learning_rate).sum()
            )
            total += parameter.numel()
    return still / total if total else 0.0


def check_memory(model: Model, plan: Plan) -> None:
    """BadInput if gradients and AdamW's two moments of the moving weights will not fit beside what
    is loaded; FSDP shares them out.
    """
    processes = (
        int(os.environ.get("WORLD_SIZE", "1"))
        if os.environ.get("ACCELERATE_USE_FSDP") == "true"
        else 1
    )
    needed, free = 3 * moving_bytes(model, plan) / processes, free_bytes(*model.devices)
    if needed > free:
        raise BadInput(
            f"fine-tuning plan {plan.text!r} needs about {needed / 1e9:.1f} GB beside the model and its activations, {free / 1e9:.1f} GB are free; "
            "let fewer weights move (plan, adapter), or run with FSDP"
        )


def collate(rows: Sequence[dict], pad: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest; labels of one class a row stay as they are."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list, filler: int) -> list:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(
            [
                padded(row["labels"], -100) if isinstance(row["labels"], list) else row["labels"]
                for row in rows
            ]
        ),
    }


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row (n, 3): nats, labels read, whether all were the likeliest; so that the Trainer
    keeps no distributions.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    else:
        logits, labels = logits[:, :-1], labels[:, 1:]  # a token is told by the one before it
    read = labels != -100
    nats = F.cross_entropy(
        logits.transpose(1, 2).float(), labels, reduction="none"
    )  # 0 where not read
    right = (logits.argmax(-1) == labels) | ~read
    return torch.stack([nats.sum(1), read.sum(1), right.all(1)], 1)


def _means(prediction: transformers.EvalPrediction) -> dict[str, float]:
    nats, read, right = prediction.predictions.T
    return {"loss_exact": float(nats.sum() / read.sum()), "accuracy_exact": float(right.mean())}
