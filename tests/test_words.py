"""Where words begin and end, in any script."""

import pytest

from workbench import words


@pytest.mark.parametrize(
    ("before", "after", "parted"),
    [
        ("k", "s", False),
        ("k", " ", True),
        ("k", ",", True),
        ("k", "'", True),
        ("4", "5", False),
        ("é", "a", False),
        ("e", "\u0301", False),  # an accent belongs to its letter
        ("京", "都", True),
        ("は", "東", True),
        ("ก", "ร", True),
        ("울", "은", True),  # a Korean particle
        ("а", "я", False),
        ("k", "", True),
        ("", "k", True),
    ],
)
def test_a_word_ends_where_the_script_shows_it_or_shows_nothing(before, after, parted):
    assert words.parts(before, after) == parted


@pytest.mark.parametrize(
    ("character", "unspaced"),
    [
        ("京", True),
        ("：", True),
        ("。", True),
        ("ก", True),
        ("k", False),
        ("울", False),
        (":", False),
    ],
)
def test_scripts_that_put_no_space_between_words(character, unspaced):
    assert words.unspaced(character) == unspaced


def test_a_word_stands_only_as_a_whole():
    text = "Ann, the sister of Annabel"
    assert words.stands(text, 0, 3)
    assert not words.stands(text, text.rindex("Ann"), text.rindex("Ann") + 3)
