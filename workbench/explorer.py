"""The explorer: what became of each fact of a finished run, and what the model would say after
every block at every token of a prompt, before the edit, after it and at each checkpoint.

Here a run is packed for it; what is seen and done is explorer.js. It needs no torch, and in a saved
page no kernel.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import anywidget
import numpy
import pandas as pd
import traitlets

from workbench.records import BadInput, check_choice
from workbench.runs import Run, seen_through, spans

# What the model says at the end, by its category -> to what an answer is lost
LOST = {"true": "back to true", "related": "lost to related"}
LOST |= dict.fromkeys(("edited", "stop", "other"), "lost to other")
OUTCOMES = ("kept", "lost to related", "back to true", "lost to other", "lost", "never held")
KEY = ["edited_model", "fact_id"]  # an intrinsic fact is watched in every edited model
MODULE, LOOKS = (Path(__file__).with_name(f"explorer.{kind}") for kind in ("js", "css"))
CAPTION = "{model}, {editor} into {blocks}, then {task}, {plan} moving"
ANSWERS = ("edited", "true")
VIEWED = ("model", "fact", "step", "mode", "pins", "fates", "words", "range")
AXES = ("fact", "step", "layer")  # of every array; a value's place is that among those there are
ONE, UNKNOWN = 65534, 65535  # a probability of 1, in two bytes; one that is not known
ALIGNED = 8  # bytes
EMPTY = "<div>The explorer is drawn here by a script: trust this notebook, or open its page.</div>"


def outcomes(run: Run) -> pd.DataFrame:
    """A row each edited and intrinsic fact of each edited model, sorted by its outcome: prompt,
    target, group, outcome; indexed by KEY.

    The last look decides. What is not retained there is lost to the answer that the model says,
    as far as its first token that is no stop word tells; what was not there right after the edit
    either was never held.
    """
    probes = run.probes[run.probes.group.isin(["edited", "intrinsic"])]
    probes = probes.sort_values("step", kind="stable").set_index(KEY)
    last = probes.groupby(KEY).tail(1)
    held = probes[probes.step == 0].retained.reindex(last.index).astype(bool)
    category = last.group.map({"edited": "edited", "intrinsic": "true"})  # of what was held
    # To what, first tokens do not tell, or what is said begins as the answer does.
    outcome = last.top_category.map(LOST).where(last.top_category != category).fillna("lost")
    outcome[~held] = "never held"
    outcome[last.retained.astype(bool)] = "kept"
    table = last[["group", "prompt", "target"]]
    table = table.assign(outcome=pd.Categorical(outcome, OUTCOMES, ordered=True))
    return table.sort_values(["group", "outcome", "prompt"], kind="stable")


class Explorer(anywidget.AnyWidget):
    """Facts of a run by what became of them, and for one of them three lenses: before the edit,
    right after it, and at a checkpoint.

    Args:
        runs: the facts are the first one's; another is shown below it at the same fact and
            checkpoint.
        view: what is chosen at first, as the trait `view` of another explorer says it.
    Raises:
        BadInput: the view is of a fact, a step or another thing that is not in the first run.
    """

    _esm = MODULE
    _css = LOOKS
    data = traitlets.Bytes().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, *runs: Run, view: Mapping | None = None):
        self._probes = runs[0].probes
        super().__init__(data=packed(runs), view=dict(view or {}))

    @traitlets.validate("view")
    def _known(self, proposal: Mapping) -> dict:
        for name, value in proposal["value"].items():
            check_choice("view", name, VIEWED)
            column = {"fact": "fact_id", "step": "step"}.get(name)
            if column and value not in set(self._probes[column]):
                raise BadInput(f"view: {name} {value!r} is not in the first run; choose another")
        return proposal["value"]

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page the same module is alive beside its data."""
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.page()}, metadata

    def page(self) -> str:
        """The explorer as markup that needs neither a kernel nor anything from outside."""
        data = base64.b64encode(self.data).decode()
        holder = f'<script type="text/plain" class="workbench-explorer-data">{data}</script>'
        script = f'<script type="module">{MODULE.read_text("utf-8")}</script>'
        return f"<div><style>{LOOKS.read_text('utf-8')}</style>{holder}{EMPTY}</div>{script}"


# --- A run, packed


def packed(runs: Sequence[Run]) -> bytes:
    """Headers as JSON, then the arrays that they name, one after another, all compressed."""
    headers, content = [], b""
    for run in runs:
        header, arrays = _described(run)
        for name, values in arrays.items():
            about = {"type": values.dtype.name, "shape": values.shape, "offset": len(content)}
            header["arrays"][name] = about
            content += values.tobytes()
            content += bytes(-len(content) % ALIGNED)
        headers.append(header)
    text = json.dumps(headers).encode()
    text += b" " * (-(len(text) + 4) % ALIGNED)
    return gzip.compress(len(text).to_bytes(4, "little") + text + content, mtime=0)


def _described(run: Run) -> tuple[dict, dict[str, numpy.ndarray]]:
    """The header of a run, and its arrays."""
    facts = outcomes(run)
    edited = facts.index[facts.group == "edited"]
    lens = _numbered(run.lens[run.lens.category.isin(ANSWERS)], facts.index)
    tokens = _numbered(run.tokens, facts.index)
    cells = _numbered(run.positions, edited)
    words, vocabulary = pd.factorize(pd.concat([tokens.word, cells.token]))
    tokens["word"], cells["word"] = words[: len(tokens)], words[len(tokens) :]
    at_answer, at_rank, at_cell = ([*AXES, one] for one in ("category", "rank", "position"))
    arrays = {}
    arrays["lens_p"] = _shares(lens, "probability", at_answer)
    arrays["lens_rank"] = _array(lens, "rank", at_answer)
    arrays["top_ids"] = _array(tokens, "word", at_rank)
    arrays["top_p"] = _shares(tokens, "probability", at_rank)
    arrays["cell_ids"] = _array(cells, "word", [*at_cell, "rank"])
    arrays["cell_p"] = _shares(cells, "probability", [*at_cell, "rank"])
    arrays["cell_edited"] = _shares(cells, "p_edited", at_cell)
    arrays["cell_true"] = _shares(cells, "p_true", at_cell)
    name = run.folder.name
    caption = CAPTION.format(blocks=spans(run.about["layers"]), **run.spec)
    header: dict = {"name": name, "caption": caption + seen_through(run)}
    header["page"] = f"{name}/notebook.html" if "notebook.html" in run.files else ""
    header |= {"blocks": int(lens.layer.max()) + 1, "edited": run.about["layers"]}
    header["steps"] = sorted(lens.step.unique().tolist())
    header["vocabulary"] = vocabulary.tolist()
    header |= {"facts": _facts(run, facts, lens, cells), "arrays": {}}
    return header, arrays


def _numbered(table: pd.DataFrame, index: pd.MultiIndex) -> pd.DataFrame:
    """The table with the number of each row's fact."""
    return table.assign(fact=index.get_indexer(pd.MultiIndex.from_frame(table[KEY])))


def _array(table: pd.DataFrame, column: str, axes: Sequence[str], empty: int = 0) -> numpy.ndarray:
    """The values of a column at their places along the axes, else what stands for none."""
    places, values = zip(*(pd.factorize(table[name], sort=True) for name in axes), strict=True)
    array = numpy.full([len(along) for along in values], empty, "uint32")
    array[places] = table[column].fillna(empty)
    return array


def _shares(table: pd.DataFrame, column: str, axes: Sequence[str]) -> numpy.ndarray:
    """Probabilities, in two bytes each."""
    coded = (table[column] * ONE).round()
    return _array(table.assign(coded=coded), "coded", axes, UNKNOWN).astype("uint16")


def _facts(run: Run, facts: pd.DataFrame, lens: pd.DataFrame, cells: pd.DataFrame) -> list[dict]:
    """What is said of each fact; `steps` are its model's, `at` the tokens of its prompt."""
    measured = _measured(run)
    # What an edit puts in front of a prompt is not there before it.
    at = cells.sort_values("step").groupby(["fact", "position"])["at"].last()
    names = {"edited_model": "model", "fact_id": "id", "outcome": "fate"}
    table = facts.reset_index().rename(columns=names)
    edited = table.group == "edited"
    table["number"] = table.index
    table["cells"] = (edited.cumsum() - 1).where(edited, -1)
    table["true"] = table.id.map(run.about.get("true", {})).where(edited, table.target).fillna("")
    table["target"] = table.target.where(edited, "")
    table["clear"] = run.probes.groupby(KEY).clear.first().reindex(facts.index).tolist()
    table["steps"] = lens.groupby("fact").step.agg(lambda steps: sorted(set(steps)))
    table["at"] = table.cells.map(at.groupby("fact").agg(list))
    table["measured"] = [measured.get((one.model, one.id), {}) for one in table.itertuples()]
    table["at"] = table["at"].where(edited, table.prompt.str.split().str[-1:])
    return table.to_dict("records")


def _measured(run: Run) -> dict[tuple, dict[int, str]]:
    """(edited model, fact) -> step -> what the run's measures said of it, in words."""
    table = run.measured[~run.measured.quantity.str.endswith("_magnitude")].copy()
    table["words"] = table.quantity + table.value.map(" {:.2f}".format)
    by_measure = table.groupby([*KEY, "step", "measure"], sort=False).words.agg(", ".join)
    texts = by_measure.reset_index()
    texts["words"] = texts.measure + ": " + texts.words
    words: dict[tuple, dict[int, str]] = {}
    for (*key, step), text in texts.groupby([*KEY, "step"]).words.agg("; ".join).items():
        words.setdefault(tuple(key), {})[step] = text
    return words
