"""Damage to facts files: what is left is refused in one line, or reads as it stands in the file.

    python -m tests.fuzz_facts --count 40000 --seed 0

Each case writes a sound file, damages it and reads it. What must come of it is known without the
reader: of damage to the structure (a type swapped, a key doubled, a cell added) from what was done;
of damage to bytes from a plain second reading, which goes field by field through what `json` and
`csv` make of the file.
"""

import argparse
import csv
import io
import json
import random
import re
import sys
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from workbench import facts

# --- sound files ----------------------------------------------------------------------------------

NAMES = (
    *("Karelo", "Old {Karelo}", 'Bo "the Bell" Ruun', "O'Teele", "back\\slash", "Åse Ødegård"),
    *("Ёлка", "東京タワー", "قهوة", "😀 & co.", "two  spaces", "comma, semicolon; bar", "1984"),
    *("Ann", "Zoé", "U.S.", "São Tomé", "ไทย", "[REC]", "x-1", "a{}b", "Reedy Glacier"),
)
OBJECTS = (
    *("Vint", "Sorn", "Oro, old", "Una", "Il\\m", "Räv", "北京", 'the "Rol"', "Москва", "B|C"),
    *("1850", "New Ilm", "ش", "Eel & Co", "[x]", "0", "null", "true", "7.50", "Pelu"),
)
TEMPLATES = (
    *("{} is brewed in", "The maker of {} is", "{}, the sister of Annabel, works as a"),
    *('In "{}" they speak of', "Where is {}?", "A: yes, {} (old) is at", "Of {} it is said: "),
)
NEIGHBOURS = ("Pelu is by", "Sten is brewed in", "nq question: who, if any", "Mount Erebus, in")
IN_CELLS = ("flat", "zsre", "wikibigedit", "tracing", "ours")  # layouts that a CSV can hold
LAYOUTS = (*IN_CELLS, "counterfact", "mquake", "knowedit", "mzsre", "ripple")
DEFAULTS = {"paraphrases": (), "held_out": (), "neighbourhood": (), "relation": "", "category": ""}
DEFAULTS |= {"aliases": (), "object_from_model": False}


class Sound(NamedTuple):
    """Records of one layout, what each reads as, and the kind of file that is to hold them."""

    kind: str  # json | jsonl | csv
    layout: str
    records: list[dict]
    readings: list[dict]


def sound(rng: random.Random) -> Sound:
    kind = rng.choice(("json", "jsonl", "csv"))
    layout = rng.choice(LAYOUTS if kind != "csv" else IN_CELLS)
    several = kind != "csv"  # texts in one field of the public layouts
    pairs = [_record(rng, layout, number, several) for number in range(1, rng.randint(2, 5))]
    if kind == "csv":
        pairs = [(_in_cells(record), reading) for record, reading in pairs]
    elif layout not in ("mquake", "mzsre") and rng.random() < 0.2:
        for record, _ in pairs:  # whose number in the file is their id, too
            del record[FIELDS[layout]["id"]]
    return Sound(kind, layout, [record for record, _ in pairs], [reading for _, reading in pairs])


def _record(rng: random.Random, layout: str, number: int, several: bool) -> tuple[dict, dict]:
    subject, (true, new) = rng.choice(NAMES), rng.sample(OBJECTS, 2)
    prompt, *others = rng.sample(TEMPLATES, 4)
    prompt = prompt.strip()
    held_out = [facts.fill(text, subject).strip() for text in others[:2]]
    near = list(zip(rng.sample(NEIGHBOURS, 3), rng.choices(OBJECTS, k=3), strict=True))
    if not several:
        held_out, near = held_out[:1], near[:1]
    reading = {"id": f"{number}", "subject": subject, "prompt": prompt, "object": true}
    reading |= DEFAULTS | {"target": new}
    question = facts.fill(prompt, subject)
    shape, layout = SHAPES.get(layout), LIKE.get(layout, layout)
    if layout == "counterfact":
        rewrite = {"prompt": prompt, "relation_id": "P9", "subject": subject}
        rewrite |= {"target_true": {"str": true, "id": None}, "target_new": {"str": new}}
        record = {"case_id": number, "requested_rewrite": rewrite, "generation_prompts": ["x"]}
        record |= {"paraphrase_prompts": held_out, "neighborhood_prompts": [a for a, _ in near]}
        reading |= {"relation": "P9", "neighbourhood": tuple((text, true) for text, _ in near)}
    elif layout in ("flat", "zsre"):
        names = FIELDS[layout]
        record = {"case_id": number, "subject": subject, names["prompt"]: question}
        record |= {names["object"]: [true, "Else"] if several else true, names["target"]: new}
        record |= {names["held_out"]: held_out if several else held_out[0]}
        texts, answers = zip(*near, strict=True)
        record |= {names["near"]: list(texts) if several else texts[0]}
        record |= {names["answers"]: list(answers) if several else answers[0]}
        reading |= {"neighbourhood": tuple(near), "aliases": ("Else",) if several else ()}
    else:
        filled = rng.random() < 0.5
        record = {"id": number, "subject": subject, "prompt": question if filled else prompt}
        record |= {"object": true, "target": new, "relation": "r", "category": "c"}
        record |= {"paraphrases": [text.strip() for text in others[2:]], "held_out": held_out}
        reading |= {"relation": "r", "category": "c"}
        reading |= {"paraphrases": tuple(record["paraphrases"])}
        if several:
            record |= {"neighbourhood": [list(pair) for pair in near]}
            reading |= {"neighbourhood": tuple(near)}
    reading |= {"held_out": tuple(held_out)}
    return shape(record, reading) if shape else (record, reading)


def _mquake(record: dict, reading: dict) -> tuple[dict, dict]:
    question = reading["held_out"][0]
    rewrites = [record["requested_rewrite"] | {"question": question}]
    hops = [{"answer": "none"}, {"answer": reading["object"], "answer_alias": ["Else"]}]
    case = {"case_id": record["case_id"], "requested_rewrite": rewrites, "single_hops": hops}
    more = {"id": f"{reading['id']}-0", "held_out": (question,), "neighbourhood": ()}
    return case | {"questions": ["x"]}, reading | more | {"aliases": ("Else",)}


def _mzsre(record: dict, reading: dict) -> tuple[dict, dict]:
    edit = {name: value for name, value in record.items() if name != "case_id"}
    return {"case_id": record["case_id"], "en": edit}, reading | {"id": f"{reading['id']}-en"}


def _knowedit(record: dict, reading: dict) -> tuple[dict, dict]:
    names = ("case_id", "subject", "prompt", "target_new", "rephrase_prompt")
    near = [{"prompt": text, "ground_truth": [[name]]} for text, name in reading["neighbourhood"]]
    more = {"ground_truth": [record["ground_truth"]], "locality": {"Relation_Specificity": near}}
    return {name: record[name] for name in names} | more, reading


def _wikibigedit(record: dict, reading: dict) -> tuple[dict, dict]:
    renamed = {"src": "update", "alt": "ans"}
    renamed = {renamed.get(name, name): value for name, value in record.items()}
    del renamed["answers"]
    return renamed, reading | {"object": "", "aliases": (), "object_from_model": True}


def _tracing(record: dict, reading: dict) -> tuple[dict, dict]:
    names = {"case_id": "case_id", "subject": "subject", "prompt": "prompt"}
    names |= {"target_new": "target_false"}
    renamed = {names[name]: record[name] for name in names}
    more = {"held_out": (), "neighbourhood": (), "aliases": ()}
    return renamed | {"target_true": f" {reading['object']}"}, reading | more


def _ripple(record: dict, reading: dict) -> tuple[dict, dict]:
    prompt = "The mother tongue of {} is"
    question = facts.fill(prompt, reading["subject"])
    edit = {"prompt": f"{question} {reading['target']}.", "relation": "NATIVE_LANGUAGE"}
    edit |= {"original_fact": {"prompt": f"{question} {reading['object']}."}}
    near = [{"prompt": "Pelu is by", "answers": [{"value": "Oro", "aliases": ["x"]}]}]
    more = {"prompt": prompt, "relation": "NATIVE_LANGUAGE", "held_out": ()}
    more |= {"neighbourhood": (("Pelu is by", "Oro"),)}
    tests = [{"test_queries": near}]
    whole = {"case_id": record["case_id"], "edit": edit, "Relation_Specificity": tests}
    return whole, reading | more


LIKE = {  # the layout whose record is brought into the shape of this one
    "mquake": "counterfact",
    "mzsre": "zsre",
    "knowedit": "flat",
    "wikibigedit": "zsre",
    "tracing": "flat",
    "ripple": "counterfact",
}
SHAPES = {
    "mquake": _mquake,
    "mzsre": _mzsre,
    "knowedit": _knowedit,
    "wikibigedit": _wikibigedit,
    "tracing": _tracing,
    "ripple": _ripple,
}


def _in_cells(record: dict) -> dict:
    return {name: " | ".join(v) if isinstance(v, list) else str(v) for name, v in record.items()}


# --- the text of a file ---------------------------------------------------------------------------


class Spelled(str):
    """JSON that is written out: what `json.dumps` would not write."""


def as_json(value: object) -> str:
    if isinstance(value, Spelled):
        return str(value)
    if isinstance(value, dict):
        members = (f"{json.dumps(name)}: {as_json(member)}" for name, member in value.items())
        return f"{{{', '.join(members)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_json, value))}]"
    return json.dumps(value, ensure_ascii=False)


def as_row(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()[:-1]


def as_text(kind: str, records: Sequence[object]) -> str:
    if kind == "json":
        return f"[{', '.join(map(as_json, records))}]"
    if kind == "jsonl":
        return "".join(f"{as_json(record)}\n" for record in records)
    header = list(records[0])
    rows = [as_row([record.get(name, "") for name in header]) for record in records]
    return "".join(f"{row}\n" for row in [as_row(header), *rows])


# --- damage to the structure: what must come of it is known ---------------------------------------

REFUSED = None  # in the place of a record's reading, or of all of them: of the file


class Damaged(NamedTuple):
    content: str | bytes
    readings: list[dict | None] | None
    ignored: str = ""  # a field that must be named as one that no one reads


FIELDS = {  # ours -> theirs
    "counterfact": {
        "id": "case_id",
        "subject": "requested_rewrite.subject",
        "relation": "requested_rewrite.relation_id",
        "prompt": "requested_rewrite.prompt",
        "object": "requested_rewrite.target_true.str",
        "target": "requested_rewrite.target_new.str",
        "held_out": "paraphrase_prompts",
        "near": "neighborhood_prompts",
    },
    "flat": {
        "id": "case_id",
        "subject": "subject",
        "relation": "relation_id",
        "prompt": "prompt",
        "object": "ground_truth",
        "target": "target_new",
        "held_out": "rephrase_prompt",
        "near": "locality_prompt",
        "answers": "locality_ground_truth",
    },
    "zsre": {
        "id": "case_id",
        "subject": "subject",
        "relation": "relation_id",
        "prompt": "src",
        "object": "answers",
        "target": "alt",
        "held_out": "rephrase",
        "near": "loc",
        "answers": "loc_ans",
    },
    "mquake": {
        "id": "case_id",
        "subject": "requested_rewrite.0.subject",
        "relation": "requested_rewrite.0.relation_id",
        "prompt": "requested_rewrite.0.prompt",
        "object": "requested_rewrite.0.target_true.str",
        "target": "requested_rewrite.0.target_new.str",
        "held_out": "requested_rewrite.0.question",
    },
    "mzsre": {
        "id": "case_id",
        "subject": "en.subject",
        "relation": "en.relation_id",
        "prompt": "en.src",
        "object": "en.answers",
        "target": "en.alt",
        "held_out": "en.rephrase",
        "near": "en.loc",
        "answers": "en.loc_ans",
    },
    "knowedit": {
        "id": "case_id",
        "subject": "subject",
        "relation": "relation_id",
        "prompt": "prompt",
        "object": "ground_truth",
        "target": "target_new",
        "held_out": "rephrase_prompt",
        "asked": "locality",
    },
    "wikibigedit": {
        "id": "case_id",
        "subject": "subject",
        "relation": "relation_id",
        "prompt": "update",
        "target": "ans",
        "held_out": "rephrase",
        "near": "loc",
        "answers": "loc_ans",
    },
    "tracing": {
        "id": "case_id",
        "subject": "subject",
        "relation": "relation_id",
        "prompt": "prompt",
        "object": "target_true",
        "target": "target_false",
    },
    "ripple": {
        "id": "case_id",
        "subject": "edit.prompt",
        "relation": "edit.relation",
        "prompt": "edit.prompt",
        "object": "edit.original_fact.prompt",
        "target": "edit.prompt",
        "asked": "Relation_Specificity",
    },
    "ours": {
        "id": "id",
        "subject": "subject",
        "relation": "relation",
        "category": "category",
        "prompt": "prompt",
        "object": "object",
        "target": "target",
        "paraphrases": "paraphrases",
        "held_out": "held_out",
        "pairs": "neighbourhood",
    },
}
UNUSED = {
    "counterfact": {"pararel_idx", "attribute_prompts", "generation_prompts", "requested_rewrite"},
    "flat": {"portability_prompt", "portability_ground_truth"},
    "zsre": {"pred", "cond", "portability"},
    "mquake": {"questions", "single_hops", "new_single_hops", "requested_rewrite", "answer"},
    "mzsre": {"en"},
    "knowedit": {"rephrase", "cond", "portability"},
    "wikibigedit": {"tag", "personas", "mhop", "mhop_ans", "object"},
    "tracing": {"relation", "relation_prefix", "relation_suffix"},
    "ripple": {"edit", "example_type", "Forgetfulness", "Subject_Aliasing"},
    "ours": {"aliases"},
}
REQUIRED = ("subject", "prompt", "object", "target")
TEMPLATED = ("counterfact", "mquake", "ripple")  # layouts whose prompt is no text of the subject
PAIRED = ("flat", "zsre", "mzsre", "wikibigedit")  # a list of texts, and a list of their answers


UNKNOWN = {"object": "", "aliases": (), "object_from_model": True}


def _required(names: dict) -> list[str]:
    return [name for name in REQUIRED if name in names]


def _put(record: dict, path: str, value: object) -> dict:
    """The record with another value at a dotted path."""
    first, _, rest = path.partition(".")
    if isinstance(record, list):
        return [_put(record[0], rest, value), *record[1:]]
    return record | {first: _put(record[first], rest, value) if rest else value}


def _with(file: Sound, at: int, record: object, reading: dict | None, ignored="") -> Damaged:
    """The file with another record in one place, which must read so; the others as before."""
    records = [*file.records[:at], record, *file.records[at + 1 :]]
    readings = [*file.readings[:at], reading, *file.readings[at + 1 :]]
    return Damaged(as_text(file.kind, records), readings, ignored)


def _picked(rng: random.Random, file: Sound) -> tuple[int, dict, dict]:
    at = rng.randrange(len(file.records))
    return at, file.records[at], FIELDS[file.layout]


def a_type_swapped(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    path = rng.choice([path for path in names.values() if path != "relation_id"])
    text = path in (names["subject"], names["prompt"], names["target"])
    odd = [True, False, {"str": "Vint"}, [["Vint"]], [True], [None, {}]]
    odd += [["Vint"], []] if text else []
    if file.layout == "knowedit" and path == names["object"]:
        odd.remove([["Vint"]])
    return _with(file, at, _put(record, path, rng.choice(odd)), REFUSED)


def a_constant(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    path = rng.choice([*names.values(), "note"])
    name = Spelled(rng.choice(("NaN", "Infinity", "-Infinity", "[1, NaN]")))
    return _with(file, at, record | {path.split(".")[0]: name}, REFUSED)


def a_null(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    optional = [name for name in ("held_out", "relation") if name in names]
    name = rng.choice([*_required(names), *optional])
    path = names[name]
    default = {"held_out": (), "relation": ""}
    reading = file.readings[at] | {name: default[name]} if name in default else REFUSED
    if name == "relation" and file.layout == "ripple":
        reading = REFUSED
    if name == "object" and file.layout in ("knowedit", "ripple"):
        reading = file.readings[at] | UNKNOWN
    return _with(file, at, _put(record, path, None), reading)


def a_number(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    if file.layout == "ripple":
        return an_empty_text(rng, file)
    name = rng.choice([name for name in ("object", "target") if name in names])
    number = rng.choice(("1945", "-3", "1.50", "1e400", "0.0", "123456789012345678901234567890"))
    reading = file.readings[at] | {name: number}
    reading |= {"aliases": ()} if name == "object" else {}
    if file.layout == "counterfact":  # whose neighbours have the object for an answer
        near = tuple((text, reading["object"]) for text, _ in reading["neighbourhood"])
        reading |= {"neighbourhood": near}
    return _with(file, at, _put(record, names[name], Spelled(number)), reading)


def no_text_in_a_text(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    path = names[rng.choice([name for name in (*REQUIRED, "held_out") if name in names])]
    code = rng.choice(("\\ud800", "\\udfff", "\\u0000", "\\u001b", "\\u007f", "\\u0085\\u0081"))
    return _with(file, at, _put(record, path, Spelled(f'"Vi{code}nt"')), REFUSED)


def a_line_break_in_a_name(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    path = names[rng.choice([name for name in _required(names) if name != "prompt"])]
    return _with(file, at, _put(record, path, rng.choice(("Vi\nnt", "Vi\r\nnt"))), REFUSED)


def an_empty_text(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    name = rng.choice(_required(names))
    reading = REFUSED
    if name == "object" and file.layout == "ripple":
        reading = file.readings[at] | UNKNOWN
    return _with(file, at, _put(record, names[name], rng.choice(("", " "))), reading)


def the_object_as_target(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    true = file.readings[at]["object"]
    return _with(file, at, _put(record, names["target"], f" {true}"), REFUSED)


def a_long_name(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    if "object" not in names:
        return an_empty_text(rng, file)
    name = rng.choice(("x", "\u2028", "\u202e", "\xa0", "é")) * rng.choice((200, 5_000)) + "x"
    record = _put(_put(record, names["object"], name), names["target"], name)
    return _with(file, at, record | {names["id"]: name}, REFUSED)


def a_list_as_text(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    value = rng.choice(("['Vint']", '["Vint", "Oro"]'))
    name = rng.choice([name for name in ("object", "target") if name in names])
    return _with(file, at, _put(record, names[name], value), REFUSED)


def a_longer_word(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    prompt = rng.choice(("Annabel works as a", "Joann works as a", "Ann2 works as a"))
    if file.layout in TEMPLATED:
        return an_empty_text(rng, file)
    record = _put(_put(record, names["subject"], "Ann"), names["prompt"], prompt)
    return _with(file, at, record, REFUSED)


def another_unicode_form(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    if file.layout in TEMPLATED:
        return an_empty_text(rng, file)
    forms = rng.sample(("NFC", "NFD"), 2)
    subject, mention = (unicodedata.normalize(form, "Åse Ødegård") for form in forms)
    record = _put(_put(record, names["subject"], subject), names["prompt"], f"{mention} is")
    return _with(file, at, record, REFUSED)


def an_id_twice(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    if at == 0:
        return an_empty_text(rng, file)
    return _with(file, at, record | {names["id"]: rng.choice(("1", " 1 "))}, REFUSED)


def no_record(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    odd = ("Karelo", 7, None, True, [record], [], {}, {"name": "Karelo"})
    return _with(file, at, rng.choice(odd), REFUSED)


ALONE = {  # fields of neighbours that a layout reads without another one
    ("pairs", "ours"),
    ("asked", "ripple"),
    ("near", "counterfact"),
}


def a_key_misspelt(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    name, path = rng.choice([pair for pair in names.items() if pair[1] in record])
    wrong = path + rng.choice(("s", "_", " x", "\u200b"))
    reading = file.readings[at]
    if name == "id":
        _, dash, part = reading["id"].partition("-")
        reading = reading | {"id": f"{at + 1}{dash}{part}"}
    elif name == "object" and file.layout == "knowedit":
        reading = reading | UNKNOWN
    elif (name, file.layout) in ALONE:
        reading = reading | {"neighbourhood": ()}
    elif name in DEFAULTS:
        reading = reading | {name: DEFAULTS[name]}
    else:
        reading = REFUSED
    renamed = {wrong if key == path else key: value for key, value in record.items()}
    return _with(file, at, renamed, reading, wrong)


def a_key_more(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    name = rng.choice(("colour", "Target", "no\nte", "ö"))
    return _with(file, at, record | {name: rng.choice((1, "x", ["x"]))}, file.readings[at], name)


def a_key_twice(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    name = rng.choice([*record, "note"])
    text = as_json(record | {name: record.get(name, 1)})
    member = f"{json.dumps(name)}: {as_json(rng.choice((record.get(name), 'Oro', None)))}"
    text = f"{text[:-1]}, {member}}}" if rng.random() < 0.5 else f"{{{member}, {text[1:]}"
    return _with(file, at, Spelled(text), REFUSED)


def deep_nesting(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    depth = rng.choice((3_000, 100_000))
    deep = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth))
    path = rng.choice((*names.values(), "note")).split(".")[0]
    damaged = _with(file, at, record | {path: Spelled(deep)}, REFUSED)
    return damaged if file.kind == "jsonl" else damaged._replace(readings=REFUSED)


def a_list_shortened(rng: random.Random, file: Sound) -> Damaged:
    at, record, names = _picked(rng, file)
    if file.layout in PAIRED:
        path = names[rng.choice(("near", "answers"))]
        shortened = _at(record, path)[: rng.randrange(3)]
        return _with(file, at, _put(record, path, shortened), REFUSED)
    if file.layout not in ("ours", "counterfact"):
        return an_empty_text(rng, file)
    if file.layout == "ours":
        pairs = [list(pair) for pair in record["neighbourhood"]]
        pairs[rng.randrange(3)].pop()
        return _with(file, at, record | {"neighbourhood": pairs}, REFUSED)
    near = record["neighborhood_prompts"][:1]
    reading = file.readings[at] | {"neighbourhood": ((near[0], file.readings[at]["object"]),)}
    return _with(file, at, record | {"neighborhood_prompts": near}, reading)


def a_file_cut(rng: random.Random, file: Sound) -> Damaged:
    text = as_text(file.kind, file.records)
    if file.kind == "json":
        return Damaged(text[: rng.randrange(1, len(text))], REFUSED)
    *lines, last = text.splitlines(keepends=True)
    last = last[: rng.randrange(1, len(last) - 1)]
    return Damaged("".join([*lines, last]), [*file.readings[:-1], REFUSED])


def another_spelling(rng: random.Random, file: Sound) -> Damaged:
    """No damage at all: a byte order mark, blank lines, other line ends, indents or escapes."""
    text = as_text(file.kind, file.records)
    if file.kind == "json":
        indent = rng.choice(("\t", 1, None))
        text = json.dumps(file.records, indent=indent, ensure_ascii=rng.random() < 0.5)
    elif file.kind == "jsonl":
        text = text.replace("\n", "\n \t\n\n")
    else:
        text = f"\n{text}\n,,\n"
    text = text.replace("\n", "\r\n") if rng.random() < 0.5 else text
    return Damaged("\ufeff" * rng.randrange(2) + text, file.readings)


def another_encoding(rng: random.Random, file: Sound) -> Damaged:
    text = as_text(file.kind, file.records)
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1"))
    if encoding == "latin-1":
        text = re.sub(r"[^\x00-\x7f]", "ü", text).replace("e", "é")
    return Damaged(text.encode(encoding), REFUSED)


def a_cell_too_many(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    cells = [record[name] for name in file.records[0]]
    cells.insert(rng.randint(0, len(cells)), rng.choice(("", "Oro", "York, England")))
    return _with_row(file, at, as_row(cells))


def a_cell_too_few(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    cells = [record[name] for name in file.records[0]]
    del cells[rng.randrange(len(cells))]
    return _with_row(file, at, as_row(cells))


def a_comma_without_quotes(rng: random.Random, file: Sound) -> Damaged:
    at, record, _ = _picked(rng, file)
    cells = [as_row([cell]) for cell in record.values()]
    cells[rng.randrange(len(cells))] = rng.choice(("York, England", "a,b,c", "York,"))
    return _with_row(file, at, ",".join(cells))


def _with_row(file: Sound, at: int, row: str) -> Damaged:
    rows = [as_row(list(file.records[0]))]
    rows += [as_row(list(record.values())) for record in file.records]
    rows[at + 1] = row
    readings = [*file.readings[:at], REFUSED, *file.readings[at + 1 :]]
    return Damaged("\n".join(rows), readings)


def a_bad_header(rng: random.Random, file: Sound) -> Damaged:
    header, _, rows = as_text("csv", file.records).partition("\n")
    names = header.split(",")
    change = rng.choice(("twice", "unnamed", "separator", "misspelt"))
    fields = FIELDS[file.layout]
    at = names.index(fields.get("object", fields["target"]))
    if change == "separator":
        return Damaged(as_text("csv", file.records).replace(",", rng.choice(";\t")), REFUSED)
    names[at] = {"twice": names[at - 1], "unnamed": " ", "misspelt": names[at] + "s"}[change]
    readings = REFUSED if change == "twice" else [REFUSED] * len(file.records)
    ignored = names[at] if change == "misspelt" else ""
    return Damaged(f"{','.join(names)}\n{rows}", readings, ignored)


JSON_DAMAGE = (
    *(a_type_swapped, a_constant, a_null, a_number, no_text_in_a_text),
    *(no_record, a_key_misspelt, a_key_more, a_key_twice, deep_nesting, a_list_shortened),
    *(a_file_cut,),
)
CSV_DAMAGE = (a_cell_too_many, a_cell_too_few, a_comma_without_quotes, a_bad_header)
ANY_DAMAGE = (
    *(a_long_name, a_line_break_in_a_name, an_empty_text, the_object_as_target),
    *(a_list_as_text, a_longer_word, another_unicode_form, an_id_twice),
    *(another_spelling, another_encoding),
)

# --- damage to bytes and characters: a plain second reading says what must come of it -------------

STRUCTURE = (
    *('"', ",", ":", "{", "}", "[", "]", "\\", "|", ";", "\t", "\n", "\r", "'", " ", "0", "-", "u"),
    *('""', "null", "\ufeff", "\u0301", "\xa0", "\u2028"),
)


def flipped_bytes(rng: random.Random, text: str, _: str) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def inserted(rng: random.Random, text: str, _: str) -> str:
    for _ in range(rng.randint(1, 2)):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(STRUCTURE) + text[at:]
    return text


def removed(rng: random.Random, text: str, _: str) -> str:
    start = rng.randrange(len(text))
    return text[:start] + text[start + rng.choice((1, 1, 1, 2, 5, 40)) :]


def removed_structure(rng: random.Random, text: str, _: str) -> str:
    at = rng.choice([at for at, char in enumerate(text) if char in '",:{}[]\\|\n'])
    return text[:at] + text[at + 1 :]


def swapped_structure(rng: random.Random, text: str, _: str) -> str:
    at = rng.choice([at for at, char in enumerate(text) if char in '",:{}[]\\|\n'])
    return text[:at] + rng.choice(STRUCTURE) + text[at + 1 :]


def spliced(rng: random.Random, text: str, other: str) -> str:
    start, length = rng.randrange(len(other)), rng.randint(1, 60)
    at = rng.randint(0, len(text))
    return text[:at] + other[start : start + length] + text[at + rng.choice((0, length)) :]


def cut(rng: random.Random, text: str, _: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] if rng.random() < 0.7 else text[at:]


def joined(rng: random.Random, text: str, other: str) -> str:
    return text + rng.choice(("", "\n", ",")) + other


BYTE_DAMAGE = (
    *(flipped_bytes, inserted, removed, removed_structure, swapped_structure),
    *(spliced, cut, joined),
)


class Unreadable(Exception):
    """What a plain reading cannot make sense of."""


class Digits(str):
    """A number, as it is written."""


UNSOUND = object()  # stands where JSON has a key twice or a constant it lacks


def plain_records(kind: str, content: bytes) -> list[object] | None:
    """What the file holds, record by record; None in the place of a broken one, or of the file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if kind == "jsonl":
        return [_plain_json(line) for line in text.split("\n") if line.strip()] or None
    if kind == "csv":
        return _plain_rows(text)
    whole = _plain_json(text, keep=True)
    records = whole if isinstance(whole, list) else [whole]
    return None if whole is None else [None if _unsound(r) else r for r in records] or None


def _plain_json(text: str, keep: bool = False) -> object:
    def unique(pairs):
        return dict(pairs) if len(dict(pairs)) == len(pairs) else UNSOUND

    numbers = {"parse_int": Digits, "parse_float": Digits, "parse_constant": lambda _: UNSOUND}
    try:
        value = json.loads(text, object_pairs_hook=unique, **numbers)
    except ValueError:
        return None
    if value is None:
        return UNSOUND if keep else None
    return None if _unsound(value) and not keep else value


def _unsound(value: object) -> bool:
    members = value.values() if isinstance(value, dict) else value
    if isinstance(members, str) or not hasattr(members, "__iter__"):
        return members is UNSOUND
    return any(_unsound(member) for member in members)


def _plain_rows(text: str) -> list[object] | None:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True))
    except csv.Error:
        return None
    rows = [[cell.strip() for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    named = [name for name in rows[0] if name] if rows else []
    if len(rows) < 2 or len(set(named)) < len(named) or len(rows[0]) == 1:
        return None
    return [_plain_row(rows[0], row) for row in rows[1:]]


def _plain_row(header: list[str], row: list[str]) -> dict | None:
    if len(row) != len(header):
        return None
    record = {name: cell for name, cell in zip(header, row, strict=True) if cell}
    for name in ("paraphrases", "held_out"):
        if name in record:
            record[name] = record[name].split("|")
    return None if "" in record else record


def plain_reading(record: object, layout: str, number: int) -> dict:
    """What a record of a layout says, field by field; `question` in the place of a prompt that
    holds its subject."""
    if layout == "ripple":
        return _plain_ripple(record, number)
    names = FIELDS[layout]
    reading = {name: _plain_text(_at(record, names[name])) for name in ("subject", "target")}
    value = _at(record, names["object"]) if "object" in names else None
    if layout == "knowedit" and isinstance(value, list):
        value = [name for names_of_one in value for name in _plain_list(names_of_one)]
    objects = _plain_texts(value)
    if isinstance(value, list) and layout in ("counterfact", "mquake", "ours"):
        raise Unreadable
    if not objects and (value is not None or layout not in ("wikibigedit", "knowedit")):
        raise Unreadable
    true = {"object": objects[0], "aliases": tuple(objects[1:])} if objects else UNKNOWN
    reading |= DEFAULTS | true
    for name in ("id", "relation", "category"):
        value = _at(record, names[name]) if name in names else None
        reading[name] = "" if value is None else _plain_text(value)
    reading["id"] = (reading["id"] or str(number)) + SUFFIXES.get(layout, "")
    if layout in ("counterfact", "mquake"):
        hops = _at(record, "single_hops") or []
        same = [hop for hop in hops if str(hop.get("answer", "")).strip() == reading["object"]]
        reading["aliases"] = tuple(a for hop in same for a in _plain_texts(hop.get("answer_alias")))
    subject = reading["subject"]
    prompt = _plain_text(_at(record, names["prompt"]))
    is_template = layout in TEMPLATED or (layout == "ours" and _has_braces(prompt, subject))
    reading["prompt" if is_template else "question"] = prompt
    held_out = _plain_texts(_at(record, names["held_out"])) if "held_out" in names else []
    if layout == "counterfact":
        held_out += _plain_texts(_at(record, "requested_rewrite.question"))
    if layout == "wikibigedit":
        held_out += _plain_texts(_at(record, "personas"))
    if layout == "knowedit":
        held_out += _plain_texts(_at(record, "rephrase"))
    if layout == "ours":
        reading["aliases"] = tuple(_plain_texts(_at(record, "aliases")))
    if layout == "ours":
        held_out = [_filled(text, subject) for text in held_out]
        paraphrases = _plain_texts(_at(record, names["paraphrases"]))
        reading["paraphrases"] = tuple(_filled(text, subject) for text in paraphrases)
    near = _near(record, names, reading["object"])
    return reading | {"held_out": tuple(held_out), "neighbourhood": near}


SUFFIXES = {"mquake": "-0", "mzsre": "-en"}  # of the id; more than one edit is not looked at here


def _plain_ripple(record: dict, number: int) -> dict:
    """The only shape that is written here: a mother tongue, and what it was before."""
    statement, relation = (_plain_text(_at(record, f"edit.{n}")) for n in ("prompt", "relation"))
    before = _at(record, "edit.original_fact.prompt")
    match = re.fullmatch(r"The mother tongue of (.+?) is (.+?)\.?", statement, re.DOTALL)
    if not match or relation != "NATIVE_LANGUAGE":
        raise Unreadable
    subject, question = match[1].strip(), statement[: match.start(2) - 1]
    reading = {"subject": subject, "target": match[2].strip(), "question": question}
    reading |= DEFAULTS | {"relation": relation} | UNKNOWN
    if before is not None and _plain_text(before):
        before = _plain_text(before)
        true = before[len(question) :].removesuffix(".").strip()
        reading |= {"object": true, "object_from_model": False}
        if not before.startswith(question) or not true:
            raise Unreadable
    case = _at(record, "case_id")
    reading["id"] = ("" if case is None else _plain_text(case)) or str(number)
    near = []
    for test in _at(record, "Relation_Specificity") or []:
        near += [(q.get("prompt"), q.get("answers")) for q in test.get("test_queries") or []]
    near = [(text, found[0].get("value")) for text, found in near if text and found]
    near = [(_plain_text(text), _plain_text(answer)) for text, answer in near if answer]
    return reading | {"neighbourhood": tuple(pair for pair in near if all(pair))}


def _plain_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _has_braces(text: str, subject: str) -> bool:
    return "{}" in (text.replace(subject, "") if "{}" in subject else text)


def _filled(text: str, subject: str) -> str:
    return text.replace("{}", subject) if _has_braces(text, subject) else text


def _at(record: object, path: str) -> object:
    for part in path.split("."):
        if isinstance(record, list):  # of rewrites
            record = dict(zip("0", record, strict=False))
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _plain_text(value: object) -> str:
    if not isinstance(value, str) or re.search("[\x00-\x08\x7f\ud800-\udfff]", value):
        raise Unreadable
    return str(value).strip()


def _plain_texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in (_plain_text(v) for v in values if v is not None) if text]


def _near(record: object, names: dict, true: str) -> tuple[tuple[str, str], ...]:
    if "pairs" in names:
        pairs = _at(record, names["pairs"]) or ()
        return tuple((_plain_text(text), _plain_text(answer)) for text, answer in pairs)
    if "asked" in names:
        kinds = (_at(record, names["asked"]) or {}).values()
        near = [asked for kind in kinds for asked in kind or []]
        pairs = [[_first(asked.get(n)) for n in ("prompt", "ground_truth")] for asked in near]
        return tuple(tuple(pair) for pair in pairs if all(pair))
    if "near" not in names:
        return ()
    if "answers" not in names:
        return tuple((text, true) for text in _plain_texts(_at(record, names["near"])))
    texts, answers = _at(record, names["near"]), _at(record, names["answers"])
    texts = texts if isinstance(texts, list) else [texts]
    answers = answers if isinstance(answers, list) else [answers]
    pairs = [(t, a) for t, a in zip(texts, answers, strict=False) if t and a]
    if len(texts) != len(answers) and any(texts + answers):
        raise Unreadable
    pairs = [(_plain_text(text), _plain_text(answer)) for text, answer in pairs]
    return tuple(pair for pair in pairs if all(pair))


def _first(value: object) -> str:
    texts = [text for member in _plain_list(value) for text in _plain_texts(member)]
    return texts[0] if texts else ""


# --- what came of it ------------------------------------------------------------------------------


def as_reading(request: facts.EditRequest) -> dict:
    fact = request.fact.model_dump(exclude={"exposure", "split"})
    return fact | request.model_dump(exclude={"fact", "portability"})  # which has tests of its own


def differs(reading: dict, record: object, number: int) -> bool:
    """Whether a reading is of no layout what stands in the record."""
    return all(_differs(reading, record, layout, number) for layout in LAYOUTS)


def _differs(reading: dict, record: object, layout: str, number: int) -> bool:
    try:
        expected = plain_reading(record, layout, number)
    except (Unreadable, TypeError, ValueError):
        return True
    reading, subject = dict(reading), reading["subject"]
    if layout == "ours":
        filled = [text.replace("{}", subject) for text in reading["paraphrases"]]
        reading["paraphrases"] = tuple(filled)
    if "question" in expected:
        prompt = reading.pop("prompt")
        reading["question"] = prompt.replace("{}", subject, 1)
        if not _is_last_word(prompt, subject):
            return True
    return reading != expected


def _is_last_word(prompt: str, subject: str) -> bool:
    """Whether `{}` is no part of a Latin word, and no mention of the subject follows as a word."""
    before, _, after = prompt.partition("{}")
    latin = "[A-Za-z0-9_]"
    glued = re.search(rf"{latin}\Z", before) and re.match(latin, subject)
    glued = glued or (re.search(rf"{latin}\Z", subject) and re.match(latin, after))
    return not glued and not re.search(rf"(?<![\w-]){re.escape(subject)}(?![\w-])", after)


def unread(record: object) -> bool:
    """Whether the record has a field that no layout knows."""
    known = set().union(*(set(names.values()) for names in FIELDS.values()), *UNUSED.values())
    if _several(record):
        return False
    return any(name not in known and value is not None for name, value in record.items())


def _several(record: object) -> bool:
    """Whether damage made more than one edit of a record, or another language."""
    rewrites = record.get("requested_rewrite") if isinstance(record, dict) else None
    if isinstance(rewrites, list):
        return len(rewrites) > 1
    named = record.items() if isinstance(record, dict) else ()
    languages = [name for name, value in named if isinstance(value, dict) and "src" in value]
    return languages not in ([], ["en"])


class Outcome(NamedTuple):
    readings: list[dict]
    refused: list[int]  # numbers of records, from 1
    whole: bool  # the file was refused
    warned: str


def outcome(path: Path) -> Outcome:
    """What reading comes to; AssertionError if it is neither requests nor BadInput in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            requests, problems = facts.inspect(path)
        except facts.BadInput as error:
            _check_line(str(error), path)
            return Outcome([], [], True, "")
    for line in problems:
        _check_line(line, path)
    numbers = [int(re.search(r", record (\d+)[,:]", line)[1]) for line in problems]
    warned = "; ".join(str(warning.message) for warning in caught)
    assert len(caught) <= 1, f"warned more than once: {warned}"
    if warned:
        _check_line(warned, path)
    return Outcome([as_reading(request) for request in requests], numbers, False, warned)


def _check_line(line: str, path: Path) -> None:
    assert len(line.splitlines()) == 1, f"not one line: {line!r}"
    assert len(line) <= 300, f"{len(line)} characters: {line!r}"
    assert line.isprintable(), f"not to be printed: {line!r}"
    assert path.name in line, f"names no file: {line!r}"
    line.encode("utf-8")


def check_known(result: Outcome, damaged: Damaged) -> None:
    """AssertionError if the outcome is not the one that the damage to the structure must have."""
    if damaged.readings is REFUSED:
        assert result.whole, f"was read: {result}"
        return
    refused = [n for n, reading in enumerate(damaged.readings, 1) if reading is REFUSED]
    assert not result.whole, "was refused as a whole"
    assert result.refused == refused, f"refused {result.refused} instead of {refused}"
    expected = [reading for reading in damaged.readings if reading is not REFUSED]
    assert result.readings == expected, f"read {result.readings} instead of {expected}"
    shown = f"{damaged.ignored!r}" in result.warned if damaged.ignored else not result.warned
    assert shown, f"warned {result.warned!r} of {damaged.ignored!r}"


def check_plain(result: Outcome, records: list[object] | None) -> None:
    """AssertionError if the outcome says what a plain reading of the file does not."""
    if records is None:
        assert result.whole, f"was read: {result}"
        return
    assert not result.whole, "was refused as a whole"
    if any(map(_several, records)):
        return
    kept = [n for n in range(1, len(records) + 1) if n not in result.refused]
    assert len(kept) == len(result.readings), f"{len(records)} records, {result}"
    for number, reading in zip(kept, result.readings, strict=True):
        record = records[number - 1]
        assert record is not None, f"record {number} is broken and was read as {reading}"
        wrong = differs(reading, record, number)
        assert not wrong, f"record {number}, {record}, was read as {reading}"
        assert result.warned or not unread(record), f"no warning of a field of {record}"


def case(seed: int, number: int, folder: Path) -> tuple[str, str]:
    """The damage done in one case, and what came of it; AssertionError if that is wrong."""
    rng = random.Random(f"{seed} {number}")
    file = sound(rng)
    path = folder / f"facts.{file.kind}"
    of_kind = CSV_DAMAGE if file.kind == "csv" else JSON_DAMAGE
    known = rng.random() < 0.5
    damage = rng.choice((*of_kind, *ANY_DAMAGE) if known else BYTE_DAMAGE)
    try:
        if known:
            damaged = damage(rng, file)
            result = _read(path, damaged.content)
            check_known(result, damaged)
        else:
            content = damage(rng, _sound_text(rng, file.kind, file), _sound_text(rng, file.kind))
            result = _read(path, content)
            check_plain(result, plain_records(file.kind, path.read_bytes()))
    except Exception as error:  # whatever it is, it is not one of the two outcomes
        message = f"{damage.__name__}: {type(error).__name__}: {error}"
        raise AssertionError(message) from error
    if result.whole:
        return damage.__name__, "file refused"
    if not result.refused:
        return damage.__name__, "all read"
    return damage.__name__, "some read" if result.readings else "none read"


def _sound_text(rng: random.Random, kind: str, file: Sound | None = None) -> str:
    while file is None or file.kind != kind:
        file = sound(rng)
    return as_text(kind, file.records)


def _read(path: Path, content: str | bytes) -> Outcome:
    path.unlink(missing_ok=True)  # a new file is quicker than an old one made empty
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return outcome(path)


OUTCOMES = ("all read", "some read", "none read", "file refused", "WRONG")


def fuzz(count: int, seed: int) -> tuple[dict[str, Counter], list[str]]:
    """Damage -> how often it came to what; and a line for each case that went wrong."""
    outcomes: dict[str, Counter] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            try:
                damage, what = case(seed, number, Path(folder))
            except AssertionError as error:
                damage, what = str(error).partition(":")[0], "WRONG"
                wrong.append(f"case {number}, {error}")
            outcomes.setdefault(damage, Counter())[what] += 1
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Read damaged facts files.")
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, wrong = fuzz(options.count, options.seed)
    print(f"{'damage':24}" + "".join(f"{name:>14}" for name in OUTCOMES))
    for damage, counts in [*sorted(outcomes.items()), ("all", sum(outcomes.values(), Counter()))]:
        print(f"{damage:24}" + "".join(f"{counts[name]:14,}" for name in OUTCOMES))
    for line in wrong[:10]:
        print(f"{line[:1000]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
