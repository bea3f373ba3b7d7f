import html
import json
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.explorer import synthetic_run
from workbench import editing, facts, job, panel, runs, study
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
        ({"layers": "2 to 4"}, "write numbers and spans, such as 2-4 or 3, 5"),
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
        shown = controls.headline.value + controls.strip.value + controls.message.value
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
    assert "the tuning ended by 3, &lt;img" in summary.value
    assert summary.value.count("&lt;img") == 3  # folder, ending, page
    assert "<img" not in summary.value
    assert loads(explored._repr_mimebundle_()["text/html"]) == []


def test_in_a_saved_page_its_words_stand_in_its_place(loads):
    controls = Panel(study.Spec(subject=EVIL, prompt="{} is", object="a", target=EVIL))
    still = controls._repr_mimebundle_()["text/html"]
    assert html.escape(f"{EVIL} is ... a") in still
    assert "E edited: 3." in still
    assert loads(still) == []


# --- what it looks like
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {},
            "E edited: 3. M may move in tuning: 0-11 and embeddings, final norm and head. "
            "Still: none.",
        ),
        (
            {"editor": "memit", "plan": "not-edited"},
            "E edited: 2-4. M may move in tuning: 0-1, 5-11. Still: 2-4.",
        ),
        (
            {"editor": "memit", "layers": [2, 4, 5], "plan": "window:4-6"},
            "E edited: 2, 4-5. M may move in tuning: 4-6. Still: 0-3, 7-11.",
        ),
        (
            {"plan": "edited-matrices"},
            "E edited: 3. M may move in tuning: 3, the edited matrices alone. Still: 0-2, 4-11.",
        ),
    ],
)
def test_the_strip_shows_edited_and_moving_blocks_by_letter_colour_and_words(fields, words):
    strip = Panel(study.Spec(**fields)).strip.value
    assert strip.count(words) == 2  # for the eye and as the label of the picture
    marks = [part.split("</b>")[0] for part in strip.split("<b>")[1:]]
    assert len(marks) == 12
    assert marks[3] == (
        "EM"
        if fields.get("plan") in (None, "edited-matrices")
        else "E"
        if "layers" not in fields
        else "-"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "gpt2-xl", "editor": "memit", "layers": [13, 14]}, "[13, 14]"),
        ({"model": "a/b"}, "the preset&#x27;s"),
    ],
)
def test_of_a_model_that_is_not_here_the_strip_says_what_is_known(fields, said):
    assert said in Panel(study.Spec(**fields)).strip.value


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
    assert "Panel(spec, notebook=" in controls.phase.value
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
    assert (
        "edited: 1 kept, 1 lost to related, 1 back to true, 1 lost to other, 1 never held"
        in summary.value
    )
    assert "intrinsic: 2 kept" in summary.value
    assert "workbench-explorer" in explored._dom_classes
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
        ('print("Killed", file=sys.stderr); os.kill(os.getpid(), 9)', "status -9: Killed"),
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
    controls = Panel(study.Spec(), notebook=NOTEBOOK, vary="plan")
    assert [name for name, widget in controls.choices.items() if widget.disabled] == ["plan"]
    assert "plan takes each of the notebook's `values` in turn" in html.unescape(
        controls.headline.value
    )
    choose(controls, editor="ft")
    assert controls.choices["plan"].disabled
    assert controls.spec.editor == "ft"


def test_the_field_that_the_notebook_varies_is_passed_on_only_if_the_spec_was_given_it():
    notebook = NOTEBOOK.with_name("02_retention.ipynb")
    controls = Panel(study.Spec(editor=None, n_edited=3), notebook=notebook, vary="editor")
    choose(controls, task="sentiment")
    assert "editor" not in job.parameters(notebook, controls.spec)
    assert study.arms(controls.spec, "editor", ["ft", "rome"]) == ["ft", "rome"]
    controls = Panel(study.Spec(editor="rome"), notebook=notebook, vary="editor")
    choose(controls, task="sentiment")
    assert "editor is 'rome' alone" in html.unescape(controls.headline.value)
    assert job.parameters(notebook, controls.spec)["editor"] == "rome"
    assert study.arms(controls.spec, "editor", ["ft", "memit"]) == ["rome"]


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
