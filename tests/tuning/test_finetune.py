"""The tuning: what moves, what is recorded, when it ends, and that it can be killed and resumed."""

import gc
import json
import math
import weakref

import pandas as pd
import pytest
import torch
import tqdm.notebook

from workbench import deltas, facts, models
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import (
    Classifier,
    Settings,
    _arguments,
    collate,
    finetune,
    unmoved_share,
)
from workbench.tuning.tasks import Data

NUMBERS = {
    "max_steps": 4,
    "eval_every": 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "threshold": 0.0,
}


@pytest.fixture(scope="module")
def made(tiny_folders):
    """task -> its rows for the tiny models, which share a tokenizer."""
    model = models.load(tiny_folders["gpt2"], device="cpu")
    return {name: build(model, Data(n_train=24, n_valid=4)) for name, build in tasks.TASKS.items()}


@pytest.fixture(scope="module")
def text(made):
    return made["text"]


def tuned(model, task, plan="all", probe=None, work=None, **numbers):
    with deltas.preserved(model.network):
        history = finetune(
            model,
            task,
            plans.resolve(model, plan, [1]),
            Settings(**(NUMBERS | numbers)),
            probe,
            work,
        )
        return history, {
            name: tensor.clone() for name, tensor in model.network.state_dict().items()
        }


def test_looks_come_before_at_each_evaluation_and_at_the_end(tiny_gpt2, text):
    steps = []
    history, _ = tuned(tiny_gpt2, text, probe=lambda step, epoch: steps.append(step), max_steps=5)
    assert steps == [0, 2, 4, 5] == history.log.step.tolist()
    assert history.ended == "budget"


def test_learning_is_real(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, max_steps=8, learning_rate=5e-3)
    assert history.log.metric.iloc[-1] < history.log.metric.iloc[0]
    assert history.log.learning_rate.iloc[-1] == 5e-3


@pytest.mark.parametrize("name", ["text", "instructions"])
def test_the_loss_is_the_mean_over_the_tokens_read_of_the_validation_rows(tiny_gpt2, made, name):
    history, _ = tuned(tiny_gpt2, made[name], max_steps=1)
    nats = read = 0
    with torch.no_grad():
        for row in made[name].valid:
            logits = tiny_gpt2.network(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            places = [place for place, label in enumerate(row["labels"]) if label != -100]
            nats -= sum(logits[place - 1, row["labels"][place]].item() for place in places)
            read += len(places)
    assert history.log.metric[0] == pytest.approx(nats / read, rel=1e-4)


def test_the_accuracy_is_the_share_of_rows_wholly_right(tiny_gpt2):
    task = tasks.facts_task(tiny_gpt2, Data(n_train=8, n_valid=8, validation="training"))
    history, weights = tuned(
        tiny_gpt2, task, max_steps=60, eval_every=30, learning_rate=1e-2, batch_size=8
    )
    right = 0
    with deltas.preserved(tiny_gpt2.network), torch.no_grad():
        tiny_gpt2.network.load_state_dict(weights)
        for row in task.valid:
            best = tiny_gpt2.network(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
            right += all(
                best[place - 1] == label
                for place, label in enumerate(row["labels"])
                if label != -100
            )
    assert history.log.metric[0] == 0
    assert history.log.metric.iloc[-1] == right / len(task.valid) > 0


def test_a_classifier_reads_the_last_real_token(tiny, made):
    head = Classifier(tiny.network, 2, seed=0)
    batch = collate([made["sentiment"].train[number] for number in range(4)])
    whole = head(**batch)["logits"]
    for number, length in enumerate(batch["attention_mask"].sum(1)):
        states = tiny.network.base_model(
            input_ids=batch["input_ids"][[number], :length]
        ).last_hidden_state
        assert torch.allclose(whole[number], head.head(states[0, -1]), atol=1e-5)


def test_a_classifier_tunes_the_planned_weights_too(tiny, made):
    before = {name: tensor.clone() for name, tensor in tiny.network.named_parameters()}
    _, after = tuned(tiny, made["sentiment"], plan="window:1-1", max_steps=3)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(plans.resolve(tiny, "window:1-1").parameters)


def test_what_nothing_reads_decays_as_adamw_lets_it(tiny_gpt2, made):
    """Positions beyond the longest row have no gradient: each step takes off learning rate times
    decay.
    """
    longest = max(map(len, made["facts"].train["input_ids"]))
    beyond = tiny_gpt2.network.transformer.wpe.weight[longest:].clone()
    assert len(beyond) > 50
    _, after = tuned(tiny_gpt2, made["facts"], max_steps=4, learning_rate=0.1, threshold=2.0)
    moved = after["transformer.wpe.weight"][longest:]
    torch.testing.assert_close(moved, beyond * (1 - 0.1 * 0.01) ** 4, rtol=1e-5, atol=0)


def test_the_threshold_ends_it_but_never_before_the_first_step(tiny_gpt2, text, made):
    history, _ = tuned(tiny_gpt2, text, threshold=100.0)
    assert history.ended == "reached"
    assert history.log.step.tolist() == [0, 2]
    history, _ = tuned(tiny_gpt2, made["facts"], threshold=-1.0)  # of an accuracy, from below
    assert history.ended == "reached"


def test_a_tuning_that_ends_early_leaves_a_full_green_bar_that_says_so(
    tiny_gpt2, text, monkeypatch, tmp_path
):
    bars = []

    class Bar(tqdm.notebook.tqdm):  # as in a notebook, where a bar left short turns red
        def close(self):
            super().close()
            _, bar, words = self.container.children
            bars.append((bar.value, bar.max, bar.bar_style, words.value.replace("\u2007", " ")))

    monkeypatch.setattr("workbench.tuning.finetune.tqdm", Bar)
    monkeypatch.setenv("WORKBENCH_PROGRESS", str(tmp_path / "progress.json"))
    tuned(tiny_gpt2, text, threshold=100.0)
    (value, most, style, words) = bars.pop()
    assert (value, most, style) == (2, 2, "success")
    assert "reached after 2 of 4 steps" in words
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert "reached after 2 of 4 steps" in progress.pop("phase")
    assert progress == {"done": 2, "total": 2}
    tuned(tiny_gpt2, text)
    assert bars.pop()[:2] == (4, 4)


def test_a_threshold_out_of_reach_ends_with_the_budget_and_says_so(tiny_gpt2, made):
    history, _ = tuned(tiny_gpt2, made["facts"], threshold=1.5)
    assert history.ended == "budget"


def test_patience_counts_evaluations_without_a_better_metric(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, max_steps=40, eval_every=1, learning_rate=1e-30, patience=3)
    assert history.ended == "patience"
    assert len(history.log) == 4


def test_a_budget_of_tokens_ends_it(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, max_steps=40, max_tokens=3 * 2 * 128)
    assert history.ended == "budget"
    assert history.log.step.iloc[-1] == 3


def test_a_person_stops_it_within_a_step(tiny_gpt2, text):
    def stop(step, epoch):
        if step == 2:
            raise KeyboardInterrupt

    history, _ = tuned(tiny_gpt2, text, probe=stop, max_steps=10)
    assert history.ended == "stopped"
    assert history.log.step.tolist() == [0, 2]


@pytest.mark.parametrize(
    "plan",
    ["all", "window:1-1", "after:1", "outside:1-1", "edited", "edited-matrices", "not-edited"],
)
def test_exactly_the_planned_weights_move(tiny, plan, text):
    before = {name: tensor.clone() for name, tensor in tiny.network.named_parameters()}
    _, after = tuned(tiny, text, plan=plan, max_steps=3)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(plans.resolve(tiny, plan, [1]).parameters)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tiny.network.named_parameters()
    )


def test_the_log_says_how_far_the_weights_have_moved(tiny, text, monkeypatch):
    before = {name: one.clone() for name, one in tiny.network.state_dict().items()}
    history, after = tuned(tiny, text, plan="after:1")
    squares = [(after[name] - one).double().square().sum() for name, one in before.items()]
    moved = history.log.moved
    assert moved.iloc[0] == 0
    assert moved.iloc[-1] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
    assert moved.is_monotonic_increasing
    monkeypatch.setattr("workbench.tuning.finetune.LARGE", 10)
    assert tuned(tiny, text)[0].log.moved.isna().all()


def test_the_same_seed_learns_the_same_and_another_does_not(tiny_gpt2, text):
    weights = [tuned(tiny_gpt2, text, seed=seed)[1]["transformer.wte.weight"] for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_probe_does_not_change_what_is_learnt(tiny_gpt2, text):
    plain = tuned(tiny_gpt2, text)[1]
    probed = tuned(tiny_gpt2, text, probe=lambda step, epoch: torch.rand(3))[1]
    assert all(torch.equal(tensor, probed[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"lr_scheduler_type": "linear"},
    ],
)
@pytest.mark.parametrize("name", ["text", "sentiment"])
def test_what_the_trainer_can_do_reaches_the_user(tiny_gpt2, made, fields, name):
    history, _ = tuned(
        tiny_gpt2, made[name], trainer=fields, threshold=0.0 if name == "text" else 2.0
    )
    assert len(history.log) == 3
    assert history.log.metric.map(math.isfinite).all()


def test_looks_and_what_comes_after_are_not_in_the_tunings_precision(tiny_gpt2, text):
    def logits():
        with torch.no_grad():
            return tiny_gpt2.network(input_ids=torch.tensor([[1, 2, 3]])).logits

    before, seen = logits(), []
    tuned(
        tiny_gpt2,
        text,
        trainer={"bf16": True},
        learning_rate=1e-30,
        probe=lambda step, epoch: seen.append(logits()),
    )
    assert len(seen) == 3
    assert all(torch.equal(each, before) for each in (*seen, logits()))
    assert "forward" not in vars(tiny_gpt2.network)


def test_each_tuning_of_a_model_has_its_own_precision(tiny_gpt2, text):
    """The second one in mixed precision too, and the one after it not."""
    learnt = []
    for mixed in (True, True, False):
        learnt.append(tuned(tiny_gpt2, text, trainer={"bf16": mixed})[1])
    first, second, plain = learnt
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, plain[name]) for name, weight in first.items())
    assert not {"_original_forward", "_is_accelerate_prepared"} & {*vars(tiny_gpt2.network)}


def test_a_killed_tuning_goes_on_from_its_checkpoint(tiny_gpt2, text, tmp_path):
    saving = {
        "trainer": {"save_strategy": "steps", "save_steps": 2},
        "max_steps": 6,
        "eval_every": 1,
    }
    undisturbed, weights = tuned(tiny_gpt2, text, **saving)

    def killed(step, epoch):
        if step == 3:
            raise SystemExit

    with pytest.raises(SystemExit):
        tuned(tiny_gpt2, text, probe=killed, work=tmp_path, **saving)
    (tmp_path / "checkpoint-4").mkdir()  # half written
    steps = []
    resumed, again = tuned(
        tiny_gpt2, text, probe=lambda step, epoch: steps.append(step), work=tmp_path, **saving
    )
    assert steps == [3, 4, 5, 6]
    pd.testing.assert_frame_equal(resumed.log, undisturbed.log)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_divergence_is_one_clear_line(tiny_gpt2, text, one_line):
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, learning_rate=1e12, max_steps=6)
    assert "learning_rate" in one_line(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("learning_rate", -1.0),
        ("batch_size", 0),
        ("patience", -1),
        ("trainer", {"no_such_field": 1}),
        ("trainer", {"optim": "no"}),
    ],
)
def test_numbers_out_of_range_are_one_clear_line(tiny_gpt2, text, name, value, one_line):
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, **{name: value})
    assert name in one_line(error)


def test_too_little_memory_is_said_before_anything_starts(tiny_gpt2, text, one_line, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100})())
    looked = []
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, probe=lambda step, epoch: looked.append(step))
    assert "GB are free" in one_line(error)
    assert not looked


def test_an_unknown_task_is_one_clear_line(one_line):
    with pytest.raises(facts.BadInput) as error:
        tasks.TASKS["cooking"]
    assert "text" in one_line(error)


def test_a_batch_in_parts_is_one_batch(tiny_llama, text, monkeypatch):
    """On a model without dropout."""
    whole = tuned(tiny_llama, text, batch_size=8, trainer={"optim": "sgd"}, learning_rate=0.1)[1]
    halves = tuned(
        tiny_llama,
        text,
        batch_size=8,
        trainer={"optim": "sgd", "gradient_accumulation_steps": 2},
        learning_rate=0.1,
    )[1]
    monkeypatch.setattr("workbench.tuning.finetune.ROWS_AT_ONCE", 2)
    quarters = tuned(tiny_llama, text, batch_size=8, trainer={"optim": "sgd"}, learning_rate=0.1)[1]
    before = tiny_llama.network.state_dict()
    for name, tensor in whole.items():
        moved = (tensor - before[name]).abs().max()
        assert (tensor - halves[name]).abs().max() <= 1e-3 * moved + 1e-7
        assert (tensor - quarters[name]).abs().max() <= 1e-3 * moved + 1e-7
    assert not torch.equal(whole["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("rows", "named", "parts"),
    [
        (16, {}, 1),
        (40, {}, 4),
        (17, {}, 17),
        (24, {"per_device_train_batch_size": 8}, 3),
        (64, {}, 4),
    ],
)
def test_a_large_batch_is_parted_evenly(tiny_gpt2, rows, named, parts):
    arguments = _arguments(
        tiny_gpt2, Settings(**(NUMBERS | {"batch_size": rows, "trainer": named})), "unused", None
    )
    assert (arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size) == (
        parts,
        rows // parts,
    )


def test_tuning_leaves_the_configuration_as_it_was(tiny, text):
    before = tiny.network.config.to_dict()
    tuned(tiny, text)
    assert tiny.network.config.to_dict() == before


def test_a_batch_that_does_not_divide_is_one_clear_line(tiny_gpt2, text, one_line):
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, batch_size=6, trainer={"gradient_accumulation_steps": 4})
    assert "batch_size 6: does not divide" in one_line(error)


def test_a_large_model_computes_activations_again_and_leaves_no_trace_of_it(
    tiny_gpt2, text, monkeypatch
):
    kept = tuned(tiny_gpt2, text)[1]
    monkeypatch.setattr("workbench.tuning.finetune.LARGE", 0)
    called = []
    enable = type(tiny_gpt2.network).activation_checkpointing_enable
    monkeypatch.setattr(
        type(tiny_gpt2.network),
        "activation_checkpointing_enable",
        lambda *args, **named: called.append(1) or enable(*args, **named),
    )
    again = tuned(tiny_gpt2, text)[1]
    assert called
    assert not tiny_gpt2.network.is_activation_checkpointing
    assert not tiny_gpt2.network.get_input_embeddings()._forward_hooks
    assert all(torch.allclose(tensor, again[name], atol=1e-5) for name, tensor in kept.items())


def test_steps_that_bfloat16_rounds_away_are_said(tiny_folders, made, recwarn):
    """0.1 is a step that most weights of about 0.1 take in bfloat16; 1e-5 is one that hardly any
    takes.
    """
    model = models.load(tiny_folders["gpt2"], device="cpu", dtype="bfloat16")
    plan = plans.resolve(model, "window:1-1")
    assert unmoved_share(model, plan, 0.1) == 0
    share = unmoved_share(model, plan, 1e-5)
    assert share > 0.5
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with pytest.warns(
        UserWarning, match="too large for a step of 1e-05 to count in torch.bfloat16"
    ):
        after = tuned(model, made["text"], plan="window:1-1", learning_rate=1e-5, max_steps=1)[1]
    names = plan.parameters
    still = sum(int((after[name] == before[name]).sum()) for name in names) / sum(
        after[name].numel() for name in names
    )
    assert still >= share
    recwarn.clear()
    tuned(
        models.load(tiny_folders["gpt2"], device="cpu"),
        made["text"],
        plan="window:1-1",
        learning_rate=1e-5,
        max_steps=1,
    )
    assert not [each for each in recwarn if "too large for a step" in str(each.message)]


def test_the_optimiser_is_gone_after_the_tuning_without_the_garbage_collector(
    tiny_gpt2, text, monkeypatch
):
    made, begin = [], torch.optim.AdamW.__init__

    def watched(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(torch.optim.AdamW, "__init__", watched)
    gc.disable()
    try:
        tuned(tiny_gpt2, text, probe=lambda step, epoch: None)
        assert [each() for each in made] == [None]
    finally:
        gc.enable()
