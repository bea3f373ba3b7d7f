"""Choose the edited layer and the learning rate of FT and ROME for the world models, on the tuning facts only.

    python tests/benchmarks/choose_layers.py [MODEL ...]      # prints the table and writes data/world/choices.csv

Each candidate edits the same tuning facts, one edit a model; no study fact is seen. Score: mean of efficacy on the edit prompt, on
templates withheld from the fact, and of locality (other known tuning facts still answered).
"""

import random
import sys

import pandas as pd
from tqdm.auto import tqdm

from workbench import deltas, editing, facts, models
from workbench.tracking.retention import measure_prompts

FACTS, WATCHED = 16, 24
CANDIDATES = {
    "ft": [{"layers": [layer], "learning_rate": rate} for layer in range(8) for rate in (1e-3, 3e-3)],
    "rome": [{"layers": [layer]} for layer in range(8)],
}


def tuning_facts(model):
    """Known tuning facts in a seeded order: those to edit, and others to watch."""
    pool = [request for request in facts.read("world") if request.fact.split == "tuning"]
    random.Random(0).shuffle(pool)
    table = measure_prompts(model, [request.fact.question for request in pool], [request.fact.object for request in pool])
    known = [request for request, top, margin in zip(pool, table.top_is_expected, table.margin, strict=True) if top and margin >= 0.1]
    return known[:FACTS], known[FACTS : FACTS + WATCHED]


def score(model, editor, hparams, resources, edited, watched):
    """Shares over the edits: target on the edit prompt, on withheld templates, and watched facts still answered."""
    rows = []
    for request in edited:
        delta = editing.EDITORS[editor].edit(model, [request], hparams, resources)
        others = [other for other in watched if other.fact.subject != request.fact.subject]
        prompts = [request.fact.question, *request.held_out, *(other.fact.question for other in others)]
        answers = [request.target] * (1 + len(request.held_out)) + [other.fact.object for other in others]
        with deltas.applied(model, delta):
            kept = measure_prompts(model, prompts, answers).retained
        n = 1 + len(request.held_out)
        solved = (delta.record.get("p_target") or [float("nan")])[0]
        rows.append({"efficacy": kept[0], "held_out": kept[1:n].mean(), "locality": kept[n:].mean(), "p_target": solved})
    return pd.DataFrame(rows)


def main():
    found = []
    for name in sys.argv[1:] or models.WORLD_MODELS:
        model = models.load(name, device="cpu")
        edited, watched = tuning_facts(model)
        for editor, candidates in CANDIDATES.items():
            for fields in tqdm(candidates, desc=f"{name} {editor}"):
                base = editing.preset(editor, model).model_dump()
                hparams = editing.EDITORS[editor].HParams(**(base | fields))
                resources = editing.EDITORS[editor].prepare(model, hparams)
                table = score(model, editor, hparams, resources, edited, watched)
                row = {"model": name, "editor": editor, "layer": fields["layers"][0], "learning_rate": hparams.learning_rate, "n": len(table)}
                found.append(row | table.mean().round(4).to_dict())
    result = pd.DataFrame(found)
    result["score"] = result[["efficacy", "held_out", "locality"]].mean(axis=1).round(4)
    result.to_csv(facts.DATA / "world" / "choices.csv", index=False)
    print(result.sort_values("score").groupby(["model", "editor"]).tail(4).to_string(index=False))


if __name__ == "__main__":
    main()
