"""The panel: a Spec in widgets, the model's blocks at a glance, Run and Stop, and the finished run.

Whatever nobody touches is passed through unchanged, so a value outside a list is never clamped. Run
starts the notebook in a process of its own (`workbench run`): the kernel stays free, Stop works,
and a thread that starts the run and reads how far it is only sets traits.
"""

import ast
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from itertools import chain
from pathlib import Path
from urllib.parse import quote

from anywidget import AnyWidget
from ipywidgets import HTML, Box, Button, Combobox, Dropdown, IntProgress, Label, VBox
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Dict

from workbench import editing, facts, runs
from workbench.checkpoints import PACKAGED, WORLD_MODELS
from workbench.explorer import Explorer
from workbench.job import Job
from workbench.records import BadInput, cause
from workbench.spec import Spec, arms, varied
from workbench.tuning import numbers, plans

UNREAD = {"edited": [], "moving": [], "count": 0, "most": 0, "learns": ""}  # of a model
SEEN = 2  # runs side by side in the explorer
TYPED = ("subject", "prompt", "object", "target")  # of a fact of one's own
OFFERED = {  # field -> (label, values), or (label, what it shows while it is empty)
    "model": ("Model", (*WORLD_MODELS, *PACKAGED)),
    "editor": ("Editor", editing.EDITORS),
    "paraphrases": ("Paraphrases", (1, 2, 3, 5, 10)),
    "fact": ("Fact", "type words of it and choose, or its id; empty is a sample"),
    "subject": ("Own subject", ""),
    "prompt": ("Own prompt", "with {} for the subject"),
    "object": ("True object", ""),
    "target": ("New object", ""),
    "layers": ("Edited blocks", "such as 2-4 or 3, 5; empty is the preset's"),
    "plan": ("What may move", plans.FORMS),
    "task": ("Task", numbers.TASKS),
    "adapter": ("Adapter", ("", "lora", "dora")),
    "protect": ("Protection", ("", *numbers.PROTECTIONS)),
    "learning_rate": ("Learning rate", (0, 1e-5, 5e-5, 1e-4, 2e-4, 3e-4, 6e-4)),
    "max_steps": ("Steps at most", (0, 20, 40, 80, 120, 240)),
    "values": ("Values", 'as in the notebook, such as ["all", "after:6"]'),
}
# what an empty value is called
EMPTY = {"adapter": "none", "protect": "none"}
EMPTY |= {"learning_rate": "the task's", "max_steps": "the task's"}
SENTENCE = """<p class="workbench-headline"><b>{editor} writes <i>{fact}</i> into {layers} of
{model}, {paraphrases}; then at most {max_steps} steps of {task}, {plan} moving{rest}.</b></p>"""
ENDINGS = {"reached": "reached its threshold", "patience": "got no better", "budget": "ended"}
OFF = "Run is off in batch, and where the notebook's path is not known: give Panel its notebook="
MOST_FACTS = 3000  # in the list; the id of another can be typed
INTERVAL = 0.3  # seconds between two looks at a run


class Blocks(AnyWidget):
    """The strip of the model's blocks, and whatever else of the panel is the browser's: what lies
    where, what is folded away, the field that a problem is about, and keys.
    """

    _esm = Path(__file__).with_name("panel.js")
    _css = Path(__file__).with_name("panel.css")
    state = Dict().tag(sync=True)  # `_drawn`, which blocks cannot be chosen (`off`), the `problem`


class Panel(Box):
    """Widgets over a Spec: `.spec` is the last sound choice and `.values` what the varied field
    takes, `.message` says in place what is wrong, `.run` is the run that Run made.

    Args:
        spec: the starting point; its values are always among those offered.
        notebook: path of what Run runs, as saved; "" = the notebook that JupyterLab has open here.
        out: folder of the runs; "" = where the notebook's cells put them.
        vary: a field that the notebook takes from a list of values, unless the Spec was given it;
            its widgets are shown but cannot be moved.
        values: that list.
    """

    def __init__(self, spec: Spec, notebook="", out="", vary="", values: Sequence = ()):
        self._spec = self._start = spec
        self.notebook = Path(notebook or os.environ.get("JPY_SESSION_NAME", ""))
        self.out = out
        self.run: runs.Run | None = None
        self.job: Job | None = None
        self._vary = vary
        self._varies = bool(vary) and vary not in spec.model_fields_set
        self.values = arms(spec, vary, values) if vary else ()
        self._batch = "WORKBENCH_BATCH" in os.environ
        self._problem = ""
        self._off = OFF if self._batch or not self.notebook.is_file() else ""
        self._requests = _facts_of(spec)
        self._ids = _labels(self._requests)
        self.choices = self._widgets(spec)
        self._initial = self._fields()
        super().__init__(self._arranged(), _dom_classes=("workbench-panel",))
        self._refreshing = threading.Lock()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._is_read = self._batch or _is_quick()
        self._refresh()
        if not self._is_read:
            self._reading.start()

    @property
    def spec(self) -> Spec:
        """The last sound choice, once the model's layout is read."""
        if self._reading.is_alive():
            self._reading.join()
        return self._spec

    def _repr_mimebundle_(self, **kwargs):
        """In a saved page the choice, as words, stands in the panel's place."""
        still = self.headline.value + self.message.value
        return super()._repr_mimebundle_(**kwargs) | {"text/html": still}

    # --- Widgets

    def _widgets(self, spec: Spec) -> dict[str, Dropdown | Combobox]:
        labels = {fact: label for label, fact in self._ids.items()}
        shown = dict(spec) | {"fact": labels.get(spec.fact, spec.fact), "values": str(self.values)}
        shown["layers"] = runs.spans(spec.layers) if spec.layers else ""
        widgets: dict[str, Dropdown | Combobox] = {}
        for name, (label, offered) in OFFERED.items():
            if name != "values" or (self._varies and self.values):
                widgets[name] = _widget(label, shown[name], offered, EMPTY.get(name))
                widgets[name].disabled = name == self._vary
                widgets[name].add_class(f"workbench-field-{name}")
                widgets[name].observe(lambda _, name=name: self._changed(name), "value")
        widgets["fact"].options = [] if self._batch else list(self._ids)[:MOST_FACTS]
        widgets["plan"].options = list(plans.KINDS)
        return widgets

    def _arranged(self) -> list:
        self.headline, self.message, self.tail, self.result = HTML(), HTML(), HTML(), VBox()
        self.blocks = Blocks(state={"count": 0})
        self.blocks.on_msg(lambda _, picked, __: self._picked(**picked))
        self.run_button = Button(description="Run", icon="play", tooltip="Run this, as saved")
        self.run_button.button_style = "primary"
        self.stop_button = Button(description="Stop", icon="stop", tooltip="End it, keep nothing")
        self.run_button.on_click(lambda _: self._run())
        self.stop_button.on_click(lambda _: self._stop())
        self.bar = IntProgress(max=1, description="Progress")
        self.phase = Label(self._off)
        running = [self.run_button, self.stop_button, self.bar, self.phase, self.tail]
        fields = self.choices.values()
        return [self.headline, self.blocks, *fields, *running, self.message, self.result]

    # --- From the widgets to the Spec

    def _fields(self) -> dict:
        """The fields of a Spec as the widgets stand."""
        fields = {name: one.value for name, one in self.choices.items() if name != "values"}
        fact = fields["fact"].strip()
        fields["fact"] = self._ids.get(fact, fact)
        fields["layers"] = _blocks(fields["layers"])
        return fields

    def _moved(self) -> dict:
        """The fields that a person has changed."""
        return {name: one for name, one in self._fields().items() if one != self._initial[name]}

    def _changed(self, name: str) -> None:
        """Take the widgets into the Spec; of a fact and one typed, whichever came last is meant."""
        if name == "fact":
            for typed in TYPED:
                self.choices[typed].value = ""
        self._refresh()

    def _picked(self, field: str, text: str, number: int) -> None:
        """Take what was chosen on the strip into its field, and tell the strip that it is done."""
        try:
            self.choices[field].value = text
        finally:  # else the strip would wait for ever
            self.blocks.send({"settled": number})

    def _read(self) -> None:
        """In a thread: import what it takes to read the model's layout, then show it."""
        with suppress(Exception):  # to refresh says what is wrong
            self._start.blocks()
        self._is_read = True
        self._refresh()

    def _refresh(self) -> None:
        """Show what is chosen; an unsound choice is explained and leaves `.spec` as it was."""
        with self._refreshing:
            self._take()
        self._say(self._problem)
        self._enable()

    def _take(self) -> None:
        """Make a Spec of what is chosen, or a problem; and draw it."""
        try:
            moved = self._moved()
            given = self._start.model_dump(exclude_unset=True)
            spec = Spec(**given | moved) if moved else self._start
            values, specs = self.values, [spec]
            if "values" in self.choices:
                values = self.choices["values"].value
                with suppress(ValueError, SyntaxError):  # a text is refused as no list
                    values = ast.literal_eval(values)
                specs = varied(spec, self._vary, values)
            drawn = (_drawn(specs) if self._is_read else UNREAD) | {"off": self._vary}
            self.headline.value = self._headline(spec, values, drawn)
            self.blocks.state = drawn
            self._spec, self.values = spec, values
            self._problem = ""
        except Exception as error:  # nobody hears of an exception in a callback
            self._problem = _words(error)

    def _headline(self, spec: Spec, values: Sequence, drawn: dict) -> str:
        """The whole experiment in a sentence; BadInput if the fact is none."""
        words = dict(spec.resolved()) | {"learning_rate": spec.learning_rate, "rest": ""}
        words["fact"] = f"fact {spec.fact}" if spec.fact else f"{spec.n_edited} facts"
        typed = spec.model_dump(include=set(TYPED))
        request = facts.typed(**typed) if any(typed.values()) else None
        if not request and spec.fact and self._requests:  # as far as it can be known here
            request = facts.named(self._requests, spec.fact, spec.facts)
        if request:
            facts.with_paraphrases(request, spec.paraphrases, spec.paraphrase_source)
            true = f" (not {request.fact.object})" if request.fact.object else ""
            words["fact"] = f"{request.fact.question} ... {request.target}{true}"
        words["editor"] = spec.editor.upper().replace("ALPHAEDIT", "AlphaEdit")
        words["layers"] = _named(drawn["edited"] or spec.layers, "the preset's blocks")
        words["plan"] = _named(drawn["moving"], f"plan {spec.plan}")
        if spec.plan == "edited-matrices":
            words["plan"] = "the edited matrices alone"
        if self._vary == "editor" and self._varies and not spec.layers:
            words["layers"] = "blocks of its own"
        if self._varies:
            words[self._vary] = " / ".join(str(one) or "none" for one in values) or "each"
            words["rest"] = f"; {self._vary} takes each of the notebook's `values` in turn"
        elif self._vary:
            words["rest"] = f"; {self._vary} is {getattr(spec, self._vary)!r} alone"
        for field in ("learning_rate", "protect", "adapter"):
            if words[field]:
                words["rest"] = f", {OFFERED[field][0].lower()} {words[field]}{words['rest']}"
        if drawn["learns"]:
            words["rest"] += f"; {spec.editor} {drawn['learns']}"
        many = words["paraphrases"]
        words["paraphrases"] = "one wording" if many == 1 else f"{many} wordings"
        return SENTENCE.format_map({name: escape(str(text)) for name, text in words.items()})

    # --- Run and Stop

    def _say(self, problem: str) -> None:
        self.message.value = f'<b role="alert">{escape(problem)}</b>' if problem else ""
        self.blocks.state = self.blocks.state | {"problem": problem}

    def _enable(self) -> None:
        self.run_button.disabled = bool(self.job or self._problem or self._off)
        self.stop_button.disabled = self.job is None

    def _run(self) -> None:
        """Answer at once; whatever takes longer is done by the thread."""
        others = {"vary": self._vary, "values": list(self.values)}
        given = (self.spec, self._moved(), others if "values" in self.choices else {})
        self.job = Job(self.notebook, runs.place(self.out, self.notebook))
        self._say("")
        self.bar.value, self.bar.bar_style = 0, ""
        self.phase.value = "starting"
        self._enable()
        threading.Thread(target=self._follow, args=(self.job, *given), daemon=True).start()

    def _stop(self) -> None:
        if self.job:
            threading.Thread(target=self.job.stop).start()

    def _follow(self, job: Job, *given) -> None:
        """In a thread: start the job, show how far it is, then what it made. Only traits change."""
        try:
            job.start(*given)
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

    def _show_progress(self, job: Job) -> None:
        phase, done, total = job.progress().values()
        self.bar.max = max(total, 1)
        self.bar.value = done
        step = f", step {done} of {total}" if done < total else ""
        self.phase.value = f"{phase}{step}, {job.seconds:.0f} s"
        self.tail.value = f"<code>{escape(job.last('stderr'))}</code>"

    def _show_end(self, job: Job, status: int) -> None:
        """What became of the job, in words; its run and the explorer are shown if it ended well."""
        if status and job.stopped:
            self.phase.value = f"stopped after {job.seconds:.0f} s; nothing half-written was kept"
            self.bar.bar_style = "warning"
            return
        if status:
            last = job.last("stderr").removeprefix("workbench: ")
            raise BadInput(f"{last} (the run's status is {status})")
        run = runs.read(job.last("stdout"))
        members = run.members or [run]
        self.result.children = (HTML(_summary(run, members)), Explorer(*members[:SEEN]))
        self.run = run
        self.bar.value = self.bar.max
        self.bar.bar_style = "success"
        self.phase.value = f"finished in {job.seconds:.0f} s: {_ended(members[-1])}"


# --- Words


def _is_quick() -> bool:
    """Whether the model's layout is read at once: torch takes seconds to import."""
    return "torch" in sys.modules


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, BadInput | OSError) else cause(error)


def _drawn(specs: Sequence[Spec]) -> dict:
    """What the strip shows of experiments that differ in one value: the blocks edited and those
    that may move in any of them, of how many, the most that can be edited at once (0 = all), and
    what the editor learns.
    """
    known = [spec.blocks() or ((), (), 0) for spec in specs]
    edited, moving, counts = zip(*known, strict=True)
    drawn = {"edited": [*chain(*edited)], "moving": [*chain(*moving)], "count": max(counts)}
    editor = editing.EDITORS[specs[-1].editor]
    limits = editor.HParams.model_fields["layers"].metadata if drawn["count"] else ()
    most = max((getattr(one, "max_length", 0) for one in limits), default=0)
    return drawn | {"most": most, "learns": editor.LEARNS}


def _named(parts: Iterable, otherwise: str) -> str:
    """The blocks among parts of the model, in words; if there are none, something else."""
    blocks = sorted({part for part in parts if isinstance(part, int)})
    if "embeddings" in parts:
        return "all blocks"
    return f"block{'s' * (len(blocks) > 1)} {runs.spans(blocks)}" if blocks else otherwise


def _summary(run: runs.Run, members: Sequence[runs.Run]) -> str:
    """What became of the facts of each run, and where all its figures are."""
    from workbench import plots  # takes a second

    lines = []
    for member in members:
        lines.append(f"<b>{escape(member.folder.name)}</b>: {escape(plots.outcome(member))}")
    lines.append(f"All figures: {_link(run.folder / 'notebook.html')}")
    if len(members) > SEEN:
        lines.append(f"Fact by fact, the first {SEEN} of {len(members)}:")
    return f"<p>{'<br>'.join(lines)}</p>"


def _ended(run: runs.Run) -> str:
    """How the tuning of each edited model came to its end, after how many steps."""
    steps = run.probes.groupby("edited_model").step.max()
    most = run.spec.get("max_steps", "its")
    ends = zip(run.about["ended"], steps, strict=False)
    words = {f"{ENDINGS.get(how, how)} after {step} of {most} steps" for how, step in ends}
    return f"the tuning {' or '.join(sorted(words))}"


def _link(page: Path) -> str:
    """A link if the JupyterLab that started this kernel serves the page, else its path."""
    server = Path(jupyter_runtime_dir(), f"jpserver-{os.environ.get('JPY_PARENT_PID')}.json")
    with suppress(OSError, ValueError, KeyError):  # no JupyterLab, or a page outside its folder
        about = json.loads(server.read_text(encoding="utf-8"))
        inside = page.resolve().relative_to(Path(about["root_dir"]).resolve()).as_posix()
        address = escape(f"{about['base_url']}files/{quote(inside)}")
        return f'<a href="{address}" target="_blank">{escape(inside)}</a>'
    return escape(str(page))


# --- What a Spec's values are as widgets


def _facts_of(spec: Spec) -> list[facts.EditRequest]:
    """Facts of the world or a file; none of the Hub's, which is asked when the facts are
    needed, nor of a file that is unreadable.
    """
    with suppress(BadInput):  # the run says what is wrong with the file
        if spec.source in facts.EMBEDDED or Path(spec.facts).is_file():
            return facts.read(spec.source, skip_bad=True)
    return []


def _labels(requests: Iterable[facts.EditRequest]) -> dict[str, str]:
    """What the list of facts shows -> id; the world's for reports alone."""
    shown = [request for request in requests if request.fact.split in ("", "study")]
    label = "{fact.id}: {fact.question} -> {target}".format
    return {label(fact=one.fact, target=one.target): one.fact.id for one in shown}


def _blocks(text: str) -> tuple[int, ...]:
    """The blocks that are written "0-2, 5"; see `runs.spans`."""
    parts = re.findall(r"(\d+)(?:-(\d+))?|(\S)", text.replace(",", " "))
    written = [range(int(first), int(last or first) + 1) for first, last, _ in parts if first]
    if any(other for _, _, other in parts) or not all(written):
        raise BadInput(f"layers {text!r}: write numbers and spans, such as 2-4 or 3, 5")
    return tuple(block for span in written for block in span)


def _widget(label: str, value, offered: Iterable | str, empty: str | None) -> Dropdown | Combobox:
    """A field to write in, or a list of values, `value` among them even if it is not offered."""
    looks = {"description": label, "style": {"description_width": "9em"}}
    if isinstance(offered, str):
        return Combobox(value=value, placeholder=offered, continuous_update=False, **looks)
    values = [*offered] if value in offered else [value, *offered]
    options = [(str(one) if one else empty, one) for one in values]
    return Dropdown(value=value, options=options, **looks)
