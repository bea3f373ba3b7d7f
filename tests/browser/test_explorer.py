"""The explorer in a saved page, in a real browser, without a kernel or a network."""

import json
import os
from urllib.parse import parse_qs, urlparse

import nbformat
import pytest

from tests.benchmarks.explorer import synthetic_run
from workbench import pages
from workbench.explorer import Explorer

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("WORKBENCH_SHOTS", "")  # a folder for pictures of what the tests see
STEPS = (-1, 0, 20, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, and the page of a notebook that shows the explorer of both."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"n_edited": 5, "n_intrinsic": 3, "layers": 4}
    run = synthetic_run(folder / "one", steps=STEPS, **sizes)
    other = synthetic_run(folder / "other", steps=STEPS[:-1], **sizes)
    cell = nbformat.v4.new_code_cell("")
    html = {"text/html": Explorer(run, other).page()}
    cell.outputs = [nbformat.v4.new_output("display_data", html)]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebook.ipynb")
    saved = folder / "notebook.html"
    saved.write_text(pages.notebook_page(folder / "notebook.ipynb"), encoding="utf-8")
    return run, saved


@pytest.fixture
def opened(browser, made):
    """opened(fragment="") -> the page; at its end nothing was asked for and nothing complained."""
    contexts, wrong = [], []
    _, saved = made

    def open_page(fragment: str = "", width: int = 1400, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda one: one.url.startswith("file:") or wrong.append(one.url))
        page.goto(saved.as_uri() + fragment)
        page.locator(".square").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def lens(page, number: int, run: int = 0):
    return page.locator("section").nth(run).get_by_role("grid").nth(number)


def recorded(run, step: int, fact_id: str = "edited:0-0"):
    """What the tables say of the likeliest token after the last block, where the answer is read."""
    tokens = run.tokens[(run.tokens.fact_id == fact_id) & (run.tokens.step == step)]
    return tokens[(tokens.layer == 3) & (tokens["rank"] == 1)].iloc[0]


def test_three_lenses_say_what_was_recorded(opened, made):
    run, _ = made
    page = opened()
    for number, step in enumerate((-1, 0, 40)):
        cell = lens(page, number).locator("tbody tr").first.locator("td").last
        assert cell.inner_text() == recorded(run, step).word
    said = page.locator("section").first.locator(".hover tr").nth(1).inner_text().split("\t")
    row = recorded(run, 40)
    assert said[:2] == ["1", row.word]
    assert float(said[2]) == pytest.approx(row.probability, abs=0.0006)
    heads = lens(page, 2).locator("tbody th").all_inner_texts()
    assert heads == ["E 3", "2", "1", "0"]
    assert lens(page, 0).locator("tfoot th").all_inner_texts()[1:3] == ["<|endoftext|>", "<i>"]
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/explorer.png", full_page=True)


def test_the_scrubber_moves_both_runs_and_the_address_keeps_the_view(opened):
    page = opened()
    slider = page.get_by_role("slider", name="Checkpoint")
    assert slider.get_attribute("aria-valuetext") == "step 40"
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "before"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    for number in (0, 1):
        assert lens(page, 2, number).locator("caption").inner_text() == "step 20"
    page.keyboard.press("End")
    assert lens(page, 2, 0).locator("caption").inner_text() == "step 40"
    assert lens(page, 2, 1).locator("caption").inner_text() == "step 20"  # it has no more
    page.keyboard.press("ArrowLeft")
    page.get_by_role("listbox").get_by_role("option").nth(2).click()
    fragment = "#" + urlparse(page.url).fragment
    view = json.loads(parse_qs(fragment[1:])["explorer0"][0])
    assert (view["fact"], view["step"]) == ("edited:0-2", 20)
    again = opened(fragment)
    assert (
        again.get_by_role("slider", name="Checkpoint").get_attribute("aria-valuetext") == "step 20"
    )
    assert "<i>Prompt</i> 2" in again.locator(".prompt").inner_text()


def test_play_goes_through_the_checkpoints_and_stops(opened):
    page = opened()
    page.get_by_role("button", name="Play").click()
    name = page.locator("output")
    for words in ("before", "edited", "step 20", "step 40"):
        page.wait_for_function(
            "words => document.querySelector('output').textContent === words", arg=words
        )
    page.get_by_role("button", name="Play").wait_for(timeout=5000)
    assert name.inner_text() == "step 40"


def test_facts_are_filtered_by_fate_words_and_a_drag(opened):
    page = opened()
    squares = page.get_by_role("listbox").get_by_role("option")
    assert squares.count() == 8
    page.get_by_role("button", name="back to true 1").click()
    assert squares.count() == 1
    assert "back to true" in squares.first.get_attribute("aria-label")
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("searchbox").fill("prompt</i> 4")
    assert squares.count() == 1
    page.get_by_role("button", name="Show all").click()
    assert squares.count() == 8
    first, last = squares.nth(1).bounding_box(), squares.nth(3).bounding_box()
    page.mouse.move(first["x"] + 8, first["y"] + 8)
    page.mouse.down()
    page.mouse.move(last["x"] + 8, last["y"] + 8)
    page.mouse.up()
    assert squares.count() == 3


def test_a_click_on_a_cell_pins_its_token_and_one_on_the_chip_unpins_it(opened, made):
    run, _ = made
    page = opened()
    chips = page.locator(".pins button")
    assert [text.strip(" \u00d7") for text in chips.all_inner_texts()] == ["A & B", "B & A"]
    lens(page, 1).locator("tbody tr").first.locator("td").last.click()
    assert chips.last.inner_text().strip(" \u00d7") == recorded(run, 0).word
    over = page.locator("section").first.locator("figure").first
    assert over.locator("path").count() == 3
    assert recorded(run, 0).word in over.locator("svg").get_attribute("aria-label")
    chips.last.click()
    assert chips.count() == 2


def test_the_mode_of_change_says_what_moved(opened, made):
    run, _ = made
    page = opened()
    page.get_by_label("Colour of the cells").select_option("change")
    at = run.positions
    at = at[
        (at.fact_id == "edited:0-0") & (at.position == -1) & (at["rank"] == 1) & (at.layer == 0)
    ]
    p = at.set_index("step").p_edited
    fills = [
        lens(page, number)
        .locator("tbody tr")
        .last.locator("td")
        .nth(-2)
        .evaluate("cell => cell.style.backgroundColor")
        for number in range(3)
    ]
    blue_or_orange = [tuple(map(int, fill[4:-1].split(","))) for fill in fills]
    for (red, _, blue), change in zip(
        blue_or_orange[1:], (p[0] - p[-1], p[40] - p[0]), strict=True
    ):
        assert (red > blue) == (change > 0)


def test_the_legend_says_what_the_colours_mean_for_the_fact(opened):
    page = opened()
    legend, mode = page.locator(".legend"), page.get_by_role("combobox")
    assert legend.inner_text().split() == ["p(the", "likeliest", "token):", "0", "1"]
    mode.select_option("edited")
    assert legend.inner_text().startswith("p(A & B): 0")
    page.locator(".square").last.click()  # nothing was edited there
    assert legend.inner_text().startswith("p(A & B): 0")
    mode.select_option("change")
    assert legend.inner_text().split() == ["change", "of", "p(A", "&", "B):", "\u22121", "+1"]


def test_the_keyboard_alone_will_do(opened):
    page = opened()
    squares = page.get_by_role("listbox").get_by_role("option")
    squares.first.focus()
    page.keyboard.press("ArrowRight")
    assert squares.nth(1).get_attribute("aria-selected") == "true"
    assert squares.nth(1).evaluate("node => node === document.activeElement")
    page.keyboard.press("End")
    assert squares.last.get_attribute("aria-selected") == "true"
    page.keyboard.press("Home")
    cell = lens(page, 2).locator("td[tabindex='0']")
    cell.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert (
        "after block 2, at" in page.locator("section").first.locator(".hover p").first.inner_text()
    )
    page.keyboard.press("Enter")
    assert page.locator(".pins button").count() == 3
    names = page.locator("button, input:visible, select").evaluate_all(
        "nodes => nodes.map(node => node.ariaLabel || node.textContent.trim())"
    )
    assert all(names)


def test_words_of_the_data_are_shown_as_words(opened):
    page = opened()
    assert page.locator(".workbench-explorer td b, .workbench-explorer .prompt i").count() == 0
    assert "<i>Prompt</i> 0" in page.locator(".prompt").inner_text()


@pytest.mark.parametrize("width", [1400, 900])
def test_nothing_is_wider_than_the_page(opened, width):
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    "fragment",
    [
        "#explorer0=%7Bbroken",
        '#explorer0={"pins":5,"step":33,"mode":"x","fact":"no such"}',
        '#explorer0={"pins":[5],"mode":"constructor","fates":[null],"range":["a"]}',
    ],
)
def test_an_address_that_says_nonsense_shows_the_page_as_it_is_at_first(opened, fragment):
    page = opened(fragment)
    assert page.locator(".pins button").count() == 2
    assert (
        page.get_by_role("slider", name="Checkpoint").get_attribute("aria-valuetext") == "step 40"
    )
    assert "<i>Prompt</i> 0" in page.locator(".prompt").inner_text()


def test_a_token_pinned_anywhere_is_found_among_the_answers(opened, made):
    run, _ = made
    page = opened()
    row = recorded(run, 40)
    lens(page, 2).locator("tbody tr").first.locator("td").last.click()
    over = page.locator("section").first.locator("figure").first.locator("svg")
    assert f"{row.word} {row.probability:.3f}".replace(" 0.", " .") in over.get_attribute(
        "aria-label"
    )


def test_a_pointer_that_comes_from_elsewhere_filters_nothing(opened):
    page = opened()
    squares = page.get_by_role("listbox").get_by_role("option")
    place = squares.nth(4).bounding_box()
    page.mouse.move(700, 300)
    page.mouse.down()
    page.mouse.move(place["x"] + 8, place["y"] + 8)
    page.mouse.up()
    assert squares.count() == 8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_in_jupyterlab_it_follows_the_theme_and_keeps_its_keys(lab, open_notebook, made, theme):
    run, _ = made
    code = f"from workbench import runs\nshown = runs.read({str(run.folder)!r}).explore()\nshown"
    codes = [code, "shown.view", "shown.view = {'step': 20, 'fact': 'edited:0-2'}"]
    cells = [nbformat.v4.new_code_cell(one) for one in codes]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, lab.root / "explore.ipynb")
    run_cell = """async (index) => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = index;
        await window.jupyterapp.commands.execute('notebook:run-cell');
    }"""
    page = open_notebook("explore.ipynb", run=False)
    page.evaluate(run_cell, 0)
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme
    )
    explorer = page.locator(".workbench-explorer")
    explorer.wait_for()
    expected = "true" if theme.endswith("Light") else "false"
    page.locator(f"body[data-jp-theme-light={expected}]").wait_for(state="attached")
    ink = explorer.evaluate("node => getComputedStyle(node).color")
    light = sum(map(int, ink.partition("(")[2].rstrip(")").split(",")[:3])) / 3
    assert (light > 128) == theme.endswith("Dark")
    slider = explorer.get_by_role("slider", name="Checkpoint")
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("x")  # which would cut the cell
    page.keyboard.press("ArrowRight")
    assert explorer.get_by_role("grid").nth(2).locator("caption").inner_text() == "edited"
    if SHOTS:
        explorer.screenshot(path=f"{SHOTS}/explorer-{theme[11:].lower()}.png")
    while not page.get_by_text("'step': 0").is_visible():  # changes are sent one by one
        page.evaluate(run_cell, 1)  # the kernel knows what is looked at
    page.evaluate(run_cell, 2)  # and says what is to be
    explorer.get_by_text("<i>Prompt</i> 2").wait_for()
    caption = explorer.get_by_role("grid").nth(2).locator("caption")
    caption.get_by_text("step 20").wait_for()
    assert page.locator(".jp-CodeCell").count() == 3
    assert page.outside == []
