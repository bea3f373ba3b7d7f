"""Load a causal language model; the one table of architectures; where its parts are."""

import gc
import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import psutil
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import GELUTanh, NewGELUActivation

from workbench import checkpoints, quantised
from workbench.activations import calls, recorded, replaced
from workbench.records import BadInput, check_choice, refused

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The sizes in a configuration, by every name that a family has for them.
SIZES = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "n_inner", "ffn_dim"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
MOST_BLOCKS, MOST_WEIGHTS = 4_096, 1e13  # more than any model has
# Fields of a configuration on which the logits do not depend.
NO_SHAPE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
HUB_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation")
ATTENTIONS = ("attn", "self_attn", "attention")  # what families call it in a block
SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Dotted names of the modules of one model family.

    `mlp` and `down_projection` are counted from the block, the others from the network.
    `transposed` is True where the down-projection is a Conv1D, which stores (d_in, d_out); a
    Linear stores (d_out, d_in).
    """

    blocks: str
    mlp: str
    down_projection: str
    final_norm: str
    embeddings: tuple[str, ...]
    unembedding: str = "lm_head"
    transposed: bool = False


def _row(trunk, blocks, down_projection, final_norm, *embeddings, transposed=False) -> Architecture:
    return Architecture(
        blocks=f"{trunk}.{blocks}",
        mlp=down_projection.partition(".")[0],
        down_projection=down_projection,
        final_norm=f"{trunk}.{final_norm}",
        embeddings=tuple(f"{trunk}.{name}" for name in embeddings),
        transposed=transposed,
    )


LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "stablelm", "granite")

# config.model_type -> row. To add a family, name its modules here, all counted from the trunk but
# for the down-projection. tests/test_models.py checks the row on a tiny model, and `load` on the
# model itself: blocks must add the down-projection's output to the residual stream as it is, which
# those of Gemma 2 and 3, GLM 4 and OLMo 2 and 3 do not, for a norm behind each MLP.
ARCHITECTURES: dict[str, Architecture] = {
    #               trunk          blocks    down-projection        final norm    embeddings
    "gpt2": _row("transformer", "h", "mlp.c_proj", "ln_f", "wte", "wpe", transposed=True),
    "gptj": _row("transformer", "h", "mlp.fc_out", "ln_f", "wte"),
    "gpt_neox": _row("gpt_neox", "layers", "mlp.dense_4h_to_h", "final_layer_norm", "embed_in"),
    **dict.fromkeys(LLAMAS, _row("model", "layers", "mlp.down_proj", "norm", "embed_tokens")),
    "phi": _row("model", "layers", "mlp.fc2", "final_layernorm", "embed_tokens"),
    "opt": _row(
        "model.decoder", "layers", "fc2", "final_layer_norm", "embed_tokens", "embed_positions"
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A network, its tokenizer and the row of its architecture; layers are block indices from 0.

    `start`: what stands in front of every text; "" is the rule of `positions.front`. `in_force`:
    edits that are applied now and leave the weights as they are.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    name: str
    revision: str = ""
    start: str = ""
    in_force: list = field(default_factory=list)

    def __post_init__(self):
        width = self.unembedding.weight.shape[1]
        for layer in (0, self.n_blocks - 1):
            if self.weight(layer).shape[0] != width:
                name = self.down_projection_name(layer)
                raise BadInput(f"{self.name}: the row's `transposed` does not fit, see {name}")

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

    def attention(self, layer: int) -> nn.Module:
        children = dict(self.blocks[layer].named_children())
        return next(children[name] for name in ATTENTIONS if name in children)

    def down_projection_name(self, layer: int) -> str:
        return f"{self.block_name(layer)}.{self.architecture.down_projection}"

    def down_projection(self, layer: int) -> nn.Module:
        return self.network.get_submodule(self.down_projection_name(layer))

    def weight(self, layer: int) -> Tensor:
        """The down-projection as W (d_out, d_in): a view of the parameter, however it is stored."""
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
            raise BadInput(f"{what}: the model lies on several devices; load it on one")

    def check_length(self, input_ids: Tensor, what: str = "a text") -> None:
        """BadInput if rows of tokens are longer than the model's positions."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        length = input_ids.shape[1]
        if limit and length > limit:
            counts = f"{length} tokens, {self.name} has {limit} positions"
            raise BadInput(f"{what}: {counts}; shorten it")

    def logits_at(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits (m, vocab), float32; the head runs at the named positions only.

        Args:
            positions: (m,).
            rows: (m,), the row of each position; by default one position a row.
        """
        self.check_length(input_ids)
        kept, column = positions.unique(return_inverse=True)
        if rows is None:
            rows = torch.arange(len(input_ids))
        output = self.network(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=kept, use_cache=False
        )
        return output.logits[rows.to(column.device), column].float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the configuration and the weights when first asked for."""
        self.__dict__["_sums"] = self._bit_sums()  # of the same weights, for `is_changed`
        config = self.network.config.to_dict()
        shape = {name: value for name, value in config.items() if name not in NO_SHAPE}
        digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            content = tensor.detach().cpu().contiguous()
            digest.update(content.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def is_changed(self) -> bool:
        """Whether an edit is in force, or the weights are other ones than those of the fingerprint.

        Compares a sum over the bits of each weight, which is much faster than the hash.
        """
        if self.in_force:
            return True
        return bool(self.fingerprint) and self.__dict__["_sums"] != self._bit_sums()

    def check_unchanged(self, what: str) -> None:
        """BadInput if what is to be kept under the fingerprint would come from other weights."""
        if self.is_changed():
            changed = f"{self.name} holds an edit, or its weights have been changed"
            raise BadInput(f"{what}: {changed}; leave the `with` of the edit, or load it anew")

    def _bit_sums(self) -> list[int]:
        tensors = [tensor.detach() for tensor in self.network.state_dict().values()]
        return [int(tensor.view(SAME_SIZE[tensor.element_size()]).sum()) for tensor in tensors]


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
        device_map: accelerate's, e.g. "balanced", to spread the blocks over several GPUs (not
            tried on more than one); `device` must then be "auto". Nothing is offloaded, as editors
            and fine-tuning write into the weights.
        start: what stands in front of every text: "" is the rule of `positions.front`, "none",
            "bos", "eos", or a token's text.
    Raises:
        BadInput: no such model, files missing (which), pickled weights only, an architecture
            without a row, too little memory.
    """
    if device_map and device != "auto":
        raise BadInput(f"device {device!r} and device_map exclude each other; leave one out")
    place = device_named(device)
    check_choice("dtype", dtype, DTYPES)
    if dtype == "auto" and place.type != "cuda":
        dtype = "float32"  # on CUDA the checkpoint's
    name = str(name)
    _check_memory(outline(name, revision), place, dtype, bool(device_map))  # nothing is read yet
    folder, commit = checkpoints.fetched(name, revision)
    config = _configuration(name, folder)
    placement = device_map
    if not placement and place.type == "cuda":
        placement = {"": place}  # straight onto the GPU, not by way of the main memory
    options = {"config": config, "dtype": dtype, "device_map": placement or None}
    with _refusals(name):
        network, tokenizer = quantised.pretrained(folder, options | {"use_safetensors": True})
    places = set(getattr(network, "hf_device_map", {}).values())
    if places & {"cpu", "disk"} and places != {"cpu"}:
        raise BadInput(f"model {name!r}: does not fit on the GPUs; use dtype='bfloat16' or more")
    if not placement:
        network.to(place)
    fuse(network.eval().requires_grad_(False))
    network.name_or_path = name  # not the cache's folder: adapters say what they were made for
    network.loss_type = "ForCausalLM"  # else transformers finds the same by itself, and warns
    model = Model(
        network=network,
        tokenizer=tokenizer,
        architecture=architecture_of(network.config),
        name=name,
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
    config = model.network.config
    layer = model.n_blocks // 2
    block = model.blocks[layer]
    length = min(4, getattr(config, "max_position_embeddings", None) or 4)
    ids = torch.arange(length, device=model.network.get_input_embeddings().weight.device)
    ids = (ids % config.vocab_size).expand(2, -1)  # (2, length)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(length, model.weight(layer).shape[0], generator=generator)
    direction /= direction.norm(dim=-1, keepdim=True)
    added = torch.zeros_like(direction)

    def add(output, _):
        entering = inputs["block"][0][0][1].float()  # of the second text, (length, d_model)
        vector = direction * entering.norm(dim=-1, keepdim=True).cpu()
        both = torch.stack([torch.zeros_like(vector), vector]).to(output)  # (2, length, d_model)
        added.copy_(both[1])
        return output + both.view_as(output)

    with (
        calls({"block": block}) as inputs,
        replaced(model.down_projection(layer), add),
        recorded({"block": block, "last": model.blocks[-1]}) as outputs,
    ):
        logits = model.network(input_ids=ids, use_cache=False).logits
    plain, moved = outputs["block"].float()
    head = model.unembedding(model.final_norm(outputs["last"]))
    rounding = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    for fault, values, expected in (
        ("a norm or a factor stands behind an MLP, so that no edit is exact", moved - plain, added),
        ("a factor or a cap stands behind the head, so that no lens is right", head, logits),
    ):
        expected = expected.to(values.device).float()
        error = (values.float() - expected).norm() / expected.norm()
        if error > rounding:
            what = f"model {model.name!r} of {config.model_type!r}: {fault}"
            raise BadInput(f"{what} ({error:.0%} off); choose another model")


def fuse(network: nn.Module) -> None:
    """Compute GPT-2's GELU by torch's one kernel instead of eight.

    On a CPU this takes a fifth off the time of an edit; it is the same function, rounded once.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh().train(child.training))


def outline(name: str, revision: str = "", here: bool = False) -> Model:
    """The model without weights and tokenizer, for plans, editors' layers and memory estimates.

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
    with _refusals(name), torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    row = architecture_of(config)
    return Model(network=network, tokenizer=None, architecture=row, name=name, revision=revision)


def _configuration(name: str, folder: Path) -> transformers.PretrainedConfig:
    """A model's configuration. No code that comes with it is run, and nobody is asked about it.

    The family is read from the file itself, so that only families of the table reach transformers,
    which has the code of each.

    Raises:
        BadInput: no row for its family, code of its own (also as kernels from the Hub), sizes that
            no model has, or broken.
    """
    with _refusals(name):
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
            raise ValueError("config.json names no model_type")
        _check_family(fields["model_type"], "auto_map" in fields)
        for field in HUB_CODE:
            if "/" in str(fields.get(field)):
                raise BadInput(f"model {name!r}: {field} in config.json names code; take it out")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_sizes(name, config)
        architecture_of(config)
    return config


def _check_sizes(name: str, config: transformers.PretrainedConfig) -> None:
    """BadInput if building even the outline would take hours or all memory."""
    sizes = {kind: getattr(config, kind, None) for kind in SIZES}
    sizes = {kind: size for kind, size in sizes.items() if size is not None}
    for kind, size in sizes.items():
        if type(size) is not int or size < 1:
            raise BadInput(f"model {name!r}: {kind} is {size!r:.80}; give a whole number from 1 on")
    width = sizes.get("hidden_size", 1)
    blocks = sizes.get("num_hidden_layers", 1)
    weights = blocks * 4 * width**2 + width * max(sizes.values(), default=1)
    if blocks > MOST_BLOCKS or weights > MOST_WEIGHTS:
        claim = f"{blocks:,} blocks and at least {weights:.1e} weights"[:60]
        raise BadInput(f"model {name!r}: {claim}, more than any has; look for a mistyped size")


def weights_bytes(model: Model, dtype: str) -> int:
    """Bytes of the parameters in a dtype; "auto" = the one that the configuration names."""
    if dtype == "auto":
        torch_dtype = model.network.config.dtype or torch.float32
    else:
        torch_dtype = getattr(torch, dtype)
    return model.network.num_parameters() * torch_dtype.itemsize


def free_bytes(*devices: torch.device) -> int:
    """Free memory of these devices together; torch's reserve of a GPU's memory counts as free."""
    gpus = {device for device in devices if device.type == "cuda"}
    if not gpus:
        return psutil.virtual_memory().available
    gc.collect()
    torch.cuda.empty_cache()
    return sum(torch.cuda.mem_get_info(device)[0] for device in gpus)


def _check_memory(model: Model, device: torch.device, dtype: str, over_all_gpus: bool) -> None:
    """BadInput if the weights of an outline will not fit in the free memory: an estimate."""
    needed = weights_bytes(model, dtype)
    numbers = range(torch.cuda.device_count() if over_all_gpus else 0)
    free = free_bytes(device, *(torch.device("cuda", number) for number in numbers))
    if needed > free:
        smaller = "" if dtype == "bfloat16" else "dtype='bfloat16', "
        sizes = f"about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device.type}"
        what = f"model {model.name!r}: its weights take {sizes}"
        raise BadInput(f"{what}; use {smaller}a smaller model, or device_map='balanced' over GPUs")


def _check_family(family: str, has_code: bool = False) -> None:
    if family in ARCHITECTURES:
        return
    families = ", ".join(ARCHITECTURES)
    code = " and brings code of its own (auto_map), which is not run" if has_code else ""
    raise BadInput(
        f"architecture {family!r} is not in the table ({families}){code}; if no norm stands behind "
        "its MLPs, add a row to ARCHITECTURES in workbench/models.py"
    )


def architecture_of(config: transformers.PretrainedConfig) -> Architecture:
    """The row of a model's family."""
    _check_family(config.model_type)
    if not getattr(config, "do_layer_norm_before", True):  # OPT 350m alone
        raise BadInput(f"{config.model_type!r} with norms behind its blocks; choose another size")
    return ARCHITECTURES[config.model_type]


@cache
def share_cores() -> None:
    """Let torch use as many cores as nothing else keeps busy, chosen once a process: two threads on
    two busy cores are far slower than one. OMP_NUM_THREADS decides if it is set.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(free_cores(torch.get_num_threads()))


def free_cores(cores: int) -> int:
    """How many of them are left, if all of the machine's are kept busy alike; at least one. Busy is
    what was so over the last minute and is now: an installation that has just ended is not.
    """
    load = psutil.getloadavg()[0] / max(psutil.cpu_count() or 1, cores)
    return max(1, cores - round(cores * min(load, psutil.cpu_percent(0.2) / 100)))


def device_named(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA, else MPS, else the CPU. What is computed from now on
    shares the CPU's cores, see `share_cores`.

    Under `accelerate launch` each process has a CUDA device of its own.
    """
    share_cores()
    if name == "auto" and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    with refused(f"device {name!r}: not on this machine", "choose auto, cpu, cuda, cuda:N or mps"):
        return torch.empty(1, device=name).device


def _refusals(name: str) -> AbstractContextManager[None]:
    """Inside, whatever a library says of a model is one line: a broken folder fails in many."""
    advice = "if memory ran out use dtype='bfloat16', if files are broken save model and tokenizer"
    return refused(f"model {name!r} cannot be loaded", f"{advice} again with save_pretrained")
