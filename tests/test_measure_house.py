"""Each measure of the house counts what it says, and catches what is planted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import measure_house

PLAIN = '''"""A module."""

import package.other


def plain(first, second):
    """Two lines,
    both of a docstring.
    """
    # a comment
    total = first + second
    return total
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from package import one\n")
    (folder / "one.py").write_text(PLAIN)
    (folder / "other.py").write_text("NAME = 1\n")
    return folder


def measured(folder: Path) -> dict:
    return measure_house.table(measure_house.measured(folder))


def test_docstrings_comments_and_blank_lines_are_no_code(package):
    assert measured(package)["code lines"] == 6


def test_the_nodes_of_a_statement_are_those_of_its_own_expressions(package):
    # import; def; total, first + second: 4; return total: 1; from; NAME = 1: 2
    assert measured(package)["nodes a statement"] == round(7 / 6, 2)


@pytest.mark.parametrize(
    ("measure", "planted", "value"),
    [
        ("longest line", "X = 1  # " + "-" * 120, 129),
        ("lines over 100", "X = 1  # " + "-" * 120, 1),
        ("function max", "def long():\n" + "    x = 1\n" * 99, 100),
        ("names of the dialect", "def f(found):\n    each = found\n    return each", 2),
        ("import cycles", "from package import one\nfrom package.one import plain", 2),
        ("ternaries per 1,000 statements", "X = 1 if True else 2", 142.9),
        ("tuple assignments per 1,000 statements", "X, Y = 1, 2", 142.9),
    ],
)
def test_what_is_planted_is_caught(package, measure, planted, value):
    before = measured(package)[measure]
    path = package / ("other.py" if "cycles" in measure else "planted.py")
    path.write_text(planted + "\n")
    assert measured(package)[measure] == value
    assert before < value


def test_a_bound_that_is_not_kept_fails(package):
    command = [sys.executable, "-m", "tests.measure_house", "--bounds", str(package)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (package / "planted.py").write_text("X = 1  # " + "-" * 120 + "\n")
    broken = subprocess.run(command, capture_output=True, text=True)
    assert broken.returncode == 1
    assert "longest line 129, at most 100" in broken.stderr


def test_the_house_has_no_line_too_long_and_no_cycle():
    house = measured(Path(__file__).parents[1] / "workbench")
    assert house["longest line"] <= 100
    assert house["import cycles"] == 0
