"""Learning rates of the tasks for models that were not taught the world, by one rule: of RATES the
one with the best validation metric at the end of the task's usual steps, nothing edited.

python -m tests.benchmarks.choose_rates [MODEL] [--adapter lora] [--tasks text,facts] [--out FILE]
# goes on with what the file has
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import pandas as pd

from workbench import deltas, models
from workbench.spec import Spec
from workbench.tuning import adapters, finetune, plans, tasks

RATES = {"": (5e-6, 2e-5, 1e-4, 5e-4), "lora": (2e-5, 2e-4, 1e-3, 5e-3)}
TASKS = "text,facts,sentiment,instructions"
TRIED = ["model", "task", "adapter", "learning_rate"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--adapter", default="", choices=RATES)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--out", type=Path, default=Path("rates.csv"))
    options = parser.parse_args()
    model = models.load(options.model, device="cpu")
    done = pd.DataFrame(columns=TRIED)
    if options.out.exists():
        done = pd.read_csv(options.out, dtype={"adapter": str}).fillna({"adapter": ""})
    for name in options.tasks.split(","):
        about = {"model": options.model, "task": name, "adapter": options.adapter}
        tried = done[(done[[*about]] == [*about.values()]).all(axis=1)].learning_rate
        rates = [rate for rate in RATES[options.adapter] if rate not in set(tried)]
        if not rates:
            continue
        spec = Spec(**about).resolved()
        task = tasks.TASKS[name](model, spec.part(tasks.Data, source="", avoid=()))
        for rate in rates:
            row = about | {"learning_rate": rate, "metric": task.metric}
            row |= _ends(model, task, spec, rate)
            done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
            done.to_csv(options.out, index=False)
    print(ranked(done[done.model == options.model]).to_string(index=False))


def _ends(model, task, spec, rate: float) -> dict:
    """The validation metric before the first and after the last step."""
    plan = plans.resolve(model, "all")
    settings = spec.part(finetune.Settings, learning_rate=rate, threshold=0.0)
    if task.metric != "loss":
        settings = settings.model_copy(update={"threshold": 2.0})  # is never reached
    attached = nullcontext()
    if spec.adapter:
        numbers = {name: getattr(spec, f"adapter_{name}") for name in ("rank", "alpha", "dropout")}
        attached = adapters.attached(model, plan, spec.adapter, **numbers)
    with deltas.preserved(model.network, plan.parameters), attached as adapter:
        moving = adapter.plan if adapter else plan
        log = finetune.finetune(model, task, moving, settings).log
    return {"before": log.metric.iloc[0], "after": log.metric.iloc[-1]}


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The rates of each task, the chosen one first: of two that do as well the smaller."""
    lower = table.metric == "loss"
    return (
        table.assign(loss=table.after.where(lower, -table.after))
        .sort_values(["adapter", "task", "loss", "learning_rate"])
        .drop(columns="loss")
    )


if __name__ == "__main__":
    main()
