"""LoRA and DoRA: on the planned modules only, gone without a trace afterwards, the same active and
merged.
"""

import peft
import pytest
import torch

from workbench import deltas, models
from workbench.facts import BadInput
from workbench.positions import encode
from workbench.tracking.retention import next_logits
from workbench.tuning import adapters, plans, tasks
from workbench.tuning.finetune import Settings, finetune
from workbench.tuning.tasks import Data

PLANS = ["all", "window:1-1", "after:0", "edited", "edited-matrices", "not-edited"]
NUMBERS = Settings(max_steps=3, eval_every=3, batch_size=2, learning_rate=1e-2, threshold=-1.0)


@pytest.fixture(scope="module")
def text(tiny_folders):
    return tasks.text_task(
        models.load(tiny_folders["gpt2"], device="cpu"), Data(n_train=12, n_valid=2)
    )


def state(network) -> dict:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return next_logits(model, encode(model, ["The harbour of", "A quiet"]))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("text_of_plan", PLANS)
def test_only_the_adapter_learns_and_the_model_comes_back(tiny, text, kind, text_of_plan):
    before, modules = state(tiny.network), [name for name, _ in tiny.network.named_modules()]
    plan = plans.resolve(tiny, text_of_plan, [1])
    wanted = adapters.targets(tiny, plan)
    with adapters.attached(tiny, plan, kind, rank=2, alpha=4, dropout=0.0) as adapter:
        start = state(tiny.network)
        finetune(tiny, text, adapter.plan, NUMBERS)
        after = state(tiny.network)
        moved = {name for name, tensor in start.items() if not torch.equal(tensor, after[name])}
        assert moved <= set(adapter.plan.parameters)
        assert {name for name in moved if "lora_B" in name} == {
            f"{name}.lora_B.default.weight" for name in wanted
        }
        assert int(adapter.plan.table(tiny).trainable.sum()) == sum(
            after[name].numel() for name in adapter.plan.parameters
        )
    assert [name for name, _ in tiny.network.named_modules()] == modules
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tiny.network.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in tiny.network.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_says_what_active_says_and_unmerging_is_exact(tiny, text, kind, tmp_path):
    plain = logits(tiny)
    with adapters.attached(
        tiny, plans.resolve(tiny, "window:0-1"), kind, rank=2, alpha=4, dropout=0.1
    ) as adapter:
        finetune(tiny, text, adapter.plan, NUMBERS)
        active, weights = logits(tiny), state(tiny.network)
        with adapter.merged():
            merged = logits(tiny)
        assert all(
            torch.equal(tensor, weights[name]) for name, tensor in tiny.network.state_dict().items()
        )
        assert torch.equal(logits(tiny), active)
        adapter.save(tmp_path / "adapter")
    assert torch.allclose(active, merged, atol=1e-4)
    assert not torch.allclose(active, plain, atol=1e-2)
    assert torch.equal(logits(tiny), plain)
    again = peft.PeftModel.from_pretrained(tiny.network, tmp_path / "adapter")
    assert torch.allclose(logits(tiny), active, atol=1e-5)
    again.unload()


def test_a_second_adapter_starts_anew(tiny, text):
    def learnt(seed):
        with adapters.attached(
            tiny, plans.resolve(tiny, "all"), "lora", rank=2, alpha=4, dropout=0.0, seed=seed
        ) as adapter:
            finetune(tiny, text, adapter.plan, NUMBERS)
            return logits(tiny)

    first, same, other = learnt(0), learnt(0), learnt(1)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.filterwarnings("error")
def test_an_adapter_comes_without_a_warning(tiny):
    """One stood in every notebook that has an adapter."""
    with adapters.attached(tiny, plans.resolve(tiny, "all"), "lora", rank=2, alpha=2, dropout=0.0):
        pass


def test_an_exception_takes_the_adapter_away_too(tiny):
    before = state(tiny.network)
    with (
        pytest.raises(ZeroDivisionError),
        adapters.attached(tiny, plans.resolve(tiny, "all"), "lora", rank=2, alpha=4, dropout=0.0),
    ):
        1 / 0  # noqa: B018
    assert set(before) == set(state(tiny.network))


def test_modules_are_chosen_by_name(tiny):
    name = {"gpt2": "c_attn", "llama": "q_proj"}[tiny.network.config.model_type]
    found = adapters.targets(tiny, plans.resolve(tiny, "window:0-1"), [name])
    assert len(found) == 2
    assert all(each.endswith(name) for each in found)


def test_targets_that_match_nothing_are_one_clear_line(tiny, one_line):
    with pytest.raises(BadInput) as error:
        adapters.targets(tiny, plans.resolve(tiny, "all"), ["no_such_proj"])
    assert "no_such_proj" in one_line(error)
    assert "there are" in one_line(error)


def test_an_edit_below_an_adapter_stays_and_goes(tiny, text):
    from workbench.deltas import Change, WeightDelta

    before = state(tiny.network)
    name = tiny.down_projection_name(1)
    shape = tiny.weight(1).shape
    delta = WeightDelta(
        changes={name: Change(dense=torch.ones(shape))},
        model=tiny.name,
        revision="",
        fingerprint=tiny.fingerprint,
    )
    with (
        deltas.applied(tiny, delta),
        adapters.attached(
            tiny, plans.resolve(tiny, "edited", [1]), "lora", rank=2, alpha=4, dropout=0.0
        ) as adapter,
    ):
        edited = tiny.network.get_submodule(name).base_layer.weight.clone()
        finetune(tiny, text, adapter.plan, NUMBERS)
        assert torch.equal(tiny.network.get_submodule(name).base_layer.weight, edited)
        assert not torch.equal(edited, before[f"{name}.weight"])
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in tiny.network.state_dict().items()
    )
