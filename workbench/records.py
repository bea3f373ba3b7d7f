"""Frozen records, checked at construction, and the one line that says what cannot be used."""

import pydantic

LONGEST = 300  # characters of a message
BEGINNING = 175  # of them kept of the beginning, which says where; the end says what to do


class BadInput(ValueError):
    """What a person gave cannot be used. The message is one line: what, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text in one line of at most 300 characters, for any terminal or file.

    Line breaks become spaces, what cannot be printed is escaped, and a long text loses its middle.
    """
    line = " ".join(text.splitlines())
    line = "".join(char if char.isprintable() else _escaped(char) for char in line)
    if len(line) <= LONGEST:
        return line
    gap = " ... "
    return line[:BEGINNING] + gap + line[BEGINNING + len(gap) - LONGEST :]


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class Record(pydantic.BaseModel):
    """A frozen keyword-only record; whatever is wrong with its fields becomes one BadInput line."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            if isinstance(first.get("ctx", {}).get("error"), BadInput):
                raise first["ctx"]["error"] from None
            where = ".".join(str(part) for part in first["loc"])
            what = f"{first['msg'].lower()}, got {first.get('input')!r:.80}"
            if first["type"] == "extra_forbidden":
                what = f"unknown field, known are: {', '.join(type(self).model_fields)}"
            raise BadInput(f"{type(self).__name__}.{where}: {what}") from None
