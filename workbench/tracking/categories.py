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
from torch import Tensor

from workbench import words
from workbench.models import Model
from workbench.tracking import retention
from workbench.tracking.retention import Answers, answers_after, token_text

Texts = Sequence[str]
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
    place: Tensor
    clear: list[bool]


def first_tokens(
    model: Model, prompts: Texts, true: Texts, edited: Texts, related: Sequence[Texts]
) -> FirstTokens:
    """First tokens of true and edited objects after prompts, and of the objects related to each.

    Args:
        related: for each prompt the objects of the category; the true and the edited one may be
            among them.
    """
    after_true = answers_after(model, prompts, true)
    after_edited = answers_after(model, prompts, edited)
    place = _places(model, after_true)
    is_one_place = place == _places(model, after_edited)

    @cache
    def tokens_of(objects: tuple[str, ...], lead: str) -> dict[str, int]:
        answers = answers_after(model, [lead] * len(objects), objects)
        return dict(zip(map(str.strip, objects), answers.first_tokens, strict=True))

    def is_broken(token: int) -> bool:
        return retention.BROKEN in token_text(model.tokenizer, token)

    others, clear = [], []
    for row, prompt in enumerate(prompts):
        names = {true[row].strip(), edited[row].strip()}
        tokens = {after_true.first_tokens[row], after_edited.first_tokens[row]}
        of_category = tokens_of(tuple(related[row]), _lead(prompt))
        rest = {token for name, token in of_category.items() if name not in names}
        rest = {token for token in rest if not is_broken(token)}
        is_apart = len(tokens) == len(names) and not tokens & rest
        others.append(frozenset(rest))
        clear.append(is_apart and bool(is_one_place[row]) and not any(map(is_broken, tokens)))
    return FirstTokens(
        true=after_true.first_tokens,
        edited=after_edited.first_tokens,
        related=others,
        place=place,
        clear=clear,
    )


def _lead(prompt: str) -> str:
    """What stands before related objects: words of the prompt's script, spaced or not."""
    last = prompt.rstrip()[-1:]
    return last if last and words.unspaced(last) else "it is"


def _places(model: Model, answers: Answers) -> Tensor:
    """Where the first word of each answer is foretold (n,): before it, and after a lone space."""
    places = answers.start.clone()
    for row, tokens in enumerate(answers.encoded.input_ids.tolist()):
        while not token_text(model.tokenizer, tokens[places[row]]).strip():
            places[row] += 1
    return places - 1


def token_categories(
    model: Model, vocabulary: int, true: int, edited: int, related: frozenset[int] = frozenset()
) -> Tensor:
    """Index into CATEGORIES of every token, (vocabulary,); the width of the logits may be padded
    past the tokenizer's.
    """
    category = torch.full((vocabulary,), CATEGORIES.index("other"))
    is_stop = retention.stop_tokens(model.tokenizer)[:vocabulary]
    category[: len(is_stop)][is_stop] = CATEGORIES.index("stop")
    category[list(related)] = CATEGORIES.index("related")
    category[edited] = CATEGORIES.index("edited")
    category[true] = CATEGORIES.index("true")
    return category


def mass(probs: Tensor, category: Tensor) -> Tensor:
    """Probability of each category: probs (..., vocab), category (vocab,) -> (..., 5), rows summing
    to those of probs.
    """
    total = probs.new_zeros(*probs.shape[:-1], len(CATEGORIES))
    return total.index_add_(-1, category.to(probs.device), probs)
