"""A name is the package's own, an installed package's, or registered here; a function is enough."""

import json
import sys
import types
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

import workbench as wb
from workbench import batch, editing, facts, registry, runs, study
from workbench.__main__ import main
from workbench.facts import BadInput
from workbench.registry import Registry
from workbench.spec import identify
from workbench.tracking.probes import Probe, questions

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def things():
    return Registry("thing", {"own": "json:dumps"}, lambda name, thing: (name, thing))


@pytest.fixture
def editors(monkeypatch):
    """The editors, without what a test registers once it is over."""
    monkeypatch.setattr(editing.EDITORS, "_ready", dict(editing.EDITORS._ready))
    monkeypatch.setattr(editing.EDITORS, "_declared", set())
    return editing.EDITORS


def test_own_names_are_imported_when_they_are_asked_for(things):
    assert list(things) == ["own"]
    assert things["own"] == ("own", sys.modules["json"].dumps)


def test_a_registered_name_is_there_and_can_be_given_again(things):
    things.register("mine", 1)
    assert things["mine"] == ("mine", 1)
    things.register("mine", 2)
    assert things["mine"] == ("mine", 2)

    @things.register("named")
    def decorated():
        return None

    assert things["named"] == ("named", decorated)
    assert list(things) == ["own", "mine", "named"]


def test_own_names_and_odd_names_are_refused(things, one_line):
    for name, why in (("own", "workbench's own"), ("a/b", "letters, digits and _")):
        with pytest.raises(BadInput) as error:
            things.register(name, 1)
        assert why in one_line(error)


def test_an_unknown_name_says_which_is_near(things, one_line):
    things.register("certainty", 1)
    with pytest.raises(BadInput) as error:
        things["certanty"]
    assert "did you mean 'certainty'" in one_line(error)


def test_a_declared_name_passes_and_says_what_to_run(things, one_line):
    things.declare(["later"])
    things.check("later")
    with pytest.raises(BadInput) as error:
        things["later"]
    assert "run the cell" in one_line(error)


def test_a_package_offers_its_own_by_an_entry_point(things, monkeypatch):
    module = types.ModuleType("a_package")
    module.offered = "an editor"
    monkeypatch.setitem(sys.modules, "a_package", module)

    def points(group):
        return (
            [EntryPoint("theirs", "a_package:offered", group)] if group.endswith("things") else []
        )

    monkeypatch.setattr(registry, "entry_points", points)
    assert things["theirs"] == ("theirs", "an editor")


def pushed(model, requests, layers=(1,), strength=0.5, seed=0):
    """A change of rank one that means nothing: of the size `strength`."""
    torch.manual_seed(seed)
    d_out, d_in = model.weight(layers[0]).shape
    change = wb.Change(left=strength * torch.ones(d_out, 1), right=torch.rand(d_in, 1))
    return wb.WeightDelta.of(model, changes={model.down_projection_name(layers[0]): change})


def test_a_function_is_an_editor(tiny, requests, editors):
    wb.editors.register("pushed", pushed)
    edit = wb.edit(tiny, requests[:2], "pushed", strength=0.25)
    assert edit.record["editor"] == "pushed"
    assert edit.record["hparams"] == {"layers": [1], "strength": 0.25}
    assert [outcome["fact"] for outcome in edit.record["outcomes"]] == [
        request.fact.id for request in requests[:2]
    ]
    (change,) = edit.changes.values()
    assert change.left.unique().tolist() == [0.25]
    assert wb.edit(tiny, requests[:2], "pushed", layers=[2]).layers == (2,)


def test_layers_are_proposed_to_a_function_that_asks_for_them(tiny, requests, editors):
    @wb.editors.register("everywhere")
    def everywhere(model, requests, layers):
        return pushed(model, requests, layers=layers)

    with pytest.warns(UserWarning, match="proposed from its depth"):
        assert wb.edit(tiny, requests[:1], "everywhere").layers == (1,)


def test_what_is_no_editor_is_refused(editors, one_line):
    def without_default(model, requests, strength):
        return None

    for thing, why in ((without_default, "strength has no default"), (types, "has no HParams")):
        with pytest.raises(BadInput) as error:
            wb.editors.register("wrong", thing)
        assert why in one_line(error)
        assert "wrong" not in wb.editors


def test_a_function_that_changes_the_model_or_gives_no_edit_is_refused(
    tiny, requests, editors, one_line
):
    def writing(model, requests):
        with torch.no_grad():
            model.weight(1).add_(1)
        return pushed(model, requests)

    for function, why in ((lambda model, requests: {}, "gave back dict"), (writing, "changed the")):
        wb.editors.register("wrong", function)
        with pytest.raises(BadInput) as error:
            wb.edit(tiny, requests[:1], "wrong")
        assert why in one_line(error)


def test_what_is_no_function_is_no_task_and_no_measure(one_line):
    for registry_of_names in (wb.tasks, wb.measures):
        with pytest.raises(BadInput) as error:
            registry_of_names.register("wrong", 3)
        assert "3 is no function" in one_line(error)


def test_layers_are_not_proposed_to_a_function_that_takes_none(tiny, requests, editors):
    wb.editors.register("plain", lambda model, requests, scale=None: pushed(model, requests))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        hparams = wb.edit(tiny, requests[:1], "plain", scale=[1]).record["hparams"]
    assert hparams == {"layers": [], "scale": [1]}
    assert not any("proposed" in str(note.message) for note in notes)


def test_another_function_under_the_same_name_is_another_experiment(editors):
    def first(model, requests, layers=(1,)):
        return pushed(model, requests, strength=0.1)

    def second(model, requests, layers=(1,)):
        return pushed(model, requests, strength=0.2)

    ids = []
    for function in (first, second, first):
        wb.editors.register("same", function)
        ids.append(identify(wb.Spec(editor="same")))
    assert ids[0] == ids[2] != ids[1]
    typed = {}
    for text in ("1", "2", "1"):
        exec(f"def typed(model, requests): return {text}", typed)
        wb.editors.register("same", typed["typed"])
        ids.append(identify(wb.Spec(editor="same")))
    assert ids[3] == ids[5] != ids[4]


def test_a_measure_takes_no_tables_name_and_gives_a_table(tiny, requests, monkeypatch, one_line):
    monkeypatch.setattr(wb.measures, "_ready", dict(wb.measures._ready))
    wb.measures.register("probes", lambda model, requests: None)
    with pytest.raises(BadInput) as error:
        wb.Spec(measures=("probes",)).resolved()
    assert "table of every run" in one_line(error)
    probe = Probe(tiny, questions(requests[:1], []))
    for value in (1, pd.DataFrame({"step": [1]})):
        wb.measures.register("wrong", lambda model, requests, value=value: value)
        with pytest.raises(BadInput) as error:
            study.Recorder().look(probe, 0, measures=["wrong"])
        assert "measure wrong: give back a table" in one_line(error)


def test_a_run_of_an_edit_watches_facts_of_the_same_source(tiny, requests, editors, one_line):
    fact = facts.Fact(id="mine", subject="Ann", prompt="{} plays the", object="harp")
    mine = facts.EditRequest(fact=fact, target="flute")
    wb.editors.register("pushed", pushed)
    edit = wb.edit(tiny, [mine], "pushed")
    with pytest.raises(BadInput) as error:
        wb.study(tiny, edit, [mine])
    assert "name their source in facts" in one_line(error)


def test_a_misspelt_number_of_a_function_is_refused(tiny, requests, editors, one_line):
    wb.editors.register("pushed", pushed)
    with pytest.raises(BadInput) as error:
        wb.edit(tiny, requests[:1], "pushed", strenght=1)
    assert "did you mean 'strength'" in one_line(error)


def small(folders, **others) -> wb.Spec:
    """A study of one fact and two steps on a tiny model."""
    return wb.Spec(
        model=str(folders["gpt2"]),
        editor="ft",
        layers=(1,),
        hparams={"steps": 1},
        fact="developer:windows-mobile-6-5",
        n_edited=1,
        n_intrinsic=0,
        n_train=4,
        n_valid=2,
        max_steps=2,
        eval_every=1,
        batch_size=2,
        **others,
    )


def test_a_measure_becomes_a_table_of_the_run(tiny_folders, monkeypatch, tmp_path):
    monkeypatch.setattr(wb.measures, "_ready", dict(wb.measures._ready))

    @wb.measures.register("length")
    def length(model, requests):
        return pd.DataFrame({"fact_id": [request.fact.id for request in requests], "words": 3})

    spec = small(tiny_folders, measures=("length", "retention"))
    run = wb.study(spec, out=tmp_path)
    assert list(run.table("length").columns) == ["edited_model", "fact_id", "words", "step"]
    assert run.table("length").step.tolist() == [-1, 0, 1, 2]
    assert run.table("retention").retained.dtype == bool
    with pytest.raises(BadInput, match="lengh"):
        wb.study(spec.model_copy(update={"measures": ("lengh",)}), out=tmp_path)


def test_what_the_unedited_model_said_is_kept_no_longer_than_it_is_compared(
    tiny_folders, monkeypatch, tmp_path
):
    monkeypatch.setattr(wb.measures, "_ready", dict(wb.measures._ready))
    recorders, asked, write = [], [], study.Recorder.write

    def ask(model, requests):
        asked.append(requests[0].fact.id)
        return len(asked)

    def compare(before, after):
        return pd.DataFrame({"fact_id": [asked[-1]], "gap": after - before})

    def written(recorder, *given):
        recorders.append(recorder)
        return write(recorder, *given)

    wb.measures.register("gap", types.SimpleNamespace(ask=ask, compare=compare))
    monkeypatch.setattr(study.Recorder, "write", written)
    spec = small(tiny_folders, measures=("gap",))
    run = wb.study(spec, out=tmp_path)
    assert run.table("gap").gap.tolist() == [0, 1, 2, 3]
    assert recorders[0]._unedited == {}


# --- through a notebook

CELL = """
import pandas as pd
import torch
import datasets
from workbench.tuning.tasks import Task

@wb.editors.register("pushed")
def pushed(model, requests, layers=(1,), strength=0.5):
    d_out, d_in = model.weight(layers[0]).shape
    change = wb.Change(left=torch.full((d_out, 1), strength), right=torch.ones(d_in, 1))
    return wb.WeightDelta.of(model, changes={model.down_projection_name(layers[0]): change})

@wb.tasks.register("counting")
def counting(model, data):
    rows = [{"input_ids": [1, 2, n % 9], "labels": [1, 2, n % 9]} for n in range(40)]
    parts = rows[: data.n_train], rows[-data.n_valid :]
    train, valid = map(datasets.Dataset.from_list, parts)
    return Task(name="counting", train=train, valid=valid)

@wb.measures.register("words")
def words(model, requests):
    return pd.DataFrame({"fact_id": [request.fact.id for request in requests], "words": 3})
"""


@pytest.fixture
def notebook(tmp_path):
    """The case study with a cell that registers an editor, a task and a measure."""
    source = nbformat.read(NOTEBOOKS / "01_case_study.ipynb", as_version=4)
    first = next(n for n, cell in enumerate(source.cells) if "import workbench" in cell.source)
    source.cells.insert(first + 1, nbformat.v4.new_code_cell(CELL))
    path = tmp_path / "mine.ipynb"
    nbformat.write(source, path)
    return path


@pytest.fixture
def given(tiny_folders, tmp_path, editors, monkeypatch):
    for registry_of_names in (wb.tasks, wb.measures):
        monkeypatch.setattr(registry_of_names, "_declared", set())
    path = tmp_path / "facts.jsonl"
    fact = {"subject": "Ann", "prompt": "{} plays the", "object": "harp", "target": "flute"}
    path.write_text(json.dumps(fact | {"id": "ann"}))
    small = {"n_intrinsic": 0, "max_steps": 1, "eval_every": 1, "n_train": 4, "n_valid": 2}
    own = {"editor": "pushed", "task": "counting", "measures": ["words", "retention"]}
    source = {"model": str(tiny_folders["gpt2"]), "facts": str(path), "fact": "ann"}
    return small | own | source | {"batch_size": 2, "device": "cpu", "hparams": {"strength": 0.25}}


def test_a_notebook_runs_what_its_cell_registers(notebook, given, tmp_path):
    run = batch.run(notebook, given, out=tmp_path / "runs")
    assert (run.spec["editor"], run.spec["task"]) == ("pushed", "counting")
    assert run.about["hparams"] == [{"layers": [1], "strength": 0.25}]
    assert run.table("words").step.tolist() == [-1, 0, 1]
    assert not run.table("retention").retained.any()


def test_a_name_that_no_cell_registers_is_refused_before_the_notebook_runs(
    notebook, given, tmp_path, one_line
):
    with pytest.raises(BadInput) as error:
        batch.run(notebook, given | {"editor": "pushd"}, out=tmp_path / "runs")
    assert "did you mean 'pushed'" in one_line(error)


@pytest.mark.slow
def test_a_sweep_and_a_report_take_what_a_cell_registers(notebook, given, tmp_path, capsys):
    grid = {"notebook": str(notebook), "parameters": given, "grid": {"seed": [0, 1]}}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    out = tmp_path / "runs"
    assert main(["sweep", str(path), "--out", str(out), "--workers", "1"]) == 0
    assert len(runs.listed(out)) == 2
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "pushed" in (tmp_path / "report" / "index.html").read_text()


def test_an_installed_package_takes_no_name_of_the_workbenchs_own():
    own = editing.EDITORS["rome"].edit
    own_rome = {"rome": "workbench.editing.rome"}
    editors = Registry("editor", own_rome, editing.Editor.of)
    foreign = EntryPoint("rome", "workbench.editing.ft", "workbench.editors")
    editors.__dict__["_offered"] = {"rome": foreign}
    assert editors["rome"].edit is own
