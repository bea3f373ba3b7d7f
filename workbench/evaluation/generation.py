"""What the model writes by itself after a fact's prompt, to its natural end.

exact: share of texts that begin with the answer (past stop words); contained: that hold it as
words; forced: share of prompts where every token of the answer is the likeliest once those before
it are given; flattery: forced - exact, how far such teacher forcing flatters. In [0, 1], the last
in [-1, 1]. Source: the WILD protocol, arXiv 2502.11177. No judge: answers are compared as text.
"""

import pandas as pd
import torch

from workbench import words
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode, pad, row_length
from workbench.tracking.retention import measure_prompts, says, text_after, token_lists

MOST = 32  # new tokens; a text that goes on is cut there
AT_ONCE = 64  # prompts


def ask(model: Model, requests: Requests) -> pd.DataFrame:
    rows = []
    for request in requests:
        for prompt in (request.fact.question, *request.held_out):
            rows.append((request.fact.id, prompt, request.target))
    table = pd.DataFrame(rows, columns=["fact_id", "prompt", "answer"])
    forced = measure_prompts(model, list(table.prompt), list(table.answer), past_stop_words=False)
    table["forced"] = forced.margin > 0
    pairs = list(zip(written(model, list(table.prompt)), table.answer, strict=True))
    table["exact"] = [says(text, answer, ended=True) for text, answer in pairs]
    table["contained"] = [words.mentions(text, answer.strip()) for text, answer in pairs]
    table["flattery"] = table.forced.astype(float) - table.exact
    quantities = ["exact", "contained", "forced", "flattery"]
    return table.melt("fact_id", quantities, "quantity", "value")


@torch.no_grad()
def written(model: Model, prompts: list[str], most: int = MOST) -> list[str]:
    """What greedy decoding writes after each prompt, until it ends the text itself."""
    before = token_lists(encode(model, [prompt.rstrip() for prompt in prompts]))
    last = {model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    texts = []
    for start in range(0, len(before), AT_ONCE):
        part = before[start : start + AT_ONCE]
        # Padding stands on the left here, so that all go on at one place.
        left = pad([ids[::-1] for ids in part]).flip(1)
        mask = pad([[1] * len(ids) for ids in part]).flip(1)
        room = row_length(model, left.shape[1] + most) - left.shape[1]
        new = model.network.generate(
            input_ids=left.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=model.tokenizer.eos_token_id,
        )[:, left.shape[1] :]
        for ids, tokens in zip(part, new.tolist(), strict=True):
            ends = [place for place, token in enumerate(tokens) if token in last]
            texts.append(text_after(model.tokenizer, ids, tokens[: min(ends, default=most)]))
    return texts
