"""Figures say what the recorded tables say, in words too, and are saved with the data they drew."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from tests.benchmarks.synthetic_runs import synthetic
from workbench import facts, plots, runs
from workbench.facts import BadInput

IDS = [request.fact.id for request in facts.read("world") if request.fact.split == "study"][:8]
STEPS = (-1, 0, 10, 20)
LENS = {
    "true": 0.2,
    "edited": 0.5,
}  # after block 0 and the edit; more with each block, less with each step
BANDS = "; bands: 95 % interval over facts"
LAST_BLOCK = (
    "p(edited token) after the last block: 0.70 after the edit, 0.60 after 20 steps (n = 4)"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(**fields of the Spec, kept=...) -> Run of four edited facts, of which one did not take,
    and four intrinsic ones.
    """
    out, number = tmp_path_factory.mktemp("runs"), itertools.count()

    def make(kept: int, metrics=(4.0, 3.0, 2.0), kind="loss", **fields):
        rows = []
        for step, (place, fact) in itertools.product(STEPS, enumerate(IDS)):
            edited = place < 4
            took = place != 3 if edited else True
            retained = {-1: not edited, 0: took}.get(step, place < kept if edited else place < 6)
            p = 0.8 if retained else 0.05
            masses = {
                "p_true": 0.1 if edited else p,
                "p_edited": p if edited else 0.1,
                "p_related": 0.05,
                "p_stop": 0.02,
            }
            masses["p_other"] = 1 - sum(masses.values())
            about = {
                "edited_model": 0,
                "step": step,
                "group": "edited" if edited else "intrinsic",
                "fact_id": fact,
                "prompt": f"{fact} is",
                "target": f"<b>{fact}",
            }
            rows.append(
                about | {"took": took if step >= 0 else None, "retained": retained} | masses
            )
        lens = [
            {
                "edited_model": 0,
                "step": step,
                "fact_id": fact,
                "layer": layer,
                "category": category,
                "probability": first + layer / 10 - step / 200,
                "rank": 1.0 + layer,
            }
            for step, fact, layer, (category, first) in itertools.product(
                STEPS, IDS, range(3), LENS.items()
            )
        ]
        tokens = [
            {
                "edited_model": 0,
                "step": step,
                "fact_id": fact,
                "layer": layer,
                "rank": rank,
                "token": f" <b>{rank}",
                "probability": 0.1,
            }
            for step, fact, layer, rank in itertools.product(STEPS, IDS, range(3), (1, 2, 3))
        ]
        tables = {
            "probes": pd.DataFrame(rows).astype({"took": "boolean"}),
            "lens": pd.DataFrame(lens),
            "tokens": pd.DataFrame(tokens),
            "training": pd.DataFrame({"edited_model": 0, "step": STEPS[1:], "metric": metrics}),
        }
        spec = {
            "model": "world-gpt2",
            "task": "text",
            "task_data": "",
            "facts": "world",
            "editor": "rome",
            "paraphrases": 1,
            "layers": [],
        } | fields
        about = {
            "spec": spec,
            "ended": ["budget"],
            "layers": [1],
            "tuning": {"metric": kind, "tokens_per_step": 100.0},
        }
        folder = out / f"run-{next(number)}"
        folder.mkdir()
        return runs.write(folder, about, tables)

    return make


def test_success_is_of_all_and_kept_is_of_those_that_took(made):
    drawing = plots.retention_by([made(2, editor="rome"), made(0, editor="ft")], "editor")
    means = drawing.data.groupby(["series", "value"]).retained.mean()
    assert means["edit success", "rome"] == 0.75
    assert means["edits kept", "rome"] == pytest.approx(2 / 3)
    assert means["edits kept", "ft"] == 0
    assert means["intrinsic kept", "ft"] == 0.5
    assert "edits kept: rome 0.67, ft 0.00" in drawing.summary


def marks(axes) -> dict[str, float]:
    """The labels of the horizontal axis and where they stand."""
    names = [label.get_text() for label in axes.get_xticklabels()]
    return dict(zip(names, axes.get_xticks().tolist(), strict=True))


def drawn(axes) -> list[float]:
    """Where the points of the middle series stand."""
    return [x for line in axes.lines if len(line.get_xdata()) > 1 for x in line.get_xdata()]


def test_numbers_are_spaced_as_numbers_and_other_values_stand_as_the_runs_come(made):
    found = [made(2, paraphrases=k) for k in (10, 1, 3)]
    drawing = plots.retention_by(found, "paraphrases", label="statements")
    (axes,) = drawing.figure.axes
    assert marks(axes) == {"1": 1, "3": 3, "10": 10}
    points = axes.lines[0].get_xdata()  # of the first series, which stands a little to the left
    assert (points[2] - points[1]) / (points[1] - points[0]) == pytest.approx(7 / 2)
    assert axes.get_xlabel() == "statements"
    assert "edit success: 1 0.75, 3 0.75, 10 0.75" in drawing.summary
    found = [made(2, editor=name) for name in ("rome", "ft")]
    (axes,) = plots.retention_by(found, "editor").figure.axes
    assert marks(axes) == {"rome": 0, "ft": 1}
    found = [made(2, learning_rate=rate) for rate in (1e-3, 5e-5, 5e-4)]
    (axes,) = plots.retention_by(found, "learning_rate").figure.axes
    assert marks(axes) == {"5e-05": 5e-5, "0.0005": 5e-4, "0.001": 1e-3}


def test_thresholds_and_windows_have_scales_of_their_own(made):
    plans = ("window:10-12", "after:10", "window:2-4", "after:6", "edited", "all")
    found = [made(2, plan=plan) for plan in plans]
    figure = plots.retention_by(found, "plan").figure
    assert [marks(axes) for axes in figure.axes] == [
        {"edited": 0, "all": 1},
        {"after:6": 6, "after:10": 10},
        {"window:2-4": 3, "window:10-12": 11},
    ]
    assert len(figure.axes[2].get_legend().get_texts()) == 3
    assert figure.axes[0].get_legend() is None
    (axes,) = plots.retention_by(found[1:3], "plan").figure.axes
    assert marks(axes) == {"after:10": 0, "window:2-4": 1}  # one of a kind makes no scale
    found = [made(2, layers=layers) for layers in ([2, 3, 4], [3], [1])]
    (axes,) = plots.retention_by(found, "layers").figure.axes
    assert sorted(marks(axes).values()) == [0, 1, 2]  # two stand at block 3: not on one spot


def test_figures_with_bands_say_what_they_are(made):
    run = made(2)
    for drawing in (plots.category_mass(run, "edited"), plots.retention_curves([run], "editor")):
        assert all("95 %" in axes.get_title() for axes in drawing.figure.axes)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([], "preset"),
        ([3], "3"),
        ([2, 3, 4], "2-4"),
        ([1, 5, 9], "1, 5, 9"),  # not the name of the blocks from 1 to 9
        ([4, 3, 9], "3-4, 9"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ("", "none"),
        (5, "5"),
        ("after:3", "after:3"),
    ],
)
def test_values_have_names(value, name):
    assert runs.value_name(value) == name


def test_curves_run_over_steps_or_over_the_metric_with_learning_to_the_right(made):
    arms = [made(2, plan="all"), made(3, metrics=(4.0, 3.5, 3.2), plan="after:6")]
    by_step, by_metric = (
        plots.retention_curves(arms, "plan"),
        plots.retention_curves(arms, "plan", against="metric"),
    )
    assert "kept at the end: edited: all 0.67, after:6 1.00" in by_step.summary
    left, right = by_metric.figure.axes[0].get_xlim()
    assert left > right  # a loss falls
    assert any(
        line.get_xdata()[0] == 3.2 for line in by_metric.figure.axes[0].lines
    )  # the loosest best
    left, right = (
        plots.retention_curves(
            [made(2, metrics=(0.1, 0.2, 0.3), kind="accuracy", plan="all")], "plan", "metric"
        )
        .figure.axes[0]
        .get_xlim()
    )
    assert left < right
    with pytest.raises(BadInput):
        plots.retention_curves(arms, "plan", against="mood")


def test_elasticity_counts_bits_by_the_wordings_that_wrote_the_fact(made):
    data = plots.elasticity([made(2, paraphrases=1), made(3, paraphrases=5)]).data
    edited = data[(data.group == "edited") & (data.tokens == 2000)].groupby("wordings").bits.mean()
    assert edited[5] == pytest.approx(0.3219, abs=1e-3)  # all three that took: -log2 .8
    assert edited[1] == pytest.approx((2 * 0.3219 + 4.3219) / 3, abs=1e-3)
    shown = {request.fact.id: request.fact.exposure.paraphrases for request in facts.read("world")}
    intrinsic = data[data.group == "intrinsic"]
    assert (intrinsic.wordings == intrinsic.fact_id.map(shown)).all()
    assert intrinsic.groupby("fact_id").size().max() == 3  # the same facts in both runs count once


def test_a_grid_holds_mean_interval_and_n(made):
    found = [
        made(2, editor="rome", task="text"),
        made(0, editor="rome", task="facts"),
        made(3, editor="ft", task="text"),
    ]
    drawing = plots.retention_grid(found, "editor", "task")
    texts = {text.get_text() for text in drawing.figure.axes[0].texts}
    assert "1.00 [0.29, 1.00]\nn = 3" in texts  # three of three may be three in ten
    assert "0.00 [0.00, 0.71]\nn = 3" in texts
    assert len(texts) == 3  # no cell without runs
    assert "most with editor ft and task text" in drawing.summary


@pytest.mark.parametrize(
    ("draw", "group", "summary"),
    [
        (
            plots.category_mass,
            "edited",
            f"edited, n = 4: mean p(edited) is 0.61 after the edit and 0.24 after 20 steps{BANDS}",
        ),
        (
            plots.category_mass,
            "intrinsic",
            "intrinsic, n = 4: mean p(true) is 0.80 after the edit and 0.4",
        ),
        (plots.lens_heatmap, "edited", LAST_BLOCK),
        (plots.lens_heatmap, "intrinsic", LAST_BLOCK),
    ],
)
def test_every_figure_has_words_and_can_be_saved_with_its_data(
    made, tmp_path, draw, group, summary
):
    drawing = draw(made(1), group)
    assert summary in drawing.summary
    for ending in ("png", "svg"):
        path = drawing.save(tmp_path / f"figure.{ending}")
        assert path.stat().st_size > 1000
    assert len(pd.read_csv(tmp_path / "figure.csv")) == len(drawing.data)
    bundle = drawing._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["text/plain"] == drawing.summary


EVIL = "<img src=x onerror=alert(1)> <script> --> $\\frac $"


def test_words_of_the_data_are_drawn_as_they_are(made, tmp_path, loads):
    """Names that would be markup, end a comment, or be a formula that cannot be set."""
    found = [made(2, editor=EVIL, task=EVIL), made(0, editor=f"=1+1 {EVIL}", task="text")]
    run = found[0]
    fact = IDS[0]
    drawings = [
        plots.retention_by(found, "editor", label=EVIL),
        plots.retention_curves(found, "editor"),
        plots.retention_grid(found, "editor", "task"),
        plots.lens_heatmap(_renamed(run, fact, EVIL)),
    ]
    for number, drawing in enumerate(drawings):
        page = drawing._repr_mimebundle_()["text/html"]
        assert "<script" not in page
        assert page.count("<img") == 1
        assert loads(page) == []
        picture = ElementTree.parse(drawing.save(tmp_path / f"{number}.svg"))
        tags = {element.tag.rpartition("}")[2] for element in picture.iter()}
        assert not tags & {"script", "foreignObject", "a"}
        assert not [
            name for element in picture.iter() for name in element.attrib if name.startswith("on")
        ]
        for element in picture.iter():
            if link := element.get("{http://www.w3.org/1999/xlink}href"):
                assert link.startswith(("#", "data:"))
    assert "'=1+1 <img" in (tmp_path / "0.csv").read_text()


def _renamed(run, fact_id, name):
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["lens"] = run.lens.replace({"fact_id": {fact_id: name}})
    return changed


def test_tokens_stand_in_a_table_as_text(made, loads):
    run = made(2)
    table = plots.top_tokens(run)
    assert run.top_tokens().equals(table)
    assert table.iloc[0, 0].startswith("<b>1")
    assert "&lt;b&gt;1" in table._repr_html_()
    assert loads(table.replace("(?s).*", EVIL, regex=True)._repr_html_()) == []


def test_nothing_to_draw_is_one_clear_line(one_line):
    for draw in (
        plots.elasticity,
        lambda found: plots.retention_by(found, "editor"),
        lambda found: plots.retention_curves(found, "editor"),
    ):
        with pytest.raises(BadInput) as error:
            draw([])
        assert "no runs" in one_line(error)


def test_prompts_and_edited_models_of_one_fact_count_once(made):
    run = made(2)
    twice = run.probes.assign(edited_model=1, prompt=run.probes.prompt + " again", retained=False)
    runs.write(
        run.folder,
        {key: value for key, value in run.about.items() if key not in ("schema", "status")},
        {"probes": pd.concat([run.probes, twice])},
    )
    again = runs.read(run.folder)
    found = runs.series([again], ["intrinsic kept"], pd.DataFrame([{"seed": 0}]))
    assert len(found) == 4
    assert set(found.retained) == {0.5, 0.0}


def test_a_fact_of_runs_that_are_pooled_counts_once(made):
    drawing = plots.retention_by(
        [made(2, editor="rome"), made(0, editor="ft")],
        "model",
        series=["intrinsic kept", "edits kept"],
    )
    assert drawing.data.groupby("series").size().to_dict() == {"intrinsic kept": 4, "edits kept": 3}
    assert drawing.data[drawing.data.series == "edits kept"].retained.tolist() == [0.5, 0.5, 0]
    assert (
        len(
            plots.retention_grid(
                [made(2, editor="rome"), made(0, editor="ft")], "model", "task"
            ).data
        )
        == 3
    )


def with_one_that_ends_early(run):
    """The run with a second edited model that keeps everything and ends at step 10."""
    kept = run.probes[run.probes.step <= 10].assign(edited_model=1, retained=True, p_edited=0.9)
    tables = {
        "probes": pd.concat([run.probes, kept]),
        "training": pd.concat(
            [run.training, run.training[run.training.step <= 10].assign(edited_model=1)]
        ),
        "lens": run.lens,
        "tokens": run.tokens,
    }
    return runs.write(
        run.folder,
        {key: value for key, value in run.about.items() if key not in ("schema", "status")},
        tables,
    )


def test_a_model_that_ended_early_counts_to_the_end(made):
    run = with_one_that_ends_early(made(0))
    curve = plots.retention_curves([run], "editor").data
    assert curve[(curve.group == "edited") & (curve.step == 20)].retained.mean() == 0.5
    mass = plots.category_mass(run).data
    assert mass[
        (mass.step == 20) & (mass.category == "edited")
    ].probability.mean() == pytest.approx((0.05 + 0.9) / 2)
    assert mass.groupby(["step", "category"]).size().max() == 4
    table = plots.retention_table(run).set_index(["group", "step"])
    assert table.loc[("edited", 20), "n"] == table.loc[("edited", 0), "n"] == 8


def test_elasticity_is_of_all_runs_and_ends_with_the_first(made):
    drawing = plots.elasticity(
        [with_one_that_ends_early(made(0, editor="rome")), made(0, editor="ft")]
    )
    data = drawing.data[drawing.data.group == "edited"]
    assert data.step.max() == 10
    assert data.groupby(["wordings", "step"]).size().max() == 3  # one did not take
    last = data[data.step == 10].bits.iloc[0]
    assert last == pytest.approx(-numpy.log2([0.05, 0.05, 0.9]).mean())
    assert "pooled over editor" in drawing.figure.axes[0].get_title()


def test_a_figure_says_over_what_unlike_runs_it_pools(made):
    found = [
        made(2, editor="rome", task="text", seed=0),
        made(0, editor="rome", task="text", seed=1),
        made(3, editor="ft", task="text"),
    ]
    # seeds are meant to be pooled
    assert "pooled" not in plots.retention_by(found, "editor").figure.get_suptitle()
    title = plots.retention_by(found, "task").figure.get_suptitle()
    assert title.endswith("; pooled over editor")
    mixed = [*found, made(1, editor="ft", task="facts", plan="edited")]
    assert plots.retention_grid(mixed, "editor", "task").figure.axes[0].get_title() == "edits kept"
    assert (
        plots.retention_grid(mixed, "editor", "model").figure.axes[0].get_title()
        == "edits kept; pooled over task, plan"
    )


def test_a_group_or_category_that_is_none_is_one_clear_line(made, one_line):
    run = made(0)
    for draw, words in (
        (lambda: plots.category_mass(run, "editd"), "group 'editd', did you mean 'edited'?"),
        (lambda: plots.lens_heatmap(run, "intrinsc"), "did you mean 'intrinsic'?"),
        (
            lambda: plots.lens_heatmap(run, categories=("tru",)),
            "category 'tru', did you mean 'true'?",
        ),
        (lambda: plots.lens_heatmap(run, categories="tru"), "choose one of true, edited"),
        (lambda: plots.lens_heatmap(run, categories=()), "category ''"),
    ):
        with pytest.raises(BadInput) as error:
            draw()
        assert words in one_line(error)


def test_a_figure_is_saved_into_a_folder_that_is_made(made, tmp_path):
    path = plots.category_mass(made(0)).save(tmp_path / "figures" / "here" / "mass.png")
    assert path.is_file()
    assert path.with_suffix(".csv").is_file()


def test_a_quantised_model_is_named_with_what_it_was_rounded_to(made):
    run = made(2)
    about = {**run.about, "revision": "Q4_1, GGUF 1a2b"}
    rounded = runs.Run(folder=run.folder, about=about)
    for draw in (plots.category_mass, plots.lens_heatmap):
        words = " ".join(text.get_text() for text in draw(rounded).figure.findobj(Text))
        assert "Q4_1, GGUF 1a2b" in words
        assert "GGUF" not in " ".join(text.get_text() for text in draw(run).figure.findobj(Text))
    assert "Q4_1, GGUF 1a2b" in plots._pooled([rounded], "editor")


def test_one_category_needs_no_list(made):
    run = made(0)
    alone = plots.lens_heatmap(run, categories="true").data
    pd.testing.assert_frame_equal(alone, plots.lens_heatmap(run, categories=["true"]).data)


# --- What a notebook shows


class _Links(HTMLParser):
    """Name and content of what the links of a page save, and the words of its pictures."""

    def __init__(self, page: str):
        super().__init__()
        self.saved, self.alt = {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        if tag == "a":
            kind, _, content = names["href"].partition(";base64,")
            self.saved[names["download"]] = (kind, base64.b64decode(content))
        elif tag == "img":
            self.alt.append(names["alt"])


def test_links_beneath_a_figure_save_it_and_its_data(made):
    drawing = plots.category_mass(made(1))
    bundle = drawing._repr_mimebundle_()
    page = _Links(bundle["text/html"])
    assert page.alt == [drawing.summary]
    kinds = {name.rpartition(".")[2]: content for name, content in page.saved.items()}
    assert len({name.rpartition(".")[0] for name in page.saved}) == 1
    assert all(re.fullmatch(r"[\w-]+\.\w+", name) for name in page.saved)
    assert kinds["png"] == ("data:image/png", bundle["image/png"])
    kind, svg = kinds["svg"]
    assert kind == "data:image/svg+xml"
    words = {element.text for element in ElementTree.fromstring(svg).iter() if element.text}
    assert "fine-tuning step" in words  # words, not outlines of letters
    kind, csv = kinds["csv"]
    assert kind == "data:text/csv"
    assert len(pd.read_csv(io.BytesIO(csv))) == len(drawing.data)


def test_a_large_file_is_left_out_and_named(made):
    drawing = plots.category_mass(made(1))
    data = pd.DataFrame({"number": range(100_000)})
    large = plots.Drawing(figure=drawing.figure, data=data, summary='of "all" <b>')
    page = large._repr_mimebundle_()["text/html"]
    assert {name.rpartition(".")[2] for name in _Links(page).saved} == {"svg", "png"}
    assert "CSV: too large" in page
    assert _Links(page).alt == ['of "all" <b>']


def test_a_figure_is_a_light_sheet_on_any_theme(made):
    drawing = plots.category_mass(made(1))
    picture = Image.open(io.BytesIO(drawing.png()))
    assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    page = drawing._repr_mimebundle_()["text/html"]
    assert "border: 1px solid" in page
    assert "background-color: #fff" in page


def test_a_single_fact_is_named_by_its_answers(case_study):
    legend = plots.category_mass(case_study).figure.axes[0].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:2] == ["harp (true)", "flute (edited)"]
    titles = [axes.get_title() for axes in plots.lens_heatmap(case_study).figure.axes]
    assert titles[:2] == ["flute (edited)", "harp (true)"]


def test_several_facts_are_named_by_what_their_answers_are(made):
    legend = plots.category_mass(made(1)).figure.axes[0].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert [name.replace("\n", " ") for name in names] == list(plots.LABELS.values())


def test_a_word_that_would_be_blank_is_named(made):
    run = made(1)
    tokens = run.tokens.assign(
        word=run.tokens.token.replace({" <b>1": "", " <b>2": "<|endoftext|>"})
    )
    run.__dict__["tokens"] = tokens
    first = plots.top_tokens(run).iloc[0]
    assert first["top 1"] == "(space) 0.100"
    assert first["top 2"] == "(end of text) 0.100"


def deep(run, n_layers: int, steps: list[int]):
    """The run with a lens of so many blocks and checkpoints."""
    rows = itertools.product(steps, IDS, range(n_layers), LENS)
    lens = pd.DataFrame(rows, columns=["step", "fact_id", "layer", "category"])
    changed = runs.Run(folder=run.folder, about=run.about)
    changed.__dict__["lens"] = lens.assign(edited_model=0, probability=0.5, rank=2.0)
    first = run.probes[run.probes.step == 0]
    changed.__dict__["probes"] = pd.concat([first.assign(step=step) for step in steps])
    return changed


LONG = "a-folder/of/SomeFamily-135M-Instruct-with-a-very-long-name, and more words than fit"
MANY = [-1, 0, *range(100, 12_001, 100)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda made: plots.lens_heatmap(deep(made(1), 30, [-1, 0, 5, 10])),
        lambda made: plots.lens_heatmap(deep(made(1), 30, MANY)),
        lambda made: plots.lens_heatmap(deep(made(1), 120, MANY), categories="true"),
        lambda made: plots.category_mass(deep(made(1), 2, MANY)),
        lambda made: plots.retention_by([made(1, model=f"{LONG} {n}") for n in range(7)], "model"),
        lambda made: plots.retention_by(
            [made(1, editor=f"edited-matrices-{n}") for n in range(3)], "editor"
        ),
        lambda made: plots.retention_by(
            [made(1, paraphrases=n) for n in (1, 2, 3, 500)], "paraphrases"
        ),
        lambda made: plots.retention_by(
            [
                made(1, plan=plan)
                for start in range(9)
                for plan in (f"after:{start}", f"window:{start}-{start + 3}")
            ],
            "plan",
        ),
        lambda made: plots.retention_grid(
            [made(1, model=f"{LONG} {n}", task=f"{n} {LONG}") for n in range(3)], "model", "task"
        ),
        lambda made: plots.retention_curves(
            [made(1, editor=LONG), made(1, editor="short")], "editor", "metric"
        ),
        lambda made: plots.elasticity([made(1)]),
    ],
)
def test_labels_of_ticks_never_touch(made, draw):
    figure = draw(made).figure
    figure.draw_without_rendering()
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        labels = [label for label in axis.get_ticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert len(labels) != 1
        if axis.get_label_text() in ("model", "task", "editor"):
            assert len(labels) == len(axis.get_ticklocs())  # names are never left out
    assert figure.get_size_inches()[0] < 26
    assert min(axes.get_window_extent().width for axes in figure.axes[:1]) > 0.2 * figure.bbox.width


# --- What became of the edits, as one sentence


def outcome(held, took=True, others=(1.0, 1.0), n=1, ended=("budget",), judged=()) -> str:
    """The sentence of a run with these shares kept at steps 0, 20, 40 ..., n edits and ten facts
    that are only watched.
    """
    rows = []
    for number, share in enumerate(held):
        for fact in range(n):
            about = {"group": "edited", "fact_id": f"e{fact}", "p_edited": 0.966, "target": "Apple"}
            kept = fact < round(share * n)
            rows.append(about | {"step": 20 * number, "took": took, "retained": kept})
        for fact in range(10 if others else 0):
            about = {"group": "intrinsic", "fact_id": f"i{fact}", "took": None}
            first, last = others
            share = first if number == 0 else last
            rows.append(about | {"step": 20 * number, "retained": fact < round(10 * share)})
        for place, said in enumerate(judged):
            about = {"group": "paraphrase", "fact_id": "e0", "prompt": str(place), "took": took}
            rows.append(about | {"step": 20 * number, "retained": said})
    run = runs.Run(folder=None, about={"ended": list(ended)})
    run.__dict__["probes"] = pd.DataFrame(rows).assign(edited_model=0)
    return plots.outcome(run)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            {"held": (1, 1, 0, 0)},
            "The edit took (Apple 0.97) and was gone after 40 steps; "
            "the 10 watched facts stayed at 1.00.",
        ),
        (
            {"held": (1, 1, 1), "others": (1.0, 0.9)},
            "The edit took (Apple 0.97) and was still there after 40 steps; "
            "the 10 watched facts went from 1.00 to 0.90.",
        ),
        (
            {"held": (1, 0, 1), "others": ()},
            "The edit took (Apple 0.97) and was gone after 20 steps, but there again after 40.",
        ),
        (
            {"held": (1, 0, 1, 0), "others": ()},
            "The edit took (Apple 0.97) and was gone after 60 steps.",
        ),
        (
            {"held": (0, 0, 1), "took": False, "judged": (False,)},
            "The edit did not take (Apple 0.97); the 10 watched facts stayed at 1.00.",
        ),
        (
            {"held": (1, 1), "others": (), "judged": (True, False), "ended": ("reached",)},
            "The edit took (Apple 0.97; 1 of 2 withheld wordings said it too) and was still there "
            "after 20 steps; the tuning ended at its threshold.",
        ),
        (
            {"held": (1, 0.25), "n": 4, "others": (), "ended": ("reached", "budget")},
            "4 of 4 edits took (mean p 0.97), and 1 was still there after 20 steps; "
            "the tuning ended at its threshold in 1 of 2 models.",
        ),
        ({"held": (0, 0), "took": False, "n": 4, "others": ()}, "0 of 4 edits took (mean p 0.97)."),
    ],
)
def test_what_became_of_the_edits_is_one_sentence(run, sentence):
    assert outcome(**run) == sentence


def test_measures_are_drawn_with_all_their_names_and_what_changed_most():
    rows = [
        ("counterfact", "efficacy", 0.0, 1.0, 1.0, 1.0, 9),
        ("counterfact", "paraphrase", 0.1, 0.7, 0.5, 0.9, 9),
        ("locality", "text", None, 0.2, 0.1, 0.3, 4),
    ]
    columns = ["measure", "quantity", "before", "after", "low", "high", "n"]
    drawing = plots.measured(pd.DataFrame(rows, columns=columns))
    first, second = drawing.figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["efficacy", "paraphrase"]
    assert all(label.get_visible() for label in first.get_yticklabels())
    assert (first.get_title(), second.get_xlabel()) == ("counterfact", "nats")
    (after, *_), (before,) = first.containers[0], first.lines[-1:]
    assert after.get_xdata().tolist() == [1.0, 0.7]
    assert before.get_xdata().tolist() == [0.0, 0.1]
    assert drawing.summary == "most changed is efficacy of counterfact: 0.00 to 1.00"


# --- measures


def test_measures_over_steps_are_means_over_facts_a_panel_a_measure(tmp_path):
    rows = [(-1, "a", 0.0), (-1, "b", 0.0), (0, "a", 1.0), (0, "b", 0.5), (20, "a", 0.5)]
    mine = pd.DataFrame([*rows, (20, "b", 0.0)], columns=["step", "fact_id", "value"])
    right = mine.assign(edited_model=0, quantity="is_right")
    tables = {"mine": pd.concat([right, right.assign(quantity="right_magnitude")])}
    tables["other"] = right.assign(quantity="far")
    run = synthetic(tmp_path, 1.0, measured=tables, editor="ft", task="text", seed=0)
    drawing = plots.measured_over_steps(run)
    left, right = drawing.figure.axes
    assert left.get_title() == "mine (n = 2 a line; bands: 95 %)"
    assert left.lines[0].get_ydata().tolist() == [0.0, 0.75, 0.25]
    assert [label.get_text() for label in left.get_xticklabels()] == ["before", "edited", "20"]
    assert set(drawing.data.quantity) == {"is right", "far"}
    assert drawing.summary == "after 20 steps: is right 0.25, far 0.25"


def test_a_run_without_measures_says_so_in_the_figures_place(tmp_path):
    run = synthetic(tmp_path, 1.0, editor="ft", task="text", seed=0)
    assert plots.measured_over_steps(run).summary == "this run's Spec names no measures"


# --- traces


def test_traces_stand_by_p_with_the_edited_ones_by_what_is_said():
    subjects = pd.DataFrame({"subject": ["Ann", "Bob", "ann", "Cy", "Di"]})
    subjects["p"] = [0.5, 1e-4, 1e-6, 1.0, 0.01]
    names = ("Bob", "Ann", "Cy")
    edited = [
        facts.EditRequest(
            fact=facts.Fact(id=name, subject=name, prompt="{} is", object="a"), target="b"
        )
        for name in names
    ]
    drawing = plots.traces(subjects, edited, [True, False, False])
    assert drawing.data.subject.tolist() == ["Ann", "Bob", "Di", "Cy"]
    assert drawing.data.trace.tolist() == pytest.approx([6, 4, 2, 0])
    hidden, shown = "edited, no longer said", "edited, still said"
    assert drawing.data.kind.tolist() == [hidden, shown, "not edited", hidden]
    assert drawing.summary == "2 of 3 edited subjects are among as many of least p"
    (axes,) = drawing.figure.axes
    drawn = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert drawn == {f"{hidden} (2)": [1, 4], f"{shown} (1)": [2], "not edited (1)": [3]}


def test_where_nobody_knows_who_was_edited_the_named_stand_out():
    subjects = pd.DataFrame({"subject": ["Ann", "Bob", "ann"], "p": [0.5, 1e-4, 1e-6]})
    drawing = plots.traces(subjects.assign(written=[True, False, True]))
    assert drawing.data.kind.tolist() == ["named", "not named"]
    assert drawing.summary == "1 of 2 subjects are named"
    labels = [text.get_text() for text in drawing.figure.axes[0].get_legend().texts]
    assert labels == ["not named (1)", "named (1)"]


def test_each_edit_goes_from_its_trace_and_answer_to_where_both_end(tmp_path):
    ids = list("abc")
    table = pd.DataFrame({"fact_id": ids * 2, "step": [0] * 3 + [20] * 3, "edited_model": 0})
    trace = table.assign(rank=1.0, p=[1e-9] * 5 + [1e-2], share=[1.0] * 3 + [0.9, 0.8, 0.1])
    trace["reach"] = trace.share / 2
    run = synthetic(tmp_path, 1.0, measured={"trace": trace}, editor="ft", task="text", seed=0)
    probes = table.assign(
        group="edited", took=[True, True, False] * 2, p_answer=[0.9] * 3 + [0.7] * 3
    )
    probes["retained"] = [True] * 3 + [True, False, False]
    vars(run)["probes"] = probes
    drawing = plots.traces_over_time(run)
    assert set(drawing.data.fact_id) == {"a", "b"}  # the third edit did not take
    hidden, shown = "edited, no longer said", "edited, still said"
    kinds = drawing.data.groupby("fact_id").kind.unique()
    assert kinds.map(list).to_dict() == {"a": [shown], "b": [hidden]}
    left, middle, right = drawing.figure.axes
    for axes, ends in ((left, [9, 9]), (middle, [0.9, 0.8]), (right, [0.45, 0.4])):
        assert [line.get_xdata()[-1] for line in axes.lines[:2]] == pytest.approx(ends)
        assert axes.lines[2].get_ydata().tolist() == [0.9, 0.9]  # where they begin
        drawn = sorted(map(tuple, axes.collections[0].get_offsets().tolist()))
        assert drawn == [pytest.approx((end, 0.7)) for end in sorted(ends)]
    assert drawing.summary == (
        "after 20 steps 1 of 2 edits are no longer said; "
        "of their shift stands 0.80 and 0.40 is reached"
    )


def test_a_run_without_the_trace_says_so_in_the_figures_place(tmp_path):
    run = synthetic(tmp_path, 1.0, editor="ft", task="text", seed=0)
    assert "does not name the measure trace" in plots.traces_over_time(run).summary
