"""A reader of workbench/x/y.py finds its tests in tests/x/test_y.py; those of a package's own file
in test_ and the package's name.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def place(module: Path) -> Path:
    """Where the tests of a module of the package lie."""
    name = module.parent.name if module.stem == "__init__" else module.stem.strip("_")
    return ROOT / "tests" / module.parent.relative_to(ROOT / "workbench") / f"test_{name}.py"


def is_empty(module: Path) -> bool:
    """Whether nothing stands in it but what it is for."""
    statements = ast.parse(module.read_text(encoding="utf-8")).body
    return all(isinstance(one, ast.Expr) for one in statements)


def test_every_module_has_its_tests_where_a_reader_looks_for_them():
    modules = [path for path in (ROOT / "workbench").rglob("*.py") if not is_empty(path)]
    assert modules
    missing = [
        f"{place(path).relative_to(ROOT)} (of {path.relative_to(ROOT)})"
        for path in sorted(modules)
        if "def test_" not in (place(path).read_text() if place(path).is_file() else "")
    ]
    assert not missing, f"no tests at {', '.join(missing)}"
