"""The notebooks as they are run: with their defaults, with other parameters, and with a step that
fails.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from workbench import batch, runs

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.ipynb")) if path.stem != "10_collect"]
SOLUTIONS = FOLDER / "solutions.md"
FEW = {"n_edited": 2, "n_intrinsic": 3, "edits_per_model": 2, "max_steps": 2, "eval_every": 2}
OTHERS = [
    {"model": "world-llama", "editor": "ft", "task": "sentiment", "seed": 3},
    {
        "editor": "alphaedit",
        "task": "instructions",
        "plan": "window:2-4",
        "paraphrases": 3,
        "adapter": "lora",
    },
    {
        "editor": "rome",
        "layers": [5],
        "task": "text",
        "split_rule": "paper",
        "variant": "reference",
        "fact": "author:anna-karenina",
        "edits_per_model": 1,
    },
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def declared_only(path: Path, parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if name in batch.declared(path)}


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name, tmp_path):
    start = time.monotonic()
    run = batch.run(FOLDER / f"{name}.ipynb", out=tmp_path)
    print(f"\n{name}: {time.monotonic() - start:.0f} s with its defaults")
    assert (run.folder / "notebook.html").stat().st_size > 10_000
    assert all(member.probes.step.max() > 0 for member in run.members or [run])


@pytest.mark.parametrize("others", OTHERS, ids=["llama", "adapter", "rome"])
@pytest.mark.parametrize("name", NAMES)
def test_other_parameters(name, others, tmp_path):
    path = FOLDER / f"{name}.ipynb"
    values = json.loads(batch.declared(path).get("values", {"default": "[]"})["default"])
    given = declared_only(path, FEW | {"values": values[-2:]} | others)
    if batch.defaults(path).get("vary") in given:  # which is then the one value
        del given["values"]
    run = batch.run(path, given, out=tmp_path)
    for each in run.members or [run]:
        for field, value in given.items():
            if field in each.spec and field != "values":
                assert each.spec[field] == value, field


def test_collect_reads_four_runs(tmp_path):
    for editor in ("ft", "rome"):
        for task in ("text", "facts"):
            batch.run(
                FOLDER / "03_token_distribution.ipynb",
                FEW | {"editor": editor, "task": task},
                out=tmp_path / "runs",
            )
    run = batch.run(
        FOLDER / "10_collect.ipynb", {"folder": str(tmp_path / "runs")}, out=tmp_path / "figures"
    )
    collected = [runs.read(folder) for folder in run.about["collected"]]
    assert len(collected) == 4
    assert {(each.spec["editor"], each.spec["task"]) for each in collected} == {
        (e, t) for e in ("ft", "rome") for t in ("text", "facts")
    }
    cells = nbformat.read(run.folder / "notebook.ipynb", as_version=4).cells
    assert (
        sum(
            "image/png" in output.get("data", {})
            for cell in cells
            for output in cell.get("outputs", [])
        )
        == 6
    )


def test_the_solutions_are_right_of_the_tour_as_it_is_shipped(tmp_path):
    """Filled in they are "Right."; and they are what can be read off the run's tables."""
    solutions = dict(re.findall(r"^    (my_\w+) = (.+)$", SOLUTIONS.read_text(), re.MULTILINE))
    tour = nbformat.read(FOLDER / "00_tour.ipynb", as_version=4)
    exercises = [cell for cell in tour.cells if "# your answer" in cell.source]
    for cell in exercises:
        name = cell.source.partition(" = ")[0]
        cell.source = cell.source.replace("None", solutions[name], 1)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(tour, tmp_path / "notebooks" / "00_tour.ipynb")
    run = batch.run(tmp_path / "notebooks" / "00_tour.ipynb", out=tmp_path / "runs")
    cells = nbformat.read(run.folder / "notebook.ipynb", as_version=4).cells
    judged = [cell.outputs[-1].data["text/plain"] for cell in cells if "# your" in cell.source]
    assert judged == ["'Right.'"] * 3

    probes = run.probes.set_index(["group", "step"])
    edited = probes.loc["edited"]
    lens = run.lens[run.lens.fact_id == edited.fact_id.iloc[0]]
    wrong = lens.query("step == -1 and category == 'true' and rank > 1")
    before, after = (probes.loc[("neighbourhood", step)].p_answer.to_numpy() for step in (-1, 0))
    weak = edited.index[(edited.index > 0) & (edited.p_answer < edited.p_answer[0] / 2)]
    read_off = [wrong.layer.max() + 1, (before - after).argmax(), weak.min()]
    assert [int(answer) for answer in solutions.values()] == read_off


STEPS = [
    "models.load",
    "study.choose",
    "study.prepare",
    "study.make_edit",
    "study.make_task",
    "study.tune_and_probe",
    "study.Recorder.write",
    "plots.top_tokens",
    "plots.category_mass",
    "plots.lens_heatmap",
]


def broken(step: str, folder: Path) -> Path:
    """A copy of the case study in which one step cannot be called."""
    notebook = nbformat.read(FOLDER / "01_case_study.ipynb", as_version=4)
    imports = next(
        number
        for number, cell in enumerate(notebook.cells)
        if "import" in cell.source and cell.cell_type == "code"
    )
    notebook.cells.insert(imports + 1, nbformat.v4.new_code_cell(f"wb.{step} = None"))
    (folder / "notebooks").mkdir()
    path = folder / "notebooks" / "broken.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_makes_the_run_fail(step, tmp_path, one_line):
    out = tmp_path / "runs"
    with pytest.raises(RuntimeError) as error:
        batch.run(
            broken(step, tmp_path), {"max_steps": 2, "eval_every": 2, "n_intrinsic": 2}, out=out
        )
    assert "NoneType" in one_line(error)
    assert not runs.listed(out)
    assert sorted(path.suffix for path in out.iterdir()) == [
        ".ipynb",
        ".txt",
    ]  # as far as it went, and the error


@pytest.mark.parametrize("step", ["models.load", "plots.lens_heatmap"])
def test_a_step_that_fails_makes_nbmake_fail(step, tmp_path):
    path = broken(step, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "--rootdir", str(tmp_path), str(path)],
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
