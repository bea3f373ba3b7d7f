"""The editors. Each module has HParams, prepare and edit; EDITORS is the only list of them."""

import json
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import yaml

from workbench.editing import ft, rome
from workbench.editing.records import Numbers, Resources
from workbench.facts import BadInput
from workbench.models import Model

EDITORS: dict[str, ModuleType] = {"ft": ft, "rome": rome}

# Where a model without a preset is edited, as a share of its depth: GPT-2 XL's published layers over its 48 blocks.
DEPTHS = {"ft": (1 / 48,), "rome": (17 / 48,)}

__all__ = ["EDITORS", "Numbers", "Resources", "editor_named", "preset"]


def editor_named(name: str) -> ModuleType:
    """The editor's module."""
    if name not in EDITORS:
        raise BadInput(f"editor {name!r}: choose one of {', '.join(EDITORS)}")
    return EDITORS[name]


@cache
def _presets() -> dict:
    return yaml.safe_load((Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8"))


def preset(editor: str, model: Model | str, path: str | Path | None = None) -> Numbers:
    """The hyper-parameters of an editor for a model.

    Args:
        model: a loaded model, or a name; the last part of the name (`gpt2-xl`) is looked up.
        path: a YAML or JSON file of fields instead.
    Returns:
        The editor's HParams. For a model without a published preset: layers in proportion to its depth, with a visible note.
    """
    module = editor_named(editor)
    if path is not None:
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise BadInput(f"preset {path}: cannot be read: {' '.join(str(error).split())[:150]}") from None
        if not isinstance(fields, dict):
            raise BadInput(f"preset {path}: holds no fields; write e.g. {json.dumps({'layers': [4]})}")
        return module.HParams(**fields)
    name = (model if isinstance(model, str) else model.name).rstrip("/").rsplit("/", 1)[-1]
    if found := _presets().get(name, {}).get(editor):
        return module.HParams(**found)
    if isinstance(model, str):
        raise BadInput(f"no preset of {editor} for {name!r}; give a loaded model, or hparams with layers")
    layers = tuple(round(share * model.n_blocks) for share in DEPTHS[editor])
    warnings.warn(f"no published preset of {editor} for {name}: layers {list(layers)} proposed from its depth of {model.n_blocks}", stacklevel=2)
    return module.HParams(layers=layers)
