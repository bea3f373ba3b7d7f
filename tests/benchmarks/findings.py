"""The pages of the findings: their tables and pictures, from data/findings/*.csv.

    python -m tests.benchmarks.findings [TABLE ...]

Writes the tables (all, or those named) behind their marks on the pages, such as <!-- claims -->,
and draws the pictures. What is said between them is written by hand.
"""

import argparse
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from tests.benchmarks import (
    claim_tables,
    claims,
    elasticity,
    facts_kept,
    forecast,
    lasting,
    outcomes,
    patching,
    recovering,
    traces,
)
from workbench import files

HEAD, FREE, COLOURS = "tab:orange", "tab:blue", {"edited": "tab:blue", "intrinsic": "0.45"}
AFTER_EDITED = {"world-gpt2": "after:4", "world-llama": "after:4", "smollm2-135m": "after:6"}
EDITS = 30
MODELS = ("world-gpt2", "world-llama")
KINDS = ("same-kinds", "other-kinds")  # of objects that are taught, as of those that were edited
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
    "after:4&span*3": ("after-edited, span, three times", False),
    "replay": ("replay", True),
    "again": ("edited again afterwards", True),
    "replay+kl": ("replay+kl", True),
    "replay+span": ("replay+span", True),
    "replay+span*0.33": ("replay+span, a third of the rate", True),
    "replay+span*2": ("replay+span, twice the rate", True),
    "after:4&replay+kl": ("after-edited, replay+kl", True),
}
ASKED = {
    "held_out": "other wordings of the edits",
    "intrinsic": "other facts",
    "step": "steps to one level of the task",
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
Place = tuple[float, float, float]  # mean, and the ends of its interval


def tournament(done: pd.DataFrame) -> Figure:
    """What keeps the edits of MEMIT while facts are taught: a row an arm, of those that have every
    seed of the tuning without a protection.
    """
    models = {model: _arms(done, model) for model in AFTER_EDITED}
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


def _arms(done: pd.DataFrame, model: str) -> dict[str, dict]:
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
        if len(rows) < len(parts[BEFORE]):
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


def recipes(done: pd.DataFrame) -> str:
    """The arms of the picture that every model has, or one in each: edits, their other wordings
    and other facts still said; steps.
    """
    models = {name: _arms(done, name) for name in AFTER_EDITED if done.trial.str.match(name).any()}
    heads = [f"{name}, {one[BEFORE]['seeds']} seeds" for name, one in models.items()]
    lines = [["", "edits at hand", *heads]]
    for arm, (label, is_at_hand) in {BEFORE: (BEFORE, False), **ARMS}.items():
        cells = [_summed(one.get(arm)) for one in models.values()]
        if any(cells):
            lines.append([label, "yes" if is_at_hand else "", *cells])
    return outcomes.markdown(lines)


def _summed(place: dict | None) -> str:
    if place is None:
        return ""
    names = ("kept", "held_out", "intrinsic")
    steps = f"{place['step'][0]:.0f} steps" + "*" * place["late"]
    return ", ".join([*(f"{place[name][0]:.2f}" for name in names), steps])


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
    figure.suptitle("Parts set back to what they were before 20 steps of facts; 95 % intervals")
    return figure


def _point(axes: Axes, place: Place, row: float, color: str, is_open: bool = False) -> None:
    mean, low, high = place
    axes.plot([low, high], [row, row], color=color, lw=1.6, solid_capstyle="round")
    inside = "white" if is_open else color
    axes.plot(mean, row, "o", color=color, ms=5, mfc=inside, clip_on=False, zorder=3)


def _mark(color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", lw=1.6, label=label)


def _line(style: str, label: str) -> Line2D:
    return Line2D([], [], color="0.3", ls=style, lw=1, label=label)


def looks_of(folder: Path) -> pd.DataFrame:
    return facts_kept.read(folder / "looks.csv")


def done_in(folder: Path, name: str = "lasting.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name)


def slow_in(folder: Path) -> pd.DataFrame:
    """The protections that take as many steps as a third of the rate, or have it."""
    done = done_in(folder)
    return done[done.arm.isin(["none*0.33", "span", "replay+span", "replay+span*0.33"])]


def traced_in(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "traces.csv")


def patched_in(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "patching.csv")


def taught_table(data: str, folder: Path) -> str:
    return claim_tables.by_plan(looks_of(folder), task_data=data)


def patched_table(model: str, folder: Path) -> str:
    table = patched_in(folder)
    return patching.shown(table[table.model == model])


Tables = dict[str, Callable[[Path], str]]  # by the name of the mark
PAGES: dict[str, Tables] = {
    "../../README.md": {
        "verdicts": lambda folder: claim_tables.verdicts(claims.judged(looks_of(folder)))
    },
    "claims.md": {
        "claims": lambda folder: claim_tables.shown(claims.judged(looks_of(folder))),
        "conditions": lambda folder: claim_tables.conditions(claims.judged(looks_of(folder))),
        "plans": lambda folder: claim_tables.by_plan(looks_of(folder)),
        "elsewhere": lambda folder: claim_tables.elsewhere(claims.judged(looks_of(folder))),
        "one-rate": lambda folder: claim_tables.by_editor(looks_of(folder), learning_rate=SLOW),
        "kinds": lambda folder: claim_tables.by_kinds(looks_of(folder)),
        "sizes": lambda folder: claim_tables.by_size(looks_of(folder)),
        "plans-slow": lambda folder: claim_tables.by_plan(looks_of(folder), learning_rate=SLOW),
        **{f"plans-{data}": functools.partial(taught_table, data) for data in KINDS},
        "windows": lambda folder: claim_tables.by_plan(looks_of(folder), claim_tables.WINDOWS_OF),
        "memory": lambda folder: claim_tables.in_memory(looks_of(folder)),
        "against-all": lambda folder: claim_tables.against_all(looks_of(folder)),
    },
    "lasting.md": {
        "recipes": lambda folder: recipes(done_in(folder)),
        "confirmed": lambda folder: recipes(done_in(folder, "lasting-confirm.csv")),
        "confirmed-against": lambda folder: lasting.against(
            done_in(folder, "lasting-confirm.csv"), "replay+kl"
        ),
        "lasting": lambda folder: lasting.table(done_in(folder)),
        "lasting-steps": lambda folder: lasting.table(done_in(folder), "steps"),
        "against": lambda folder: lasting.against(done_in(folder), "replay+kl"),
        "against-slow": lambda folder: lasting.against(slow_in(folder), "none*0.33"),
        "against-none": lambda folder: lasting.against(done_in(folder), "none"),
    },
    "traces.md": {
        "traces": lambda folder: traces.judged(traced_in(folder)),
        "otherwise": lambda folder: traces.asked_otherwise(traced_in(folder)),
        "changed": lambda folder: traces.changed(traced_in(folder)),
        "remedied": lambda folder: traces.remedied(traced_in(folder)),
        "recovery": lambda folder: recovering.judged(pd.read_csv(folder / "recovery.csv")),
        **{f"patching-{model}": functools.partial(patched_table, model) for model in MODELS},
    },
    "elasticity.md": {
        "elasticity": lambda folder: elasticity.judged(elasticity.read(folder / "elasticity.csv"))
    },
    "forecast.md": {
        "forecast": lambda folder: forecast.shown(
            forecast.judged(forecast.read(folder / "forecast.csv"))
        )
    },
}
TABLES = {name: table for tables in PAGES.values() for name, table in tables.items()}
PICTURES: dict[str, Callable[[Path], Figure]] = {
    "lasting.png": lambda folder: tournament(done_in(folder)),
    "blocks.png": lambda folder: by_blocks(looks_of(folder)),
    "traces.png": lambda folder: by_traces(traced_in(folder)),
    "patching.png": lambda folder: by_parts(patched_in(folder)),
}


def page_of(name: str, folder: Path) -> Path:
    """Where the table of this name stands."""
    return folder / next(page for page, tables in PAGES.items() if name in tables)


def filled(page: str, name: str, table: str) -> str:
    """The page with the table behind the mark of this name."""
    pattern = rf"(?<=<!-- {name} -->\n)(\|.*\n)*"
    if not re.search(pattern, page):
        raise ValueError(f"no mark <!-- {name} --> on the page")
    return re.sub(pattern, lambda _: table + "\n", page, count=1)


def saved(figure: Figure, path: Path) -> None:
    """In 256 colours, which take a third of the room."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize().save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE")
    options = parser.parse_args()
    folder = outcomes.FINDINGS
    for name in options.tables:
        path = page_of(name, folder)
        page = filled(path.read_text(encoding="utf-8"), name, TABLES[name](folder))
        with files.written(path) as partial:
            partial.write_text(page, encoding="utf-8")
        print(name, flush=True)
    for name, picture in PICTURES.items():
        saved(picture(folder), folder / name)


if __name__ == "__main__":
    main()
