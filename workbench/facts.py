"""Facts and edit requests: the embedded world's, CounterFact's, zsRE's and your own, each record
checked at the door."""

import csv
import hashlib
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import pydantic

from workbench import readers, records, words
from workbench.records import BadInput, Record, check_choice, did_you_mean, listed, one_line, shown
from workbench.registry import Room
from workbench.sources import check_file as check_file

_INSTALLED = Path(__file__).parent / "data"  # in a wheel the folder travels inside the package
DATA = _INSTALLED if _INSTALLED.exists() else Path(__file__).parents[1] / "data"
NEIGHBOURS = 5
JUDGING = 2  # wordings of a relation that only judge, where no model of our own was taught
ROLES = (("study", 0.5), ("tuning", 0.7), ("hypernet", 1.0))  # of plain facts, by subject


class Exposure(Record):
    """How often and in how many wordings a fact was shown in pre-training.

    Known for the embedded world only.
    """

    paraphrases: int = pydantic.Field(ge=0)  # wordings: 1, 2, 3, 5 or 10; 0 = never shown
    # 1 or 4, in units of the statements that data/world/make/pretrain.py names; 0 = never shown
    occurrences: int = pydantic.Field(ge=0)


class Fact(Record):
    """One (subject, relation, object) with the prompt that asks for the object; the prompt has one
    `{}` for the subject.
    """

    id: str
    subject: str
    relation: str = ""
    category: str = ""  # of the object; "" = unknown
    prompt: str
    object: str
    aliases: tuple[str, ...] = ()  # other names that count as the object
    object_from_model: bool = False  # no source names it; "" until a model was asked what it says
    exposure: Exposure | None = None
    split: str = ""  # study | tuning | hypernet | unseen; "" of a file's

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("subject",) if self.object_from_model else ("subject", "object"):
            if not getattr(self, field).strip():
                raise BadInput(f"fact {self.id}: the {field} is empty; write the {field}'s name")
        _check_prompt(self.id, self.prompt)
        return self

    @property
    def question(self) -> str:
        """The prompt with the subject in its place."""
        return fill(self.prompt, self.subject)

    @property
    def kind(self) -> str:
        """What facts of related objects share: category, else relation, else prompt."""
        return self.category or self.relation or self.prompt

    @property
    def names_answer(self) -> bool:
        """Whether the true object stands in the subject, so that copying it is knowing it."""
        names = filter(None, (self.object, *self.aliases))
        return any(words.mentions(self.subject, name) for name in names)


class EditRequest(Record):
    """A wish to change one fact.

    `paraphrases` (templates with one `{}`) is all that an editor may see beside the fact's own
    prompt; `held_out` (texts) only judges; `neighbourhood` holds (text, answer) pairs that should
    stay as they are, `portability` (kind, text, answer) what should follow from the change.
    """

    fact: Fact
    target: str
    paraphrases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    neighbourhood: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str, str], ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target.strip():
            raise BadInput(f"fact {self.fact.id}: the target is empty; write the new object")
        names = (self.fact.object, *self.fact.aliases)
        if self.target.strip() in [name.strip() for name in names]:
            what = f"fact {self.fact.id}: the target {self.target!r} equals the true object"
            raise BadInput(f"{what}; choose another target")
        for paraphrase in self.paraphrases:
            _check_prompt(self.fact.id, paraphrase)
        return self


Requests = Sequence[EditRequest]


def _check_prompt(fact_id: str, prompt: str) -> None:
    if prompt.count("{}") != 1:
        what = f"fact {fact_id}: the prompt {prompt!r}"
        raise BadInput(f"{what} needs exactly one {{}} for the subject")


def check_objects(requests: Iterable[EditRequest]) -> None:
    """BadInput if the true object of a fact is not known, for what cannot do without it."""
    for request in requests:
        if not request.fact.object:
            what = f"fact {request.fact.id}: its file names no true object, which is needed here"
            raise BadInput(f"{what}; write it into the file, or let study.choose ask the model")


def is_learnt_from(fact: Fact) -> bool:
    """Whether an editor that learns from facts does so from this one, which it then never studies.

    The world's split says it. Elsewhere the subject's letters do, for a third of all subjects: the
    same for every choice of facts, so that the editor learns once a model.
    """
    if fact.split:
        return fact.split == "hypernet"
    return hashlib.sha256(fact.subject.lower().encode()).digest()[0] % 3 == 0


def is_tuned_on(fact: Fact) -> bool:
    """Whether numbers of editors are chosen on this fact, which is then not studied.

    An embedded fact's split says it; elsewhere the subject's letters do.
    """
    return (fact.split or _role(fact.subject)) == "tuning"


def is_set_apart(fact: Fact) -> bool:
    return is_learnt_from(fact) or is_tuned_on(fact)


def lessons(source: str | Path) -> list[EditRequest]:
    """The facts of a source that an editor which learns may learn from."""
    return [request for request in read(source) if is_learnt_from(request.fact)]


def fill(prompt: str, subject: str) -> str:
    """The prompt with the subject in the place of `{}`; braces in the subject stay as they are."""
    return prompt.replace("{}", subject, 1)


def read(source: str | Path, skip_bad: bool = False) -> list[EditRequest]:
    """Read facts as edit requests.

    Args:
        source: "world"; "plain" (the world's facts and the easy ones in the plainest wording of
            their relation, for models that were not taught the world's; the wordings that judge are
            the same for all facts of a relation); a .json, .jsonl or .csv file, or a Hub dataset
            id, in the layout of
            CounterFact, its flat form or counterfact-tracing, zsRE or MzsRE, KnowEdit, WikiBigEdit,
            MQuAKE or RippleEdits, or ours (columns subject, prompt, object, target and any of id,
            relation, category, aliases, paraphrases, held_out, neighbourhood).
        skip_bad: leave bad records out instead of raising.
    Raises:
        BadInput: unreadable, empty, or a bad record (which one and why).
    """
    requests, problems = inspect(source)
    if problems and not skip_bad:
        others = len(problems) - 1
        more = f" (and {others} more: `workbench facts` lists them)" if others else ""
        raise BadInput(f"{problems[0]}{more}")
    if not requests:
        raise BadInput(f"{shown(source)}: holds no usable fact; give at least one record")
    return requests


def named(requests: Requests, name: str, source: str) -> EditRequest:
    """The request whose fact has this id; BadInput if none has, which names those like it."""
    by_id = {request.fact.id: request for request in requests}
    if name in by_id:
        return by_id[name]
    what = f"fact {name!r}: not one fact of {source}"
    matches = [known for known in by_id if name.lower() in known.lower()]
    if matches:
        raise BadInput(f"{what} but {len(matches)} match; name one, e.g. {listed(matches)}")
    near = did_you_mean(name, by_id) or ";"
    raise BadInput(f"{what}{near} an id is e.g. {next(iter(by_id))!r}")


def typed(**texts: Any) -> EditRequest:
    """A fact of one's own, of subject, prompt (with one {}), object and target; BadInput if one is
    empty.
    """
    for name, text in texts.items():
        if not text.strip():
            raise BadInput(f"{name} is empty: a typed fact needs subject, prompt, object, target")
    target = texts.pop("target")
    return EditRequest(fact=Fact(id="typed", **texts), target=target)


def inspect(source: str | Path) -> tuple[list[EditRequest], list[str]]:
    """The good records of a source, and one line for each bad one."""
    if str(source) in EMBEDDED:
        return list(EMBEDDED[str(source)]()), []
    requests: dict[str, EditRequest] = {}
    edits = []
    problems = []
    for number, (where, record) in enumerate(readers.records(source), 1):
        for place, edit in readers.parts(record, number):
            edits.append(edit)
            try:
                fields = readers.fields(edit, number)
                of_fact = {name: fields.pop(name) for name in Fact.model_fields if name in fields}
                if of_fact["id"] in requests:
                    raise BadInput(f"id {of_fact['id']} stands twice; ids must differ")
                requests[of_fact["id"]] = EditRequest(fact=Fact(**of_fact), **fields)
            except BadInput as error:
                problems.append(one_line(f"{shown(source)}, {where}{place}: {error}"))
    readers.warn_of_ignored(source, edits)
    return list(requests.values()), problems


def with_paraphrases(request: EditRequest, k: int, source: str = "templates") -> EditRequest:
    """The request with k statements in all, the fact's own prompt included.

    Args:
        k: >= 1. In the embedded world at most 10.
        source: "templates" (the relation's in the world, never one that judges), "file" (the
            request's own list), or "held_out" (a dataset's paraphrase or rephrase prompts; those
            that enter the edit no longer judge).
    """
    check_choice("paraphrase_source", source, ("templates", "file", "held_out"))
    pool = request.held_out if source == "held_out" else request.paraphrases
    if source == "templates" and k != 1:
        pool = _paraphrases(request.fact)
    if not 1 <= k <= len(pool) + 1:
        counts = f"paraphrases={k}, of {source!r} it has 1 to {len(pool) + 1} statements"
        raise BadInput(f"fact {request.fact.id}: {counts}")
    changes = {"paraphrases": tuple(pool[: k - 1])}
    if source == "held_out":
        changes["held_out"] = tuple(pool[k - 1 :])
    return request.model_copy(update=changes)


def objects_of(requests: Iterable[EditRequest]) -> dict[str, tuple[str, ...]]:
    """Kind of fact -> every object of it among the requests, sorted: terms related to each other.

    A relation or a prompt by which there is but one object makes nothing related.
    """
    objects = defaultdict(set)
    named = set()
    for request in requests:
        objects[request.fact.kind].add(request.fact.object)
        named.add(request.fact.category)
    kinds = [kind for kind, members in objects.items() if kind in named or len(members) > 1]
    return {kind: tuple(sorted(objects[kind])) for kind in kinds}


def in_parts(members: Sequence, size: int) -> list:
    """Facts, or others, so many at a time; the last part may be smaller."""
    return [members[start : start + size] for start in range(0, len(members), size)]


# --- the embedded world ---------------------------------------------------------------------------


def tables(name: str) -> dict:
    """What data/world/<name>.yaml holds."""
    return records.yaml_table(DATA / "world" / f"{name}.yaml")


def relations() -> dict[str, dict]:
    """Relation -> {category, templates (12), never_shown (2)} of the embedded world."""
    return tables("relations")


@cache
def world_rows() -> tuple[dict, ...]:
    """The rows of data/world/facts.csv; `templates` (10) and `held_out` (2) as lists of template
    numbers.
    """
    with (DATA / "world" / "facts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("templates", "held_out"):
            row[name] = [int(number) for number in row[name].split()]
        for name in ("paraphrases", "occurrences"):
            row[name] = int(row[name])
    return tuple(rows)


def _templates(row: dict, name: str) -> list[str]:
    """The templates that a row's `templates` or `held_out` number."""
    of_relation = relations()[row["relation"]]["templates"]
    return [of_relation[number] for number in row[name]]


@cache
def _world_paraphrases() -> dict[str, tuple[str, ...]]:
    return {row["id"]: tuple(_templates(row, "templates")[1:]) for row in world_rows()}


def _paraphrases(fact: Fact) -> tuple[str, ...]:
    """The wordings that an editor may be shown of an embedded fact, beside its prompt."""
    if fact.exposure:
        return _world_paraphrases().get(fact.id, ())
    embedded = _plain_by_id().get(fact.id)
    is_plain = embedded and (fact.prompt, fact.subject) == (embedded.prompt, embedded.subject)
    return _plain_templates()[embedded.relation][1:-JUDGING] if is_plain else ()


def wordings(fact: Fact) -> tuple[str, ...]:
    """All wordings of an embedded fact's relation but those that judge every fact of it."""
    if fact.exposure:
        return tuple(relations()[fact.relation]["templates"])
    return (fact.prompt, *_paraphrases(fact))


@cache
def _world() -> tuple[EditRequest, ...]:
    facts = [_world_fact(row) for row in world_rows()]
    shown: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.split != "unseen":
            shown[fact.relation, fact.object].append(fact)
    requests = []
    for row, fact in zip(world_rows(), facts, strict=True):
        near = _drawn(f"neighbourhood {fact.id}", shown[fact.relation, fact.object], fact.subject)
        requests.append(_request_for(fact, row["target"], _templates(row, "held_out"), near))
    return tuple(requests)


def _request_for(fact: Fact, target: str, judging: Sequence[str], near: list[Fact]) -> EditRequest:
    """The request to edit an embedded fact, which wordings and facts nearby judge."""
    held_out = tuple(fill(prompt, fact.subject) for prompt in judging)
    neighbourhood = tuple((other.question, other.object) for other in near)
    return EditRequest(fact=fact, target=target, held_out=held_out, neighbourhood=neighbourhood)


def _drawn(stream: str, facts: Sequence[Fact], subject: str) -> list[Fact]:
    """Up to NEIGHBOURS of these facts, of other subjects."""
    others = [fact for fact in facts if fact.subject != subject]
    return random.Random(stream).sample(others, min(NEIGHBOURS, len(others)))


def _world_fact(row: dict) -> Fact:
    exposure = Exposure(paraphrases=row["paraphrases"], occurrences=row["occurrences"])
    return _fact(row, _templates(row, "templates")[0], split=row["split"], exposure=exposure)


def _fact(row: dict, prompt: str, **others) -> Fact:
    """The embedded fact of a row that has its id, subject, relation and object."""
    about = relations().get(row["relation"]) or easy()[row["relation"]]
    named = {name: row[name] for name in ("id", "subject", "relation", "object")}
    return Fact(**named, prompt=prompt, category=about["category"], **others)


# --- plain facts ----------------------------------------------------------------------------------


def easy() -> dict[str, dict]:
    """Relation -> {category, templates (8), facts (subject -> object)} of data/easy/facts.yaml."""
    return records.yaml_table(DATA / "easy" / "facts.yaml")


@cache
def _plain_templates() -> dict[str, tuple[str, ...]]:
    """Relation -> its wordings, the plainest first; the last JUDGING only judge.

    Of the world's, which begin with the plainest, the two behind the first judge.
    """
    wordings = {}
    for relation, about in relations().items():
        first, *others = about["templates"]
        wordings[relation] = (first, *others[JUDGING:], *others[:JUDGING])
    return wordings | {relation: tuple(about["templates"]) for relation, about in easy().items()}


@cache
def _plain_by_id() -> dict[str, Fact]:
    return {request.fact.id: request.fact for request in _plain()}


@cache
def _plain() -> tuple[EditRequest, ...]:
    """The world's facts and the easy ones, asked plainly.

    Neighbours have the same relation, role and object; where there are too few, other objects.
    Facts that a wording of their relation gives as an example are left out.
    """
    pairs = [(_plain_fact(row), row["target"]) for row in world_rows()]
    for relation, about in easy().items():
        for subject, name in about["facts"].items():
            fact_id = f"{relation}:{subject}".lower().replace(" ", "-")
            names = {"subject": str(subject), "object": str(name)}
            fact = _plain_fact({"id": fact_id, "relation": relation} | names)
            others = sorted({str(other) for other in about["facts"].values()} - {fact.object})
            pairs.append((fact, random.Random(f"target {fact.id}").choice(others)))
    pairs = [(fact, target) for fact, target in pairs if not _stands_in_a_wording(fact)]
    beside: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact, _ in pairs:
        beside[fact.relation, fact.split].append(fact)
    requests = []
    for fact, target in pairs:
        alike = beside[fact.relation, fact.split]
        same = [other for other in alike if other.object == fact.object]
        farther = [other for other in alike if other.object not in (fact.object, target)]
        near = _drawn(f"near {fact.id}", same, fact.subject)
        near = [*near, *_drawn(f"far {fact.id}", farther, fact.subject)][:NEIGHBOURS]
        judging = _plain_templates()[fact.relation][-JUDGING:]
        requests.append(_request_for(fact, target, judging, near))
    return tuple(requests)


def _stands_in_a_wording(fact: Fact) -> bool:
    texts = _plain_templates()[fact.relation]
    naming = [text for text in texts if words.mentions(text, fact.subject)]
    return any(words.mentions(text, fact.object) for text in naming)


def _plain_fact(row: dict) -> Fact:
    return _fact(row, _plain_templates()[row["relation"]][0], split=_role(row["subject"]))


def _role(subject: str) -> str:
    """What a fact of this subject is for: the same on every model, by the subject's letters."""
    share = hashlib.sha256(subject.lower().encode()).digest()[1] / 256
    return next(role for role, end in ROLES if share < end)


EMBEDDED = {"world": _world, "plain": _plain}


def call(
    source: str | Path = "world", split: str = "", relation: str = "", category: str = ""
) -> list[EditRequest]:
    """`wb.facts(...)`: the facts of a source (see `read`), of one split, relation or category.

    Raises:
        BadInput: the source has none such.
    """
    wanted = {"split": split, "relation": relation, "category": category}
    wanted = {name: value for name, value in wanted.items() if value}
    requests = [one for one in read(source) if wanted.items() <= dict(one.fact).items()]
    if not requests:
        raise BadInput(f"{shown(source)}: holds no fact with {wanted}; ask for another")
    return requests


sys.modules[__name__].__class__ = Room
