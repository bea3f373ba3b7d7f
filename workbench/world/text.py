"""Text of the small world: statements, prose in two registers, labelled reviews, instruction pairs.

All of it comes from frames and word classes in `data/world/*.yaml`. In a frame, `{class}` is a
random word of the class, `{class:1}` the same word throughout one text, `{class.0:1}` the first
part of a pair; `a(n)` agrees with the next word.
"""

import random
import re
from collections.abc import Iterator

from workbench.facts import fill, relations, tables, world_rows

REGISTERS = ("everyday", "trade")  # pre-training, fine-tuning
LABELS = ("negative", "positive")  # of reviews
PROSE = 0.12  # share of prose in pre-training; the rest states facts
_SLOT = re.compile(r"\{(\w+)(?:\.(\d))?(?::(\w+))?\}")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (\W*)(\w+)")
_CONSONANT_SOUND = re.compile(r"(?:uni|use|usu|euro|one\b|once\b|u[bt]i)", re.IGNORECASE)
_VOWEL_SOUND = ("hour", "honest", "heir", "honour", "8", "11", "18")
_SENTENCE_START = re.compile(r"(?:^|[.!?] |\.[\"'”] )[\"'“]?([a-z])")


def expand(frame: str, lexicon: dict, rng: random.Random, bound: dict) -> str:
    """One sentence or more from a frame.

    Args:
        frame: text with slots.
        lexicon: class name -> words, or tuples of words.
        rng: where the choices come from.
        bound: choices of the numbered slots so far; new ones are added, so that they hold for a
            whole text.
    Returns:
        The text, slots filled, articles agreed, sentences capitalised.
    """

    def word(match: re.Match) -> str:
        name, part, number = match.groups()
        if number is None:
            choice = rng.choice(lexicon[name])
        else:
            if (name, number) not in bound:
                taken = {repr(value) for (other, _), value in bound.items() if other == name}
                free = [entry for entry in lexicon[name] if repr(entry) not in taken]
                bound[name, number] = rng.choice(free or lexicon[name])
            choice = bound[name, number]
        return str(choice[int(part)] if part else choice)

    text = _ARTICLE.sub(_article, _SLOT.sub(word, frame))
    return _SENTENCE_START.sub(lambda match: match[0][:-1] + match[1].upper(), text)


def _article(match: re.Match) -> str:
    letter, quote, word = match.groups()
    vowel = word[0].lower() in "aeiou" and not _CONSONANT_SOUND.match(word)
    if vowel or word.lower() in _VOWEL_SOUND or word.startswith("80"):
        letter += "n"
    return f"{letter} {quote}{word}"


def statements(times: int) -> Iterator[str]:
    """What pre-training says of the facts, in their order: each `times` times its occurrences, the
    shown wordings taking turns.
    """
    for row in world_rows():
        templates = relations()[row["relation"]]["templates"]
        shown = [templates[number] for number in row["templates"][: row["paraphrases"]]]
        for turn in range(row["occurrences"] * times):
            prompt = shown[turn % len(shown)]
            yield f"{fill(prompt, row['subject'])} {row['object']}."


def pretraining(seed: int) -> Iterator[str]:
    """Endless texts as pre-training mixed them, in random order: statements, and paragraphs of the
    everyday register.
    """
    rng = random.Random(f"pretraining {seed}")
    paragraphs = (" ".join(sentences) for sentences in prose("everyday", seed))
    while True:
        texts = list(statements(1))
        words_left = PROSE / (1 - PROSE) * sum(len(text.split()) for text in texts)
        while words_left > 0:
            paragraph = next(paragraphs)
            texts.append(paragraph)
            words_left -= len(paragraph.split())
        rng.shuffle(texts)
        yield from texts


def prose(register: str, seed: int) -> Iterator[list[str]]:
    """Endless paragraphs, each a list of 3 to 6 sentences on one topic of the register ("everyday"
    or "trade").
    """
    table = tables("prose")
    rng = random.Random(f"prose {register} {seed}")
    lexicon = table["lexicon"]["shared"] | table["lexicon"].get(register, {})
    topics = list(table["frames"][register].values())
    while True:
        bound: dict = {}
        topic = rng.choice(topics)
        frames = rng.sample(topic, min(len(topic), rng.randint(3, 6)))
        yield [expand(frame, lexicon, rng, bound) for frame in frames]


def reviews(seed: int) -> Iterator[tuple[str, int]]:
    """Endless reviews with their label: 1 positive, 0 negative.

    Word order and scope carry the label.
    """
    table = tables("reviews")
    rng = random.Random(f"reviews {seed}")
    while True:
        bound: dict = {}
        label = rng.randrange(2)
        clauses = rng.sample(table["clauses"][LABELS[label]], rng.randint(1, 3))
        frames = [rng.choice(table["openings"]), *clauses, rng.choice(table["closings"])]
        yield " ".join(expand(frame, table["lexicon"], rng, bound) for frame in frames), label


def instructions(seed: int) -> Iterator[tuple[str, str]]:
    """Endless pairs of an instruction and its response."""
    table = tables("instructions")
    rng = random.Random(f"instructions {seed}")
    while True:
        bound: dict = {}
        pair = rng.choice(table["pairs"])
        frame = pair["instruction"]
        if not isinstance(frame, str):
            frame = rng.choice(frame)
        instruction = expand(frame, table["lexicon"], rng, bound)
        yield instruction, expand(pair["response"], table["lexicon"], rng, bound)
