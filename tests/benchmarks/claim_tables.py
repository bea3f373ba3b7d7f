"""The claims and what they are judged on as tables of the findings' pages."""

import itertools

import pandas as pd

from tests.benchmarks import outcomes
from tests.benchmarks.claims import BATCHES, CLAIMS, MEMORY, ON_EDIT, READ, differences
from tests.benchmarks.facts_kept import (
    SETTING,
    USUAL,
    arms,
    chosen,
    even,
    facts_of,
    interval,
    kept,
    paired,
)

OTHERWISE = "at one (?:end|steps|distance)"  # read so, and not at one level
MOVES = (
    *("all", "window:0-11", "not-edited", "after:2", "after:5", "after:8", "after:20"),
    *("edited", "window:2-4", "window:5-7", "window:8-10"),
)
OF_DEEP = ("window:0-29", "window:12-16", "window:20-24")
OF_MEMORY = ("all", "after-edited")
WINDOWS_OF = ("all", "window:0-2", "window:2-4", "window:5-7", "window:8-10")
WINDOWS_OF += ("window:1-5", "window:6-10", *OF_DEEP)
PUBLISHED = {
    "1": "Llama-3-8B, instructions: ROME .374 and .824, FT .634 and .831, MALMEN .815 and .817",
    "2": "about .8 on each",
    "5, three": "MEMIT and AlphaEdit, a hundred facts: three reach the .8 of intrinsic ones",
    "6": "GPT-2 XL: blocks above 40 of 48",
    "7": "of five blocks",
    "10": "more than moving all, at a modest cost to the task",
    "11": "more than moving all",
    "9": "AlphaEdit on GPT-J, zsRE: 25 % of the edits lost, the most of all",
}  # of a claim that has a figure: what the study reports


def by_plan(looks: pd.DataFrame, plans: tuple[str, ...] = MOVES, **setting) -> str:
    """Of editors with several plans: edited and intrinsic facts at the end of each tuning, by what
    moved; of the seeds that all arms have, at the usual rate and data or at these.
    """
    names = ["model", "editor", "edits", "task", "moves", "n", "edits kept", "intrinsic kept"]
    lines = [[*names, "metric", "steps", "distance"]]
    looks = looks[looks.plan.isin(plans)]
    for task, size in itertools.product(("facts", "text"), BATCHES):
        part = even(arms(looks, "plan", task=task, n_edited=size, **setting), "plan")
        for (model, editor), ends in chosen(part, "plan", "end").groupby(["model", "editor"]):
            if ends.plan.nunique() > 1:
                about = [model, editor, str(size), task]
                lines += [[*about, *_plan(ends, plan)] for plan in plans if plan in {*ends.plan}]
    return outcomes.markdown(lines)


def by_size(looks: pd.DataFrame) -> str:
    """MEMIT's edits by how many stand in one model, at the end of each tuning; of the seeds that
    all numbers have.
    """
    names = ["model", "edits at once", "n", "edits kept", "intrinsic kept", "metric", "steps"]
    lines = [names]
    part = arms(looks, "n_edited", editor="memit", task="facts")
    part = even(part[part.n_edited.isin([str(size) for size in BATCHES])], "n_edited")
    ends = chosen(part, "n_edited", "end")
    for model, of_model in ends.groupby("model"):
        if of_model.n_edited.nunique() > 1:
            arms_of = sorted(of_model.groupby("n_edited"), key=lambda arm: int(arm[0]))
            lines += [[model, size, *_plan(arm, "all")[1:-1]] for size, arm in arms_of]
    return outcomes.markdown(lines)


def in_memory(looks: pd.DataFrame) -> str:
    """Edits that leave the weights as they are, beside MEMIT's of the same seeds, at the end of
    each tuning.
    """
    looks = arms(looks)
    seeds = looks[looks.editor.isin(MEMORY)][["model", "task", "seed"]].drop_duplicates()
    beside = looks[looks.editor.isin([*MEMORY, "memit"])].merge(seeds)
    return by_editor(even(beside, "editor"))


def by_editor(looks: pd.DataFrame, **setting) -> str:
    """A line a model, task and editor, at the end of each tuning."""
    lines = [["model", "task", "editor", "seeds", "n", "edits kept", "intrinsic kept", "metric"]]
    ends = chosen(arms(looks, **setting), "editor", "end")
    for (model, task, editor), arm in ends.groupby(["model", "task", "editor"]):
        _, n, edits, *cells, _, _ = _plan(arm, "all")
        edits = edits.replace("nan [nan, nan]", "none took")
        lines.append([model, task, editor, str(arm.seed.nunique()), n, edits, *cells])
    return outcomes.markdown(lines)


def by_kinds(looks: pd.DataFrame) -> str:
    """What is kept under facts of other kinds less under those of the edits' own, fact by fact, by
    which blocks moved, at the end of each tuning.
    """
    lines = [["model", "moves", "n", "edits", "intrinsic facts"]]
    looks = looks[looks.task_data.isin(["same-kinds", "other-kinds"])]
    ends = chosen(looks, "task_data", "end")
    for (model, plan), arm in ends.groupby(["model", "plan"]):
        facts = facts_of(arm)
        results = []
        for group in ("edited", "intrinsic"):
            own, other = (
                kept(facts, group, task_data=data) for data in ("same-kinds", "other-kinds")
            )
            results.append(interval(paired(other, own), least=-1))
        cells = [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high, *_ in results]
        lines.append([model, f"`{plan}`", f"{results[0][3]}, {results[1][3]}", *cells])
    return outcomes.markdown(lines)


def _plan(ends: pd.DataFrame, plan: str) -> list[str]:
    arm = ends[ends.plan == plan]
    facts = facts_of(arm)
    cells = [interval(kept(facts, group)) for group in ("edited", "intrinsic")]
    shares = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high, *_ in cells]
    ended = f"{arm.metric.mean():.2f}", f"{arm.step.mean():.0f}", f"{arm.moved.mean():.1f}"
    return [f"`{plan}`", f"{cells[0][3]}, {cells[1][3]}", *shares, *ended]


def against_all(looks: pd.DataFrame) -> str:
    """A line a way to read: of how many arms (models, editors, batches, other plans) more edits are
    kept than where everything moves, and how many differences are told from 0, fact by fact. The
    window that MEMIT writes is its plan `edited`, and counts once. At the usual rate, on the usual
    data.
    """
    lines = [["read at one", "arms", "more kept", "told from 0", "fewer kept", "told from 0"]]
    results = []
    for _, of_model in looks.groupby("model"):
        for plan in (*MOVES[1:], *OF_DEEP):
            part = of_model[of_model.editor != "memit"] if plan == ON_EDIT else of_model
            results += differences(part, plan, "all")
    for how in READ:
        read = [result for condition, result in results if condition.endswith(how)]
        counts = [len(read)]
        for sign in (1, -1):
            counts.append(sum(sign * mean > 0 for mean, *_ in read))
            counts.append(sum(min(sign * low, sign * high) > 0 for _, low, high, *_ in read))
        lines.append([how, *map(str, counts)])
    return outcomes.markdown(lines)


def shown(table: pd.DataFrame) -> str:
    """A line a claim, a column a model: how many conditions hold, and their differences; of blocks
    that move, at one level of the task; at the usual rate and on the usual data.
    """
    table = usually(table)
    names = sorted(set(table.model))
    lines = [["claim", *names]]
    for number, _, what, _ in CLAIMS:
        cells = []
        for name in names:
            part = table[(table.claim == number) & (table.model == name)]
            counts = part.verdict.value_counts()
            words = [f"{verdict} {count}" for verdict, count in counts.items()]
            span = f"{part.difference.min():+.2f} to {part.difference.max():+.2f}"
            counted = [f"{one} {_span(part[one])}" for one in ("n", "seeds")]
            cells.append(
                f"{', '.join(words)} ({span}; {'; '.join(counted)})" if words else "not run"
            )
        lines.append([f"{number}. {what}", *cells])
    return outcomes.markdown(lines)


def headlines(table: pd.DataFrame) -> pd.DataFrame:
    """The usual conditions, in each claim and model those of most edits at once first (of as many,
    of most facts, then seeds, then MEMIT's).
    """
    table = usually(table)
    edits = table.condition.str.extract(r"(\d+) edits", expand=False).fillna(0).astype(int)
    table = table.assign(edits=edits, memit=table.condition.str.contains("memit"))
    order = ["edits", "n", "seeds", "memit"]
    return table.sort_values(order, ascending=False, kind="stable")


def verdicts(table: pd.DataFrame) -> str:
    """A line a claim: the study's figure, and a column a model: its headline, with its interval,
    and how many conditions there are.
    """
    table = headlines(table)
    names = sorted(set(table.model), key=lambda name: (not name.startswith("world"), name))
    lines = [["claim", "the study's figure", *names]]
    for number, _, what, _ in CLAIMS:
        cells = [PUBLISHED.get(number, "")]
        for name in names:
            part = table[(table.claim == number) & (table.model == name)]
            cells.append(_headline(part) if len(part) else "not run")
        lines.append([f"{number}. {what}", *cells])
    return outcomes.markdown(lines)


def _headline(conditions: pd.DataFrame) -> str:
    first, alike = conditions.iloc[0], (conditions.verdict == conditions.verdict.iloc[0]).sum()
    seeds = f"{first.seeds} seed{'s' if first.seeds > 1 else ''}"
    counted = f"{first.condition.replace(', at one level', '')}; n {first.n}, {seeds}"
    others = f"; so in {alike} of {len(conditions)}" if len(conditions) > 1 else ""
    return f"**{first.verdict}** {_difference(first)} ({counted}{others})"


def _span(counts: pd.Series) -> str:
    return " to ".join(map(str, sorted({counts.min(), counts.max()})))


def usually(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions of the usual rate and data, of blocks at one level of the task."""
    for name in SETTING:
        table = table[table[name] == USUAL[name]]
    return table[~table.condition.str.contains(OTHERWISE)]


def elsewhere(table: pd.DataFrame) -> str:
    """A line a claim and model at another rate or on other data, as of `conditions`."""
    is_usual = (table[SETTING] == [USUAL[name] for name in SETTING]).all(axis=1)
    table = table[~is_usual & ~table.condition.str.contains(OTHERWISE)]
    rates = ("rate " + table.learning_rate).replace("rate usual", "")
    settings = table.task_data.replace("none", "") + rates
    return _lines(table.assign(condition=settings + ": " + table.condition))


def conditions(table: pd.DataFrame) -> str:
    """A line a claim, model and condition; of blocks that move, at one level of the task."""
    return _lines(usually(table))


def readings(table: pd.DataFrame) -> str:
    """A line a condition of blocks that move: its difference by how it is read, at the usual rate
    and on the usual data.
    """
    for name in SETTING:
        table = table[table[name] == USUAL[name]]
    parts = table.condition.str.extract(rf"(?P<of>.*), at one (?P<how>{'|'.join(READ)})$")
    table = table.join(parts).dropna(subset="how")
    lines = [["claim", "model", "condition", *(f"at one {how}" for how in READ)]]
    for names, rows in table.groupby(["claim", "model", "of"], sort=False):
        read = {row.how: _difference(row) for row in rows.itertuples()}
        lines.append([*names, *(read[how] for how in READ)])
    return outcomes.markdown(lines)


def _difference(row) -> str:
    return f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"


def _lines(table: pd.DataFrame) -> str:
    lines = [["claim", "model", "condition", "difference", "n", "seeds", "verdict"]]
    for row in table.itertuples():
        counts = str(row.n), str(row.seeds)
        lines.append([row.claim, row.model, row.condition, _difference(row), *counts, row.verdict])
    return outcomes.markdown(lines)
