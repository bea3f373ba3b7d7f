"""What cannot be used is one line that any terminal shows, and the line keeps both its ends."""

import pickle

import pydantic
import pytest
from IPython.core.interactiveshell import InteractiveShell

from workbench.records import LONGEST, BadInput, Record


@pytest.mark.parametrize("middle", ["x" * 10_000, "é\n" * 500, "\ud800" * 300, "\x1b[2J" * 90])
def test_a_long_message_keeps_its_beginning_and_what_to_do(middle):
    line = str(BadInput(f"facts.json, record 3: the target {middle} is bad; write a name"))
    assert line.startswith("facts.json, record 3: the target ")
    assert line.endswith(" is bad; write a name")
    assert " ... " in line
    assert len(line) == LONGEST == 300


def test_a_message_of_just_the_longest_length_stays_whole():
    assert str(BadInput("x" * 300)) == "x" * 300
    assert str(BadInput("x" * 301)) != "x" * 301


def test_what_no_terminal_should_get_is_escaped():
    line = str(BadInput("a\x00b\x1b[31mc\ud800d\u202ee\tf\r\ng"))
    assert line == r"a\x00b\x1b[31mc\ud800d\u202ee\tf g"
    assert line.encode("utf-8").decode("ascii") == line


@pytest.mark.parametrize("text", ["東京タワー, قهوة, Ёлка, Åse; 😀 & co.", "two  spaces", ""])
def test_what_can_be_read_stays_as_it_is(text):
    assert str(BadInput(text)) == text


def test_a_message_stays_the_same_on_its_way_between_processes():
    error = BadInput("x" * 200 + "\ud800" + "y" * 200)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_record_names_the_fields_it_knows():
    class Pair(Record):
        left: str
        right: str

    with pytest.raises(BadInput, match=r"^Pair.middle: unknown field, known are: left, right$"):
        Pair(left="a", right="b", middle="c")
    with pytest.raises(BadInput, match=r"^Pair.right: .* string, got 7$"):
        Pair(left="a", right=7)
    with pytest.raises(
        BadInput, match=r"^Pair.rigth: unknown field, did you mean 'right'\? known are: "
    ):
        Pair(left="a", right="b", rigth="b")


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("layers", 3, "[2, 3, 4]"),
        ("layers", ["two"], "[2, 3, 4]"),
        ("names", "q_proj", '["text", "facts"]'),
        ("steps", "many", "3"),
        ("rate", [], "0.1"),
        ("numbers", "x", '{"steps": 30}'),
        ("optional", "x", "3"),
    ],
)
def test_a_wrong_type_is_shown_a_right_one(field, value, right):
    class Wide(Record):
        layers: tuple[int, ...] = ()
        names: tuple[str, ...] = ()
        steps: int = 0
        rate: float = 0.0
        numbers: dict = pydantic.Field(default_factory=dict)
        optional: int | None = None

    with pytest.raises(BadInput) as error:
        Wide(**{field: value})
    assert str(error.value).endswith(f"; write e.g. {right}")


def test_in_a_notebook_it_is_one_line_without_a_traceback(capsys):
    shell = InteractiveShell()
    shell.run_cell("from workbench.facts import BadInput\nraise BadInput('facts: no such file')")
    assert capsys.readouterr().out.strip() == "BadInput: facts: no such file"
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out
