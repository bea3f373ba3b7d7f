"""One experiment, from a Spec to a Run: known facts, edit, fine-tune, probe.

Notebooks call its steps one by one, or `run` at once.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from workbench import cache, deltas, editing, facts, models, positions, runs
from workbench.checkpoints import is_world
from workbench.editing.records import Numbers, Resources, warn_of_missed
from workbench.edits import Edit
from workbench.facts import BadInput, Requests
from workbench.known import Chosen, choose, known_table, with_objects  # noqa: F401
from workbench.models import Model
from workbench.registry import MEASURES, Room
from workbench.spec import Spec, arms, code_fingerprint, identify, varied  # noqa: F401
from workbench.tracking import lens
from workbench.tracking.probes import OWN, Probe, questions
from workbench.tuning import adapters, numbers, plans, protection, tasks
from workbench.tuning.finetune import UNPROTECTED, History, Protection, Settings, finetune
from workbench.tuning.tasks import Data, Task

try:
    import resource
except ImportError:  # Windows has none
    resource = None

OTHER_MODEL = ("model", "revision", "device", "dtype", "device_map", "start")  # fields that name it
KEPT = ("rome", "memit", "alphaedit")  # editors whose edits are slow, small, and kept for more runs


def load(spec: Spec) -> Model:
    """The model of an experiment."""
    return models.load(
        spec.model, spec.device, spec.dtype, spec.revision, spec.device_map, spec.start
    )


def prepare(spec: Spec, model: Model, chosen: Chosen) -> tuple[Numbers, Resources]:
    """The editor's hyper-parameters and what it prepares once per model.

    An editor that learns (MALMEN) does so on the facts set apart for it, of the world where the
    model is of the world, else of `spec.facts`; never on one whose subject is chosen (by name).
    """
    runs.progress(f"preparing {spec.editor}")
    editor = editing.EDITORS[spec.editor]
    hparams = spec.editor_hparams(model)
    lessons = None
    if editor.LEARNS:
        taken = {request.fact.subject.lower() for request in (*chosen.edited, *chosen.intrinsic)}
        pool = facts.lessons("world" if is_world(spec.model) else spec.source)
        lessons = [request for request in pool if request.fact.subject.lower() not in taken]
    return hparams, editor.prepare(model, hparams, spec.corpus, lessons, seed=spec.seed)


def make_edit(
    spec: Spec, model: Model, requests: Requests, hparams: Numbers, resources: Resources
) -> Edit:
    """The edit of one edited model."""
    return _edits(spec, model, [requests], hparams, resources)[0]


def _edits(
    spec: Spec, model: Model, groups: Sequence[Requests], hparams: Numbers, resources: Resources
) -> list[Edit]:
    """An edit a group of requests, all made together, which is faster than one by one. A run that
    differs in task or plan alone finds them in the cache, the same to the bit.
    """
    runs.progress(f"editing with {spec.editor}")
    make = partial(editing.edit_each, spec.editor, model, groups, hparams, resources, spec.seed)
    if spec.editor not in KEPT or model.is_changed():
        return make()
    about = [model.name, model.revision, model.fingerprint, str(model.dtype), model.device.type]
    about += [positions.front(model), code_fingerprint(), spec.editor, spec.seed]
    about += [hparams.model_dump_json(), resources.prefixes, cache.tensor_sum(resources.memory)]
    about += [moment.fingerprint for moment in resources.moments.values()]
    about += [[request.model_dump_json() for request in group] for group in groups]
    digest = cache.digest(about)
    folder = cache.folder("edits")
    paths = [folder / f"{digest}-{number}.safetensors" for number in range(len(groups))]
    with cache.locked(f"edits {digest}"):
        kept = [cache.kept(path, path.stem) for path in paths]
        is_new = None in kept
        if is_new:
            kept = [deltas.packed(edit) for edit in make()]
            for path, part in zip(paths, kept, strict=True):
                cache.keep(path, part, path.stem)
    edits = [deltas.unpacked(part) for part in kept]
    if not is_new:
        warn_of_missed(edits)
    return edits


def make_task(spec: Spec, model: Model, chosen: Chosen) -> Task:
    """The rows to tune on, none of which touches a chosen fact; the same for every edited model of
    the run.
    """
    avoid = (*chosen.edited, *chosen.intrinsic)
    data = spec.part(Data, source=spec.task_data, avoid=avoid)
    return tasks.TASKS[spec.task](model, data)


@dataclass
class Recorder:
    """Collects what is seen of edited models, and writes the run."""

    tables: dict[str, list[pd.DataFrame]] = field(default_factory=dict)  # of each edited model
    ended: list[str] = field(default_factory=list)  # how the tuning of each came to its end
    deltas: list[Edit] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # MB, highest so far, after each phase
    tunings: list[dict] = field(default_factory=list)
    specs: list[Spec] = field(default_factory=list)  # under which each edited model was tuned
    _adapters: tempfile.TemporaryDirectory | None = None
    _unedited: dict[tuple[str, int], Any] = field(default_factory=dict)  # for measures that compare

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

    def look(
        self,
        probe: Probe,
        step: int,
        epoch: float = 0.0,
        edited_model: int = 0,
        measures: Sequence[str] = (),
    ) -> None:
        """Ask everything now, and the registered measures of these names about the edited facts;
        `step` -1 is before the edit, 0 after it.
        """
        with self.timed("probe"):
            look = probe.look(step, epoch)
            for name in ("probes", "lens", "tokens", "positions"):
                self.add(name, getattr(look, name), edited_model)
            edited = [asked.request for asked in probe.questions if asked.group == "edited"]
            for name in measures:
                measure = MEASURES[name]
                table = measure.ask(probe.model, edited)
                if measure.compare:
                    key = name, edited_model
                    if step >= 0 and key not in self._unedited:
                        what = f"measure {name}: compares with the unedited model"
                        raise BadInput(f"{what}; ask it at step -1 too")
                    table = measure.compare(self._unedited.setdefault(key, table), table)
                if not isinstance(table, pd.DataFrame) or {"edited_model", "step"} & set(table):
                    what = f"measure {name}: give back a table without columns edited_model and"
                    raise BadInput(f"{what} step, which the run adds, not a {type(table).__name__}")
                self.add(name, table.assign(step=step), edited_model)

    def add(self, name: str, table: pd.DataFrame, edited_model: int) -> None:
        self.tables.setdefault(name, []).append(table.assign(edited_model=edited_model))

    def table(self, name: str) -> pd.DataFrame:
        """probes, lens, tokens, training, merged, or a measure's table so far, with
        `edited_model`.
        """
        table = pd.concat(self.tables[name], ignore_index=True)
        return table[["edited_model", *table.columns.drop("edited_model")]]

    def write(
        self, spec: Spec, model: Model, chosen: Chosen, out: str | Path = "", cells: str = ""
    ) -> runs.Run:
        """Write the run: into the folder that WORKBENCH_RUN names, else into out/<id>, or
        out/<id>-stopped if a person stopped it.

        Args:
            cells: whatever else determines the result, for the id.
        Raises:
            BadInput: what was done is not what the Spec says, and would be found under its id.
        """
        check_fits(self.deltas, spec, model, chosen)
        if any(tuned_under.resolved() != spec.resolved() for tuned_under in self.specs):
            what = "the tuning was done under another Spec than the one to write"
            raise BadInput(f"{what}; write it under that one")
        about = self._about(spec, model, chosen)
        tables = {name: self.table(name) for name in self.tables}
        ending = "-stopped" if "stopped" in self.ended else ""
        final = runs.place(out) / (identify(spec, cells) + ending)
        with runs.opened(final.parent, final.name) as folder:
            (folder / "deltas").mkdir(exist_ok=True)
            for number, edit in enumerate(self.deltas):
                deltas.save(edit, folder / "deltas" / f"{number}.safetensors")
            if self._adapters:
                shutil.copytree(self._adapters.name, folder / "adapters", dirs_exist_ok=True)
            runs.write(folder, about, tables)
        return runs.read(os.environ.get("WORKBENCH_RUN") or final)

    def _about(self, spec: Spec, model: Model, chosen: Chosen) -> dict:
        """What run.json says beside the tables."""
        edits: list[dict] = []
        for number, edit in enumerate(self.deltas):
            edits += [{"edited_model": number} | outcome for outcome in edit.outcomes]
        packages = ("torch", "transformers", "datasets", "accelerate", "peft", "pandas")
        about: dict = {"spec": spec.model_dump(mode="json"), "revision": model.revision}
        about["start"] = positions.front_text(model)
        about |= {"commit": _commit(), "python": platform.python_version()}
        about["packages"] = {name: version(name) for name in packages}
        about["true"] = {request.fact.id: request.fact.object for request in chosen.edited}
        about["hparams"] = [edit.parts[0].get("hparams") for edit in self.deltas][:1]
        about["layers"] = sorted({layer for edit in self.deltas for layer in edit.layers})
        about["measures"] = [name for name in self.tables if name not in runs.OF_EVERY_RUN]
        return about | {
            "weights": model.fingerprint,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "known": chosen.known.to_dict("records"),
            "harmless": chosen.harmless,
            "ended": self.ended,
            "tuning": _in_common(self.tunings),
            "edits": edits,
            "seconds": self.seconds,
            "peak_memory_mb": _peak_memory_mb(),
            "peak_memory_mb_after": self.memory,
        }


def check_fits(edits: Sequence[Edit], spec: Spec, model: Model, chosen: Chosen) -> None:
    """BadInput if the edits were made with other numbers than the Spec's, or of other facts."""
    with warnings.catch_warnings(action="ignore"):  # which layers are proposed was said before
        numbers = spec.editor_hparams(model).model_dump(mode="json")
    parts = [part for edit in edits for part in edit.parts]
    for part in parts:
        made = {"editor": part.get("editor", "no editor")} | part.get("hparams", {})
        for name, value in ({"editor": spec.editor} | numbers).items():
            if made.get(name) != value:
                how = f"an edit was made with {name}={made.get(name)!r}"
                advice = "a run is filed by what was done; give it the same"
                raise BadInput(f"{how}, the Spec says {value!r}; {advice}")
    requests = [request for part in parts for request in part["requests"]]
    done = sorted((request["fact"]["id"], request["target"]) for request in requests)
    if done != sorted((request.fact.id, request.target) for request in chosen.edited):
        what = "the edits are of other facts than the chosen ones, or of one twice"
        raise BadInput(f"{what}; edit chosen.edited, or choose again")


def tune_and_probe(
    spec: Spec,
    model: Model,
    edit: Edit,
    task: Task,
    probe: Probe,
    recorder: Recorder,
    edited_model: int = 0,
    into: Model | None = None,
) -> History:
    """Apply the edit, fine-tune, look at every evaluation; afterwards the model is bit for bit as
    before.

    Args:
        into: the same model, loaded once more, which takes the weights as they are at the end.
    Raises:
        BadInput: the Spec's lens is not the probe's; `into` cannot hold the edit.
    """
    if into and not isinstance(edit, deltas.WeightDelta):
        what = f"{type(edit).__name__}: is no change of weights, so no other model can take it"
        raise BadInput(f"{what}; leave `into` out, or choose another editor")
    if probe.fitted.kind != spec.lens:
        what = f"the probe looks through the {probe.fitted.kind} lens, the Spec says {spec.lens!r}"
        raise BadInput(f"{what}; give it fitted=lens.fitted(model, spec.lens, spec.corpus)")
    plan = plans.resolve(model, spec.plan, edit.layers)
    recorder.deltas.append(edit)
    recorder.specs.append(spec)

    def look(step: int, epoch: float) -> None:
        recorder.look(probe, step, epoch, edited_model, spec.measures)

    with (
        recorder.timed("tune and probe"),
        deltas.preserved(model.network, () if spec.adapter else plan.parameters),
        deltas.applied(model, edit),
        _adapted(spec, model, plan) as adapter,
    ):
        moving = adapter.plan if adapter else plan
        held = make_protection(spec, model, moving, probe)
        about = _about_tuning(model, task, moving, spec.batch_size)
        recorder.tunings.append(about | {"protect_weight": held.weight})
        history = finetune(model, task, moving, spec.part(Settings), look, protection=held)
        if adapter:
            recorder.keep(adapter, edited_model)
            last = history.log.iloc[-1]
            with adapter.merged():
                merged = probe.look(int(last.step), float(last.epoch)).probes
            recorder.add("merged", merged, edited_model)
        if into:
            with adapter.merged() if adapter else nullcontext():
                _copy_weights(model, into)
    recorder.add("training", history.log, edited_model)
    recorder.ended.append(history.ended)
    for name in spec.measures:  # what the unedited model said may be large
        recorder._unedited.pop((name, edited_model), None)
    return history


def make_protection(spec: Spec, model: Model, moving: plans.Plan, probe: Probe) -> Protection:
    """The protection, if the Spec names one, of what the model, which holds the edit, says now. It
    sees no wording that judges, and nothing of the facts that are only watched.
    """
    if not spec.protect:
        return UNPROTECTED
    edited = [one.request for one in probe.questions if one.group == "edited"]
    measured = [one.request for one in probe.questions if one.group in OWN]
    about: dict[str, Any] = {"weight": spec.protect_weight, "seed": spec.seed}
    about |= {"edited": edited, "others": protection.others(model, measured)}
    held = protection.Held(model=model, moving=moving.parameters, **about)
    made = numbers.PROTECTIONS[spec.protect](held)
    if not isinstance(made, Protection):
        what = f"protection {spec.protect}: gave back {type(made).__name__}"
        raise BadInput(f"{what}; give back a workbench.tuning.finetune.Protection")
    return made


def _copy_weights(model: Model, into: Model) -> None:
    """Under an adapter the weights of a module stand a name deeper."""
    weights = model.network.state_dict()
    named = {name.replace(".base_layer.", "."): values for name, values in weights.items()}
    into.network.load_state_dict({name: named[name] for name in into.network.state_dict()})
    vars(into).pop("fingerprint", None)


def _about_tuning(model: Model, task: Task, moving: plans.Plan, batch_size: int) -> dict:
    """What run.json says of the tuning."""
    trainable = moving.table(model).trainable
    tokens = sum(map(len, task.train["input_ids"]))
    return {
        "task": task.name,
        "metric": task.metric,
        "train_rows": len(task.train),
        "valid_rows": len(task.valid),
        "dropped": task.dropped,
        "chat_date": tasks.CHAT_DATE.date().isoformat(),
        "moving": int(trainable.sum()),
        "moving_by_part": {str(part): int(count) for part, count in trainable.items() if count},
        "tokens_per_step": batch_size * tokens / len(task.train),
    }


def _in_common(tunings: list[dict]) -> dict:
    """What is alike of all edited models; of what is not, a list of theirs."""
    first = tunings[0] if tunings else {}
    alike = {name: all(one[name] == first[name] for one in tunings) for name in first}
    return {name: first[name] if alike[name] else [one[name] for one in tunings] for name in first}


def _adapted(spec: Spec, model: Model, plan: plans.Plan) -> AbstractContextManager:
    """The adapter of the Spec, on the model for the length of the `with`; None if it names none."""
    if not spec.adapter:
        return nullcontext()
    numbers = {name: getattr(spec, f"adapter_{name}") for name in ("rank", "alpha", "dropout")}
    named = spec.adapter_targets
    return adapters.attached(model, plan, spec.adapter, **numbers, named=named, seed=spec.seed)


def run(
    spec: Spec, model: Model | None = None, out: str | Path = "", again: bool = False
) -> runs.Run:
    """The whole experiment: one run of n_edited / edits_per_model edited copies of the base model.
    All edits are made first, then one copy after another is tuned.

    A finished run of the same experiment is returned at once unless `again`. Under `accelerate
    launch` only the first process writes into `out`.
    """
    return _followed(spec.resolved(), model, out, again)


def _followed(
    spec: Spec,
    model: Model | None,
    out: str | Path,
    again: bool,
    edit: Edit | None = None,
    requests: Requests = (),
    cells: str = "",
) -> runs.Run:
    """The run of a resolved Spec, made or found; of facts that were edited before, if given.

    Raises:
        KeyboardInterrupt: a person stopped it.
    """
    if model:
        model.check_unchanged("a study")
    folder = runs.place(out) / identify(spec, cells)
    if not (again or os.environ.get("WORKBENCH_RUN")) and runs.finished(folder):
        return runs.read(folder)
    spec.blocks()  # refuses layers and a plan that do not go together, before hours are spent
    recorder = Recorder()
    with recorder.timed("load"):
        model = model or load(spec)
        model.fingerprint  # noqa: B018 (taken while the weights are the model's own)
    with recorder.timed("choose facts"):
        chosen = choose(spec, model, requests)
    if edit:
        check_fits([edit], spec, model, chosen)
    with recorder.timed("make task"):
        task = make_task(spec, model, chosen)
    with recorder.timed("fit lens"):
        fitted = lens.fitted(model, spec.lens, spec.corpus)
    size = len(requests) or spec.edits_per_model
    groups = facts.in_parts(chosen.edited, size)
    edits = [edit]
    if edit is None:
        with recorder.timed("prepare editor"):
            hparams, resources = prepare(spec, model, chosen)
        with recorder.timed("edit"):
            edits = _edits(spec, model, groups, hparams, resources)
    for number, group in enumerate(tqdm(groups, desc="edited models", disable=None)):
        probe = Probe(model, questions(group, chosen.intrinsic), chosen.related, fitted)
        recorder.look(probe, -1, edited_model=number, measures=spec.measures)
        history = tune_and_probe(spec, model, edits[number], task, probe, recorder, number)
        if history.ended == "stopped":
            raise KeyboardInterrupt
    with tempfile.TemporaryDirectory() as elsewhere:  # of several processes the first writes
        out = elsewhere if int(os.environ.get("RANK", "0")) else out
        return recorder.write(spec, model, chosen, out, cells)


def of_edit(
    model: Model,
    edit: Edit,
    requests: Requests,
    out: str | Path = "",
    again: bool = False,
    **fields,
) -> runs.Run:
    """Tune one copy of a model that holds an edit made before, look, and write the run.

    It is filed under what was done: the editor and its numbers are the edit's own.

    Args:
        requests: the facts of the edit, each once.
        fields: further ones of Spec, e.g. task, plan, max_steps; facts, the source from which the
            watched facts come too, if it is not the world.
    Raises:
        BadInput: the facts are not of that source; the edit has no record.
    """
    made = edit.parts[0]
    if "editor" not in made:
        raise BadInput("the edit has no record of how it was made; make it with an editor")
    about: dict = {"model": model.name, "revision": model.revision, "start": model.start}
    about |= {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    about |= {"editor": made["editor"], "hparams": dict(made["hparams"])}
    about["paraphrases"] = 1 + max((len(one.paraphrases) for one in requests), default=0)
    about |= dict.fromkeys(("n_edited", "edits_per_model"), len(requests))
    if twice := sorted({*about, "layers", "variant"} & set(fields)):
        raise BadInput(f"{', '.join(twice)}: model, edit and requests say it; leave it out")
    spec = Spec(**about | fields).resolved()
    source = {request.fact.id for request in facts.read(spec.source)}
    if spec.n_intrinsic and not source & {request.fact.id for request in requests}:
        what = f"no fact of the edit is of {spec.facts!r}, from which the watched ones would come"
        raise BadInput(f"{what}; name their source in facts, or n_intrinsic=0")
    done = [model.fingerprint, cache.tensor_sum(edit.tensors()), dict(edit.record)]
    done += [request.model_dump_json() for request in requests]
    cells = json.dumps(done, sort_keys=True, default=str)
    return _followed(spec, model, out, again, edit, list(requests), cells)


def vary(
    spec: Spec, vary: str, values: Sequence, out: str | Path = "", model: Model | None = None
) -> list[runs.Run]:
    """One run for each value of one field, and a folder whose run.json names them. Give the Spec as
    it is, not resolved: an adapter or another task brings its own usual numbers.

    `model`, or the one that is loaded, serves all runs, unless the field names another.
    """
    specs = varied(spec, vary, values)
    for one in specs:
        one.blocks()  # refuses what does not go together, of the last arm too
    whole = os.environ.get("WORKBENCH_RUN")  # of the notebook that varies; members lie beside it
    out = Path(whole).parent if whole else runs.place(out)
    again = bool(os.environ.get("WORKBENCH_AGAIN"))
    with patch.dict(os.environ, WORKBENCH_RUN=""):
        model = None if vary in OTHER_MODEL else model or load(spec)
        done = [run(one, model, out, again) for one in tqdm(specs, desc=vary, disable=None)]
    members = [member.folder.name for member in done]
    about: dict = {"spec": spec.model_dump(mode="json"), "vary": vary}
    about |= {"values": list(values), "members": members}
    name = f"vary-{vary}-{cache.digest(members)[:10]}"
    with runs.opened(out, name) as folder:
        runs.write(folder, about, {})
    return done


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; elsewhere kibibytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def call(of: Any, *edit_and_requests, **fields) -> runs.Run:
    """`wb.study(spec)`, see `run`; `wb.study(model, edit, requests, task=..., plan=...)`, see
    `of_edit`.

    Raises:
        BadInput: neither a Spec nor a model.
    """
    if isinstance(of, Spec):
        return run(of, *edit_and_requests, **fields)
    if isinstance(of, Model):
        return of_edit(of, *edit_and_requests, **fields)
    what = f"study: a {type(of).__name__} is neither a Spec nor a model"
    raise BadInput(f"{what}; give wb.Spec(...), or a model of wb.load")


sys.modules[__name__].__class__ = Room
