"""What reviewers ask of an edit: every measure of it from one call, `wb.evaluate`.

A measure asks a model about requests: `ask(model, requests)`, as a function, or as a module that
may also have `compare(before, after)` for what can only be said of two models. What it gives back
is tidy, `fact_id, quantity, value`: a row a fact and quantity, the mean over the fact's prompts.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy
import pandas as pd

from workbench.edits import Edit
from workbench.facts import Requests
from workbench.models import Model
from workbench.registry import MEASURES

STANDARD = ("counterfact", "generation", "locality", "ability", "portability", "superficiality")
TIDY = ["fact_id", "quantity", "value"]
SCORED = ("efficacy", "paraphrase", "neighbourhood")  # whose harmonic mean is CounterFact's score
DRAWS = 1000  # of the bootstrap


def evaluate(
    model: Model,
    requests: Requests,
    edit: Edit | None = None,
    measures: Sequence[str] = STANDARD,
    base: Model | None = None,
) -> pd.DataFrame:
    """Measure an edit, or a finished model against its base.

    Args:
        edit: applied to `model` for the measuring; without one, `model` is the edited one.
        base: the unedited model; with an edit `model` is. Without either the model is compared
            with itself.
        measures: names of `wb.measures`.
    Returns:
        DataFrame[measure, quantity, fact_id, before, after]; `before` is null of what compares the
        two models. `summary` makes a table of it.
    """
    kinds = [MEASURES[name] for name in measures]
    before = [kind.ask(base or model, requests) for kind in kinds]
    after = before
    if edit or base:
        with edit.applied(model) if edit else nullcontext():
            after = [kind.ask(model, requests) for kind in kinds]
    tables = []
    for kind, first, second in zip(kinds, before, after, strict=True):
        if kind.compare:
            table = tidy(kind.compare(first, second)).rename(columns={"value": "after"})
        else:
            pair = tidy(first), tidy(second)
            table = pair[0].merge(pair[1], on=TIDY[:2], how="outer", sort=False)
            table = table.rename(columns={"value_x": "before", "value_y": "after"})
        tables.append(table.assign(measure=kind.name))
    columns = ["measure", "quantity", "fact_id", "before", "after"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A measure's table as TIDY; of another form, the numbers of each fact by their columns."""
    if "quantity" not in table:
        numbers = table.select_dtypes(["number", "bool"]).columns
        table = table.melt("fact_id", numbers, "quantity", "value")
    table = table.astype({"value": float}).groupby(TIDY[:2], as_index=False, sort=False)
    return table.value.mean()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over facts before and after, with the 95 % interval after (bootstrap over facts), and
    CounterFact's score: the harmonic mean of its three shares.
    """
    rows = []
    for (measure, quantity), part in table.groupby(["measure", "quantity"], sort=False):
        wide = part.set_index("fact_id")[["before", "after"]]
        rows.append({"measure": measure, "quantity": quantity} | _interval(wide, _mean))
    scored = table[(table.measure == "counterfact") & table.quantity.isin(SCORED)]
    wide = scored.pivot(index="fact_id", columns="quantity", values=["before", "after"])
    if wide.shape[1] == 2 * len(SCORED):
        row = {"measure": "counterfact", "quantity": "score"}
        rows.insert(0, row | _interval(wide, _harmonic))
    return pd.DataFrame(rows)


def _interval(wide: pd.DataFrame, mean) -> dict:
    """`before`, `after`, `low`, `high` and the number of facts `n`."""
    numbers = numpy.random.default_rng(0).integers(len(wide), size=(DRAWS, len(wide)))
    drawn = numpy.array([mean(wide["after"].to_numpy()[draw]) for draw in numbers])
    low, high = numpy.nanquantile(drawn, [0.025, 0.975])
    means = {when: mean(wide[when].to_numpy()) for when in ("before", "after")}
    return means | {"low": low, "high": high, "n": len(wide)}


def _mean(values: numpy.ndarray) -> float:
    known = values[~numpy.isnan(values)]
    return known.mean() if len(known) else numpy.nan


def _harmonic(shares: numpy.ndarray) -> float:
    """Of the means of columns; 0 if one is."""
    means = numpy.array([_mean(column) for column in shares.T])
    return len(means) / (1 / means).sum() if (means > 0).all() else 0.0
