import pandas as pd
import pytest

from tests.benchmarks import choose_rates
from workbench.facts import DATA, BadInput
from workbench.tuning import numbers, tasks


def test_every_task_has_its_usual_numbers():
    assert set(numbers.presets()["world"]) == set(tasks.TASKS)


def test_a_real_model_is_tuned_at_the_rates_that_the_record_chooses():
    tried = choose_rates.ranked(pd.read_csv(DATA / "smollm2" / "rates.csv"))
    tried = tried[tried.adapter.isna()]
    best = tried.drop_duplicates("task").set_index("task").learning_rate
    assert set(best.index) == set(tasks.TASKS)
    for task, rate in best.items():
        assert numbers.usual(task, "", "smollm2-135m").learning_rate == rate
        assert min(choose_rates.RATES[""]) < rate < max(choose_rates.RATES[""])


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
