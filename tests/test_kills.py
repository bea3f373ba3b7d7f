"""A command that is killed at any moment leaves what it makes whole or not at all, and the next
start finishes it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from workbench import deltas, runs

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"
KILLS = {"edit": 13, "run": 12}


@pytest.fixture
def command(request, tiny_folders, tmp_path):
    """command(out) -> what to start."""
    path = tmp_path / "facts.jsonl"
    lines = [
        {
            "id": str(n),
            "subject": f"Person {n}",
            "prompt": "{} plays the",
            "object": "harp",
            "target": "flute",
        }
        for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    model = str(tiny_folders["gpt2"])
    start = [sys.executable, "-m", "workbench", request.param]
    if request.param == "edit":
        return lambda out: [
            *start,
            "--model",
            model,
            "--editor",
            "rome",
            "--facts",
            str(path),
            "--out",
            str(out / "edited"),
        ]
    given = {
        "model": model,
        "facts": str(path),
        "fact": "0",
        "layers": "[1]",
        "n_intrinsic": 0,
        "max_steps": 1,
        "eval_every": 1,
        "device": "cpu",
    }
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    return lambda out: [*start, str(NOTEBOOK), *pairs, "--out", str(out)]


def content(out: Path) -> dict:
    """What was made, as far as it is the same each time."""
    if (folder := out / "edited").exists():
        delta = deltas.load(folder / "delta.safetensors")
        changes = {name: change.matrix().tolist() for name, change in delta.changes.items()}
        return {
            "changes": changes,
            "files": {path.name: path.stat().st_size for path in folder.iterdir()},
        }
    return {
        run.folder.name: {name: getattr(run, name).to_json() for name in runs.TABLES}
        for run in runs.listed(out)
    }


def kill(running: subprocess.Popen) -> None:
    """The process and whatever it has started."""
    below = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    for child in below:
        if child.is_running():
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", KILLS, indirect=True)
def test_a_killed_command_leaves_nothing_half_written(request, command, tmp_path):
    quiet, out, moments = tmp_path / "quiet", tmp_path / "out", random.Random(0)
    for folder in (quiet, out):
        folder.mkdir()
    alone = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.monotonic()
    subprocess.run(command(quiet), check=True, **alone)
    seconds, expected, killed = time.monotonic() - start, content(quiet), 0
    assert expected
    wanted = KILLS[request.node.callspec.params["command"]]
    for _ in range(4 * wanted):
        if killed == wanted:
            break
        running = subprocess.Popen(command(out), **alone)
        try:
            running.wait(moments.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            kill(running)
            killed += 1
        visible = [path for path in out.iterdir() if not path.name.startswith(".")]
        assert content(out) == (expected if visible else {})
        for path in visible:
            shutil.rmtree(path)
    print(
        f"{killed} kills of {request.node.callspec.params['command']}, which takes {seconds:.0f} s"
    )
    assert killed == wanted
    subprocess.run(command(out), check=True, **alone)
    assert content(out) == expected
    assert [path.name for path in out.iterdir()] == [path.name for path in quiet.iterdir()]
