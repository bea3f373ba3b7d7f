"""The page of the findings says what its tables hold."""

import pandas as pd
import pytest

from tests.benchmarks import claims, findings

PAGE = claims.FINDINGS / "README.md"


def test_a_table_goes_behind_its_mark_alone():
    page = "a\n<!-- one -->\n| old |\n| --- |\n\nb\n<!-- two -->\n| kept |\n"
    new = "| new |\n| --- |\n| 1 |"
    assert findings.filled(page, "one", new) == page.replace("| old |\n| --- |", new)
    with pytest.raises(ValueError, match="no mark"):
        findings.filled(page, "three", new)


def test_the_claims_of_the_page_are_those_of_the_looks():
    page = PAGE.read_text(encoding="utf-8")
    for name in ("claims", "plans", "against-all"):
        assert findings.TABLES[name](claims.FINDINGS) + "\n" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", [*findings.TABLES])
def test_every_table_of_the_page_is_what_its_command_prints(name):
    assert findings.TABLES[name](claims.FINDINGS) + "\n" in PAGE.read_text(encoding="utf-8")


def test_the_picture_of_the_blocks_shows_the_shares_of_the_facts():
    looks = findings.looks_of(claims.FINDINGS)
    axes = findings.by_blocks(looks).axes[0]
    part = claims.of_blocks(looks)
    part = part[(part.model == "world-gpt2") & (part.editor == "memit")]
    everything = claims.chosen(part, "plan", "level").query("plan == 'all'")
    kept = claims.kept(claims.facts_of(everything)).groupby(level=["seed", "place"]).mean()
    points = [line.get_data() for line in axes.lines if len(line.get_xdata()) == 1]
    [first] = [float(x[0]) for x, y in points if y[0] == pytest.approx(-0.15)]
    assert first == pytest.approx(kept.mean())


def test_the_picture_of_the_tournament_leaves_out_edits_that_never_took():
    rows = []
    for arm in findings.ARMS:
        for at, said in (("edited", "1 1 0"), ("threshold", "1 0 1")):
            row = {"trial": f"world-gpt2:memit:3:facts:{arm}:0", "at": at, "arm": arm, "step": 40}
            shares = dict.fromkeys(("kept", "held_out"), said)
            rows.append(row | shares | {"intrinsic": "1 0 0 0", "ended": "budget"})
    places = dict(findings._arms(pd.DataFrame(rows), "world-gpt2"))
    assert places["none"]["held_out"][0] == 0.5  # of the two that took
    assert places["none"]["intrinsic"][0] == 0.25
    assert places["none"]["late"]
    assert places[findings.BEFORE]["held_out"][0] == 1
