"""The case study as a person uses it, in JupyterLab in a real browser."""

import json
import os
import re
import time

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]
SHOTS = os.environ.get("WORKBENCH_SHOTS", "")  # a folder for pictures of what the tests see


def shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def wait_for(found, seconds: float, what: str):
    """The first true value of found()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    pytest.fail(f"within {seconds:g} s: {what}")


@pytest.fixture
def page(open_notebook):
    """The case study up to its panel."""
    page = open_notebook("01_case_study.ipynb", run=False)
    page.evaluate(
        """async () => {
            const commands = window.jupyterapp.commands;
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = notebook.widgets.findIndex(
                cell => cell.model.sharedModel.getSource().includes('panel.Panel('));
            await commands.execute('notebook:run-all-above');
            await commands.execute('notebook:run-cell');
        }"""
    )
    page.locator(".workbench-panel").scroll_into_view_if_needed()
    return page


def finished(lab) -> set:
    return {path.parent.name for path in lab.runs.glob("[!.]*/run.json")}


def partial(lab) -> list:
    return list(lab.runs.glob(".*"))


def test_run_all_shows_panel_and_figures_and_stays_on_this_machine(lab, open_notebook):
    page = open_notebook("01_case_study.ipynb")
    panel = page.locator(".workbench-panel")
    panel.wait_for()
    wait_for(lambda: finished(lab), 150, "no finished run")
    page.wait_for_function(
        """() => window.jupyterapp.shell.currentWidget.model.sharedModel.cells
                 .flatMap(cell => cell.cell_type === 'code' ? cell.getOutputs() : [])
                 .filter(output => output.data?.['image/png']).length >= 4"""
    )
    shoot(page, "panel-figures")
    assert page.outside == []


def test_what_is_chosen_is_run_and_shown(lab, page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    panel.get_by_label("Editor").select_option("memit")
    panel.get_by_label("Edited blocks").fill("3-4")
    panel.get_by_label("Edited blocks").press("Tab")
    panel.get_by_label("Paraphrases").select_option("3")
    expect(panel).to_contain_text("E edited: 3-4.")
    shoot(page, "panel-chosen")
    before = finished(lab)
    panel.get_by_role("button", name="Run").click()
    expect(panel).to_contain_text("step 2 of 4", timeout=90_000)
    shoot(page, "panel-running")
    explorer = panel.locator(".workbench-explorer")
    explorer.wait_for(timeout=90_000)
    (name,) = finished(lab) - before
    spec = json.loads((lab.runs / name / "run.json").read_text())["spec"]
    assert (spec["editor"], spec["layers"], spec["paraphrases"], spec["max_steps"]) == (
        "memit",
        [3, 4],
        3,
        4,
    )
    expect(panel).to_contain_text("finished in")

    picture = explorer.locator("img")
    source = picture.get_attribute("src")
    explorer.get_by_role("slider").focus()
    page.keyboard.press("Home")
    expect(explorer).to_contain_text("Checkpoint before")
    expect(picture).not_to_have_attribute("src", source)
    explorer.scroll_into_view_if_needed()
    shoot(page, "panel-explorer")
    page.keyboard.press("ArrowRight")
    expect(explorer).to_contain_text("Checkpoint edited")
    assert page.outside == []


def test_stop_ends_a_run_at_once_and_leaves_nothing(lab, page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    panel.get_by_label("Steps at most").select_option("240")
    panel.get_by_label("Task").select_option("facts")
    before = finished(lab)
    panel.get_by_role("button", name="Run").click()
    wait_for(lambda: partial(lab), 30, "no run was begun")
    expect(panel).to_contain_text(" of 240", timeout=90_000)
    stop = time.monotonic()
    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("stopped after", timeout=10_000)
    assert time.monotonic() - stop < 5
    shoot(page, "panel-stopped")
    assert partial(lab) == []
    assert finished(lab) == before
    assert (
        page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
        )
        == "idle"
    )
    expect(panel.get_by_role("button", name="Run")).to_be_enabled()


def test_a_fact_of_ones_own_is_shown_as_text(page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    subject = "<b id='own'>Ada</b> \"Countess\" & 'co'"
    panel.get_by_label("Own subject").fill(subject)
    panel.get_by_label("Own subject").press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("prompt is empty")
    for label, text in {
        "Own prompt": "{} plays the",
        "True object": "harp",
        "New object": "flute",
    }.items():
        panel.get_by_label(label).fill(text)
        panel.get_by_label(label).press("Tab")
    expect(panel.get_by_role("alert")).to_have_count(0)
    expect(panel).to_contain_text(f"{subject} plays the ... harp")
    assert page.locator("#own").count() == 0
    shoot(page, "panel-own")


FOCUSED = "node => node === document.activeElement"
RING = """node => {  // its width, as far as it is inside: widgets cut off the rest
    const style = getComputedStyle(node);
    const inside = Math.min(parseFloat(style.outlineWidth), -parseFloat(style.outlineOffset));
    return style.outlineStyle === 'none' ? 0 : inside;
}"""
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .map(cell => [cell.model.type, cell.model.sharedModel.getSource()])"""


def name_of(control) -> str:
    """As a screen reader says it, without the icon's glyph; "" if it has none."""
    found = re.match(r'- (?:combobox|textbox|button) "([^"]*)"', control.aria_snapshot())
    return found[1].strip("\uf04b\uf04d ") if found else ""


def tab_to(page, control, key: str = "Tab") -> None:
    for _ in range(40):
        page.keyboard.press(key)
        if control.evaluate(FOCUSED):
            assert control.evaluate(RING) >= 2
            return
    pytest.fail(f"{key} does not lead to {control}")


def test_the_keyboard_alone_will_do(lab, open_notebook):
    from playwright.sync_api import expect

    page = open_notebook("01_case_study.ipynb", run=False)
    cells = nbformat.read(lab.root / "01_case_study.ipynb", as_version=4).cells
    for _ in range(next(n for n, cell in enumerate(cells) if "panel.Panel(" in cell.source)):
        page.keyboard.press("Shift+Enter")
    page.keyboard.press("Control+Enter")
    panel = page.locator(".workbench-panel")
    expect(panel).to_contain_text("E edited: 3.", timeout=60_000)
    before, written = finished(lab), page.evaluate(CELLS)

    def choice(name):
        return panel.get_by_role("combobox", name=name, exact=True)

    controls = panel.locator("select, input, button").all()
    names = [name_of(control) for control in controls]
    assert "" not in names
    assert len(set(names)) == len(names)
    for control in controls:
        if control.is_enabled():
            page.keyboard.press("Tab")
            if control is controls[0] and not control.evaluate(FOCUSED):
                tab_to(page, control)  # past the buttons of the cell
            assert control.evaluate(FOCUSED), name_of(control)
            assert control.evaluate(RING) >= 2

    tab_to(page, choice("Editor"), "Shift+Tab")
    page.keyboard.press("a")  # these keys insert and cut cells where a notebook takes them
    expect(choice("Editor")).to_have_value("alphaedit")
    page.keyboard.press("x")
    page.keyboard.press("ArrowUp")
    expect(choice("Editor")).to_have_value("memit")
    tab_to(page, choice("Edited blocks"))
    page.keyboard.type("3-4")
    page.keyboard.press("Enter")
    expect(panel).to_contain_text("E edited: 3-4.")
    tab_to(page, choice("Paraphrases"))
    page.keyboard.press("ArrowDown")
    expect(choice("Paraphrases")).to_have_value("2")
    tab_to(page, choice("Steps at most"))
    page.keyboard.press("End")
    expect(panel).to_contain_text("at most 240 steps")
    shoot(page, "keyboard-chosen")

    run, stop = (panel.get_by_role("button", name=name) for name in ("Run", "Stop"))
    tab_to(page, run)
    page.keyboard.press("Enter")
    expect(panel).to_contain_text(" of 240", timeout=150_000)
    expect(run).to_be_disabled()
    tab_to(page, stop)
    shoot(page, "keyboard-running")
    page.keyboard.press("Space")
    expect(panel).to_contain_text("stopped after", timeout=10_000)
    expect(stop).to_be_disabled()
    assert finished(lab) == before

    tab_to(page, choice("Steps at most"), "Shift+Tab")
    page.keyboard.press("Home")
    expect(panel).to_contain_text("at most 4 steps")
    tab_to(page, run)
    page.keyboard.press("Space")
    explorer = panel.locator(".workbench-explorer")
    explorer.wait_for(timeout=150_000)
    (name,) = finished(lab) - before
    spec = json.loads((lab.runs / name / "run.json").read_text())["spec"]
    assert (spec["editor"], spec["layers"], spec["paraphrases"], spec["max_steps"]) == (
        "memit",
        [3, 4],
        2,
        4,
    )
    tab_to(page, explorer.get_by_role("slider"))
    page.keyboard.press("Home")
    expect(explorer).to_contain_text("Checkpoint before")
    page.keyboard.press("ArrowRight")
    expect(explorer).to_contain_text("Checkpoint edited")
    shoot(page, "keyboard-explorer")
    assert page.evaluate(CELLS) == written
