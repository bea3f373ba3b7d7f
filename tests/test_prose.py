"""Real prose for models that were not taught the world's."""

import re

import pytest

from workbench import facts, prose


def test_paragraphs_are_english_sentences_without_markup_and_none_stands_twice():
    paragraphs = prose.manual()
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(map(len, paragraphs)) > 150_000
    for paragraph in paragraphs:
        assert paragraph.endswith(".")
        assert not re.search(r"[*`\n]|>>>", paragraph)
    letters = sum(character.isalpha() for paragraph in paragraphs for character in paragraph)
    assert letters / sum(map(len, paragraphs)) > 0.75
    assert sum(" the " in paragraph for paragraph in paragraphs) / len(paragraphs) > 0.7


def test_what_judges_is_english_that_no_task_and_no_moment_takes():
    judges = set(prose.docstrings())
    assert sum(map(len, judges)) > 100_000
    assert not judges & set(prose.manual())
    assert not judges & set(prose.mixed())
    assert all(len(text) >= 200 and text.endswith(".") for text in judges)


def test_a_python_without_sources_cannot_judge_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(prose.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(facts.BadInput, match="no text to judge by"):
        next(prose.docstrings())


def test_only_the_worlds_models_read_its_text_where_none_is_named():
    assert prose.corpus_of("world-gpt2") == "world"
    assert prose.corpus_of("smollm2-135m") == "manual-and-facts"
    assert prose.corpus_of("smollm2-135m", "wikipedia") == "wikipedia"


def test_what_is_mixed_in_names_people_and_places_but_no_fact_of_a_study():
    mixed = set(prose.mixed())
    assert mixed > set(prose.manual())
    statements = mixed - set(prose.manual())
    studied = [r.fact for r in facts.read("plain") if r.fact.split == "study"]
    assert len(statements) > 2_000
    for text in statements:
        for fact in studied:
            assert not (fact.subject in text and fact.object in text), text
