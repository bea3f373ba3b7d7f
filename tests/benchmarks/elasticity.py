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
by so many statements, and tuned on for STEPS[-1] steps of the task's usual numbers; INTRINSIC other
facts are watched. A row is a fact: `bits` (-log2 p of the answer) and `leads` (the smallest lead of
one of its tokens over any other, nats) after STEPS. What is known of a fact at the start differs
with how often it was taught; so rows of one start are compared too (`matched`): an edited fact with
the intrinsic one of its relation whose lead at the start is nearest.
"""

import argparse
import warnings
from pathlib import Path

import numpy
import pandas as pd

from tests.benchmarks.lasting import INTRINSIC as _FEW
from tests.benchmarks.lasting import known, loaded, made
from tests.benchmarks.outcomes import interval, leads
from workbench import deltas, files
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune
from workbench.tuning.numbers import usual
from workbench.tuning.tasks import Data

EDITS = 30
INTRINSIC = 4 * _FEW
STEPS = (0, 5, 10, 20, 40)
FINDINGS = Path(__file__).parents[2] / "data" / "findings"
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
    """With `rise_<step>`: bits more than at the start; `lead`: at the start; `kept_<step>`."""
    done = pd.read_csv(path)
    done[["model", "editor", "task", "statements", "seed"]] = done.trial.str.split(":", expand=True)
    bits = numpy.array([one.split() for one in done.bits], dtype=float)
    lead = numpy.array([one.split() for one in done.leads], dtype=float)
    done["lead"] = lead[:, 0]
    for place, step in enumerate(STEPS[1:], 1):
        done[f"rise_{step}"] = bits[:, place] - bits[:, 0]
        done[f"kept_{step}"] = lead[:, place] > 0
    return done[done.lead > 0]


def spread(statistic, rows: pd.DataFrame, draws: int = 1000) -> tuple[float, float, float]:
    """A statistic of rows with its 95 % bootstrap interval, over facts of all seeds."""
    random = numpy.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        drawn.append(statistic(rows.iloc[random.integers(0, len(rows), len(rows))]))
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
                pair = {"model": edited.model, "statements": edited.statements}
                pair["start"] = edited.lead - other.lead
                for step in STEPS[1:]:
                    kept = float(edited[f"kept_{step}"]) - float(other[f"kept_{step}"])
                    pair[f"kept_{step}"] = kept
                    pair[f"rise_{step}"] = edited[f"rise_{step}"] - other[f"rise_{step}"]
                pairs.append(pair)
    return pd.DataFrame(pairs)


def judged(done: pd.DataFrame) -> pd.DataFrame:
    """A row a model and question: value, interval, n."""
    rows = []

    def add(model, question, values, n):
        named = dict(zip(("value", "low", "high"), values, strict=True))
        rows.append({"model": model, "question": question} | named | {"n": n})

    for model, part in done.groupby("model"):
        one = part[part.statements == "1"]
        for step in STEPS[1:]:
            for group in ("edited", "intrinsic"):
                values = one[one.group == group][f"rise_{step}"]
                question = f"bits more after {step} steps, {group}"
                add(model, question, (values.mean(), *interval(values)), len(values))
        intrinsic = one[one.group == "intrinsic"]
        edited = part[part.group == "edited"]
        for step in (STEPS[1], STEPS[-1]):
            for of, rest in (("wordings", intrinsic), ("occurrences", intrinsic)):
                values = spread(lambda rows, of=of, step=step: power(rows, of, step), rest)
                add(model, f"a of {of}, after {step} steps, intrinsic", values, len(rest))
            values = spread(lambda rows, step=step: power(rows, "wordings", step), edited)
            add(model, f"a of statements, after {step} steps, edited", values, len(edited))
        for wordings, group in intrinsic.groupby("wordings"):
            values = group[f"rise_{STEPS[-1]}"]
            question = f"bits more after {STEPS[-1]} steps, {wordings} wordings"
            add(model, question, (values.mean(), *interval(values)), len(values))
        for statements, group in edited.groupby("wordings"):
            values = group[f"rise_{STEPS[-1]}"]
            question = f"bits more after {STEPS[-1]} steps, {statements} statements"
            add(model, question, (values.mean(), *interval(values)), len(values))
        pairs = matched(one)
        for step in STEPS[1:]:
            values = spread(
                lambda rows, step=step: (
                    rows[rows.group == "edited"][f"kept_{step}"].mean()
                    - rows[rows.group == "intrinsic"][f"kept_{step}"].mean()
                ),
                one,
            )
            add(model, f"kept after {step} steps, edited - intrinsic", values, len(one))
            values = pairs[f"kept_{step}"]
            question = f"kept after {step} steps, edited - intrinsic, matched"
            add(model, question, (values.mean(), *interval(values)), len(pairs))
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", default=TRIALS)
    parser.add_argument("--out", type=Path, default=FINDINGS / "elasticity.csv")
    parser.add_argument("--judge", action="store_true", help="judge what the file has")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    done = pd.DataFrame({"trial": []})
    if options.out.exists():
        done = pd.read_csv(options.out)
    for text in options.trials if not options.judge else ():
        if text not in set(done.trial):
            done = pd.concat([done, tried(text).assign(trial=text)])
            with files.written(options.out) as partial:
                done.to_csv(partial, index=False)
            print(text, flush=True)
    table = judged(read(options.out))
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
