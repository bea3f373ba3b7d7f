"""The explorer: what became of each fact of a finished run, checkpoint by checkpoint.

It redraws what was recorded and needs no torch.
"""

import base64
import html
import io
import threading

import ipywidgets
import numpy
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from workbench.runs import Run

OUTCOMES = ("kept", "lost to related", "back to true", "lost to other", "never held")
KEY = ["edited_model", "fact_id"]  # an intrinsic fact is watched in every edited model
SHOWN = ("edited", "true")
MARK = "#D55E00"  # orange is told from every shade of cividis
_DRAWING = threading.Lock()  # callbacks may run in threads


def outcomes(run: Run) -> pd.DataFrame:
    """A row each edited and intrinsic fact of each edited model, sorted by its outcome: prompt,
    target, group, outcome; indexed by KEY.

    The last look decides. What is not retained there went to the category with most of the
    probability; what was not there right after the edit either was never held.
    """
    own = run.probes[run.probes.group.isin(["edited", "intrinsic"])].sort_values(
        "step", kind="stable"
    )
    held = own[own.step == 0].set_index(KEY).retained
    last = own.groupby(KEY).tail(1).set_index(KEY)
    masses = last[["p_true", "p_edited", "p_related", "p_stop", "p_other"]]
    unclear = masses.isna().all(axis=1)  # first tokens do not tell this fact's answers apart
    most = masses.fillna(0).idxmax(axis=1).mask(unclear, "p_other")
    lost = pd.Series("lost to other", last.index)
    lost[most == "p_related"] = "lost to related"
    lost[(most == "p_true") & (last.group == "edited")] = "back to true"
    lost[~held.reindex(last.index).astype(bool)] = "never held"
    last["outcome"] = pd.Categorical(
        lost.mask(last.retained.astype(bool), "kept"), OUTCOMES, ordered=True
    )
    return last[["group", "prompt", "target", "outcome"]].sort_values(
        ["outcome", "group", "prompt"], kind="stable"
    )


def step_name(step: int) -> str:
    return {-1: "before", 0: "edited"}.get(step, str(step))


class _View(ipywidgets.VBox):
    """One run at one fact and checkpoint: heatmap, likeliest tokens, and both in words.

    The tables are cut once, here.
    """

    def __init__(self, run: Run):
        self.name, self.facts = run.folder.name, outcomes(run)
        lens = run.lens[run.lens.category.isin(SHOWN)]
        self.lens = lens.pivot(
            index=[*KEY, "category", "layer"], columns="step", values="probability"
        ).sort_index()
        tokens = run.tokens[run.tokens.layer == run.tokens.layer.max()]
        self.tokens = tokens.sort_values("rank").set_index([*KEY, "step"]).sort_index(kind="stable")
        self.edited = list(run.about.get("layers", ()))
        self._axes_of: list[int] = []
        self.image = ipywidgets.Image(
            format="png", layout={"max_width": "100%", "align_self": "flex-start"}
        )
        self.text, self.likeliest = ipywidgets.HTML(), ipywidgets.HTML()
        beside = ipywidgets.HBox([self.image, self.likeliest], layout={"flex_flow": "row wrap"})
        super().__init__([self.text, beside], layout={"margin": "0 1em 0 0"})

    def of(self, category: str, key: tuple) -> pd.DataFrame:
        """Probability by layer and step."""
        return self.lens.loc[(*key, category)].dropna(axis=1, how="all")

    def steps(self, key: tuple) -> list[int]:
        return self.of("edited", key).columns.tolist()

    def twin(self, key: tuple) -> tuple | None:
        """The same fact in this run: in the same edited model, or else in the first that has it."""
        if key in self.facts.index:
            return key
        return min((found for found in self.facts.index if found[1] == key[1]), default=None)

    def show(self, key: tuple, step: int) -> None:
        """Redraw at the checkpoint, or at the last one before it that this run has."""
        twin = self.twin(key)
        if twin is None:
            self.image.value, self.likeliest.value, self.text.value = (
                b"",
                "",
                f"{html.escape(self.name)} does not hold this fact",
            )
            return
        step = max((at for at in self.steps(twin) if at <= step), default=-1)
        with _DRAWING:
            self.image.value = self._png(twin, step)
        self.text.value = f"<p>{html.escape(self._summary(twin, step))}</p>"
        self.likeliest.value = self._table(twin, step)

    def still(self) -> str:
        """The same without widgets, as markup."""
        picture = base64.b64encode(self.image.value).decode()
        image = f'<img alt="" src="data:image/png;base64,{picture}">' if picture else ""
        return self.text.value + image + self.likeliest.value

    def _png(self, key: tuple, step: int) -> bytes:
        steps = self.steps(key)
        if (
            self._axes_of != steps
            # facts differ in their numbers only, and to draw axes anew takes longer than all the rest
        ):
            self._axes_of, self._figure, self._parts = (
                steps,
                *self._empty(steps, len(self.of(SHOWN[0], key))),
            )
        for (image, box), category in zip(self._parts, SHOWN, strict=True):
            image.set_data(self.of(category, key).to_numpy())
            box.set_x(steps.index(step) - 0.5)
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png")
        return buffer.getvalue()

    def _empty(self, steps: list[int], layers: int) -> tuple[Figure, list]:
        """A figure without numbers, and of each category the image and the box that marks the
        checkpoint.
        """
        figure = Figure(figsize=(min(2.4 + 0.8 * len(steps), 9), 3.6), dpi=90)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(SHOWN), sharey=True)
        figure.subplots_adjust(left=0.11, right=0.86, bottom=0.2, top=0.88, wspace=0.06)
        places = range(0, len(steps), -(-len(steps) // 10))
        parts = []
        for ax, category in zip(axes, SHOWN, strict=True):
            image = ax.imshow(
                numpy.zeros((layers, len(steps))),
                origin="lower",
                aspect="auto",
                cmap="cividis",
                vmin=0,
                vmax=1,
            )
            box = Rectangle((0, -0.5), 1, layers, fill=False, edgecolor=MARK, lw=2, clip_on=False)
            parts.append((image, ax.add_patch(box)))
            ax.set_xticks(
                places, [step_name(steps[place]) for place in places], rotation=45, ha="right"
            )
            ax.set_title(f"p({category} token)", fontsize=10)
        axes[0].set_yticks(
            range(layers),
            [f"E {layer}" if layer in self.edited else layer for layer in range(layers)],
            fontsize=8,
        )
        for layer in self.edited:
            axes[0].get_yticklabels()[layer].set(color=MARK, weight="bold")
        axes[0].set_ylabel("after block (E: edited)")
        figure.colorbar(image, cax=figure.add_axes((0.88, 0.2, 0.02, 0.68)))
        return figure, parts

    def _summary(self, key: tuple, step: int) -> str:
        fact, now = self.facts.loc[key], self.of("edited", key)[step].to_numpy()
        ends = ", ".join(f"p({name}) {self.of(name, key)[step].iloc[-1]:.3f}" for name in SHOWN)
        above = numpy.flatnonzero(now > 0.5)
        first = (
            f"the edited token passes 0.5 first after block {above[0]}"
            if len(above)
            else "the edited token passes 0.5 after no block"
        )
        return f"{self.name}, {fact.group} fact, {fact.outcome} at the end. Checkpoint {step_name(step)}: {ends} after the last block; {first}."

    def _table(self, key: tuple, step: int) -> str:
        rows = (
            f"<tr><td>{html.escape(str(row.rank))}</td>"
            f"<td><code style='white-space:pre'>{html.escape(row.token)}</code></td>"
            f"<td>{row.probability:.3f}</td></tr>"
            for row in self.tokens.loc[[(*key, step)]].itertuples(index=False)
        )
        caption = html.escape(f"{self.facts.loc[key].prompt} ... ({step_name(step)})")
        caption = f"<caption style='text-align:left'>{caption}</caption>"
        head = "<tr><th>rank</th><th>token</th><th>probability</th></tr>"
        return f"<table style='line-height:1.3;min-width:24em;text-align:left'>{caption}{head}{''.join(rows)}</table>"


class Explorer(ipywidgets.VBox):
    """Facts of a run by what became of them, and for one of them the lens and the likeliest tokens
    at any checkpoint.

    Args:
        other: a second run, shown beside the first at the same fact and step.
    """

    def __init__(self, run: Run, other: Run | None = None):
        self._quiet = False
        self.views = [_View(one) for one in (run, other) if one]
        found = self.views[0].facts
        several = found.index.get_level_values("edited_model").nunique() > 1
        options = [
            (
                f"[{row.outcome}] {row.prompt} -> {row.target}"
                + (f" ({row.group}, model {row.Index[0]})" if several else f" ({row.group})"),
                row.Index,
            )
            for row in found.itertuples()
        ]
        first = next((key for _, key in options if found.loc[key].group == "edited"), options[0][1])
        style, wide = {"description_width": "8em"}, {"width": "min(60em, 98%)"}
        self.fact = ipywidgets.Dropdown(
            options=options, value=first, description="Explored fact", style=style, layout=wide
        )
        self.step = ipywidgets.Dropdown(description="Checkpoint", style=style)
        self.slider = ipywidgets.IntSlider(description="Slide to it", readout=False, style=style)
        self.fact.observe(lambda _: self._set_steps(), "value")
        self.step.observe(lambda _: self._draw(), "value")
        self.slider.observe(lambda change: setattr(self.step, "index", change["new"]), "value")
        head = ipywidgets.HBox([self.step, self.slider], layout={"flex_flow": "row wrap"})
        views = ipywidgets.HBox(self.views, layout={"flex_flow": "row wrap"})
        super().__init__([self.fact, head, views], _dom_classes=("workbench-explorer",))
        self._set_steps()

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page what is chosen, as picture and words, stands in the explorer's place."""
        still = "".join(view.still() for view in self.views)
        return super()._repr_mimebundle_(**kwargs) | {"text/html": still}

    def _set_steps(self) -> None:
        """Offer the checkpoints of the chosen fact's model, at the one chosen before if it has
        that.
        """
        steps, before = self.views[0].steps(self.fact.value), self.step.value
        self._quiet = True  # new options choose the first of them, and a shorter slider moves
        self.step.options = [(step_name(step), step) for step in steps]
        self.slider.max = len(steps) - 1
        self.step.value = before if before in steps else steps[-1]
        self._quiet = False
        self._draw()

    def _draw(self) -> None:
        if self._quiet:
            return
        self.slider.value = self.step.index
        for view in self.views:
            view.show(self.fact.value, self.step.value)
