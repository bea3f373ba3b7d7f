"""What probing costs, and what one loaded model saves: fine-tuning beside the bare Trainer, a study
beside cold processes.

    python -m tests.benchmarks.tuning [MODEL ...]

CPU seconds of 50 steps of the tuning on text with probes of 300 prompts at steps 0 and 50, and of
transformers.Trainer alone on the same rows in the same order, without and with the same evaluations
on the validation rows: least and median of --rounds. The ratios are of 50 steps that have one
evaluation and one look, as a long tuning with a look every 50 steps does. Then --edits edits of one
fact in one study against as many processes that each load the model, choose facts and tune by
themselves; --processes of them are run and scaled. --only probing, or cold, for one of the two.
"""

import argparse
import resource
import statistics
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

STEPS = 50
COLD = """
import sys
from workbench.study import Spec, run
run(Spec(**eval(sys.argv[1])), out=sys.argv[2])
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(checkpoints.WORLD_MODELS))
    parser.add_argument("--only", default="", choices=["probing", "cold"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        parts = []
        if options.only != "cold":
            parts += _probing(models.load(name, device="cpu"), options.rounds)
        if options.only != "probing":
            parts += _cold(name, options.edits, options.processes)
        for row in parts:
            rows.append({"model": name} | row)
    table = pd.DataFrame(rows)
    table["ratio"] = table.plain / table.ours
    print(table.to_string(index=False, float_format="{:.2f}".format))


def _probing(model, rounds):
    spec = Spec(
        model=model.name,
        n_edited=30,
        n_intrinsic=120,
        max_steps=STEPS,
        eval_every=STEPS,
        threshold=-1.0,
    ).resolved()
    chosen = study.choose(spec, model)
    task, plan = study.make_task(spec, model, chosen), plans.resolve(model, "all")
    probe = Probe(model, questions(chosen.edited, chosen.intrinsic)[:300], chosen.related)
    probe.look(-1)  # so that no first call is timed
    seconds = {"bare": [], "evaluating": [], "probed": [], "look": []}

    def look(step, epoch):
        start = time.process_time()
        probe.look(step, epoch)
        seconds["look"].append(time.process_time() - start)

    for _ in range(rounds):
        for name in ("bare", "evaluating", "probed"):
            start = time.process_time()
            with deltas.preserved(model.network):
                if name == "probed":
                    finetune(model, task, plan, spec.part(Settings), look)
                else:
                    _bare(model, task, spec, evaluating=name == "evaluating")
            seconds[name].append(time.process_time() - start)
            print(model.name, name, round(seconds[name][-1], 2), flush=True)
    for name, of in (("least", min), ("median", statistics.median)):
        bare, evaluating, probed, one = (of(seconds[part]) for part in seconds)
        # both evaluate before the first step, too: of two evaluations one is counted
        per_50 = {"evaluating": (bare + evaluating) / 2, "probed": (bare + probed) / 2}
        yield {"what": f"{name}: bare Trainer; with looks", "plain": bare, "ours": per_50["probed"]}
        yield {"what": f"{name}: evaluating Trainer; with looks", "ours": per_50["probed"]} | {
            "plain": per_50["evaluating"]
        }
        yield {"what": f"{name}: 50 steps; a look at {len(probe.questions)}"} | {
            "plain": bare,
            "ours": one,
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


def _cold(name, edits, processes):
    fields = {
        "model": name,
        "n_edited": edits,
        "edits_per_model": 1,
        "max_steps": 20,
        "eval_every": 20,
        "n_train": 200,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = models.load(name, device="cpu")
        study.choose(Spec(**fields).resolved(), model)  # neither side prepares for the first time
        start = time.process_time()
        study.run(Spec(**fields), out=folder)
        warm = time.process_time() - start
        before = _of_children()
        for seed in range(1, processes + 1):
            single = fields | {
                "n_edited": 1,
                "seed": seed,
                "split_rule": "paper",
            }  # one relation alone has too few to watch
            subprocess.run(
                [sys.executable, "-c", COLD, repr(single), folder], check=True, capture_output=True
            )
        cold = (_of_children() - before) / processes * edits
    yield {"what": f"{edits} single-fact edits", "plain": cold, "ours": warm}


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
