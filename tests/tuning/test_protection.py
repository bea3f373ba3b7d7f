"""Each protection does what its formula says, on tiny random models, and nothing else changes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.benchmarks import lasting
from workbench import deltas, facts, models, study
from workbench.activations import recorded
from workbench.facts import BadInput
from workbench.positions import encode
from workbench.spec import Spec, identify
from workbench.tracking.probes import Probe, questions
from workbench.tracking.retention import measure
from workbench.tuning import numbers, plans, tasks
from workbench.tuning.finetune import UNPROTECTED, Protection, Settings, finetune
from workbench.tuning.protection import Held, Span, others
from workbench.tuning.tasks import Data

NUMBERS = {"max_steps": 3, "eval_every": 3, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def text(tiny_folders):
    model = models.load(tiny_folders["llama"], device="cpu")
    return tasks.text_task(model, Data(n_train=24, n_valid=2))


@pytest.fixture(scope="module")
def edited(requests):
    return [one.model_copy(update={"paraphrases": ("{} is said to be",)}) for one in requests[:3]]


def held(model, edited, **fields):
    moving = plans.resolve(model, "all").parameters
    elsewhere = others(model, edited)[:40]
    return Held(model=model, moving=moving, edited=edited, others=elsewhere, **fields)


def learnt(model, task, protection=None, look=None, **fields):
    """The weights after a tuning, which is then taken back."""
    settings = Settings(**(NUMBERS | {"threshold": 0.0} | fields))
    with deltas.preserved(model.network):
        made = protection() if protection else UNPROTECTED
        finetune(model, task, plans.resolve(model, "all"), settings, look, protection=made)
        return {name: one.clone() for name, one in model.network.state_dict().items()}


def same(some: dict, other: dict) -> bool:
    return all(torch.equal(some[name], other[name]) for name in some)


def log_probs(model, prompts):
    """After each prompt, one at a time, without padding."""
    rows = [
        model.network(**encode(model, [prompt]).arguments()).logits[0, -1] for prompt in prompts
    ]
    return torch.stack(rows).float().log_softmax(-1)


def prompts_of(requests):
    templates = [
        (one, prompt) for one in requests for prompt in (one.fact.prompt, *one.paraphrases)
    ]
    return [facts.fill(prompt, one.fact.subject) for one, prompt in templates]


def test_without_a_protection_the_tuning_is_bit_for_bit_that_of_the_plain_trainer(
    tiny, text, monkeypatch
):
    without = learnt(tiny, text)
    nothing = learnt(tiny, text, Protection)
    monkeypatch.setattr("workbench.tuning.finetune._Trainer", transformers.Trainer)
    assert same(without, learnt(tiny, text))
    assert same(without, nothing)


class Sum(Protection):
    """Adds a loss whose gradient is one everywhere."""

    def __init__(self, model, weight=1.0):
        self.model, self.weight = model, weight

    def loss(self):
        return self.weight * sum(one.sum() for one in self.model.network.parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_its_loss_is_added_once_a_step_however_many_parts_a_batch_has(tiny_llama, text, parts):
    how = {"max_steps": 1, "trainer": {"optim": "sgd", "max_grad_norm": 0.0}}
    how["trainer"] |= {"gradient_accumulation_steps": parts, "weight_decay": 0.0}
    without = learnt(tiny_llama, text, **how)
    added = learnt(tiny_llama, text, lambda: Sum(tiny_llama, 0.5), **how)
    for name, _ in tiny_llama.network.named_parameters():
        moved = added[name] - without[name]
        torch.testing.assert_close(moved, torch.full_like(moved, -0.5e-2), atol=1e-5, rtol=0)


def test_replay_is_the_cross_entropy_of_the_new_answers_a_token(tiny, edited):
    protection = numbers.PROTECTIONS["replay"](held(tiny, edited, weight=0.25))
    nats = tokens = 0
    for prompt, request in zip(
        prompts_of(edited), itertools.chain(*([one] * 2 for one in edited)), strict=True
    ):
        ids = encode(tiny, [f"{prompt} {request.target}"]).input_ids
        start = encode(tiny, [prompt]).input_ids.shape[1]
        logits = tiny.network(ids).logits[0, start - 1 : -1]
        nats += F.cross_entropy(logits, ids[0, start:], reduction="sum")
        tokens += ids.shape[1] - start
    torch.testing.assert_close(protection.loss(), 0.25 * nats / tokens)


def test_replay_keeps_what_is_lost_without(tiny_gpt2, text, requests):
    """Two facts that are taught first; the text then takes them back, unless they are replayed."""
    edited = requests[:2]
    replay = numbers.PROTECTIONS["replay"]
    nothing = {"max_steps": 10, "eval_every": 10}
    with deltas.preserved(tiny_gpt2.network):
        teach = replay(held(tiny_gpt2, edited, weight=1.0))
        adam = torch.optim.Adam(tiny_gpt2.network.requires_grad_(True).parameters(), lr=1e-2)
        for _ in range(40):
            adam.zero_grad()
            teach.loss().backward()
            adam.step()
        assert (measure(tiny_gpt2, edited).p > 0.5).all()
        kept = {}
        for name in ("", "replay"):
            make = (lambda: replay(held(tiny_gpt2, edited, weight=1.0))) if name else None
            weights = learnt(tiny_gpt2, text, make, **nothing)
            with deltas.preserved(tiny_gpt2.network):
                tiny_gpt2.network.load_state_dict(weights)
                kept[name] = measure(tiny_gpt2, edited).p
    assert (kept[""] < 0.2).all()
    assert (kept["replay"] > 0.5).all()


def test_only_what_an_editor_may_see_is_replayed(tiny, edited):
    """Wordings that judge and neighbours change nothing."""
    bare = [one.model_copy(update={"held_out": (), "neighbourhood": ()}) for one in edited]
    for name in ("replay", "replay+kl", "replay+span"):
        make = numbers.PROTECTIONS[name]
        losses = [make(held(tiny, some)).loss().item() for some in (edited, bare)]
        assert losses[0] == losses[1]
    other = [one.model_copy(update={"paraphrases": ()}) for one in edited]
    replayed = numbers.PROTECTIONS["replay"]
    assert replayed(held(tiny, other)).loss() != replayed(held(tiny, edited)).loss()


def test_others_is_the_divergence_from_the_model_before_a_prompt(tiny, edited):
    given = held(tiny, edited, weight=2.0)
    given = Held(**(vars(given) | {"others": given.others[:5]}))
    protection = numbers.PROTECTIONS["others"](given)
    prompts = [one.fact.question for one in given.others]
    assert protection.loss().item() == pytest.approx(0, abs=1e-6)
    with deltas.preserved(tiny.network), torch.no_grad():
        before = log_probs(tiny, prompts)
        for weight in tiny.network.parameters():
            weight.mul_(1.2)
        after = log_probs(tiny, prompts)
        divergence = (before.exp() * (before - after)).sum(-1).mean()
        assert divergence > 0.01
        torch.testing.assert_close(protection.loss(), 2 * divergence, rtol=1e-4, atol=0)


def test_replay_and_span_is_the_loss_of_the_one_and_the_correction_of_the_other(tiny, edited):
    both = numbers.PROTECTIONS["replay+span"](held(tiny, edited, weight=0.8))
    replay = numbers.PROTECTIONS["replay"](held(tiny, edited))
    span = numbers.PROTECTIONS["span"](held(tiny, edited, weight=0.8))
    torch.testing.assert_close(both.loss(), replay.loss())
    weights = dict(tiny.network.named_parameters())
    corrected = []
    for protection in (both, span):
        with deltas.preserved(tiny.network), torch.no_grad():
            for weight in weights.values():
                weight.mul_(1.1)
            protection.after_step()
            corrected.append({name: weight.clone() for name, weight in weights.items()})
    assert all(torch.equal(corrected[0][name], corrected[1][name]) for name in weights)


def test_others_is_0_at_the_edited_model_under_dropout_too(new_tiny, edited):
    model = new_tiny("gpt2", resid_pdrop=0.5)
    made = numbers.PROTECTIONS["others"](held(model, edited))
    model.network.train()
    assert made.loss().item() == pytest.approx(0, abs=1e-5)
    assert model.network.training


def test_a_few_of_many_prompts_are_asked_a_step_and_in_time_all(tiny, edited):
    given = held(tiny, edited)
    protection = numbers.PROTECTIONS["others"](given)
    drawn = [protection.drawn(40) for _ in range(30)]
    assert all(len(rows) == len(set(rows)) == 16 for rows in drawn)
    assert set(itertools.chain(*drawn)) == set(range(40))
    again = numbers.PROTECTIONS["others"](given)
    assert [again.drawn(40) for _ in range(30)] == drawn


def test_others_have_other_subjects_and_are_no_neighbours(world, requests):
    measured = [one for one in facts.read("world") if one.fact.split == "study"][:99]
    some = others(world, measured)
    assert len(some) > 50
    assert {one.fact.split for one in some} == {"tuning"}
    subjects = {one.fact.subject.lower() for one in measured}
    assert not subjects & {one.fact.subject.lower() for one in some}
    pool = [one for one in facts.read("world") if one.fact.split == "tuning"]
    asked = pool[0].fact.question
    near = requests[0].model_copy(update={"neighbourhood": ((asked, pool[0].fact.object),)})
    assert asked in {one.fact.question for one in others(world, requests[:1])}
    assert asked not in {one.fact.question for one in others(world, [near])}


def test_the_average_is_what_is_looked_at_and_not_what_is_learnt_from(tiny_llama, text, edited):
    weights = [{name: one.clone() for name, one in tiny_llama.network.state_dict().items()}]
    for steps in (1, 2, 3):
        weights.append(learnt(tiny_llama, text, max_steps=steps, eval_every=1))
    expected = [weights[0]]
    for now in weights[1:]:
        last = expected[-1]
        expected.append({name: 0.6 * last[name] + 0.4 * now[name] for name in now})
    seen = []

    def look(step, epoch):
        seen.append({name: one.clone() for name, one in tiny_llama.network.state_dict().items()})

    average = lasting.Average(held(tiny_llama, edited, weight=0.6))
    with average.read():
        last = learnt(tiny_llama, text, lambda: average, look, eval_every=1)
    assert same(last, weights[-1])
    for some, other in zip(seen, expected, strict=True):
        for name, weight in other.items():
            torch.testing.assert_close(some[name], weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected[-1]["lm_head.weight"], weights[-1]["lm_head.weight"])


def test_the_distance_pulls_each_weight_back_by_twice_its_change(tiny, edited):
    distance = lasting.Distance(held(tiny, edited, weight=0.3))
    with deltas.preserved(tiny.network):
        weight = tiny.network.requires_grad_(True).get_parameter("lm_head.weight")
        change = torch.randn_like(weight)
        with torch.no_grad():
            weight += change
        distance.loss().backward()
        torch.testing.assert_close(weight.grad, 0.3 * 2 * change, rtol=1e-3, atol=1e-5)
        others = [one.grad for one in tiny.network.parameters() if one is not weight]
        assert all((grad == 0).all() for grad in others)


@pytest.mark.parametrize("kind", [Span, lasting.EditsSpan])
def test_out_of_the_span_every_map_answers_as_before_where_it_is_asked(tiny, text, edited, kind):
    """Of all inputs, the whole span; the unprotected tuning answers otherwise."""
    given = held(tiny, edited, weight=1.0)
    given = Held(**(vars(given) | {"others": given.others[:3]}))
    with deltas.preserved(tiny.network):
        protection = kind(given)
    asked = given.others if kind is Span else edited
    encoded = encode(tiny, [one.fact.question for one in asked])
    down = tiny.down_projection(1)
    with recorded({0: down}, inputs=True) as keys, torch.no_grad():
        tiny.network(**encoded.arguments())
    last = keys[0][torch.arange(len(asked)), encoded.lengths - 1]
    before = down(last)
    for name, make in (("", None), ("span", lambda: protection)):
        weights = learnt(tiny, text, make)
        with deltas.preserved(tiny.network), torch.no_grad():
            tiny.network.load_state_dict(weights)
            far = (down(last) - before).norm() / before.norm()
            assert far < 1e-4 if name else far > 1e-2
        moved = tiny.down_projection_name(1) + ".weight"
        assert not torch.equal(weights[moved], tiny.network.state_dict()[moved])


def test_a_span_is_found_where_texts_and_tokens_are_one_dimension(new_tiny, edited):
    """OPT's MLPs take in (n * length, d)."""
    model = new_tiny("opt")
    given = held(model, edited, weight=1.0)
    given = Held(**(vars(given) | {"others": given.others[:3]}))
    with deltas.preserved(model.network):
        protection = Span(given)
    encoded = encode(model, [one.fact.question for one in given.others])
    down = model.down_projection(1)
    with recorded({0: down}, inputs=True) as keys, torch.no_grad():
        model.network(**encoded.arguments())
    last = keys[0].reshape(3, -1, down.in_features)[range(3), encoded.lengths - 1]
    (span,) = [span for weight, _, span in protection.maps if weight is down.weight]
    torch.testing.assert_close(last @ span @ span.T, last, atol=1e-4, rtol=1e-4)


def test_a_share_of_more_than_all_is_refused(tiny, edited, one_line):
    with pytest.raises(BadInput) as error:
        Span(held(tiny, edited, weight=1.5))
    assert "protect_weight 1.5" in one_line(error)


def test_what_is_not_known_is_refused_in_one_line(one_line):
    with pytest.raises(BadInput) as error:
        Spec(protect="replai").resolved()
    assert "replay" in one_line(error)
    with pytest.raises(ValueError, match="protect_weight"):
        Spec(protect="replay", protect_weight=-1)


def test_several_processes_and_checkpoints_are_refused(tiny_gpt2, text, monkeypatch, one_line):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput) as error:
        learnt(tiny_gpt2, text, Protection)
    assert "protect" in one_line(error)


def test_a_run_is_filed_by_its_protection():
    specs = [{}, {"protect": "replay"}, {"protect": "replay", "protect_weight": 0.5}]
    assert len({identify(Spec(**fields)) for fields in specs}) == 3


def test_one_of_your_own_that_is_none_is_refused(base, edited, monkeypatch, one_line):
    monkeypatch.setattr(numbers.PROTECTIONS, "_ready", {})
    numbers.PROTECTIONS.register("mine", lambda given: None)
    plan = plans.resolve(base, "all")
    probe = Probe(base, questions(edited, []))
    with pytest.raises(BadInput) as error:
        study.make_protection(Spec(protect="mine"), base, plan, probe)
    assert "NoneType" in one_line(error)


def test_one_of_your_own_is_made_of_what_the_study_holds_and_recorded(
    parameters, tmp_path, monkeypatch
):
    monkeypatch.setattr(numbers.PROTECTIONS, "_ready", {})
    made = []

    def mine(given):
        made.append(given)
        protection = Sum(given.model, 0.0)
        protection.weight = 0.125
        return protection

    numbers.PROTECTIONS.register("mine", mine)
    few = {"hparams": {"steps": 1}, "n_train": 16, "n_valid": 4}
    spec = Spec(**parameters, **few, protect="mine", protect_weight=0.5, seed=3)
    run = study.run(spec, out=tmp_path)
    assert run.spec["protect"] == "mine"
    assert run.about["tuning"]["protect_weight"] == 0.125
    (given,) = made
    assert (given.weight, given.seed) == (0.5, 3)
    assert [one.fact.id for one in given.edited] == ["0"]
    assert {one.fact.split for one in given.others} == {"tuning"}
    assert set(given.moving) == {name for name, _ in given.model.network.named_parameters()}
