"""How long the explorer takes to open a run of 150 facts x 12 checkpoints x 30 blocks and, in
Chromium, to redraw another checkpoint or fact; how much data it needs.

python -m tests.benchmarks.explorer [PAGE]      # keeps the page there
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy
import pandas as pd

from workbench import runs
from workbench.explorer import Explorer

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# of the facts in turn: retained at step 0, at the end, and which category has the most there
ENDS = (
    (True, True, "p_edited"),
    (True, False, "p_related"),
    (True, False, "p_true"),
    (True, False, "p_other"),
    (False, False, "p_true"),
)
PROMPT = ("<|endoftext|>", "<i>", "The", " capital", " of", " San", " Mar", "ino", " is")
WORDS = [f" <b>{number}" for number in range(3000)]
REDRAWN = """async () => {
    const slider = document.querySelector('[aria-label="Checkpoint"]');
    const squares = [...document.querySelectorAll('.square')];
    const timed = (act) => {
        const start = performance.now();
        act();
        document.body.getBoundingClientRect();  // the browser has laid it out
        return performance.now() - start;
    };
    const moved = (at) => { slider.value = at; slider.dispatchEvent(new Event('input')); };
    const steps = [...Array(12).keys()].map((at) => timed(() => moved(at)));
    const facts = squares.slice(0, 12).map((square) => timed(() => square.click()));
    return [steps, facts];
}"""


def synthetic_run(
    folder: Path,
    n_edited: int = 50,
    n_intrinsic: int = 100,
    models: int = 1,
    steps=(-1, 0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200),
    layers: int = 30,
):
    """A run of made-up numbers in the recorded form; its edited facts end as ENDS says, its
    intrinsic ones are kept.
    """
    rng = numpy.random.default_rng(0)
    probes, about = [], {}
    for model in range(models):
        for number in range(n_edited + n_intrinsic):
            edited = number < n_edited
            fact_id = f"edited:{model}-{number}" if edited else f"intrinsic:{number}"
            held, kept, most = ENDS[number % len(ENDS)] if edited else (True, True, "p_true")
            if edited:
                about[fact_id] = "B & A"
            for step in steps:
                names = ("p_true", "p_edited", "p_related", "p_stop", "p_other")
                row = dict.fromkeys(names, 0.1)
                likeliest = most if step == steps[-1] else "p_edited"
                row |= {likeliest: 0.6, "top_category": likeliest.removeprefix("p_")}
                row |= {"edited_model": model, "step": step, "fact_id": fact_id}
                row |= {"group": "edited" if edited else "intrinsic", "clear": True}
                row |= {"prompt": f"<i>Prompt</i> {number}", "target": "A & B", "took": held}
                probes.append(row | {"retained": kept if step == steps[-1] else held})
    probes = pd.DataFrame(probes)
    keys = probes[["edited_model", "step", "fact_id"]]
    of_edited = keys[(probes.group == "edited").to_numpy()]
    blocks = pd.DataFrame({"layer": range(layers)})
    lens = _crossed(keys, blocks, category=["true", "edited", "related"])
    lens["probability"], lens["rank"] = rng.random(len(lens)), 1.0
    tokens = _crossed(keys, blocks, rank=range(1, 11))
    positions = _crossed(of_edited, blocks, position=range(1 - len(PROMPT), 1), rank=range(1, 6))
    positions["at"] = [PROMPT[at - 1] for at in positions.position]
    for name in ("p_true", "p_edited"):
        positions[name] = rng.random(len(positions) // 5).repeat(5)  # the same at every rank
    for table in (tokens, positions):
        likely = rng.random(len(table)) ** 3 / table["rank"] ** 2
        table["probability"] = likely.round(3)  # after tuning most cells say what they said before
        numbers = table.layer * 31 + table["rank"] * 7 + table.get("position", 0) * 13
        table["token"] = [WORDS[number] for number in numbers % len(WORDS)]
    tokens["word"] = tokens.token.str.strip()
    folder.mkdir(parents=True)
    tables = {"probes": probes, "lens": lens, "tokens": tokens, "positions": positions}
    tables["training"] = pd.DataFrame({"step": [0]})
    spec = {"model": "a <b>model</b>", "editor": "rome", "task": "text", "plan": "all"}
    whole = {"spec": spec, "ended": ["budget"], "layers": [3], "true": about}
    return runs.write(folder, whole, tables)


def _crossed(keys: pd.DataFrame, blocks: pd.DataFrame, **axes) -> pd.DataFrame:
    """Every combination of the rows of the two tables and of the axes' values."""
    table = keys.merge(blocks, how="cross")
    for name, values in axes.items():
        table = table.merge(pd.DataFrame({name: values}), how="cross")
    return table


def main(page: str) -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        run = runs.read(synthetic_run(Path(folder) / "made-up").folder)
        start = time.perf_counter()
        explorer = Explorer(run)
        seconds = time.perf_counter() - start
        print(f"packed in {seconds:.1f} s, {len(explorer.data) / 1e6:.1f} MB")
        saved = Path(page or f"{folder}/page.html")
        saved.write_text(f"<!doctype html><meta charset=utf-8>{explorer.page()}", encoding="utf-8")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            shown = browser.new_page(viewport={"width": 1400, "height": 900})
            shown.goto(saved.as_uri())
            shown.wait_for_selector(".square")
            for name, times in zip(("checkpoint", "fact"), shown.evaluate(REDRAWN), strict=True):
                median = numpy.median(times)
                print(f"another {name}: median {median:.0f} ms, longest {max(times):.0f} ms")
            browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
