import ast
import re
from pathlib import Path

import nbformat
import pytest

from workbench import batch, study

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_it_is_short_and_hides_nothing(path):
    cells = code_cells(path)
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(cells) <= 12
    assert len(lines) <= 60
    tree = ast.parse("\n".join(lines))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    assert "sys.path" not in "\n".join(lines)


def test_it_carries_no_outputs_and_no_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_parameters_are_literals_one_a_line_with_type_and_meaning(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = [^=]+  # [^=]+", line), line
        ast.literal_eval(line.split(" = ")[1].split("  # ")[0])
    assert set(batch.declared(path)) == {line.split(":")[0] for line in cell.source.splitlines()}


def test_every_parameter_is_a_field_of_the_spec_and_reaches_it(path):
    cells = code_cells(path)
    (making,) = [cell.source for cell in cells if "study.Spec(" in cell.source]
    for name in batch.declared(path):
        if name not in ("vary", "values"):
            assert name in study.Spec.model_fields, name
            assert f"{name}={name}" in making, name


def test_it_has_small_values_for_a_quick_run(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    mock = cell.metadata["nbmake"]["mock"]
    assert set(mock) <= set(batch.declared(path))
