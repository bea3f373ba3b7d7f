"""The judge of the studies' claims: what it calls a difference, and which arms it sees."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.benchmarks import claim_tables, claims, facts_kept
from tests.benchmarks.outcomes import difference, interval
from workbench.spec import Spec

BEST_ON_FACTS = claims.best_editor({"memit", "rome"}, ("facts",))


@pytest.mark.parametrize(
    ("low", "high", "claimed", "verdict"),
    [
        (0.1, 0.4, 1, "holds"),
        (0.1, 0.4, -1, "does not hold"),
        (-0.1, 0.4, 1, "undecided"),
        (-0.05, 0.1, 0, "holds"),
        (0.05, 0.3, 0, "undecided"),
        (0.15, 0.3, 0, "does not hold"),
    ],
)
def test_a_verdict_goes_by_the_interval(low, high, claimed, verdict):
    assert claims.verdict(low, high, claimed) == verdict


def test_fewer_facts_than_five_decide_nothing():
    assert claims.verdict(0.1, 0.4, 1, 5) == "holds"
    assert claims.verdict(0.1, 0.4, 1, 4) == "undecided"


def looks(varied, kept):
    """One look of an arm a value: which of ten edits it kept."""
    plain = facts_kept.USUAL | {"model": "m", "editor": "rome", "task": "facts"}
    plain |= {"plan": "all", "layers": "preset", "paraphrases": "1", "n_edited": "10"}
    about = {"seed": 0, "edited_model": 0, "step": 10, "metric": 0.7, "moved": 1.0}
    about |= {"harmless": "0" * 10, "intrinsic": "1" * 10, "known": "1" * 10}
    rows = [plain | about | {varied: value, "edited": edited} for value, edited in kept.items()]
    return pd.DataFrame(rows)


def test_blocks_and_plans_are_those_that_a_run_is_filed_under():
    every, none = "1" * 10, "t" * 10
    ((condition, result, claimed),) = claims.early_layers_equal(
        looks("layers", {"0": every, "4": none})
    )
    assert (condition, result[0], claimed) == ("block 4 less 0, 10 edits", -1, 0)
    moving = looks("plan", {"all": every, "edited": none})
    results = list(claims.plans("edited", ("all",), -1)(moving))
    assert [result[0] for _, result, _ in results] == [-1] * len(claims.READ)


def test_runs_of_another_number_of_edits_or_of_an_adapter_are_of_other_facts():
    """The first facts of ten and of twenty are not the same: to average them pairs nothing."""
    every, none = "1" * 10, "t" * 10
    moving = looks("plan", {"all": none, "edited": every})
    beside = looks("plan", {"all": every})
    for other in ({"n_edited": "20"}, {"adapter": "lora"}):
        both = pd.concat([moving, beside.assign(**other)])
        results = list(claims.plans("edited", ("all",), -1)(both))
        assert [result[0] for _, result, _ in results] == [1] * len(claims.READ)
    of_statements = looks("paraphrases", {"1": none, "3": every, "10": every})
    both = pd.concat([of_statements, beside.assign(n_edited="20", plan="all")])
    assert [result[0] for _, result, _ in claims.more_paraphrases(both)] == [1]
    assert [result[0] for _, result, _ in claims.as_intrinsic(both)] == [0]


@pytest.mark.parametrize(
    ("claim", "varied", "values", "fixed", "others"),
    [
        (claims.early_layers_equal, "layers", ("0", "4"), {}, ({"plan": "edited"},)),
        (claims.early_and_finished, "revision", ("early", "none"), {}, ({"adapter": "lora"},)),
        (
            claims.adapted("none", 1, "lora"),
            "adapter",
            ("none", "lora"),
            {"n_edited": "20"},
            ({"paraphrases": "3"}, {"layers": "7"}, {"plan": "edited"}),
        ),
    ],
)
def test_a_claim_sees_runs_that_differ_in_its_field_alone(claim, varied, values, fixed, others):
    every, none = "1" * 10, "t" * 10
    table = looks(varied, dict(zip(values, (none, every), strict=True))).assign(**fixed)
    [alone] = [result[0] for _, result, _ in claim(table)]
    assert alone == 1
    for other in others:
        turned = looks(varied, dict(zip(values, (every, none), strict=True)))
        both = pd.concat([table, turned.assign(**fixed | other)])
        assert [result[0] for _, result, _ in claim(both)] == [1]


def test_false_edits_are_judged_within_one_plan_and_adapter():
    half = looks("adapter", {"none": "1" * 5 + "t" * 5}).assign(n_edited="20", harmless="01" * 5)
    frozen = half.assign(plan="edited", edited="t" * 5 + "1" * 5)
    lora = half.assign(adapter="lora", edited="10" * 5)
    results = claims.false_as_harmless(pd.concat([half, frozen, lora]))
    shown = {condition: round(result[0], 6) for condition, result, _ in results}
    ways = ("full", "lora", "edited")  # 3 of 5 less 2 of 5; all less none; 2 of 5 less 3 of 5
    assert shown == {f"rome, {ways[place]}, 20 edits": (0.2, 1, -0.2)[place] for place in range(3)}


def test_seeds_that_one_arm_lacks_judge_nothing():
    """Editors that keep the same on the seed that both have, and another seed of one alone."""
    every, none = "1" * 10, "t" * 10
    table = looks("editor", {"rome": every, "memit": every, "ft": every})
    more = looks("editor", {"rome": none, "memit": none}).assign(seed=1)
    [(condition, result, _)] = BEST_ON_FACTS(pd.concat([table, more]))
    assert (condition, result[0], result[3]) == ("memit and rome less ft, facts, 10 edits", 0, 10)
    more = looks("editor", {"rome": every, "ft": none}).assign(seed=1)  # without MEMIT
    [(_, result, _)] = BEST_ON_FACTS(pd.concat([table, more]))
    assert (result[0], result[3]) == (0, 10)
    early = looks("revision", {"none": every, "early": every})
    more = looks("revision", {"none": none}).assign(seed=1)
    [(_, result, _)] = claims.early_and_finished(pd.concat([early, more]))
    assert (result[0], result[3]) == (0, 10)
    plans = looks("plan", {"all": every, "edited": every})
    more = looks("plan", {"all": none}).assign(seed=1)
    assert "| `all` | 10, 10 | 1.00" in claim_tables.by_plan(pd.concat([plans, more]))


def test_a_difference_of_two_samples_is_newcombes():
    """8 of 10 less 4 of 10, by the ends of either."""
    index = pd.MultiIndex.from_product([[0], range(10)], names=["seed", "place"])
    first = pd.Series([1] * 8 + [0] * 2, index)
    second = pd.Series([1] * 4 + [0] * 6, index)
    (a, low, high, *_), (b, under, over, *_) = (
        facts_kept.interval(first),
        facts_kept.interval(second),
    )
    mean, least, most, n, _ = facts_kept.interval(first, second)
    assert (mean, n) == (pytest.approx(0.4), 10)
    assert least == pytest.approx(0.4 - ((a - low) ** 2 + (over - b) ** 2) ** 0.5)
    assert most == pytest.approx(0.4 + ((high - a) ** 2 + (b - under) ** 2) ** 0.5)
    none = pd.Series([0.0] * 10, index)
    mean, least, most, n, _ = facts_kept.interval(none.iloc[:3], none)
    assert (mean, n) == (0, 3)
    assert least < 0 < most


def test_at_one_distance_two_looks_share():
    """An arm went to 1.0; the other is at .5 and 1.5, and had lost half and all: it lost 3/4."""
    steps = [("all", 0, 0.0, "1"), ("all", 10, 1.0, "1"), ("edited", 0, 0.0, "1")]
    steps += [("edited", 10, 0.5, "h"), ("edited", 20, 1.5, "t")]
    said = {"1": "1" * 10, "h": "1" * 5 + "t" * 5, "t": "t" * 10}
    rows = [
        looks("plan", {plan: said[edited]}).assign(step=step, moved=moved)
        for plan, step, moved, edited in steps
    ]
    results = dict(claims.differences(pd.concat(rows), "edited", "all"))
    assert results["rome, 10 edits, at one distance"][0] == pytest.approx(-0.75)


def test_at_one_level_two_looks_share():
    """Arms that end at .7 and .5 are read at .5, which one passed half way from .3, where it had
    lost nothing, to .7, where all.
    """
    steps = [("all", 0, 0.3, "1"), ("all", 10, 0.7, "t"), ("edited", 0, 0.1, "1")]
    steps += [("edited", 10, 0.5, "1")]
    rows = [
        looks("plan", {plan: edited * 10}).assign(step=step, metric=metric)
        for plan, step, metric, edited in steps
    ]
    results = dict(claims.differences(pd.concat(rows), "edited", "all"))
    assert results["rome, 10 edits, at one level"][0] == pytest.approx(0.5)


def test_seeds_are_drawn_together_in_both_samples():
    """Of two seeds both samples are 0 and both 1: they differ in none, whichever seed is drawn."""
    index = pd.MultiIndex.from_product([[0, 1], range(10)], names=["seed", "place"])
    values = pd.Series([0.0] * 10 + [1.0] * 10, index)
    assert difference(values, values) == (0, 0)
    apart = pd.Series([1.0] * 10 + [0.0] * 10, index)
    assert difference(values, apart) == (-1, 1)


def test_an_adapter_is_held_against_a_tuning_of_the_blocks_too():
    table = looks("adapter", {"none": "t" * 10, "lora": "1" * 10})
    frozen = looks("plan", {"window:0-11": "1" * 5 + "t" * 5})
    both = pd.concat([table, frozen]).assign(n_edited="20")
    for claim, condition, gain in (
        (claims.adapted("none", 1, "lora"), "rome, lora less full", 1),
        (claims.adapted("blocks", 1, "lora"), "rome, lora less blocks", 0.5),
    ):
        assert [(name, result[0]) for name, result, _ in claim(both)] == [(condition, gain)]


def test_both_adapters_are_held_against_each_other():
    both = looks("adapter", {"lora": "1" * 10, "dora": "1" * 9 + "t"}).assign(n_edited="20")
    [(condition, result, claimed)] = claims.adapted("dora", 0, "lora")(both)
    assert (condition, round(result[0], 6), claimed) == ("rome, lora less dora", 0.1, 0)


def test_edits_that_the_edited_blocks_remove_are_counted_by_themselves():
    """Of nine that took seven are lost, 5 / 18 more than a half; those of another plan are not."""
    both = looks("plan", {"edited": "11" + "t" * 7 + "-", "all": "1" * 10})
    [(condition, result, claimed)] = claims.mostly_removed(both)
    assert (condition, claimed) == ("rome, 10 edits", 1)
    assert result[0] == pytest.approx(7 / 9 - 0.5)


def test_edits_in_memory_are_no_editor_of_the_studies():
    every = looks("editor", {"memit": "1" * 10, "grace": "t" * 10})
    assert set(claims.judged(every).condition) == {"memit, facts, 10 edits"}
    lines = claim_tables.in_memory(every).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["grace", "memit"]


def test_a_run_that_is_made_again_replaces_all_looks_of_the_earlier(monkeypatch, tmp_path):
    def made(run, steps):
        rows = [looks("plan", {"all": "1" * 10}).assign(step=step, run=run) for step in steps]
        return pd.concat(rows).drop(columns="known").assign(held_out=1.0)

    out = tmp_path / "looks.csv"
    monkeypatch.setattr(facts_kept, "looked", lambda run: run)
    for run, steps in (("old", (0, 10, 20, 30)), ("new", (0, 10, 20)), ("new", (0, 10, 20))):
        table = made(run, steps)
        monkeypatch.setattr(facts_kept.runs, "collect", lambda _, table=table: [table])
        facts_kept.collect(tmp_path, out)
    table = facts_kept.read(out)
    assert table.step.tolist() == [0, 10, 20]
    assert set(table.run) == {"new"}


def finished(**fields):
    """A run of two single edits and three watched facts, one look."""
    about = {"model": "world-gpt2", "editor": "rome", "task": "facts", "edits_per_model": 1}
    spec = Spec(**{"n_edited": 10, **about, **fields}).resolved().model_dump(mode="json")
    rows = [
        {"edited_model": copy, "step": 0, "group": group, "fact_id": str(fact)}
        for copy in (0, 1)
        for group, facts in (("edited", [copy]), ("intrinsic", [2, 3, 4]))
        for fact in facts
    ]
    probes = pd.DataFrame(rows).assign(took=True, retained=True, top_category="other")
    training = pd.DataFrame({"edited_model": [0, 1], "step": 0, "metric": 0.5, "moved": 1.0})
    about = {"harmless": []}
    return SimpleNamespace(
        spec=spec, folder=Path("run"), probes=probes, training=training, about=about
    )


@pytest.mark.parametrize(
    ("adapter", "rate", "filed"),
    [
        ("", 0, "usual"),
        ("", 3e-4, "usual"),
        ("", 1e-4, "0.0001"),
        ("lora", 1e-3, "usual"),
        ("lora", 3e-4, "0.0003"),
    ],
)
def test_a_run_is_filed_under_its_rate_and_data(adapter, rate, filed):
    run = finished(adapter=adapter, learning_rate=rate, task_data="runs/other-kinds.jsonl")
    looks = facts_kept.looked(run)
    assert set(looks.learning_rate) == {filed}
    assert set(looks.task_data) == {"other-kinds"}


@pytest.mark.parametrize(
    "other",
    [
        {"protect": "replay"},
        {"hparams": {"layers": [2]}},
        {"adapter": "lora", "adapter_rank": 4},
        {"threshold": 0.6},
        {"n_edited": 20},
        {"n_edited": 20, "edits_per_model": 10},
        {"n_edited": 30, "edits_per_model": 30, "harmless": 0.5},
        {"n_edited": 20, "edits_per_model": 20},
    ],
)
def test_a_run_unlike_those_of_the_grids_is_not_filed_under_their_columns(other):
    with pytest.raises(ValueError, match=r"not of these grids|at once"):
        facts_kept.looked(finished(**other))


def test_a_look_has_a_letter_a_fact():
    """One that did not take; one kept; lost to the true answer, to a related one, and one whose
    answers cannot be told apart. Of their wordings only those of edits that took count.
    """
    run = finished(edits_per_model=20, n_edited=20, harmless=0.5)
    row = {"edited_model": 0, "step": 0, "group": "edited", "took": True, "retained": False}
    edited = pd.DataFrame([row] * 5).assign(fact_id=list("abcde"))
    edited["top_category"] = ["other", "other", "true", "related", None]
    edited.loc[0, "took"] = False
    edited.loc[1, "retained"] = True
    wordings = edited.assign(group="paraphrase", retained=[True, True, False, False, False])
    run.probes = pd.concat([edited, wordings])
    run.about["harmless"] = ["b", "c"]
    run.training = run.training[run.training.edited_model == 0]
    [look] = facts_kept.looked(run).to_dict("records")
    assert (look["edited"], look["harmless"], look["held_out"]) == ("-1trn", "01100", 0.25)
    lost = looks("plan", {"all": look["edited"]}).assign(harmless="0" * 5)
    [(_, result, _)] = claims.to_related(lost)
    assert (result[0], result[3]) == (0, 2)


def test_single_edits_are_facts_of_their_own_and_what_they_watch_is_not():
    """Two models of one edit each that watch the same three facts: n is 2, and 3."""
    looks = facts_kept.looked(finished()).assign(known="111")
    assert set(looks.n_edited) == {"1"}
    facts = facts_kept.facts_of(looks)
    counts = [
        facts_kept.interval(facts_kept.kept(facts, group))[3] for group in ("edited", "intrinsic")
    ]
    assert counts == [2, 3]


def test_each_copy_of_a_single_edit_is_read_where_its_own_arms_are():
    """One pair of copies ends after a step, the other after three; each loses its edit then."""
    rows = []
    for copy, last in ((0, 10), (1, 30)):
        for plan in ("all", "edited"):
            for step in range(0, last + 10, 10):
                said = "t" if plan == "edited" and step == last else "1"
                one = looks("plan", {plan: said}).assign(step=step, metric=step / 100)
                rows.append(one.assign(edited_model=copy, harmless="0", n_edited="1"))
    results = dict(claims.differences(pd.concat(rows), "edited", "all"))
    for how in ("level", "end", "steps"):
        assert results[f"rome, 1 edits, at one {how}"][0] == -1


def test_single_edits_stand_beside_ten_of_the_same_seeds():
    ten = looks("plan", {"all": "1" * 9 + "t"}).assign(editor="memit")
    other = ten.assign(seed=1, edited="t" * 10)
    one = looks("plan", {"all": "t"}).assign(editor="memit", n_edited="1", harmless="0")
    single = pd.concat(one.assign(edited_model=copy) for copy in range(10))
    lines = claim_tables.by_size(pd.concat([ten, other, single])).splitlines()
    assert [line.split(" [")[0] for line in lines[2:]] == [
        "| m | 1 | 10, 10 | 0.00",
        "| m | 10 | 10, 10 | 0.90",
    ]


def test_what_other_kinds_keep_more_is_counted_fact_by_fact():
    """Three of ten edits are gained and one is lost."""
    own = looks("plan", {"all": "1" * 5 + "t" * 5}).assign(task_data="same-kinds")
    other = looks("plan", {"all": "t" + "1" * 7 + "t" * 2}).assign(task_data="other-kinds")
    elsewhere = looks("plan", {"all": "1" * 10})  # of the usual data: no part of it
    table = claim_tables.by_kinds(pd.concat([own, other, elsewhere]))
    [line] = table.splitlines()[2:]
    assert line.startswith("| m | `all` | 10, 10 | +0.20 [")
    low, high = interval([-1, 0, 0, 0, 0, 1, 1, 1, 0, 0], least=-1)
    assert f"[{low:+.2f}, {high:+.2f}]" in line


def test_another_rate_and_other_data_are_judged_apart():
    every, none = "1" * 10, "t" * 10
    ours = looks("plan", {"all": none, "edited": every})
    slow = looks("plan", {"all": every, "edited": none}).assign(learning_rate="0.0001")
    apart = looks("plan", {"all": none, "edited": none}).assign(task_data="other-kinds")
    table = claims.judged(pd.concat([ours, slow, apart]))
    level = table[(table.claim == "10") & table.condition.str.endswith("level")]
    shown = level.set_index(["task_data", "learning_rate"]).difference.to_dict()
    expected = {("none", "usual"): 1, ("none", "0.0001"): -1, ("other-kinds", "usual"): 0}
    assert shown == expected
    [headline] = [
        line for line in claim_tables.verdicts(table).splitlines() if line.startswith("| 10. ")
    ]
    assert "+1.00" in headline  # of the usual one, whatever else has as many facts
    assert "(+1.00 to +1.00;" in claim_tables.shown(table)
    assert claim_tables.elsewhere(table).count("| 10 | m |") == 2


def test_a_hundred_edits_are_judged_apart():
    every, none = "1" * 10, "t" * 10
    ten = looks("plan", {"all": none, "edited": every})
    hundred = looks("plan", {"all": every, "edited": none}).assign(n_edited="100")
    results = list(claims.plans("edited", ("all",), -1)(pd.concat([ten, hundred])))
    level = {name: result[0] for name, result, _ in results if name.endswith("level")}
    assert level == {"rome, 10 edits, at one level": 1, "rome, 100 edits, at one level": -1}


def test_a_model_of_which_little_was_run_is_judged_on_that():
    arms = looks("plan", {"all": "t" * 10, "edited": "1" * 10}).assign(n_edited="30")
    table = claims.judged(arms)
    assert set(table.claim) == {"1", "3", "10", "10, alone"}


def test_windows_and_statements_are_those_of_a_deeper_model():
    every, none = "1" * 10, "t" * 10
    windows = looks("plan", {"edited": none, "window:12-16": every}).assign(model="smollm2-135m")
    results = claims.plans(claims.ON_EDIT, claims.WINDOWS, -1)(windows)
    shown = {condition: result[0] for condition, result, _ in results}
    assert shown["less window:12-16, rome, 10 edits, at one level"] == -1
    stated = looks("paraphrases", {"1": none, "3": none, "6": every})
    stated = stated.assign(model="smollm2-135m", n_edited="30")
    condition, result, _ = next(claims.more_paraphrases(stated))
    assert (condition, result[0]) == ("rome, 6 less 1, 30 edits", 1)


def test_late_blocks_are_late_in_a_deeper_model_too():
    every, none = "1" * 10, "t" * 10
    arms = looks("plan", {"all": none, "after:8": none, "after:20": every})
    [first, *_] = claims.plans(claims.LATE, ("all",), 1)(arms.assign(model="smollm2-135m"))
    assert first[1][0] == 1
    [first, *_] = claims.plans(claims.LATE, ("all",), 1)(arms)
    assert first[1][0] == 0


def test_an_intrinsic_fact_counts_where_the_edited_model_says_it():
    table = looks("plan", {"all": "1" * 10}).assign(intrinsic="10" * 5, known="1" * 6 + "0" * 4)
    facts = facts_kept.facts_of(table)
    assert facts_kept.kept(facts, "intrinsic").tolist() == [1, 0] * 3


def test_copies_of_a_fact_are_one_fact():
    every, none = "1" * 10, "t" * 10
    table = pd.concat(
        looks("adapter", {"none": every, "lora": none}).assign(seed=seed) for seed in (0, 1)
    )
    mean, low, high, n, _ = facts_kept.interval(facts_kept.kept(facts_kept.facts_of(table)))
    assert (mean, n) == (0.5, 20)
    assert low < 0.5 < high


@pytest.mark.parametrize(("value", "low", "high"), [(1, 0.69, 1), (0, 0, 0.31)])
def test_facts_that_all_agree_are_not_certain(value, low, high):
    """Ten of ten: the exact interval of Clopper and Pearson is .69 to 1."""
    assert interval([value] * 10) == pytest.approx((low, high), abs=0.02)


def test_a_mean_is_no_surer_than_its_seeds():
    """Two seeds of a hundred facts that differ wholly."""
    values, seeds = [0] * 100 + [1] * 100, [0] * 100 + [1] * 100
    assert interval(values, seeds) == (0, 1)
    low, high = interval(values)
    assert 0.4 < low < 0.5 < high < 0.6


def test_an_early_checkpoint_counts_for_the_claim_that_is_about_it_alone():
    every, none = "1" * 10, "t" * 10
    finished = looks("plan", {"all": none, "after:8": every})
    early = looks("plan", {"all": every}).assign(revision="early")
    table = claims.judged(pd.concat([finished, early])).set_index("claim")
    assert table.difference["6"].tolist() == [1] * len(claims.READ)
    assert table.difference["14"] == -1


def test_a_verdict_stands_beside_the_condition_of_most_edits():
    row = {"claim": "6", "model": "world-gpt2", "low": -0.1, "high": 0.5, "seeds": 1}
    row |= {name: facts_kept.USUAL[name] for name in facts_kept.SETTING}
    few = row | {"condition": "rome, 10 edits, at one level", "difference": 0.2, "n": 30}
    many = row | {"condition": "memit, 100 edits, at one level", "difference": 0.4, "n": 20}
    apart = row | {"condition": "memit, 100 edits, at one end", "difference": -0.9, "n": 90}
    rows = [few | {"verdict": "undecided"}, many | {"verdict": "holds"}]
    table = claim_tables.verdicts(pd.DataFrame([*rows, apart | {"verdict": "does not hold"}]))
    [line] = [line for line in table.splitlines() if line.startswith("| 6.")]
    said = "**holds** +0.40 [-0.10, +0.50] (memit, 100 edits; n 20, 1 seed; so in 1 of 2)"
    assert line.endswith(f"| {claim_tables.PUBLISHED['6']} | {said} |")
    assert sum("not run" in other for other in table.splitlines()[2:]) == len(claims.CLAIMS) - 1


def test_arms_that_are_held_against_all_are_counted_where_both_were_run():
    """Two plans keep more of ten, one of them told; ROME's window is not MEMIT's `edited`."""
    arms = looks("plan", {"all": "t" * 10, "edited": "1" * 10, "after:8": "1" + "t" * 9})
    other = looks("plan", {"window:2-4": "1" * 10}).assign(editor="memit")
    lines = claim_tables.against_all(pd.concat([arms, other])).splitlines()[2:]
    assert [line.strip("| ").split(" | ") for line in lines] == [
        [how, "2", "2", "1", "0", "0"] for how in claims.READ
    ]
