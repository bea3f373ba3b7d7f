"""Text from data does nothing in a spreadsheet or a terminal; everything else stays as it is."""

import csv
import subprocess
import sys

import pandas as pd
import pytest

from workbench import inert

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx"]


def test_text_that_could_be_computed_is_marked_as_text(tmp_path):
    table = pd.DataFrame(
        {
            "=name": FORMULAS,
            "kind": pd.Categorical(FORMULAS),
            "mixed": ["=a", -1, None, 2.5, "b", True, "-"],
        }
    )
    inert.write_csv(table, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["'=name", "kind", "mixed"]
    text, kind, mixed = zip(*rows, strict=True)
    assert text == kind == tuple(f"'{cell}" for cell in FORMULAS)
    assert mixed == ("'=a", "-1", "", "2.5", "b", "True", "'-")


def test_a_carriage_return_begins_no_row(tmp_path):
    inert.write_csv(pd.DataFrame({"a": ["x\r=1+1", "y"], "b": [1, 2]}), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["x\r=1+1", "1"], ["y", "2"]]


def test_numbers_and_ordinary_text_stay_as_they_are(tmp_path):
    table = pd.DataFrame(
        {
            "text": ["Ada Lovelace", "1984", "a=b", 'say "no", twice', "it's", "a\nb", "naïve"],
            "whole": [-1, 2, 3, 4, 5, 6, 7],
            "share": [-0.25, 1.5, float("nan"), 0, 1, 2, 3],
            "half": pd.array([0.1] * 7, dtype="float32"),
            "held": [True, False, True, True, True, True, True],
            "took": pd.array([True, None, False, True, True, True, True], dtype="boolean"),
            "kind": pd.Categorical(list("abcabca")),
        }
    )
    inert.write_csv(table, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().decode() == table.to_csv(index=False)
    inert.write_csv(table, tmp_path / "b.csv", float_format="%.1f")
    assert (tmp_path / "b.csv").read_bytes().decode() == table.to_csv(
        index=False, float_format="%.1f"
    )


def test_the_table_itself_is_not_changed(tmp_path):
    table = pd.DataFrame({"=a": ["=1", "b"]})
    inert.write_csv(table, tmp_path / "a.csv")
    assert table.to_dict("list") == {"=a": ["=1", "b"]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x00\x7f\x9b31m", r"a\x0db\x00\x7f\x9b31m"),
        ("two\nlines\tand naïve → 😀", "two\nlines\tand naïve → 😀"),
    ],
)
def test_a_terminal_is_told_nothing(text, shown):
    assert inert.printable(text) == shown


def test_it_is_cheap_to_import():
    code = "import sys, workbench.inert; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
