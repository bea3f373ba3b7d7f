import html
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.explorer import synthetic_run
from workbench import editing, facts, job, panel, plots, runs, study
from workbench.explorer import Explorer
from workbench.panel import Panel

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"
FACT = "developer:windows-mobile-6-5"
EVIL = "<img src=x onerror=alert(1)> & \"co\" 'x'"


def choose(controls: Panel, **values) -> None:
    for name, value in values.items():
        controls.choices[name].value = value


def label_of(controls: Panel, fact_id: str) -> str:
    return next(
        label for label in controls.choices["fact"].options if label.startswith(f"{fact_id}: ")
    )


# --- the Spec passes through
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {
            "max_steps": 37,
            "paraphrases": 4,
            "layers": [3, 5],
            "editor": "memit",
            "seed": 9,
            "fact": FACT,
        },
        {"layers": [3, 4, 5], "editor": "memit", "plan": "window:2-99"},
        {
            "model": "owner/name",
            "plan": "nonsense",
            "adapter": "dora",
            "variant": "paper",
            "editor": "memit",
        },
        {"fact": "of another file", "facts": "owner/data", "task": "facts"},
        {"subject": "A", "prompt": "{} b", "object": "c", "target": "d"},
    ],
)
def test_whatever_nobody_touches_passes_through_unchanged(fields):
    spec = study.Spec(**fields)
    controls = Panel(spec)
    assert controls.spec is spec
    choose(controls, max_steps=80)
    changed = spec.model_copy(update={"max_steps": 80})
    assert controls.spec == (spec if controls._problem else changed)


def test_a_value_outside_a_list_is_offered():
    controls = Panel(
        study.Spec(
            max_steps=37,
            paraphrases=4,
            layers=[3, 5],
            editor="memit",
            plan="window:2-99",
            model="owner/name",
        )
    )
    shown = {name: widget.value for name, widget in controls.choices.items()}
    assert (
        shown["max_steps"],
        shown["paraphrases"],
        shown["layers"],
        shown["plan"],
        shown["model"],
    ) == (37, 4, "3, 5", "window:2-99", "owner/name")


@pytest.mark.parametrize(
    ("moves", "changed"),
    [
        ({"editor": "ft"}, {"editor": "ft"}),
        ({"model": "world-llama"}, {"model": "world-llama"}),
        ({"paraphrases": 5}, {"paraphrases": 5}),
        (
            {"task": "facts", "adapter": "lora", "max_steps": 20},
            {"task": "facts", "adapter": "lora", "max_steps": 20},
        ),
        ({"layers": "7"}, {"layers": (7,)}),
        ({"editor": "memit", "layers": "2-4"}, {"editor": "memit", "layers": (2, 3, 4)}),
        ({"editor": "memit", "layers": " 0-1,6 "}, {"editor": "memit", "layers": (0, 1, 6)}),
        ({"plan": "after:3"}, {"plan": "after:3"}),
        ({"plan": "window:3-8"}, {"plan": "window:3-8"}),
        ({"plan": "edited-matrices"}, {"plan": "edited-matrices"}),
        ({"fact": "field:moliere"}, {"fact": "field:moliere"}),
        ({"fact": ""}, {"fact": ""}),
    ],
)
def test_a_choice_changes_that_field_alone(moves, changed):
    start = {"seed": 3, "fact": FACT}
    controls = Panel(study.Spec(**start))
    choose(controls, **moves)
    assert controls.message.value == ""
    assert controls.spec == study.Spec(**(start | changed))


def test_the_recipe_for_an_edited_model_can_be_chosen_and_is_said():
    controls = Panel(study.Spec(fact=FACT, task="facts"))
    assert "rate" not in controls.headline.value
    choose(controls, protect="replay+span", learning_rate=6e-4)
    assert (controls.spec.protect, controls.spec.learning_rate) == ("replay+span", 6e-4)
    assert ", protection replay+span, learning rate 0.0006" in controls.headline.value


def test_a_layer_list_that_is_no_window_stays_until_it_is_changed():
    controls = Panel(study.Spec(layers=[3, 5], editor="memit"))
    choose(controls, task="facts")
    assert controls.spec.layers == (3, 5)
    choose(controls, layers="4")
    assert controls.spec.layers == (4,)


def test_a_fact_is_chosen_from_a_list_that_says_question_and_target():
    controls = Panel(study.Spec(fact=FACT))
    assert controls.choices["fact"].value == f"{FACT}: Windows Mobile 6.5 was developed by -> Apple"
    studied = [request for request in facts.read("world") if request.fact.split == "study"]
    assert len(controls.choices["fact"].options) == len(studied)
    choose(controls, fact=label_of(controls, "field:moliere"))
    assert controls.spec.fact == "field:moliere"
    assert "Moliere" in controls.headline.value


def test_a_fact_from_the_list_takes_the_place_of_a_typed_one():
    controls = Panel(study.Spec(subject="A", prompt="{} b", object="c", target="d"))
    choose(controls, fact=FACT)
    assert controls.spec == study.Spec(fact=FACT)
    assert controls.choices["subject"].value == ""


def test_a_typed_fact_reaches_the_spec_when_all_four_parts_are_there(one_line):
    controls = Panel(study.Spec(fact=FACT), notebook=NOTEBOOK)
    for name, value in {"subject": "Ada", "prompt": "{} plays the", "object": "harp"}.items():
        choose(controls, **{name: value})
        assert "is empty" in one_line(controls.message.value)
        assert controls.spec == study.Spec(fact=FACT)
        assert controls.run_button.disabled
    choose(controls, target="flute")
    assert controls.message.value == ""
    assert not controls.run_button.disabled
    assert controls.spec == study.Spec(
        fact=FACT, subject="Ada", prompt="{} plays the", object="harp", target="flute"
    )


# --- what has no meaning is explained
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        ({"layers": "2-4"}, "layers: tuple should have at most 1 item"),
        (
            {"layers": "2 to 4"},
            "layers &#x27;2 to 4&#x27;: write numbers and spans, such as 2-4 or 3, 5",
        ),
        ({"layers": "4-2", "editor": "memit"}, "write numbers and spans"),
        ({"plan": "outside:0-11"}, "moves no weight"),
        ({"plan": "after:11"}, "moves no weight"),
        ({"plan": "window"}, "choose all, after:N, window:A-B"),
        ({"fact": "no such fact"}, "not one fact of world"),
        ({"fact": "developer"}, "match; name one, e.g. developer:"),
        (
            {"subject": "A", "prompt": "no gap", "object": "c", "target": "d"},
            "needs exactly one {} for the subject",
        ),
        (
            {"subject": "A", "prompt": "{} b", "object": "c", "target": "c"},
            "equals the true object",
        ),
        (
            {"subject": "A", "prompt": "{} b", "object": "c", "target": "d", "paraphrases": 3},
            "has 1 to 1 statements",
        ),
    ],
)
def test_what_has_no_meaning_is_explained_in_one_line_and_cannot_be_run(moves, said, one_line):
    controls = Panel(study.Spec(fact=FACT), notebook=NOTEBOOK)
    choose(controls, **moves)
    assert said in one_line(controls.message.value)
    assert controls.run_button.disabled
    choose(controls, fact=FACT, plan="all", layers="", paraphrases=1)
    assert controls.message.value == ""
    assert not controls.run_button.disabled


def test_blocks_that_a_model_has_not_are_explained(tiny_folders, one_line):
    tiny = str(tiny_folders["gpt2"])
    controls = Panel(study.Spec(model=tiny), notebook=NOTEBOOK)
    choose(controls, layers="7")
    assert "has blocks 0 to 2" in one_line(controls.message.value)
    assert "has blocks 0 to 2" in one_line(Panel(study.Spec(model=tiny, layers=[4])).message.value)


def test_text_of_people_and_facts_is_shown_as_text(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(
        json.dumps({"id": EVIL, "subject": EVIL, "prompt": "{} is", "object": "a", "target": EVIL})
    )
    for spec in (
        study.Spec(facts=str(path), fact=EVIL),
        study.Spec(subject=EVIL, prompt="{} is", object="a", target=EVIL),
        study.Spec(fact=EVIL),
        study.Spec(model=EVIL, plan=EVIL),
        study.Spec(facts="owner/data", fact=EVIL),
    ):
        controls = Panel(spec)
        shown = controls.headline.value + controls.message.value
        assert "<img" not in shown
        assert "&lt;img" in shown


def test_words_of_a_run_are_shown_as_text(stand_in, tmp_path, loads):
    made = synthetic_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        n_edited=5,
        n_intrinsic=2,
        steps=(-1, 0, 20),
        layers=4,
    )
    changed = {
        name: value for name, value in made.about.items() if name not in ("schema", "status")
    }
    runs.write(made.folder, changed | {"ended": [EVIL, 3]}, {})
    controls = stand_in(f"print({str(made.folder)!r})")
    controls.run_button.click()
    wait_until(lambda: controls.job is None)
    summary, explored = controls.result.children
    assert EVIL in controls.phase.value  # a label, which shows it as text
    assert summary.value.count("&lt;img") == 2  # folder, page
    assert "<img" not in summary.value
    assert EVIL not in explored.page()


def test_in_a_saved_page_its_words_stand_in_its_place(loads):
    controls = Panel(study.Spec(subject=EVIL, prompt="{} is", object="a", target=EVIL))
    still = controls._repr_mimebundle_()["text/html"]
    assert html.escape(f"{EVIL} is ... {EVIL} (not a)") in still
    assert "into block 3 of" in still
    assert loads(still) == []


# --- what it looks like
# ----------------------------------------------------------------------------------------


def headline(controls: Panel) -> str:
    """As it is read."""
    text = re.sub("<[^>]*>", "", controls.headline.value)
    return html.unescape(text).replace("\n", " ")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"fact": FACT, "max_steps": 100},
            "ROME writes Windows Mobile 6.5 was developed by ... Apple (not Microsoft) into block "
            "3 of world-gpt2, one wording; then at most 100 steps of text, all blocks moving.",
        ),
        (
            {"editor": "memit", "plan": "not-edited", "paraphrases": 3, "adapter": "lora"},
            "MEMIT writes 10 facts into blocks 2-4 of world-gpt2, 3 wordings; then at most 160 "
            "steps of text, blocks 0-1, 5-11 moving, adapter lora.",
        ),
        (
            {"editor": "alphaedit", "layers": [2, 4, 5], "plan": "window:4-6", "n_edited": 7},
            "AlphaEdit writes 7 facts into blocks 2, 4-5 of world-gpt2, one wording; then at most "
            "160 steps of text, blocks 4-6 moving.",
        ),
        (
            {"plan": "edited-matrices", "fact": FACT, "subject": "A", "prompt": "{} b"}
            | {"target": "d", "object": "c"},
            "ROME writes A b ... d (not c) into block 3 of world-gpt2, one wording; then at most "
            "160 steps of text, the edited matrices alone moving.",
        ),
        (
            {"model": "gpt2-xl", "editor": "memit", "layers": [13, 14], "plan": "after:9"},
            "MEMIT writes 10 facts into blocks 13-14 of gpt2-xl, one wording; then at most 40 "
            "steps of text, plan after:9 moving.",
        ),
        (
            {"model": "a/b"},
            "ROME writes 10 facts into the preset's blocks of a/b, one wording; then at most 40 "
            "steps of text, plan all moving.",
        ),
    ],
)
def test_the_headline_says_the_whole_experiment_in_one_sentence(fields, sentence):
    assert headline(Panel(study.Spec(**fields))) == sentence


@pytest.mark.parametrize(
    ("fields", "edited", "moving", "most"),
    [
        ({}, {3}, {*range(12), "embeddings", "final norm"}, 1),
        ({"editor": "memit", "plan": "not-edited"}, {2, 3, 4}, {0, 1, *range(5, 12)}, 0),
        ({"editor": "memit", "layers": [2, 4, 5], "plan": "window:4-6"}, {2, 4, 5}, {4, 5, 6}, 0),
        ({"plan": "edited-matrices"}, {3}, {3}, 1),
        ({"model": "gpt2-xl"}, set(), set(), 0),
    ],
)
def test_the_strip_draws_what_is_edited_and_what_may_move(fields, edited, moving, most):
    state = Panel(study.Spec(**fields)).blocks.state
    assert (set(state["edited"]), set(state["moving"])) == (edited, moving)
    assert (state["count"], state["most"]) == (12 if edited else 0, most)


def test_a_choice_on_the_strip_goes_into_its_field_and_is_acknowledged(monkeypatch):
    controls = Panel(study.Spec(editor="memit"))
    answers = []
    monkeypatch.setattr(controls.blocks, "send", answers.append)
    controls._picked(field="layers", text="4-6", number=1)
    controls._picked(field="plan", text="after:6", number=2)
    assert (controls.spec.layers, controls.spec.plan) == ((4, 5, 6), "after:6")
    assert controls.blocks.state["edited"] == [4, 5, 6]
    assert answers == [{"settled": 1}, {"settled": 2}]


def test_a_problem_is_told_to_the_strip_which_shows_it_beside_its_field():
    controls = Panel(study.Spec())
    choose(controls, layers="2-4")
    assert "layers: tuple should have at most 1 item" in controls.blocks.state["problem"]
    assert controls.blocks.state["edited"] == [3]
    choose(controls, editor="memit")
    assert controls.blocks.state["problem"] == ""
    assert controls.blocks.state["edited"] == [2, 3, 4]


def test_every_control_has_a_name_for_screen_and_keyboard():
    controls = Panel(study.Spec())
    assert all(
        widget.description
        for widget in [
            *controls.choices.values(),
            controls.run_button,
            controls.stop_button,
            controls.bar,
        ]
    )
    names = [widget.description for widget in controls.choices.values()]
    assert len(names) == len(set(names))
    assert "workbench-panel" in controls._dom_classes


def test_in_batch_it_is_only_shown(monkeypatch):
    monkeypatch.setenv("WORKBENCH_BATCH", "1")
    controls = Panel(study.Spec(fact=FACT), notebook=NOTEBOOK)
    assert controls.run_button.disabled
    assert controls.stop_button.disabled
    assert len(controls.choices["fact"].options) == 0


def test_without_a_notebook_run_is_off_and_says_why(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    controls = Panel(study.Spec())
    assert controls.run_button.disabled
    assert "give Panel its notebook=" in controls.phase.value
    monkeypatch.setenv("JPY_SESSION_NAME", str(NOTEBOOK))
    assert not Panel(study.Spec()).run_button.disabled


# --- Run and Stop
# ----------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(code): what the panel starts instead of Python, given the same arguments; -> Panel
    whose Run starts it.
    """

    def made(code: str) -> Panel:
        script = tmp_path / "python"
        script.write_text(
            f"#!{sys.executable}\nimport json, os, pathlib, signal, subprocess, sys, time\n{code}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(job.sys, "executable", str(script))
        return Panel(study.Spec(fact=FACT), notebook=NOTEBOOK, out=tmp_path / "runs")

    return made


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


TELL = """state = {"phase": "tuning <b>", "done": 3, "total": 9}
pathlib.Path(os.environ["WORKBENCH_PROGRESS"]).write_text(json.dumps(state))
"""


def test_run_starts_the_notebook_shows_how_far_it_is_and_then_what_it_made(stand_in, tmp_path):
    made = synthetic_run(tmp_path / "made", n_edited=5, n_intrinsic=2, steps=(-1, 0, 20), layers=4)
    go = tmp_path / "go"
    code = f"""{TELL}
sys.stderr.write("Executing: 10%\\rExecuting: 20% <b>[IPKernelApp] WARNING")
sys.stderr.flush()
pathlib.Path({str(tmp_path / "arguments")!r}).write_text(json.dumps(sys.argv[1:]))
while not os.path.exists({str(go)!r}): time.sleep(0.02)
print("a table"); print({str(made.folder)!r})"""
    controls = stand_in(code)
    choose(controls, editor="ft", paraphrases=3)
    controls.run_button.click()
    assert controls.run_button.disabled
    assert not controls.stop_button.disabled
    wait_until(lambda: "step 3 of 9" in controls.phase.value)
    assert (controls.bar.value, controls.bar.max) == (3, 9)
    wait_until(lambda: "20% &lt;b&gt;" in controls.tail.value)
    choose(controls, task="facts")
    assert controls.run_button.disabled  # one at a time
    go.touch()
    wait_until(lambda: controls.job is None)
    assert controls.run.folder == made.folder
    summary, explored = controls.result.children
    assert plots.outcome(made) in summary.value
    assert plots.outcome(made).startswith("4 of 5 edits took")
    assert isinstance(explored, Explorer)
    assert not controls.run_button.disabled
    arguments = json.loads((tmp_path / "arguments").read_text())
    out = str(tmp_path / "runs")
    assert arguments == [
        "-m",
        "workbench",
        "run",
        str(NOTEBOOK),
        "-p",
        "paraphrases",
        "3",
        "-p",
        "editor",
        "ft",
        "--out",
        out,
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            'print("workbench: cell 3: too <b>hot", file=sys.stderr); sys.exit(2)',
            "cell 3: too &lt;b&gt;hot",
        ),
        (
            'print("Killed", file=sys.stderr); os.kill(os.getpid(), 9)',
            "Killed (the run&#x27;s status is -9)",
        ),
        ('print("no/such/run")', "no finished run there"),
    ],
)
def test_a_run_that_fails_says_why_in_one_line(code, said, stand_in, one_line):
    controls = stand_in(code)
    controls.run_button.click()
    wait_until(lambda: controls.job is None)
    assert said in one_line(controls.message.value)
    assert controls.run is None
    assert not controls.run_button.disabled


@pytest.mark.parametrize("stubborn", [False, True])
def test_stop_ends_the_run_and_all_below_it_and_leaves_nothing(stubborn, stand_in, tmp_path):
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if stubborn else ""
    code = f"""{ignore}
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
partial = out / f".id.{{os.getpid()}}@{{os.uname().nodename}}.partial"
partial.mkdir(parents=True); (partial / "half").touch()
below = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(below.pid))
{TELL}
while True: time.sleep(0.1)"""
    controls = stand_in(code)
    controls.run_button.click()
    wait_until(lambda: "step 3 of 9" in controls.phase.value)
    work = controls.job.folder
    start = time.monotonic()
    controls.stop_button.click()
    assert time.monotonic() - start < 0.5  # the kernel stays free
    wait_until(lambda: controls.job is None, 6)
    assert time.monotonic() - start < 5
    assert "stopped" in controls.phase.value
    assert controls.message.value == ""
    assert list((tmp_path / "runs").iterdir()) == []
    assert not work.exists()
    below = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE
    assert not controls.run_button.disabled
    assert controls.stop_button.disabled


def test_a_field_that_the_notebook_varies_cannot_be_moved_and_it_is_said_why():
    controls = Panel(study.Spec(), notebook=NOTEBOOK, vary="plan", values=["all", "after:6"])
    assert [name for name, widget in controls.choices.items() if widget.disabled] == ["plan"]
    assert "all / after:6 moving; plan takes each of the notebook's `values` in turn" in headline(
        controls
    )
    assert controls.blocks.state["off"] == "plan"
    choose(controls, editor="ft")
    assert controls.choices["plan"].disabled
    assert controls.spec.editor == "ft"


VARIED = NOTEBOOK.with_name("02_retention.ipynb")


def test_the_values_of_what_the_notebook_varies_can_be_chosen(stand_in, tmp_path):
    arguments = tmp_path / "arguments"
    stand_in(f"pathlib.Path({str(arguments)!r}).write_text(json.dumps(sys.argv[1:])); sys.exit(1)")
    controls = Panel(study.Spec(editor=None), VARIED, tmp_path, "editor", ["ft", "memit"])
    assert controls.choices["values"].value == "['ft', 'memit']"
    choose(controls, values='["memit", "rome"]')
    assert controls.values == ["memit", "rome"]
    assert headline(controls).startswith("memit / rome writes 10 facts into blocks of its own of")
    assert controls.blocks.state["edited"] == [2, 3, 4, 3]  # of either
    controls.run_button.click()
    wait_until(lambda: controls.job is None)
    given = json.loads(arguments.read_text())
    assert given[given.index("values") + 1] == "[memit, rome]"
    assert "editor" not in given


@pytest.mark.parametrize(
    ("vary", "values", "text", "said"),
    [
        ("editor", ["ft", "memit"], "ft, memit", "values &#x27;ft, memit&#x27;: give a list"),
        ("editor", ["ft", "memit"], "['ft', 'mimet']", "editor &#x27;mimet&#x27;: choose one of"),
        ("editor", ["ft", "memit"], "['ft', 'ft']", "two of editor make the same experiment"),
        ("plan", ["all", "after:6"], "['all', 'after:11']", "moves no weight"),
        ("paraphrases", [1, 3], "[]", "give a list of at least one value"),
    ],
)
def test_values_that_have_no_meaning_are_explained(vary, values, text, said, one_line):
    controls = Panel(study.Spec(), vary=vary, values=values)
    choose(controls, values=text)
    assert said in one_line(controls.message.value)
    assert controls.values == values


@pytest.mark.parametrize("values", [[1e-5, 1e-4], ["", "lora"], [[1], [3]], [None, True]])
def test_values_that_nobody_touches_pass_through_unchanged(values):
    vary = {float: "learning_rate", str: "adapter", list: "layers"}.get(type(values[0]), "seed")
    assert Panel(study.Spec(), vary=vary, values=values).values == values


def test_the_field_that_the_notebook_varies_is_passed_on_only_if_the_spec_was_given_it():
    spec = study.Spec(editor=None, n_edited=3)
    controls = Panel(spec, notebook=VARIED, vary="editor", values=["ft", "rome"])
    choose(controls, task="sentiment")
    assert "editor" not in job.parameters(VARIED, controls.spec)
    assert controls.values == ["ft", "rome"]
    spec = study.Spec(editor="rome")
    controls = Panel(spec, notebook=VARIED, vary="editor", values=["ft", "memit"])
    choose(controls, task="sentiment")
    assert "editor is 'rome' alone" in headline(controls)
    assert "values" not in controls.choices
    assert job.parameters(VARIED, controls.spec)["editor"] == "rome"
    assert controls.values == ["rome"]


# --- what the run says at its end
# ----------------------------------------------------------------------------------------


def made_run(folder: Path, **about):
    """A made-up run of 120 steps, of which this is said."""
    made = synthetic_run(folder, n_edited=5, n_intrinsic=2, steps=(-1, 0, 100), layers=4)
    known = {name: value for name, value in made.about.items() if name not in ("schema", "status")}
    changed = known | about
    return runs.write(folder, changed | {"spec": made.spec | about.get("spec", {})}, {})


def test_a_run_that_reached_its_threshold_ends_with_a_full_green_bar_that_says_so(
    stand_in, tmp_path
):
    made = made_run(tmp_path / "made", ended=["reached"], spec={"max_steps": 160})
    tell = TELL.replace('"done": 3, "total": 9', '"done": 100, "total": 160')
    controls = stand_in(f"{tell}\ntime.sleep(1); print({str(made.folder)!r})")
    controls.run_button.click()
    wait_until(lambda: "step 100 of 160" in controls.phase.value)
    wait_until(lambda: controls.job is None)
    assert controls.bar.value == controls.bar.max
    assert controls.bar.bar_style == "success"
    assert "reached its threshold after 100 of 160 steps" in controls.phase.value


def test_the_result_links_its_page_where_jupyterlab_serves_it(tmp_path, monkeypatch):
    root = tmp_path / "root"
    page = root / "runs" / "a & b" / "notebook.html"
    page.parent.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "12")
    assert panel._link(page) == html.escape(str(page))  # no JupyterLab
    server = {"root_dir": str(root), "base_url": "/user/ann/"}
    (tmp_path / "jpserver-12.json").write_text(json.dumps(server))
    address = "/user/ann/files/runs/a%20%26%20b/notebook.html"
    shown = "runs/a &amp; b/notebook.html"
    assert panel._link(page) == f'<a href="{address}" target="_blank">{shown}</a>'
    assert panel._link(tmp_path / "elsewhere.html") == html.escape(str(tmp_path / "elsewhere.html"))


def test_the_click_on_run_imports_nothing_heavy(tmp_path):
    code = f"""import sys, threading
from workbench import panel, study
threading.Thread.start = lambda self: None
controls = panel.Panel(study.Spec(), {str(NOTEBOOK)!r}, {str(tmp_path)!r})
controls.run_button.click()
assert controls.phase.value == "starting" and controls.run_button.disabled
assert not controls.stop_button.disabled
assert not {{"papermill", "nbclient", "nbconvert"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_that_is_stopped_before_its_process_began_never_begins(stand_in, tmp_path):
    controls = stand_in(f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()")
    begun = job.Job(NOTEBOOK, tmp_path / "runs")
    begun.stop()
    begun.start(controls.spec)
    assert (begun.stopped, begun.running) == (True, False)
    controls._follow(begun, controls.spec)
    assert "stopped after" in controls.phase.value
    assert not (tmp_path / "begun").exists()


def test_an_editor_that_must_learn_first_says_so():
    controls = Panel(study.Spec(), notebook=NOTEBOOK)
    assert "hyper-network" not in controls.headline.value
    choose(controls, editor="malmen", layers="0")
    assert "trains a hyper-network for these blocks" in controls.headline.value


def test_names_registered_after_the_panel_was_imported_are_offered(monkeypatch):
    monkeypatch.setattr(editing.EDITORS, "_ready", dict(editing.EDITORS._ready))
    editing.EDITORS.register("mine", lambda model, requests: None)
    controls = Panel(study.Spec())
    assert "mine" in dict(controls.choices["editor"].options)


@pytest.mark.parametrize("layers", [(4, 7, 3), (2, 3, 4), (5,)])
def test_blocks_in_any_order_are_shown_and_read_back(layers):
    controls = Panel(study.Spec(editor="memit", layers=layers), notebook="x")
    assert controls.spec.layers == layers


def test_the_real_model_is_offered():
    assert "smollm2-135m" in panel.OFFERED["model"][1]


# --- no waiting


def test_the_panel_stands_before_the_models_layout_is_read(monkeypatch):
    may_read = threading.Event()
    read = study.Spec.blocks

    def slowly(spec):
        assert may_read.wait(30)
        return read(spec)

    monkeypatch.setattr(study.Spec, "blocks", slowly)
    monkeypatch.setattr(panel, "_is_quick", lambda: False)
    shown = Panel(study.Spec(fact=FACT))
    assert "Apple (not Microsoft)" in shown.headline.value
    assert "the preset&#x27;s blocks" in shown.headline.value
    assert shown.blocks.state["count"] == 0
    choose(shown, editor="memit")  # is answered meanwhile, and not forgotten when all is read
    assert shown.headline.value.startswith('<p class="workbench-headline"><b>MEMIT writes')
    may_read.set()
    assert (shown.spec.fact, shown.spec.editor) == (FACT, "memit")  # waits for it
    assert "into blocks 2-4" in shown.headline.value
    assert shown.blocks.state["count"] == 12


def test_to_show_a_panel_takes_neither_torch_nor_a_plotting_library():
    code = (
        "import sys, workbench as wb; from workbench import panel;"
        "panel.Panel._read = lambda self: None;"
        "wb.panel.Panel(wb.Spec(fact='developer:windows-mobile-6-5'));"
        "print({'torch', 'seaborn', 'matplotlib', 'transformers'} & {*sys.modules})"
    )
    environment = {key: one for key, one in os.environ.items() if key != "WORKBENCH_BATCH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout.strip() == b"set()", done.stderr
