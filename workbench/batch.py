"""One notebook in batch, through papermill: strict about parameters, complete or absent, resumed by
its id.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
import yaml

from workbench import files, runs
from workbench import spec as specs
from workbench.cache import locked
from workbench.facts import BadInput, check_file
from workbench.records import did_you_mean, listed

TIMEOUT = 6 * 3600  # seconds a cell; papermill has none by itself
PATHS = ("facts", "task_data", "corpus", "folder", "model")  # parameters that may be one
PRESETS = "presets"  # folder beside the notebooks


def declared(notebook: Path) -> dict[str, dict]:
    """The parameters that a notebook declares: name -> papermill's description of it."""
    if not notebook.is_file():
        raise BadInput(f"notebook {str(notebook)!r}: no such file")
    try:
        found = papermill.inspect_notebook(_as_it_is(notebook))
    except (nbformat.reader.NotJSONError, json.JSONDecodeError, AttributeError):
        raise BadInput(f"notebook {str(notebook)!r}: not a notebook (broken JSON)") from None
    if not found:
        raise BadInput(
            f"notebook {str(notebook)!r}: has no cell tagged 'parameters'; tag the cell of plain assignments"
        )
    return found


def checked(notebook: Path, parameters: Mapping, preset: str = "") -> tuple[dict, specs.Spec]:
    """The given parameters over the preset's, each declared by the notebook, and the Spec that they
    make with its defaults, not resolved.
    """
    known = declared(notebook)
    given = _preset(notebook, preset) | dict(parameters)
    defaults = {name: _default(about) for name, about in known.items()}
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(name, known) or ":"
            raise BadInput(f"parameter {name!r}{near} {notebook.name} declares {', '.join(known)}")
        if value is None and defaults[name] is not None:
            raise BadInput(f"parameter {name!r}: has no value; give one, or leave it out")
    vary = given.get("vary", defaults.get("vary", ""))
    _one_meaning(given, parameters, vary)
    for name in PATHS:
        if name in given:
            given[name] = _from_here(name, given[name], notebook)
    if vary in PATHS and isinstance(given.get("values"), list):
        given["values"] = [_from_here(vary, value, notebook) for value in given["values"]]
    fields = {
        name: value
        for name, value in (defaults | given).items()
        if name in specs.Spec.model_fields and (name, value) != ("model", "")
    }
    made = specs.Spec(**fields)
    if found := values(notebook, given):
        specs.varied(made, *found)
    made.resolved()
    return given, made


def _one_meaning(given: dict, parameters: Mapping, vary: str) -> None:
    """Of two parameters that exclude each other the preset's goes; BadInput if both were named."""
    typed = [name for name in ("subject", "prompt", "object", "target") if given.get(name)]
    pairs = [("values", vary)] if isinstance(vary, str) else []
    pairs += [("fact", name) for name in typed if given.get("fact")]
    for first, second in pairs:
        if given.get(first) is None or given.get(second) is None:
            continue
        named = [name for name in (first, second) if name in parameters]
        if len(named) != 1:
            raise BadInput(
                f"parameters {first!r} and {second!r} exclude each other; give one of them"
            )
        given.pop(second if named == [first] else first)


def _from_here(name: str, value, notebook: Path):
    """A path that is given counts from here, not from the notebook's folder, where the kernel runs;
    one that is nowhere is refused.
    """
    if not value or not isinstance(value, str):
        return value
    if Path(value).exists() and (name != "model" or Path(value).is_dir()):
        return str(Path(value).resolve())
    if name != "model" and not (notebook.parent / value).exists():
        check_file(value, name)
    return value


def parsed(notebook: str | Path, pairs: Sequence[tuple[str, str]]) -> dict:
    """Parameters given as text: YAML, but what the notebook declares as `str` stays the text it is
    (`{} was born in`, 1984, no).
    """
    known, found = declared(Path(notebook)), {}
    for name, text in pairs:
        words = known.get(name, {}).get("inferred_type_name") == "str"
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            if not words:
                raise BadInput(
                    f"-p {name}: {text!r} is not YAML ({' '.join(str(error).split())[:100]}); quote it"
                ) from None
            value = text
        found[name] = text if words and not isinstance(value, str) else value
    return found


def values(notebook: Path, given: Mapping) -> tuple[str, list] | None:
    """The field that a notebook varies and its values; None if it varies none.

    A notebook declares the field that it varies as None: a value that is given is then the only
    one.
    """
    known = declared(notebook)
    if "vary" not in known:
        return None
    vary, listed = (given.get(name, _default(known[name])) for name in ("vary", "values"))
    named = given.get(vary) if isinstance(vary, str) else None
    return vary, listed if named is None else [named]


def _default(about: Mapping):
    return ast.literal_eval(about["default"])


def place(notebook: str | Path, out: str | Path = "") -> Path:
    """The folder of a notebook's runs: `out`, else the one that its own cells would write into."""
    return Path(out) if str(out) else runs.place(notebook=notebook)


def _preset(notebook: Path, name: str) -> dict:
    if not name:
        return {}
    folder = notebook.parent / PRESETS
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in folder.glob("*.yaml"))
        near = did_you_mean(name, known) or ":"
        raise BadInput(
            f"preset {name!r}{near} no file {path}; those of the notebook are {listed(known, 20)}"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(
            f"preset {name!r}: {path} cannot be read ({' '.join(str(error).split())[:120]})"
        ) from None
    if not isinstance(found, dict):
        raise BadInput(f"preset {name!r}: {path} holds no parameters")
    return found


def identify(notebook: Path, given: Mapping, spec: specs.Spec) -> str:
    """The run's id: the Spec, the code, the notebook's code cells and what is given beside the
    Spec.
    """
    cells = [
        cell.source
        for cell in nbformat.read(notebook, as_version=4).cells
        if cell.cell_type == "code"
    ]
    extra = {name: value for name, value in given.items() if name not in specs.Spec.model_fields}
    text = hashlib.sha256(
        json.dumps([cells, extra], sort_keys=True, default=str).encode()
    ).hexdigest()
    return specs.identify(spec, cells=text, name=notebook.stem)


def makes_spec(notebook: Path) -> bool:
    """Whether a notebook makes an experiment of its own, rather than reading what runs there are."""
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
    notebook, out = Path(notebook), place(notebook, out)
    given, spec = checked(notebook, parameters or {}, preset)
    run_id = identify(notebook, given, spec)
    again = again or not makes_spec(notebook)
    if runs.finished(out / run_id) and not again:
        return runs.read(out / run_id)
    with locked(f"run {out.resolve()} {run_id}"):
        if runs.finished(out / run_id) and not again:  # another process made it meanwhile
            return runs.read(out / run_id)
        with runs.new_folder(out, run_id) as partial:
            _execute(notebook, given, partial.resolve(), out / run_id, again)
            runs.seal(partial)
    for left in failure_of(out / run_id):
        left.unlink(missing_ok=True)
    return runs.read(out / run_id)


def failure_of(folder: Path) -> tuple[Path, Path]:
    """The notebook and the error that a failed run leaves in the place of its folder."""
    return folder.with_name(f"{folder.name}.failed.ipynb"), folder.with_name(
        f"{folder.name}.failed.txt"
    )


def _execute(notebook: Path, given: Mapping, folder: Path, final: Path, again: bool) -> None:
    from workbench import pages  # nbconvert takes a second to import

    changed = {
        "WORKBENCH_AGAIN": "1" if again else "",
        "WORKBENCH_RUN": str(folder),
        "WORKBENCH_BATCH": "1",
        "TQDM_DISABLE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    executed = folder / "notebook.ipynb"
    try:
        papermill.execute_notebook(
            _as_it_is(notebook.resolve()),
            _as_it_is(executed),
            parameters=given,
            cwd=str(notebook.parent.resolve()),
            kernel_name="python3",  # of this environment, whichever one the notebook was saved with
            execution_timeout=TIMEOUT,
            log_output=False,
            extra_arguments=[
                "--IPKernelApp.log_level=50"
                # else it warns of TCP on loopback at every start, and of its own interrupt at the end
            ],
            progress_bar="WORKBENCH_SWEEP" not in os.environ,
        )
    except papermill.PapermillExecutionError as error:
        kept = failure_of(final)[0]
        os.replace(executed, kept)
        what = (
            error.evalue
            if error.ename == "BadInput"
            else f"{error.ename}: {' '.join(error.evalue.split())[:300]}"
        )
        text = f"{notebook.name}, cell {error.exec_count}: {what}"
        _tell(final, text)
        failure = BadInput if error.ename == "BadInput" else RuntimeError
        raise failure(f"{text} (executed so far: {kept})") from None
    except Exception as error:  # the kernel was killed, or took too long
        if files.no_room(error):
            raise
        if executed.exists():
            os.replace(executed, failure_of(final)[0])
        text = f"{notebook.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _tell(final, text)
        raise RuntimeError(text) from None
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    if not (folder / "run.json").exists():
        raise RuntimeError(
            f"{notebook.name} ended without writing a run; its last cells must call recorder.write"
        )
    executed.with_suffix(".html").write_text(pages.notebook_page(executed), encoding="utf-8")


def _as_it_is(path: Path) -> str:
    """The path for papermill, which fills parameters into what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _tell(final: Path, text: str) -> None:
    """Leave the error of a failed run where its folder would be."""
    with files.written(failure_of(final)[1]) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
