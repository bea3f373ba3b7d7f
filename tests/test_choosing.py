"""Numbers of an editor, chosen on facts that no study takes."""

import json
from itertools import pairwise

import pandas as pd
import pytest

from workbench import choosing, editing, facts, models
from workbench.facts import BadInput

MEMIT = {"layers": (2, 3, 4), "steps": 5, "learning_rate": 0.2, "clamp": 10.0}
TRIED = [MEMIT | {"weight": 100_000_000}, MEMIT | {"weight": 100}]


@pytest.fixture(scope="module")
def model():
    return models.load("world-gpt2", device="cpu")


@pytest.fixture(scope="module")
def apart(model):
    return choosing.apart(model, "world")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(choosing, "candidates", lambda *_: TRIED)
    monkeypatch.setattr(choosing, "EDITED", 4)
    monkeypatch.setattr(choosing, "WATCHED", 6)
    monkeypatch.setattr(choosing, "BATCH", 2)


def test_only_known_facts_that_are_set_apart_are_edited(apart):
    assert {request.fact.split for request in apart} == {"tuning"}
    assert len(apart) >= 100
    plain = [r.fact for r in facts.read("plain") if facts.is_tuned_on(r.fact)]
    assert {fact.split for fact in plain} == {"tuning"}


def test_the_best_candidate_stands_last_and_target_vectors_are_solved_once(
    model, apart, few, tmp_path, monkeypatch
):
    solved = []
    memit = editing.EDITORS["memit"]

    def targets(*arguments):
        solved.append(arguments)
        return solve(*arguments)

    solve = memit.targets
    monkeypatch.setattr(memit, "targets", targets)
    table = choosing.choose(model, "memit", apart, tmp_path / "table.csv")
    assert len(solved) == 1  # both candidates share them
    best = table.iloc[-1]
    assert json.loads(best.hparams)["weight"] == 100  # the other one writes next to nothing
    assert table.efficacy.tolist() == sorted(table.efficacy)
    assert best.efficacy > table.efficacy.iloc[0]
    means = [best[name] for name in choosing.WANTED]
    assert best.score == pytest.approx(sum(means) / len(means), abs=1e-3)
    assert not model.is_changed()


def test_a_stopped_choice_goes_on(model, apart, few, tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    whole = choosing.choose(model, "memit", apart, path)
    pd.read_csv(path).iloc[:1].to_csv(path, index=False)
    tried = []
    outcome = choosing.outcome
    monkeypatch.setattr(choosing, "outcome", lambda *given: tried.append(given) or outcome(*given))
    again = choosing.choose(model, "memit", apart, path)
    assert len(tried) == 2  # the batches of the second candidate
    pd.testing.assert_frame_equal(again, whole)


def test_other_facts_or_another_corpus_are_another_choice(model, apart, few, tmp_path):
    path = tmp_path / "table.csv"
    first = choosing.choose(model, "memit", apart, path)
    second = choosing.choose(model, "memit", apart[::-1], path)
    assert len(first) == len(second) == 2
    assert len(pd.read_csv(path)) == 4
    assert not second.facts.isin(first.facts).any()


def test_what_is_no_table_of_candidates_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("other.csv", "no/table.csv", "numbers.yaml"):
        with pytest.raises(BadInput):
            choosing.check("memit", tmp_path / name)


def test_too_few_facts_and_an_editor_without_candidates_are_refused(model, apart, tmp_path):
    with pytest.raises(BadInput, match="5 of the facts set apart are known"):
        choosing.choose(model, "memit", apart[:5], tmp_path / "table.csv")
    with pytest.raises(BadInput, match="no candidates"):
        choosing.choose(model, "grace", apart, tmp_path / "table.csv")


def test_a_candidate_that_is_refused_has_no_measures(model, apart, few, tmp_path, monkeypatch):
    memit = editing.EDITORS["memit"]

    def edit(model, batch, hparams, *others, **given):
        if hparams.weight != 100:
            raise BadInput("too heavy")
        return change(model, batch, hparams, *others, **given)

    change = memit.edit
    monkeypatch.setattr(memit, "edit", edit)
    table = choosing.choose(model, "memit", apart, tmp_path / "table.csv")
    assert table.score.isna().tolist() == [True, False]
    assert table.reached.iloc[0] == 0
    monkeypatch.setattr(memit, "edit", change)  # a corpus that broke off is there again
    table = choosing.choose(model, "memit", apart, tmp_path / "table.csv")
    assert table.score.notna().tolist() == [True, True]
    monkeypatch.setattr(memit, "edit", edit)
    other = [numbers for numbers in TRIED if numbers["weight"] != 100]
    monkeypatch.setattr(choosing, "candidates", lambda *_: other)
    with pytest.raises(BadInput, match="too heavy"):
        choosing.choose(model, "memit", apart, tmp_path / "other.csv")


def test_an_editor_that_learns_does_so_from_facts_that_are_not_edited(apart):
    learnt = {request.fact.subject for request in facts.lessons("world")}
    assert learnt
    assert not learnt & {request.fact.subject for request in apart}


def test_candidates_are_numbers_of_their_editor_and_share_targets_side_by_side(model):
    for editor in choosing.grids():
        tried = choosing.candidates(editor, model)
        every = [editing.EDITORS[editor].HParams(**numbers) for numbers in tried]
        assert len({numbers.model_dump_json() for numbers in every}) == len(every)
        for numbers in every:
            assert model.check_layers(numbers.layers)
        tops = [(max(numbers.layers), getattr(numbers, "clamp", 0)) for numbers in every]
        changes = sum(first != second for first, second in pairwise(tops))
        assert editor in ("ft", "malmen") or changes == len(set(tops)) - 1
