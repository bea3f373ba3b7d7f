"""What probing costs, and what one loaded model saves: fine-tuning beside the bare Trainer, a study
beside cold processes.

    python -m tests.benchmarks.tuning [MODEL ...]

Tokens a second of the tuning on text with probes of 300 prompts at step 0 and every 50 steps, and
of transformers.Trainer alone on the same rows in the same order, without and with the same
evaluations on the validation rows; what 50 steps with one evaluation and one look take from these;
share of the time spent looking. Then 10 single-fact edits in one study against 10 processes that
each load the model, choose facts and tune by themselves; 2 processes are run and scaled.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time

import pandas as pd
import torch
import transformers

from workbench import checkpoints, deltas, models, study
from workbench.study import Spec
from workbench.tracking.probes import Probe, questions
from workbench.tuning import plans
from workbench.tuning.finetune import Settings, collate, finetune

STEPS, ROUNDS = 100, 1
COLD = """
import sys
from workbench.study import Spec, run
run(Spec(**eval(sys.argv[1])), out=sys.argv[2])
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(checkpoints.WORLD_MODELS))
    rows = []
    for name in parser.parse_args().models:
        model = models.load(name, device="cpu")
        for row in itertools.chain(_probing(model), _cold(name)):
            rows.append({"model": name} | row)
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))


def _probing(model):
    spec = Spec(
        model=model.name,
        n_edited=30,
        n_intrinsic=120,
        max_steps=STEPS,
        eval_every=50,
        threshold=-1.0,
    ).resolved()
    chosen = study.choose(spec, model)
    task, plan = study.make_task(spec, model, chosen), plans.resolve(model, "all")
    probe = Probe(model, questions(chosen.edited, chosen.intrinsic)[:300], chosen.related)
    tokens = STEPS * spec.batch_size * len(task.train[0]["input_ids"])
    looking = []

    def look(step, epoch):
        start = time.perf_counter()
        probe.look(step, epoch)
        looking.append(time.perf_counter() - start)

    seconds = {}
    for name in ("bare", "evaluating", "probed") * ROUNDS:  # the fastest of each counts
        start = time.perf_counter()
        with deltas.preserved(model.network):
            if name != "probed":
                _bare(model, task, spec, evaluating=name == "evaluating")
            else:
                looking.clear()
                finetune(model, task, plan, spec.part(Settings), look)
        seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - start)
    per_look, evaluations = sum(looking) / len(looking), STEPS // 50 + 1
    probed, training = tokens / seconds["probed"], seconds["bare"] / STEPS * 50
    more = (seconds["probed"] - seconds["bare"]) / evaluations  # of ours, by evaluation and look
    for name, what in (
        ("bare", "tuning, tokens a second"),
        ("evaluating", "the same, the Trainer evaluating too"),
    ):
        yield {
            "what": what,
            "plain": tokens / seconds[name],
            "ours": probed,
            "ratio": probed * seconds[name] / tokens,
        }
    yield {
        "what": "seconds of 50 steps; with one evaluation and one look",
        "plain": training,
        "ours": training + more,
        "ratio": training / (training + more),
    }
    yield {
        "what": f"seconds of 50 steps; of a look at {len(probe.questions)} prompts",
        "plain": training,
        "ours": per_look,
        "ratio": per_look / training,
    }


def _bare(model, task, spec, evaluating):
    model.network.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            eval_strategy="steps" if evaluating else "no",
            eval_steps=spec.eval_every,
            eval_on_start=evaluating,
            per_device_eval_batch_size=16,
            prediction_loss_only=True,
        )
        transformers.Trainer(
            model=model.network,
            args=arguments,
            train_dataset=task.train,
            eval_dataset=task.valid,
            data_collator=collate,
        ).train()


def _cold(name):
    fields = {
        "model": name,
        "n_edited": 10,
        "edits_per_model": 1,
        "max_steps": 20,
        "eval_every": 20,
        "n_train": 200,
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        study.run(Spec(**fields), out=folder)
        warm = time.perf_counter() - start
        start = time.perf_counter()
        for seed in (1, 2):
            single = fields | {
                "n_edited": 1,
                "seed": seed,
                "split_rule": "paper",
            }  # one relation alone has too few to watch
            subprocess.run(
                [sys.executable, "-c", COLD, repr(single), folder], check=True, capture_output=True
            )
        cold = (time.perf_counter() - start) * 5
    yield {
        "what": "10 single-fact edits, seconds",
        "plain": cold,
        "ours": warm,
        "ratio": cold / warm,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
