"""Where slow results are kept, with what they are for, and locks between processes."""

import hashlib
import io
import json
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from workbench import files
from workbench.records import BadInput, cause

ELSEWHERE = "name another folder in WORKBENCH_CACHE"
ADVICE = f"free some space, or {ELSEWHERE}"


def cache_folder() -> Path:
    """WORKBENCH_CACHE, or workbench/ in the user's cache folder."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"
    return Path(os.environ.get("WORKBENCH_CACHE") or usual)


def folder(kind: str) -> Path:
    """The cache's folder for results of a kind, made if it is missing, for its owner alone.

    Raises:
        BadInput: it cannot be made, or is a link or another user's, who could put results there.
    """
    path = cache_folder() / kind
    with files.writing(path, ADVICE):
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        state = path.lstat()
        is_foreign = hasattr(os, "getuid") and state.st_uid != os.getuid()
        if is_foreign or not stat.S_ISDIR(state.st_mode):
            raise BadInput(f"the cache's folder {path} is a link or another user's; {ELSEWHERE}")
        path.chmod(0o700)
    return path


@contextmanager
def locked(what: str) -> Iterator[None]:
    """Inside, no other process that shares the cache folder is inside the same.

    The system frees the lock of a process that was killed.
    """
    lock = filelock.FileLock(folder("locks") / hashlib.sha256(what.encode()).hexdigest()[:20])
    with files.writing(cache_folder(), ADVICE):
        held = lock.acquire()
    with held:
        yield


def keep(path: Path, tensors: Mapping, about: str) -> None:
    """Keep named tensors in a safetensors file, with what they are for and a sum of their bytes.

    To be used under a lock: what a killed process had begun to write is removed first.
    """
    import safetensors.torch

    header = json.dumps({"about": about, "sha256": tensor_sum(tensors)})
    for abandoned in path.parent.glob(f".{path.name}.*.partial"):
        abandoned.unlink(missing_ok=True)
    with files.written(path, private=True, advice=ADVICE) as partial:
        safetensors.torch.save_file(dict(tensors), partial, metadata={"workbench": header})


def kept(path: Path, about: str) -> dict | None:
    """The tensors that were kept for this; None if there are none.

    None and a warning if they are damaged or for something else.
    """
    import safetensors.torch

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["workbench"])
        tensors = safetensors.torch.load_file(path)
        if header != {"about": about, "sha256": tensor_sum(tensors)}:
            raise ValueError("it is for something else, or its sum is another one")
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged files fail in many ways
        warnings.warn(f"{path}: not used ({cause(error)}); it is made anew", stacklevel=2)
        return None
    return tensors


def keep_table(path: Path, table: pd.DataFrame, about: str) -> None:
    """Keep a table, as `keep`: one tensor, of the bytes of a parquet file."""
    import torch

    parquet = bytearray(table.reset_index(drop=True).to_parquet())
    keep(path, {"parquet": torch.frombuffer(parquet, dtype=torch.uint8)}, about)


def kept_table(path: Path, about: str) -> pd.DataFrame | None:
    """The table that was kept for this, as `kept`."""
    tensors = kept(path, about)
    return tensors and pd.read_parquet(io.BytesIO(tensors["parquet"].numpy()))


def digest(value: Any) -> str:
    """Of what JSON can say, SHA-256 in 16 hex digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def tensor_sum(tensors: Mapping) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
