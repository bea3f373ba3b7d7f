import pytest
import torch

from workbench import deltas, facts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import finetune

NUMBERS = {"max_steps": 4, "eval_every": 2, "batch_size": 2, "learning_rate": 1e-3, "threshold": 0.0}


@pytest.fixture(scope="module")
def text(tiny_folders):
    from workbench import models

    return tasks.text_task(models.load(tiny_folders["gpt2"], device="cpu"), n_train=12, n_valid=4, seed=0)


def tuned(model, task, plan="all", probe=None, **numbers):
    with deltas.preserved(model.network):
        history = finetune(model, task, plans.resolve(model, plan, [1]), probe=probe, **(NUMBERS | numbers))
        return history, {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def test_looks_come_before_at_each_evaluation_and_at_the_end(tiny_gpt2, text):
    steps = []
    history, _ = tuned(tiny_gpt2, text, probe=lambda step, epoch: steps.append(step), max_steps=5)
    assert steps == [0, 2, 4, 5] == history.log.step.tolist()
    assert history.ended == "budget"


def test_learning_is_real_and_the_validation_rows_are_apart(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, max_steps=8, learning_rate=5e-3)
    assert history.log.metric.iloc[-1] < history.log.metric.iloc[0]
    train, valid = ({tuple(row) for row in part["input_ids"]} for part in (text.train, text.valid))
    assert not train & valid


def test_the_metric_is_the_mean_loss_of_the_validation_rows(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, max_steps=1)
    ids = torch.tensor(text.valid["input_ids"])
    loss = tiny_gpt2.network(input_ids=ids, labels=ids).loss.item()
    assert history.log.metric[0] == pytest.approx(loss, rel=1e-4)


def test_the_threshold_ends_it_but_never_before_the_first_step(tiny_gpt2, text):
    history, _ = tuned(tiny_gpt2, text, threshold=100.0)
    assert history.ended == "reached"
    assert history.log.step.tolist() == [0, 2]


@pytest.mark.parametrize("plan", ["all", "window:1-1", "after:1", "outside:1-1", "edited", "edited-matrices", "not-edited"])
def test_exactly_the_planned_weights_move(tiny, plan, text):
    before = {name: tensor.clone() for name, tensor in tiny.network.named_parameters()}
    _, after = tuned(tiny, text, plan=plan, max_steps=3)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == set(plans.resolve(tiny, plan, [1]).parameters)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.network.named_parameters())


def test_the_same_seed_learns_the_same_and_another_does_not(tiny_gpt2, text):
    weights = [tuned(tiny_gpt2, text, seed=seed)[1]["transformer.wte.weight"] for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_probe_does_not_change_what_is_learnt(tiny_gpt2, text):
    plain = tuned(tiny_gpt2, text)[1]
    probed = tuned(tiny_gpt2, text, probe=lambda step, epoch: torch.rand(3))[1]
    assert all(torch.equal(tensor, probed[name]) for name, tensor in plain.items())


def test_divergence_is_one_clear_line(tiny_gpt2, text, one_line):
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, learning_rate=1e12, max_steps=6)
    assert "learning_rate" in one_line(error)


@pytest.mark.parametrize(("name", "value"), [("max_steps", 0), ("learning_rate", -1.0), ("batch_size", 0)])
def test_numbers_out_of_range_are_one_clear_line(tiny_gpt2, text, name, value, one_line):
    with pytest.raises(facts.BadInput) as error:
        tuned(tiny_gpt2, text, **{name: value})
    assert name in one_line(error)


def test_own_text_files_and_columns(tiny_gpt2, tmp_path, one_line):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(f'{{"body": "The cat number {n} sat on the mat and looked at the moon."}}' for n in range(400)))
    task = tasks.text_task(tiny_gpt2, n_train=8, n_valid=2, seed=0, data=str(path), columns={"text": "body"})
    assert len(task.train) == 8
    assert all(len(row) == 128 for row in task.train["input_ids"])
    for columns, rows, named in (({}, 8, "column"), ({"text": "body"}, 10_000, "rows")):
        with pytest.raises(facts.BadInput) as error:
            tasks.text_task(tiny_gpt2, n_train=rows, n_valid=2, seed=0, data=str(path), columns=columns)
        assert named in one_line(error)


def test_an_unknown_task_is_one_clear_line(one_line):
    with pytest.raises(facts.BadInput) as error:
        tasks.named("cooking")
    assert "text" in one_line(error)
