"""Is a fact still there? The first word that is not a stop word, under greedy decoding, against the expected object's.

Source: the retention measure of arXiv 2507.14198. Differs from: the paper does not say how long it decodes; here at most 8 tokens.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from workbench.facts import DATA, BadInput, EditRequest, check_objects
from workbench.models import Model
from workbench.positions import Encoded, encode, statement

GREEDY_TOKENS = 8


@cache
def stop_words() -> frozenset[str]:
    return frozenset((DATA / "stopwords.txt").read_text(encoding="utf-8").split())


@lru_cache(maxsize=8)
def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token says, (vocab,): to decode one at a time takes longer than to ask the model."""
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which tokens are a stop word, punctuation or white space, (vocab,), bool. Special tokens are not."""
    texts = token_texts(tokenizer)
    found = [text.strip().lower() in stop_words() or not any(map(str.isalnum, text)) for text in texts]
    mask = torch.tensor(found)
    mask[tokenizer.all_special_ids] = False
    return mask


def expected_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """First token of each answer's first word that is not a stop word, as it stands after its prompt."""
    encoded = encode(tokenizer, [statement(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    tokens = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        words = answer.split()
        skipped = next((number for number, word in enumerate(words) if word.lower() not in stop_words()), 0)
        start = len(statement(prompt, " ".join(words[: skipped + 1]))) - len(words[skipped])
        found = encoded.tokens_from(row, start)
        if not found:
            raise BadInput(f"the answer {answer!r} has no token after {prompt!r:.80}; give a longer answer")
        tokens.append(encoded.input_ids[row, found[0]].item())
    return tokens


@torch.no_grad()
def first_words(model: Model, encoded: Encoded, logits: torch.Tensor, expected: Sequence[int]) -> list[int]:
    """Greedy tokens past stop words.

    Args:
        encoded: n prompts.
        logits: (n, vocab), what the model says after each prompt.
        expected: tokens that end the search even where they look like a stop word.
    Returns:
        For each prompt the first greedy token that is no stop word, or the last of `GREEDY_TOKENS`.
    """
    is_stop = stop_tokens(model.tokenizer)
    found = logits.argmax(1).tolist()
    texts = {row: encoded.input_ids[row, : encoded.lengths[row]].tolist() for row in range(len(found))}
    pending = list(texts)
    for _ in range(GREEDY_TOKENS - 1):
        pending = [row for row in pending if found[row] != expected[row] and found[row] < len(is_stop) and is_stop[found[row]]]
        if not pending:
            break
        for row in pending:
            texts[row].append(found[row])
        grown = _padded([texts[row] for row in pending])
        for batch in grown.batches(tokens_at_once(model)):
            part = grown.rows(batch).to(model.device)
            for index, token in zip(batch, next_logits(model, part).argmax(1).tolist(), strict=True):
                found[pending[index]] = token
    return found


def tokens_at_once(model: Model) -> int:
    """Tokens of a batch of questions: on a CPU as many as stay in its caches, which is 1.7 times as fast as 4096."""
    return 1024 if model.device.type == "cpu" else 16384


def next_logits(model: Model, encoded: Encoded) -> torch.Tensor:
    """Logits (n, vocab), float32, after the last token of each text, in one pass."""
    encoded = encoded.to(model.device)
    return model.logits_at(encoded.input_ids, encoded.attention_mask, encoded.lengths - 1)


def _padded(rows: list[list[int]]) -> Encoded:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Encoded(input_ids=ids, attention_mask=mask, offsets=((),) * len(rows))


MEASURED = ["prompt", "expected", "retained", "top_token", "p", "rank", "p_second", "margin", "top_is_expected"]


@torch.no_grad()
def measure_prompts(model: Model, prompts: Sequence[str], answers: Sequence[str], bos: bool = True) -> pd.DataFrame:
    """Retention of an answer after each prompt: columns prompt, expected, retained, top_token, p, rank, p_second, margin, top_is_expected.

    `p` and `rank` (1 = top) are of the expected token right after the prompt; `p_second` is the second likeliest token's, `margin` p of the
    likeliest less p_second; `top_token` is the first greedy token that is no stop word.
    """
    expected = expected_tokens(model.tokenizer, prompts, answers)
    encoded = encode(model.tokenizer, prompts, bos=bos)
    columns: list[dict | None] = [None] * len(prompts)
    for batch in encoded.batches(tokens_at_once(model)):
        part = encoded.rows(batch)
        logits = next_logits(model, part)
        wanted = [expected[index] for index in batch]
        tops = first_words(model, part, logits, wanted)
        probs = logits.softmax(1)
        p = probs[range(len(batch)), wanted]
        rank = (probs > p[:, None]).sum(1) + 1
        first, second = probs.topk(2).values.unbind(1)
        for place, index in enumerate(batch):
            columns[index] = {
                "prompt": prompts[index],
                "expected": model.tokenizer.decode([wanted[place]]).strip(),
                "retained": tops[place] == wanted[place],
                "top_token": model.tokenizer.decode([tops[place]]).strip(),
                "p": p[place].item(),
                "rank": rank[place].item(),
                "p_second": second[place].item(),
                "margin": (first - second)[place].item(),
                "top_is_expected": logits[place].argmax().item() == wanted[place],
            }
    return pd.DataFrame(columns, columns=MEASURED)


def measure(model: Model, requests: Sequence[EditRequest], against: str = "target") -> pd.DataFrame:
    """Retention of facts on their own prompts.

    Args:
        against: "target" (was the edit kept?) or "object" (is the true fact still known?).
    Returns:
        DataFrame[fact_id, prompt, expected, retained, top_token, p, rank], one row a request.
    """
    if against not in ("target", "object"):
        raise BadInput(f"against={against!r}: choose target or object")
    if against == "object":
        check_objects(requests)
    answers = [request.target if against == "target" else request.fact.object for request in requests]
    table = measure_prompts(model, [request.fact.question for request in requests], answers)
    table.insert(0, "fact_id", [request.fact.id for request in requests])
    return table[["fact_id", "prompt", "expected", "retained", "top_token", "p", "rank"]]
