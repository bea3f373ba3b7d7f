import re
import subprocess
import sys

import pytest

from tests.benchmarks.explorer import ENDS, synthetic_run
from workbench import explorer, runs
from workbench.explorer import Explorer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(
        tmp_path_factory.mktemp("runs") / "one",
        n_edited=5,
        n_intrinsic=2,
        steps=(-1, 0, 20, 40),
        layers=4,
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return synthetic_run(
        tmp_path_factory.mktemp("runs") / "several",
        n_edited=1,
        n_intrinsic=2,
        models=2,
        steps=(-1, 0, 20),
        layers=4,
    )


def test_facts_are_sorted_by_what_became_of_them(run):
    table = explorer.outcomes(run)
    assert list(table.outcome) == ["kept"] * 3 + list(explorer.OUTCOMES[1:])
    edited = table[table.group == "edited"].reset_index().set_index("fact_id").outcome
    assert list(edited[[f"edited:0-{number}" for number in range(len(ENDS))]]) == list(
        explorer.OUTCOMES
    )
    assert [label.split("]")[0][1:] for label, _ in Explorer(run).fact.options] == list(
        table.outcome
    )


def test_an_intrinsic_fact_that_was_lost_is_not_called_back_to_true(run):
    probes = run.probes.copy()
    probes.loc[(probes.group == "intrinsic") & (probes.step == 40), "retained"] = False
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["probes"] = probes
    table = explorer.outcomes(changed)
    assert set(table[table.group == "intrinsic"].outcome) == {"lost to other"}


def test_another_checkpoint_redraws_figure_table_and_words(run):
    shown = Explorer(run)
    (view,) = shown.views
    assert shown.step.value == 40
    image, text, table = view.image.value, view.text.value, view.likeliest.value
    assert bytes(image[:4]) == b"\x89PNG"
    shown.step.index = 0
    assert shown.step.value == -1
    assert view.image.value != image
    assert view.text.value != text
    assert view.likeliest.value != table
    assert "Checkpoint before" in view.text.value
    shown.step.value = 20
    assert shown.step.label == "20"


def test_the_words_say_the_recorded_numbers(run):
    shown = Explorer(run)
    shown.step.value = 20
    model, fact_id = shown.fact.value
    lens = run.lens[
        (run.lens.edited_model == model)
        & (run.lens.fact_id == fact_id)
        & (run.lens.step == 20)
        & (run.lens.layer == 3)
    ]
    said = [
        f"p({name}) {lens[lens.category == name].probability.item():.3f}"
        for name in ("edited", "true")
    ]
    assert f"Checkpoint 20: {', '.join(said)} after the last block" in shown.views[0].text.value


def test_text_of_facts_and_tokens_is_shown_as_text(run):
    (view,) = Explorer(run).views
    text = view.text.value + view.likeliest.value
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;1</code>" in text
    assert len(re.findall("<tr><td>", text)) == 10


def test_words_of_a_run_can_be_no_markup(run, loads):
    evil = "<img src=x onerror=alert(1)>"
    changed = runs.Run(folder=run.folder.with_name(evil), about=run.about)
    tables = {
        "lens": run.lens,
        "probes": run.probes.assign(prompt=evil, target=evil),
        "tokens": run.tokens.assign(
            token=evil, rank=[f"{rank} {evil}" for rank in run.tokens["rank"]]
        ),
    }
    changed.__dict__.update(tables)
    shown = Explorer(changed)
    (view,) = shown.views
    for text in (view.text.value, view.likeliest.value):
        assert "&lt;img" in text
        assert loads(text) == []
    view.show((0, "no such fact"), 0)
    assert view.text.value == "&lt;img src=x onerror=alert(1)&gt; does not hold this fact"


def test_in_a_saved_page_what_is_chosen_stands_in_its_place(run, several, loads):
    shown = Explorer(run, several)
    still = shown._repr_mimebundle_()["text/html"]
    assert loads(still) == []
    for view in shown.views:
        assert view.text.value in still
        assert view.likeliest.value in still
    assert (
        still.count('src="data:image/png;base64,iVBOR')
        == sum(bool(view.image.value) for view in shown.views)
        > 0
    )


def test_an_intrinsic_fact_is_listed_once_for_each_edited_model(several):
    shown = Explorer(several)
    keys = [key for _, key in shown.fact.options]
    assert len(keys) == len(set(keys)) == 6
    assert all("model" in label for label, _ in shown.fact.options)
    image = shown.views[0].image.value
    shown.fact.value = (
        (0, "intrinsic:1") if shown.fact.value != (0, "intrinsic:1") else (1, "intrinsic:1")
    )
    first = shown.views[0].image.value
    shown.fact.value = (1, "intrinsic:1")
    assert len({image, first, shown.views[0].image.value}) == 3


def test_a_second_run_is_shown_at_the_same_fact_and_step(run, several):
    shown = Explorer(run, several)
    shown.fact.value = (0, "intrinsic:6")
    assert "does not hold this fact" in shown.views[1].text.value
    shown = Explorer(several, run)
    shown.fact.value = (1, "edited:1-0")
    assert shown.views[1].image.value == b""
    shown = Explorer(run, run)
    assert shown.views[0].image.value == shown.views[1].image.value


def test_every_control_has_a_name(run):
    shown = Explorer(run)
    assert all(widget.description for widget in (shown.fact, shown.step))
    assert "workbench-explorer" in shown._dom_classes


def test_it_needs_no_torch():
    code = "import sys, workbench.explorer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
