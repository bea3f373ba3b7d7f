"""The panel: a Spec in widgets, the model's blocks at a glance, Run and Stop, and the finished run.

Whatever nobody touches is passed through unchanged, so a value outside a list is never clamped. Run
starts the notebook in a process of its own (`workbench run`): the kernel stays free, Stop works,
and a thread that reads how far the run is only sets traits.
"""

import html
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets

from workbench import editing, facts, runs
from workbench.checkpoints import WORLD_MODELS
from workbench.explorer import Explorer, outcomes
from workbench.facts import BadInput, EditRequest, Fact
from workbench.spec import Spec
from workbench.tuning import numbers

if TYPE_CHECKING:
    from workbench.job import Job

OFFERED = {  # field -> (label, values)
    "model": ("Model", WORLD_MODELS),
    "editor": ("Editor", tuple(editing.EDITORS)),
    "paraphrases": ("Paraphrases", (1, 2, 3, 5, 10)),
    "task": ("Task", tuple(numbers.presets()["world"])),
    "adapter": ("Adapter", ("", "lora", "dora")),
    "max_steps": ("Steps at most", (0, 20, 40, 80, 120, 240)),
}
OWN = {
    "subject": "Own subject",
    "prompt": "Own prompt",
    "object": "True object",
    "target": "New object",
}
PLANS = ("all", "after", "window", "outside", "edited", "edited-matrices", "not-edited")
BLOCKS = {
    "first": "First edited block",
    "last": "Last edited block",
    "from": "From block",
    "to": "To block",
}
FIELDS = {
    "first": "layers",
    "last": "layers",
    "from": "plan",
    "to": "plan",
}  # of widgets that are not named for their field
OTHER_END = {"first": "last", "last": "first", "from": "to", "to": "from"}
ROWS = (
    ("model", "editor", "first", "last"),
    ("fact",),
    tuple(OWN),
    ("paraphrases", "task", "adapter", "max_steps"),
    ("plan", "from", "to"),
)
COLOURS = {
    "": "#e8e8e8",
    "E": "#e69f00",
    "M": "#56b4e9",
    "EM": "#2fae86",
}  # told apart by their letters too
BOX = "display:inline-block;width:2.4em;margin:1px;text-align:center;color:#000"
DEEPEST = 100  # blocks offered where the model's depth is not known yet
MOST = 3000  # facts in the list; the id of another can be typed
EVERY = 0.3  # seconds between two looks at a run
STYLE = {"description_width": "9em"}
# For the keyboard: a ring that is seen (inside, for widgets cut off what stands out), and plain
# keys that reach the focused control. A notebook in
# command mode takes them for itself: an arrow leaves the panel, X cuts its cell. Widgets cannot
# carry the attribute that forbids it, so it is set
# as such a key is pressed; those with Ctrl, Alt or Meta stay the notebook's.
KEYBOARD = """<style>
.workbench-panel.jupyter-widgets :focus-visible { outline: 2px solid var(--jp-ui-font-color0, #000) !important; outline-offset: -2px !important }
</style><img src="data:," alt="" onerror='window.addEventListener("keydown", ({target, ctrlKey, altKey, metaKey}) =>
    target.matches?.(".workbench-panel *") && target.toggleAttribute("data-lm-suppress-shortcuts", !(ctrlKey || altKey || metaKey)), true)'>"""


class Panel(ipywidgets.VBox):
    """Widgets over a Spec: `.spec` is the last sound choice, `.message` says in place what is
    wrong, `.run` is the run that Run made.

    Args:
        spec: the starting point; its own values are always among those offered.
        notebook: what Run runs, as saved; "" = the notebook that JupyterLab has open here.
        out: folder of the runs; "" = where the notebook's own cells put them.
        vary: a field that the notebook takes from a list of values, unless the Spec was given it;
            its widgets are shown but cannot be moved.
    """

    def __init__(self, spec: Spec, notebook: str | Path = "", out: str | Path = "", vary: str = ""):
        self._vary = vary
        self.spec = self._start = spec
        self.notebook, self.out = Path(notebook or os.environ.get("JPY_SESSION_NAME", "")), out
        self.run: runs.Run | None = None
        self.job: Job | None = None
        self._batch = "WORKBENCH_BATCH" in os.environ
        self._moved: dict[str, object] = {}
        self._quiet = False
        self._problem = ""
        self._requests = _facts_of(spec)
        self.choices = self._choices(spec)
        for name, widget in self.choices.items():
            widget.observe(lambda _, name=name: self._changed(name), "value")
        self.headline, self.strip, self.message, self.tail = (ipywidgets.HTML() for _ in range(4))
        self.run_button = ipywidgets.Button(
            description="Run",
            icon="play",
            button_style="primary",
            tooltip="Run the notebook, as saved, like this",
        )
        self.stop_button = ipywidgets.Button(
            description="Stop", icon="stop", tooltip="End the run; nothing half-written is kept"
        )
        self.bar = ipywidgets.IntProgress(max=1, description="Progress")
        self.phase = ipywidgets.Label()
        self.result = ipywidgets.VBox()
        self.run_button.on_click(lambda _: self._run())
        self.stop_button.on_click(
            lambda _: self.job and threading.Thread(target=self.job.stop).start()
        )
        rows = [_row([self.choices[name] for name in names]) for names in ROWS]
        buttons = _row([self.run_button, self.stop_button, self.bar, self.phase])
        keyboard = ipywidgets.HTML(KEYBOARD, layout={"display": "none"})
        children = [
            self.headline,
            *rows,
            self.strip,
            self.message,
            buttons,
            self.tail,
            self.result,
            keyboard,
        ]
        super().__init__(children, _dom_classes=("workbench-panel",))
        self._refresh()

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page the choice and the blocks, as words, stand in the panel's place."""
        still = self.headline.value + self.strip.value + self.message.value
        return super()._repr_mimebundle_(**kwargs) | {"text/html": still}

    def _choices(self, spec: Spec) -> dict[str, ipywidgets.Widget]:
        found = {
            name: _dropdown(label, getattr(spec, name), _named(name, values))
            for name, (label, values) in OFFERED.items()
        }
        pool = [
            request for request in self._requests.values() if request.fact.split in ("", "study")
        ]
        self._ids = {
            f"{request.fact.id}: {request.fact.question} -> {request.target}": request.fact.id
            for request in pool
        }
        found["fact"] = ipywidgets.Combobox(
            value=next((label for label, fact_id in self._ids.items() if fact_id == spec.fact), spec.fact),
            options=() if self._batch else list(self._ids)[:MOST], placeholder="type words of it, or its id; empty is a sample",
            description="Fact", continuous_update=False, style=STYLE, layout={"width": "min(66em, 98%)"},
        )  # fmt: skip
        for name, label in OWN.items():
            hint = "with {} for the subject" if name == "prompt" else ""
            found[name] = ipywidgets.Text(
                getattr(spec, name),
                description=label,
                placeholder=hint,
                continuous_update=False,
                style=STYLE,
                layout={"width": "33em"},
            )
        depth = _depth(spec)
        kind, begin, end = _plan_parts(spec.plan)
        found["plan"] = _dropdown("What may move", kind, _named("plan", PLANS))
        first, *_, last = (
            spec.layers if len(spec.layers) > 1 else (*spec.layers, *spec.layers) or ("", "")
        )
        if spec.layers and spec.layers != tuple(range(first, last + 1)):
            first, last = spec.layers, ""  # no window: kept as one value of the first list
        ends = {
            "first": first,
            "last": last,
            "from": begin,
            "to": depth // 2 - 1 if end is None else end,
        }
        return found | {
            name: _dropdown(BLOCKS[name], value, _blocks(name, depth))
            for name, value in ends.items()
        }

    def _changed(self, name: str) -> None:
        """Take the widget's value into the Spec, and move those that hang on it."""
        if self._quiet:
            return
        self._quiet = True
        if name == "fact":
            self._moved |= dict.fromkeys(OWN, "")  # whichever fact was named last is meant
        for own in OWN if name == "fact" else ():
            self.choices[own].value = ""
        if name in OTHER_END and self.choices[OTHER_END[name]].disabled is False:
            self._pair(name, OTHER_END[name])
        field = FIELDS.get(name, name)
        self._moved[field] = self._value(field)
        if name == "model":
            depth = _depth(self._start.model_copy(update=self._moved))
            for each in BLOCKS:
                _offer(self.choices[each], self.choices[each].value, _blocks(each, depth))
        self._quiet = False
        self._refresh()

    def _pair(self, moved: str, other: str) -> None:
        """A window has two ends or none, and the one that was moved takes the other along before
        they cross.
        """
        end, there = self.choices[moved].value, self.choices[other].value
        both = isinstance(end, int) and isinstance(there, int)
        if not both or (end > there) == (moved in ("first", "from")):
            _offer(
                self.choices[other],
                "" if isinstance(end, tuple) else end,
                self.choices[other].options,
            )

    def _value(self, field: str):
        value = {name: self.choices[name].value for name in self.choices}
        if field == "layers":
            first, last = value["first"], value["last"]
            return tuple(range(first, last + 1)) if isinstance(first, int) else first or ()
        if field == "plan":
            ends = {
                "after": f":{value['from']}",
                "window": f":{value['from']}-{value['to']}",
                "outside": f":{value['from']}-{value['to']}",
            }
            return value["plan"] + ends.get(value["plan"], "")
        return self._fact_id(value["fact"].strip()) if field == "fact" else value[field]

    def _fact_id(self, text: str) -> str:
        """Of a label, or of words that stand in one label alone; else the text, which may be an id."""
        found = (
            [text]
            if text in self._ids
            else [label for label in self._ids if text.lower() in label.lower()]
        )
        return self._ids[found[0]] if len(found) == 1 and text not in self._requests else text

    def _refresh(self) -> None:
        """Show what is chosen; an unsound choice is explained and leaves `.spec` as it was."""
        ends = {"from": ("after", "window", "outside"), "to": ("window", "outside")}
        for name, widget in self.choices.items():
            widget.disabled = FIELDS.get(name, name) == self._vary or (
                name in ends and self.choices["plan"].value not in ends[name]
            )
        try:
            spec = (
                Spec(**(self._start.model_dump(exclude_unset=True) | self._moved))
                if self._moved
                else self._start
            )
            self.headline.value, self.strip.value = self._check(spec)
            self.spec, self._problem = spec, ""
        except BadInput as error:
            self._problem = str(error)
        self._say(self._problem)
        self._enable()

    def _check(self, spec: Spec) -> tuple[str, str]:
        """The headline and the strip of a Spec that the model, editor, plan and fact agree with;
        BadInput if they do not.
        """
        editor = editing.editor_named(spec.editor)
        most = next(
            (
                rule.max_length
                for rule in editor.HParams.model_fields["layers"].metadata
                if hasattr(rule, "max_length")
            ),
            None,
        )
        if most and len(spec.layers) > most:
            raise BadInput(
                f"{spec.editor} edits {most} block, not {len(spec.layers)}; let the window end where it begins, or choose memit"
            )
        usual, request = spec.resolved(), self._request(spec)
        text = f"a sample of {spec.n_edited} facts"
        if request:
            request = facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source)
            true = request.fact.object or "(what the model says)"
            text = f"{request.fact.question} ... {true} \N{RIGHTWARDS ARROW} {request.target}"
        elif spec.fact:
            text = f"fact {spec.fact}"
        tuned = f"{spec.model}, then tuned on {spec.task} for at most {usual.max_steps} steps"
        tuned += f"; {spec.editor} {editor.LEARNS}" if hasattr(editor, "LEARNS") else ""
        if self._vary in spec.model_fields_set:
            tuned += f"; {self._vary} is {getattr(spec, self._vary)!r} alone"
        elif self._vary:
            tuned += f"; {self._vary} takes each of the notebook's `values` in turn"
        return f"<p><b>{html.escape(text)}</b><br>in {html.escape(tuned)}</p>", _strip(spec)

    def _request(self, spec: Spec) -> EditRequest | None:
        """The one fact that is named, as far as it can be known here."""
        if any(getattr(spec, name) for name in OWN):
            for name in OWN:
                if not getattr(spec, name).strip():
                    raise BadInput(
                        f"{OWN[name].lower()} is empty; a fact of your own needs subject, prompt (with one {{}}), true and new object"
                    )
            return EditRequest(
                fact=Fact(id="typed", subject=spec.subject, prompt=spec.prompt, object=spec.object),
                target=spec.target,
            )
        if spec.fact and self._requests and spec.fact not in self._requests:
            words = spec.fact.lower()
            matches = [self._ids[label] for label in self._ids if words in label.lower()]
            raise facts.no_such_fact(spec.fact, [*self._requests], matches, spec.facts)
        return self._requests.get(spec.fact)

    def _say(self, problem: str) -> None:
        self.message.value = f'<b role="alert">{html.escape(problem)}</b>' if problem else ""

    def _why_not(self) -> str:
        if self._batch:
            return "in batch the cells below do the work"
        return (
            ""
            if self.notebook.is_file()
            else "Run is off: this notebook's path is not known; write Panel(spec, notebook=...)"
        )

    def _enable(self) -> None:
        running = self.job is not None
        self.run_button.disabled = bool(running or self._problem or self._why_not())
        self.stop_button.disabled = not running
        if not running and self._why_not():
            self.phase.value = self._why_not()

    def _run(self) -> None:
        # papermill takes a second to import, and a notebook in batch needs none
        from workbench import batch
        from workbench.job import Job, parameters

        try:
            given = parameters(
                self.notebook,
                self.spec,
                [name for name in self._moved if self._moved[name] != getattr(self._start, name)],
            )
            self.job = Job(self.notebook, given, batch.place(self.notebook, self.out))
        except (BadInput, OSError) as error:
            self._say(str(error))
            return
        self._say("")
        self.bar.bar_style, self.bar.value, self.phase.value = "", 0, "starting"
        self._enable()
        threading.Thread(target=self._follow, args=(self.job,), daemon=True).start()

    def _follow(self, job: "Job") -> None:
        """In a thread: show how far the job is, then what it made. It sets traits only."""
        try:
            while job.running:
                at = job.progress()
                self.bar.max, self.bar.value = max(at["total"], 1), at["done"]
                step = f", step {at['done']} of {at['total']}" if at["total"] else ""
                self.phase.value = f"{at['phase']}{step}, {job.seconds:.0f} s"
                self.tail.value = f"<code>{html.escape(job.last('stderr'))}</code>"
                time.sleep(EVERY)
            status = job.status()
            self.phase.value, self.bar.bar_style = (
                self._ended(job, status),
                "warning" if status else "success",
            )
        except Exception as error:  # nobody hears of an exception in a thread
            self.phase.value, self.bar.bar_style = "failed", "danger"
            self._say(
                str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
            )
        finally:
            job.close()
            self.job, self.tail.value = None, ""
            self._enable()

    def _ended(self, job: "Job", status: int) -> str:
        """What became of the job, in words; its run and the explorer are shown if it ended well."""
        if status and job.stopped:
            return f"stopped after {job.seconds:.0f} s; nothing half-written was kept"
        if status:
            said = job.last("stderr")
            raise BadInput(
                said.removeprefix("workbench: ")
                if said.startswith("workbench: ")
                else f"the run ended with status {status}: {said}"
            )
        run = runs.read(job.last("stdout"))
        shown = run.members or [run]
        self.run, self.result.children = (
            run,
            (ipywidgets.HTML(_summary(run, shown)), Explorer(*shown[:2])),
        )
        self.bar.value = self.bar.max
        return f"finished in {job.seconds:.0f} s"


def _depth(spec: Spec) -> int:
    outline = spec.outline()
    return outline.n_blocks if outline else DEEPEST


def _strip(spec: Spec) -> str:
    """The model's blocks as boxes, E for edited, M for one that may move in tuning, and the same in
    words.
    """
    found = spec.blocks()
    if found is None:
        try:
            edited = list(
                spec.layers or editing.preset(spec.editor, spec.model, variant=spec.variant).layers
            )
        except BadInput:
            edited = "proposed from the depth when the model is loaded"
        return f"<p>Edited blocks: {html.escape(str(edited))}; plan {html.escape(spec.plan)}; {html.escape(spec.model)} is read when it is loaded.</p>"
    edited, moving, n_blocks = found
    marks = [
        ("E" if block in edited else "") + ("M" if block in moving else "")
        for block in range(n_blocks)
    ]
    boxes = "".join(
        f'<span style="{BOX};background:{COLOURS[mark]}">{block}<br><b>{mark or "-"}</b></span>'
        for block, mark in enumerate(marks)
    )
    rest = " and embeddings, final norm and head" if "embeddings" in moving else ""
    rest = ", the edited matrices alone" if spec.plan == "edited-matrices" else rest
    moves, still = (
        [block for block, mark in enumerate(marks) if ("M" in mark) == which]
        for which in (True, False)
    )
    words = f"E edited: {spans(edited)}. M may move in tuning: {spans(moves)}{rest}. Still: {spans(still)}."
    return f'<div role="img" aria-label="{words}" style="line-height:1.2">{boxes}</div><p>Blocks: {words}</p>'


def spans(blocks: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return (
        ", ".join(
            str(start) if start == end else f"{start}-{end}"
            for start, end in zip(starts, ends, strict=True)
        )
        or "none"
    )


def _summary(run: runs.Run, shown: Sequence[runs.Run]) -> str:
    lines = []
    for one in shown:
        count = outcomes(one).groupby(["group", "outcome"], observed=True).size()
        what = "; ".join(
            f"{group}: {', '.join(f'{n} {outcome}' for outcome, n in count[group].items())}"
            for group in count.index.levels[0]
        )
        ended = ", ".join(sorted(set(map(str, one.about["ended"]))))
        words = html.escape(f"{what}; the tuning ended by {ended}")
        lines.append(f"<b>{html.escape(one.folder.name)}</b>: {words}")
    return f"<p>{'<br>'.join(lines)}<br>All figures: {html.escape(str(run.folder / 'notebook.html'))}</p>"


def _facts_of(spec: Spec) -> dict[str, EditRequest]:
    """Facts by id, of the world or a file; none of the Hub's, which is asked when the facts are
    needed, nor of a file that is unreadable.
    """
    if spec.facts != "world" and not Path(spec.facts).is_file():
        return {}
    with suppress(BadInput):  # the run says what is wrong with the file
        return {request.fact.id: request for request in facts.read(spec.facts, skip_bad=True)}
    return {}


def _plan_parts(plan: str) -> tuple[str, int, int | None]:
    found = re.fullmatch(r"(after|window|outside):(\d+)(?:-(\d+))?", plan)
    return (
        (found[1], int(found[2]), int(found[3]) if found[3] else None) if found else (plan, 0, None)
    )


def _named(name: str, values: Iterable) -> list[tuple[str, object]]:
    empty = {"max_steps": "the task's", "adapter": "none"}
    return [(str(value) if value else empty[name], value) for value in values]


def _blocks(name: str, n_blocks: int) -> list[tuple[str, int | str]]:
    return ([("the preset's", "")] if FIELDS[name] == "layers" else []) + [
        (str(block), block) for block in range(n_blocks)
    ]


def _dropdown(label: str, value, options: Sequence[tuple[str, object]]) -> ipywidgets.Dropdown:
    dropdown = ipywidgets.Dropdown(description=label, style=STYLE, layout={"width": "20em"})
    _offer(dropdown, value, options)
    return dropdown


def _offer(dropdown: ipywidgets.Dropdown, value, options: Sequence[tuple[str, object]]) -> None:
    """Offer the options, and the value even if it is none of them."""
    known = any(offered == value for _, offered in options)
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    dropdown.options = [*options] if known else [(text, value), *options]
    dropdown.value = value


def _row(widgets: Sequence[ipywidgets.Widget]) -> ipywidgets.HBox:
    return ipywidgets.HBox(widgets, layout={"flex_flow": "row wrap"})
