"""Which facts a model knows, and which of them are edited and which only watched."""

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from workbench import cache, facts, runs
from workbench.cache import locked
from workbench.facts import BadInput, EditRequest
from workbench.models import Model
from workbench.records import one_line
from workbench.spec import Spec, code_fingerprint
from workbench.tracking.retention import measure_prompts, stop_words


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The facts of an experiment, and the data table: how sure the unedited model is of them.

    `known`: one row a group: n, candidates known, mean p(true), mean p(second). `edited` holds the `harmless` ones, spread among the
    false ones; their object is what the unedited model says, their target the truth.
    """

    edited: list[EditRequest]
    intrinsic: list[EditRequest]
    known: pd.DataFrame
    related: dict[str, tuple[str, ...]]
    harmless: tuple[str, ...] = ()


def choose(spec: Spec, model: Model) -> Chosen:
    """Edited and intrinsic facts, both known to the unedited model: the true token on top by `spec.margin`.

    The choice depends on the seed, the numbers and the split rule, never on editor or plan. A fact named or typed is edited even if
    the model does not know it; the data table then says so.
    """
    runs.progress("choosing facts")
    requests = facts.read(spec.facts)
    related = facts.objects_of(requests)
    named = [_typed(spec)] if spec.subject or spec.prompt or spec.target else []
    if spec.fact and not named:
        named = [request for request in requests if request.fact.id == spec.fact]
        if not named:
            raise BadInput(f"fact {spec.fact!r}: no such id in {spec.facts}; an id is e.g. {requests[0].fact.id!r}")
    named, silent = with_objects(model, named)
    if silent:
        raise BadInput(silent[0])
    pool = [request for request in requests if request.fact.split in ("", "study")]
    random.Random(f"choice {spec.seed}").shuffle(pool)
    n_harmless = 0 if named else round(spec.harmless * spec.n_edited)
    n_edited = 0 if named else spec.n_edited - n_harmless
    scores, edited, intrinsic = _chosen(spec, model, pool, named, n_edited)
    harmless = _harmless(spec, model, requests, edited, intrinsic, n_harmless)
    unnamed = sum(request.fact.object_from_model for request in (*edited, *intrinsic))
    if unnamed:
        what = f"no source names the true object of {unnamed} chosen facts"
        warnings.warn(f"{what}; it is what the unedited model says", stacklevel=2)
    edited = _spread(edited, harmless)
    edited = [facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source) for request in edited]
    asked, known = len(scores), int(scores.known.sum())
    if named or harmless:
        scores = pd.concat([scores, known_table(model, named or harmless, spec.margin)], ignore_index=True)
    rows = []
    for group, members in (("edited", edited), ("intrinsic", intrinsic), ("harmless edits", harmless)):
        if group == "harmless edits" and not harmless:
            continue
        part = scores[scores.fact_id.isin([request.fact.id for request in members])].drop_duplicates("fact_id", keep="last")
        rows.append({"group": group, "n": len(members), "known": int(part.known.sum()), "p_true": part.p.mean(), "p_second": part.p_second.mean()})
    table = pd.DataFrame(rows).assign(asked=asked, known_of_asked=known)
    ids = tuple(request.fact.id for request in harmless)
    return Chosen(edited=edited, intrinsic=intrinsic, known=table, related=related, harmless=ids)


def _harmless(
    spec: Spec, model: Model, requests: Sequence[EditRequest], edited: Sequence[EditRequest], intrinsic: Sequence[EditRequest], count: int
) -> list[EditRequest]:
    """Facts that the model gets wrong, as wishes to put them right; none shares a subject with another one chosen.

    They have no neighbourhood: its facts have the target for their own object, so that an edit that spills over would look kept there.
    """
    if not count:
        return []
    subjects, found = {request.fact.subject for request in (*edited, *intrinsic)}, []
    relations, objects = ({getattr(request.fact, name) for request in intrinsic} for name in ("relation", "object"))
    pool = [request for request in requests if request.fact.split in ("", "unseen")]
    pool = [request for request in pool if request.fact.object]  # what it says is never wrong
    if spec.split_rule == "paper":
        pool = [request for request in pool if request.fact.relation not in relations and request.fact.object not in objects]
    random.Random(f"harmless {spec.seed}").shuffle(pool)
    for start in range(0, len(pool), 256):
        part = pool[start : start + 256]
        told = measure_prompts(model, [request.fact.question for request in part], [request.fact.object for request in part])
        for request, right, said in zip(part, told.retained, told.top_token, strict=True):
            free = request.fact.subject not in subjects and len(found) < count and (spec.split_rule == "matched" or said not in objects)
            if not right and free and len(said) > 3 and said.isalpha() and said.lower() not in stop_words():
                fact = request.fact.model_copy(update={"object": said})
                found.append(request.model_copy(update={"fact": fact, "target": request.fact.object, "neighbourhood": ()}))
                subjects.add(request.fact.subject)
        if len(found) == count:
            return found
    raise BadInput(f"the model gets only {len(found)} facts wrong that could be put right, {count} are asked for; lower harmless or n_edited")


def _spread(some: Sequence[EditRequest], others: Sequence[EditRequest]) -> list[EditRequest]:
    """Both evenly mixed, so that every edited model holds its share of either."""
    places = [(number / len(group), group is others, request) for group in (some, others) for number, request in enumerate(group)]
    return [request for *_, request in sorted(places, key=lambda place: place[:2])]


def _typed(spec: Spec) -> EditRequest:
    for name in ("subject", "prompt", "object", "target"):
        if not getattr(spec, name).strip():
            raise BadInput(f"{name} is empty: a typed fact needs subject, prompt (with one {{}}), object and target")
    fact = facts.Fact(id="typed", subject=spec.subject, prompt=spec.prompt, object=spec.object)
    return EditRequest(fact=fact, target=spec.target)


def with_objects(
    model: Model,
    requests: Sequence[EditRequest],
) -> tuple[list[EditRequest], list[str]]:
    """The requests with what the model says in the place of each true object that no source names.

    Left out, with a line for each, is one where the model says no word or the target already.
    """
    unknown = [request for request in requests if not request.fact.object]
    if not unknown:
        return list(requests), []
    questions = [request.fact.question for request in unknown]
    table = measure_prompts(model, questions, [request.target for request in unknown])
    said, problems = {}, []
    for request, word, is_target in zip(unknown, table.top_token, table.retained, strict=True):
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
    """One row a fact: fact_id, known (the true token is on top by `margin`), p (of the true token), p_second."""
    table = _answers(model, [request.fact.question for request in requests], [request.fact.object for request in requests])
    return pd.DataFrame(
        {
            "fact_id": [request.fact.id for request in requests],
            "known": table.top_is_expected & (table.margin >= margin),
            "p": table.p,
            "p_second": table.p_second,
        }
    )


def _answers(model: Model, questions: list[str], objects: list[str]) -> pd.DataFrame:
    """What the model says, from the cache if these very weights have been asked the same before."""
    if model.is_changed():
        return measure_prompts(model, questions, objects)
    tokens = model.tokenizer([*questions, *objects])["input_ids"] if questions else []
    about = [model.fingerprint, str(model.dtype), model.device.type, questions, objects, tokens, code_fingerprint()]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    with locked(f"known {digest}"):
        path = cache.folder("known") / f"{digest}.parquet"
        table = cache.kept_table(path, f"known {digest}")
        if table is None:
            table = measure_prompts(model, questions, objects)
            cache.keep_table(path, table, f"known {digest}")
        return table


def _chosen(spec: Spec, model: Model, pool: Sequence[EditRequest], named: list[EditRequest], n_edited: int) -> tuple[pd.DataFrame, list, list]:
    """Scores of those asked, edited and intrinsic facts; as much of the pool is asked as the split needs."""
    problem = BadInput(f"facts {spec.facts!r}: holds none that may be edited")
    for scores, known in _known(model, pool, spec.margin, wanted=4 * (n_edited + spec.n_intrinsic) + 40):
        try:
            return scores, *_split(named, known, n_edited, spec.n_intrinsic, spec.split_rule)
        except BadInput as error:
            problem = error
    raise problem


def _known(model: Model, pool: Sequence[EditRequest], margin: float, wanted: int) -> Iterator[tuple[pd.DataFrame, list[EditRequest]]]:
    """Ask the pool in its order: what was found once so many facts are known, then again and again with more of the pool, to its end."""
    parts: list[pd.DataFrame] = []
    known: list[EditRequest] = []
    for start in range(0, len(pool), 256):
        part, _ = with_objects(model, pool[start : start + 256])
        parts.append(known_table(model, part, margin))
        known += [request for request, good in zip(part, parts[-1].known, strict=True) if good]
        if len(known) >= wanted or start + 256 >= len(pool):
            yield pd.concat(parts, ignore_index=True), known


def _split(named: list[EditRequest], known: list[EditRequest], n_edited: int, n_intrinsic: int, rule: str) -> tuple[list, list]:
    """Take edited and intrinsic facts from the known ones in their order.

    "matched": both groups draw on the same relations, no subject twice. "paper": no two facts of different groups share a subject,
    relation or object.
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
