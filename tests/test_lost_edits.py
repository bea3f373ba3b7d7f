"""The judge of forecasts of lost edits: what decides is found, what only tells trials apart is not,
and no forecast has seen the task, seed or subject that it is judged on.
"""

import numpy
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from tests.benchmarks import forecast


@pytest.fixture(scope="module")
def trials():
    """Six trials of one model: the sign `leap` decides what is kept, `overlap` names the trial."""
    random = numpy.random.default_rng(0)
    tables = []
    for number, (task, seed) in enumerate((task, seed) for task in "ab" for seed in "012"):
        table = pd.DataFrame(random.normal(size=(40, 7)), columns=forecast.SIGNS)
        table["overlap"] = number
        # Trials differ in how many edits they keep, and `overlap` goes with that.
        chance = 1 / (1 + numpy.exp(-4 * table.leap - number + 3))
        table["kept"] = random.random(40) < chance
        table["subject"] = [f"s{random.integers(100)}" for _ in range(40)]
        table = table.assign(relation="r", model="m", task=task, seed=seed, trial=f"{task}{seed}")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def test_a_sign_that_decides_beats_the_margin_and_one_that_names_the_trial_does_not(
    trials, monkeypatch
):
    ways = {"margin": ["margin"], "leap": ["leap"], "trial": ["overlap"]}
    monkeypatch.setattr(forecast, "FORECASTS", ways)
    table = forecast.judged(trials, draws=30)
    table = table[(table.model == "all") & (table.task == "all")].set_index("forecast")
    assert table.auroc["leap"] > 0.9
    assert table.lead_low["leap"] > 0.2
    assert table.low["plain margin"] < 0.5 < table.high["plain margin"]
    assert table.auroc["trial"] == 0.5
    assert table.trials["leap"] == 6


def test_no_forecast_has_seen_the_task_the_seed_or_the_subject(trials, monkeypatch):
    fits = []

    def noted(rows, signs):
        fits.append(rows)
        return whole(rows, signs)

    whole = forecast.fitted
    monkeypatch.setattr(forecast, "fitted", noted)
    chances = forecast.foretold(trials, ["leap"])
    assert chances.index.tolist() == trials.index.tolist()
    judged = [part for _, part in trials.groupby("trial")]
    for part, rows in zip(judged, fits, strict=True):
        for name in ("task", "seed", "subject"):
            assert not set(part[name]) & set(rows[name])


def test_calibration_is_the_mean_gap_between_the_chance_and_the_share():
    chance = pd.Series([0.25, 0.25, 0.95, 0.95])
    kept = pd.Series([False, True, True, True])
    assert forecast.calibration(chance, kept) == pytest.approx((0.25 * 2 + 0.05 * 2) / 4)


def test_the_share_of_ordered_pairs_is_the_area_under_the_curve(trials, monkeypatch):
    monkeypatch.setattr(forecast, "FORECASTS", {"margin": ["margin"]})
    one = trials[trials.trial == "a1"]
    one = one.assign(margin=one.margin.round(0))  # with ties
    area = roc_auc_score(one.kept, one.margin)
    one = one.assign(**{forecast.PLAIN: one.margin})
    assert forecast._aurocs([one])[forecast.PLAIN] == pytest.approx(area)


def test_a_sign_that_goes_the_other_way_between_editors_still_counts_within_each(
    trials, monkeypatch
):
    """Editors whose edits have larger margins and are kept less."""
    monkeypatch.setattr(forecast, "FORECASTS", {"leap": ["leap"]})
    firm = trials.assign(trial=trials.trial + "f", leap=trials.leap + 5)
    kept = firm.kept & (firm.leap > 6)
    table = forecast.judged(pd.concat([trials, firm.assign(kept=kept)], ignore_index=True), 20)
    table = table[(table.model == "all") & (table.task == "all")].set_index("forecast")
    assert table.auroc["leap"] > 0.9
