"""Layers and numbers of an editor for any model, by one rule, on facts that are set apart for it.

Every candidate edits the same known facts of the role "tuning", which no study takes. What is slow,
target vectors, is solved once for all candidates that share it. The rule: of the candidates that
reach the most of WANTED, the one with the highest score, the mean of four measures.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from workbench import editing, facts, files, inert, prose
from workbench.editing.records import Numbers, Resources
from workbench.editing.target_vectors import Solving
from workbench.evaluation.efficacy import asked, outcome
from workbench.known import known_of
from workbench.models import Model
from workbench.records import BadInput, refused, yaml_table

# measure -> what a candidate has to reach; `reached` counts them
WANTED = {"efficacy": 0.95, "held_out": 0.6, "intrinsic": 0.95, "neighbourhood_kept": 0.9}
EDITED, WATCHED = 20, 30  # facts; half as many will do
BATCH = 10  # edited at once, by editors of many facts
ABOUT = ["model", "weights", "corpus", "facts", "editor", "hparams"]
COLUMNS = [*ABOUT, *WANTED, "score", "reached"]


def grids() -> dict[str, dict]:
    """Editor -> the values that are tried of each number, and the fixed ones."""
    return yaml_table(Path(editing.__file__).with_name("candidates.yaml"))


def check(editor: str, path: Path) -> None:
    """BadInput if there are no candidates for an editor, or no table can stand there."""
    if editor not in grids():
        raise BadInput(f"editor {editor!r}: no candidates; choose {', '.join(grids())}")
    if path.suffix != ".csv" or not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: name a .csv file in a folder that is there")
    _read(path)


def candidates(editor: str, model: Model) -> list[dict]:
    """The numbers that are tried, those that share target vectors side by side."""
    grid = dict(grids()[editor])
    fixed = grid.pop("fixed")
    tried = {}  # by their text: windows at the first blocks may fall together
    for values in product(*grid.values()):
        numbers = fixed | dict(zip(grid, values, strict=True))
        last = min(round(numbers.pop("last") * model.n_blocks), model.n_blocks - 1)
        first = max(0, last + 1 - numbers.pop("size", 1))
        numbers["layers"] = list(range(first, last + 1))
        if "weight" in numbers:
            numbers["weight"] = round(numbers["weight"] * model.weight(0).shape[1])
        tried[json.dumps(numbers)] = numbers
    return list(tried.values())


def apart(model: Model, source: str, margin: float = 0.1) -> list[facts.EditRequest]:
    """The facts of a source that are set apart for tuning and that the model knows, in an order of
    their own.
    """
    pool = [request for request in facts.read(source) if facts.is_tuned_on(request.fact)]
    pool = [request for request in pool if not request.fact.names_answer]
    random.Random("choosing").shuffle(pool)
    return known_of(model, pool, margin)


def choose(
    model: Model,
    editor: str,
    requests: facts.Requests,
    path: Path,
    corpus: str = "",
    lessons: facts.Requests | None = None,
) -> pd.DataFrame:
    """Try every candidate, and write the table after each; a stopped choice goes on.

    Args:
        requests: known facts, of `apart`.
        path: of the table, CSV.
        lessons: of `facts.lessons`, for an editor that learns; default those of its own.
    Returns:
        The candidates by the rule, the chosen one last; hparams are JSON. One that the editor
        refuses has no measures, and is tried again by a choice that goes on.
    Raises:
        BadInput: too few facts, an editor without candidates, or all candidates are refused.
    """
    check(editor, path)
    edited, watched = requests[:EDITED], requests[EDITED : EDITED + WATCHED]
    if len(watched) < WATCHED // 2:
        what = f"{len(requests)} of the facts set apart are known to {model.name}"
        raise BadInput(f"{what}, {EDITED + WATCHED // 2} are needed; give a source with more")
    texts = "\n".join(request.model_dump_json() for request in (*edited, *watched))
    about = {"model": model.name, "weights": model.fingerprint}
    about["corpus"] = prose.corpus_of(model.name, corpus)
    about |= {"facts": hashlib.sha256(texts.encode()).hexdigest()[:12], "editor": editor}
    done = _read(path)
    solver = _Solver(model, editor, edited, corpus, lessons)
    tables = [asked(model, batch, watched) for batch in solver.batches]
    refusal = None
    for numbers in tqdm(candidates(editor, model), desc=f"numbers of {editor}", unit="candidate"):
        row = about | {"hparams": json.dumps(numbers)}
        tried = _matching(done, row)
        if done[tried].score.notna().any():
            continue
        try:
            edits = solver.edits(solver.editor.HParams(**numbers))
            parts = [outcome(model, *pair) for pair in zip(edits, tables, strict=True)]
        except BadInput as error:
            refusal = error
            tqdm.write(inert.printable(f"{numbers}: {error}"), file=sys.stderr)
            parts = [pd.DataFrame(columns=list(WANTED), dtype=float)]
        means = pd.concat(parts)[list(WANTED)].mean()
        row |= means.round(4).to_dict() | {"score": round(means.mean(), 4)}
        row["reached"] = sum(means[name] >= wanted for name, wanted in WANTED.items())
        done = pd.concat([done[~tried], pd.DataFrame([row])], ignore_index=True)
        with files.written(path) as partial:
            done.to_csv(partial, index=False)
        done = _read(path)
    mine = done[_matching(done, about)]
    if refusal and mine.score.isna().all():
        raise refusal
    return mine.sort_values(["reached", "score"], ignore_index=True, na_position="first")


def _read(path: Path) -> pd.DataFrame:
    """The table so far; BadInput if the file is another one."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    with refused(f"{path}: cannot be read as a table", "name another file"):
        table = pd.read_csv(path, dtype=dict.fromkeys(ABOUT, str))
    if list(table) != COLUMNS:
        raise BadInput(f"{path}: is no table of candidates; name another file")
    return table


def _matching(table: pd.DataFrame, row: dict) -> pd.Series:
    return (table[list(row)] == list(row.values())).all(axis=1)


class _Solver:
    """Edits the same batches by one candidate after another."""

    def __init__(self, model: Model, editor: str, edited: facts.Requests, *learnt_of):
        self.model, self.editor, self.learnt_of = model, editing.EDITORS[editor], learnt_of
        size = 1 if editor in ("ft", "rome") else BATCH
        self.batches = facts.in_parts(edited, size)
        self._solved_by, self._solutions = "", [None] * len(self.batches)

    def edits(self, hparams: Numbers) -> Iterator:
        resources = self.editor.prepare(self.model, hparams, *self.learnt_of)
        if self.editor.targets:
            self._solve(hparams, resources)
        for batch, solution in zip(self.batches, self._solutions, strict=True):
            given: dict = {"solution": solution} if solution else {}
            yield self.editor.edit(self.model, batch, hparams, resources, **given)

    def _solve(self, hparams: Numbers, resources: Resources) -> None:
        """The target vectors, which depend on the last layer and on the solver's numbers alone."""
        numbers = hparams.model_dump(include=set(Solving.model_fields))
        key = json.dumps(numbers | {"last": max(hparams.layers)})
        if key == self._solved_by:
            return
        self._solutions = self.editor.solved(self.model, self.batches, hparams, resources)
        self._solved_by = key
