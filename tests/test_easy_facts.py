"""The easy facts: what their file promises to whoever reads it."""

import re
from collections import Counter

import pytest
import yaml

from workbench import facts

RELATIONS = yaml.safe_load((facts.DATA / "easy" / "facts.yaml").read_text(encoding="utf-8"))
# the world's relations that mean what one of these means
SAME_MEANING = {
    "capital": "capital",
    "language": "official_language",
    "us_state": "us_state",
    "kind": "animal_kind",
    "city_country": "landmark_country",
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_each_wording_asks_for_the_object_of_one_subject(relation):
    templates = RELATIONS[relation]["templates"]
    assert len(templates) == len(set(templates)) == 8
    for template in templates:
        assert template.count("{}") == 1
        assert template == template.strip()
        assert not template.endswith("{}")


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_question_gives_its_answer_away(relation):
    for subject, answer in RELATIONS[relation]["facts"].items():
        assert subject == subject.strip()
        assert answer == answer.strip()
        assert answer.lower() not in subject.lower()
        assert subject.lower() not in answer.lower()


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_wording_holds_a_subject_or_an_answer_of_its_facts(relation):
    pairs = RELATIONS[relation]["facts"].items()
    names = {name.lower() for pair in pairs for name in pair}
    for template in RELATIONS[relation]["templates"]:
        assert not names & set(re.findall(r"\w+", template.lower()))


def test_no_subject_stands_twice_in_a_relation():
    # a mapping hides a key that is written twice, so the text is read
    tree = yaml.compose((facts.DATA / "easy" / "facts.yaml").read_text(encoding="utf-8"))
    for name, relation in tree.value:
        fields = {key.value: value for key, value in relation.value}
        subjects = Counter(subject.value.lower() for subject, _ in fields["facts"].value)
        assert max(subjects.values()) == 1, name.value


def test_names_are_text():
    for relation in RELATIONS.values():
        for subject, answer in relation["facts"].items():
            assert isinstance(subject, str)
            assert isinstance(answer, str)


def test_none_is_a_fact_of_the_world():
    world = {
        (row["relation"], row["subject"].lower(), row["object"].lower())
        for row in facts.world_rows()
    }
    for relation, fields in RELATIONS.items():
        for subject, answer in fields["facts"].items():
            for name in {relation, SAME_MEANING.get(relation, relation)}:
                assert (name, subject.lower(), answer.lower()) not in world


def test_there_are_enough():
    assert len(RELATIONS) >= 10
    assert sum(len(relation["facts"]) for relation in RELATIONS.values()) >= 300
