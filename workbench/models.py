"""Load a causal language model; the one table of architectures; where its blocks, MLPs, norm and head are."""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.facts import DATA, BadInput

WORLD_MODELS = ("world-gpt2", "world-llama")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Dotted module names of one model family, counted from the network; `mlp` and the rest from the block.

    `transposed` is True where the down-projection is a Conv1D, which stores (d_in, d_out); a Linear stores (d_out, d_in).
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

# config.model_type -> row. To add a family, name its modules here; tests/test_models.py then checks the row on a tiny model. The
# editors need blocks that add the down-projection's output to the residual stream as it is, with no norm in between.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _GPT2,
    "gptj": replace(_GPT2, down_projection="mlp.fc_out", embeddings=("transformer.wte",), transposed=False),
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A network with its tokenizer and the row of its architecture. Layers are block indices from 0."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    name: str
    revision: str = ""

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

    def block_name(self, layer: int) -> str:
        return f"{self.architecture.blocks}.{layer}"

    def mlp(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(self.architecture.mlp)

    def down_projection_name(self, layer: int) -> str:
        return f"{self.block_name(layer)}.{self.architecture.down_projection}"

    def down_projection(self, layer: int) -> nn.Module:
        return self.network.get_submodule(self.down_projection_name(layer))

    def weight(self, layer: int) -> torch.Tensor:
        """The down-projection as W (d_out, d_in), a view of the parameter whatever way it is stored."""
        weight = self.down_projection(layer).weight
        return weight.T if self.architecture.transposed else weight

    def check_layers(self, layers) -> list[int]:
        """The layers as a sorted list; BadInput if one is not a block."""
        for layer in layers:
            if not 0 <= layer < self.n_blocks:
                raise BadInput(f"layer {layer}: {self.name} has blocks 0 to {self.n_blocks - 1}")
        return sorted(set(layers))

    def check_length(self, input_ids: torch.Tensor, what: str = "a text") -> None:
        """BadInput if rows of tokens are longer than the model's positions."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit and input_ids.shape[1] > limit:
            raise BadInput(f"{what}: {input_ids.shape[1]} tokens with BOS, {self.name} has {limit} positions; shorten the text")

    def logits_at(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Next-token logits (n, vocab), float32, after one position of each row; the head runs at the named positions only."""
        self.check_length(input_ids)
        wanted, column = positions.unique(return_inverse=True)
        output = self.network(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=wanted, use_cache=False)
        return output.logits[torch.arange(len(input_ids), device=column.device), column].float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of names and bytes of the weights as they were when first asked for."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def load(name: str | Path, device: str = "auto", dtype: str = "auto", revision: str = "") -> Model:
    """Load a model in evaluation mode.

    Args:
        name: "world-gpt2", "world-llama", a folder in Hugging Face layout, or a Hub id.
        device: "auto" (CUDA, else MPS, else CPU) or a torch device.
        dtype: "auto" (fp32 on CPU and MPS, the checkpoint's on CUDA), "float32" or "bfloat16".
        revision: Hub revision; for the world models "" or "early", a checkpoint in the middle of learning.
    Raises:
        BadInput: no such model, an architecture without a row, not on this machine and offline.
    """
    device = _device(device)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"dtype {dtype!r}: choose auto, float32, bfloat16 or float16")
    folder, hub_revision = _locate(str(name), revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, revision=hub_revision)
        architecture = architecture_of(config)
        wanted = dtype if dtype != "auto" or device.type == "cuda" else "float32"
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, revision=hub_revision, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, revision=hub_revision)
        if report["missing_keys"]:  # transformers would leave them random
            raise ValueError(f"no weights for {min(report['missing_keys'])}")
        if not tokenizer.vocab_size:  # transformers makes an empty one where there is none
            raise ValueError("no tokenizer")
    except BadInput:
        raise
    except Exception as error:  # a broken folder fails in many libraries, each with its own exception
        raise BadInput(_explain(str(name), folder, revision, error)) from None
    network.to(device).eval().requires_grad_(False)
    network.loss_type = "ForCausalLM"  # else transformers finds the same by itself, and warns
    return Model(network=network, tokenizer=tokenizer, architecture=architecture, name=str(name), revision=revision)


def file_fingerprint(name: str, revision: str = "") -> str:
    """Of a model's files, without loading it: a hash of the folder's weights, configuration and tokenizer; for a Hub id the commit in the cache."""
    folder, hub_revision = _locate(name, revision)
    if not Path(folder).is_dir():
        found = transformers.utils.hub.cached_file(
            folder, "config.json", revision=hub_revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        return f"{folder}@{Path(found).parent.name if found else hub_revision}"
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def architecture_of(config: transformers.PretrainedConfig) -> Architecture:
    """The row of a model's family."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(f"architecture {config.model_type!r} is not in the table ({known}); add a row to ARCHITECTURES in workbench/models.py")
    if not getattr(config, "do_layer_norm_before", True):  # OPT 350m alone
        raise BadInput(f"architecture {config.model_type!r} with its norms behind the blocks cannot be edited; choose another size")
    return ARCHITECTURES[config.model_type]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        raise BadInput(f"device {name!r}: not on this machine; choose auto, cpu, cuda, cuda:N or mps") from None


def _locate(name: str, revision: str) -> tuple[str, str]:
    if name in WORLD_MODELS:
        if revision not in ("", "early"):
            raise BadInput(f"{name}: revision {revision!r} does not exist; choose '' (finished) or 'early'")
        folder = DATA / "world" / "models" / name / revision
        if not (folder / "config.json").is_file():
            raise BadInput(f"model {name!r}: no config.json in {folder}; `workbench pretrain {name}` makes it")
        return str(folder), "main"
    folder = os.path.expanduser(name)
    if name.startswith((".", "/", "~")) or os.path.exists(folder):
        if revision:
            raise BadInput(f"model {name!r}: a folder has no revision {revision!r}; leave it out")
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise BadInput(
                f"model {name!r}: no config.json there; give a folder that save_pretrained wrote, a Hub id, or one of {', '.join(WORLD_MODELS)}"
            )
        return folder, "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadInput(f"model {name!r}: no such folder, and not a Hub id (owner/name); the embedded ones are {', '.join(WORLD_MODELS)}")
    return name, revision or "main"


def _explain(name: str, folder: str, revision: str, error: Exception) -> str:
    text = str(error)
    what = " ".join(f"{type(error).__name__}: {text}".split())[:200]
    if os.path.isdir(folder):
        return f"model {name!r}: {folder} cannot be loaded ({what}); save it again with save_pretrained, tokenizer included"
    at = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    if "gated" in text or "401" in text or "403" in text:
        return f"{at}: the Hub refuses it; accept the licence on the model's page and log in with `hf auth login`"
    if os.environ.get("HF_HUB_OFFLINE") == "1" or "connect" in text or "offline" in text:
        return f"{at}: not on this machine, and the Hub is out of reach; fetch it once with `hf download {name}`, or use {' or '.join(WORLD_MODELS)}"
    return f"{at}: cannot be loaded ({what}); check the name and revision"
