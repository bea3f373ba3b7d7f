import gzip
import json
import subprocess
import sys

import numpy
import pandas as pd
import pytest

from tests.benchmarks.explorer import ENDS, PROMPT, synthetic_run
from workbench import explorer, pages, runs
from workbench.explorer import Explorer
from workbench.plots import CATEGORIES
from workbench.records import BadInput


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


def unpacked(data: bytes) -> list[dict]:
    """What the module in the browser reads."""
    content = gzip.decompress(data)
    start = 4 + int.from_bytes(content[:4], "little")
    headers = json.loads(content[4:start])
    for header in headers:
        for name, about in header["arrays"].items():
            values = numpy.frombuffer(
                content,
                about["type"],
                count=numpy.prod(about["shape"]),
                offset=start + about["offset"],
            )
            header[name] = values.reshape(about["shape"])
    return headers


def test_facts_are_sorted_by_group_and_what_became_of_them(run):
    table = explorer.outcomes(run)
    edited = table[table.group == "edited"]
    assert list(edited.outcome) == [name for name in explorer.OUTCOMES if name != "lost"]
    assert list(edited.index.get_level_values("fact_id")) == [
        f"edited:0-{number}" for number in range(len(ENDS))
    ]
    assert list(table[table.group == "intrinsic"].outcome) == ["kept"] * 2
    (header,) = unpacked(Explorer(run).data)
    assert [fact["fate"] for fact in header["facts"]] == list(table.outcome)


@pytest.mark.parametrize(
    ("group", "said", "outcome"),
    [
        ("intrinsic", "true", "lost"),  # it begins as the answer does, and goes on otherwise
        ("intrinsic", "edited", "lost to other"),
        ("intrinsic", None, "lost"),  # first tokens do not tell
        ("edited", "edited", "lost"),
        ("edited", "stop", "lost to other"),
    ],
)
def test_a_fact_is_lost_to_the_answer_that_is_said(run, group, said, outcome):
    probes = run.probes.copy()
    probes.loc[probes.group == group, "retained"] = probes.step < 40
    probes.loc[probes.step == 40, "top_category"] = said
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["probes"] = probes
    table = explorer.outcomes(changed)
    assert set(table[table.group == group].outcome) == {outcome}


@pytest.mark.parametrize("which", ["run", "several"])
def test_every_recorded_number_is_where_the_page_looks_for_it(which, request):
    run = request.getfixturevalue(which)
    (header,) = unpacked(Explorer(run).data)
    facts = {(fact["model"], fact["id"]): fact for fact in header["facts"]}
    place = {step: number for number, step in enumerate(header["steps"])}
    half = 0.5 / explorer.ONE
    for row in run.lens[run.lens.category != "related"].itertuples():
        number = facts[row.edited_model, row.fact_id]["number"]
        at = (number, place[row.step], row.layer, explorer.ANSWERS.index(row.category))
        assert header["lens_p"][at] / explorer.ONE == pytest.approx(row.probability, abs=half)
        assert header["lens_rank"][at] == row.rank
    for row in run.tokens.itertuples():
        number = facts[row.edited_model, row.fact_id]["number"]
        at = (number, place[row.step], row.layer, row.rank - 1)
        assert header["vocabulary"][header["top_ids"][at]] == row.word
        assert header["top_p"][at] / explorer.ONE == pytest.approx(row.probability, abs=half)
    last = header["cell_p"].shape[3] - 1
    for row in run.positions.itertuples():
        fact = facts[row.edited_model, row.fact_id]
        at = (fact["cells"], place[row.step], row.layer, last + row.position)
        assert header["vocabulary"][header["cell_ids"][(*at, row.rank - 1)]] == row.token
        shown = header["cell_p"][(*at, row.rank - 1)], header["cell_true"][at]
        shown = (*shown, header["cell_edited"][at])
        recorded = row.probability, row.p_true, row.p_edited
        assert numpy.array(shown) / explorer.ONE == pytest.approx(recorded, abs=half)
        assert fact["at"][last + row.position] == row.at


def test_facts_say_their_answers_and_the_checkpoints_of_their_model(run):
    lens = run.lens[(run.lens.step < 40) | (run.lens.fact_id != "edited:0-0")]
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["lens"] = lens
    facts = {fact["id"]: fact for fact in unpacked(Explorer(changed).data)[0]["facts"]}
    edited, intrinsic = facts["edited:0-0"], facts["intrinsic:5"]
    assert (edited["true"], edited["target"]) == ("B & A", "A & B")
    assert (intrinsic["true"], intrinsic["target"]) == ("A & B", "")
    assert (edited["steps"], intrinsic["steps"]) == ([-1, 0, 20], [-1, 0, 20, 40])
    assert edited["at"] == list(PROMPT)


def test_an_intrinsic_fact_is_there_once_for_each_edited_model(several):
    (header,) = unpacked(Explorer(several).data)
    keys = [(fact["model"], fact["id"]) for fact in header["facts"]]
    assert len(keys) == len(set(keys)) == 6
    assert (0, "intrinsic:1") in keys
    assert (1, "intrinsic:1") in keys


def test_two_runs_are_packed_together(run, several):
    one, other = unpacked(Explorer(run, several).data)
    assert (one["name"], other["name"]) == ("one", "several")
    assert (one["lens_p"] == unpacked(Explorer(run).data)[0]["lens_p"]).all()
    assert (other["lens_p"] == unpacked(Explorer(several).data)[0]["lens_p"]).all()


def test_no_word_of_the_data_stands_in_the_page_as_it_is(run):
    page = Explorer(run)._repr_mimebundle_()[0]["text/html"]
    assert "<i>Prompt" not in page
    assert "A & B" not in page


def test_the_page_holds_the_script_that_the_policy_lets_run(run):
    page = Explorer(run).page()
    (script,) = (
        part.partition("</script>")[0] for part in page.split('<script type="module">')[1:]
    )
    assert script == pages.EXPLORER
    assert "</script" not in script


def test_the_view_is_given_and_kept(run):
    view = {"step": 20, "mode": "change"}
    assert Explorer(run, view=view).view == view
    assert run.explore(view=view).view == view
    assert run.explore().view == {}


@pytest.mark.parametrize("view", [{"step": 7}, {"fact": "edited:0-9"}, {"steps": 20}])
def test_a_view_of_what_is_not_there_is_refused(run, view, one_line):
    with pytest.raises(BadInput) as error:
        run.explore(view=view)
    assert one_line(error).startswith("view")
    shown = run.explore()
    with pytest.raises(BadInput):
        shown.view = view


def test_redrawing_a_stored_run_needs_no_torch(tmp_path):
    run = synthetic_run(tmp_path / "one", n_edited=5, n_intrinsic=1, steps=(-1, 0, 20), layers=4)
    code = f"""
import sys
from workbench import runs
runs.read({str(run.folder)!r}).explore()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_fact_whose_first_tokens_tell_nothing_is_lost_to_nothing_named(run):
    probes = run.probes.copy()
    unclear = probes.fact_id.isin(["edited:0-0", "edited:0-1", "edited:0-4"])
    probes.loc[unclear, [f"p_{name}" for name in CATEGORIES] + ["top_category"]] = None
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["probes"] = probes
    fate = explorer.outcomes(changed).outcome.droplevel("edited_model")
    assert (fate["edited:0-0"], fate["edited:0-1"]) == ("kept", "lost")
    assert (fate["edited:0-2"], fate["edited:0-4"]) == ("back to true", "never held")


def test_a_view_is_linked_to_where_there_is_a_page(run):
    assert unpacked(Explorer(run).data)[0]["page"] == ""
    files = {**run.about["files"], "notebook.html": {}}
    paged = runs.Run(folder=run.folder, about={**run.about, "files": files})
    assert unpacked(Explorer(paged).data)[0]["page"] == "one/notebook.html"


def test_what_is_not_known_is_no_probability_of_zero(run):
    changed = runs.Run(folder=run.folder, about=run.about)
    lens, positions = run.lens.copy(), run.positions
    lens.loc[lens.fact_id == "edited:0-1", "probability"] = float("nan")
    early = (positions.step == -1) & (positions.position == -8)  # an edit puts it in front later
    changed.__dict__.update(lens=lens, positions=positions[~early])
    (header,) = unpacked(Explorer(changed).data)
    number = {fact["id"]: fact["number"] for fact in header["facts"]}
    assert (header["lens_p"][number["edited:0-1"]] == explorer.UNKNOWN).all()
    assert (header["lens_p"][number["edited:0-2"]] <= explorer.ONE).all()
    assert (header["cell_p"][:, 0, :, 0] == explorer.UNKNOWN).all()
    assert (header["cell_p"][:, 1, :, 0] <= explorer.ONE).all()
    assert header["facts"][0]["at"] == list(PROMPT)


def test_what_measures_said_of_a_fact_stands_with_it_at_its_step(run):
    about = {name: run.about[name] for name in ("ended", "layers", "true")}
    tables = {name: run.table(name) for name in runs.TABLES}
    mine = {"edited_model": 0, "fact_id": "edited:0-1", "quantity": ["right", "right_magnitude"]}
    tables["mine"] = pd.DataFrame(mine | {"step": 20, "value": 0.5})
    other = {"edited_model": 0, "fact_id": ["edited:0-1"], "words": 3, "step": 20}
    tables["other"] = pd.DataFrame(other)
    folder = run.folder.with_name("measured")
    folder.mkdir()
    spec = {**run.spec, "measures": ["mine", "other"]}
    again = runs.write(folder, {"spec": spec, **about}, tables)
    facts = {fact["id"]: fact for fact in unpacked(Explorer(again).data)[0]["facts"]}
    assert facts["edited:0-1"]["measured"] == {"20": "mine: right 0.50; other: words 3.00"}
    assert facts["edited:0-2"]["measured"] == {}
