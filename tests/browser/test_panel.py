"""The case study as a person uses it, in JupyterLab in a real browser."""

import json
import os
import time

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
            const commands = window.jupyterapp.commands, notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.sharedModel.getSource().includes('panel.Panel('));
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
        """() => window.jupyterapp.shell.currentWidget.model.sharedModel.cells.flatMap(cell => cell.cell_type === 'code' ? cell.getOutputs() : [])
                 .filter(output => output.data?.['image/png']).length >= 4"""
    )
    shoot(page, "panel-figures")
    assert page.outside == []


def test_what_is_chosen_is_run_and_shown(lab, page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    panel.get_by_label("Editor").select_option("memit")
    panel.get_by_label("First edited block").select_option("3")
    panel.get_by_label("Last edited block").select_option("4")
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
    assert (spec["editor"], spec["layers"], spec["paraphrases"], spec["max_steps"]) == ("memit", [3, 4], 3, 4)
    expect(panel).to_contain_text("finished in")

    picture = explorer.locator("img")
    source = picture.get_attribute("src")
    explorer.get_by_label("Checkpoint").select_option("before")
    expect(explorer).to_contain_text("Checkpoint before")
    expect(picture).not_to_have_attribute("src", source)
    explorer.scroll_into_view_if_needed()
    shoot(page, "panel-explorer")
    explorer.locator(".noUi-handle").focus()
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
    assert page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "idle"
    expect(panel.get_by_role("button", name="Run")).to_be_enabled()


def test_a_fact_of_ones_own_is_shown_as_text(page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    subject = "<b id='own'>Ada</b> \"Countess\" & 'co'"
    panel.get_by_label("Own subject").fill(subject)
    panel.get_by_label("Own subject").press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("own prompt is empty")
    for label, text in {"Own prompt": "{} plays the", "True object": "harp", "New object": "flute"}.items():
        panel.get_by_label(label).fill(text)
        panel.get_by_label(label).press("Tab")
    expect(panel.get_by_role("alert")).to_have_count(0)
    expect(panel).to_contain_text(f"{subject} plays the ... harp")
    assert page.locator("#own").count() == 0
    shoot(page, "panel-own")
