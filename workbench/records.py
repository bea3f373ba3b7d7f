"""Frozen records, checked at construction, and the one line that says what cannot be used."""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pydantic
import yaml

LONGEST = 300  # characters of a message
BEGINNING = 175  # of them kept of the beginning, which says where; the end says what to do


class BadInput(ValueError):
    """What a person gave cannot be used. The message is one line: what, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the line alone, for there is nothing to debug."""
        return [f"BadInput: {self}"]


def one_line(text: str) -> str:
    """The text in one line of at most 300 characters, for any terminal or file.

    Line breaks become spaces, what cannot be printed is escaped, and a long text loses its middle.
    """
    line = " ".join(text.splitlines())
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    if len(line) <= LONGEST:
        return line
    gap = " ... "
    return line[:BEGINNING] + gap + line[BEGINNING + len(gap) - LONGEST :]


def cause(error: BaseException) -> str:
    """What a library says went wrong, in a few words for the middle of a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


@contextmanager
def refused(what: str, advice: str) -> Iterator[None]:
    """Inside, what a library says went wrong becomes one line: what, its cause, and what to do.

    For a call or two of readers and loaders, each of which fails in ways of its own.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{what} ({cause(error)}); {advice}") from None


def fields_of(path: str | Path, what: str) -> dict:
    """The fields of a YAML or JSON file, by their names."""
    with refused(f"{what} {path}: cannot be read", "mend it"):
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise BadInput(f"{what} {path}: holds no fields; write name: value, a line each")
    return fields


@cache
def yaml_table(path: Path) -> typing.Any:
    """What a YAML file of the package holds, read once; not to be written into."""
    text = path.read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for the end of a clause, if one of the names is much like this one; else ""."""
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near else ""


def check_choice(what: str, name: str, choices: Iterable[str]) -> None:
    """BadInput if a name is none of the choices."""
    choices = list(choices)
    if name not in choices:
        near = did_you_mean(name, choices) or ":"
        raise BadInput(f"{what} {name!r}{near} choose one of {', '.join(choices)}")


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of several names."""
    names = list(names)
    rest = " ..." if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def shown(source: str | Path) -> str:
    """The name of a source in a message, where its end tells more than its beginning."""
    name = str(source)
    return name if len(name) <= 100 else f"...{name[-97:]}"


class Record(pydantic.BaseModel):
    """A frozen keyword-only record; whatever is wrong with its fields becomes one BadInput line."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, BadInput):
                raise cause from None
            where = ".".join(map(str, first["loc"]))
            what = _fault(first, where, type(self).model_fields)
            raise BadInput(f"{type(self).__name__}.{where}: {what}") from None


def _fault(error: dict, where: str, fields: dict) -> str:
    """What pydantic found wrong there, and a right value or the names of the fields."""
    if error["type"] == "extra_forbidden":
        near = did_you_mean(where, fields) or ","
        return f"unknown field{near} known are: {', '.join(fields)}"
    what = f"{error['msg'].lower()}, got {error.get('input')!r:.80}"
    if error["type"].endswith(("_type", "_parsing")):
        kind = fields[error["loc"][0]].annotation
        members = typing.get_args(kind) if isinstance(kind, types.UnionType) else ()
        for one in (kind, typing.get_origin(kind), *members):
            if one in _RIGHT:
                return f"{what}; write e.g. {_RIGHT[one]}"
    return what


_RIGHT = {  # a value of each kind, as one would write it
    tuple[int, ...]: "[2, 3, 4]",
    tuple[str, ...]: '["text", "facts"]',
    dict: '{"steps": 30}',
    int: "3",
    float: "0.1",
}
