import pytest

from workbench.facts import BadInput
from workbench.tuning import numbers, tasks


def test_every_task_has_its_usual_numbers():
    assert set(numbers.presets()["world"]) == set(tasks.TASKS)


def test_the_studies_sources_name_a_task_and_refuse_another(one_line):
    found = numbers.presets()["sources"]
    assert {"common-crawl", "counterfact", "imdb", "tulu-3", "commonsense-170k"} <= set(found)
    assert {source.task for source in found.values()} == set(tasks.TASKS)
    assert numbers.usual("text", "common-crawl").threshold == 3.1
    assert numbers.usual("facts", "", "smollm2-135m").learning_rate == 1e-4
    assert (
        numbers.usual("facts").learning_rate
        == numbers.usual("facts", "", "world-gpt2").learning_rate
    )
    with pytest.raises(BadInput) as error:
        numbers.usual("facts", "imdb")
    assert "sentiment" in one_line(error)
