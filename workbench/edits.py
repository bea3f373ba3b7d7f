"""What an edit is: applied to a model for the length of a `with`, saved, loaded, added to others.

Changed weights (`deltas.WeightDelta`) are one kind. The other kinds here leave the weights alone: a
`Codebook` answers for chosen keys of one layer, a `Context` stands in front of what is asked.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from workbench import words
from workbench.activations import replaced
from workbench.facts import BadInput
from workbench.models import Model
from workbench.positions import statement


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Edit:
    """An edit of one model. A kind says what it does while it is applied, and what is saved of it.

    Attributes:
        model: name of the model it was made for; revision and fingerprint with it.
        record: everything needed to make it again: editor, hparams, requests, prefixes, seed,
            fingerprint of the moments; and which requests took. Of a sum: `parts`, one of each.
    """

    model: str
    revision: str
    fingerprint: str
    record: Mapping = field(default_factory=dict)

    kinds: ClassVar[dict[str, type["Edit"]]] = {}  # by class name: what a file can hold
    in_tensors: ClassVar[tuple[str, ...]] = ()  # names of the fields that hold tensors

    def __init_subclass__(cls):
        Edit.kinds[cls.__name__] = cls

    @classmethod
    def of(cls, model: Model, **about) -> Self:
        """An edit for this model, with no record yet."""
        about |= {"model": model.name, "revision": model.revision}
        return cls(fingerprint=model.fingerprint, **about)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that it touches."""
        return ()

    @property
    def parts(self) -> list[Mapping]:
        """The record of each edit that it is the sum of; an empty one where no editor made it."""
        return list(self.record.get("parts", [self.record]))

    @property
    def outcomes(self) -> list[dict]:
        """Of each request, in order: `fact`, `p_solved`, `p_after` and whether it `took`."""
        return [outcome for part in self.parts for outcome in part.get("outcomes", ())]

    def __repr__(self) -> str:
        by = " + ".join(dict.fromkeys(part.get("editor", "by hand") for part in self.parts))
        took = sum(outcome["took"] for outcome in self.outcomes)
        where = f", layers {list(self.layers)}" if self.layers else ""
        share = f"{took} of {len(self.outcomes)} edits took"
        return f"<{type(self).__name__} {by}: {share}{where}, of {self.model}>"

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The edited model, for the length of the `with`; afterwards bit for bit as before.

        Raises:
            BadInput: the edit was made for other weights.
        """
        self.check_made_for(model)
        model.in_force.append(self)
        try:
            yield model
        finally:
            model.in_force.remove(self)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change of each weight; none where no weight changes."""
        return {}

    def before(self, text: str) -> str:
        """What the edit puts in front of a text that the model is asked."""
        return ""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        return {name: getattr(self, name) for name in self.in_tensors}

    def settings(self) -> dict[str, Any]:
        """What else is to be saved: every field that holds no tensor."""
        names = [one.name for one in fields(self) if one.name not in self.in_tensors]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> Self:
        """The edit that these were saved of."""
        return cls(**tensors, **settings)

    def check_made_for(self, model: Model) -> None:
        """BadInput if it was made for other weights."""
        if self.fingerprint != model.fingerprint:
            made_for = f"{self.model} ({self.fingerprint}), not for {model.name}"
            raise BadInput(f"the edit is for {made_for} ({model.fingerprint}); make it again")

    def sum_with(self, other: "Edit", **changes) -> Self:
        """This edit with other fields and the records of both. They must be of one model and kind.

        For the kinds' own `+`.
        """
        if type(self) is not type(other):
            kinds = f"{type(self).__name__} and {type(other).__name__}"
            raise BadInput(f"{kinds} cannot be added; apply one inside the other")
        if self.fingerprint != other.fingerprint:
            models = f"{self.model} {self.fingerprint}, {other.model} {other.fingerprint}"
            raise BadInput(f"edits of two models cannot be added ({models}); make one again")
        return replace(self, record={"parts": [*self.parts, *other.parts]}, **changes)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Codebook(Edit):
    """Values that one down-projection puts out in place of its own, near chosen keys.

        h(x) = v_i  if |x - k_i| <= r_i for the nearest key k_i,  else  W x

    Attributes:
        layer: block of the down-projection.
        keys: (n, d_in), float32, what goes into it.
        values: (n, d_model), float32, what then comes out.
        radii: (n,), float32, how far from a key it answers.
    """

    layer: int
    keys: Tensor
    values: Tensor
    radii: Tensor
    in_tensors = ("keys", "values", "radii")

    def __post_init__(self):
        if not all(tensor.isfinite().all() for tensor in self.tensors().values()):
            raise BadInput("the codebook holds NaN or infinite numbers; lower the learning rate")

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        with super().applied(model), replaced(model.down_projection(self.layer), self.looked_up):
            yield model

    def looked_up(self, output: Tensor, key: Tensor) -> Tensor:
        """The output (..., d_model), with the value of the nearest key where one is near enough."""
        keys, values, radii = (tensor.to(output.device) for tensor in self.tensors().values())
        distance, nearest = self.distances(key, keys).min(-1)
        inside = distance <= radii[nearest]
        return torch.where(inside[..., None], values[nearest].to(output.dtype), output)

    @staticmethod
    @torch.no_grad()
    def distances(key: Tensor, keys: Tensor) -> Tensor:
        """Of every vector of `key` (..., d_in) to every one of `keys` (n, d_in): (..., n).

        By differences: the product form loses what is near to rounding.
        """
        flat = key.reshape(-1, key.shape[-1]).float()
        distance = torch.cdist(flat, keys, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.view(*key.shape[:-1], len(keys))

    def __add__(self, other: "Codebook") -> "Codebook":
        """Both: where two keys are nearer than their radii, each answers up to half way."""
        summed = self.sum_with(other)
        if self.layer != other.layer:
            raise BadInput("codebooks of two layers cannot be added; apply one inside the other")
        theirs = {name: tensor.to(self.keys.device) for name, tensor in other.tensors().items()}
        half = self.distances(self.keys, theirs["keys"]) / 2
        nearest = torch.cat([half.min(1).values, half.min(0).values])
        mine = self.tensors()
        joined = {name: torch.cat([mine[name], theirs[name]]) for name in mine}
        return replace(summed, **joined | {"radii": joined["radii"].minimum(nearest)})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Context(Edit):
    """Statements that stand in front of what the model is asked; its weights stay as they are.

    Training texts get nothing in front: an edit in context is made by whoever asks.

    Attributes:
        statements: (subject, statement) of every fact.
        scope: "subject": a statement stands before the texts that name its subject; "all": every
            statement before every text, whoever it is about.
    """

    statements: tuple[tuple[str, str], ...]
    scope: Literal["subject", "all"] = "subject"

    def before(self, text: str) -> str:
        facts = ""
        for subject, stated in self.statements:
            if self.scope == "all" or words.mentions(text, subject):
                facts += f"New Fact: {stated}\n"
        return f"{facts}Prompt: " if facts else ""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping) -> Self:
        pairs = tuple(map(tuple, settings["statements"]))
        return cls(**dict(settings) | {"statements": pairs})

    def __add__(self, other: "Context") -> "Context":
        """Both; what is stated later stands nearer to the question."""
        return self.sum_with(other, statements=self.statements + other.statements)


def stated(prompt: str, subject: str, target: str) -> str:
    """A fact as a sentence: the prompt with its subject and its answer."""
    return f"{statement(prompt.replace('{}', subject, 1), target)}."
