"""The editors. Each module has HParams, prepare and edit; EDITORS is the only list of them.

One that solves target vectors also has `check`, which refuses what it could not edit, and
`targets`, which `edit` takes as `solution`.
"""

import importlib
import json
import warnings
from collections import UserDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pandas as pd
import yaml
from tqdm.auto import tqdm

from workbench import inert
from workbench.editing import foreign
from workbench.facts import BadInput, EditRequest
from workbench.records import did_you_mean

if TYPE_CHECKING:
    from workbench.deltas import WeightDelta
    from workbench.editing.records import Numbers, Resources
    from workbench.models import Model


class Editors(UserDict):
    """Name -> module, imported when it is first asked for: to name the editors takes no torch."""

    def __getitem__(self, name: str) -> ModuleType:
        return importlib.import_module(f"{__name__}.{self.data[name]}")


EDITORS = Editors({name: name for name in ("ft", "rome", "memit", "alphaedit", "malmen")})

# Where a model without a preset is edited, as shares of its depth: the published layers of GPT-2 XL
# over its 48 blocks.
DEPTHS = {
    "ft": (0,),
    "rome": (17 / 48,),
    "memit": tuple(layer / 48 for layer in range(13, 18)),
    "alphaedit": tuple(layer / 48 for layer in range(13, 18)),
    "malmen": tuple(layer / 48 for layer in range(42, 48)),
}


def check_named(name: str) -> None:
    """BadInput if no editor is called so."""
    if name not in EDITORS:
        near = did_you_mean(name, EDITORS) or ":"
        raise BadInput(f"editor {name!r}{near} choose one of {', '.join(EDITORS)}")


def editor_named(name: str) -> ModuleType:
    """The editor's module."""
    check_named(name)
    return EDITORS[name]


def edit_each(
    editor: str,
    model: "Model",
    batches: Sequence[Sequence[EditRequest]],
    hparams: "Numbers",
    resources: "Resources",
    seed: int = 0,
) -> "list[WeightDelta]":
    """Each batch of facts edited into a copy of the model of its own: a delta a batch.

    An editor that solves target vectors (`targets`) solves those of all batches at once, which is
    faster than batch by batch.
    """
    from workbench.editing import records

    module = editor_named(editor)
    solved: Sequence[dict] = [{}] * len(batches)
    if hasattr(module, "targets"):
        for batch in batches:
            module.check(model, batch, hparams, resources)  # before the long work
        solution = module.targets(
            model, [request for batch in batches for request in batch], hparams, resources
        )
        solved = [{"solution": part} for part in solution.split([len(batch) for batch in batches])]
    with warnings.catch_warnings(action="ignore", category=records.NotTaken):  # said once, of all
        deltas = [
            module.edit(model, batch, hparams, resources, seed, **of)
            for batch, of in zip(batches, solved, strict=True)
        ]
    records.warn_of_missed(deltas)
    return deltas


def edit_in_turn(
    editor: str,
    model: "Model",
    batches: Sequence[Sequence[EditRequest]],
    hparams: "Numbers",
    resources: "Resources",
    seed: int = 0,
) -> "WeightDelta":
    """Batches of facts edited one after another, each into the model that holds the earlier ones:
    the sum of their deltas.

    An editor with a memory (AlphaEdit) carries the keys of earlier batches along. The model is left
    bit for bit as it was.
    """
    from workbench import deltas
    from workbench.editing import records

    module = editor_named(editor)
    if not batches:
        raise BadInput("no batch to edit; give at least one")
    total = None
    with warnings.catch_warnings(action="ignore", category=records.NotTaken):  # said once, of all
        for batch in tqdm(
            batches, desc=editor, unit="batch", disable=None if len(batches) > 1 else True
        ):
            if total is None:
                delta = total = module.edit(model, batch, hparams, resources, seed)
            else:
                with deltas.applied(model, total):
                    delta = module.edit(model, batch, hparams, resources, seed)
                total = total + delta
            if hasattr(module, "remember"):
                resources = module.remember(resources, delta)
    if len(batches) > 1:  # a later edit may undo an earlier one
        total = records.asked_again(
            model, total, [request for batch in batches for request in batch]
        )
    records.warn_of_missed([total])
    return total


@cache
def presets() -> dict:
    """Model, in lower case -> editor -> variant -> numbers."""
    found = yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8"))
    return {name.lower(): numbers for name, numbers in found.items()}


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
        editor, path = foreign.editor_of(editor, _fields(editor)), editor
    module = editor_named(editor)
    if path is not None:
        return module.HParams(**_read(editor, path))
    if variant not in ("", "published", "paper", "reference"):
        raise BadInput(f"variant {variant!r}: choose published, paper or reference")
    name = (model if isinstance(model, str) else model.name).rstrip("/").rsplit("/", 1)[-1]
    known = presets().get(name.lower(), {}).get(editor, {})
    convention = {"convention": "reference"} if variant == "reference" else {}
    if convention and "convention" not in module.HParams.model_fields:
        raise BadInput(f"variant 'reference': {editor} has none; choose published")
    if variant == "paper":
        if "paper" not in known:
            raise BadInput(
                f"variant 'paper': arXiv 2507.14198 gives no numbers of {editor} for {name}; choose published"
            )
        return module.HParams(**known["paper"])
    if "published" in known:
        return module.HParams(**(known["published"] | convention))
    if isinstance(model, str):
        raise BadInput(
            f"no preset of {editor} for {name!r}; give a loaded model, or hparams with layers"
        )
    layers = tuple(sorted({int(share * model.n_blocks) for share in DEPTHS[editor]}))
    scaled = _by_scale(editor, model)
    numbers = ", ".join(f"{field} {value}" for field, value in scaled.items())
    warnings.warn(
        f"no published preset of {editor} for {name}: layers {list(layers)} proposed from its depth of "
        f"{model.n_blocks}{', by the scale of its keys ' * bool(scaled)}{numbers}",
        stacklevel=2,
    )
    return module.HParams(layers=layers, **scaled, **convention)


def _by_scale(editor: str, model: "Model") -> dict:
    """The numbers that compare between models only by the scale of their keys.

    E[k' C^-1 k] = d_in, so a request is as heavy as `weight` / d_in of the corpus: .9 (GPT-J), 1.0
    (Llama-3-8B), 1.4 (Llama-2-7B) and 3.1 (GPT-2 XL) as published. AlphaEdit's published threshold
    and ridge are absolute; these are shares of C's trace, and as heavy as what was chosen for the
    world's models (ridge of .011 to .047).
    """
    if editor == "memit":
        return {"weight": model.weight(0).shape[1]}
    if editor == "alphaedit":
        return {"null_space": "trace", "threshold": 0.1, "ridge_unit": "trace", "ridge": 0.02}
    return {}


def translation(path: str | Path, editor: str = "") -> pd.DataFrame:
    """What each name in another project's file of hyper-parameters becomes: name, value, became (""
    = ignored), note.
    """
    fields = _fields(path)
    return foreign.translated(editor or foreign.editor_of(path, fields), path, fields)[1]


def _read(editor: str, path: str | Path) -> dict:
    fields = _fields(path)
    if not foreign.is_foreign(fields):
        return fields
    found, table = foreign.translated(editor, path, fields)
    ignored = inert.printable(", ".join(table.name[table.became == ""]))
    warnings.warn(
        f"{path}: hyper-parameters of another project; ignored: {ignored} (editing.translation(path) says why)",
        stacklevel=3,
    )
    return found


def _fields(path: str | Path) -> dict:
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(
            f"preset {path}: cannot be read: {' '.join(str(error).split())[:150]}"
        ) from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise BadInput(f"preset {path}: holds no fields; write e.g. {json.dumps({'layers': [4]})}")
    return fields
