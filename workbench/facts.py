"""Facts and edit requests: the embedded world's, CounterFact's, zsRE's and your own, each record checked at the door."""

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Self

import pydantic
import yaml


def _data_folder() -> Path:
    installed = Path(__file__).parent / "data"  # in a wheel the folder travels inside the package
    return installed if installed.exists() else Path(__file__).parents[1] / "data"


FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # ending -> what `datasets` calls it
DATA = _data_folder()
NEIGHBOURS = 5


class BadInput(ValueError):
    """What a person gave cannot be used. The message is one line: what, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


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
            known = ", ".join(type(self).model_fields) if first["type"] == "extra_forbidden" else ""
            what = f"unknown field, known are: {known}" if known else f"{first['msg'].lower()}, got {first.get('input')!r:.80}"
            raise BadInput(f"{type(self).__name__}.{where}: {what}") from None


class Exposure(Record):
    """How often and in how many wordings a fact was shown in pre-training. Known for the embedded world only."""

    paraphrases: int = pydantic.Field(ge=0)  # wordings: 1, 2, 3, 5 or 10; 0 = never shown
    occurrences: int = pydantic.Field(ge=0)  # 1 or 4, in units of the statements that world.pretrain.RECIPES names; 0 = never shown


class Fact(Record):
    """One (subject, relation, object) with the prompt that asks for the object; the prompt has one `{}` for the subject."""

    id: str
    subject: str
    relation: str = ""
    category: str = ""  # of the object; "" = unknown
    prompt: str
    object: str
    exposure: Exposure | None = None
    split: str = ""  # study | tuning | hypernet | unseen; "" outside the world

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("subject", "object"):
            if not getattr(self, name).strip():
                raise BadInput(f"fact {self.id}: the {name} is empty; write the {name}'s name")
        _check_prompt(self.id, self.prompt)
        return self

    @property
    def question(self) -> str:
        """The prompt with the subject in its place."""
        return fill(self.prompt, self.subject)


class EditRequest(Record):
    """A wish to change one fact.

    `paraphrases` (templates with one `{}`) is all that an editor may see beside the fact's own prompt; `held_out` (texts) only
    judges; `neighbourhood` holds (text, answer) pairs that should stay as they are.
    """

    fact: Fact
    target: str
    paraphrases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    neighbourhood: tuple[tuple[str, str], ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target.strip():
            raise BadInput(f"fact {self.fact.id}: the target is empty; write the new object")
        if self.target.strip() == self.fact.object.strip():
            raise BadInput(f"fact {self.fact.id}: the target {self.target!r} equals the true object; choose another target")
        for paraphrase in self.paraphrases:
            _check_prompt(self.fact.id, paraphrase)
        return self


def _check_prompt(fact_id: str, prompt: str) -> None:
    if prompt.count("{}") != 1:
        raise BadInput(f"fact {fact_id}: the prompt {prompt!r} needs exactly one {{}} for the subject, it has {prompt.count('{}')}")


def fill(prompt: str, subject: str) -> str:
    """The prompt with the subject in the place of `{}`; braces in the subject stay as they are."""
    return prompt.replace("{}", subject, 1)


def read(source: str | Path, skip_bad: bool = False) -> list[EditRequest]:
    """Read facts as edit requests.

    Args:
        source: "world", a .json, .jsonl or .csv file, or a Hub dataset id, in CounterFact's layout, its flat form, zsRE's, or ours
            (columns subject, prompt, object, target and any of id, relation, category, paraphrases, held_out, neighbourhood).
        skip_bad: leave bad records out instead of raising.
    Raises:
        BadInput: unreadable, empty, or a bad record (which one and why).
    """
    if str(source) == "world":
        return list(_world())
    requests, problems = inspect(source)
    if problems and not skip_bad:
        more = f" (and {len(problems) - 1} more: `workbench facts {source}` lists them)" if len(problems) > 1 else ""
        raise BadInput(f"{problems[0]}{more}")
    if not requests:
        raise BadInput(f"{source}: holds no usable fact; give at least one record")
    return requests


def inspect(source: str | Path) -> tuple[list[EditRequest], list[str]]:
    """The good records of a source, and one line for each bad one."""
    if str(source) == "world":
        return list(_world()), []
    requests: dict[str, EditRequest] = {}
    problems = []
    for number, record in enumerate(_records(source)):
        try:
            request = _request(record, number)
            if request.fact.id in requests:
                raise BadInput(f"id {request.fact.id} stands twice; ids must differ")
            requests[request.fact.id] = request
        except BadInput as error:
            problems.append(f"{source}, record {number}: {error}")
    return list(requests.values()), problems


def with_paraphrases(request: EditRequest, k: int, source: str = "templates") -> EditRequest:
    """The request with k statements in all, the fact's own prompt included.

    Args:
        k: >= 1. In the embedded world at most 10.
        source: "templates" (the relation's in the world, never one that judges), "file" (the request's own list), or "held_out" (a
            dataset's paraphrase or rephrase prompts; those that enter the edit no longer judge).
    """
    if source not in ("templates", "file", "held_out"):
        raise BadInput(f"paraphrase_source {source!r}: choose templates, file or held_out")
    pool = request.held_out if source == "held_out" else request.paraphrases
    if source == "templates" and k != 1:
        pool = _world_paraphrases().get(request.fact.id, ())
    if k < 1 or k - 1 > len(pool):
        raise BadInput(f"fact {request.fact.id}: paraphrases={k}, but with source {source!r} it has 1 to {len(pool) + 1} statements")
    rest = {"held_out": tuple(pool[k - 1 :])} if source == "held_out" else {}
    return request.model_copy(update={"paraphrases": tuple(pool[: k - 1])} | rest)


def objects_of(requests: Iterable[EditRequest]) -> dict[str, tuple[str, ...]]:
    """Category -> every object of it among the requests, sorted: the terms related to each other."""
    found = defaultdict(set)
    for request in requests:
        if request.fact.category:
            found[request.fact.category].add(request.fact.object)
    return {category: tuple(sorted(objects)) for category, objects in found.items()}


# --- the embedded world -------------------------------------------------------------------------------------------------


@cache
def relations() -> dict[str, dict]:
    """Relation -> {category, templates (12), never_shown (2)} of the embedded world."""
    return yaml.safe_load((DATA / "world" / "relations.yaml").read_text(encoding="utf-8"))


@cache
def world_rows() -> tuple[dict, ...]:
    """The rows of data/world/facts.csv; `templates` (10) and `held_out` (2) as lists of template numbers."""
    with (DATA / "world" / "facts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("templates", "held_out"):
            row[name] = [int(number) for number in row[name].split()]
        row["paraphrases"], row["occurrences"] = int(row["paraphrases"]), int(row["occurrences"])
    return tuple(rows)


@cache
def _world_paraphrases() -> dict[str, tuple[str, ...]]:
    return {row["id"]: tuple(relations()[row["relation"]]["templates"][n] for n in row["templates"][1:]) for row in world_rows()}


@cache
def _world() -> tuple[EditRequest, ...]:
    facts, sharing = {}, defaultdict(list)
    for row in world_rows():
        relation = relations()[row["relation"]]
        facts[row["id"]] = fact = Fact(
            id=row["id"],
            subject=row["subject"],
            relation=row["relation"],
            category=relation["category"],
            prompt=relation["templates"][row["templates"][0]],
            object=row["object"],
            exposure=Exposure(paraphrases=row["paraphrases"], occurrences=row["occurrences"]),
            split=row["split"],
        )
        if fact.split != "unseen":
            sharing[fact.relation, fact.object].append(fact)
    requests = []
    for row in world_rows():
        fact = facts[row["id"]]
        others = [other for other in sharing[fact.relation, fact.object] if other.subject != fact.subject]
        near = random.Random(f"neighbourhood {fact.id}").sample(others, min(NEIGHBOURS, len(others)))
        templates = relations()[fact.relation]["templates"]
        requests.append(
            EditRequest(
                fact=fact,
                target=row["target"],
                held_out=tuple(fill(templates[number], fact.subject) for number in row["held_out"]),
                neighbourhood=tuple((other.question, other.object) for other in near),
            )
        )
    return tuple(requests)


# --- files --------------------------------------------------------------------------------------------------------------


def _records(source: str | Path) -> list[dict]:
    path = Path(source)
    if not path.exists():
        return _hub_records(str(source))
    if path.is_dir():
        raise BadInput(f"{source}: is a folder; give a .json, .jsonl or .csv file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            records = [_csv_record(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
        elif path.suffix == ".jsonl":
            records = [_json(source, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        elif path.suffix == ".json":
            records = _json(source, text) if text.strip() else []
        else:
            raise BadInput(f"{source}: the ending {path.suffix!r} is not known; use .json, .jsonl or .csv")
    except csv.Error as error:
        raise BadInput(f"{source}: broken CSV: {error}; look for a quote that is left open") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{source}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not isinstance(records, list):
        records = [records]
    if not records:
        raise BadInput(f"{source}: is empty; give at least one record")
    return records


def _json(source: str | Path, text: str, line: int = 1):
    """The value of a JSON text that begins at this line of the source."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise BadInput(f"{source}: broken JSON at {where}: {error.msg}; mend the file there") from None


def _csv_record(row: dict) -> dict:
    record = {name: value for name, value in row.items() if name and value not in (None, "")}
    for name in ("paraphrases", "held_out"):  # several in one cell are set apart by |
        if name in record:
            record[name] = [part.strip() for part in record[name].split("|")]
    return record


def check_file(source: str, what: str) -> None:
    """BadInput if a source is named as a file is, and nothing is there."""
    if (Path(source).suffix in FILES or source.startswith((".", "/", "~"))) and not Path(source).exists():
        raise BadInput(f"{what} {source!r}: no such file; give a path that counts from here, or a Hub dataset id (owner/name)")


def _hub_records(name: str) -> list[dict]:
    check_file(name, "facts")
    if name.count("/") != 1:
        raise BadInput(f"facts {name!r}: no such file; give 'world', a path or a Hub dataset id (owner/name)")
    import datasets

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:
        raise BadInput(f"facts {name!r}: no such file, and not to be had as a Hub dataset ({type(error).__name__}); check name and network") from None


def _request(record: dict, number: int) -> EditRequest:
    if not isinstance(record, dict):
        raise BadInput(f"is a {type(record).__name__}, not an object with named fields")
    for marker, reader in _LAYOUTS.items():
        if marker in record:
            return reader({name: value for name, value in record.items() if value is not None}, number)
    raise BadInput(f"no known layout; it has {sorted(record)!r:.120}, ours needs subject, prompt, object, target")


def _field(record: dict, name: str) -> str:
    value = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        raise BadInput(f"the field {name!r} is missing")
    if isinstance(value, list | dict):
        raise BadInput(f"the field {name!r} must be a text, got {value!r:.80}")
    return str(value).strip()


def _column(value) -> list[str]:
    """Strings of an optional field that may be null, one string or a list; "" for a null."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [str(text).strip() if text else "" for text in values]


def _texts(value) -> tuple[str, ...]:
    """The strings of an optional field that hold something."""
    return tuple(filter(None, _column(value)))


def _template(text: str, subject: str) -> str:
    """The text with its last mention of the subject made `{}`."""
    start = text.rfind(subject)
    if start < 0 or not subject:
        raise BadInput(f"the subject {subject!r} does not stand in the prompt {text!r:.120}; write it there")
    return f"{text[:start]}{{}}{text[start + len(subject) :]}"


def _counterfact(record: dict, number: int) -> EditRequest:
    rewrite = "requested_rewrite."
    true = _field(record, rewrite + "target_true.str")
    fact = Fact(
        id=str(record.get("case_id", number)),
        subject=_field(record, rewrite + "subject"),
        relation=str(record["requested_rewrite"].get("relation_id") or ""),
        prompt=_field(record, rewrite + "prompt"),
        object=true,
    )
    near = tuple((text, true) for text in _texts(record.get("neighborhood_prompts")))
    held_out = _texts(record.get("paraphrase_prompts"))
    return EditRequest(fact=fact, target=_field(record, rewrite + "target_new.str"), held_out=held_out, neighbourhood=near)


def _question_layout(prompt: str, target: str, object: str, rephrase: str, near: str, answer: str) -> Callable[[dict, int], EditRequest]:
    """A reader for the flat layouts, which differ in the names of their fields only."""

    def reader(record: dict, number: int) -> EditRequest:
        subject = _field(record, "subject")
        objects = _texts(record.get(object)) or (_field(record, object),)
        fact = Fact(
            id=str(record.get("case_id", number)),
            subject=subject,
            relation=str(record.get("relation_id") or ""),
            prompt=_template(_field(record, prompt), subject),
            object=objects[0],
        )
        pairs = tuple(pair for pair in zip(_column(record.get(near)), _column(record.get(answer)), strict=False) if all(pair))
        return EditRequest(fact=fact, target=_field(record, target), held_out=_texts(record.get(rephrase)), neighbourhood=pairs)

    return reader


def _own(record: dict, number: int) -> EditRequest:
    subject, prompt = _field(record, "subject"), _field(record, "prompt")
    fact = Fact(
        id=str(record.get("id", number)),
        subject=subject,
        relation=str(record.get("relation") or ""),
        category=str(record.get("category") or ""),
        prompt=prompt if "{}" in prompt else _template(prompt, subject),
        object=_field(record, "object"),
    )
    return EditRequest(
        fact=fact,
        target=_field(record, "target"),
        paraphrases=tuple(text if "{}" in text else _template(text, subject) for text in _texts(record.get("paraphrases"))),
        held_out=tuple(fill(text, subject) for text in _texts(record.get("held_out"))),
        neighbourhood=record.get("neighbourhood", ()),
    )


_flat = _question_layout("prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
_zsre = _question_layout("src", "alt", "answers", "rephrase", "loc", "loc_ans")
_LAYOUTS = {  # a field that only this layout has -> its reader; the first found decides
    "requested_rewrite": _counterfact,
    "target_new": _flat,
    "alt": _zsre,
    "object": _own,
    "target": _own,
    "ground_truth": _flat,
    "answers": _zsre,
    "src": _zsre,
    "subject": _own,
}
