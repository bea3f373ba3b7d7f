"""What an edit did, against counts that follow from its parts."""

import pytest

from workbench import facts, models
from workbench.deltas import WeightDelta
from workbench.evaluation.efficacy import asked, outcome


@pytest.fixture(scope="module")
def model():
    return models.load("world-gpt2", device="cpu")


@pytest.fixture(scope="module")
def nothing(model):
    """An edit that changes nothing."""
    return WeightDelta.of(model, changes={})


def test_without_a_change_what_was_right_stays_right(model, nothing):
    requests = [request for request in facts.read("world") if request.fact.split == "study"][:6]
    watched = [request for request in facts.read("world") if request.fact.split == "tuning"][:9]
    rows = outcome(model, nothing, asked(model, requests, watched))
    assert len(rows) == 6
    assert (rows.efficacy == 0).all()  # the model says the true objects
    assert (rows.neighbourhood == rows.neighbourhood_before)[rows.neighbourhood.notna()].all()
    kept = rows.neighbourhood_kept.dropna()
    assert len(kept)
    assert (kept == 1).all()
    assert rows.intrinsic.nunique() == 1


def test_watched_facts_of_an_edited_subject_do_not_count(model, nothing):
    requests = [request for request in facts.read("world") if request.fact.split == "study"][:3]
    rows = outcome(model, nothing, asked(model, requests, requests))
    assert rows.intrinsic.isna().all()
