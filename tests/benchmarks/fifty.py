"""50 study facts in one model: in one batch, and in turn (batches of 10, one by one for single-fact
editors).

python -m tests.benchmarks.fifty [MODEL ...]      # prints a line for each editor and way, and what
is left of all but the last batch
"""

import sys

from tests.benchmarks.outcomes import known_facts, outcome, show
from workbench import checkpoints, editing, models

EDITED, WATCHED = 50, 100


def main():
    for name in sys.argv[1:] or checkpoints.WORLD_MODELS:
        model = models.load(name, device="cpu")
        requests = known_facts(model, "study")
        edited, watched = requests[:EDITED], requests[EDITED : EDITED + WATCHED]
        for editor, module in editing.EDITORS.items():
            hparams = editing.preset(editor, model)
            resources = module.prepare(model, hparams)
            show(
                name,
                editor,
                "one batch",
                outcome(model, module.edit(model, edited, hparams, resources), edited, watched),
            )
            size = 1 if editor in ("ft", "rome") else 10
            batches = [edited[start : start + size] for start in range(0, EDITED, size)]
            table = outcome(
                model,
                editing.edit_in_turn(editor, model, batches, hparams, resources),
                edited,
                watched,
            )
            show(name, editor, f"in turn by {size}", table)
            show(name, editor, f"in turn by {size}, all but the last batch", table[:-size])


if __name__ == "__main__":
    main()
