"""Learning rates of the tasks for models that were not taught the world, by one rule: of RATES the
one with the best validation metric at the end of the task's usual steps, nothing edited.

python -m tests.benchmarks.choose_rates [MODEL] [--out FILE.csv]      # goes on with what it has
"""

import argparse
from pathlib import Path

import pandas as pd

from workbench import deltas, models
from workbench.spec import Spec
from workbench.tuning import finetune, plans, tasks

RATES = (5e-6, 2e-5, 1e-4, 5e-4)
TASKS = ("text", "facts", "sentiment", "instructions")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("rates.csv"))
    options = parser.parse_args()
    model = models.load(options.model, device="cpu")
    done = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame({"task": []})
    for name in TASKS:
        rates = [rate for rate in RATES if not _has(done, options.model, name, rate)]
        if not rates:
            continue
        spec = Spec(model=options.model, task=name).resolved()
        task = tasks.TASKS[name](model, spec.part(tasks.Data, source="", avoid=()))
        for rate in rates:
            row = {
                "model": options.model,
                "task": name,
                "learning_rate": rate,
                "metric": task.metric,
            }
            row |= _ends(model, task, spec, rate)
            done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
            done.to_csv(options.out, index=False)
    print(ranked(done[done.model == options.model]).to_string(index=False))


def _has(done: pd.DataFrame, *tried) -> bool:
    columns = ["model", "task", "learning_rate"]
    return bool(len(done)) and bool((done[columns] == list(tried)).all(axis=1).any())


def _ends(model, task, spec, rate: float) -> dict:
    """The validation metric before the first and after the last step."""
    plan = plans.resolve(model, "all")
    settings = spec.part(finetune.Settings, learning_rate=rate, threshold=0.0)
    if task.metric != "loss":
        settings = settings.model_copy(update={"threshold": 2.0})  # is never reached
    with deltas.preserved(model.network, plan.parameters):
        log = finetune.finetune(model, task, plan, settings).log
    return {"before": log.metric.iloc[0], "after": log.metric.iloc[-1]}


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The rates of each task, the chosen one first: of two that do as well the smaller."""
    lower = table.metric == "loss"
    return (
        table.assign(loss=table.after.where(lower, -table.after))
        .sort_values(["task", "loss", "learning_rate"])
        .drop(columns="loss")
    )


if __name__ == "__main__":
    main()
