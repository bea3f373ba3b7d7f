"""Where fine-tuning loses an edit: each part of the tuned model set back to what it was before the
tuning, and each part of the untuned one set to what it is after; study facts.

    python -m tests.benchmarks.patching [TRIAL ...] [--rows FOLDER] [--out FILE.csv]

A trial is MODEL:EDITOR:SEED: 30 known facts, whose kinds of object are a half of the world's, in
one change; then task facts with all weights moving, twice from the same edited model: on facts of
every relation (`any`), and on those of the kinds of object that no edited fact has (`apart`). After
each of STEPS the model is patched (`wb.traces.patched`) and the mean shift of the relation on other
subjects taken away (`without_shift`). A trial's rows, a fact each, are kept in the folder
and not made again; the table is over the facts whose edit took, of all seeds, with 95 % intervals
(bootstrap over seeds and facts). Without a trial: all of TRIALS.
"""

import argparse
import random
import warnings
from pathlib import Path

import pandas as pd
import torch

import workbench as wb
from tests.benchmarks.outcomes import interval, known_facts, markdown
from workbench import deltas, editing, facts, files, models
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode
from workbench.traces.patching import margins
from workbench.tracking.retention import answers_after, measure, next_logits
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune
from workbench.tuning.numbers import usual
from workbench.tuning.tasks import Data

STEPS = (20,)
EDITS = 30
N_TRAIN = 300
OTHERS = 16  # known facts of each relation on which its shift is seen
MODELS = ("world-gpt2", "world-llama")
EDITORS = ("memit", "rome", "ft", "alphaedit")
SEEDS = {"memit": (0, 1, 2), "rome": (0, 1), "ft": (0,), "alphaedit": (0,)}
TRIALS = [
    f"{name}:{editor}:{seed}" for editor in EDITORS for seed in SEEDS[editor] for name in MODELS
]
TRIALS += ["world-gpt2:ft:1"]
_BACK = ("set back", "weights")
PARTS = {  # a line of the table -> measure, by, part, block
    "as tuned": (*_BACK, "nothing", -1),
    "all attention set back": (*_BACK, "attention", -1),
    "all MLPs": (*_BACK, "mlps", -1),
    "block 0": (*_BACK, "block", 0),
    "embeddings": (*_BACK, "embeddings", -1),
    "norms": (*_BACK, "norms", -1),
    "edited matrices": (*_BACK, "edited matrices", -1),
    "residual behind block 4, subject": ("set back", "subject", "block", 4),
    "residual behind block 4, end": ("set back", "end", "block", 4),
    "residual behind block 9, end": ("set back", "end", "block", 9),
    "attention alone set forth": ("set forth", "weights", "attention", -1),
    "MLPs alone": ("set forth", "weights", "mlps", -1),
    "block 0 alone": ("set forth", "weights", "block", 0),
    "edited matrices alone": ("set forth", "weights", "edited matrices", -1),
    "without the relation's mean shift": ("shift", "logits", "without", -1),
    "without that of other relations": ("shift", "logits", "elsewhere", -1),
}


def rows_of(trial: str) -> pd.DataFrame:
    """Every fact's rows of one edited model."""
    name, editor, seed = trial.split(":")
    seed = int(seed)
    model, untuned = (models.load(name, device="cpu") for _ in range(2))
    requests, others, apart = chosen(model, seed)
    hparams = editing.preset(editor, model)
    module = editing.EDITORS[editor]
    edit = module.edit(model, requests, hparams, module.prepare(model, hparams), seed=seed)
    tables = []
    with deltas.applied(untuned, edit):
        took = measure(untuned, requests).retained.tolist()
        for task, avoid in (("any", requests + others), ("apart", requests + others + apart)):
            about = {"model": name, "editor": editor, "seed": seed, "task": task}
            tables += tuned(model, untuned, edit, requests, others, avoid, about)
    table = pd.concat(tables, ignore_index=True)
    return table.assign(took=table.fact_id.map(dict(zip(ids(requests), took, strict=True))))


def ids(requests) -> list[str]:
    return [request.fact.id for request in requests]


def chosen(model, seed: int) -> tuple[list, list, list]:
    """Facts to edit; other known ones of their relations; all facts of kinds of object that an
    edited fact has.
    """
    pool = facts.read("world")
    kinds = sorted({request.fact.category for request in pool})
    random.Random(seed).shuffle(kinds)
    inside = set(kinds[: len(kinds) // 2])
    known = [one for one in known_facts(model, "study", seed + 1) if one.fact.category in inside]
    by_subject = {}
    for request in known:
        by_subject.setdefault(request.fact.subject.lower(), request)
    requests = list(by_subject.values())[:EDITS]
    edited = {request.fact.subject.lower() for request in requests}
    others = []
    for relation in {request.fact.relation for request in requests}:
        alike = [one for one in known if one.fact.relation == relation]
        others += [one for one in alike if one.fact.subject.lower() not in edited][:OTHERS]
    return requests, others, [one for one in pool if one.fact.category in inside]


def tuned(model, untuned, edit, requests, others, avoid, about: dict) -> list[pd.DataFrame]:
    """The rows after each of STEPS of a tuning that keeps off the facts to avoid."""
    numbers = usual("facts", "", model.name)
    data = Data(n_train=N_TRAIN, n_valid=32, seed=about["seed"], avoid=tuple(avoid))
    task = tasks.facts_task(model, data)
    settings = Settings(
        max_steps=max(STEPS),
        eval_every=min(STEPS),
        batch_size=numbers.batch_size,
        learning_rate=numbers.learning_rate,
        threshold=2.0,  # never reached
        seed=about["seed"],
    )
    rows = []

    def look(step: int, epoch: float) -> None:
        if step not in STEPS:
            return
        layers = edit.layers
        said = measure(model, requests).assign(true=[one.fact.object for one in requests])
        said["says_true"] = said.top_token.map(len).gt(0) & said.apply(begins, axis=1)
        parts = {
            "said": said[["fact_id", "retained", "says_true"]],
            "set back": wb.traces.patched(model, untuned, requests, layers),
            "set forth": wb.traces.patched(untuned, model, requests, layers, ["weights"]),
            "shift": without_shift(model, untuned, requests, others),
        }
        for name, part in parts.items():
            rows.append(part.assign(**about, step=step, measure=name, n_train=len(task.train)))

    with deltas.preserved(model.network), deltas.applied(model, edit):
        finetune(model, task, plans.resolve(model, "all"), settings, look)
    return rows


@torch.no_grad()
def without_shift(
    model: Model, source: Model, requests: Requests, others: Requests
) -> pd.DataFrame:
    """How much of a loss is the whole relation's: the mean shift of the logits from source to model
    on other subjects, after the same prompt, is taken from the model's.

    Args:
        source: the edited model from before the tuning.
        others: facts of whose subjects those of a request's relation are asked.
    Returns:
        DataFrame[fact_id, before, after, without, elsewhere, target, target_shift], a row a
        request. Margins of the new answer's first token, nats: of the source, of the model, of it
        without the relation's shift, and, as a control, without the mean shift of the requests'
        other relations (null where there are none). target: how far the answer's own logit rose,
        over the mean of all tokens; target_shift: how far on the other subjects.
    """
    tokens = first_tokens(model, requests)
    changes = []
    for request in requests:
        fact = request.fact
        alike = [one.fact.subject for one in others if one.fact.relation == fact.relation]
        alike = [subject for subject in alike if subject != fact.subject]
        prompts = [facts.fill(fact.prompt, subject) for subject in (fact.subject, *alike)]
        encoded = encode(model, prompts)
        old, new = (next_logits(one, encoded).cpu() for one in (source, model))
        rise = new - old
        rise -= rise.mean(1, keepdim=True)
        changes.append((old[0], new[0], rise[0], rise[1:].mean(0)))
    old, new, rise, shift = map(torch.stack, zip(*changes, strict=True))  # (n, vocab)
    relations = pd.Series([request.fact.relation for request in requests])
    is_other = torch.tensor(relations.to_numpy()[:, None] != relations.to_numpy())
    elsewhere = (is_other / is_other.sum(1, keepdim=True)) @ shift
    table = pd.DataFrame({"fact_id": [request.fact.id for request in requests]})
    logits = {"before": old, "after": new, "without": new - shift, "elsewhere": new - elsewhere}
    for name, values in logits.items():
        table[name] = margins(values, tokens).tolist()
    table["target"] = rise.gather(1, tokens[:, None])[:, 0].tolist()
    table["target_shift"] = shift.gather(1, tokens[:, None])[:, 0].tolist()
    return table


def first_tokens(model, requests) -> torch.Tensor:
    """The first token (n,) of each new answer after its prompt."""
    questions = [request.fact.question for request in requests]
    asked = answers_after(model, questions, [request.target for request in requests])
    return asked.encoded.input_ids[torch.arange(len(questions)), asked.start]


def begins(row: pd.Series) -> bool:
    return row.true.startswith(row.top_token)


def tidied(table: pd.DataFrame) -> pd.DataFrame:
    """Every row with a margin or a truth: those of the shift and of what is said as parts, too; and
    `base`, the part of the same fact that a gain is over.
    """
    key = ["model", "editor", "seed", "task", "step", "measure", "fact_id", "took"]
    columns = [*key, "by", "part", "layer", "retained", "margin"]
    rows = [table[table.measure.str.startswith("set")][columns].assign(base="nothing")]
    shift = table[table.measure == "shift"].drop(columns=["part", "margin"])
    logits = shift.melt(key, ["before", "after", "without", "elsewhere"], "part", "margin")
    rows.append(logits.assign(by="logits", retained=logits.margin > 0, base="after"))
    own = shift.melt(key, ["target", "target_shift"], "part", "margin")
    rows.append(own.assign(by="logits", base="target_shift"))
    said = table[table.measure == "said"].rename(columns={"retained": "says_new"})
    said = said.drop(columns="part").melt(key, ["says_new", "says_true"], "part", "retained")
    rows.append(said.assign(by="text", base="says_new"))
    return pd.concat(rows, ignore_index=True).fillna({"layer": -1}).astype({"layer": int})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Over the facts whose edit took: n, the share retained, the mean margin in nats, and the gains
    of both over the base part of the same facts, each gain with its 95 % interval.
    """
    rows = tidied(table[table.took])
    group = ["model", "editor", "task", "step", "measure"]
    fact = [*group, "seed", "fact_id"]
    base = rows[rows.part == rows.base].set_index([*fact, "base"])[["retained", "margin"]]
    rows = rows.join(base, on=[*fact, "base"], rsuffix="_base")
    made = []
    for about, part in rows.groupby([*group, "by", "part", "layer"], sort=False):
        row = dict(zip([*group, "by", "part", "layer"], about, strict=True))
        row |= {"n": len(part), "seeds": part.seed.nunique()}
        for name in ("retained", "margin"):
            values = part[name].astype(float)
            gains = values - part[f"{name}_base"].astype(float)
            row |= {name: values.mean(), f"{name}_gain": gains.mean()}
            row[f"{name}_low"], row[f"{name}_high"] = interval(gains, part.seed)
        made.append(row)
    return pd.DataFrame(made).round(3)


def shown(table: pd.DataFrame) -> str:
    """A line a part of PARTS, a column a model, editor and task: the share of facts retained and
    the gain in margin, nats, with its interval.
    """
    head, lines = [""], [[name] for name in PARTS]
    order = [EDITORS.index(editor) for editor in table.editor]
    table = table.assign(order=order).sort_values(["order", "model", "task"], kind="stable")
    for (model, editor, task), rows in table.groupby(["model", "editor", "task"], sort=False):
        [n] = rows.n.unique()
        [seeds] = rows.seeds.unique()
        head.append(f"{model}, {editor}, {task} (n {n}; seeds {seeds})")
        rows = rows.set_index(["measure", "by", "part", "layer"])
        before = rows.loc[("shift", "logits", "before", -1)]
        for line, (name, place) in zip(lines, PARTS.items(), strict=True):
            row = rows.loc[place]
            gain = f"{row.margin_gain:+.1f} [{row.margin_low:+.1f}, {row.margin_high:+.1f}]"
            if name == "as tuned":
                gain = f"{before.margin:.1f} before, {row.margin:.1f} after"
            line.append(f"{row.retained:.2f}; {gain}")
    return markdown([head, *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", default=TRIALS)
    parser.add_argument("--rows", type=Path, default=Path("patching"))
    parser.add_argument("--out", type=Path, default=Path("patching.csv"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.rows.mkdir(exist_ok=True, parents=True)
    for trial in options.trials:
        path = options.rows / f"{trial.replace(':', '-')}.parquet"
        if not path.exists():
            table = rows_of(trial)
            with files.written(path) as partial:
                table.to_parquet(partial)
            print(trial, flush=True)
    done = [pd.read_parquet(path) for path in sorted(options.rows.glob("*.parquet"))]
    table = summary(pd.concat(done))
    table.to_csv(options.out, index=False)
    print(table[table.layer == -1].to_string(index=False))


if __name__ == "__main__":
    main()
