"""The exercises of the tour: what the right answers are, and what is said of a student's.

A cell of the tour names a function of this module and does not show what it does. Answers are
numbers, and words where there is no number: "none", "never".
"""

import pandas as pd


def check(given: object, answer: object, hint: str) -> str:
    """What is said of an answer; None is none."""
    if given is None:
        return 'Not answered yet: write a number, or a word in quotes, in place of "None".'
    written = f"{given:g}" if isinstance(given, float) else str(given).strip().lower()
    return "Right." if written == str(answer) else f"Not yet: {hint}."


def settled(blocks: pd.DataFrame, answer: str) -> int | str:
    """The block from which on a token that begins the answer is the likeliest, up to the end."""
    wrong = [not token or not answer.startswith(token) for token in blocks.likeliest]
    block = max(blocks.index[wrong], default=-1) + 1
    return block if block in blocks.index else "none"


def most_hurt(neighbours: pd.DataFrame) -> int | str:
    """The row whose answer lost most of its probability, from `before` to `p`."""
    loss = neighbours.before - neighbours.p
    return loss.idxmax() if loss.max() > 0 else "none"


def half_gone(probes: pd.DataFrame) -> int | str:
    """The first step at which the edited answer has less than half of what the edit gave it."""
    p = probes[probes.group == "edited"].groupby("step").p_answer.mean()
    gone = p.index[(p.index > 0) & (p < p[0] / 2)]
    return min(gone, default="never")
