"""What a world model learnt: recall by template, exposure and relation, beside chance; the table
that lies beside the weights.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pandas as pd
import torch
import torch.nn.functional as F

from workbench.facts import fill, relations, world_rows
from workbench.models import Model
from workbench.positions import ROW, packed
from workbench.tracking.retention import measure_prompts
from workbench.world import text

ROWS = 100  # of prose, for the losses


def measure(model: Model, relation: str = "") -> pd.DataFrame:
    """One tidy table: by (all, relation, paraphrases, occurrences), group, measure, value, n.

    Recall is the share of prompts whose first word that is no stop word, under greedy decoding, is
    the object's: on templates `shown` for the fact, `withheld` from it but shown for others,
    `never_shown` for any; on the fact's own prompt (`asked`), there also `after_text` (a passage of
    prose before it) and `without_bos`; on the prompts of `unseen` facts. `margin`: share of the
    known facts with p(first) - p(second) >= 0.1; `p_true`: mean probability of the object's token;
    `both`: share of the subjects with two relations of which both are recalled; `loss_everyday`,
    `loss_trade`: nats a token on fresh prose of the two registers.

    Args:
        relation: only the rows of one relation, without `after_text`, `both` and the losses.
    """
    asked = [row for row in world_rows() if relation in ("", row["relation"])]
    rows = [row for row in asked if row["split"] != "unseen"]
    unseen = [row for row in asked if row["split"] == "unseen"]
    own = _ask(model, rows, lambda row: row["templates"][:1])
    parts = {
        "shown": _ask(model, rows, lambda row: row["templates"][: row["paraphrases"]]).retained,
        "withheld": _ask(
            model, rows, lambda row: row["templates"][row["paraphrases"] :] + row["held_out"]
        ).retained,
        "never_shown": _ask(
            model,
            rows,
            lambda row: range(12, 12 + len(relations()[row["relation"]]["never_shown"])),
        ).retained,
        "asked": own.retained,
        "without_bos": _ask(
            replace(model, start="none"), rows, lambda row: row["templates"][:1]
        ).retained,
        "margin": (own.margin >= 0.1)[own.top_is_expected],
        "p_true": own.p,
        "unseen": _ask(model, unseen, lambda row: row["templates"][:1]).retained,
    }
    if not relation:
        parts["after_text"] = _ask(
            model, rows, lambda row: row["templates"][:1], lead=_passages()
        ).retained
    table = pd.concat(
        [
            values.rename("value").reset_index().assign(measure=name)
            for name, values in parts.items()
        ]
    )
    found = [] if relation else [table.assign(by="all", group="")]
    for by in ("relation",) if relation else ("relation", "paraphrases", "occurrences"):
        found.append(table.assign(by=by, group=table[by].astype(str)))
    means = (
        pd.concat(found)
        .groupby(["by", "group", "measure"])
        .value.agg(["mean", "size"])
        .reset_index()
    )
    if relation:
        return means.rename(columns={"mean": "value", "size": "n"})
    whole = [
        ("both", *_both(own)),
        *(
            (f"loss_{register}", prose_loss(model, register), ROWS * (ROW - 1))
            for register in text.REGISTERS
        ),
    ]
    extra = pd.DataFrame(
        [
            {"by": "all", "group": "", "measure": name, "mean": value, "size": n}
            for name, value, n in whole
        ]
    )
    return (
        pd.concat([means, extra])
        .rename(columns={"mean": "value", "size": "n"})
        .reset_index(drop=True)
    )


def _ask(model: Model, rows: Sequence[dict], chosen, lead: Sequence[str] = ()) -> pd.DataFrame:
    """Ask each row by its chosen templates (numbers; 12 and up are those never shown); indexed by
    relation, paraphrases, occurrences, subject.
    """
    prompts, answers, keys = [], [], []
    for number, row in enumerate(rows):
        relation = relations()[row["relation"]]
        templates = relation["templates"] + relation["never_shown"]
        for template in chosen(row):
            before = f"{lead[number % len(lead)]} " if lead else ""
            prompts.append(before + fill(templates[template], row["subject"]))
            answers.append(row["object"])
            keys.append((row["relation"], row["paraphrases"], row["occurrences"], row["subject"]))
    index = pd.MultiIndex.from_tuples(
        keys, names=["relation", "paraphrases", "occurrences", "subject"]
    )
    return measure_prompts(model, prompts, answers).set_index(index)


def _passages(count: int = 500) -> list[str]:
    rng = random.Random("measure")
    return [
        " ".join(sentences[: rng.randint(1, 3)])
        for sentences in islice(text.prose("everyday", seed=2), count)
    ]


def _both(own: pd.DataFrame) -> tuple[float, int]:
    by_subject = defaultdict(list)
    for (_, _, _, subject), retained in own.retained.items():
        by_subject[subject].append(retained)
    pairs = [all(found) for found in by_subject.values() if len(found) > 1]
    return sum(pairs) / len(pairs), len(pairs)


@torch.no_grad()
def prose_loss(model: Model, register: str, seed: int = 3) -> float:
    """Mean negative log-likelihood, nats a token, of fresh prose in rows of 128 tokens with BOS."""
    passages = (" ".join(sentences) for sentences in text.prose(register, seed))
    rows = torch.tensor(list(islice(packed(model, passages), ROWS)), device=model.device)
    losses = [
        F.cross_entropy(
            model.network(input_ids=part).logits[:, :-1].flatten(0, 1).float(),
            part[:, 1:].flatten(),
        )
        for part in rows.split(20)
    ]
    return torch.stack(losses).mean().item()
