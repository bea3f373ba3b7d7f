"""What a batch run would take, before anything is loaded: every setting, the memory, what would be fetched."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from workbench import batch, checkpoints, models
from workbench.editing.target_vectors import Solving
from workbench.facts import BadInput
from workbench.moments import NAMED
from workbench.spec import Spec
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import memory_needed


def forecast(notebook: str | Path, parameters: Mapping | None = None, preset: str = "", out: str | Path = "runs") -> str:
    """The text of a dry run: run folder, settings, hyper-parameters, memory, downloads. Of a Hub model the configuration is read, no more.

    Raises:
        BadInput: whatever `batch.checked` finds; layers or plan that do not fit the model.
    """
    notebook = Path(notebook)
    given, spec = batch.checked(notebook, parameters or {}, preset)
    folder = Path(out) / batch.identify(notebook, given, spec)
    varied = batch.varied(notebook, given)
    lines = [f"run       {folder}{' (finished: it would be returned at once)' if (folder / 'run.json').exists() else ''}", "", "settings"]
    lines += [f"  {name} = {value!r}" for name, value in (spec.model_dump() | varied).items()]
    changes = [{varied["vary"]: value} for value in varied["values"]] if varied else [{}]
    specs = [Spec(**(spec.model_dump() | change)).resolved() for change in changes]
    for name in dict.fromkeys(each.model for each in specs):
        lines += _model([each for each in specs if each.model == name])
    return "\n".join([*lines, "", "fetched from the Hub", *dict.fromkeys(line for each in specs for line in _fetched(each))])


def _model(specs: list[Spec]) -> list[str]:
    """Hyper-parameters of each editor on one model, and the memory of the largest run."""
    unknown = ""
    try:
        outline = models.outline(specs[0].model, specs[0].revision)
    except BadInput as error:
        outline, unknown = None, str(error)
    lines, needed = [], []
    for spec in specs:
        with warnings.catch_warnings(record=True) as said:
            hparams = spec.editor_hparams(outline or spec.model)
        told = ["", f"hyper-parameters of {spec.editor} on {spec.model}", *(f"  {name} = {value!r}" for name, value in hparams.model_dump().items())]
        told += [f"  note: {each.message}" for each in said]
        lines += [] if told[2:] and "\n".join(told) in "\n".join(lines) else told
        if outline:
            needed.append(_needed(spec, outline, hparams))
    if not outline:
        return [*lines, "", f"memory    not known: {unknown}"]
    at, beside = models.device_named(specs[0].device), max(needed, key=lambda each: sum(each.values()))
    total, free = sum(beside.values()), models.free_bytes(at, specs[0].device_map)
    lines += [
        "",
        f"memory    {outline.name}: {outline.network.num_parameters() / 1e6:,.0f} million parameters on {at.type}, {free / 1e9:.1f} GB free",
    ]
    lines += [f"  {size / 1e9:8.2f} GB  {what}" for what, size in (beside | {"in all, beside activations": total}).items()]
    return lines + ([] if total < free else ["  more than is free: let fewer weights move (plan, adapter), or use bfloat16 or more GPUs"])


def _needed(spec: Spec, outline: models.Model, hparams) -> dict[str, int]:
    at = models.device_named(spec.device)
    dtype = spec.dtype if spec.dtype != "auto" or at.type == "cuda" else "float32"
    weights = models.weights_bytes(outline, dtype)
    plan = plans.resolve(outline, spec.plan, hparams.layers)
    moments = [12 * outline.weight(layer).shape[1] ** 2 for layer in hparams.layers] if isinstance(hparams, Solving) else []
    return {
        "weights": weights,
        "second moments and their factors": sum(moments),
        "tuning: gradients, AdamW, a copy": 0 if spec.adapter else memory_needed(outline, plan, weights // outline.network.num_parameters()),
    }


def _fetched(spec: Spec) -> list[str]:
    files = checkpoints.downloads(spec.model, spec.revision)
    if files is None:
        found = [f"  model {spec.model}: the Hub is out of reach, and the cache does not hold the whole model"]
    else:
        found = [f"  {size / 1e6:10,.1f} MB  {spec.model}/{name}" for name, size in files]
    study = tasks.presets()["sources"].get(spec.task_data)
    sets = [(spec.facts, "facts"), (study.data if study else spec.task_data, "task_data"), (NAMED.get(spec.corpus, spec.corpus), "corpus")]
    streamed = {"corpus"} | ({"task_data"} if study and study.streaming else set())
    for source, what in sets:
        if source not in ("", "world") and not Path(source).exists():
            found.append(f"  dataset {source} ({what}{', streamed: only what is read of it' if what in streamed else ''})")
    return found or ["  nothing"]
