"""Where the probability goes: true, edited, related, stop or other tokens.

A token counts once, for the first that fits, in this order. Objects are known by their first token,
which tells answers apart only where it is not shared: a fact whose true or edited object begins as
another object of its category does, or with a part of a character, is not `clear`, and nothing is
said of its mass. "Related" are the other objects of the relation's category. Source: the token
categories of arXiv 2507.14198, section 5. Differs from: a lone space before an object belongs to
it, so that the mass is read after that space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench import words
from workbench.models import Model
from workbench.tracking.retention import Answers, answers_after, stop_tokens, token_texts

CATEGORIES = ("true", "edited", "related", "stop", "other")


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """The first tokens of n facts' objects after their prompts.

    `true`, `edited`: tokens; `related`: of each fact's category, the tokens of the others; `place`
    (n,): the position, in prompt and answer as one text, after which they stand; `clear`: whether
    they tell the fact's answers apart.
    """

    true: list[int]
    edited: list[int]
    related: list[frozenset[int]]
    place: torch.Tensor
    clear: list[bool]


def first_tokens(
    model: Model,
    prompts: Sequence[str],
    true: Sequence[str],
    edited: Sequence[str],
    related: Sequence[Sequence[str]],
) -> FirstTokens:
    """First tokens of true and edited objects after prompts, and of the objects related to each.

    Args:
        related: for each prompt the objects of the category; the true and the edited one may be
            among them.
    """
    asked = {
        "true": answers_after(model, prompts, true),
        "edited": answers_after(model, prompts, edited),
    }
    tokens = {name: answers.first_tokens for name, answers in asked.items()}
    spaces = {name: _lone_spaces(model, answers) for name, answers in asked.items()}
    kept: dict[tuple, list[tuple[str, int]]] = {}
    others, clear = [], []
    for row, (prompt, objects) in enumerate(zip(prompts, related, strict=True)):
        lead = (
            prompt.rstrip()[-1:]
            if prompt.rstrip() and words.unspaced(prompt.rstrip()[-1])
            else "it is"
        )
        key = (lead, tuple(objects))
        if key not in kept:
            kept[key] = _plain_tokens(model, lead, objects)
        own = {true[row].strip(), edited[row].strip()}
        others.append(frozenset(token for thing, token in kept[key] if thing.strip() not in own))
        shared = {tokens["true"][row], tokens["edited"][row]} & others[-1]
        alike = tokens["true"][row] == tokens["edited"][row] and len(own) == 2
        plain = bool(asked["true"].plain[row] and asked["edited"].plain[row])
        clear.append(
            plain and not shared and not alike and spaces["true"][row] == spaces["edited"][row]
        )
    place = asked["true"].start - 1 + torch.tensor(spaces["true"], dtype=torch.long)
    return FirstTokens(**tokens, related=others, place=place, clear=clear)


def _lone_spaces(model: Model, answers: Answers) -> list[int]:
    """How many tokens of white space stand between each prompt and the first word of its answer."""
    texts, counts = token_texts(model.tokenizer), []
    for row, start in enumerate(answers.start.tolist()):
        ids = answers.encoded.input_ids[row, start:].tolist()
        counts.append(next(number for number, token in enumerate(ids) if texts[token].strip()))
    return counts


def _plain_tokens(model: Model, lead: str, objects: Sequence[str]) -> list[tuple[str, int]]:
    """Each object and its first token after a lead; left out where that is a part of a character."""
    answers = answers_after(model, [lead] * len(objects), objects)
    return [
        (thing, token)
        for thing, token, plain in zip(
            objects, answers.first_tokens, answers.plain.tolist(), strict=True
        )
        if plain
    ]


def token_categories(
    model: Model, vocabulary: int, true: int, edited: int, related: frozenset[int] = frozenset()
) -> torch.Tensor:
    """Index into CATEGORIES of every token, (vocabulary,); the width of the logits may be padded
    past the tokenizer's.
    """
    category = torch.full((vocabulary,), CATEGORIES.index("other"))
    is_stop = stop_tokens(model.tokenizer)[:vocabulary]
    category[: len(is_stop)][is_stop] = CATEGORIES.index("stop")
    category[list(related)] = CATEGORIES.index("related")
    category[edited] = CATEGORIES.index("edited")
    category[true] = CATEGORIES.index("true")
    return category


def mass(probs: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
    """Probability of each category: probs (..., vocab), category (vocab,) -> (..., 5), rows summing
    to those of probs.
    """
    total = probs.new_zeros(*probs.shape[:-1], len(CATEGORIES))
    return total.index_add_(-1, category.to(probs.device), probs)
