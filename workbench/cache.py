"""Where slow results are kept, with what they are for, and locks between processes."""

import contextlib
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import filelock
import pandas as pd

from workbench import files
from workbench.facts import BadInput

ADVICE = "free some space, or name another folder in WORKBENCH_CACHE"


def cache_folder() -> Path:
    """WORKBENCH_CACHE, or workbench/ in the user's cache folder."""
    chosen = os.environ.get("WORKBENCH_CACHE")
    if chosen:
        return Path(chosen)
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
        is_foreign = hasattr(os, "getuid") and state.st_uid != os.getuid()
        if is_foreign or not stat.S_ISDIR(state.st_mode):
            advice = "name another folder in WORKBENCH_CACHE"
            raise BadInput(f"the cache's folder {path} is a link or another user's; {advice}")
        path.chmod(0o700)
    except OSError as error:
        raise files.unwritable(path, error, ADVICE) from None
    return path


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Inside, no other process that shares the cache folder is inside the same.

    The system frees the lock of a process that was killed.
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
    """Keep named tensors in a safetensors file, with what they are for and a sum of their bytes.

    To be used under a lock, as `keep_table` is: what a killed process had begun to write is removed
    first.
    """
    import safetensors.torch

    header = json.dumps({"about": about, "sha256": tensor_sum(tensors)})
    with _written(path) as partial:
        safetensors.torch.save_file(dict(tensors), partial, metadata={"workbench": header})


def kept(path: Path, about: str) -> dict | None:
    """The tensors that were kept for this; None if there are none.

    None and a warning if they are damaged or for something else.
    """
    import safetensors.torch

    def read():
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["workbench"])
        tensors = safetensors.torch.load_file(path)
        return tensors, header, tensor_sum(tensors)

    return _checked(path, about, read)


def keep_table(path: Path, table: pd.DataFrame, about: str) -> None:
    """Keep a table in a parquet file, with what it is for and a sum of its rows."""
    table = table.reset_index(drop=True)
    table.attrs = {"about": about, "sha256": _table_sum(table)}
    with _written(path) as partial:
        table.to_parquet(partial)


def kept_table(path: Path, about: str) -> pd.DataFrame | None:
    """The table that was kept for this, as `kept`."""

    def read():
        table = pd.read_parquet(path)
        header = table.attrs
        table.attrs = {}
        return table, header, _table_sum(table)

    return _checked(path, about, read)


def _checked(path: Path, about: str, read: Callable):
    """What `read` finds: the content, its header, and the sum that the content has now."""
    try:
        content, header, sum_now = read()
        if header != {"about": about, "sha256": sum_now}:
            raise ValueError("it is for something else, or its sum is another one")
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files fail in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        warnings.warn(f"{path}: not used ({reason}); it is made anew", stacklevel=3)
        return None
    return content


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    for abandoned in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):
            abandoned.unlink()
    with files.written(path, private=True, advice=ADVICE) as partial:
        yield partial


def tensor_sum(tensors: Mapping) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _table_sum(table: pd.DataFrame) -> str:
    """SHA-256 of the names of the columns, their types, and every row."""
    columns = json.dumps([[name, str(dtype)] for name, dtype in table.dtypes.items()])
    rows = pd.util.hash_pandas_object(table).to_numpy().tobytes()
    return hashlib.sha256(columns.encode() + rows).hexdigest()
