"""The explorer: what became of each fact of a finished run, checkpoint by checkpoint.

It redraws what was recorded and needs no torch.
"""

import base64
import io
from html import escape

import numpy
import pandas as pd
from ipywidgets import HTML, Dropdown, HBox, Image, SelectionSlider, VBox
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workbench.plots import CATEGORIES, STEP_NAMES, step_names
from workbench.runs import Run

OUTCOMES = ("kept", "lost to related", "back to true", "lost to other", "never held")
KEY = ["edited_model", "fact_id"]  # an intrinsic fact is watched in every edited model
SHOWN = ("edited", "true")
MARK = "#D55E00"  # orange is told from every shade of cividis
WRAP = {"flex_flow": "row wrap"}
STYLE = {"description_width": "8em"}


def outcomes(run: Run) -> pd.DataFrame:
    """A row each edited and intrinsic fact of each edited model, sorted by its outcome: prompt,
    target, group, outcome; indexed by KEY.

    The last look decides. What is not retained there went to the category with most of the
    probability; what was not there right after the edit either was never held.
    """
    probes = run.probes[run.probes.group.isin(["edited", "intrinsic"])]
    probes = probes.sort_values("step", kind="stable").set_index(KEY)
    last = probes.groupby(KEY).tail(1)
    held = probes[probes.step == 0].retained.reindex(last.index).astype(bool)
    masses = last[[f"p_{name}" for name in CATEGORIES]].fillna(0)
    most = masses.idxmax(axis=1).mask(masses.sum(axis=1) == 0)  # else no mass is known
    outcome = pd.Series("lost to other", last.index)
    outcome[most == "p_related"] = "lost to related"
    outcome[(most == "p_true") & (last.group == "edited")] = "back to true"
    outcome[~held] = "never held"
    outcome[last.retained.astype(bool)] = "kept"
    table = last[["group", "prompt", "target"]]
    table = table.assign(outcome=pd.Categorical(outcome, OUTCOMES, ordered=True))
    return table.sort_values(["outcome", "group", "prompt"], kind="stable")


class _View(VBox):
    """One run at one fact and checkpoint: heatmap, likeliest tokens, and both in words."""

    def __init__(self, run: Run):
        self.name = run.folder.name
        self.facts = outcomes(run)
        self.edited = run.about.get("layers", ())
        index = [*KEY, "category", "layer"]
        self.lens = run.lens.pivot(index=index, columns="step", values="probability").sort_index()
        tokens = run.tokens[run.tokens.layer == run.tokens.layer.max()]
        tokens = tokens.sort_values("rank").set_index([*KEY, "step"])
        self.tokens = tokens.sort_index(kind="stable")
        fitting = {"max_width": "100%", "align_self": "flex-start"}
        self.image = Image(format="png", layout=fitting)
        self.text, self.likeliest = HTML(), HTML()
        beside = HBox([self.image, self.likeliest], layout=WRAP)
        super().__init__([self.text, beside], layout={"margin": "0 1em 0 0"})

    def curve(self, category: str, key: tuple) -> pd.DataFrame:
        """Probability (layer, step) of the category's token."""
        return self.lens.loc[(*key, category)].dropna(axis=1, how="all")

    def steps(self, key: tuple) -> list[int]:
        return self.curve("edited", key).columns.tolist()

    def same_fact(self, key: tuple) -> tuple | None:
        """The same fact in this run: in the same edited model, or else in the first that has it."""
        if key in self.facts.index:
            return key
        copies = [other for other in self.facts.index if other[1] == key[1]]
        return min(copies, default=None)

    def show(self, key: tuple, step: int) -> None:
        """Redraw at the checkpoint, or at the last one before it that this run has."""
        key = self.same_fact(key)
        if key is None:
            self.image.value = b""
            self.likeliest.value = ""
            self.text.value = f"{escape(self.name)} does not hold this fact"
            return
        earlier = [known for known in self.steps(key) if known <= step]
        step = max(earlier, default=-1)
        self.image.value = self._png(key, step)
        self.text.value = f"<p>{escape(self._summary(key, step))}</p>"
        self.likeliest.value = self._table(key, step)

    def still(self) -> str:
        """The same without widgets, as markup."""
        picture = base64.b64encode(self.image.value).decode()
        image = f'<img alt="" src="data:image/png;base64,{picture}">' if picture else ""
        return self.text.value + image + self.likeliest.value

    def _png(self, key: tuple, step: int) -> bytes:
        """Layer by checkpoint of each category, the chosen checkpoint framed."""
        steps = self.steps(key)
        blocks = self.curve("edited", key).index
        figure = Figure(figsize=(min(2.4 + 0.8 * len(steps), 9), 3.6), dpi=90)
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(1, len(SHOWN), sharey=True)
        figure.subplots_adjust(left=0.11, right=0.86, bottom=0.2, top=0.88, wspace=0.06)
        scale = {"cmap": "cividis", "vmin": 0, "vmax": 1, "origin": "lower", "aspect": "auto"}
        every = -(-len(steps) // 10)  # ten labels at most
        for axes, category in zip(all_axes, SHOWN, strict=True):
            image = axes.imshow(self.curve(category, key), **scale)
            place = steps.index(step)
            axes.axvspan(place - 0.5, place + 0.5, fill=False, ec=MARK, lw=2, clip_on=False)
            axes.set_xticks(range(len(steps))[::every], step_names(steps)[::every])
            axes.tick_params("x", rotation=45)
            axes.set_title(f"p({category} token)", fontsize=10)
        marks = [f"E {block}" if block in self.edited else block for block in blocks]
        all_axes[0].set_yticks(range(len(marks)), marks, fontsize=8)
        all_axes[0].set_ylabel("after block (E: edited)")
        figure.colorbar(image, cax=figure.add_axes((0.88, 0.2, 0.02, 0.68)))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    def _summary(self, key: tuple, step: int) -> str:
        fact = self.facts.loc[key]
        edited = self.curve("edited", key)[step]
        true = self.curve("true", key)[step]
        ends = f"p(edited) {edited.iloc[-1]:.3f}, p(true) {true.iloc[-1]:.3f}"
        above = numpy.flatnonzero(edited > 0.5)
        passes = f"first after block {above[0]}" if len(above) else "after no block"
        words = f"{self.name}, {fact.group} fact, {fact.outcome} at the end. "
        words += f"Checkpoint {STEP_NAMES.get(step, step)}: {ends} after the last block; "
        return f"{words}the edited token passes 0.5 {passes}."

    def _table(self, key: tuple, step: int) -> str:
        prompt = escape(self.facts.loc[key].prompt)
        caption = f"{prompt} ... ({STEP_NAMES.get(step, step)})"
        rows = f"<caption style='text-align:left'>{caption}</caption>"
        rows += "<tr><th>rank</th><th>token</th><th>probability</th></tr>"
        for row in self.tokens.loc[[(*key, step)]].itertuples():
            rank = escape(str(row.rank))
            token = f"<code style='white-space:pre'>{escape(row.token)}</code>"
            rows += f"<tr><td>{rank}</td><td>{token}</td><td>{row.probability:.3f}</td></tr>"
        return f"<table style='line-height:1.3;min-width:24em;text-align:left'>{rows}</table>"


class Explorer(VBox):
    """Facts of a run by what became of them, and for one of them the lens and the likeliest tokens
    at any checkpoint.

    Args:
        other: a second run, shown beside the first at the same fact and step.
    """

    def __init__(self, run: Run, other: Run | None = None):
        self.views = [_View(one) for one in (run, other) if one]
        table = self.views[0].facts
        edited = table.index[table.group == "edited"]
        first = edited[0] if len(edited) else table.index[0]
        wide = {"options": _options(table), "layout": {"width": "min(60em, 98%)"}}
        self.fact = Dropdown(value=first, description="Explored fact", style=STYLE, **wide)
        self.step = SelectionSlider(options=[("", "")], description="Checkpoint", style=STYLE)
        self.step.continuous_update = False  # a picture takes a third of a second
        self.fact.observe(lambda _: self._set_steps(), "value")
        self.step.observe(lambda _: self._draw(), "value")
        views = HBox(self.views, layout=WRAP)
        super().__init__([self.fact, self.step, views], _dom_classes=("workbench-explorer",))
        self._set_steps()

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page what is chosen, as picture and words, stands in the explorer's place."""
        still = "".join(view.still() for view in self.views)
        return super()._repr_mimebundle_(**kwargs) | {"text/html": still}

    def _set_steps(self) -> None:
        """Offer the checkpoints of the chosen fact's model, at the one chosen before if it has
        that.
        """
        steps = self.views[0].steps(self.fact.value)
        options = tuple(zip(step_names(steps), steps, strict=True))
        if options != self.step.options:  # new ones choose the first of them
            before = self.step.value
            self.step.options = options
            self.step.value = before if before in steps else steps[-1]
        self._draw()

    def _draw(self) -> None:
        for view in self.views:
            view.show(self.fact.value, self.step.value)


def _options(table: pd.DataFrame) -> list[tuple[str, tuple]]:
    """What the list of facts shows, and the keys."""
    several = table.index.get_level_values("edited_model").nunique() > 1
    options = []
    for key, row in table.iterrows():
        which = f"{row.group}, model {key[0]}" if several else row.group
        label = f"[{row.outcome}] {row.prompt} -> {row.target} ({which})"
        options.append((label, key))
    return options
