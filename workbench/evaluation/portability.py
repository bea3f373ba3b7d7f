"""What should follow from an edit, and what should stay of the same things.

A quantity a kind, the share of its prompts whose answer is said, in [0, 1]: of a file the kinds
that it brings (KnowEdit, RippleEdits, MQuAKE, WikiBigEdit, the flat form of CounterFact); of
embedded facts `same_subject`, what else is known of the subject, and `new_object`, what is known
of the new object, and `hop`, the same asked of "the author of ..." instead of its name. Source:
arXiv 2305.13172, 2307.12976. Reversal and aliases are asked only where a file does.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workbench import facts
from workbench.checkpoints import source_of
from workbench.models import Model
from workbench.records import yaml_table
from workbench.tracking.retention import measure_prompts

HOPS = Path(__file__).with_name("hops.yaml")  # relation -> a name for its object, one `{}`


def ask(model: Model, requests: facts.Requests) -> pd.DataFrame:
    rows = []
    for request in requests:
        for kind, prompt, answer in request.portability:
            quantity = re.sub(r"\W+", "_", kind).lower()
            rows.append((request.fact.id, quantity, prompt, answer))
    rows += _embedded(model, requests)
    return shares(model, rows)


def shares(model: Model, rows: Sequence[tuple]) -> pd.DataFrame:
    """Of (fact, quantity, prompt, answer): whether each answer is said, 1 or 0."""
    table = pd.DataFrame(rows, columns=["fact_id", "quantity", "prompt", "answer"])
    retained = measure_prompts(model, table.prompt, table.answer).retained
    return table[["fact_id", "quantity"]].assign(value=retained.astype(float))


def _embedded(model: Model, requests: facts.Requests) -> list[tuple]:
    """What is known of the subjects and new objects of embedded facts that are not edited."""
    source = facts.read(source_of(model.name))
    edited = {request.fact.id for request in requests}
    about = defaultdict(list)
    for one in source:
        if one.fact.id not in edited and one.fact.split != "unseen":
            about[one.fact.subject].append(one.fact)
    embedded = {one.fact.id for one in source}
    hops = yaml_table(HOPS)
    rows = []
    for fact, target in [(one.fact, one.target) for one in requests if one.fact.id in embedded]:
        for known in about[fact.subject]:
            rows.append((fact.id, "same_subject", known.question, known.object))
        for known in about[target]:
            rows.append((fact.id, "new_object", known.question, known.object))
            if fact.relation in hops:
                name = facts.fill(hops[fact.relation], fact.subject)
                question = facts.fill(known.prompt, name)
                rows.append((fact.id, "hop", question[0].upper() + question[1:], known.object))
    return rows
