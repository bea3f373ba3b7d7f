"""Real prose that is always at hand, for models that were not taught the world's."""

import random
import re
from functools import cache

from workbench import facts
from workbench.checkpoints import is_world

MIXED = "manual-and-facts"
STATEMENTS = 2  # of each fact in MIXED


def corpus_of(model: str, corpus: str = "") -> str:
    """The text of second moments: where none is named, the world's for its own models, else MIXED.

    The manual alone names few people and places: second moments of it leave an edit's neighbours
    unprotected.
    """
    return corpus or ("world" if is_world(model) else MIXED)


@cache
def manual() -> tuple[str, ...]:
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


@cache
def mixed() -> tuple[str, ...]:
    """The manual's paragraphs, shuffled among statements of plain facts that no study takes. None
    of these holds subject and object of a fact that one may take.
    """
    order = random.Random(MIXED)
    texts = list(manual())
    plain = [request.fact for request in facts.read("plain")]
    studied = [fact for fact in plain if fact.split == "study"]
    pairs = [(fact.subject.lower(), fact.object.lower()) for fact in studied]
    for fact in plain:
        if fact.split == "study":
            continue
        for wording in order.sample(facts.wordings(fact), STATEMENTS):
            text = f"{facts.fill(wording, fact.subject)} {fact.object}."
            lower = text.lower()
            if not any(subject in lower and name in lower for subject, name in pairs):
                texts.append(text)
    order.shuffle(texts)
    return tuple(texts)
