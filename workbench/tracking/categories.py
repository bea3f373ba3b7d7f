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
from functools import cache

import torch

from workbench import words
from workbench.models import Model
from workbench.tracking.retention import (
    BROKEN,
    Answers,
    answers_after,
    stop_tokens,
    token_lists,
    token_text,
)

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
    after_true = answers_after(model, prompts, true)
    after_edited = answers_after(model, prompts, edited)
    pairs = list(zip(after_true.first_tokens, after_edited.first_tokens, strict=True))
    place = _places(model, after_true)
    same_place = place == _places(model, after_edited)

    @cache
    def tokens_of(objects: tuple[str, ...], lead: str) -> dict[str, int]:
        answers = answers_after(model, [lead] * len(objects), objects)
        names = map(str.strip, objects)
        return dict(zip(names, answers.first_tokens, strict=True))

    others, clear = [], []
    for row, tokens in enumerate(map(set, pairs)):
        names = {true[row].strip(), edited[row].strip()}
        known = tokens_of(tuple(related[row]), _lead(prompts[row]))
        rest = {token for name, token in known.items() if name not in names}
        rest = {token for token in rest if not _is_broken(model, token)}
        whole = not any(_is_broken(model, token) for token in tokens)
        apart = len(tokens) == len(names) and not tokens & rest
        others.append(frozenset(rest))
        clear.append(whole and apart and bool(same_place[row]))
    return FirstTokens(
        true=after_true.first_tokens,
        edited=after_edited.first_tokens,
        related=others,
        place=place,
        clear=clear,
    )


def _is_broken(model: Model, token: int) -> bool:
    """Whether a token is a part of a character."""
    return BROKEN in token_text(model.tokenizer, token)


def _lead(prompt: str) -> str:
    """What stands before related objects: words of the prompt's script, spaced or not."""
    last = prompt.rstrip()[-1:]
    return last if last and words.unspaced(last) else "it is"


def _places(model: Model, answers: Answers) -> torch.Tensor:
    """Where the first word of each answer is foretold (n,): before it, and after a lone space."""
    places = []
    starts = answers.start.tolist()
    for start, tokens in zip(starts, token_lists(answers.encoded), strict=True):
        place = start
        while not token_text(model.tokenizer, tokens[place]).strip():
            place += 1
        places.append(place - 1)
    return torch.tensor(places, dtype=torch.long)


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
