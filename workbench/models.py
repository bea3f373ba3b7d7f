"""Load a causal language model; the one table of architectures; where its blocks, MLPs, norm and
head are.
"""

import dataclasses
import gc
import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import psutil
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import GELUTanh, NewGELUActivation

from workbench import checkpoints
from workbench.facts import BadInput

DTYPES = ("auto", "float32", "bfloat16", "float16")
SIZES = (  # of a configuration, by every name that a family has for them
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MOST_BLOCKS, MOST_WEIGHTS = 4_096, 1e13  # beyond any model that there is
NO_SHAPE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_cache",
}  # of a configuration: nothing that the logits depend on


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Dotted module names of one model family, counted from the network; `mlp` and the rest from
    the block.

    `transposed` is True where the down-projection is a Conv1D, which stores (d_in, d_out); a Linear
    stores (d_out, d_in).
    """

    blocks: str
    mlp: str
    down_projection: str
    final_norm: str
    unembedding: str
    embeddings: tuple[str, ...]
    transposed: bool = False


_LLAMA = Architecture(
    blocks="model.layers",
    mlp="mlp",
    down_projection="mlp.down_proj",
    final_norm="model.norm",
    unembedding="lm_head",
    embeddings=("model.embed_tokens",),
)
_GPT2 = Architecture(
    blocks="transformer.h",
    mlp="mlp",
    down_projection="mlp.c_proj",
    final_norm="transformer.ln_f",
    unembedding="lm_head",
    embeddings=("transformer.wte", "transformer.wpe"),
    transposed=True,
)

# config.model_type -> row. To add a family, name its modules here; tests/test_models.py then checks
# the row on a tiny model, and
# `load` checks it on the model itself: blocks must add the down-projection's output to the residual
# stream as it is.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _GPT2,
    "gptj": replace(
        _GPT2, down_projection="mlp.fc_out", embeddings=("transformer.wte",), transposed=False
    ),
    "gpt_neox": replace(
        _LLAMA,
        blocks="gpt_neox.layers",
        down_projection="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        embeddings=("gpt_neox.embed_in",),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "granite": _LLAMA,
    "phi": replace(_LLAMA, down_projection="mlp.fc2", final_norm="model.final_layernorm"),
    "opt": replace(
        _LLAMA,
        blocks="model.decoder.layers",
        mlp="fc2",
        down_projection="fc2",
        final_norm="model.decoder.final_layer_norm",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ),
}
# Families of which no row would be right.
NORM_BEHIND = ("gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3")


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A network with its tokenizer and the row of its architecture. Layers are block indices from
    0.

    `start`: what stands in front of every text; "" is the rule of `positions.front`. `in_force`:
    edits that are applied now and leave the weights as they are.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    name: str
    revision: str = ""
    start: str = ""
    in_force: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        width = self.network.get_submodule(self.architecture.unembedding).weight.shape[1]
        for layer in (0, self.n_blocks - 1):
            if self.weight(layer).shape[0] != width:
                raise BadInput(
                    f"{self.name}: the architecture row's `transposed` does not fit, {self.down_projection_name(layer)} writes {width} numbers"
                )

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.get_submodule(self.architecture.blocks)

    @property
    def final_norm(self) -> nn.Module:
        return self.network.get_submodule(self.architecture.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        return self.network.get_submodule(self.architecture.unembedding)

    @property
    def devices(self) -> set[torch.device]:
        """Where its weights are; several under a device map."""
        return {parameter.device for parameter in self.network.parameters()}

    def block_name(self, layer: int) -> str:
        return f"{self.architecture.blocks}.{layer}"

    def mlp(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(self.architecture.mlp)

    def down_projection_name(self, layer: int) -> str:
        return f"{self.block_name(layer)}.{self.architecture.down_projection}"

    def down_projection(self, layer: int) -> nn.Module:
        return self.network.get_submodule(self.down_projection_name(layer))

    def weight(self, layer: int) -> torch.Tensor:
        """The down-projection as W (d_out, d_in), a view of the parameter whatever way it is
        stored.
        """
        weight = self.down_projection(layer).weight
        return weight.T if self.architecture.transposed else weight

    def check_layers(self, layers) -> list[int]:
        """The layers as a sorted list; BadInput if one is not a block."""
        for layer in layers:
            if not 0 <= layer < self.n_blocks:
                raise BadInput(f"layer {layer}: {self.name} has blocks 0 to {self.n_blocks - 1}")
        return sorted(set(layers))

    def check_one_device(self, what: str) -> None:
        """BadInput if a device map has spread the model over several."""
        if len(self.devices) > 1:
            raise BadInput(
                f"{what}: does not work on a model that device_map spreads over several devices; load it on one"
            )

    def check_length(self, input_ids: torch.Tensor, what: str = "a text") -> None:
        """BadInput if rows of tokens are longer than the model's positions."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit and input_ids.shape[1] > limit:
            raise BadInput(
                f"{what}: {input_ids.shape[1]} tokens, {self.name} has {limit} positions; shorten the text"
            )

    def logits_at(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits (m, vocab), float32, after places of some rows; the head runs at the
        named positions only.

        Args:
            positions: (m,).
            rows: (m,), the row of each position; by default one position a row.
        """
        self.check_length(input_ids)
        wanted, column = positions.unique(return_inverse=True)
        rows = torch.arange(len(input_ids)) if rows is None else rows
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=wanted,
            use_cache=False,
        )
        return output.logits[rows.to(column.device), column].float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the configuration and of names and bytes of the weights as
        they were when first asked for.
        """
        self.__dict__["_sums"] = self._bit_sums()
        shape = {
            name: value
            for name, value in self.network.config.to_dict().items()
            if name not in NO_SHAPE
        }
        digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def is_changed(self) -> bool:
        """Whether an edit is in force, or the weights are other ones than those of the fingerprint:
        a sum over the bits of each, much faster than the hash.
        """
        if self.in_force:
            return True
        return bool(self.fingerprint) and self._bit_sums() != self.__dict__["_sums"]

    def check_unchanged(self, what: str) -> None:
        """BadInput if what is to be kept under the fingerprint would come from other weights."""
        if self.is_changed():
            raise BadInput(
                f"{what}: the weights of {self.name} have been changed since they were read; take the change back, or save and load them"
            )

    def _bit_sums(self) -> list[int]:
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return [
            int(tensor.detach().view(same_size[tensor.element_size()]).sum())
            for tensor in self.network.state_dict().values()
        ]


def load(
    name: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    revision: str = "",
    device_map: str | dict = "",
    start: str = "",
) -> Model:
    """Load a model in evaluation mode.

    Args:
        name: "world-gpt2", "world-llama", a folder in Hugging Face layout, or a Hub id; of that,
            what is not in the cache is fetched.
        device: "auto" (CUDA, else MPS, else CPU) or a torch device.
        dtype: "auto" (fp32 on CPU and MPS, the checkpoint's on CUDA), "float32", "bfloat16" or
            "float16".
        revision: Hub revision, pinned to its commit in `Model.revision`; for the world models "" or
            "early", a checkpoint in the middle of learning.
        device_map: accelerate's, e.g. "balanced", to spread the blocks over several GPUs; `device`
            must then be "auto". Nothing is offloaded: weights that fit on no GPU are refused, as
            editors and fine-tuning write into them.
        start: what stands in front of every text: "" is the rule of `positions.front`, "none",
            "bos", "eos", or a token's text.
    Raises:
        BadInput: no such model, files missing (which), pickled weights only, an architecture
            without a row, too little memory.
    """
    if device_map and device != "auto":
        raise BadInput(
            f"device {device!r} and device_map exclude each other; leave one of them out"
        )
    at = device_named(device)
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r}: choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    check_memory(name, at, dtype, revision, device_map)
    folder, commit = checkpoints.fetched(str(name), revision)
    config = _configuration(str(name), folder)
    placed = device_map or (
        {"": at} if at.type == "cuda" else None
    )  # straight onto the GPU, not by way of the main memory
    try:
        wanted = dtype if dtype != "auto" or at.type == "cuda" or device_map else "float32"
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=placed,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if report["missing_keys"]:  # transformers would leave them random
            raise ValueError(f"no weights for {min(report['missing_keys'])}")
        if not tokenizer.vocab_size:  # transformers makes an empty one where there is none
            raise ValueError("no tokenizer")
    except torch.OutOfMemoryError:
        raise BadInput(
            f"model {str(name)!r}: {at} ran out of memory while it was loaded; use dtype='bfloat16', or several GPUs"
        ) from None
    except (
        Exception
    ) as error:  # a broken folder fails in many libraries, each with its own exception
        raise BadInput(_broken(name, error)) from None
    if "disk" in (spread := set(getattr(network, "hf_device_map", {}).values())) or (
        len(spread) > 1 and "cpu" in spread
    ):
        raise BadInput(
            f"model {str(name)!r}: does not fit on the GPUs, part of it would be offloaded; use dtype='bfloat16' or more GPUs"
        )
    if not placed:
        network.to(at)
    fuse(network.eval().requires_grad_(False))
    network.name_or_path = str(name)  # not the cache's folder: adapters say what they were made for
    network.loss_type = "ForCausalLM"  # else transformers finds the same by itself, and warns
    model = Model(
        network=network,
        tokenizer=tokenizer,
        architecture=architecture_of(network.config),
        name=str(name),
        revision=commit or revision,
        start=start,
    )
    check_row(model)
    return model


@torch.no_grad()
def check_row(model: Model) -> None:
    """Try the row of the architecture on the model itself, in one pass over two equal short texts.

    A vector that is added to one of them at a down-projection must move the block's output by that
    vector, and the head on the final norm of the last block must be the logits.

    Raises:
        BadInput: it is not so, by more than the dtype rounds.
    """
    config, layer = model.network.config, model.n_blocks // 2
    length = min(4, getattr(config, "max_position_embeddings", None) or 4)
    ids = torch.arange(length, device=model.network.get_input_embeddings().weight.device)
    ids = (ids % config.vocab_size).expand(2, -1)  # (2, length)
    direction = torch.randn(
        length, model.weight(layer).shape[0], generator=torch.Generator().manual_seed(0)
    )
    seen = {}

    def entering(module, args):
        seen["size"] = args[0][1].float().norm(dim=-1, keepdim=True).cpu()  # (length, 1)

    def adding(module, args, output):
        vector = direction * seen["size"] / direction.norm(dim=-1, keepdim=True)
        both = torch.stack([torch.zeros_like(vector), vector]).to(output)  # (2, length, d_model)
        seen["vector"] = both[1].float()
        return output + both.view_as(output)

    def leaving(name):
        def hook(module, args, output):
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(model.blocks[layer].register_forward_pre_hook(entering))
        hooks.enter_context(model.down_projection(layer).register_forward_hook(adding))
        hooks.enter_context(model.blocks[layer].register_forward_hook(leaving("block")))
        hooks.enter_context(model.blocks[-1].register_forward_hook(leaving("last")))
        logits = model.network(input_ids=ids, use_cache=False).logits
    plain, moved = seen["block"].float()
    off = _share(moved - plain, seen["vector"].to(plain.device))
    rounding = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    what = f"model {model.name!r}: blocks of {config.model_type!r}"
    if off > rounding:
        raise BadInput(
            f"{what} do not add the MLP's output to the residual stream as it is ({off:.0%} off: a norm or "
            "a factor stands behind it), so that no edit there is exact; choose another model"
        )
    head = model.unembedding(model.final_norm(seen["last"]))
    if (off := _share(head, logits.to(head.device))) > rounding:
        raise BadInput(
            f"{what} lead to other logits than its head on the final norm ({off:.0%} off: a factor or a cap "
            "stands behind it), so that no lens would be right; choose another model"
        )


def _share(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far one is from the other, as a share of it."""
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def fuse(network: nn.Module) -> None:
    """GPT-2's GELU by torch's one kernel instead of eight, on a CPU a fifth off the time of an
    edit; the same function, rounded once.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh().train(child.training))


def outline(name: str, revision: str = "", here: bool = False) -> Model:
    """The model without weights and tokenizer: what plans, editors' layers and estimates of memory
    need of it.

    Args:
        here: of a Hub id read only what the cache has, ask nothing.
    Raises:
        BadInput: no such model, a broken configuration, an architecture without a row.
    """
    folder = checkpoints.configuration(name, revision, here)
    return _outline(name, revision, folder, (folder / "config.json").stat().st_mtime_ns)


@cache
def _outline(name: str, revision: str, folder: Path, written: int) -> Model:
    config = _configuration(name, folder)
    try:
        with torch.device("meta"):
            network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise BadInput(_broken(name, error)) from None
    return Model(
        network=network,
        tokenizer=None,
        architecture=architecture_of(config),
        name=name,
        revision=revision,
    )


def speaker(name: str, revision: str = "", start: str = "") -> Model:
    """The outline with its tokenizer: what stands in front of a text needs no weights.

    Of a Hub id only the cache is read.
    """
    folder = checkpoints.configuration(name, revision, here=True)
    if "tokenizer.json" in checkpoints.missing(folder):
        raise BadInput(f"model {name!r}: no tokenizer in it")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise BadInput(_broken(name, error)) from None
    return replace(outline(name, revision, here=True), tokenizer=tokenizer, start=start)


def _configuration(name: str, folder: Path) -> transformers.PretrainedConfig:
    """A model's configuration. No code that comes with it is run, and nobody is asked whether it
    should be.

    The family is read from the file itself, so that only families of the table reach transformers,
    which has the code of each.

    Raises:
        BadInput: no row for its family, code of its own (also as kernels from the Hub), sizes that
            no model has, or broken.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
            raise ValueError("config.json names no model_type")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(_broken(name, error)) from None
    _check_family(fields["model_type"], "auto_map" in fields)
    for field in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(fields.get(field)):
            raise BadInput(
                f"model {name!r}: its config.json names code from the Hub in {field!r}, which is not run; take the field out"
            )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_sizes(name, config)
        architecture_of(config)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_broken(name, error)) from None
    return config


def _check_sizes(name: str, config: transformers.PretrainedConfig) -> None:
    """BadInput if a configuration asks for a model that cannot be: building even its outline would
    take hours or all memory.
    """
    sizes = {field: getattr(config, field, None) for field in SIZES}
    for field, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise BadInput(
                f"model {name!r}: {field} in its config.json is {size!r:.80}; it must be a whole number of at least 1"
            )
    width, blocks = sizes["hidden_size"] or 1, sizes["num_hidden_layers"] or 1
    weights = blocks * 4 * width**2 + width * max(size or 1 for size in sizes.values())
    if blocks > MOST_BLOCKS or weights > MOST_WEIGHTS:
        size = f"{blocks:,} blocks and at least {weights:.1e} weights"
        raise BadInput(
            f"model {name!r}: its config.json asks for {size:.60}, more than any model has; look for a mistyped size"
        )


def weights_bytes(model: Model, dtype: str) -> int:
    """Bytes of the parameters in a dtype; "auto" = the one that the configuration names."""
    named = (
        getattr(torch, dtype) if dtype != "auto" else model.network.config.dtype or torch.float32
    )
    return sum(parameter.numel() for parameter in model.network.parameters()) * named.itemsize


def free_bytes(*devices: torch.device) -> int:
    """Free memory of these devices together; what torch keeps of a GPU's memory for later counts as
    free.
    """
    if not (found := {device for device in devices if device.type == "cuda"}):
        return psutil.virtual_memory().available
    gc.collect()
    torch.cuda.empty_cache()
    return sum(torch.cuda.mem_get_info(device)[0] for device in found)


def all_gpus() -> list[torch.device]:
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def check_memory(
    name: str | Path,
    device: torch.device,
    dtype: str,
    revision: str = "",
    device_map: str | dict = "",
) -> None:
    """BadInput if the weights will not fit in the free memory: an estimate from the configuration,
    before anything is fetched or loaded.
    """
    needed = weights_bytes(
        outline(str(name), revision),
        dtype if dtype != "auto" or device.type == "cuda" else "float32",
    )
    if needed > (free := free_bytes(device, *(all_gpus() if device_map else ()))):
        smaller = "" if dtype == "bfloat16" else "dtype='bfloat16', "
        raise BadInput(
            f"model {str(name)!r}: its weights take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device.type}; use {smaller}a "
            "smaller model, or device_map='balanced' over several GPUs"
        )


def _check_family(family: str, own_code: bool = False) -> None:
    if family in NORM_BEHIND and family not in ARCHITECTURES:
        raise BadInput(
            f"architecture {family!r} puts a norm behind each MLP, so that no edit of its weights is exact; "
            f"choose a model of {', '.join(ARCHITECTURES)}"
        )
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        code = " and brings code of its own (auto_map), which is not run" if own_code else ""
        raise BadInput(
            f"architecture {family!r} is not in the table ({known}){code}; add a row to ARCHITECTURES in workbench/models.py"
        )


def architecture_of(config: transformers.PretrainedConfig) -> Architecture:
    """The row of a model's family."""
    _check_family(config.model_type)
    if not getattr(config, "do_layer_norm_before", True):  # OPT 350m alone
        raise BadInput(
            f"architecture {config.model_type!r} with its norms behind the blocks cannot be edited; choose another size"
        )
    return ARCHITECTURES[config.model_type]


def device_named(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA (under `accelerate launch` each process its own), else
    MPS, else the CPU.
    """
    if name == "auto":
        name = (
            f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        raise BadInput(
            f"device {name!r}: not on this machine; choose auto, cpu, cuda, cuda:N or mps"
        ) from None


def _broken(name: str | Path, error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    advice = "if files are broken, save it again with save_pretrained, tokenizer included"
    return f"model {str(name)!r} cannot be loaded ({what}); {advice}"
