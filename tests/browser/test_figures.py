"""The links beneath a figure save it and its data: in JupyterLab, light and dark, and in a saved
page without a kernel. WORKBENCH_SHOTS names a folder for pictures of both.
"""

import csv
from xml.etree import ElementTree

import nbclient
import nbformat
import pytest

from tests.browser.test_panel import shoot
from workbench import pages

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]
SUMMARY = "of <b>one</b> & 'another': up"
CODE = f"""
import pandas as pd
from workbench import plots
figure, (axes,) = plots._axes(3, 5)
data = pd.DataFrame({{"step": [0, 10, 20], "share": [1.0, 0.5, 0.2]}})
axes.plot(data.step, data.share)
axes.set(xlabel="fine-tuning step", ylabel="share of facts")
plots.Drawing(figure=figure, data=data, summary={SUMMARY!r})
"""


@pytest.fixture(scope="module")
def notebook():
    """A notebook with one figure, executed."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python"}
    return nbclient.NotebookClient(made, timeout=120).execute()


def saved(page, tmp_path) -> dict:
    """What a click on each link beneath the figure downloads: ending -> (name, path)."""
    files = {}
    for ending in ("svg", "png", "csv"):
        with page.expect_download() as download:
            page.get_by_role("link", name=ending.upper(), exact=True).click()
        path = tmp_path / f"saved.{ending}"
        download.value.save_as(path)
        files[ending] = (download.value.suggested_filename, path)
    return files


def check(files: dict) -> None:
    assert {name for name, _ in files.values()} == {
        f"of-b-one-b-another.{ending}" for ending in files
    }
    assert files["png"][1].read_bytes().startswith(b"\x89PNG")
    words = [element.text for element in ElementTree.parse(files["svg"][1]).iter()]
    assert "share of facts" in words
    rows = list(csv.reader(files["csv"][1].open(newline="")))
    assert rows == [["step", "share"], ["0", "1.0"], ["10", "0.5"], ["20", "0.2"]]


def test_a_saved_page_saves_its_figures(browser, notebook, tmp_path):
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    page_file = tmp_path / "notebook.html"
    page_file.write_text(pages.notebook_page(tmp_path / "notebook.ipynb"), encoding="utf-8")
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri(), wait_until="load")
    assert page.locator("figure img").get_attribute("alt") == SUMMARY
    assert page.locator("figure img").bounding_box()["width"] > 300
    check(saved(page, tmp_path))
    shoot(page, "figure-saved-page")
    assert said == []
    context.close()


def test_jupyterlab_saves_a_figure_and_shows_it_on_the_dark_theme(lab, open_notebook, tmp_path):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python"}
    nbformat.write(made, lab.root / "figure.ipynb")
    page = open_notebook("figure.ipynb")
    page.locator("figure img").wait_for()
    check(saved(page, tmp_path))
    shoot(page, "figure-lab-light")
    dark = "apputils:change-theme', {theme: 'JupyterLab Dark'}"
    page.evaluate(f"() => window.jupyterapp.commands.execute('{dark})")
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    sheet = page.locator("figure").evaluate("sheet => getComputedStyle(sheet).backgroundColor")
    assert sheet == "rgb(255, 255, 255)"
    page.wait_for_timeout(500)
    shoot(page, "figure-lab-dark")
    assert page.outside == []
