import copy
import re
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

import workbench as wb
from workbench.positions import encode, subject_end
from workbench.records import BadInput
from workbench.traces import patching
from workbench.tracking.retention import answers_after, next_logits
from workbench.tuning import adapters, plans


@pytest.fixture
def pair(tiny):
    """A model, and one with all weights moved."""
    return moved(tiny), tiny


def moved(model):
    network = copy.deepcopy(model.network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return replace(model, network=network)


def bits(model):
    return {name: weight.clone() for name, weight in model.network.state_dict().items()}


def margins(model, requests):
    """Of each first token, of a pass of its own."""
    values = []
    for one in requests:
        asked = answers_after(model, [one.fact.question], [one.target])
        token = asked.encoded.input_ids[0, asked.start[0]]
        logits = next_logits(model, encode(model, [one.fact.question]))[0]
        rivals = torch.cat([logits[:token], logits[token + 1 :]])
        values.append((logits[token] - rivals.max()).item())
    return pytest.approx(values, abs=1e-4)


def part(table, *key):
    by, name, layer = key
    rows = table[(table.by == by) & (table.part == name) & (table.layer == layer)]
    assert len(rows)
    return rows.margin.tolist()


def test_everything_set_back_is_the_other_model_and_nothing_this_one(pair, requests):
    tuned, untuned = pair
    before = bits(tuned), bits(untuned)
    table = wb.traces.patched(tuned, untuned, requests, [1])
    theirs, ours = margins(untuned, requests), margins(tuned, requests)
    last = tuned.n_blocks - 1
    assert part(table, "weights", "nothing", -1) == ours
    assert part(table, "weights", "everything", -1) == theirs
    assert part(table, "weights", "everything", -1) != ours
    # behind the last block stand the norm and the head, which are this model's
    with torch.no_grad():
        for name in patching.parts(tuned)["norms", -1] + patching.parts(tuned)["embeddings", -1]:
            if not name.startswith(f"{tuned.architecture.blocks}."):
                weight = tuned.network.get_parameter(name)
                weight.copy_(untuned.network.get_parameter(name))
    mixed = wb.traces.patched(tuned, untuned, requests, by=["end"])
    assert part(mixed, "end", "block", last) == theirs
    assert set(mixed.by) == {"end"}
    for model, kept in zip(pair, before, strict=True):
        same = [torch.equal(weight, kept[name]) for name, weight in bits(model).items()]
        assert all(same) if model is untuned else not all(same)


def test_a_patch_leaves_both_models_bit_for_bit(pair, requests):
    before = [bits(model) for model in pair]
    wb.traces.patched(*pair, requests[:2], [1])
    for model, kept in zip(pair, before, strict=True):
        assert all(torch.equal(weight, kept[name]) for name, weight in bits(model).items())
        assert not any(module._forward_hooks for module in model.network.modules())


def test_the_parts_are_all_weights_once(tiny):
    parts = patching.parts(tiny, [1])
    names = [name for name, _ in tiny.network.named_parameters()]
    kinds = [parts[kind, -1] for kind in ("attention", "mlps", "norms", "embeddings")]
    assert sorted(name for kind in kinds for name in kind) == sorted(names)
    assert parts["edited matrices", -1] == [f"{tiny.down_projection_name(1)}.weight"]
    inside = [name for layer in range(3) for name in parts["block", layer]]
    assert inside == [name for name in names if name.startswith(f"{tiny.architecture.blocks}.")]
    patterns = [r"attn", r"mlp", r"\bln_|norm", r"wte|wpe|embed"]
    for names, pattern in zip(kinds, patterns, strict=True):
        assert all(re.search(pattern, name) for name in names)


@pytest.mark.parametrize("kind", ["mlp", "attention", "block"])
def test_an_output_is_put_in_at_one_token_alone(pair, requests, kind):
    """By hand: of one text the module's output, changed at one place."""
    tuned, untuned = pair
    one = requests[0]
    table = wb.traces.patched(tuned, untuned, [one, requests[1]])
    encoded = encode(tuned, [one.fact.question])
    end = encoded.token_at(0, subject_end(one.fact.prompt, one.fact.subject))
    module = {"mlp": lambda model: model.mlp(1), "attention": lambda model: model.attention(1)}
    module["block"] = lambda model: model.blocks[1]
    kept = []

    def first(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    def keep(_, args, output):
        kept.append(first(output).clone())

    def put(_, args, output):
        first(output)[0, end] = kept[0][0, end]  # in place

    with module[kind](untuned).register_forward_hook(keep), torch.no_grad():
        next_logits(untuned, encoded)
    with module[kind](tuned).register_forward_hook(put), torch.no_grad():
        expected = margins(tuned, [one])
    assert part(table, "subject", kind, 1)[:1] == expected
    assert part(table, "subject", kind, 1)[:1] != margins(tuned, [one])


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_families_with_other_shapes_are_patched_alike(new_tiny, requests, family):
    """OPT's MLP has one dimension for texts and tokens; GPT-NeoX names norms after attention."""
    untuned = new_tiny(family)
    tuned = moved(untuned)
    table = wb.traces.patched(tuned, untuned, requests[:2])
    assert part(table, "weights", "everything", -1) == margins(untuned, requests[:2])
    assert table.margin.notna().all()
    kinds = {kind for kind, layer in patching.parts(untuned) if layer == -1}
    assert {"attention", "mlps", "norms", "embeddings"} <= kinds


def test_one_model_is_not_two(tiny, requests, one_line):
    with pytest.raises(BadInput) as error:
        wb.traces.patched(tiny, tiny, requests)
    assert "load one twice" in one_line(error)


def test_a_margin_is_the_lead_over_the_largest_other_logit():
    logits = torch.tensor([[1.0, 3.0, 2.5], [1.0, 3.0, 2.5]])
    leads = patching.margins(logits, torch.tensor([1, 2]))
    assert leads.tolist() == [0.5, -0.5]


def test_what_no_patch_can_be_read_from_is_refused(pair, requests, one_line):
    patched = wb.traces.patched
    for by in (["weight"], "weights", []):
        with pytest.raises(BadInput) as error:
            patched(*pair, requests[:2], by=by)
        assert "weights, subject, end" in one_line(error)
    with pytest.raises(BadInput, match="no facts"):
        patched(*pair, [])
    with pytest.raises(BadInput, match="layer 99"):
        patched(*pair, requests[:2], [99])
    for model in pair:
        begun = replace(model, start="none")
        models = [begun if one is model else one for one in pair]
        with pytest.raises(BadInput) as error:
            patched(*models, requests[:2])
        assert "start" in one_line(error)


def test_an_edit_in_context_of_one_of_them_is_refused(pair, requests, one_line):
    tuned, untuned = (replace(model, in_force=[]) for model in pair)
    told = wb.edit(untuned, requests[:2], "incontext")
    with wb.applied(untuned, told), pytest.raises(BadInput) as error:
        wb.traces.patched(tuned, untuned, requests[:2])
    assert "in context" in one_line(error)


def test_both_with_an_adapter_are_refused(pair, requests, one_line):
    with ExitStack() as stack:
        for model in pair:
            plan = plans.resolve(model, "all")
            stack.enter_context(adapters.attached(model, plan, "lora", 2, 4, 0.0))
        with pytest.raises(BadInput) as error:
            wb.traces.patched(*pair, requests[:2])
    assert "adapter" in one_line(error)


def test_without_edited_layers_there_is_no_row_of_them(pair, requests):
    table = wb.traces.patched(*pair, requests[:2], by=["weights"])
    assert "edited matrices" not in set(table.part)
