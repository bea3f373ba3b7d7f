"""What is slow and shared is made by one process at a time, and a process that is killed keeps
nobody waiting.
"""

import os
import signal
import stat
import subprocess
import sys
import warnings

import filelock
import pandas as pd
import pytest
import torch

from workbench import cache
from workbench.cache import locked
from workbench.facts import BadInput

HOLDER = """
import sys, time
from workbench.cache import locked
with locked(sys.argv[1]):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_lock_of_a_killed_process_is_free_again(cache_folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "moments"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "inside\n"
        (file,) = (cache_folder / "locks").iterdir()
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


TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "rate": torch.tensor([1.5], dtype=torch.bfloat16),
}


def keep(kind: str):
    """Keep something of a kind; what was kept, as a value that `==` compares, and what reads it
    again.
    """
    if kind == "tensors":
        path = cache.folder("kept") / "one.safetensors"
        cache.keep(path, TENSORS, "these")
        return path, lambda about="these": as_lists(cache.kept(path, about)), as_lists(TENSORS)
    table = pd.DataFrame({"fact_id": ["a", "b"], "known": [True, False], "p": [0.25, 1e-300]})
    path = cache.folder("kept") / "one.parquet"
    cache.keep_table(path, table, "these")
    return path, lambda about="these": as_rows(cache.kept_table(path, about)), as_rows(table)


def as_lists(tensors):
    return tensors and {
        name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()
    }


def as_rows(table):
    return None if table is None else table.to_dict("list")


@pytest.mark.parametrize("kind", ["tensors", "table"])
def test_what_was_kept_comes_back_and_is_refused_for_anything_else(kind):
    path, kept, expected = keep(kind)
    assert kept() == expected
    with pytest.warns(UserWarning, match=f"{path.name}.*something else"):
        assert kept("those") is None
    path.unlink()
    assert kept() is None  # nothing there: no line


@pytest.mark.parametrize("kind", ["tensors", "table"])
def test_no_damage_of_what_was_kept_goes_unseen(kind):
    """A byte changed at every place, the file cut at every place: the same again, or nothing and a
    line.
    """
    path, kept, expected = keep(kind)
    whole, refused = path.read_bytes(), 0
    damages = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for at in range(0, len(whole), 3)
    ]
    damages += [whole[:at] for at in range(0, len(whole), 7)]
    for damaged in damages:
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as lines:
            warnings.simplefilter("always")
            now = kept()
        assert now == expected or (now is None and len(lines) == 1)
        refused += now is None
    assert refused > len(damages) / 2


def test_the_cache_is_its_owners_alone(cache_folder):
    path, *_ = keep("tensors")
    for made in (cache_folder, path.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.parent.chmod(0o777)
    cache.folder("kept")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_planted_link_is_neither_followed_nor_written_through(cache_folder, tmp_path, one_line):
    """The names of earlier versions could be foreseen: whatever a link of that name pointed to was
    overwritten.
    """
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary")
    for name in (".one.safetensors.partial", "one.safetensors"):
        (cache.folder("kept") / name).symlink_to(diary)
    path, kept, expected = keep("tensors")
    assert diary.read_text() == "dear diary"
    assert not path.is_symlink()
    assert kept() == expected
    (cache_folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(BadInput) as error:
        cache.folder("elsewhere")
    assert "is a link" in one_line(error)


def test_what_a_killed_process_had_begun_is_removed(cache_folder):
    begun = cache.folder("kept") / ".one.safetensors.0123456789abcdef.partial"
    begun.write_text("half")
    keep("tensors")
    assert not begun.exists()
