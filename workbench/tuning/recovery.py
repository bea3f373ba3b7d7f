"""How soon a lost edit comes back: is it erased, or only hidden?

others: steps of a small adapter (LoRA of rank 4, on a batch of facts) on the prompts of the other
half of the requests until this fact's new answer is said; own: on its own prompt; true: on its own
prompt until the true answer is said. From 0 (said already) to MOST + 1 (not within MOST steps). To
be read against a control that was never edited: `evaluate(tuned, requests, base=unedited)`. Source:
"spurious forgetting", arXiv 2501.13453; the adapter and its numbers are ours.
"""

from typing import Any

import pandas as pd
import torch

from workbench import deltas
from workbench.facts import Requests
from workbench.models import Model
from workbench.tracking.retention import measure_prompts
from workbench.tuning import adapters, plans
from workbench.tuning.finetune import collate
from workbench.tuning.tasks import answer_rows

MOST = 20  # steps
RATE = 2e-3  # of AdamW
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0}


def ask(model: Model, requests: Requests) -> pd.DataFrame:
    new = [(request.fact.id, request.fact.question, request.target) for request in requests]
    true = [(request.fact.id, request.fact.question, request.fact.object) for request in requests]
    parts = [("own", new, new), ("true", true, true)]
    if len(new) > 1:
        halves = new[::2], new[1::2]
        parts += [("others", *halves), ("others", *halves[::-1])]
    tables = [_steps(model, *pair).assign(quantity=name) for name, *pair in parts]
    return pd.concat(tables, ignore_index=True)


def _steps(model: Model, taught: list[tuple], asked: list[tuple]) -> pd.DataFrame:
    """The first step of learning what is taught at which each answer is said: fact_id, value.

    Both are of (id, prompt, answer). The model is bit for bit as before afterwards.
    """
    ids, prompts, answers = map(list, zip(*asked, strict=True))
    first = pd.Series(MOST + 1, index=range(len(asked)))
    plan = plans.resolve(model, "all")
    with deltas.preserved(model.network, ()), adapters.attached(model, plan, "lora", **LORA) as one:
        batch = collate(answer_rows(model, [(prompt, answer) for _, prompt, answer in taught]))
        inputs = {name: rows.to(model.device) for name, rows in batch.items()}
        weights = [model.network.get_parameter(name) for name in one.plan.parameters]
        optimiser = torch.optim.AdamW(weights, lr=RATE)
        for step in range(MOST + 1):
            retained = measure_prompts(model, prompts, answers).retained
            first = first.mask(retained & (first > step), step)
            if step == MOST or first.le(MOST).all():
                break
            with torch.enable_grad():
                loss = model.network(**inputs, use_cache=False).loss
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    return pd.DataFrame({"fact_id": ids, "value": first.astype(float)})
