import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from workbench import batch, deltas, facts, models, pages, runs
from workbench.facts import BadInput
from workbench.tracking.retention import measure
from workbench.tuning.numbers import PROTECTIONS

CASE_STUDY = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"


def test_a_run_folder_is_complete(case_study):
    names = {path.name for path in case_study.folder.iterdir()}
    assert names == {
        "run.json",
        "notebook.ipynb",
        "notebook.html",
        "deltas",
        *(f"{name}.parquet" for name in runs.TABLES),
    }
    assert [path.name for path in case_study.deltas] == ["0.safetensors"]
    assert case_study.about["status"] == "finished"
    for name in (
        "spec",
        "weights",
        "device",
        "dtype",
        "hparams",
        "seconds",
        "peak_memory_mb",
        "packages",
        "known",
        "ended",
        "commit",
    ):
        assert name in case_study.about
    assert case_study.probes.step.unique().tolist() == [-1, 0, 1, 2]


def test_the_record_carries_the_parameters(case_study, parameters):
    assert case_study.spec["model"] == parameters["model"]
    assert case_study.spec["max_steps"] == 2
    assert case_study.about["hparams"][0]["layers"] == [1]


def test_a_finished_run_is_returned_at_once(case_study, parameters):
    before = (case_study.folder / "run.json").stat().st_mtime_ns
    again = batch.run(CASE_STUDY, parameters, out=case_study.folder.parent)
    assert again.folder == case_study.folder
    assert (again.folder / "run.json").stat().st_mtime_ns == before


def test_a_protection_that_the_cells_register_is_no_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setattr(PROTECTIONS, "_declared", set())
    notebook = nbformat.read(CASE_STUDY.with_name("12_lasting_edits.ipynb"), as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell('wb.protections.register("mine", Mine)'))
    path = tmp_path / "mine.ipynb"
    nbformat.write(notebook, path)
    assert batch.checked(path, {"protect": "mine"})[1].protect == "mine"
    with pytest.raises(BadInput, match="protection 'other'"):
        batch.checked(path, {"protect": "other"})


def test_the_id_changes_with_whatever_determines_the_result(
    parameters, tmp_path, own_facts, tiny_folders
):
    def identity(notebook=CASE_STUDY, **changes):
        given, spec = batch.checked(notebook, parameters | changes)
        return batch.identify(notebook, given, spec)

    base = identity()
    assert identity() == base
    changed = tmp_path / "01_case_study.ipynb"
    notebook = nbformat.read(CASE_STUDY, as_version=4)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    last.source += "\n1 + 1"
    nbformat.write(notebook, changed)
    other_facts = tmp_path / "facts.jsonl"
    other_facts.write_text(own_facts.read_text().replace("flute", "drums"))
    found = [
        base,
        identity(seed=1),
        identity(layers=[2]),
        identity(notebook=changed),
        identity(facts=str(other_facts)),
        identity(model=str(tiny_folders["llama"])),
    ]
    assert len(set(found)) == len(found)


def test_the_delta_in_the_folder_is_the_edit(case_study, tiny_folders, own_facts):
    """With it the model gives the target the probability that the run recorded right after the
    edit.
    """
    model = models.load(tiny_folders["gpt2"], device="cpu")
    probes = case_study.probes[case_study.probes.group == "edited"].set_index("step")
    request = facts.read(own_facts)[0]
    assert measure(model, [request]).p[0] == pytest.approx(probes.p_answer[-1], rel=1e-4)
    with deltas.applied(model, deltas.load(case_study.deltas[0])):
        assert measure(model, [request]).p[0] == pytest.approx(probes.p_answer[0], rel=1e-4)
    assert probes.p_answer[0] != pytest.approx(probes.p_answer[-1], rel=1e-3)


def test_the_executed_notebook_shows_every_figure_without_a_kernel(case_study):
    notebook = nbformat.read(case_study.folder / "notebook.ipynb", as_version=4)
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    page = (case_study.folder / "notebook.html").read_text()
    assert page.count("data:image/png;base64") >= 3
    assert "Person 0 &lt;img src=x onerror=alert(1)&gt;" in page  # in the panel's place
    assert "<math" in page


def test_the_page_of_a_run_loads_nothing_from_elsewhere(case_study, loads):
    page = (case_study.folder / "notebook.html").read_text()
    assert loads(page) == ["<script>"] * 2  # the explorer's data, and what the policy lets run
    assert f'<script type="module">{pages.EXPLORER}</script>' in page
    assert pages.META in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"editr": "rome"}, "'editr', did you mean 'editor'?"),
        ({"editor": "memo"}, "memo"),
        ({"editor": "alfaedit"}, "'alfaedit', did you mean 'alphaedit'?"),
        ({"task": "cooking"}, "cooking"),
        ({"task": "sentimant"}, "'sentimant', did you mean 'sentiment'?"),
        ({"n_intrinsic": -1}, "n_intrinsic"),
        ({"layers": "four"}, "layers"),
        ({"fact": "no-such-fact"}, "no-such-fact"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_bad_parameters_are_one_clear_line_and_leave_nothing(
    changes, named, parameters, tmp_path, one_line
):
    with pytest.raises(BadInput) as error:
        batch.run(CASE_STUDY, parameters | changes, out=tmp_path / "runs")
    assert named in one_line(error)
    assert not list((tmp_path / "runs").glob("*/run.json"))
    assert not list((tmp_path / "runs").glob(".*"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no such file"),
        ("{", "not a notebook"),
        (nbformat.writes(nbformat.v4.new_notebook()), "parameters"),
    ],
)
def test_a_bad_notebook_is_one_clear_line(text, named, tmp_path, one_line):
    path = tmp_path / "odd.ipynb"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput) as error:
        batch.run(path, {}, out=tmp_path)
    assert named in one_line(error)


def test_words_are_taken_as_they_are_and_the_rest_as_yaml():
    given = {
        "prompt": "{} worked in the field of",
        "subject": "1984",
        "target": "no",
        "editor": '"ft"',
        "layers": "[2, 3]",
        "n_intrinsic": "4",
    }
    found = batch.parsed(CASE_STUDY, list(given.items()))
    assert found == given | {"editor": "ft", "layers": [2, 3], "n_intrinsic": 4}
    with pytest.raises(BadInput, match="layers"):
        batch.parsed(CASE_STUDY, [("layers", "[2")])


@pytest.mark.parametrize(
    ("name", "value"), [("model", 3), ("facts", 3), ("task_data", [1]), ("seed", "2024-05-01")]
)
def test_a_value_of_an_odd_type_is_one_clear_line(name, value, one_line):
    with pytest.raises(BadInput) as error:
        batch.checked(CASE_STUDY, {name: value})
    assert name in one_line(error)


def test_a_preset_that_is_not_there_is_one_clear_line(one_line):
    with pytest.raises(BadInput) as error:
        batch.checked(CASE_STUDY, {}, "gpt2-xxl")
    assert "did you mean 'gpt2-xl'?" in one_line(error)
    assert "world-large" in str(error.value)


def test_a_full_disk_is_one_clear_line_and_leaves_no_run(
    parameters, tmp_path, monkeypatch, one_line
):
    from workbench import study

    in_memory = pd.DataFrame.to_parquet

    def full(table, path=None, **options):
        if path is None:  # what is cached is made in memory first
            return in_memory(table, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    fields = {name: value for name, value in parameters.items() if name in study.Spec.model_fields}
    with pytest.raises(BadInput) as error:
        study.run(study.Spec(**fields, n_edited=1), out=tmp_path)
    assert "No space left" in one_line(error)
    assert not list(tmp_path.iterdir())


def test_the_notebook_may_lie_anywhere(parameters, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(CASE_STUDY, elsewhere / "mine.ipynb")
    given, spec = batch.checked(elsewhere / "mine.ipynb", parameters)
    assert batch.identify(elsewhere / "mine.ipynb", given, spec).startswith("mine-rome-text-")


def test_a_path_with_braces_is_a_path(parameters, tmp_path):
    folder = tmp_path / "{seed} {}" / "notebooks"
    folder.mkdir(parents=True)
    shutil.copy(CASE_STUDY, folder)
    spec = batch.checked(folder / CASE_STUDY.name, parameters)[1]
    assert spec.max_steps == 2
    named = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata=named)
    nbformat.write(notebook, folder / "fails.ipynb")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        batch._execute(folder / "fails.ipynb", {"seed": 1}, folder, folder / "run", again=False)


def test_two_parameters_of_which_one_would_be_ignored_are_refused(one_line):
    with pytest.raises(BadInput) as error:
        batch.checked(CASE_STUDY, {"fact": "author:anna-karenina", "subject": "Ada"})
    assert "'fact' and 'subject' exclude each other" in one_line(error)
    assert batch.checked(CASE_STUDY, {"fact": "", "subject": "Ada"})[0]["fact"] == ""
    with pytest.raises(BadInput) as error:
        batch.checked(CASE_STUDY, {"seed": None})
    assert "'seed': has no value" in one_line(error)


def test_what_is_named_takes_the_place_of_the_presets(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("values: [ft, rome]\n")
    notebook = CASE_STUDY.with_name("02_retention.ipynb")
    checked = batch.checked(notebook, {"editor": "memit"}, str(preset))
    assert [one.editor for one in batch.experiments(notebook, *checked)] == ["memit"]
    preset.write_text("editor: memit\n")
    checked = batch.checked(notebook, {"values": ["ft", "rome"]}, str(preset))
    assert [one.editor for one in batch.experiments(notebook, *checked)] == ["ft", "rome"]
    assert "editor" not in checked[0]


def test_checking_and_naming_a_run_needs_no_torch():
    """Every command and every worker of a sweep would wait for it, the kernel that runs the
    notebook once more.
    """
    code = f"""
import subprocess
import sys
from workbench import batch, job, sweep
given, spec = batch.checked(batch.Path({str(CASE_STUDY)!r}), {{"editor": "ft"}})
heavy = {{"torch", "transformers", "datasets"}}
print(batch.identify(batch.Path({str(CASE_STUDY)!r}), given, spec), heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


def test_paths_count_from_here_and_one_that_is_nowhere_is_refused_at_once(
    tmp_path, monkeypatch, one_line
):
    for name in ("notebooks", "rows"):
        (tmp_path / name).mkdir()
    shutil.copy(CASE_STUDY, tmp_path / "notebooks")
    shutil.copy(CASE_STUDY.with_name("02_retention.ipynb"), tmp_path / "notebooks")
    (tmp_path / "notebooks" / "beside.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    notebook = Path("notebooks/01_case_study.ipynb")
    given = batch.checked(notebook, {"task_data": "rows", "corpus": "beside.jsonl"})[0]
    assert given == {
        "task_data": str(tmp_path / "rows"),
        "corpus": "beside.jsonl",
    }  # the latter as the notebook itself would read it
    for name, value in (
        ("facts", "nowhere.json"),
        ("task_data", "./nowhere"),
        ("corpus", "a/nowhere.txt"),
    ):
        with pytest.raises(BadInput) as error:
            batch.checked(notebook, {name: value})
        assert f"{name} {value!r}: no such file" in one_line(error)
    several = Path("notebooks/02_retention.ipynb")
    assert batch.checked(several, {"vary": "task_data", "values": ["rows", ""]})[0]["values"] == [
        str(tmp_path / "rows"),
        "",
    ]
    with pytest.raises(BadInput) as error:
        batch.checked(several, {"vary": "task_data", "values": ["nowhere.csv"]})
    assert "no such file" in one_line(error)


def test_another_field_to_vary_takes_all_its_values_though_the_notebook_sets_it():
    notebook = Path(batch.__file__).parents[1] / "notebooks" / "02_retention.ipynb"
    given = {"vary": "task", "values": ["text", "facts"], "editor": "memit"}
    given, spec = batch.checked(notebook, given)
    assert [one.task for one in batch.experiments(notebook, given, spec)] == ["text", "facts"]
    assert given["task"] is None  # in the kernel too
    assert batch.checked(notebook, given) == (given, spec)  # a sweep's worker checks again


def test_an_empty_text_is_a_value_to_vary_and_excludes_others(one_line):
    with pytest.raises(BadInput) as refusal:
        batch._without_rivals({"adapter": "", "values": ["lora"]}, ["adapter", "values"], "adapter")
    assert "exclude each other" in one_line(refusal)


def test_a_preset_may_hold_a_section_for_one_notebook(tmp_path, one_line):
    for name in ("one", "two"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    preset = tmp_path / "own.yaml"
    preset.write_text("seed: 3\none: {editor: ft}\n")
    assert batch._preset(tmp_path / "one.ipynb", str(preset)) == {"seed": 3, "editor": "ft"}
    assert batch._preset(tmp_path / "two.ipynb", str(preset)) == {"seed": 3}
    preset.write_text("one: 5\n")
    with pytest.raises(BadInput) as refusal:
        batch._preset(tmp_path / "one.ipynb", str(preset))
    assert "must hold parameters" in one_line(refusal)
    preset.write_text("three: {editor: ft}\n")  # no such notebook: refused as any undeclared name
    assert "three" in batch._preset(tmp_path / "one.ipynb", str(preset))
