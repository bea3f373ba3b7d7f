"""A saved page in a real browser: what others wrote into it runs nothing and fetches nothing, and
formulas are drawn.
"""

import nbformat
import pytest

from workbench import pages

pytestmark = pytest.mark.browser
ATTACK = """<img src="x" onerror="document.title = 'run'"><script>document.title = 'run'</script>
<img src="http://127.0.0.1:9/a.png"><link rel="stylesheet" href="http://127.0.0.1:9/a.css">
<iframe src="http://127.0.0.1:9/"></iframe><p style="background: url(http://127.0.0.1:9/b.png)">end</p>"""


def opened(browser, path) -> tuple[list[str], str, float]:
    """The addresses that the page was let ask for, its title, and how far the numerator of its
    formula stands above the denominator, in pixels.
    """
    context = browser.new_context()
    page = context.new_page()
    asked, refused = [], []
    page.on("request", lambda request: asked.append(request))
    page.on("requestfailed", lambda request: request.failure == "csp" and refused.append(request))
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    above, below = page.locator("mfrac > *").all()
    height = below.bounding_box()["y"] - above.bounding_box()["y"]
    title = page.title()
    context.close()
    urls = [request.url for request in asked if request not in refused]
    return [url for url in urls if not url.startswith(("data:", path.as_uri()))], title, height


def test_markup_of_others_does_nothing_and_formulas_are_drawn(browser, tmp_path):
    cells = [nbformat.v4.new_markdown_cell(r"$\frac{a}{b}$"), nbformat.v4.new_code_cell("")]
    cells[1].outputs = [nbformat.v4.new_output("display_data", {"text/html": ATTACK})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    saved = tmp_path / "notebook.html"
    saved.write_text(pages.notebook_page(tmp_path / "notebook.ipynb"), encoding="utf-8")
    asked, title, height = opened(browser, saved)
    assert (asked, title) == ([], "notebook")
    assert height > 3  # of what is not drawn as a formula both stand in one line

    saved.write_text(saved.read_text(encoding="utf-8").replace(pages.META, ""), encoding="utf-8")
    asked, title, _ = opened(browser, saved)
    assert len(asked) >= 4  # so it would have been
    assert title == "run"
