"""What a protection costs: CPU seconds of a step of the tuning under each, in turn in one process.

    python -m tests.benchmarks.protecting [MODEL ...] [--rounds N]

STEPS steps of the task `facts` at its usual numbers, no look and no evaluation, of a model that
holds 30 edits by MEMIT: least of the rounds, as a ratio to the tuning without a protection.
"""

import argparse
import time

import numpy
import pandas as pd

from tests.benchmarks.lasting import loaded, setting
from workbench import deltas
from workbench.checkpoints import WORLD_MODELS
from workbench.tuning import plans
from workbench.tuning.finetune import UNPROTECTED, Settings, finetune
from workbench.tuning.numbers import PROTECTIONS
from workbench.tuning.protection import Held, others

STEPS = 10


def seconds(name: str, rounds: int) -> pd.DataFrame:
    """A row a protection: CPU seconds of its making and of a step."""
    here = setting(name, "memit", 30, "facts", 0, "study")
    model = loaded(name)
    plan = plans.resolve(model, "all", here.edit.layers)
    settings = Settings(
        max_steps=STEPS,
        eval_every=2 * STEPS,
        batch_size=here.usual.batch_size,
        learning_rate=here.usual.learning_rate,
        threshold=2.0,  # never reached
    )
    about = {"edited": here.edited, "others": others(model, here.edited)}
    rows = []
    for _ in range(rounds):
        for protection in ("", *PROTECTIONS):
            with deltas.preserved(model.network), deltas.applied(model, here.edit):
                start = time.process_time()
                held = Held(model=model, moving=plan.parameters, **about)
                made = PROTECTIONS[protection](held) if protection else UNPROTECTED
                ready = time.process_time()
                finetune(model, here.task, plan, settings, lambda *_: None, protection=made)
                step = (time.process_time() - ready) / STEPS
            rows.append({"protect": protection or "none", "making": ready - start, "step": step})
    return pd.DataFrame(rows).groupby("protect", sort=False).min().reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(WORLD_MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.models:
        table = seconds(name, options.rounds)
        plain = table.step[table.protect == "none"].iloc[0]
        table = table.assign(model=name, ratio=numpy.round(table.step / plain, 2))
        print(table.to_string(index=False, float_format="{:.2f}".format), flush=True)


if __name__ == "__main__":
    main()
