"""Second moments of the keys: C = E[k k'] of every down-projection's input, all layers in one pass,
cached under a fingerprint.

Source: ROME, arXiv 2202.05262. Differs from: 10 tokens a key dimension (arXiv 2506.04226) in rows
of 128 tokens, texts run on, where the first code takes 100,000 articles, each cut to the length
that the model can read.
"""

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm

from workbench import cache, sources
from workbench.activations import recorded, stop_after
from workbench.cache import locked
from workbench.checkpoints import WORLD_MODELS
from workbench.closed_form import factorised
from workbench.facts import BadInput
from workbench.models import Model, free_bytes
from workbench.positions import front
from workbench.world import text

TOKENS_PER_WIDTH = 10  # tokens for each dimension of the key; source: arXiv 2506.04226
ROW = 128  # tokens of a row
FLOOR = 1e-6  # of the mean diagonal of C; less than that is a direction that no text uses
NAMED = {"wikipedia": "wikimedia/wikipedia:20231101.en"}


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """C = E[k k'] of one layer's keys.

    The factor that edits are solved with is of C + f I, f = FLOOR tr(C) / d_in: no eigenvalue is
    below f. Units that never fire leave C without one, and nearly all of a change then lies where
    no key of the corpus goes.

    Attributes:
        layer: block index.
        matrix: C (d_in, d_in), float32, uncentred, divided by the number of tokens.
        tokens: how many tokens were seen; those in front of a row are not counted.
        fingerprint: of weights, dtype, corpus and tokens.
        model: fingerprint of the weights.
        corpus: the name of the text it was collected on.
    """

    layer: int
    matrix: torch.Tensor
    tokens: int
    fingerprint: str
    model: str
    corpus: str = ""

    def __post_init__(self):
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"second moment {tuple(self.matrix.shape)} is not square")

    @cached_property
    def factor(self) -> torch.Tensor:
        """Cholesky factor of C + f I (d_in, d_in), float64."""
        return self._factorised(FLOOR)

    @cached_property
    def bare_factor(self) -> torch.Tensor:
        """Cholesky factor of C alone (d_in, d_in), float64; closed_form.Singular if there is none."""
        return self._factorised(0.0)

    def _factorised(self, floor: float) -> torch.Tensor:
        raised = self.matrix.to(torch.float64, copy=True)
        raised.diagonal().add_(floor * raised.diagonal().mean())
        return factorised(raised, f"the second moment of layer {self.layer}")


def corpus_texts(corpus: str) -> Iterable[str]:
    """Running text, read only as far as it is needed.

    Args:
        corpus: "world" (what the embedded world's pre-training says, statements and prose; not
            Wikipedia); "wikipedia"; a UTF-8 .txt file, one text a paragraph; a .jsonl, .csv or
            .parquet file or a Hub dataset id, of which the column `text` is read.
    """
    if corpus == "world":
        return text.pretraining(seed=1)
    if corpus.endswith(".txt"):
        try:
            content = Path(corpus).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise BadInput(f"corpus {corpus!r}: no such UTF-8 text file") from None
        return (part for part in content.split("\n\n") if part.strip())
    if "/" not in corpus and corpus not in NAMED and not Path(corpus).is_file():
        raise BadInput(
            f"corpus {corpus!r}: choose world, wikipedia, a file (.txt, .jsonl, .csv, .parquet) or a Hub dataset id (owner/name)"
        )
    found = sources.records(NAMED.get(corpus, corpus), "corpus", streaming=True)
    first = next(iter(found), {})
    if "text" not in first:
        raise BadInput(
            f"corpus {corpus!r}: has no column 'text' but {list(first)}; rename the one that holds the text"
        )
    return _whole(corpus, found)


def _whole(corpus: str, found) -> Iterable[str]:
    try:
        yield from (
            record["text"]
            for record in found
            if isinstance(record["text"], str) and record["text"].strip()
        )
    except Exception as error:  # of whatever the stream comes through
        raise BadInput(
            f"corpus {corpus!r}: broke off ({type(error).__name__}: {' '.join(str(error).split())[:120]}); try again"
        ) from None


def second_moments(
    model: Model, layers: Sequence[int], corpus: str = "world", tokens: int = 0
) -> dict[int, SecondMoment]:
    """Second moments of the keys of some layers, from the cache or from one pass over the corpus.

    Args:
        layers: block indices.
        corpus: see `corpus_texts`.
        tokens: how many to see; 0 = 10 a key dimension. Fewer than d_in leave the matrix singular.
    Raises:
        BadInput: the corpus is too short, or activations are NaN or infinite (which layer).
    """
    layers = model.check_layers(layers)
    if corpus == "world" and model.name not in WORLD_MODELS:
        warnings.warn(
            f"second moments of {model.name} from the embedded world's text, which is not Wikipedia; name a corpus",
            stacklevel=3,
        )
    tokens = tokens or TOKENS_PER_WIDTH * max(model.weight(layer).shape[1] for layer in layers)
    rows = _rows(model, corpus, tokens)
    digest = hashlib.sha256(
        f"{model.fingerprint} {model.dtype} {tokens}".encode() + rows.numpy().tobytes()
    ).hexdigest()[:16]
    with locked(f"moments {digest}"):
        kept_matrices = {layer: _kept(model, digest, layer) for layer in layers}
        missing = [layer for layer, matrix in kept_matrices.items() if matrix is None]
        if missing:
            model.check_unchanged("second moments")
        for layer, matrix in (_collect(model, missing, rows, tokens) if missing else {}).items():
            kept_matrices[layer] = matrix.cpu()
            cache.keep(
                _path(digest, layer), {"matrix": kept_matrices[layer]}, f"moments {digest} {layer}"
            )
    at = _solving_device(model, layers)
    return {
        layer: SecondMoment(
            layer=layer,
            matrix=matrix.to(at),
            tokens=tokens,
            fingerprint=digest,
            model=model.fingerprint,
            corpus=corpus,
        )
        for layer, matrix in kept_matrices.items()
    }


def _path(digest: str, layer: int) -> Path:
    return cache.folder("moments") / f"{digest}-{layer}.safetensors"


def _kept(model: Model, digest: str, layer: int) -> torch.Tensor | None:
    """The matrix that was kept for a layer, if there is a sound one."""
    matrix = (cache.kept(_path(digest, layer), f"moments {digest} {layer}") or {}).get("matrix")
    width = model.weight(layer).shape[1]
    return matrix if matrix is not None and matrix.shape == (width, width) else None


def _solving_device(model: Model, layers: Sequence[int]) -> torch.device:
    """The model's GPU if the matrices, their float64 factors and one more in the making fit there,
    else the CPU, which has float64 too.
    """
    widths = [model.weight(layer).shape[1] for layer in layers]
    needed = sum(12 * width**2 for width in widths) + 16 * max(widths) ** 2
    return (
        model.device
        if model.device.type == "cuda" and needed < free_bytes(model.device)
        else torch.device("cpu")
    )


def _rows(model: Model, corpus: str, tokens: int) -> torch.Tensor:
    """Token ids (rows, ROW), each row the front tokens and running text; together at least so many
    tokens.
    """
    first = front(model)
    length = min(ROW, getattr(model.network.config, "max_position_embeddings", ROW)) - len(first)
    count = -(-tokens // length)
    stream, texts = [], iter(corpus_texts(corpus))
    while len(stream) < count * length and (paragraphs := list(itertools.islice(texts, 256))):
        for ids in model.tokenizer(paragraphs, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            stream += ids
    if len(stream) < count * length:
        raise BadInput(
            f"corpus {corpus!r} holds {len(stream)} tokens, {count * length} are needed; give more text or ask for fewer tokens"
        )
    rows = torch.tensor(stream[: count * length]).view(count, length)
    return torch.cat(
        [torch.tensor([first] * count, dtype=torch.long).view(count, len(first)), rows], dim=1
    )


@torch.no_grad()
def _collect(
    model: Model, layers: Sequence[int], rows: torch.Tensor, tokens: int
) -> dict[int, torch.Tensor]:
    widths = {layer: model.weight(layer).shape[1] for layer in layers}
    sums = {
        layer: torch.zeros(width, width, device=model.device) for layer, width in widths.items()
    }
    left, skip = tokens, len(front(model))
    with recorded({layer: model.down_projection(layer) for layer in layers}, inputs=True) as keys:
        for batch in tqdm(rows.split(16), desc="second moments", unit="batch", disable=None):
            batch = batch.to(model.device)
            with stop_after(model.blocks[max(layers)]):
                model.network(input_ids=batch, logits_to_keep=1, use_cache=False)
            for layer, total in sums.items():
                seen = (
                    keys[layer]
                    .view(*batch.shape, -1)[:, skip:]
                    .flatten(0, 1)[:left]
                    .float()
                    .to(total.device)
                )  # (tokens, d_in)
                total.addmm_(seen.T, seen)
            left -= min(left, batch[:, skip:].numel())
    for layer, total in sums.items():
        if not torch.isfinite(total).all():
            raise BadInput(f"layer {layer}: keys are NaN or infinite; load the model in float32")
    return {layer: total / tokens for layer, total in sums.items()}
