"""Fine-tune with transformers.Trainer; stop at a validation threshold; probe at every evaluation."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import transformers

from workbench.facts import BadInput
from workbench.models import Model
from workbench.tuning.plans import Plan
from workbench.tuning.tasks import Task


@dataclass(frozen=True, kw_only=True)
class History:
    """What happened. `log`: one row an evaluation: step, epoch, metric (on the validation rows), loss (mean training loss since the
    last evaluation, nats a token), learning_rate. `ended`: "reached" (the threshold), "budget" or "stopped" (by a person)."""

    log: pd.DataFrame
    ended: str


class _Watch(transformers.TrainerCallback):
    """Keeps the log, calls the probe at every evaluation, ends the tuning at the threshold."""

    def __init__(self, probe: Callable[[int, float], None] | None, threshold: float, evaluate: Callable[[], None] | None = None):
        self.probe, self.threshold, self.evaluate = probe, threshold, evaluate
        self.rows: list[dict] = []
        self.ended = "budget"
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(self, args, state, control, metrics=None, **_):
        loss = sum(self.losses) / len(self.losses) if self.losses else float("nan")
        self.losses.clear()
        row = {"step": state.global_step, "epoch": state.epoch or 0.0, "metric": metrics["eval_loss"], "loss": loss}
        self.rows.append(row | {"learning_rate": args.learning_rate})
        if self.probe:
            self.probe(state.global_step, state.epoch or 0.0)
        if metrics["eval_loss"] <= self.threshold and state.global_step > 0:
            self.ended = "reached"
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        if self.rows and self.rows[-1]["step"] != state.global_step:
            self.evaluate()


def finetune(
    model: Model,
    task: Task,
    plan: Plan,
    max_steps: int,
    eval_every: int,
    batch_size: int,
    learning_rate: float,
    threshold: float,
    seed: int = 0,
    probe: Callable[[int, float], None] | None = None,
) -> History:
    """Tune the model in place: put `with deltas.preserved(model.network):` around it to have it back as it was.

    AdamW, decay .01, betas .9 and .999, constant learning rate (arXiv 2507.14198 names no schedule).

    Args:
        plan: which weights move.
        max_steps: budget, optimiser steps.
        eval_every: steps between evaluations; one more before the first and one after the last step.
        batch_size: rows a step.
        threshold: the validation metric at which to stop.
        probe: called with (step, epoch) at every evaluation, the model in evaluation mode.
    """
    for name, value in {"max_steps": max_steps, "eval_every": eval_every, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if value <= 0:
            raise BadInput(f"{name}={value}: must be above 0")
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in plan.parameters)

    def probing(step: int, epoch: float) -> None:
        training = model.network.training
        model.network.eval()
        with torch.random.fork_rng():  # a look does not change what is learnt
            probe(step, epoch)
        model.network.train(training)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=eval_every,
            eval_on_start=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
        )
        arguments._n_gpu = 1  # the model stays where it is
        watch = _Watch(probing if probe else None, threshold)
        trainer = transformers.Trainer(model=model.network, args=arguments, train_dataset=task.train, eval_dataset=task.valid, callbacks=[watch])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        watch.evaluate = trainer.evaluate
        trainer.train()
    model.network.eval()
    if not torch.isfinite(torch.tensor(watch.rows[-1]["metric"])):
        raise BadInput(f"fine-tuning diverged (validation loss {watch.rows[-1]['metric']}); lower learning_rate={learning_rate}")
    return History(log=pd.DataFrame(watch.rows), ended=watch.ended)
