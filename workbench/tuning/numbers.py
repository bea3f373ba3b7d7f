"""Usual numbers of every task, and where the studies' data lie: presets.yaml, read without
torch.
"""

from functools import cache
from pathlib import Path

import pydantic

from workbench.checkpoints import is_world
from workbench.records import BadInput, Record, yaml_table
from workbench.registry import Registry


class Usual(Record):
    """Usual numbers of a task; whatever a Spec leaves at 0 is taken from here.

    `threshold`, of the validation metric, ends the tuning: a loss in nats a token, or an accuracy.
    """

    n_train: int  # rows; for facts: facts
    n_valid: int  # rows
    max_steps: int
    eval_every: int  # steps
    batch_size: int  # rows
    learning_rate: float
    adapter_learning_rate: float
    threshold: float


class Source(Usual):
    """The data of a published study: where it is on the Hub and how it is read."""

    task: str
    data: str
    config: str = ""
    split: str = "train"
    streaming: bool = False
    columns: dict = pydantic.Field(default_factory=dict)


@cache
def presets() -> dict:
    """world: task -> numbers; real: those of other models; own: model -> task -> other ones;
    sources: name -> Source; adapter: numbers of LoRA and DoRA.
    """
    numbers = yaml_table(Path(__file__).with_name("presets.yaml"))
    sources = {name: Source(**fields) for name, fields in numbers["sources"].items()}
    return numbers | {"sources": sources}


NAMES = ("text", "facts", "sentiment", "instructions")
TASKS = Registry("task", {name: f"workbench.tuning.tasks:{name}_task" for name in NAMES})

# ways to protect what a model holds while it is tuned
PLACES = {"replay": "Replay", "others": "Others", "replay+kl": "Both", "span": "Span"}
PLACES["replay+span"] = "ReplayAndSpan"
PLACES = {name: f"workbench.tuning.protection:{place}" for name, place in PLACES.items()}
PROTECTIONS = Registry("protection", PLACES)


def usual(task: str, data: str = "", model: str = "") -> Usual:
    """The numbers of a task on a published study's data, else those of the embedded world, from
    which its models differ in a few and other models in most; a registered task has those of
    running text.
    """
    TASKS.check(task)
    source = presets()["sources"].get(data)
    if source and source.task != task:
        raise BadInput(f"task_data {data!r}: is data of task {source.task}, not {task}")
    if source:
        return source
    table = presets()["world" if not model or is_world(model) else "real"]
    numbers = table.get(task, table["text"])
    return Usual(**(numbers | presets()["own"].get(model, {}).get(task, {})))
