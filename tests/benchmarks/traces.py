"""What can be read in the weights of edited models that were tuned, and whether it can be taken out
or brought back: study facts that no number was chosen on.

    python -m tests.benchmarks.traces [TRIAL ...] [--out FILE.csv] [--brief] [--alone]

A trial is MODEL:EDITOR:EDITS:TASK:PLAN:SEED, e.g. world-gpt2:memit:10:facts:all:0; a plan may be
lora, an editor none. It is tuned for 160 steps and inspected after 0, 20, 80 and 160; after 80 also
with its weights rounded to 8, 4 and 3 bits (absolute maximum of a row of the matrix), merged half
and half with the base model, with what stands out removed, and restored. Goes on with what the file
has; prints the table. Without a trial: those of the findings, where the rows at 20 and 160 steps
were kept of those alone that were also changed. Columns: right of the named are edited; unlisted:
named of the list without the edited; first: edited of as many of least p as directions stand out;
withheld, withheld_first: both where the list asks in wordings that no editor saw; objects: read
among ten tokens.
"""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy
import pandas as pd
import torch

import workbench as wb
from tests.benchmarks.outcomes import FINDINGS, interval, known_facts, markdown, resumed, trials_of
from workbench import deltas, editing, facts, models, readers
from workbench.checkpoints import is_world
from workbench.tracking.retention import measure, token_texts
from workbench.tuning import adapters, plans, tasks
from workbench.tuning.finetune import Settings, collate, finetune
from workbench.tuning.numbers import usual
from workbench.tuning.tasks import Data

STEPS = (0, 20, 80, 160)
CHANGED = 80  # the step at which the tuned model is also changed
STRENGTHS = (0.5, 1.0, 2.0)
INTRINSIC = 50
MODELS = ("world-gpt2", "world-llama")
REMEDIED = ["trial", "step", "change", "kept", "true", "intrinsic", "loss"]
ALONE = ("rome", "memit", "alphaedit")
INSPECTED = [*REMEDIED[:4], "edits", "directions", "named", "right", "objects", "first"]


class Trial:
    """One edited model, tuned; `rows` is what was seen."""

    def __init__(self, text: str, brief: bool):
        self.text = text
        self.steps = STEPS[::2] if brief else STEPS
        self.is_changed = not brief
        first, seed = text.rsplit(":", 1)
        name, self.editor, edits, self.task_name, self.plan_text = first.split(":", 4)
        self.seed = int(seed)
        self.model = models.load(name, device="cpu")
        self.base = models.load(name, device="cpu")
        self.tuned = models.load(name, device="cpu")
        self.source = "world" if is_world(name) else "plain"
        self.list = facts.read(self.source)
        self.requests, self.intrinsic = self._facts(int(edits))
        self.rows: list[dict] = []
        numbers = usual(self.task_name, "", name)
        about = {"n_train": numbers.n_train, "n_valid": 32, "seed": self.seed}
        avoid = (*self.requests, *self.intrinsic)
        self.task = tasks.TASKS[self.task_name](self.model, Data(**about, avoid=avoid))
        is_lora = self.plan_text == "lora"
        rate = numbers.adapter_learning_rate if is_lora else numbers.learning_rate
        self.settings = Settings(
            max_steps=max(self.steps),
            eval_every=20,
            batch_size=numbers.batch_size,
            learning_rate=rate,
            threshold=0.0 if self.task.metric == "loss" else 2.0,  # never reached
            seed=self.seed,
        )

    def _facts(self, edits: int) -> tuple[list, list]:
        """Known study facts of different subjects: those to edit, and others."""
        by_subject = {}
        known = known_facts(self.model, "study", seed=self.seed + 1, source=self.source)
        for request in known:
            by_subject.setdefault(request.fact.subject.lower(), request)
        chosen = list(by_subject.values())
        return chosen[:edits], chosen[edits : edits + INTRINSIC]

    def edit(self):
        if self.editor == "none":
            return None
        hparams = editing.preset(self.editor, self.model)
        module = editing.EDITORS[self.editor]
        taken = {one.fact.subject.lower() for one in self.list if one.fact.split == "study"}
        lessons = [one for one in facts.lessons("world") if one.fact.subject.lower() not in taken]
        given = lessons if module.LEARNS else None
        resources = module.prepare(self.model, hparams, "", given, seed=self.seed)
        return module.edit(self.model, self.requests, hparams, resources, seed=self.seed)

    def run(self) -> list[dict]:
        edit = self.edit()
        plan = "all" if self.plan_text == "lora" else self.plan_text
        with (
            deltas.preserved(self.model.network),
            deltas.applied(self.model, edit) if edit else nullcontext(),
            self.attached(plans.resolve(self.model, plan, edit.layers if edit else ())) as moving,
        ):
            finetune(self.model, self.task, moving, self.settings, self.look)
        return self.rows

    @contextmanager
    def attached(self, plan) -> Iterator:
        self.adapter = None
        if self.plan_text != "lora":
            yield plan
            return
        numbers = {"rank": 32, "alpha": 64, "dropout": 0.05, "seed": self.seed}
        with adapters.attached(self.model, plan, "lora", **numbers) as self.adapter:
            yield self.adapter.plan

    def look(self, step: int, epoch: float) -> None:
        if step not in self.steps:
            return
        names = dict(self.base.network.named_parameters())
        with self.adapter.merged() if self.adapter else nullcontext():
            weights = dict(self.model.network.named_parameters())
            plain = {name.replace(".base_layer", ""): one for name, one in weights.items()}
            state = {name: plain[name].detach().clone() for name in names}
        self.see(step, "", state)
        if step != CHANGED or not self.is_changed:
            return
        for bits in (8, 4, 3):
            self.see(step, f"{bits} bits", {one: rounded(state[one], bits) for one in state})
        merged = {one: (state[one] + names[one].detach()) / 2 for one in state}
        self.see(step, "half merged", merged)
        if self.editor == "none":
            return
        with torch.no_grad():
            tuned = self.with_weights(state)
        every = {"removed": lambda: wb.traces.removed(tuned, self.base)}
        named = wb.inspect(tuned, self.base, self.list).written.fact_id.drop_duplicates()
        firsts = {one.fact.subject.lower(): one for one in self.list if one.fact.id in set(named)}
        if firsts:
            subjects = list(firsts.values())
            every["removed, named"] = lambda: wb.traces.removed(tuned, self.base, subjects)
        for strength in STRENGTHS:
            every[f"restored {strength}"] = lambda by=strength: wb.traces.restored(
                tuned, self.base, strength=by
            )
        for name, make in every.items():
            try:
                delta = make()
            except wb.facts.BadInput as error:
                self.rows.append(self.about(step, name) | {"problem": str(error)})
                continue
            with deltas.applied(tuned, delta):
                self.rows.append(self.about(step, name) | self.behaviour(tuned))

    def with_weights(self, state: dict):
        self.tuned.network.load_state_dict(state, strict=False)
        return replace(self.tuned)

    def about(self, step: int, change: str) -> dict:
        return {"trial": self.text, "step": step, "change": change}

    def behaviour(self, model) -> dict:
        """Edits said, true answers of the edited facts, intrinsic facts known, loss of the task."""
        losses = []
        n = len(self.task.valid)
        with torch.no_grad():
            for start in range(0, n, 16):
                batch = collate([self.task.valid[one] for one in range(start, min(start + 16, n))])
                losses.append(model.network(**batch).loss.item())
        return {
            "kept": measure(model, self.requests).retained.mean(),
            "true": measure(model, self.requests, against="object").retained.mean(),
            "intrinsic": measure(model, self.intrinsic, against="object").retained.mean(),
            "loss": sum(losses) / len(losses),
        }

    def see(self, step: int, change: str, state: dict) -> None:
        tuned = self.with_weights(state)
        row = self.about(step, change) | self.behaviour(tuned)
        try:
            traces = wb.inspect(tuned, self.base, self.list)
        except wb.facts.BadInput as error:
            self.rows.append(row | {"problem": str(error)})
            return
        edited = set()
        if self.editor != "none":
            edited = {one.fact.subject.lower() for one in self.requests}
        if step == CHANGED and edited and not change:
            others = [one for one in self.list if one.fact.subject.lower() not in edited]
            unlisted = wb.inspect(tuned, self.base, others).written.subject
            row["unlisted"] = unlisted.str.lower().nunique()
            asked = wb.inspect(tuned, self.base, list(map(otherwise, self.list)))
            withheld = set(asked.written.subject.str.lower())
            row |= {"withheld": len(edited & withheld), "withheld_named": len(withheld)}
            row["withheld_first"] = len(edited & firsts(asked))
        written = traces.written.assign(key=traces.written.subject.str.lower())
        names = set(written.key)
        row |= {"edits": len(edited), "directions": traces.n_edits, "named": len(names)}
        row |= {"right": len(names & edited), "objects": 0}
        row["first"] = len(edited & firsts(traces))
        outlying = traces.matrices[traces.matrices.outlying > 0]
        row["matrices"] = " ".join(f"{one.matrix}@{one.layer}" for one in outlying.itertuples())
        if len(written):
            best = written.sort_values("gain").drop_duplicates("key", keep="last")
            tokens = dict(zip(best.fact_id, best.tokens, strict=True))
            row["objects"] = sum(self.is_read(one, tokens) for one in self.requests)
        self.rows.append(row)
        print(row, flush=True)

    def is_read(self, request, tokens: dict) -> bool:
        """Whether the first token of the edit's object is in the ten that its subject's fact with
        the largest gain gives; another fact of the subject does not count.
        """
        text = self.model.tokenizer(f" {request.target}", add_special_tokens=False)["input_ids"][0]
        first = token_texts(self.model.tokenizer)[text].strip()
        return first in tokens.get(request.fact.id, "").split()


def firsts(traces) -> set[str]:
    """As many subjects of least p as directions stand out."""
    ranked = traces.subjects.sort_values("p").subject.str.lower().drop_duplicates()
    return set(ranked[: traces.n_edits])


def otherwise(request: facts.EditRequest) -> facts.EditRequest:
    """The fact asked in the first of the wordings that judge, if that names its subject."""
    fact = request.fact
    for text in request.held_out[:1]:
        if fact.subject in text:
            fact = fact.model_copy(update={"prompt": readers.template(text, fact.subject)})
    return request.model_copy(update={"fact": fact})


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix on 2^bits - 1 levels, scaled by each row's absolute maximum; others as they are."""
    if weight.ndim != 2:
        return weight
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def alone() -> str:
    """Matrices that stand out without a base: of unedited models, and of edited ones untuned."""
    lines = []
    for name, revision in ((one, early) for one in MODELS for early in ("", "early")):
        lines.append(_outlying(models.load(name, device="cpu", revision=revision), revision))
    lines.append(_outlying(models.load("smollm2-135m", device="cpu"), ""))
    for name, editor in ((one, editor) for one in MODELS for editor in ALONE):
        trial = Trial(f"{name}:{editor}:10:facts:all:0", brief=True)
        with deltas.applied(trial.model, trial.edit()):
            lines.append(_outlying(replace(trial.model), editor))
    return "\n".join(lines)


def _outlying(model, how: str) -> str:
    table = wb.traces.spectrum.table(wb.traces.spectrum.differences(model, None))
    outlying = table[table.outlying > 0]
    places = [f"{one.matrix}@{one.layer}: {one.outlying}" for one in outlying.itertuples()]
    return f"{model.name} {how}: {len(outlying)} of {len(table)} matrices {' '.join(places)}"


def shown(done: pd.DataFrame) -> str:
    """Tables for a page: what was inspected, and what was taken out or brought back."""
    done = done.assign(change=done.change.fillna(""))
    parts = []
    for is_remedy, columns in ((False, INSPECTED), (True, REMEDIED)):
        rows = done[done.change.str.startswith(("removed", "restored")) == is_remedy]
        lines = [columns]
        for row in rows[columns].itertuples(index=False):
            lines.append([cell(value) for value in row])
        parts.append(markdown(lines))
    return "\n\n".join(parts)


PARTS = r"^(?P<model>[^:]+):(?P<editor>[^:]+):(?P<batch>\d+):(?P<task>[^:]+):(?P<plan>.*):\d+$"


def judged(done: pd.DataFrame) -> str:
    """A row a model and way to edit and tune, over seeds: of the edits the share still said; of
    the subjects named at 5 % the share that was edited (precision), of the edited ones the share
    named (recall), with intervals over trials and subjects.
    """
    done = done.join(done.trial.str.extract(PARTS)).assign(problem=done.get("problem"))
    done = done[done.change.isna() & done.problem.isna() & done.step.isin([0, CHANGED])]
    head = ["model", "editor", "edits", "task", "plan", "step", "runs", "kept"]
    lines = [[*head, "directions", "named", "precision", "recall"]]
    keys = ["model", "editor", "batch", "task", "plan", "step"]
    for (*about, step), rows in done.groupby(keys):
        n_edits = int(rows.edits.sum())
        kept = f"{(rows.kept * rows.edits).sum() / n_edits:.2f}" if n_edits else ""
        line = [*about, f"{step:.0f}", str(len(rows)), kept, f"{rows.directions.sum():.0f}"]
        line += [f"{rows.named.sum():.0f}", _share(rows, "named"), _share(rows, "edits")]
        lines.append(line)
    return markdown(lines)


def asked_otherwise(done: pd.DataFrame) -> str:
    """Of the edited subjects, those named and those first, where the list asks in the edit's own
    wording and where it asks in one that no editor saw, and all who are named there; sums over
    seeds.
    """
    done = done.join(done.trial.str.extract(PARTS)).dropna(subset=["withheld"])
    columns = ["edits", "right", "first", "withheld", "withheld_named", "withheld_first"]
    lines = [["model", "editor", "runs", "edits", "named", "first"]]
    lines[0] += [f"{name}, other wording" for name in ("edited and named", "named", "first")]
    for about, rows in done.groupby(["model", "editor"]):
        counts = [f"{rows[name].sum():.0f}" for name in columns]
        lines.append([*about, str(len(rows)), *counts])
    return markdown(lines)


def changed(done: pd.DataFrame) -> str:
    """What steps, rounding and merging leave to read: sums over the seeds that were changed."""
    columns = ["kept", "directions", "named", "right", "first", "objects"]
    lines = [["model", "editor", "step", "change", "edits", *columns]]
    for about, rows in _whole(done, is_remedy=False):
        rows = rows.assign(kept=rows.kept * rows.edits)
        model, editor, step, change = about
        counts = [f"{rows[name].sum():.0f}" for name in ("edits", *columns)]
        lines.append([model, editor, f"{step:.0f}", change, *counts])
    return markdown(lines)


def remedied(done: pd.DataFrame) -> str:
    """What taking out and bringing back does: means over the seeds that were changed."""
    lines = [["model", "editor", "change", "seeds", *REMEDIED[3:]]]
    for (model, editor, _, change), rows in _whole(done, is_remedy=True):
        means = [f"{rows[name].mean():.2f}" for name in REMEDIED[3:]]
        lines.append([model, editor, change or "as it is", str(len(rows)), *means])
    return markdown(lines)


def _whole(done: pd.DataFrame, is_remedy: bool) -> Iterator:
    """The rows of each change, over the trials that were changed; those of remedies begin with the
    tuned model as it is.
    """
    done = done.join(done.trial.str.extract(PARTS)).assign(change=done.change.fillna(""))
    done = done[done.trial.isin(done.trial[done.change != ""])]
    is_part = done.change.str.startswith(("removed", "restored")) == is_remedy
    if is_remedy:
        is_part |= (done.change == "") & (done.step == CHANGED)
    keys = ["model", "editor", "step", "change"]
    return iter(done[is_part].groupby(keys, sort=False))


def _share(rows: pd.DataFrame, of: str) -> str:
    """Edited and named subjects, as a share of those named or of those edited."""
    counts = rows[[of, "right"]].astype(int)
    is_right = [number < right for whole, right in counts.values for number in range(whole)]
    if not is_right:
        return ""
    low, high = interval(is_right, numpy.repeat(range(len(counts)), counts[of]))
    return f"{numpy.mean(is_right):.2f} [{low:.2f}, {high:.2f}]"


def cell(value) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("traces.csv"))
    parser.add_argument("--brief", action="store_true", help="0 and 80 steps, nothing changed")
    parser.add_argument("--alone", action="store_true", help="what is seen without a base")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.alone:
        print(alone())
        return

    table = pd.read_csv(FINDINGS / "traces.csv")
    whole = set(options.trials or table.trial[table.change.notna()])

    def tried(text: str) -> pd.DataFrame:
        return pd.DataFrame(Trial(text, options.brief or text not in whole).run())

    done = resumed(options.out, options.trials or trials_of("traces.csv"), tried)
    print(shown(done), judged(done), sep="\n\n")


if __name__ == "__main__":
    main()
