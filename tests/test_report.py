"""The report's numbers are those of the runs, its intervals cover what they say, and it holds no
more than a run at a time.
"""

import html
import itertools
import re
import types
from pathlib import Path

import numpy
import pandas as pd
import pytest

from tests.benchmarks.synthetic_runs import synthetic
from workbench import batch, pages, report, runs, sweep
from workbench.__main__ import main
from workbench.facts import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three seeds of two editors and two tasks; ft keeps 80 % of its edits, rome 50 %."""
    out = tmp_path_factory.mktemp("runs")
    for editor, task, seed in itertools.product(("ft", "rome"), ("text", "facts"), range(3)):
        synthetic(out, kept={"ft": 0.8, "rome": 0.5}[editor], editor=editor, task=task, seed=seed)
    runs.write((out / "whole", (out / "whole").mkdir())[0], {"spec": {}, "members": []}, {})
    return out


def tables(folder: Path, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the cells of 10_collect write, as it is read again: retention and paired differences."""
    found = runs.collect(folder)
    shares = report.shares(found)
    fields = report.varying(shares)
    made = {"retention": report.retention(shares, fields)}
    made["differences"] = report.paired(shares, fields)
    out.mkdir()
    report.save(found, out, **made)
    assert not list(out.glob(".*"))
    return tuple(pd.read_csv(out / f"{name}.csv") for name in made)


def test_the_tables_hold_the_means_of_the_runs(folder, tmp_path):
    table, differences = tables(folder, tmp_path / "report")
    table = table.set_index(["editor", "task", "series"])
    probes = pd.read_parquet(tmp_path / "report" / "probes.parquet")
    assert len(probes) == sum(
        len(run.probes) for run in runs.listed(folder) if "members" not in run.about
    )
    for editor, task in itertools.product(("ft", "rome"), ("text", "facts")):
        part = probes[
            (probes.editor == editor)
            & (probes.task == task)
            & (probes.group == "edited")
            & (probes.step == probes.step.max())
        ]
        row = table.loc[(editor, task, "edits kept")]
        kept = part[part.took.astype(bool)].retained
        assert row["mean"] == pytest.approx(kept.mean())
        counts = numpy.random.default_rng(0).binomial(
            len(kept), kept.mean(), 100_000
        )  # of shares drawn again
        low, high = numpy.quantile(counts, [0.025, 0.975]) / len(kept)
        assert (row.low, row.high) == pytest.approx((low, high), abs=1.5 / len(kept))
        assert high - low > 12 / len(kept)
    row = differences[(differences.field == "editor") & (differences.series == "edits kept")].iloc[
        0
    ]
    assert (row["of"], row.against) == ("rome", "ft")
    assert row.high < 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits, times = numpy.random.default_rng(0), 0, 1000
    for _ in range(times):
        low, high = runs.interval(pd.Series((rng.random(90) < 0.6).astype(float)))
        hits += low <= 0.6 <= high
    assert 0.93 <= hits / times <= 0.97


@pytest.mark.parametrize(
    ("value", "least", "low", "high"),
    [(1, 0, 0.6915, 1), (0, 0, 0, 0.3085), (0, -1, -0.3085, 0.3085), (1, -1, 0.3830, 1)],
)
def test_ten_facts_that_agree_are_not_certain(value, least, low, high):
    """Clopper and Pearson's interval of ten of ten is .6915 to 1; of differences it is as wide to
    either side as they can be.
    """
    assert runs.interval(pd.Series([value] * 10), least) == pytest.approx((low, high), abs=1e-4)


def test_a_drift_of_nothing_is_no_share_of_facts():
    """Nats that are 0 of each fact (GRACE changes no neighbour) are not up to .31 nats."""
    table = pd.DataFrame({"fact_id": range(10), "value": 0.0, "step": 0, "edited_model": 0})
    parts = [("locality", "neighbourhood"), ("counterfact", "efficacy")]
    made = pd.concat(table.assign(measure=one, quantity=other) for one, other in parts)
    run = types.SimpleNamespace(measured=made, spec={})
    rows = report.measured([run], ["editor"]).set_index("measure")
    assert (rows.low["locality"], rows.high["locality"]) == (0, 0)
    assert rows.high["counterfact"] == pytest.approx(0.3085, abs=1e-4)


def test_paired_differences_cover_the_truth_as_often_as_they_say():
    rng, hits, times = numpy.random.default_rng(1), 0, 300
    for _ in range(times):
        hard = rng.random(90)  # a fact's own difficulty, shared by both editors
        rows = [
            {
                "editor": editor,
                "series": "edits kept",
                "seed": 0,
                "fact_id": str(number),
                "retained": float(rng.random() < (hard[number] + more) / 2),
            }
            for editor, more in (("a", 0.0), ("b", 0.4))
            for number in range(90)
        ]
        row = report.paired(pd.DataFrame(rows), ["editor"]).iloc[0]
        hits += row.low <= 0.2 <= row.high
    assert 0.92 <= hits / times <= 0.98


def test_a_tasks_usual_numbers_do_not_keep_tasks_from_being_paired(tmp_path):
    for task, rate in (("text", 5e-5), ("facts", 3e-4)):
        synthetic(tmp_path / "runs", 0.7, editor="ft", task=task, seed=0, learning_rate=rate)
    _, differences = tables(tmp_path / "runs", tmp_path / "report")
    assert set(differences.field) == {"task"}
    assert (differences.n > 0).all()


def test_any_field_that_runs_differ_in_keeps_them_apart(tmp_path):
    for editor, rank, kept in (("rome", 4, 1.0), ("rome", 64, 0.0), ("memit", 4, 1.0)):
        synthetic(tmp_path / "runs", kept, editor=editor, task="text", seed=0, adapter_rank=rank)
    _, differences = tables(tmp_path / "runs", tmp_path / "report")
    differences = differences.set_index(["field", "series"])
    assert set(differences.index.get_level_values("field")) == {"editor", "adapter_rank"}
    assert abs(differences.loc[("editor", "edits kept"), "mean"]) < abs(
        differences.loc[("adapter_rank", "edits kept"), "mean"]
    )


def sentences_of(collected: list[runs.Run]) -> list[str]:
    """What is said of runs, without its markup."""
    shares = report.shares(collected)
    markup = report.findings(collected, shares, report.varying(shares)).data
    sentences = re.findall("(?s)<li>(.*?)</li>", markup)
    return [html.unescape(re.sub("</?b>", "", sentence)) for sentence in sentences]


def test_a_sentence_a_finding_says_what_the_tables_say(folder):
    collected = runs.collect(folder)
    shares = report.shares(collected)
    counts, *sentences = sentences_of(collected)
    assert counts == "12 runs, 3 seeds"
    assert len(sentences) == 6  # two series: by editor under each task, by task
    text = shares[shares.task == "text"]
    (sentence,) = [one for one in sentences if one.startswith("edits kept under text, by editor: ")]
    means = report.retention(text, ["editor"]).set_index(["editor", "series"])
    for editor in ("ft", "rome"):
        row = means.loc[(editor, "edits kept")]
        interval = f"{row['mean']:.2f} [{row.low:.2f}, {row.high:.2f}]"
        assert f"{editor} {interval} of {row.n:.0f}" in sentence
    differences = report.paired(text, ["editor"]).set_index("series")
    row = differences.loc["edits kept"]
    assert row.high < 0
    interval = f"{row['mean']:.2f} [{row.low:.2f}, {row.high:.2f}]"
    assert sentence.endswith(f"; rome less ft at n = {row.n:.0f}, difference {interval}")
    (sentence,) = [one for one in sentences if one.startswith("edits kept, by task: ")]
    assert "text and facts cannot be told apart at n = " in sentence


def two_editors(tmp_path: Path, kept: dict[str, float], facts: int) -> list[str]:
    """What is said of a run of each editor that keeps this share."""
    for editor, share in kept.items():
        synthetic(tmp_path, share, facts, editor=editor, task="text", seed=0)
    return sentences_of(runs.collect(tmp_path))


@pytest.mark.parametrize(
    ("facts", "high", "apart"), [(report.FEWEST - 1, "0.04", False), (30, "-0.77", True)]
)
def test_a_few_facts_tell_nothing_apart_however_unanimous(facts, high, apart, tmp_path):
    counts, edits, _ = two_editors(tmp_path, {"ft": 1.0, "rome": 0.0}, facts)
    assert counts == "2 runs, 1 seed"
    assert f"-1.00 [-1.00, {high}]" in edits
    assert ("cannot be told apart" in edits) != apart


def test_of_one_run_its_share_is_said_and_of_runs_that_share_no_fact_nothing(tmp_path):
    counts, edits, _ = two_editors(tmp_path / "one", {"rome": 1.0}, 30)
    assert counts == "1 run, 1 seed"
    assert re.fullmatch(r"edits kept under text, by editor: rome 1.00 \[0.88, 1.00\] of 30", edits)
    for seed, (editor, plan) in enumerate((("rome", "all"), ("ft", "edited"))):
        synthetic(tmp_path / "two", 1.0, editor=editor, plan=plan, task="text", seed=seed)
    assert sentences_of(runs.collect(tmp_path / "two")) == ["2 runs, 2 seeds"]


def test_an_unknown_schema_and_an_empty_folder_are_one_clear_line(folder, tmp_path, one_line):
    (tmp_path / "runs" / "new").mkdir(parents=True)
    for text, named in (('{"schema": 99}', "schema 99"), ("", "damaged")):
        (tmp_path / "runs" / "new" / "run.json").write_text(text)
        with pytest.raises(BadInput) as error:
            report.report(tmp_path / "runs", tmp_path / "report")
        assert "no run can be read" in one_line(error)
        assert named in str(error.value)
    with pytest.raises(BadInput) as error:
        report.report(tmp_path / "report", tmp_path / "other")
    assert "no finished run" in one_line(error)


EVIL = "<img src=x onerror=alert(1)>"


def test_the_page_shows_tables_and_figures_and_words_of_the_runs_are_no_markup_and_no_formula(
    tmp_path, loads, capsys, monkeypatch
):
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path / "other runs"))
    for editor, other in (("rome", "a"), ("rome", "b"), (f"=1+1 {EVIL}", "a")):
        synthetic(tmp_path / EVIL, 0.7, editor=editor, task="text", seed=0, **{f"={EVIL}": other})
    assert main(["report", str(tmp_path / EVIL), "--out", str(tmp_path / "report")]) == 0
    page = tmp_path / "report" / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text()
    assert loads(text) == []
    found = [text.index(part) for part in ("<li>3 runs, 1 seed</li>", "<img alt=", "<table")]
    assert found == sorted(found)  # what was found opens the page, then figures, then tables
    assert "no run recorded every position" in text
    assert pages.META in text
    assert text.count("<img alt=") == 6
    assert "edits kept" in text
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x") >= 6  # folder, column, cells
    retention, differences = (
        pd.read_csv(page.parent / f"{name}.csv") for name in ("retention", "differences")
    )
    assert set(retention.editor) == {"rome", f"'=1+1 {EVIL}"}
    assert f"'={EVIL}" in retention.columns
    assert f"'={EVIL}" in set(differences.field)
    assert differences["mean"].dtype == float
    assert len(pd.read_parquet(page.parent / "probes.parquet")) == 3 * 90 * 4


def test_runs_that_recorded_every_position_are_explored_at_the_end(case_study, tmp_path, loads):
    text = report.report(case_study.folder.parent, tmp_path / "report").read_text()
    assert loads(text) == ["<script>", "<script>"]  # its data, and what the policy knows by its sum
    assert text.rindex(pages.EXPLORER) > text.rindex("<img alt=")
    assert text.count('class="workbench-explorer-data"') == 1


@pytest.mark.parametrize(
    "path",
    sorted((report.COLLECT.parent / "presets").glob("grid-*.yaml")),
    ids=lambda path: path.stem,
)
def test_every_grid_that_is_shipped_is_whole(path, tmp_path):
    planned = sweep.planned(sweep.read(path), tmp_path)
    assert len(planned) >= 16
    assert len({each.folder for each in planned}) == len(planned)
    assert all(
        set(each.parameters)
        <= set(batch.declared(report.COLLECT.parent / "03_token_distribution.ipynb"))
        for each in planned
    )


def test_a_run_that_is_damaged_does_not_end_a_report_and_is_listed(tmp_path, capsys):
    for number, editor in enumerate(("rome", "memit", "ft")):
        synthetic(tmp_path / "runs", 1.0, editor=editor, task="text", seed=number)
    damaged = sorted((tmp_path / "runs").iterdir())[1] / "probes.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    page = report.report(tmp_path / "runs", tmp_path / "report").read_text()
    assert f"left out: {damaged}: damaged" in capsys.readouterr().err
    assert str(damaged) in page
    retention = pd.read_csv(tmp_path / "report" / "retention.csv")
    assert retention.editor.nunique() == 2


def test_measures_are_read_after_the_edits_and_at_the_end_by_the_fields(tmp_path):
    for editor, end in (("ft", 0.0), ("rome", 0.5)):
        rows = [(-1, "a", 0.0), (0, "a", 1.0), (0, "b", 0.5), (20, "a", 0.9), (40, "a", end)]
        mine = pd.DataFrame(rows, columns=["step", "fact_id", "value"])
        mine = {"mine": mine.assign(edited_model=0, quantity="right")}
        synthetic(tmp_path, 0.7, measured=mine, editor=editor, task="text", seed=0)
    collected = runs.collect(tmp_path)
    table = report.measured(collected, ["editor"]).set_index(["editor", "when"])
    assert table["mean"].to_dict() == {
        ("ft", "edited"): 0.75,
        ("ft", "end"): 0.0,
        ("rome", "edited"): 0.75,
        ("rome", "end"): 0.5,
    }
    assert table.n.tolist() == [2, 1, 2, 1]
    assert (table.measure == "mine").all()


def test_runs_that_name_no_measures_have_no_rows_of_them(folder):
    assert report.measured(runs.collect(folder), ["editor"]).empty
