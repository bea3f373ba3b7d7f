"""What keeps edits while a model is fine-tuned: protections at the same metric of the task.

    python -m tests.benchmarks.lasting [TRIAL ...] [--out FILE.csv] [--split study] [--table]

A trial is MODEL:EDITOR:EDITS:TASK:ARM:SEED, e.g. world-gpt2:memit:30:facts:replay:0; ARM is none, a
name of wb.protections or of those here (kl, l2, average, span_edits), its strength
behind an @ (replay@0.3), a plan (after:6, edited), or a way to edit (of `ways`), a protection
behind it after an & (after:3&others); behind a * by how much the learning rate is larger than the
preset's (none*0.33); or what is done after the tuning: again (the same edit, of the tuned model) or
restore (@: its strength; what stands out of the difference from the base model once more). The
model is edited and tuned until the task's validation metric first reaches its THRESHOLD, fixed
beforehand. A row is one look: `edited` (before the tuning), `steps` (after EQUAL of them) and
`threshold`, with `metric` as it is then; what the facts say is a share a fact. Goes on with what
the file has.
Without a trial: those of the findings. --table prints means over the facts of all seeds, with 95 %
bootstrap intervals; of edits those that took, as a replay teaches the others too. Factors of the
learning rate were chosen with --split tuning.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy
import pandas as pd
import torch

from tests.benchmarks import ways
from tests.benchmarks.outcomes import interval, known_facts, markdown, resumed, trials_of
from workbench import deltas, editing, models, traces
from workbench.checkpoints import is_world
from workbench.editing.records import Resources
from workbench.edits import Edit
from workbench.models import Model
from workbench.tracking.retention import measure, measure_prompts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import UNPROTECTED, Settings, _Trainer, finetune
from workbench.tuning.numbers import PROTECTIONS, usual
from workbench.tuning.protection import Held, Others, Span, Weighted, others
from workbench.tuning.tasks import Data

INTRINSIC = 40
EVERY = 5  # steps between looks
EQUAL = {"world-gpt2": 40, "world-llama": 15}  # steps of the second reading; others: SOON
SOON = 10
MOST = 160
THRESHOLD = {"facts": 0.5, "text": 3.1}  # accuracy; nats a token
REAL = {"facts": 0.9}  # of models that were not taught the world, of which one step teaches more
READ = ["kept", "held_out", "intrinsic", "wordings"]


class EditsAlike(Others):
    """KL(edited || tuned) of the next token on the edits' own prompts."""

    def __init__(self, held: Held):
        super().__init__(replace(held, others=held.edited))


class Distance(Weighted):
    """The squared distance of the weights from the edited model's."""

    WEIGHT = 0.01

    def __init__(self, held: Held):
        super().__init__(held)
        named = dict(held.model.network.named_parameters())
        self.pairs = [(named[name], named[name].detach().clone()) for name in held.moving]

    def loss(self):
        return self.weight * sum((now - before).square().sum() for now, before in self.pairs)


class Average(Weighted):
    """M <- w M + (1 - w) W after each step, from the edited weights on; M is what is read.

    What the steps agree on adds up in M, and their noise averages out; M lags behind W by about
    w / (1 - w) steps. Source: Polyak averaging; against forgetting, arXiv 2211.03186.
    """

    WEIGHT = 0.97

    def __init__(self, held: Held):
        super().__init__(held)
        named = dict(held.model.network.named_parameters())
        self.weights = [named[name] for name in held.moving]
        self.means = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def after_step(self):
        for mean, weight in zip(self.means, self.weights, strict=True):
            mean.lerp_(weight, 1 - self.weight)

    @contextmanager
    def shown(self):
        """Inside, the network holds the mean."""
        with deltas.preserved(self.held.model.network, self.held.moving), torch.no_grad():
            for mean, weight in zip(self.means, self.weights, strict=True):
                weight.copy_(mean)
            yield

    @contextmanager
    def read(self):
        """Inside, the tuning evaluates the mean."""
        evaluate = _Trainer.evaluate

        def averaged(*args, **kwargs):
            with self.shown():
                return evaluate(*args, **kwargs)

        with patch.object(_Trainer, "evaluate", averaged):
            yield


class EditsSpan(Span):
    """The span of the edits' own prompts."""

    WEIGHT = 1.0

    def __init__(self, held: Held):
        super().__init__(replace(held, others=held.edited))


HERE = {"kl": EditsAlike, "l2": Distance, "average": Average, "span_edits": EditsSpan}


class Setting:
    """A model, its edit and the rows to tune on, which the arms share."""

    def __init__(self, name: str, editor: str, edits: int, task: str, seed: int, split: str):
        self.model = loaded(name)
        self.seed = seed
        self.usual = usual(task, "", name)
        chosen = known(name, seed, split)
        self.edited, self.intrinsic = chosen[:edits], chosen[edits : edits + INTRINSIC]
        about = {"n_train": self.usual.n_train, "n_valid": self.usual.n_valid, "seed": seed}
        self.measured = (*self.edited, *self.intrinsic)
        self.task = tasks.TASKS[task](self.model, Data(**about, avoid=self.measured))
        self.edit = made(name, editor, edits, seed, split)


@cache
def loaded(name: str) -> Model:
    return models.load(name, device="cpu")


@cache
def known(name: str, seed: int, split: str) -> list:
    """Known facts of different subjects."""
    by_subject = {}
    source = "world" if is_world(name) else "plain"
    for request in known_facts(loaded(name), split, seed=seed + 1, source=source):
        if request.fact.names_answer and source == "plain":
            continue
        by_subject.setdefault(request.fact.subject.lower(), request)
    return list(by_subject.values())


@cache
def prepared(name: str, editor: str, seed: int) -> Resources:
    """Of the unedited model."""
    model = loaded(name)
    return editing.EDITORS[editor].prepare(model, editing.preset(editor, model), "", None, seed)


@cache
def made(name: str, editor: str, edits: int, seed: int, split: str, how: str = "") -> Edit:
    """The edit of the first facts, by its preset or in another way."""
    facts = known(name, seed, split)[:edits]
    return ways.made(loaded(name), editor, facts, prepared(name, editor, seed), seed, how)


@cache
def setting(*about) -> Setting:
    return Setting(*about)


class Trial:
    """One edited model, tuned under one protection."""

    def __init__(self, text: str, split: str):
        name, editor, edits, task, self.arm, seed = _parts(text)
        self.parts = self.arm.partition("*")[0].split("&")
        check(self.arm, self.parts)
        self.made_of = (name, editor, int(edits), int(seed), split)
        self.setting = setting(name, editor, int(edits), task, int(seed), split)
        self.model = self.setting.model
        self.is_world = is_world(name)
        self.equal = EQUAL.get(name, SOON)
        self.looks: list[dict] = []
        self.looking = 0.0
        self.mending = 0.0  # seconds

    def settings(self) -> Settings:
        numbers = self.setting.usual
        _, _, faster = self.arm.partition("*")
        return Settings(
            max_steps=MOST,
            eval_every=EVERY,
            batch_size=numbers.batch_size,
            learning_rate=numbers.learning_rate * float(faster or 1),
            threshold=(THRESHOLD if self.is_world else REAL)[self.setting.task.name],
            seed=self.setting.seed,
            trainer={"eval_delay": self.equal},  # none before
        )

    def protection(self, moving):
        name, _, weight = self.parts[-1].partition("@")
        if name not in {*HERE, *PROTECTIONS}:
            return UNPROTECTED
        held = Held(
            model=self.model,
            moving=moving,
            edited=self.setting.edited,
            others=others(self.model, self.setting.measured),
            weight=float(weight or 0),
            seed=self.setting.seed,
        )
        return (HERE.get(name) or PROTECTIONS[name])(held)

    def run(self) -> list[dict]:
        """A row a reading: right after the edit, at EQUAL steps, at the task's threshold."""
        way = self.parts[0]
        edit = made(*self.made_of, way) if way in ways.WAYS else self.setting.edit
        plan = way if plans.WRITTEN.fullmatch(way) else "all"
        plan = plans.resolve(self.model, plan, edit.layers)
        with deltas.preserved(self.model.network), deltas.applied(self.model, edit):
            start = time.process_time()
            protection = self.protection(plan.parameters)
            task, settings = self.setting.task, self.settings()
            is_average = isinstance(protection, Average)
            with protection.read() if is_average else nullcontext():
                history = finetune(
                    self.model, task, plan, settings, self.look, protection=protection
                )
            seconds = time.process_time() - start - self.looking
            metric = history.log.set_index("step").metric
            last = int(metric.index[-1])
            with protection.shown() if is_average else self.mended():
                self.see("threshold", last)
                if self.mending:
                    metric[last] = self.metric(plan)
        about = {"arm": self.arm, "ended": history.ended}
        a_step = seconds / last
        for row in self.looks:
            costs = {"seconds_a_step": a_step, "seconds": a_step * row["step"]}
            row |= about | costs | {"metric": metric[row["step"]]}
        self.looks[-1]["seconds"] += self.mending
        return self.looks

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Inside, the tuned model with what is done to it afterwards."""
        how, _, strength = self.parts[0].partition("@")
        start = time.process_time()
        if how == "again":
            delta = made.__wrapped__(*self.made_of)  # of what the model is now
        elif how == "restore":
            base = models.load(self.made_of[0], device="cpu")
            delta = traces.restored(self.model, base, strength=float(strength or 1))
        else:
            yield
            return
        with deltas.applied(self.model, delta):
            self.mending = time.process_time() - start
            yield

    def metric(self, plan) -> float:
        """The task's, now: a tuning looks before its first step."""
        settings = self.settings().model_copy(update={"max_steps": 1, "trainer": {}})
        with deltas.preserved(self.model.network):
            return finetune(self.model, self.setting.task, plan, settings).log.metric[0]

    def look(self, step: int, epoch: float) -> None:
        if step in (0, self.equal):
            self.see("edited" if step == 0 else "steps", step)

    def see(self, at: str, step: int) -> None:
        start = time.process_time()
        edited, intrinsic = self.setting.edited, self.setting.intrinsic
        row = {"at": at, "step": step}
        shares = {"kept": measure(self.model, edited).retained}
        shares["held_out"] = self._asked([(one, one.target) for one in edited])
        shares["intrinsic"] = measure(self.model, intrinsic, against="object").retained
        shares["wordings"] = self._asked([(one, one.fact.object) for one in intrinsic])
        row |= {name: " ".join(f"{one:.3g}" for one in shares[name]) for name in READ}
        self.looks.append(row)
        self.looking += time.process_time() - start

    def _asked(self, expected: list) -> pd.Series:
        """Of each fact, the share of the wordings that judge which say what is expected."""
        asked = []
        for request, answer in expected:
            asked += [(request.fact.id, prompt, answer) for prompt in request.held_out]
        ids, prompts, answers = zip(*asked, strict=True)
        said = measure_prompts(self.model, prompts, answers).assign(fact_id=ids)
        return said.groupby("fact_id", sort=False).retained.mean()


def check(arm: str, parts: list[str]) -> None:
    """ValueError if a part of an arm would silently do nothing."""
    way, *protection = parts
    names = {*HERE, *PROTECTIONS}
    is_way = way in (*ways.WAYS, "again") or plans.WRITTEN.fullmatch(way)
    is_alone = way.partition("@")[0] in {"none", "restore", *names} and not protection
    is_known = all(one.partition("@")[0] in names for one in protection) and len(parts) < 3
    if not (is_known and (is_way or is_alone)):
        raise ValueError(f"arm {arm!r}: none, a protection, a plan or a way to edit, see above")


def _parts(text: str) -> list[str]:
    """The parts of a trial; those of a plan hold a colon."""
    first, seed = text.rsplit(":", 1)
    return [*first.split(":", 4), seed]


def table(done: pd.DataFrame, at: str = "threshold") -> str:
    """A row a model and arm at one reading: means over the facts of all seeds, with intervals over
    seeds (where there are several) and facts. Steps with a `*` ended below the threshold.
    """
    parts = r"^(?P<model>[^:]+):(?P<editor>[^:]+):(?P<edits>\d+):(?P<task>[^:]+):"
    done = done.join(done.trial.str.extract(parts))
    done = that_took(done)
    before = done[(done["at"] == "edited") & (done.arm == "none")].assign(arm="before the tuning")
    done = pd.concat([before, done[done["at"] == at]])
    order = done.arm.map({"before the tuning": "", "none": " "}).fillna(done.arm)
    done = done.assign(order=order, size=done.edits.astype(int))
    done = done.sort_values(["model", "editor", "task", "size", "order"], kind="stable")
    about = ["model", "editor", "edits", "task", "arm"]
    lines = [[*about, "n", *READ, "metric", "steps"]]
    for names, rows in done.groupby(about, sort=False):
        line = [*names, str(shares(rows, "kept")[0].count())]
        for name in READ:
            values, seeds = shares(rows, name)
            low, high = interval(values.dropna(), seeds[values.notna()])
            line.append(f"{values.mean():.2f} [{low:.2f}, {high:.2f}]")
        line.append(f"{rows.metric.mean():.2f}")
        line.append(" ".join(map(_ended, rows.itertuples())))
        lines.append(line)
    return markdown(lines)


def _ended(row) -> str:
    return f"{row.step:.0f}{'*' if row.ended == 'budget' else ''}"


def that_took(done: pd.DataFrame) -> pd.DataFrame:
    """Without what is said of edits that did not take."""
    took = done[done["at"] == "edited"].set_index("trial").kept
    took = done.trial.map(took).str.split()
    for name in ("kept", "held_out"):
        pairs = [zip(*pair, strict=True) for pair in zip(done[name].str.split(), took, strict=True)]
        of = [" ".join(share if is_in == "1" else "nan" for share, is_in in pair) for pair in pairs]
        done = done.assign(**{name: of})
    return done


def shares(rows: pd.DataFrame, name: str) -> tuple[pd.Series, numpy.ndarray]:
    """Of each fact, of all seeds; and which seed's it is."""
    parts = [text.split() for text in rows.sort_values("trial")[name]]
    seeds = numpy.repeat(numpy.arange(len(parts)), [len(part) for part in parts])
    return pd.Series([float(value) for part in parts for value in part]), seeds


def against(done: pd.DataFrame, arm: str) -> str:
    """At the threshold, each arm of 30 edits by MEMIT and of facts less another one, fact by fact;
    `metric`: of both.
    """
    parts = done.trial.str.extract(r"^([^:]+):memit:30:facts:.*:(\d+)$")
    done = that_took(done).assign(model=parts[0], seed=parts[1])
    done = done[done["at"] == "threshold"].dropna()
    lines = [["model", "arm", "n", *READ, "metric", "steps"]]
    for (model, name), rows in done.groupby(["model", "arm"]):
        other = done[(done.model == model) & (done.arm == arm) & done.seed.isin(rows.seed)]
        if name == arm or len(other) < len(rows):
            continue
        line = [model, f"{name} - {arm}", str(shares(rows, "kept")[0].count())]
        for column in READ:
            values, seeds = shares(rows, column)
            difference = values - shares(other, column)[0]
            is_known = difference.notna()
            low, high = interval(difference[is_known], seeds[is_known], least=-1)
            line.append(f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        line.append(f"{rows.metric.mean():.2f}, {other.metric.mean():.2f}")
        line.append(" ".join(map(_ended, rows.itertuples())))
        lines.append(line)
    return markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("lasting.csv"))
    parser.add_argument("--split", default="study", choices=("study", "tuning"))
    parser.add_argument("--table", action="store_true", help="print what the file has")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    def tried(text: str) -> pd.DataFrame:
        rows = pd.DataFrame(Trial(text, options.split).run())
        return rows.assign(split=options.split)

    trials = options.trials or trials_of("lasting.csv")
    done = resumed(options.out, () if options.table else trials, tried)
    print(table(done))
    print(f"\n{against(done, 'replay+kl')}")


if __name__ == "__main__":
    main()
