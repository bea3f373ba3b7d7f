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
