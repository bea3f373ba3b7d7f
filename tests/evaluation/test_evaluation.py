"""Every measure from one call: before and after, means with intervals, measures of one's own."""

import dataclasses
import types

import numpy
import pandas as pd
import pytest
import torch

import workbench as wb
from tests.evaluation.edited import edit_of, loaded
from workbench import deltas, evaluation, models, study
from workbench.facts import BadInput
from workbench.tracking.probes import Probe, questions

COLUMNS = ["measure", "quantity", "fact_id", "before", "after"]


@pytest.fixture
def measures(monkeypatch):
    """The measures, without what a test registers once it is over."""
    monkeypatch.setattr(wb.measures, "_ready", dict(wb.measures._ready))
    return wb.measures


def means(table) -> pd.DataFrame:
    return evaluation.summary(table).set_index(["measure", "quantity"])


def test_every_measure_of_an_edit(model, few):
    edit = edit_of("world-gpt2", "memit", 5)
    weights = {name: one.clone() for name, one in model.network.state_dict().items()}
    table = wb.evaluate(model, few, edit)
    assert list(table.columns) == COLUMNS
    assert tuple(table.measure.unique()) == evaluation.STANDARD
    assert all(one.equal(weights[name]) for name, one in model.network.state_dict().items())
    shown = means(table)
    assert shown.before["counterfact", "score"] == 0
    assert shown.after["counterfact", "score"] > 0.7
    assert shown.after["counterfact", "efficacy"] > shown.before["counterfact", "efficacy"] == 0
    assert shown.before["counterfact", "neighbourhood"] == 1
    assert shown.after["locality", "neighbourhood"] > 0
    assert shown.after["superficiality", "mentioned_new"] > 0
    assert (shown.low <= shown.after).all()
    assert (shown.after <= shown.high).all()
    with edit.applied(model):  # what holds of an edit holds of the finished model
        after = evaluation.asked(model, few)
    again = evaluation.compared(evaluation.asked(model, few), after)
    pd.testing.assert_frame_equal(again, table)


def test_a_model_as_its_own_base_differs_in_nothing(model, few):
    table = wb.evaluate(model, few, base=model, measures=["counterfact", "locality"])
    near = table[table.measure == "locality"]
    assert (near.after == 0).all()
    rest = table[table.measure == "counterfact"]
    assert (rest.before == rest.after).all()


def test_a_model_alone_has_no_before_and_is_not_compared(model, few, one_line):
    table = wb.evaluate(model, few)
    assert set(table.measure) == {*evaluation.STANDARD} - {"locality"}
    assert table.before.isna().all()
    with pytest.raises(BadInput) as error:
        wb.evaluate(model, few, measures=["locality", "counterfact"])
    assert "measures locality: compare two models" in one_line(error)


def test_what_an_edit_did_is_not_asked_of_a_model_that_holds_one(few, one_line):
    """It would be applied twice; and a base that is not the edit's would stand for it."""
    model, edit = loaded("world-gpt2"), edit_of("world-gpt2", "memit", 5)
    for given in ({"edit": edit}, {"base": model}):
        with edit.applied(model), pytest.raises(BadInput) as error:
            wb.evaluate(model, few, measures="retention", **given)
        assert "holds an edit" in one_line(error)
    with pytest.raises(BadInput) as error:
        wb.evaluate(model, few, edit, base=model)
    assert "leave one out" in one_line(error)


def test_a_base_of_another_architecture_is_refused(few, one_line):
    pair = loaded("world-gpt2"), loaded("world-llama")  # of one tokenizer
    with pytest.raises(BadInput) as error:
        wb.evaluate(pair[0], few, base=pair[1], measures="retention")
    assert "not one architecture (llama, 12 blocks" in one_line(error)


def test_a_finished_model_is_compared_with_its_base(tmp_path, few):
    base, edit = loaded("world-gpt2"), edit_of("world-gpt2", "memit", 5)
    finished = models.load(deltas.export(base, edit, tmp_path / "edited"), device="cpu")
    pd.testing.assert_frame_equal(
        wb.evaluate(finished, few, base=base, measures=["counterfact", "locality"]),
        wb.evaluate(base, few, edit, measures=["counterfact", "locality"]),
        rtol=1e-3,  # an edit is rounded once as a whole
        atol=1e-5,
    )


def test_a_model_overwritten_with_noise_scores_badly_on_all(model, few):
    before = evaluation.asked(model, few)
    with deltas.preserved(model.network):
        torch.manual_seed(0)
        for weight in model.network.parameters():
            weight.normal_(std=0.3)
        after = evaluation.asked(model, few)
    shown = means(evaluation.compared(before, after))
    assert shown.after["counterfact", "score"] < 0.8
    for quantity in ("efficacy_exact", "paraphrase_exact", "neighbourhood_exact"):
        assert shown.after["counterfact", quantity] == 0
    assert abs(shown.after["counterfact", "neighbourhood_magnitude"]) < 0.1
    for quantity in ("exact", "contained", "forced"):
        assert shown.after["generation", quantity] == 0
    assert shown.after["locality", "neighbourhood"] > 5
    assert shown.after["locality", "text"] > 5
    assert shown.after["ability", "loss"] > shown.before["ability", "loss"] + 5
    assert (shown.after["superficiality"] == 0).all()


def table_of(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def test_the_score_is_the_harmonic_mean_of_the_three_shares():
    shares = {"efficacy": (1, 0.5), "paraphrase": (0.25, 0.25), "neighbourhood": (1, 1)}
    rows = [
        ("counterfact", quantity, f"{number}", 0.0, value)
        for quantity, values in shares.items()
        for number, value in enumerate(values)
    ]
    shown = means(table_of(rows))
    assert shown.after["counterfact", "score"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.25 + 1))
    assert shown.before["counterfact", "score"] == 0
    without = [row if row[1] != "neighbourhood" else (*row[:3], None, None) for row in rows]
    missing = means(table_of(without))
    assert missing.loc[("counterfact", "score"), ["before", "after"]].isna().all()
    assert ("counterfact", "score") not in means(table_of(rows[:4])).index


def test_the_interval_is_that_of_the_mean_over_facts():
    generator = numpy.random.default_rng(1)
    values = generator.normal(3, 2, 400)
    rows = [("mine", "size", f"{number}", numpy.nan, value) for number, value in enumerate(values)]
    shown = means(table_of(rows)).loc[("mine", "size")]
    width = 1.96 * values.std() / 20
    assert shown.after == pytest.approx(values.mean())
    assert shown.low == pytest.approx(values.mean() - width, abs=0.05)
    assert shown.high == pytest.approx(values.mean() + width, abs=0.05)
    assert shown.n == 400
    assert numpy.isnan(shown.before)


def test_several_prompts_of_a_fact_count_as_one_fact():
    table = pd.DataFrame(
        {"fact_id": ["a", "a", "b"], "quantity": "right", "value": [True, False, 1]}
    )
    assert evaluation.tidy("mine", table).value.tolist() == [0.5, 1]


def test_a_measure_of_ones_own(model, few, measures):
    measures.register(
        "length",
        lambda model, requests: pd.DataFrame(
            {"fact_id": [one.fact.id for one in requests], "words": 3, "said": True, "note": "x"}
        ),
    )
    table = wb.evaluate(model, few, measures=["length", "retention"])
    assert table[table.measure == "length"].quantity.unique().tolist() == ["said", "words"]
    assert (table[table.quantity == "words"].after == 3).all()
    retained = table[table.quantity == "retained"]
    assert retained.fact_id.tolist() == sorted(one.fact.id for one in few)


def drifting() -> types.SimpleNamespace:
    """A measure in two halves: how much the first weight of block 2 moved."""

    def ask(model, requests):
        return [(one.fact.id, model.weight(2).clone()) for one in requests]

    def compare(before, after):
        pairs = zip(before, after, strict=True)
        moved = [(name, (new - old).norm().item()) for (name, old), (_, new) in pairs]
        return pd.DataFrame(moved, columns=["fact_id", "moved"])

    return types.SimpleNamespace(ask=ask, compare=compare)


def test_a_measure_of_ones_own_may_compare(model, few, measures):
    measures.register("drift", drifting())
    edit = edit_of("world-gpt2", "memit", 5)
    table = wb.evaluate(model, few, edit, ["drift"])
    assert table.quantity.unique().tolist() == ["moved"]
    norm = edit.norms()[model.down_projection_name(2)]
    assert table.after.tolist() == pytest.approx([norm] * len(few), rel=1e-3)


def test_other_code_under_the_same_name_is_another_measure(measures):
    prints = []
    for thing in (drifting(), drifting(), types.SimpleNamespace(ask=lambda model, requests: 1)):
        measures.register("drift", thing)
        prints.append(measures.fingerprint("drift"))
    assert prints[0] == prints[1] != prints[2]
    assert "norm" in prints[0]  # the code of both halves


def test_what_is_no_table_of_facts_is_refused(model, few, measures, one_line):
    for thing in (3, pd.DataFrame({"words": [1]})):
        measures.register("wrong", lambda model, requests, thing=thing: thing)
        with pytest.raises(BadInput) as error:
            wb.evaluate(model, few, measures=["wrong"])
        assert "measure wrong: give back a table with fact_id" in one_line(error)


def test_what_cannot_be_measured_is_refused_in_one_line(model, few, one_line):
    apart = few[0].fact.model_copy(update={"id": "a fact of no list"})
    bare = [few[0].model_copy(update={"portability": (), "fact": apart})]
    for requests, names, why in (
        ([], ["counterfact"], "no facts"),
        (few, ["localty"], "'locality'"),
        (bare, ["portability"], "no fact brings what they ask"),
    ):
        with pytest.raises(BadInput) as error:
            wb.evaluate(model, requests, measures=names)
        assert why in one_line(error)


def test_models_that_read_one_text_as_different_tokens_are_refused(model, few, tiny_gpt2, one_line):
    for other, why in (
        (tiny_gpt2, "not one architecture"),
        (dataclasses.replace(model, start="none", in_force=[]), "different tokens"),
    ):
        with pytest.raises(BadInput) as error:
            wb.evaluate(other, few, base=model, measures=["counterfact"])
        assert why in one_line(error)


def test_a_model_that_fits_no_base_is_not_asked_first(model, few, tiny_gpt2, measures):
    asked = []

    def seen(one, requests):
        asked.append(one.name)
        return pd.DataFrame({"fact_id": [requests[0].fact.id], "value": [1.0]})

    measures.register("seen", seen)
    with pytest.raises(BadInput):
        wb.evaluate(tiny_gpt2, few, base=model, measures=["seen"])
    assert asked == [model.name]


def test_ten_of_ten_facts_are_not_certain():
    """The exact interval of ten of ten is .69 to 1 (Clopper and Pearson)."""
    table = pd.DataFrame({"fact_id": range(10), "measure": "mine", "quantity": "said"})
    [row] = evaluation.summary(table.assign(before=0.0, after=1.0)).to_dict("records")
    assert (row["after"], row["low"], row["high"]) == pytest.approx((1, 0.6915, 1), abs=1e-4)
    [row] = evaluation.summary(table.assign(before=0.0, after=3.5)).to_dict("records")
    assert (row["low"], row["high"]) == (3.5, 3.5)  # no share: nothing is known of its bounds
    [row] = evaluation.summary(
        table.assign(measure="locality", quantity="text", before=0.0, after=0.0)
    ).to_dict("records")
    assert (row["low"], row["high"]) == (0, 0)  # nats


def test_a_perfect_score_of_ten_is_not_certain_and_null_is_no_fact():
    tables = [
        pd.DataFrame({"fact_id": range(10), "measure": "counterfact", "quantity": quantity})
        for quantity in evaluation.SCORED
    ]
    table = pd.concat(tables).assign(before=0.0, after=1.0)
    shown = evaluation.summary(table).set_index("quantity")
    assert shown.low["score"] == pytest.approx(0.6915, abs=1e-4)
    table.loc[(table.quantity == "paraphrase") & (table.fact_id > 1), "after"] = None
    assert evaluation.summary(table).set_index("quantity").n["paraphrase"] == 2


# --- in runs


def test_measures_become_tables_of_a_run(tiny_folders, measures, tmp_path):
    measures.register("drift", drifting())
    spec = wb.Spec(
        model=str(tiny_folders["gpt2"]),
        editor="ft",
        layers=(2,),
        hparams={"steps": 3},
        fact="developer:windows-mobile-6-5",
        n_edited=1,
        n_intrinsic=0,
        n_train=4,
        n_valid=2,
        max_steps=2,
        eval_every=1,
        batch_size=2,
        device="cpu",
        measures=("counterfact", "locality", "drift"),
    )
    run = wb.study(spec, out=tmp_path)
    scores = run.table("counterfact")
    assert list(scores.columns) == ["edited_model", "fact_id", "quantity", "value", "step"]
    assert scores.step.unique().tolist() == [-1, 0, 1, 2]
    near = run.table("locality").groupby("step").value.max()
    assert near[-1] == 0
    assert (near[[0, 1, 2]] > 0).all()
    moved = run.table("drift").groupby("step").moved.max()
    assert moved[-1] == 0
    (norm,) = wb.load_edit(run.folder / "deltas" / "0.safetensors").norms().values()
    assert moved[0] == pytest.approx(norm, rel=1e-3)


def test_a_look_that_has_nothing_to_compare_with_is_refused(tiny_gpt2, requests, one_line):
    probe = Probe(tiny_gpt2, questions(requests[:1], []))
    recorder = study.Recorder()
    with pytest.raises(BadInput) as error:
        recorder.look(probe, 0, measures=["locality"])
    assert "step -1" in one_line(error)
    recorder = study.Recorder()
    recorder.look(probe, -1, measures=["locality"])
    recorder.look(probe, 0, measures=["locality"])
    assert (recorder.table("locality").value == 0).all()
