"""Records from wherever `datasets` reads them: a file, or a Hub dataset by its id."""

from pathlib import Path

import datasets

from workbench.facts import FILES, BadInput


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
    if path.is_file() and path.suffix not in FILES:
        raise BadInput(
            f"{what} {source!r}: the ending {path.suffix!r} is not known; use one of {', '.join(FILES)}"
        )
    try:
        if path.is_file():
            return datasets.load_dataset(
                FILES[path.suffix], data_files=str(path), split="train", streaming=streaming
            )
        name, _, named = source.partition(":")
        return datasets.load_dataset(
            name, config or named or None, split=split, streaming=streaming
        )
    except Exception as error:  # each reader fails in its own way
        raise BadInput(
            f"{what} {source!r}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from None
