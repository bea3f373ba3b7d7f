"""Real prose that is always at hand, for models that were not taught the world's."""

import re
from functools import cache

from workbench.checkpoints import WORLD_MODELS

MANUAL = "python-manual"


def corpus_of(model: str, corpus: str = "") -> str:
    """The running text for a model: where none is named, the world's for its own, else MANUAL."""
    return corpus or ("world" if model in WORLD_MODELS else MANUAL)


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of the language reference that every CPython brings (`pydoc_data.topics`): some
    190,000 characters of English, without code, lists and markup. Each version has its own.
    """
    from pydoc_data.topics import topics

    texts: dict[str, None] = {}
    for paragraph in "\n\n".join(topics.values()).split("\n\n"):
        text = re.sub(r"[*`]", "", " ".join(paragraph.split()))
        is_prose = text[:1].isupper() and text.endswith(".") and len(text) >= 80
        if is_prose and not paragraph.startswith("    "):
            texts[text] = None  # a paragraph may stand under several topics
    return tuple(texts)
