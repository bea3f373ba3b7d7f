"""A plan names exactly the weights that it says in words."""

import pytest
import torch

from workbench.facts import BadInput
from workbench.tuning import plans

EDITED = (0, 2)
BLOCKS_OF = {  # of three blocks, of which 0 and 2 were edited
    "after:0": {1, 2},
    "after:1": {2},
    "window:0-0": {0},
    "window:0-1": {0, 1},
    "window:1-2": {1, 2},
    "window:0-2": {0, 1, 2},
    "outside:0-0": {1, 2},
    "outside:1-1": {0, 2},
    "outside:0-1": {2},
    "edited": {0, 2},
    "not-edited": {1},
}
AFTER_EDITED = {(0,): {1, 2}, (1,): {2}, (0, 1): {2}}  # blocks edited and moved
EDITED_MATRICES = {
    "gpt2": ["transformer.h.0.mlp.c_proj.weight", "transformer.h.2.mlp.c_proj.weight"],
    "llama": ["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"],
}
OUTSIDE = {
    "gpt2": {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    },
    "llama": {"model.embed_tokens.weight", "model.norm.weight"},
}
TENSORS_OF_A_BLOCK = {"gpt2": 12, "llama": 9}


def names(model) -> list[str]:
    return [name for name, _ in model.network.named_parameters()]


def block_of(name: str) -> int | None:
    """transformer.h.3.mlp... and model.layers.3.mlp...: the number is the third part."""
    parts = name.split(".")
    return int(parts[2]) if len(parts) > 3 and parts[2].isdigit() else None


def family(model) -> str:
    return model.network.config.model_type


@pytest.mark.parametrize(("text", "blocks"), BLOCKS_OF.items())
def test_a_plan_moves_every_weight_of_its_blocks_and_no_other(tiny, text, blocks, sealed):
    plan = plans.resolve(tiny, text, EDITED)
    assert plan.text == text
    sealed(plan)
    assert list(plan.parameters) == [name for name in names(tiny) if block_of(name) in blocks]
    assert len(plan.parameters) == TENSORS_OF_A_BLOCK[family(tiny)] * len(blocks)


def test_all_moves_every_weight_embeddings_norm_and_head_included(tiny):
    plan = plans.resolve(tiny, "all")
    assert list(plan.parameters) == names(tiny)
    assert {name for name in plan.parameters if block_of(name) is None} == OUTSIDE[family(tiny)]


def test_edited_matrices_are_the_down_projections_alone(tiny):
    assert (
        list(plans.resolve(tiny, "edited-matrices", EDITED).parameters)
        == EDITED_MATRICES[family(tiny)]
    )
    assert (
        list(plans.resolve(tiny, "edited-matrices", [2]).parameters)
        == EDITED_MATRICES[family(tiny)][1:]
    )


@pytest.mark.parametrize("text", [*BLOCKS_OF, "edited-matrices"])
def test_weights_outside_the_blocks_stay_but_under_all(tiny, text):
    assert not OUTSIDE[family(tiny)] & set(plans.resolve(tiny, text, EDITED).parameters)


@pytest.mark.parametrize("layers", [(1,), [1], (1, 1), {1}])
def test_edited_and_not_edited_share_out_the_blocks(tiny, layers):
    edited, rest = (
        set(plans.resolve(tiny, text, layers).parameters) for text in ("edited", "not-edited")
    )
    assert {block_of(name) for name in edited} == {1}
    assert {block_of(name) for name in rest} == {0, 2}
    assert edited | rest | OUTSIDE[family(tiny)] == set(names(tiny))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_tied_weights_count_as_embeddings(new_tiny, model_type):
    tied, untied = (new_tiny(model_type, tie_word_embeddings=choice) for choice in (True, False))
    assert tied.unembedding.weight is tied.network.get_input_embeddings().weight
    assert "lm_head.weight" not in plans.resolve(tied, "all").parameters
    assert set(plans.resolve(untied, "all").parameters) - set(
        plans.resolve(tied, "all").parameters
    ) == {"lm_head.weight"}
    assert plans.resolve(tied, "after:0").parameters == plans.resolve(untied, "after:0").parameters


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("window:1-1", {1}),
        ("outside:1-1", {0, *range(2, 11)}),
        ("after:9", {10}),
        ("window:10-10", {10}),
        ("edited", {1}),
        ("not-edited", {0, *range(2, 11)}),
    ],
)
def test_block_1_is_not_block_10(new_tiny, model_type, text, blocks):
    model = new_tiny(model_type, num_hidden_layers=11)
    found = plans.resolve(model, text, [1]).parameters
    assert {block_of(name) for name in found} == blocks
    assert len(found) == TENSORS_OF_A_BLOCK[model_type] * len(blocks)
    assert any(
        name.startswith(model.block_name(1)) for name in names(model) if block_of(name) == 10
    )  # a name alone would not do


# table


@pytest.mark.parametrize("text", ["all", "after:1", "edited", "edited-matrices"])
def test_the_table_adds_up(tiny, text):
    plan = plans.resolve(tiny, text, EDITED)
    table = plan.table(tiny)
    sizes = {name: parameter.numel() for name, parameter in tiny.network.named_parameters()}
    assert list(table.index) == ["embeddings", 0, 1, 2, "final norm"]  # the head is tied
    assert table["all"].sum() == sum(sizes.values())
    assert table["trainable"].sum() == sum(sizes[name] for name in plan.parameters)
    for block in (0, 1, 2):
        assert table.loc[block, "all"] == sum(
            size for name, size in sizes.items() if block_of(name) == block
        )
        assert table.loc[block, "trainable"] == sum(
            sizes[name] for name in plan.parameters if block_of(name) == block
        )


def test_what_is_outside_the_blocks_is_trainable_under_all_only(tiny):
    outside = sum(tiny.network.get_parameter(name).numel() for name in OUTSIDE[family(tiny)])
    for text, moving in (("all", outside), ("window:0-2", 0)):
        assert plans.resolve(tiny, text).table(tiny).drop([0, 1, 2]).sum().tolist() == [
            moving,
            outside,
        ]


def test_a_head_of_its_own_is_a_row_of_its_own(new_tiny):
    model = new_tiny("llama", tie_word_embeddings=False)
    for text, moves in (("all", True), ("window:0-1", False)):
        table = plans.resolve(model, text).table(model)
        assert set(table.index) == {0, 1, 2, "embeddings", "final norm", "head"}
        assert table.loc["head", "trainable"] == moves * model.unembedding.weight.numel()


def test_the_table_tells_block_1_from_block_10(new_tiny):
    model = new_tiny("gpt2", num_hidden_layers=11)
    table = plans.resolve(model, "window:1-1").table(model)
    assert table.index[table["trainable"] > 0].tolist() == [1]
    assert table.loc[list(range(11)), "all"].nunique() == 1


# what is refused


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "plan ''"),
        ("everything", "plan 'everything'"),
        ("ALL", "plan 'ALL'"),
        ("after", "plan 'after'"),
        ("after:", "plan 'after:'"),
        ("after:x", "plan 'after:x'"),
        ("after:-1", "plan 'after:-1'"),
        ("after:1.5", "plan 'after:1.5'"),
        ("after:1\n", r"plan 'after:1\n'"),
        ("window:1", "plan 'window:1'"),
        ("window:0-1-2", "plan 'window:0-1-2'"),
        ("edited:1", "plan 'edited:1'"),
        ("after:2", "plan 'after:2' moves no weight"),
        ("outside:0-2", "plan 'outside:0-2' moves no weight"),
        ("window:2-1", "plan 'window:2-1': the window ends before it begins"),
        ("after:3", "layer 3"),
        ("window:1-3", "layer 3"),
        ("outside:7-9", "layer 7"),
    ],
)
def test_a_bad_plan_is_one_line(tiny, one_line, text, named):
    with pytest.raises(BadInput) as error:
        plans.resolve(tiny, text, EDITED)
    assert named in one_line(error)


@pytest.mark.parametrize(("edited", "blocks"), AFTER_EDITED.items())
def test_after_edited_is_what_lies_above_the_last_edited_block(tiny, edited, blocks):
    plan = plans.resolve(tiny, "after-edited", edited)
    assert list(plan.parameters) == [name for name in names(tiny) if block_of(name) in blocks]


def test_above_the_last_block_lies_nothing(tiny, one_line):
    with pytest.raises(BadInput) as error:
        plans.resolve(tiny, "after-edited", [2])
    assert "plan 'after-edited' moves no weight" in one_line(error)


@pytest.mark.parametrize("text", ["edited", "not-edited", "edited-matrices", "after-edited"])
def test_a_plan_by_edit_needs_an_edit(tiny, one_line, text):
    with pytest.raises(BadInput) as error:
        plans.resolve(tiny, text)
    assert f"plan {text!r} needs edited layers" in one_line(error)


def test_every_block_edited_leaves_none_that_is_not(tiny, one_line):
    with pytest.raises(BadInput) as error:
        plans.resolve(tiny, "not-edited", [0, 1, 2])
    assert "plan 'not-edited' moves no weight" in one_line(error)


@pytest.mark.parametrize("text", ["edited", "edited-matrices", "not-edited"])
def test_an_edited_layer_that_is_no_block_is_refused(tiny, one_line, text):
    with pytest.raises(BadInput) as error:
        plans.resolve(tiny, text, [0, 3])
    assert "layer 3" in one_line(error)


def test_a_plan_leaves_the_model_as_it_was(tiny):
    before = {
        name: (parameter.requires_grad, parameter.clone())
        for name, parameter in tiny.network.named_parameters()
    }
    plans.resolve(tiny, "all").table(tiny)
    for name, parameter in tiny.network.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
