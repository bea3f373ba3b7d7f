"""One notebook in batch, through papermill: strict about its parameters, whole or absent, and found
again by its id.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
import psutil
import yaml

from workbench import files, runs
from workbench import spec as specs
from workbench.cache import locked
from workbench.editing import EDITORS
from workbench.facts import check_file
from workbench.records import BadInput, did_you_mean, fields_of, listed, one_line, refused
from workbench.registry import MEASURES
from workbench.tuning.numbers import PROTECTIONS, TASKS

PATHS = ("facts", "task_data", "corpus", "folder", "model")  # parameters that may be one
FACT = ("fact", "subject", "prompt", "object", "target")  # a fact is named, or typed in the others
PRESETS = "presets"  # folder beside the notebooks
QUIET_KERNEL = "--IPKernelApp.log_level=50"  # it warns of TCP on loopback at every start
IN_BATCH = {"WORKBENCH_BATCH": "1", "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def declared(notebook: Path) -> dict[str, dict]:
    """The parameters that a notebook declares: name -> papermill's description of it."""
    if not notebook.is_file():
        raise BadInput(f"notebook {str(notebook)!r}: no such file")
    with refused(f"notebook {str(notebook)!r}: not a notebook", "save it again in JupyterLab"):
        parameters = papermill.inspect_notebook(_literal(notebook))
    if not parameters:
        raise BadInput(f"notebook {str(notebook)!r}: tag its cell of assignments 'parameters'")
    return parameters


def defaults(notebook: Path) -> dict:
    """The value that a notebook gives each of its parameters."""
    return {name: ast.literal_eval(about["default"]) for name, about in declared(notebook).items()}


def declare_registered(notebook: Path) -> None:
    """Let the names pass that the notebook's cells register, which run in a kernel of its own."""
    code = "\n".join(_code(notebook))
    registries = {"editors": EDITORS, "tasks": TASKS, "measures": MEASURES}
    registries["protections"] = PROTECTIONS
    for kind, name in re.findall(r"\b(\w+)\.register\(\s*[\"'](\w+)[\"']", code):
        if kind in registries:
            registries[kind].declare([name])


def _code(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def checked(notebook: Path, parameters: Mapping, preset: str = "") -> tuple[dict, specs.Spec]:
    """The given parameters over the preset's, each declared by the notebook, and the Spec that they
    make with its defaults, not resolved.
    """
    usual = defaults(notebook)
    declare_registered(notebook)
    given = _preset(notebook, preset) | dict(parameters)
    vary = given.get("vary", usual.get("vary"))
    for name, value in given.items():
        if name not in usual:
            near = did_you_mean(name, usual) or ":"
            raise BadInput(f"parameter {name!r}{near} {notebook.name} declares {', '.join(usual)}")
        if value is None and usual[name] is not None and name != vary:
            raise BadInput(f"parameter {name!r}: has no value; give one, or leave it out")
    if vary != usual.get("vary") and vary in usual:
        given.setdefault(vary, None)  # not the notebook's own value alone, but each of `values`
    given = _without_rivals(given, parameters, vary)
    for name in PATHS:
        if name in given:
            given[name] = _path(name, given[name], notebook)
    if vary in PATHS and isinstance(given.get("values"), list):
        given["values"] = [_path(vary, value, notebook) for value in given["values"]]
    parameters = usual | given
    fields = {name: parameters[name] for name in specs.Spec.model_fields if name in parameters}
    if fields.get("model") == "":
        del fields["model"]  # any
    spec = specs.Spec(**fields)
    experiments(notebook, given, spec)  # checks names and values
    return given, spec


def _without_rivals(given: Mapping, named: Mapping, vary: object) -> dict:
    """Of two parameters that exclude each other the preset's goes.

    Raises:
        BadInput: both were named, or both are the preset's.
    """
    kept = dict(given)
    pairs = [("values", vary), *((FACT[0], name) for name in FACT[1:])]
    for pair in pairs:
        absent = (None,) if pair[0] == "values" else (None, "")  # "" is a value to vary
        if any(given.get(name) in absent for name in pair):
            continue
        of_the_preset = [name for name in pair if name not in named]
        if len(of_the_preset) != 1:
            raise BadInput(f"parameters {pair[0]!r} and {pair[1]!r} exclude each other; give one")
        kept.pop(of_the_preset[0], None)
    return kept


def _path(name: str, value, notebook: Path):
    """A path that is given counts from here, not from the notebook's folder, where the kernel runs;
    one that is nowhere is refused.
    """
    if not value or not isinstance(value, str):
        return value
    path = Path(value)
    if path.is_dir() or (path.exists() and name != "model"):
        return str(path.resolve())
    if name != "model" and not (notebook.parent / path).exists():
        check_file(value, name)
    return value


def _preset(notebook: Path, name: str) -> dict:
    """The parameters of a preset for a notebook: the shared ones, and those under its name."""
    if not name:
        return {}
    folder = notebook.parent / PRESETS
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in folder.glob("*.yaml"))
        near = did_you_mean(name, known) or ":"
        raise BadInput(f"preset {name!r}{near} no file {path}; there are {listed(known, 20)}")
    parameters = fields_of(path, "preset")
    notebooks = {path.stem for path in notebook.parent.glob("*.ipynb")}
    for_this_one = parameters.get(notebook.stem) or {}
    if not isinstance(for_this_one, dict):
        raise BadInput(f"preset {name!r}: {notebook.stem} must hold parameters, name: value")
    shared = {key: value for key, value in parameters.items() if key not in notebooks}
    return shared | for_this_one


def parsed(notebook: str | Path, pairs: Sequence[tuple[str, str]]) -> dict:
    """Parameters given as text: YAML, but what the notebook declares as `str` stays the text it is
    (`{} was born in`, 1984, no).
    """
    types = {name: about["inferred_type_name"] for name, about in declared(Path(notebook)).items()}
    return {name: _value(name, text, types.get(name) == "str") for name, text in pairs}


def _value(name: str, text: str, is_text: bool):
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if is_text:
            return text
        raise BadInput(f"-p {name}: {text!r} is not YAML ({error}); quote it") from None
    return text if is_text and not isinstance(value, str) else value


def experiments(notebook: Path, given: Mapping, spec: specs.Spec) -> list[specs.Spec]:
    """The Specs, resolved, that a notebook runs: one, or one for each value of what it varies.

    It declares the field that it varies as None: a value that is given is then the only one.
    """
    parameters = defaults(notebook) | dict(given)
    if "vary" not in parameters:
        return [spec.resolved()]
    vary = parameters["vary"]
    return specs.varied(spec, vary, specs.arms(spec, vary, parameters["values"]))


def identify(notebook: Path, given: Mapping, spec: specs.Spec) -> str:
    """The run's id: the Spec, the code, the notebook's code cells and what is given beside the
    Spec.
    """
    code = _code(notebook)
    extra = {name: value for name, value in given.items() if name not in specs.Spec.model_fields}
    text = json.dumps([code, extra], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return specs.identify(spec, cells=digest, name=notebook.stem)


def makes_spec(notebook: Path) -> bool:
    """Whether a notebook makes an experiment of its own, rather than reading runs."""
    return re.search(r"\bSpec(\.of)?\(", notebook.read_text(encoding="utf-8")) is not None


def run(
    notebook: str | Path,
    parameters: Mapping | None = None,
    preset: str = "",
    again: bool = False,
    out: str | Path = "",
) -> runs.Run:
    """Execute a notebook into a run folder.

    A finished run of the same parameters, code, weights and data is returned at once unless
    `again`; a notebook that makes no Spec of its own reads what there is, and is always run. A
    failed one leaves `<id>.failed.ipynb`, executed up to the failing cell, and `<id>.failed.txt`,
    the error, beside the runs. Two processes that are asked for one run do it once.
    """
    notebook = Path(notebook)
    out = runs.place(out, notebook)
    given, spec = checked(notebook, parameters or {}, preset)
    folder = out / identify(notebook, given, spec)
    again = again or not makes_spec(notebook)
    with locked(f"run {out.resolve()} {folder.name}"):
        if runs.finished(folder) and not again:
            return runs.read(folder)
        with runs.new_folder(out, folder.name) as partial:
            _execute(notebook, given, partial.resolve(), folder, again)
            runs.seal(partial)
    for path in failure_of(folder):
        path.unlink(missing_ok=True)
    return runs.read(folder)


def failure_of(folder: Path) -> tuple[Path, Path]:
    """The notebook and the error that a failed run leaves in the place of its folder."""
    executed = folder.with_name(f"{folder.name}.failed.ipynb")
    return executed, folder.with_name(f"{folder.name}.failed.txt")


def note_failure(folder: Path, text: str) -> None:
    """Leave the error of a failed run in the place of its folder."""
    with files.written(failure_of(folder)[1]) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _execute(notebook: Path, given: Mapping, folder: Path, final: Path, again: bool) -> None:
    from workbench import pages  # nbconvert takes a second to import

    executed = folder / "notebook.ipynb"
    state = {"WORKBENCH_RUN": str(folder), "WORKBENCH_AGAIN": "1" if again else ""}
    try:
        with patch.dict(os.environ, IN_BATCH | state):
            papermill.execute_notebook(
                _literal(notebook.resolve()),
                _literal(executed),
                parameters=given,
                cwd=str(notebook.parent.resolve()),
                kernel_name="python3",  # of this environment, whatever the notebook was saved with
                extra_arguments=[QUIET_KERNEL],
                progress_bar="WORKBENCH_SWEEP" not in os.environ,
            )
    except Exception as error:
        if files.no_room(error):
            raise
        raise _failure(error, notebook, executed, final) from None
    if not (folder / "run.json").exists():
        raise RuntimeError(f"{notebook.name} wrote no run; its last cells must recorder.write one")
    executed.with_suffix(".html").write_text(pages.notebook_page(executed), encoding="utf-8")


def _failure(error: Exception, notebook: Path, executed: Path, final: Path) -> Exception:
    """What to raise of a notebook that failed. Its cells so far and the error are kept in the place
    of its run.
    """
    where = notebook.name
    name, reason = type(error).__name__, str(error)  # the kernel was killed
    if isinstance(error, papermill.PapermillExecutionError):
        where += f", cell {error.exec_count}"
        name, reason = error.ename, error.evalue
    text = one_line(f"{where}: {name}: {reason}".replace("BadInput: ", "", 1))
    note_failure(final, text)
    if executed.exists():
        kept = failure_of(final)[0]
        os.replace(executed, kept)
        text += f" (executed so far: {kept})"
    return BadInput(text) if name == "BadInput" else RuntimeError(text)


def _literal(path: Path) -> str:
    """The path for papermill, which fills parameters into what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, kernels too, which have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes. One whose number the system has given to another meanwhile is safe."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
