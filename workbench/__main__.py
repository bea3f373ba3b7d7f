"""The command line. The last line on standard output is the path of what was made; exit status 0, 1
(failed), 2 (bad input), 130 (stopped).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from workbench import inert
from workbench.facts import BadInput

SHOWN = 100  # rows of a long table that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error is one line on standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except BadInput as error:
        _print(f"workbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _print("workbench: stopped; nothing half-written was kept", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, ValueError) as error:
        _print(f"workbench: failed: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        _print(
            f"workbench: failed: {type(error).__name__}: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workbench",
        description="Edit facts into a language model, fine-tune it, see what survives.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a notebook in batch; prints the run folder")
    run.add_argument("notebook")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter, its value as YAML",
    )
    run.add_argument(
        "--preset", default="", help="a name in notebooks/presets, or a YAML file of parameters"
    )
    run.add_argument("--again", action="store_true", help="run even if a finished run is there")
    run.add_argument(
        "--out", default="", help="folder of the runs; default runs/ of the notebook's project"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print every setting, the memory and what would be fetched; run nothing",
    )
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep", help="run every combination of a grid once; finished runs are kept"
    )
    sweep.add_argument("grid", help="a YAML file: notebook, parameters, grid, cells, exclude")
    sweep.add_argument(
        "--out", default="", help="folder of the runs; default runs/ of the notebook's project"
    )
    where = sweep.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes of a local Dask cluster; default one a GPU, or one",
    )
    where.add_argument(
        "--scheduler", default="", help="address of a running Dask scheduler, tcp://..."
    )
    sweep.add_argument("--retry-failed", action="store_true", help="try the runs that failed again")
    sweep.set_defaults(command=_sweep)

    report = commands.add_parser(
        "report",
        help="tables with intervals, paired differences, figures and one page of many runs",
    )
    report.add_argument("runs", help="the folder of the runs")
    report.add_argument("--out", default="report")
    report.set_defaults(command=_report)

    edit = commands.add_parser(
        "edit", help="write an edited model as an ordinary Hugging Face folder"
    )
    for name in ("model", "editor", "facts", "out"):
        edit.add_argument(f"--{name}", required=True)
    edit.add_argument(
        "--hparams", help="a YAML or JSON file of hyper-parameters instead of the preset"
    )
    edit.add_argument(
        "--corpus",
        default="world",
        help="text of the second moments: world, wikipedia, a file or a Hub dataset id",
    )
    edit.add_argument("--seed", type=int, default=0)
    edit.set_defaults(command=_edit)

    facts = commands.add_parser(
        "facts", help="which facts a model knows, which records are bad and why"
    )
    facts.add_argument("file", help="'world', a file or a Hub dataset id")
    facts.add_argument("--model", required=True)
    facts.add_argument("--out", default="known-facts.csv", help="the table to write")
    facts.add_argument(
        "--margin",
        type=float,
        default=0.1,
        help="by which a known fact's true token must lead the second",
    )
    facts.set_defaults(command=_facts)

    return parser


def _run(options) -> None:
    from workbench import batch

    parameters = batch.parsed(options.notebook, options.p)
    if options.dry_run:
        from workbench import forecast

        _print(forecast.forecast(options.notebook, parameters, options.preset, options.out))
        return
    done = batch.run(options.notebook, parameters, options.preset, options.again, options.out)
    from workbench import plots

    if "members" in done.about:
        field = done.about.get("vary", "editor")
        for member in done.members:
            _print(
                f"{field} = {member.spec[field]}: {member.folder}\n{_table(plots.retention_table(member))}\n"
            )
    elif done.probes[done.probes.group == "edited"].fact_id.nunique() == 1:
        fact = done.probes[done.probes.group == "edited"].iloc[0]
        _print(f"{fact.prompt} ... ({fact.target}): the three likeliest next tokens\n")
        _print(plots.top_tokens(done).to_string(), end="\n\n")
    if "members" not in done.about:
        _print(_table(plots.retention_table(done)), end="\n\n")
    print(done.folder / "notebook.html")
    print(done.folder)


def _sweep(options) -> None:
    from workbench import batch, sweep

    grid = sweep.read(options.grid)
    out = batch.place(grid.notebook, options.out)
    failed = sweep.sweep(grid, out, options.workers, options.scheduler, options.retry_failed)
    for each in failed:
        _print(f"failed: {each.folder.name}: {each.failure or 'was not run'}", file=sys.stderr)
    if failed:
        raise RuntimeError(
            f"{len(failed)} runs failed; mend what the lines above say and start it again with --retry-failed"
        )
    print(out)


def _report(options) -> None:
    from workbench import report

    print(report.report(options.runs, options.out))


def _print(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text in which words of the data may stand; a path is printed as it is."""
    print(inert.printable(text), end=end, file=file)


def _table(table) -> str:
    return table.to_string(index=False, float_format="{:.2f}".format)


def _edit(options) -> None:
    from workbench import deltas, editing, facts, files, models

    editor = editing.editor_named(options.editor)
    files.check_new(options.out)
    requests = facts.read(options.facts)
    model = models.load(options.model)
    hparams = editing.preset(options.editor, model, options.hparams)
    resources = editor.prepare(model, hparams, options.corpus, seed=options.seed)
    delta = editor.edit(model, requests, hparams, resources, seed=options.seed)
    folder = deltas.export(model, delta, options.out)
    took = [outcome["took"] for outcome in delta.record["outcomes"]]
    print(f"{sum(took)} of {len(took)} edits took")
    print(folder)


def _facts(options) -> None:
    from workbench import facts, models, study

    if not Path(options.out).absolute().parent.is_dir():
        raise BadInput(
            f"{options.out}: there is no folder {Path(options.out).parent}; make it first"
        )
    if not 0 <= options.margin < 1:
        raise BadInput(f"margin {options.margin}: must be at least 0 and below 1, e.g. 0.1")
    requests, problems = facts.inspect(options.file)
    model = None
    if requests:
        model = models.load(options.model)
        requests, silent = study.with_objects(model, requests)
        problems += silent
    for problem in problems:
        _print(problem, file=sys.stderr)
    if not requests:
        raise BadInput(f"{options.file}: no usable record among {len(problems)}")
    table = study.known_table(model, requests, options.margin)
    table["object_from_model"] = [request.fact.object_from_model for request in requests]
    inert.write_csv(table, options.out)
    _print(
        table.drop(columns="fact_id")
        .head(SHOWN)
        .to_string(index=False, float_format="{:.2f}".format)
    )
    if len(table) > SHOWN:
        _print(f"... and {len(table) - SHOWN} more in {options.out}")
    _print(
        f"{table.known.sum()} of {len(table)} facts known, mean p(true) {table.p.mean():.3f}; {len(problems)} bad records"
    )
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
