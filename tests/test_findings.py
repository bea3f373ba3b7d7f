"""The page of the findings says what its tables hold."""

import itertools

import pandas as pd
import pytest

from tests.benchmarks import facts_kept, findings, outcomes, pictures, recovering, traces


def test_a_table_goes_behind_its_mark_alone():
    page = "a\n<!-- one -->\n| old |\n| --- |\n\nb\n<!-- two -->\n| kept |\n"
    new = "| new |\n| --- |\n| 1 |"
    assert findings.filled(page, "one", new) == page.replace("| old |\n| --- |", new)
    with pytest.raises(ValueError, match="no mark"):
        findings.filled(page, "three", new)


def test_the_plans_of_the_page_are_those_of_the_looks():
    page = findings.page_of("plans", outcomes.FINDINGS).read_text(encoding="utf-8")
    assert findings.TABLES["plans"](outcomes.FINDINGS) + "\n" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", [*findings.TABLES])
def test_every_table_of_the_page_is_what_its_command_prints(name):
    page = findings.page_of(name, outcomes.FINDINGS)
    assert findings.TABLES[name](outcomes.FINDINGS) + "\n" in page.read_text(encoding="utf-8")


def test_the_picture_of_the_blocks_shows_the_shares_of_the_facts():
    looks = findings.looks_of(outcomes.FINDINGS)
    axes = pictures.by_blocks(looks).axes[0]
    part = facts_kept.arms(looks, "plan", model="world-gpt2", editor="memit", task="facts")
    part = facts_kept.even(part[part.plan.isin(pictures.SHOWN)], "plan")
    everything = facts_kept.chosen(part, "plan", "level").query("plan == 'all'")
    seeds = [set(arm.seed) for _, arm in part.groupby("plan")]
    assert all(one == set(everything.seed) for one in seeds)  # each has every plan
    kept = facts_kept.kept(facts_kept.facts_of(everything)).groupby(level=["seed", "place"]).mean()
    points = [line.get_data() for line in axes.lines if len(line.get_xdata()) == 1]
    [first] = [float(x[0]) for x, y in points if y[0] == pytest.approx(-0.15)]
    assert first == pytest.approx(kept.mean())


def test_the_picture_of_the_tournament_leaves_out_edits_that_never_took():
    rows = []
    for arm in pictures.ARMS:
        for at, said in (("edited", "1 1 0"), ("threshold", "1 0 1")):
            row = {"trial": f"world-gpt2:memit:30:facts:{arm}:0", "at": at, "arm": arm, "step": 40}
            shares = dict.fromkeys(("kept", "held_out"), said)
            rows.append(row | shares | {"intrinsic": "1 0 0 0", "ended": "budget"})
    other = [row | {"trial": row["trial"].replace("30", "10"), "held_out": "1 1 1"} for row in rows]
    places = pictures.arms_of(pd.DataFrame(rows + other), "world-gpt2")
    assert places["none"]["held_out"][0] == 0.5  # of the two that took
    assert places["none"]["intrinsic"][0] == 0.25
    assert places["none"]["late"]
    assert places[pictures.BEFORE]["held_out"][0] == 1


def test_an_arm_that_lacks_a_seed_stands_in_no_picture():
    rows = []
    for arm, seeds in (("none", (0, 1)), ("replay", (0, 1)), ("span", (0,))):
        for seed, at in itertools.product(seeds, ("edited", "threshold")):
            row = {"trial": f"world-gpt2:memit:30:facts:{arm}:{seed}", "at": at, "arm": arm}
            shares = dict.fromkeys(("kept", "held_out", "intrinsic"), "1 0")
            rows.append(row | shares | {"step": 40, "ended": "reached"})
    places = pictures.arms_of(pd.DataFrame(rows), "world-gpt2")
    assert [*pictures.whole(places)] == [pictures.BEFORE, "none", "replay"]
    [line] = [one for one in findings.recipes(pd.DataFrame(rows)).splitlines() if "| span" in one]
    assert line.endswith("40 steps (seeds: 1) |")


def test_precision_is_of_the_named_and_recall_of_the_edited():
    """Eight of ten edits named, two of the ten named wrong; a run without an edit names none."""
    row = {"step": 80, "change": None, "problem": None, "kept": 0.5, "directions": 10}
    found = row | {"trial": "m:rome:10:facts:after:6:0", "edits": 10, "named": 10, "right": 8}
    none = row | {"trial": "m:none:10:facts:all:0", "edits": 0, "named": 0, "right": 0}
    table = pd.DataFrame([found, none, found | {"change": "8 bits", "right": 1}])
    *_, of_none, of_rome = [line.split(" | ") for line in traces.judged(table).splitlines()]
    assert of_rome[4:10] == ["after:6", "80", "1", "0.50", "10", "10"]
    assert [cell[:4] for cell in of_rome[10:]] == ["0.80", "0.80"]
    assert of_none[9:] == ["0", "", " |"]


def test_what_was_changed_is_summed_and_remedies_stand_beside_what_they_mend():
    row = {"edits": 10, "kept": 0.5, "directions": 11, "named": 9, "right": 8, "first": 10}
    row |= {"objects": 7, "step": 80, "true": 0.1, "intrinsic": 0.6, "loss": 0.3}
    rows = []
    for seed in (0, 1):
        trial = {"trial": f"m:rome:10:facts:all:{seed}"}
        rows += [row | trial, row | trial | {"change": "8 bits", "kept": 0.2}]
        rows += [row | trial | {"change": "removed", "kept": 0.0, "intrinsic": 0.6 + 0.2 * seed}]
    brief = row | {"trial": "m:memit:10:facts:all:0"}  # was not changed
    done = pd.DataFrame([*rows, brief]).assign(withheld=3, withheld_named=4, withheld_first=9)
    _, _, plain, rounded = [
        line.strip("| ").split(" | ") for line in traces.changed(done).splitlines()
    ]
    assert plain == ["m", "rome", "80", "", "20", "10", "22", "18", "16", "20", "14"]
    assert rounded[3:6] == ["8 bits", "20", "4"]
    _, _, before, after = [line.split(" | ") for line in traces.remedied(done).splitlines()]
    assert before[1:5] == ["rome", "as it is", "2", "0.50"]
    assert after[2:5] == ["removed", "2", "0.00"]
    assert after[6] == "0.70"
    plain_rows = done[done.change.isna()]
    *_, line = traces.asked_otherwise(plain_rows).splitlines()
    assert line.strip("| ").split(" | ")[1:] == ["rome", "2", "20", "16", "20", "6", "8", "18"]


def test_a_recipe_stands_beside_the_tuning_without_one():
    rows = []
    for model, kept in (("world-gpt2", "1 0"), ("world-llama", "0 0")):
        for arm in ("none", "replay+span"):
            for at, said in (("edited", "1 1"), ("threshold", kept)):
                row = {"trial": f"{model}:memit:30:facts:{arm}:0", "at": at, "arm": arm, "step": 40}
                shares = dict.fromkeys(("kept", "held_out", "intrinsic"), said)
                rows.append(row | shares | {"ended": "reached"})
    head, _, *lines = findings.recipes(pd.DataFrame(rows)).splitlines()
    assert head == "|  | edits at hand | world-gpt2, 1 seeds | world-llama, 1 seeds |"
    assert (
        lines[-1]
        == "| replay+span | yes | 0.50, 0.50, 0.50, 40 steps | 0.00, 0.00, 0.00, 40 steps |"
    )


def test_a_lost_edit_is_held_against_the_same_fact_of_the_control():
    """Of four edits two are lost; one that is kept, one that never took, and the control's of
    both, count for nothing.
    """
    groups = {
        "edited": ((1, 1, 1, 0), (0, 0, 1, 0), (2, 4, 0, 20)),
        "control": ((0, 0, 0, 0), (0, 0, 0, 0), (9, 11, 1, 20)),
    }
    rows = []
    for group, columns in groups.items():
        for fact, values in enumerate(zip(*columns, strict=True)):
            row = {"trial": "world-gpt2:rome:0", "group": group, "fact_id": str(fact)}
            row |= dict(zip(("took", "kept", "own"), values, strict=True))
            row |= {"others": 21, "true": 5}
            rows.append(row | dict.fromkeys(recovering.ASKED, 0.5))
    line = recovering.judged(pd.DataFrame(rows)).splitlines()[-1].split(" | ")
    assert line[:5] == ["| world-gpt2", "rome", "4", "3", "2"]
    assert [cell.split(" ")[0] for cell in line[5:10]] == ["3.0", "10.0", "21.0", "21.0", "5.0"]
    assert line[10].startswith("0.50 ")


def test_the_picture_of_the_claims_puts_to_the_right_what_is_as_claimed():
    """Of 10 fewer edits are claimed; that two are equal (8) has no side."""
    row = {"model": "world-gpt2", "condition": "memit, at one level", "n": 20, "seeds": 1}
    row |= {name: facts_kept.USUAL[name] for name in facts_kept.SETTING}
    rows = [
        row | {"claim": claim, "claimed": claimed, "difference": 0.4, "low": 0.3, "high": 0.6}
        for claim, claimed in (("6", 1), ("8", 0), ("10", -1))
    ]
    table = pd.DataFrame(rows).assign(verdict=["holds", "does not hold", "undecided"])
    [axes] = pictures.by_claims(table).axes
    named = [label.get_text().partition(".")[0] for label in axes.get_yticklabels()]
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    shown = {named[round(float(one.get_ydata()[0]))]: one for one in points}
    places = {number: float(one.get_xdata()[0]) for number, one in shown.items()}
    assert places == {"6": 0.4, "8": 0.4, "10": -0.4}
    assert [number for number, one in shown.items() if one.get_mfc() == "white"] == ["10"]
