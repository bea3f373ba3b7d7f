"""Every measure of every editor on a model: study facts that no number was chosen on.

python -m tests.benchmarks.measures [MODEL] [--editors memit,ft] [--facts 50] [--out FILE.csv]
# goes on with what the file has; prints means with 95 % intervals over facts, as a README has them
"""

import argparse
from pathlib import Path

import pandas as pd

from tests.benchmarks.outcomes import known_facts
from workbench import editing, evaluation, models
from workbench.checkpoints import is_world

EDITORS = "ft,rome,memit,alphaedit,malmen,grace,incontext"
ONE_BY_ONE = ("ft", "rome")
BATCH = 10
SHOWN = (  # of the printed table
    *("score", "efficacy_exact", "paraphrase", "paraphrase_exact", "neighbourhood", "contained"),
    *("loss", "entropy", "same_subject", "new_object", "hop"),
    *("mentioned_new", "asked_new", "passage_new"),
)


def measured(model, editor: str, requests: list, unedited: dict) -> pd.DataFrame:
    """The tidy table of all batches of facts, each edited into a copy of its own. `unedited` keeps
    what the model says before, for the next editor.
    """
    hparams = editing.preset(editor, model)
    resources = editing.EDITORS[editor].prepare(model, hparams)
    size = 1 if editor in ONE_BY_ONE else BATCH
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    edits = editing.edit_each(editor, model, batches, hparams, resources)
    tables = []
    for batch, edit in zip(batches, edits, strict=True):
        key = tuple(request.fact.id for request in batch)
        if key not in unedited:
            unedited[key] = evaluation.asked(model, batch)
        with edit.applied(model):
            after = evaluation.asked(model, batch)
        tables.append(evaluation.compared(unedited[key], after))
    return pd.concat(tables, ignore_index=True)


def cell(row) -> str:
    return f"{row.after:.2f} [{row.low:.2f}, {row.high:.2f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="world-gpt2")
    parser.add_argument("--editors", default=EDITORS)
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("measures.csv"))
    options = parser.parse_args()
    model = models.load(options.model, device="cpu")
    source = "world" if is_world(options.model) else "plain"
    requests = known_facts(model, "study", source=source)
    requests = [one for one in requests if not one.fact.names_answer][: options.facts]
    done = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame({"editor": []})
    unedited: dict = {}
    for editor in options.editors.split(","):
        if editor not in set(done.editor):
            rows = measured(model, editor, requests, unedited)
            rows = rows.assign(editor=editor, model=options.model)
            done = pd.concat([done, rows])
            done.to_csv(options.out, index=False)
    columns = {}
    for editor, table in done.groupby("editor", sort=False):
        means = evaluation.summary(table).set_index(["measure", "quantity"])
        columns["unedited"] = means.before.map("{:.2f}".format)
        columns[editor] = means.apply(cell, axis=1)
        columns["n"] = means.n
    table = pd.DataFrame(columns)
    table = table[["n", *table.columns.drop("n")]]
    print("| | " + " | ".join(table.columns) + " |\n|" + "---|" * (table.shape[1] + 1))
    for (measure, quantity), row in table.iterrows():
        if quantity in SHOWN:
            print(f"| {measure}: {quantity} | " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
