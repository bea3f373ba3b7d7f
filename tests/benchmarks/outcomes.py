"""What edits do to facts: shared by the choice of numbers (tuning facts) and by the tests of
efficacy (study facts).
"""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbench import editing, facts, files, runs, study
from workbench.evaluation import efficacy
from workbench.traces.patching import margins
from workbench.tracking.retention import answers_after, passes

FINDINGS = Path(__file__).parents[2] / "data" / "findings"


def known_facts(model, split: str, seed: int = 1, source: str = "world") -> list:
    """All facts of a split that the model knows, in a seeded order."""
    pool = [request for request in facts.read(source) if request.fact.split == split]
    random.Random(seed).shuffle(pool)
    return [
        request
        for request, known in zip(pool, study.known_table(model, pool).known, strict=True)
        if known
    ]


def outcome(model, delta, edited: Sequence, watched: Sequence) -> pd.DataFrame:
    """One row an edited fact, see `evaluation.efficacy.outcome`."""
    return efficacy.outcome(model, delta, efficacy.asked(model, edited, watched))


def in_batches(
    model, editor: str, requests: Sequence, size: int, hparams, watched: Sequence, resources=None
) -> pd.DataFrame:
    """Each batch of `size` facts edited into a model of its own."""
    resources = resources or editing.EDITORS[editor].prepare(model, hparams)
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    edits = editing.edit_each(editor, model, batches, hparams, resources)
    parts = [
        outcome(model, delta, batch, watched).assign(batch=number)
        for number, (batch, delta) in enumerate(
            zip(tqdm(batches, desc=f"{model.name} {editor}", disable=None), edits, strict=True)
        )
    ]
    return pd.concat(parts, ignore_index=True)


def interval(
    values, groups=None, least: float = 0, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: groups, such as seeds, are drawn, and in each its
    values; of one group alone only these. Where all values agree see `runs.interval`.
    """
    values = numpy.asarray(values, dtype=float)
    if numpy.ptp(values) == 0:
        return runs.interval(values, least)
    random = numpy.random.default_rng(seed)
    groups = numpy.zeros(len(values)) if groups is None else numpy.asarray(groups)
    parts = [values[groups == group] for group in numpy.unique(groups)]
    sums = numpy.zeros(draws)
    counts = numpy.zeros(draws)
    for _ in parts:
        chosen = random.integers(0, len(parts), draws)
        for number, part in enumerate(parts):
            is_chosen = chosen == number
            sums[is_chosen] += random.choice(part, (is_chosen.sum(), len(part))).sum(1)
            counts[is_chosen] += len(part)
    low, high = numpy.quantile(sums / counts, [0.025, 0.975])
    return float(low), float(high)


def difference(first: pd.Series, second: pd.Series, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the difference of two means of the same seeds (a level of both),
    which are drawn together, and in each the values of either.
    """
    random = numpy.random.default_rng(0)
    seeds = sorted(set(first.index.get_level_values("seed")))
    chosen = random.integers(0, len(seeds), (len(seeds), draws))
    means = []
    for values in (first, second):
        parts = [part.to_numpy() for _, part in values.groupby(level="seed")]
        sums = numpy.zeros(draws)
        counts = numpy.zeros(draws)
        for drawn, (number, part) in itertools.product(chosen, enumerate(parts)):
            is_chosen = drawn == number
            sums[is_chosen] += random.choice(part, (is_chosen.sum(), len(part))).sum(1)
            counts[is_chosen] += len(part)
        means.append(sums / counts)
    low, high = numpy.quantile(means[0] - means[1], [0.025, 0.975])
    return float(low), float(high)


def show(name: str, editor: str, how: str, table: pd.DataFrame) -> None:
    """One line: means, with 95 % intervals where facts are the sample."""
    parts = []
    for column in ("efficacy", "held_out", "held_out_understood", "neighbourhood_kept"):
        values = table[column].dropna()
        low, high = interval(values)
        parts.append(f"{column} {values.mean():.3f} [{low:.3f}, {high:.3f}]")
    neighbours = (
        f"neighbourhood {table.neighbourhood_before.mean():.3f} -> {table.neighbourhood.mean():.3f}"
    )
    print(
        f"{name} {editor}, {how}, {len(table)} facts: {', '.join(parts)}, "
        f"intrinsic {table.intrinsic.mean():.3f}, {neighbours}",
        flush=True,
    )


@torch.no_grad()
def leads(model, requests: Sequence, answers: list[str]) -> tuple:
    """Smallest lead (n,) in nats of one of an answer's tokens over any other, and log p (n,)."""
    asked = answers_after(model, [request.fact.question for request in requests], answers)
    lead = torch.full((len(answers),), torch.inf)
    log_p = torch.zeros(len(answers))
    for one in passes(model, asked):
        is_inside = one.position + 1 < asked.encoded.lengths[one.row]
        row = one.row[is_inside]
        tokens = asked.encoded.input_ids[row, one.position[is_inside] + 1]
        logits = one.logits[is_inside].cpu()
        lead.scatter_reduce_(0, row, margins(logits, tokens), "amin")
        log_p.index_add_(0, row, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return lead, log_p


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table for a page, its first line the head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def trials_of(name: str) -> list[str]:
    """The trials of a table of the findings."""
    return list(pd.read_csv(FINDINGS / name, usecols=["trial"]).trial.unique())


def resumed(out: Path, trials: Sequence[str], tried: Callable) -> pd.DataFrame:
    """The rows of a file and of those trials that it lacks, added to it one trial at a time."""
    done = pd.read_csv(out) if out.exists() else pd.DataFrame({"trial": []})
    for text in trials:
        if text not in set(done.trial):
            done = pd.concat([done, tried(text).assign(trial=text)], ignore_index=True)
            with files.written(out) as partial:
                done.to_csv(partial, index=False, float_format="%.5g")
            print(text, flush=True)
    return done
