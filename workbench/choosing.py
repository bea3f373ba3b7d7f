"""Layers and numbers of an editor for any model, by one rule, on facts that are set apart for it.

Every candidate edits the same known facts of the role "tuning", which no study takes. What is slow,
target vectors, is solved once for all candidates that share it. The rule: of the candidates that
reach the most of WANTED, the one with the highest score, the mean of four measures.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from workbench import editing, facts, files
from workbench.editing.records import Numbers, Resources
from workbench.editing.target_vectors import Solving
from workbench.facts import BadInput, EditRequest
from workbench.known import known_table
from workbench.measures.efficacy import asked, outcome
from workbench.models import Model

# measure -> what a candidate has to reach; `reached` counts them
WANTED = {"efficacy": 0.95, "held_out": 0.6, "intrinsic": 0.95, "neighbourhood_kept": 0.9}
EDITED, WATCHED = 20, 30  # facts; half as many will do
BATCH = 10  # edited at once, by editors of many facts
LAST = (0.2, 0.3, 0.4)  # the last edited block, as a share of the depth
CLAMPS = {"rome": (1.5, 4.0), "": (0.5, 0.75)}  # of the shift; ROME's stands on the MLP's output
SOLVER = {"learning_rate": 0.5, "steps": 20, "weight_decay": 0.5}  # as published


def candidates(editor: str, model: Model) -> list[dict]:
    """The numbers that are tried, those that share target vectors side by side."""
    depth = model.n_blocks
    width = model.weight(0).shape[1]
    last = sorted({max(1, round(share * depth)) for share in LAST})
    solved = [SOLVER | {"clamp": clamp} for clamp in CLAMPS.get(editor, CLAMPS[""])]
    grids: dict[str, Iterator[dict]] = {
        "ft": (
            {"layers": (layer,), "learning_rate": rate, "steps": 25}
            for layer, rate in product((0, last[0], last[-1]), (1e-4, 5e-4))
        ),
        "rome": (
            numbers | {"layers": (layer,), "prefixes": 5, "bare_share": share}
            for layer, numbers, share in product(last, solved, (None, 0.5))
        ),
        "memit": (
            numbers | {"layers": _window(layer, size), "weight": round(share * width)}
            for layer, numbers, size, share in product(last, solved, (3, 5), (0.5, 1, 2))
        ),
        "alphaedit": (
            numbers
            | {"layers": _window(layer, size), "null_space": "trace"}
            | {"threshold": share, "ridge": ridge}
            for layer, numbers, size, share, ridge in product(
                last, solved[:1], (3, 5), (0.02, 0.1), (0.1, 1)
            )
        ),
    }
    if editor not in grids:
        names = ", ".join(grids)
        raise BadInput(f"editor {editor!r}: no candidates are known for it; choose {names}")
    tried = {json.dumps(numbers): numbers for numbers in grids[editor]}  # windows may fall together
    return list(tried.values())


def _window(last: int, size: int) -> tuple[int, ...]:
    return tuple(range(max(0, last - size + 1), last + 1))


def apart(model: Model, source: str, margin: float = 0.1) -> list[EditRequest]:
    """The facts of a source that are set apart for tuning and that the model knows, in an order of
    their own.
    """
    pool = [request for request in facts.read(source) if facts.is_tuned_on(request.fact)]
    pool = [request for request in pool if not request.fact.names_answer]
    random.Random("choosing").shuffle(pool)
    known = known_table(model, pool, margin).known
    return [request for request, good in zip(pool, known, strict=True) if good]


def choose(
    model: Model, editor: str, requests: Sequence[EditRequest], path: Path, corpus: str = ""
) -> pd.DataFrame:
    """Try every candidate, and write the table after each; a stopped choice goes on.

    Args:
        requests: known facts, of `apart`.
        path: of the table, CSV.
    Returns:
        The candidates by the rule, the chosen one last: model, editor, n, hparams (JSON), the
        measures, score, reached.
    Raises:
        BadInput: too few facts, or an editor without candidates.
    """
    edited, watched = requests[:EDITED], requests[EDITED : EDITED + WATCHED]
    if len(watched) < WATCHED // 2:
        what = f"{len(requests)} of the facts set apart are known to {model.name}"
        raise BadInput(f"{what}, {EDITED + WATCHED // 2} are needed; give a source with more")
    about = {"model": model.name, "weights": model.fingerprint, "editor": editor, "n": len(edited)}
    done = pd.read_csv(path) if path.exists() else pd.DataFrame()
    solver = _Solver(model, editor, edited, corpus)
    tables = [asked(model, batch, watched) for batch in solver.batches]
    for numbers in tqdm(candidates(editor, model), desc=f"numbers of {editor}", unit="candidate"):
        hparams = editing.EDITORS[editor].HParams(**numbers)
        row = about | {"hparams": json.dumps(numbers)}
        if not done.empty and (done[list(row)] == list(row.values())).all(axis=1).any():
            continue
        edits = solver.edits(hparams)
        parts = [outcome(model, *pair) for pair in zip(edits, tables, strict=True)]
        means = pd.concat(parts)[list(WANTED)].mean()
        row |= means.round(4).to_dict() | {"score": round(means.mean(), 4)}
        row["reached"] = sum(means[name] >= wanted for name, wanted in WANTED.items())
        done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
        with files.written(path) as partial:
            done.to_csv(partial, index=False)
    here = done[(done.model == model.name) & (done.editor == editor)]
    return here.sort_values(["reached", "score"], kind="stable", ignore_index=True)


class _Solver:
    """Edits the same batches by one candidate after another."""

    def __init__(self, model: Model, editor: str, edited: Sequence[EditRequest], corpus: str):
        self.model, self.editor, self.corpus = model, editing.EDITORS[editor], corpus
        size = 1 if editor in ("ft", "rome") else BATCH
        self.batches = [edited[start : start + size] for start in range(0, len(edited), size)]
        self._solved_by, self._solutions = "", [None] * len(self.batches)

    def edits(self, hparams: Numbers) -> Iterator:
        resources = self.editor.prepare(self.model, hparams, self.corpus)
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
        requests = [request for batch in self.batches for request in batch]
        solution = self.editor.targets(self.model, requests, hparams, resources)
        self._solved_by = key
        self._solutions = solution.split([len(batch) for batch in self.batches])
