"""How long the explorer needs to open a run of 150 facts and to redraw another checkpoint or fact:
python -m tests.benchmarks.explorer
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy
import pandas as pd

from workbench import runs
from workbench.explorer import Explorer

# of the facts in turn: retained at step 0, at the end, and which category has the most there
ENDS = (
    (True, True, "p_edited"),
    (True, False, "p_related"),
    (True, False, "p_true"),
    (True, False, "p_other"),
    (False, False, "p_true"),
)


def synthetic_run(
    folder: Path,
    n_edited: int = 50,
    n_intrinsic: int = 100,
    models: int = 1,
    steps=(-1, 0, 20, 40, 60, 80, 100, 120),
    layers: int = 12,
):
    """A run of made-up numbers in the recorded form; its edited facts end as ENDS says, its
    intrinsic ones are kept.
    """
    rng = numpy.random.default_rng(0)
    probes, lens, tokens = [], [], []
    for model in range(models):
        for number in range(n_edited + n_intrinsic):
            edited = number < n_edited
            fact_id = f"edited:{model}-{number}" if edited else f"intrinsic:{number}"
            held, kept, most = ENDS[number % len(ENDS)] if edited else (True, True, "p_true")
            for step in steps:
                masses = dict.fromkeys(
                    ("p_true", "p_edited", "p_related", "p_stop", "p_other"), 0.1
                )
                masses[most if step == steps[-1] else "p_edited"] = 0.6
                retained = kept if step == steps[-1] else held
                about = {"edited_model": model, "step": step, "fact_id": fact_id}
                probes.append(
                    about
                    | masses
                    | {
                        "group": "edited" if edited else "intrinsic",
                        "prompt": f"<i>Prompt</i> {number}",
                        "target": "A & B",
                        "retained": retained,
                    }
                )
                for layer in range(layers):
                    lens += [
                        about
                        | {
                            "layer": layer,
                            "category": name,
                            "probability": rng.random(),
                            "rank": 1.0,
                        }
                        for name in ("true", "edited", "related")
                    ]
                    tokens += [
                        about
                        | {
                            "layer": layer,
                            "rank": rank,
                            "token": f" <b>{rank}",
                            "probability": 1 / (rank + step + 2),
                        }
                        for rank in range(1, 11)
                    ]
    folder.mkdir(parents=True)
    tables = {
        "probes": pd.DataFrame(probes),
        "lens": pd.DataFrame(lens),
        "tokens": pd.DataFrame(tokens),
        "training": pd.DataFrame({"step": [0]}),
    }
    return runs.write(folder, {"spec": {}, "ended": ["budget"], "layers": [3]}, tables)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = runs.read(synthetic_run(Path(folder) / "made-up").folder)
        start = time.perf_counter()
        explorer = Explorer(run)
        print(f"opened in {time.perf_counter() - start:.3f} s")
        for name, widget in (("checkpoint", explorer.step), ("fact", explorer.fact)):
            seconds = []
            for index in range(8):
                start = time.perf_counter()
                widget.index = index if widget.index != index else index + 1
                seconds.append(time.perf_counter() - start)
            print(
                f"another {name}: median {statistics.median(seconds) * 1000:.0f} ms, "
                f"longest {max(seconds) * 1000:.0f} ms"
            )


if __name__ == "__main__":
    main()
