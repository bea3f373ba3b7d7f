"""Pages that are kept: an executed notebook, a report. Each is one file that needs no server.

One script runs in them, the explorer's, known by its sum. Formulas become MathML, which browsers
draw by themselves. Of any other widget its words stay.
"""

import base64
import hashlib
import html
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import latex2mathml.converter
import nbconvert
import nbformat
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

# What stands in a page was partly written by others: facts, tokens, names of files.
EXPLORER = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")
SUM = base64.b64encode(hashlib.sha256(EXPLORER.encode()).digest()).decode()
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; font-src data:; "
POLICY += f"style-src 'unsafe-inline'; script-src 'sha256-{SUM}'"
META = f'<meta content="{POLICY}" http-equiv="Content-Security-Policy"/>'
DOUBLE_STRUCK = {ord("0") + digit: 0x1D7D8 + digit for digit in range(10)}
PICTURES = ("image/png", "image/jpeg")
# Of the forms that an output has, the first that is there is shown.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "text/latex", *PICTURES, "text/plain"]
WIDGET = "application/vnd.jupyter.widget-view+json"
TEMPLATE = Path(__file__).with_name("page.html.j2")


def notebook_page(path: Path) -> str:
    """The page of an executed notebook: what JupyterLab shows of it without a kernel."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]
    config = Config(NbConvertBase=Config(display_data_priority=SHOWN))
    template = TEMPLATE.read_text(encoding="utf-8")
    exporter = _Exporter(config=config, raw_template=template, embed_images=True)
    about = {"metadata": {"name": path.stem, "path": str(path.parent)}, "meta": META}
    body, _ = exporter.from_notebook_node(notebook, about)
    return body


def mathml(formula: str, display: str) -> str:
    """A LaTeX formula as MathML, or as its source if the converter does not know all of it.

    Args:
        display: "inline" or "block".
    """
    source = f"<code>{html.escape(formula)}</code>"
    try:
        root = latex2mathml.converter.convert_to_element(formula, display=display)
    except Exception:  # of a dozen kinds, which share no other type
        return source
    for element in root.iter():
        # Signs come as character references; resolved before it is written, they are no markup.
        element.text = html.unescape(element.text or "")
        if element.get("mathvariant") == "double-struck":  # which browsers do not know
            element.text = element.text.translate(DOUBLE_STRUCK)
        # Of a command that it did not know the name stays as text, or an empty operator.
        is_lost = element.tag == "mo" and not (element.text or element.attrib or len(element))
        if is_lost or element.text == "&" or element.text.startswith("\\"):
            return source
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _is_progress_bar(output: nbformat.NotebookNode) -> bool:
    """Whether it is a bar of tqdm, whose words are of the moment at which it was first shown."""
    data = output.get("data", {})
    return WIDGET in data and "%|" in data.get("text/plain", "")


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class _Exporter(nbconvert.HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context, source: str) -> str:
        attachments = context["cell"].get("attachments", {})
        path = context["resources"]["metadata"]["path"]
        renderer = _Renderer(escape=False, embed_images=True, attachments=attachments, path=path)
        return MarkdownWithMath(renderer=renderer).render(source)
