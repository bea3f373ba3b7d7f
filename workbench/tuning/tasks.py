"""What a model is fine-tuned on: rows of tokens to learn from, rows to validate on, the metric and its usual numbers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets

from workbench.facts import BadInput
from workbench.models import Model
from workbench.positions import bos_id
from workbench.world import text

ROW = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Usual numbers of a task on the world models; whatever a Spec leaves at 0 is taken from here.

    `threshold` is of the validation metric, which ends the tuning.
    """

    n_train: int  # rows
    n_valid: int  # rows
    max_steps: int
    eval_every: int  # steps
    batch_size: int  # rows
    learning_rate: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data to tune on.

    `train`, `valid`: datasets of input_ids, attention_mask and labels, rows padded alike. `metric` is "loss" (nats a token, lower
    is better), on `valid`.
    """

    name: str
    train: datasets.Dataset
    valid: datasets.Dataset
    metric: str = "loss"


NUMBERS = {
    "text": Numbers(n_train=2000, n_valid=64, max_steps=120, eval_every=20, batch_size=8, learning_rate=5e-5, threshold=3.1),
}


def named(name: str) -> Callable[..., Task]:
    """The function that builds a task."""
    if name not in TASKS:
        raise BadInput(f"task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def text_task(model: Model, n_train: int, n_valid: int, seed: int, data: str = "", columns: dict | None = None) -> Task:
    """Next-token prediction on running text.

    Args:
        n_train, n_valid: rows of at most 128 tokens, BOS in front; the validation rows come before the training rows in the
            stream and from other paragraphs.
        data: "" = the trade register of the embedded world, by seed; else a text, JSONL, CSV or parquet file or a Hub dataset id.
        columns: {"text": name of the column} for `data`.
    """
    rows = _packed(model, _paragraphs(data, columns or {}, seed))
    found = list(islice(rows, n_valid + n_train))
    if len(found) < n_valid + n_train:
        raise BadInput(
            f"task text: {data or 'world'} gives {len(found)} rows of {ROW} tokens, {n_valid + n_train} are asked for; "
            "lower n_train or give more text"
        )
    return Task(name="text", train=_dataset(found[n_valid:]), valid=_dataset(found[:n_valid]))


TASKS: dict[str, Callable[..., Task]] = {"text": text_task}


def _paragraphs(data: str, columns: dict, seed: int) -> Iterable[str]:
    if not data:
        return (" ".join(sentences) for sentences in text.prose("trade", seed))
    path = Path(data)
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.exists() and path.suffix not in kinds:
        raise BadInput(f"task_data {data!r}: the ending {path.suffix!r} is not known; use one of {', '.join(kinds)}")
    try:
        if path.exists():
            table = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(data, split="train", streaming=True)
    except Exception as error:
        raise BadInput(f"task_data {data!r}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    column = columns.get("text", "text")
    if column not in (table.column_names or []):
        raise BadInput(f"task_data {data!r}: has no column {column!r} but {table.column_names}; set columns={{'text': NAME}}")
    return (str(value) for value in table[column]) if path.exists() else (str(row[column]) for row in table)


def _packed(model: Model, paragraphs: Iterable[str]) -> Iterator[list[int]]:
    """Rows of BOS and running text, cut at the row's length."""
    length = min(ROW, getattr(model.network.config, "max_position_embeddings", ROW)) - 1
    stream: list[int] = []
    for paragraph in paragraphs:
        stream += model.tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"]
        while len(stream) >= length:
            yield [bos_id(model.tokenizer), *stream[:length]]
            stream = stream[length:]


def _dataset(rows: list[list[int]]) -> datasets.Dataset:
    labels = [[-100, *row[1:]] for row in rows]  # nothing predicts BOS, so it must not count in the mean
    return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "labels": labels})
