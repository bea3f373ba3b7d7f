"""What the editors do to a real model: study facts, asked plainly, that no number was chosen on.

python -m tests.benchmarks.real [MODEL] [--editors memit,alphaedit] [--out FILE.csv]     # goes on
with what the file has; prints a line an editor, with 95 % intervals over facts
"""

import argparse
from pathlib import Path

import pandas as pd

from tests.benchmarks.outcomes import in_batches, known_facts, show
from workbench import editing, models

EDITED, WATCHED = 50, 100
EDITORS = "ft,rome,memit,alphaedit,grace,incontext"
ONE_BY_ONE = ("ft", "rome")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--editors", default=EDITORS)
    parser.add_argument("--out", type=Path, default=Path("real.csv"))
    options = parser.parse_args()
    model = models.load(options.model, device="cpu")
    requests = known_facts(model, "study", source="plain")
    requests = [request for request in requests if not request.fact.names_answer]
    edited, watched = requests[:EDITED], requests[EDITED : EDITED + WATCHED]
    print(f"{len(requests)} known, {len(edited)} edited, {len(watched)} watched", flush=True)
    done = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame({"editor": []})
    for editor in options.editors.split(","):
        if editor not in set(done.editor):
            hparams = editing.preset(editor, model)
            size = 1 if editor in ONE_BY_ONE else 10
            rows = in_batches(model, editor, edited, size, hparams, watched)
            done = pd.concat([done, rows.assign(editor=editor, at_once=size)])
            done.to_csv(options.out, index=False)
        rows = done[done.editor == editor]
        show(options.model, editor, f"{rows.at_once.iloc[0]} at once", rows)


if __name__ == "__main__":
    main()
