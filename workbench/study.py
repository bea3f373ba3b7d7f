"""One experiment, from a Spec to a Run: known facts, edit, fine-tune, probe. Notebooks call its steps one by one, or `run` at once."""

import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from tqdm.auto import tqdm

from workbench import deltas, editing, facts, models, runs
from workbench.deltas import WeightDelta
from workbench.editing import Numbers, Resources
from workbench.facts import BadInput, EditRequest, Record
from workbench.models import Model
from workbench.tracking.probes import Look, Probe, questions
from workbench.tracking.retention import measure_prompts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import History, finetune

MARGIN = 0.1  # p of the true token over the second; source: arXiv 2507.14198


class Spec(Record):
    """A whole experiment. Numbers of 0 and empty strings mean the preset's. The field names are the notebooks' parameters."""

    model: str = "world-gpt2"  # world-gpt2, world-llama, a folder or a Hub id
    revision: str = ""  # "early" = a world model in the middle of learning; or a Hub revision
    facts: str = "world"  # world, a file or a Hub dataset id
    fact: str = ""  # one fact's id; "" = a sample
    subject: str = ""  # a typed fact: subject, prompt with one {}, object, target
    prompt: str = ""
    object: str = ""
    target: str = ""
    editor: str = "rome"
    variant: Literal["", "published", "paper", "reference"] = ""  # of the editor's preset
    hparams: dict = Field(default_factory=dict)  # fields of the editor's HParams to change
    layers: tuple[int, ...] = ()  # edited blocks
    n_edited: int = Field(10, ge=1)
    n_intrinsic: int = Field(20, ge=0)
    edits_per_model: int = Field(10, ge=1)
    split_rule: Literal["matched", "paper"] = "matched"  # same relations in both groups | no shared subject, relation, object
    paraphrases: int = Field(1, ge=1)  # statements an edit sees, its prompt included
    paraphrase_source: Literal["templates", "file"] = "templates"
    task: str = "text"
    task_data: str = ""  # "" = the embedded world's
    columns: dict = Field(default_factory=dict)
    n_train: int = Field(0, ge=0)  # rows
    n_valid: int = Field(0, ge=0)  # rows
    plan: str = "all"
    adapter: Literal["", "lora", "dora"] = ""
    adapter_rank: int = Field(0, ge=0)
    adapter_alpha: float = Field(0, ge=0)
    adapter_dropout: float = Field(0, ge=0, lt=1)
    max_steps: int = Field(0, ge=0)  # optimiser steps
    eval_every: int = Field(0, ge=0)  # steps
    batch_size: int = Field(0, ge=0)  # rows
    learning_rate: float = Field(0, ge=0)
    threshold: float = 0.0  # validation metric that ends the tuning
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "auto"

    def resolved(self) -> "Spec":
        """The same experiment with the task's usual numbers in the place of zeros; names are checked, nothing heavy is loaded."""
        tasks.named(self.task)
        editing.editor_named(self.editor)
        if self.adapter:
            raise BadInput(f"adapter={self.adapter!r}: this version has none; leave it empty")
        usual = tasks.NUMBERS[self.task]
        filled = {name: getattr(self, name) or getattr(usual, name) for name in type(usual).__dataclass_fields__}
        return self.model_copy(update=filled)

    def editor_hparams(self, model: Model) -> Numbers:
        """The editor's hyper-parameters: the preset for the model, changed by `hparams` and `layers`."""
        base = editing.preset(self.editor, model, variant=self.variant)
        changes = dict(self.hparams) | ({"layers": list(self.layers)} if self.layers else {})
        hparams = type(base)(**(base.model_dump() | changes))
        model.check_layers(hparams.layers)
        return hparams


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The facts of an experiment, and the data table: how sure the unedited model is of them.

    `known`: one row a group: n, candidates known, mean p(true), mean p(second).
    """

    edited: list[EditRequest]
    intrinsic: list[EditRequest]
    known: pd.DataFrame
    related: dict[str, tuple[str, ...]]


def choose(spec: Spec, model: Model, margin: float = MARGIN) -> Chosen:
    """Edited and intrinsic facts, both known to the unedited model: the true token on top by `margin`.

    The choice depends on the seed, the numbers and the split rule, never on editor or plan. A fact named or typed is edited even if
    the model does not know it; the data table then says so.
    """
    requests = facts.read(spec.facts)
    if not requests:
        raise BadInput(f"facts {spec.facts!r}: holds none")
    related = facts.objects_of(requests)
    named = [_typed(spec)] if spec.subject or spec.prompt or spec.target else []
    if spec.fact and not named:
        named = [request for request in requests if request.fact.id == spec.fact]
        if not named:
            raise BadInput(f"fact {spec.fact!r}: no such id in {spec.facts}; an id is e.g. {requests[0].fact.id!r}")
    pool = [request for request in requests if request.fact.split in ("", "study")]
    random.Random(f"choice {spec.seed}").shuffle(pool)
    n_edited = 0 if named else spec.n_edited
    scores, known = _known(model, pool, margin, wanted=4 * (n_edited + spec.n_intrinsic) + 40)
    edited, intrinsic = _split(named, known, n_edited, spec.n_intrinsic, spec.split_rule)
    edited = [facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source) for request in edited]
    if named:
        scores = pd.concat([scores, known_table(model, named)], ignore_index=True)
    rows = []
    for group, members in (("edited", edited), ("intrinsic", intrinsic)):
        part = scores[scores.fact_id.isin([request.fact.id for request in members])].drop_duplicates("fact_id")
        rows.append({"group": group, "n": len(members), "known": int(part.known.sum()), "p_true": part.p.mean(), "p_second": part.p_second.mean()})
    table = pd.DataFrame(rows).assign(asked=len(scores), known_of_asked=int(scores.known.sum()))
    return Chosen(edited=edited, intrinsic=intrinsic, known=table, related=related)


def _typed(spec: Spec) -> EditRequest:
    for name in ("subject", "prompt", "object", "target"):
        if not getattr(spec, name).strip():
            raise BadInput(f"{name} is empty: a typed fact needs subject, prompt (with one {{}}), object and target")
    fact = facts.Fact(id="typed", subject=spec.subject, prompt=spec.prompt, object=spec.object)
    return EditRequest(fact=fact, target=spec.target)


def known_table(model: Model, requests: Sequence[EditRequest], margin: float = MARGIN) -> pd.DataFrame:
    table = measure_prompts(model, [request.fact.question for request in requests], [request.fact.object for request in requests])
    return pd.DataFrame(
        {
            "fact_id": [request.fact.id for request in requests],
            "known": table.top_is_expected & (table.margin >= margin),
            "p": table.p,
            "p_second": table.p_second,
        }
    )


def _known(model: Model, pool: Sequence[EditRequest], margin: float, wanted: int) -> tuple[pd.DataFrame, list[EditRequest]]:
    """Ask the pool in its order until enough known facts are found."""
    parts: list[pd.DataFrame] = []
    known: list[EditRequest] = []
    for start in range(0, len(pool), 256):
        part = pool[start : start + 256]
        parts.append(known_table(model, part, margin))
        known += [request for request, good in zip(part, parts[-1].known, strict=True) if good]
        if len(known) >= wanted:
            break
    return pd.concat(parts, ignore_index=True), known


def _split(named: list[EditRequest], known: list[EditRequest], n_edited: int, n_intrinsic: int, rule: str) -> tuple[list, list]:
    """Take edited and intrinsic facts from the known ones in their order.

    "matched": both groups draw on the same relations, no subject twice. "paper": no two facts of different groups share a subject,
    relation or object.
    """
    edited, taken = list(named), {request.fact.subject for request in named}
    for request in known:
        if len(edited) - len(named) == n_edited:
            break
        if request.fact.subject not in taken:
            edited.append(request)
            taken.add(request.fact.subject)
    relations = {request.fact.relation for request in edited}
    objects = {thing for request in edited for thing in (request.fact.object, request.target)}

    def fits(request: EditRequest) -> bool:
        if request.fact.subject in taken:
            return False
        if rule == "matched":
            return bool(named) or request.fact.relation in relations
        return request.fact.relation not in relations and request.fact.object not in objects

    intrinsic = []
    for request in known:
        if len(intrinsic) < n_intrinsic and fits(request):
            intrinsic.append(request)
            taken.add(request.fact.subject)
    if len(edited) - len(named) < n_edited or len(intrinsic) < n_intrinsic:
        raise BadInput(
            f"the model knows too few facts: {len(edited)} edited of {n_edited} and {len(intrinsic)} intrinsic of {n_intrinsic} by "
            f"split_rule={rule!r}; lower n_edited or n_intrinsic"
        )
    return edited, intrinsic


def prepare(spec: Spec, model: Model) -> tuple[Numbers, Resources]:
    """The editor's hyper-parameters and what it prepares once per model."""
    hparams = spec.editor_hparams(model)
    return hparams, editing.EDITORS[spec.editor].prepare(model, hparams, seed=spec.seed)


def make_edit(spec: Spec, model: Model, requests: Sequence[EditRequest], hparams: Numbers, resources: Resources) -> WeightDelta:
    """The delta of one edited model."""
    return editing.EDITORS[spec.editor].edit(model, requests, hparams, resources, seed=spec.seed)


@dataclass
class Recorder:
    """Collects looks and histories of edited models, and writes the run."""

    looks: list[tuple[int, Look]] = field(default_factory=list)
    histories: list[tuple[int, History]] = field(default_factory=list)
    deltas: list[WeightDelta] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def table(self, name: str) -> pd.DataFrame:
        """probes, lens or tokens so far, with `edited_model`; or training."""
        if name == "training":
            parts = [history.log.assign(edited_model=number) for number, history in self.histories]
        else:
            parts = [getattr(look, name).assign(edited_model=number) for number, look in self.looks]
        table = pd.concat(parts, ignore_index=True)
        return table[["edited_model", *table.columns.drop("edited_model")]]

    def write(self, spec: Spec, model: Model, chosen: Chosen, out: str | Path = "runs") -> runs.Run:
        """Write the run: into the folder that WORKBENCH_RUN names, else into out/<id>."""
        about = {
            "spec": spec.model_dump(mode="json"),
            "weights": model.fingerprint,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "known": chosen.known.to_dict("records"),
            "ended": [history.ended for _, history in self.histories],
            "hparams": [delta.record.get("hparams") for delta in self.deltas][:1],
            "seconds": self.seconds,
            "peak_memory_mb": _peak_memory_mb(),
            "packages": {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "peft", "pandas")},
            "python": platform.python_version(),
            "commit": _commit(),
        }
        tables = {name: self.table(name) for name in runs.TABLES}
        if folder := os.environ.get("WORKBENCH_RUN"):
            return self._write(Path(folder), about, tables)
        run_id = identify(spec)
        with runs.new_folder(out, run_id) as partial:
            self._write(partial, about, tables)
        return runs.read(Path(out) / run_id)

    def _write(self, folder: Path, about: dict, tables: dict) -> runs.Run:
        (folder / "deltas").mkdir(exist_ok=True)
        for number, delta in enumerate(self.deltas):
            deltas.save(delta, folder / "deltas" / f"{number}.safetensors")
        return runs.write(folder, about, tables)


def tune_and_probe(spec: Spec, model: Model, delta: WeightDelta, probe: Probe, recorder: Recorder, edited_model: int = 0) -> History:
    """Apply the edit, fine-tune, look at every evaluation; afterwards the model is bit for bit as before."""
    task = tasks.named(spec.task)(model, spec.n_train, spec.n_valid, spec.seed, spec.task_data, spec.columns)
    hparams = delta.record["hparams"]
    plan = plans.resolve(model, spec.plan, hparams["layers"])
    recorder.deltas.append(delta)

    def look(step: int, epoch: float) -> None:
        with recorder.timed("probe"):
            recorder.looks.append((edited_model, probe.look(step, epoch)))

    with recorder.timed("tune and probe"), deltas.preserved(model.network, plan.parameters), deltas.applied(model, delta):
        history = finetune(
            model,
            task,
            plan,
            max_steps=spec.max_steps,
            eval_every=spec.eval_every,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            threshold=spec.threshold,
            seed=spec.seed,
            probe=look,
        )
    recorder.histories.append((edited_model, history))
    return history


def run(spec: Spec, model: Model | None = None, out: str | Path = "runs", again: bool = False) -> runs.Run:
    """The whole experiment: one run of n_edited / edits_per_model edited copies of the base model, one after another.

    A finished run of the same experiment is returned at once unless `again`.
    """
    spec = spec.resolved()
    finished = Path(out) / identify(spec)
    if not again and "WORKBENCH_RUN" not in os.environ and (finished / "run.json").exists():
        return runs.read(finished)
    recorder = Recorder()
    with recorder.timed("load"):
        model = model or models.load(spec.model, spec.device, spec.dtype, spec.revision)
        model.fingerprint  # noqa: B018 (taken while the weights are the model's own)
    with recorder.timed("choose facts"):
        chosen = choose(spec, model)
    with recorder.timed("prepare editor"):
        hparams, resources = prepare(spec, model)
    groups = [chosen.edited[start : start + spec.edits_per_model] for start in range(0, len(chosen.edited), spec.edits_per_model)]
    for number, requests in enumerate(tqdm(groups, desc="edited models", disable=None)):
        probe = Probe(model, questions(requests, chosen.intrinsic), chosen.related)
        with recorder.timed("probe"):
            recorder.looks.append((number, probe.look(-1)))
        with recorder.timed("edit"):
            delta = make_edit(spec, model, requests, hparams, resources)
        tune_and_probe(spec, model, delta, probe, recorder, number)
    return recorder.write(spec, model, chosen, out)


def vary(spec: Spec, vary: str, values: Sequence, out: str | Path = "runs") -> list[runs.Run]:
    """One run for each value of one field; the model is loaded once where the field allows it."""
    if vary not in Spec.model_fields:
        raise BadInput(f"vary={vary!r}: not a field of Spec; choose e.g. editor, paraphrases, plan")
    specs = [Spec(**(spec.model_dump() | {vary: value})) for value in values]
    reload = vary in ("model", "revision", "device", "dtype")
    model = None if reload else models.load(spec.model, spec.device, spec.dtype, spec.revision)
    return [run(one, model, out) for one in tqdm(specs, desc=vary, disable=None)]


@cache
def code_fingerprint() -> str:
    """Of every Python file of the package, and of the presets, which determine results as much."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.glob("editing/*.yaml")]):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def identify(spec: Spec, cells: str = "", name: str = "study") -> str:
    """The run's id: readable words and a hash of whatever determines the result (resolved Spec, model, data, code), never the commit."""
    spec = spec.resolved()
    digest = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode())
    digest.update(models.file_fingerprint(spec.model, spec.revision).encode())
    for source in (spec.facts, spec.task_data):
        if Path(source).is_file():
            digest.update(Path(source).read_bytes())
    for path in sorted([facts.DATA / "world" / "facts.csv", *(facts.DATA / "world").glob("*.yaml")]):
        digest.update(path.read_bytes())
    digest.update((code_fingerprint() + cells).encode())
    return f"{name}-{spec.editor}-{spec.task}-{digest.hexdigest()[:10]}"


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
