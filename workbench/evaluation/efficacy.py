"""What an edit did to its facts, to their neighbours and to other facts."""

import pandas as pd

from workbench.edits import Edit
from workbench.facts import Requests
from workbench.models import Model
from workbench.tracking.retention import measure_prompts


def asked(model: Model, edited: Requests, watched: Requests) -> pd.DataFrame:
    """What is asked about an edit, and what the unedited model answers.

    Args:
        watched: facts that the edit is to leave alone; those of edited subjects are left out.
    Returns:
        DataFrame[kind, number, prompt, answer, before]: `number` of the edited fact, -1 of a
        watched one; `before`: of neighbours whether their answer, of held-out wordings whether the
        true object is said; null of the other kinds.
    """
    subjects = {request.fact.subject for request in edited}
    questions = {request.fact.question for request in edited}
    rows: list[tuple] = []
    for number, request in enumerate(edited):
        rows.append(("efficacy", number, request.fact.question, request.target, None))
        for prompt in request.held_out:
            rows.append(("held_out", number, prompt, request.target, request.fact.object))
        near = [pair for pair in request.neighbourhood if pair[0] not in questions]
        for prompt, answer in near:
            rows.append(("neighbourhood", number, prompt, answer, answer))
    for request in watched:
        if request.fact.subject not in subjects:
            rows.append(("intrinsic", -1, request.fact.question, request.fact.object, None))
    table = pd.DataFrame(rows, columns=["kind", "number", "prompt", "answer", "before"])
    first = table[table.before.notna()]
    table["before"] = _right(model, first.prompt, first.before)
    return table


def outcome(model: Model, edit: Edit, table: pd.DataFrame) -> pd.DataFrame:
    """One row an edited fact: shares of its prompts by which the answer is said.

    Args:
        table: of `asked`, of the unedited model.
    Returns:
        DataFrame[efficacy, held_out, neighbourhood, neighbourhood_before, neighbourhood_kept,
        held_out_understood, intrinsic]: the target after the edit prompt and after the wordings
        that judge; the neighbours' answers after and before the edit, and after it of those right
        before; the target after those wordings by which the unedited model gave the true object;
        the true objects of the watched facts, the same in every row. A share of nothing is null.
    """
    with edit.applied(model):
        after = table.assign(after=_right(model, table.prompt, table.answer))

    right_before = _by_fact(after[after.before == 1], "after")
    rows = _by_fact(after, "after").reindex(range(table.number.max() + 1))
    rows["neighbourhood_before"] = _by_fact(after, "before").neighbourhood
    rows["neighbourhood_kept"] = right_before.neighbourhood
    rows["held_out_understood"] = right_before.held_out
    return rows.assign(intrinsic=after[after.kind == "intrinsic"].after.mean())


def _by_fact(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The mean of a column by number and, side by side, kind."""
    means = table.groupby(["number", "kind"])[column].mean().unstack()
    return means.reindex(columns=["efficacy", "held_out", "neighbourhood"]).astype(float)


def _right(model: Model, prompts: pd.Series, answers: pd.Series) -> pd.Series:
    """Whether each answer is said, 1 or 0, with the index of the prompts."""
    retained = measure_prompts(model, prompts, answers).retained
    return retained.astype(float).set_axis(prompts.index)
