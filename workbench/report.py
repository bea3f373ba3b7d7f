"""Many runs in one place: tables with intervals, paired differences, figures, one page.

report/index.html           the notebook 10_collect, executed on the runs; opens without a server or
                            a network
       retention.csv        mean and 95 % interval of each group of runs
       differences.csv      the same facts under two values of a field
       measures.csv         what the runs' measures said after the edits and at the end
       probes.parquet       every probe of every run, the fields of its Spec beside it
       notebook/            the executed notebook, as a run
"""

import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd
import pyarrow
from IPython.display import HTML
from pyarrow.parquet import ParquetWriter

from workbench import batch, files, inert, runs
from workbench.facts import DATA, BadInput
from workbench.plots import ASIDE, BRING, BROUGHT
from workbench.registry import NO_SHARES
from workbench.runs import SERIES, Run, interval, value_name

EDITED = ("model", "revision", "editor", "variant", "layers", "paraphrases", "edits_per_model")
TUNED = ("task", "plan", "adapter", "protect", "learning_rate", "max_steps")
FIELDS = EDITED + TUNED  # of a Spec; all stand beside the probes
SUMMARY = ["mean", "low", "high", "n"]
KEPT = ("edits kept", "intrinsic kept")  # the series of which a report speaks
FEWEST = 6  # facts; fewer reach no 5 % in a sign test, however unanimous
FINDINGS = Path(__file__).with_name("findings.html.j2")
COLLECT = DATA.parent / "notebooks" / "10_collect.ipynb"  # a wheel has it too


def report(folder: str | Path, out: str | Path = "report") -> Path:
    """Write the report of the runs below a folder; returns its page.

    Raises:
        BadInput: no finished run there, or one of a version that cannot be read.
    """
    folder = Path(folder).resolve()
    out = Path(out)
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        whole = runs.listed(folder)
    if not whole:
        nothing = f"{folder}: holds no finished run; make some with `workbench run`"
        raise BadInput(f"no run can be read; {left_out[0].message}" if left_out else nothing)
    for note in left_out:
        print(inert.printable(str(note.message)), file=sys.stderr)
    parameters = {"folder": str(folder), "tables": str(out.resolve())}
    run = batch.run(COLLECT, parameters, out=out / "notebook")
    page = out / "index.html"
    with files.written(page) as partial:
        shutil.copyfile(run.file("notebook.html"), partial)
    return page


def shares(collected: Sequence[Run]) -> pd.DataFrame:
    """A row a run, series and fact: `retained`, the share of its prompts with the answer, and the
    fields of the run's Spec that say which run it is.
    """
    specs = pd.DataFrame([_fields(run) for run in collected]).fillna("none")
    several = [name for name in specs if name in (*FIELDS, "seed") or specs[name].nunique() > 1]
    return runs.series(collected, list(SERIES), specs[several].astype("category"))


def _fields(run: Run) -> dict:
    """The fields of a run's Spec as they stand on an axis, and its seed."""
    fields = {name: value_name(run.spec.get(name, "")) for name in FIELDS}
    others = {name: str(run.spec[name]) for name in run.spec if name not in (*FIELDS, *ASIDE)}
    return fields | others | {"seed": run.spec.get("seed", 0)}


def varying(table: pd.DataFrame) -> list[str]:
    """The fields in which runs differ of themselves: a task's usual numbers differ with the task,
    and nothing would pair.
    """
    bring = table.groupby([name for name in BRING if name in table], observed=True)
    values = table.nunique().where(~table.columns.isin(BROUGHT), bring.nunique().max())
    fields = table.columns.drop(["series", "fact_id", "retained", "seed"])
    return [name for name in fields if values[name] > 1] or ["editor"]


def retention(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean and interval of each series by the fields; a fact of a seed counts once, however many of
    its copies were asked.
    """
    facts = table.groupby([*by, "series", "seed", "fact_id"], observed=True).retained.mean()
    groups = facts.groupby([*by, "series"], observed=True)
    return groups.apply(_summary).unstack().reset_index().astype({"n": int})


def measured(collected: Sequence[Run], by: Sequence[str]) -> pd.DataFrame:
    """What the runs' measures said right after the edits and at the end, by the fields: mean and
    interval over facts, a fact of a seed once.
    """
    tables = []
    for run in collected:
        table = run.measured
        last = table.step == table.groupby("edited_model").step.transform("max")
        for when, rows in (("edited", table.step == 0), ("end", last & (table.step > 0))):
            tables.append(table[rows].assign(when=when, **_fields(run)))
    names = [*by, "measure", "quantity", "when"]
    facts = pd.concat(tables).groupby([*names, "seed", "fact_id"], sort=False).value.mean()
    if facts.empty:
        return pd.DataFrame(columns=[*names, *SUMMARY])
    groups = facts.dropna().groupby(names, sort=False)
    return groups.apply(_of_measure).unstack().reset_index().astype({"n": int})


def _of_measure(values: pd.Series) -> pd.Series:
    return _summary(values, 0 if NO_SHARES.isdisjoint(values.name) else float("inf"))


def paired(table: pd.DataFrame, by: Sequence[str], of: Sequence[str] = ()) -> pd.DataFrame:
    """For each field of `by`, or of those in `of` alone, each value against the field's first: the
    mean difference over facts that both have, all else equal.
    """
    rows = []
    for name in of or by:
        rest = [other for other in by if other != name]
        facts = table.groupby(["series", *rest, "seed", "fact_id", name], observed=True)
        wide = facts.retained.mean().unstack()
        against = wide.columns[0]
        for value in wide.columns[1:]:
            differences = (wide[value] - wide[against]).dropna()
            of_facts = differences.groupby(["series", "seed", "fact_id"], observed=True).mean()
            for series, part in of_facts.groupby("series", observed=True):
                names = {"field": name, "of": value, "against": against, "series": series}
                rows.append(names | dict(_summary(part, least=-1)))
    columns = ["field", "of", "against", "series", *SUMMARY]
    return pd.DataFrame(rows, columns=columns).astype({"n": int})


def _summary(values: pd.Series, least: float = 0) -> pd.Series:
    low, high = interval(values, least)
    return pd.Series([values.mean(), low, high, len(values)], index=SUMMARY)


def findings(collected: Sequence[Run], table: pd.DataFrame, by: Sequence[str]) -> HTML:
    """How many runs and seeds these are, then a sentence for each field, task and series of which
    two values share facts, all else equal: what each value keeps, and which can be told apart.

    Two values cannot where the interval of their difference holds 0, or where they share fewer
    than FEWEST facts.
    """
    sentences = []
    kept = table[table.series.isin(KEPT)]
    for name in by:
        split = ["series"] if name == "task" else ["series", "task"]
        for (series, *task), part in kept.groupby(split, observed=True):
            differences = paired(part, by, [name]).to_dict("records")
            if differences or len(by) == 1:
                means = retention(part, [name]).to_dict("records")
                about = {"field": name, "series": series, "task": task}
                sentences.append(about | {"means": means, "differences": differences})
    template = jinja2.Template(FINDINGS.read_text("utf-8"), autoescape=True, trim_blocks=True)
    counts = {"runs": len(collected), "seeds": table.seed.nunique(), "fewest": FEWEST}
    return HTML(template.render(sentences=sentences, **counts))


def save(collected: Sequence[Run], out: str | Path, **tables: pd.DataFrame) -> None:
    """Write tables as CSV, and all probes of the runs as one parquet, into a folder; "" is none."""
    if not str(out):
        return
    out = Path(out)
    for name, table in tables.items():
        inert.write_csv(table, out / f"{name}.csv")
    schema = pyarrow.Schema.from_pandas(_probes(collected[0]), preserve_index=False)
    with files.written(out / "probes.parquet") as partial, ParquetWriter(partial, schema) as writer:
        for run in collected:  # never all at once in memory
            writer.write_table(pyarrow.Table.from_pandas(_probes(run), schema))


def _probes(run: Run) -> pd.DataFrame:
    """Its probes, with the fields of its Spec beside them."""
    probes = pd.read_parquet(run.file("probes.parquet"))
    # p_related of facts without a category holds nothing, and no type.
    numbers = {name: "float64" for name in probes if name.startswith("p_")}
    named = pd.Series(_fields(run))[[*FIELDS, "seed"]]
    return probes.astype(numbers).assign(**named, run=run.folder.name)
