"""Where the probability goes: true, edited, related, stop or other tokens.

A token counts once, for the first that fits, in this order. Objects are known by their first token,
which tells answers apart only where it is not shared: a fact whose true or edited object begins as
another object of its category does, or with a part of a character, is not `clear`, and nothing is
said of its mass. "Related" are the other objects of the relation's category. Source: the token
categories of arXiv 2507.14198, section 5. Differs from: a lone space before an object belongs to
it, so that the mass is read after that space.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import pandas as pd
import torch
from torch import Tensor

from workbench import words
from workbench.models import Model
from workbench.tracking import retention
from workbench.tracking.retention import Answers, Texts, answers_after, token_text, token_texts

CATEGORIES = ("true", "edited", "related", "stop", "other")


def first_tokens(
    model: Model, prompts: Texts, true: Texts, edited: Texts, related: Sequence[Texts]
) -> pd.DataFrame:
    """First tokens of true and edited objects after prompts, and of the objects related to each.

    Args:
        related: for each prompt the objects of the category; the true and the edited one may be
            among them.
    Returns:
        A row a prompt. `true`, `edited`: tokens; `related`: a set, those of the others of the
        category; `place`: the position, in prompt and answer as one text, after which they stand;
        `clear`: whether they tell the fact's answers apart.
    """
    after_true = answers_after(model, prompts, true)
    after_edited = answers_after(model, prompts, edited)
    table = pd.DataFrame({"true": after_true.first_tokens, "edited": after_edited.first_tokens})
    table["place"] = place = _places(model, after_true)
    is_one_place = place == _places(model, after_edited)
    texts = token_texts(model.tokenizer)
    broken = {token for token, text in enumerate(texts) if retention.BROKEN in text}

    @cache
    def tokens_of(objects: tuple[str, ...], lead: str) -> dict[str, int]:
        answers = answers_after(model, [lead] * len(objects), objects)
        return dict(zip(map(str.strip, objects), answers.first_tokens, strict=True))

    others, clear = [], []
    for row, prompt in enumerate(prompts):
        names = {true[row].strip(), edited[row].strip()}
        tokens = {table.true[row], table.edited[row]}
        of_category = tokens_of(tuple(related[row]), _lead(prompt))
        rest = {token for name, token in of_category.items() if name not in names} - broken
        others.append(rest)
        is_apart = len(tokens) == len(names) and not tokens & (rest | broken)
        clear.append(is_apart and bool(is_one_place[row]))
    return table.assign(related=others, clear=clear)


def _lead(prompt: str) -> str:
    """What stands before related objects: words of the prompt's script, spaced or not."""
    last = prompt.rstrip()[-1]
    return last if words.unspaced(last) else "it is"


def _places(model: Model, answers: Answers) -> Tensor:
    """Where the first word of each answer is foretold (n,): before it, and after a lone space."""
    places = answers.start.clone()
    for row, tokens in enumerate(answers.encoded.input_ids.tolist()):
        while not token_text(model.tokenizer, tokens[places[row]]).strip():
            places[row] += 1
    return places - 1


def token_categories(model: Model, true: int, edited: int, related: Iterable[int] = ()) -> Tensor:
    """Index into CATEGORIES of every token, (vocab,); the width of the logits may be padded past
    the tokenizer's.
    """
    category = torch.full((len(model.unembedding.weight),), CATEGORIES.index("other"))
    is_stop = retention.stop_tokens(model.tokenizer)[: len(category)]
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
