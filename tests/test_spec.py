import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import workbench.spec
from workbench import facts, study
from workbench.facts import BadInput
from workbench.spec import identify
from workbench.study import Spec
from workbench.tracking import lens


@pytest.mark.parametrize(
    "fields",
    [
        {"n_edited": 0},
        {"seed": -1},
        {"edittor": "ft"},
        {"split_rule": "none"},
        {"learning_rate": float("nan")},
    ],
)
def test_a_bad_spec_is_one_clear_line(fields, one_line):
    with pytest.raises(BadInput) as error:
        Spec(**fields)
    assert next(iter(fields)) in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"layers": [99]}, "blocks 0 to 11"), ({"hparams": {"stepps": 3}}, "stepps")],
)
def test_bad_hyper_parameters_are_one_clear_line(base, fields, named, one_line):
    with pytest.raises(BadInput) as error:
        study.prepare(Spec(**fields), base, None)
    assert named in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"editor": "memo"}, "memo"),
        ({"task": "cooking"}, "cooking"),
        ({"task_data": "imdb"}, "sentiment"),
    ],
)
def test_a_name_that_does_not_exist_is_one_clear_line(fields, named, one_line):
    with pytest.raises(BadInput) as error:
        Spec(**fields).resolved()
    assert named in one_line(error)


def test_resolving_fills_the_tasks_numbers_and_keeps_what_is_given():
    spec = Spec(max_steps=7).resolved()
    assert spec.max_steps == 7
    assert spec.eval_every > 0
    assert spec.learning_rate > 0
    assert facts.read("world")


def test_layers_that_are_given_twice_are_refused(base, one_line):
    spec = Spec(editor="memit", layers=[2], hparams={"layers": [3], "steps": 7})
    with pytest.raises(BadInput) as error:
        spec.editor_hparams(base)
    assert "layers are given twice" in one_line(error)
    hparams = spec.model_copy(update={"layers": ()}).editor_hparams(base)
    assert (list(hparams.layers), hparams.steps) == ([3], 7)


@pytest.mark.parametrize(
    ("given", "unit"), [({"ridge": 10.0}, "ridge_unit"), ({"threshold": 2e-2}, "null_space")]
)
@pytest.mark.filterwarnings("ignore:no published preset")
def test_a_number_in_another_unit_than_the_proposed_ones_is_refused(tiny, given, unit, one_line):
    """The published ridge of 10 became 10 times the trace, which edits nothing."""
    with pytest.raises(facts.BadInput) as error:
        study.Spec(model="some", editor="alphaedit", hparams=given).editor_hparams(tiny)
    assert f"give {unit} too" in one_line(error)
    whole = given | {unit: "absolute"}
    hparams = study.Spec(model="some", editor="alphaedit", hparams=whole).editor_hparams(tiny)
    assert getattr(hparams, unit) == "absolute"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("editing/presets.yaml", "steps: 50"),
        ("layouts.yaml", "target: alt"),
        ("evaluation/hops.yaml", "the author of"),
    ],
)
def test_a_changed_table_is_another_experiment(tmp_path, monkeypatch, table, words):
    package = tmp_path / "workbench"
    shutil.copytree(
        Path(study.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(workbench.spec, "__file__", str(package / "spec.py"))
    before = workbench.spec.code_fingerprint.__wrapped__()
    path = package / table
    path.write_text(path.read_text().replace(words, "other: 1"))
    assert workbench.spec.code_fingerprint.__wrapped__() != before


def test_a_room_that_determines_no_result_makes_no_other_experiment(tmp_path, monkeypatch):
    """A typo in the panel made a sweep run again."""
    package = tmp_path / "workbench"
    shutil.copytree(
        Path(study.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(workbench.spec, "__file__", str(package / "spec.py"))
    before = workbench.spec.code_fingerprint.__wrapped__()
    for room in workbench.spec.NO_RESULT:
        (package / f"{room}.py").write_text("nothing")
    assert workbench.spec.code_fingerprint.__wrapped__() == before
    (package / "study.py").write_text("nothing")
    assert workbench.spec.code_fingerprint.__wrapped__() != before


def test_whatever_a_study_imports_is_in_its_id():
    """Of the rooms left out, none is imported where a study runs."""
    code = "import sys; from workbench import editing, study; "
    code += "[editing.EDITORS[name] for name in editing.EDITORS]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {
        name.removeprefix("workbench.").replace(".", "/")
        for name in done.stdout.split()
        if name.startswith("workbench.")
    }
    assert "study" in imported
    assert imported & set(workbench.spec.NO_RESULT) <= {"inert"}  # which writes messages


def test_an_experiment_that_names_a_fact_is_of_one():
    for named in ({"fact": "capital:spain"}, {"subject": "Spain", "prompt": "{} is"}):
        spec = Spec(**named).resolved()
        assert (spec.n_edited, spec.edits_per_model) == (1, 1)
    assert Spec().resolved().n_edited == 10


@pytest.mark.parametrize(
    ("number", "kind"),
    [({"protect_weight": 0.3}, {"protect": "replay"}), ({"adapter_rank": 3}, {"adapter": "lora"})],
)
def test_numbers_of_what_there_is_none_make_no_other_experiment(number, kind):
    assert identify(Spec(**number)) == identify(Spec())
    assert identify(Spec(**number, **kind)) != identify(Spec(**kind))


def test_two_values_that_make_one_experiment_are_refused():
    with pytest.raises(BadInput, match="same experiment"):
        workbench.spec.varied(Spec(fact="capital:spain"), "edits_per_model", [1, 5])
    assert len(workbench.spec.varied(Spec(), "edits_per_model", [1, 5])) == 2


def test_a_module_that_a_notebook_imports_is_no_parameter():
    """`from workbench.tracking import lens` stands in many a notebook."""
    assert Spec.of({"lens": lens, "seed": 3}) == Spec(seed=3)
    assert Spec.of({"lens": "tuned"}).lens == "tuned"
