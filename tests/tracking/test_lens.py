import warnings

import pytest
import torch
import torch.nn.functional as F

from workbench import deltas, editing, explorer, facts, moments, plots, study
from workbench.activations import hidden, recorded, replaced
from workbench.cache import tensor_sum
from workbench.deltas import Change, WeightDelta
from workbench.editing import memit
from workbench.facts import BadInput
from workbench.positions import encode, front
from workbench.tracking import lens
from workbench.tracking.categories import first_tokens
from workbench.tracking.probes import Probe, questions

FITTED = ("tuned", "jacobian")
PROMPT = "The capital of Spain is"


def check_lens(model, prompt: str) -> None:
    encoded = encode(model, [prompt])
    with torch.no_grad():
        output = model.network(input_ids=encoded.input_ids, output_hidden_states=True)
        states = [
            state[0, -1] for state in output.hidden_states[1:]
        ]  # the last entry is already normed
        oracle = [
            model.unembedding(model.final_norm(state)).softmax(0) for state in states[:-1]
        ] + [model.unembedding(states[-1]).softmax(0)]
    found = lens.trajectory(model, prompt)
    assert found.probs.shape == (model.n_blocks, len(oracle[0]))
    for layer, row in enumerate(oracle):
        assert torch.allclose(found.probs[layer], row, atol=1e-6), layer
    assert torch.allclose(found.probs[-1], output.logits[0, -1].softmax(0), atol=1e-6)
    assert not torch.allclose(found.probs[0], oracle[1], atol=1e-6)  # an off-by-one would show
    assert len(found.tokens) == encoded.input_ids.shape[1]


def test_every_layer_is_the_final_norm_and_head_of_its_hidden_state(tiny):
    check_lens(tiny, facts.read("world")[3].fact.question)


def test_every_layer_of_a_world_model(world):
    check_lens(world, facts.read("world")[3].fact.question)


def test_a_look_at_many_prompts_reads_what_each_gives_alone(tiny):
    requests = facts.read("world")[:200:40]
    tokens = Probe(tiny, questions([], requests)).look(-1).tokens
    for request in requests:
        alone = lens.trajectory(tiny, request.fact.question).probs.topk(10).values.flatten()
        together = tokens[tokens.fact_id == request.fact.id].probability
        assert torch.allclose(torch.tensor(together.to_numpy()).float(), alone, atol=1e-4)


# --- Lenses that are fitted


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the test's own; quick fits."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(lens, "STEPS", 3)
    monkeypatch.setattr(lens, "ROWS", {"tuned": 4, "jacobian": 2})
    return tmp_path / "lenses"


@pytest.fixture
def edit(tiny):
    change = torch.randn(tiny.weight(0).shape, generator=torch.Generator().manual_seed(0))
    return WeightDelta.of(tiny, changes={tiny.down_projection_name(0): Change(dense=change)})


@pytest.fixture
def never_fitted(monkeypatch):
    def fit(model, rows):
        raise AssertionError("fitted")

    return lambda: [monkeypatch.setattr(lens, name, fit) for name in ("_tuned", "_jacobian")]


def losses(model, rows, through) -> torch.Tensor:
    """KL(the model's own || the lens's) by block, in nats a token."""
    length = rows.shape[1] - 1
    with torch.no_grad(), recorded(dict(enumerate(model.blocks))) as states:
        own = model.network(input_ids=rows).logits[:, 1:].flatten(0, 1).log_softmax(-1)
        row = torch.arange(len(rows)).repeat_interleave(length)
        at = torch.arange(1, length + 1).repeat(len(rows))
        log_probs = lens.read(model, states, row, at, through).log_softmax(-1)
    kl = F.kl_div(log_probs, own[:, None].expand_as(log_probs), log_target=True, reduction="none")
    return kl.sum(-1).mean(0)


def test_the_tuned_lens_is_nearer_to_the_model_on_text_that_it_was_not_fitted_on(base, monkeypatch):
    monkeypatch.setattr(lens, "STEPS", 25)
    width = 127
    rows = moments.token_rows(base, "world", width * (lens.ROWS["tuned"] + 4))[-4:]
    logit = losses(base, rows, lens.LOGIT)
    tuned = losses(base, rows, lens.fitted(base, "tuned"))
    assert (tuned[:6] < 0.9 * logit[:6]).all()
    assert tuned[-1] == logit[-1]
    assert logit[-1] < 1e-5


def test_the_tuned_lens_goes_down_the_kl_from_the_models_own_to_the_lenss(
    tiny, cached, monkeypatch
):
    """Adam's first step is against the sign of the gradient; of rows of one token nothing is left
    to chance.
    """
    rows = torch.tensor([[0, 17], [0, 302], [0, 45], [0, 711]])
    monkeypatch.setattr(moments, "token_rows", lambda model, corpus, tokens: rows)
    monkeypatch.setattr(lens, "STEPS", 1)
    with torch.no_grad():
        tiny.final_norm.weight.mul_(10)  # far apart, so that it matters which way the KL goes
        with recorded(dict(enumerate(tiny.blocks))) as states:
            own = tiny.network(input_ids=rows).logits[:, 1].softmax(-1)
    through = lens.fitted(tiny, "tuned")
    for layer in range(tiny.n_blocks - 1):
        h = hidden(states[layer])[:, 1]
        matrix = torch.eye(h.shape[-1], requires_grad=True)
        log_probs = tiny.unembedding(tiny.final_norm(h @ matrix.T)).log_softmax(-1)
        ways = {"to the lens": own * (own.log() - log_probs)}
        ways["from the lens"] = log_probs.exp() * (log_probs - own.log())
        agree = {}
        for way, terms in ways.items():
            (gradient,) = torch.autograd.grad(terms.sum(), matrix, retain_graph=True)
            steep = gradient.abs() > 1e-4
            agree[way] = (through.matrix[layer].sign() == -gradient.sign())[steep].float().mean()
        assert agree["to the lens"] == 1 > agree["from the lens"]


def test_another_model_kind_or_number_of_steps_is_another_lens(
    tiny_gpt2, tiny_llama, cached, monkeypatch
):
    monkeypatch.setattr(lens, "ROWS", dict.fromkeys(FITTED, 2))
    for model in (tiny_gpt2, tiny_llama):
        for kind in FITTED:
            lens.fitted(model, kind)
    assert len([*cached.iterdir()]) == 4
    monkeypatch.setattr(lens, "STEPS", 4)
    lens.fitted(tiny_gpt2, "tuned")
    assert len([*cached.iterdir()]) == 5


def plain_jacobian(model, rows, layer) -> torch.Tensor:
    """The mean over rows and positions of the summed effect on the last block's hidden states, from
    every entry of torch's own Jacobian.
    """
    effects = []
    for row in rows:

        def last(state, row=row):
            with (
                replaced(model.blocks[layer], lambda out, _: state),
                recorded({"last": model.blocks[-1]}) as after,
            ):
                model.network(input_ids=row[None], use_cache=False)
            return hidden(after["last"])[0]

        with torch.no_grad(), recorded({"block": model.blocks[layer]}) as states:
            model.network(input_ids=row[None], use_cache=False)
        whole = torch.autograd.functional.jacobian(last, states["block"])[:, :, 0]
        for start in range(len(front(model)), len(row)):  # (to, d, from, d)
            effects.append(sum(whole[end, :, start] for end in range(start, len(row))))
            assert not whole[:start, :, start].any()  # nothing before it
    return torch.stack(effects).mean(0)


def test_the_jacobian_lens_is_the_mean_effect_on_this_and_later_positions(
    tiny, cached, monkeypatch
):
    rows = torch.tensor([[0, 17, 302, 45, 9], [0, 711, 5, 88, 400]])
    monkeypatch.setattr(moments, "token_rows", lambda model, corpus, tokens: rows)
    through = lens.fitted(tiny, "jacobian")
    identity = torch.eye(through.matrix.shape[-1])
    for layer in range(tiny.n_blocks - 1):
        jacobian = plain_jacobian(tiny, rows, layer)
        assert torch.allclose(through.matrix[layer] + identity, jacobian, atol=1e-4), layer
        assert not torch.allclose(jacobian, identity, atol=1e-2)
    assert not through.matrix[-1].any()
    assert not through.bias.any()


@pytest.mark.parametrize("kind", FITTED)
def test_a_lens_moves_every_block_but_the_last_as_its_formula_says(tiny, cached, kind):
    through = lens.fitted(tiny, kind)
    encoded = encode(tiny, [PROMPT])
    with torch.no_grad(), recorded(dict(enumerate(tiny.blocks))) as states:
        own = tiny.network(input_ids=encoded.input_ids).logits[0, -1]
        found = lens.trajectory(tiny, PROMPT, through).probs
        for layer in range(tiny.n_blocks - 1):
            h = hidden(states[layer])[0, -1]
            moved = h + through.matrix[layer] @ h + through.bias[layer]
            row = tiny.unembedding(tiny.final_norm(moved)).softmax(-1)
            assert torch.allclose(found[layer], row, atol=1e-6), layer
    plain = lens.trajectory(tiny, PROMPT).probs
    assert torch.equal(found[-1], plain[-1])
    assert torch.allclose(found[-1], own.softmax(-1), atol=1e-6)
    assert not torch.allclose(found[0], plain[0], atol=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_fitting_leaves_the_model_and_the_random_numbers_as_they_were(tiny, cached, kind):
    before = tensor_sum(tiny.network.state_dict())
    state = torch.get_rng_state()
    first = lens.fitted(tiny, kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert tensor_sum(tiny.network.state_dict()) == before
    assert not any(weight.requires_grad for weight in tiny.network.parameters())
    assert all(weight.grad is None for weight in tiny.network.parameters())
    assert not first.matrix.requires_grad
    for path in cached.iterdir():
        path.unlink()
    again = lens.fitted(tiny, kind)
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.bias, again.bias)


@pytest.mark.parametrize("kind", FITTED)
def test_it_is_fitted_once_and_anew_when_damaged(tiny, cached, kind, never_fitted):
    first = lens.fitted(tiny, kind)
    (path,) = cached.iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="made anew"):
        again = lens.fitted(tiny, kind)
    assert torch.equal(first.matrix, again.matrix)
    never_fitted()
    with warnings.catch_warnings(action="error"):
        assert torch.equal(lens.fitted(tiny, kind).matrix, first.matrix)
    with pytest.raises(AssertionError, match="fitted"):
        lens.fitted(tiny, kind, "world")  # another corpus, another lens


@pytest.mark.parametrize("kind", FITTED)
def test_it_is_fitted_on_the_unedited_model_alone_and_read_on_the_edited_one(
    tiny, cached, edit, kind, one_line
):
    with deltas.applied(tiny, edit), pytest.raises(BadInput) as error:
        lens.fitted(tiny, kind)
    assert one_line(error).startswith(f"{kind} lens: ")
    assert "holds an edit" in one_line(error)
    through = lens.fitted(tiny, kind)
    before = lens.trajectory(tiny, PROMPT, through).probs
    with deltas.applied(tiny, edit):
        again = lens.fitted(tiny, kind)
        after = lens.trajectory(tiny, PROMPT, again).probs
    assert torch.equal(again.matrix, through.matrix)
    assert not torch.allclose(after, before)


def test_a_lens_of_another_model_is_refused(cached, tiny_gpt2, tiny_llama, one_line):
    through = lens.fitted(tiny_gpt2, "tuned")
    with pytest.raises(BadInput) as error:
        lens.trajectory(tiny_llama, PROMPT, through)
    assert "was fitted for the weights" in one_line(error)


def test_an_unknown_lens_is_refused(tiny_gpt2, one_line):
    with pytest.raises(BadInput) as error:
        lens.fitted(tiny_gpt2, "prism")
    assert "prism" in one_line(error)


def test_numbers_that_are_not_finite_are_refused_and_not_kept(tiny_gpt2, cached, one_line):
    with torch.no_grad():
        tiny_gpt2.weight(1)[0, 0] = torch.inf
    with pytest.raises(BadInput) as error:
        lens.fitted(tiny_gpt2, "tuned")
    assert "NaN or infinite" in one_line(error)
    assert not list(cached.iterdir())


def test_the_lenses_are_compared_block_by_block(tiny, cached):
    table = lens.disagreement(tiny, PROMPT)
    assert list(table) == [*lens.KINDS, "agree"]
    for kind in lens.KINDS:
        alone = lens.table(tiny, lens.trajectory(tiny, PROMPT, lens.fitted(tiny, kind)))
        assert table[kind].tolist() == alone.likeliest.tolist()
    assert table.agree.tolist() == [len(set(row)) == 1 for row in table[[*lens.KINDS]].values]
    assert table.agree.iloc[-1]


def test_a_study_looks_through_the_lens_that_its_spec_names(
    tiny_gpt2, parameters, cached, tmp_path
):
    logit, tuned = (
        study.run(study.Spec(**parameters, lens=kind), out=tmp_path) for kind in ("logit", "tuned")
    )
    last = tuned.lens.layer.max()
    same = logit.lens.probability.round(5) == tuned.lens.probability.round(5)
    assert same[logit.lens.layer == last].all()
    assert not same[logit.lens.layer < last].all()
    question = facts.read(parameters["facts"])[0].fact.question
    through = lens.trajectory(tiny_gpt2, question, lens.fitted(tiny_gpt2, "tuned")).probs
    tokens = tuned.tokens[tuned.tokens.step == -1]
    found = torch.tensor(tokens.probability.to_numpy()).view(tiny_gpt2.n_blocks, -1).float()
    assert torch.allclose(found, through.topk(10).values, atol=1e-5)
    for run, named in ((logit, False), (tuned, True)):
        figure = plots.lens_heatmap(run).figure
        assert figure.get_suptitle().endswith("; tuned lens") == named
        header, _ = explorer._described(run)
        assert header["caption"].endswith("; tuned lens") == named


def test_looks_through_another_lens_than_the_specs_are_refused(
    tiny_gpt2, parameters, cached, one_line
):
    spec = study.Spec(**parameters, lens="tuned").resolved()
    chosen = study.choose(spec, tiny_gpt2)
    edit = study.make_edit(spec, tiny_gpt2, chosen.edited, *study.prepare(spec, tiny_gpt2, chosen))
    probe = Probe(tiny_gpt2, questions(chosen.edited, []), chosen.related)
    task = study.make_task(spec, tiny_gpt2, chosen)
    with pytest.raises(BadInput) as error:
        study.tune_and_probe(spec, tiny_gpt2, edit, task, probe, study.Recorder())
    assert "the probe looks through the logit lens, the Spec says 'tuned'" in one_line(error)


@pytest.mark.slow
def test_where_the_subject_ends_the_jacobian_lens_alone_sees_an_edit(base):
    """After MEMIT's blocks the logit and the tuned lens have the edited object lower than before
    the edit, towards the bottom of the vocabulary.
    """
    requests = [request for request in facts.read("world") if request.fact.split == "study"]
    requests = requests[:300:15]
    hparams = editing.preset("memit", base)
    edit = memit.edit(base, requests, hparams, memit.prepare(base, hparams))
    block = max(hparams.layers) - 1
    lenses = {kind: lens.fitted(base, kind) for kind in lens.KINDS}

    @torch.no_grad()
    def ranks() -> dict[str, list[int]]:
        found = {kind: [] for kind in lenses}
        for request in requests:
            question, subject = request.fact.question, request.fact.subject
            encoded = encode(base, [question])
            end = encoded.token_at(0, question.index(subject) + len(subject) - 1)
            answers = [question], [request.fact.object], [request.target], [()]
            token = first_tokens(base, *answers).edited[0]
            with recorded(dict(enumerate(base.blocks))) as states:
                base.network(input_ids=encoded.input_ids, use_cache=False)
            for kind, through in lenses.items():
                places = torch.tensor([0]), torch.tensor([end])
                logits = lens.read(base, states, *places, through)[0, block]
                found[kind].append(int((logits > logits[token]).sum()) + 1)
        return found

    before = ranks()
    with deltas.applied(base, edit):
        after = ranks()
    pairs = {kind: list(zip(before[kind], after[kind], strict=True)) for kind in lenses}
    print(f"\nranks before and after MEMIT, after block {block}: {pairs}")
    better = {kind: sum(new < old for old, new in pairs[kind]) for kind in lenses}
    assert better["logit"] == better["tuned"] == 0
    assert better["jacobian"] > len(requests) / 2
