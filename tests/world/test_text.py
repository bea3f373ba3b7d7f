"""The small world's prose, reviews and instructions: whole, varied, repeatable, and apart from the
facts.
"""

import re
from collections import Counter
from functools import cache
from itertools import islice
from random import Random

import pytest
import yaml
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from workbench.facts import DATA, fill, relations, world_rows
from workbench.world.text import (
    REGISTERS,
    expand,
    instructions,
    pretraining,
    prose,
    reviews,
    statements,
)

AMOUNT = 2000
MAKERS = {
    "everyday": lambda seed: prose("everyday", seed),
    "trade": lambda seed: prose("trade", seed),
    "reviews": reviews,
    "instructions": instructions,
}
VOWEL_SOUND = re.compile(r"[aeio]|u(?!ni|s[aeiu]|[tb]i)|hour|8|11\b|18\b")
CONSONANT_SOUND = re.compile(r"on(?:e|ce)\b|eu")


@cache
def table(name: str) -> dict:
    return yaml.safe_load((DATA / "world" / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def texts(kind: str, seed: int = 0, amount: int = AMOUNT) -> tuple[str, ...]:
    made = islice(MAKERS[kind](seed), amount)
    if kind == "reviews":
        return tuple(review for review, _ in made)
    return tuple(" ".join(parts) for parts in made)


def frames_of(kind: str) -> list[str]:
    if kind in REGISTERS:
        return [frame for topic in table("prose")["frames"][kind].values() for frame in topic]
    if kind == "reviews":
        whole = table("reviews")
        return [
            *whole["openings"],
            *whole["closings"],
            *whole["clauses"]["positive"],
            *whole["clauses"]["negative"],
        ]
    asked = [
        [pair["instruction"]] if isinstance(pair["instruction"], str) else pair["instruction"]
        for pair in table("instructions")["pairs"]
    ]
    return [frame for phrasings in asked for frame in phrasings] + [
        pair["response"] for pair in table("instructions")["pairs"]
    ]


def lexicon_of(kind: str) -> dict:
    if kind in REGISTERS:
        return table("prose")["lexicon"]["shared"] | table("prose")["lexicon"][kind]
    return table(kind)["lexicon"]


# --- repeatable
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_seed_gives_the_same_text(kind):
    assert list(islice(MAKERS[kind](3), 200)) == list(islice(MAKERS[kind](3), 200))


@pytest.mark.parametrize("kind", MAKERS)
def test_another_seed_gives_another_text(kind):
    assert texts(kind, 3, 200) != texts(kind, 4, 200)


def test_the_registers_share_no_sentence():
    everyday, trade = (
        {part for made in islice(prose(register, 0), AMOUNT) for part in made}
        for register in REGISTERS
    )
    assert everyday.isdisjoint(trade)


@pytest.mark.parametrize("kind", MAKERS)
def test_texts_seldom_repeat(kind):
    assert len(set(texts(kind))) > 0.5 * AMOUNT


# --- frames and slots
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", REGISTERS)
def test_a_register_has_200_frames(register):
    assert len(set(frames_of(register))) >= 200


def slot_faults(frame: str, lexicon: dict) -> list[str]:
    """What of a frame's slots cannot be filled, by the words of each class."""
    found = [
        f"{frame}: loose brace"
        for _ in re.findall(r"[{}]", re.sub(r"\{\w+(?:\.\d)?(?::\w+)?\}", "", frame))
    ]
    for name, part in re.findall(r"\{(\w+)(?:\.(\d))?(?::\w+)?\}", frame):
        words = lexicon.get(name, [])
        parts = {len(word) if isinstance(word, list) else 0 for word in words}
        if not words:
            found.append(f"{frame}: no words for {name}")
        elif part and min(parts) <= int(part):
            found.append(f"{frame}: {name} has no part {part}")
        elif not part and max(parts):
            found.append(f"{frame}: {name} is made of parts")
    return found


@pytest.mark.parametrize("kind", MAKERS)
def test_every_slot_of_every_frame_resolves(kind):
    lexicon = lexicon_of(kind)
    assert [fault for frame in frames_of(kind) for fault in slot_faults(frame, lexicon)] == []
    for frame in frames_of(kind):
        assert leftovers(expand(frame, lexicon, Random(frame), {})) == []


@pytest.mark.parametrize("kind", MAKERS)
def test_every_word_of_every_class_is_a_text(kind):
    words = [word for words in lexicon_of(kind).values() for word in words]
    parts = [part for word in words for part in (word if isinstance(word, list) else [word])]
    assert [
        part for part in parts if not isinstance(part, str) or part != part.strip() or not part
    ] == []


@pytest.mark.parametrize(
    "frame", ["a {gem}", "a {pair}", "a {pair.2}", "a {word.0}", "a {word:1", "a {wo rd}"]
)
def test_a_slot_that_cannot_be_filled_would_be_noticed(frame):
    assert slot_faults(frame, {"word": ["x"], "pair": [["y", "z"]]}) != []


def leftovers(text: str) -> list[str]:
    """Traces of a frame or of a word class in a finished text."""
    return re.findall(r"[{}]|\([nN]\)|\['|'\]|\bNone\b|  |\n| [,;:!?](?!\w)|^\W*[a-z]", text)


@pytest.mark.parametrize("kind", MAKERS)
def test_no_text_shows_its_frame(kind):
    assert {text: found for text in texts(kind) if (found := leftovers(text))} == {}


@pytest.mark.parametrize(
    "text", ["A {word} is", "It is a(n) egg", "It is ['a', 'b']", "It  is", "it is", "It is , so"]
)
def test_a_trace_of_a_frame_would_be_noticed(text):
    assert leftovers(text) != []


def test_a_numbered_slot_holds_through_a_text_and_differs_from_its_like():
    lexicon = {"tree": ["oak", "elm"], "pair": [["hot", "cold"], ["dry", "wet"]]}
    for seed in range(50):
        bound: dict = {}
        first = expand("{tree:1} {tree:2} {pair.0:a}", lexicon, Random(seed), bound).lower().split()
        again = (
            expand("{tree:1} {tree:2} {pair.0:a} {pair.1:a}", lexicon, Random(99), bound)
            .lower()
            .split()
        )
        assert again[:3] == first
        assert first[0] != first[1]
        assert again[2:] in lexicon["pair"]


def test_a_slot_without_a_number_is_drawn_anew():
    drawn = {
        expand("{tree} {tree}", {"tree": ["oak", "elm"]}, Random(seed), {}) for seed in range(50)
    }
    assert drawn == {"Oak oak", "Oak elm", "Elm oak", "Elm elm"}


def says(sentence: str, frame: str) -> bool:
    """The fixed words of the frame stand in the sentence, in their order."""
    place, sentence = 0, sentence.lower()
    for fixed in re.split(r"\{.+?\}|a\(n\)", frame.lower()):
        place = sentence.find(fixed, place) + len(fixed)
        if place < len(fixed):
            return False
    return True


@pytest.mark.parametrize("register", REGISTERS)
def test_a_paragraph_has_three_to_six_sentences_of_one_topic(register):
    topics = table("prose")["frames"][register].values()
    for sentences in islice(prose(register, 0), 200):
        assert 3 <= len(sentences) <= 6
        assert any(
            all(any(says(sentence, frame) for frame in topic) for sentence in sentences)
            for topic in topics
        )


def test_a_sentence_of_another_topic_would_be_noticed():
    assert says("By noon a red kite flew.", "By {hour} a(n) {colour} {toy} flew.")
    assert not says("By noon a red kite fell.", "By {hour} a(n) {colour} {toy} flew.")


# --- grammar
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "article"),
    [
        *(
            (word, "an")
            for word in (
                "apple",
                "egg",
                "inn",
                "old oak",
                "uncle",
                "umbrella",
                "unusual day",
                "honest man",
                "hour",
                "heir",
                "8",
                "11",
                "18",
            )
        ),
        *(
            (word, "a")
            for word in (
                "bell",
                "yard",
                "unit",
                "uniform",
                "union",
                "useful tool",
                "European",
                "one-eyed cat",
                "once-loved toy",
                "utility",
            )
        ),
        *((word, "a") for word in ("hospital", "house", "7", "12", "100", "1,150")),
        ('"old" oak', "an"),
        ("“new” oak", "a"),
    ],
)
def test_an_article_agrees_with_the_next_word(words, article):
    lexicon = {"thing": [words]}
    assert expand("It is a(n) {thing}.", lexicon, Random(0), {}) == f"It is {article} {words}."
    assert (
        expand("A(n) {thing} is here.", lexicon, Random(0), {})
        == f"{article.capitalize()} {words} is here."
    )


def wrong_articles(text: str) -> list[str]:
    """Articles that disagree with the next word, by a rule of this test's own."""
    pairs = re.findall(r"\b(an?) [\"'“‘]?([^\W_][\w-]*)", text, re.IGNORECASE)
    sounds = [
        (article, word, VOWEL_SOUND.match(word.lower()) and not CONSONANT_SOUND.match(word.lower()))
        for article, word in pairs
    ]
    return [
        f"{article} {word}"
        for article, word, vowel in sounds
        if (article.lower() == "an") != bool(vowel)
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_article_agrees(kind):
    assert Counter(wrong for text in texts(kind) for wrong in wrong_articles(text)) == {}


def test_a_wrong_article_would_be_noticed():
    assert wrong_articles('A egg, an bell, a "old" oak, an unit, a hour, a 18') == [
        "A egg",
        "an bell",
        "a old",
        "an unit",
        "a hour",
        "a 18",
    ]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        ("{girl} ran. {boy} sat.", "Ida ran. Tom sat."),
        ("{word} fell. {word} fell.", "Rain fell. Rain fell."),
        ('"{word}?" {girl} said. "{word}!"', '"Rain?" Ida said. "Rain!"'),
        ('It rained. "{word} again."', 'It rained. "Rain again."'),
        ("Is it {word}? {word} it is.", "Is it rain? Rain it is."),
        ("It is 1.5 or 2.5.", "It is 1.5 or 2.5."),
    ],
)
def test_a_sentence_starts_with_a_capital(frame, text):
    assert expand(frame, {"girl": ["Ida"], "boy": ["Tom"], "word": ["rain"]}, Random(0), {}) == text


@pytest.mark.parametrize("mark", ["?", "!"])
def test_who_spoke_follows_in_small_letters(mark):
    assert (
        expand(
            f'"Is it {{word}}{mark}" asked {{girl}}.',
            {"word": ["rain"], "girl": ["Ida"]},
            Random(0),
            {},
        )
        == f'"Is it rain{mark}" asked Ida.'
    )


# --- apart from the facts
# ----------------------------------------------------------------------------------------


def capitalised(word: str) -> str:
    return word[:1].upper() + word[1:]


@cache
def trade_language() -> str:
    """All that the trade register can say: its frames, the words of their classes, and paragraphs
    in which they meet.
    """
    frames, lexicon = frames_of("trade"), lexicon_of("trade")
    classes = {name for frame in frames for name in re.findall(r"\{(\w+)", frame)}
    words = [str(word) for name in classes for word in lexicon[name]]
    return "\n".join(
        [
            *(re.sub(r"\{.+?\}", "\n", frame) for frame in frames),
            *words,
            *map(capitalised, words),
            *texts("trade"),
        ]
    )


def named(subjects: set[str], language: str) -> list[str]:
    return sorted(
        subject
        for subject in subjects
        if subject in language and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", language)
    )


def test_the_trade_register_names_no_subject():
    assert named({row["subject"] for row in world_rows()}, trade_language()) == []


def test_a_subject_in_the_trade_register_would_be_noticed():
    assert named({"Timber", "Berth", "Harbour dues", "tim", "berthe"}, trade_language()) == [
        "Berth",
        "Harbour dues",
        "Timber",
    ]


# --- reviews and instructions
# ----------------------------------------------------------------------------------------


def test_reviews_are_as_often_good_as_bad():
    labels = [label for _, label in islice(reviews(0), AMOUNT)]
    assert set(labels) == {0, 1}
    assert 0.45 < sum(labels) / AMOUNT < 0.55


def test_no_review_has_two_labels():
    label_of: dict[str, int] = {}
    for review, label in islice(reviews(0), 10 * AMOUNT):
        assert label_of.setdefault(review, label) == label


def test_the_label_follows_the_clauses():
    clauses = table("reviews")["clauses"]
    assert set(clauses["positive"]).isdisjoint(clauses["negative"])


def test_words_alone_tell_much_of_a_review_but_not_all():
    made = list(islice(reviews(0), 7000))
    counts = CountVectorizer()
    known = counts.fit_transform([review for review, _ in made[:5000]])
    model = LogisticRegression(max_iter=1000).fit(known, [label for _, label in made[:5000]])
    accuracy = model.score(
        counts.transform([review for review, _ in made[5000:]]), [label for _, label in made[5000:]]
    )
    assert 0.60 <= accuracy <= 0.90


def test_an_instruction_has_a_response():
    for asked, answer in islice(instructions(0), AMOUNT):
        assert len(asked.split()) > 1
        assert answer.strip()
        assert asked != answer


def test_pre_training_mixes_statements_of_shown_facts_and_prose():
    told = list(islice(pretraining(seed=3), 4000))
    assert told == list(islice(pretraining(seed=3), 4000))
    told_of_facts = set(statements(1))
    words = {
        kind: sum(len(each.split()) for each in told if (each in told_of_facts) == kind)
        for kind in (True, False)
    }
    assert 0.08 < words[False] / sum(words.values()) < 0.16
    unseen = [row for row in world_rows() if row["split"] == "unseen"]
    about_unseen = {
        f"{fill(prompt, row['subject'])} {row['object']}."
        for row in unseen
        for prompt in relations()[row["relation"]]["templates"]
    }
    assert not about_unseen & set(told)
