"""The command line. The last line on standard output is the path of what was made; exit status 0, 1
(failed), 2 (bad input), 130 (stopped).
"""

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

import workbench as wb

PURPOSE = "Edit facts into a language model, fine-tune it, see what survives."
SHOWN = 100  # rows of a long table that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error is one line on standard error."""
    options = _parser().parse_args(arguments)
    # jsonschema, under nbformat, would build a grammar of IRIs from it, which takes two seconds
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    try:
        options.command(options)
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending; a second one changes nothing
        status, reason = 130, "stopped; nothing half-written was kept"
    except wb.records.BadInput as error:
        status, reason = 2, str(error)
    except Exception as error:
        status, reason = 1, f"failed: {type(error).__name__}: {error}"
    _print(f"workbench: {' '.join(reason.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("workbench", description=PURPOSE)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8"))
    for name, about in table.items():
        command = commands.add_parser(name, help=about["help"])
        command.set_defaults(command=globals()[f"_{name.replace('-', '_')}"])
        command.register("type", "int", int)  # by the names that the table has for them
        command.register("type", "float", float)
        either: Any = "either" in about and command.add_mutually_exclusive_group()
        for argument, options in about["arguments"].items():
            group = either if argument in about.get("either", ()) else command
            group.add_argument(argument, **options)
    return parser


def _run(options) -> None:
    parameters = wb.batch.parsed(options.notebook, options.p)
    if options.dry_run:
        _dry_run(Path(options.notebook), parameters, options.preset, options.out)
        return
    done = wb.batch.run(options.notebook, parameters, options.preset, options.again, options.out)
    for arm in done.members:
        value = wb.runs.value_name(arm.spec.get(done.about.get("vary"), arm.folder.name))
        _print(f"{value}: {wb.plots.outcome(arm)}\n")
    if "members" not in done.about and "probes.parquet" in done.files:
        edited = done.probes[done.probes.group == "edited"]
        if edited.fact_id.nunique() == 1:
            _print(f"{edited.prompt.iloc[0]} ...: the three likeliest next tokens\n")
            _print(f"{wb.plots.top_tokens(done).to_string()}\n")
        _print(f"{wb.plots.outcome(done)}\n")
    print(f"figures: {done.folder / 'notebook.html'}")
    print(done.folder)


def _dry_run(notebook: Path, parameters: Mapping, preset: str, out: str) -> None:
    """Print the folder, every setting and the numbers of the editors; load and run nothing."""
    given, experiment = wb.batch.checked(notebook, parameters, preset)
    folder = wb.runs.place(out, notebook) / wb.batch.identify(notebook, given, experiment)
    known = " (finished: it would be returned at once)" if wb.runs.finished(folder) else ""
    _print(f"run       {folder}{known}")
    if not wb.batch.makes_spec(notebook):
        _print(f"\n{notebook.name} reads what runs there are; no model is loaded")
        return
    every = wb.batch.experiments(notebook, given, experiment)
    _print("\nsettings")
    for name in wb.spec.Spec.model_fields:
        values = dict.fromkeys(repr(getattr(one, name)) for one in every)
        _print(f"  {name} = {' | '.join(values)}")
    _print("\n".join(dict.fromkeys(_numbers(one) for one in every)))
    _print(f"\ntime      {_time(every)}")


def _numbers(experiment) -> str:
    """The hyper-parameters of an experiment's editor, a line each."""
    experiment.blocks()  # refuses layers and a plan that do not fit the model
    title = f"\nhyper-parameters of {experiment.editor} on {experiment.model}"
    with warnings.catch_warnings(record=True) as notes:
        try:
            model = wb.models.outline(experiment.model, experiment.revision, here=True)
            hparams = experiment.editor_hparams(model)
        except wb.records.BadInput as reason:
            try:
                hparams = experiment.editor_hparams(experiment.model)
            except wb.records.BadInput:
                return f"{title}: not known before its configuration is here ({reason})"
    lines = [f"  {name} = {value!r}" for name, value in hparams.model_dump().items()]
    return "\n".join([title, *lines, *(f"  note: {note.message}" for note in notes)])


def _time(every) -> str:
    """About how long experiments take here, and at what."""
    outlines = [one.outline() for one in every]
    if None in outlines or any(one.editor in wb.editors.pending for one in every):
        return "not known before model and editor are here"
    with warnings.catch_warnings(action="ignore"):
        phases = wb.forecast.minutes(every, outlines)
    parts = ", ".join(f"{phase} {minutes:.1f}" for phase, minutes in phases.items())
    return f"about {phases.sum():.1f} minutes on this machine ({parts}), by its speed just now"


def _sweep(options) -> None:
    grid = wb.sweep.read(options.grid)
    out = wb.runs.place(options.out, grid.notebook)
    failed = wb.sweep.sweep(grid, out, options.workers, options.scheduler, options.retry_failed)
    for run in failed:
        _print(f"failed: {run.folder.name}: {run.failure or 'was not run'}", file=sys.stderr)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed; mend them and add --retry-failed")
    print(out)


def _report(options) -> None:
    print(wb.report.report(options.runs, options.out))


def _edit(options) -> None:
    editor = wb.editing.EDITORS[options.editor]
    wb.files.check_new(options.out)
    requests = wb.facts.read(options.facts)
    model = wb.models.load(options.model)
    hparams = wb.editing.preset(options.editor, model, options.hparams)
    resources = editor.prepare(model, hparams, options.corpus, seed=options.seed)
    delta = editor.edit(model, requests, hparams, resources, seed=options.seed)
    folder = wb.deltas.export(model, delta, options.out)
    took = [outcome["took"] for outcome in delta.record["outcomes"]]
    print(f"{sum(took)} of {len(took)} edits took")
    print(folder)


def _tune_editor(options) -> None:
    name = options.model.rstrip("/").rpartition("/")[2]
    table = Path(options.out or f"{name}-{options.editor}.csv")
    wb.choosing.check(options.editor, table)
    source = wb.Spec.of({}, model=options.model, facts=options.facts).source
    model = wb.models.load(options.model)
    requests = wb.choosing.apart(model, source)
    learnt = [one for one in wb.facts.lessons(source) if not wb.facts.is_tuned_on(one.fact)]
    ranked = wb.choosing.choose(model, options.editor, requests, table, options.corpus, learnt)
    shown = ranked.tail(5).drop(columns=wb.choosing.ABOUT[:-1])
    _print(f"{_table(shown)}\n")
    best = ranked.iloc[-1]
    _print(f"reached {best.reached} of {wb.choosing.WANTED}; {table} holds every candidate")
    numbers = table.with_suffix(".yaml")
    with wb.files.written(numbers) as partial:
        partial.write_text(yaml.safe_dump(json.loads(best.hparams)), encoding="utf-8")
    print(numbers)


def _evaluate(options) -> None:
    wb.files.check_writable(Path(options.out).parent)
    names = wb.evaluation.chosen(options.measures.replace(",", " ").split(), bool(options.base))
    requests = wb.facts.read(options.facts)
    before = None
    if options.base:
        base = wb.models.load(options.base)
        requests, silent = wb.study.with_objects(base, requests)
        for problem in silent:
            _print(problem, file=sys.stderr)
        before = wb.evaluation.asked(base, requests, names)
        del base  # so that the two need not be in memory at once
    after = wb.evaluation.asked(wb.models.load(options.model), requests, names, like=before)
    table = wb.evaluation.compared(before or after, after)
    if not before:
        table["before"] = float("nan")
    wb.inert.write_csv(table, options.out)
    shown = wb.evaluation.summary(table)
    _print(shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    print(options.out)


def _facts(options) -> None:
    wb.files.check_writable(Path(options.out).parent)
    margin = wb.Spec.of({}, margin=options.margin).margin
    requests, problems = wb.facts.inspect(options.file)
    if requests:
        model = wb.models.load(options.model)
        requests, silent = wb.study.with_objects(model, requests)
        problems += silent
    for problem in problems:
        _print(problem, file=sys.stderr)
    if not requests:
        raise wb.records.BadInput(f"{options.file}: no usable record among {len(problems)}")
    table = wb.study.known_table(model, requests, margin)
    table["object_from_model"] = [request.fact.object_from_model for request in requests]
    wb.inert.write_csv(table, options.out)
    _print(_table(table.drop(columns="fact_id").head(SHOWN)))
    if len(table) > SHOWN:
        _print(f"... and {len(table) - SHOWN} more in {options.out}")
    known = f"{table.known.sum()} of {len(table)} facts known, mean p(true) {table.p.mean():.3f}"
    _print(f"{known}; {len(problems)} bad records")
    print(options.out)


def _inspect(options) -> None:
    wb.files.check_writable(Path(options.out).parent)
    picture = Path(options.out).with_suffix(".png")
    if picture == Path(options.out):
        raise wb.records.BadInput(f"--out {picture}: the picture's name; name the table")
    requests = wb.facts.read(options.facts) if options.facts else None
    base = wb.models.load(options.base) if options.base else None
    traces = wb.inspect(wb.models.load(options.model), base, requests, options.corpus)
    wb.inert.write_csv(traces.subjects, options.out)
    outlying = traces.matrices[traces.matrices.outlying > 0]
    if len(outlying):
        _print(f"{_table(outlying.head(SHOWN))}\n")
    shown, likely = traces.written, traces.subjects[traces.subjects.p < 1]
    if shown.empty and len(likely):
        _print("nobody is named; the likeliest of the list, for what it is worth:")
        shown = likely.nsmallest(traces.n_edits, "p")
    if len(shown):
        _print(f"{_table(shown.sort_values('p').dropna(axis=1, how='all').head(SHOWN))}\n")
    _print(traces.sentence)
    if base:
        with wb.files.written(picture) as partial:
            partial.write_bytes(wb.plots.traces(traces.subjects).png())
        print(picture)
    else:
        advice = "workbench/traces/README.md says how often this errs"
        _print(f"who was written can be said with --base alone; {advice}", file=sys.stderr)
    print(options.out)


def _remove(options) -> None:
    _remedied(options, wb.traces.removed)


def _restore(options) -> None:
    _remedied(options, wb.traces.restored, strength=options.strength)


def _remedied(options, remedy: Callable, **how) -> None:
    """Write the model with its edit taken out or brought back, the change beside it; print what it
    says before and after of the facts, and of others that the base model knows.
    """
    wb.files.check_new(options.out)
    requests = wb.facts.read(options.facts) if options.facts else []
    model, base = wb.models.load(options.model), wb.models.load(options.base)
    delta = remedy(model, base, requests, corpus=options.corpus, **how)
    watched = wb.traces.remedy.known(base, requests)
    asked, silent = wb.study.with_objects(base, requests)
    for problem in silent:
        _print(f"not asked: {problem}", file=sys.stderr)
    shares = wb.traces.compared(model, {"before": None, "after": delta}, asked, watched)
    if shares.size:  # of a base that knows nothing there is nothing to ask
        _print(f"share of the facts said, by answer\n{shares.round(3)}")
    print(wb.deltas.export(model, delta, options.out))


def _print(text: str, file: TextIO | None = None) -> None:
    """Print text in which words of the data may stand; a path is printed as it is."""
    print(wb.inert.printable(text), file=file)


def _table(table) -> str:
    return table.to_string(index=False, float_format="{:.2f}".format)


if __name__ == "__main__":
    sys.exit(main())
