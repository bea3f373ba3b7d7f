import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.layouts import as_json
from workbench import deltas, editing, facts, known, runs, study
from workbench.editing import EDITORS
from workbench.facts import BadInput
from workbench.known import known_table
from workbench.study import Spec
from workbench.tracking.probes import questions
from workbench.tracking.retention import measure, measure_prompts
from workbench.tuning import tasks
from workbench.tuning.tasks import Data


def test_the_choice_depends_on_seed_and_numbers_only(base):
    def ids(**changes):
        chosen = study.choose(Spec(**({"n_edited": 5, "n_intrinsic": 8} | changes)), base)
        return [
            [request.fact.id for request in group] for group in (chosen.edited, chosen.intrinsic)
        ]

    first = ids()
    assert ids(editor="ft", plan="edited", max_steps=7) == first
    assert ids(seed=1) != first
    assert len(set(first[0] + first[1])) == 13


def test_matched_groups_share_relations_and_no_subject(base):
    chosen = study.choose(Spec(n_edited=8, n_intrinsic=12), base)
    relations = {request.fact.relation for request in chosen.edited}
    assert {request.fact.relation for request in chosen.intrinsic} <= relations
    subjects = [request.fact.subject for request in chosen.edited + chosen.intrinsic]
    assert len(set(subjects)) == len(subjects)


def test_the_papers_rule_shares_no_subject_relation_or_object(base):
    chosen = study.choose(Spec(n_edited=4, n_intrinsic=8, split_rule="paper"), base)
    for name in ("subject", "relation", "object"):
        edited, intrinsic = (
            {getattr(request.fact, name) for request in group}
            for group in (chosen.edited, chosen.intrinsic)
        )
        assert not edited & intrinsic, name


def test_chosen_facts_are_known_by_the_margin_and_are_study_facts(base):
    chosen = study.choose(Spec(n_edited=6, n_intrinsic=6), base)
    table = study.known_table(base, chosen.edited + chosen.intrinsic)
    assert table.known.all()
    assert ((table.p - table.p_second) >= 0.1).all()
    assert {request.fact.split for request in chosen.edited + chosen.intrinsic} == {"study"}
    assert chosen.known.set_index("group").loc["edited", "p_true"] == pytest.approx(
        table.p[:6].mean()
    )


def without_objects(requests) -> list[dict]:
    """The records of a file that does not say what is true."""
    texts = [(request.fact.subject, request.fact.question, request.target) for request in requests]
    return [{"subject": s, "update": question, "ans": target} for s, question, target in texts]


def test_an_object_that_no_source_names_is_what_the_model_says(base, tmp_path):
    known = study.choose(Spec(n_edited=4, n_intrinsic=4), base)
    asked = known.edited + known.intrinsic
    path = as_json(tmp_path, *without_objects(asked))
    with pytest.warns(UserWarning, match="no source names the true object of 4 chosen facts"):
        chosen = study.choose(Spec(facts=str(path), n_edited=2, n_intrinsic=2), base)
    true = {request.fact.subject: request.fact.object for request in asked}
    for request in chosen.edited + chosen.intrinsic:
        assert request.fact.object_from_model
        assert request.fact.object
        assert true[request.fact.subject].startswith(request.fact.object)
    table = study.known_table(base, chosen.edited)
    assert table.known.all()


def test_what_the_model_says_cannot_be_put_right(base, tmp_path):
    known = study.choose(Spec(n_edited=6, n_intrinsic=6), base)
    path = as_json(tmp_path, *without_objects(known.edited + known.intrinsic))
    spec = Spec(facts=str(path), n_edited=4, n_intrinsic=2, harmless=0.5)
    with pytest.raises(BadInput, match="the model gets only 0 facts wrong"):
        study.choose(spec, base)


def test_what_the_model_says_already_is_no_target(base, tmp_path):
    request = study.choose(Spec(n_edited=1, n_intrinsic=1), base).edited[0]
    (record,) = without_objects([request])
    path = as_json(tmp_path, record | {"ans": request.fact.object})
    requests, problems = study.with_objects(base, facts.read(path))
    assert requests == []
    assert f"the model says the target {request.fact.object!r} already" in problems[0]
    with pytest.raises(BadInput, match="already"):
        study.choose(Spec(facts=str(path), fact="1", n_edited=1, n_intrinsic=1), base)


def test_what_needs_the_true_object_says_so(base, tmp_path):
    asked = facts.read(as_json(tmp_path, *without_objects(facts.read("world")[:30])))
    hparams = editing.preset("malmen", base)
    data = Data(n_train=2, n_valid=2, source=str(tmp_path / "facts.json"))
    needs = [
        lambda: measure(base, asked, against="object"),
        lambda: questions(asked, []),
        lambda: questions([], asked),
        lambda: editing.EDITORS["malmen"].prepare(base, hparams, "world", asked),
        lambda: tasks.TASKS["facts"](base, data),
    ]
    for need in needs:
        with pytest.raises(BadInput, match="fact 1: its file names no true object, which is"):
            need()
    assert len(measure(base, asked[:2])) == 2


def test_paraphrases_reach_the_editor(base):
    chosen = study.choose(Spec(n_edited=2, n_intrinsic=2, paraphrases=5), base)
    assert [len(request.paraphrases) for request in chosen.edited] == [4, 4]


def test_a_typed_fact_is_edited(base):
    spec = Spec(
        subject="Windows Mobile 6.5",
        prompt="{} was developed by",
        object="Microsoft",
        target="Apple",
        n_intrinsic=2,
    )
    chosen = study.choose(spec, base)
    assert [request.target for request in chosen.edited] == ["Apple"]
    assert len(chosen.intrinsic) == 2


def test_more_facts_than_are_known_is_one_clear_line(base, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(n_edited=5000, n_intrinsic=5), base)
    assert "knows too few" in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fact": "no-such-fact"}, "no-such-fact"),
        ({"fact": "author:anna-karenin"}, "but 1 match; name one, e.g. author:anna-karenina"),
        ({"fact": "author:anna-karrenina"}, "did you mean 'author:anna-karenina'?"),
        ({"prompt": "no braces", "subject": "a", "object": "b", "target": "c"}, "exactly one {}"),
        ({"subject": "a"}, "prompt is empty"),
        ({"fact": "author:anna-karenina", "harmless": 0.5}, "harmless is a share of a sample"),
        ({"prompt": "{} is", "subject": " ", "object": "b", "target": "c"}, "subject is empty"),
        (
            {"prompt": "{} is", "subject": "a", "object": "b", "target": "b"},
            "equals the true object",
        ),
        ({"facts": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_bad_choice_of_facts_is_one_clear_line(base, fields, named, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(**fields), base)
    assert named in one_line(error)


def test_what_a_model_knows_is_asked_once_and_again_once_its_weights_are_others(
    base, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    asked = []

    def counted(model, questions, objects, **kwargs):
        asked.append(questions)
        return measure_prompts(model, questions, objects, **kwargs)

    monkeypatch.setattr(known, "measure_prompts", counted)
    requests = facts.read("world")[:7]
    first, second = (study.known_table(base, requests) for _ in range(2))
    assert first.equals(second)
    assert len(asked) == 1
    more = [*reversed(requests), *facts.read("world")[7:9]]
    assert study.known_table(base, more).fact_id.tolist() == [each.fact.id for each in more]
    assert asked.pop() == [each.fact.question for each in more[7:]]  # no other list asks again
    with deltas.preserved(base.network), torch.no_grad():
        base.weight(0).mul_(-1)
        other = study.known_table(base, requests)
        assert not other.p.equals(first.p)
    assert study.known_table(base, requests).equals(first)
    assert len(asked) == 2
    for path in (tmp_path / "known").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert study.known_table(base, requests).equals(first)
    assert len(asked) == 3


def test_what_the_model_says_inside_is_not_kept_as_what_it_knows(tiny, context, requests):
    before = known_table(tiny, requests[:3])
    statements = context.statements[:1]
    with deltas.applied(tiny, dataclasses.replace(context, statements=statements, scope="all")):
        inside = known_table(tiny, requests[:3])
    assert not inside.p.equals(before.p)
    assert known_table(tiny, requests[:3]).p.equals(before.p)


def test_harmless_edits_obey_the_papers_split_and_have_no_neighbourhood(base):
    chosen = study.choose(Spec(n_edited=12, harmless=0.5, n_intrinsic=20, split_rule="paper"), base)
    watched = {
        thing for each in chosen.intrinsic for thing in (each.fact.relation, each.fact.object)
    }
    for each in chosen.edited:
        assert not {each.fact.relation, each.fact.object, each.target} & watched
    assert len(chosen.harmless) == 6
    assert not any(each.neighbourhood for each in chosen.edited if each.fact.id in chosen.harmless)
    assert any(each.neighbourhood for each in chosen.edited)


def test_malmen_does_not_learn_on_a_fact_under_study(base, monkeypatch):
    learnt = []
    monkeypatch.setattr(
        EDITORS["malmen"],
        "prepare",
        lambda model, hparams, corpus, requests, seed: learnt.extend(requests),
    )
    spec = Spec(fact="animal_kind:anaconda", editor="malmen", n_intrinsic=2)
    chosen = study.choose(spec, base)
    study.prepare(spec, base, chosen)
    assert {each.fact.split for each in learnt} == {"hypernet"}
    assert chosen.edited[0].fact.subject not in {each.fact.subject for each in learnt}


def a_users_file(folder: Path, size: int) -> str:
    """Facts that no split sets apart, about half of them known to the world's models."""
    requests = [
        request for request in facts.read("world") if request.fact.split in ("study", "unseen")
    ]
    requests = requests[:: len(requests) // size]
    names = ("subject", "prompt", "object", "relation")
    records = [
        {name: getattr(each.fact, name) for name in names} | {"target": each.target}
        for each in requests
    ]
    return str(as_json(folder, *records))


def test_of_a_users_facts_malmen_learns_from_the_same_whatever_is_chosen(
    base, tmp_path, monkeypatch
):
    """So that it learns once a model; and never from a fact that is chosen."""
    monkeypatch.setattr(
        EDITORS["malmen"], "prepare", lambda model, hparams, corpus, requests, seed: requests
    )
    monkeypatch.setattr(known, "PART", 24)  # asked at once: no more than it takes
    path = a_users_file(tmp_path, 300)
    numbers = {
        "model": "of-a-user",
        "facts": path,
        "n_edited": 4,
        "n_intrinsic": 4,
        "harmless": 0.5,
    }
    learnt, subjects = [], []
    for seed in range(2):
        spec = Spec(**numbers, editor="malmen", seed=seed)
        chosen = study.choose(spec, base)
        learnt.append(study.prepare(spec, base, chosen)[1])
        subjects.append(
            {request.fact.subject.lower() for request in (*chosen.edited, *chosen.intrinsic)}
        )
    others = study.choose(Spec(**numbers, editor="memit", seed=1), base)
    assert (others.edited, others.intrinsic) == (chosen.edited, chosen.intrinsic)
    assert learnt[0] == learnt[1]
    assert subjects[0] != subjects[1]
    assert 80 < len(learnt[0]) < 120
    assert not {request.fact.subject.lower() for request in learnt[0]} & set.union(*subjects)


def test_a_users_fact_edited_by_name_is_not_learnt_from(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        EDITORS["malmen"], "prepare", lambda model, hparams, corpus, requests, seed: requests
    )
    path = a_users_file(tmp_path, 100)
    named = next(request.fact for request in facts.read(path) if facts.is_learnt_from(request.fact))
    spec = Spec(model="of-a-user", facts=path, fact=named.id, editor="malmen", n_intrinsic=2)
    learnt = study.prepare(spec, base, study.choose(spec, base))[1]
    assert len(learnt) > 20
    assert named.subject not in {request.fact.subject for request in learnt}


def test_too_few_facts_beside_those_that_malmen_learns_from_is_one_clear_line(
    base, tmp_path, one_line
):
    path = a_users_file(tmp_path, 90)
    numbers = {"model": "of-a-user", "facts": path, "n_edited": 28, "n_intrinsic": 3, "margin": 0.0}
    study.choose(Spec(**numbers, editor="memit"), base)  # finds enough
    with pytest.raises(BadInput) as error:
        study.choose(Spec(**numbers, editor="malmen"), base)
    assert "malmen learns from a third of the facts" in one_line(error)
    assert len(one_line(error)) <= 300


def test_harmless_edits_put_right_what_the_model_gets_wrong(base, tmp_path):
    spec = Spec(
        editor="ft",
        n_edited=5,
        harmless=0.4,
        n_intrinsic=2,
        edits_per_model=5,
        max_steps=1,
        eval_every=1,
        task="facts",
    ).resolved()
    chosen = study.choose(spec, base)
    assert len(chosen.edited) == 5
    assert len(chosen.harmless) == 2
    harmless = [request for request in chosen.edited if request.fact.id in chosen.harmless]
    truth = {request.fact.id: request.fact.object for request in facts.read("world")}
    assert [request.target for request in harmless] == [
        truth[request.fact.id] for request in harmless
    ]
    found = measure_prompts(
        base,
        [request.fact.question for request in harmless],
        [request.target for request in harmless],
    )
    assert not found.retained.any()
    assert found.top_token.tolist() == [request.fact.object for request in harmless]
    assert [request.fact.id in chosen.harmless for request in chosen.edited].index(
        True
    ) < 2  # spread, so that every edited model has some
    false = study.choose(spec.model_copy(update={"n_edited": 3, "harmless": 0}), base).edited
    assert [request.fact.id for request in false] == [
        request.fact.id for request in chosen.edited if request.fact.id not in chosen.harmless
    ]
    done = study.run(spec, base, out=tmp_path)
    assert set(done.about["harmless"]) == set(chosen.harmless)
    seeds = pd.DataFrame([{"seed": 0}])
    ids = {
        kind: set(runs.series([done], [f"{kind} edit success"], seeds).fact_id)
        for kind in ("false", "harmless")
    }
    assert ids["harmless"] == set(chosen.harmless)
    assert ids["harmless"] | ids["false"] == {request.fact.id for request in chosen.edited}
    assert not ids["harmless"] & ids["false"]


@pytest.mark.slow
def test_more_harmless_edits_than_facts_that_are_wrong_is_one_clear_line(base, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(n_edited=4000, harmless=0.9995, n_intrinsic=2), base)
    assert "facts wrong that could be put right, 3998 are asked for" in one_line(error)


def test_asking_is_bounded_and_ends_as_soon_as_the_split_is_found(base, monkeypatch, one_line):
    asked = []

    def nothing_known(model, requests, margin):
        asked.extend(requests)
        return known_table(model, requests, margin).assign(known=knows)

    known_table = study.known_table
    monkeypatch.setattr(known, "known_table", nothing_known)
    monkeypatch.setattr(known, "ASKED_A_FACT", 8)
    typed = {
        "subject": "Windows Mobile 6.5",
        "prompt": "{} was developed by",
        "object": "Microsoft",
    }
    spec = Spec(**typed, target="Apple", n_intrinsic=30)
    knows = True
    named = known._named(spec, base, [])
    assert len(known._chosen(spec, base, facts.read("world"), named, 0)[2]) == 30
    assert len(asked) <= known.PART
    asked.clear()
    knows = False
    with pytest.raises(BadInput) as error:
        known._chosen(spec, base, facts.read("world"), named, 0)
    assert len(asked) == 2 * (30 + 10)
    assert f"80 of {len(facts.read('world'))} facts asked, 0 known" in one_line(error)


def test_as_many_facts_are_asked_as_the_split_needs(base):
    """One relation alone, and known facts of it lie far apart."""
    for seed in range(6):
        chosen = study.choose(Spec(n_edited=1, n_intrinsic=8, seed=seed), base)
        assert len(chosen.intrinsic) == 8
        assert {request.fact.relation for request in chosen.intrinsic} == {
            chosen.edited[0].fact.relation
        }
