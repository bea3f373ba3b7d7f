"""LoRA and DoRA through peft, for the length of a `with`: arXiv 2106.09685 and 2402.09353."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from transformers.pytorch_utils import Conv1D

from workbench import deltas
from workbench.facts import BadInput
from workbench.models import Model
from workbench.tuning.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter on a model.

    `plan`: its parameters, the only ones that learn; `network`: what peft made of the model.
    """

    plan: Plan
    network: peft.PeftModel

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the change is written into the weights; afterwards it stands beside them again,
        the weights bit for bit as before.
        """
        changed = []
        for name, module in self.network.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                changed.append(f"{name}.base_layer.weight")
        with deltas.preserved(self.network, changed):
            self.network.merge_adapter()
            try:
                yield
            finally:
                self.network.unmerge_adapter()

    def save(self, folder: str | Path) -> Path:
        """A PEFT folder."""
        # to save embeddings "auto" would ask the Hub
        self.network.save_pretrained(folder, save_embedding_layers=False)
        return Path(folder)


def targets(model: Model, plan: Plan, named: Sequence[str] = ()) -> list[str]:
    """The linear modules in blocks whose weights the plan moves; of these the ones whose last name
    is in `named`, if it holds any.
    """
    blocks = f"{model.architecture.blocks}."
    inside = []
    for name, module in model.network.named_modules():
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)
        if is_linear and name.startswith(blocks) and f"{name}.weight" in plan.parameters:
            inside.append(name)
    offered = {name.rpartition(".")[2] for name in inside}
    unknown = sorted(set(named) - offered)
    if unknown or not inside:
        what = f"adapter_targets {unknown}: match no linear module of plan {plan.text!r}"
        raise BadInput(f"{what}; there are {', '.join(sorted(offered)) or 'none'}")
    return [name for name in inside if not named or name.rpartition(".")[2] in named]


@contextmanager
def attached(
    model: Model,
    plan: Plan,
    kind: str,
    rank: int,
    alpha: float,
    dropout: float,
    named: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Adapter]:
    """Inside, the linear modules of the plan carry an adapter; afterwards the network has its own
    modules again, untouched.

    Args:
        kind: "lora" or "dora".
        rank, alpha: the change of a weight is alpha / rank times a product of that rank.
        dropout: of the adapter's input.
        named: last names of the modules, e.g. q_proj; () = every linear one.
    """
    modules = targets(model, plan, named)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules,
        use_dora=kind == "dora",
        fan_in_fan_out=isinstance(model.network.get_submodule(modules[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    with deltas.preserved(model.network, [f"{name}.weight" for name in modules]):
        torch.manual_seed(seed)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of its own calls
            network = peft.get_peft_model(model.network, config)
        weights = model.network.named_parameters()
        learning = tuple(name for name, weight in weights if weight.requires_grad)
        moving = Plan(text=f"{kind} on {plan.text}", parameters=learning)
        try:
            yield Adapter(plan=moving, network=network)
        finally:
            network.unload()
            vars(model.network).pop("peft_config", None)
