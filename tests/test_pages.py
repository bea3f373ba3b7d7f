"""A saved page runs nothing and loads nothing from elsewhere, and still shows formulas, tables,
pictures and words.
"""

import base64
import hashlib
import html
import re
from pathlib import Path

import nbclient
import nbconvert
import nbformat
import pytest

from workbench import explorer, pages

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"
MARKDOWN = r"""# Formulas

One $p(o^*) \ge 0.1$ in a line, `$no$` in code, and

$$\Delta = \dfrac{(v^* - Wk)\,(C^{-1}k)^\top}{k^\top C^{-1} k}$$
"""
CODE = f"""
import ipywidgets, pandas, tqdm.auto
from IPython.display import Javascript, Latex, display
for _ in tqdm.auto.tqdm(range(3), desc="a bar"):
    pass
display(ipywidgets.IntSlider(7, description="a slider"), Javascript("alert(3)"))
display(pandas.DataFrame({{{EVIL!r}: [{EVIL!r}]}}, index=[{EVIL!r}]), Latex("$\\\\alpha$"))
print({EVIL!r}, "\\x1b[31mred")
{EVIL!r}
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook with formulas, a widget, a progress bar, tables and words with markup in them."""
    cells = [nbformat.v4.new_markdown_cell(MARKDOWN), nbformat.v4.new_code_cell(CODE)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python"}
    nbclient.NotebookClient(notebook, timeout=120).execute()
    path = tmp_path_factory.mktemp("notebook") / "notebook.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def page(executed):
    return pages.notebook_page(executed)


def test_a_saved_page_loads_nothing_from_elsewhere(page, executed, loads):
    assert loads(page) == []
    assert "<script" not in page
    assert page.index(pages.META) < page.index("<style")
    usual, _ = nbconvert.HTMLExporter().from_filename(str(executed))
    assert loads(usual)  # what it would be


@pytest.mark.parametrize(
    "markup",
    [
        "<script>1</script>",
        "<script src='//a/b.js'></script>",
        "<img src='https://a/b.png'>",
        "<img src=x onerror=alert(1)>",
        "<link rel=stylesheet href=a.css>",
        "<style>@import 'a.css';</style>",
        "<style>p {background: url(https://a)}</style>",
        "<p style='background:url(//a/b)'>",
        "<iframe srcdoc='x'></iframe>",
        "<meta http-equiv=refresh content='0;url=https://a'>",
        "<a href='javascript:alert(1)'>a</a>",
    ],
)
def test_what_a_page_loads_is_found(markup, loads):
    assert loads(markup)
    assert (
        loads("<a href='https://a'>a</a><img src='data:,'><style>p {fill: url(#a)}</style>") == []
    )


def test_the_policy_allows_no_script_but_the_explorers_and_no_address():
    rules = dict(rule.strip().split(" ", 1) for rule in pages.POLICY.split(";"))
    assert rules["default-src"] == "'none'"
    script = hashlib.sha256(Path(explorer.MODULE).read_bytes()).digest()
    assert rules.pop("script-src") == f"'sha256-{base64.b64encode(script).decode()}'"
    assert set(rules.values()) == {"'none'", "data:", "'unsafe-inline'"}
    assert [name for name, value in rules.items() if value == "'unsafe-inline'"] == ["style-src"]


def test_formulas_are_set_when_the_page_is_made(page):
    formulas = re.findall("<math.*?</math>", page, flags=re.DOTALL)
    assert [re.search('display="(.*?)"', formula)[1] for formula in formulas] == [
        "inline",
        "block",
        "inline",
    ]
    assert "<mfrac>" in formulas[1]
    assert ">α<" in formulas[2]
    assert "<code>$no$</code>" in page


def test_of_a_widget_its_words_stay_and_of_a_progress_bar_nothing(page):
    assert "IntSlider(value=7, description='a slider')" in page
    assert "a bar" not in re.sub("(?s)<div class=.cm-editor.*?</div>", "", page)
    assert "widget-state" not in page


def test_words_of_the_data_are_shown_as_words(page):
    shown = re.sub("(?s)<div class=.cm-editor.*?</div>", "", page)
    assert (
        shown.count("&lt;img src=x onerror=alert(1)&gt;") == 5
    )  # column, index, cell, printed, result
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("formula", "shown"),
    [
        (r"\mathbb 1", "𝟙</mn>"),
        (r"\Delta", "Δ</mi>"),
        (
            r"\text{<script>alert(1)</script>}",
            "<mtext>&lt;script&gt;alert(1)&lt;/script&gt;</mtext>",
        ),
        (r"\text{&lt;b&gt;}", "<mtext>&lt;b&gt;</mtext>"),
        ("a < b", "<mo>&lt;</mo>"),
    ],
)
def test_a_formula_holds_signs_and_no_markup_of_others(formula, shown):
    made = pages.mathml(formula, "inline")
    assert made.startswith("<math")
    assert shown in made


@pytest.mark.parametrize(
    "formula",
    [r"\unheard{x}", "x^2^3", r"\begin{nothing}", r"\operatorname{a\,b}", "a & b", r"\left( <b>"],
)
def test_a_formula_that_cannot_be_set_stands_as_its_source(formula):
    assert (
        pages.mathml(formula, "block")
        == f"<code>{formula.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</code>"
    )


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")),
    ids=lambda path: path.stem,
)
def test_every_formula_of_the_notebooks_can_be_set(path, loads):
    page = pages.notebook_page(path)
    assert loads(page) == []
    assert not re.search(r"<code>[^<]*\\", page)
    words = re.sub(r"(?s)<(style|math|pre|code)\b.*?</\1>", "", page)
    assert "$" not in words


def test_a_picture_has_its_words_and_they_are_no_markup(tmp_path, loads):
    words = 'edits kept by "rome" & <img src=x onerror=alert(1)>'
    picture = nbformat.v4.new_output("display_data", {"image/png": "aGVq", "text/plain": words})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[picture])])
    path = tmp_path / "some.ipynb"
    nbformat.write(notebook, path)
    text = pages.notebook_page(path)
    assert loads(text) == []
    (image,) = re.findall(r"<img alt='([^']*)'", text)
    assert html.unescape(image) == words
    assert "<img src=x" not in text
