"""Many runs in one place: a tidy parquet of all probes, tables with intervals, paired differences,
figures, one page.

report/probes.parquet       every probe of every run, the fields of its Spec beside it; written a
hundred runs at a time, never held whole
       retention.csv        mean and 95 % interval of each group of runs
       differences.csv      the same facts under two values of a field
       index.html           the tables and the figures of 10_collect; opens without a server or a
       network
"""

import html
import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from workbench import batch, files, inert, pages, runs
from workbench.facts import BadInput
from workbench.plots import ASIDE, BRING, BROUGHT, interval, value_name
from workbench.runs import SERIES

FIELDS = ("model", "revision", "editor", "variant", "layers", "paraphrases", "edits_per_model", "task", "plan", "adapter", "learning_rate",
          "max_steps")  # fmt: skip
TOLD = ("fact_id", "retained", "series", "number")  # columns of a run's facts that are no fields
AT_ONCE = 100  # runs held in memory
DRAWS = 1000  # of the bootstrap
COLLECT = Path(__file__).parents[1] / "notebooks" / "10_collect.ipynb"


def report(folder: str | Path, out: str | Path = "report", figures: bool = True) -> Path:
    """Write the report of the runs below a folder; returns its page.

    Raises:
        BadInput: no finished run there, or one of a version that cannot be read.
    """
    folder, out = Path(folder), Path(out)
    told, problems = _told(folder, out)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    varying = [
        name for name in told.columns if name not in (*TOLD, "seed", "run") and _varies(told, name)
    ] or ["editor"]
    table, differences = retention(told, varying), paired(told, varying)
    inert.write_csv(table, out / "retention.csv")
    inert.write_csv(differences, out / "differences.csv")
    images = _figures(folder, out) if figures and COLLECT.is_file() else []
    page = out / "index.html"
    with files.written(page) as partial:
        partial.write_text(
            _page(folder, told, table, differences, images, problems), encoding="utf-8"
        )
    return page


def _varies(told: pd.DataFrame, name: str) -> bool:
    """Whether the runs differ in the field of themselves; a task's usual numbers differ with the
    task, and nothing would pair.
    """
    bring = [other for other in BRING if other in told]
    return (
        told.groupby(bring, observed=True)[name].nunique().max() > 1
        if name in BROUGHT
        else told[name].nunique() > 1
    )


def _told(folder: Path, out: Path) -> tuple[pd.DataFrame, list[str]]:
    """One value a run, series and fact: the share of its prompts with the answer; and a line for
    each run that cannot be read.

    On the way all probes go into probes.parquet.
    """
    found = sorted(path.parent for path in folder.glob("[!.]*/run.json"))
    if not found:
        raise BadInput(
            f"{folder}: holds no finished run; make some with `workbench run` or `workbench sweep`"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    partial, writer, parts, specs, problems = out / ".probes.parquet.partial", None, [], [], []
    try:
        for start in tqdm(
            range(0, len(found), AT_ONCE),
            desc=f"{len(found)} runs",
            unit=f"{AT_ONCE} runs",
            disable=None,
        ):
            some, tables = [], []
            for one in found[start : start + AT_ONCE]:
                try:
                    run = runs.read(one)
                    if "members" not in run.about:
                        tables.append(_probes(run))
                        some.append(run)
                except BadInput as error:
                    problems.append(str(error))
            if not some:
                continue
            rows = pyarrow.concat_tables(tables, promote_options="permissive")
            writer = writer or pyarrow.parquet.ParquetWriter(partial, rows.schema)
            writer.write_table(rows.cast(writer.schema))
            table = runs.series(some, list(SERIES))
            parts.append(table.assign(number=table.number + len(specs)))
            specs += [
                _fields(run)
                | {
                    name: str(value)
                    for name, value in run.spec.items()
                    if name not in (*FIELDS, *ASIDE)
                }
                for run in some
            ]
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        if writer:
            writer.close()
    if not parts:
        if problems:  # which name the folder
            raise BadInput(f"no run can be read; the first: {problems[0]}")
        raise BadInput(f"{folder}: holds no run of an experiment of its own")
    partial.replace(out / "probes.parquet")
    told = pd.concat(parts, ignore_index=True).astype({"series": "category", "fact_id": "category"})
    fields = pd.DataFrame(specs).fillna("none")
    fields = fields[
        [name for name in fields if name in (*FIELDS, "seed", "run") or fields[name].nunique() > 1]
    ]
    return told.join(
        fields.astype("category"), on="number"
    ), problems  # categories: the names of a Spec stand a million times here


def _fields(run: runs.Run) -> dict:
    return {name: value_name(run.spec.get(name, "")) for name in FIELDS} | {
        "seed": run.spec.get("seed", 0),
        "run": run.folder.name,
    }


def _probes(run: runs.Run) -> pyarrow.Table:
    """Its probes, with the fields of its Spec beside them."""
    table = pyarrow.parquet.read_table(run.file("probes.parquet")).replace_schema_metadata(None)
    for place, name in enumerate(
        table.column_names
    ):  # of facts without a category p_related holds nothing at all
        if name.startswith("p_"):
            table = table.set_column(place, name, table[name].cast(pyarrow.float64()))
    for name, value in _fields(run).items():
        table = table.append_column(name, pyarrow.repeat(value, len(table)))
    return table


def _summed(values: pd.Series) -> pd.Series:
    low, high = interval(values, DRAWS)
    return pd.Series({"mean": values.mean(), "low": low, "high": high, "n": len(values)})


def retention(told: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean and interval of each series by the fields; a fact of a seed counts once, however many of
    its copies were asked.
    """
    facts = (
        told.groupby([*by, "series", "seed", "fact_id"], observed=True)
        .retained.mean()
        .reset_index()
    )
    found = (
        facts.groupby([*by, "series"], observed=True)
        .retained.apply(_summed)
        .unstack()
        .reset_index()
    )
    return found.astype({"n": int})


def paired(told: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """For each field, each value against the field's first: the mean difference over facts that
    both have, all else equal.
    """
    rows = []
    for name in by:
        rest = [other for other in by if other != name]
        wide = told.pivot_table(
            index=["series", *rest, "seed", "fact_id"],
            columns=name,
            values="retained",
            aggfunc="mean",
            observed=True,
        )
        first, *others = wide.columns
        for other in others:
            both = (
                (wide[other] - wide[first])
                .dropna()
                .groupby(["series", "seed", "fact_id"], observed=True)
                .mean()
            )  # a fact is one draw
            for series, values in both.groupby("series", observed=True):
                rows.append(
                    {
                        "field": name,
                        "of": other,
                        "against": first,
                        "series": series,
                        **_summed(values),
                    }
                )
    return pd.DataFrame(
        rows, columns=["field", "of", "against", "series", "mean", "low", "high", "n"]
    ).astype({"n": int})


def _figures(folder: Path, out: Path) -> list[tuple[str, str]]:
    """The figures of 10_collect over these runs, as base64 PNG, each with what it says in words."""
    run = batch.run(COLLECT, {"folder": str(folder.resolve())}, out=out / "figures")
    cells = json.loads((run.folder / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    found = [
        output["data"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return [
        ("".join(data["image/png"]).replace("\n", ""), "".join(data["text/plain"]))
        for data in found
    ]


def _page(
    folder: Path,
    told: pd.DataFrame,
    table: pd.DataFrame,
    differences: pd.DataFrame,
    images: list[tuple[str, str]],
    problems: list[str],
) -> str:
    style = "body{font:15px sans-serif;margin:2em auto;max-width:70em}td,th{padding:.2em .7em;text-align:right}table{border-collapse:collapse}"
    number = "{:.3f}".format
    said = f"{told.run.nunique()} runs, {told.seed.nunique()} seeds, {told.fact_id.nunique()} facts in {html.escape(str(folder))}"
    parts = [
        f"<h1>Retention</h1><p>{said}. Means with 95 % bootstrap intervals over facts and seeds; <i>kept</i> is among the edits that took.</p>",
        table.to_html(index=False, float_format=number, border=0),
        "<h2>Paired differences</h2><p>The same facts under two values of a field, all else equal.</p>",
        differences.to_html(index=False, float_format=number, border=0)
        if len(differences)
        else "<p>None: no two runs share facts.</p>",
        *(
            f'<p><img alt="{html.escape(said)}" src="data:image/png;base64,{image}"></p>'
            for image, said in images
        ),
        *(["<h2>Left out</h2>"] if problems else []),
        *(f"<p>{html.escape(problem)}</p>" for problem in problems),
    ]
    return pages.page("Retention", style, "".join(parts))
