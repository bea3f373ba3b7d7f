"""Where slow results are kept, what they are for beside them, and locks, so that two processes do
not make the same one at once.
"""

import contextlib
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import filelock
import pandas as pd

from workbench import files
from workbench.facts import BadInput

ADVICE = "free some space, or name another folder in WORKBENCH_CACHE"


def cache_folder() -> Path:
    """WORKBENCH_CACHE, or workbench/ in the user's cache folder."""
    if named := os.environ.get("WORKBENCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"


def folder(kind: str) -> Path:
    """The cache's folder for results of a kind, made if it is missing, for its owner alone.

    Raises:
        BadInput: it cannot be made, or is a link or another user's, who could put results there.
    """
    path = cache_folder() / kind
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        state = path.lstat()
        if not stat.S_ISDIR(state.st_mode) or (
            hasattr(os, "getuid") and state.st_uid != os.getuid()
        ):
            raise BadInput(
                f"the cache's folder {path} is a link or another user's; name another folder in WORKBENCH_CACHE"
            )
        if state.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise files.unwritable(path, error, ADVICE) from None
    return path


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Inside, no other process that shares the cache folder is inside the same; the system frees
    the lock of a process that was killed.
    """
    lock = filelock.FileLock(folder("locks") / hashlib.sha256(what.encode()).hexdigest()[:20])
    try:
        lock.acquire()
    except OSError as error:
        raise files.unwritable(cache_folder(), error, ADVICE) from None
    try:
        yield
    finally:
        lock.release()


def keep(path: Path, tensors: Mapping, about: str) -> None:
    """Keep named tensors in a safetensors file: what they are for, and a sum of their bytes, stand
    in its header.

    To be used under a lock, as `keep_table` is: what a killed process had begun to write is removed
    first.
    """
    import safetensors.torch

    with _written(path) as partial:
        header = json.dumps({"about": about, "sha256": _sum(tensors)})
        safetensors.torch.save_file(dict(tensors), partial, metadata={"workbench": header})


def kept(path: Path, about: str) -> dict | None:
    """The tensors that were kept for this; None if there are none, and with a line if they are
    damaged or for something else.
    """
    import safetensors.torch

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["workbench"])
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files fail in many ways
        return _refused(path, f"{type(error).__name__}: {error}")
    if header != {"about": about, "sha256": _sum(tensors)}:
        return _refused(path, "it is for something else, or its sum is another one")
    return tensors


def keep_table(path: Path, table: pd.DataFrame, about: str) -> None:
    """Keep a table in a parquet file: what it is for, and a sum of its rows, stand in its metadata."""
    table = table.reset_index(drop=True)
    table.attrs = {"about": about, "sha256": _table_sum(table)}
    with _written(path) as partial:
        table.to_parquet(partial)


def kept_table(path: Path, about: str) -> pd.DataFrame | None:
    """The table that was kept for this; None if there is none, and with a line if it is damaged or
    for something else.
    """
    try:
        table = pd.read_parquet(path)
        header, table.attrs = table.attrs, {}
        sum_now = _table_sum(table)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files fail in many ways
        return _refused(path, f"{type(error).__name__}: {error}")
    if header != {"about": about, "sha256": sum_now}:
        return _refused(path, "it is for something else, or its sum is another one")
    return table


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):
            left.unlink()
    with files.written(path, private=True, advice=ADVICE) as partial:
        yield partial


def _refused(path: Path, why: str) -> None:
    warnings.warn(
        f"{path}: not used ({' '.join(why.split())[:120]}); it is made anew", stacklevel=3
    )


def _sum(tensors: Mapping) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _table_sum(table: pd.DataFrame) -> str:
    """SHA-256 of the names of the columns, their types, and every row."""
    columns = json.dumps([[name, str(dtype)] for name, dtype in table.dtypes.items()])
    return hashlib.sha256(
        columns.encode() + pd.util.hash_pandas_object(table).to_numpy().tobytes()
    ).hexdigest()
