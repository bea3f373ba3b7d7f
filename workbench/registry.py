"""Editors, tasks, measures and protections by name: the package's, installed packages', and yours.

    wb.editors.register("mine", function_or_module)

A package offers its own through the entry-point groups `workbench.editors`, `workbench.tasks`,
`workbench.measures` and `workbench.protections`. What each kind of thing must be is written here,
and only here.
"""

import inspect
import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from workbench.records import BadInput, check_choice

if TYPE_CHECKING:
    import pandas as pd

    from workbench.edits import Edit
    from workbench.facts import EditRequest
    from workbench.models import Model
    from workbench.tuning.tasks import Data, Task


class EditorFunction(Protocol):
    """An editor in one function; its further arguments, which have defaults, are its numbers.

    `layers` and `seed` are given to it if it asks for them. What a module may say is listed by
    `editing.Editor`.
    """

    def __call__(
        self, model: "Model", requests: "Sequence[EditRequest]", **numbers: Any
    ) -> "Edit": ...


class TaskBuilder(Protocol):
    """Rows to learn from and to validate on, of which none touches the facts in `data.avoid`."""

    def __call__(self, model: "Model", data: "Data") -> "Task": ...


class MeasureFunction(Protocol):
    """A tidy table about requests, of a model that may be edited; it becomes a table of the run."""

    def __call__(self, model: "Model", requests: "Sequence[EditRequest]") -> "pd.DataFrame": ...


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is asked of a model about requests: a table, or anything that `compare` makes a table
    of, given what the unedited model said and what this one says.
    """

    name: str
    ask: Callable[[Any, Any], Any]
    compare: Callable[[Any, Any], "pd.DataFrame"] | None = None

    @classmethod
    def of(cls, name: str, thing: Any) -> "Measure":
        """The measure that a function is, or a module with `ask`; BadInput if it is none."""
        ask = getattr(thing, "ask", thing)
        if not callable(ask):
            raise BadInput(f"measure {name}: {thing!r} is no function, nor a module with ask")
        return cls(name=name, ask=ask, compare=getattr(thing, "compare", None))


class Room(ModuleType):
    """A module that can be called, too: `wb.facts(...)` beside `wb.facts.read`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Registry(Mapping):
    """Things of one kind by name; each is imported when it is first asked for.

    Args:
        kind: "editor", "task" or "measure".
        places: name -> "module" or "module:attribute" of the package's own ones.
        finished: (name, thing) -> what is handed out for it; it raises BadInput for what is none.
            Without it functions are handed out as they are.
    """

    def __init__(self, kind: str, places: Mapping[str, str], finished: Callable | None = None):
        self.kind = kind
        group = f"workbench.{kind}s"
        self._own = {name: EntryPoint(name, place, group) for name, place in places.items()}
        self._finished = finished or self._function
        self._ready: dict[str, tuple[Any, Any]] = {}  # the thing, and what is handed out for it
        self._declared: set[str] = set()

    def register(self, name: str, thing: Any = None) -> Any:
        """Give a thing a name, in place of an earlier one; without a thing, a decorator.

        Raises:
            BadInput: the name is the package's own, or the thing is not of this kind.
        """
        if thing is None:
            return partial(self.register, name)
        if name in self._own:
            raise BadInput(f"{self.kind} {name!r}: is the workbench's own; choose another name")
        if not str(name).isidentifier():
            raise BadInput(f"{self.kind} {name!r}: choose a name of letters, digits and _")
        self._ready[name] = thing, self._finished(name, thing)
        return thing

    def declare(self, names: Iterable[str]) -> None:
        """Names that code registers which has not run yet: they pass `check`."""
        self._declared.update(names)

    @property
    def pending(self) -> set[str]:
        """Names that are declared, whose code has not run here."""
        return self._declared - {*self._own, *self._offered, *self._ready}

    def check(self, name: str) -> None:
        """BadInput if nothing is called so."""
        check_choice(self.kind, name, self)

    def __getitem__(self, name: str) -> Any:
        return self._found(name)[1]

    def _found(self, name: str) -> tuple[Any, Any]:
        self.check(name)
        if name in self.pending:
            raise BadInput(f"{self.kind} {name!r}: run the cell that registers it first")
        if name not in self._ready:
            thing = (self._offered | self._own)[name].load()
            self._ready[name] = thing, self._finished(name, thing)
        return self._ready[name]

    def fingerprint(self, name: str) -> str:
        """The code of a thing, which determines what a run of it finds; "" of the package's own,
        and of one whose cell has not run here. What a function reads from elsewhere is not in it.
        """
        if name in self._own or name in self.pending:
            return ""
        thing = self._found(name)[0]
        parts = [thing]
        if hasattr(thing, "ask") and not inspect.ismodule(thing):  # of a measure
            parts = [thing.ask, getattr(thing, "compare", None)]
        return "".join(self._code(inspect.unwrap(part)) for part in parts)

    @staticmethod
    def _code(thing: Any) -> str:
        try:
            return inspect.getsource(thing)
        except (OSError, TypeError):  # typed in at a prompt, or no function
            code = getattr(thing, "__code__", None)
            return marshal.dumps(code).hex() if code else repr(type(thing))

    def _function(self, name: str, thing: Any) -> Any:
        if not callable(thing):
            raise BadInput(f"{self.kind} {name}: {thing!r} is no function")
        return thing

    @cached_property
    def _offered(self) -> dict[str, Any]:
        points = entry_points(group=f"workbench.{self.kind}s")
        return {point.name: point for point in points}

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *self._offered, *self._ready, *self._declared]))

    def __len__(self) -> int:
        return len(list(iter(self)))


ASKED = ("counterfact", "generation", "locality", "ability", "portability", "superficiality")
PLACES = {name: f"workbench.evaluation.{name}" for name in (*ASKED, "tracing")}
PLACES["recovery"] = "workbench.tuning.recovery"
PLACES["trace"] = "workbench.traces.trace"
PLACES["retention"] = "workbench.tracking.retention:measure"
MEASURES = Registry("measure", PLACES, Measure.of)
UNITS = {"locality": "nats", "ability": "bits of entropy; nats a token of loss"}
UNITS |= {"recovery": "steps", "tracing": "probability", "trace": "p; shares"}
NO_SHARES = {*UNITS, "flattery"}  # measures and quantities that are no shares of prompts
