"""The Python on the page for contributors works as it is printed."""

import re
from pathlib import Path

import workbench as wb

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_page_works_as_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path))
    for registry in (wb.editors, wb.tasks, wb.measures):
        monkeypatch.setattr(registry, "_ready", dict(registry._ready))
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        exec(code, names)
    assert sum(outcome["took"] for outcome in names["edit"].outcomes) >= 4
    run = names["run"]
    assert run.table("uncertainty").groupby("step").bits.mean().gt(0).all()
    assert run.spec["editor"] == "hebb"
    tasks = {folder.name.split("-")[2] for folder in tmp_path.glob("study-*")}
    assert tasks == {"counting", "text"}


def test_it_is_one_page_of_short_lines():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 150
