"""An exercise is judged by what the tables say, and an answer that is missing is asked for."""

import re
from pathlib import Path

import pandas as pd
import pytest

from workbench import teaching
from workbench.tracking import lens

SOLUTIONS = Path(__file__).parents[1] / "notebooks" / "solutions.md"


@pytest.mark.parametrize(
    ("given", "answer", "begins"),
    [
        (None, 4, "Not answered yet"),
        (None, "none", "Not answered yet"),
        (4, 4, "Right."),
        ("4", 4, "Right."),
        (4.0, 4, "Right."),
        (" Never ", "never", "Right."),
        (0, "never", "Not yet: look again."),
        (-1, "none", "Not yet: look again."),
        ("four", 4, "Not yet: look again."),
    ],
)
def test_an_answer_is_right_or_gets_a_hint_and_none_is_asked_for(given, answer, begins):
    assert teaching.check(given, answer, "look again").startswith(begins)


@pytest.mark.parametrize(
    ("likeliest", "block"),
    [
        (["a", "Micro", "b", "Micro", "Microsoft"], 3),
        (["Microsoft", "Micro"], 0),
        (["a", "Microsoft"], 1),
        (["a", ""], "none"),  # a space begins no answer
        (["Microsoft", "a"], "none"),
    ],
)
def test_an_answer_is_settled_after_the_last_block_that_says_another(likeliest, block):
    assert teaching.settled(pd.DataFrame({"likeliest": likeliest}), "Microsoft") == block


def test_the_neighbour_that_lost_most_is_the_most_hurt_whatever_it_has_left():
    table = pd.DataFrame({"before": [0.9, 0.8, 0.2], "p": [0.85, 0.3, 0.1]})
    assert teaching.most_hurt(table) == 1
    assert teaching.most_hurt(table.assign(p=table.before)) == "none"
    assert teaching.most_hurt(pd.DataFrame(columns=["before", "p"])) == "none"


def test_half_is_of_what_the_edit_gave_and_the_first_step_below_it_counts():
    steps, p = [-1, 0, 10, 20, 30, 40], [0.0, 0.6, 0.4, 0.2, 0.5, 0.1]
    rows = pd.DataFrame({"step": steps, "p_answer": p, "group": "edited"})
    others = rows.assign(group="paraphrase", p_answer=0.0)
    assert teaching.half_gone(pd.concat([rows, others])) == 20
    assert teaching.half_gone(rows[:3]) == "never"


def test_the_first_solution_is_what_the_model_of_the_tour_says(base):
    (written,) = re.findall(r"my_block = (\d+)", SOLUTIONS.read_text())
    blocks = lens.table(base, lens.trajectory(base, "Windows Mobile 6.5 was developed by"))
    assert teaching.settled(blocks, "Microsoft") == int(written)
