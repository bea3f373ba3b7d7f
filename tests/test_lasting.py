"""The tournament: what an arm may be called, and how arms are held against each other."""

import pandas as pd
import pytest

from tests.benchmarks import lasting


@pytest.mark.parametrize(
    "arm", ["none*0.33", "replay+kl@0.3", "after:4&replay+span*2", "firm", "3&span", "again"]
)
def test_an_arm_has_a_name_that_is_known(arm):
    lasting.check(arm, arm.partition("*")[0].split("&"))


@pytest.mark.parametrize(
    "arm", ["replya", "5", "replay&after:4", "after:4&spn", "none&replay", "all&kl&span"]
)
def test_a_mistyped_arm_is_refused_and_not_run_as_another(arm):
    with pytest.raises(ValueError, match="none, a protection, a plan or a way to edit"):
        lasting.check(arm, arm.partition("*")[0].split("&"))


def rows(arm, kept, seed=0, ended="reached", model="world-gpt2"):
    """Two looks of three edits, of which the last did not take, and two other facts."""
    row = {"trial": f"{model}:memit:30:facts:{arm}:{seed}", "arm": arm, "metric": 0.5}
    row |= {"intrinsic": "1 0", "wordings": "1 1", "held_out": "0.5 0.5 1"}
    before = row | {"at": "edited", "step": 0, "kept": "1 1 0", "ended": ended}
    return [before, row | {"at": "threshold", "step": 40, "kept": kept, "ended": ended}]


def test_arms_are_held_against_each_other_fact_by_fact_and_seed_by_seed():
    """Seed 0 keeps one of two more, seed 1 none; the edit that never took counts for neither."""
    done = pd.DataFrame(
        [
            *rows("none", "1 0 0"),
            *rows("replay", "1 1 1"),
            *rows("none", "1 1 0", seed=1),
            *rows("replay", "1 1 1", seed=1),
            *rows("span", "0 0 0", seed=2),  # whose seed the other lacks
        ]
    )
    lines = [line.strip("| ").split(" | ") for line in lasting.against(done, "none").splitlines()]
    assert [line[:3] for line in lines[2:]] == [["world-gpt2", "replay - none", "4"]]
    assert [cell.split(" ")[0] for cell in lines[2][3:5]] == ["+0.25", "+0.00"]


def test_a_table_counts_edits_that_took_and_marks_a_level_that_was_not_met():
    done = pd.DataFrame([*rows("none", "1 0 1"), *rows("span", "1 1 1", ended="budget")])
    lines = [line.strip("| ").split(" | ") for line in lasting.table(done).splitlines()[2:]]
    said = {line[4]: (line[5], line[6].split(" ")[0], line[-1]) for line in lines}
    assert said == {
        "before the tuning": ("2", "1.00", "0"),
        "none": ("2", "0.50", "40"),
        "span": ("2", "1.00", "40*"),
    }
