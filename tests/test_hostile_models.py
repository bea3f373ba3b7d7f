"""A model folder from anywhere: none of its code is run, nobody is asked whether it should be, and
no size it claims is built.
"""

import builtins
import json
import shutil
import time

import pytest

from workbench import models
from workbench.__main__ import main
from workbench.facts import BadInput

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = {model_type!r}
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "own.C",
    "AutoModelForCausalLM": "own.M",
    "AutoTokenizer": ["own.T", "own.T"],
}


@pytest.fixture
def hostile(tiny_folders, tmp_path, monkeypatch):
    """hostile(family, {file: fields}) -> a folder whose Python leaves a mark; `marked()` tells
    whether it did. stdin answers yes.
    """
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *_: asked.append("asked") or "y")
    folder, marker = tmp_path / "model", tmp_path / "was-run"

    def make(family: str, changes: dict, own_type: str = "llama"):
        shutil.copytree(tiny_folders[family], folder)
        for name, fields in changes.items():
            path = folder / name
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | fields))
        (folder / "own.py").write_text(CODE.format(marker=str(marker), model_type=own_type))
        return folder

    make.marked = lambda: marker.exists() or bool(asked)
    return make


@pytest.mark.parametrize("how", ["load", "outline", "run", "edit"])
def test_code_of_an_unknown_family_is_neither_run_nor_asked_about(
    hostile, one_line, capsys, tmp_path, how
):
    """It was, after a "y" on the terminal."""
    folder = hostile("llama", {"config.json": {"model_type": "mine", "auto_map": CLASSES}}, "mine")
    if how in ("load", "outline"):
        with pytest.raises(BadInput) as error:
            models.load(folder) if how == "load" else models.outline(str(folder))
        message = one_line(error)
    else:
        edit = ["edit", "--editor", "ft", "--facts", "world", "--out", str(tmp_path / "out")]
        run = ["run", "notebooks/01_case_study.ipynb", "-p", "model", str(folder), "--dry-run"]
        status = main([*edit, "--model", str(folder)] if how == "edit" else run)
        message = "".join(capsys.readouterr())
        assert status == (2 if how == "edit" else 0)
    assert "'mine' is not in the table" in message
    assert "code of its own" in message
    assert "trust_remote_code" not in message
    assert not hostile.marked()


@pytest.mark.parametrize(
    "classes",
    [{name: CLASSES[name]} for name in CLASSES] + [CLASSES],
    ids=lambda classes: "+".join(classes),
)
def test_code_beside_a_known_family_is_not_run(hostile, classes):
    folder = hostile(
        "llama",
        {"config.json": {"auto_map": classes}, "tokenizer_config.json": {"auto_map": classes}},
    )
    try:
        model = models.load(folder, device="cpu")
        assert type(model.network).__module__.startswith("transformers.models.llama")
        assert type(model.tokenizer).__module__.startswith("transformers.")
    except BadInput as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert not hostile.marked()


def test_a_tokenizer_with_a_class_of_its_own_is_not_run(hostile):
    fields = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    folder = hostile("gpt2", {"tokenizer_config.json": fields})
    try:
        assert models.load(folder, device="cpu").tokenizer("Moby Dick")["input_ids"]
    except BadInput as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert not hostile.marked()


@pytest.mark.parametrize(
    "field", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_kernels_from_the_hub_are_refused(hostile, one_line, field):
    folder = hostile("llama", {"config.json": {field: "somebody/kernel"}})
    with pytest.raises(BadInput) as error:
        models.load(folder)
    assert field in one_line(error)


ABSURD = {
    "blocks": {"num_hidden_layers": 10**9},
    "some blocks too many": {"num_hidden_layers": 5000},
    "width": {"hidden_size": 2**62},
    "a wide width": {"hidden_size": 10**8},
    "vocabulary": {"vocab_size": 10**15},
    "inner": {"intermediate_size": 10**15},
    "positions": {"max_position_embeddings": 10**15},
    "an integer of 5,000 digits": {"vocab_size": "DIGITS"},
    "no blocks": {"num_hidden_layers": 0},
    "negative": {"hidden_size": -32},
    "text": {"hidden_size": "32"},
    "true": {"num_hidden_layers": True},
    "a fraction": {"hidden_size": 32.5},
    "a list": {"vocab_size": [1000]},
    "infinity": {"hidden_size": float("inf")},
    "no family": {"model_type": None},
    "a family that is a list": {"model_type": ["llama"]},
    "heads that do not divide": {"num_attention_heads": 7},
}


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(hostile, one_line, fields):
    folder = hostile("llama", {"config.json": fields})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"DIGITS"', "9" * 5000))
    start = time.monotonic()
    for read in (models.load, lambda folder: models.outline(str(folder))):
        with pytest.raises(BadInput) as error:
            read(folder)
        assert str(folder) in one_line(error)
        assert len(one_line(error)) <= 500
    assert time.monotonic() - start < 20
