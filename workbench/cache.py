"""Where slow results are kept, and locks, so that two processes do not make the same one at once."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import safetensors

from workbench.facts import BadInput


def cache_folder() -> Path:
    """WORKBENCH_CACHE, or workbench/ in the user's cache folder."""
    if named := os.environ.get("WORKBENCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Inside, no other process that shares the cache folder is inside the same; the system frees the lock of a process that was killed."""
    folder = cache_folder() / "locks"
    lock = filelock.FileLock(folder / hashlib.sha256(what.encode()).hexdigest()[:20])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes `path` when the block ends well; a disk that is full or read-only is one clear line.

    To be used under a lock: the name is the same for every process, so that whoever comes next writes over what a killed one left.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unwritable(error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _unwritable(error: Exception) -> BadInput:
    what = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
    return BadInput(f"the cache {cache_folder()} cannot be written ({what}); free some space, or name another folder in WORKBENCH_CACHE")
