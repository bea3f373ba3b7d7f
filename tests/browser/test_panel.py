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
    return with_panel(open_notebook, "01_case_study.ipynb")


def with_panel(open_notebook, name: str):
    """A notebook up to its panel."""
    page = open_notebook(name, run=False)
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
    words = page.locator(".workbench-panel .workbench-words").first
    words.filter(has_text="edited").wait_for(timeout=60_000)  # the model's layout is read
    page.locator(".workbench-panel").first.scroll_into_view_if_needed()
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
                 .filter(output => output.data?.['image/png']).length >= 3"""
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

    caption = explorer.get_by_role("grid").nth(2).locator("caption")
    explorer.get_by_role("slider").focus()
    page.keyboard.press("Home")
    expect(caption).to_have_text("before")
    explorer.scroll_into_view_if_needed()
    shoot(page, "panel-explorer")
    page.keyboard.press("ArrowRight")
    expect(caption).to_have_text("edited")
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
    unfold = panel.get_by_role("button", name="A fact of your own")
    expect(panel.get_by_label("Own subject")).to_be_hidden()
    expect(unfold).to_have_attribute("aria-expanded", "false")
    unfold.focus()
    page.keyboard.press("Enter")
    expect(unfold).to_have_attribute("aria-expanded", "true")
    subject = "<b id='own'>Ada</b> \"Countess\" & 'co'"
    panel.get_by_label("Own subject").fill(subject)
    panel.get_by_label("Own subject").press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("prompt is empty")
    assert_beside(panel, panel.get_by_label("Own prompt"))
    for label, text in {
        "Own prompt": "{} plays the",
        "True object": "harp",
        "New object": "flute",
    }.items():
        panel.get_by_label(label).fill(text)
        panel.get_by_label(label).press("Tab")
    expect(panel.get_by_role("alert")).to_have_count(0)
    expect(panel).to_contain_text(f"{subject} plays the ... flute (not harp)")
    assert page.locator("#own").count() == 0
    shoot(page, "panel-own")


def assert_beside(panel, field) -> None:
    """The problem stands right below this field, which alone is marked."""
    alert, place = panel.get_by_role("alert").bounding_box(), field.bounding_box()
    assert 0 < alert["y"] - place["y"] < 60
    assert field.get_attribute("aria-invalid") == "true"
    assert panel.locator("[aria-invalid=true]").count() == 1


def test_a_problem_stands_beside_the_field_that_caused_it(page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    blocks, plan = panel.get_by_label("Edited blocks"), panel.get_by_label("What may move")
    blocks.fill("2 to 4")
    blocks.press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("write numbers and spans")
    assert_beside(panel, blocks)
    shoot(page, "panel-problem")
    blocks.fill("3")
    blocks.press("Tab")
    expect(panel.get_by_role("alert")).to_have_count(0)
    assert panel.locator("[aria-invalid=true]").count() == 0
    plan.fill("after:11")
    plan.press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("moves no weight")
    assert_beside(panel, plan)
    plan.fill("all")
    plan.press("Tab")
    panel.get_by_label("Paraphrases").select_option("10")
    expect(panel.get_by_role("alert")).to_have_count(0)
    panel.get_by_label("Fact", exact=True).fill("nonsense")
    panel.get_by_label("Fact", exact=True).press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("not one fact of world")
    assert_beside(panel, panel.get_by_label("Fact", exact=True))


def drag(page, row: str, first: int, last: int) -> None:
    boxes = page.locator(f".workbench-panel .box.{row}")
    start, end = (boxes.nth(block).bounding_box() for block in (first, last))
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + 12)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + 12, steps=4)
    page.mouse.up()


def test_blocks_are_chosen_on_the_strip_with_the_mouse(page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    blocks, plan = panel.get_by_label("Edited blocks"), panel.get_by_label("What may move")
    expect(panel).to_contain_text("into block 3 of world-gpt2, one wording")
    drag(page, "layers", 1, 5)  # ROME edits one block: the last that the mouse was on
    expect(blocks).to_have_value("5")
    panel.get_by_label("Editor").select_option("memit")
    expect(panel).to_contain_text("MEMIT writes")
    for first, last, text in ((2, 4, "2-4"), (8, 6, "6-8"), (7, 7, "7")):
        drag(page, "layers", first, last)
        expect(blocks).to_have_value(text)
    for first, last, text in ((2, 5, "window:2-5"), (11, 7, "after:6"), (0, 11, "all")):
        drag(page, "plan", first, last)
        expect(plan).to_have_value(text)
    drag(page, "plan", 3, 3)
    expect(panel).to_contain_text("MEMIT writes Windows Mobile 6.5 was developed by ... Apple")
    expect(panel).to_contain_text("into block 7 of world-gpt2")
    expect(panel).to_contain_text("block 3 moving.")
    expect(panel).to_contain_text("E edited: 7. M may move in tuning: 3. Still: 0-2, 4-11.")
    assert panel.locator(".box.on").all_inner_texts() == ["E", "M"]
    last = panel.get_by_role("slider", name="Last block that may move").bounding_box()
    to = panel.locator(".box.plan").nth(9).bounding_box()
    page.mouse.move(last["x"] + 5, last["y"] + 12)  # a thumb is taken along
    page.mouse.down()
    page.mouse.move(to["x"] + 5, to["y"] + 12, steps=4)
    page.mouse.up()
    expect(plan).to_have_value("window:3-9")
    blocks.fill("3, 5")  # what no range says is typed, and drawn
    blocks.press("Tab")
    expect(panel).to_contain_text("E edited: 3, 5.")
    shoot(page, "panel-strip")
    assert page.outside == []


def test_blocks_are_chosen_on_the_strip_with_keys(page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")

    def thumb(name):
        return panel.get_by_role("slider", name=name)

    def press(name, *keys):
        tab_to(page, thumb(name))
        for key in keys:
            page.keyboard.press(key)

    written = page.evaluate(CELLS)
    panel.get_by_label("Editor").select_option("memit")
    expect(panel).to_contain_text("MEMIT writes")
    panel.get_by_label("Editor").focus()
    page.keyboard.press("Shift+Tab")
    for _ in range(5):  # from the model, backwards to before the strip
        page.keyboard.press("Shift+Tab")
    press("First edited block", "ArrowLeft", "ArrowLeft", "ArrowLeft")
    expect(thumb("First edited block")).to_have_attribute("aria-valuetext", "block 0")
    press("Last edited block", "End", "ArrowDown")
    expect(panel.get_by_label("Edited blocks")).to_have_value("0-10")
    press("First block that may move", "PageUp", "ArrowRight", "ArrowUp")
    expect(panel.get_by_label("What may move")).to_have_value("after:5")
    press("Last block that may move", "Home")
    expect(panel.get_by_label("What may move")).to_have_value("window:0-0")
    about = ("aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext")
    last = thumb("Last block that may move")
    assert [last.get_attribute(name) for name in about] == ["0", "11", "0", "block 0"]
    assert page.evaluate(CELLS) == written


def test_run_answers_within_half_a_second_and_names_its_phases(lab, page):
    from playwright.sync_api import expect

    panel = page.locator(".workbench-panel")
    milliseconds = page.evaluate(
        """() => new Promise(answered => {
            const panel = document.querySelector('.workbench-panel');
            const run = [...panel.querySelectorAll('button')].find(
                button => button.innerText.includes('Run'));
            const start = performance.now();
            new MutationObserver((_, watch) => {
                if (!run.disabled || !panel.innerText.includes('starting')) return;
                watch.disconnect();
                answered(performance.now() - start);
            }).observe(panel, {subtree: true, childList: true, attributes: true,
                               characterData: true});
            run.click();
        })"""
    )
    print(f"first answer to Run: {milliseconds:.0f} ms")
    assert milliseconds < 500
    expect(panel).to_contain_text("starting Python", timeout=20_000)
    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("stopped after", timeout=20_000)


def of_cells(lab, name: str, *cells: str) -> str:
    """A notebook of these cells, the first of which are parameters."""
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    kernel["language_info"] = {"name": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), lab.root / name)
    return name


def test_a_tuning_that_reaches_its_threshold_is_a_full_green_bar_and_its_page_a_link(
    lab, open_notebook
):
    from playwright.sync_api import expect

    name = of_cells(
        lab,
        "threshold.ipynb",
        'fact: str = "developer:windows-mobile-6-5"\nthreshold: float = 100.0\n'
        "n_intrinsic: int = 2\neval_every: int = 2\nmax_steps: int = 8",
        "import workbench as wb\nfrom workbench import panel, study",
        "spec = wb.Spec.of(globals())\ncontrols = panel.Panel(spec, out='runs')\ncontrols",
        "study.run(spec, out='kernel')",
    )
    page = with_panel(open_notebook, name)
    panel = page.locator(".workbench-panel")
    panel.get_by_role("button", name="Run").click()
    words = "reached its threshold after 2 of 8 steps"
    expect(panel).to_contain_text(words, timeout=150_000)
    bar = panel.locator(".progress-bar")
    assert "progress-bar-success" in bar.get_attribute("class")
    assert bar.evaluate("bar => bar.style.width") == "100%"
    link = panel.get_by_role("link", name="notebook.html")
    link.scroll_into_view_if_needed()
    shoot(page, "panel-threshold")
    with page.expect_popup() as opened:
        link.click()
    expect(opened.value.locator("body")).to_contain_text("study.run(spec", timeout=30_000)

    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    cell = page.locator(".jp-OutputArea-output", has_text="reached after 2 of 8 steps")
    cell.wait_for(timeout=150_000)
    bar = cell.locator(".progress-bar").last
    assert "progress-bar-success" in bar.get_attribute("class")
    assert cell.locator(".progress-bar-danger").count() == 0
    cell.scroll_into_view_if_needed()
    shoot(page, "panel-threshold-cell")


def test_what_a_notebook_varies_is_chosen_in_the_panel(lab, open_notebook):
    from playwright.sync_api import expect

    page = with_panel(open_notebook, "05_frozen_layers.ipynb")
    panel = page.locator(".workbench-panel")
    expect(panel.get_by_label("What may move")).to_be_disabled()
    expect(panel.get_by_role("slider", name="First block that may move")).to_have_count(0)
    values = panel.get_by_label("Values")
    expect(values).to_have_value("['all', 'after:6', 'window:2-4']")
    values.fill("['after:6', 'after:11']")
    values.press("Tab")
    expect(panel.get_by_role("alert")).to_contain_text("moves no weight")
    assert_beside(panel, values)
    values.fill('["after:6", "window:0-1"]')
    values.press("Tab")
    expect(panel).to_contain_text("after:6 / window:0-1 moving; plan takes each of")
    expect(panel).to_contain_text(
        "In one run or another: E edited: 2-4. M may move in tuning: 0-1, 7-11."
    )
    shoot(page, "panel-values")


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
@pytest.mark.parametrize("width", [1400, 900])
def test_the_panel_fits_at_any_width_and_in_any_theme(theme, width, lab, open_notebook):
    """12 and 48 blocks need no scrolling, and every letter is told from its box."""
    config = json.dumps({"model_type": "gpt2", "n_layer": 48, "n_embd": 16, "n_head": 2})
    deep = lab.root / "deep"
    deep.mkdir(exist_ok=True)
    (deep / "config.json").write_text(config)
    name = of_cells(
        lab,
        "wide.ipynb",
        'model: str = ""',
        "import workbench as wb\nfrom workbench import panel",
        "from ipywidgets import VBox\nVBox([panel.Panel(wb.Spec(editor='memit')),"
        " panel.Panel(wb.Spec(model='deep', editor='memit', layers=range(13, 18)))])",
    )
    page = with_panel(open_notebook, name)
    page.set_viewport_size({"width": width, "height": 1100})
    page.evaluate(
        """theme => {
            window.jupyterapp.shell.collapseLeft();
            return window.jupyterapp.commands.execute('apputils:change-theme', {theme});
        }""",
        theme,
    )
    page.wait_for_timeout(1500)
    shoot(page, f"panel-{theme.split()[1].lower()}-{width}")
    for strip, count in zip(page.locator(".workbench-blocks").all(), (12, 48), strict=True):
        assert strip.locator(".box.plan.on").count() == count
        assert strip.evaluate("node => node.scrollWidth <= node.clientWidth + 8")
        output = strip.evaluate(
            "node => { const area = node.closest('.jp-OutputArea').getBoundingClientRect();"
            " return node.getBoundingClientRect().right <= area.right; }"
        )
        assert output


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
    role = "combobox|textbox|button|slider"
    found = re.match(rf'- (?:{role}) "([^"]*)"', control.aria_snapshot())
    return found[1].strip("\uf04b\uf04d\uf040 ") if found else ""


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
    panel.get_by_role("button", name="A fact of your own").wait_for()
    before, written = finished(lab), page.evaluate(CELLS)

    def choice(name):
        return panel.get_by_role("combobox", name=name, exact=True)

    controls = panel.locator(":is(select, input, button, [role=slider]):visible").all()
    names = [name_of(control) for control in controls]
    assert "" not in names
    assert sorted(set(names)) == sorted(names)
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
    caption = explorer.get_by_role("grid").nth(2).locator("caption")
    page.keyboard.press("Home")
    expect(caption).to_have_text("before")
    page.keyboard.press("ArrowRight")
    expect(caption).to_have_text("edited")
    shoot(page, "keyboard-explorer")
    assert page.evaluate(CELLS) == written
