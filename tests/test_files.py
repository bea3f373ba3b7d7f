"""A file is there whole or not at all, and one that is not what was written is named."""

import os
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from workbench import files
from workbench.facts import BadInput


@contextmanager
def masked(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_what_is_not_written_to_its_end_is_not_there(tmp_path):
    def killed():
        with files.written(tmp_path / "kept") as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        killed()
    assert not list(tmp_path.iterdir())
    with files.written(tmp_path / "new" / "kept") as partial:  # in a folder that is made
        partial.write_text("whole")
    assert (tmp_path / "new" / "kept").read_text() == "whole"
    with pytest.raises(BadInput), files.written(tmp_path / "new" / "kept" / "below") as partial:
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_a_file_has_the_permissions_that_the_umask_gives(tmp_path, mask, expected):
    """Whatever the library that writes it does: safetensors makes files that only their owner
    reads.
    """
    with masked(mask):
        with files.written(tmp_path / "a.safetensors") as partial:
            safetensors.torch.save_file({"a": torch.zeros(2)}, partial)
        with files.written(tmp_path / "b", private=True) as partial:
            partial.write_text("b")
        safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "c.safetensors")
        assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == expected
        files.open_as_umask(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {expected}


def test_the_temporary_name_is_another_one_each_time_and_nothing_is_written_through(
    tmp_path, monkeypatch, one_line
):
    names = set()
    for _ in range(3):
        with files.written(tmp_path / "kept") as partial:
            names.add(partial.name)
    assert len(names) == 3
    (tmp_path / "diary").write_text("dear diary")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".kept.guessed.partial").symlink_to(tmp_path / "diary")
    with pytest.raises(BadInput) as error, files.written(tmp_path / "kept") as partial:
        partial.write_text("oh")
    assert "cannot be written" in one_line(error)
    assert (tmp_path / "diary").read_text() == "dear diary"


FULL = """
import resource, signal, sys
from workbench import files
from workbench.facts import BadInput
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with files.written(sys.argv[1]) as partial:
        partial.write_bytes(bytes(5000))
except BadInput as error:
    print(error)
"""


def test_a_file_size_limit_is_one_line_with_the_path_and_leaves_nothing(tmp_path):
    path = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{path}: cannot be written (File too large); free some space, or choose another folder"
    ]
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


@pytest.mark.parametrize(
    "kind", ["file", "folder with files", "link", "broken link", "below a file"]
)
def test_a_new_folder_where_something_is_or_nothing_can_be_is_refused(tmp_path, one_line, kind):
    place = tmp_path / "new"
    if kind in ("file", "below a file"):
        place.write_text("years of work")
    elif kind == "folder with files":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        (tmp_path / "there").mkdir()
        place.symlink_to(tmp_path / ("there" if kind == "link" else "nowhere"))
    place = place / "deeper" if kind == "below a file" else place
    with pytest.raises(BadInput) as error:
        files.check_new(place)
    assert str(place) in one_line(error)


def test_a_new_folder_is_looked_at_and_not_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert files.check_new(place) == place
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_file_that_is_not_what_was_written_is_told(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"abc")
    (name,), (state,) = (lambda found: (found.keys(), found.values()))(files.sums(tmp_path))
    assert (name, state["size"]) == ("deep/a", 3)
    assert files.problem(tmp_path, name, state) == ""
    (tmp_path / "deep" / "a").write_bytes(b"abd")
    assert files.problem(tmp_path, name, state, sizes_alone=True) == ""
    assert "SHA-256" in files.problem(tmp_path, name, state)
    (tmp_path / "deep" / "a").write_bytes(b"ab")
    assert "2 bytes instead of 3" in files.problem(tmp_path, name, state)
    (tmp_path / "deep" / "a").unlink()
    assert files.problem(tmp_path, name, state) == "is missing"
    (tmp_path / "deep" / "a").symlink_to("/etc/passwd")
    assert files.problem(tmp_path, name, state) == "is no file"
    for outside in ("../a", "/etc/passwd", "deep/../../a"):
        assert "outside" in files.problem(tmp_path, outside, state)
