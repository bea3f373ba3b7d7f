"""A model that is not whole, not allowed, too large or not there is refused in one line that says
what to do; a whole one in the cache is loaded.
"""

import errno
import json
import shutil
import subprocess
import sys

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from workbench import checkpoints, models
from workbench.facts import DATA, BadInput
from workbench.spec import Spec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "somebody/a-model"


def refusal(one_line, name, **fields) -> str:
    with pytest.raises(BadInput) as error:
        models.load(name, **({"device": "cpu"} | fields))
    return one_line(error)


@pytest.fixture
def sharded(tiny_folders, tmp_path):
    """A tiny GPT-2 in several files."""
    folder = tmp_path / "sharded"
    model = models.load(tiny_folders["gpt2"], device="cpu")
    model.network.save_pretrained(folder, max_shard_size="60KB")
    model.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    """The Hub's cache with that model in it, no way to the Hub; returns the snapshot's folder."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--somebody--a-model" / "snapshots" / COMMIT
    shutil.copytree(sharded, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_sharded_checkpoint_loads(sharded, tiny_folders):
    assert (
        models.load(sharded, device="cpu").fingerprint
        == models.load(tiny_folders["gpt2"], device="cpu").fingerprint
    )


def test_a_lost_shard_is_named(sharded, one_line):
    (lost := sorted(sharded.glob("model-*"))[1]).unlink()
    message = refusal(one_line, sharded)
    assert f"missing {lost.name} (1 in all)" in message
    assert str(sharded) in message


def test_several_lost_shards_are_counted(sharded, one_line):
    lost = sorted(sharded.glob("model-*"))[1:]
    for path in lost:
        path.unlink()
    message = refusal(one_line, sharded)
    assert f"({len(lost)} in all)" in message
    assert lost[0].name in message


def test_a_broken_index_is_one_line(sharded, one_line):
    (sharded / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is broken" in refusal(one_line, sharded)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": ["b"]}}', '{"weight_map": 3}', "{}"])
def test_an_index_of_another_form_is_one_line(sharded, one_line, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is broken" in refusal(one_line, sharded)


def test_an_index_left_over_beside_whole_weights_is_not_read(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "whole")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00009.safetensors"}}'
    )
    assert models.load(folder, device="cpu").n_blocks == 3


def test_a_shard_cut_short_is_one_line(sharded, one_line):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:500])
    assert "cannot be loaded" in refusal(one_line, sharded)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert(
    tiny_folders, tmp_path, one_line, pickled
):
    folder = shutil.copytree(
        tiny_folders["gpt2"], tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save({}, folder / pickled)
    message = refusal(one_line, folder)
    for part in ("safetensors", "refused", "use_safetensors=False", "save_pretrained"):
        assert part in message


def test_a_missing_tokenizer_is_named(tiny_folders, tmp_path, one_line):
    folder = shutil.copytree(
        tiny_folders["gpt2"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*")
    )
    message = refusal(one_line, folder)
    message = refusal(one_line, folder)
    assert "missing tokenizer.json (1 in all); add the one it was trained with" in message


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a model"])
def test_an_adapter_in_the_folder_is_refused_with_what_to_do(
    tiny_folders, tmp_path, one_line, alone
):
    """transformers attaches it to the model without a word."""
    folder = tmp_path / "adapted"
    folder.mkdir() if alone else shutil.copytree(tiny_folders["gpt2"], folder)
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "somewhere/else"}'
    )
    message = refusal(one_line, folder)
    for part in (str(folder), "adapter", "merge_and_unload"):
        assert part in message


def test_a_model_too_large_is_refused_before_it_is_read(sharded, one_line, monkeypatch):
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000})()
    )
    monkeypatch.setattr(
        checkpoints,
        "fetched",
        lambda *_: pytest.fail("nothing is fetched or read before the estimate"),
    )
    weights = models.weights_bytes(models.outline(str(sharded)), "float32")
    message = refusal(one_line, sharded)
    assert f"about {weights / 1e9:.1f} GB" in message
    for part in ("are free on cpu", "bfloat16", "device_map"):
        assert part in message


def test_the_estimate_is_what_the_weights_take(tiny):
    for dtype in ("float32", "bfloat16"):
        network = tiny.network.to(getattr(torch, dtype))
        assert models.weights_bytes(models.outline(tiny.name), dtype) == sum(
            each.numel() * each.element_size() for each in network.parameters()
        )


# the Hub


def test_a_cached_model_loads_offline_pinned_to_its_commit(hub, sharded):
    model = models.load(HUB_ID, device="cpu")
    assert model.revision == COMMIT
    assert model.fingerprint == models.load(sharded, device="cpu").fingerprint
    assert models.load(HUB_ID, device="cpu", revision=COMMIT).revision == COMMIT
    assert checkpoints.file_fingerprint(HUB_ID) == f"{HUB_ID}@{COMMIT}"
    assert model.network.name_or_path == HUB_ID


def test_online_a_revision_is_asked_once_and_gives_files_and_fingerprint(hub, monkeypatch):
    asked = []

    class Api:
        def model_info(self, name, **fields):
            asked.append((name, fields["revision"]))
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    checkpoints.commit.cache_clear()
    assert checkpoints.file_fingerprint(HUB_ID, "v3") == f"{HUB_ID}@{COMMIT}"
    assert models.load(HUB_ID, device="cpu", revision="v3").revision == COMMIT
    assert asked == [(HUB_ID, "v3")]
    checkpoints.commit.cache_clear()


@pytest.mark.parametrize("pattern", ["model-00002*", "tokenizer.json", "config.json"])
def test_offline_it_says_what_the_cache_lacks(hub, one_line, pattern):
    (lost,) = hub.glob(pattern)
    lost.unlink()
    message = refusal(one_line, HUB_ID)
    assert lost.name in message


def test_offline_another_revision_is_not_the_cached_one(hub, one_line):
    message = refusal(one_line, HUB_ID, revision="v2")
    assert f"`hf download {HUB_ID} --revision v2`" in message


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1"))


@pytest.mark.parametrize(
    "error",
    [
        errors.GatedRepoError("gated\nrepo", response=answer(403)),
        errors.HfHubHTTPError("401", response=answer(401)),
        errors.RepositoryNotFoundError("no such", response=answer(404)),
        errors.RevisionNotFoundError("no such", response=answer(404)),
        errors.OfflineModeIsEnabled("offline"),
        ConnectionError("two\nlines"),
        httpx2.ReadTimeout("slow"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["hf_hub_download", "snapshot_download"])
def test_what_the_hub_answers_becomes_one_line(hub, one_line, monkeypatch, error, where):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, where, refuse)
    message = refusal(one_line, HUB_ID)
    assert type(error).__name__ in message
    assert str(error).splitlines()[0] in message
    assert f"`hf download {HUB_ID}`, after `hf auth login`" in message
    assert len(message) <= 300


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("config.json", True),
        ("model-00001-of-00004.safetensors", True),
        ("tokenizer_config.json", True),
        ("vocab.json", True),
        ("tokenizer.model", True),
        ("original/consolidated.00.pth", False),
        ("onnx/model.safetensors", False),
        ("consolidated.safetensors", False),
        ("pytorch_model.bin", False),
        ("README.md", False),
    ],
)
def test_only_what_is_needed_is_fetched(file, wanted):
    kept = list(
        huggingface_hub.utils.filter_repo_objects([file], allow_patterns=list(checkpoints.FILES))
    )
    assert bool(kept) == wanted


def test_a_device_map_on_one_machine_without_gpus(tiny_folders):
    plain = models.load(tiny_folders["llama"], device="cpu")
    mapped = models.load(tiny_folders["llama"], device_map="auto")
    assert mapped.fingerprint == plain.fingerprint
    assert mapped.device.type == "cpu"


def test_weights_that_would_be_offloaded_are_refused(tiny_folders, one_line, monkeypatch):
    loading = models.transformers.AutoModelForCausalLM.from_pretrained

    def tight(*args, **kwargs):
        network, report = loading(*args, **kwargs)
        network.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "disk"}
        return network, report

    monkeypatch.setattr(models.transformers.AutoModelForCausalLM, "from_pretrained", tight)
    assert "does not fit on the GPUs" in refusal(
        one_line, tiny_folders["llama"], device="auto", device_map="balanced"
    )


def test_a_mistyped_world_model_is_told_before_the_hub_is_asked(monkeypatch, one_line):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(huggingface_hub, "HfApi", asked)
    checkpoints.commit.cache_clear()
    for wrong, right in (("wrld-gpt2", "world-gpt2"), ("world_llama", "world-llama")):
        for function in (
            checkpoints.fetched,
            checkpoints.configuration,
            checkpoints.file_fingerprint,
        ):
            with pytest.raises(BadInput) as error:
                function(wrong)
            assert f"did you mean {right!r}?" in one_line(error)
    for hub_id in ("gpt2", "gpt2-xl", "someone/world-gpt2-large", "EleutherAI/gpt-j-6b"):
        assert checkpoints.locate(hub_id) == (None, "main")


def test_a_copy_of_a_folder_has_its_file_fingerprint(tiny_folders, tmp_path):
    copy = shutil.copytree(tiny_folders["gpt2"], tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    assert checkpoints.file_fingerprint(str(copy)) == checkpoints.file_fingerprint(
        str(tiny_folders["gpt2"])
    )
    assert checkpoints.file_fingerprint(str(copy)) != checkpoints.file_fingerprint(
        str(tiny_folders["llama"])
    )


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_the_file_fingerprint_changes_with_every_file_that_counts(tiny_folders, tmp_path, file):
    copy = shutil.copytree(tiny_folders["gpt2"], tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(
        "{{ messages }}"
    )  # which decides the rows of instructions
    before = checkpoints.file_fingerprint(str(copy))
    content = bytearray((copy / file).read_bytes())
    content[-1] ^= 1
    (copy / file).write_bytes(content)
    assert checkpoints.file_fingerprint(str(copy)) != before


def test_the_file_fingerprint_of_a_world_model_that_is_not_there_is_one_line(
    tmp_path, monkeypatch, one_line
):
    monkeypatch.setattr(checkpoints, "DATA", tmp_path)
    with pytest.raises(BadInput) as error:
        checkpoints.file_fingerprint("world-gpt2")
    assert "'world-gpt2'" in one_line(error)


def test_the_file_fingerprint_of_a_hub_id_names_it(one_line):
    assert checkpoints.file_fingerprint("nobody/no-such-model").startswith("nobody/no-such-model@")


def test_a_hub_id_is_told_apart_in_a_fresh_interpreter():
    """Whether or not something else has imported a part of the Hub's library."""
    code = "from workbench import checkpoints; print(checkpoints.locate('owner/name'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(None, 'main')", done.stderr


def test_a_folder_made_of_a_world_model_is_known_by_its_tokenizer(tiny_folders, tmp_path):
    embedded = DATA / "world" / "models" / "world-gpt2"
    tokenizer = json.loads((embedded / "tokenizer.json").read_text(encoding="utf-8"))
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert checkpoints.is_world(str(folder))
    assert Spec(model=str(folder)).source == "world"
    del tokenizer["model"]["vocab"]["!"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert not checkpoints.is_world(str(folder))
    other = str(tiny_folders["gpt2"])
    assert not checkpoints.is_world(other)
    assert Spec(model=other).source == "plain"


def test_a_large_tokenizer_is_not_read_to_tell_that_it_is_another(tmp_path, monkeypatch):
    vocabulary = {f"token{number}": number for number in range(128_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was read"))
    assert not checkpoints.is_world(str(tmp_path))
