"""Records from wherever `datasets` reads them: a file, or a Hub dataset by its id."""

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.records import BadInput, cause, shown

if TYPE_CHECKING:
    import datasets

# ending -> what `datasets` calls it
FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def check_file(source: str, what: str) -> None:
    """BadInput if a source is named as a file is, and nothing is there."""
    named_as_file = Path(source).suffix in FILES or source.startswith((".", "/", "~"))
    if named_as_file and not Path(source).exists():
        advice = "give a path that counts from here, or a Hub dataset id (owner/name)"
        raise BadInput(f"{what} {shown(source)!r}: no such file; {advice}")


def records(
    source: str, what: str, config: str = "", split: str = "train", streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """The records of a source.

    Args:
        source: a file (.txt, .jsonl, .json, .csv, .parquet), or a Hub id, `owner/name` or
            `owner/name:config`.
        what: the parameter that named it, for errors.
    Raises:
        BadInput: an unknown ending, or it cannot be read.
    """
    import datasets

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
        raise BadInput(f"{what} {source!r}: cannot be read ({cause(error)})") from None
