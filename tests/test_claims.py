"""The judge of the studies' claims: what it calls a difference, and which arms it sees."""

import pandas as pd
import pytest

from tests.benchmarks import claims


@pytest.mark.parametrize(
    ("low", "high", "claimed", "verdict"),
    [
        (0.1, 0.4, 1, "holds"),
        (0.1, 0.4, -1, "does not hold"),
        (-0.1, 0.4, 1, "undecided"),
        (-0.05, 0.1, 0, "holds"),
        (0.05, 0.3, 0, "undecided"),
        (0.15, 0.3, 0, "does not hold"),
    ],
)
def test_a_verdict_goes_by_the_interval(low, high, claimed, verdict):
    assert claims.verdict(low, high, claimed) == verdict


def looks(varied, kept):
    """One look of an arm a value: which of ten edits it kept."""
    plain = dict.fromkeys(claims.ARM, "none") | {"model": "m", "editor": "rome", "task": "facts"}
    plain |= {"plan": "all", "layers": "preset", "paraphrases": "1", "n_edited": "10"}
    about = {"seed": 0, "edited_model": 0, "step": 10, "metric": 0.7, "moved": 1.0}
    about |= {"harmless": "0" * 10, "intrinsic": "1" * 10}
    rows = [plain | about | {varied: value, "edited": edited} for value, edited in kept.items()]
    return pd.DataFrame(rows)


def test_blocks_and_plans_are_those_that_a_run_is_filed_under():
    every, none = "1" * 10, "t" * 10
    ((condition, result, claimed),) = claims.early_layers_equal(
        looks("layers", {"0": every, "4": none})
    )
    assert (condition, result[0], claimed) == ("block 0 less 4", 1, 0)
    moving = looks("plan", {"all": every, "edited": none})
    results = list(claims.plans("edited", ("all",), -1)(moving))
    assert [result[0] for _, result, _ in results] == [-1] * len(claims.READ)
