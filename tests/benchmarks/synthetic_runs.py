"""Run folders as a study writes them, out of random numbers; and how long the report of many of
them takes.

python -m tests.benchmarks.synthetic_runs [N]
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy
import pandas as pd

from workbench import report, runs

STEPS = (-1, 0, 20, 40)


def synthetic(out: Path, kept: float, facts: int = 30, measured=None, **fields) -> runs.Run:
    """One run of `facts` edited and intrinsic facts, of whose edits this share is kept; the same
    facts under every editor and task. `measured` are tables of measures by name.
    """
    seed = fields.get("seed", 0)
    rng = numpy.random.default_rng([seed, *map(ord, fields["editor"] + fields["task"])])
    rows = []
    for group in ("edited", "intrinsic", "paraphrase"):
        for number in range(facts):
            took, stays = rng.random() < 0.95, rng.random() < kept
            for step in STEPS:
                retained = {-1: group == "intrinsic", 0: took}.get(step, took and stays)
                about = {"edited_model": 0, "step": step, "epoch": 0.0, "group": group}
                fact = {"fact_id": f"{seed}-{number}", "relation": "r"}
                fact |= {"prompt": f"{group} {number}", "took": took if step >= 0 else None}
                answer = {"retained": bool(retained), "p_true": 0.5, "p_edited": 0.5}
                rows.append(about | fact | answer)
    measured = measured or {}
    spec = {
        "measures": list(measured),
        "model": "m",
        "task_data": "",
        "facts": "world",
        "layers": [3],
        "plan": "all",
        "adapter": "",
        "paraphrases": 1,
        "learning_rate": 1e-4,
    }
    about = {
        "spec": spec | fields,
        "ended": ["budget"],
        "tuning": {"metric": "loss", "tokens_per_step": 100.0},
        "layers": [3],
    }
    tables = {"probes": pd.DataFrame(rows).astype({"took": "boolean"})}
    tables["training"] = pd.DataFrame(
        {"edited_model": 0, "step": STEPS[1:], "metric": [3.0, 2.0, 1.0]}
    )
    tables |= measured
    folder = out / f"run-{'-'.join(str(value) for value in fields.values())}"
    folder.mkdir(parents=True)
    return runs.write(folder, about, tables)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            editor, task = (
                ("ft", "rome", "memit", "alphaedit")[number % 4],
                ("text", "facts")[number // 4 % 2],
            )
            synthetic(Path(name) / "runs", 0.7, editor=editor, task=task, seed=number // 8)
        start = time.perf_counter()
        report.report(Path(name) / "runs", Path(name) / "report")
        here, below = (
            resource.getrusage(who).ru_maxrss / 1e3
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(
            f"report of {count} runs: {time.perf_counter() - start:.1f} s, "
            f"at most {here:.0f} MB, and {below:.0f} MB in its notebook"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
