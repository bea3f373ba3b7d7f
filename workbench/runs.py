"""The run folder: written under a temporary name, renamed when whole; read, listed, compared.

Reading needs no torch.

runs/<id>/
  run.json             status, every parameter, versions, seconds; size and SHA-256 of every other
                       file, and its own; written last
  probes.parquet       a row an edited model, step, and prompt (step -1: before the edit, 0: after
                       it, then training steps)
  lens.parquet         edited_model, step, fact_id, layer, category, probability, rank
  tokens.parquet       edited_model, step, fact_id, layer, rank (1 to 10), token, the word that it
                       begins, probability
  positions.parquet    edited_model, step, fact_id of edited facts, position in the prompt (0:
                       where the answer is read, -1 before it), layer, rank (1 to 5), at (the
                       prompt's token there), token, probability, p_true, p_edited
  training.parquet     edited_model, step, epoch, metric, loss, learning_rate, moved
  merged.parquet       with an adapter: the last probes again, the adapter written into the weights
  deltas/<edited_model>.safetensors, adapters/<edited_model>/ (a PEFT folder)

A run that varied a field holds run.json alone, which names its `members`, the runs beside it.
"""

import hashlib
import importlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
import pandas as pd
import psutil
import safetensors

from workbench import files
from workbench.facts import BadInput

SCHEMA = 2  # of the folder; raise it when a column changes its meaning
AGAIN = "make the run again (`workbench run ... --again`; a sweep does it by itself)"
TABLES = ("probes", "lens", "tokens", "positions", "training")
OF_EVERY_RUN = (*TABLES, "merged")  # names that no measure of your own may take
NOTEBOOK = ("notebook.ipynb", "notebook.html")  # papermill writes them while the notebook runs
SERIES = {  # name -> (group, which checkpoint, only edits that took)
    "edit success": ("edited", "first", False),
    "held-out success": ("paraphrase", "first", False),
    "edits kept": ("edited", "last", True),
    "held-out kept": ("paraphrase", "last", True),
    "intrinsic kept": ("intrinsic", "last", False),
}
# Before the name of a series of edits: whether they put right what the model got wrong.
KINDS = {"false": False, "harmless": True}


def _table(name: str) -> cached_property:
    return cached_property(lambda run: run.table(name))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, read from its folder; tables are loaded when first asked for."""

    folder: Path
    about: Mapping

    probes = _table("probes")
    lens = _table("lens")
    tokens = _table("tokens")
    positions = _table("positions")
    training = _table("training")

    @property
    def spec(self) -> Mapping:
        """The experiment as it was resolved, every number named."""
        return self.about["spec"]

    @property
    def files(self) -> Mapping[str, Mapping]:
        """Size and SHA-256 of every file but run.json, by its name."""
        return self.about["files"]

    def file(self, name: str) -> Path:
        """The path of one of the run's files.

        Raises:
            BadInput: its sum is not the recorded one, or the run has no such file.
        """
        if name not in self.files:
            raise BadInput(f"{self.folder}: this run has no {name}")
        _check_file(self.folder, name, self.files[name])
        return self.folder / name

    @cached_property
    def merged(self) -> pd.DataFrame | None:
        """With an adapter: the last probes again, with the adapter written into the weights."""
        return self.table("merged") if "merged.parquet" in self.files else None

    @cached_property
    def shares(self) -> dict[str, dict[str, float]]:
        """Of each of SERIES: fact -> the share retained.

        The mean is over the fact's prompts and edited models, which are no independent draws.
        """
        columns = ["edited_model", "step", "group", "fact_id", "took", "retained"]
        probes = pd.read_parquet(self.file("probes.parquet"), columns=columns)
        newest = probes.groupby("edited_model").step.transform("max")
        checkpoints = {"first": probes.step == 0, "last": probes.step == newest}
        took = as_bool(probes.took)
        retained = as_bool(probes.retained).astype(float)
        shares = {}
        for name, (group, checkpoint, only_took) in SERIES.items():
            rows = checkpoints[checkpoint] & (probes.group == group)
            if only_took:
                rows &= took
            shares[name] = retained[rows].groupby(probes.fact_id[rows]).mean().to_dict()
        return shares

    @cached_property
    def measured(self) -> pd.DataFrame:
        """What the measures that the Spec names said at each look: `measure`, `edited_model`,
        `step`, `fact_id`, `quantity`, `value`.
        """
        by = ["edited_model", "step", "fact_id"]
        names = self.spec.get("measures", ())  # older runs have none
        tables = [tidy(name, self.table(name), by).assign(measure=name) for name in names]
        none = pd.DataFrame(columns=["measure", *by, "quantity", "value"])
        return pd.concat([none, *tables], ignore_index=True)

    def table(self, name: str) -> pd.DataFrame:
        """One of TABLES, or that of a measure that the Spec names."""
        return pd.read_parquet(self.file(f"{name}.parquet"))

    def plot(self, group: str = "edited"):
        """Where the probability of a group's facts goes, see `plots.category_mass`."""
        return _plots().category_mass(self, group)

    def explore(self, *others: "Run", view: Mapping | None = None):
        """The run, fact by fact and checkpoint by checkpoint, see `explorer.Explorer`."""
        return importlib.import_module("workbench.explorer").Explorer(self, *others, view=view)

    def top_tokens(self, fact_id: str = "", k: int = 3) -> pd.DataFrame:
        """The likeliest tokens at each look, see `plots.top_tokens`."""
        return _plots().top_tokens(self, fact_id, k)

    @property
    def members(self) -> list["Run"]:
        """The runs that this one is made of, if it varied a field; they lie beside it."""
        return [read(_member(self.folder, name)) for name in self.about.get("members", ())]

    @property
    def deltas(self) -> list[Path]:
        """Files of the edits, in order of the edited models; `deltas.load` reads one."""
        names = [name for name in self.files if name.startswith("deltas/")]
        return [self.file(name) for name in sorted(names, key=lambda name: int(Path(name).stem))]


def _plots():
    return importlib.import_module("workbench.plots")  # reading a run takes no plotting


def as_bool(column: pd.Series) -> pd.Series:
    """A column of true, false and null as bool; null is false."""
    return column.fillna(False).astype(bool)


def seen_through(run: Run) -> str:
    """The lens of its looks, where it is not the logit lens."""
    kind = run.spec.get("lens", "logit")  # older runs have no other
    return "" if kind == "logit" else f"; {kind} lens"


def value_name(value) -> str:
    """A field's value as it stands on an axis; an empty one is the preset's, or none."""
    if not isinstance(value, list | tuple):
        return str(value) or "none"
    is_blocks = all(isinstance(one, int) for one in value)
    name = spans(value) if is_blocks else ", ".join(map(str, value))
    return name if value else "preset"


def spans(blocks: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    blocks = sorted(blocks)
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    pairs = zip(starts, ends, strict=True)
    words = [str(start) if start == end else f"{start}-{end}" for start, end in pairs]
    return ", ".join(words) or "none"


def tidy(name: str, table: pd.DataFrame, by: Sequence[str] = ("fact_id",)) -> pd.DataFrame:
    """A measure's table with a row for each of `by` and `quantity`: the mean `value`. Of another
    form, its columns of numbers are the quantities.
    """
    by = list(by)
    if not isinstance(table, pd.DataFrame) or "fact_id" not in table:
        what = f"measure {name}: give back a table with fact_id and numbers"
        raise BadInput(f"{what}, not {type(table).__name__}")
    if "quantity" not in table:
        numbers = table.select_dtypes(["number", "bool"]).columns.drop(by, errors="ignore")
        table = table.melt(by, numbers, "quantity", "value")
    rows = table.astype({"value": float}).groupby([*by, "quantity"], as_index=False, sort=False)
    return rows.value.mean()


def interval(values, least: float = 0, draws: int = 1000) -> tuple[float, ...]:
    """95 % interval of the mean of independent values, by bootstrap; where all agree, which that
    would call certain, from what so many may have missed of others (Clopper and Pearson).

    Args:
        least: the values are shares, from 0 to 1, or differences of shares, from -1; of what has
            no such bounds infinity: where all agree nothing is known of others.
    """
    every, counts = numpy.unique(values, return_counts=True)
    n = counts.sum()
    if len(every) == 1 and least <= every[0] <= 1:
        [value] = every.tolist()
        like = 0.025 ** (1 / n)  # of all that there are
        return least + like * (value - least), 1 - like * (1 - value)
    drawn = numpy.random.default_rng(0).multinomial(n, counts / n, draws)
    return tuple(numpy.quantile(drawn @ every / n, [0.025, 0.975]).tolist())


def watched(probes: pd.DataFrame) -> pd.DataFrame:
    """Those of the edits that took, and of the intrinsic facts."""
    took = (probes.group == "edited") & as_bool(probes.took)
    return probes[took | (probes.group == "intrinsic")]


def read(folder: str | Path) -> Run:
    """A finished run, whose files have the recorded sizes. Their sums are looked at when they are
    read.

    Raises:
        BadInput: no run there, unfinished, damaged, or written by a version with another schema.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: no finished run there (run.json is missing)") from None
    except (OSError, ValueError, RecursionError) as error:  # no JSON, or brackets without end
        raise BadInput(f"{folder}/run.json: damaged ({error}); {AGAIN}") from None
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        versions = f"has schema {schema}, this version reads {SCHEMA}"
        advice = f"read it with the version that wrote it, or {AGAIN}"
        raise BadInput(f"{folder}: run.json {versions}; {advice}")
    if about.get("sha256") != _sum(about):
        raise BadInput(f"{folder}/run.json: damaged (another SHA-256 than its own); {AGAIN}")
    for name, expected in about["files"].items():
        _check_file(folder, name, expected, sizes_alone=True)
    for name in about.get("members", ()):
        _member(folder, name)
    return Run(folder=folder, about=about)


def _check_file(folder: Path, name: str, expected: Mapping, sizes_alone: bool = False) -> None:
    problem = files.problem(folder, name, expected, sizes_alone)
    if problem:
        raise BadInput(f"{folder / name}: damaged, it {problem}; {AGAIN}")


def _member(folder: Path, name: str) -> Path:
    """The folder of a member: a plain name beside the run, and no link to somewhere else."""
    path = folder.parent / name
    if name in ("", ".", "..", folder.name) or Path(name).name != name or path.is_symlink():
        problem = f"names the member {name!r}, which is no run beside it"
        raise BadInput(f"{folder}/run.json: {problem}; {AGAIN}")
    return path


def _sum(about: Mapping) -> str:
    """SHA-256 of what run.json says, but for this sum."""
    text = json.dumps({**about, "sha256": ""}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def series(runs: Sequence[Run], names: Sequence[str], fields: pd.DataFrame) -> pd.DataFrame:
    """Some SERIES of runs: a row a fact, with `series`, `fact_id`, `retained` (a share), and its
    run's row of `fields`.

    "false" or "harmless" before the name of a series of edits takes those edits alone.
    """
    rows = []
    for number, run in enumerate(runs):
        harmless = set(run.about.get("harmless", ()))
        for name in names:
            kind, _, rest = name.partition(" ")
            for fact, share in run.shares[rest if kind in KINDS else name].items():
                if kind not in KINDS or KINDS[kind] == (fact in harmless):
                    rows.append((number, name, fact, share))
    table = pd.DataFrame(rows, columns=["number", "series", "fact_id", "retained"])
    return table.join(fields, on="number").drop(columns="number")


def finished(folder: Path) -> bool:
    """Whether a finished run lies there and is whole, every file with its recorded sum, and so are
    the runs that it names.
    """
    try:
        run = read(folder)
        for part in (run, *run.members):
            for name in part.files:
                part.file(name)
    except BadInput:
        return False
    return True


def place(out: str | Path = "", notebook: str | Path = "") -> Path:
    """The folder of runs: `out`, else the one that WORKBENCH_OUT names, else runs/ of the project.

    The project is the nearest folder upwards, from the notebook or else from where it runs, that
    has a pyproject.toml or a .git; without one the runs lie beside the notebook.
    """
    chosen = str(out) or os.environ.get("WORKBENCH_OUT")
    if chosen:
        return Path(chosen)
    folder = Path(notebook).absolute().parent if str(notebook) else Path.cwd()
    for above in (folder, *folder.parents):
        if (above / "pyproject.toml").exists() or (above / ".git").exists():
            return above / "runs"
    return folder / "runs"


def listed(out: str | Path = "") -> list[Run]:
    """The finished runs below a folder, oldest first.

    One that cannot be read, or whose probes are damaged, is left out, with a visible line.
    """
    paths = sorted(place(out).glob("[!.]*/run.json"), key=lambda path: path.stat().st_mtime)
    whole = []
    for path in paths:
        try:
            run = read(path.parent)
            if "probes.parquet" in run.files:
                run.file("probes.parquet")
            whole.append(run)
        except BadInput as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return whole


def collect(out: str | Path, **fields) -> list[Run]:
    """The finished runs of experiments below a folder whose Spec has these fields; "" and None
    match anything.

    In a notebook that is itself run in batch, its run.json names the ones that lie beside it as
    members, and the paths of all.
    """
    wanted = {name: value for name, value in fields.items() if value not in ("", None)}
    out = place(out)
    runs = [run for run in listed(out) if "probes.parquet" in run.files]
    runs = [run for run in runs if "members" not in run.about]
    for name, value in wanted.items():
        runs = [run for run in runs if run.spec.get(name) == value]
    if not runs:
        advice = "make some with `workbench run` or `workbench sweep`"
        raise BadInput(f"{out}: holds no finished run with {wanted or 'probes'}; {advice}")
    own_folder = os.environ.get("WORKBENCH_RUN")
    if own_folder:
        beside = Path(own_folder).resolve().parent
        members = [run.folder.name for run in runs if run.folder.resolve().parent == beside]
        paths = [str(run.folder) for run in runs]
        write(Path(own_folder), {"spec": wanted, "members": members, "collected": paths}, {})
    return runs


def check_any(arms: Sequence[Run]) -> None:
    """BadInput if there are no runs."""
    if not arms:
        raise BadInput("no runs to draw or compare; give at least one")


def compare(arms: Sequence[Run], by: str) -> pd.DataFrame:
    """Retention of runs (arms) that differ in the field `by`, read where comparing is fair.

    Tuning that moves less of the model also learns less, so a table at the end of each run would
    reward it for that. Here every edited model is read where it first is at one `level` of the
    validation metric, the loosest of all models' best ones, and once more at the last step that all
    of them have.

    Returns:
        A row an arm: its value, `reached` (share of its models that reached the task's threshold),
        `best` metric (the loosest of its models'), `level`, `step` (where its models are first at
        the level; the mean), `edited` (share retained of the edits that took) and `intrinsic`
        there, the same `_at_<step>` for the common step; with an adapter `merged_gap`, the largest
        difference in p(true) of any probe once the adapter is merged.
    """
    check_any(arms)
    if len({(run.spec["task"], run.spec["model"], run.spec["task_data"]) for run in arms}) > 1:
        raise BadInput("runs of several tasks or models cannot be compared; group them first")
    sign = 1 if arms[0].about["tuning"]["metric"] == "loss" else -1  # so that less is better
    curve_of = {"index": "step", "columns": "edited_model", "values": "metric"}
    curves = [sign * run.training.pivot_table(**curve_of) for run in arms]  # NaN after its end
    all_models = pd.concat(curves, axis=1)
    level = all_models.min().max()
    common = int(all_models.dropna().index.max())
    rows = []
    for run, curve in zip(arms, curves, strict=True):
        steps = (curve <= level).idxmax()
        ended = run.about["ended"]
        row = {by: run.spec[by], "reached": ended.count("reached") / len(ended)}
        row |= {"best": sign * curve.min().max(), "level": sign * level, "step": steps.mean()}
        row |= _retained(run, steps)
        if run.merged is not None:
            row["merged_gap"] = _merged_gap(run)
        at_common = _retained(run, 0 * steps + common)
        row |= {f"{group}_at_{common}": share for group, share in at_common.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _merged_gap(run: Run) -> float:
    newest = run.probes.groupby("edited_model").step.transform("max")
    active = run.probes[run.probes.step == newest]
    # of those that are known
    return run.merged.p_true.sub(active.p_true.reset_index(drop=True)).abs().max()


def _retained(run: Run, steps: pd.Series) -> dict[str, float]:
    """Shares retained, each edited model at its own step."""
    probes = run.probes[run.probes.step == run.probes.edited_model.map(steps)]
    kept = watched(probes).groupby("group").retained.mean()
    return kept.reindex(["edited", "intrinsic"]).to_dict()


def write(folder: Path, about: Mapping, tables: Mapping[str, pd.DataFrame]) -> Run:
    """Write the tables and, last, run.json into a folder that exists.

    The disk being full is one clear line.
    """
    for name, table in tables.items():
        with files.written(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial, index=False)
    return _seal(folder, about, but=(*NOTEBOOK, "run.json"))


def seal(folder: Path) -> Run:
    """Write run.json again, over the executed notebook and its page too, which make it whole."""
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return _seal(folder, about, but=("run.json",))


def _seal(folder: Path, about: Mapping, but: Sequence[str]) -> Run:
    known = json.loads(json.dumps({**about, "schema": SCHEMA, "status": "finished"}, default=str))
    known["files"] = {name: state for name, state in files.sums(folder).items() if name not in but}
    known["sha256"] = _sum(known)
    with files.written(folder / "run.json") as partial:
        partial.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    return read(folder)


def progress(phase: str, done: int = 0, total: int = 0) -> None:
    """Write how far this run is into the file that WORKBENCH_PROGRESS names, as one JSON object."""
    path = os.environ.get("WORKBENCH_PROGRESS")
    if path:
        text = json.dumps({"phase": phase, "done": done, "total": total})
        with files.written(path) as partial:
            partial.write_text(text, encoding="utf-8")


def clean(out: Path, run_id: str = "*") -> None:
    """Remove what processes of this machine that are no more had begun to write."""
    ending = f"@{platform.node()}.partial"
    for partial in out.glob(f".{run_id}.*{ending}"):
        pid = partial.name.removesuffix(ending).rpartition(".")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(partial, ignore_errors=True)


def opened(out: str | Path, run_id: str) -> AbstractContextManager[Path]:
    """Where a run is written: the folder that WORKBENCH_RUN names, else a new one of this id."""
    own_folder = os.environ.get("WORKBENCH_RUN")
    return nullcontext(Path(own_folder)) if own_folder else new_folder(out, run_id)


@contextmanager
def new_folder(out: str | Path, run_id: str) -> Iterator[Path]:
    """A folder under a temporary name, renamed to the run's id if the block ends well and removed
    if it does not.

    Raises:
        BadInput: `out` cannot be written, or something other than a folder has the name already;
            the disk is full.
    """
    out = Path(out)
    final = out / run_id
    if final.is_file() or final.is_symlink():
        raise BadInput(f"{final}: is a file or a link; choose another out folder")
    partial = out / f".{run_id}.{os.getpid()}@{platform.node()}.partial"
    try:
        clean(out, run_id)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise files.unwritable(out, error, "choose another out folder") from None
    try:
        yield partial
        files.open_as_umask(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, safetensors.SafetensorError) as error:
        if files.no_room(error):
            raise files.unwritable(final, error) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def whole_checkpoint(folder: Path) -> str | None:
    """The newest of a Trainer's checkpoints that was written to its end."""
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    steps = {int(path.name.rpartition("-")[2]): str(path) for path in checkpoints}
    return steps[max(steps)] if steps else None
