"""Is knowledge elastic? Bits of a fact against fine-tuning, by how much data wrote it.

    python -m tests.benchmarks.elasticity [TRIAL ...] [--out FILE.csv]
    python -m tests.benchmarks.elasticity --judge

The account (arXiv 2507.14198, equation 2, after arXiv 2406.06144): let a small set of data D2 be
learnt after a large one D1, and tune on D3, l = |D3| / |D2|. What is learnt of D2 goes as l grows,
and what is learnt of D1 comes back, k = |D1| / |D2| times slower. It says three things that can be
read here, where it is known by how many wordings, and how often, every fact was taught:

    sign: while bits of edited facts rise, those of intrinsic facts fall
    scaling: bits lost a token go as volume^-a, a = 1; of wordings and of occurrences, which are
        varied apart
    crossing: an edit of as many statements as pre-training had wordings is lost as fast

A trial is MODEL:EDITOR:TASK:STATEMENTS:SEED: EDITS facts of split "study" are edited at once, each
by so many statements, and tuned on for STEPS[-1] steps of the task's usual numbers; of one
statement INTRINSIC other facts are watched too. A row is a fact: `bits` (-log2 p of the answer) and
`leads` (the smallest lead of one of its tokens over any other, nats) after STEPS. What is known of
a fact at the start differs with how often it was taught; so rows of one start are compared too
(`matched`): an edited fact with the intrinsic one of its relation whose lead at the start is
nearest.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import numpy
import pandas as pd

from tests.benchmarks.lasting import INTRINSIC as _FEW
from tests.benchmarks.lasting import known, loaded, made
from tests.benchmarks.outcomes import FINDINGS, interval, leads, markdown, resumed
from workbench import deltas
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune
from workbench.tuning.numbers import usual
from workbench.tuning.tasks import Data

EDITS = 30
INTRINSIC = 4 * _FEW
STEPS = (0, 5, 10, 20, 40)
TRIALS = [
    f"{name}:memit:facts:{statements}:{seed}"
    for seed in range(3)
    for name in ("world-gpt2", "world-llama")
    for statements in (1, 3, 10)
]
NEAR = 1.0  # nats by which the starts of a matched pair may differ


def tried(text: str) -> pd.DataFrame:
    name, editor, task_name, statements, seed = text.split(":")
    model, seed = loaded(name), int(seed)
    numbers = usual(task_name, "", name)
    chosen = known(name, seed, "study")
    edited, intrinsic = chosen[:EDITS], chosen[EDITS : EDITS + INTRINSIC]
    about = {"n_train": numbers.n_train, "n_valid": 8, "seed": seed}
    task = tasks.TASKS[task_name](model, Data(**about, avoid=(*edited, *intrinsic)))
    settings = Settings(
        max_steps=STEPS[-1],
        eval_every=STEPS[1],
        batch_size=numbers.batch_size,
        learning_rate=numbers.learning_rate,
        threshold=2.0 if task.metric == "accuracy" else 0.0,  # never
        seed=seed,
    )
    edit = made(name, editor, EDITS, seed, "study", statements)
    if statements != "1":
        intrinsic = []  # they are the same in every arm
    requests = [*edited, *intrinsic]
    answers = [one.target for one in edited] + [one.fact.object for one in intrinsic]
    looks: dict[int, tuple] = {}

    def look(step: int, epoch: float) -> None:
        if step in STEPS:
            looks[step] = leads(model, requests, answers)

    with deltas.preserved(model.network), deltas.applied(model, edit):
        finetune(model, task, plans.resolve(model, "all", edit.layers), settings, look)
    tokens = settings.batch_size * sum(map(len, task.train["input_ids"])) / len(task.train)
    rows = []
    for place, request in enumerate(requests):
        exposure = request.fact.exposure
        is_edited = place < EDITS
        row = {"group": "edited" if is_edited else "intrinsic", "fact_id": request.fact.id}
        row |= {"relation": request.fact.relation, "tokens_a_step": tokens}
        row["wordings"] = int(statements) if is_edited else exposure.paraphrases
        row["occurrences"] = 1 if is_edited else exposure.occurrences
        lead = [looks[step][0][place].item() for step in STEPS]
        bits = [-looks[step][1][place].item() / numpy.log(2) for step in STEPS]
        row["bits"] = " ".join(f"{one:.4g}" for one in bits)
        row["leads"] = " ".join(f"{one:.4g}" for one in lead)
        rows.append(row)
    return pd.DataFrame(rows)


def read(path: Path) -> pd.DataFrame:
    """With `rise_<step>`: bits more than at the start; `lead`: at the start; `kept_<step>`. Without
    edits that did not take; intrinsic facts that the edit knocked out stay, with a `lead` below 0.
    """
    done = pd.read_csv(path)
    done[["model", "editor", "task", "statements", "seed"]] = done.trial.str.split(":", expand=True)
    bits = numpy.array([one.split() for one in done.bits], dtype=float)
    lead = numpy.array([one.split() for one in done.leads], dtype=float)
    done["lead"] = lead[:, 0]
    for place, step in enumerate(STEPS[1:], 1):
        done[f"rise_{step}"] = bits[:, place] - bits[:, 0]
        done[f"kept_{step}"] = lead[:, place] > 0
    return done[(done.group == "intrinsic") | (done.lead > 0)]


def spread(statistic, rows: pd.DataFrame, draws: int = 1000) -> tuple[float, float, float]:
    """A statistic of rows with its 95 % bootstrap interval, over seeds and the facts of each."""
    random = numpy.random.default_rng(0)
    parts = [part for _, part in rows.groupby("seed")]
    drawn = []
    for _ in range(draws):
        chosen = [parts[number] for number in random.integers(0, len(parts), len(parts))]
        facts = [part.iloc[random.integers(0, len(part), len(part))] for part in chosen]
        drawn.append(statistic(pd.concat(facts)))
    return (statistic(rows), *numpy.nanquantile(drawn, [0.025, 0.975]))


def power(rows: pd.DataFrame, of: str, step: int) -> float:
    """a of: mean rise ~ of^-a, by least squares on logarithms of the means."""
    means = rows.groupby(of)[f"rise_{step}"].mean()
    means = means[means > 0]
    if len(means) < 2:
        return numpy.nan
    return -numpy.polyfit(numpy.log(means.index), numpy.log(means), 1)[0]


def matched(rows: pd.DataFrame) -> pd.DataFrame:
    """A row an edited fact: its own and the nearest intrinsic one's `kept` and `rise`, of the same
    model, seed and relation.
    """
    pairs = []
    for _, part in rows.groupby(["trial", "relation"]):
        intrinsic = part[part.group == "intrinsic"]
        for _, edited in part[part.group == "edited"].iterrows():
            gaps = (intrinsic.lead - edited.lead).abs()
            if len(gaps) and gaps.min() <= NEAR:
                other = intrinsic.loc[gaps.idxmin()]
                pair = {"model": edited.model, "seed": edited.seed}
                pair["start"] = edited.lead - other.lead
                for step in STEPS[1:]:
                    kept = float(edited[f"kept_{step}"]) - float(other[f"kept_{step}"])
                    pair[f"kept_{step}"] = kept
                    pair[f"rise_{step}"] = edited[f"rise_{step}"] - other[f"rise_{step}"]
                pairs.append(pair)
    return pd.DataFrame(pairs)


def gap(rows: pd.DataFrame, step: int) -> float:
    """Share of edited facts kept, less that of intrinsic ones."""
    kept = rows.groupby("group")[f"kept_{step}"].mean()
    return kept["edited"] - kept["intrinsic"]


def answers(part: pd.DataFrame) -> dict[str, str]:
    """Of one model: question -> value with its 95 % interval, and how many facts."""
    last = STEPS[-1]
    whole = part[part.statements == "1"]
    one = whole[whole.lead > 0]
    intrinsic = one[one.group == "intrinsic"]
    hurt = whole[whole.lead <= 0]
    edited = part[part.group == "edited"]
    pairs = matched(one)
    cells = {}

    def mean(question: str, rows: pd.DataFrame, of: str) -> None:
        values = rows[of].astype(float)
        cells[question] = _cell((values.mean(), *interval(values, rows.seed)), len(values))

    def of_rows(question: str, statistic, rows: pd.DataFrame) -> None:
        cells[question] = _cell(spread(statistic, rows), len(rows))

    for step in (STEPS[1], STEPS[2], last):
        for group, rows in whole.groupby("group"):
            mean(f"bits more after {step} steps, {group}", rows, f"rise_{step}")
        question = f"bits more after {step} steps, intrinsic and lost by the edit"
        mean(question, hurt, f"rise_{step}")
        mean(f"of these said after {step} steps", hurt, f"kept_{step}")
    for name, rows in (("wordings", intrinsic), ("occurrences", intrinsic), ("statements", edited)):
        of = "wordings" if name == "statements" else name
        for step in (STEPS[2], last):  # at the last some facts are wholly lost
            of_rows(f"a of {name}, after {step} steps", partial(power, of=of, step=step), rows)
    for name, rows in (("wordings", intrinsic), ("statements", edited)):
        for count, some in rows.groupby("wordings"):
            question = f"bits more after {last} steps, {count:.0f} {name}"
            mean(question, some, f"rise_{last}")
    for step in (STEPS[1], last):
        question = f"kept after {step} steps, edited less intrinsic"
        of_rows(question, partial(gap, step=step), one)
        mean(f"{question}, matched", pairs, f"kept_{step}")
    return cells


def _cell(values: tuple, n: int) -> str:
    value, low, high = values
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}], {n}"


def judged(done: pd.DataFrame) -> str:
    """A line a question, a column a model."""
    table = {name: answers(part) for name, part in done.groupby("model")}
    lines = [["", *table]]
    for question in next(iter(table.values())):
        lines.append([question, *(cells.get(question, "") for cells in table.values())])
    return markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", default=TRIALS)
    parser.add_argument("--out", type=Path, default=FINDINGS / "elasticity.csv")
    parser.add_argument("--judge", action="store_true", help="judge what the file has")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    resumed(options.out, () if options.judge else options.trials, tried)
    print(judged(read(options.out)))


if __name__ == "__main__":
    main()
