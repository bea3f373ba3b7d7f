"""Hooks record or replace what modules put out, for the length of the `with` and no longer."""

import pytest
import torch
from torch import nn

from workbench.activations import calls, hidden, recorded, replaced

IDS = torch.tensor([[0, 5, 17, 400, 33], [0, 9, 8, 7, 6]])


class Pair(nn.Module):
    """Puts out a tuple, as the blocks of some architectures do."""

    def forward(self, states, scale=2.0):
        return states * scale, "cache", 7


def doubled(output, given):
    return output * 2


def run_and_raise(model, error):
    model.network(input_ids=IDS)
    raise error


def test_hidden_takes_the_first_of_a_tuple():
    states = torch.ones(1, 2, 3)
    assert hidden(states) is states
    assert hidden((states, "cache")) is states


def test_a_recorded_output_is_that_of_a_direct_call(tiny):
    with (
        recorded({layer: tiny.mlp(layer) for layer in range(3)}) as outputs,
        recorded({layer: tiny.mlp(layer) for layer in range(3)}, True) as given,
    ):
        tiny.network(input_ids=IDS)
    for layer in range(3):
        assert torch.equal(outputs[layer], tiny.mlp(layer)(given[layer]))
        assert not torch.equal(outputs[layer], tiny.mlp(layer)(given[layer] + 1))
        assert not torch.equal(outputs[layer], tiny.mlp((layer + 1) % 3)(given[layer]))


def test_the_recorded_input_of_a_block_is_the_output_of_the_one_before(tiny):
    blocks = dict(enumerate(tiny.blocks))
    with recorded(blocks) as outputs, recorded(blocks, inputs=True) as given:
        tiny.network(input_ids=IDS)
    assert torch.equal(given[1], outputs[0])
    assert torch.equal(given[2], outputs[1])
    assert not torch.equal(given[1], outputs[1])


def test_a_module_that_is_called_by_names_is_recorded_and_replaced(tiny_llama):
    """Llama's attention: `self_attn(hidden_states=...)`."""
    attention = tiny_llama.blocks[1].self_attn
    with recorded({"in": attention}, inputs=True) as given, recorded({"out": attention}) as outputs:
        tiny_llama.network(input_ids=IDS)
    seen = []
    before = tiny_llama.network(input_ids=IDS).logits
    with replaced(attention, lambda out, states: seen.append(states) or out + states):
        after = tiny_llama.network(input_ids=IDS).logits
    assert torch.equal(seen[0], given["in"])
    assert given["in"].shape == outputs["out"].shape
    assert not torch.allclose(after, before)


def test_the_last_call_is_what_is_recorded(tiny):
    with recorded({"mlp": tiny.mlp(1)}) as outputs:
        tiny.network(input_ids=IDS)
        first = outputs["mlp"]
        tiny.network(input_ids=IDS.flip(1))
    assert not torch.equal(outputs["mlp"], first)


def test_recording_changes_nothing(tiny):
    before = tiny.network(input_ids=IDS).logits
    with recorded(dict(enumerate(tiny.blocks))), calls(dict(enumerate(tiny.blocks))):
        assert torch.equal(tiny.network(input_ids=IDS).logits, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inputs", [False, True])
def test_nothing_is_recorded_after_an_exception(tiny, error, inputs):
    with pytest.raises(error), recorded({"mlp": tiny.mlp(1)}, inputs=inputs) as record:
        run_and_raise(tiny, error)
    seen = record["mlp"]
    tiny.network(input_ids=IDS.flip(1))
    assert record["mlp"] is seen


def test_nothing_is_recorded_after_the_model_itself_has_failed(tiny):
    with pytest.raises(IndexError), recorded({"mlp": tiny.mlp(1)}) as record:
        tiny.network(input_ids=torch.tensor([[10**6]]))
    tiny.network(input_ids=IDS)
    assert record == {}


def test_no_hook_stays_when_one_of_the_modules_does_not_exist(tiny):
    with pytest.raises(AttributeError), recorded({"mlp": tiny.mlp(1), "none": None}):
        raise AssertionError("the block must not run")
    with pytest.raises(AttributeError), calls({"mlp": tiny.mlp(1), "none": None}):
        raise AssertionError("the block must not run")
    assert not tiny.mlp(1)._forward_hooks
    assert not tiny.mlp(1)._forward_pre_hooks


def test_a_tuples_first_is_recorded():
    states = torch.randn(1, 4, 3)
    pair = Pair()
    with recorded({"pair": pair}) as outputs, recorded({"pair": pair}, inputs=True) as given:
        pair(states)
    assert torch.equal(outputs["pair"], states * 2)
    assert torch.equal(given["pair"], states)


# replaced


def test_a_replaced_output_goes_on_through_the_model(tiny):
    before = tiny.network(input_ids=IDS).logits
    with (
        replaced(tiny.mlp(1), doubled),
        recorded({"mlp": tiny.mlp(1), "next": tiny.mlp(2)}) as changed,
    ):
        after = tiny.network(input_ids=IDS).logits
    with recorded({"mlp": tiny.mlp(1), "next": tiny.mlp(2)}) as plain:
        again = tiny.network(input_ids=IDS).logits
    assert torch.equal(changed["mlp"], plain["mlp"] * 2)
    assert not torch.equal(changed["next"], plain["next"])
    assert (after - before).abs().max() > 0.01
    assert torch.equal(again, before)


def test_the_change_is_given_output_and_input(tiny):
    with (
        recorded({"mlp": tiny.mlp(1)}) as outputs,
        recorded({"mlp": tiny.mlp(1)}, inputs=True) as given,
    ):
        tiny.network(input_ids=IDS)
    with (
        replaced(tiny.mlp(1), lambda output, states: output + 3 * states),
        recorded({"mlp": tiny.mlp(1)}) as changed,
    ):
        tiny.network(input_ids=IDS)
    assert torch.equal(changed["mlp"], outputs["mlp"] + 3 * given["mlp"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_after_an_exception(tiny, error):
    before = tiny.network(input_ids=IDS).logits
    with pytest.raises(error), replaced(tiny.blocks[1], doubled):
        run_and_raise(tiny, error)
    assert torch.equal(tiny.network(input_ids=IDS).logits, before)


def test_the_model_is_as_before_when_the_change_itself_fails(tiny):
    before = tiny.network(input_ids=IDS).logits
    with pytest.raises(ZeroDivisionError), replaced(tiny.blocks[1], lambda output, given: 1 / 0):
        tiny.network(input_ids=IDS)
    assert torch.equal(tiny.network(input_ids=IDS).logits, before)


def test_of_a_tuple_the_first_is_replaced_and_the_rest_kept():
    states, pair = torch.randn(1, 4, 3), Pair()
    with replaced(pair, lambda output, given: output - given):
        changed = pair(states)
    assert torch.equal(changed[0], states)
    assert changed[1:] == ("cache", 7)
    assert torch.equal(pair(states)[0], states * 2)


def test_two_replacements_add_up_and_end_one_by_one(tiny):
    with recorded({"mlp": tiny.mlp(1)}) as plain:
        tiny.network(input_ids=IDS)
    with replaced(tiny.mlp(1), doubled):
        with replaced(tiny.mlp(1), doubled), recorded({"mlp": tiny.mlp(1)}) as both:
            tiny.network(input_ids=IDS)
        with recorded({"mlp": tiny.mlp(1)}) as outer:
            tiny.network(input_ids=IDS)
    assert torch.equal(both["mlp"], plain["mlp"] * 2 * 2)
    assert torch.equal(outer["mlp"], plain["mlp"] * 2)


# calls


def test_a_block_can_be_called_again_with_equal_output(tiny):
    blocks = dict(enumerate(tiny.blocks))
    with calls(blocks) as seen, recorded(blocks) as outputs:
        tiny.network(
            input_ids=IDS,
            attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
            use_cache=False,
        )
    for layer, (args, kwargs) in seen.items():
        assert torch.equal(hidden(blocks[layer](*args, **kwargs)), outputs[layer])
        assert not torch.equal(
            hidden(blocks[layer](args[0] + 1, *args[1:], **kwargs)), outputs[layer]
        )


def test_a_call_holds_positional_and_named_arguments():
    states, pair = torch.randn(1, 4, 3), Pair()
    with calls({"pair": pair}) as seen:
        pair(states, scale=5.0)
    args, kwargs = seen["pair"]
    assert torch.equal(pair(*args, **kwargs)[0], states * 5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_call_is_noted_after_an_exception(tiny, error):
    with pytest.raises(error), calls({"mlp": tiny.mlp(1)}) as seen:
        raise error
    tiny.network(input_ids=IDS)
    assert seen == {}
