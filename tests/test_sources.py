import json

import datasets
import pytest

from workbench import sources
from workbench.facts import BadInput

ROWS = [{"text": "A fine day.", "label": 1}, {"text": "A grey one.", "label": 0}]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_holds_the_same_records(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    table = datasets.Dataset.from_list(ROWS)
    if ending == ".json":
        path.write_text(json.dumps(ROWS))
    elif ending == ".csv":
        table.to_csv(path)
    elif ending == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path)
    assert list(sources.records(str(path), "corpus")) == ROWS
    assert list(sources.records(str(path), "corpus", streaming=True)) == ROWS


def test_a_line_of_a_text_file_is_a_record(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("A fine day.\nA grey one.\n")
    assert list(sources.records(str(path), "corpus")) == [{"text": row["text"]} for row in ROWS]


def test_a_hub_dataset_is_asked_for_by_its_id_and_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **how: asked.append((where, how)))
    sources.records("owner/name", "corpus")
    sources.records("owner/name:part", "corpus", split="test", streaming=True)
    sources.records("owner/name:part", "corpus", config="named")
    assert asked == [
        (("owner/name", None), {"split": "train", "streaming": False}),
        (("owner/name", "part"), {"split": "test", "streaming": True}),
        (("owner/name", "named"), {"split": "train", "streaming": False}),
    ]


def test_what_cannot_be_read_is_one_line_with_the_parameter(tmp_path, one_line):
    odd, broken = tmp_path / "rows.xlsx", tmp_path / "rows.json"
    odd.touch()
    broken.write_text("{")
    for source, why in ((odd, "ending '.xlsx' is not known"), (broken, "cannot be read (")):
        with pytest.raises(BadInput) as error:
            sources.records(str(source), "task_data")
        assert f"task_data {str(source)!r}: {why}" in one_line(error)
