"""Hyper-parameter files of EasyEdit and of the ROME, MEMIT and AlphaEdit repositories, read by the
table in foreign.yaml: what each name becomes here, or why it is ignored.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.records import BadInput, yaml_table

TABLE = Path(__file__).with_suffix(".yaml")
ALGORITHMS = {"FT": "ft", "FT-L": "ft", "FT-M": "ft", "ROME": "rome", "R-ROME": "rome"}
ALGORITHMS |= {"MEMIT": "memit", "ALPHAEDIT": "alphaedit", "MALMEN": "malmen"}
AS_PUBLISHED = ("R-ROME", "FT-M")  # mend what their project's own ROME and FT do otherwise
HABITS = "how steps are counted, ROME's keys, FT's objective, no floor on C"
CONVENTIONS = {"reference": f"their code's habits: {HABITS}"}
CONVENTIONS["published"] = "one key, all target tokens; steps are updates, theirs are one fewer"


def _layers(modules: list[str]) -> list[int]:
    return sorted({int(re.search(r"\.(\d+)\.", module)[1]) for module in modules})


READERS: dict[str, Any] = {  # of values that are not taken as they stand
    "inner_params": _layers,
    "edit_modules": _layers,
    "context_template_length_params": lambda pairs: sum(int(count) for _, count in pairs),
    "mom2_adjustment": {True: "corpus", False: "identity"}.__getitem__,
    "norm_constraint": lambda bound: float(bound or 0),
    "objective_optimization": {"prompt_last": "reference", "target_new": "published"}.__getitem__,
}


def _row(editor: str, name: str) -> dict:
    """What the table says of a name in a file for an editor."""
    for row in yaml_table(TABLE):
        if re.fullmatch(row["name"], name) and editor in row.get("editors", [editor]):
            return row
    return {"note": f"{editor} has nothing of the kind"}


def is_foreign(fields: Mapping) -> bool:
    """Whether these are fields of those projects and not of an HParams here."""
    rows = yaml_table(TABLE)
    renamed = {row["name"] for row in rows if row.get("becomes", row["name"]) != row["name"]}
    return bool((renamed | {"alg_name", "rewrite_module_tmp"}) & set(fields))


def _algorithm(fields: Mapping) -> str:
    return str(fields.get("alg_name", "")).upper()


def editor_of(path: str | Path, fields: Mapping) -> str:
    """The editor that a file is for: by `alg_name`, else by the folder it lies in, as in
    hparams/ROME/gpt2-xl.json.
    """
    for name in (_algorithm(fields), Path(path).resolve().parent.name.upper()):
        if name in ALGORITHMS:
            return ALGORITHMS[name]
    problem = f"preset {path}: names no editor known here (alg_name {fields.get('alg_name')!r})"
    raise BadInput(f"{problem}; it has {', '.join(ALGORITHMS)}")


def translated(editor: str, path: str | Path, fields: Mapping) -> tuple[dict, pd.DataFrame]:
    """Fields of the editor's HParams, and the table: name, value, became ("" = ignored), note.

    Raises:
        BadInput: a value that asks for what no editor here does.
    """
    algorithm = _algorithm(fields)
    meant = ALGORITHMS.get(algorithm, editor)
    if meant != editor:
        raise BadInput(f"preset {path}: is for {meant}, not for {editor}")
    numbers = {}
    rows = []
    for name, value in fields.items():
        row = _row(editor, name)
        if "only" in row and value != row["only"]:
            only = f"only {row['only']!r}"
            raise BadInput(f"preset {path}: {name} {value!r} is not to be had here, {only}")
        became = ""
        if field := row.get("becomes"):
            numbers[field] = _read(path, name, value)
            became = f"{field}={numbers[field]}"
        rows.append((name, str(value), became, row.get("note", "")))
    if editor != "malmen" and "convention" not in numbers:
        convention = "published" if algorithm in AS_PUBLISHED else "reference"
        numbers["convention"] = convention
        rows.append(("convention", "", f"convention={convention}", CONVENTIONS[convention]))
    return numbers, pd.DataFrame(rows, columns=["name", "value", "became", "note"])


def _read(path: str | Path, name: str, value):
    try:
        return READERS[name](value) if name in READERS else value
    except (KeyError, TypeError, ValueError):
        problem = f"{name} {value!r:.60} is not of the form it has in that project"
        raise BadInput(f"preset {path}: {problem}") from None
