"""Facts files, read strictly: a file becomes raw records, a record of any layout plain fields.

layouts.yaml is the table of the layouts; those that no table can say have a reader here.
"""

import csv
import io
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from workbench import sources, words
from workbench.records import BadInput, listed, one_line, shown, yaml_table

Placed = Iterator[tuple[str, object]]  # where a record stands, and what it says
Asked = list[tuple[str, ...]]  # a kind of question if there are several, its text, the answer


def records(source: str | Path) -> list[tuple[str, Any]]:
    """Where each record of a source stands ("record 3, line 7"), and the record as it was written.

    Args:
        source: a .json, .jsonl or .csv file, or a Hub dataset id.
    Returns:
        What JSON makes of a record, its numbers as they are written, for nothing here computes with
        them; in the place of a record that is broken by itself the BadInput that says why.
    Raises:
        BadInput: no such source, unreadable, empty, or broken from some place on.
    """
    try:
        text = _content(Path(source))
        of_format = _hub_records if text is None else _FORMATS[Path(source).suffix]
        placed = list(of_format(str(source) if text is None else text))
    except _BadFile as error:
        raise BadInput(f"{shown(source)}: {error}") from None
    if not placed:
        raise BadInput(f"{shown(source)}: is empty; give at least one record")
    return [(f"record {n}{line}", record) for n, (line, record) in enumerate(placed, 1)]


def parts(record: Any, number: int) -> list[tuple[str, Any]]:
    """The single edits of a record, each with its place in it; most records are one edit.

    A case of MQuAKE holds a list of rewrites, a record of MzsRE an edit in each language. The name
    of each (its place in the list, the language) is added to the case's id.
    """
    edits = _edits(record)
    if not edits:
        return [("", record)]
    try:
        case = _optional(record, "case_id") or str(number)
    except BadInput as error:
        return [("", error)]
    shared = {name: value for name, value in record.items() if name not in edits}
    edits = {name: shared | edit | {"case_id": f"{case}-{name}"} for name, edit in edits.items()}
    return [(f", edit {name:.30}", edit) for name, edit in edits.items()]


def _edits(record: object) -> dict[str, dict]:
    """The edits of a record that holds several, by name."""
    if not isinstance(record, dict):
        return {}
    rewrites = record.get("requested_rewrite")
    if isinstance(rewrites, list):
        # What several rewrites bring about together follows from none of them alone.
        alone = {} if len(rewrites) == 1 else {"questions": None}
        edits = [{"requested_rewrite": rewrite} | alone for rewrite in rewrites]
        return {str(number): edit for number, edit in enumerate(edits)}
    if _layout(record):
        return {}
    dicts = {name: value for name, value in record.items() if isinstance(value, dict)}
    return {language: edit for language, edit in dicts.items() if "src" in edit}


def fields(record: object, number: int) -> dict:
    """The plain fields of a Fact and its EditRequest that a record of any layout holds.

    Args:
        record: of `parts`.
        number: the record's place, from 1; its id if it has none.
    Raises:
        BadInput: the record is broken, of no known layout, or a field is missing or no text.
    """
    if isinstance(record, BadInput):
        raise record
    if not isinstance(record, dict):
        raise BadInput(f"is {record!r:.80}; write an object with named fields")
    layout = _layout(record)
    if layout is None:
        names = ", ".join(sorted(record))
        raise BadInput(f"no known layout; it has {names!r:.100}, ours needs {NEEDED}")
    known = _without_nulls(record)
    plain = _READERS.get(layout.name, _filled)(known, layout)
    return plain | {"id": _optional(known, layout.id) or str(number)}


def _without_nulls(record: dict) -> dict:
    return {name: value for name, value in record.items() if value is not None}


def warn_of_ignored(source: str | Path, edits: Iterable[Any]) -> None:
    """One warning that names the fields of these edits which no layout of theirs has."""
    ignored = set()
    for edit in edits:
        layout = _layout(edit) if isinstance(edit, dict) else None
        if layout:
            ignored.update(_without_nulls(edit).keys() - layout.known)
    if ignored:
        names = listed(f"{name!r:.30}" for name in sorted(ignored))
        line = f"{shown(source)}: fields that no one reads, ignored: {names}"
        warnings.warn(one_line(line), stacklevel=3)


# --- from a file to raw records -------------------------------------------------------------------


class _BadFile(BadInput):
    """What is wrong with a file, still without the file's name."""


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


def _json_records(text: str) -> Placed:
    """The members of a JSON list, or the one value that the file is."""
    if not text.strip():
        return
    value = _json(text, "line {0.lineno}, column {0.colno}")
    if isinstance(value, BadInput):
        raise _BadFile(str(value))
    for record in value if isinstance(value, list) else [value]:
        yield "", _checked(record)


def _jsonl_records(text: str) -> Placed:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f", line {number}", _checked(_json(line, "column {0.colno}"))


_AS_WRITTEN: dict[str, Any] = {"parse_int": str, "parse_float": str}


def _json(text: str, place: str) -> Any:
    """The JSON value that a text is, a BadInput in the place of what is not to be trusted in it.

    Args:
        place: how a fault's place is named.
    """
    try:
        return json.loads(text, object_pairs_hook=_members, parse_constant=_constant, **_AS_WRITTEN)
    except json.JSONDecodeError as error:
        return BadInput(f"broken JSON at {place.format(error)}: {error.msg}; mend it there")
    except RecursionError:
        return BadInput("is nested too deeply; a record holds texts, lists and pairs of texts")


def _members(pairs: list[tuple[str, object]]) -> dict | BadInput:
    record = dict(pairs)
    if len(record) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        return BadInput(f"the field {name!r:.80} stands twice; leave one of them")
    return record


def _constant(name: str) -> BadInput:
    return BadInput(f"{name} is no value of JSON; write null, or a text in quotes")


def _checked(record: object) -> object:
    """A record, or what is not to be trusted somewhere in it."""
    within = [record]
    for value in within:
        if isinstance(value, BadInput):
            return value
        if isinstance(value, dict | list):
            within += value.values() if isinstance(value, dict) else value
    return record


def _csv_records(text: str) -> Placed:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if header and any(map(str.strip, row)):
                yield f", line {line}", _csv_record(header, row)
            elif any(map(str.strip, row)):
                header = _csv_header(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise _BadFile(f"broken CSV at line {line}: {error}; look for an open quote") from None


def _csv_header(row: list[str]) -> list[str]:
    header = [cell.strip() for cell in row]
    if len(header) == 1:
        raise _BadFile(f"the header is one cell, {header[0]!r:.80}; set cells apart by commas")
    [(name, times)] = Counter(filter(None, header)).most_common(1)
    if times > 1:
        raise _BadFile(f"the column {name!r:.80} stands twice in the header; leave one of them")
    return header


def _csv_record(header: list[str], row: list[str]) -> dict | BadInput:
    if len(row) != len(header):
        counts = f"has {len(row)} cells, the header has {len(header)}"
        return BadInput(f"{counts}; put a cell that holds a comma in quotes, leave no cell out")
    record: dict = {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    if "" in record:
        return BadInput(f"a column without a name holds {record['']!r:.80}; name it in the header")
    for name in record.keys() & {"aliases", "paraphrases", "held_out"}:
        record[name] = record[name].split("|")
    return record


_FORMATS = {".json": _json_records, ".jsonl": _jsonl_records, ".csv": _csv_records}


def _hub_records(name: str) -> Placed:
    sources.check_file(name, "facts")
    if name.count("/") != 1:
        raise _BadFile("no such file; give 'world', a path or a Hub dataset id (owner/name)")
    for record in sources.records(name, "facts"):
        yield "", record


# --- from a raw record to plain fields ------------------------------------------------------------


NEEDED = "subject, prompt, object and target"  # of a record of ours


class Layout(NamedTuple):
    """What a layout calls its fields, see layouts.yaml."""

    name: str
    id: str = "case_id"
    prompt: str = ""
    target: str = ""
    object: str = ""
    held_out: str = ""
    near: str = ""
    follows: str = ""
    more: str = ""

    @property
    def known(self) -> set[str]:
        """Every field that records of this layout may have."""
        shared = ["subject relation_id"] if self.prompt else []
        return set(" ".join([*shared, *self[1:]]).split())


@cache
def _tables() -> dict[str, dict]:
    """layouts.yaml, `layouts` as records."""
    tables = yaml_table(Path(__file__).with_name("layouts.yaml"))
    layouts = {name: Layout(name, **fields) for name, fields in tables["layouts"].items()}
    return tables | {"layouts": layouts}


def _layout(record: dict) -> Layout | None:
    tables = _tables()
    names = (name for marker, name in tables["markers"].items() if marker in record)
    return tables["layouts"].get(next(names, None))


def _filled(record: dict, layout: Layout) -> dict:
    """A record whose prompt holds its subject."""
    subject = _name(record, "subject")
    follows = layout.follows.partition(" ")[0].removesuffix("_prompt")
    return {
        "subject": subject,
        "relation": _optional(record, "relation_id"),
        "prompt": template(_required(record, layout.prompt), subject),
        "target": _name(record, layout.target),
        "held_out": _texts(record, *layout.held_out.split()),
        "neighbourhood": _paired(record, layout.near),
        "portability": [(follows, *pair) for pair in _paired(record, layout.follows)],
        **_true(layout.object, _answers(record, layout.object) if layout.object else []),
    }


def _true(field: str, names: Sequence[str]) -> dict:
    """The true object and its other names; without any, it is what the model will say."""
    if not names:
        return {"object": "", "object_from_model": True}
    return {"object": _one_line_name(names[0], field), "aliases": names[1:]}


def _knowedit(record: dict, layout: Layout) -> dict:
    """The flat form with kinds of neighbours, answers lists of lists; wiki_recent has no object."""
    near = [pair for _, *pair in _of_kinds(record, "locality")]
    others = {"neighbourhood": near, "portability": _of_kinds(record, "portability")}
    if "ground_truth" not in record:
        return _filled(record, layout._replace(object="")) | others
    flat = record | {"ground_truth": _flattened(record["ground_truth"])}
    return _filled(flat, layout) | others


def _of_kinds(record: dict, field: str) -> Asked:
    """(kind, prompt, answer) of an object of kinds of questions, each with a list of them."""
    kinds = record.get(field, {})
    if not isinstance(kinds, dict):
        raise BadInput(f"the field {field!r} must be an object of kinds, it is {kinds!r:.80}")
    asked: Asked = []
    for kind, question in [(name, one) for name in kinds for one in _objects(kinds, name)]:
        question = {name: _flattened(value) for name, value in question.items()}
        prompts = _texts(question, "prompt")
        answers = _texts(question, "ground_truth")
        if len(prompts) > 1:
            raise BadInput(f"{field!r} has several prompts for one answer; write one an entry")
        if prompts and answers:
            asked.append((kind, prompts[0], answers[0]))
    return asked


def _flattened(value: object) -> list:
    """The members of a list and of the lists in it."""
    lists = value if isinstance(value, list) else [value]
    return [name for member in lists for name in (member if isinstance(member, list) else [member])]


def _counterfact(record: dict, _: Layout) -> dict:
    """A record of CounterFact, or one rewrite of a case of MQuAKE.

    MQuAKE asks for the fact in a question too, and its hops know other names of their answers.
    """
    true = _name(record, "requested_rewrite.target_true.str")
    hops = _objects(record, "single_hops")
    same = [hop for hop in hops if _optional(hop, "answer") == true]
    hop = _optional(record, "new_answer")
    asked = _texts(record, "questions") if hop else []
    return {
        "subject": _name(record, "requested_rewrite.subject"),
        "relation": _optional(record, "requested_rewrite.relation_id"),
        "prompt": _required(record, "requested_rewrite.prompt"),
        "object": true,
        "aliases": [alias for hop in same for alias in _texts(hop, "answer_alias")],
        "target": _name(record, "requested_rewrite.target_new.str"),
        "held_out": _texts(record, "paraphrase_prompts", "requested_rewrite.question"),
        "neighbourhood": [(text, true) for text in _texts(record, "neighborhood_prompts")],
        "portability": [("hops", text, hop) for text in asked],
    }


def _ripple(record: dict, _: Layout) -> dict:
    """RippleEdits names things by Wikidata's ids; their texts are taken from its statements."""
    relation = _required(record, "edit.relation")
    statement = _required(record, "edit.prompt").removesuffix(".")
    before = _optional(record, "edit.original_fact.prompt")
    before = (before or _optional(record, "edit.previous_fact.prompt")).removesuffix(".")
    question, subject = _taken_apart(statement, before, relation)
    true = [before[len(question) :].strip()] if before else []
    return {
        "subject": subject,
        "relation": relation,
        "prompt": template(question, subject),
        "target": _one_line_name(statement[len(question) :].strip(), "edit.prompt"),
        "neighbourhood": [pair for _, *pair in _queries(record, STAYS)],
        "portability": _queries(record, FOLLOWS),
        **_true("edit.original_fact", true),
    }


def _queries(record: dict, kinds: str) -> Asked:
    """(kind, prompt, answer) of the tests of some kinds."""
    asked = []
    for kind, test in [(name, test) for name in kinds.split() for test in _objects(record, name)]:
        for query in _objects(test, "test_queries"):
            for answer in _objects(query, "answers")[:1]:
                asked.append((kind, _optional(query, "prompt"), _optional(answer, "value")))
    return [question for question in asked if all(question)]


STAYS = "Relation_Specificity Relation_Specifity Forgetfulness"
FOLLOWS = "Subject_Aliasing Logical_Generalization Compositionality_I Compositionality_II"


def _taken_apart(statement: str, before: str, relation: str) -> tuple[str, str]:
    """The question and the subject of a statement, where but one reading of it is possible.

    Args:
        before: the statement that was true before, which begins with the same question; or "".
    """
    by_rule = (f"{re.escape(relation.lower().replace('_', ' '))}s? of", "")
    start, end = _tables()["phrases"].get(relation, by_rule)
    phrase = re.compile(rf"The (?:names? of the )?{start} (.+){end} (?:is|are)")
    readings = []
    for verb in re.finditer(r" (?:is|are)(?= )", statement):
        question = statement[: verb.end()]
        reading = phrase.fullmatch(question)
        if reading and (before or statement).startswith(f"{question} "):
            readings.append((question, reading[1].strip()))
    if len(readings) != 1:
        what = f"the subject cannot be told from {statement!r:.80} ({relation:.30})"
        raise BadInput(f"{what}; write the record with {NEEDED}")
    return readings[0]


def _ours(record: dict, _: Layout) -> dict:
    fields: dict = {name: _optional(record, name) for name in ("relation", "category")}
    fields |= {name: _name(record, name) for name in ("subject", "object", "target")}
    subject = fields["subject"]
    fields["prompt"] = _with_place(_required(record, "prompt"), subject)
    fields["aliases"] = _texts(record, "aliases")
    fields["paraphrases"] = [_with_place(text, subject) for text in _texts(record, "paraphrases")]
    fields["held_out"] = [_with_subject(text, subject) for text in _texts(record, "held_out")]
    fields["neighbourhood"] = _pairs(record, "neighbourhood")
    return fields


# how records of a layout are read, if not as `_filled`
_READERS = {"counterfact": _counterfact, "knowedit": _knowedit, "ripple": _ripple, "ours": _ours}


# --- texts ----------------------------------------------------------------------------------------

_NO_TEXT = re.compile(  # control characters but tab and line breaks; halves of a surrogate pair
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]"
)
# A list of texts as pandas writes it into a cell: ['Vint', 'Vint city'], or [['Vint']]
_WRITTEN_LIST = re.compile(r"""\[[\[\s]*(['"]).*\1[\]\s]*\]""", re.DOTALL)


def _text(value: object, name: str) -> str:
    """The text of a field, or its number as it is written, without the white space around it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)  # of a Hub dataset
    if not isinstance(value, str):
        raise BadInput(f"the field {name!r} must be a text, it is {value!r:.80}; write a text")
    damage = _NO_TEXT.search(value)
    if damage:
        raise BadInput(f"the field {name!r} holds {damage[0]!r}, which is no text; take it out")
    text = value.strip()
    if _WRITTEN_LIST.fullmatch(text):
        raise BadInput(f"{name!r} holds a list written as a text, {text!r:.80}; write one text")
    return text


def _value(record: dict, path: str) -> object:
    """What stands there (field.field...), None if nothing does."""
    value = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _optional(record: dict, name: str) -> str:
    value = _value(record, name)
    return "" if value is None else _text(value, name)


def _required(record: dict, name: str) -> str:
    if _value(record, name) is None:
        raise BadInput(f"the field {name!r} is missing; write it")
    return _optional(record, name)


def _name(record: dict, name: str) -> str:
    """The text of a field that holds the name of a thing."""
    return _one_line_name(_required(record, name), name)


def _one_line_name(text: str, name: str) -> str:
    if "\n" in text or "\r" in text:
        raise BadInput(f"{name!r} holds a line break, {text!r:.80}; look for a quote too many")
    return text


def _column(record: dict, name: str) -> list[str]:
    """The texts of a field that may be missing, one text or a list; "" for a null."""
    value = _value(record, name)
    values = value if isinstance(value, list) else [value]
    return ["" if member is None else _text(member, name) for member in values]


def _texts(record: dict, *names: str) -> list[str]:
    """The texts of optional fields that are not empty."""
    return [text for name in names for text in _column(record, name) if text]


def _answers(record: dict, name: str) -> list[str]:
    """The names of the true object in a field that must have one; the first is the usual one."""
    names = _texts(record, name)
    if not names and name in record:
        raise BadInput(f"the field {name!r} is empty; write the true object")
    return names or [_required(record, name)]


def _objects(record: dict, name: str) -> list[dict]:
    """The objects of an optional list of them."""
    members = record.get(name)
    if members is None:
        return []
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise BadInput(f"the field {name!r:.80} must be a list of objects; write it so, in JSON")
    return members


def _paired(record: dict, names: str) -> Asked:
    """Each text of the first of two fields with its answer in the other, where neither is empty."""
    if not names:
        return []
    prompts, answers = names.split()
    asked = _column(record, prompts)
    answered = _column(record, answers)
    if any(asked + answered) and len(asked) != len(answered):
        counts = f"{prompts!r} holds {len(asked)} and {answers!r} {len(answered)}"
        raise BadInput(f"{counts}; give each text its answer")
    return [pair for pair in zip(asked, answered, strict=False) if all(pair)]


def _pairs(record: dict, name: str) -> list[list[str]]:
    """The pairs of a text and its answer in an optional field."""
    members = record.get(name, [])
    pairs = [_column({name: pair}, name) for pair in members] if isinstance(members, list) else [[]]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise BadInput(f"{name!r} must be a list of pairs, a text and its answer; write it in JSON")
    return pairs


# --- the subject in its prompt --------------------------------------------------------------------

_HYPHEN = r"[-\u2010\u2011\u2013]"  # an en dash too


def template(text: str, subject: str) -> str:
    """The text with its last mention of the subject, as a word, made `{}`.

    A mention that stands apart goes before one that a hyphen ties to another word (Ann before
    Ann-Marie). In scripts without spaces between words every mention counts.
    """
    if not subject:
        raise BadInput("the subject is empty; write its name")
    named, prompt = f"the subject {subject!r:.60}", f"the prompt {text!r:.100}"
    composed = unicodedata.normalize("NFC", subject)
    if unicodedata.normalize("NFC", text).count(composed) > text.count(subject):
        raise BadInput(
            f"{prompt} and {named} differ only in Unicode form; normalise the file to NFC"
        )
    if subject not in text:
        raise BadInput(f"{named} does not stand in {prompt}; write it there")
    standing = words.places(text, subject)
    if not standing:
        raise BadInput(f"{named} stands in {prompt} only within a longer word; write it as a word")
    apart = [span for span in standing if _is_apart(text, *span)]
    start, end = (apart or standing)[-1]
    return f"{text[:start]}{{}}{text[end:]}"


def _is_apart(text: str, start: int, end: int) -> bool:
    """Whether no word touches the mention, not even with a hyphen between."""
    before = re.sub(rf"{_HYPHEN}\Z", "", text[:start])
    after = re.sub(rf"\A{_HYPHEN}", "", text[end:])
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
