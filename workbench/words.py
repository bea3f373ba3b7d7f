"""Words in text of any script: where one begins and ends, which scripts set none apart."""

import unicodedata
from functools import lru_cache

STEM = 5  # letters that inflected forms of a word share at least
_WITHOUT_SPACES = (  # scripts, by the first word of their characters' names
    *("CJK", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BALINESE", "JAVANESE", "TAI", "NEW TAI", "YI"),
)
_PUNCTUATION = "、。〈〉《》「」『』【】〔〕〖〗・"  # of those scripts


@lru_cache(maxsize=4096)
def unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no space between words."""
    return character in _PUNCTUATION or unicodedata.name(character, "").startswith(_WITHOUT_SPACES)


@lru_cache(maxsize=4096)
def of_word(character: str) -> bool:
    """Whether a character belongs to a word of a script in which words end where a text shows it.

    Korean has spaces, but its particles stand without one behind a word.
    """
    if not character or unspaced(character) or unicodedata.name(character, "").startswith("HANGUL"):
        return False
    accent = unicodedata.category(character).startswith("M")
    return character.isalnum() or character == "_" or accent


def parts(before: str, after: str) -> bool:
    """Whether a word may end between two neighbouring characters; "" is the end of the text."""
    return not (of_word(before) and of_word(after))


def stands(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins and ends where words do."""
    return parts(text[:start][-1:], text[start]) and parts(text[end - 1], text[end : end + 1])


def places(text: str, name: str) -> list[tuple[int, int]]:
    """Where a name stands in a text as words: Ann is not in Annabel."""
    starts = [place for place in range(len(text)) if text.startswith(name, place)]
    spans = [(start, start + len(name)) for start in starts]
    return [span for span in spans if stands(text, *span)]


def mentions(text: str, name: str) -> bool:
    """Whether a text names a thing, in any case and as words."""
    return bool(places(text.lower(), name.lower()))


def key(word: str) -> str:
    """What a word shares with its other forms: all but its last letters, at least five of them."""
    return word[: max(STEM, len(word) - 3)]
