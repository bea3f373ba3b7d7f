"""A change of weights as a value: low-rank factors or a dense matrix a weight.

Here every kind of edit is applied for a `with`, saved and loaded; a change of weights can also be
written for good, or exported as a model.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from workbench import files, runs
from workbench.edits import Edit
from workbench.models import Model
from workbench.records import BadInput, cause

HOOKS = ("_hooks", "_hooks_with_kwargs")  # how the names of a module's tables of hooks end


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is added to one weight W (d_out, d_in): `left @ right.T` of left (d_out, r) and right
    (d_in, r), or `dense` (d_out, d_in).
    """

    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None

    def __post_init__(self):
        tensors = self.tensors()
        if set(tensors) not in ({"left", "right"}, {"dense"}):
            raise ValueError("a change is either left and right, or dense")
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        if {len(shape) for shape in shapes} != {2} or len({rank for _, rank in shapes}) > 1:
            raise ValueError(f"{list(tensors)} {shapes}: not matrices, or not of one rank")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                what = f"the change holds NaN or infinite numbers ({name})"
                raise BadInput(f"{what}; lower the learning rate or edit in float32")

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def matrix(self) -> Tensor:
        """D (d_out, d_in), float32 or wider."""
        if self.dense is not None:
            return _wide(self.dense)
        return _wide(self.left) @ _wide(self.right).T

    def __add__(self, other: "Change") -> "Change":
        if self.dense is None and other.dense is None:
            left = _beside(self.left, other.left)
            return Change(left=left, right=_beside(self.right, other.right))
        mine = self.matrix()
        return Change(dense=mine + other.matrix().to(mine.device))


def _beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right.to(left.device)], 1)


def with_keys(keys: Mapping, more: Mapping) -> dict[str, Tensor]:
    """Keys (d_in, n) by module name, with more of them behind."""
    joined = dict(keys)
    for name, added in more.items():
        joined[name] = _beside(joined[name], added) if name in joined else added
    return joined


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightDelta(Edit):
    """The change of weights that an edit makes.

    Attributes:
        changes: module name (a down-projection) -> Change.
        keys: module name -> keys (d_in, n) that AlphaEdit's next edits are to leave alone.
    """

    changes: Mapping[str, Change]
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    in_tensors = ("changes", "keys")

    def __add__(self, other: "WeightDelta") -> "WeightDelta":
        """Both changes at once."""
        summed = self.sum_with(other)
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = changes[name] + change if name in changes else change
        return replace(summed, changes=changes, keys=with_keys(self.keys, other.keys))

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose weights it changes."""
        return tuple(sorted({int(re.search(r"\.(\d+)\.", name)[1]) for name in self.changes}))

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change of each weight."""
        matrices = {name: change.matrix().double() for name, change in self.changes.items()}
        return {name: matrix.norm().item() for name, matrix in matrices.items()}

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the changed weights; BadInput too if they overflow its dtype."""
        self.check_made_for(model)
        with preserved(model.network, [f"{name}.weight" for name in self.changes]):
            write(model, self)
            yield model

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}|keys": keys for name, keys in self.keys.items()}
        for name, change in self.changes.items():
            tensors |= {f"{name}|{part}": tensor for part, tensor in change.tensors().items()}
        return tensors

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping) -> "WeightDelta":
        parts: dict[str, dict] = defaultdict(dict)
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            parts[name][part] = tensor
        keys = {name: part.pop("keys") for name, part in parts.items() if "keys" in part}
        changes = {name: Change(**part) for name, part in parts.items()}
        return cls(changes=changes, keys=keys, **settings)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the random numbers of Python, NumPy and torch go on as if nothing had been drawn
    inside.
    """
    python = random.getstate()
    array = numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)


@contextmanager
def preserved(network: nn.Module, parameters: Iterable[str] | None = None) -> Iterator[None]:
    """Whatever happens inside, afterwards the network is bit for bit as before.

    Weights are copied before and copied back, never subtracted; hooks, requires_grad, train/eval
    mode, gradients and random state are put back too. Costs the memory of one copy of the named
    parameters.

    Args:
        parameters: names of those that may change inside; None = all parameters and buffers.
    """
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    names = tensors if parameters is None else parameters
    copies = {name: tensors[name].detach().clone() for name in names}
    gradients = [(weight, weight.requires_grad, weight.grad) for weight in network.parameters()]
    modules = [(module, module.training, _hooks(module)) for module in network.modules()]
    for weight in network.parameters():
        weight.grad = None  # set aside, so that nothing inside can write into it
    try:
        with random_state_kept():
            yield
    finally:
        with torch.no_grad():
            for name, saved in copies.items():
                tensors[name].copy_(saved)
        for weight, requires_grad, grad in gradients:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for module, training, hooks in modules:
            module.training = training
            for name, saved in hooks.items():
                getattr(module, name).clear()
                getattr(module, name).update(saved)


def _hooks(module: nn.Module) -> dict:
    kept = {name: value for name, value in vars(module).items() if name.endswith(HOOKS)}
    return {name: value.copy() for name, value in kept.items() if isinstance(value, dict)}


def applied(model: Model, edit: Edit) -> AbstractContextManager[Model]:
    """The edited model, for the length of the `with`; afterwards bit for bit the model from before,
    also after an exception.

    Raises:
        BadInput: the edit was made for other weights, or does not fit in the model's dtype.
    """
    return edit.applied(model)


@torch.no_grad()
def write(model: Model, delta: WeightDelta) -> None:
    """Add the change to the weights for good: computed in float32 or wider, rounded once to the
    model's dtype; all weights or none.
    """
    edited = []
    for name, change in delta.changes.items():
        weight = model.network.get_submodule(name).weight
        matrix = change.matrix().to(weight.device)
        if model.architecture.transposed:
            matrix = matrix.T
        if matrix.shape != weight.shape:
            shapes = f"{tuple(matrix.shape)}, the weight {tuple(weight.shape)}"
            raise BadInput(f"the delta of {name} is {shapes}; it is of another model")
        changed = (weight.to(matrix.dtype) + matrix).to(weight.dtype)
        if not changed.isfinite().all():
            raise BadInput(f"{name}: the edit overflows {weight.dtype}; load it in float32")
        edited.append((weight, changed))
    for weight, changed in edited:
        weight.copy_(changed)


def save(edit: Edit, path: str | Path) -> Path:
    """One safetensors file: the tensors, and everything else in its header.

    Written under a temporary name, then renamed.
    """
    path = Path(path)
    tensors = packed(edit)
    about = bytes(tensors.pop("about").tolist()).decode()
    with files.written(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={"workbench": about})
    return path


def load(path: str | Path) -> Edit:
    """An edit that `save` wrote."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["workbench"])
        tensors = safetensors.torch.load_file(path)
        kind = about.pop("kind", WeightDelta.__name__)
        return Edit.kinds[kind].restored(tensors, about)
    except Exception as error:  # also what a change refuses, which names no file
        raise BadInput(f"{path}: not an edit ({cause(error)}); make it again") from None


def packed(edit: Edit) -> dict[str, torch.Tensor]:
    """The edit as tensors alone, on the CPU: what else it holds is the bytes of `about`."""
    text = json.dumps({"kind": type(edit).__name__} | edit.settings(), default=dict)
    about = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    tensors = edit.tensors()
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in tensors}
    return plain | {"about": about}


def unpacked(tensors: Mapping[str, torch.Tensor]) -> Edit:
    """The edit that `packed` made these of."""
    parts = dict(tensors)
    about = json.loads(bytes(parts.pop("about").tolist()))
    return Edit.kinds[about.pop("kind")].restored(parts, about)


def export(model: Model, delta: Edit, folder: str | Path) -> Path:
    """The edited model as an ordinary Hugging Face folder, delta and record beside it; the model
    itself stays as it was.
    """
    if not isinstance(delta, WeightDelta):
        what = f"{type(delta).__name__}: is no change of weights, so no ordinary model holds it"
        raise BadInput(f"{what}; save it (deltas.save) and apply it, or choose another editor")
    folder = files.check_new(folder)
    with runs.new_folder(folder.parent, folder.name) as partial:
        with applied(model, delta):
            model.network.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        save(delta, partial / "delta.safetensors")
        record = json.dumps(dict(delta.record), indent=1, ensure_ascii=False)
        (partial / "edit.json").write_text(record, encoding="utf-8")
    return folder
