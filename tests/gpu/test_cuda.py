"""On an NVIDIA GPU the same comes out as on the CPU, in float32 and bfloat16, and everything is
taken back.
"""

import pytest
import torch

from workbench import deltas, editing, facts, models
from workbench.moments import second_moments
from workbench.tracking.retention import measure, measure_prompts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"),
]
EDITORS = ("ft", "rome", "memit", "alphaedit")


@pytest.fixture(scope="module", params=["world-gpt2", "world-llama"])
def pair(request):
    """The same model on the CPU and on the GPU."""
    return tuple(
        models.load(request.param, device=device, dtype="float32") for device in ("cpu", "cuda")
    )


@pytest.fixture(scope="module")
def requests():
    return [request for request in facts.read("world") if request.fact.split == "study"][:8]


def delta_by(editor, model, requests):
    module = editing.EDITORS[editor]
    hparams = editing.preset(editor, model)
    return module.edit(model, requests, hparams, module.prepare(model, hparams))


def test_auto_is_the_gpu():
    assert models.load("world-gpt2").device.type == "cuda"


def test_answers_are_those_of_the_cpu(pair, requests):
    prompts, objects = (
        [request.fact.question for request in requests],
        [request.fact.object for request in requests],
    )
    cpu, gpu = (measure_prompts(model, prompts, objects) for model in pair)
    assert cpu.retained.tolist() == gpu.retained.tolist()
    assert (cpu.p - gpu.p).abs().max() < 1e-3


def test_second_moments_are_those_of_the_cpu(pair):
    cpu, gpu = (second_moments(model, [3], tokens=20_000)[3].matrix.cpu() for model in pair)
    assert (cpu - gpu).norm() <= 1e-4 * cpu.norm()


@pytest.mark.parametrize("editor", EDITORS)
def test_an_edit_reaches_what_it_reaches_on_the_cpu_and_is_taken_back(pair, requests, editor):
    reached, some = [], requests[:1] if editor == "rome" else requests
    for model in pair:
        before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        delta = delta_by(editor, model, some)
        with deltas.applied(model, delta):
            reached.append(measure(model, some).p.mean())
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items()
        )
    assert abs(reached[0] - reached[1]) < 0.05


def test_a_delta_made_on_the_gpu_is_applied_on_the_cpu(pair, requests, tmp_path):
    cpu, gpu = pair
    path = deltas.save(delta_by("rome", gpu, requests[:1]), tmp_path / "delta.safetensors")
    with deltas.applied(cpu, deltas.load(path)):
        assert measure_prompts(cpu, [requests[0].fact.question], [requests[0].target]).p[0] > 0.5


@pytest.mark.parametrize(
    "trainer",
    [{}, {"bf16": True}, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}],
)
def test_tuning_learns_and_is_taken_back(pair, trainer):
    model = pair[1]
    before = model.weight(0).clone()
    task = tasks.TASKS["text"](model, tasks.Data(n_train=64, n_valid=8))
    settings = Settings(
        max_steps=20,
        eval_every=10,
        batch_size=8,
        learning_rate=5e-4,
        threshold=0.0,
        trainer=trainer,
    )
    with deltas.preserved(model.network):
        log = finetune(model, task, plans.resolve(model, "all"), settings).log
        assert not torch.equal(model.weight(0), before)
    assert log.metric.iloc[-1] < log.metric.iloc[0]
    assert torch.equal(model.weight(0), before)


def test_bfloat16_on_the_gpu_is_edited(requests):
    model = models.load("world-llama", device="cuda", dtype="bfloat16")
    with deltas.applied(model, delta_by("rome", model, requests[:1])):
        assert measure_prompts(model, [requests[0].fact.question], [requests[0].target]).p[0] > 0.5
