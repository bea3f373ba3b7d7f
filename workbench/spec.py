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
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, model_validator

from workbench import checkpoints, editing, facts, runs
from workbench.records import BadInput, Record, did_you_mean
from workbench.registry import MEASURES
from workbench.tuning import numbers, plans

if TYPE_CHECKING:
    from workbench.editing.records import Numbers
    from workbench.models import Model

Part = TypeVar("Part", bound=Record)

# Rooms on which no number of a run depends: they show and gather runs, or start them.
SHOWING = ("explorer", "forecast", "inert", "pages", "panel", "plots", "report")
STARTING = ("__main__", "batch", "choosing", "job", "sweep")
NO_RESULT = SHOWING + STARTING


class Spec(Record):
    """A whole experiment; its flat fields are the notebooks' parameters.

    Numbers of 0 and empty strings mean the preset's; None is a field that is not given.
    """

    # the model
    model: str = "world-gpt2"  # world-gpt2, world-llama, a folder or a Hub id
    revision: str = ""  # "early" = a world model in the middle of learning; or a Hub revision
    start: str = ""  # in front of every text: "" = the rule, none, bos, eos, or a token's text
    device: str = "auto"
    dtype: str = "auto"
    device_map: str = ""  # accelerate's, e.g. balanced, over several GPUs
    # the facts
    facts: str = "world"  # world (asked plainly of other models), a file or a Hub dataset id
    fact: str = ""  # one fact's id; "" = a sample
    subject: str = ""  # a typed fact: subject, prompt with one {}, object, target
    prompt: str = ""
    object: str = ""
    target: str = ""
    n_edited: int = Field(10, ge=1)
    harmless: float = Field(0, ge=0, lt=1)  # share of n_edited: wrong facts edited to the truth
    n_intrinsic: int = Field(20, ge=0)  # facts that are only watched
    answer_in_subject: bool = False  # take also facts whose subject names the true object
    margin: float = Field(0.1, ge=0, lt=1)  # lead of a known fact's true token over the second
    # matched: both groups of the same relations; paper: no shared subject, relation, object
    split_rule: Literal["matched", "paper"] = "matched"
    paraphrases: int = Field(1, ge=1)  # statements an edit sees, its prompt included
    # held_out: a dataset's rephrasings, which then judge no more
    paraphrase_source: Literal["templates", "file", "held_out"] = "templates"
    # the edit
    editor: str = "rome"
    variant: Literal["", "published", "paper", "reference"] = ""  # of the editor's preset
    hparams: dict = Field(default_factory=dict)  # fields of the editor's HParams to change
    layers: tuple[int, ...] = ()  # edited blocks
    edits_per_model: int = Field(10, ge=1)  # facts edited at once into one copy of the model
    # of second moments and lenses: "" = world for the world's models, else manual-and-facts;
    # wikipedia, a file or a Hub dataset id
    corpus: str = ""
    # the data to tune on
    task: str = "text"
    task_data: str = ""  # "" = the embedded world's
    columns: dict = Field(default_factory=dict)  # the task's name of a column -> the data's
    n_train: int = Field(0, ge=0)  # rows
    n_valid: int = Field(0, ge=0)  # rows
    # training: rows trained on, as in arXiv 2507.14198
    validation: Literal["apart", "training"] = "apart"
    loss_on: Literal["response", "all"] = "response"  # of instructions
    # the tuning
    plan: str = "all"  # which weights may move
    max_steps: int = Field(0, ge=0)  # optimiser steps
    eval_every: int = Field(0, ge=0)  # steps
    batch_size: int = Field(0, ge=0)  # rows
    learning_rate: float = Field(0, ge=0)
    threshold: float = 0.0  # validation metric that ends the tuning
    patience: int = Field(0, ge=0)  # evaluations without a better metric that end it; 0 = never
    max_tokens: int = Field(0, ge=0)  # of training; 0 = no such budget
    trainer: dict = Field(default_factory=dict)  # further transformers.TrainingArguments
    protect: str = ""  # replay, others, replay+kl, span, replay+span or one of your own
    protect_weight: float = Field(0, ge=0)  # its strength; 0 = the protection's own
    # its adapter
    adapter: Literal["", "lora", "dora"] = ""
    adapter_rank: int = Field(0, ge=0)
    adapter_alpha: float = Field(0, ge=0)
    adapter_dropout: float = Field(0, ge=0, lt=1)
    adapter_targets: tuple[str, ...] = ()  # last names of modules; () = every linear one that moves
    # what is looked at beside the probes, and through which lens each block is read
    lens: Literal["logit", "tuned", "jacobian"] = "logit"
    measures: tuple[str, ...] = ()  # names of registered measures, a table of the run each
    seed: int = Field(0, ge=0)  # of facts, prefixes and data order

    @model_validator(mode="before")
    @classmethod
    def _only_given(cls, fields: dict) -> dict:
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of(cls, names: Mapping, **others) -> "Spec":
        """The Spec of a notebook's parameters: of `globals()`, whatever is named as a field, but
        for modules (`lens`); and of other fields.
        """
        given = {name: names[name] for name in cls.model_fields if name in names}
        given = {name: value for name, value in given.items() if not isinstance(value, ModuleType)}
        return cls(**given | others)

    def resolved(self) -> "Spec":
        """The same experiment with the task's usual numbers in the place of zeros, and of one fact
        if one is named; names are checked, nothing heavy is loaded.
        """
        editing.EDITORS.check(self.editor)
        plans.parsed(self.plan)
        if self.protect:
            numbers.PROTECTIONS.check(self.protect)
        for name in self.measures:
            MEASURES.check(name)
            if name in runs.OF_EVERY_RUN:
                raise BadInput(f"measure {name!r}: is a table of every run; choose another name")
        usual = numbers.usual(self.task, self.task_data, self.model).model_dump()
        if self.adapter:
            usual |= numbers.presets()["adapter"]
            usual["learning_rate"] = usual["adapter_learning_rate"]
        unset = {name: usual[name] for name in usual if getattr(self, name, None) == 0}
        if self.fact or self.subject:
            unset |= {"n_edited": 1, "edits_per_model": 1}
        kinds = [kind for kind in ("protect", "adapter") if not getattr(self, kind)]
        for name, field in type(self).model_fields.items():
            if any(name.startswith(f"{kind}_") for kind in kinds):  # of what there is none
                unset[name] = field.default
        return self.model_copy(update=unset)

    @property
    def source(self) -> str:
        """Where the facts come from: the world's are asked plainly of a model not taught them."""
        is_world = checkpoints.is_world(self.model)
        if self.facts == "plain" and is_world:
            what = f"facts 'plain': their roles are not those of {self.model}'s training"
            raise BadInput(f"{what}; choose 'world', or another model")
        return "plain" if self.facts == "world" and not is_world else self.facts

    def part(self, kind: type[Part], **others) -> Part:
        """What one room needs of it: a record of its fields by the same names, and these others."""
        shared = type(self).model_fields.keys() & kind.model_fields.keys()
        return kind(**{name: getattr(self, name) for name in shared} | others)

    def editor_hparams(self, model: "Model | str") -> "Numbers":
        """The editor's hyper-parameters: the preset for the model, changed by `hparams` and
        `layers`; of a mere name, layers unchecked.
        """
        if self.layers and "layers" in self.hparams:
            raise BadInput("layers are given twice, as layers and in hparams; leave one out")
        changes = dict(self.hparams)
        if self.layers:
            changes["layers"] = list(self.layers)
        base = editing.preset(self.editor, model, variant=self.variant)
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
        where they are not known before loading.

        Raises:
            BadInput: editor, layers and plan do not go together on this model.
        """
        model = self.outline()
        if model is None or self.editor in editing.EDITORS.pending:
            return None
        with warnings.catch_warnings(action="ignore"):  # that layers are proposed from the depth
            edited = list(self.editor_hparams(model).layers)
        if not edited and "edited" in self.plan and self.editor not in editing.NAMES:
            return None  # a function of one's own may choose them
        table = plans.resolve(model, self.plan, edited).table(model)
        return edited, set(table.index[table.trainable > 0]), model.n_blocks


def varied(spec: Spec, vary: str, values: Sequence) -> list[Spec]:
    """The Specs, resolved, that differ in one field."""
    if not isinstance(vary, str) or vary not in Spec.model_fields:
        near = did_you_mean(vary, Spec.model_fields) or ";"
        what = f"vary={vary!r}: not a field of Spec{near}"
        raise BadInput(f"{what} choose e.g. editor, paraphrases, plan")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise BadInput(f"values {values!r}: give a list of at least one value of {vary}")
    specs = [Spec(**(spec.model_dump() | {vary: value})).resolved() for value in values]
    if any(one == other for one, other in combinations(specs, 2)):
        what = f"values {values!r}: two of {vary} make the same experiment"
        raise BadInput(f"{what}; leave one out (one that names a fact is of one fact)")
    return specs


def _check_units(base: "Numbers", changes: Mapping) -> None:
    """BadInput if a number is given that the proposed ones count in another unit than the
    published.
    """
    if getattr(base, "ridge_unit", "absolute") == "absolute":
        return
    for name, unit in (("ridge", "ridge_unit"), ("threshold", "null_space")):
        if name in changes and unit not in changes:
            counted = f"{name} {changes[name]} counts by {unit}, which is {getattr(base, unit)!r}"
            where = "where no preset is published"
            raise BadInput(f"hparams: {counted} {where}; give {unit} too (absolute as published)")


def arms(spec: Spec, vary: str, values: Sequence) -> Sequence:
    """The values of the field that varies: the one that the Spec was given for it, else all."""
    return [getattr(spec, vary)] if vary in [*spec.model_fields_set] else values


@cache
def code_fingerprint() -> str:
    """Of every Python file that determines a result, of the presets, the layouts of facts files,
    the names that portability asks by and the list of stop words, which do as much.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    tables = [*folder.rglob("presets.yaml"), *folder.rglob("hops.yaml"), folder / "layouts.yaml"]
    for path in sorted([*folder.rglob("*.py"), *tables]):
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
    embedded = [*facts.DATA.glob("world/facts.csv"), *facts.DATA.glob("*/*.yaml")]
    for path in sorted(embedded):
        digest.update(path.read_bytes())
    named = [(editing.EDITORS, spec.editor), (numbers.TASKS, spec.task)]
    named += [(MEASURES, measure) for measure in spec.measures]
    named += [(numbers.PROTECTIONS, spec.protect)] if spec.protect else []
    registered = "".join(registry.fingerprint(one) for registry, one in named)
    digest.update((code_fingerprint() + registered + cells).encode())
    return f"{name}-{spec.editor}-{spec.task}-{digest.hexdigest()[:10]}"
