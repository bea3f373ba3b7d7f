"""What reviewers ask of an edit: every measure of it from one call, `wb.evaluate`.

A measure asks a model about requests: `ask(model, requests)`, as a function, or as a module that
may also have `compare(before, after)` for what can only be said of two models. What it gives back
is tidy, `fact_id, quantity, value`: a row a fact and quantity, the mean over the fact's prompts.
A table with `fact_id` and columns of numbers or truths will do.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import pandas as pd

from workbench.edits import Edit
from workbench.evaluation.ability import real_text
from workbench.facts import BadInput, Requests
from workbench.models import Model
from workbench.registry import ASKED, MEASURES, NO_SHARES
from workbench.runs import interval, tidy

STANDARD = ASKED
SCORED = ("efficacy", "paraphrase", "neighbourhood")  # whose harmonic mean is CounterFact's score
DRAWS = 1000  # of the bootstrap


def evaluate(
    model: Model,
    requests: Requests,
    edit: Edit | None = None,
    measures: Sequence[str] = (),
    base: Model | None = None,
) -> pd.DataFrame:
    """Measure an edit, or a finished model against its base.

    Args:
        edit: applied to `model` for the measuring; without one, `model` is the edited one.
        base: the unedited model; with an edit `model` is.
        measures: names of `wb.measures`; by default STANDARD, without either edit or base those
            that need no other model.
    Returns:
        DataFrame[measure, quantity, fact_id, before, after]; `before` is null of what compares the
        two models, and where there is one only. `summary` makes a table of it.
    Raises:
        BadInput: edit and base; a base that holds an edit; a measure that compares, alone.
    """
    if edit and base:
        raise BadInput("edit and base are given: with an edit, model is the base; leave one out")
    has_base = bool(edit or base)
    names = chosen(measures, has_base)
    if not has_base:
        alone = asked(model, requests, names)
        return compared(alone, alone).assign(before=numpy.nan)
    base = base or model
    base.check_unchanged("evaluate, the base")
    before = asked(base, requests, names)
    with edit.applied(model) if edit else nullcontext():
        return compared(before, asked(model, requests, names, like=before))


def chosen(measures: Sequence[str], has_base: bool) -> list[str]:
    """The names given, else STANDARD; without a base, of measures that need none."""
    names = [measures] if isinstance(measures, str) else list(measures or STANDARD)
    alone = [name for name in names if has_base or not MEASURES[name].compare]
    if measures and alone != names:
        missing = ", ".join(name for name in names if name not in alone)
        raise BadInput(f"measures {missing}: compare two models; give base, or name --base")
    return alone


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model gave the measures, by name; its `kind`, and how it `reads` text, both alike in
    two to compare.
    """

    kind: str
    reads: tuple
    answers: Mapping[str, Any]


def asked(
    model: Model, requests: Requests, measures: Sequence[str] = STANDARD, like: Asked | None = None
) -> Asked:
    """Ask a model by itself: of two large ones, one at a time.

    Args:
        like: what the other was asked; a model that cannot be compared with it is refused at once.
    """
    if not requests:
        raise BadInput("there are no facts to measure; give one at least")
    reads = real_text(model, 1), model.tokenizer.get_vocab(), len(model.unembedding.weight)
    kind = f"{model.network.config.model_type}, {model.n_blocks} blocks {[*model.weight(0).shape]}"
    if like:
        _check_alike(like, kind, reads)
    answers = {name: MEASURES[name].ask(model, requests) for name in measures}
    return Asked(kind=kind, reads=reads, answers=answers)


def _check_alike(before: Asked, kind: str, reads: tuple) -> None:
    """BadInput if the two are of other kinds, or read the same text as other tokens."""
    if before.kind != kind:
        what = f"base and model are not one architecture ({before.kind}; {kind})"
        raise BadInput(f"{what}; compare a model with the one that it was made of")
    if before.reads != reads:
        what = "base and model read the same text as different tokens (tokenizer, start or length)"
        raise BadInput(f"{what}; compare a model with the one that it was made of")


def compared(before: Asked, after: Asked) -> pd.DataFrame:
    """The table of `evaluate`.

    Raises:
        BadInput: the two are of other kinds, or read the same text as other tokens; no fact brings
            what the measures ask.
    """
    _check_alike(before, after.kind, after.reads)
    tables = []
    for name, first in before.answers.items():
        second = after.answers[name]
        compare = MEASURES[name].compare
        if compare:
            table = tidy(name, compare(first, second)).rename(columns={"value": "after"})
        else:
            pair = tidy(name, first), tidy(name, second)
            table = pair[0].merge(pair[1], on=["fact_id", "quantity"], how="outer", sort=False)
            table = table.rename(columns={"value_x": "before", "value_y": "after"})
        tables.append(table.assign(measure=name))
    columns = ["measure", "quantity", "fact_id", "before", "after"]
    table = pd.concat(tables, ignore_index=True).reindex(columns=columns)
    if table.empty:
        raise BadInput(f"measures {', '.join(before.answers)}: no fact brings what they ask")
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over facts before and after, with the 95 % interval after (bootstrap over facts), and
    CounterFact's score: the harmonic mean of its three shares.
    """
    rows = []
    for (measure, quantity), part in table.groupby(["measure", "quantity"], sort=False):
        wide = part.set_index("fact_id")[["before", "after"]]
        row = {"measure": measure, "quantity": quantity}
        rows.append(row | _interval(wide, _mean, NO_SHARES.isdisjoint(row.values())))
    scored = table[(table.measure == "counterfact") & table.quantity.isin(SCORED)]
    wide = scored.pivot(index="fact_id", columns="quantity", values=["before", "after"])
    if wide.shape[1] == 2 * len(SCORED):
        row = {"measure": "counterfact", "quantity": "score"}
        rows.insert(0, row | _interval(wide, _harmonic, is_share=True))
    return pd.DataFrame(rows)


def _interval(wide: pd.DataFrame, mean, is_share: bool) -> dict:
    """`before`, `after`, `low`, `high` and the number of facts `n`."""
    drawn = numpy.random.default_rng(0).integers(len(wide), size=(DRAWS, len(wide)))
    after = wide["after"].to_numpy()
    with warnings.catch_warnings(action="ignore"):  # the mean of nothing is null
        means = {"before": mean(wide["before"].to_numpy()), "after": mean(after)}
        low, high = numpy.nanquantile(mean(after[drawn]), [0.025, 0.975])
    n = len(wide["after"].dropna(how="all"))
    if is_share and low == high:
        low, high = interval(numpy.full(n, low))
    return means | {"low": low, "high": high, "n": n}


_mean = partial(numpy.nanmean, axis=-1)  # over facts (..., n)


def _harmonic(shares: numpy.ndarray) -> numpy.ndarray:
    """Of the means over facts (..., n, shares); 0 if one of them is."""
    means = numpy.nanmean(shares, axis=-2)
    return means.shape[-1] / (1 / means).sum(-1)
