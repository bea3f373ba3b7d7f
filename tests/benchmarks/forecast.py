"""Which edits will a tuning lose? Foretold from what is known before it, and judged.

    python -m tests.benchmarks.forecast [TRIAL ...] [--out FILE.csv]
    python -m tests.benchmarks.forecast --judge

A trial is MODEL:EDITOR:EDITS:TASK:SEED. Facts of split "study" are edited at once, their signs are
read, and the model is tuned with the task's usual numbers to its usual threshold. A row is a fact
whose edit took: its signs and whether it was kept, after EQUAL steps and at the end.

Signs, of the edited model before the tuning (none is a wording that judges):
    margin: the smallest lead, in nats, of one of the new answer's tokens over any other token
    log_p: of the new answer, nats
    old: the lead of the old answer's tokens in the model before the edit, nats
    written: mean over the edited blocks of |D k| / |W k|, k the key at the subject's last token, W
        before the edit
    overlap: mean over those blocks of cos^2 of k and the keys of the task's rows
    slope: how far the margin moves by one expected step of the task, nats
    leap: the margin after AHEAD such steps at once
An expected step is `ways.expected_step`.

A forecast is a logistic regression on signs (and the relation), fitted on trials of other tasks and
seeds, without the subjects that it is judged on. Signs are standardised within their trial, which
needs no outcome, so that no sign can tell trials apart; `plain margin` is the margin itself. AUROC
is of facts within a trial. Intervals of 95 %, by bootstrap over settings (a model and seed, whose
trials share their facts) and over facts. Brier score and calibration are of the chances.
"""

import argparse
import warnings
from pathlib import Path

import numpy
import pandas as pd
import torch
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from tests.benchmarks.lasting import setting
from tests.benchmarks.outcomes import FINDINGS, leads, markdown, resumed, trials_of
from tests.benchmarks.ways import expected_step
from workbench import deltas
from workbench.activations import recorded
from workbench.models import Model
from workbench.traces.subjects import keys_of
from workbench.tracking.retention import measure
from workbench.tuning import plans
from workbench.tuning.finetune import Settings, collate, finetune
from workbench.tuning.tasks import Task

EQUAL = 40  # steps of the second reading
AHEAD = 10
SIGNS = ["margin", "log_p", "old", "written", "overlap", "slope", "leap"]
PLAIN = "plain margin"
FORECASTS = {
    "leap": ["leap"],
    "margin, slope": ["margin", "slope"],
    "margin, leap": ["margin", "leap"],
    "all signs": SIGNS,
    "all and relation": [*SIGNS, "relation"],
}


def overlaps(model: Model, task: Task, keys: dict, layers) -> torch.Tensor:
    """Mean over blocks and tokens of the task's first rows of cos^2 with each key, (n,)."""
    rows = collate([task.train[row] for row in range(min(64, len(task.train)))])
    mask = rows["attention_mask"].bool()
    modules = {layer: model.down_projection(layer) for layer in layers}
    with torch.no_grad(), recorded(modules, inputs=True) as inputs:
        model.network(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    shares = []
    for layer, values in inputs.items():
        others = torch.nn.functional.normalize(values[mask].double(), dim=-1)
        ours = torch.nn.functional.normalize(keys[layer][0], dim=-1)
        shares.append((ours @ others.T).square().mean(1))
    return torch.stack(shares).mean(0)


def relative_shift(model: Model, edit, keys: dict) -> torch.Tensor:
    """Mean over the edited blocks of |D k| / |W k|, (n,)."""
    ratios = []
    for name, change in edit.changes.items():
        module = dict(model.network.named_modules())[name]
        layer = next(one for one in keys if model.down_projection(one) is module)
        key = keys[layer][0]  # (n, d_in)
        ours = (key @ change.matrix().double().T).norm(dim=1)
        before = model.weight(layer).detach().double() - change.matrix().double()
        ratios.append(ours / (key @ before.T).norm(dim=1))
    return torch.stack(ratios).mean(0)


def moved(model: Model, steps: dict, times: float, margin) -> torch.Tensor:
    """How the margin changes when the weights go so many expected steps."""
    before = margin()
    with deltas.preserved(model.network), torch.no_grad():
        for name, weight in model.network.named_parameters():
            weight += times * steps[name]
        return margin() - before


def tried(text: str) -> pd.DataFrame:
    """A row a fact whose edit took."""
    name, editor, edits, task_name, seed = text.split(":")
    here = setting(name, editor, int(edits), task_name, int(seed), "study")
    model, task, usual = here.model, here.task, here.usual
    settings = Settings(
        max_steps=usual.max_steps,
        eval_every=10,
        batch_size=usual.batch_size,
        learning_rate=usual.learning_rate,
        threshold=usual.threshold,
        seed=here.seed,
    )
    targets = [request.target for request in here.edited]
    about = [request.fact for request in here.edited]
    table = pd.DataFrame({"fact_id": [fact.id for fact in about]})
    table["subject"] = [fact.subject for fact in about]
    table["relation"] = [fact.relation for fact in about]
    table["old"] = leads(model, here.edited, [fact.object for fact in about])[0]
    layers = here.edit.layers
    looks: dict[int, list] = {}

    def look(step: int, epoch: float) -> None:
        looks[step] = measure(model, here.edited).retained.tolist()

    with deltas.preserved(model.network), deltas.applied(model, here.edit):
        keys = keys_of(model, here.edited, layers)
        table["margin"], table["log_p"] = leads(model, here.edited, targets)
        table["written"] = relative_shift(model, here.edit, keys)
        table["overlap"] = overlaps(model, task, keys, layers)
        steps = expected_step(model, task, settings)

        def margin():
            return leads(model, here.edited, targets)[0]

        table["slope"] = moved(model, steps, 1, margin)
        table["leap"] = moved(model, steps, AHEAD, margin) + table.margin.to_numpy()
        history = finetune(model, task, plans.resolve(model, "all", layers), settings, look)
    end = max(looks)
    table["kept_equal"] = looks[EQUAL] if EQUAL in looks else looks[end]
    table["kept"] = looks[end]
    table = table.assign(steps=end, ended=history.ended)
    return table[numpy.array(looks[0])]


def fitted(rows: pd.DataFrame, signs: list[str]):
    """P(kept) as a logistic regression of the signs."""
    relation = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), [one for one in signs if one == "relation"]),
        remainder="passthrough",
    )
    model = make_pipeline(relation, LogisticRegression(max_iter=1000))
    return model.fit(rows[signs], rows.kept)


def foretold(done: pd.DataFrame, signs: list[str]) -> pd.Series:
    """P(kept) of each row, by a fit on other tasks, seeds and subjects, of the same model."""
    parts = []
    by_trial = done.groupby("trial")[SIGNS]
    scale = by_trial.transform("std").replace(0, 1)
    done = done.assign(**(done[SIGNS] - by_trial.transform("mean")) / scale)
    for _, part in done.groupby("trial"):
        one = part.iloc[0]
        others = (done.task != one.task) & (done.seed != one.seed) & (done.model == one.model)
        rows = done[others & ~done.subject.isin(part.subject)]
        if rows.kept.nunique() == 2:
            chance = fitted(rows, signs).predict_proba(part[signs])[:, 1]
            parts.append(pd.Series(chance, part.index))
    return pd.concat(parts)


def judged(done: pd.DataFrame, draws: int = 500) -> pd.DataFrame:
    """A row a model (all of them), task and forecast."""
    chances = {name: foretold(done, signs) for name, signs in FORECASTS.items()}
    about = ["trial", "model", "task", "seed", "kept"]
    done = done[about].assign(**chances, **{PLAIN: done.margin}).dropna()
    rows = []
    groups = [(("all", task), part) for task, part in done.groupby("task")]
    groups += [*done.groupby(["model", "task"]), (("all", "all"), done)]
    for (model, task), part in groups:
        trials = [one for _, one in part.groupby("trial") if one.kept.nunique() == 2]
        if not trials:
            continue
        found = _aurocs(trials)
        drawn = pd.DataFrame([_aurocs(sample) for sample in _drawn(trials, draws)])
        low, high = drawn.quantile(0.025), drawn.quantile(0.975)
        leads = drawn.sub(drawn[PLAIN], axis=0)
        gaps = _gaps([one for _, one in part.groupby("trial")], draws)
        for name in (PLAIN, *FORECASTS):
            row = {"model": model, "task": task, "forecast": name}
            row |= {"auroc": found[name], "low": low[name], "high": high[name]}
            row["lead"] = found[name] - found[PLAIN]
            row["lead_low"], row["lead_high"] = leads[name].quantile([0.025, 0.975])
            if name != PLAIN:
                row["brier"] = (part[name] - part.kept).pow(2).mean()
                row["calibration"] = calibration(part[name], part.kept)
                row["gap_low"], row["gap_high"] = gaps[name].quantile([0.025, 0.975])
            row |= {"kept": part.kept.mean(), "trials": len(trials), "n": len(part)}
            rows.append(row)
    return pd.DataFrame(rows)


def _drawn(trials: list[pd.DataFrame], draws: int):
    """Settings, with all their trials, and facts in each of these."""
    settings: dict[tuple, list] = {}
    for one in trials:
        settings.setdefault((one.model.iloc[0], one.seed.iloc[0]), []).append(one)
    of_settings = list(settings.values())
    random = numpy.random.default_rng(0)
    for _ in range(draws):
        chosen = random.integers(0, len(of_settings), len(of_settings))
        several = [one for number in chosen for one in of_settings[number]]
        yield [one.sample(frac=1, replace=True, random_state=random) for one in several]


def _gaps(trials: list[pd.DataFrame], draws: int) -> pd.DataFrame:
    """The calibration of each forecast on each draw."""
    samples = (pd.concat(sample) for sample in _drawn(trials, draws))
    return pd.DataFrame(
        [{name: calibration(one[name], one.kept) for name in FORECASTS} for one in samples]
    )


def _aurocs(trials: list[pd.DataFrame]) -> pd.Series:
    """Of each forecast, the mean over trials; of one in which all or none was kept there is none.

    The share of pairs of a kept and a lost edit in which the kept one was given the higher chance,
    from the sum of the ranks of those kept.
    """
    rows = []
    for one in trials:
        kept = one.kept.to_numpy(bool)
        pairs = kept.sum() * (~kept).sum()
        if pairs:
            ranks = one[[PLAIN, *FORECASTS]].rank()[kept].sum()
            rows.append((ranks - kept.sum() * (kept.sum() + 1) / 2) / pairs)
    return pd.DataFrame(rows).mean()


def calibration(chance: pd.Series, kept: pd.Series, parts: int = 10) -> float:
    """Mean distance between chance and share kept, over tenths of the chance."""
    bins = (chance * parts).astype(int).clip(upper=parts - 1)
    gaps = numpy.bincount(bins, weights=chance - kept.astype(float))
    return float(numpy.abs(gaps).sum() / len(chance))


def shown(table: pd.DataFrame) -> str:
    """A line a model and task, a column a forecast: AUROC and its lead over the plain margin."""
    lines = [["model", "task", "trials", "n", "kept", PLAIN, *FORECASTS]]
    for (model, task), part in table.groupby(["model", "task"], sort=False):
        one = part.iloc[0]
        line = [model, task, str(one.trials), str(one.n), f"{one.kept:.2f}"]
        for row in part.itertuples():
            cell = f"{row.auroc:.2f} [{row.low:.2f}, {row.high:.2f}]"
            lead = f"; {row.lead:+.2f} [{row.lead_low:+.2f}, {row.lead_high:+.2f}]"
            line.append(cell if row.forecast == PLAIN else cell + lead)
        lines.append(line)
    return markdown(lines)


def calibrated(table: pd.DataFrame) -> str:
    """A line a model and task, a column a forecast: how far its chances are off; Brier's score."""
    lines = [["model", "task", "n", "kept", *FORECASTS]]
    table = table[table.forecast != PLAIN]
    for (model, task), part in table.groupby(["model", "task"], sort=False):
        line = [model, task, str(part.n.iloc[0]), f"{part.kept.iloc[0]:.2f}"]
        for row in part.itertuples():
            gap = f"{row.calibration:.2f} [{row.gap_low:.2f}, {row.gap_high:.2f}]"
            line.append(f"{gap}; {row.brier:.2f}")
        lines.append(line)
    return markdown(lines)


def read(path: Path) -> pd.DataFrame:
    done = pd.read_csv(path)
    names = ["model", "editor", "edits", "task", "seed"]
    done[names] = done.trial.str.split(":", expand=True)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*")
    parser.add_argument("--out", type=Path, default=FINDINGS / "forecast.csv")
    parser.add_argument("--judge", action="store_true", help="judge what the file has")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trials = options.trials or trials_of("forecast.csv")
    resumed(options.out, () if options.judge else trials, tried)
    table = judged(read(options.out))
    table.to_csv(options.out.with_name("forecasts.csv"), index=False, float_format="%.3f")
    print(shown(table))


if __name__ == "__main__":
    main()
