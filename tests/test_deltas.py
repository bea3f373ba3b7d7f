"""A delta changes exactly what it says, for exactly as long as the `with` lasts, and survives the
way to disk.
"""

import os
import platform
import random
import resource
import stat
from contextlib import contextmanager, suppress

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from workbench import deltas, models
from workbench.deltas import Change, WeightDelta
from workbench.facts import BadInput

IDS = torch.tensor([[0, 5, 17, 400, 33]])


@pytest.fixture(params=["float32", "bfloat16"])
def model(request, tiny_folders, architecture):
    return models.load(tiny_folders[architecture], device="cpu", dtype=request.param)


@pytest.fixture(params=["gpt2", "llama"])
def architecture(request):
    return request.param


def low_rank(model, layer=1, rank=2, seed=0, size=1.0) -> Change:
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = model.weight(layer).shape
    return Change(
        left=size * torch.randn(d_out, rank, generator=generator),
        right=torch.randn(d_in, rank, generator=generator),
    )


def dense(model, layer=1, seed=0, size=1.0) -> Change:
    return Change(
        dense=size
        * torch.randn(model.weight(layer).shape, generator=torch.Generator().manual_seed(seed))
    )


def delta_of(model, changes=None, **more) -> WeightDelta:
    """Of changes by layer; without any, a low-rank change of block 1 and a dense one of block 2."""
    changes = changes or {1: low_rank(model), 2: dense(model, 2)}
    named = {model.down_projection_name(layer): change for layer, change in changes.items()}
    return WeightDelta(
        **(
            {
                "changes": named,
                "model": model.name,
                "revision": "",
                "fingerprint": model.fingerprint,
            }
            | more
        )
    )


def tensors(model) -> dict:
    return dict(model.network.named_parameters()) | dict(model.network.named_buffers())


def copied(model) -> dict:
    return {name: tensor.clone() for name, tensor in tensors(model).items()}


def differing(model, before: dict) -> set:
    """Names of the tensors that are not bit for bit as before."""
    return {
        name
        for name, tensor in tensors(model).items()
        if tensor.dtype != before[name].dtype or not torch.equal(tensor, before[name])
    }


def train(model, steps=3):
    """A few real steps on every weight."""
    model.network.train().requires_grad_(True)
    adam = torch.optim.AdamW(model.network.parameters(), lr=0.01)
    for _ in range(steps):
        model.network(input_ids=IDS, labels=IDS).loss.backward()
        adam.step()
        adam.zero_grad()


# inside


def rounded_once(weight, D):
    return (weight.float() + D.float()).to(weight.dtype)


@pytest.mark.parametrize("kind", [low_rank, dense])
def test_inside_the_weight_is_w_plus_d(model, kind):
    change = kind(model)
    before = model.weight(1).clone()
    D = change.dense if kind is dense else change.left @ change.right.T
    with deltas.applied(model, delta_of(model, {1: change})) as edited:
        assert edited is model
        assert torch.equal(model.weight(1), rounded_once(before, D))
        assert not torch.equal(model.weight(1), rounded_once(before, -D))
        assert not torch.equal(model.weight(1), rounded_once(before, D + 0.01))


def test_the_sum_is_rounded_once(tiny_folders, architecture):
    model = models.load(tiny_folders[architecture], device="cpu", dtype="bfloat16")
    change = dense(model, size=0.01)
    before = model.weight(1).clone()
    with deltas.applied(model, delta_of(model, {1: change})):
        assert torch.equal(model.weight(1), (before.double() + change.dense.double()).bfloat16())
        assert not torch.equal(model.weight(1), before + change.dense.bfloat16())


def test_the_product_of_low_precision_factors_is_not_rounded_to_them(tiny):
    change = low_rank(tiny)
    change = Change(left=change.left.bfloat16(), right=change.right.bfloat16())
    exact = change.left.double() @ change.right.double().T
    before = tiny.weight(1).clone()
    with deltas.applied(tiny, delta_of(tiny, {1: change})):
        torch.testing.assert_close(
            tiny.weight(1), (before.double() + exact).float(), rtol=0, atol=1e-5
        )


def test_a_square_weight_is_changed_the_right_way_round(new_tiny, architecture):
    model = new_tiny(architecture, intermediate_size=32, n_inner=32)
    change = dense(model)
    before = model.weight(1).clone()
    with deltas.applied(model, delta_of(model, {1: change})):
        assert torch.equal(model.weight(1), before + change.dense)
        assert not torch.equal(model.weight(1), before + change.dense.T)


def test_inside_nothing_but_the_named_weights_differs(model):
    before = copied(model)
    delta = delta_of(model)
    with deltas.applied(model, delta):
        assert differing(model, before) == {f"{name}.weight" for name in delta.changes}


def test_the_edit_moves_the_output_by_d_times_the_key(tiny):
    key, change = torch.randn(1, 4, 48), low_rank(tiny)
    plain = tiny.down_projection(1)(key)
    with deltas.applied(tiny, delta_of(tiny, {1: change})):
        edited = tiny.down_projection(1)(key)
    torch.testing.assert_close(
        edited - plain, key @ (change.left @ change.right.T).T, rtol=1e-4, atol=1e-4
    )
    assert (edited - plain).abs().max() > 1


def test_write_changes_the_weight_for_good(tiny):
    before, change = tiny.weight(1).clone(), dense(tiny)
    deltas.write(tiny, delta_of(tiny, {1: change}))
    assert torch.equal(tiny.weight(1), before + change.dense)


# afterwards


class Stop(Exception):
    pass


def leave_in_peace(model):
    pass


def raise_an_error(model):
    raise Stop


def interrupt(model):
    raise KeyboardInterrupt


def train_inside_preserved(model):
    with deltas.preserved(model.network):
        train(model)
    model.network.requires_grad_(False)


def spoil_the_edited_weight(model):
    model.weight(1).fill_(float("nan"))


@pytest.mark.parametrize(
    "body",
    [leave_in_peace, raise_an_error, interrupt, train_inside_preserved, spoil_the_edited_weight],
)
def test_afterwards_every_tensor_is_bit_for_bit_as_before(model, body):
    before = copied(model)
    with suppress(Stop, KeyboardInterrupt), deltas.applied(model, delta_of(model)):
        assert differing(model, before)
        body(model)
    assert differing(model, before) == set()


def test_an_exception_goes_on_to_the_caller(tiny):
    with pytest.raises(Stop), deltas.applied(tiny, delta_of(tiny)):
        raise Stop


@pytest.mark.parametrize("outer", [True, False], ids=["around the edit", "of named weights"])
def test_training_the_edited_model_inside_preserved_leaves_no_trace(model, outer):
    before = copied(model)
    names = None if outer else [name for name, _ in model.network.named_parameters()]
    with deltas.preserved(model.network, names), deltas.applied(model, delta_of(model)):
        edited = copied(model)
        train(model)
        assert len(differing(model, edited)) > 20
    assert differing(model, before) == set()


def test_preserved_puts_back_only_the_parameters_that_are_named(tiny):
    before = copied(tiny)
    names = [f"{tiny.down_projection_name(0)}.weight", f"{tiny.down_projection_name(1)}.weight"]
    with deltas.preserved(tiny.network, names[:1]):
        tiny.weight(0).add_(1)
        tiny.weight(1).add_(1)
    assert differing(tiny, before) == {names[1]}


def test_preserved_puts_back_buffers(tiny_llama):
    before = copied(tiny_llama)
    buffers = dict(tiny_llama.network.named_buffers())
    assert buffers
    with deltas.preserved(tiny_llama.network):
        for buffer in buffers.values():
            buffer.add_(1)
        assert differing(tiny_llama, before) == set(buffers)
    assert differing(tiny_llama, before) == set()


def negative(model, delta):
    (change,) = delta.changes.values()
    return delta_of(model, {1: Change(left=-change.left, right=change.right)})


def test_a_thousand_edits_leave_no_trace(model):
    before = copied(model)
    some = [delta_of(model, {1: low_rank(model, seed=seed, size=0.1)}) for seed in range(10)]
    for number in range(1000):
        with deltas.applied(model, some[number % 10]):
            pass
    assert differing(model, before) == set()
    for delta in some:  # adding and subtracting would have left one
        deltas.write(model, delta)
        deltas.write(model, negative(model, delta))
    assert differing(model, before) == {f"{model.down_projection_name(1)}.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_edits_of_a_world_model_leave_no_trace(world, dtype):
    model = models.load(world.name, device="cpu", dtype=dtype)
    before = copied(model)
    some = [
        delta_of(
            model, {layer: low_rank(model, seed=layer, size=0.1) for layer in (number, number + 1)}
        )
        for number in range(10)
    ]
    for number in range(1000):
        with suppress(ZeroDivisionError), deltas.applied(model, some[number % 10]):
            if number % 3 == 0:
                raise ZeroDivisionError
    assert differing(model, before) == set()


def test_edits_can_be_nested(tiny):
    before = copied(tiny)
    first, second = (
        delta_of(tiny, {1: low_rank(tiny, seed=1)}),
        delta_of(tiny, {1: low_rank(tiny, seed=2)}),
    )
    with deltas.applied(tiny, first):
        outer = copied(tiny)
        with deltas.applied(tiny, second):
            assert differing(tiny, outer)
        assert differing(tiny, outer) == set()
    assert differing(tiny, before) == set()


def register_all(module, log, name):
    """One hook of each kind, all of which write into the log."""
    return [
        module.register_forward_hook(lambda *given: log.append(f"{name} forward")),
        module.register_forward_pre_hook(lambda *given: log.append(f"{name} forward pre")),
        module.register_forward_hook(
            lambda *given: log.append(f"{name} forward kwargs {len(given)}"), with_kwargs=True
        ),
        module.register_forward_pre_hook(
            lambda *given: log.append(f"{name} forward pre kwargs {len(given)}"), with_kwargs=True
        ),
        module.register_full_backward_hook(lambda *given: log.append(f"{name} backward")),
        module.register_full_backward_pre_hook(lambda *given: log.append(f"{name} backward pre")),
    ]


def called(model, log) -> set:
    log.clear()
    states = torch.randn(1, 3, 32, requires_grad=True)
    model.mlp(1)(states).sum().backward()
    return set(log)


@pytest.mark.parametrize("body", [leave_in_peace, raise_an_error])
def test_hooks_added_inside_are_gone_and_earlier_ones_still_there(tiny, body):
    log = []
    early = register_all(tiny.mlp(1), log, "early")
    expected = called(tiny, log)
    assert len(expected) == 6
    with suppress(Stop), deltas.applied(tiny, delta_of(tiny)):
        register_all(tiny.mlp(1), log, "late")
        for handle in early[::2] + early[3:]:
            handle.remove()
        assert called(tiny, log) != expected
        body(tiny)
    assert called(tiny, log) == expected
    for handle in early:
        handle.remove()


def test_requires_grad_and_mode_are_put_back(tiny):
    tiny.down_projection(0).weight.requires_grad_(True)
    tiny.mlp(2).train()
    flags = {name: parameter.requires_grad for name, parameter in tiny.network.named_parameters()}
    modes = {name: module.training for name, module in tiny.network.named_modules()}
    assert set(flags.values()) == set(modes.values()) == {True, False}
    with deltas.applied(tiny, delta_of(tiny)):
        tiny.network.train()
        tiny.mlp(2).eval()
        for parameter in tiny.network.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    assert {
        name: parameter.requires_grad for name, parameter in tiny.network.named_parameters()
    } == flags
    assert {name: module.training for name, module in tiny.network.named_modules()} == modes


def test_gradients_are_set_aside_and_put_back(tiny):
    parameter = tiny.down_projection(1).weight.requires_grad_(True)
    tiny.network(input_ids=IDS, labels=IDS).loss.backward()
    grad, values = parameter.grad, parameter.grad.clone()
    assert values.abs().max() > 0
    with deltas.preserved(tiny.network):
        assert parameter.grad is None
        train(tiny)
        tiny.network(input_ids=IDS, labels=IDS).loss.backward()
    assert parameter.grad is grad
    assert torch.equal(grad, values)
    assert tiny.final_norm.weight.grad is None


def drawn() -> tuple:
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_random_state_is_put_back(tiny):
    transformers.set_seed(7)
    expected = drawn()
    transformers.set_seed(7)
    with deltas.applied(tiny, delta_of(tiny)):
        inside = [drawn() for _ in range(3)]
    assert inside[0] == expected
    assert drawn() == expected
    assert drawn() != expected


def test_parameters_added_inside_do_not_keep_the_rest_from_being_put_back(tiny):
    before, logits = copied(tiny), tiny.network(input_ids=IDS).logits
    with deltas.preserved(tiny.network):
        tiny.network.adapter = nn.Linear(2, 2)
        tiny.mlp(1).register_forward_hook(lambda module, args, output: output * 0)
        train(tiny)
    del tiny.network.adapter
    assert differing(tiny, before) == set()
    assert not tiny.network.training
    assert torch.equal(tiny.network(input_ids=IDS).logits, logits)


# what is refused


def test_another_models_delta_is_refused(tiny_gpt2, tiny_llama, one_line):
    before = copied(tiny_llama)
    delta = delta_of(tiny_gpt2)
    with pytest.raises(BadInput) as error, deltas.applied(tiny_llama, delta):
        raise AssertionError("the body must not run")
    message = one_line(error)
    assert tiny_gpt2.fingerprint in message
    assert tiny_llama.fingerprint in message
    assert differing(tiny_llama, before) == set()


@pytest.mark.parametrize("part", ["left", "right", "dense"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_change_that_is_not_finite_is_refused(one_line, part, value):
    good = (
        {"dense": torch.ones(3, 4)}
        if part == "dense"
        else {"left": torch.ones(3, 2), "right": torch.ones(4, 2)}
    )
    Change(**good)
    good[part][1, 1] = value
    with pytest.raises(BadInput) as error:
        Change(**good)
    assert f"NaN or infinite numbers ({part})" in one_line(error)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"left": (3, 2)},
        {"right": (4, 2)},
        {"left": (3, 2), "right": (4, 2), "dense": (3, 4)},
        {"left": (3, 2), "dense": (3, 4)},
        {"right": (4, 2), "dense": (3, 4)},
        {"left": (3, 2), "right": (4, 3)},
        {"left": (3,), "right": (4,)},
        {"dense": (12,)},
    ],
    ids=str,
)
def test_parts_that_make_no_change_are_refused(one_line, parts):
    with pytest.raises(ValueError, match=r"left|dense") as error:
        Change(**{name: torch.ones(shape) for name, shape in parts.items()})
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [Change(dense=torch.ones(3, 4)), Change(left=torch.ones(32, 1), right=torch.ones(32, 1))],
)
def test_a_change_of_another_shape_is_refused(tiny, one_line, change):
    before = copied(tiny)
    delta = delta_of(tiny, {0: dense(tiny, 0), 1: change})
    with pytest.raises(BadInput) as error, deltas.applied(tiny, delta):
        raise AssertionError("the body must not run")
    message = one_line(error)
    assert tiny.down_projection_name(1) in message
    assert "48" in message
    assert differing(tiny, before) == set()


def test_a_write_that_is_refused_has_written_nothing(tiny, one_line):
    before = copied(tiny)
    with pytest.raises(BadInput) as error:
        deltas.write(tiny, delta_of(tiny, {0: dense(tiny, 0), 1: Change(dense=torch.ones(3, 4))}))
    one_line(error)
    assert differing(tiny, before) == set()


def test_an_overflow_of_the_models_dtype_is_refused(tiny_folders, architecture, one_line):
    change = Change(dense=torch.full((32, 48), 3.4e38))  # finite in float32, beyond bfloat16
    wide, narrow = (
        models.load(tiny_folders[architecture], device="cpu", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    with deltas.applied(wide, delta_of(wide, {1: change})):
        assert torch.isfinite(wide.weight(1)).all()
    before = copied(narrow)
    with pytest.raises(BadInput) as error, deltas.applied(narrow, delta_of(narrow, {1: change})):
        raise AssertionError("the body must not run")
    message = one_line(error)
    assert "overflows torch.bfloat16" in message
    assert narrow.down_projection_name(1) in message
    assert differing(narrow, before) == set()


# sums


def test_a_sum_of_deltas_is_both_changes(tiny):
    first = delta_of(
        tiny,
        {0: low_rank(tiny, 0, seed=1), 1: low_rank(tiny, 1, seed=2), 2: dense(tiny, 2, seed=3)},
        record={"editor": "rome"},
    )
    second = delta_of(
        tiny,
        {1: low_rank(tiny, 1, rank=3, seed=4), 2: low_rank(tiny, 2, seed=5)},
        record={"editor": "ft"},
    )
    both = first + second
    for layer in range(3):
        name = tiny.down_projection_name(layer)
        parts = [delta.changes[name].matrix() for delta in (first, second) if name in delta.changes]
        torch.testing.assert_close(both.changes[name].matrix(), sum(parts), rtol=0, atol=1e-5)
        assert both.norms()[name] == pytest.approx(sum(parts).norm().item(), rel=1e-5)
    assert both.changes[tiny.down_projection_name(1)].left.shape == (32, 5)
    assert both.record == {"parts": [{"editor": "rome"}, {"editor": "ft"}]}
    assert (both + first).record == {
        "parts": [{"editor": "rome"}, {"editor": "ft"}, {"editor": "rome"}]
    }
    assert first.record == {"editor": "rome"}


def test_deltas_of_two_models_cannot_be_added(tiny_gpt2, tiny_llama, one_line):
    with pytest.raises(BadInput) as error:
        delta_of(tiny_gpt2) + delta_of(tiny_llama)
    message = one_line(error)
    assert tiny_gpt2.fingerprint in message
    assert tiny_llama.fingerprint in message


# on disk


RECORD = {
    "editor": "rome",
    "hparams": {"layers": [1], "clamp": 4.0},
    "prefixes": ['Þe "old" one\n'],
    "p_target": [0.99, 1e-9],
}


def test_a_delta_comes_back_from_disk_as_it_was(tiny, tmp_path):
    wide = Change(
        left=torch.randn(32, 2, dtype=torch.float64), right=torch.randn(48, 2, dtype=torch.float64)
    )
    delta = delta_of(
        tiny, {0: wide, 1: low_rank(tiny), 2: dense(tiny, 2)}, record=RECORD, revision="early"
    )
    path = deltas.save(delta, str(tmp_path / "new" / "0.safetensors"))  # it makes its folder
    back = deltas.load(str(path))
    assert list(path.parent.iterdir()) == [path]
    assert (back.model, back.revision, back.fingerprint, back.record) == (
        delta.model,
        "early",
        delta.fingerprint,
        RECORD,
    )
    assert set(back.changes) == set(delta.changes)
    for name, change in delta.changes.items():
        assert set(back.changes[name].tensors()) == set(change.tensors())
        for part, tensor in change.tensors().items():
            assert torch.equal(back.changes[name].tensors()[part], tensor)
            assert back.changes[name].tensors()[part].dtype == tensor.dtype


def test_a_delta_from_disk_makes_the_same_edit(tiny, tmp_path):
    delta = delta_of(tiny)
    with deltas.applied(tiny, delta):
        expected = tiny.network(input_ids=IDS).logits
    with deltas.applied(tiny, deltas.load(deltas.save(delta, tmp_path / "0.safetensors"))):
        assert torch.equal(tiny.network(input_ids=IDS).logits, expected)
    assert not torch.equal(tiny.network(input_ids=IDS).logits, expected)


def test_saving_again_takes_the_old_ones_place(tiny, tmp_path):
    for size in (1.0, 2.0):
        deltas.save(delta_of(tiny, {1: dense(tiny, size=size)}), tmp_path / "0.safetensors")
    (change,) = deltas.load(tmp_path / "0.safetensors").changes.values()
    assert torch.equal(change.dense, dense(tiny, size=2.0).dense)


CANNOT_WRITE = (OSError, safetensors.SafetensorError, BadInput)


@contextmanager
def files_of_at_most(size):
    """As if the disk were full: writing more into one file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tiny, tmp_path):
    path = deltas.save(delta_of(tiny), tmp_path / "0.safetensors")
    before = path.read_bytes()
    with files_of_at_most(1000), pytest.raises(CANNOT_WRITE):
        deltas.save(delta_of(tiny, {1: dense(tiny, size=3.0)}), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


ABOUT = '{"model": "m", "revision": "", "fingerprint": "f", "record": {}}'


def write_tensors(path, metadata, **named):
    safetensors.torch.save_file(
        {name.replace("_", "|"): tensor for name, tensor in named.items()}, path, metadata=metadata
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("subject,prompt,object\n"),
        lambda path: write_tensors(path, None, x_dense=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"format": "pt"}, x_dense=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"workbench": "{"}, x_dense=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"workbench": "[]"}, x_dense=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"workbench": '{"model": "m"}'}, x_dense=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"workbench": ABOUT}, x_left=torch.ones(2, 2)),
        lambda path: write_tensors(path, {"workbench": ABOUT}, x_bias=torch.ones(2, 2)),
        lambda path: write_tensors(
            path, {"workbench": ABOUT}, x_dense=torch.full((2, 2), float("nan"))
        ),
    ],
    ids=[
        "no file",
        "a folder",
        "an empty file",
        "a text",
        "tensors alone",
        "somebody else's tensors",
        "broken JSON",
        "JSON of another kind",
        "half a record",
        "half a change",
        "an unknown part",
        "NaN",
    ],
)
def test_a_file_that_is_no_delta_is_named(tmp_path, one_line, write):
    path = tmp_path / "0.safetensors"
    write_tensors(path, {"workbench": ABOUT}, x_dense=torch.ones(2, 2))
    deltas.load(path)
    path.unlink()
    write(path)
    with pytest.raises(BadInput) as error:
        deltas.load(path)
    assert str(path) in one_line(error)


# export


def test_an_exported_model_is_an_ordinary_one_with_equal_logits(model, tmp_path):
    delta, before = delta_of(model, record=RECORD), copied(model)
    plain = model.network(input_ids=IDS).logits
    with deltas.applied(model, delta):
        expected = model.network(input_ids=IDS).logits
    folder = deltas.export(model, delta, tmp_path / "new" / "edited")
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert exported.dtype == model.dtype
    rounding = (
        1e-5 if model.dtype == torch.float32 else 0.05
    )  # of GPT-2's GELU, which load computes by one kernel
    assert (
        (exported(input_ids=IDS).logits - expected).abs().max()
        < rounding
        < (expected - plain).abs().max()
    )
    models.fuse(exported)
    assert torch.equal(exported(input_ids=IDS).logits, expected)
    assert not torch.equal(expected, plain)
    assert differing(model, before) == set()
    assert torch.equal(model.network(input_ids=IDS).logits, plain)
    assert [path.name for path in folder.parent.iterdir()] == ["edited"]


def test_an_exported_folder_holds_tokenizer_delta_and_record(tiny, tmp_path):
    folder = deltas.export(tiny, delta_of(tiny, record=RECORD), str(tmp_path / "edited"))
    assert deltas.load(folder / "delta.safetensors").record == RECORD
    assert "rome" in (folder / "edit.json").read_text(encoding="utf-8")
    again = models.load(folder, device="cpu")
    assert again.tokenizer("Moby Dick")["input_ids"] == tiny.tokenizer("Moby Dick")["input_ids"]
    assert again.fingerprint != tiny.fingerprint


def test_an_exported_model_is_readable_by_whoever_the_umask_lets(tiny, tmp_path):
    """safetensors writes files that their owner alone can read."""
    before = os.umask(0o022)
    try:
        folder = deltas.export(tiny, delta_of(tiny), tmp_path / "edited")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_an_export_through_a_link_is_refused(tiny, tmp_path, one_line):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "edited").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput) as error:
        deltas.export(tiny, delta_of(tiny), tmp_path / "edited")
    assert "is a link" in one_line(error)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_export_into_an_empty_folder_is_fine(tiny, tmp_path):
    (tmp_path / "edited").mkdir()
    assert (deltas.export(tiny, delta_of(tiny), tmp_path / "edited") / "config.json").is_file()


def test_an_export_into_a_folder_with_files_is_refused(tiny, tmp_path, one_line):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput) as error:
        deltas.export(tiny, delta_of(tiny), tmp_path)
    message = one_line(error)
    assert str(tmp_path) in message
    assert "not empty" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_export_onto_a_file_is_refused(tiny, tmp_path, one_line):
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(BadInput) as error:
        deltas.export(tiny, delta_of(tiny), tmp_path / "file")
    assert str(tmp_path / "file") in one_line(error)
    assert (tmp_path / "file").read_text() == "years of work"


def test_an_export_that_fails_leaves_no_folder(tiny, tiny_folders, tmp_path):
    before = copied(tiny)
    with pytest.raises(CANNOT_WRITE), files_of_at_most(20_000):
        deltas.export(tiny, delta_of(tiny), tmp_path / "edited")
    assert list(tmp_path.iterdir()) == []
    assert differing(tiny, before) == set()


@pytest.mark.parametrize("left", ["edited.partial", ".edited.PID@HOST.partial"])
def test_what_an_interrupted_export_left_is_not_taken_over(tiny, tmp_path, left):
    left = left.replace("PID@HOST", f"{os.getpid()}@{platform.node()}")
    (tmp_path / left).mkdir()
    (tmp_path / left / "adapter_config.json").write_text("{}")
    folder = deltas.export(tiny, delta_of(tiny), tmp_path / "edited")
    assert (folder / "config.json").is_file()
    assert not (folder / "adapter_config.json").exists()


def test_an_edit_leaves_a_trained_model_bit_for_bit_as_it_was(world):
    before = copied(world)
    with deltas.applied(world, delta_of(world)):
        assert differing(world, before)
    assert differing(world, before) == set()
