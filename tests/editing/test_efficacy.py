"""What an edit does on the world models: study facts only, numbers chosen on the tuning facts (tests/benchmarks/choose_layers.py)."""

import random

import pandas as pd
import pytest

from workbench import deltas, editing, facts, study
from workbench.editing import target_vectors
from workbench.tracking.retention import measure_prompts

N, WATCHED = 40, 60
BARS = {"ft": {"efficacy": 0.95, "held_out": 0.85}, "rome": {"efficacy": 0.90, "held_out": 0.80}}


def known(model, split: str, n: int) -> list:
    pool = [request for request in facts.read("world") if request.fact.split == split]
    random.Random(1).shuffle(pool)
    good = study.known_table(model, pool[: 2 * n]).known
    return [request for request, is_known in zip(pool, good, strict=False) if is_known][:n]


def one_edit_a_model(model, editor: str, edited, watched) -> pd.DataFrame:
    hparams = editing.preset(editor, model)
    resources = editing.EDITORS[editor].prepare(model, hparams)
    rows = []
    for request in edited:
        others = [other for other in watched if other.fact.subject != request.fact.subject]
        prompts = [request.fact.question, *request.held_out, *(other.fact.question for other in others)]
        answers = [request.target] * 3 + [other.fact.object for other in others]
        with deltas.applied(model, editing.EDITORS[editor].edit(model, [request], hparams, resources)):
            kept = measure_prompts(model, prompts, answers).retained
        rows.append({"efficacy": kept[0], "held_out": kept[1:3].mean(), "intrinsic": kept[3:].mean()})
    return pd.DataFrame(rows)


@pytest.mark.slow
@pytest.mark.parametrize("editor", BARS)
def test_edits_take_generalise_and_spare_the_rest(world, editor):
    requests = known(world, "study", N + WATCHED)
    found = one_edit_a_model(world, editor, requests[:N], requests[N:]).mean()
    print(world.name, editor, found.round(3).to_dict())
    assert found.efficacy >= BARS[editor]["efficacy"]
    assert found.held_out >= BARS[editor]["held_out"]
    assert found.intrinsic >= 0.95


@pytest.mark.slow
def test_the_target_vector_itself_makes_the_target_likely(world):
    hparams = editing.preset("rome", world)
    prefixes = target_vectors.sample_prefixes(world, hparams.prefixes, seed=0)
    numbers = hparams.model_dump(include={"steps", "learning_rate", "weight_decay", "clamp", "kl_weight", "stop_loss"})
    solution = target_vectors.solve(world, known(world, "tuning", 60), hparams.layers[0], site="mlp", prefixes=prefixes, **numbers)
    share = (solution.p_target > 0.5).float().mean().item()
    print(world.name, f"p(target) > .5 for {share:.3f} of {len(solution.p_target)} tuning facts")
    assert share >= 0.95


def test_an_edit_is_on_top_right_after_it(world):
    request = next(request for request in facts.read("world") if request.fact.id == "developer:windows-mobile-6-5")
    for editor in editing.EDITORS:
        found = one_edit_a_model(world, editor, [request], [])
        assert found.efficacy[0], editor
