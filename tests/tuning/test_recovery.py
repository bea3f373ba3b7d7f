import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from workbench import editing, facts
from workbench.deltas import applied
from workbench.evaluation import tidy
from workbench.positions import front
from workbench.tracking.retention import measure
from workbench.tuning import recovery


@pytest.fixture(scope="module")
def requests(world):
    pool = [one for one in facts.read("world") if one.fact.split == "study"][:12]
    known = measure(world, pool, against="object").retained
    return [one for one, good in zip(pool, known, strict=True) if good][:4]


def values(model, requests):
    table = tidy("recovery", recovery.ask(model, requests))
    return table.pivot(index="fact_id", columns="quantity", values="value")


def test_the_unedited_model_says_what_is_true_and_has_to_learn_what_is_new(world, requests):
    before = {name: weight.clone() for name, weight in world.network.state_dict().items()}
    steps = values(world, requests)
    assert (steps.true == 0).all()
    assert (steps.own > 0).all()
    assert (steps.others >= steps.own).all()
    assert ((steps >= 0) & (steps <= recovery.MOST + 1)).all(axis=None)
    after = world.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in world.network.parameters())


def test_of_an_edited_model_it_is_the_other_way_round(world, requests):
    edit = editing.edit_each(
        "ft",
        world,
        [requests],
        editing.preset("ft", world),
        editing.EDITORS["ft"].prepare(world, editing.preset("ft", world)),
    )[0]
    with applied(world, edit):
        steps = values(world, requests)
    took = [outcome["fact"] for outcome in edit.outcomes if outcome["took"]]
    assert took
    assert (steps.loc[took, ["own", "others"]] == 0).all(axis=None)
    assert (steps.loc[took, "true"] > 0).all()


def test_steps_are_those_of_a_plain_loop(base, requests):
    """One statement after another in a loss that is summed by hand, answers by plain arg-max."""
    expected = {}
    torch.manual_seed(0)
    blocks = base.architecture.blocks
    linear = torch.nn.Linear | Conv1D
    modules = dict(base.network.get_submodule(blocks).named_modules())
    targets = [f"{blocks}.{name}" for name, one in modules.items() if isinstance(one, linear)]
    is_conv = any(isinstance(one, Conv1D) for one in modules.values())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=is_conv)
    network = peft.get_peft_model(base.network, config)
    weights = [weight for name, weight in network.named_parameters() if "lora" in name]
    optimiser = torch.optim.AdamW(weights, lr=recovery.RATE)
    try:
        for step in range(recovery.MOST + 1):
            nats, tokens = 0.0, 0
            for request in requests:
                lead = base.tokenizer(request.fact.question, add_special_tokens=False)["input_ids"]
                whole = base.tokenizer(
                    f"{request.fact.question} {request.target}", add_special_tokens=False
                )["input_ids"]
                ids = torch.tensor([[*front(base), *whole]])
                start = len(front(base)) + len(lead)
                logits = network(input_ids=ids).logits[0]
                answer = ids[0, start:]
                if (logits[start - 1 : -1].argmax(1) == answer).all():
                    expected.setdefault(request.fact.id, step)
                losses = torch.nn.functional.cross_entropy(
                    logits[start - 1 : -1], answer, reduction="sum"
                )
                nats, tokens = nats + losses, tokens + len(answer)
            optimiser.zero_grad()
            (nats / tokens).backward()
            optimiser.step()
    finally:
        network.unload()
        vars(base.network).pop("peft_config", None)
        base.network.requires_grad_(False)
    own = values(base, requests).own
    # a word that goes on ends the plain reading later than ours begins, by a step at most
    assert {name: expected[name] for name in own.index} == pytest.approx(own.to_dict(), abs=1)
