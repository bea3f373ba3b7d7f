"""A whole experiment as a record: its fields are the notebooks' parameters, its id a hash of whatever determines the result."""

import hashlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import transformers
from pydantic import Field

from workbench import editing, facts, models
from workbench.editing import Numbers
from workbench.facts import Record
from workbench.models import Model
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings


class Spec(Record):
    """A whole experiment. Numbers of 0 and empty strings mean the preset's. The field names are the notebooks' parameters."""

    model: str = "world-gpt2"  # world-gpt2, world-llama, a folder or a Hub id
    revision: str = ""  # "early" = a world model in the middle of learning; or a Hub revision
    facts: str = "world"  # world, a file or a Hub dataset id
    fact: str = ""  # one fact's id; "" = a sample
    subject: str = ""  # a typed fact: subject, prompt with one {}, object, target
    prompt: str = ""
    object: str = ""
    target: str = ""
    editor: str = "rome"
    variant: Literal["", "published", "paper", "reference"] = ""  # of the editor's preset
    hparams: dict = Field(default_factory=dict)  # fields of the editor's HParams to change
    layers: tuple[int, ...] = ()  # edited blocks
    n_edited: int = Field(10, ge=1)
    n_intrinsic: int = Field(20, ge=0)
    edits_per_model: int = Field(10, ge=1)
    margin: float = Field(0.1, ge=0, lt=1)  # of the true token over the second; what a known fact has at least
    split_rule: Literal["matched", "paper"] = "matched"  # same relations in both groups | no shared subject, relation, object
    paraphrases: int = Field(1, ge=1)  # statements an edit sees, its prompt included
    paraphrase_source: Literal["templates", "file"] = "templates"
    task: str = "text"
    task_data: str = ""  # "" = the embedded world's
    columns: dict = Field(default_factory=dict)
    n_train: int = Field(0, ge=0)  # rows
    n_valid: int = Field(0, ge=0)  # rows
    plan: str = "all"
    adapter: Literal["", "lora", "dora"] = ""
    adapter_rank: int = Field(0, ge=0)
    adapter_alpha: float = Field(0, ge=0)
    adapter_dropout: float = Field(0, ge=0, lt=1)
    adapter_targets: tuple[str, ...] = ()  # last names of the modules; empty = every linear module the plan moves
    max_steps: int = Field(0, ge=0)  # optimiser steps
    eval_every: int = Field(0, ge=0)  # steps
    batch_size: int = Field(0, ge=0)  # rows
    learning_rate: float = Field(0, ge=0)
    threshold: float = 0.0  # validation metric that ends the tuning
    patience: int = Field(0, ge=0)  # evaluations without a better metric that end it too; 0 = never
    max_tokens: int = Field(0, ge=0)  # of training; 0 = no such budget
    validation: Literal["apart", "training"] = "apart"  # training: rows trained on, as in arXiv 2507.14198
    loss_on: Literal["response", "all"] = "response"  # of instructions
    trainer: dict = Field(default_factory=dict)  # further fields of transformers.TrainingArguments, e.g. {"bf16": True}
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "auto"

    def resolved(self) -> "Spec":
        """The same experiment with the task's usual numbers in the place of zeros; names are checked, nothing heavy is loaded."""
        tasks.named(self.task)
        editing.editor_named(self.editor)
        usual = tasks.usual(self.task, self.task_data, self.model).model_dump()
        if self.adapter:
            usual |= tasks.presets()["adapter"] | {"learning_rate": usual["adapter_learning_rate"]}
        return self.model_copy(update={name: value for name, value in usual.items() if getattr(self, name, None) == 0})

    def settings(self) -> Settings:
        """The numbers of the tuning."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    def editor_hparams(self, model: Model) -> Numbers:
        """The editor's hyper-parameters: the preset for the model, changed by `hparams` and `layers`."""
        base = editing.preset(self.editor, model, variant=self.variant)
        changes = dict(self.hparams) | ({"layers": list(self.layers)} if self.layers else {})
        hparams = type(base)(**(base.model_dump() | changes))
        model.check_layers(hparams.layers)
        return hparams

    def n_blocks(self) -> int | None:
        """The model's depth, if its configuration is on this machine."""
        world = facts.DATA / "world" / "models" / self.model / self.revision
        folder = world if self.model in models.WORLD_MODELS else Path(self.model).expanduser()
        try:
            return transformers.AutoConfig.from_pretrained(folder).num_hidden_layers if (folder / "config.json").is_file() else None
        except (OSError, ValueError, AttributeError):
            return None  # loading it says why

    def blocks(self) -> tuple[list[int], set, int] | None:
        """Edited blocks, what may move (blocks, and "embeddings"), and the depth; None where the depth is not known before loading.

        Raises:
            BadInput: editor, layers and plan do not go together on this model.
        """
        if (depth := self.n_blocks()) is None:
            return None
        model = Skeleton(self.model, depth)
        with warnings.catch_warnings(action="ignore"):  # that layers are proposed from the depth
            edited = list(self.editor_hparams(model).layers)
        names = {name.partition(".")[0] for name in plans.resolve(model, self.plan, edited).parameters}
        return edited, {int(name) if name.isdigit() else name for name in names}, depth


class Skeleton:
    """What a choice of blocks asks of a model, known before the model is loaded: its name, its depth, names for its weights."""

    check_layers = Model.check_layers

    def __init__(self, name: str, n_blocks: int):
        self.name, self.n_blocks, self.network = name, n_blocks, self

    def named_parameters(self) -> list[tuple[str, None]]:
        return [("embeddings", None)] + [(f"{block}.{part}.weight", None) for block in range(self.n_blocks) for part in ("attention", "down")]

    def block_name(self, layer: int) -> str:
        return str(layer)

    def down_projection_name(self, layer: int) -> str:
        return f"{layer}.down"


@cache
def code_fingerprint() -> str:
    """Of every Python file of the package, and of the presets, which determine results as much."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("presets.yaml")]):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def identify(spec: Spec, cells: str = "", name: str = "study") -> str:
    """The run's id: readable words and a hash of whatever determines the result (resolved Spec, model, data, code), never the commit."""
    spec = spec.resolved()
    digest = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode())
    digest.update(models.file_fingerprint(spec.model, spec.revision).encode())
    for source in (spec.facts, spec.task_data):
        if Path(source).is_file():
            digest.update(Path(source).read_bytes())
    for path in sorted([facts.DATA / "world" / "facts.csv", *(facts.DATA / "world").glob("*.yaml")]):
        digest.update(path.read_bytes())
    digest.update((code_fingerprint() + cells).encode())
    return f"{name}-{spec.editor}-{spec.task}-{digest.hexdigest()[:10]}"
