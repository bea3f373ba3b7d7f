"""Facts files, read strictly: how a file becomes raw records, and how a layout's record becomes
the plain fields of our types."""

import csv
import io
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from workbench import words
from workbench.records import BadInput, one_line

FILES = {  # ending -> what `datasets` calls it
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
LONGEST_NUMBER = 100  # characters; whoever writes a longer one means something else


class Number(str):
    """A number as the file writes it; nothing here computes with it."""


def records(source: str | Path) -> list[tuple[str, object]]:
    """Where each record of a source stands ("record 3, line 7"), and the record as it was written.

    Args:
        source: a .json, .jsonl or .csv file, or a Hub dataset id.
    Returns:
        What JSON makes of a record, its numbers as `Number`; in the place of a record that is
        broken by itself the BadInput that says why.
    Raises:
        BadInput: no such source, unreadable, empty, or broken from some place on.
    """
    try:
        placed = list(_placed(source))
    except _BadFile as error:
        raise BadInput(f"{shown(source)}: {error}") from None
    if not placed:
        raise BadInput(f"{shown(source)}: is empty; give at least one record")
    return [(f"record {n}{line}", record) for n, (line, record) in enumerate(placed, 1)]


def fields(record: object, number: int) -> dict:
    """The plain fields of a Fact and its EditRequest that a record of any layout holds.

    Args:
        record: of `records`.
        number: the record's place, from 1; its id if it has none.
    Raises:
        BadInput: the record is broken, of no known layout, or a field is missing or no text.
    """
    if isinstance(record, BadInput):
        raise record
    if not isinstance(record, dict):
        raise BadInput(f"is {_kind(record)}; write an object with named fields")
    layout = _layout(record)
    if layout is None:
        names = ", ".join(sorted(record))
        needed = "subject, prompt, object, target"
        raise BadInput(f"no known layout; it has {names!r:.100}, ours needs {needed}")
    plain = layout.read({name: value for name, value in record.items() if value is not None})
    return plain | {"id": plain["id"] or str(number)}


def warn_of_ignored(source: str | Path, read: Sequence[tuple[str, object]]) -> None:
    """One warning that names the fields which the layouts of the records that were read lack."""
    ignored = set()
    for _, record in read:
        layout = _layout(record) if isinstance(record, dict) else None
        if layout:
            held = {name for name, value in record.items() if value is not None}
            ignored.update(held - layout.known)
    if ignored:
        names = [f"{name!r:.30}" for name in sorted(ignored)]
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        line = f"{shown(source)}: fields that no one reads, ignored: {', '.join(names[:5])}{rest}"
        warnings.warn(one_line(line), stacklevel=3)


def shown(source: str | Path) -> str:
    """The name of a source in a message, where its end tells more than its beginning."""
    name = str(source)
    return name if len(name) <= 100 else f"...{name[-97:]}"


def check_file(source: str, what: str) -> None:
    """BadInput if a source is named as a file is, and nothing is there."""
    named_as_file = Path(source).suffix in FILES or source.startswith((".", "/", "~"))
    if named_as_file and not Path(source).exists():
        advice = "give a path that counts from here, or a Hub dataset id (owner/name)"
        raise BadInput(f"{what} {shown(source)!r}: no such file; {advice}")


# --- from a file to raw records -------------------------------------------------------------------


class _BadFile(BadInput):
    """What is wrong with a file, still without the file's name."""


def _placed(source: str | Path) -> Iterable[tuple[str, object]]:
    """The line of each record, for a message, and the record."""
    text = _content(Path(source))
    if text is None:
        return [("", record) for record in _hub_records(str(source))]
    return _FORMATS[Path(source).suffix](text)


def _content(path: Path) -> str | None:
    """The text of a file; None if there is no file."""
    try:
        if not path.exists():
            return None
        if path.is_dir():
            raise _BadFile("is a folder; give a .json, .jsonl or .csv file in it")
        if path.suffix not in _FORMATS:
            raise _BadFile(f"the ending {path.suffix!r} is not known; use .json, .jsonl or .csv")
        content = path.read_bytes()
    except OSError as error:
        raise _BadFile(f"cannot be read ({error.strerror}); check its name and rights") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 in content[:2]:
        raise _BadFile("is not UTF-8 but UTF-16; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadFile(f"is not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _json_records(text: str) -> Iterator[tuple[str, object]]:
    """The members of a JSON list one by one, so that a fault can be laid to its record."""
    at = _past_white(text, 0)
    listed = text.startswith("[", at)
    if listed:
        at = _past_white(text, at + 1)
    ended = text.startswith("]", at) if listed else at == len(text)
    number = 0
    try:
        while not ended:
            number += 1
            record, at = _json_value(text, at)
            yield "", record
            at = _past_white(text, at)
            ended = not listed or text.startswith("]", at)
            if not ended:
                at = _past_white(text, _past(",", text, at))
        _check_end(text, at + 1 if listed else at)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (record {number})"
        raise _BadFile(f"broken JSON at {where}: {error.msg}; mend the file there") from None
    except RecursionError:
        raise _BadFile(f"record {number}: {_TOO_DEEP}") from None


def _jsonl_records(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f", line {number}", _json_line(line)


def _json_line(line: str) -> object:
    try:
        record, end = _json_value(line, _past_white(line, 0))
        _check_end(line, end)
    except json.JSONDecodeError as error:
        return BadInput(f"broken JSON at column {error.colno}: {error.msg}; mend the line there")
    except RecursionError:
        return BadInput(_TOO_DEEP)
    return record


def _json_value(text: str, start: int) -> tuple[object, int]:
    """The JSON value that begins there (BadInput if it is not to be trusted), and where it ends."""
    faults = []

    def members(pairs: list[tuple[str, object]]) -> dict:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            name = names.most_common(1)[0][0]
            faults.append(f"the field {name!r:.80} stands twice; leave one of them")
        return dict(pairs)

    def constant(name: str) -> None:
        faults.append(f"{name} is no value of JSON; write null, or a text in quotes")

    numbers = {"parse_int": Number, "parse_float": Number, "parse_constant": constant}
    value, end = json.JSONDecoder(object_pairs_hook=members, **numbers).raw_decode(text, start)
    return (BadInput(faults[0]) if faults else value), end


_TOO_DEEP = "is nested too deeply; a record holds texts, lists of texts and pairs of them"
_WHITE = re.compile(r"[ \t\r\n]*")


def _past_white(text: str, at: int) -> int:
    return _WHITE.match(text, at).end()


def _past(mark: str, text: str, at: int) -> int:
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return at + 1


def _check_end(text: str, at: int) -> None:
    at = _past_white(text, at)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _csv_records(text: str) -> Iterator[tuple[str, object]]:
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    header: list[str] = []
    next_line = 1
    try:
        for row in reader:
            line, next_line = next_line, reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header:
                yield f", line {line}", _csv_record(header, row)
            else:
                header = _csv_header(row)
    except csv.Error as error:
        where = f"broken CSV in the record of line {next_line}"
        raise _BadFile(f"{where}: {error}; look for a quote that is left open") from None


def _csv_header(row: list[str]) -> list[str]:
    header = [cell.strip() for cell in row]
    if len(header) == 1:
        raise _BadFile(f"the header is one cell, {header[0]!r:.80}; set cells apart by commas")
    name, times = Counter(filter(None, header)).most_common(1)[0]
    if times > 1:
        raise _BadFile(f"the column {name!r:.80} stands twice in the header; leave one of them")
    return header


def _csv_record(header: list[str], row: list[str]) -> dict | BadInput:
    if len(row) != len(header):
        advice = "put a cell that holds a comma in quotes, leave no cell out"
        return BadInput(f"has {len(row)} cells, the header has {len(header)}; {advice}")
    record = {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    if "" in record:
        return BadInput(f"a column without a name holds {record['']!r:.80}; name it in the header")
    for name in record.keys() & {"paraphrases", "held_out"}:  # several in a cell are set apart by |
        record[name] = record[name].split("|")
    return record


_FORMATS = {".json": _json_records, ".jsonl": _jsonl_records, ".csv": _csv_records}


def _hub_records(name: str) -> list[dict]:
    check_file(name, "facts")
    if name.count("/") != 1:
        advice = "give 'world', a path or a Hub dataset id (owner/name)"
        raise BadInput(f"facts {shown(name)!r}: no such file; {advice}")
    import datasets

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:
        what = f"not to be had as a Hub dataset ({type(error).__name__}); check name and network"
        raise BadInput(f"facts {shown(name)!r}: no such file, and {what}") from None


# --- from a raw record to plain fields, one function a layout -------------------------------------


def _counterfact(record: dict) -> dict:
    true = _name(record, "requested_rewrite.target_true.str")
    near = _texts(record, "neighborhood_prompts")
    return {
        "id": _optional(record, "case_id"),
        "subject": _subject(record, "requested_rewrite.subject"),
        "relation": _optional(record, "requested_rewrite.relation_id"),
        "prompt": _required(record, "requested_rewrite.prompt"),
        "object": true,
        "target": _name(record, "requested_rewrite.target_new.str"),
        "held_out": _texts(record, "paraphrase_prompts"),
        "neighbourhood": [(text, true) for text in near],
    }


def _flat(record: dict) -> dict:
    return _filled(record, prompt="prompt", object="ground_truth", target="target_new") | {
        "held_out": _texts(record, "rephrase_prompt"),
        "neighbourhood": _paired(record, "locality_prompt", "locality_ground_truth"),
    }


def _zsre(record: dict) -> dict:
    return _filled(record, prompt="src", object="answers", target="alt") | {
        "held_out": _texts(record, "rephrase"),
        "neighbourhood": _paired(record, "loc", "loc_ans"),
    }


def _filled(record: dict, prompt: str, object: str, target: str) -> dict:
    """What the flat form and zsRE have in common, under these names of theirs for a prompt, an
    object or a list of them, and a target."""
    subject = _subject(record, "subject")
    objects = _texts(record, object) or [_required(record, object)]
    return {
        "id": _optional(record, "case_id"),
        "subject": subject,
        "relation": _optional(record, "relation_id"),
        "prompt": template(_required(record, prompt), subject),
        "object": _one_line_name(objects[0], object),
        "target": _name(record, target),
    }


def _ours(record: dict) -> dict:
    subject = _subject(record, "subject")
    paraphrases = _texts(record, "paraphrases")
    return {
        "id": _optional(record, "id"),
        "subject": subject,
        "relation": _optional(record, "relation"),
        "category": _optional(record, "category"),
        "prompt": _with_place(_required(record, "prompt"), subject),
        "object": _name(record, "object"),
        "target": _name(record, "target"),
        "paraphrases": [_with_place(text, subject) for text in paraphrases],
        "held_out": [_with_subject(text, subject) for text in _texts(record, "held_out")],
        "neighbourhood": _pairs(record, "neighbourhood"),
    }


class Layout(NamedTuple):
    read: Callable[[dict], dict]
    known: set[str]  # its fields, those that nothing here needs included


_COUNTERFACT = Layout(
    _counterfact,
    {
        *("case_id", "pararel_idx", "requested_rewrite", "paraphrase_prompts"),
        *("neighborhood_prompts", "attribute_prompts", "generation_prompts"),
    },
)
_FLAT = Layout(
    _flat,
    {
        *("case_id", "subject", "relation_id", "prompt", "ground_truth", "target_new"),
        *("rephrase_prompt", "locality_prompt", "locality_ground_truth"),
        *("portability_prompt", "portability_ground_truth"),
    },
)
_ZSRE = Layout(
    _zsre,
    {
        *("case_id", "subject", "relation_id", "src", "answers", "alt", "rephrase"),
        *("loc", "loc_ans", "pred", "cond", "portability"),
    },
)
_OURS = Layout(
    _ours,
    {
        *("id", "subject", "relation", "category", "prompt", "object", "target"),
        *("paraphrases", "held_out", "neighbourhood"),
    },
)
_MARKERS = {  # a field that only this layout has; the first that a record has decides
    "requested_rewrite": _COUNTERFACT,
    "target_new": _FLAT,
    "alt": _ZSRE,
    "object": _OURS,
    "target": _OURS,
    "ground_truth": _FLAT,
    "answers": _ZSRE,
    "src": _ZSRE,
    "subject": _OURS,
}


def _layout(record: dict) -> Layout | None:
    return next((layout for marker, layout in _MARKERS.items() if marker in record), None)


# --- texts ----------------------------------------------------------------------------------------

_NO_TEXT = re.compile(  # control characters but tab and line breaks; halves of a surrogate pair
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]"
)
# A list of texts as pandas writes it into a cell: ['Vint', 'Vint city']
_WRITTEN_LIST = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)


def _text(value: object, name: str) -> str:
    """The text of a field, or its number as it is written, without the white space around it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = Number(value)  # of a Hub dataset
    if not isinstance(value, str):
        raise BadInput(f"the field {name!r} must be a text, it is {_kind(value)}; write a text")
    if isinstance(value, Number) and len(value) > LONGEST_NUMBER:
        raise BadInput(f"the field {name!r} is a number of {len(value)} digits; write a text")
    damage = _NO_TEXT.search(value)
    if damage:
        raise BadInput(f"the field {name!r} holds {damage[0]!r}, which is no text; take it out")
    text = value.strip()
    if _WRITTEN_LIST.fullmatch(text):
        what = f"the field {name!r} holds a list written as a text, {text!r:.80}"
        raise BadInput(f"{what}; write one text, or a list in JSON")
    return text


def _kind(value: object) -> str:
    names = {bool: "true or false", list: "a list", dict: "an object", Number: "a number"}
    names |= {str: "a text", type(None): "null", float: "not a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _value(record: dict, name: str) -> object:
    value = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _required(record: dict, name: str) -> str:
    value = _value(record, name)
    if value is None:
        raise BadInput(f"the field {name!r} is missing; write it")
    return _text(value, name)


def _subject(record: dict, name: str) -> str:
    subject = _name(record, name)
    if not subject:
        raise BadInput("the subject is empty; write its name")
    return subject


def _name(record: dict, name: str) -> str:
    """The text of a field that holds the name of a thing."""
    return _one_line_name(_required(record, name), name)


def _one_line_name(text: str, name: str) -> str:
    if "\n" in text or "\r" in text:
        what = f"the field {name!r} holds a line break, {text!r:.80}"
        raise BadInput(f"{what}; write a name in one line, and look for a quote too many")
    return text


def _optional(record: dict, name: str) -> str:
    value = _value(record, name)
    return "" if value is None else _text(value, name)


def _column(record: dict, name: str) -> list[str]:
    """The texts of a field that may be missing, one text or a list; "" for a null."""
    value = record.get(name)
    values = value if isinstance(value, list) else [value]
    return ["" if member is None else _text(member, name) for member in values]


def _texts(record: dict, name: str) -> list[str]:
    """The texts of an optional field that are not empty."""
    return [text for text in _column(record, name) if text]


def _paired(record: dict, prompts: str, answers: str) -> list[tuple[str, str]]:
    """Each text of one field with its answer in the other, where neither is empty."""
    texts, answered = _column(record, prompts), _column(record, answers)
    if not any(texts) and not any(answered):
        return []
    if len(texts) != len(answered):
        what = f"{prompts!r} holds {len(texts)} and {answers!r} {len(answered)}"
        raise BadInput(f"{what}; give each text its answer")
    return [pair for pair in zip(texts, answered, strict=True) if all(pair)]


def _pairs(record: dict, name: str) -> list[tuple[str, str]]:
    """The pairs of a text and its answer in an optional field."""
    members = record.get(name, [])
    sound = isinstance(members, list) and all(isinstance(pair, list) for pair in members)
    pairs = [tuple(_text(text, name) for text in pair) for pair in members] if sound else []
    if not sound or any(len(pair) != 2 or "" in pair for pair in pairs):
        what = f"the field {name!r} must be a list of pairs, each a text and its answer"
        raise BadInput(f"{what}; write it so, in JSON (a CSV cannot hold it)")
    return pairs


# --- the subject in its prompt --------------------------------------------------------------------

_HYPHENS = ("-", "\u2010", "\u2011", "\u2013")  # an en dash too


def template(text: str, subject: str) -> str:
    """The text with its last mention of the subject, as a word, made `{}`.

    A mention that stands apart goes before one that a hyphen ties to another word (Ann before
    Ann-Marie). In scripts without spaces between words every mention counts.
    """
    named, prompt = f"the subject {subject!r:.60}", f"the prompt {text!r:.100}"
    composed = unicodedata.normalize("NFC", subject)
    if unicodedata.normalize("NFC", text).count(composed) > text.count(subject):
        what = "differ only in Unicode form; normalise the file to NFC"
        raise BadInput(f"{named} and its mention in {prompt} {what}")
    if subject not in text:
        raise BadInput(f"{named} does not stand in {prompt}; write it there")
    starts = [at for at in range(len(text)) if text.startswith(subject, at)]
    spans = [(at, at + len(subject)) for at in starts]
    standing = [span for span in spans if words.stands(text, *span)]
    if not standing:
        what = "only within a longer word; write it there as a word"
        raise BadInput(f"{named} stands in {prompt} {what}")
    apart = [span for span in standing if _is_apart(text, *span)]
    start, end = (apart or standing)[-1]
    return f"{text[:start]}{{}}{text[end:]}"


def _is_apart(text: str, start: int, end: int) -> bool:
    """Whether no word touches the mention, not even with a hyphen between."""
    before, after = text[:start], text[end:]
    before = before[:-1] if before.endswith(_HYPHENS) else before
    after = after[1:] if after.startswith(_HYPHENS) else after
    return not words.of_word(before[-1:]) and not words.of_word(after[:1])


def _with_place(text: str, subject: str) -> str:
    """The text with `{}` for its subject, as it is if it has one already."""
    written = any("{}" in part for part in _around(subject, text))
    return text if written else template(text, subject)


def _with_subject(text: str, subject: str) -> str:
    """The text with the subject in the place of its `{}`, as it is if it has none."""
    return subject.join(part.replace("{}", subject) for part in _around(subject, text))


def _around(subject: str, text: str) -> list[str]:
    """The parts of a text between the mentions of a subject whose `{}` belongs to its name."""
    return text.split(subject) if "{}" in subject else [text]
