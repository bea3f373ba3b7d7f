"""A name is the package's own, an installed package's, or registered here; a function is enough."""

import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench import editing, facts, registry
from workbench.facts import BadInput
from workbench.registry import Registry


@pytest.fixture
def things():
    return Registry("thing", {"own": "json:dumps"}, lambda name, thing: (name, thing))


@pytest.fixture
def editors(monkeypatch):
    """The editors, without what a test registers once it is over."""
    monkeypatch.setattr(editing.EDITORS, "_ready", dict(editing.EDITORS._ready))
    monkeypatch.setattr(editing.EDITORS, "_declared", set())
    return editing.EDITORS


@pytest.fixture(scope="module")
def requests():
    return [request for request in facts.read("world") if request.fact.split == "study"][:300:60]


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


def test_a_misspelt_number_of_a_function_is_refused(tiny, requests, editors, one_line):
    wb.editors.register("pushed", pushed)
    with pytest.raises(BadInput) as error:
        wb.edit(tiny, requests[:1], "pushed", strenght=1)
    assert "did you mean 'strength'" in one_line(error)


def test_a_measure_becomes_a_table_of_the_run(tiny_folders, monkeypatch, tmp_path):
    monkeypatch.setattr(wb.measures, "_ready", dict(wb.measures._ready))

    @wb.measures.register("length")
    def length(model, requests):
        return pd.DataFrame({"fact_id": [request.fact.id for request in requests], "words": 3})

    spec = wb.Spec(
        model=str(tiny_folders["gpt2"]),
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
        measures=("length", "retention"),
    )
    run = wb.study(spec, out=tmp_path)
    assert list(run.table("length").columns) == ["edited_model", "fact_id", "words", "step"]
    assert run.table("length").step.tolist() == [-1, 0, 1, 2]
    assert run.table("retention").retained.dtype == bool
    with pytest.raises(BadInput, match="lengh"):
        wb.study(spec.model_copy(update={"measures": ("lengh",)}), out=tmp_path)


def test_to_import_the_package_takes_no_torch():
    code = "import sys, workbench as wb; list(wb.editors); print(sorted(sys.modules))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "ipywidgets", "matplotlib"):
        assert f"'{heavy}'" not in names.stdout
