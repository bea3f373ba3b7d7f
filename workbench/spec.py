"""A whole experiment as a record: its fields are the notebooks' parameters, its id a hash of
whatever determines the result.

Checking and identifying one needs no torch, which takes seconds to import; what does is imported
where it is used.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from workbench import checkpoints, editing, facts
from workbench.facts import BadInput, Record
from workbench.records import did_you_mean
from workbench.tuning import numbers

if TYPE_CHECKING:
    from workbench.editing.records import Numbers
    from workbench.models import Model
    from workbench.tuning.finetune import Settings


# rooms that show, start or gather runs: no number of a run depends on them
NO_RESULT = (
    "__main__",
    "batch",
    "explorer",
    "forecast",
    "inert",
    "job",
    "pages",
    "panel",
    "plots",
    "report",
    "sweep",
)


class Spec(Record):
    """A whole experiment. Numbers of 0 and empty strings mean the preset's; None is a field not
    given.

    The field names are the notebooks' parameters.
    """

    model: str = "world-gpt2"  # world-gpt2, world-llama, a folder or a Hub id
    start: str = (
        ""  # what stands in front of every text: "" = the rule, none, bos, eos, or a token's text
    )
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
    harmless: float = Field(
        0,
        ge=0,
        lt=1,
        # share of n_edited: facts that the model gets wrong, edited to the truth; the others are made
        # false
    )
    n_intrinsic: int = Field(20, ge=0)
    edits_per_model: int = Field(10, ge=1)
    margin: float = Field(
        0.1, ge=0, lt=1
    )  # of the true token over the second; what a known fact has at least
    split_rule: Literal["matched", "paper"] = (
        "matched"  # same relations in both groups | no shared subject, relation, object
    )
    paraphrases: int = Field(1, ge=1)  # statements an edit sees, its prompt included
    paraphrase_source: Literal["templates", "file", "held_out"] = (
        "templates"  # held_out: a dataset's rephrasings, which then judge no more
    )
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
    adapter_targets: tuple[
        str, ...
    ] = ()  # last names of the modules; empty = every linear module the plan moves
    max_steps: int = Field(0, ge=0)  # optimiser steps
    eval_every: int = Field(0, ge=0)  # steps
    batch_size: int = Field(0, ge=0)  # rows
    learning_rate: float = Field(0, ge=0)
    threshold: float = 0.0  # validation metric that ends the tuning
    patience: int = Field(0, ge=0)  # evaluations without a better metric that end it too; 0 = never
    max_tokens: int = Field(0, ge=0)  # of training; 0 = no such budget
    validation: Literal["apart", "training"] = (
        "apart"  # training: rows trained on, as in arXiv 2507.14198
    )
    loss_on: Literal["response", "all"] = "response"  # of instructions
    trainer: dict = Field(
        default_factory=dict
    )  # further fields of transformers.TrainingArguments, e.g. {"bf16": True}
    seed: int = Field(0, ge=0)
    corpus: str = (
        "world"  # text of the second moments: world, wikipedia, a file or a Hub dataset id
    )
    device: str = "auto"
    dtype: str = "auto"
    device_map: str = ""  # accelerate's, e.g. balanced, over several GPUs

    @model_validator(mode="before")
    @classmethod
    def _only_given(cls, fields: dict) -> dict:
        return {name: value for name, value in fields.items() if value is not None}

    def resolved(self) -> "Spec":
        """The same experiment with the task's usual numbers in the place of zeros; names are
        checked, nothing heavy is loaded.
        """
        editing.check_named(self.editor)
        usual = numbers.usual(self.task, self.task_data, self.model).model_dump()
        if self.adapter:
            usual |= numbers.presets()["adapter"] | {
                "learning_rate": usual["adapter_learning_rate"]
            }
        return self.model_copy(
            update={name: value for name, value in usual.items() if getattr(self, name, None) == 0}
        )

    def settings(self) -> "Settings":
        """The numbers of the tuning."""
        from workbench.tuning.finetune import Settings

        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    def editor_hparams(self, model: "Model | str") -> "Numbers":
        """The editor's hyper-parameters: the preset for the model, changed by `hparams` and
        `layers`; of a mere name, layers unchecked.
        """
        base = editing.preset(self.editor, model, variant=self.variant)
        if self.layers and "layers" in self.hparams:
            raise BadInput(
                "layers are given twice, as layers and in hparams; leave one of them out"
            )
        changes = dict(self.hparams) | ({"layers": list(self.layers)} if self.layers else {})
        _check_units(base, changes)
        hparams = type(base)(**(base.model_dump() | changes))
        if not isinstance(model, str):
            model.check_layers(hparams.layers)
        return hparams

    def outline(self) -> "Model | None":
        """The model without its weights, if its configuration is on this machine."""
        from workbench import models

        try:
            return models.outline(self.model, self.revision, here=True)
        except BadInput:
            return None  # loading it says why

    def blocks(self) -> tuple[list[int], set, int] | None:
        """Edited blocks, what may move (blocks, and "embeddings" and the like), and the depth; None
        where the depth is not known before loading.

        Raises:
            BadInput: editor, layers and plan do not go together on this model.
        """
        from workbench.tuning import plans

        if (model := self.outline()) is None:
            return None
        with warnings.catch_warnings(action="ignore"):  # that layers are proposed from the depth
            edited = list(self.editor_hparams(model).layers)
        table = plans.resolve(model, self.plan, edited).table(model)
        return edited, set(table.index[table.trainable > 0]), model.n_blocks


def varied(spec: Spec, vary: str, values: Sequence) -> list[Spec]:
    """The Specs, resolved, that differ in one field."""
    if not isinstance(vary, str) or vary not in Spec.model_fields:
        near = did_you_mean(vary, Spec.model_fields) or ";"
        raise BadInput(
            f"vary={vary!r}: not a field of Spec{near} choose e.g. editor, paraphrases, plan"
        )
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise BadInput(f"values {values!r}: give a list of at least one value of {vary}")
    return [Spec(**(spec.model_dump() | {vary: value})).resolved() for value in values]


def _check_units(base: "Numbers", changes: Mapping) -> None:
    """BadInput if a number is given that the proposed ones count in another unit than the
    published.
    """
    if getattr(base, "ridge_unit", "absolute") == "absolute":
        return
    for name, unit in (("ridge", "ridge_unit"), ("threshold", "null_space")):
        if name in changes and unit not in changes:
            raise BadInput(
                f"hparams: {name} {changes[name]} counts by {unit}, which is {getattr(base, unit)!r} "
                f"where no preset is published; give {unit} too (absolute as published)"
            )


def arms(spec: Spec, vary: str, values: Sequence) -> list:
    """The values of the field that varies: the one that the Spec was given for it, else all."""
    return [getattr(spec, vary)] if vary in spec.model_fields_set else values


@cache
def code_fingerprint() -> str:
    """Of every Python file that determines a result, of the presets and of the list of stop words,
    which do as much.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("presets.yaml")]):
        if path.relative_to(folder).with_suffix("").as_posix() in NO_RESULT:
            continue
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    digest.update((facts.DATA / "stopwords.txt").read_bytes())
    return digest.hexdigest()


def identify(spec: Spec, cells: str = "", name: str = "study") -> str:
    """The run's id: readable words and a hash of whatever determines the result (resolved Spec,
    model, data, code), never the commit.
    """
    spec = spec.resolved()
    digest = hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode())
    digest.update(checkpoints.file_fingerprint(spec.model, spec.revision).encode())
    for source in (spec.facts, spec.task_data, spec.corpus):
        if Path(source).is_file():
            digest.update(Path(source).read_bytes())
    for path in sorted(
        [facts.DATA / "world" / "facts.csv", *(facts.DATA / "world").glob("*.yaml")]
    ):
        digest.update(path.read_bytes())
    digest.update((code_fingerprint() + cells).encode())
    return f"{name}-{spec.editor}-{spec.task}-{digest.hexdigest()[:10]}"
