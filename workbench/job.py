"""A notebook run in a process of its own (`workbench run`), which can be watched and stopped; the
panel's Run and Stop.
"""

import ast
import atexit
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from workbench import batch
from workbench.facts import BadInput
from workbench.spec import Spec

GRACE = 3.0  # seconds that a stopped run has to end by itself


class Job:
    """One `workbench run` in a process of its own.

    Its log, progress and temporary files lie in a folder that goes with it.
    """

    def __init__(self, notebook: Path, given: dict, out: Path):
        self.out, self.stopped, self._settling, self._start = (
            out,
            False,
            threading.Lock(),
            time.monotonic(),
        )
        self._work = tempfile.TemporaryDirectory(prefix="workbench-", ignore_cleanup_errors=True)
        self.folder = Path(self._work.name)
        pairs = [part for name, value in given.items() for part in ("-p", name, _yaml(value))]
        command = [
            sys.executable,
            "-m",
            "workbench",
            "run",
            str(notebook.resolve()),
            *pairs,
            "--out",
            str(out),
        ]
        environment = os.environ | {
            "WORKBENCH_PROGRESS": str(self.folder / "progress.json"),
            "TMPDIR": str(self.folder),
        }
        with (
            open(self.folder / "stdout", "wb") as stdout,
            open(self.folder / "stderr", "wb") as stderr,
        ):
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )  # fmt: skip
        atexit.register(self.stop)  # a kernel that ends takes its run along

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self) -> dict:
        try:
            return json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"phase": "starting", "done": 0, "total": 0}

    def last(self, stream: str) -> str:
        """The last line so far of stdout or stderr; a progress bar's carriage returns end lines
        too. The kernel's remarks are left out.
        """
        text = (self.folder / stream).read_bytes()[-4000:].decode("utf-8", "replace")
        lines = (line.partition("[IPKernelApp]")[0].strip() for line in re.split(r"[\r\n]", text))
        return next((line for line in reversed([*lines]) if line), "")

    def stop(self) -> None:
        """End the run, within GRACE seconds, and leave nothing half-written."""
        with self._settling:
            if not self.running:
                return
            self.stopped = True
            below = _below(
                self.process.pid
            )  # a notebook's kernel has a session of its own and outlives its parent
            self.process.send_signal(signal.SIGINT)
            self._ended_within(GRACE / 6)
            _kill(below)  # else its parent would wait for it to end by itself
            if not self._ended_within(GRACE * 5 / 6):
                _kill([*_below(self.process.pid), psutil.Process(self.process.pid)])
                self.process.wait()
            for left in self.out.glob(f".*.{self.process.pid}@{platform.node()}.partial"):
                shutil.rmtree(left, ignore_errors=True)

    def _ended_within(self, seconds: float) -> bool:
        try:
            return self.process.wait(seconds) is not None
        except subprocess.TimeoutExpired:
            return False

    def status(self) -> int:
        """The exit status, once whoever stops the run is done with it."""
        with self._settling:
            return self.process.wait()

    def close(self) -> None:
        atexit.unregister(self.stop)
        self._work.cleanup()


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(
            psutil.NoSuchProcess
        ):  # psutil knows a process by pid and start, so a pid that was given anew is safe
            process.kill()


def parameters(notebook: Path, spec: Spec, moved: Iterable[str] = ()) -> dict:
    """What to tell a notebook so that it runs this Spec: each parameter it declares whose value is
    not its default.

    Args:
        moved: fields that a person changed; BadInput if the notebook does not declare one.
    """
    declared = batch.declared(notebook)
    if missing := [name for name in moved if name not in declared]:
        raise BadInput(
            f"{notebook.name} declares no parameter {', '.join(missing)}; run its cells below instead, or put the choice back"
        )
    values = spec.model_dump(mode="json")
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared.items()}
    not_given = {name for name in defaults if defaults[name] is None} - spec.model_fields_set
    told = [name for name in defaults if name in values and name not in not_given]
    return {name: values[name] for name in told if values[name] != defaults[name]}


def _yaml(value) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
        .removesuffix("...\n")
        .strip()
    )
