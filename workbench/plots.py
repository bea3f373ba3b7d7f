"""Figures and tables of a run.

Each returns a Drawing: the figure, the tidy data it drew, and a sentence that says what is seen.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import pandas as pd
import seaborn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from workbench import facts, files, inert, runs
from workbench.facts import BadInput
from workbench.records import did_you_mean
from workbench.runs import SERIES, Run

CATEGORIES = ("true", "edited", "related", "stop", "other")
GROUPS = ("edited", "intrinsic", "paraphrase", "neighbourhood")
_COLOURS = dict(zip(CATEGORIES, seaborn.color_palette("colorblind", 5), strict=True))
_MARKERS = dict(zip(CATEGORIES, "osD^v", strict=True))
BEFORE, AFTER = "before", "edited"
UNCLEAR = "the first tokens of their answers do not tell these apart"


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.unwritable(path, error) from None
        with matplotlib.rc_context({"svg.hashsalt": "workbench"}):
            self._write(path, dpi=150)
        inert.write_csv(self.data, path.with_suffix(".csv"))
        return path

    def _write(self, to: str | Path | io.BytesIO, **options) -> None:
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)  # a dollar sign in a name is one, and begins no formula
        self.figure.savefig(to, bbox_inches="tight", **options)


def _axes(width: float, height: float, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, sharey=True)[0]


def _nothing(group: str, why: str = "") -> Drawing:
    figure, (axes,) = _axes(4, 0.6)
    axes.set_axis_off()
    axes.text(
        0.5,
        0.5,
        f"{group} facts: {why}" if why else f"this run has no {group} facts",
        ha="center",
        va="center",
    )
    return Drawing(
        figure=figure,
        data=pd.DataFrame(),
        summary=f"{group} facts: {why}" if why else f"no {group} facts",
    )


def _check_named(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """BadInput if one is not known; one name alone may not stand for several."""
    if isinstance(names, str) or not names:
        raise BadInput(f"{what} {names!r}: give a tuple of some of {', '.join(known)}")
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or ":"
            raise BadInput(f"{what} {name!r}{near} choose one of {', '.join(known)}")


def step_names(steps) -> list[str]:
    """-1 and 0 in words, the others as they are."""
    return [{-1: BEFORE, 0: AFTER}.get(step, str(step)) for step in steps]


def _one(run: Run, table: pd.DataFrame, fact_id: str) -> pd.DataFrame:
    found = table[table.fact_id == fact_id]
    if found.empty:
        raise BadInput(f"{run.folder}: holds no fact {fact_id!r}")
    return found


def edited_fact(run: Run) -> str:
    """The id of the first edited fact."""
    return run.probes[run.probes.group == "edited"].fact_id.iloc[0]


def top_tokens(run: Run, fact_id: str = "", k: int = 3) -> pd.DataFrame:
    """The k likeliest next tokens of a fact's prompt at every checkpoint, with their probabilities:
    Table 2 of arXiv 2507.14198.
    """
    found = _one(run, run.tokens, fact_id or edited_fact(run))
    found = found[(found.layer == found.layer.max()) & (found["rank"] <= k)]
    cells = found.token.str.strip() + " " + found.probability.map("{:.3f}".format)
    table = found.assign(cell=cells, checkpoint=found.step).pivot_table(
        index="checkpoint", columns="rank", values="cell", aggfunc="first"
    )
    table.columns = [f"top {rank}" for rank in table.columns]
    return table.set_axis(step_names(table.index), axis=0).rename_axis("step")


def category_mass(run: Run, group: str = "edited", fact_id: str = "") -> Drawing:
    """Where the next-token probability goes over fine-tuning, on the facts' own prompts: Figure 4
    of arXiv 2507.14198.
    """
    _check_named("group", [group], GROUPS)
    found = run.probes[run.probes.group == group]
    if found.empty:
        return _nothing(group)
    found = _one(run, found, fact_id) if fact_id else found
    names = [f"p_{name}" for name in CATEGORIES if found[f"p_{name}"].notna().any()]
    if not names:
        return _nothing(group, UNCLEAR)
    data = (
        _to_the_end(found, ["edited_model"])
        .melt(["step", "fact_id"], names, "category", "probability")
        .dropna()
    )
    data = data.groupby(
        ["category", "step", "fact_id"], as_index=False, sort=False
    ).probability.mean()  # a fact counts once
    data["category"] = data.category.str.removeprefix("p_")
    n = data.fact_id.nunique()
    steps = sorted(data.step.unique())
    data["place"] = data.step.map({step: place for place, step in enumerate(steps)})
    figure, (axes,) = _axes(6.4, 3.6)
    order = [name for name in CATEGORIES if f"p_{name}" in names]
    seaborn.lineplot(
        data, x="place", y="probability", hue="category", hue_order=order, style="category", style_order=order, palette=_COLOURS,
        markers=_MARKERS, dashes=False, errorbar=("ci", 95) if n > 1 else None, seed=0, ax=axes,
    )  # fmt: skip
    axes.set(
        ylim=(-0.02, 1.02),
        xlabel="fine-tuning step",
        ylabel="probability of the next token",
        title=f"{group} facts (n = {n}; bands: 95 % interval over facts)"
        if n > 1
        else f"{group} fact (n = 1)",
    )
    axes.set_xticks(range(len(steps)), step_names(steps))
    axes.legend(title="first token of", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    mean = data.groupby(["step", "category"]).probability.mean().unstack()
    name = "edited" if group == "edited" else "true"
    summary = f"{group}, n = {n}: mean p({name}) is {mean.loc[0, name]:.2f} after the edit and {mean[name].iloc[-1]:.2f} after {steps[-1]} steps"
    return Drawing(
        figure=figure,
        data=data.drop(columns="place"),
        summary=summary + (", bands are 95 % intervals over facts" if n > 1 else ""),
    )


def _to_the_end(table: pd.DataFrame, of: list[str]) -> pd.DataFrame:
    """Each edited model at every step that any has: where it has none, because it ended before the
    others, it stays as it was.

    Without it a mean late in the tuning would be of the models alone that were slow to learn.
    """
    steps = sorted(table.step.unique())
    own = table.groupby(of, sort=False).step.unique()
    places = [
        (*(key if isinstance(key, tuple) else (key,)), at, have[have <= at].max())
        for key, have in own.items()
        for at in steps
        if at >= have.min()
    ]
    places = pd.DataFrame(places, columns=[*of, "at", "step"])
    return table.merge(places, on=[*of, "step"]).assign(step=lambda each: each["at"])[table.columns]


def _facts(found: Sequence[Run], by: str) -> pd.DataFrame:
    """Every probed fact of every run at every step from 0 on: value of `by`, group, step, metric,
    took, retained.

    The models of one value go on together, see `_to_the_end`.
    """
    if not found:
        raise BadInput("no runs to draw; give at least one")
    parts = []
    for run in found:
        probes = run.probes[run.probes.step >= 0]
        metric = run.training[["edited_model", "step", "metric"]]
        table = probes[
            ["edited_model", "step", "group", "fact_id", "prompt", "took", "retained"]
        ].merge(metric, on=["edited_model", "step"])
        parts.append(table.assign(value=value_name(run.spec[by]), run=run.folder.name))
    table = pd.concat(parts, ignore_index=True)
    table = pd.concat(
        [
            _to_the_end(part, ["run", "edited_model"])
            for _, part in table.groupby("value", sort=False)
        ],
        ignore_index=True,
    )
    return table.assign(
        took=table.took.fillna(False).astype(bool), retained=table.retained.astype(float)
    )


def _order(values: pd.Series) -> list[str]:
    """Numbers by size, plans of one kind by their blocks (thresholds, then windows from below),
    anything else as the runs come.
    """
    order = list(dict.fromkeys(values))
    if all(re.fullmatch(r"[\d.]+", value) for value in order):
        return sorted(order, key=float)
    blocks = {
        value: re.fullmatch(r"(after|window|outside):(\d+)(?:-(\d+))?", value) for value in order
    }
    if not any(blocks.values()):
        return order
    return sorted(
        order,
        key=lambda value: (
            (blocks[value][1], int(blocks[value][2]), int(blocks[value][3] or 0))
            if blocks[value]
            else ("", 0, 0)
        ),
    )


def value_name(value) -> str:
    """A field's value as it stands on an axis; an empty one is the preset's, or none."""
    if isinstance(value, list | tuple):
        return f"{value[0]}-{value[-1]}" if len(value) > 1 else str(*value) or "preset"
    return str(value) or "none"


ASIDE = (
    "seed",
    "device",
    "device_map",
    "fact",
    "subject",
    "prompt",
    "object",
    "target",
)  # fields of a Spec that do not make runs unlike
BRING = (
    "model",
    "task",
    "task_data",
    "adapter",
)  # fields that bring usual numbers for these others
BROUGHT = (
    "learning_rate",
    "max_steps",
    "eval_every",
    "n_train",
    "n_valid",
    "batch_size",
    "threshold",
)


def _series(found: Sequence[Run], names: Sequence[str], **by: str) -> pd.DataFrame:
    """Some SERIES of runs, a row a fact of a model and seed at each value of the fields: over what
    else the runs differ in it counts once.
    """
    if not found:
        return pd.DataFrame()
    fields = pd.DataFrame(
        {column: [value_name(run.spec[field]) for run in found] for column, field in by.items()}
    )
    fields = fields.assign(
        model=[value_name(run.spec.get("model")) for run in found],
        seed=[run.spec.get("seed", 0) for run in found],
    )
    data = runs.series(found, names).join(fields, on="number")
    return data.groupby(["series", *fields, "fact_id"], as_index=False, sort=False).retained.mean()


def _pooled(found: Sequence[Run], *by: str) -> str:
    """Which choices, beside `by` and the seed, differ among runs that share a point; "" if none
    does.
    """
    cells: dict[tuple, list[dict]] = {}
    for run in found:
        cells.setdefault(tuple(value_name(run.spec[name]) for name in by), []).append(run.spec)
    names = dict.fromkeys(name for run in found for name in run.spec if name not in (*by, *ASIDE))
    mixed = [
        name
        for name in names
        if any(len({str(spec.get(name)) for spec in specs}) > 1 for specs in cells.values())
    ]
    if set(mixed) & set(BRING):
        mixed = [name for name in mixed if name not in BROUGHT]
    return f"; pooled over {', '.join(mixed)}" if mixed else ""


def retention_by(
    found: Sequence[Run],
    by: str,
    series: Sequence[str] = ("edit success", "edits kept", "intrinsic kept"),
    label: str = "",
) -> Drawing:
    """Success right after the edit and retention after fine-tuning, against the field that the runs
    vary; 95 % intervals over facts.

    "kept" of edits is among those that took. Figures 2, 5, 6 and 7 and Table 1 of arXiv 2507.14198
    are of this kind.
    """
    if not found:
        raise BadInput("no runs to draw; give at least one")
    data = _series(found, series, value=by)
    order = _order(pd.Series([value_name(run.spec[by]) for run in found]))
    figure, (axes,) = _axes(max(4.2, 1.1 * len(order) + 2.6), 3.6)
    colours = seaborn.color_palette("colorblind", len(SERIES))
    own = [
        list(SERIES if name in SERIES else series).index(name) for name in series
    ]  # a series has one colour in every figure
    seaborn.pointplot(
        data, x="value", y="retained", hue="series", order=order, hue_order=list(series), markers=list("osD^v"[: len(series)]),
        linestyles=["-", "--", ":", "-.", (0, (1, 3))][: len(series)], palette=[colours[number] for number in own],
        dodge=0.25, errorbar=("ci", 95), seed=0, capsize=0.08, markersize=7, linewidth=1.4, ax=axes,
    )  # fmt: skip
    counts = data.groupby(["series", "value"]).size()
    means = data.groupby(["series", "value"]).retained.mean()
    axes.set(
        ylim=(-0.03, 1.05), xlabel=label or by, ylabel="share of facts (95 % interval over facts)"
    )
    span = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
    axes.set_title(f"n = {span} a point{_pooled(found, by)}", fontsize=10)
    axes.legend(title=None, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    said = [
        f"{name}: "
        + ", ".join(f"{value} {means.get((name, value), float('nan')):.2f}" for value in order)
        for name in series
    ]
    return Drawing(figure=figure, data=data, summary="; ".join(said))


def retention_curves(found: Sequence[Run], by: str, against: str = "step") -> Drawing:
    """Edits kept (of those that took) and intrinsic facts kept over fine-tuning, a line a run.

    Args:
        against: "step", or "metric": the task's validation metric, at which arms that learn at
            different speeds are compared.
    """
    if against not in ("step", "metric"):
        raise BadInput(f"against={against!r}: choose step or metric")
    table = _facts(found, by)
    kind = found[0].about["tuning"]["metric"]
    keep = ((table.group == "edited") & table.took) | (table.group == "intrinsic")
    data = (
        table[keep]
        .groupby(["run", "value", "step", "group", "fact_id"], as_index=False, sort=False)[
            ["metric", "retained"]
        ]
        .mean()
    )
    data["metric"] = data.groupby(["value", "step"]).metric.transform("mean")
    order = _order(table.value)
    figure, all_axes = _axes(8.2, 3.5, 2)
    for axes, group in zip(all_axes, ("edited", "intrinsic"), strict=True):
        part = data[data.group == group]
        seaborn.lineplot(
            part, x=against, y="retained", hue="value", hue_order=order, style="value", style_order=order, palette="colorblind", markers=True,
            dashes=True, errorbar=("ci", 95), seed=0, ax=axes, legend=axes is all_axes[-1], sort=True,
        )  # fmt: skip
        unit = {"loss": "validation loss (nats a token)", "accuracy": "validation accuracy"}[kind]
        axes.set(
            ylim=(-0.03, 1.05),
            xlabel="fine-tuning step" if against == "step" else unit,
            ylabel="share kept",
        )
        axes.set_title(
            f"{group} facts (n = {part.groupby('value').fact_id.nunique().max()} a line; bands: 95 %)",
            fontsize=10,
        )
        if against == "metric" and kind == "loss":
            axes.invert_xaxis()  # learning goes to the right
    if against == "metric":
        level = runs.compare(found, by).level.iloc[0]
        for axes in all_axes:
            axes.axvline(level, color="0.5", lw=1)
            axes.annotate(
                "all arms reach",
                (level, 0.01),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                rotation=90,
                ha="right",
                va="bottom",
            )
    all_axes[-1].legend(title=by, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    last = (
        data[data.step == data.groupby("run").step.transform("max")]
        .groupby(["group", "value"])
        .retained.mean()
    )
    said = [
        f"{group} at the end: "
        + ", ".join(f"{value} {last.get((group, value), float('nan')):.2f}" for value in order)
        for group in last.index.levels[0]
    ]
    return Drawing(figure=figure, data=data.drop(columns="run"), summary="; ".join(said))


def elasticity(found: Sequence[Run]) -> Drawing:
    """Bits per fact token against fine-tuning tokens, by the number of wordings that wrote the
    fact.

    Bits are -log2 p of the object's first token, the edited one for edits that took, the true one
    for intrinsic facts. Wordings: the statements that the edit saw, and the ones that pre-training
    showed, which are known for the embedded world alone. A line ends where the first of its models
    does; a fact counts once, as its mean over models and runs.
    """
    if not found:
        raise BadInput("no runs to draw; give at least one")
    parts = []
    for run in found:
        wordings = {
            request.fact.id: request.fact.exposure.paraphrases
            for request in facts.read(run.spec["facts"])
            if request.fact.exposure
        }
        probes = run.probes[run.probes.step >= 0]
        for group, column in (("edited", "p_edited"), ("intrinsic", "p_true")):
            part = probes[
                (probes.group == group)
                & (probes.took.fillna(False).astype(bool) | (group == "intrinsic"))
            ]
            by = run.spec["paraphrases"] if group == "edited" else part.fact_id.map(wordings)
            bits = -numpy.log2(part[column].clip(lower=1e-12))
            tokens = part.step * run.about["tuning"]["tokens_per_step"]
            model = part.edited_model.map(lambda number, run=run: f"{run.folder} {number}")
            parts.append(
                part[["step", "fact_id"]].assign(
                    group=group, wordings=by, bits=bits, tokens=tokens, model=model
                )
            )
    data = (
        pd.concat(parts, ignore_index=True)
        .dropna(subset=["wordings", "bits"])
        .astype({"wordings": int})
    )
    had = data.groupby(["group", "wordings", "tokens"]).model.transform("nunique")
    data = data[had == data.groupby(["group", "wordings"]).model.transform("nunique")]
    data = data.groupby(
        ["group", "wordings", "step", "tokens", "fact_id"], as_index=False
    ).bits.mean()
    figure, all_axes = _axes(8.2, 3.5, 2)
    order = sorted(data.wordings.unique())
    colours = seaborn.color_palette("viridis", len(order))
    for axes, group in zip(all_axes, ("edited", "intrinsic"), strict=True):
        part = data[data.group == group]
        seaborn.lineplot(
            part, x="tokens", y="bits", hue="wordings", hue_order=order, style="wordings", style_order=order, palette=colours,
            markers=True, dashes=True, errorbar=("ci", 95), seed=0, ax=axes, legend=axes is all_axes[-1],
        )  # fmt: skip
        axes.set(xlabel="fine-tuning tokens", ylabel="bits per fact token (0 = certain)")
        axes.set_title(
            f"{group} facts (n = {part.fact_id.nunique()}; bands: 95 %){_pooled(found, 'paraphrases')}",
            fontsize=10,
        )
    all_axes[-1].legend(title="wordings", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ends = (
        data[data.tokens == data.groupby(["group", "wordings"]).tokens.transform("max")]
        .groupby(["group", "wordings"])
        .bits.mean()
    )
    said = [
        f"{group} written in {count} wording{'s' if count > 1 else ''}: {bits:.1f} bits at the end"
        for (group, count), bits in ends.items()
    ]
    return Drawing(figure=figure, data=data, summary="; ".join(said))


def retention_grid(
    found: Sequence[Run], rows: str, columns: str, series: str = "edits kept"
) -> Drawing:
    """One of SERIES by two fields of the runs, a cell the mean over facts and seeds with its 95 %
    interval: Table 1 of arXiv 2507.14198.
    """
    data = _series(found, [series], row=rows, column=columns)
    if data.empty:
        return _nothing(SERIES[series][0])
    table = (
        data.groupby(["row", "column"])
        .retained.agg(["mean", "size"])
        .join(data.groupby(["row", "column"]).retained.apply(interval))
    )
    names = [list(dict.fromkeys(data[name])) for name in ("row", "column")]
    means = table["mean"].unstack().reindex(index=names[0], columns=names[1])
    figure, (axes,) = _axes(2.2 + 1.5 * means.shape[1], 1.1 + 0.62 * means.shape[0])
    image = axes.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (y, x), mean in numpy.ndenumerate(means.to_numpy()):
        if numpy.isfinite(mean):
            cell = table.loc[(names[0][y], names[1][x])]
            text = f"{mean:.2f} [{cell.retained[0]:.2f}, {cell.retained[1]:.2f}]\nn = {cell['size']:.0f}"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if mean > 0.5 else "white",
            )
    axes.set_xticks(range(len(names[1])), names[1])
    axes.set_yticks(range(len(names[0])), names[0])
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_title(series + _pooled(found, rows, columns), fontsize=10)
    figure.colorbar(image, ax=axes, label="share of facts")
    flat = means.stack()
    best = flat.idxmax()
    return Drawing(
        figure=figure,
        data=data,
        summary=f"{series}: most with {rows} {best[0]} and {columns} {best[1]} ({flat.max():.2f})",
    )


def interval(values: pd.Series, draws: int = 1000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of independent values."""
    rng, drawn = numpy.random.default_rng(0), values.to_numpy(dtype="float32")
    at_once = max(1, 2_000_000 // len(drawn))  # resamples, to hold little memory
    means = [
        drawn[rng.integers(len(drawn), size=(min(at_once, draws - start), len(drawn)))].mean(1)
        for start in range(0, draws, at_once)
    ]
    low, high = numpy.quantile(numpy.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def lens_heatmap(
    run: Run,
    group: str = "edited",
    fact_id: str = "",
    categories: tuple[str, ...] = ("edited", "true"),
) -> Drawing:
    """Logit lens, layer by checkpoint: the probability of the edited and the true token after each
    block; edited blocks are boxed.

    For a group of several facts the mean is drawn. Cells carry the median rank (1 = top) where it
    is 100 or better.
    """
    _check_named("group", [group], GROUPS)
    _check_named("category", categories, CATEGORIES)
    members = [fact_id] if fact_id else run.probes[run.probes.group == group].fact_id.unique()
    if not len(members):
        return _nothing(group)
    found = run.lens[run.lens.fact_id.isin(members) & run.lens.category.isin(categories)]
    if found.probability.isna().all():
        return _nothing(group, UNCLEAR)
    members = found[found.probability.notna()].fact_id.unique()
    data = (
        _to_the_end(found, ["edited_model"])
        .groupby(["category", "layer", "step"], as_index=False)
        .agg(probability=("probability", "mean"), rank=("rank", "median"))
    )
    steps = sorted(data.step.unique())
    layers = data.layer.max() + 1
    figure, all_axes = _axes(
        1.6 + 0.62 * len(steps) * len(categories), 0.8 + 0.27 * layers, len(categories)
    )
    for axes, category in zip(all_axes, categories, strict=True):
        part = data[data.category == category]
        table = part.pivot(index="layer", columns="step", values="probability")
        ranks = part.pivot(index="layer", columns="step", values="rank")
        image = axes.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for (row, column), rank in numpy.ndenumerate(ranks.to_numpy()):
            if rank <= 100:
                colour = "black" if table.iat[row, column] > 0.5 else "white"
                axes.text(
                    column, row, f"{rank:g}", ha="center", va="center", fontsize=7, color=colour
                )
        for layer in run.about.get("layers", ()):
            axes.axhline(layer - 0.5, color="tab:orange", lw=1.2)
            axes.axhline(layer + 0.5, color="tab:orange", lw=1.2)
        axes.set(xlabel="fine-tuning step", title=f"{category} token")
        axes.set_xticks(range(len(steps)), step_names(steps), rotation=45, ha="right")
        axes.set_yticks(range(layers))
    all_axes[0].set_ylabel("block (lens after it)")
    figure.colorbar(
        image, ax=list(all_axes), label="probability (cell text: median rank)", fraction=0.05
    )
    n = len(members)
    figure.suptitle(
        f"{group}: {fact_id}"
        if fact_id
        else f"{group} facts, mean (n = {n}); edited block between orange lines",
        fontsize=10,
    )
    last = (
        data[(data.layer == layers - 1) & (data.category == categories[0])]
        .set_index("step")
        .probability
    )
    summary = f"p({categories[0]} token) after the last block: {last[0]:.2f} after the edit, {last.iloc[-1]:.2f} after {steps[-1]} steps (n = {n})"
    return Drawing(figure=figure, data=data, summary=summary)


def retention_table(run: Run) -> pd.DataFrame:
    """Share retained by group and step, over all facts and over those whose edit took, with n."""
    probes = _to_the_end(run.probes[run.probes.step >= 0], ["edited_model"])
    every = probes.groupby(["group", "step"]).agg(
        n=("retained", "size"), retained=("retained", "mean")
    )
    took = (
        probes[probes.took.fillna(False).astype(bool)]
        .groupby(["group", "step"])
        .agg(n_took=("retained", "size"), retained_of_took=("retained", "mean"))
    )
    return every.join(took).reset_index()
