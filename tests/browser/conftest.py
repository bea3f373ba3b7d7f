"""A private JupyterLab on loopback and a real Chromium; all of its folders are temporary ones."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {"max_steps": 4, "eval_every": 2, "n_intrinsic": 4}
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
IDLE = """() => {
    const shown = window.jupyterapp?.shell.currentWidget, session = shown?.sessionContext;
    const kernel = session?.session?.kernel;
    return !!(shown?.context?.isReady && session?.isReady && kernel?.status === 'idle');
}"""


@dataclass(frozen=True)
class Lab:
    url: str
    token: str
    root: Path  # holds the notebooks; runs go beside it

    @property
    def runs(self) -> Path:
        return self.root.parent / "runs"


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}; CHROMIUM names another place")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """JupyterLab over a copy of the notebooks whose parameters are small ones."""
    home = tmp_path_factory.mktemp("lab")
    _copy_notebooks(home / "notebooks")
    (home / "pyproject.toml").touch()  # a project, whose runs lie beside its notebooks' folder
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = Lab(
        url=f"http://127.0.0.1:{port}", token=secrets.token_hex(16), root=home / "notebooks"
    )
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={started.token}", f"--ServerApp.root_dir={started.root}",
        "--ServerApp.terminals_enabled=False",
        "--LabApp.news_url=", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(home)
        )
    try:
        _wait_until_up(started, server, home / "server.log")
        yield started
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _copy_notebooks(folder: Path) -> None:
    shutil.copytree(
        NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "images")
    )
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                lines = [line.split(":")[0] for line in cell.source.splitlines()]
                cell.source = "\n".join(
                    f"{name}: int = {SMALL[name]}" if name in SMALL else line
                    for name, line in zip(lines, cell.source.splitlines(), strict=True)
                )
        nbformat.write(notebook, path)


def _environment(home: Path) -> dict[str, str]:
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {"WORKBENCH_CACHE": "cache"} if "WORKBENCH_CACHE" not in os.environ else {}
    return {
        **os.environ,
        **{name: str(home / place) for name, place in places.items()},
        "OMP_NUM_THREADS": "1",
    }


def _wait_until_up(lab: Lab, server: subprocess.Popen, log: Path) -> None:
    request = urllib.request.Request(
        f"{lab.url}/api/status", headers={"Authorization": f"token {lab.token}"}
    )
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        try:
            urllib.request.urlopen(request, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer within a minute: {log.read_text()[-2000:]}")


@pytest.fixture
def open_notebook(lab, browser):
    """open_notebook(name, run=True) -> a page with its kernel idle; `page.outside` lists requests
    that left this machine.
    """
    contexts = []

    def opened(name: str, run: bool = True):
        context = browser.new_context(viewport={"width": 1500, "height": 1600})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.outside = []
        inside = (lab.url, lab.url.replace("http", "ws"), "data:", "blob:")
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(inside) else page.outside.append(request.url)
            ),
        )
        page.goto(
            f"{lab.url}/lab/tree/{name}?token={lab.token}&reset", wait_until="domcontentloaded"
        )
        page.wait_for_function(IDLE)
        if run:
            page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        return page

    yield opened
    for context in contexts:
        context.close()
