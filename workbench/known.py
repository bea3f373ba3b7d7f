"""Which facts a model knows, and which of them are edited and which only watched."""

import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from tqdm.auto import tqdm

from workbench import cache, facts, runs
from workbench.checkpoints import is_world
from workbench.editing import EDITORS
from workbench.facts import BadInput, EditRequest
from workbench.models import Model
from workbench.positions import front
from workbench.records import one_line
from workbench.spec import Spec, code_fingerprint
from workbench.tracking.categories import first_tokens
from workbench.tracking.retention import measure, measure_prompts, said_words, stop_words

Requests = list[EditRequest]
Related = dict[str, tuple[str, ...]]  # kind of fact -> its objects

PART = 64  # facts asked before it is seen whether the split needs more
ASKED_A_FACT = 100  # facts of the pool that may be asked for one that is wanted


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The facts of an experiment, and the data table: how sure the unedited model is of them.

    `known`: one row a group: n, candidates known, mean p(true), mean p(second), `shared_first`
    (facts whose answers the first token does not tell apart; columns that go by it leave them out),
    `left_out` (facts of the source whose subject names the answer).
    `edited` holds the `harmless` ones, spread among the false ones; their object is what the
    unedited model says, their target the truth.
    """

    edited: Requests
    intrinsic: Requests
    known: pd.DataFrame
    related: Related
    harmless: tuple[str, ...] = ()


def choose(spec: Spec, model: Model, edited: Sequence[EditRequest] = ()) -> Chosen:
    """Edited and intrinsic facts, both known to the unedited model: the true token on top by
    `spec.margin`.

    The choice depends on the seed, the numbers and the split rule, never on editor or plan; but an
    editor that learns from these facts is refused where the others go on to those that it needs. A
    fact named or typed, or given as `edited`, is edited even if the model does not know it; the
    data table then says so.
    """
    runs.progress("choosing facts")
    requests = facts.read(spec.source)
    related = facts.objects_of(requests)
    given = list(edited)
    named = given or _named(spec, model, requests)
    n_harmless = 0 if named else round(spec.harmless * spec.n_edited)
    n_edited = 0 if named else spec.n_edited - n_harmless

    pool = _pool(spec, requests, purpose="choice", split="study")
    counts, edited, intrinsic = _chosen(spec, model, pool, named, n_edited)
    harmless = _harmless(spec, model, requests, edited, intrinsic, n_harmless)
    unnamed = sum(request.fact.object_from_model for request in (*edited, *intrinsic))
    if unnamed:
        what = f"no source names the true object of {unnamed} chosen facts"
        warnings.warn(f"{what}; it is what the unedited model says", stacklevel=2)

    stated = partial(facts.with_paraphrases, k=spec.paraphrases, source=spec.paraphrase_source)
    edited = given or [stated(request) for request in _spread(edited, harmless)]
    if not spec.answer_in_subject:
        counts["left_out"] = sum(request.fact.names_answer for request in requests)
    groups = {"edited": edited, "intrinsic": intrinsic}
    if harmless:
        groups["harmless edits"] = harmless
    table = _data_table(model, groups, related, spec.margin).assign(**counts)
    ids = tuple(request.fact.id for request in harmless)
    return Chosen(edited=edited, intrinsic=intrinsic, known=table, related=related, harmless=ids)


def _named(spec: Spec, model: Model, requests: Requests) -> Requests:
    """The one fact that the experiment names or types; none if it takes a sample."""
    if spec.subject or spec.prompt or spec.target:
        fields = spec.model_dump(include={"subject", "prompt", "object", "target"})
        named = facts.typed(**fields)
    elif spec.fact:
        named = facts.named(requests, spec.fact, spec.facts)
    else:
        return []
    if spec.harmless:
        raise BadInput("harmless is a share of a sample, but one fact is named; leave one out")
    filled, problems = with_objects(model, [named])
    if problems:
        raise BadInput(problems[0])
    return filled


def _data_table(
    model: Model, groups: Mapping[str, Requests], related: Related, margin: float
) -> pd.DataFrame:
    """The rows of `Chosen.known`."""
    ambiguous = _ambiguous(model, [*groups["edited"], *groups["intrinsic"]], related)
    rows = []
    for group, members in groups.items():
        asked = known_table(model, members, margin)
        row = {"group": group, "n": len(members), "known": int(asked.known.sum())}
        row |= {"p_true": asked.p.mean(), "p_second": asked.p_second.mean()}
        rows.append(row | {"shared_first": len(ambiguous.intersection(asked.fact_id))})
    return pd.DataFrame(rows)


def _ambiguous(model: Model, requests: Requests, related: Related) -> set[str]:
    """Ids of the facts whose answers the first token does not tell apart."""
    questions = [request.fact.question for request in requests]
    objects = [request.fact.object for request in requests]
    targets = [request.target for request in requests]
    others = [related.get(request.fact.kind, ()) for request in requests]
    clear = first_tokens(model, questions, objects, targets, others).clear
    return {request.fact.id for request, sure in zip(requests, clear, strict=True) if not sure}


def _pool(spec: Spec, requests: Requests, purpose: str, split: str) -> Requests:
    """The facts of a split in the order in which they are asked.

    Those from which editors learn, and on which their numbers are chosen, come last; where this
    editor learns, what it learns from is left out.
    """
    pool = [request for request in requests if request.fact.split in ("", split)]
    if not spec.answer_in_subject:
        pool = [request for request in pool if not request.fact.names_answer]
    random.Random(f"{purpose} {spec.seed}").shuffle(pool)
    if _learns_from(spec):
        pool = [request for request in pool if not facts.is_learnt_from(request.fact)]
    return sorted(pool, key=lambda request: facts.is_set_apart(request.fact))


def _learns_from(spec: Spec) -> bool:
    """Whether the editor learns, and from `spec.facts`."""
    return bool(EDITORS[spec.editor].LEARNS) and not is_world(spec.model)


def _chosen(
    spec: Spec, model: Model, pool: Requests, named: Requests, n_edited: int
) -> tuple[dict[str, int], Requests, Requests]:
    """How many were asked and are known; edited and intrinsic facts.

    The pool is asked in its order until the split is found; asking more would not change it.
    """
    if not pool:
        raise BadInput(f"facts {spec.facts!r}: holds none that may be edited")
    n_asked = 0
    known: Requests = []
    # beside a named fact any relation will do
    for_each = ASKED_A_FACT // 4 if named else ASKED_A_FACT
    most = min(len(pool), for_each * (n_edited + spec.n_intrinsic + 10))
    for part in _parts(pool[:most], "choosing facts"):
        part, _ = with_objects(model, part)
        n_asked += len(part)
        known += known_of(model, part, spec.margin)
        sample, intrinsic = _split(spec, named, known, n_edited)
        if len(sample) == n_edited and len(intrinsic) == spec.n_intrinsic:
            counts = {"asked": n_asked, "known_of_asked": len(known)}
            return counts, [*named, *sample], intrinsic
    kept = f"; {spec.editor} learns from a third of the facts" if _learns_from(spec) else ""
    what = f"{len(named) + len(sample)} edited of {n_edited} and {len(intrinsic)} intrinsic of"
    what += f" {spec.n_intrinsic} by split_rule={spec.split_rule!r}; lower n_edited or n_intrinsic"
    extent = f"{most} of {len(pool)} facts asked, {len(known)} known by margin {spec.margin}{kept}"
    raise BadInput(f"the model knows too few facts: {what}; {extent}")


def _split(spec: Spec, named: Requests, known: Requests, n_edited: int) -> tuple[Requests, ...]:
    """Take a sample to edit and intrinsic facts from the known ones in their order.

    "matched": both groups draw on the same relations, no subject twice. "paper": no two facts of
    different groups share a subject, relation or object.
    """
    sample = _first(known, n_edited, _subjects(named))
    edited = [*named, *sample]
    relations = {request.fact.relation for request in edited}
    objects = {name for request in edited for name in (request.fact.object, request.target)}
    if spec.split_rule == "paper":
        fitting = _apart(known, relations, objects)
    elif named:
        fitting = known
    else:
        fitting = [request for request in known if request.fact.relation in relations]
    return sample, _first(fitting, spec.n_intrinsic, _subjects(edited))


def _first(requests: Requests, count: int, taken: Collection[str]) -> Requests:
    """The first so many requests of other subjects than those taken, no subject twice."""
    by_subject: dict[str, EditRequest] = {}
    for request in requests:
        if request.fact.subject not in taken:
            by_subject.setdefault(request.fact.subject, request)
    return list(by_subject.values())[:count]


def _subjects(requests: Requests) -> set[str]:
    return {request.fact.subject for request in requests}


def _apart(requests: Requests, relations: Collection[str], objects: Collection[str]) -> Requests:
    """Those with none of these relations and objects."""
    others = [request for request in requests if request.fact.relation not in relations]
    return [request for request in others if request.fact.object not in objects]


def _harmless(
    spec: Spec, model: Model, requests: Requests, edited: Requests, intrinsic: Requests, count: int
) -> Requests:
    """Facts that the model gets wrong, as wishes to put them right; none shares a subject with
    another one chosen.

    They have no neighbourhood: its facts have the target for their own object, so that an edit that
    spills over would look kept there.
    """
    if not count:
        return []
    requests = [request for request in requests if request.fact.object]  # else nothing is wrong
    objects: set[str] = set()
    if spec.split_rule == "paper":
        objects = {request.fact.object for request in intrinsic}
        requests = _apart(requests, {request.fact.relation for request in intrinsic}, objects)
    pool = _pool(spec, requests, purpose="harmless", split="unseen")
    pool = pool or _pool(spec, requests, purpose="harmless", split="study")  # no model was taught
    most = min(len(pool), ASKED_A_FACT * (count + 10))
    wrong: Requests = []
    harmless: Requests = []
    for part in _parts(pool[:most], "facts that it gets wrong"):
        retained = _answers(model, part, past_stop_words=True).retained
        answers = said_words(model, [request.fact.question for request in part])
        for request, right, answer in zip(part, retained, answers, strict=True):
            if not right and _is_name(answer) and answer not in objects:
                changes = {"target": request.fact.object, "neighbourhood": ()}
                wrong.append(_with_object(request, answer, **changes))
        harmless = _first(wrong, count, _subjects([*edited, *intrinsic]))
        if len(harmless) == count:
            return harmless
    what = f"the model gets only {len(harmless)} facts wrong that could be put right"
    raise BadInput(f"{what}, {count} are asked for; lower harmless or n_edited")


def _is_name(word: str) -> bool:
    return len(word) > 3 and word.isalpha() and word.lower() not in stop_words()


def _with_object(request: EditRequest, name: str, **changes) -> EditRequest:
    fact = request.fact.model_copy(update={"object": name})
    return request.model_copy(update={"fact": fact, **changes})


def _spread(requests: Requests, others: Requests) -> Requests:
    """Both evenly mixed, so that every edited model holds its share of either."""
    places: list[tuple[float, EditRequest]] = []
    for group in (requests, others):
        places += [(number / len(group), request) for number, request in enumerate(group)]
    return [request for _, request in sorted(places, key=lambda place: place[0])]


def with_objects(model: Model, requests: Requests) -> tuple[Requests, list[str]]:
    """The requests with what the model says in the place of each true object that no source names.

    Left out, with a line for each, is one where the model says no word or the target already.
    """
    unknown = [request for request in requests if not request.fact.object]
    if not unknown:
        return list(requests), []
    questions = [request.fact.question for request in unknown]
    is_target = measure(model, unknown).retained
    answers = said_words(model, questions)
    filled, problems = {}, []
    for request, answer, same in zip(unknown, answers, is_target, strict=True):
        where = f"fact {request.fact.id}: no source names its true object, and the model says"
        if same:
            problems.append(one_line(f"{where} the target {request.target!r} already"))
        elif not any(map(str.isalnum, answer)):
            problems.append(one_line(f"{where} no word, {answer!r}; write it into the file"))
        else:
            filled[request.fact.id] = _with_object(request, answer)
    requests = [filled.get(request.fact.id, request) for request in requests]
    return [request for request in requests if request.fact.object], problems


def known_table(model: Model, requests: Requests, margin: float = 0.1) -> pd.DataFrame:
    """What the model says of each fact.

    Returns:
        DataFrame[fact_id, prompt, object, says, known, p, p_second], one row a fact: `says` is the
        likeliest token; `p` is of the whole true answer, which is `known` if it is said at once and
        each of its tokens leads by `margin`; `p_second` is of the second likeliest first token.
    """
    size = max(PART, len(requests) // 20)  # larger parts need less padding
    parts = [_answers(model, part) for part in _parts(requests, "asking facts", size)]
    answers = pd.concat(parts, ignore_index=True) if parts else measure_prompts(model, [], [])
    asked = [(request.fact.id, request.fact.question, request.fact.object) for request in requests]
    table = pd.DataFrame(asked, columns=["fact_id", "prompt", "object"])
    table["says"] = answers.top_token
    table["known"] = answers.top_is_expected & (answers.margin >= margin)
    return table.join(answers[["p", "p_second"]])


def known_of(model: Model, requests: Requests, margin: float = 0.1) -> Requests:
    """Those of the facts that the model knows, see `known_table`."""
    known = known_table(model, requests, margin).known
    return [request for request, good in zip(requests, known, strict=True) if good]


def _parts(requests: Requests, what: str, size: int = PART) -> Iterator[Requests]:
    """A few requests at a time; more than one such part has a bar."""
    hidden = True if len(requests) <= size else None
    with tqdm(total=len(requests), desc=what, unit="fact", disable=hidden) as bar:
        try:
            for part in facts.in_parts(requests, size):
                yield part
                bar.update(len(part))
        finally:
            bar.total = bar.n  # what was enough is all: a bar that is left short turns red


def _answers(model: Model, requests: Requests, past_stop_words: bool = False) -> pd.DataFrame:
    """What the model says, a row a request; these very weights are asked a prompt once."""
    questions = [request.fact.question for request in requests]
    objects = [request.fact.object for request in requests]
    ask = partial(measure_prompts, model, past_stop_words=past_stop_words)
    if model.is_changed():
        return ask(questions, objects)
    machine = [model.fingerprint, str(model.dtype), model.device.type]
    digest = cache.digest([*machine, front(model), code_fingerprint(), past_stop_words])
    name = f"known {digest}"
    path = cache.folder("known") / f"{digest}.safetensors"
    keys = _keys(model, questions, objects)
    with cache.locked(name):
        table = cache.kept_table(path, name)
        stored = set() if table is None else set(table.key)
        missing = {key: row for row, key in enumerate(keys) if key not in stored}
        if missing:
            rows = missing.values()
            new = ask([questions[row] for row in rows], [objects[row] for row in rows])
            new.insert(0, "key", list(missing))
            table = pd.concat([table, new], ignore_index=True)
            cache.keep_table(path, table, name)
    return table.set_index("key").loc[keys].reset_index(drop=True)


def _keys(model: Model, questions: Sequence[str], objects: Sequence[str]) -> list[str]:
    """What tells one question from another: its words and their tokens."""
    tokens = model.tokenizer([*questions, *objects])["input_ids"]
    of_questions, of_objects = tokens[: len(questions)], tokens[len(questions) :]
    parts = zip(questions, objects, of_questions, of_objects, strict=True)
    return [cache.digest(part) for part in parts]
