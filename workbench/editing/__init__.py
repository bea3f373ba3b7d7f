"""The editors, and the numbers that are proposed for them.

EDITORS is the only list. An editor is a module or a function, see `registry`; `Editor` is what
becomes of either.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from workbench import inert
from workbench.checkpoints import PACKAGED
from workbench.editing import foreign
from workbench.facts import Requests
from workbench.records import BadInput, check_choice, fields_of, yaml_table
from workbench.registry import Registry

if TYPE_CHECKING:
    from workbench.editing.records import Numbers, Resources
    from workbench.edits import Edit
    from workbench.models import Model


Batches = Sequence[Requests]


def _nothing_to_prepare(*args, **kwargs) -> "Resources":
    from workbench.editing.records import Resources

    return Resources()


@dataclass(kw_only=True)
class Editor:
    """An editor with what it left out filled in.

    Attributes:
        HParams: its numbers, a subclass of `records.Numbers`.
        edit: (model, requests, hparams, resources, seed) -> Edit; leaves the model as it was.
        prepare: (model, hparams, corpus, training_requests, seed) -> Resources, once a model.
        check: refuses what it could not edit, before the long work.
        targets: solves the target vectors of requests; `edit` then takes them as `solution`.
        remember: (resources, edit) -> resources, for the edits after it.
        scaled: (model) -> numbers that compare between models only by the scale of their keys.
        DEPTHS: the blocks proposed for a model without a preset, as shares of its depth.
        LEARNS: what it learns in `prepare`, from facts that are then not studied; "" = nothing.
        REMEDY: the numbers to change where an edit did not take, as a template of HParams' fields.
    """

    name: str
    HParams: type["Numbers"]
    edit: Callable[..., "Edit"]
    prepare: Callable[..., "Resources"] = _nothing_to_prepare
    check: Callable[..., None] = field(default=lambda *_: None)
    targets: Callable[..., Any] | None = None
    remember: Callable[..., "Resources"] = field(default=lambda resources, _: resources)
    scaled: Callable[["Model"], dict] = field(default=lambda _: {})
    DEPTHS: tuple[float, ...] = (1 / 3,)
    LEARNS: str = ""
    REMEDY: str = ""

    @classmethod
    def of(cls, name: str, thing: Any) -> "Editor":
        """The editor that a module or a function is; BadInput if it is none."""
        if inspect.isfunction(thing):
            return cls(name=name, **_of_function(name, thing))
        names = {one.name for one in fields(cls)} & set(dir(thing))
        missing = {"HParams", "edit"} - names
        if missing:
            what = f"editor {name}: {thing!r} has no {' and no '.join(sorted(missing))}"
            raise BadInput(f"{what}; give a function of (model, requests, **numbers), or a module")
        return cls(**{one: getattr(thing, one) for one in names} | {"name": name})

    def solved(self, model: "Model", batches: Batches, *prepared) -> list:
        """The target vectors of batches of facts, solved all at once."""
        requests = [request for batch in batches for request in batch]
        solution = self.targets(model, requests, *prepared)
        return solution.split([len(batch) for batch in batches])


def _of_function(name: str, function: Callable) -> dict[str, Any]:
    """HParams and `edit` of an editor that is one function: its defaults are its numbers."""
    import pydantic

    from workbench.editing import records
    from workbench.edits import Edit

    none = inspect.Parameter.empty
    numbers = list(inspect.signature(function).parameters.values())[2:]
    defaults = {number.name: number.default for number in numbers if number.name != "seed"}
    layers = defaults.pop("layers", ())
    kinds: dict[str, Any] = {"layers": (tuple[int, ...], () if layers is none else layers)}
    for number, default in defaults.items():
        if default is none:
            raise BadInput(f"editor {name}: {number} has no default; give it one")
        kinds[number] = (Any if default is None else type(default), default)
    hparams_type = pydantic.create_model(f"{name}.HParams", __base__=records.Numbers, **kinds)

    def edit(model, requests, hparams, resources, seed=0):
        before = model.is_changed()
        given = hparams.model_dump() | {"seed": seed}
        made = function(model, requests, **{number.name: given[number.name] for number in numbers})
        if not before and model.is_changed():
            what = f"editor {name}: changed the model itself"
            raise BadInput(f"{what}; load it again, and give back the change as an edit")
        if not isinstance(made, Edit):
            what = f"editor {name}: gave back {type(made).__name__}, no edit"
            raise BadInput(f"{what}; return e.g. wb.WeightDelta.of(model, changes=...)")
        return records.described(name, model, made, requests, hparams, resources, seed)

    depths = (1 / 3,) if layers is none else ()
    return {"HParams": hparams_type, "edit": edit, "DEPTHS": depths}


NAMES = ("ft", "rome", "memit", "alphaedit", "malmen", "grace", "incontext")
EDITORS = Registry("editor", {name: f"{__name__}.{name}" for name in NAMES}, Editor.of)


def edit_each(
    editor: str,
    model: "Model",
    batches: Batches,
    hparams: "Numbers",
    resources: "Resources",
    seed: int = 0,
) -> "list[Edit]":
    """Each batch of facts edited into a copy of the model of its own: an edit a batch.

    An editor that solves target vectors (`targets`) solves those of all batches at once, which is
    faster than batch by batch.
    """
    from workbench.editing import records

    module = EDITORS[editor]
    solved: list[dict] = [{} for _ in batches]
    if module.targets:
        for batch in batches:
            module.check(model, batch, hparams, resources)  # before the long work
        parts = module.solved(model, batches, hparams, resources)
        solved = [{"solution": part} for part in parts]
    edits = []
    with warnings.catch_warnings(action="ignore", category=records.NotTaken):  # once, of all
        for batch, given in zip(batches, solved, strict=True):
            edits.append(module.edit(model, batch, hparams, resources, seed, **given))
    records.warn_of_missed(edits)
    return edits


def edit_in_turn(
    editor: str,
    model: "Model",
    batches: Batches,
    hparams: "Numbers",
    resources: "Resources",
    seed: int = 0,
) -> "Edit":
    """Batches of facts edited one after another, each into the model that holds the earlier ones:
    the sum of their deltas.

    An editor with a memory (AlphaEdit) carries the keys of earlier batches along. The model is left
    bit for bit as it was.
    """
    from workbench.editing import records

    module = EDITORS[editor]
    if not batches:
        raise BadInput("no batch to edit; give at least one")
    total: Any = None
    with warnings.catch_warnings(action="ignore", category=records.NotTaken):  # once, of all
        for batch in tqdm(batches, desc=editor, unit="batch", disable=None):
            with nullcontext() if total is None else total.applied(model):
                edit = module.edit(model, batch, hparams, resources, seed)
            total = edit if total is None else total + edit
            resources = module.remember(resources, edit)
    requests = [request for batch in batches for request in batch]
    total = records.asked_again(model, total, requests)  # a later edit may undo an earlier one
    records.warn_of_missed([total])
    return total


@cache
def presets() -> dict:
    """Model, in lower case -> editor -> variant -> numbers."""
    by_model = yaml_table(Path(__file__).with_name("presets.yaml"))
    return {name.lower(): numbers for name, numbers in by_model.items()}


def preset(
    editor: str, model: "Model | str" = "", path: str | Path | None = None, variant: str = ""
) -> "Numbers":
    """The hyper-parameters of an editor for a model.

    Args:
        editor: its name; or a file of another project, alone, which names its editor:
            `preset("hparams/ROME/gpt2-xl.json")`.
        model: a loaded model, or a name; the last part of the name (`gpt2-xl`) is looked up.
        path: a YAML or JSON file of fields instead: of HParams, or of EasyEdit's or the ROME and
            MEMIT repositories' names; what is ignored of those is said in a visible note, and
            `translation(path)` is the whole table.
        variant: "" or "published"; "paper": those of arXiv 2507.14198; "reference": the published
            ones, with the habits of the papers' own code.
    Returns:
        The editor's HParams. For a model without a published preset: layers in proportion to its
        depth and weights in proportion to the scale of its keys, with a visible note.
    """
    if Path(editor).suffix in (".json", ".yaml", ".yml"):
        path = editor
        editor = foreign.editor_of(path, fields_of(path, "preset"))
    module = EDITORS[editor]
    if path is not None:
        return module.HParams(**_read(editor, path))
    check_choice("variant", variant or "published", ("published", "paper", "reference"))
    convention: dict[str, Any] = {}
    if variant == "reference":
        if "convention" not in module.HParams.model_fields:
            raise BadInput(f"variant 'reference': {editor} has none; choose published")
        convention = {"convention": "reference"}
    name = model if isinstance(model, str) else model.name
    where, _, name = name.rstrip("/").rpartition("/")
    is_another = where and name.lower() in PACKAGED  # e.g. the base model of a packaged one
    numbers: dict[str, Any] = presets().get("" if is_another else name.lower(), {}).get(editor, {})
    if variant == "paper" and "paper" not in numbers:
        what = f"variant 'paper': arXiv 2507.14198 gives no numbers of {editor} for {name}"
        raise BadInput(f"{what}; choose published")
    wanted = "paper" if variant == "paper" else "published"
    if wanted in numbers:
        return module.HParams(**numbers[wanted], **convention)
    return module.HParams(**_proposed(module, model, name), **convention)


def _proposed(editor: Editor, model: "Model | str", name: str) -> dict:
    """Numbers for a model without a preset: layers by its depth, weights by the scale of its keys,
    with a visible note.
    """
    if not editor.DEPTHS:
        return {}
    if isinstance(model, str):
        what = f"no preset of {editor.name} for {name!r}"
        raise BadInput(f"{what}; give a loaded model, or hparams with layers")
    layers = sorted({int(share * model.n_blocks) for share in editor.DEPTHS})
    scaled = editor.scaled(model)
    note = f"no published preset of {editor.name} for {name}: layers {layers} proposed from its"
    note += f" depth of {model.n_blocks}"
    if scaled:
        numbers = ", ".join(f"{field} {value}" for field, value in scaled.items())
        note += f", by the scale of its keys {numbers}"
    warnings.warn(note, stacklevel=3)
    return scaled | {"layers": layers}


def translation(path: str | Path, editor: str = "") -> pd.DataFrame:
    """What each name in another project's file of hyper-parameters becomes: name, value, became (""
    = ignored), note.
    """
    fields = fields_of(path, "preset")
    return foreign.translated(editor or foreign.editor_of(path, fields), path, fields)[1]


def _read(editor: str, path: str | Path) -> dict:
    fields = fields_of(path, "preset")
    if not foreign.is_foreign(fields):
        return fields
    numbers, table = foreign.translated(editor, path, fields)
    ignored = inert.printable(", ".join(table.name[table.became == ""]))
    note = f"{path}: hyper-parameters of another project; ignored: {ignored}"
    warnings.warn(f"{note} (editing.translation(path) says why)", stacklevel=3)
    return numbers
