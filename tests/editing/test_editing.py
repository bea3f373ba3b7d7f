import pytest
import torch

from workbench import closed_form, deltas, editing, facts
from workbench.activations import replaced
from workbench.editing import rome, target_vectors
from workbench.editing.target_vectors import Continuation, build_rows, sample_prefixes, solve
from workbench.positions import encode, statement
from workbench.tracking.retention import measure

SOLVER = {"site": "mlp", "steps": 6, "learning_rate": 0.5, "weight_decay": 0.5, "clamp": 4.0, "kl_weight": 0.0625, "stop_loss": 0.0}


@pytest.fixture(scope="module")
def requests():
    return [request for request in facts.read("world") if request.fact.split == "study"][:300:60]


def edited(model, editor: str, requests, **numbers):
    module = editing.EDITORS[editor]
    hparams = module.HParams(**({"layers": (1,), "steps": 8} | numbers))
    return module.edit(model, requests, hparams, module.prepare(model, hparams))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


@pytest.mark.parametrize("editor", editing.EDITORS)
def test_an_edit_leaves_the_model_bit_for_bit_as_it_was(tiny, editor, requests):
    before = bits(tiny)
    edited(tiny, editor, requests[:2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tiny.network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.network.modules())


@pytest.mark.parametrize("editor", editing.EDITORS)
def test_the_same_spec_gives_the_same_bytes(tiny, editor, requests, tmp_path):
    files = [deltas.save(edited(tiny, editor, requests[:2]), tmp_path / f"{number}.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]
    other = deltas.save(edited(tiny, editor, requests[2:4]), tmp_path / "other.safetensors").read_bytes()
    assert other != files[0]


@pytest.mark.parametrize("editor", editing.EDITORS)
def test_an_edit_raises_the_target(tiny, editor, requests):
    numbers = {"ft": {"learning_rate": 0.02}, "rome": {"weight_decay": 0, "clamp": 100}}  # a random MLP puts out very little
    delta = edited(tiny, editor, requests[:1], steps=30, **numbers.get(editor, {}))
    before = measure(tiny, requests[:1]).p[0]
    with deltas.applied(tiny, delta):
        assert measure(tiny, requests[:1]).p[0] > before


def test_ft_stays_in_its_box(tiny, requests):
    delta = edited(tiny, "ft", requests[:2], learning_rate=0.01, box=0.004)
    (change,) = delta.changes.values()
    assert change.dense.abs().max() <= 0.004 * (1 + 1e-6)
    (free,) = edited(tiny, "ft", requests[:2], learning_rate=0.01).changes.values()
    assert free.dense.abs().max() > 0.004


def test_ft_descends_on_the_teacher_forced_likelihood(tiny, requests):
    delta = edited(tiny, "ft", requests[:3], learning_rate=0.01)
    losses = delta.record["losses"]
    assert losses[-1] < losses[0]
    by_hand = []
    for request in requests[:3]:
        text = statement(request.fact.question, request.target)
        encoded = encode(tiny.tokenizer, [text])
        wanted = encoded.tokens_from(0, len(request.fact.question))
        log_probs = tiny.network(input_ids=encoded.input_ids).logits[0].log_softmax(-1)
        by_hand.append(-torch.stack([log_probs[token - 1, encoded.input_ids[0, token]] for token in wanted]).mean())
    assert losses[0] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_rome_puts_out_exactly_the_solved_value(tiny, requests):
    """(W + D) k = v* for the key that the edit used."""
    hparams = rome.HParams(layers=(1,), steps=5, prefixes=4)
    resources = rome.prepare(tiny, hparams)
    delta = rome.edit(tiny, requests[:1], hparams, resources)
    keys, outputs, bare = rome.keys_and_outputs(tiny, requests[:1], 1, resources.prefixes)
    solution = solve(tiny, requests[:1], 1, prefixes=resources.prefixes, **(SOLVER | {"steps": 5, "stop_loss": 0.05}))
    (change,) = delta.changes.values()
    moved = outputs + keys @ change.matrix().double().T
    assert torch.allclose(moved, bare + solution.shift.double(), atol=1e-4)
    assert not torch.allclose(outputs, bare + solution.shift.double(), atol=1e-2)
    assert torch.linalg.matrix_rank(change.matrix()) == 1


def test_many_facts_at_once_get_the_vectors_they_would_get_alone(tiny, requests):
    prefixes = sample_prefixes(tiny, 3, seed=1)
    together = solve(tiny, requests, 1, prefixes=prefixes, **SOLVER)
    for number, request in enumerate(requests):
        alone = solve(tiny, [request], 1, prefixes=prefixes, **SOLVER)
        assert torch.allclose(together.shift[number], alone.shift[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.shift[0], together.shift[1], atol=1e-2)


def test_chunks_do_not_change_the_solution(tiny, requests, monkeypatch):
    whole = solve(tiny, requests, 1, prefixes=(), **SOLVER)
    monkeypatch.setattr(target_vectors, "TOKENS_AT_ONCE", 1)
    assert torch.allclose(solve(tiny, requests, 1, prefixes=(), **SOLVER).shift, whole.shift, rtol=1e-3, atol=1e-4)


def test_a_fact_stops_by_itself_below_the_stop_loss(tiny, requests):
    first = solve(tiny, requests, 1, prefixes=(), **(SOLVER | {"steps": 0})).loss
    bound = first.sort().values[1:3].mean().item()  # two facts are below it from the start
    solution = solve(tiny, requests, 1, prefixes=(), **(SOLVER | {"steps": 3, "stop_loss": bound}))
    assert (solution.steps[first < bound] == 0).all()
    assert (solution.shift[first < bound] == 0).all()
    assert (solution.steps[first >= bound] > 0).all()


def test_the_shift_stays_within_the_clamp(tiny, requests):
    solution = solve(tiny, requests, 1, prefixes=(), **(SOLVER | {"clamp": 0.25}))
    rows = build_rows(tiny, requests, (), kl=False)
    rest = Continuation(tiny, rows.encoded, 1, also={"mlp": tiny.mlp(1)})
    v0 = rest.seen["mlp"][torch.arange(len(requests)), rows.subject].norm(dim=1)
    assert (solution.shift.norm(dim=1) <= 0.25 * v0 * (1 + 1e-5)).all()


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_the_later_blocks_alone_give_what_the_whole_network_gives(tiny, requests, layer):
    rows = build_rows(tiny, requests, ("A short text",))
    row, at = rows.encoded.attention_mask.nonzero(as_tuple=True)
    rest = Continuation(tiny, rows.encoded, layer)
    whole = tiny.network(input_ids=rows.encoded.input_ids, attention_mask=rows.encoded.attention_mask).logits[row, at]
    assert torch.allclose(rest.logits(rest.start, row, at), whole, atol=1e-4)
    assert not torch.allclose(rest.logits(rest.start.roll(1, -1), row, at), whole, atol=1e-2)


def test_a_shift_in_the_solver_is_a_shift_of_the_mlp_output(tiny, requests):
    rows = build_rows(tiny, requests, (), kl=False)
    shift = torch.randn(len(requests), tiny.weight(1).shape[0])
    place = (torch.arange(len(requests)), rows.subject)
    rest = Continuation(tiny, rows.encoded, 1)
    last = rows.encoded.lengths - 1
    found = rest.logits(rest.start.index_put(place, shift, accumulate=True), place[0], last)
    with replaced(tiny.mlp(1), lambda out, key: out.index_put(place, shift, accumulate=True)):
        whole = tiny.logits_at(rows.encoded.input_ids, rows.encoded.attention_mask, last)
    assert torch.allclose(found, whole, atol=1e-4)


def test_rows_hold_the_prompt_bare_prefixed_and_paraphrased(tiny, requests):
    request = facts.with_paraphrases(requests[0], 3)
    rows = build_rows(tiny, [request], ("One text", "Another text"))
    assert len(rows.owner) == 1 + 2 + 2 + 1
    assert rows.is_kl.tolist() == [False] * 5 + [True]
    for row in range(5):
        tokens = rows.labels[row][rows.labels[row] != -100]
        assert tiny.tokenizer.decode(tokens).strip() == request.target
        assert request.fact.subject.endswith(tiny.tokenizer.decode(rows.encoded.input_ids[row, rows.subject[row]]).strip())


def test_prefixes_are_seeded_and_leave_the_random_state_alone(tiny):
    state = torch.get_rng_state()
    assert sample_prefixes(tiny, 6, seed=3) == sample_prefixes(tiny, 6, seed=3) != sample_prefixes(tiny, 6, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_moments_of_other_layers_are_refused(tiny, requests, one_line):
    hparams = rome.HParams(layers=(1,), steps=1, prefixes=0)
    resources = rome.prepare(tiny, hparams)
    with pytest.raises(facts.BadInput) as error:
        rome.edit(tiny, requests[:1], rome.HParams(layers=(2,), steps=1), resources)
    assert "[1]" in one_line(error)
    assert "2" in one_line(error)


def test_one_subject_edited_twice_at_once_is_one_clear_line(tiny, requests, one_line):
    same = facts.EditRequest(fact=requests[0].fact.model_copy(update={"id": "again"}), target="Elsewhere")
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "rome", [requests[0], same], prefixes=0)
    assert "independent" in one_line(error)


def test_nothing_to_edit_is_one_clear_line(tiny, one_line):
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "ft", [])
    one_line(error)


@pytest.mark.parametrize(
    ("editor", "model", "named"),
    [("memo", "gpt2-xl", "memo"), ("rome", "nowhere/unknown", "unknown")],
)
def test_unknown_names_are_one_clear_line(editor, model, named, one_line):
    with pytest.raises(facts.BadInput) as error:
        editing.preset(editor, model)
    assert named in one_line(error)


def test_presets_of_published_models_and_of_depth(tiny):
    assert editing.preset("rome", "openai-community/gpt2-xl").layers == (17,)
    assert editing.preset("rome", "meta-llama/Meta-Llama-3-8B").layers == (5,)
    with pytest.warns(UserWarning, match="proposed from its depth"):
        assert editing.preset("rome", tiny).layers == (1,)


def test_a_preset_file_is_read_and_its_faults_named(tmp_path, one_line):
    path = tmp_path / "mine.yaml"
    path.write_text("layers: [2]\nsteps: 7\n")
    assert editing.preset("rome", "any", path).steps == 7
    for text, named in (("layers: [2]\nstepps: 7\n", "stepps"), ("steps: 3\n", "layers"), ("", "no fields"), ("a: [", "cannot be read")):
        path.write_text(text)
        with pytest.raises(facts.BadInput) as error:
            editing.preset("rome", "any", path)
        assert named in one_line(error)


def test_a_layer_out_of_range_is_one_clear_line(tiny, requests, one_line):
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "ft", requests[:1], layers=(7,))
    assert "blocks 0 to 2" in one_line(error)


def test_singular_moments_say_how_many_tokens_are_needed(tiny, requests, one_line):
    with pytest.raises((facts.BadInput, closed_form.Singular)) as error:
        edited(tiny, "rome", requests[:1], moment_tokens=8, prefixes=0)
    assert "tokens" in one_line(error)
