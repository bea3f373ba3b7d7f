"""The pictures of the findings' pages."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tests.benchmarks import claim_tables, facts_kept, lasting, outcomes, patching, traces
from tests.benchmarks.claims import CLAIMS, SAME

HEAD, FREE, COLOURS = "tab:orange", "tab:blue", {"edited": "tab:blue", "intrinsic": "0.45"}
AFTER_EDITED = {"world-gpt2": "after:4", "world-llama": "after:4", "smollm2-135m": "after:6"}
EDITS = 30
MODELS = ("world-gpt2", "world-llama")
SLOW = "0.0001"  # a third of the rate at which facts are usually taught
BATCHES = (  # editor, edits at once, rate
    ("memit", 10, "usual"),
    ("rome", 10, "usual"),
    ("memit", 100, "usual"),
    ("memit", 100, SLOW),
)
NOTHING, BEFORE = "none", "before the tuning"
ARMS = {  # arm of lasting.csv -> what it is called, and whether it needs the edits at hand
    "none": ("nothing", False),
    "none*0.33": ("nothing, a third of the rate", False),
    "others": ("others", False),
    "after:4": ("after-edited", False),
    "after:4&others": ("after-edited, others", False),
    "after:4*0.5": ("after-edited, half the rate", False),
    "span": ("span", False),
    "span*2": ("span, twice the rate", False),
    "after:4&span": ("after-edited, span", False),
    "after:4&span*2": ("after-edited, span, twice the rate", False),
    "after:4&span*3": ("after-edited, span, three times the rate", False),
    "replay": ("replay", True),
    "again": ("edited again afterwards", True),
    "replay+kl": ("replay+kl", True),
    "replay+span": ("replay+span", True),
    "replay+span*0.33": ("replay+span, a third of the rate", True),
    "replay+span*2": ("replay+span, twice the rate", True),
    "after:4&replay+kl": ("after-edited, replay+kl", True),
    "after:4&replay+span": ("after-edited, replay+span", True),
    "after:4&replay+span*2": ("after-edited, replay+span, twice the rate", True),
    "after:4&replay+span*3": ("after-edited, replay+span, three times the rate", True),
}
ASKED = {
    "held_out": "other wordings of edits",
    "intrinsic": "other facts",
    "step": "steps to one level",
}
PLANS = {"all": "everything", "window:0-11": "all blocks", "edited": "the edited blocks"}
PLANS |= {"not-edited": "all but the edited"}
SHOWN = [plan for plan in claim_tables.MOVES if plan != "after:20"]
GIVEN_BACK = {  # a row of the picture -> a line of patching's table
    "all MLPs": "all MLPs",
    "all attention": "all attention set back",
    "block 0": "block 0",
    "embeddings": "embeddings",
    "norms": "norms",
    "the edited matrices": "edited matrices",
    "behind block 4, at the subject": "residual behind block 4, subject",
    "behind block 9, at the end": "residual behind block 9, end",
}
COLOURS_OF = {
    "memit": "tab:blue",
    "rome": "tab:orange",
    "ft": "tab:green",
    "alphaedit": "tab:purple",
}
NAMED = {"memit": "MEMIT", "rome": "ROME", "alphaedit": "AlphaEdit", "malmen": "MALMEN", "ft": "FT"}
UNLIKE = {"text": "prose", "edited": "edited blocks", "not-edited": "other blocks", "lora": "LoRA"}
OF_MODEL = {"world-gpt2": "tab:blue", "world-llama": "tab:orange", "smollm2-135m": "tab:green"}
MARKS = {  # of a verdict
    "holds": {"marker": "o", "is_open": False},
    "does not hold": {"marker": "X", "is_open": False},
    "undecided": {"marker": "o", "is_open": True},
}
Place = tuple[float, float, float]  # mean, and the ends of its interval


def by_claims(table: pd.DataFrame) -> Figure:
    """Each claim's headline on each model: right of 0 it is as the study says; where two are said
    to be equal, in the band.
    """
    table = claim_tables.headlines(table)
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots()
    for row, (number, *_) in enumerate(CLAIMS):
        of_claim = table[table.claim == number]
        axes.axhspan(row - 0.5, row + 0.5, color="0.96" if row % 2 else "white", zorder=0)
        if len(of_claim) and (of_claim.claimed == 0).all():
            axes.fill_between([-SAME, SAME], row - 0.42, row + 0.42, color="0.85", zorder=0.5)
        for place, (model, color) in enumerate(OF_MODEL.items()):
            for first in of_claim[of_claim.model == model].head(1).itertuples():
                sign = first.claimed or 1
                ends = (sign * first.difference, sign * first.low, sign * first.high)
                _point(axes, ends, row + 0.25 * (place - 1), color, **MARKS[first.verdict])
    axes.axvline(0, color="0.3", lw=1)
    axes.set_xlim(-1, 1)
    axes.set_ylim(len(CLAIMS) - 0.5, -0.5)
    axes.set_yticks(range(len(CLAIMS)), [f"{number}. {what}" for number, _, what, _ in CLAIMS])
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set_xlabel("difference in the share of facts; right of 0 as claimed")
    handles = [_mark(color, model) for model, color in OF_MODEL.items()]
    for verdict, mark in MARKS.items():
        inside = "white" if mark["is_open"] else "0.3"
        shape = {"marker": mark["marker"], "mfc": inside}
        handles.append(Line2D([], [], color="0.3", lw=0, label=verdict, **shape))
    handles.append(Line2D([], [], color="0.85", lw=10, label="no difference is claimed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("What two studies claim, seen here: of most edits at once, 95 % intervals")
    return figure


def tournament(done: pd.DataFrame) -> Figure:
    """What keeps the edits of MEMIT while facts are taught: a row an arm, of those that have every
    seed of the tuning without a protection.
    """
    models = {model: whole(arms_of(done, model)) for model in AFTER_EDITED}
    heights = [len(places) for places in models.values()]
    figure = Figure(figsize=(10, 1.8 + 0.26 * sum(heights)), layout="constrained")
    grid = {"height_ratios": heights}
    axes = figure.subplots(len(models), len(ASKED), sharex="col", sharey="row", gridspec_kw=grid)
    for of_model, (model, places) in zip(axes, models.items(), strict=True):
        before = places.pop(BEFORE)
        for one, name in zip(of_model, ASKED, strict=True):
            for row, (arm, place) in enumerate(places.items()):
                color = HEAD if ARMS[arm][1] else FREE
                _point(one, place[name], row, color=color, is_open=place["late"])
            one.set_xlim(left=0)
            if name != "step":
                one.axvline(before[name][0], color="0.3", lw=1, ls="--")
                one.axvline(places[NOTHING][name][0], color="0.3", lw=1, ls=":")
                one.set_xlim(0, 1.02)
            one.grid(axis="y", color="0.92")
            one.set_axisbelow(True)
        of_model[0].set_yticks(range(len(places)), [ARMS[arm][0] for arm in places])
        of_model[0].set_ylim(len(places) - 0.4, -0.6)
        title = f"{model}, {before['seeds']} seeds"
        of_model[0].set_title(title, loc="left", fontweight="bold", fontsize=10)
    for one, name in zip(axes[-1], ASKED.values(), strict=True):
        one.set_xlabel(name if name.startswith("steps") else f"{name}: share still said")
    handles = [_mark(FREE, "without the edits at hand"), _mark(HEAD, "with them")]
    handles += [_line("--", "before the tuning"), _line(":", "tuned without a protection")]
    if any(place.get("late") for places in models.values() for place in places.values()):
        label = "level not met"
        handles.append(Line2D([], [], color=FREE, marker="o", mfc="white", lw=0, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{EDITS} edits, then new facts until one level of accuracy; 95 % intervals")
    return figure


def arms_of(done: pd.DataFrame, model: str) -> dict[str, dict]:
    """Each arm's places, by column; its number of `seeds`; `late`: whether one was never at the
    level.
    """
    done = lasting.that_took(done[done.trial.str.match(rf"{model}:memit:{EDITS}:facts:")])
    parts = {BEFORE: done[(done["at"] == "edited") & (done.arm == NOTHING)]}
    ended = done[done["at"] == "threshold"]
    for arm in ARMS:
        parts[arm] = ended[ended.arm == arm.replace("after:4", AFTER_EDITED[model])]
    places: dict[str, dict] = {}
    for arm, rows in parts.items():
        if rows.empty:
            continue
        place: dict = {"seeds": len(rows), "late": "budget" in set(rows.ended)}
        place["step"] = (rows.step.mean(), rows.step.min(), rows.step.max())
        for name in ("kept", "held_out", "intrinsic"):
            values, seeds = lasting.shares(rows, name)
            is_known = values.notna()
            ends = outcomes.interval(values[is_known], seeds[is_known])
            place[name] = (values.mean(), *ends)
        places[arm] = place
    return places


def whole(places: dict[str, dict]) -> dict[str, dict]:
    """Those of every seed."""
    every = places[BEFORE]["seeds"]
    return {arm: place for arm, place in places.items() if place["seeds"] == every}


def by_blocks(looks: pd.DataFrame) -> Figure:
    """Edits and other facts kept by which blocks may move, at one level of the task."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(len(MODELS), len(BATCHES), sharex=True, sharey=True)
    for of_model, model in zip(axes, MODELS, strict=True):
        for one, (editor, size, rate) in zip(of_model, BATCHES, strict=True):
            fixed = {"model": model, "editor": editor, "task": "facts", "n_edited": size}
            fixed |= {"learning_rate": rate}
            part = facts_kept.arms(looks[looks.plan.isin(SHOWN)], "plan", **fixed)
            part = facts_kept.even(part, "plan")
            counts = _blocks(one, facts_kept.chosen(part, "plan", "level"))
            slower = ", a third of the rate" if rate == SLOW else ""
            one.set_title(f"{model}, {editor.upper()}{slower}\n{counts}", fontsize=9)
    names = [PLANS.get(plan, plan) for plan in SHOWN]
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    for one in axes[-1]:
        one.set_xlabel("share still said")
    handles = [_mark(COLOURS["edited"], "edits"), _mark(COLOURS["intrinsic"], "other facts")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    title = "What moves while facts are taught, each arm where it first is at one accuracy"
    figure.suptitle(f"{title}; 95 % intervals")
    return figure


def _blocks(axes: Axes, looks: pd.DataFrame) -> str:
    """Draws a row a plan; says of how many edits and seeds."""
    for row, plan in enumerate(SHOWN):
        part = looks[looks.plan == plan]
        facts = facts_kept.facts_of(part) if len(part) else part
        for shift, (group, color) in zip((-0.15, 0.15), COLOURS.items(), strict=True):
            if len(facts):
                mean, low, high, *_ = facts_kept.interval(facts_kept.kept(facts, group))
                _point(axes, (mean, low, high), row + shift, color=color)
    axes.set_xlim(0, 1.02)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    edits = int(looks.n_edited.iloc[0])
    seeds = looks.seed.nunique()
    level = (looks.metric * looks.share).groupby(looks.seed).sum().mean() / looks.plan.nunique()
    return f"{edits} edits, {seeds} seed{'s' if seeds > 1 else ''}; at accuracy {level:.2f}"


def by_traces(done: pd.DataFrame) -> Figure:
    """What is said and what is written after a tuning: a row a way to edit and tune."""
    done = done.join(done.trial.str.extract(traces.PARTS))
    done = done[done.change.isna() & (done.step == traces.CHANGED) & (done.edits > 0)]
    about = ["editor", "batch", "task", "plan"]
    done = done.assign(rank=done.editor.map([*NAMED].index))
    arms = done.sort_values(["rank", "batch", "task", "plan"])[about].drop_duplicates()
    names = [arm_name(*arm) for arm in arms.itertuples(index=False)]
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(names)), layout="constrained")
    every = figure.subplots(1, len(AFTER_EDITED), sharex=True, sharey=True)
    for axes, model in zip(every, AFTER_EDITED, strict=True):
        for row, arm in enumerate(arms.itertuples(index=False)):
            here = done[(done.model == model) & (done[about] == list(arm)).all(axis=1)]
            if here.empty:
                continue
            total = here.edits.sum()
            said, written = (here.kept * here.edits).sum() / total, here.right.sum() / total
            axes.plot([said, written], [row, row], color="0.85", lw=3, zorder=1)
            axes.plot(written, row, "o", color="tab:blue", clip_on=False)
            style = {"mfc": "white", "ms": 6 if said != written else 3}
            axes.plot(said, row, "o", color="0.35", clip_on=False, **style)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("share of the edits")
    every[0].set_yticks(range(len(names)), names)
    every[0].invert_yaxis()
    marks = [Line2D([], [], color="0.35", marker="o", mfc="white", lw=0, label="still said")]
    marks += [Line2D([], [], color="tab:blue", marker="o", lw=0, label="subject named")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Said and written, {traces.CHANGED} steps after the edit")
    return figure


def arm_name(editor: str, batch: str, task: str, plan: str) -> str:
    """E.g. "MEMIT, 10 edits"; facts and all weights where nothing is said."""
    unlike = [UNLIKE.get(word, word) for word in (task, plan) if word not in ("facts", "all")]
    edits = f"{batch} edit{'s' if batch != '1' else ''}"
    return ", ".join([NAMED[editor], edits, *unlike])


def by_parts(table: pd.DataFrame) -> Figure:
    """Which part of a tuned model, set back to what it was before, gives the edits back."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    table = table[(table.task == "any") & (table.step == patching.STEPS[0])]
    for axes, model in zip(figure.subplots(1, 2, sharex=True, sharey=True), MODELS, strict=True):
        here = table[table.model == model].set_index(["editor", "measure", "by", "part", "layer"])
        counts = []
        for place, (editor, color) in enumerate(COLOURS_OF.items()):
            if editor not in here.index:
                continue
            rows = here.loc[editor]
            lost = rows.loc[("set back", "weights", "everything", -1)].margin_gain
            counts.append(f"{NAMED[editor]} {lost:.1f}")
            for row, part in enumerate(GIVEN_BACK.values()):
                gain = rows.loc[patching.PARTS[part]]
                shares = (gain.margin_gain / lost, gain.margin_low / lost, gain.margin_high / lost)
                _point(axes, shares, row + 0.16 * (place - 1.5), color=color)
        axes.axvline(0, color="0.3", lw=1)
        axes.axvline(1, color="0.3", lw=1, ls="--")
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(f"{model}\nnats lost: {', '.join(counts)}", fontsize=9)
        axes.set_xlabel("share of the lost margin that is given back")
        axes.set_yticks(range(len(GIVEN_BACK)), list(GIVEN_BACK))
    axes.invert_yaxis()
    handles = [_mark(color, NAMED[editor]) for editor, color in COLOURS_OF.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Parts set back to what they were before 20 steps of facts (any); 95 % intervals"
    )
    return figure


def _point(
    axes: Axes, place: Place, row: float, color: str, is_open: bool = False, marker: str = "o"
) -> None:
    mean, low, high = place
    axes.plot([low, high], [row, row], color=color, lw=1.6, solid_capstyle="round")
    inside = "white" if is_open else color
    size = 7 if marker == "X" else 5
    axes.plot(mean, row, marker, color=color, ms=size, mfc=inside, clip_on=False, zorder=3)


def _mark(color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", lw=1.6, label=label)


def _line(style: str, label: str) -> Line2D:
    return Line2D([], [], color="0.3", ls=style, lw=1, label=label)
