"""What `import workbench as wb` gives."""

import importlib
import subprocess
import sys

import pytest
import torch

import workbench as wb


def test_every_name_is_there_when_it_is_asked_for():
    for name, place in wb._ELSEWHERE.items():
        module, _, attribute = place.partition(":")
        room = importlib.import_module(f"workbench.{module}")
        assert getattr(wb, name) is getattr(room, attribute)
    assert wb.plots is importlib.import_module("workbench.plots")
    with pytest.raises(AttributeError, match="has no attribute 'retentoin'"):
        wb.retentoin  # noqa: B018


def test_a_model_is_loaded_by_its_name_or_of_a_spec(tiny_folders):
    folder = str(tiny_folders["gpt2"])
    named = wb.load(folder, device="cpu", dtype="bfloat16")
    of_spec = wb.load(wb.Spec(model=folder, device="cpu", dtype="bfloat16"))
    assert named.fingerprint == of_spec.fingerprint
    assert named.dtype == of_spec.dtype == torch.bfloat16


def test_numbers_of_an_edit_take_the_place_of_the_presets(tiny_gpt2, requests):
    before = {name: tensor.clone() for name, tensor in tiny_gpt2.network.state_dict().items()}
    edit = wb.edit(tiny_gpt2, requests[:2], "ft", layers=[2], steps=3, seed=7)
    assert edit.layers == (2,)
    assert (edit.record["hparams"]["steps"], edit.record["seed"]) == (3, 7)
    assert len(edit.outcomes) == 2
    for name, tensor in tiny_gpt2.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    with wb.applied(tiny_gpt2, edit):
        p = wb.retention(tiny_gpt2, requests[:2]).p.tolist()
    assert p == pytest.approx([outcome["p_after"] for outcome in edit.outcomes], rel=1e-4)


def test_to_import_the_package_takes_no_torch():
    code = "import sys, workbench as wb; list(wb.editors); print(sorted(sys.modules))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "ipywidgets", "matplotlib"):
        assert f"'{heavy}'" not in names.stdout
