"""The panel: a Spec in widgets, the model's blocks at a glance, Run and Stop, and the finished run.

Whatever nobody touches is passed through unchanged, so a value outside a list is never clamped. Run
starts the notebook in a process of its own (`workbench run`): the kernel stays free, Stop works,
and a thread that reads how far the run is only sets traits.
"""

import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ipywidgets import HTML, Button, Combobox, Dropdown, HBox, IntProgress, Label, VBox

from workbench import editing, facts, runs
from workbench.checkpoints import PACKAGED, WORLD_MODELS
from workbench.explorer import Explorer, outcomes
from workbench.facts import EditRequest
from workbench.records import BadInput, cause
from workbench.spec import Spec
from workbench.tuning import numbers, plans

if TYPE_CHECKING:
    from workbench.job import Job

OFFERED = {  # field -> (label, values)
    "model": ("Model", (*WORLD_MODELS, *PACKAGED)),
    "editor": ("Editor", editing.EDITORS),
    "paraphrases": ("Paraphrases", (1, 2, 3, 5, 10)),
    "task": ("Task", numbers.TASKS),
    "adapter": ("Adapter", ("", "lora", "dora")),
    "max_steps": ("Steps at most", (0, 20, 40, 80, 120, 240)),
}
EMPTY = {"max_steps": "the task's", "adapter": "none"}  # what an empty value is called
TYPED = ("subject", "prompt", "object", "target")  # of a fact of one's own
TEXTS = {  # field -> (label, what an empty one shows, width)
    "fact": ("Fact", "type words of it and choose, or its id; empty is a sample", "min(66em, 98%)"),
    "subject": ("Own subject", "", "33em"),
    "prompt": ("Own prompt", "with {} for the subject", "33em"),
    "object": ("True object", "", "33em"),
    "target": ("New object", "", "33em"),
    "layers": ("Edited blocks", "such as 2-4 or 3, 5; empty is the preset's", "33em"),
    "plan": ("What may move", plans.FORMS, "33em"),
}
ROWS = (
    ("model", "editor", "layers"),
    ("fact",),
    TYPED,
    ("paraphrases", "task", "adapter", "max_steps"),
    ("plan",),
)
# Of blocks: neither, edited, may move, both; told apart by their letters too
COLOURS = {"-": "#e8e8e8", "E": "#e69f00", "M": "#56b4e9", "EM": "#2fae86"}
BOX = "display:inline-block;width:2.4em;margin:1px;text-align:center;color:#000"
STYLE = {"description_width": "9em"}
MOST_FACTS = 3000  # in the list; the id of another can be typed
INTERVAL = 0.3  # seconds between two looks at a run

# For the keyboard: a ring that is seen (inside, for widgets cut off what stands out), and plain
# keys that reach the focused control. A notebook in command mode takes them for itself: an arrow
# leaves the panel, X cuts its cell. Widgets cannot carry the attribute that forbids it, so it is
# set as such a key is pressed; those with Ctrl, Alt or Meta stay the notebook's.
KEYBOARD = Path(__file__).with_name("panel.html")


class Panel(VBox):
    """Widgets over a Spec: `.spec` is the last sound choice, `.message` says in place what is
    wrong, `.run` is the run that Run made.

    Args:
        spec: the starting point; its values are always among those offered.
        notebook: what Run runs, as saved; "" = the notebook that JupyterLab has open here.
        out: folder of the runs; "" = where the notebook's cells put them.
        vary: a field that the notebook takes from a list of values, unless the Spec was given it;
            its widgets are shown but cannot be moved.
    """

    def __init__(self, spec: Spec, notebook: str | Path = "", out: str | Path = "", vary: str = ""):
        self.spec = self._start = spec
        self.notebook = Path(notebook or os.environ.get("JPY_SESSION_NAME", ""))
        self.out = out
        self.run: runs.Run | None = None
        self.job: Job | None = None
        self._vary = vary
        self._batch = "WORKBENCH_BATCH" in os.environ
        self._problem = ""
        self._requests = _facts_of(spec)
        self._ids = _labels(self._requests)
        self.choices = self._widgets(spec)
        self._initial = self._fields()
        for name, widget in self.choices.items():
            widget.observe(lambda _, name=name: self._changed(name), "value")
        super().__init__(self._arranged(), _dom_classes=("workbench-panel",))
        self._refresh()

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page the choice and the blocks, as words, stand in the panel's place."""
        still = self.headline.value + self.strip.value + self.message.value
        return super()._repr_mimebundle_(**kwargs) | {"text/html": still}

    # --- Widgets

    def _widgets(self, spec: Spec) -> dict[str, Dropdown | Combobox]:
        widgets: dict[str, Dropdown | Combobox] = {}
        for name, (label, offered) in OFFERED.items():
            widgets[name] = _dropdown(label, getattr(spec, name), offered, EMPTY.get(name))
        labels = {fact: label for label, fact in self._ids.items()}
        shown = dict(spec) | {"fact": labels.get(spec.fact, spec.fact)}
        shown["layers"] = spans(sorted(spec.layers)) if spec.layers else ""
        for name, (label, empty, width) in TEXTS.items():
            looks = {"style": STYLE, "layout": {"width": width}, "continuous_update": False}
            about = {"description": label, "placeholder": empty}
            widgets[name] = Combobox(value=shown[name], **about, **looks)
        widgets["fact"].options = [] if self._batch else list(self._ids)[:MOST_FACTS]
        widgets["plan"].options = list(plans.KINDS)
        if self._vary in widgets:
            widgets[self._vary].disabled = True
        return widgets

    def _arranged(self) -> list:
        self.headline, self.strip, self.message, self.tail = HTML(), HTML(), HTML(), HTML()
        tooltip = "Run the notebook, as saved, like this"
        self.run_button = Button(description="Run", icon="play", tooltip=tooltip)
        self.run_button.button_style = "primary"
        tooltip = "End the run; nothing half-written is kept"
        self.stop_button = Button(description="Stop", icon="stop", tooltip=tooltip)
        self.run_button.on_click(lambda _: self._run())
        self.stop_button.on_click(lambda _: self._stop())
        self.bar = IntProgress(max=1, description="Progress")
        self.phase = Label()
        self.result = VBox()
        rows = [_row([self.choices[name] for name in names]) for names in ROWS]
        buttons = _row([self.run_button, self.stop_button, self.bar, self.phase])
        keyboard = HTML(KEYBOARD.read_text(encoding="utf-8"), layout={"display": "none"})
        below = [self.strip, self.message, buttons, self.tail, self.result, keyboard]
        return [self.headline, *rows, *below]

    # --- From the widgets to the Spec

    def _fields(self) -> dict:
        """The fields of a Spec as the widgets stand."""
        fields = {name: widget.value for name, widget in self.choices.items()}
        fact = fields["fact"].strip()
        fields["fact"] = self._ids.get(fact, fact)
        fields["layers"] = _blocks(fields["layers"])
        return fields

    def _moved(self) -> dict:
        """The fields that a person has changed."""
        fields = self._fields().items()
        return {name: value for name, value in fields if value != self._initial[name]}

    def _changed(self, name: str) -> None:
        """Take the widgets into the Spec; of a fact and one typed, whichever came last is meant."""
        if name == "fact":
            for typed in TYPED:
                self.choices[typed].value = ""
        self._refresh()

    def _refresh(self) -> None:
        """Show what is chosen; an unsound choice is explained and leaves `.spec` as it was."""
        try:
            moved = self._moved()
            given = self._start.model_dump(exclude_unset=True)
            spec = Spec(**given | moved) if moved else self._start
            self.headline.value = self._headline(spec)
            self.strip.value = _strip(spec)
            self.spec = spec
            self._problem = ""
        except Exception as error:  # nobody hears of an exception in a callback
            self._problem = _words(error)
        self._say(self._problem)
        self._enable()

    def _headline(self, spec: Spec) -> str:
        """What will be done, in words; BadInput if the fact is none."""
        request = self._request(spec)
        text = f"fact {spec.fact}" if spec.fact else f"a sample of {spec.n_edited} facts"
        if request:
            request = facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source)
            true = request.fact.object or "(what the model says)"
            text = f"{request.fact.question} ... {true} \N{RIGHTWARDS ARROW} {request.target}"
        steps = spec.resolved().max_steps
        tuned = f"{spec.model}, then tuned on {spec.task} for at most {steps} steps"
        learns = editing.EDITORS[spec.editor].LEARNS
        if learns:
            tuned += f"; {spec.editor} {learns}"
        if self._vary in spec.model_fields_set:
            tuned += f"; {self._vary} is {getattr(spec, self._vary)!r} alone"
        elif self._vary:
            tuned += f"; {self._vary} takes each of the notebook's `values` in turn"
        return f"<p><b>{escape(text)}</b><br>in {escape(tuned)}</p>"

    def _request(self, spec: Spec) -> EditRequest | None:
        """The one fact that is named, as far as it can be known here."""
        typed = spec.model_dump(include=set(TYPED))
        if any(typed.values()):
            return facts.typed(**typed)
        if spec.fact and self._requests:
            return facts.named(self._requests, spec.fact, spec.facts)
        return None

    # --- Run and Stop

    def _say(self, problem: str) -> None:
        self.message.value = f'<b role="alert">{escape(problem)}</b>' if problem else ""

    def _enable(self) -> None:
        off = ""
        if self._batch:
            off = "in batch the cells below do the work"
        elif not self.notebook.is_file():
            off = "Run is off: this notebook's path is not known; write Panel(spec, notebook=...)"
        running = self.job is not None
        self.run_button.disabled = bool(running or self._problem or off)
        self.stop_button.disabled = not running
        if off and not running:
            self.phase.value = off

    def _run(self) -> None:
        try:
            # papermill takes a second to import, and a notebook in batch needs none
            from workbench.job import Job, parameters

            given = parameters(self.notebook, self.spec, self._moved())
            self.job = Job(self.notebook, given, runs.place(self.out, self.notebook))
        except Exception as error:
            self._say(_words(error))
            return
        self._say("")
        self.bar.value = 0
        self.bar.bar_style = ""
        self.phase.value = "starting"
        self._enable()
        threading.Thread(target=self._follow, args=(self.job,), daemon=True).start()

    def _stop(self) -> None:
        if self.job:
            threading.Thread(target=self.job.stop).start()

    def _follow(self, job: "Job") -> None:
        """In a thread: show how far the job is, then what it made. It sets traits only."""
        try:
            while job.running:
                self._show_progress(job)
                time.sleep(INTERVAL)
            self._show_end(job, job.status())
        except Exception as error:  # nobody hears of an exception in a thread
            self.phase.value = "failed"
            self.bar.bar_style = "danger"
            self._say(_words(error))
        finally:
            job.close()
            self.job = None
            self.tail.value = ""
            self._enable()

    def _show_progress(self, job: "Job") -> None:
        progress = job.progress()
        done, total = progress["done"], progress["total"]
        self.bar.max = max(total, 1)
        self.bar.value = done
        step = f", step {done} of {total}" if total else ""
        self.phase.value = f"{progress['phase']}{step}, {job.seconds:.0f} s"
        self.tail.value = f"<code>{escape(job.last('stderr'))}</code>"

    def _show_end(self, job: "Job", status: int) -> None:
        """What became of the job, in words; its run and the explorer are shown if it ended well."""
        if status and job.stopped:
            self.phase.value = f"stopped after {job.seconds:.0f} s; nothing half-written was kept"
            self.bar.bar_style = "warning"
            return
        if status:
            last = job.last("stderr")
            refusal = last.removeprefix("workbench: ")
            raise BadInput(refusal if refusal != last else f"run: status {status}: {last}")
        run = runs.read(job.last("stdout"))
        members = run.members or [run]
        self.result.children = (HTML(_summary(run, members)), Explorer(*members[:2]))
        self.run = run
        self.bar.value = self.bar.max
        self.bar.bar_style = "success"
        self.phase.value = f"finished in {job.seconds:.0f} s"


# --- Words


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, BadInput | OSError) else cause(error)


def _strip(spec: Spec) -> str:
    """The model's blocks as boxes, E for edited, M for one that may move in tuning, and the same in
    words.
    """
    known = spec.blocks()
    if known is None:
        edited = list(spec.layers) or "the preset's"
        words = f"Edited blocks: {edited}; plan {spec.plan}; {spec.model} is not loaded yet."
        return f"<p>{escape(words)}</p>"
    edited, moving, n_blocks = known
    boxes = ""
    for block in range(n_blocks):
        mark = "E" * (block in edited) + "M" * (block in moving) or "-"
        style = f"{BOX};background:{COLOURS[mark]}"
        boxes += f'<span style="{style}">{block}<br><b>{mark}</b></span>'
    rest = " and embeddings, final norm and head" if "embeddings" in moving else ""
    if spec.plan == "edited-matrices":
        rest = ", the edited matrices alone"
    moves = [block for block in range(n_blocks) if block in moving]
    still = [block for block in range(n_blocks) if block not in moving]
    words = f"E edited: {spans(edited)}. M may move in tuning: {spans(moves)}{rest}. "
    words += f"Still: {spans(still)}."
    boxes = f'<div role="img" aria-label="{words}" style="line-height:1.2">{boxes}</div>'
    return f"{boxes}<p>Blocks: {words}</p>"


def spans(blocks: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    pairs = zip(starts, ends, strict=True)
    words = [str(start) if start == end else f"{start}-{end}" for start, end in pairs]
    return ", ".join(words) or "none"


def _summary(run: runs.Run, members: Sequence[runs.Run]) -> str:
    """How many facts of each run ended how."""
    lines = []
    for member in members:
        groups = []
        for group, rows in outcomes(member).groupby("group"):
            counts = rows.outcome.value_counts(sort=False)
            parts = [f"{n} {outcome}" for outcome, n in counts.items() if n]
            groups.append(f"{group}: {', '.join(parts)}")
        ended = ", ".join(sorted(set(map(str, member.about["ended"]))))
        words = escape(f"{'; '.join(groups)}; the tuning ended by {ended}")
        lines.append(f"<b>{escape(member.folder.name)}</b>: {words}")
    page = escape(str(run.folder / "notebook.html"))
    return f"<p>{'<br>'.join(lines)}<br>All figures: {page}</p>"


# --- What a Spec's values are as widgets


def _facts_of(spec: Spec) -> list[EditRequest]:
    """Facts of the world or a file; none of the Hub's, which is asked when the facts are
    needed, nor of a file that is unreadable.
    """
    if spec.source not in facts.EMBEDDED and not Path(spec.facts).is_file():
        return []
    with suppress(BadInput):  # the run says what is wrong with the file
        return facts.read(spec.source, skip_bad=True)
    return []


def _labels(requests: Iterable[EditRequest]) -> dict[str, str]:
    """What the list of facts shows -> id; the world's for reports alone."""
    labels = {}
    for request in requests:
        fact = request.fact
        if fact.split in ("", "study"):
            labels[f"{fact.id}: {fact.question} -> {request.target}"] = fact.id
    return labels


def _blocks(text: str) -> tuple[int, ...]:
    """The blocks that are written "0-2, 5"; see `spans`."""
    blocks: list[int] = []
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span:
            raise BadInput(f"edited blocks {text!r}: write numbers and spans, such as 2-4 or 3, 5")
        blocks += span
    return tuple(blocks)


def _dropdown(label: str, value, offered: Iterable, empty: str | None = None) -> Dropdown:
    """A list of values, `value` among them even if it is not one that is offered."""
    values = [*offered]
    if value not in values:
        values.insert(0, value)
    options = [(str(one) if one else empty, one) for one in values]
    looks = {"style": STYLE, "layout": {"width": "20em"}}
    return Dropdown(value=value, options=options, description=label, **looks)


def _row(widgets: Sequence) -> HBox:
    return HBox(widgets, layout={"flex_flow": "row wrap"})
