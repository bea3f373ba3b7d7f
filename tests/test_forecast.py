"""A dry run tells what a run would take, and runs nothing."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import transformers

from workbench import batch, forecast, models, runs
from workbench.__main__ import main
from workbench.spec import Spec
from workbench.tuning import numbers

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
RETENTION = NOTEBOOKS / "02_retention.ipynb"


@pytest.fixture
def nothing_loaded(monkeypatch):
    for owner, name in (
        (models, "load"),
        (batch, "_execute"),
        (transformers.AutoModelForCausalLM, "from_pretrained"),
    ):
        monkeypatch.setattr(
            owner, name, lambda *_, **__: pytest.fail("a dry run loads and runs nothing")
        )


@pytest.fixture
def xl(tmp_path):
    """A folder with the configuration of GPT-2 XL, under its name."""
    folder = tmp_path / "gpt2-xl"
    transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25).save_pretrained(folder)
    return folder


def test_every_setting_is_told_as_it_would_be_resolved(nothing_loaded, tmp_path):
    told = forecast.forecast(RETENTION, {"task": "text", "seed": 3, "max_steps": 0}, out=tmp_path)
    spec = Spec(
        **batch.checked(RETENTION, {"task": "text", "seed": 3, "max_steps": 0})[1].model_dump()
    ).resolved()
    assert spec.max_steps > 0
    for name in set(Spec.model_fields) - {"editor"}:
        assert f"\n  {name} = {getattr(spec, name)!r}\n" in told
    assert "\n  editor = 'ft' | 'memit' | 'alphaedit'\n" in told
    for editor in ("ft", "memit", "alphaedit"):
        assert told.count(f"hyper-parameters of {editor} on world-gpt2\n") == 1
    assert "fetched from the Hub\n  nothing" in told


def test_it_names_the_folder_that_the_run_will_have(nothing_loaded, tmp_path):
    given, spec = batch.checked(RETENTION, {"seed": 3})
    folder = tmp_path / batch.identify(RETENTION, given, spec)
    assert f"run       {folder}\n" in forecast.forecast(RETENTION, {"seed": 3}, out=tmp_path)
    folder.mkdir()
    runs.write(folder, {"spec": spec.model_dump(mode="json")}, {})
    assert f"{folder} (finished" in forecast.forecast(RETENTION, {"seed": 3}, out=tmp_path)


def test_a_rome_that_reads_no_corpus_is_told_none(nothing_loaded):
    for moments, reads in (("corpus", True), ("identity", False)):
        spec = Spec(
            model="world-gpt2", editor="rome", corpus="wikipedia", hparams={"moments": moments}
        )
        needed = forecast._needed(spec, models.outline("world-gpt2"), "cpu")
        assert (needed["second moments and their factors"] > 0) == reads
        assert any("wikimedia/wikipedia" in line for line in forecast._fetched(spec)) == reads


def gigabytes(told: str) -> dict[str, float]:
    return {
        what: float(size) for size, what in re.findall(r"^ +([\d.]+) GB  (.*)$", told, re.MULTILINE)
    }


def test_the_memory_at_the_shape_of_gpt2_xl(nothing_loaded, xl, tmp_path):
    """1,557.6 million weights of 4 bytes; five (6,400)^2 moments in float32 and float64; gradients,
    two moments and a copy of each weight.
    """
    given = {
        "model": str(xl),
        "vary": "editor",
        "values": ["memit"],
        "layers": [13, 14, 15, 16, 17],
        "device": "cpu",
    }
    found = gigabytes(forecast.forecast(RETENTION, given, out=tmp_path))
    assert found["weights"] == pytest.approx(6.23, abs=0.01)
    assert found["second moments and their factors"] == pytest.approx(
        5 * 6400**2 * 12 / 1e9, abs=0.01
    )
    assert found["tuning: gradients, AdamW, a copy"] == pytest.approx(4 * 6.23, abs=0.04)
    assert found["in all, beside activations"] == pytest.approx(sum(found.values()) / 2, abs=0.02)
    small = gigabytes(
        forecast.forecast(
            RETENTION, given | {"dtype": "bfloat16", "plan": "edited-matrices"}, out=tmp_path
        )
    )
    assert small["weights"] == pytest.approx(3.12, abs=0.01)
    assert small["tuning: gradients, AdamW, a copy"] == pytest.approx(
        4 * 5 * 6400 * 1600 * 2 / 1e9, abs=0.01
    )


def test_it_says_when_it_will_not_fit(nothing_loaded, xl, tmp_path, monkeypatch):
    given = {"model": str(xl), "device": "cpu", "layers": [13]}
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**10})()
    )
    assert "more than is free" in forecast.forecast(RETENTION, given, out=tmp_path)
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**11})()
    )
    assert "more than is free" not in forecast.forecast(RETENTION, given, out=tmp_path)


@pytest.mark.parametrize("preset", ["gpt2-xl", "llama-3-8b"])
def test_a_studys_preset_resolves_without_the_hub(nothing_loaded, preset, capsys):
    assert main(["run", str(RETENTION), "--preset", preset, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in (
        "batch_size = 256",
        "threshold = 3.1",
        "n_edited = 50",
        "hyper-parameters of memit",
        "layers = (3, 4, 5, 6, 7, 8)",
    ):
        assert part in told
    for part in (
        "azhx/counterfact (facts)",
        "allenai/c4 (task_data, streamed",
        "wikimedia/wikipedia:20231101.en (corpus, streamed",
    ):
        assert part in told
    assert "memory    not known: " in told
    assert "the Hub is out of reach" in told


def test_what_would_be_fetched_is_listed_with_its_size(nothing_loaded, xl, monkeypatch, capsys):
    file = huggingface_hub.DryRunFileInfo(
        commit_hash="0",
        file_size=6_430_000_000,
        filename="model.safetensors",
        local_path="",
        is_cached=False,
        will_download=True,
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: [file])
    monkeypatch.setattr(
        models, "outline", lambda name, revision, real=models.outline: real(str(xl))
    )
    assert main(["run", str(RETENTION), "--preset", "gpt2-xl", "--dry-run"]) == 0
    assert "6,430.0 MB  gpt2-xl/model.safetensors" in capsys.readouterr().out


def test_bad_parameters_are_one_line(nothing_loaded, capsys, one_line):
    assert main(["run", str(RETENTION), "--dry-run", "-p", "no_such_thing", "1"]) == 2
    assert "'no_such_thing'" in one_line(capsys.readouterr().err)
    assert main(["run", str(RETENTION), "--dry-run", "-p", "layers", "[77]"]) == 2
    assert "layer 77" in one_line(capsys.readouterr().err)


def test_what_hangs_on_the_value_that_varies_is_told_too(nothing_loaded, tmp_path):
    """An adapter has its own rank and learning rate, here as in the run."""
    told = forecast.forecast(NOTEBOOKS / "07_adapters.ipynb", out=tmp_path)
    usual = numbers.usual("facts", "", "world-gpt2")
    assert f"learning_rate = {usual.learning_rate} | {usual.adapter_learning_rate}\n" in told
    assert "adapter_rank = 0 | 32\n" in told
    full = gigabytes(told)
    lora = gigabytes(
        forecast.forecast(NOTEBOOKS / "07_adapters.ipynb", {"values": ["lora"]}, out=tmp_path)
    )
    assert (
        0
        < lora["copies of the weights that carry an adapter"]
        < full["tuning: gradients, AdamW, a copy"]
    )


@pytest.mark.parametrize(
    ("values", "told"), [(5, "values 5"), ([], "values []"), (["no such"], "no such")]
)
def test_bad_values_are_one_line(nothing_loaded, capsys, one_line, values, told):
    assert main(["run", str(RETENTION), "--dry-run", "-p", "values", str(values)]) == 2
    assert told in one_line(capsys.readouterr().err)


def test_an_editor_without_a_preset_for_a_model_out_of_reach_is_said(nothing_loaded, tmp_path):
    told = forecast.forecast(RETENTION, {"model": "nobody/nothing"}, out=tmp_path)
    assert (
        "hyper-parameters of memit on nobody/nothing: not known before its configuration is here"
        in told
    )
    assert "memory    not known" in told


def test_a_notebook_that_only_reads_runs_says_so(nothing_loaded, tmp_path):
    told = forecast.forecast(NOTEBOOKS / "10_collect.ipynb", out=tmp_path)
    assert "reads what runs there are" in told
    assert "hyper-parameters" not in told


@pytest.mark.parametrize(("start", "front"), [("", "'<|endoftext|>'"), ("none", "''")])
def test_what_stands_in_front_of_every_text_is_told(nothing_loaded, start, front):
    assert forecast._front("world-gpt2", "", start) == front


def test_where_the_tokenizer_is_not_here_that_is_told(nothing_loaded, xl):
    assert "not known before its tokenizer is here" in forecast._front(str(xl), "", "")
