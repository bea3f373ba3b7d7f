"""What an edit did to its facts, to their neighbours and to other facts."""

from collections.abc import Sequence

import pandas as pd

from workbench.edits import Edit
from workbench.facts import EditRequest
from workbench.models import Model
from workbench.tracking.retention import measure_prompts

MEASURES = ["efficacy", "held_out", "intrinsic", "neighbourhood"]


def outcome(
    model: Model, edit: Edit, edited: Sequence[EditRequest], watched: Sequence[EditRequest]
) -> pd.DataFrame:
    """One row an edited fact: shares of its prompts by which the answer is said.

    Args:
        watched: facts that the edit is to leave alone; those of edited subjects are left out.
    Returns:
        DataFrame[efficacy, held_out, neighbourhood, neighbourhood_before, neighbourhood_kept,
        held_out_understood, intrinsic]: the target after the edit prompt and after the wordings
        that judge; the neighbours' answers after and before the edit, and after it of those right
        before; the target after those wordings by which the unedited model gave the true object;
        the true objects of the watched facts, the same in every row. A share of nothing is null.
    """
    subjects = {request.fact.subject for request in edited}
    asked = []
    for number, request in enumerate(edited):
        asked.append(("efficacy", number, request.fact.question, request.target))
        asked += [("held_out", number, prompt, request.target) for prompt in request.held_out]
        asked += [("neighbourhood", number, *pair) for pair in request.neighbourhood]
    for request in watched:
        if request.fact.subject not in subjects:
            asked.append(("intrinsic", -1, request.fact.question, request.fact.object))
    table = pd.DataFrame(asked, columns=["kind", "number", "prompt", "answer"])
    before = table[table.kind.isin(["held_out", "neighbourhood"])].copy()
    is_held_out = before.kind == "held_out"
    objects = before.number.map(dict(enumerate(request.fact.object for request in edited)))
    before["answer"] = before.answer.mask(is_held_out, objects)  # what it said of the fact
    table.loc[before.index, "before"] = _right(model, before)
    with edit.applied(model):
        table["after"] = _right(model, table)

    def shares(kind: str, column: str, right_before: bool = False) -> pd.Series:
        part = table[table.kind == kind]
        if right_before:
            part = part[part.before == 1]
        return part.groupby("number")[column].mean()

    columns = {
        "efficacy": shares("efficacy", "after"),
        "held_out": shares("held_out", "after"),
        "neighbourhood": shares("neighbourhood", "after"),
        "neighbourhood_before": shares("neighbourhood", "before"),
        "neighbourhood_kept": shares("neighbourhood", "after", right_before=True),
        "held_out_understood": shares("held_out", "after", right_before=True),
    }
    rows = pd.DataFrame(columns, index=range(len(edited)), dtype=float)
    return rows.assign(intrinsic=table[table.kind == "intrinsic"].after.mean())


def _right(model: Model, asked: pd.DataFrame) -> pd.Series:
    answers = measure_prompts(model, list(asked.prompt), list(asked.answer))
    return answers.retained.astype(float).set_axis(asked.index)
