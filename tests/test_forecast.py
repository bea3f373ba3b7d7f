"""What an experiment costs goes up with what it does, and is said before it runs."""

import pytest

from workbench import forecast, models
from workbench.spec import Spec


@pytest.fixture(scope="module")
def outline():
    return models.outline("world-gpt2")


def costs(outline, **fields):
    return forecast.operations(Spec(**fields).resolved(), outline)


def test_the_tuning_costs_six_operations_a_weight_and_token(outline):
    one = costs(outline, max_steps=100, eval_every=100, n_valid=1, batch_size=4)
    two = costs(outline, max_steps=200, eval_every=200, n_valid=1, batch_size=4)
    weights = sum(weight.numel() for weight in outline.network.parameters())
    assert two["tuning"] - one["tuning"] == 100 * 4 * 128 * 6 * weights


def test_every_phase_goes_up_with_what_it_does(outline):
    usual = costs(outline)
    assert all(work > 0 for work in usual.values())
    assert costs(outline, n_edited=20)["editing"] == 2 * usual["editing"]
    assert costs(outline, n_edited=20)["tuning"] == 2 * usual["tuning"]  # two copies
    assert costs(outline, n_edited=20, edits_per_model=20)["tuning"] == usual["tuning"]
    assert costs(outline, fact="capital:spain")["editing"] == usual["editing"] / 10
    assert costs(outline, n_intrinsic=40)["looking"] > usual["looking"]
    assert costs(outline, editor="incontext")["editing"] == 0
    assert costs(outline, protect="replay")["tuning"] > 1.5 * usual["tuning"]


def test_a_lens_is_fitted_for_a_price(outline):
    usual = costs(outline)
    for kind in ("tuned", "jacobian"):
        fitting = costs(outline, lens=kind)["looking"] - usual["looking"]
        assert 1e11 < fitting < 1e13  # a minute or so, at the speed of one core


def test_minutes_are_of_all_experiments_together_each_on_its_model(outline, new_tiny, monkeypatch):
    monkeypatch.setattr(forecast, "speed", lambda model, device: 1e9)
    spec, tiny = Spec().resolved(), new_tiny("gpt2")
    one, two = (forecast.minutes([spec] * times, [outline] * times) for times in (1, 2))
    assert (two == 2 * one).all()
    assert one.sum() > 0
    small = forecast.minutes([spec], [tiny])
    assert small.sum() < one.sum()
    for pair in ([tiny, outline], [outline, tiny]):
        assert forecast.minutes([spec] * 2, pair).tolist() == pytest.approx((small + one).tolist())


def test_the_speed_is_the_one_of_the_device_that_is_named(outline, monkeypatch):
    monkeypatch.setattr(
        forecast, "speed", lambda model, device: {"cpu": 1e9, "cuda:1": 1e12}[device]
    )
    slow, fast = (
        forecast.minutes([Spec(device=name).resolved()], [outline]).sum()
        for name in ("cpu", "cuda:1")
    )
    assert slow == pytest.approx(1000 * fast)


def test_an_editor_that_learns_costs_its_lessons_from_the_first_edited_block_on(outline):
    def learnt(meta_steps, layers):
        hparams = {"meta_steps": meta_steps, "facts_at_once": 10, "layers": layers}
        return costs(outline, editor="malmen", hparams=hparams)["editing"]

    weights = sum(weight.numel() for weight in outline.network.parameters())
    lessons = 100 * 3 * 10 * forecast.PROMPT
    assert learnt(100, [6, 11]) == pytest.approx(lessons * 4 * weights * 6 / 12)
    assert learnt(200, [6, 11]) == 2 * learnt(100, [6, 11])


def test_the_speed_is_the_products_operations_by_its_seconds(outline, monkeypatch):
    seconds = {}

    class Timer(forecast.Timer):
        def blocked_autorange(self, **fields):
            measured = super().blocked_autorange(**fields)
            seconds["product"] = measured.mean
            return measured

    monkeypatch.setattr(forecast, "Timer", Timer)
    width = outline.unembedding.weight.shape[1]
    one = 2 * 512 * width * 4 * width
    assert forecast.speed(outline) == pytest.approx(one / seconds["product"])
