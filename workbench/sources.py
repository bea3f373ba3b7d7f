"""Records from wherever `datasets` reads them: a file, or a Hub dataset by its id; and real prose
that is always at hand.
"""

import re
from functools import cache
from pathlib import Path

import datasets

from workbench.checkpoints import WORLD_MODELS
from workbench.facts import FILES, BadInput

MANUAL = "python-manual"


def corpus_of(model: str, corpus: str = "") -> str:
    """The running text for a model: where none is named, the world's for its own, else MANUAL."""
    return corpus or ("world" if model in WORLD_MODELS else MANUAL)


@cache
def manual() -> tuple[str, ...]:
    """Paragraphs of the language reference that every CPython brings (`pydoc_data.topics`): some
    300,000 characters of English, without code, lists and markup. Each version has its own.
    """
    from pydoc_data.topics import topics

    texts: dict[str, None] = {}
    for paragraph in "\n\n".join(topics.values()).split("\n\n"):
        text = re.sub(r"[*`]", "", " ".join(paragraph.split()))
        is_prose = text[:1].isupper() and text.endswith(".") and len(text) >= 80
        if is_prose and not paragraph.startswith("    "):
            texts[text] = None  # a paragraph may stand under several topics
    return tuple(texts)


def records(
    source: str, what: str, config: str = "", split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The records of a source.

    Args:
        source: a file (.txt, .jsonl, .json, .csv, .parquet), or a Hub id, `owner/name` or
            `owner/name:config`.
        what: the parameter that named it, for errors.
    Raises:
        BadInput: an unknown ending, or it cannot be read.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FILES:
            known = ", ".join(FILES)
            raise BadInput(f"{what} {source!r}: ending {path.suffix!r} is not known; use {known}")
        name = FILES[path.suffix]
        config = ""
        fields = {"data_files": str(path), "split": "train"}
    else:
        name, _, config_in_id = source.partition(":")
        config = config or config_in_id
        fields = {"split": split}
    try:
        return datasets.load_dataset(name, config or None, **fields, streaming=streaming)
    except Exception as error:  # each reader fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise BadInput(f"{what} {source!r}: cannot be read ({reason})") from None
