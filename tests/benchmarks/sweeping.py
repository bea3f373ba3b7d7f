"""What a sweep costs beside its notebooks: 24 runs on the world models with two workers, then a
second start, which has nothing to do.

python -m tests.benchmarks.sweeping
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import yaml

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_case_study.ipynb"
GRID = {
    "editor": ["ft", "rome", "memit"],
    "task": ["text", "facts"],
    "model": ["world-gpt2", "world-llama"],
    "seed": [0, 1],
}
WORKERS = 2


def main():
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "grid.yaml", Path(folder) / "runs"
        small = {"max_steps": 4, "eval_every": 2, "n_intrinsic": 4}
        path.write_text(
            yaml.safe_dump({"notebook": str(NOTEBOOK), "parameters": small, "grid": GRID})
        )
        command = [
            sys.executable,
            "-m",
            "workbench",
            "sweep",
            str(path),
            "--out",
            str(out),
            "--workers",
            str(WORKERS),
        ]
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True)
            seconds.append(time.perf_counter() - start)
        own = [
            nbformat.read(each, as_version=4).metadata.papermill.duration
            for each in out.glob("*/notebook.ipynb")
        ]
    beside = (WORKERS * seconds[0] - sum(own)) / len(own)
    print(
        f"{len(own)} runs, {WORKERS} workers: {seconds[0]:.0f} s, "
        f"the notebooks themselves {sum(own):.0f} s"
    )
    print(f"beside them {beside:.1f} worker seconds a run")
    print(f"second start: {seconds[1]:.1f} s")


if __name__ == "__main__":
    main()
