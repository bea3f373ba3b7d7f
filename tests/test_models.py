"""Every row of the table of architectures fits its family; loading says what is wrong."""

import dataclasses
import json
import shutil
import time

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

from workbench import checkpoints, models
from workbench.activations import recorded
from workbench.facts import BadInput

TEXTS = (
    "The cocker spaniel is a kind of dog.",
    "Every hammerhead counts as one sort of shark, they say.",
    "Moby",
)
ROWS = pytest.mark.parametrize("model_type", models.ARCHITECTURES)
SQUARE = pytest.mark.parametrize("inner", [48, 32], ids=["wide", "square"])


def encoded(model) -> dict:
    """Texts of unlike length, padded on the right."""
    return model.tokenizer(
        list(TEXTS),
        padding=True,
        padding_side="right",
        return_tensors="pt",
        return_token_type_ids=False,
    )


def down_projections(model) -> dict:
    return {layer: model.down_projection(layer) for layer in range(model.n_blocks)}


@ROWS
@SQUARE
def test_weight_times_key_plus_bias_is_the_modules_output(new_tiny, model_type, inner):
    model = new_tiny(model_type, intermediate_size=inner, n_inner=inner, ffn_dim=inner)
    with (
        recorded(down_projections(model), inputs=True) as keys,
        recorded(down_projections(model)) as outputs,
    ):
        model.network(**encoded(model))
    for layer, module in down_projections(model).items():
        bias = getattr(module, "bias", None)
        rest = outputs[layer] - (0 if bias is None else bias)
        torch.testing.assert_close(keys[layer] @ model.weight(layer).T, rest, rtol=0, atol=1e-5)
        if inner == 32:  # the other way round fits too, and must be wrong
            assert (keys[layer] @ model.weight(layer) - rest).abs().max() > 0.1


@ROWS
def test_the_weight_is_the_parameter_itself(new_tiny, model_type):
    model = new_tiny(model_type)
    with torch.no_grad():
        model.weight(1)[5, 7] = 42.0
    stored = model.network.state_dict()[f"{model.down_projection_name(1)}.weight"]
    assert (stored.T if model.architecture.transposed else stored)[5, 7] == 42.0


@ROWS
def test_the_mlp_puts_out_what_its_down_projection_does(new_tiny, model_type):
    model = new_tiny(model_type)
    with (
        recorded({layer: model.mlp(layer) for layer in range(3)}) as outputs,
        recorded(down_projections(model)) as projected,
    ):
        model.network(**encoded(model))
    for layer in range(3):
        assert torch.equal(outputs[layer], projected[layer])
    assert not torch.equal(outputs[0], outputs[1])


@ROWS
def test_final_norm_and_head_turn_the_last_block_into_logits(new_tiny, model_type):
    model = new_tiny(model_type)
    with recorded({"last": model.blocks[-1]}) as seen:
        logits = model.network(**encoded(model)).logits
    torch.testing.assert_close(
        model.unembedding(model.final_norm(seen["last"])), logits, rtol=0, atol=1e-5
    )
    assert (model.unembedding(seen["last"]) - logits).abs().max() > 0.1


@ROWS
def test_the_embeddings_are_what_enters_the_first_block(new_tiny, model_type):
    model = new_tiny(model_type)
    tables = {name: model.network.get_submodule(name) for name in model.architecture.embeddings}
    with recorded(tables) as parts, recorded({"first": model.blocks[0]}, inputs=True) as seen:
        model.network(**encoded(model))
    torch.testing.assert_close(
        sum(parts.values()).expand_as(seen["first"]), seen["first"], rtol=0, atol=1e-6
    )


@ROWS
def test_a_row_with_transposed_the_wrong_way_round_is_refused(new_tiny, one_line, model_type):
    model = new_tiny(model_type)
    wrong = dataclasses.replace(model.architecture, transposed=not model.architecture.transposed)
    with pytest.raises(BadInput) as error:
        dataclasses.replace(model, architecture=wrong)
    assert "transposed" in one_line(error)


@ROWS
def test_a_row_works_after_save_and_load(new_tiny, tmp_path, model_type):
    saved = new_tiny(model_type)
    saved.network.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    model = models.load(tmp_path, device="cpu")
    assert model.n_blocks == 3
    models.fuse(saved.network)  # as load does
    assert torch.equal(
        model.network(**encoded(saved)).logits, saved.network(**encoded(saved)).logits
    )


def test_a_fused_gelu_is_the_same_function_and_leaves_the_configuration(new_tiny):
    plain, fused = new_tiny("gpt2"), new_tiny("gpt2")

    def kinds(model):
        return {
            type(module).__name__
            for module in model.network.modules()
            if "GELU" in type(module).__name__
        }

    models.fuse(fused.network)
    assert (kinds(plain), kinds(fused)) == ({"NewGELUActivation"}, {"GELUTanh"})
    assert fused.network.config.activation_function == "gelu_new"
    torch.testing.assert_close(
        fused.network(**encoded(fused)).logits,
        plain.network(**encoded(plain)).logits,
        rtol=0,
        atol=1e-6,
    )


def test_names_lead_to_the_modules(tiny):
    for layer, block in enumerate(tiny.blocks):
        assert tiny.network.get_submodule(tiny.block_name(layer)) is block
        assert tiny.network.get_submodule(tiny.down_projection_name(layer)) is tiny.down_projection(
            layer
        )


def test_logits_at_equals_the_full_logits_at_those_positions(tiny):
    batch = encoded(tiny)
    positions = torch.tensor([4, 2, 0])
    full = tiny.network(**batch).logits
    found = tiny.logits_at(batch["input_ids"], batch["attention_mask"], positions)
    assert found.shape == (3, len(tiny.tokenizer))
    torch.testing.assert_close(found, full[torch.arange(3), positions], rtol=0, atol=1e-5)
    assert (found - full[torch.arange(3), positions + 1]).abs().max() > 0.1


def test_logits_at_takes_one_position_for_all_rows(tiny):
    batch = encoded(tiny)
    found = tiny.logits_at(batch["input_ids"], batch["attention_mask"], torch.tensor([1, 1, 1]))
    torch.testing.assert_close(found, tiny.network(**batch).logits[:, 1], rtol=0, atol=1e-5)


def test_logits_at_are_float32_whatever_the_model_computes_in(tiny_folders):
    model = models.load(tiny_folders["gpt2"], device="cpu", dtype="bfloat16")
    batch = encoded(model)
    found = model.logits_at(batch["input_ids"], batch["attention_mask"], torch.tensor([4, 2, 0]))
    assert (model.dtype, found.dtype) == (torch.bfloat16, torch.float32)


def test_check_layers_sorts_and_drops_doubles(tiny):
    assert tiny.check_layers([2, 0, 2]) == [0, 2]


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_no_block_is_named(tiny, one_line, layer):
    with pytest.raises(BadInput) as error:
        tiny.check_layers([0, layer])
    message = one_line(error)
    assert f"layer {layer}:" in message
    assert "0 to 2" in message


# loading


def test_a_local_folder_loads_offline_ready_to_be_read(tiny_folders):
    assert huggingface_hub.is_offline_mode()
    for folder in tiny_folders.values():
        model = models.load(str(folder), device="cpu")
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        assert all(
            torch.equal(model.network.state_dict()[name], tensor) for name, tensor in saved.items()
        )
        assert not model.network.training
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert (
            model.tokenizer.decode(model.tokenizer("Moby Dick")["input_ids"]).strip() == "Moby Dick"
        )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_on_the_cpu_auto_is_float32_also_of_a_bfloat16_checkpoint(
    tiny_folders, tmp_path, dtype, expected
):
    models.load(tiny_folders["gpt2"], device="cpu", dtype="bfloat16").network.save_pretrained(
        tmp_path
    )
    shutil.copytree(
        tiny_folders["gpt2"],
        tmp_path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("model*", "config*"),
    )
    assert models.load(tmp_path, device="cpu", dtype=dtype).dtype == expected


@pytest.mark.parametrize("model_type", ["bert", "bloom"])
def test_an_unknown_architecture_says_how_to_add_a_row(tmp_path, one_line, model_type):
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(BadInput) as error:
        models.load(tmp_path, device="cpu")
    message = one_line(error)
    assert repr(model_type) in message
    assert "add a row to ARCHITECTURES in workbench/models.py" in message


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_stands_the_check_that_loading_makes(new_tiny, model_type, dtype):
    model = new_tiny(model_type)
    model.network.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    models.check_row(model)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items()
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.network.modules()
    )


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("gemma2", {}, "a norm or a factor"),
        ("gemma3_text", {}, "a norm or a factor"),
        ("olmo2", {}, "a norm or a factor"),
        ("granite", {"residual_multiplier": 0.22}, "78% off"),
        ("granite", {"logits_scaling": 8.0}, "a factor or a cap"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_does_not_fit_is_refused_when_the_model_is_loaded(
    new_tiny, tmp_path, monkeypatch, one_line, model_type, config, why, dtype
):
    """As for whoever adds a row in good faith."""
    monkeypatch.setitem(models.ARCHITECTURES, model_type, models.ARCHITECTURES["llama"])
    saved = new_tiny(model_type, **config)
    saved.network.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput) as error:
        models.load(tmp_path, device="cpu", dtype=dtype)
    assert why in one_line(error)
    assert repr(model_type) in str(error.value)


def test_a_family_without_a_row_is_told_what_may_have_one(tmp_path, one_line):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(BadInput) as error:
        models.outline(str(tmp_path))
    assert "'gemma2' is not in the table" in one_line(error)
    assert "if no norm stands behind its MLPs" in str(error.value)


def test_a_device_and_a_device_map_exclude_each_other(tiny_folders, one_line):
    with pytest.raises(BadInput) as error:
        models.load(tiny_folders["gpt2"], device="cpu", device_map="balanced")
    assert "'cpu' and device_map exclude each other" in one_line(error)


def quick_refusal(one_line, *args, **kwargs) -> str:
    start = time.perf_counter()
    with pytest.raises(BadInput) as error:
        models.load(*args, **kwargs)
    assert time.perf_counter() - start < 30  # no waiting for a Hub that does not answer
    return one_line(error)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("/nowhere/model", "'/nowhere/model': no config.json there"),
        ("./nowhere", "'./nowhere': no config.json there"),
        ("~nobody-of-this-name/model", "~nobody-of-this-name/model"),
        ("one/two/three", "'one/two/three': no such folder"),
        ("", "model ''"),
        ("nobody/no-such-model", "`hf download nobody/no-such-model`"),
        ("two\nlines", "two\\nlines"),
        ("x" * 300, "x" * 100),
    ],
    ids=[
        "folder",
        "relative folder",
        "home of nobody",
        "too many slashes",
        "empty",
        "Hub id",
        "two lines",
        "long",
    ],
)
def test_a_model_that_is_not_there_is_one_line(one_line, name, named):
    assert named in quick_refusal(one_line, name, device="cpu")


def test_a_folder_without_config_is_one_line(tmp_path, one_line):
    assert f"{str(tmp_path)!r}: no config.json there" in quick_refusal(one_line, tmp_path)


@pytest.mark.parametrize("name", checkpoints.WORLD_MODELS)
def test_a_world_model_has_no_other_revisions(one_line, name):
    message = quick_refusal(one_line, name, revision="late")
    assert "'late' does not exist" in message
    assert "early" in message


@pytest.mark.parametrize("revision", ["", "early"])
def test_a_world_model_that_is_not_there_is_made_not_downloaded(
    tmp_path, monkeypatch, one_line, revision
):
    monkeypatch.setattr(checkpoints, "DATA", tmp_path)
    message = quick_refusal(one_line, "world-gpt2", revision=revision, device="cpu")
    assert "'world-gpt2'" in message
    assert "hf download" not in message


def test_a_revision_of_a_local_folder_is_refused(tiny_folders, one_line):
    assert "revision 'early'" in quick_refusal(
        one_line, tiny_folders["gpt2"], revision="early", device="cpu"
    )


@pytest.mark.parametrize("dtype", ["int4", "float64", "Float32", ""])
def test_a_bad_dtype_is_one_line(tiny_folders, one_line, dtype):
    message = quick_refusal(one_line, tiny_folders["gpt2"], dtype=dtype)
    assert f"dtype {dtype!r}" in message
    assert "float32" in message


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cuda:-1", "cuda:77", ""])
def test_a_bad_device_is_one_line(tiny_folders, one_line, device):
    message = quick_refusal(one_line, tiny_folders["gpt2"], device=device)
    assert f"device {device!r}" in message
    assert "cpu" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none_is_one_line(tiny_folders, one_line):
    assert "device 'cuda'" in quick_refusal(one_line, tiny_folders["gpt2"], device="cuda")


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def widen(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_inner": 64}))


def lengthen(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_layer": 4}))


def misspell(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_layer": "three"}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text("{}")),
        ("config.json", widen),
        ("config.json", lengthen),
        ("config.json", misspell),
        ("model.safetensors", truncate),
        ("model.safetensors", lambda path: path.unlink()),
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("tokenizer.json", lambda path: path.unlink()),
    ],
    ids=[
        "config is not JSON",
        "config says nothing",
        "config is wider than the weights",
        "config has a block without weights",
        "config holds a word for a number",
        "weights cut short",
        "no weights",
        "tokenizer broken",
        "no tokenizer",
    ],
)
def test_a_broken_folder_is_one_line_and_not_a_matter_of_the_hub(
    tiny_folders, tmp_path, one_line, file, damage
):
    folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "broken")
    models.load(folder, device="cpu")
    damage(folder / file)
    message = quick_refusal(one_line, folder, device="cpu")
    assert str(folder) in message
    assert "not on this machine" not in message


def test_a_folder_without_any_tokenizer_is_refused(tiny_folders, tmp_path, one_line):
    folder = shutil.copytree(
        tiny_folders["gpt2"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*")
    )
    assert "tokenizer" in quick_refusal(one_line, folder, device="cpu")


# fingerprints


def test_the_fingerprint_is_that_of_the_weights(tiny_folders):
    loaded = [
        models.load(folder, device="cpu").fingerprint
        for folder in (*tiny_folders.values(), *tiny_folders.values())
    ]
    assert loaded[:2] == loaded[2:]
    assert loaded[0] != loaded[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bit_changes_the_fingerprint(tiny_folders, dtype):
    whole, changed = (
        models.load(tiny_folders["llama"], device="cpu", dtype=dtype) for _ in range(2)
    )
    integers = changed.weight(2).view(torch.int32 if dtype == "float32" else torch.int16)
    integers[3, 4] ^= 1
    assert changed.fingerprint != whole.fingerprint


def test_equal_weights_of_another_configuration_are_another_model(new_tiny, tmp_path):
    saved = new_tiny("llama")
    saved.network.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    before = models.load(tmp_path, device="cpu").fingerprint
    assert saved.fingerprint == before
    config = json.loads((tmp_path / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.load(tmp_path, device="cpu").fingerprint != before


def test_the_fingerprint_stays_that_of_the_weights_first_asked_for(tiny):
    before = tiny.fingerprint
    with torch.no_grad():
        tiny.weight(0).add_(1)
    assert tiny.fingerprint == before


def test_world_models_load_in_float32_with_their_tokenizer(world):
    assert (world.n_blocks, world.dtype) == (12, torch.float32)
    assert world.tokenizer.bos_token_id is not None


@pytest.fixture
def four_cores(monkeypatch):
    """four_cores(load, busy) -> what torch is told to use on a machine of four cores under this
    load, of which this share of a hundred is busy now.
    """

    def choose(load: float, busy: float = 100.0) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(models.psutil, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(models.psutil, "cpu_percent", lambda interval: busy)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        models.share_cores.cache_clear()
        models.device_named("cpu")
        models.device_named("cpu")
        return chosen

    yield choose
    models.share_cores.cache_clear()


def test_what_ended_just_now_keeps_no_core_busy(monkeypatch, four_cores):
    """After an installation a study ran on one thread of two idle cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert four_cores(3.4, busy=2.0) == [4]
    assert four_cores(3.4, busy=50.0) == [2]


@pytest.mark.parametrize(("load", "threads"), [(0.2, 4), (1.4, 3), (1.6, 2), (3.4, 1), (9.0, 1)])
def test_threads_are_the_cores_that_the_load_leaves_chosen_once(
    monkeypatch, four_cores, load, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert four_cores(load) == [threads]


def test_a_number_of_threads_that_a_person_set_stays(monkeypatch, four_cores):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert four_cores(9.0) == []
