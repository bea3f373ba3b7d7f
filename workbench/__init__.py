"""Edit facts into a language model, fine-tune it, and see whether the edits survive.

    import workbench as wb

    model = wb.load("world-gpt2")
    requests = wb.facts("world", split="study")[:10]
    edit = wb.edit(model, requests, "memit", layers=[2, 3, 4])
    with wb.applied(model, edit):
        wb.retention(model, requests)
    run = wb.study(model, edit, requests, task="facts", plan="after:6")
    run.plot()

To import it is cheap; torch comes with the first model. `wb.editors`, `wb.tasks` and `wb.measures`
are open: see `registry`.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.deltas import applied as applied
    from workbench.edits import Edit
    from workbench.evaluation import evaluate as evaluate
    from workbench.facts import EditRequest
    from workbench.models import Model
    from workbench.spec import Spec
    from workbench.traces import inspect as inspect
    from workbench.tracking.retention import measure as retention  # noqa: F401

__version__ = "0.2.0"

# name -> where it is; imported when it is asked for
_ELSEWHERE = {name: f"deltas:{name}" for name in ("applied", "save", "WeightDelta", "Change")}
_ELSEWHERE |= {"load_edit": "deltas:load", "retention": "tracking.retention:measure"}
_ELSEWHERE |= {"editors": "editing:EDITORS", "measures": "registry:MEASURES"}
_ELSEWHERE |= {"tasks": "tuning.numbers:TASKS", "protections": "tuning.numbers:PROTECTIONS"}
_ELSEWHERE |= {"evaluate": "evaluation:evaluate", "inspect": "traces:inspect", "Spec": "spec:Spec"}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        module, _, attribute = _ELSEWHERE[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def load(model: "str | Spec" = "world-gpt2", **options: Any) -> "Model":
    """A model in evaluation mode: of a Spec, or by its name with `models.load`'s options.

    Args:
        model: world-gpt2, world-llama, a folder in Hugging Face layout, a Hub id, or a Spec.
        options: device, dtype, revision, device_map, start.
    """
    from workbench import models, study
    from workbench.spec import Spec

    return study.load(model) if isinstance(model, Spec) else models.load(model, **options)


def edit(
    model: "Model",
    requests: "Sequence[EditRequest]",
    editor: str = "rome",
    *,
    variant: str = "",
    corpus: str = "",
    facts: str = "world",
    seed: int = 0,
    **numbers: Any,
) -> "Edit":
    """Edit facts: a value to apply; the model stays bit for bit as it was. It says how many took.

    Args:
        requests: facts, see `wb.facts`.
        editor: one of `wb.editors`.
        variant: of its preset: published, paper or reference.
        corpus: text of the second moments, where the editor needs them: once a model, then cached.
        facts: those that an editor that learns (malmen) learns from, on a model of your own.
        numbers: fields of the editor's HParams in place of the preset's, e.g. layers=[2, 3, 4].
    """
    from workbench import study
    from workbench.known import Chosen
    from workbench.spec import Spec

    name: dict[str, Any] = {"model": model.name, "editor": editor, "variant": variant}
    spec = Spec(**name, corpus=corpus, facts=facts, seed=seed, hparams=numbers)
    chosen = Chosen(edited=list(requests), intrinsic=[], known=None, related={})
    hparams, resources = study.prepare(spec, model, chosen)
    return study.make_edit(spec, model, requests, hparams, resources)
