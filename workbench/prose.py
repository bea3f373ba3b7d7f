"""Real prose that is always at hand, for models that were not taught the world's."""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from workbench import facts
from workbench.checkpoints import is_world
from workbench.records import BadInput

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

    texts = (text for topic in topics.values() for text in _paragraphs(topic, 80))
    return tuple(dict.fromkeys(texts))  # a paragraph may stand under several topics


def docstrings() -> Iterator[str]:
    """Longer paragraphs of the docstrings of CPython's library: English that nothing here tunes on
    and no second moment is taken of, to judge by. Each version has its own.

    Raises:
        BadInput: a Python that came without its sources.
    """
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not paths:
        raise BadInput("no text to judge by: this Python has no sources; run one that has them")
    tuned_on = set(manual())
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts = _paragraphs(ast.get_docstring(node) or "", 200)
                yield from (text for text in texts if text not in tuned_on)


def _paragraphs(text: str, least: int) -> Iterator[str]:
    """Those that are prose of so many characters at least, without markup."""
    for paragraph in text.split("\n\n"):
        plain = re.sub(r"[*`]", "", " ".join(paragraph.split()))
        is_prose = plain[:1].isupper() and plain.endswith(".") and len(plain) >= least
        if is_prose and not paragraph.startswith("    "):
            yield plain


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
    for fact in [fact for fact in plain if fact.split != "study"]:
        for wording in order.sample(facts.wordings(fact), STATEMENTS):
            text = f"{facts.fill(wording, fact.subject)} {fact.object}."
            lower = text.lower()
            if not any(subject in lower and name in lower for subject, name in pairs):
                texts.append(text)
    order.shuffle(texts)
    return tuple(texts)
