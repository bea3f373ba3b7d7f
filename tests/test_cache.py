"""What is slow and shared is made by one process at a time, and a process that is killed keeps nobody waiting."""

import os
import signal
import subprocess
import sys

import filelock
import pytest

from workbench.cache import locked, written
from workbench.facts import BadInput

HOLDER = """
import sys, time
from workbench.cache import locked
with locked(sys.argv[1]):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_lock_of_a_killed_process_is_free_again(cache):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, "moments"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "inside\n"
        (file,) = (cache / "locks").iterdir()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(file).acquire(timeout=0.2)
        with locked("something else"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with locked("moments"):
            pass
    finally:
        holder.kill()


def test_what_is_not_written_to_its_end_is_not_there(cache):
    def killed():
        with written(cache / "kept") as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        killed()
    assert not list(cache.iterdir())
    with written(cache / "kept") as partial:
        partial.write_text("whole")
    assert (cache / "kept").read_text() == "whole"
    with pytest.raises(BadInput), written(cache / "kept" / "below") as partial:
        pass
