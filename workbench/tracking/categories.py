"""Where the probability goes: true, edited, related, stop or other tokens.

A token counts once, for the first that fits, in this order. Objects are known by their first token. "Related" are the other
objects of the relation's category. Source: the token categories of arXiv 2507.14198, section 5.
"""

from collections.abc import Sequence

import torch

from workbench.models import Model
from workbench.positions import first_tokens
from workbench.tracking.retention import stop_tokens

CATEGORIES = ("true", "edited", "related", "stop", "other")


def token_categories(model: Model, vocabulary: int, true: int, edited: int, related: Sequence[str] = ()) -> torch.Tensor:
    """Index into CATEGORIES of every token, (vocabulary,).

    Args:
        vocabulary: width of the logits; may be padded past the tokenizer's.
        true, edited: first tokens of the two objects.
        related: objects of the category; the true and the edited one may be among them.
    """
    category = torch.full((vocabulary,), CATEGORIES.index("other"))
    is_stop = stop_tokens(model.tokenizer)[:vocabulary]
    category[: len(is_stop)][is_stop] = CATEGORIES.index("stop")
    if related:
        category[first_tokens(model.tokenizer, related)] = CATEGORIES.index("related")
    category[edited] = CATEGORIES.index("edited")
    category[true] = CATEGORIES.index("true")
    return category


def mass(probs: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
    """Probability of each category: probs (..., vocab), category (vocab,) -> (..., 5), rows summing to those of probs."""
    total = probs.new_zeros(*probs.shape[:-1], len(CATEGORIES))
    return total.index_add_(-1, category.to(probs.device), probs)
