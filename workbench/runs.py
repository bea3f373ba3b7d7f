"""The run folder: written under a temporary name, renamed when whole; read, listed, compared. Reading needs no torch.

runs/<id>/run.json              status, every parameter, versions, seconds; written last
          probes.parquet        a row an edited model, step, and prompt (step -1: before the edit, 0: after it, then training steps)
          lens.parquet          edited_model, step, fact_id, layer, category, probability, rank
          tokens.parquet        edited_model, step, fact_id, layer, rank (1 to 10), token, probability
          training.parquet      edited_model, step, epoch, metric, loss, learning_rate
          deltas/<edited_model>.safetensors
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from workbench.facts import BadInput

SCHEMA = 1  # of the folder; raise it when a column changes its meaning
TABLES = ("probes", "lens", "tokens", "training")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, read from its folder; tables are loaded when first asked for."""

    folder: Path
    about: Mapping

    @property
    def spec(self) -> Mapping:
        """The experiment as it was resolved, every number named."""
        return self.about["spec"]

    @cached_property
    def probes(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "probes.parquet")

    @cached_property
    def lens(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "lens.parquet")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "tokens.parquet")

    @cached_property
    def training(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "training.parquet")

    @property
    def deltas(self) -> list[Path]:
        """Files of the edits, in order of the edited models; `deltas.load` reads one."""
        return sorted((self.folder / "deltas").glob("*.safetensors"), key=lambda path: int(path.stem))


def read(folder: str | Path) -> Run:
    """A finished run.

    Raises:
        BadInput: no run there, unfinished, or written by a version with another schema.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: no finished run there (run.json is missing)") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise BadInput(f"{folder}/run.json: broken ({error}); run it again") from None
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        raise BadInput(f"{folder}: run.json has schema {schema}, this version reads {SCHEMA}; read it with the version that wrote it")
    return Run(folder=folder, about=about)


def listed(out: str | Path = "runs") -> list[Run]:
    """The finished runs below a folder, oldest first."""
    found = sorted(Path(out).glob("[!.]*/run.json"), key=lambda path: path.stat().st_mtime)
    return [read(path.parent) for path in found]


def write(folder: Path, about: Mapping, tables: Mapping[str, pd.DataFrame]) -> Run:
    """Write the tables and, last, run.json into a folder that exists. The disk being full is one clear line."""
    try:
        for name in TABLES:
            _replace(folder / f"{name}.parquet", lambda path, name=name: tables[name].to_parquet(path, index=False))
        text = json.dumps({"schema": SCHEMA, "status": "finished", **about}, indent=1, ensure_ascii=False, default=str)
        _replace(folder / "run.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{folder}: the run cannot be written ({error.strerror or error}); free some space or choose another out folder") from None
    return read(folder)


def _replace(path: Path, write_to) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_to(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: str | Path, run_id: str) -> Iterator[Path]:
    """A folder under a temporary name, renamed to the run's id if the block ends well and removed if it does not."""
    out, final = Path(out), Path(out) / run_id
    if final.is_file():
        raise BadInput(f"{final}: is a file; choose another out folder")
    partial = out / f".{run_id}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); choose another out folder") from None
    try:
        yield partial
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def whole_checkpoint(folder: Path) -> str | None:
    """The newest of a Trainer's checkpoints that was written to its end."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None
