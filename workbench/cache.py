"""Where slow results are kept, and locks, so that two processes do not make the same one at once."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


def cache_folder() -> Path:
    """WORKBENCH_CACHE, or workbench/ in the user's cache folder."""
    if named := os.environ.get("WORKBENCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Inside, no other process that shares the cache folder is inside the same; the system frees the lock of a process that was killed."""
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / hashlib.sha256(what.encode()).hexdigest()[:20]):
        yield
