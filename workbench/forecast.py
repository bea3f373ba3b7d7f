"""What a batch run would take, before anything is loaded: every setting, the memory, what would be
fetched.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from workbench import batch, checkpoints, editing, models, positions
from workbench.facts import BadInput
from workbench.moments import NAMED
from workbench.runs import finished
from workbench.spec import Spec, varied
from workbench.tuning import adapters, numbers, plans
from workbench.tuning.finetune import moving_bytes


def forecast(
    notebook: str | Path, parameters: Mapping | None = None, preset: str = "", out: str | Path = ""
) -> str:
    """The text of a dry run: run folder, settings, hyper-parameters, memory, downloads. Of a Hub
    model the configuration is read, no more.

    Raises:
        BadInput: whatever `batch.checked` finds; layers or plan that do not fit the model.
    """
    notebook = Path(notebook)
    given, spec = batch.checked(notebook, parameters or {}, preset)
    folder = batch.place(notebook, out) / batch.identify(notebook, given, spec)
    if not batch.makes_spec(notebook):
        return f"run       {folder}\n\n{notebook.name} reads what runs there are; no model is loaded, nothing is fetched"
    values = batch.values(notebook, given)
    runs = varied(spec, *values) if values else [spec.resolved()]
    lines = [
        f"run       {folder}{' (finished: it would be returned at once)' if finished(folder) else ''}",
        "",
        "settings",
    ]
    for name in Spec.model_fields:
        told = dict.fromkeys(repr(getattr(each, name)) for each in runs)
        lines.append(f"  {name} = {' | '.join(told)}")
    for name, start in dict.fromkeys((each.model, each.start) for each in runs):
        lines.append(f"  in front of every text: {_front(name, runs[0].revision, start)}")
    for name in dict.fromkeys(each.model for each in runs):
        lines += _model([each for each in runs if each.model == name])
    return "\n".join(
        [
            *lines,
            "",
            "fetched from the Hub",
            *dict.fromkeys(line for each in runs for line in _fetched(each)),
        ]
    )


def _front(name: str, revision: str, start: str) -> str:
    """What `start` comes to on a model, as far as its tokenizer is on this machine."""
    try:
        return repr(positions.front_text(models.speaker(name, revision, start)))
    except BadInput as error:
        return f"not known before its tokenizer is here ({error})"


def _model(runs: list[Spec]) -> list[str]:
    """Hyper-parameters of each editor on one model, and the memory of the largest run."""
    outline, unknown = None, ""
    try:
        outline = models.outline(runs[0].model, runs[0].revision)
    except BadInput as error:
        unknown = str(error)
    blocks = dict.fromkeys(_hparams(each, outline) for each in runs)
    if outline is None:
        return [*blocks, "", f"memory    not known: {unknown}"]
    at = models.device_named("auto" if runs[0].device_map else runs[0].device)
    beside = max(
        (_needed(each, outline, at.type) for each in runs), key=lambda each: sum(each.values())
    )
    total, free = (
        sum(beside.values()),
        models.free_bytes(at, *(models.all_gpus() if runs[0].device_map else ())),
    )
    millions = outline.network.num_parameters() / 1e6
    lines = [
        *blocks,
        "",
        f"memory    {outline.name}: {millions:,.0f} million parameters on {at.type}, {free / 1e9:.1f} GB free",
    ]
    lines += [
        f"  {size / 1e9:8.2f} GB  {what}"
        for what, size in (beside | {"in all, beside activations": total}).items()
    ]
    return lines + (
        []
        if total < free
        else [
            "  more than is free: let fewer weights move (plan, adapter), or use bfloat16 or more GPUs"
        ]
    )


def _hparams(spec: Spec, outline: models.Model | None) -> str:
    try:
        with warnings.catch_warnings(record=True) as said:
            hparams = spec.editor_hparams(outline or spec.model)
    except BadInput as error:
        if outline is not None:
            raise
        return f"\nhyper-parameters of {spec.editor} on {spec.model}: not known before its configuration is here ({error})"
    told = [f"  {name} = {value!r}" for name, value in hparams.model_dump().items()] + [
        f"  note: {each.message}" for each in said
    ]
    return "\n".join([f"\nhyper-parameters of {spec.editor} on {spec.model}", *told])


def _needed(spec: Spec, outline: models.Model, device: str) -> dict[str, int]:
    with warnings.catch_warnings(action="ignore"):
        hparams = spec.editor_hparams(outline)
    weights = models.weights_bytes(
        outline, spec.dtype if spec.dtype != "auto" or device == "cuda" else "float32"
    )
    itemsize = weights // sum(parameter.numel() for parameter in outline.network.parameters())
    plan = plans.resolve(outline, spec.plan, hparams.layers)
    moments = [
        12 * outline.weight(layer).shape[1] ** 2 for layer in hparams.layers if _uses_moments(spec)
    ]
    found = {"weights": weights, "second moments and their factors": sum(moments)}
    if spec.adapter:
        adapted = adapters.targets(outline, plan, spec.adapter_targets)
        copies = sum(outline.network.get_submodule(name).weight.numel() for name in adapted)
        return found | {"copies of the weights that carry an adapter": 2 * itemsize * copies}
    return found | {"tuning: gradients, AdamW, a copy": 4 * moving_bytes(outline, plan, itemsize)}


def _uses_moments(spec: Spec) -> bool:
    solves = hasattr(editing.EDITORS[spec.editor], "targets")
    return solves and spec.hparams.get("moments", "corpus") == "corpus"


def _fetched(spec: Spec) -> list[str]:
    files = checkpoints.downloads(spec.model, spec.revision)
    if files is None:
        found = [
            f"  model {spec.model}: the Hub is out of reach, and the cache does not hold the whole model"
        ]
    else:
        found = [f"  {size / 1e6:10,.1f} MB  {spec.model}/{name}" for name, size in files]
    study = numbers.presets()["sources"].get(spec.task_data)
    corpus = NAMED.get(spec.corpus, spec.corpus) if _uses_moments(spec) else ""
    sets = [
        (spec.facts, "facts"),
        (study.data if study else spec.task_data, "task_data"),
        (corpus, "corpus"),
    ]
    streamed = {"corpus"} | ({"task_data"} if study and study.streaming else set())
    for source, what in sets:
        if source not in ("", "world") and not Path(source).exists():
            found.append(
                f"  dataset {source} ({what}{', streamed: only what is read of it' if what in streamed else ''})"
            )
    return found or ["  nothing"]
