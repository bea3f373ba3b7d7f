"""Text from data in other programs, a spreadsheet or a terminal, where it must do nothing."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import files

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet may compute what begins so
NUMBERS = "iufcb"  # kinds of dtype
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def write_csv(table: "pd.DataFrame", path: str | Path, float_format: str | None = None) -> None:
    """Write a table without its index, an apostrophe before what a spreadsheet could compute.

    Only text and the names of columns are touched: a negative number stays a number.
    """
    safe = table.rename(columns=_as_text)
    for number, dtype in enumerate(table.dtypes):
        if dtype.kind not in NUMBERS:
            column = table.iloc[:, number].astype(object)
            safe.isetitem(number, column.map(_as_text))
    text = safe.to_csv(index=False, float_format=float_format, lineterminator="\n")
    if "\r" in text:  # bare it begins a row; Python 3.12 quotes it only where lines end with it
        text = safe.to_csv(index=False, float_format=float_format, lineterminator="\r\n")
    with files.written(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def _as_text(cell):
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def printable(text: str) -> str:
    """The text with control characters written out: a terminal shows them and obeys none."""
    return CONTROL.sub(lambda match: rf"\x{ord(match[0]):02x}", text)
