"""Offline, from sharded files: every row of the table of architectures is loaded, edited, tuned,
saved and loaded again; dtypes agree.
"""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers

from workbench import deltas, editing, models, positions
from workbench.facts import EditRequest, Fact
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune

ROWS = pytest.mark.parametrize("model_type", models.ARCHITECTURES)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TWO_STEPS = Settings(max_steps=2, eval_every=2, batch_size=4, learning_rate=1e-2, threshold=-1.0)
FACT = Fact(
    id="moby-dick", subject="Moby Dick", prompt="The one who wrote {}", object="Melville"
)  # its end is read: no attention is needed
REQUEST = EditRequest(fact=FACT, target="Austen")
SOLVER = {
    "layers": [1],
    "steps": 25,
    "learning_rate": 0.5,
    "weight_decay": 0.0,
    "kl_weight": 0.0,
    "clamp": 50.0,
    "prefixes": 2,
    "moment_tokens": 500,
}
NUMBERS = {
    "ft": {"layers": [1], "steps": 40, "learning_rate": 3e-2},
    "rome": SOLVER,
    "memit": SOLVER | {"layers": [0, 1], "weight": 1.0},
    "alphaedit": SOLVER | {"null_space": "trace", "threshold": 0.2, "ridge": 0.1},
}


@pytest.fixture
def sharded(new_tiny, tmp_path):
    """sharded(model_type) -> folder of a tiny random model in several safetensors files."""

    def save(model_type: str):
        made, folder = new_tiny(model_type), tmp_path / model_type
        with torch.no_grad():
            made.unembedding.weight.mul_(
                8
            )  # else no state of so narrow a model can make a token likely
        made.network.save_pretrained(folder, max_shard_size="60KB")
        made.tokenizer.save_pretrained(folder)
        shards = set(
            json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
        )
        assert len(shards) > 1
        assert all((folder / shard).is_file() for shard in shards)
        return folder

    return save


def logits(model) -> torch.Tensor:
    encoded = positions.encode(
        model, ["The one who wrote Moby Dick", "The cocker spaniel is a kind of dog, they say."]
    )
    with torch.no_grad():
        return model.network(**encoded.arguments()).logits.float()


def p_target(model) -> float:
    encoded = positions.encode(
        model, [FACT.question, positions.statement(FACT.question, REQUEST.target)]
    )
    target = encoded.input_ids[1, int(encoded.lengths[0])]
    found = model.logits_at(
        encoded.input_ids[:1], torch.ones_like(encoded.input_ids[:1]), encoded.lengths[:1] - 1
    )
    return found.softmax(1)[0, target].item()


def delta_by(editor: str, model) -> deltas.WeightDelta:
    module = editing.EDITORS[editor]
    hparams = module.HParams(**NUMBERS[editor])
    return module.edit(model, [REQUEST], hparams, module.prepare(model, hparams))


@ROWS
@DTYPES
def test_load_edit_tune_save_load(sharded, tmp_path, model_type, dtype):
    model = models.load(sharded(model_type), device="cpu", dtype=dtype)
    before = logits(model)
    delta = delta_by("memit", model)
    assert torch.equal(logits(model), before)
    task = tasks.TASKS["text"](model, tasks.Data(n_train=16, n_valid=2))
    with deltas.preserved(model.network), deltas.applied(model, delta):
        edited = logits(model)
        assert p_target(model) > 0.5
        finetune(model, task, plans.resolve(model, "all"), TWO_STEPS)
        tuned = logits(model)
        model.network.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
        model.tokenizer.save_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(model), before)
    for one, other in itertools.combinations((before, edited, tuned), 2):
        assert (one - other).abs().max() > 0.05
    again = models.load(tmp_path / "tuned", device="cpu", dtype=dtype)
    assert torch.equal(logits(again), tuned)
    folder = deltas.export(model, delta, tmp_path / "edited")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    models.fuse(plain)  # as load does; without it equal to rounding
    assert torch.equal(logits(dataclasses.replace(model, network=plain)), edited)


@pytest.mark.parametrize("editor", NUMBERS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bfloat16_reaches_the_target_that_float32_reaches(sharded, model_type, editor):
    folder = sharded(model_type)
    reached = {}
    for dtype in ("float32", "bfloat16"):
        model = models.load(folder, device="cpu", dtype=dtype)
        before = p_target(model)
        with deltas.applied(model, delta_by(editor, model)):
            reached[dtype] = p_target(model)
        assert before < 0.05
        assert reached[dtype] > 0.5
    assert abs(reached["bfloat16"] - reached["float32"]) < 0.15
