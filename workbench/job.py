"""A notebook run in a process of its own (`workbench run`), which can be watched and stopped; the
panel's Run and Stop.
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
from pathlib import Path

import yaml

from workbench import batch, runs
from workbench.facts import BadInput
from workbench.spec import Spec

GRACE = 3.0  # seconds that a stopped run has to end by itself


class Job:
    """One `workbench run` in a process of its own.

    Its log, progress and temporary files lie in a folder that goes with it.
    """

    def __init__(self, notebook: Path, given: dict, out: Path):
        self.out = out
        self.stopped = False
        self._settling = threading.Lock()
        self._start = time.monotonic()
        self._work = tempfile.TemporaryDirectory(prefix="workbench-", ignore_cleanup_errors=True)
        self.folder = Path(self._work.name)
        command = [sys.executable, "-m", "workbench", "run", str(notebook.resolve())]
        for name, value in given.items():
            command += ["-p", name, _yaml(value)]
        progress = str(self.folder / "progress.json")
        with (
            open(self.folder / "stdout", "wb") as out_file,
            open(self.folder / "stderr", "wb") as log,
        ):
            self.process = subprocess.Popen(
                [*command, "--out", str(out)],
                env=os.environ | {"WORKBENCH_PROGRESS": progress, "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=log,
                start_new_session=True,
            )
        atexit.register(self.stop)  # a kernel that ends takes its run along

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self) -> dict:
        """`phase`, and how many steps of it are `done` of a `total`."""
        try:
            return json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"phase": "starting", "done": 0, "total": 0}

    def last(self, stream: str) -> str:
        """The last line so far of stdout or stderr; a progress bar's carriage returns end lines
        too. The kernel's remarks are left out.
        """
        text = (self.folder / stream).read_bytes()[-4000:].decode("utf-8", "replace")
        lines = [line.partition("[IPKernelApp]")[0].strip() for line in re.split(r"[\r\n]", text)]
        return next((line for line in reversed(lines) if line), "")

    def stop(self) -> None:
        """End the run, within GRACE seconds, and leave nothing half-written."""
        with self._settling:
            if not self.running:
                return
            self.stopped = True
            pid = self.process.pid
            below = batch.family(pid)[1:]
            self.process.send_signal(signal.SIGINT)
            self._ends_within(GRACE / 6)
            batch.kill(below)  # a kernel outlives its parent, which else would wait for it
            if not self._ends_within(GRACE * 5 / 6):
                batch.kill(batch.family(pid))
                self.process.wait()
            runs.clean(self.out)

    def _ends_within(self, seconds: float) -> bool:
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


def parameters(notebook: Path, spec: Spec, moved: Iterable[str] = ()) -> dict:
    """What to tell a notebook so that it runs this Spec: each parameter it declares whose value is
    not its default.

    Args:
        moved: fields that a person changed; BadInput if the notebook does not declare one.
    """
    usual = batch.defaults(notebook)
    missing = [name for name in moved if name not in usual]
    if missing:
        names = ", ".join(missing)
        advice = "run its cells below instead, or put the choice back"
        raise BadInput(f"{notebook.name} declares no parameter {names}; {advice}")
    changed = {}
    for name, value in spec.model_dump(mode="json").items():
        is_given = name in spec.model_fields_set or usual.get(name) is not None
        if name in usual and is_given and value != usual[name]:
            changed[name] = value
    return changed


def _yaml(value) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
