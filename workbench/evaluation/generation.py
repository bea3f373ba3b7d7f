"""What the model writes by itself after a fact's prompt, to its natural end.

exact: share of texts that begin with the answer (past stop words); contained: that do or hold it
as words; forced: share of prompts where every token of the answer is the likeliest once those
before it are given; flattery: forced - exact, how far such teacher forcing flatters, in [-1, 1];
the others in [0, 1]. Source: the WILD protocol, arXiv 2502.11177. No judge: text is compared.
"""

from collections.abc import Sequence
from unittest.mock import patch

import pandas as pd
import torch
from transformers import GenerationConfig

from workbench import words
from workbench.facts import Requests, in_parts
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
    forced = measure_prompts(model, table.prompt, table.answer, past_stop_words=False)
    table["forced"] = forced.margin > 0
    pairs = list(zip(written(model, table.prompt), table.answer, strict=True))
    table["exact"] = [says(text, answer, ended=True) for text, answer in pairs]
    table["contained"] = [words.mentions(text, answer.strip()) for text, answer in pairs]
    table["contained"] |= table.exact  # in another form, too
    table["flattery"] = table.forced.astype(float) - table.exact
    quantities = ["exact", "contained", "forced", "flattery"]
    return table.melt("fact_id", quantities, "quantity", "value").astype({"value": float})


@torch.no_grad()
def written(model: Model, prompts: Sequence[str], most: int = MOST) -> list[str]:
    """What greedy decoding writes after each prompt, until it ends the text itself."""
    before = token_lists(encode(model, [prompt.rstrip() for prompt in prompts]))
    rooms = [row_length(model, len(ids) + most) - len(ids) for ids in before]
    texts = [""] * len(prompts)
    for room in set(rooms):  # so that no text ends early for a longer prompt beside it
        alike = [index for index, one in enumerate(rooms) if one == room]
        for part in in_parts(alike, AT_ONCE):
            new = _continued(model, [before[index] for index in part], room)
            for index, tokens in zip(part, new, strict=True):
                texts[index] = text_after(model.tokenizer, before[index], tokens)
    return texts


def _continued(model: Model, before: list[list[int]], room: int) -> list[list[int]]:
    """At most `room` greedy tokens after each prompt, up to one that ends the text."""
    # Padding stands on the left here, so that all go on at one place.
    left = pad([ids[::-1] for ids in before]).flip(1)
    mask = pad([[1] * len(ids) for ids in before]).flip(1)
    model.check_length(left, "a prompt")
    last = {model.tokenizer.eos_token_id, model.tokenizer.bos_token_id} - {None}
    plain = GenerationConfig(eos_token_id=list(last) or None, pad_token_id=min(last, default=0))
    # A model's own settings may hold penalties or beams, which are not greedy.
    with patch.object(model.network, "generation_config", plain):
        inputs = {"input_ids": left.to(model.device), "attention_mask": mask.to(model.device)}
        rows = model.network.generate(**inputs, max_new_tokens=max(room, 1))
    new = rows[:, left.shape[1] :].tolist()
    ends = [[place for place, one in enumerate(row) if one in last] for row in new]
    return [row[: min(end, default=room)] for row, end in zip(new, ends, strict=True)]
