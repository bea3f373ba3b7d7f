"""Figures and tables of a run. Each returns a Drawing: the figure, the tidy data it drew, and a sentence that says what is seen."""

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import pandas as pd
import seaborn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workbench.facts import BadInput
from workbench.runs import Run

CATEGORIES = ("true", "edited", "related", "stop", "other")
_COLOURS = dict(zip(CATEGORIES, seaborn.color_palette("colorblind", 5), strict=True))
_MARKERS = dict(zip(CATEGORIES, "osD^v", strict=True))
BEFORE, AFTER = "before", "edited"


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
        self.figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """PNG or SVG by the path's ending, and the data as CSV beside it."""
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise BadInput(f"{path}: a figure ends in .png or .svg")
        with matplotlib.rc_context({"svg.hashsalt": "workbench"}):
            self.figure.savefig(path, dpi=150, bbox_inches="tight")
        self.data.to_csv(path.with_suffix(".csv"), index=False)
        return path


def _axes(width: float, height: float, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False, sharey=True)[0]


def _nothing(group: str) -> Drawing:
    figure, (axes,) = _axes(4, 0.6)
    axes.set_axis_off()
    axes.text(0.5, 0.5, f"this run has no {group} facts", ha="center", va="center")
    return Drawing(figure=figure, data=pd.DataFrame(), summary=f"no {group} facts")


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
    """The k likeliest next tokens of a fact's prompt at every checkpoint, with their probabilities: Table 2 of arXiv 2507.14198."""
    found = _one(run, run.tokens, fact_id or edited_fact(run))
    found = found[(found.layer == found.layer.max()) & (found["rank"] <= k)]
    cells = found.token.str.strip() + " " + found.probability.map("{:.3f}".format)
    table = found.assign(cell=cells, checkpoint=found.step).pivot_table(index="checkpoint", columns="rank", values="cell", aggfunc="first")
    table.columns = [f"top {rank}" for rank in table.columns]
    return table.set_axis(step_names(table.index), axis=0).rename_axis("step")


def category_mass(run: Run, group: str = "edited", fact_id: str = "") -> Drawing:
    """Where the next-token probability goes over fine-tuning, on the facts' own prompts: Figure 4 of arXiv 2507.14198."""
    found = run.probes[run.probes.group == group]
    if found.empty:
        return _nothing(group)
    found = _one(run, found, fact_id) if fact_id else found
    names = [f"p_{name}" for name in CATEGORIES if found[f"p_{name}"].notna().any()]
    data = found.melt(["step", "fact_id", "edited_model"], names, "category", "probability").dropna()
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
        ylim=(-0.02, 1.02), xlabel="fine-tuning step", ylabel="probability of the next token", title=f"{group} fact{'s' if n > 1 else ''} (n = {n})"
    )
    axes.set_xticks(range(len(steps)), step_names(steps))
    axes.legend(title="first token of", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    mean = data.groupby(["step", "category"]).probability.mean().unstack()
    name = "edited" if group == "edited" else "true"
    summary = f"{group}, n = {n}: mean p({name}) is {mean.loc[0, name]:.2f} after the edit and {mean[name].iloc[-1]:.2f} after {steps[-1]} steps"
    return Drawing(figure=figure, data=data.drop(columns="place"), summary=summary + (", bands are 95 % intervals over facts" if n > 1 else ""))


def lens_heatmap(run: Run, group: str = "edited", fact_id: str = "", categories: tuple[str, ...] = ("edited", "true")) -> Drawing:
    """Logit lens, layer by checkpoint: the probability of the edited and the true token after each block; edited blocks are boxed.

    For a group of several facts the mean is drawn. Cells carry the median rank (1 = top) where it is 100 or better.
    """
    members = [fact_id] if fact_id else run.probes[run.probes.group == group].fact_id.unique()
    if not len(members):
        return _nothing(group)
    found = run.lens[run.lens.fact_id.isin(members) & run.lens.category.isin(categories)]
    data = found.groupby(["category", "layer", "step"], as_index=False).agg(probability=("probability", "mean"), rank=("rank", "median"))
    steps = sorted(data.step.unique())
    layers = data.layer.max() + 1
    figure, all_axes = _axes(1.6 + 0.62 * len(steps) * len(categories), 0.8 + 0.27 * layers, len(categories))
    for axes, category in zip(all_axes, categories, strict=True):
        part = data[data.category == category]
        table = part.pivot(index="layer", columns="step", values="probability")
        ranks = part.pivot(index="layer", columns="step", values="rank")
        image = axes.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for (row, column), rank in numpy.ndenumerate(ranks.to_numpy()):
            if rank <= 100:
                colour = "black" if table.iat[row, column] > 0.5 else "white"
                axes.text(column, row, f"{rank:g}", ha="center", va="center", fontsize=7, color=colour)
        for layer in run.about["hparams"][0]["layers"]:
            axes.axhline(layer - 0.5, color="tab:orange", lw=1.2)
            axes.axhline(layer + 0.5, color="tab:orange", lw=1.2)
        axes.set(xlabel="fine-tuning step", title=f"{category} token")
        axes.set_xticks(range(len(steps)), step_names(steps), rotation=45, ha="right")
        axes.set_yticks(range(layers))
    all_axes[0].set_ylabel("block (lens after it)")
    figure.colorbar(image, ax=list(all_axes), label="probability (cell text: median rank)", fraction=0.05)
    n = len(members)
    figure.suptitle(f"{group}: {fact_id}" if fact_id else f"{group} facts, mean (n = {n}); edited block between orange lines", fontsize=10)
    last = data[(data.layer == layers - 1) & (data.category == categories[0])].set_index("step").probability
    summary = f"p({categories[0]} token) after the last block: {last[0]:.2f} after the edit, {last.iloc[-1]:.2f} after {steps[-1]} steps (n = {n})"
    return Drawing(figure=figure, data=data, summary=summary)


def retention_table(run: Run) -> pd.DataFrame:
    """Share retained by group and step, over all facts and over those whose edit took, with n."""
    probes = run.probes[run.probes.step >= 0]
    every = probes.groupby(["group", "step"]).agg(n=("retained", "size"), retained=("retained", "mean"))
    took = (
        probes[probes.took.fillna(False).astype(bool)]
        .groupby(["group", "step"])
        .agg(n_took=("retained", "size"), retained_of_took=("retained", "mean"))
    )
    return every.join(took).reset_index()
