"""One experiment, from a Spec to a Run: known facts, edit, fine-tune, probe.

Notebooks call its steps one by one, or `run` at once.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from workbench import deltas, editing, facts, models, positions, runs
from workbench.checkpoints import WORLD_MODELS
from workbench.deltas import WeightDelta
from workbench.editing.records import Numbers, Resources, outcomes
from workbench.facts import BadInput, EditRequest
from workbench.known import Chosen, choose, known_table, with_objects
from workbench.models import Model
from workbench.spec import Spec, arms, identify, varied
from workbench.tracking.probes import Look, Probe, questions
from workbench.tuning import adapters, plans, tasks
from workbench.tuning.finetune import History, finetune
from workbench.tuning.tasks import Data, Task

try:
    import resource
except ImportError:  # Windows has none
    resource = None

__all__ = [
    "Chosen",
    "Recorder",
    "Spec",
    "arms",
    "choose",
    "identify",
    "known_table",
    "make_edit",
    "make_edits",
    "make_task",
    "prepare",
    "run",
    "tune_and_probe",
    "vary",
    "with_objects",
]


def prepare(spec: Spec, model: Model, chosen: Chosen) -> tuple[Numbers, Resources]:
    """The editor's hyper-parameters and what it prepares once per model.

    An editor that learns (MALMEN) does so on the facts set apart for it, of the world where the
    model is of the world, else of `spec.facts`; never on one whose subject is chosen (by name).
    """
    runs.progress(f"preparing {spec.editor}")
    hparams, learnt_from = spec.editor_hparams(model), None
    if hasattr(editing.EDITORS[spec.editor], "LEARNS"):
        taken = {request.fact.subject.lower() for request in (*chosen.edited, *chosen.intrinsic)}
        own = facts.read("world" if spec.model in WORLD_MODELS else spec.facts)
        own = [request for request in own if facts.is_learnt_from(request.fact)]
        learnt_from = [request for request in own if request.fact.subject.lower() not in taken]
    return hparams, editing.EDITORS[spec.editor].prepare(
        model, hparams, spec.corpus, learnt_from, seed=spec.seed
    )


def make_edit(
    spec: Spec,
    model: Model,
    requests: Sequence[EditRequest],
    hparams: Numbers,
    resources: Resources,
) -> WeightDelta:
    """The delta of one edited model."""
    return make_edits(spec, model, [requests], hparams, resources)[0]


def make_edits(
    spec: Spec,
    model: Model,
    groups: Sequence[Sequence[EditRequest]],
    hparams: Numbers,
    resources: Resources,
) -> list[WeightDelta]:
    """The delta of each edited model; solved together, which is faster than one by one."""
    runs.progress(f"editing with {spec.editor}")
    return editing.edit_each(spec.editor, model, groups, hparams, resources, seed=spec.seed)


def make_task(spec: Spec, model: Model, chosen: Chosen) -> Task:
    """The rows to tune on, none of which touches a chosen fact; the same for every edited model of
    the run.
    """
    data = Data(
        n_train=spec.n_train,
        n_valid=spec.n_valid,
        seed=spec.seed,
        source=spec.task_data,
        columns=spec.columns,
        avoid=(*chosen.edited, *chosen.intrinsic),
        validation=spec.validation,
        loss_on=spec.loss_on,
    )
    return tasks.named(spec.task)(model, data)


@dataclass
class Recorder:
    """Collects looks and histories of edited models, and writes the run.

    `merged`: of a run with an adapter, the last look again with the adapter written into the
    weights.
    """

    looks: list[tuple[int, Look]] = field(default_factory=list)
    merged: list[tuple[int, Look]] = field(default_factory=list)
    histories: list[tuple[int, History]] = field(default_factory=list)
    deltas: list[WeightDelta] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(
        default_factory=dict
    )  # MB, the highest so far at the end of each phase
    tuning: dict = field(default_factory=dict)
    specs: list[Spec] = field(default_factory=list)  # under which each edited model was tuned
    _adapters: tempfile.TemporaryDirectory | None = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            self.memory[phase] = _peak_memory_mb()

    def keep(self, adapter: adapters.Adapter, edited_model: int) -> None:
        self._adapters = self._adapters or tempfile.TemporaryDirectory()
        adapter.save(Path(self._adapters.name) / str(edited_model))

    def table(self, name: str) -> pd.DataFrame:
        """probes, lens, tokens, training or merged so far, with `edited_model`."""
        if name == "training":
            parts = [history.log.assign(edited_model=number) for number, history in self.histories]
        elif name == "merged":
            parts = [look.probes.assign(edited_model=number) for number, look in self.merged]
        else:
            parts = [getattr(look, name).assign(edited_model=number) for number, look in self.looks]
        table = pd.concat(parts, ignore_index=True)
        return table[["edited_model", *table.columns.drop("edited_model")]]

    def write(self, spec: Spec, model: Model, chosen: Chosen, out: str | Path = "") -> runs.Run:
        """Write the run: into the folder that WORKBENCH_RUN names, else into out/<id>, or
        out/<id>-stopped if a person stopped it.

        Raises:
            BadInput: what was done is not what the Spec says, and would be found under its id.
        """
        self._check_fits(spec, model, chosen)
        ended = [history.ended for _, history in self.histories]
        about = {
            "spec": spec.model_dump(mode="json"),
            "revision": model.revision,
            "start": positions.front_text(model),
            "weights": model.fingerprint,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "known": chosen.known.to_dict("records"),
            "harmless": chosen.harmless,
            "ended": ended,
            "tuning": self.tuning,
            "edits": [
                {"edited_model": number} | outcome
                for number, delta in enumerate(self.deltas)
                for outcome in outcomes([delta])
            ],
            "hparams": [delta.parts[0].get("hparams") for delta in self.deltas][:1],
            "layers": sorted({layer for delta in self.deltas for layer in delta.layers}),
            "seconds": self.seconds,
            "peak_memory_mb": _peak_memory_mb(),
            "peak_memory_mb_after": self.memory,
            "packages": {
                name: version(name)
                for name in ("torch", "transformers", "datasets", "accelerate", "peft", "pandas")
            },
            "python": platform.python_version(),
            "commit": _commit(),
        }
        tables = {name: self.table(name) for name in runs.TABLES} | (
            {"merged": self.table("merged")} if self.merged else {}
        )
        if folder := os.environ.get("WORKBENCH_RUN"):
            return self._write(Path(folder), about, tables)
        out = runs.place(out)
        run_id = identify(spec) + ("-stopped" if "stopped" in ended else "")
        with runs.new_folder(out, run_id) as partial:
            self._write(partial, about, tables)
        return runs.read(out / run_id)

    def _check_fits(self, spec: Spec, model: Model, chosen: Chosen) -> None:
        with warnings.catch_warnings(
            action="ignore"
        ):  # that layers are proposed from the depth was said when they were used
            expected = spec.editor_hparams(model).model_dump(mode="json")
        edits = [part for delta in self.deltas for part in delta.parts]
        for edit in edits:
            editor, hparams = edit.get("editor", "no editor"), edit.get("hparams", {})
            if editor != spec.editor:
                raise BadInput(
                    f"an edit is by {editor}, the Spec says {spec.editor}: a run is filed by what was done; name it in the Spec"
                )
            if other := [name for name in expected if hparams.get(name) != expected[name]]:
                raise BadInput(
                    f"an edit was made with {other[0]}={hparams.get(other[0])!r}, the Spec says {expected[other[0]]!r}; give it the same"
                )
        done = {
            (request["fact"]["id"], request["target"])
            for edit in edits
            for request in edit["requests"]
        }
        if done != {(request.fact.id, request.target) for request in chosen.edited}:
            raise BadInput(
                "the edits are of other facts than the chosen ones; edit chosen.edited, or choose again"
            )
        if any(one.resolved() != spec.resolved() for one in self.specs):
            raise BadInput(
                "the tuning was done under another Spec than the one to write; write it under that one"
            )

    def _write(self, folder: Path, about: dict, tables: dict) -> runs.Run:
        (folder / "deltas").mkdir(exist_ok=True)
        for number, delta in enumerate(self.deltas):
            deltas.save(delta, folder / "deltas" / f"{number}.safetensors")
        if self._adapters:
            shutil.copytree(self._adapters.name, folder / "adapters", dirs_exist_ok=True)
        return runs.write(folder, about, tables)


def tune_and_probe(
    spec: Spec,
    model: Model,
    delta: WeightDelta,
    task: Task,
    probe: Probe,
    recorder: Recorder,
    edited_model: int = 0,
) -> History:
    """Apply the edit, fine-tune, look at every evaluation; afterwards the model is bit for bit as
    before.
    """
    plan = plans.resolve(model, spec.plan, delta.layers)
    recorder.deltas.append(delta)
    recorder.specs.append(spec)

    def look(step: int, epoch: float) -> None:
        start = time.perf_counter()
        recorder.looks.append((edited_model, probe.look(step, epoch)))
        recorder.seconds["probe"] = recorder.seconds.get("probe", 0.0) + time.perf_counter() - start

    with (
        recorder.timed("tune and probe"),
        deltas.preserved(model.network, () if spec.adapter else plan.parameters),
        deltas.applied(model, delta),
        _adapted(spec, model, plan) as adapter,
    ):
        moving = adapter.plan if adapter else plan
        recorder.tuning = {
            "task": task.name,
            "metric": task.metric,
            "train_rows": len(task.train),
            "valid_rows": len(task.valid),
            "dropped": task.dropped,
            "chat_date": tasks.CHAT_DATE.date().isoformat(),
            "moving": int(moving.table(model).trainable.sum()),
            "moving_by_part": {
                str(part): int(count)
                for part, count in moving.table(model).trainable.items()
                if count
            },
            "tokens_per_step": spec.batch_size
            * sum(map(len, task.train["input_ids"]))
            / len(task.train),
        }
        history = finetune(model, task, moving, spec.settings(), look)
        if adapter:
            recorder.keep(adapter, edited_model)
            with adapter.merged():
                recorder.merged.append(
                    (
                        edited_model,
                        probe.look(
                            int(history.log.step.iloc[-1]), float(history.log.epoch.iloc[-1])
                        ),
                    )
                )
    recorder.histories.append((edited_model, history))
    return history


@contextmanager
def _adapted(spec: Spec, model: Model, plan: plans.Plan) -> Iterator[adapters.Adapter | None]:
    if not spec.adapter:
        yield None
        return
    numbers = {
        "rank": spec.adapter_rank,
        "alpha": spec.adapter_alpha,
        "dropout": spec.adapter_dropout,
    }
    with adapters.attached(
        model, plan, spec.adapter, **numbers, named=spec.adapter_targets, seed=spec.seed
    ) as adapter:
        yield adapter


def run(
    spec: Spec, model: Model | None = None, out: str | Path = "", again: bool = False
) -> runs.Run:
    """The whole experiment: one run of n_edited / edits_per_model edited copies of the base model.
    All edits are made first, then one copy after another is tuned.

    A finished run of the same experiment is returned at once unless `again`. Under `accelerate
    launch` only the first process writes into `out`.
    """
    spec = spec.resolved()
    folder = runs.place(out) / identify(spec)
    if not again and "WORKBENCH_RUN" not in os.environ and runs.finished(folder):
        return runs.read(folder)
    recorder = Recorder()
    with recorder.timed("load"):
        model = model or models.load(
            spec.model, spec.device, spec.dtype, spec.revision, spec.device_map, spec.start
        )
        model.fingerprint  # noqa: B018 (taken while the weights are the model's own)
    with recorder.timed("choose facts"):
        chosen = choose(spec, model)
    with recorder.timed("prepare editor"):
        hparams, resources = prepare(spec, model, chosen)
    with recorder.timed("make task"):
        task = make_task(spec, model, chosen)
    groups = [
        chosen.edited[start : start + spec.edits_per_model]
        for start in range(0, len(chosen.edited), spec.edits_per_model)
    ]
    with recorder.timed("edit"):
        edits = make_edits(spec, model, groups, hparams, resources)
    for number, requests in enumerate(tqdm(groups, desc="edited models", disable=None)):
        probe = Probe(model, questions(requests, chosen.intrinsic), chosen.related)
        with recorder.timed("probe"):
            recorder.looks.append((number, probe.look(-1)))
        if (
            tune_and_probe(spec, model, edits[number], task, probe, recorder, number).ended
            == "stopped"
        ):
            raise KeyboardInterrupt
    if int(os.environ.get("RANK", "0")):
        with tempfile.TemporaryDirectory() as folder:
            return recorder.write(spec, model, chosen, folder)
    return recorder.write(spec, model, chosen, out)


def vary(
    spec: Spec, vary: str, values: Sequence, out: str | Path = "", model: Model | None = None
) -> list[runs.Run]:
    """One run for each value of one field, and a folder whose run.json names them. Give the Spec as
    it is, not resolved: an adapter or another task brings its own usual numbers.

    `model`, or the one that is loaded, serves all runs, unless the field is one that names another
    (model, revision, device, dtype).
    """
    specs = varied(spec, vary, values)
    whole = os.environ.pop(
        "WORKBENCH_RUN", None
    )  # of the notebook that varies; its members lie beside it
    try:
        out = Path(whole).parent if whole else runs.place(out)
        reload = vary in ("model", "revision", "device", "dtype", "device_map", "start")
        model = (
            None
            if reload
            else model
            or models.load(
                spec.model, spec.device, spec.dtype, spec.revision, spec.device_map, spec.start
            )
        )
        done = [
            run(one, model, out, again=bool(os.environ.get("WORKBENCH_AGAIN")))
            for one in tqdm(specs, desc=vary, disable=None)
        ]
    finally:
        if whole:
            os.environ["WORKBENCH_RUN"] = whole
    members = [each.folder.name for each in done]
    about = {
        "spec": spec.model_dump(mode="json"),
        "vary": vary,
        "values": list(values),
        "members": members,
    }
    if whole:
        runs.write(Path(whole), about, {})
    else:
        name = f"vary-{vary}-{runs.short_hash(members)}"
        with runs.new_folder(out, name) as partial:
            runs.write(partial, about, {})
    return done


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; elsewhere kibibytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
