"""Which facts a model knows, and which of them are edited and which only watched."""

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from tqdm.auto import tqdm

from workbench import cache, facts, runs
from workbench.cache import locked
from workbench.checkpoints import WORLD_MODELS
from workbench.editing import EDITORS
from workbench.facts import BadInput, EditRequest
from workbench.models import Model
from workbench.positions import front
from workbench.records import one_line
from workbench.spec import Spec, code_fingerprint
from workbench.tracking.categories import first_tokens
from workbench.tracking.retention import measure_prompts, said_words, stop_words

PART = 64  # facts asked before it is seen whether the split needs more
ASKED_A_FACT = 100  # facts of the pool that may be asked for one that is wanted


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The facts of an experiment, and the data table: how sure the unedited model is of them.

    `known`: one row a group: n, candidates known, mean p(true), mean p(second), `shared_first`
    (facts whose answers the first token does not tell apart; columns that go by it leave them out).
    `edited` holds the `harmless` ones, spread among the false ones; their object is what the
    unedited model says, their target the truth.
    """

    edited: list[EditRequest]
    intrinsic: list[EditRequest]
    known: pd.DataFrame
    related: dict[str, tuple[str, ...]]
    harmless: tuple[str, ...] = ()


def choose(spec: Spec, model: Model, edited: Sequence[EditRequest] = ()) -> Chosen:
    """Edited and intrinsic facts, both known to the unedited model: the true token on top by
    `spec.margin`.

    The choice depends on the seed, the numbers and the split rule, never on editor or plan; but an
    editor that learns from these facts is refused where the others go on to those that it needs. A
    fact named or typed, or given as `edited`, is edited even if the model does not know it; the data
    table then says so.
    """
    runs.progress("choosing facts")
    requests = facts.read(spec.facts)
    related = facts.objects_of(requests)
    given = tuple(edited)
    named = list(given)
    if spec.subject or spec.prompt or spec.target:
        named = [_typed(spec)]
    if spec.fact and not named:
        named = [request for request in requests if request.fact.id == spec.fact]
        if not named:
            ids = [request.fact.id for request in requests]
            matches = [name for name in ids if spec.fact.lower() in name.lower()]
            raise facts.no_such_fact(spec.fact, ids, matches, spec.facts)
    if named and spec.harmless:
        raise BadInput(
            "harmless is a share of a sample, but one fact is named; leave one of them out"
        )
    named, silent = with_objects(model, named)
    if silent:
        raise BadInput(silent[0])
    pool = [request for request in requests if request.fact.split in ("", "study")]
    random.Random(f"choice {spec.seed}").shuffle(pool)
    pool = _studied(spec, pool)
    n_harmless = 0 if named else round(spec.harmless * spec.n_edited)
    n_edited = 0 if named else spec.n_edited - n_harmless
    scores, edited, intrinsic = _chosen(spec, model, pool, named, n_edited)
    harmless = _harmless(spec, model, requests, edited, intrinsic, n_harmless)
    unnamed = sum(request.fact.object_from_model for request in (*edited, *intrinsic))
    if unnamed:
        what = f"no source names the true object of {unnamed} chosen facts"
        warnings.warn(f"{what}; it is what the unedited model says", stacklevel=2)
    edited = _spread(edited, harmless)
    edited = list(given) or [
        facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source)
        for request in edited
    ]
    asked, known = len(scores), int(scores.known.sum())
    if named or harmless:
        scores = pd.concat(
            [scores, known_table(model, named or harmless, spec.margin)], ignore_index=True
        )
    rows = []
    ambiguous = _ambiguous(model, [*edited, *intrinsic, *harmless], related)
    for group, members in (
        ("edited", edited),
        ("intrinsic", intrinsic),
        ("harmless edits", harmless),
    ):
        if group == "harmless edits" and not harmless:
            continue
        part = scores[
            scores.fact_id.isin([request.fact.id for request in members])
        ].drop_duplicates("fact_id", keep="last")
        rows.append(
            {
                "group": group,
                "n": len(members),
                "known": int(part.known.sum()),
                "p_true": part.p.mean(),
                "p_second": part.p_second.mean(),
                "shared_first": sum(request.fact.id in ambiguous for request in members),
            }
        )
    table = pd.DataFrame(rows).assign(asked=asked, known_of_asked=known)
    ids = tuple(request.fact.id for request in harmless)
    return Chosen(edited=edited, intrinsic=intrinsic, known=table, related=related, harmless=ids)


def _ambiguous(
    model: Model, requests: Sequence[EditRequest], related: dict[str, tuple[str, ...]]
) -> set[str]:
    """Ids of the facts whose answers the first token does not tell apart."""
    questions, objects = (
        [request.fact.question for request in requests],
        [request.fact.object for request in requests],
    )
    others = [related.get(request.fact.category, ()) for request in requests]
    first = first_tokens(
        model, questions, objects, [request.target for request in requests], others
    )
    return {
        request.fact.id for request, clear in zip(requests, first.clear, strict=True) if not clear
    }


def _harmless(
    spec: Spec,
    model: Model,
    requests: Sequence[EditRequest],
    edited: Sequence[EditRequest],
    intrinsic: Sequence[EditRequest],
    count: int,
) -> list[EditRequest]:
    """Facts that the model gets wrong, as wishes to put them right; none shares a subject with
    another one chosen.

    They have no neighbourhood: its facts have the target for their own object, so that an edit that
    spills over would look kept there.
    """
    if not count:
        return []
    subjects, found = {request.fact.subject for request in (*edited, *intrinsic)}, []
    relations, objects = (
        {getattr(request.fact, name) for request in intrinsic} for name in ("relation", "object")
    )
    pool = [request for request in requests if request.fact.split in ("", "unseen")]
    pool = [request for request in pool if request.fact.object]  # what it says is never wrong
    if spec.split_rule == "paper":
        pool = [
            request
            for request in pool
            if request.fact.relation not in relations and request.fact.object not in objects
        ]
    random.Random(f"harmless {spec.seed}").shuffle(pool)
    pool = _studied(spec, pool)
    most = min(len(pool), ASKED_A_FACT * (count + 10))
    for part in _parts(pool[:most], "facts that it gets wrong"):
        retained = _answers(model, part, past_stop_words=True).retained
        words = said_words(model, [request.fact.question for request in part])
        for request, right, said in zip(part, retained, words, strict=True):
            free = (
                request.fact.subject not in subjects
                and len(found) < count
                and (spec.split_rule == "matched" or said not in objects)
            )
            if (
                not right
                and free
                and len(said) > 3
                and said.isalpha()
                and said.lower() not in stop_words()
            ):
                fact = request.fact.model_copy(update={"object": said})
                found.append(
                    request.model_copy(
                        update={"fact": fact, "target": request.fact.object, "neighbourhood": ()}
                    )
                )
                subjects.add(request.fact.subject)
        if len(found) == count:
            return found
    raise BadInput(
        f"the model gets only {len(found)} facts wrong that could be put right, {count} are asked for; lower harmless or n_edited"
    )


def _spread(some: Sequence[EditRequest], others: Sequence[EditRequest]) -> list[EditRequest]:
    """Both evenly mixed, so that every edited model holds its share of either."""
    places = [
        (number / len(group), group is others, request)
        for group in (some, others)
        for number, request in enumerate(group)
    ]
    return [request for *_, request in sorted(places, key=lambda place: place[:2])]


def _typed(spec: Spec) -> EditRequest:
    for name in ("subject", "prompt", "object", "target"):
        if not getattr(spec, name).strip():
            raise BadInput(
                f"{name} is empty: a typed fact needs subject, prompt (with one {{}}), object and target"
            )
    fact = facts.Fact(id="typed", subject=spec.subject, prompt=spec.prompt, object=spec.object)
    return EditRequest(fact=fact, target=spec.target)


def with_objects(
    model: Model, requests: Sequence[EditRequest]
) -> tuple[list[EditRequest], list[str]]:
    """The requests with what the model says in the place of each true object that no source names.

    Left out, with a line for each, is one where the model says no word or the target already.
    """
    unknown = [request for request in requests if not request.fact.object]
    if not unknown:
        return list(requests), []
    questions = [request.fact.question for request in unknown]
    targets = measure_prompts(model, questions, [request.target for request in unknown]).retained
    said, problems = {}, []
    for request, word, is_target in zip(
        unknown, said_words(model, questions), targets, strict=True
    ):
        where = f"fact {request.fact.id}: no source names its true object, and the model says"
        if is_target:
            problems.append(one_line(f"{where} the target {request.target!r} already"))
        elif not any(map(str.isalnum, word)):
            problems.append(one_line(f"{where} no word, {word!r}; write the object into the file"))
        else:
            said[request.fact.id] = word
    filled = []
    for request in requests:
        if not request.fact.object and request.fact.id in said:
            fact = request.fact.model_copy(update={"object": said[request.fact.id]})
            request = request.model_copy(update={"fact": fact})
        filled.append(request)
    return [request for request in filled if request.fact.object], problems


def known_table(model: Model, requests: Sequence[EditRequest], margin: float = 0.1) -> pd.DataFrame:
    """What the model says of each fact.

    Returns:
        DataFrame[fact_id, prompt, object, says, known, p, p_second], one row a fact: `says` is the
        likeliest token; `p` is of the whole true answer, which is `known` if it is said at once and
        each of its tokens leads by `margin`; `p_second` is of the second likeliest first token.
    """
    size = max(PART, len(requests) // 20)  # larger parts need less padding
    parts = [_answers(model, part) for part in _parts(requests, "asking facts", size)]
    table = pd.concat(parts, ignore_index=True) if parts else measure_prompts(model, [], [])
    return pd.DataFrame(
        {
            "fact_id": [request.fact.id for request in requests],
            "prompt": [request.fact.question for request in requests],
            "object": [request.fact.object for request in requests],
            "says": table.top_token,
            "known": table.top_is_expected & (table.margin >= margin),
            "p": table.p,
            "p_second": table.p_second,
        }
    )


def _parts(
    requests: Sequence[EditRequest], what: str, size: int = PART
) -> Iterator[Sequence[EditRequest]]:
    """A few requests at a time; more than one such part has a bar."""
    disable = None if len(requests) > size else True
    with tqdm(total=len(requests), desc=what, unit="fact", disable=disable) as bar:
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            yield part
            bar.update(len(part))


def _answers(
    model: Model, requests: Sequence[EditRequest], past_stop_words: bool = False
) -> pd.DataFrame:
    """What the model says, a row a request; these very weights are asked a prompt once."""
    questions = [request.fact.question for request in requests]
    objects = [request.fact.object for request in requests]
    ask = partial(measure_prompts, model, past_stop_words=past_stop_words)
    if model.is_changed():
        return ask(questions, objects)
    at = [
        model.fingerprint,
        str(model.dtype),
        model.device.type,
        front(model),
        code_fingerprint(),
        past_stop_words,
    ]
    name = f"known {_digest(at)}"
    keys = _keys(model, questions, objects)
    path = cache.folder("known") / f"{_digest(at)}.parquet"
    with locked(name):
        table = cache.kept_table(path, name)
        asked = set() if table is None else set(table.key)
        missing = {key: row for row, key in enumerate(keys) if key not in asked}
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
    return [_digest(part) for part in parts]


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _chosen(
    spec: Spec, model: Model, pool: Sequence[EditRequest], named: list[EditRequest], n_edited: int
) -> tuple[pd.DataFrame, list, list]:
    """Scores of those asked, edited and intrinsic facts.

    The pool is asked in its order until the split is found; asking more would not change it.
    """
    if not pool:
        raise BadInput(f"facts {spec.facts!r}: holds none that may be edited")
    scores: list[pd.DataFrame] = []
    known: list[EditRequest] = []
    problem = None
    each = ASKED_A_FACT // 4 if named else ASKED_A_FACT  # beside a named fact any relation will do
    most = min(len(pool), each * (n_edited + spec.n_intrinsic + 10))
    for part in _parts(pool[:most], "choosing facts"):
        part, _ = with_objects(model, part)
        scores.append(known_table(model, part, spec.margin))
        known += [request for request, good in zip(part, scores[-1].known, strict=True) if good]
        try:
            edited, intrinsic = _split(named, known, n_edited, spec.n_intrinsic, spec.split_rule)
        except BadInput as error:
            problem = error
            continue
        return pd.concat(scores, ignore_index=True), edited, intrinsic
    asked = f"{most} of {len(pool)} facts asked, {len(known)} known by margin {spec.margin}"
    kept = f"; {spec.editor} learns from a third of the facts" if _learns_from(spec) else ""
    raise BadInput(f"{problem}; {asked}{kept}")


def _learns_from(spec: Spec) -> bool:
    """Whether the editor learns, and from `spec.facts`."""
    return bool(EDITORS[spec.editor].LEARNS) and spec.model not in WORLD_MODELS


def _studied(spec: Spec, pool: Sequence[EditRequest]) -> list[EditRequest]:
    """The pool with the facts from which editors learn last; without them where this one does."""
    last = [request for request in pool if facts.is_learnt_from(request.fact)]
    first = [request for request in pool if not facts.is_learnt_from(request.fact)]
    return first if _learns_from(spec) else first + last


def _split(
    named: list[EditRequest], known: list[EditRequest], n_edited: int, n_intrinsic: int, rule: str
) -> tuple[list, list]:
    """Take edited and intrinsic facts from the known ones in their order.

    "matched": both groups draw on the same relations, no subject twice. "paper": no two facts of
    different groups share a subject, relation or object.
    """
    edited, taken = list(named), {request.fact.subject for request in named}
    for request in known:
        if len(edited) - len(named) == n_edited:
            break
        if request.fact.subject not in taken:
            edited.append(request)
            taken.add(request.fact.subject)
    relations = {request.fact.relation for request in edited}
    objects = {thing for request in edited for thing in (request.fact.object, request.target)}

    def fits(request: EditRequest) -> bool:
        if request.fact.subject in taken:
            return False
        if rule == "matched":
            return bool(named) or request.fact.relation in relations
        return request.fact.relation not in relations and request.fact.object not in objects

    intrinsic = []
    for request in known:
        if len(intrinsic) < n_intrinsic and fits(request):
            intrinsic.append(request)
            taken.add(request.fact.subject)
    if len(edited) - len(named) < n_edited or len(intrinsic) < n_intrinsic:
        raise BadInput(
            f"the model knows too few facts: {len(edited)} edited of {n_edited} and {len(intrinsic)} intrinsic of {n_intrinsic} by "
            f"split_rule={rule!r}; lower n_edited or n_intrinsic"
        )
    return edited, intrinsic
