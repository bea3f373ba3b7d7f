"""The pages of the findings: their tables and pictures, from data/findings/*.csv.

    python -m tests.benchmarks.findings [TABLE ...]

Writes the tables (all, or those named) behind their marks on the pages, such as <!-- claims -->,
and draws the pictures. What is said between them is written by hand.
"""

import argparse
import functools
import io
import re
from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
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
    pictures,
    recovering,
    traces,
)
from tests.benchmarks.pictures import BEFORE, MODELS, SLOW
from workbench import files

RECOMMENDED = (
    *("none", "none*0.33", "after:4&span*2", "after:4&span*3", "replay+span", "replay+span*2"),
    *("after:4&replay+span", "after:4&replay+span*2", "after:4&replay+span*3"),
)
KINDS = ("same-kinds", "other-kinds")  # of objects that are taught, as of those that were edited


def recipes(done: pd.DataFrame, which: Collection[str] = pictures.ARMS) -> str:
    """Arms of the picture: edits, their other wordings and other facts still said, and steps, with
    a `*` where the level was not met; of how many seeds, where it is not of all.
    """
    models = {
        name: pictures.arms_of(done, name)
        for name in pictures.AFTER_EDITED
        if done.trial.str.match(name).any()
    }
    every = {name: places[BEFORE]["seeds"] for name, places in models.items()}
    lines = [["", "edits at hand", *(f"{name}, {seeds} seeds" for name, seeds in every.items())]]
    for arm in (BEFORE, *which):
        label, is_at_hand = pictures.ARMS.get(arm, (BEFORE, False))
        places = {name: places.get(arm) for name, places in models.items()}
        if any(places.values()):
            cells = [_summed(place, every[name]) for name, place in places.items()]
            lines.append([label, "yes" if is_at_hand else "", *cells])
    return outcomes.markdown(lines)


def _summed(place: dict | None, seeds: int) -> str:
    if place is None:
        return "not run"
    names = ("kept", "held_out", "intrinsic")
    steps = f"{place['step'][0]:.0f} steps" + "*" * place["late"]
    fewer = [f"(seeds: {place['seeds']})"] * (place["seeds"] < seeds)
    shares = ", ".join([*(f"{place[name][0]:.2f}" for name in names), steps])
    return " ".join([shares, *fewer])


@functools.cache
def looks_of(folder: Path) -> pd.DataFrame:
    return facts_kept.read(folder / "looks.csv")


@functools.cache
def judged_in(folder: Path) -> pd.DataFrame:
    return claims.judged(looks_of(folder))


@functools.cache
def forecasts_in(folder: Path) -> pd.DataFrame:
    return forecast.judged(forecast.read(folder / "forecast.csv"))


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
        "verdicts": lambda folder: claim_tables.verdicts(judged_in(folder)),
        "recommended": lambda folder: recipes(done_in(folder), RECOMMENDED),
    },
    "claims.md": {
        "claims": lambda folder: claim_tables.shown(judged_in(folder)),
        "conditions": lambda folder: claim_tables.conditions(judged_in(folder)),
        "plans": lambda folder: claim_tables.by_plan(looks_of(folder)),
        "elsewhere": lambda folder: claim_tables.elsewhere(judged_in(folder)),
        "one-rate": lambda folder: claim_tables.by_editor(looks_of(folder), learning_rate=SLOW),
        "kinds": lambda folder: claim_tables.by_kinds(looks_of(folder)),
        "sizes": lambda folder: claim_tables.by_size(looks_of(folder)),
        "plans-slow": lambda folder: claim_tables.by_plan(looks_of(folder), learning_rate=SLOW),
        **{f"plans-{data}": functools.partial(taught_table, data) for data in KINDS},
        "windows": lambda folder: claim_tables.by_plan(looks_of(folder), claim_tables.WINDOWS_OF),
        "memory": lambda folder: claim_tables.in_memory(looks_of(folder)),
        "memory-plans": lambda folder: claim_tables.by_plan(
            looks_of(folder), claim_tables.OF_MEMORY
        ),
        "readings": lambda folder: claim_tables.readings(judged_in(folder)),
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
        "forecast": lambda folder: forecast.shown(forecasts_in(folder)),
        "calibration": lambda folder: forecast.calibrated(forecasts_in(folder)),
    },
}
TABLES = {name: table for tables in PAGES.values() for name, table in tables.items()}
PICTURES: dict[str, Callable[[Path], Figure]] = {
    "claims.png": lambda folder: pictures.by_claims(judged_in(folder)),
    "lasting.png": lambda folder: pictures.tournament(done_in(folder)),
    "blocks.png": lambda folder: pictures.by_blocks(looks_of(folder)),
    "traces.png": lambda folder: pictures.by_traces(traced_in(folder)),
    "patching.png": lambda folder: pictures.by_parts(patched_in(folder)),
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
