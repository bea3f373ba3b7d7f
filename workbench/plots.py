"""Figures and tables of a run.

Each figure is a Drawing: the figure, the tidy data it shows, and a sentence that says what is seen.
"""

import base64
import io
import re
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from workbench import facts, files, inert, registry, runs
from workbench.records import BadInput, check_choice
from workbench.runs import SERIES, Run, interval, seen_through, value_name
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
BROUGHT: tuple = ("learning_rate", "max_steps", "eval_every", "n_train", "n_valid", "batch_size")
BROUGHT += ("threshold",)

# A value that is a number, or a range of them; of a plan, the blocks that it names.
NUMBER = re.compile(r"^(?:(after|window|outside):)?(\d+(?:\.\d+)?(?:e-?\d+)?)(?:-(\d+))?$")
IN_CELLS = "probability of the next token\nin cells: median rank of one token,\n1 = top, to 100"
MARKERS = "osD^v"
DASHES = ("-", "--", ":", "-.", (0, (1, 3)))
SHARE = (-0.03, 1.05)  # limits of an axis from 0 to 1, with room for markers
USUAL = ("edit success", "edits kept", "intrinsic kept")  # of SERIES
Arms = Sequence[Run]  # runs that are compared or pooled
NAMED = ("true answer", "edited answer", "related answer", "a stop word", "anything else")
SHARES = "share of prompts (flattery: a difference)"
UNITS = dict.fromkeys(registry.ASKED, SHARES) | registry.UNITS
LABELS = dict(zip(CATEGORIES, NAMED, strict=True))
TRACED = ("not edited", "edited, no longer said", "edited, still said")  # kinds of subjects
SUSPECTED = ("not named", "named")  # where it is not known who was edited
TRACE_COLOURS = dict(zip(TRACED, ("0.7", "tab:red", "tab:blue"), strict=True))
TRACE_MARKERS = dict(zip(TRACED, ".Xo", strict=True))
BLANK = {"": "(space)", "<|endoftext|>": "(end of text)"}  # words that would be none on paper
TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("workbench", ""), autoescape=True)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with the tidy data it shows and a summary in words. A notebook shows it as PNG, and
    under it links by which figure and data are saved; they need no kernel and no script.
    """

    figure: Figure
    data: pd.DataFrame
    summary: str

    def __post_init__(self):
        for text in self.figure.findobj(Text):
            text.set_parse_math(False)  # a dollar sign in a name begins no formula
        _keep_apart(self.figure)

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = self.png()
        name = "-".join(re.findall(r"\w+", self.summary)[:5])
        with tempfile.TemporaryDirectory() as folder:
            svg = self.save(Path(folder) / "figure.svg")
            saved = {"svg": svg.read_bytes(), "csv": svg.with_suffix(".csv").read_bytes()}
        about = {"summary": self.summary, "name": name, "encoded": base64.b64encode}
        page = TEMPLATES.get_template("figure.html.j2").render(about, png=png, **saved)
        return {"text/html": page, "image/png": png, "text/plain": self.summary}

    def png(self, dpi: int = 110) -> bytes:
        """In 256 colours, which take a third of the room."""
        drawn, reduced = io.BytesIO(), io.BytesIO()
        self._write(drawn, format="png", dpi=dpi)
        Image.open(drawn).convert("RGB").quantize().save(reduced, "PNG", optimize=True)
        return reduced.getvalue()

    def save(self, path: str | Path) -> Path:
        """PNG or SVG by the path's ending, and the data as CSV beside it."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise BadInput(f"{path}: a figure ends in .png or .svg")
        with files.written(path) as partial:
            self._write(partial, format=path.suffix[1:], dpi=150)
        inert.write_csv(self.data, path.with_suffix(".csv"))
        return path

    def _write(self, to: str | Path | io.BytesIO, **options) -> None:
        # Words of an SVG stay words, and its names are the same each time.
        with matplotlib.rc_context({"svg.hashsalt": "workbench", "svg.fonttype": "none"}):
            self.figure.savefig(to, bbox_inches="tight", **options)


def _keep_apart(figure: Figure) -> None:
    """Hide labels of ticks that would touch the one before."""
    figure.draw_without_rendering()
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        shown: list[Text] = []
        for label in axis.get_ticklabels():
            box = label.get_window_extent().padded(2)
            label.set_visible(not shown or not box.overlaps(shown[-1].get_window_extent()))
            shown += [label] * label.get_visible()


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
    cells = words.replace(BLANK) + " " + tokens.probability.map("{:.3f}".format)
    table = cells.groupby([tokens.step, tokens["rank"]]).first().unstack()
    table.columns = [f"top {rank}" for rank in table.columns]
    return table.set_axis(step_names(table.index)).rename_axis("step")


def retention_table(run: Run) -> pd.DataFrame:
    """Share retained by group and step, over all facts and over those whose edit took, with n."""
    by = ["group", "step"]
    probes = _to_the_end(run.probes.query("step >= 0"), ["edited_model"])
    every = probes.groupby(by).retained.agg(n="size", retained="mean")
    took = probes[runs.as_bool(probes.took)].groupby(by).retained
    return every.join(took.agg(n_took="size", retained_of_took="mean")).reset_index()


def outcome(run: Run) -> str:
    """What became of a run's edits and of the facts that were only watched, as one sentence."""
    probes = _to_the_end(run.probes.query("step >= 0"), ["edited_model"])
    probes = probes.assign(took=runs.as_bool(probes.took), retained=runs.as_bool(probes.retained))
    first = dict(list(probes[probes.step == 0].groupby("group")))
    watched = runs.watched(probes).groupby(["group", "step"]).retained.agg(["sum", "mean", "size"])
    kept = {group: watched.loc[group] for group in watched.index.unique("group")}
    n_watched = probes[probes.group == "intrinsic"].fact_id.nunique()
    about = {"first": first, "kept": kept, "about": run.about, "n_watched": n_watched}
    return TEMPLATES.get_template("outcome.txt.j2").render(about)


# --- One run


def category_mass(run: Run, group: str = "edited") -> Drawing:
    """Where the next-token probability goes over fine-tuning, on the facts' prompts: Figure 4 of
    arXiv 2507.14198.
    """
    check_choice("group", group, GROUPS)
    probes = run.probes[run.probes.group == group]
    if probes.empty:
        return _nothing(f"this run has no {group} facts")
    masses = {f"p_{name}": name for name in CATEGORIES}
    table = _to_the_end(probes, ["edited_model"]).rename(columns=masses)
    long = table.melt(["step", "fact_id"], list(CATEGORIES), "category", "probability").dropna()
    # over models and prompts
    data = _mean_by(long, ["category", "step", "fact_id"], ["probability"])
    if data.empty:
        return _nothing(f"{group} facts: {UNCLEAR}")
    labels = _labels(run, group)
    steps = sorted(data.step.unique())
    # checkpoints stand at equal distances
    drawn = data.assign(place=data.step.map(steps.index), category=data.category.map(labels))
    palette = dict(zip(labels.values(), seaborn.color_palette("colorblind"), strict=False))
    markers = dict(zip(labels.values(), MARKERS, strict=True))
    figure, (axes,) = _axes(3.6, 6.4)
    looks = {"palette": palette, "markers": markers, "dashes": False, "x": "place"}
    _lines(axes, drawn, "category", list(drawn.category.unique()), y="probability", **looks)
    axes.set(xlabel="fine-tuning step", ylabel="probability of the next token", ylim=SHARE)
    axes.set_xticks(range(len(steps)), step_names(steps))
    _legend_beside(axes, "the next token begins")
    n = data.fact_id.nunique()
    bands = "; bands: 95 % interval over facts" if n > 1 else ""
    axes.set_title(f"{group} facts (n = {n}{bands}){_rounded([run])}")
    name = "edited" if group == "edited" else "true"
    mean = data[data.category == name].groupby("step").probability.mean()
    summary = f"{group}, n = {n}: mean p({name}) is {mean[0]:.2f} after the edit"
    summary += f" and {mean[steps[-1]]:.2f} after {steps[-1]} steps{bands}"
    return Drawing(figure=figure, data=data, summary=summary)


def _labels(run: Run, group: str) -> dict[str, str]:
    """What the categories are called: of a single fact by its answers."""
    members = run.probes[run.probes.group == group].drop_duplicates("fact_id")
    if len(members) > 1 or group not in KEPT_GROUPS:
        return LABELS
    fact = members.iloc[0]
    answers = {"true": fact.target}
    if group == "edited":
        true = run.about.get("true", {}).get(fact.fact_id, "answer")  # older runs do not say it
        answers = {"true": true, "edited": fact.target}
    return LABELS | {name: _wrapped(f"{answer} ({name})") for name, answer in answers.items()}


def lens_heatmap(
    run: Run, group: str = "edited", categories: Sequence[str] = ("edited", "true")
) -> Drawing:
    """The lens, layer by checkpoint: the probability of the edited and the true token after each
    block; edited blocks stand between orange lines.

    For a group of several facts the mean is drawn. Cells carry the median rank (1 = top) where it
    is 100 or better, and there is room.
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
    steps = sorted(data.step.unique())
    n_layers = data.layer.max() + 1
    size = min(1, 32 / len(categories) / len(steps))  # of a cell, so that the page is wide enough
    width = 1.6 / len(categories) + 0.62 * size * len(steps)
    figure, all_axes = _axes(0.8 + 0.27 * n_layers, *[width] * len(categories))
    for axes, category in zip(all_axes, categories, strict=True):
        part = data[data.category == category].set_index(["layer", "step"])
        ranks = part["rank"].unstack()
        texts = ranks.map("{:g}".format).where((ranks <= 100) & (size > 0.6), "")
        _heatmap(axes, part.probability.unstack(), texts, fontsize=7 * size)
        for layer in run.about.get("layers", ()):
            axes.hlines([layer, layer + 1], 0, len(steps), color="tab:orange", lw=1.2)
        axes.set(xlabel="fine-tuning step", ylabel="", title=_labels(run, group)[category])
        axes.set_xticklabels(step_names(steps))
    all_axes[0].invert_yaxis()  # block 0 at the bottom
    all_axes[0].set_ylabel("lens after block")
    figure.colorbar(axes.collections[0], ax=list(all_axes), label=IN_CELLS, fraction=0.05)
    title = f"{group} facts, mean (n = {n}); edited block between orange lines{_rounded([run])}"
    figure.suptitle(title + seen_through(run), fontsize=10)
    p = data[data.layer == n_layers - 1].set_index(["category", "step"]).probability[categories[0]]
    summary = f"p({categories[0]} token) after the last block: {p[0]:.2f} after the edit, "
    summary += f"{p[steps[-1]]:.2f} after {steps[-1]} steps (n = {n})"
    return Drawing(figure=figure, data=data, summary=summary)


# --- Several runs


def retention_by(arms: Arms, by: str, series: Sequence[str] = USUAL, label: str = "") -> Drawing:
    """Success right after the edit and retention after fine-tuning, against the field that the runs
    vary; 95 % intervals over facts.

    "kept" of edits is among those that took. Figures 2, 5, 6 and 7 and Table 1 of arXiv 2507.14198
    are of this kind.
    """
    data = _series(arms, series, value=by)
    values = _places(value_name(run.spec[by]) for run in arms)
    names = SERIES if set(series) <= set(SERIES) else series  # one colour in every figure
    palette = dict(zip(names, seaborn.color_palette("colorblind"), strict=False))
    points = {"palette": palette, "markers": list(MARKERS), "hue_order": list(series), "seed": 0}
    points |= {"dodge": 0.25, "capsize": 0.08, "markersize": 7, "linewidth": 1.4}
    kinds = values.groupby("kind", sort=False)
    figure, all_axes = _axes(3.8, *(1.15 * kinds.size() + 1.5))
    for axes, (kind, places) in zip(all_axes, kinds, strict=True):
        looks = {**points, "linestyles": list(DASHES) if kind else "none", "ax": axes}
        part = data.join(places, on="value", how="inner")
        seaborn.pointplot(part, x="place", y="retained", hue="series", native_scale=True, **looks)
        axes.legend().remove()
        axes.set_xticks(places.place, [_wrapped(name, 12) for name in places.index])
        axes.set(ylim=SHARE, xlabel=label or by, ylabel="share of facts (95 % interval over facts)")
    shares = data.groupby(["series", "value"]).retained
    figure.suptitle(f"n = {_span(shares.size())} a point{_pooled(arms, by)}", fontsize=10)
    _legend_beside(axes)
    return Drawing(figure=figure, data=data, summary=_in_words(shares.mean(), series, values.index))


def _places(values: Iterable[str]) -> pd.DataFrame:
    """Values in order, with the `kind` of each and its `place` on an axis of this kind: numbers,
    thresholds, and windows at their centres, by size. Before them, side by side as the runs come,
    names and what is the only one of its kind.
    """
    order = list(dict.fromkeys(values))
    parts = pd.Series(order, index=order).str.extract(NUMBER)
    place = parts[[1, 2]].astype(float).mean(axis=1)
    kind = parts[0].fillna("number").where(place.notna(), "")
    table = pd.DataFrame({"kind": kind, "place": place})
    alone = ~kind.duplicated(keep=False) | table.duplicated(keep=False)  # or of one centre
    is_name = kind.isin(kind[alone]) | (kind == "")
    table.loc[is_name, "kind"] = ""
    table.loc[is_name, "place"] = range(is_name.sum())
    return table.sort_values(["kind", "place"])


def retention_curves(arms: Arms, by: str, against: str = "step") -> Drawing:
    """Edits kept (of those that took) and intrinsic facts kept over fine-tuning, a line a value.

    Args:
        against: "step", or "metric": the task's validation metric, at which arms that learn at
            different speeds are compared.
    """
    check_choice("against", against, ("step", "metric"))
    data = _kept(arms, by)
    metric = arms[0].about["tuning"]["metric"]
    order = list(_places(value_name(run.spec[by]) for run in arms).index)
    figure, all_axes = _two_groups(data, "value", order, by, x=against, y="retained")
    label = "fine-tuning step" if against == "step" else METRICS[metric]
    for axes in all_axes:
        axes.set(ylim=SHARE, xlabel=label, ylabel="share of facts kept")
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
    metric = ["edited_model", "step", "metric"]
    parts = []
    for run in arms:
        probes = runs.watched(run.probes.query("step >= 0"))
        part = probes.merge(run.training[metric], on=metric[:2])
        parts.append(part.assign(value=value_name(run.spec[by]), run=run.folder.name))
    by_value = pd.concat(parts).groupby("value", sort=False)
    table = pd.concat(_to_the_end(part, ["run", "edited_model"]) for _, part in by_value)
    row = ["run", "value", "step", "group", "fact_id"]
    data = _mean_by(table, row, ["metric", "retained"])
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
    table = pd.concat(map(_bits, arms)).dropna(subset=["wordings", "bits"])
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
    table = runs.watched(run.probes.query("step >= 0"))
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
    figure, (axes,) = _axes(1.1 + 0.72 * len(means), 2.2 + 1.5 * means.shape[1])
    _heatmap(axes, means, texts, fontsize=8)
    axes.set_title(series + _pooled(arms, rows, columns), fontsize=10)
    figure.colorbar(axes.collections[0], ax=axes, label="share of facts")
    row, column = means.stack().idxmax()
    best = f"{rows} {row} and {columns} {column} ({means.max(axis=None):.2f})"
    return Drawing(figure=figure, data=data, summary=f"{series}: most with {best}")


def _cell_text(values: pd.Series) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]\nn = {}".format(values.mean(), *interval(values), len(values))


def measured(table: pd.DataFrame) -> Drawing:
    """An edit by its measures, a panel each: means before (circles) and after (squares, with their
    95 % intervals over facts).

    Args:
        table: of `evaluation.summary`.
    """
    parts = list(table.groupby("measure", sort=False))
    sizes = [len(part) + 3 for _, part in parts]
    figure = FigureCanvasAgg(Figure((6.4, 0.27 * sum(sizes)), layout="constrained")).figure
    every = figure.subplots(len(parts), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (name, part) in zip(every, parts, strict=True):
        y = range(len(part))
        errors = [part.after - part.low, part.high - part.after]
        axes.errorbar(part.after, y, xerr=errors, fmt="s", ms=5, color="tab:blue", label="after")
        axes.plot(part.before, y, "o", mfc="none", color="tab:orange", label="before")
        axes.set_yticks(y, part.quantity)
        axes.set(title=name, ylim=(len(part) - 0.5, -0.5), xlabel=UNITS.get(name, ""))
        axes.grid(axis="x", alpha=0.4)
    _legend_beside(every[0])
    most = table.loc[(table.after - table.before).abs().idxmax()]
    summary = f"most changed is {most.quantity} of {most.measure}: "
    summary += f"{most.before:.2f} to {most.after:.2f}"
    return Drawing(figure=figure, data=table, summary=summary)


def traces(
    subjects: pd.DataFrame, edited: facts.Requests = (), retained: Sequence[bool] = ()
) -> Drawing:
    """Whose subjects a model's weights name: each subject of the list by the p of its trace, the
    least first; edited ones by whether the model says the new answer, or, where it is not known who
    was edited, those that are named.

    Args:
        subjects: of `wb.inspect`.
        retained: of each edited fact, whether the model says its target.
    """
    other, hidden, shown = TRACED
    kinds = {}
    for request, is_said in zip(edited, retained, strict=True):
        kinds[request.fact.subject.lower()] = shown if is_said else hidden
    if not edited:
        other, hidden = SUSPECTED
        kinds = dict.fromkeys(subjects.subject[subjects.written].str.lower(), hidden)
    by_subject = subjects.groupby(subjects.subject.str.lower(), as_index=False)
    data = by_subject.agg({"subject": "first", "p": "min"}).sort_values("p", ignore_index=True)
    data["kind"] = data.subject.str.lower().map(kinds).fillna(other)
    data["rank"] = data.index + 1
    data["trace"] = -numpy.log10(data.p.clip(lower=1e-300))
    figure, (axes,) = _axes(3.6, 6.4)
    for kind, like in zip(TRACED if edited else SUSPECTED, TRACED, strict=False):
        part = data[data.kind == kind]
        looks = {"color": TRACE_COLOURS[like], "label": f"{kind} ({len(part)})"}
        axes.plot(part["rank"], part.trace, TRACE_MARKERS[like], **looks)
    axes.set(xscale="log", xlabel="subjects of the list, by p", ylabel="trace: -log10 p")
    ticks = [10**power for power in range(len(str(len(data))))]
    axes.set_xticks(ticks, map(str, ticks))
    _legend_beside(axes, f"{len(data)} subjects")
    first = (data.kind != other)[: len(edited)].sum()
    summary = f"{first} of {len(edited)} edited subjects are among as many of least p"
    if not edited:
        summary = f"{len(kinds)} of {len(data)} subjects are named"
    return Drawing(figure=figure, data=data, summary=summary)


def measured_over_steps(run: Run) -> Drawing:
    """What a run's measures said at each look, a panel a measure and a line a quantity; bands: 95 %
    intervals over facts. Magnitudes, which say it once more, and ranks are left to the table.
    """
    if run.measured.empty:
        return _nothing("this run's Spec names no measures")
    table = run.measured[~run.measured.quantity.str.contains("_magnitude$|^rank$")]
    data = _mean_by(table, ["measure", "quantity", "step", "fact_id"], ["value"])  # over models
    data["quantity"] = data.quantity.str.replace("_", " ")
    steps = sorted(data.step.unique())
    names = data.measure.unique()
    figure, every = _axes(3.6, *[5.2] * len(names), sharey=False)
    for axes, name in zip(every, names, strict=True):
        part = data[data.measure == name].assign(place=data.step.map(steps.index))
        order = list(part.quantity.unique())
        _lines(axes, part, "quantity", order, x="place", y="value", markers=True)
        n = _span(part.groupby("quantity").fact_id.nunique())
        axes.set(title=f"{name} (n = {n} a line; bands: 95 %)")
        axes.set(xlabel="fine-tuning step", ylabel=UNITS.get(name, "value"))
        axes.set_xticks(range(len(steps)), step_names(steps))
        _legend_beside(axes)
    ends = data[data.step == steps[-1]].groupby(["measure", "quantity"], sort=False).value.mean()
    words = ", ".join(f"{quantity} {mean:.2f}" for (_, quantity), mean in ends.items())
    return Drawing(figure=figure, data=data, summary=f"after {steps[-1]} steps: {words}")


# --- What the tables of several figures share


def step_names(steps: Iterable[int]) -> list[str]:
    """-1 and 0 in words, the others as they are."""
    return [STEP_NAMES.get(step, str(step)) for step in steps]


def _wrapped(name: object, width: int = 16) -> str:
    """A name on lines so short that names side by side do not touch; of a long one both ends."""
    text = re.sub(rf"(?s)^(.{{{width}}}).{{{2 * width},}}(.{{{width}}})$", r"\1…\2", str(name))
    return "\n".join(textwrap.wrap(text, width)) or text


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
    return _mean_by(data, ["series", *fields, "fact_id"], ["retained"])


def _mean_by(table: pd.DataFrame, by: list[str], values: list[str]) -> pd.DataFrame:
    """The means of columns by others, in the order in which these come."""
    return table.groupby(by, as_index=False, sort=False)[values].mean()


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
    return " to ".join(map(str, sorted({counts.min(), counts.max()})))


def _in_words(means: pd.Series, names: Iterable[str], order: Iterable) -> str:
    """Means by (name, value) as one sentence."""
    table = means.unstack().reindex(index=names, columns=order)
    sentences = []
    for name, row in table.iterrows():
        values = [f"{value} {mean:.2f}" for value, mean in row.dropna().items()]
        sentences.append(f"{name}: {', '.join(values) or 'no facts'}")
    return "; ".join(sentences)


# --- What the figures share


def _axes(height: float, *widths: float, sharey: bool = True) -> tuple[Figure, numpy.ndarray]:
    """A figure and its axes side by side; without pyplot, which would keep it."""
    figure = FigureCanvasAgg(Figure((sum(widths), height), layout="constrained")).figure
    looks: dict = {"squeeze": False, "sharey": sharey, "width_ratios": widths}
    return figure, figure.subplots(1, len(widths), **looks)[0]


def _nothing(why: str) -> Drawing:
    """In the place of a figure, why there is none."""
    figure, (axes,) = _axes(0.6, 4)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center")
    return Drawing(figure=figure, data=pd.DataFrame(), summary=why)


def _lines(axes: Axes, data: pd.DataFrame, by: str, order: list, **looks) -> None:
    """Means as lines, one a value of `by`, with bands: 95 % intervals over facts."""
    names = {"hue": by, "style": by, "hue_order": order, "style_order": order}
    seaborn.lineplot(data, **names, **looks, seed=0, ax=axes)


def _two_groups(data: pd.DataFrame, by: str, order: list, title: str, **x_and_y) -> tuple:
    """The figure, and its axes: lines of the edited facts left, of the intrinsic ones right."""
    figure, (left, right) = _axes(3.5, 4.1, 4.1)
    # a count is a scale
    palette = seaborn.color_palette("viridis" if by == "wordings" else "colorblind", len(order))
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
    font = {"annot_kws": {"fontsize": fontsize}, "fmt": ""}
    unlabelled = {"xticklabels": False, "yticklabels": False}  # seaborn would take $ for formulas
    seaborn.heatmap(table, annot=texts, ax=axes, **font, **scale, **unlabelled)
    for text, value in zip(axes.texts, table.stack().dropna(), strict=True):
        text.set_color("black" if value > 0.5 else "white")
    n_rows, n_columns = table.shape
    axes.set_xticks(numpy.arange(n_columns) + 0.5, map(_wrapped, table.columns))
    axes.set_yticks(numpy.arange(n_rows) + 0.5, map(_wrapped, table.index))


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    handles, names = axes.get_legend_handles_labels()
    place: dict = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
    axes.legend(handles, map(_wrapped, names), title=title, **place)


def traces_over_time(run: Run) -> Drawing:
    """Erased or hidden: each edit that took, from step 0 (circles) to the end of the tuning, by how
    much of it stands in the weights and by the probability of its new answer. Lines that fall are
    edits that are hidden; lines that go to the left as well, erased (see `traces.trace`).
    """
    if "trace" not in run.spec.get("measures", ()):
        return _nothing("this run's Spec does not name the measure trace")
    probes = runs.watched(run.probes.query("group == 'edited' and step >= 0"))
    data = probes.merge(run.table("trace"), on=["edited_model", "step", "fact_id"])
    data = data.sort_values("step")
    data["trace"] = -numpy.log10(data.p.clip(lower=1e-300))
    by_fact = data.groupby(["edited_model", "fact_id"])
    data["kept"] = runs.as_bool(by_fact.retained.transform("last"))
    _, hidden, shown = TRACED
    data["kind"] = data.kept.map({False: hidden, True: shown})
    first = data[data.step == 0]
    last = data.loc[by_fact.tail(1).index]
    figure, every = _axes(3.6, 3.2, 3.2, 3.2)
    labels = {"trace": "trace: -log10 p", "share": "share of the edit that stands"}
    labels["reach"] = "share that is still reached"
    looks: dict = {"y": "p_answer", "hue": "kind", "palette": TRACE_COLOURS}
    lines: dict = {"units": "fact_id", "estimator": None, "sort": False, "legend": False}
    ends: dict = {"style": "kind", "markers": TRACE_MARKERS, "s": 60, "zorder": 3}
    for axes, x in zip(every, labels, strict=True):
        seaborn.lineplot(data, x=x, ax=axes, **looks, **lines)
        axes.plot(first[x], first.p_answer, "o", color="0.5", mfc="white")
        is_last = axes is every[-1]
        seaborn.scatterplot(last, x=x, ax=axes, legend=is_last, **looks, **ends)
        axes.set(xlabel=labels[x], ylabel="probability of the new answer", ylim=SHARE)
        low, high = data[x].agg(["min", "max"])
        axes.set_xlim(min(0, low), 1.05 * high)
    steps = data.step.max()
    _legend_beside(every[-1], f"{len(last)} edits\nhollow: step 0\nfull: step {steps}")
    lost = last[last.kind == hidden]
    share, reach = lost[["share", "reach"]].mean()
    summary = f"after {steps} steps {len(lost)} of {len(last)} edits are no longer said; "
    summary += f"of their shift stands {share:.2f} and {reach:.2f} is reached"
    columns = ["edited_model", "fact_id", "step", *labels, "rank", "p", "p_answer", "kind"]
    return Drawing(figure=figure, data=data[columns], summary=summary)
