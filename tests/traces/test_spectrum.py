import copy
from dataclasses import replace

import pytest
import torch

from workbench.deltas import Change, WeightDelta
from workbench.models import load
from workbench.records import BadInput
from workbench.traces import spectrum
from workbench.tuning import adapters, plans


def updates(seed, blocks=8, shape=(24, 64), rank=12):
    """What tuning might leave: a few strong directions over a bulk, a matrix a block."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    strengths = torch.arange(1, rank + 1) ** -1.0
    changes = {}
    for layer in range(blocks):
        strong = normal(shape[0], rank) * strengths @ normal(rank, shape[1])
        changes[layer] = 0.02 * strong + 0.02 * normal(*shape)
    return changes


def test_noise_is_cut_where_gavish_and_donoho_cut_it():
    """Square noise of known size: the cut is 2.858 medians, their figure for square matrices."""
    values = torch.linalg.svdvals(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))
    edge = spectrum.noise_edge(values, torch.Size([300, 300]))
    assert edge == pytest.approx(2.858 * values.median().item(), rel=2e-3)
    assert values.max() < edge
    wide = torch.Size([100, 400])
    assert spectrum.noise_edge(values, wide) == pytest.approx(
        (0.56 / 64 - 0.95 / 16 + 1.82 / 4 + 1.43) * values.median().item()
    )


def test_tuning_alone_stands_out_no_more_often_than_one_time_in_twenty():
    """200 models of 8 blocks: a model counts if any matrix of it stands out."""
    hits = 0
    for seed in range(200):
        hits += spectrum.table({"down": updates(seed)}).outlying.gt(0).any()
    assert hits <= 10


def test_what_is_planted_is_counted_in_its_block_alone():
    changes = updates(0)
    top = torch.linalg.svdvals(changes[3])[0]
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(24, 3, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(64, 3, generator=generator)).Q
    changes[3] = changes[3] + 20 * top * left @ right.T
    rows = spectrum.table({"down": changes}).set_index("layer")
    assert rows.outlying.to_dict() == {layer: 3 * (layer == 3) for layer in range(8)}
    assert rows.energy[3] > 0.9 > rows.energy_beside[3]
    changes[3] = changes[3] - 19 * top * left @ right.T  # no stronger than what tuning does
    assert spectrum.table({"down": changes}).outlying.sum() == 0


def planted(changes, layers, rank=3):
    """Strong directions in these blocks."""
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        left, right = (torch.randn(size, rank, generator=generator) for size in (24, 64))
        changes[layer] = changes[layer] + left @ right.T
    return changes


def test_an_edit_of_most_blocks_is_told_by_what_else_moved():
    """Beside three quarters of the down-projections stand other matrices of the same blocks."""
    changes = {"down": planted(updates(0), range(6)), "up": updates(1), "query": updates(2)}
    rows = spectrum.table(changes)
    found = rows[rows.outlying > 0]
    assert (found.matrix == "down").all()
    assert dict(zip(found.layer, found.outlying, strict=True)) == dict.fromkeys(range(6), 3)


def test_blocks_that_are_known_to_be_edited_are_not_held_against_each_other():
    changes = {"": planted(updates(0), range(6))}
    assert spectrum.table(changes).outlying.sum() == 0
    rows = spectrum.table(changes, edited=range(6)).set_index("layer")
    assert rows.outlying.to_dict() == {layer: 3 * (layer < 6) for layer in range(8)}


@pytest.mark.parametrize("window", [(3,), (2, 3, 4)])
def test_a_tuning_of_a_few_blocks_is_no_edit(window):
    """Blocks that stay are no measure of what tuning does; 50 models, none with an edit."""
    for seed in range(0, 150, 3):
        changes = {name: updates(seed + place) for place, name in enumerate(("down", "up", "key"))}
        for layers in changes.values():
            for layer in set(layers) - set(window):
                layers[layer] = layers[layer] * 0
        assert spectrum.table(changes).outlying.sum() == 0
    planted(changes["down"], window)
    assert (spectrum.table(changes).outlying > 0).sum() == len(window)  # with one there are


def test_the_difference_is_of_every_matrix_of_the_blocks(tiny, one_line):
    other = load(tiny.name, device="cpu")
    with pytest.raises(BadInput) as error:
        spectrum.differences(tiny, other)
    assert "the same matrices" in one_line(error)
    with torch.no_grad():
        tiny.weight(1)[2, 5] += 1  # row d_out, column d_in, however it is stored
    changes = spectrum.differences(tiny, other)
    name = f"{tiny.architecture.down_projection}.weight"
    assert changes[name][1].nonzero().tolist() == [[2, 5]]
    changed = [key for key, layers in changes.items() for one in layers.values() if one.any()]
    assert changed == [name]
    assert all(one.ndim == 2 for layers in changes.values() for one in layers.values())


def test_models_of_other_shapes_are_refused(tiny_gpt2, tiny_llama, one_line):
    with pytest.raises(BadInput) as error:
        spectrum.differences(tiny_gpt2, tiny_llama)
    assert "made of" in one_line(error)


def test_models_that_cannot_be_compared_are_refused(tiny, one_line):
    other = load(tiny.name, device="cpu")
    with torch.no_grad():
        other.network.get_input_embeddings().weight.add_(1)
    with pytest.raises(BadInput) as error:
        spectrum.differences(tiny, other)
    assert "what else differs is not looked at" in one_line(error)
    change = Change(dense=torch.ones(tiny.weight(0).shape))
    edit = WeightDelta.of(tiny, changes={tiny.down_projection_name(0): change})
    with edit.applied(tiny), pytest.raises(BadInput) as error:
        spectrum.differences(other, tiny)
    assert "the base" in one_line(error)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    with pytest.raises(BadInput) as error:
        spectrum.differences(other, tiny)
    assert "nothing in common" in one_line(error)
    shorter = copy.deepcopy(tiny.network)
    del tiny.blocks[-1]
    with pytest.raises(BadInput) as error:
        spectrum.differences(tiny, replace(tiny, network=shorter))
    assert "blocks" in one_line(error)


def test_an_attached_adapter_is_refused(tiny, one_line):
    base = load(tiny.name, device="cpu")
    plan = plans.resolve(tiny, "all", ())
    numbers = {"rank": 2, "alpha": 4, "dropout": 0.0, "seed": 0}
    with adapters.attached(tiny, plan, "lora", **numbers), pytest.raises(BadInput) as error:
        spectrum.differences(tiny, base)
    assert "merge it" in one_line(error)


def test_the_part_that_stands_out_is_the_planted_one(tiny_gpt2):
    base = load(tiny_gpt2.name, device="cpu")
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = base.weight(1).shape
    left, right = (torch.randn(size, 2, generator=generator) for size in (d_out, d_in))
    with torch.no_grad():
        for layer in range(3):
            noise = torch.randn(d_out, d_in, generator=generator)
            tiny_gpt2.weight(layer).add_(1e-3 * noise)
        tiny_gpt2.weight(1).add_(left @ right.T)
    parts = spectrum.parts(tiny_gpt2, base)[1]
    assert list(parts) == [1]
    planted = left @ right.T
    assert (parts[1].matrix() - planted).norm() < 2e-3 * planted.norm()
    unit = parts[1].right.T @ parts[1].right
    torch.testing.assert_close(unit, torch.eye(2), atol=1e-5, rtol=0)
