import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from workbench import batch, editing, study
from workbench.facts import BadInput
from workbench.tuning.finetune import Settings

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STEMS = {path.stem for path in NOTEBOOKS}
PRESETS = [
    path
    for path in sorted((FOLDER / "presets").glob("*.yaml"))
    if not path.stem.startswith(("accelerate", "grid"))
]
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_it_is_short_and_hides_nothing(path):
    cells = code_cells(path)
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(cells) <= 12
    assert len(lines) <= 64
    tree = ast.parse("\n".join(lines))
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
    ]
    assert "sys.path" not in "\n".join(lines)


def test_it_carries_no_outputs_and_no_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert not any(
        cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
    )


def test_parameters_are_literals_one_a_line_with_type_and_meaning(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = [^=]+  # [^=]+", line), line
        ast.literal_eval(line.split(" = ")[1].split("  # ")[0])
    assert set(batch.declared(path)) == {line.split(":")[0] for line in cell.source.splitlines()}


def test_every_parameter_reaches_the_spec_or_the_code(path):
    cells = code_cells(path)
    whole = "\n".join(cell.source for cell in cells[1:])
    for name in batch.declared(path):
        if batch.makes_spec(path) and name not in ("vary", "values"):
            assert name in study.Spec.model_fields, name
        else:
            assert re.search(rf"\b{name}\b", whole), name
    if batch.makes_spec(path):
        assert whole.count("wb.Spec.of(globals()") == 1


def test_no_cell_takes_the_name_of_a_parameter(path):
    """The Spec is of whatever is called like a field, also where its cell is run again."""
    cells = [cell for cell in code_cells(path) if "parameters" not in cell.metadata.get("tags", [])]
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in study.Spec.model_fields
            if isinstance(node, ast.alias):
                assert (node.asname or node.name) not in study.Spec.model_fields


NEEDED, TUNED = ("hparams", "margin"), ("batch_size", "n_train", "n_valid")
EVERY = {"editor": "malmen", "paraphrases": 2, "plan": "edited", "layers": [4], "adapter": "dora"}
EVERY |= {"protect": "others"}


def test_whatever_makes_a_spec_can_set_what_an_experiment_needs(path):
    if batch.makes_spec(path):
        tunes = "task" in batch.declared(path)
        assert {*NEEDED, *(TUNED if tunes else ())} <= set(batch.declared(path))


def varied_by(path: Path, given: dict, monkeypatch) -> list:
    """The values that the notebook's own code would run after papermill has put these parameters
    in.
    """
    ran = []

    def vary(spec, field, values, **kwargs):
        ran.extend(values)
        return []

    monkeypatch.setattr(study, "vary", vary)
    notebook = papermill.iorw.load_notebook_node(str(path))
    notebook = papermill.parameterize.parameterize_notebook(
        notebook, given, kernel_name="python3", language="python"
    )
    names = {}
    for cell in notebook.cells:
        is_vary = "study.vary(" in cell.source
        if cell.cell_type == "code" and ("base = " not in cell.source or is_vary):
            exec(cell.source, names)
        if is_vary:
            return ran
        names.setdefault("base", None)
    raise AssertionError("varies nothing")


def test_naming_the_field_that_varies_gives_that_value_alone(path, monkeypatch, one_line):
    declared = batch.declared(path)
    if "vary" not in declared:
        return
    vary, values = (ast.literal_eval(declared[name]["default"]) for name in ("vary", "values"))
    assert varied_by(path, {}, monkeypatch) == values
    empty = study.Spec.model_fields[vary].get_default(call_default_factory=True)
    for value in (EVERY[vary], values[0], list(empty) if vary == "layers" else empty):
        (only,) = batch.experiments(path, *batch.checked(path, {vary: value}))
        assert json.dumps(getattr(only, vary)) == json.dumps(value)
        ran = varied_by(path, {vary: value}, monkeypatch)
        assert [*map(json.dumps, ran)] == [json.dumps(value)]
    with pytest.raises(BadInput) as error:
        batch.checked(path, {vary: EVERY[vary], "values": values})
    assert f"'values' and {vary!r} exclude each other" in one_line(error)


def test_it_says_question_source_and_time(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.startswith("# ")
    for word in ("**Question.**", "arXiv", "Expected time"):
        assert word in first, word


def test_its_presets_are_declared_and_make_a_spec(path):
    settings = {}
    for preset in PRESETS:
        fields = yaml.safe_load(preset.read_text())
        own = fields.get(path.stem, {})
        fields = {name: fields[name] for name in fields if name not in STEMS} | own
        if set(fields) <= set(batch.declared(path)):
            settings[preset] = fields
    for preset, fields in settings.items():
        given, spec = batch.checked(path, {}, str(preset))
        varied = fields.get("vary")
        assert {name: given[name] for name in given if name != varied or given[name]} == fields
        assert spec.resolved().part(Settings).max_steps > 0
        if spec.model.rpartition("/")[2].lower() in editing.presets():
            assert editing.preset(spec.editor, spec.model, variant=spec.variant).layers
    if path.stem == "02_retention":
        names = {preset.stem for preset in settings}
        assert {"gpt2-xl", "llama-3-8b", "world-large", "smollm2"} <= names


def test_an_exercise_waits_for_an_answer_and_does_not_give_it_away(path):
    cells = [cell for cell in code_cells(path) if "your answer" in cell.source]
    assert len(cells) == (3 if path.stem == "00_tour" else 0)
    for cell in cells:
        name = cell.source.partition(" = ")[0]
        first, worked_out, judged = cell.source.splitlines()
        assert first == f"{name} = None  # your answer"
        assert re.fullmatch(r"answer = wb\.teaching\.\w+\([\w., ]+\)", worked_out)
        assert re.fullmatch(rf'wb\.teaching\.check\({name}, answer, "[^"]+"\)', judged)


def test_no_solution_is_one_that_comes_of_itself(path):
    if path.stem == "00_tour":
        text = (FOLDER / "solutions.md").read_text(encoding="utf-8")
        solutions = re.findall(r"^    (my_\w+) = (.+)$", text, re.MULTILINE)
        exercises = re.findall(r"(my_\w+) = None", path.read_text(encoding="utf-8"))
        assert [name for name, _ in solutions] == exercises
        degenerate = {"None", "0", "-1", '"none"', '"never"'}
        assert not degenerate & {answer for _, answer in solutions}


def test_it_has_small_values_for_a_quick_run(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    mock = cell.metadata["nbmake"]["mock"]
    assert set(mock) <= set(batch.declared(path))


def test_every_preset_fits_a_notebook(path):
    if path == NOTEBOOKS[0]:
        declared = {notebook.stem: set(batch.declared(notebook)) for notebook in NOTEBOOKS}
        for preset in PRESETS:
            names = yaml.safe_load(preset.read_text())
            sections = {name: names.pop(name) for name in declared.keys() & names.keys()}
            assert any(set(names) <= known for known in declared.values()), preset.name
            for notebook, section in sections.items():
                assert set(section) <= declared[notebook], (preset.name, notebook)


def test_its_first_cell_imports_nothing_heavy(path):
    cells = [cell for cell in code_cells(path) if "parameters" not in cell.metadata.get("tags", [])]
    code = cells[0].source + "\nimport sys; print([*sys.modules])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "matplotlib", "nbformat"):
        assert f"'{heavy}'" not in names.stdout
