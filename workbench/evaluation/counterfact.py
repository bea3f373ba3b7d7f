"""Does the new answer beat the old one? The scores of CounterFact, and the exact reading beside.

efficacy, paraphrase: share of prompts with p(new) > p(true), in [0, 1]; neighbourhood: share of the
neighbours' prompts with p(true) > p(new); *_magnitude: the difference of the two, in [-1, 1];
*_exact: share where greedy decoding says the answer itself. Source: arXiv 2202.05262, section 3.2.
p is the geometric mean over an answer's tokens, as in that paper's code; exact is our reading.
"""

from collections.abc import Iterator

import pandas as pd

from workbench.facts import EditRequest, Requests, check_objects
from workbench.models import Model
from workbench.tracking.retention import measure_prompts

COLUMNS = ["quantity", "fact_id", "prompt", "wanted", "other"]


def ask(model: Model, requests: Requests) -> pd.DataFrame:
    check_objects(requests)
    rows = []
    for request in requests:
        fact = request.fact
        for quantity, prompts in (("efficacy", [fact.question]), ("paraphrase", request.held_out)):
            rows += [(quantity, fact.id, prompt, request.target, fact.object) for prompt in prompts]
    for request, prompt, answer in near(requests):
        rows.append(("neighbourhood", request.fact.id, prompt, answer, request.target))
    table = pd.DataFrame(rows, columns=COLUMNS)
    wanted = measure_prompts(model, table.prompt, table.wanted)
    other = measure_prompts(model, table.prompt, table.other, past_stop_words=False)
    lead = wanted.p_token - other.p_token
    tables = [table.assign(value=lead > 0)]
    tables.append(table.assign(value=lead, quantity=table.quantity + "_magnitude"))
    tables.append(table.assign(value=wanted.retained, quantity=table.quantity + "_exact"))
    named = pd.concat(tables, ignore_index=True)[["fact_id", "quantity", "value"]]
    return named.astype({"value": float})


def near(requests: Requests) -> Iterator[tuple[EditRequest, str, str]]:
    """Each request's neighbours, prompt and answer, but those that are edited themselves."""
    edited = {request.fact.question for request in requests}
    for request in requests:
        for prompt, answer in request.neighbourhood:
            if prompt not in edited:
                yield request, prompt, answer
