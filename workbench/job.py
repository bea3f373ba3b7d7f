"""A notebook run in a process of its own (`workbench run`), which can be watched and stopped; the
panel's Run and Stop.

Importing it is quick: batch, which takes seconds, is imported where a thread may wait for it.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import yaml

from workbench import runs
from workbench.facts import BadInput
from workbench.spec import Spec

GRACE = 3.0  # seconds that a stopped run has to end by itself


class Job:
    """One `workbench run` in a process of its own.

    Its log, progress and temporary files lie in a folder that goes with it.
    """

    def __init__(self, notebook: Path, out: Path):
        self.notebook = notebook
        self.out = out
        self.stopped = False
        self.process: subprocess.Popen | None = None
        self._settling = threading.Lock()
        self._start = time.monotonic()
        self._work = tempfile.TemporaryDirectory(prefix="workbench-", ignore_cleanup_errors=True)
        self.folder = Path(self._work.name)

    def start(self, spec: Spec, moved: Iterable[str] = (), others: Iterable = ()) -> None:
        """Start the process; see `parameters`. A job that was stopped before is not started."""
        command = [sys.executable, "-m", "workbench", "run", str(self.notebook.resolve())]
        for name, value in parameters(self.notebook, spec, moved, others).items():
            command += ["-p", name, _yaml(value)]
        command += ["--out", str(self.out)]
        at = self.folder
        with self._settling, open(at / "stdout", "wb") as out, open(at / "stderr", "wb") as log:
            if self.stopped:
                return
            env = {"WORKBENCH_PROGRESS": str(at / "progress.json"), "TMPDIR": str(at)}
            how: dict = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": log}
            how["start_new_session"] = True
            self.process = subprocess.Popen(command, env=os.environ | env, **how)
            atexit.register(self.stop)  # a kernel that ends takes its run along

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self) -> dict:
        """`phase`, and how many steps of it are `done` of a `total`; before the notebook says so,
        what comes before it.
        """
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        is_read = self.last("stderr").startswith("Executing")  # papermill's bar
        phase = "importing and loading the model" if is_read else "starting Python"
        return {"phase": phase, "done": 0, "total": 0}

    def last(self, stream: str) -> str:
        """The last line so far of stdout or stderr; a progress bar's carriage returns end lines
        too. The kernel's remarks are left out.
        """
        text = (self.folder / stream).read_bytes()[-4000:].decode("utf-8", "replace")
        lines = [line.partition("[IPKernelApp]")[0].strip() for line in re.split(r"[\r\n]", text)]
        return next((line for line in reversed(lines) if line), "")

    def stop(self) -> None:
        """End the run, within GRACE seconds, and leave nothing half-written."""
        from workbench import batch

        with self._settling:
            self.stopped = self.process is None or self.running
            if not self.running:
                return
            below = batch.family(self.process.pid)[1:]
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE / 6)
            batch.kill(below)  # a kernel outlives its parent, which else would wait for it
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE * 5 / 6)
            if self.running:
                batch.kill(batch.family(self.process.pid))
                self.process.wait()
            runs.clean(self.out)

    def status(self) -> int:
        """The exit status, once whoever stops the run is done with it; 1 if it never started."""
        with self._settling:
            return self.process.wait() if self.process else 1

    def close(self) -> None:
        atexit.unregister(self.stop)
        self._work.cleanup()


def parameters(
    notebook: Path, spec: Spec, moved: Iterable[str] = (), others: Iterable = ()
) -> dict:
    """What to tell a notebook so that it runs this Spec: each parameter it declares whose value is
    not its default.

    Args:
        moved: fields that a person changed; BadInput if the notebook does not declare one.
        others: parameters that are no fields of a Spec, as a mapping.
    """
    from workbench import batch

    usual = batch.defaults(notebook)
    for name in moved:
        if name not in usual:
            what = f"{notebook.name} declares no parameter {name}"
            raise BadInput(f"{what}; run its cells below instead, or put the choice back")
    fields = {**spec.model_dump(mode="json"), **dict(others)}
    given = {name for name, value in usual.items() if value is not None} | spec.model_fields_set
    known = [name for name in fields if name in usual and name in given]
    return {name: fields[name] for name in known if fields[name] != usual[name]}


def _yaml(value) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
