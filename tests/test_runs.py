"""A run is there as a whole or not at all, and reading it needs no torch."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from workbench import runs
from workbench.facts import BadInput

ABOUT = {
    "spec": {"editor": "rome", "plan": "after:3", "seed": 0},
    "hparams": [{"clamp": 4.0}],
    "commit": "Þ",
}
TABLES = {
    "probes": pd.DataFrame(
        {
            "edited_model": [0, 0],
            "step": [-1, 0],
            "prompt": ["Moby Dick is by", "Þ"],
            "p_true": [0.25, 1e-12],
        }
    ),
    "lens": pd.DataFrame(
        {
            "edited_model": [0],
            "step": [0],
            "fact_id": ["author:moby-dick"],
            "layer": [3],
            "probability": [0.5],
        }
    ),
    "tokens": pd.DataFrame({"edited_model": [0], "step": [0], "token": [" Herman"], "rank": [1]}),
    "positions": pd.DataFrame({"edited_model": [0], "step": [0], "position": [-1], "at": [" of"]}),
    "training": pd.DataFrame(
        {"edited_model": [0, 0], "step": [0, 10], "loss": [3.5, float("nan")]}
    ),
}


def make(out, run_id="rome-1", about=ABOUT, tables=TABLES):
    with runs.new_folder(out, run_id) as folder:
        runs.write(folder, about, tables)
    return runs.read(out / run_id)


def refusal(one_line, action, *args) -> str:
    with pytest.raises(BadInput) as error:
        action(*args)
    return one_line(error)


class Crash(Exception):
    pass


class Unwritable(pd.DataFrame):
    """A table that fails while it is written."""

    def to_parquet(self, path, **options):
        path.write_bytes(b"PAR1")
        raise Crash


# round trip


def test_a_run_comes_back_as_it_was_written(tmp_path):
    run = make(tmp_path)
    for name, table in TABLES.items():
        pd.testing.assert_frame_equal(getattr(run, name), table)
    assert run.spec == ABOUT["spec"]
    assert {
        name: value for name, value in run.about.items() if name not in ("files", "sha256")
    } == {"schema": runs.SCHEMA, "status": "finished"} | ABOUT
    assert set(run.files) == {f"{name}.parquet" for name in TABLES}
    assert run.folder == tmp_path / "rome-1"


def test_another_table_would_not_do(tmp_path):
    run = make(tmp_path, tables=TABLES | {"lens": TABLES["lens"].assign(probability=0.51)})
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(run.lens, TABLES["lens"])


def test_write_returns_the_run_it_wrote(tmp_path):
    run = runs.write(tmp_path, ABOUT, TABLES)
    assert run.folder == tmp_path
    pd.testing.assert_frame_equal(run.training, TABLES["training"])


def test_a_folder_holds_the_files_of_a_run_and_no_partial_ones(tmp_path):
    make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rome-1"]
    assert {path.name for path in (tmp_path / "rome-1").iterdir()} == {
        "run.json",
        *(f"{name}.parquet" for name in TABLES),
    }


def test_deltas_are_in_order_of_the_edited_models(tmp_path):
    assert make(tmp_path).deltas == []
    (tmp_path / "run" / "deltas").mkdir(parents=True)
    for number in (10, 2, 0):
        (tmp_path / "run" / "deltas" / f"{number}.safetensors").touch()
    run = runs.write(tmp_path / "run", ABOUT, TABLES)
    assert [path.stem for path in run.deltas] == ["0", "2", "10"]


def test_reading_needs_no_torch(tmp_path):
    make(tmp_path)
    code = (
        "import sys; from workbench import runs; "
        "print(len(runs.listed(sys.argv[1])[0].probes), {'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["2", "set()"]


# run.json last


@pytest.mark.parametrize("broken", runs.TABLES)
def test_a_run_whose_tables_are_not_all_written_is_no_run(tmp_path, one_line, broken):
    with pytest.raises(Crash):
        runs.write(tmp_path, ABOUT, TABLES | {broken: Unwritable(TABLES[broken])})
    assert not list(tmp_path.glob(".*"))
    assert "no finished run" in refusal(one_line, runs.read, tmp_path)


def test_run_json_is_the_last_to_be_written(tmp_path):
    folder = make(tmp_path).folder
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(written) == 6
    assert max(written.values()) == written["run.json"]


def write_and_raise(folder, written, error):
    (folder / "deltas").mkdir()
    if written:
        runs.write(folder, ABOUT, TABLES)
    raise error


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
@pytest.mark.parametrize("written", [False, True], ids=["before the run is written", "after it"])
def test_a_crash_inside_new_folder_leaves_nothing(tmp_path, error, written):
    with pytest.raises(error), runs.new_folder(tmp_path, "rome-1") as folder:
        write_and_raise(folder, written, error)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_an_earlier_run_of_the_same_id(tmp_path):
    make(tmp_path)
    with pytest.raises(Crash):
        make(tmp_path, tables=TABLES | {"tokens": Unwritable(TABLES["tokens"])})
    assert [path.name for path in tmp_path.iterdir()] == ["rome-1"]
    pd.testing.assert_frame_equal(runs.read(tmp_path / "rome-1").tokens, TABLES["tokens"])


def test_a_later_run_of_the_same_id_takes_the_place_of_the_earlier(tmp_path):
    (make(tmp_path).folder / "notes.txt").write_text("of the first")
    second = make(tmp_path, about=ABOUT | {"spec": {"editor": "ft"}})
    assert second.spec == {"editor": "ft"}
    assert not (second.folder / "notes.txt").exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_the_out_folder_is_made(tmp_path):
    assert make(tmp_path / "deep" / "runs").spec == ABOUT["spec"]


# a full disk


@pytest.fixture
def full_disk(monkeypatch):
    """From the third table on there is no space left."""
    written, to_parquet = [], pd.DataFrame.to_parquet

    def write(table, path, **options):
        written.append(path)
        if len(written) > 2:
            path.write_bytes(b"PAR1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return to_parquet(table, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", write)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_line_and_leaves_no_run(tmp_path, one_line):
    message = refusal(one_line, make, tmp_path)
    assert "No space left on device" in message
    assert str(tmp_path) in message
    assert list(tmp_path.iterdir()) == []
    assert runs.listed(tmp_path) == []


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_partial_file_in_a_folder_that_was_there(tmp_path, one_line):
    assert "No space left on device" in refusal(one_line, runs.write, tmp_path, ABOUT, TABLES)
    assert {path.name for path in tmp_path.iterdir()} == {"probes.parquet", "lens.parquet"}
    assert "no finished run" in refusal(one_line, runs.read, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, one_line):
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in refusal(one_line, make, tmp_path / "file")
    assert "below" in refusal(one_line, runs.write, tmp_path / "file" / "below", ABOUT, TABLES)


def test_a_file_in_the_place_of_the_run_is_one_line(tmp_path, one_line):
    (tmp_path / "rome-1").write_text("no run")
    assert str(tmp_path / "rome-1") in refusal(one_line, make, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rome-1"]


# reading what is no run


@pytest.mark.parametrize("schema", [runs.SCHEMA + 1, runs.SCHEMA - 1, None])
def test_an_unknown_schema_names_both(tmp_path, one_line, schema):
    folder = make(tmp_path).folder
    (folder / "run.json").write_text(json.dumps(ABOUT | {"schema": schema}))
    message = refusal(one_line, runs.read, folder)
    assert f"has schema {schema}, this version reads {runs.SCHEMA}" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema": 1,\n"spec": ', b"[]", b"null", b"3", b"\xff\xfe"], ids=repr
)
def test_a_broken_run_json_is_named(tmp_path, one_line, content):
    folder = make(tmp_path).folder
    (folder / "run.json").write_bytes(content)
    message = refusal(one_line, runs.read, folder)
    assert str(folder) in message
    assert "run.json" in message


def test_the_line_that_is_broken_is_named(tmp_path, one_line):
    (tmp_path / "run.json").write_text('{"schema": 1,\n"spec": {},\n"deep": [1, }')
    assert "line 3" in refusal(one_line, runs.read, tmp_path)


@pytest.mark.parametrize("name", ["nothing", "folder", "file"])
def test_a_place_without_a_run_is_named(tmp_path, one_line, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    message = refusal(one_line, runs.read, tmp_path / name)
    assert str(tmp_path / name) in message
    assert "no finished run" in message


# listing


def test_finished_runs_are_listed_oldest_first(tmp_path):
    now = time.time()
    for age, run_id in enumerate(("c-newest", "a", "b-oldest")):
        os.utime(make(tmp_path, run_id).folder / "run.json", (now - age, now - age))
    assert [run.folder.name for run in runs.listed(tmp_path)] == ["b-oldest", "a", "c-newest"]


def test_unfinished_and_partial_folders_are_not_listed(tmp_path):
    make(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "notes.txt").touch()
    with runs.new_folder(tmp_path, "rome-2") as partial:
        runs.write(partial, ABOUT, TABLES)  # whole but for its name, as after a kill
        assert [run.folder.name for run in runs.listed(tmp_path)] == ["rome-1"]
    assert len(runs.listed(tmp_path)) == 2


def test_without_an_out_folder_the_list_is_empty(tmp_path):
    assert runs.listed(tmp_path / "nowhere") == []
    assert runs.listed(str(tmp_path)) == []


def arm(folder, plan, metrics, edited, ended="budget", metric="loss"):
    """A run of one edited model with a fact of each group at steps 0, 10, 20 ..."""
    folder.mkdir()
    steps = [10 * number for number in range(len(metrics))]
    rows = [
        {"edited_model": 0, "step": step, "group": "edited", "took": True, "retained": kept}
        for step, kept in zip(steps, edited, strict=True)
    ]
    rows += [
        {"edited_model": 0, "step": step, "group": "edited", "took": False, "retained": False}
        for step in steps
    ]
    rows += [
        {"edited_model": 0, "step": step, "group": "intrinsic", "took": True, "retained": True}
        for step in steps
    ]
    tables = {
        "probes": pd.DataFrame(rows),
        "training": pd.DataFrame({"edited_model": 0, "step": steps, "metric": metrics}),
    }
    about = {
        "spec": {"task": "text", "model": "m", "task_data": "", "plan": plan},
        "ended": [ended],
        "tuning": {"metric": metric},
    }
    return runs.write(folder, about, tables)


@pytest.mark.parametrize(("metric", "sign"), [("loss", 1), ("accuracy", -1)])
def test_arms_are_compared_at_the_loosest_metric_that_all_reach_and_at_one_step(
    tmp_path, metric, sign
):
    quick = arm(
        tmp_path / "a",
        "all",
        [4 * sign, 3 * sign, 2 * sign],
        [True, True, False],
        "reached",
        metric,
    )
    slow = arm(
        tmp_path / "b",
        "window:1-2",
        [4 * sign, 3.5 * sign, 3.2 * sign, 3.0 * sign],
        [True, True, False, False],
        "budget",
        metric,
    )
    table = runs.compare([quick, slow], "plan").set_index("plan")
    assert table.level.tolist() == [3 * sign, 3 * sign]
    assert table.step.tolist() == [10, 30]
    assert table.edited.tolist() == [1, 0]
    assert table.edited_at_20.tolist() == [0, 0]
    assert table.intrinsic.tolist() == [1, 1]
    assert table.reached.tolist() == [1, 0]
    assert table.best.tolist() == [2 * sign, 3 * sign]


def test_every_edited_model_is_read_where_it_is_at_the_level(tmp_path):
    quick = arm(tmp_path / "quick", "all", [4, 3], [True, True], "reached")
    slow = arm(tmp_path / "slow", "all", [4, 3.5, 3.2, 3], [True, True, True, False], "reached")
    tables = {
        name: pd.concat([getattr(quick, name), getattr(slow, name).assign(edited_model=1)])
        for name in ("probes", "training")
    }
    about = {"spec": quick.spec, "ended": ["reached", "reached"], "tuning": {"metric": "loss"}}
    (tmp_path / "both").mkdir()
    (row,) = runs.compare([runs.write(tmp_path / "both", about, tables)], "plan").to_dict("records")
    assert (row["level"], row["step"], row["edited"]) == (3, 20, 0.5)  # at 10 and at 30
    assert row["edited_at_10"] == 1


def test_what_cannot_be_compared_is_one_clear_line(tmp_path, one_line):
    first = arm(tmp_path / "a", "all", [4], [True])
    other = runs.Run(
        folder=first.folder, about={**first.about, "spec": {**first.spec, "task": "facts"}}
    )
    for found, named in (([], "no runs"), ([first, other], "several tasks")):
        with pytest.raises(BadInput) as error:
            runs.compare(found, "plan")
        assert named in one_line(error)


def test_collected_runs_are_those_of_experiments_with_the_fields_asked_for(
    tmp_path, one_line, monkeypatch
):
    first, second = (
        arm(tmp_path / name, plan, [4.0], [True]) for name, plan in (("a", "all"), ("b", "after:3"))
    )
    (tmp_path / "whole").mkdir()
    runs.write(tmp_path / "whole", {"spec": {}, "members": ["a", "b"]}, {})
    assert {run.folder for run in runs.collect(tmp_path)} == {first.folder, second.folder}
    assert [run.folder for run in runs.collect(tmp_path, plan="after:3", model="")] == [
        second.folder
    ]
    assert [run.folder for run in runs.read(tmp_path / "whole").members] == [
        first.folder,
        second.folder,
    ]
    (tmp_path / "notebook").mkdir()
    monkeypatch.setenv("WORKBENCH_RUN", str(tmp_path / "notebook"))
    runs.collect(tmp_path, plan="all")
    assert [run.folder.name for run in runs.read(tmp_path / "notebook").members] == ["a"]
    with pytest.raises(BadInput) as error:
        runs.collect(tmp_path, plan="window:1-2")
    assert "window:1-2" in one_line(error)


def test_the_tests_runs_lie_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path))
    assert runs.place() == runs.place(notebook="a.ipynb") == tmp_path
    assert runs.place("runs") == Path("runs")


def test_runs_lie_in_the_project_of_their_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("WORKBENCH_OUT", raising=False)
    notebook = tmp_path / "mine" / "notebooks" / "a.ipynb"
    notebook.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    beside = notebook.parent / "runs"
    assert runs.place(notebook=notebook) == beside
    assert runs.place(notebook="mine/notebooks/a.ipynb") == beside
    monkeypatch.chdir(notebook.parent)
    assert runs.place() == beside
    for mark in ("pyproject.toml", ".git"):
        (tmp_path / "mine" / mark).touch()
        assert runs.place(notebook=notebook) == tmp_path / "mine" / "runs"
        assert runs.place() == tmp_path / "mine" / "runs"
        (tmp_path / "mine" / mark).unlink()
    assert runs.place("elsewhere", notebook) == Path("elsewhere")


def test_progress_is_told_to_whoever_asks(tmp_path, monkeypatch):
    runs.progress("nobody listens")
    monkeypatch.setenv("WORKBENCH_PROGRESS", str(tmp_path / "progress.json"))
    runs.progress("fine-tuning", 3, 10)
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "phase": "fine-tuning",
        "done": 3,
        "total": 10,
    }


def test_a_run_that_names_others_is_finished_only_while_they_are_there(tmp_path):
    for name, about in (("a", {}), ("b", {}), ("both", {"members": ["a", "b"]})):
        (tmp_path / name).mkdir()
        runs.write(tmp_path / name, about, {})
    assert runs.finished(tmp_path / "both")
    shutil.rmtree(tmp_path / "b")
    assert not runs.finished(tmp_path / "both")
    assert not runs.finished(tmp_path / "b")


# damage


def whole(out, run_id="rome-1"):
    """A run as a notebook leaves one, edits included."""
    with runs.new_folder(out, run_id) as folder:
        (folder / "deltas").mkdir()
        (folder / "deltas" / "0.safetensors").write_bytes(bytes(range(256)))
        runs.write(folder, ABOUT, TABLES)
        (folder / "notebook.ipynb").write_text("{}")
        (folder / "notebook.html").write_text("<p>")
        runs.seal(folder)
    return runs.read(out / run_id)


def content(run):
    """Whatever can be read of a run."""
    tables = {name: getattr(run, name).to_json(double_precision=15) for name in TABLES}
    return (
        tables,
        [path.read_bytes() for path in run.deltas],
        {**run.about, "files": None, "sha256": None},
    )


def damage(rng: random.Random, folder) -> None:
    """A file flipped, cut, grown, emptied, removed, replaced by another of the run or by a link;
    run.json more often than others.
    """
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice([*names, folder / "run.json"])
    data = path.read_bytes()
    at = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind == 0:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    elif kind == 1:
        path.write_bytes(data[:at])
    elif kind == 2:
        path.write_bytes(data + bytes(rng.randrange(1, 9)))
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.write_bytes(rng.choice([other for other in names if other != path]).read_bytes())
    else:
        path.unlink()
        path.symlink_to("/dev/null")


def damaged_outcomes(tmp_path, count: int, seed: int) -> Counter:
    rng, outcomes, lines = random.Random(seed), Counter(), []
    expected = content(whole(tmp_path / "sound"))
    for _ in range(count):
        shutil.rmtree(tmp_path / "one", ignore_errors=True)
        shutil.copytree(tmp_path / "sound" / "rome-1", tmp_path / "one")
        damage(rng, tmp_path / "one")
        outcome = "taken for finished" if runs.finished(tmp_path / "one") else "not finished"
        try:
            read = content(runs.read(tmp_path / "one"))
            outcome += ", read right" if read == expected else ", READ WRONG"
        except BadInput as error:
            lines.append(str(error))
            outcome += ", one line"
        outcomes[outcome] += 1
    assert all(len(line.splitlines()) == 1 and str(tmp_path / "one") in line for line in lines)
    return outcomes


def test_no_damaged_run_passes_for_a_result(tmp_path):
    """500 damaged folders: 448 of them were finished runs to the version that looked at run.json
    alone.

    What may be read right of a damaged run is what the damage spared: the notebook or its page was
    hit. What may be taken for finished is not damaged in what it says: white space of run.json.
    """
    outcomes = damaged_outcomes(tmp_path, 500, seed=0)
    print(dict(outcomes))
    assert set(outcomes) <= {
        "not finished, one line",
        "not finished, read right",
        "taken for finished, read right",
    }
    assert outcomes["taken for finished, read right"] < 10
    assert outcomes["not finished, one line"] > 300


def test_a_damaged_table_is_named_when_it_is_first_read_and_says_what_to_do(tmp_path, one_line):
    run = whole(tmp_path)
    path = run.folder / "lens.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert len(run.probes)
    message = refusal(one_line, lambda: runs.read(run.folder).lens)
    assert str(path) in message
    assert "--again" in message
    assert not runs.finished(run.folder)


@pytest.mark.parametrize("member", ["../../etc", "/etc", "..", ".", "", "both", "sub/a", "link"])
def test_members_are_runs_beside_it(tmp_path, one_line, member):
    """A name that leads elsewhere was followed."""
    whole(tmp_path / "elsewhere", "a")
    (tmp_path / "out" / "both").mkdir(parents=True)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere" / "a")
    with pytest.raises(BadInput) as error:
        runs.write(tmp_path / "out" / "both", {"members": [member]}, {})
    assert "no run beside it" in one_line(error)
    assert not runs.finished(tmp_path / "out" / "both")


def test_runs_that_cannot_be_read_are_left_out_of_a_list_with_a_line(tmp_path):
    whole(tmp_path, "good")
    (whole(tmp_path, "bad").folder / "lens.parquet").unlink()
    with pytest.warns(UserWarning, match=r"left out: .*bad/lens.parquet: damaged"):
        assert [run.folder.name for run in runs.listed(tmp_path)] == ["good"]


def test_the_gap_of_a_merged_adapter_is_of_the_probes_that_are_known():
    probes = pd.DataFrame(
        {"edited_model": 0, "step": [0, 8, 8], "p_true": [0.9, 0.5, float("nan")]}
    )
    run = runs.Run(folder=Path("nowhere"), about={})
    run.__dict__.update(probes=probes, merged=pd.DataFrame({"p_true": [0.25, float("nan")]}))
    assert runs._merged_gap(run) == 0.25


# --- what measures said

MEASURED = {
    "mine": pd.DataFrame(
        {
            "edited_model": [0, 0, 0, 0, 0],
            "step": [-1, 0, 0, 0, 20],
            "fact_id": ["a", "a", "a", "b", "a"],
            "quantity": "right",
            "value": [0.0, 1.0, 0.0, 1.0, 0.25],
        }
    ),
    "wide": pd.DataFrame(
        {"edited_model": [0], "step": [20], "fact_id": ["a"], "words": [3], "good": [True]}
    ),
}


def measuring(out, run_id="measured"):
    about = {**ABOUT, "spec": {**ABOUT["spec"], "measures": ["mine", "wide"]}}
    return make(out, run_id, about, {**TABLES, **MEASURED})


def test_what_measures_said_is_one_table_of_a_mean_a_fact_step_and_quantity(tmp_path):
    table = measuring(tmp_path).measured
    key = ["measure", "step", "fact_id", "quantity"]
    assert table.set_index(key).value.to_dict() == {
        ("mine", -1, "a", "right"): 0.0,
        ("mine", 0, "a", "right"): 0.5,
        ("mine", 0, "b", "right"): 1.0,
        ("mine", 20, "a", "right"): 0.25,
        ("wide", 20, "a", "words"): 3.0,
        ("wide", 20, "a", "good"): 1.0,
    }
    assert (table.edited_model == 0).all()


def test_a_run_without_measures_has_an_empty_table_of_them(tmp_path):
    assert make(tmp_path).measured.empty
