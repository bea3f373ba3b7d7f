"""Words in running text of any script: where one begins and ends, and which scripts set none apart."""

import re

# Han, kana, bopomofo and their punctuation and wide forms; Thai, Lao, Tibetan, Burmese, Khmer
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)

STEM = 5  # letters that inflected forms of a word share at least


def unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return bool(_UNSPACED.match(character))


def parts(before: str, after: str) -> bool:
    """Whether a word may end between two neighbouring characters; "" is the end of the text."""
    if not before or not after or unspaced(before) or unspaced(after):
        return True
    return not (before.isalnum() and after.isalnum())


def places(text: str, word: str) -> list[int]:
    """Where a word, or several, stands in a text as such: not as a piece of a longer word."""
    starts = (match.start() for match in re.finditer(f"(?={re.escape(word)})", text)) if word else ()
    return [start for start in starts if stands(text, start, start + len(word))]


def stands(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins and ends where words do."""
    return parts(text[:start][-1:], text[start]) and parts(text[end - 1], text[end : end + 1])


def key(word: str) -> str:
    """What an inflected word has in common with its other forms: all but its last letters, at least five of them."""
    letters = word.casefold()
    return letters[: max(STEM, len(letters) - 3)]
