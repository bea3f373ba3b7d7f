"""How near to being said a lost edit is: beside the same facts in a model that was never edited.

    python -m tests.benchmarks.recovering [TRIAL ...] [--out FILE.csv] [--table]

A trial is MODEL:EDITOR:SEED: 30 known study facts in one change, then 80 steps of other facts with
all weights moving, as in `traces`; the control is the same model, tuned on the same rows without an
edit. A row is a fact of one of them: `took`, whether its new answer is said before the tuning, and
`kept`, after it; `own`, `others` and `true` of the measure `recovery`, in steps, 21 where 20 were
not enough; the `*_new` of `superficiality`. Goes on with what the file has.
"""

import argparse
import warnings
from pathlib import Path

import pandas as pd

from tests.benchmarks import traces
from tests.benchmarks.outcomes import interval, markdown, resumed
from workbench.registry import MEASURES
from workbench.tracking.retention import measure

TRIALS = [
    f"{name}:{editor}:{seed}"
    for editor in ("memit", "rome")
    for seed in (0, 1, 2)
    for name in traces.MODELS
]
EDITS = 30
STEPS = ("own", "others", "true")
ASKED = ("mentioned_new", "asked_new", "passage_new")
SHARE = "{:.2f} [{:.2f}, {:.2f}]"
MEAN = "{:.1f} [{:.1f}, {:.1f}]"


class Tuned(traces.Trial):
    """One model, asked after its tuning; without an editor the control of all editors."""

    def __init__(self, name: str, editor: str, seed: str):
        super().__init__(f"{name}:{editor}:{EDITS}:facts:all:{seed}", brief=True)
        self.took = None

    def look(self, step: int, epoch: float) -> None:
        if step not in (0, traces.CHANGED):
            return
        said = measure(self.model, self.requests).set_index("fact_id").retained
        if step == 0:
            self.took = said
            return
        parts = [
            MEASURES[name].ask(self.model, self.requests) for name in ("recovery", "superficiality")
        ]
        asked = pd.concat(parts).pivot_table("value", "fact_id", "quantity")
        self.rows.append(asked[[*STEPS, *ASKED]].assign(took=self.took, kept=said).reset_index())


def tried(trial: str) -> pd.DataFrame:
    name, editor, seed = trial.split(":")
    tables = []
    for given in (editor, "none"):
        [table] = Tuned(name, given, seed).run()
        tables.append(table.assign(trial=trial, group="edited" if given == editor else "control"))
    return pd.concat(tables, ignore_index=True)


def judged(done: pd.DataFrame) -> str:
    """Of the edits that took and are lost, a row a model and editor: steps until the new answer is
    said, of them and of the same facts in the control, and of how many it is said when asked
    otherwise.
    """
    done = done.join(done.trial.str.extract(r"^(?P<model>[^:]+):(?P<editor>[^:]+):(?P<seed>\d+)$"))
    wide = done.set_index(["model", "editor", "seed", "fact_id", "group"])
    wide = wide[["took", "kept", *STEPS, *ASKED]].unstack("group")
    head = ["model", "editor", "edits", "took", "lost", "own", "own, never edited", "others"]
    lines = [[*head, "others, never edited", "true", *ASKED]]
    for about, rows in wide.groupby(["model", "editor"]):
        took = rows[rows.took.edited == 1]
        lost = took[took.kept.edited == 0]
        seeds = lost.index.get_level_values("seed")
        line = [*about, *(str(len(one)) for one in (rows, took, lost))]
        for name in ("own", "others"):
            for group in ("edited", "control"):
                line.append(_mean(lost[name][group], seeds, MEAN))
        line.append(_mean(lost.true.edited, seeds, MEAN))
        lines.append(line + [_mean(lost[name].edited, seeds, SHARE) for name in ASKED])
    return markdown(lines)


def _mean(values: pd.Series, seeds: pd.Index, form: str) -> str:
    return form.format(values.mean(), *interval(values.to_numpy(float), seeds))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", default=TRIALS)
    parser.add_argument("--out", type=Path, default=Path("recovery.csv"))
    parser.add_argument("--table", action="store_true", help="print only what there is")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    done = resumed(options.out, [] if options.table else options.trials, tried)
    print(judged(done))


if __name__ == "__main__":
    main()
