"""Does the old answer come back once something in front of the prompt leads to it?

mentioned: a sentence that names the old answer stands in front; asked: the prompt is put as a
question; passage: a paragraph of other text stands in front. Of each the share of facts whose new
answer is still said (`*_new`) and whose old one is said instead (`*_old`), in [0, 1]. Source: arXiv
2505.12636, whose attacks are found by search; these are three fixed ones.
"""

import pandas as pd

from workbench.evaluation.ability import real_text
from workbench.evaluation.portability import shares
from workbench.facts import Requests, check_objects
from workbench.models import Model

LEADS = {
    "mentioned": "Many people have heard of {old}. {prompt}",
    "asked": "Question: how does this sentence end? {prompt} ... Answer: {prompt}",
    "passage": "{passage} {prompt}",
}
PASSAGE = 60  # tokens


def ask(model: Model, requests: Requests) -> pd.DataFrame:
    check_objects(requests)
    row = real_text(model, 1)[0][:PASSAGE]
    text = model.tokenizer.decode(row, skip_special_tokens=True)
    sentences, _, rest = text.rpartition(".")
    passage = f"{(sentences or rest).strip()}."
    rows = []
    for lead, form in LEADS.items():
        for request in requests:
            fact = request.fact
            prompt = form.format(old=fact.object, prompt=fact.question, passage=passage)
            rows.append((fact.id, f"{lead}_new", prompt, request.target))
            rows.append((fact.id, f"{lead}_old", prompt, fact.object))
    return shares(model, rows)
