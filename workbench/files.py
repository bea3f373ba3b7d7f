"""Files that are there whole or not at all, and that are still what they were when they were
written.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors

from workbench.records import BadInput, cause

NO_ROOM = ["ENOSPC", "EFBIG", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO"]
ADVICE = "free some space, or choose another folder"


@contextlib.contextmanager
def written(path: str | Path, private: bool = False, advice: str = ADVICE) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place when the block ends well and is removed
    when it does not. Its folder is made if it is missing.

    The name cannot be foreseen and is opened exclusively: nothing that somebody else laid there, a
    link for example, is written through. The file gets the permissions that the umask gives to any
    new file; a `private` one is its owner's alone.

    Raises:
        BadInput: the disk is full or read-only, the file too large, or the folder is not to be
            written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        with writing(path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = _created(partial, 0o600 if private else 0o666)
            yield partial
            os.chmod(partial, mode)  # safetensors leaves 0600
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, advice: str = ADVICE) -> Iterator[None]:
    """Inside, whatever stands in the way of writing there becomes one line."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise unwritable(path, error, advice) from None


def unwritable(path: str | Path, error: Exception, advice: str = ADVICE) -> BadInput:
    """The one line on a path that could not be written."""
    reason = getattr(error, "strerror", None) or cause(error)
    return BadInput(f"{path}: cannot be written ({reason}); {advice}")


def no_room(error: BaseException) -> bool:
    """Whether the disk, a quota, a limit or a permission stands in the way of writing."""
    if isinstance(error, safetensors.SafetensorError):
        return "os error" in str(error)
    return isinstance(error, OSError) and errno.errorcode.get(error.errno) in NO_ROOM


def check_new(folder: str | Path) -> Path:
    """The folder; BadInput if it holds something already, or nothing can be made there."""
    folder = Path(folder)
    if folder.is_symlink():
        raise BadInput(f"{folder}: is a link; name the folder itself")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: exists and is not empty; choose a new folder")
    check_writable(folder)
    return folder


def check_writable(folder: Path) -> None:
    """BadInput if nothing can be made in a folder, or in the nearest one above it that is there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    probe = there / f".{secrets.token_hex(8)}.partial"
    with writing(folder, "choose another folder"):
        probe.mkdir()  # rights alone do not tell of quotas and of disks of the network
        probe.rmdir()


def sums(folder: Path) -> dict[str, dict]:
    """Size in bytes and SHA-256 of every file below a folder, by its path from there."""
    recorded = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            recorded[name] = {"size": path.stat().st_size, "sha256": digest(path)}
    return recorded


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem(folder: Path, name: str, expected: Mapping, sizes_alone: bool = False) -> str:
    """What is wrong with a file whose size and SHA-256 were recorded; "" if nothing is."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "lies outside the folder"
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            return "is no file"
        if state.st_size != expected["size"]:
            return f"has {state.st_size} bytes instead of {expected['size']}"
        if not sizes_alone and digest(path) != expected["sha256"]:
            return "is not what was written (another SHA-256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def open_as_umask(folder: Path) -> None:
    """Give every file below a folder the permissions of a newly made one.

    Safetensors writes files that only their owner can read.
    """
    probe = folder / f".{secrets.token_hex(8)}.partial"
    mode = _created(probe, 0o666)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _created(path: Path, mode: int) -> int:
    """Make an empty file where nothing is; returns the permissions that it got."""
    path.touch(mode, exist_ok=False)
    return stat.S_IMODE(path.lstat().st_mode)
