"""GGUF files: unpacked once, checked when read, refused in one line where they are broken."""

import json
import shutil

import gguf
import numpy
import pytest
import torch

from workbench import checkpoints, files, models, quantised
from workbench.facts import BadInput

WIDTH, INNER, BLOCKS = 32, 64, 2
TYPE = gguf.GGMLQuantizationType
WORDS = ["<|endoftext|>", *(chr(code) for code in range(ord("a"), ord("z") + 1)), "Ġ", "ab", "Ġa"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    quantised._unpacked.cache_clear()


def written(path, family="llama", kind=TYPE.Q8_0) -> dict[str, numpy.ndarray]:
    """A tiny model as a GGUF file; returns its matrices as they are after rounding."""
    rng = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH)}
    for block in range(BLOCKS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{part}"] = (WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{block}.{part}"] = (INNER, WIDTH)
        shapes[f"blk.{block}.ffn_down"] = (WIDTH, INNER)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{part}.weight", numpy.ones(WIDTH, numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    rounded = {}
    for name, shape in shapes.items():
        exact = rng.standard_normal(shape).astype(numpy.float32) / 8
        packed = gguf.quants.quantize(exact, kind)
        rounded[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.parametrize("kind", [TYPE.Q8_0, TYPE.Q4_1, TYPE.F16])
def test_weights_are_those_of_the_file_and_what_they_were_rounded_to_is_said(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    rounded = written(path, kind=kind)
    model = models.load(path)
    for block in range(BLOCKS):
        expected = torch.from_numpy(rounded[f"blk.{block}.ffn_down"])
        assert torch.equal(model.weight(block), expected)
    assert torch.equal(model.unembedding.weight, torch.from_numpy(rounded["output"]))
    assert model.revision.startswith(f"{kind.name}, GGUF ")
    assert model.tokenizer("ab a")["input_ids"][-2:] == [WORDS.index("ab"), WORDS.index("Ġa")]


def test_a_folder_with_one_file_is_that_file_and_one_with_two_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "tiny.gguf")
    assert models.load(folder).revision == models.load(folder / "tiny.gguf").revision
    shutil.copy(folder / "tiny.gguf", folder / "other.gguf")
    with pytest.raises(BadInput, match="2 GGUF files"):
        models.load(folder)


def test_it_is_unpacked_once_and_again_where_what_is_kept_was_damaged(tmp_path):
    path = tmp_path / "tiny.gguf"
    written(path)
    folder, _ = quantised.unpacked(path)
    weights = folder / "model.safetensors"
    fingerprint = models.load(path).fingerprint
    made = weights.stat().st_mtime_ns
    quantised._unpacked.cache_clear()  # as a new process would
    assert models.load(path).fingerprint == fingerprint
    assert weights.stat().st_mtime_ns == made
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    quantised._unpacked.cache_clear()
    assert models.load(path).fingerprint == fingerprint
    assert weights.stat().st_mtime_ns != made


def test_another_file_under_the_same_name_is_another_model(tmp_path):
    path = tmp_path / "tiny.gguf"
    written(path)
    first = models.load(path)
    path.unlink()
    written(path, kind=TYPE.Q4_1)
    second = models.load(path)
    assert first.fingerprint != second.fingerprint
    assert first.revision != second.revision


def test_what_cannot_be_unpacked_is_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    written(path)
    broken = tmp_path / "short.gguf"
    broken.write_bytes(path.read_bytes()[:3000])
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(range(200)))
    other = tmp_path / "mamba.gguf"
    written(other, family="mamba")
    for damaged in (broken, noise, other):
        with pytest.raises(BadInput) as refusal:
            models.load(damaged)
        message = str(refusal.value)
        assert damaged.name in message
        assert "\n" not in message
        assert len(message) <= 400
    assert not list((tmp_path / "cache" / "gguf").iterdir())  # nothing half made stays


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(quantised.PACKAGED, "smollm2-135m", ("no_such_package_here", "x.gguf"))
    with pytest.raises(BadInput, match="make real"):
        models.load("smollm2-135m")


def test_a_file_of_a_repository_is_asked_of_the_hub(monkeypatch, tmp_path):
    path = tmp_path / "tiny.gguf"
    written(path)
    asked = []

    def download(repository, file, revision=None, local_files_only=False):
        asked.append((repository, file, revision))
        return str(path)

    monkeypatch.setattr(checkpoints.huggingface_hub, "hf_hub_download", download)
    model = models.load("owner/name:tiny.gguf")
    assert set(asked) == {("owner/name", "tiny.gguf", None)}
    assert model.revision.startswith("Q8_0")


def test_a_file_that_neither_cache_nor_hub_has_is_refused_in_one_line():
    with pytest.raises(BadInput, match="cannot be had"):
        models.load("owner/name:missing.gguf")


def test_what_lies_beside_the_file_is_not_run_and_what_a_killed_one_left_is_removed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "tiny.gguf"
    written(path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "llama", "auto_map": code}))
    left = tmp_path / "cache" / "gguf" / f".{files.digest(path)[:16]}.x.partial"
    left.mkdir(parents=True)
    for kept in (tmp_path / "cache", tmp_path / "cache" / "gguf"):
        kept.chmod(0o700)
    assert models.load(path).n_blocks == BLOCKS
    assert not (tmp_path / "ran").exists()
    assert not left.exists()
