"""The measures written plainly, to check ours against: one prompt at a time, the whole network
again for every token, no padding, no cache; answers compared word by word. Nothing here is used by
the workbench.
"""

import math
import re

import torch

from workbench.facts import DATA
from workbench.positions import front

STOP_WORDS = set((DATA / "stopwords.txt").read_text(encoding="utf-8").split())
ANSWER = 12  # tokens in which an answer comes, past stop words


def tokens(model, text: str) -> list[int]:
    """What stands in front, what an edit in force puts there, and the text."""
    whole = "".join(edit.before(text) for edit in model.in_force) + text
    return [*front(model), *model.tokenizer(whole, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def log_probs(model, ids: list[int]) -> torch.Tensor:
    """Of the next token after each token (length, vocab), nats."""
    return model.network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def written(model, prompt: str, most: int) -> str:
    """What the likeliest next token makes, again and again."""
    before = tokens(model, prompt)
    ends = {model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    new: list[int] = []
    while len(new) < most and len(before) + len(new) < model.network.config.max_position_embeddings:
        token = log_probs(model, before + new)[-1].argmax().item()
        if token in ends:
            break
        new.append(token)
    return model.tokenizer.decode(before + new)[len(model.tokenizer.decode(before)) :]


def of_answer(model, prompt: str, answer: str) -> tuple[float, bool]:
    """The geometric mean of p over the answer's tokens; whether each is the likeliest."""
    before, ids = tokens(model, prompt), tokens(model, f"{prompt} {answer}")
    assert ids[: len(before)] == before
    rows = log_probs(model, ids)
    places = range(len(before), len(ids))
    mean = sum(rows[place - 1, ids[place]].item() for place in places) / len(places)
    return math.exp(mean), all(rows[place - 1].argmax() == ids[place] for place in places)


def says(text: str, answer: str) -> bool:
    """Whether a text begins with an answer, or does after stop words and marks."""
    said, wanted = (re.findall(r"\w+|[^\w\s]", one) for one in (text, answer))
    for start, word in enumerate(said):
        if said[start : start + len(wanted)] == wanted:
            return True
        if word.isalnum() and word.lower() not in STOP_WORDS:
            return False
    return False


def mentions(text: str, answer: str) -> bool:
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def entropy(words: list[str]) -> float:
    """A third of the bigrams' entropy and two thirds of the trigrams', bits."""
    parts = []
    for n in (2, 3):
        grams = [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        parts.append(-sum(share * math.log2(share) for share in shares))
    return (parts[0] + 2 * parts[1]) / 3


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL(before || after) of two rows of log-probabilities, nats."""
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    return sum(math.exp(old) * (old - new) for old, new in pairs)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
