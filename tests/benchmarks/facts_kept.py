"""Which facts each look of a run kept: looks.csv of the findings, and how its arms are compared.

`looks.csv` has a row an edited model and look. Its column `edited` has a letter a fact, in the
order of their ids: - the edit did not take; 1 it is said; else what the likeliest token is, t the
true answer, r a related one, s a stop word, e the edit's own first token (without its rest), o any
other; n where the answers cannot be told apart by a first token. `intrinsic` has 1 or 0 a fact.

`kept` is of edits that took, and of intrinsic facts that the edited model says before the tuning.
Arms that are compared are alike in every field but one, and of the seeds that both have. Intervals
are of 95 %, by bootstrap over seeds and facts; ten facts of one model share its fate, which of one
seed no interval knows, and of two hardly. Differences are taken fact by fact where both arms have
the fact, else (edited less intrinsic) by Newcombe's rule of two intervals, or by a bootstrap that
draws the seeds of both together where that is wider.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy
import pandas as pd

from tests.benchmarks import outcomes
from workbench import runs
from workbench.runs import value_name
from workbench.spec import Spec
from workbench.tuning.numbers import usual

SETTING = ["task_data", "learning_rate"]  # every claim is judged within one of each
ARM = [
    *("model", "revision", "editor", "layers", "paraphrases", "n_edited"),
    *("task", "plan", "adapter", *SETTING),
]
COPY = [*ARM, "seed", "edited_model"]
FACT = ["editor", "task", "seed", "place"]
USUAL = {"revision": "none", "layers": "preset", "paraphrases": "1", "n_edited": "10"}
USUAL |= {"plan": "all", "adapter": "none", "task_data": "none", "learning_rate": "usual"}
SINGLE = (1, 10)  # of so many
MIXED = (20, 60)  # edits at once, half of them harmless
FREE = {  # what runs of the grids may differ in beside the columns
    *("edits_per_model", "facts", "harmless", "n_intrinsic", "n_train", "seed"),
    *("eval_every", "max_steps", "max_tokens"),
}

Result = tuple[float, float, float, int, int]  # mean, low, high, facts, seeds


def filed(spec: Mapping) -> dict:
    """The columns of a run, of its resolved Spec."""
    fields = {name: value_name(spec[name]) for name in ARM} | {"seed": spec["seed"]}
    fields["n_edited"] = str(spec["edits_per_model"])
    fields["task_data"] = Path(fields["task_data"]).stem
    numbers = usual(spec["task"], spec["task_data"], spec["model"])
    usual_rate = numbers.adapter_learning_rate if spec["adapter"] else numbers.learning_rate
    rate = spec["learning_rate"]
    fields["learning_rate"] = "usual" if rate in (0, usual_rate) else f"{rate:g}"
    return fields


def looked(run: runs.Run) -> pd.DataFrame:
    """The looks of a run, a row each.

    Raises:
        ValueError: it differs from others in what the table has no column for.
    """
    batch = (run.spec["edits_per_model"], run.spec["n_edited"])
    if batch[0] != batch[1] and batch != SINGLE:
        raise ValueError(f"{run.folder}: neither all edits at once nor ten, one at a time")
    if bool(run.spec["harmless"]) != (batch[1] in MIXED):
        raise ValueError(f"{run.folder}: harmless edits are of {MIXED} at once, half of them")
    plain = Spec(**{name: run.spec[name] for name in (*ARM, *FREE)}).resolved()
    for name, value in plain.model_dump(mode="json").items():
        if run.spec.get(name, value) != value:
            raise ValueError(f"{run.folder}: {name} {run.spec[name]!r}; not of these grids")
    training = run.training.set_index(["edited_model", "step"])
    harmless = set(run.about["harmless"])
    fields = filed(run.spec)
    rows = []
    probes = run.probes[run.probes.step >= 0].sort_values("fact_id")
    for place, look in probes.groupby(["edited_model", "step"]):
        edited = look[look.group == "edited"]
        took = edited[edited.took.astype(bool)]
        others = look[look.group == "paraphrase"]
        others = others[others.fact_id.isin(took.fact_id)]
        rows.append(
            fields
            | {"edited_model": place[0], "step": place[1], "run": run.folder.name}
            | training.loc[place, ["metric", "moved"]].to_dict()
            | {
                "edited": "".join(map(_letter, edited.itertuples())),
                "harmless": "".join(str(int(one in harmless)) for one in edited.fact_id),
                "held_out": others.retained.astype(float).mean(),
                "intrinsic": _digits(look[look.group == "intrinsic"].retained),
            }
        )
    return pd.DataFrame(rows)


def _letter(fact) -> str:
    if not fact.took:
        return "-"
    return "1" if fact.retained else str(fact.top_category)[0]


def _digits(values: pd.Series) -> str:
    return "".join(str(int(value)) for value in values)


def collect(folder: Path, out: Path) -> None:
    """Add the looks of the finished runs below a folder; a copy that is there is replaced whole."""
    tables = [looked(run) for run in runs.collect(folder)]
    if out.exists():
        tables.insert(0, read(out).drop(columns="known"))
    whole = pd.concat(tables).astype(dict.fromkeys(ARM, str))
    newest = whole.groupby(COPY).run.transform("last")
    whole = whole[whole.run == newest].drop_duplicates([*COPY, "step"], keep="last")
    whole = whole.sort_values([*COPY, "step"])
    whole.to_csv(out, index=False, float_format="%.5g")


def read(path: Path) -> pd.DataFrame:
    """With `known`: the intrinsic facts that the edited model says before the tuning."""
    words = dict.fromkeys((*ARM, "edited", "harmless", "intrinsic"), str)
    looks = pd.read_csv(path, dtype=words, keep_default_na=False, na_values={"held_out": [""]})
    starts = looks[looks.step == 0].set_index(COPY).intrinsic.rename("known")
    return looks.join(starts, on=COPY, validate="m:1")


def arms(looks: pd.DataFrame, *varied: str, **fixed) -> pd.DataFrame:
    """Rows that differ in these fields, and in editor, task and seed; the others are as usual, or
    as given.
    """
    for name, value in (USUAL | fixed).items():
        if name not in varied:
            looks = looks[looks[name] == str(value)]
    return looks


def even(looks: pd.DataFrame, varied: str) -> pd.DataFrame:
    """The seeds that all arms have which differ in one field alone."""
    others = [name for name in ARM if name != varied]
    every = looks.groupby(others)[varied].transform("nunique")
    return looks[looks.groupby([*others, "seed"])[varied].transform("nunique") == every]


def chosen(looks: pd.DataFrame, varied: str, how: str) -> pd.DataFrame:
    """One look of each copy, or two that share (`share`). `level`: where the metric first is at the
    loosest of the arms' best ones; `distance`: where it first is as far from the start as the arm
    went that went least; both between two looks, as they lie about it. `end`: the last look;
    `steps`: the one at the last step that all arms have.
    """
    if how == "end" or looks.empty:
        return looks[looks.step == looks.groupby(COPY).step.transform("max")]
    parts = []
    for _, alike in looks.groupby([name for name in COPY if name != varied]):
        sign = 1 if alike.task.iloc[0] in ("text", "instructions") else -1
        metric = sign * alike.metric
        copies = alike.groupby(COPY)
        if how == "level":
            best = metric.groupby([alike[name] for name in COPY]).min().max()
            parts += [_first(copy, sign * copy.metric, best) for _, copy in copies]
        elif how == "steps":
            common = set.intersection(*(set(one.step) for _, one in copies))
            parts.append(alike[alike.step == max(common)])
        else:
            least = copies.moved.max().min()
            parts += [_first(copy, -copy.moved, -least) for _, copy in copies]
    return pd.concat(parts)


def _first(copy: pd.DataFrame, values: pd.Series, most: float) -> pd.DataFrame:
    """The first look of a copy with a value of at most so much and the one before, with shares."""
    number = int((values <= most).to_numpy().argmax())
    both = copy.iloc[max(number - 1, 0) : number + 1]
    if len(both) == 1:
        return both.assign(share=1.0)
    before, after = values.iloc[number - 1 : number + 1]
    part = (before - most) / (before - after)
    return both.assign(share=[1 - part, part])[-2 + int(part == 1) :]


def facts_of(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a fact of each look: `group`, `place`, `kept` (times the look's `share`), `to` (a
    letter), `harmless`.
    """
    rows = []
    for look in looks.to_dict("records"):
        about = {name: look[name] for name in (*ARM, "seed", "edited_model")}
        copy = look["edited_model"]
        share = look.get("share", 1.0)
        for place, (letter, kind) in enumerate(zip(look["edited"], look["harmless"], strict=True)):
            if letter != "-":
                edit = {"group": "edited", "place": f"{copy}:{place}", "kept": letter == "1"}
                edit |= {"to": letter, "harmless": kind == "1", "share": share}
                rows.append(about | edit)
        for place, (letter, known) in enumerate(zip(look["intrinsic"], look["known"], strict=True)):
            if known == "1":
                one = {"group": "intrinsic", "place": f"{place}", "kept": letter == "1"}
                rows.append(about | one | {"to": "", "harmless": False, "share": share})
    fact = [*ARM, "seed", "edited_model", "group", "place", "harmless"]
    table = pd.DataFrame(rows, columns=[*fact, "kept", "to", "share"])
    if "share" not in looks:
        return table.drop(columns="share")
    return table.assign(kept=table.kept * table.share).groupby(fact, as_index=False).kept.sum()


def kept(facts: pd.DataFrame, group: str = "edited", **which) -> pd.Series:
    """1 or 0 of each fact of a group and of these arms, by editor, task, seed and place."""
    rows = facts[facts.group == group]
    for name, value in which.items():
        rows = rows[rows[name] == value]
    return rows.set_index(FACT).kept.astype(float)


def interval(values: pd.Series, others: pd.Series | None = None, least: float = 0) -> Result:
    """Mean, 95 % interval, number of the values and of their seeds; less the mean of `others`,
    which are of other facts, where they are given: of the seeds that both have; the number is then
    of the fewer.
    """
    parts = [one.astype(float) for one in (values, others) if one is not None]
    seeds = set.intersection(*({*one.index.get_level_values("seed")} for one in parts))
    results, means = [], []
    for one in parts:
        one = one[one.index.get_level_values("seed").isin(seeds)]
        one = one.groupby(level=["seed", "place"]).mean()
        if one.empty:
            return numpy.nan, numpy.nan, numpy.nan, 0, 0
        ends = outcomes.interval(one, one.index.get_level_values("seed"), least)
        results.append((one.mean(), *ends, len(one), len(seeds)))
        means.append(one)
    if others is None:
        return results[0]
    (mean, low, high, n, _), (other, under, over, m, _) = results
    difference = mean - other
    low = difference - numpy.hypot(mean - low, over - other)
    high = difference + numpy.hypot(high - mean, other - under)
    if len(seeds) > 1:
        ends = outcomes.difference(*means)
        low, high = min(low, ends[0]), max(high, ends[1])
    return difference, low, high, min(n, m), len(seeds)


def paired(of: pd.Series, against: pd.Series, but: str = "") -> pd.Series:
    """Differences over the facts that both have, whatever they are in the level `but`; a fact's
    copies averaged.
    """
    fact = [name for name in FACT if name != but]
    return of.groupby(fact).mean().sub(against.groupby(fact).mean()).dropna()
