"""Figures and tables of a run.

Each figure is a Drawing: the figure, the tidy data it shows, and a sentence that says what is seen.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from workbench import facts, files, inert, runs
from workbench.records import BadInput, check_choice
from workbench.runs import SERIES, Run
from workbench.spec import Spec

CATEGORIES = ("true", "edited", "related", "stop", "other")
GROUPS = ("edited", "intrinsic", "paraphrase", "neighbourhood")
KEPT_GROUPS = ("edited", "intrinsic")
STEP_NAMES = {-1: "before", 0: "edited"}
METRICS = {"loss": "validation loss (nats a token)", "accuracy": "validation accuracy"}
UNCLEAR = "the first tokens of their answers do not tell these apart"

# Fields of a Spec that do not make runs unlike
ASIDE = ("seed", "device", "device_map", "fact", "subject", "prompt", "object", "target")
# Fields that bring usual numbers for those in BROUGHT
BRING = ("model", "task", "task_data", "adapter")
BROUGHT = (
    *("learning_rate", "max_steps", "eval_every", "n_train", "n_valid"),
    *("batch_size", "threshold"),
)

BLOCKS = re.compile(r"(after|window|outside):(\d+(?:-\d+)?)")  # a plan that names blocks
MARKERS = "osD^v"
DASHES = ("-", "--", ":", "-.", (0, (1, 3)))
SHARE = (-0.03, 1.05)  # limits of an axis from 0 to 1, with room for markers
Arms = Sequence[Run]  # runs that are compared or pooled
RESAMPLED = 2_000_000  # values held at once by the bootstrap


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with the tidy data it shows and a summary in words. A notebook shows it as PNG."""

    figure: Figure
    data: pd.DataFrame
    summary: str

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": self.png(), "text/plain": self.summary}

    def png(self, dpi: int = 110) -> bytes:
        buffer = io.BytesIO()
        self._write(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """PNG or SVG by the path's ending, and the data as CSV beside it."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise BadInput(f"{path}: a figure ends in .png or .svg")
        salted = matplotlib.rc_context({"svg.hashsalt": "workbench"})
        with salted, files.written(path) as partial:
            self._write(partial, format=path.suffix[1:], dpi=150)
        inert.write_csv(self.data, path.with_suffix(".csv"))
        return path

    def _write(self, to: str | Path | io.BytesIO, **options) -> None:
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)  # a dollar sign in a name begins no formula
        self.figure.savefig(to, bbox_inches="tight", **options)


# --- Tables


def top_tokens(run: Run, fact_id: str = "", k: int = 3) -> pd.DataFrame:
    """The k likeliest next tokens of a fact's prompt at every checkpoint, with their probabilities:
    Table 2 of arXiv 2507.14198.
    """
    edited = run.probes[run.probes.group == "edited"]
    tokens = run.tokens[run.tokens.fact_id == (fact_id or edited.fact_id.iloc[0])]
    if tokens.empty:
        raise BadInput(f"{run.folder}: holds no fact {fact_id!r}")
    tokens = tokens[(tokens.layer == tokens.layer.max()) & (tokens["rank"] <= k)]
    words = tokens.get("word", tokens.token.str.strip())  # older runs have none
    cells = words + " " + tokens.probability.map("{:.3f}".format)
    table = cells.groupby([tokens.step, tokens["rank"]]).first().unstack()
    table.columns = [f"top {rank}" for rank in table.columns]
    return table.set_axis(step_names(table.index)).rename_axis("step")


def retention_table(run: Run) -> pd.DataFrame:
    """Share retained by group and step, over all facts and over those whose edit took, with n."""
    by = ["group", "step"]
    probes = _to_the_end(_since_edit(run), ["edited_model"])
    every = probes.groupby(by).retained.agg(n="size", retained="mean")
    took = probes[runs.as_bool(probes.took)].groupby(by).retained
    return every.join(took.agg(n_took="size", retained_of_took="mean")).reset_index()


# --- One run


def category_mass(run: Run, group: str = "edited") -> Drawing:
    """Where the next-token probability goes over fine-tuning, on the facts' prompts: Figure 4 of
    arXiv 2507.14198.
    """
    check_choice("group", group, GROUPS)
    probes = run.probes[run.probes.group == group]
    if probes.empty:
        return _nothing(f"this run has no {group} facts")
    data = _category_mass(probes)
    if data.empty:
        return _nothing(f"{group} facts: {UNCLEAR}")
    figure, axes = _draw_category_mass(data)
    n = data.fact_id.nunique()
    bands = "; bands: 95 % interval over facts" if n > 1 else ""
    axes.set_title(f"{group} facts (n = {n}{bands}){_rounded([run])}")
    end = data.step.max()
    name = "edited" if group == "edited" else "true"
    mean = data[data.category == name].groupby("step").probability.mean()
    summary = f"{group}, n = {n}: mean p({name}) is {mean[0]:.2f} after the edit"
    summary += f" and {mean[end]:.2f} after {end} steps{bands}"
    return Drawing(figure=figure, data=data, summary=summary)


def _category_mass(probes: pd.DataFrame) -> pd.DataFrame:
    """A row a category, step and fact, its mean probability over models and prompts."""
    masses = {f"p_{name}": name for name in CATEGORIES}
    table = _to_the_end(probes, ["edited_model"]).rename(columns=masses)
    long = table.melt(["step", "fact_id"], list(CATEGORIES), "category", "probability").dropna()
    by_fact = long.groupby(["category", "step", "fact_id"], as_index=False, sort=False)
    return by_fact.probability.mean()


def _draw_category_mass(data: pd.DataFrame) -> tuple[Figure, Axes]:
    steps = sorted(data.step.unique())
    place = data.step.map(steps.index)  # checkpoints stand at equal distances
    palette = dict(zip(CATEGORIES, seaborn.color_palette("colorblind", 5), strict=True))
    markers = dict(zip(CATEGORIES, MARKERS, strict=True))
    figure, (axes,) = _axes(6.4, 3.6)
    looks = {"palette": palette, "markers": markers, "dashes": False}
    names = list(data.category.unique())
    _lines(axes, data.assign(place=place), "category", names, x="place", y="probability", **looks)
    axes.set(xlabel="fine-tuning step", ylabel="probability of the next token", ylim=SHARE)
    axes.set_xticks(range(len(steps)), step_names(steps))
    _legend_beside(axes, "first token of")
    return figure, axes


def lens_heatmap(
    run: Run, group: str = "edited", categories: Sequence[str] = ("edited", "true")
) -> Drawing:
    """Logit lens, layer by checkpoint: the probability of the edited and the true token after each
    block; edited blocks stand between orange lines.

    For a group of several facts the mean is drawn. Cells carry the median rank (1 = top) where it
    is 100 or better.
    """
    check_choice("group", group, GROUPS)
    categories = [categories] if isinstance(categories, str) else categories
    for category in categories or ("",):
        check_choice("category", category, CATEGORIES)
    members = run.probes[run.probes.group == group].fact_id.unique()
    if not len(members):
        return _nothing(f"this run has no {group} facts")
    lens = run.lens[run.lens.category.isin(categories) & run.lens.fact_id.isin(members)]
    n = lens[lens.probability.notna()].fact_id.nunique()
    if not n:
        return _nothing(f"{group} facts: {UNCLEAR}")
    cells = _to_the_end(lens, ["edited_model"]).groupby(["category", "layer", "step"])
    data = cells.agg(probability=("probability", "mean"), rank=("rank", "median")).reset_index()
    figure = _draw_lens(data, categories, run.about.get("layers", ()))
    title = f"{group} facts, mean (n = {n}); edited block between orange lines{_rounded([run])}"
    figure.suptitle(title, fontsize=10)
    last = data[data.layer == data.layer.max()].set_index(["category", "step"]).probability
    name = categories[0]
    p = last[name]
    end = data.step.max()
    summary = f"p({name} token) after the last block: {p[0]:.2f} after the edit, "
    summary += f"{p[end]:.2f} after {end} steps (n = {n})"
    return Drawing(figure=figure, data=data, summary=summary)


def _draw_lens(data: pd.DataFrame, categories: Sequence[str], edited: Sequence[int]) -> Figure:
    """A heatmap a category, block 0 at the bottom."""
    steps = sorted(data.step.unique())
    n_layers = data.layer.max() + 1
    width = 1.6 + 0.62 * len(steps) * len(categories)
    figure, all_axes = _axes(width, 0.8 + 0.27 * n_layers, len(categories))
    for axes, category in zip(all_axes, categories, strict=True):
        part = data[data.category == category].set_index(["layer", "step"])
        ranks = part["rank"].unstack()
        texts = ranks.map("{:g}".format).where(ranks <= 100, "")
        _heatmap(axes, part.probability.unstack(), texts, fontsize=7)
        for layer in edited:
            axes.hlines([layer, layer + 1], 0, len(steps), color="tab:orange", lw=1.2)
        axes.set(xlabel="fine-tuning step", ylabel="", title=f"{category} token")
        axes.set_xticklabels(step_names(steps), rotation=45, ha="right")
    all_axes[0].invert_yaxis()
    all_axes[0].set_ylabel("block (lens after it)")
    label = "probability (cell text: median rank)"
    figure.colorbar(axes.collections[0], ax=list(all_axes), label=label, fraction=0.05)
    return figure


# --- Several runs


def retention_by(
    arms: Arms,
    by: str,
    series: Sequence[str] = ("edit success", "edits kept", "intrinsic kept"),
    label: str = "",
) -> Drawing:
    """Success right after the edit and retention after fine-tuning, against the field that the runs
    vary; 95 % intervals over facts.

    "kept" of edits is among those that took. Figures 2, 5, 6 and 7 and Table 1 of arXiv 2507.14198
    are of this kind.
    """
    data = _series(arms, series, value=by)
    order = _order(value_name(run.spec[by]) for run in arms)
    width = max(4.2, 1.1 * len(order) + 2.6)
    figure, (axes,) = _axes(width, 3.6)
    _points(axes, data, order, list(series))
    axes.set(ylim=SHARE, xlabel=label or by, ylabel="share of facts (95 % interval over facts)")
    points = data.groupby(["series", "value"]).retained
    n = _span(points.size())
    axes.set_title(f"n = {n} a point{_pooled(arms, by)}", fontsize=10)
    _legend_beside(axes)
    return Drawing(figure=figure, data=data, summary=_in_words(points.mean(), series, order))


def _points(axes: Axes, data: pd.DataFrame, order: list[str], series: list[str]) -> None:
    """Means by value, a series in one colour in every figure; whiskers: 95 % intervals."""
    names = SERIES if set(series) <= set(SERIES) else series
    palette = dict(zip(names, seaborn.color_palette("colorblind"), strict=False))
    looks = {"palette": palette, "markers": list(MARKERS), "linestyles": list(DASHES)}
    sizes = {"dodge": 0.25, "capsize": 0.08, "markersize": 7, "linewidth": 1.4}
    columns = {"x": "value", "y": "retained", "hue": "series", "order": order, "hue_order": series}
    seaborn.pointplot(data, **columns, **looks, **sizes, seed=0, ax=axes)


def retention_curves(arms: Arms, by: str, against: str = "step") -> Drawing:
    """Edits kept (of those that took) and intrinsic facts kept over fine-tuning, a line a value.

    Args:
        against: "step", or "metric": the task's validation metric, at which arms that learn at
            different speeds are compared.
    """
    check_choice("against", against, ("step", "metric"))
    data = _kept(arms, by)
    metric = arms[0].about["tuning"]["metric"]
    order = _order(value_name(run.spec[by]) for run in arms)
    figure, all_axes = _two_groups(data, "value", order, by, x=against, y="retained")
    label = "fine-tuning step" if against == "step" else METRICS[metric]
    for axes in all_axes:
        axes.set(ylim=SHARE, xlabel=label, ylabel="share kept")
        if against == "metric":
            axes.set_xinverted(metric == "loss")  # learning goes to the right
            level = runs.compare(arms, by).level.iloc[0]  # where all arms can be compared
            axes.axvline(level, color="0.5", lw=1)
            above = {"ha": "right", "va": "bottom", "transform": axes.get_xaxis_transform()}
            axes.text(level, 0.01, "all arms reach", fontsize=7, rotation=90, **above)
    ends = data[data.step == data.groupby("run").step.transform("max")]
    words = _in_words(ends.groupby(["group", "value"]).retained.mean(), KEPT_GROUPS, order)
    data = data.drop(columns="run")
    return Drawing(figure=figure, data=data, summary=f"kept at the end: {words}")


def _kept(arms: Arms, by: str) -> pd.DataFrame:
    """A row a run, step and fact (edits that took, and intrinsic facts) from step 0 on: value of
    `by`, the metric (the mean of all models with this value) and the share retained.
    """
    runs.check_any(arms)
    parts = []
    for run in arms:
        metric = run.training[["edited_model", "step", "metric"]]
        probes = runs.watched(_since_edit(run)).merge(metric, on=["edited_model", "step"])
        probes["value"] = value_name(run.spec[by])
        probes["run"] = run.folder.name
        parts.append(probes)
    by_value = pd.concat(parts).groupby("value", sort=False)
    model = ["run", "edited_model"]
    table = pd.concat(_to_the_end(part, model) for _, part in by_value)
    row = ["run", "value", "step", "group", "fact_id"]
    by_fact = table.groupby(row, as_index=False, sort=False)
    data = by_fact[["metric", "retained"]].mean()
    return data.assign(metric=data.groupby(["value", "step"]).metric.transform("mean"))


def elasticity(arms: Arms) -> Drawing:
    """Bits per fact token against fine-tuning tokens, by the number of wordings that wrote the
    fact.

    Bits are -log2 p of the object's first token, the edited one for edits that took, the true one
    for intrinsic facts. Wordings: the statements that the edit saw, and the ones that pre-training
    showed, which are known for the embedded world alone. A line ends where the first of its models
    does; a fact counts once, as its mean over models and runs.
    """
    runs.check_any(arms)
    table = pd.concat([_bits(run) for run in arms]).dropna(subset=["wordings", "bits"])
    table = table.astype({"wordings": int})
    line, point = ["group", "wordings"], ["group", "wordings", "step", "tokens"]
    n_models = table.groupby([*line, "tokens"]).model.transform("nunique")
    whole = table[n_models == table.groupby(line).model.transform("nunique")]
    data = whole.groupby([*point, "fact_id"], as_index=False).bits.mean()
    order = sorted(data.wordings.unique())
    figure, all_axes = _two_groups(data, "wordings", order, "wordings", x="tokens", y="bits")
    pooled = _pooled(arms, "paraphrases").replace("; ", "\n")
    for axes in all_axes:
        axes.set(xlabel="fine-tuning tokens", ylabel="bits per fact token (0 = certain)")
        axes.set_title(axes.get_title() + pooled, fontsize=10)
    ends = data[data.tokens == data.groupby(line).tokens.transform("max")]
    words = _in_words(ends.groupby(line).bits.mean(), KEPT_GROUPS, order)
    return Drawing(figure=figure, data=data, summary=f"bits at the end by wordings: {words}")


def _bits(run: Run) -> pd.DataFrame:
    """A row a model, step and prompt of the edits that took and of the intrinsic facts."""
    known = [request.fact for request in facts.read(Spec(**run.spec).source)]
    wordings = {fact.id: fact.exposure.paraphrases for fact in known if fact.exposure}
    table = runs.watched(_since_edit(run))
    is_edited = table.group == "edited"
    shown = table.fact_id.map(wordings)
    table = table.assign(wordings=shown.mask(is_edited, run.spec["paraphrases"]))
    p = table.p_true.mask(is_edited, table.p_edited)
    table["bits"] = -numpy.log2(p.clip(lower=1e-12))
    table["tokens"] = table.step * run.about["tuning"]["tokens_per_step"]
    table["model"] = f"{run.folder} " + table.edited_model.astype(str)
    return table


def retention_grid(arms: Arms, rows: str, columns: str, series: str = "edits kept") -> Drawing:
    """One of SERIES by two fields of the runs, a cell the mean over facts and seeds with its 95 %
    interval: Table 1 of arXiv 2507.14198.
    """
    data = _series(arms, [series], row=rows, column=columns)
    if data.empty:
        return _nothing(f"these runs have no {SERIES[series][0]} facts")
    cells = data.groupby(["row", "column"], sort=False).retained
    means = cells.mean().unstack(sort=False).rename_axis(index=rows, columns=columns)
    texts = cells.apply(_cell_text).unstack(sort=False)
    n_rows, n_columns = means.shape
    figure, (axes,) = _axes(2.2 + 1.5 * n_columns, 1.1 + 0.62 * n_rows)
    _heatmap(axes, means, texts, fontsize=8)
    axes.set_title(series + _pooled(arms, rows, columns), fontsize=10)
    figure.colorbar(axes.collections[0], ax=axes, label="share of facts")
    row, column = means.stack().idxmax()
    best = f"{rows} {row} and {columns} {column} ({means.max(axis=None):.2f})"
    return Drawing(figure=figure, data=data, summary=f"{series}: most with {best}")


def _cell_text(values: pd.Series) -> str:
    low, high = interval(values)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]\nn = {len(values)}"


# --- What the tables of several figures share


def interval(values: pd.Series, draws: int = 1000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of independent values."""
    rng = numpy.random.default_rng(0)
    sample = values.to_numpy(dtype="float32")
    n = len(sample)
    means = []
    at_once = max(1, RESAMPLED // n)
    for start in range(0, draws, at_once):
        size = (min(at_once, draws - start), n)
        means.append(sample[rng.integers(n, size=size)].mean(1))
    low, high = numpy.quantile(numpy.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def step_names(steps: Iterable[int]) -> list[str]:
    """-1 and 0 in words, the others as they are."""
    return [STEP_NAMES.get(step, str(step)) for step in steps]


def value_name(value) -> str:
    """A field's value as it stands on an axis; an empty one is the preset's, or none."""
    if not isinstance(value, list | tuple):
        return str(value) or "none"
    if len(value) > 1:
        return f"{value[0]}-{value[-1]}"
    return str(*value) or "preset"


def _since_edit(run: Run) -> pd.DataFrame:
    return run.probes[run.probes.step >= 0]


def _to_the_end(table: pd.DataFrame, model: list[str]) -> pd.DataFrame:
    """Each edited model at every step that any has: one that ended before the others stays as it
    was. Else a late mean would be of the models alone that were slow to learn.

    Args:
        model: the columns that tell the edited models apart.
    """
    checkpoints = table[[*model, "step"]].drop_duplicates().sort_values("step")
    later = pd.DataFrame({"at": checkpoints.step.unique()})
    every = checkpoints[model].drop_duplicates().merge(later, how="cross").sort_values("at")
    newest = pd.merge_asof(every, checkpoints, left_on="at", right_on="step", by=model).dropna()
    filled = table.merge(newest.astype({"step": int}), on=[*model, "step"])
    return filled.assign(step=filled["at"])[table.columns]


def _series(arms: Arms, names: Sequence[str], **by: str) -> pd.DataFrame:
    """Some SERIES of runs, a row a fact of a model and seed at each value of the fields: over what
    else the runs differ in it counts once.
    """
    runs.check_any(arms)
    specs = [run.spec for run in arms]
    fields = {column: [value_name(spec[name]) for spec in specs] for column, name in by.items()}
    fields["model"] = [value_name(spec.get("model")) for spec in specs]
    fields["seed"] = [spec.get("seed", 0) for spec in specs]
    data = runs.series(arms, names, pd.DataFrame(fields))
    by_fact = data.groupby(["series", *fields, "fact_id"], as_index=False, sort=False)
    return by_fact.retained.mean()


def _order(values: Iterable[str]) -> list[str]:
    """Numbers by size, plans of one kind by their blocks (thresholds, then windows from below),
    anything else as the runs come.
    """
    order = list(dict.fromkeys(values))
    if all(re.fullmatch(r"[\d.]+", value) for value in order):
        return sorted(order, key=float)
    if any(map(BLOCKS.fullmatch, order)):
        return sorted(order, key=_kind_and_blocks)
    return order


def _kind_and_blocks(plan: str) -> tuple[str, list[int]]:
    match = BLOCKS.fullmatch(plan)
    return (match[1], [int(block) for block in match[2].split("-")]) if match else ("", [])


def _pooled(arms: Arms, *by: str) -> str:
    """Which choices, beside `by` and the seed, differ among runs that share a point; "" if none
    does.
    """
    specs = [{name: str(value) for name, value in run.spec.items()} for run in arms]
    points = [[value_name(run.spec[name]) for run in arms] for name in by]
    table = pd.DataFrame(specs).fillna("None").drop(columns=[*by, *ASIDE], errors="ignore")
    differ = table.groupby(points).nunique().gt(1).any()
    mixed = list(differ.index[differ])
    if set(mixed) & set(BRING):
        mixed = [name for name in mixed if name not in BROUGHT]
    pooled = f"; pooled over {', '.join(mixed)}" if mixed else ""
    return pooled + _rounded(arms)


def _rounded(arms: Arms) -> str:
    """A line for each model whose weights were quantised, and to what."""
    rounded = {run.spec["model"]: run.about.get("revision", "") for run in arms}
    return "".join(f"\n{name}: {to}" for name, to in rounded.items() if "GGUF" in to)


def _span(counts: pd.Series) -> str:
    low = counts.min()
    high = counts.max()
    return f"{low} to {high}" if low < high else f"{low}"


def _in_words(means: pd.Series, names: Iterable[str], order: Iterable) -> str:
    """Means by (name, value) as one sentence."""
    table = means.unstack().reindex(index=names, columns=order)
    sentences = []
    for name, row in table.iterrows():
        values = [f"{value} {mean:.2f}" for value, mean in row.dropna().items()]
        sentences.append(f"{name}: {', '.join(values) or 'no facts'}")
    return "; ".join(sentences)


# --- What the figures share


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, numpy.ndarray]:
    """A figure and its axes side by side; without pyplot, which would keep it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, sharey=True)[0]


def _nothing(why: str) -> Drawing:
    """In the place of a figure, why there is none."""
    figure, (axes,) = _axes(4, 0.6)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center")
    return Drawing(figure=figure, data=pd.DataFrame(), summary=why)


def _lines(axes: Axes, data: pd.DataFrame, by: str, order: list, **looks) -> None:
    """Means as lines, one a value of `by`, with bands: 95 % intervals over facts."""
    names = {"hue": by, "style": by, "hue_order": order, "style_order": order}
    seaborn.lineplot(data, **names, **looks, seed=0, ax=axes)


def _two_groups(data: pd.DataFrame, by: str, order: list, title: str, **x_and_y) -> tuple:
    """The figure, and its axes: lines of the edited facts left, of the intrinsic ones right."""
    figure, (left, right) = _axes(8.2, 3.5, 2)
    name = "viridis" if by == "wordings" else "colorblind"  # a count is a scale
    palette = seaborn.color_palette(name, len(order))
    for axes, group in ((left, "edited"), (right, "intrinsic")):
        part = data[data.group == group]
        looks = {"markers": True, "palette": palette, "legend": axes is right}
        _lines(axes, part, by, order, **looks, **x_and_y)
        n = _span(part.groupby(by).fact_id.nunique())
        axes.set_title(f"{group} facts (n = {n} a line; bands: 95 %)", fontsize=10)
    _legend_beside(right, title)
    return figure, (left, right)


def _heatmap(axes: Axes, table: pd.DataFrame, texts: pd.DataFrame, fontsize: float) -> None:
    """Shares or probabilities as colours from 0 to 1, each cell with its text."""
    scale = {"cmap": "cividis", "vmin": 0, "vmax": 1, "cbar": False}
    unlabelled = {"xticklabels": False, "yticklabels": False}  # seaborn would take $ for formulas
    font = {"fontsize": fontsize}
    seaborn.heatmap(table, annot=texts, fmt="", annot_kws=font, ax=axes, **scale, **unlabelled)
    for text, value in zip(axes.texts, table.stack().dropna(), strict=True):
        text.set_color("black" if value > 0.5 else "white")
    n_rows, n_columns = table.shape
    axes.set_xticks(numpy.arange(n_columns) + 0.5, table.columns)
    axes.set_yticks(numpy.arange(n_rows) + 0.5, table.index)


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
