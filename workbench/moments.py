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
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench import cache, prose, sources
from workbench.activations import recorded, stop_after
from workbench.checkpoints import is_world
from workbench.closed_form import factorised
from workbench.models import Model, free_bytes
from workbench.positions import front, packed, row_length
from workbench.records import BadInput, refused
from workbench.world import text

TOKENS_PER_WIDTH = 10  # tokens for each dimension of the key; source: arXiv 2506.04226
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
    matrix: Tensor
    tokens: int
    fingerprint: str
    model: str
    corpus: str = ""

    def __post_init__(self):
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"second moment {tuple(self.matrix.shape)} is not square")

    @cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of C + f I (d_in, d_in), float64."""
        return self._factorised(FLOOR)

    @cached_property
    def bare_factor(self) -> Tensor:
        """Cholesky factor of C alone (d_in, d_in), float64; Singular if there is none."""
        return self._factorised(0.0)

    def _factorised(self, floor: float) -> Tensor:
        raised = self.matrix.to(torch.float64, copy=True)
        raised.diagonal().add_(floor * raised.diagonal().mean())
        return factorised(raised, f"the second moment of layer {self.layer}")


def corpus_texts(corpus: str) -> Iterable[str]:
    """Running text, read only as far as it is needed.

    Args:
        corpus: "world" (what the embedded world's pre-training says, statements and prose; not
            Wikipedia); "manual-and-facts" (see `prose`); "wikipedia"; a UTF-8 .txt file, one text a
            paragraph; a .jsonl, .csv or .parquet file or a Hub dataset id, of which the column
            `text` is read.
    """
    if corpus == "world":
        return text.pretraining(seed=1)
    if corpus == prose.MIXED:
        return prose.mixed()
    if corpus.endswith(".txt"):
        with refused(f"corpus {corpus!r}: is no UTF-8 text file", "name one"):
            paragraphs = Path(corpus).read_text(encoding="utf-8").split("\n\n")
        return filter(str.strip, paragraphs)
    if "/" not in corpus and corpus not in NAMED and not Path(corpus).is_file():
        choices = f"world, {prose.MIXED}, wikipedia, a file (.txt, .jsonl, .csv, .parquet)"
        raise BadInput(f"corpus {corpus!r}: choose {choices} or a Hub dataset id (owner/name)")
    records = sources.records(NAMED.get(corpus, corpus), "corpus", streaming=True)
    columns = list(next(iter(records), {}))
    if "text" not in columns:
        raise BadInput(f"corpus {corpus!r}: has no column 'text' but {columns}; rename one")
    return _column(corpus, records)


def _column(corpus: str, records: Iterable[dict]) -> Iterable[str]:
    """The texts of the column `text`, without those that say nothing."""
    with refused(f"corpus {corpus!r}: broke off", "try again"):
        for record in records:
            if isinstance(record["text"], str) and record["text"].strip():
                yield record["text"]


def second_moments(
    model: Model, layers: Sequence[int], corpus: str = "", tokens: int = 0
) -> dict[int, SecondMoment]:
    """Second moments of the keys of some layers, from the cache or from one pass over the corpus.

    Args:
        layers: block indices.
        corpus: see `corpus_texts`; "" = `prose.corpus_of` the model.
        tokens: how many to see; 0 = 10 a key dimension. Fewer than d_in leave the matrix singular.
    Raises:
        BadInput: the corpus is too short, or activations are NaN or infinite (which layer).
    """
    layers = model.check_layers(layers)
    corpus = prose.corpus_of(model.name, corpus)
    if corpus == "world" and not is_world(model.name):
        message = f"second moments of {model.name} from the world's text, which is not Wikipedia"
        warnings.warn(f"{message}; name a corpus", stacklevel=3)
    widths = {layer: model.weight(layer).shape[1] for layer in layers}
    tokens = tokens or TOKENS_PER_WIDTH * max(widths.values())
    rows = token_rows(model, corpus, tokens)
    about = f"{model.fingerprint} {model.dtype} {tokens}".encode()
    digest = hashlib.sha256(about + rows.numpy().tobytes()).hexdigest()[:16]
    paths = {layer: cache.folder("moments") / f"{digest}-{layer}.safetensors" for layer in layers}
    matrices = {}
    with cache.locked(f"moments {digest}"):
        for layer, width in widths.items():
            tensors = cache.kept(paths[layer], f"moments {digest} {layer}")
            if tensors and tensors["matrix"].shape == (width, width):
                matrices[layer] = tensors["matrix"]
        missing = {layer: width for layer, width in widths.items() if layer not in matrices}
        if missing:
            model.check_unchanged("second moments")
            matrices |= _collect(model, missing, rows, tokens)
        for layer in missing:
            cache.keep(paths[layer], {"matrix": matrices[layer]}, f"moments {digest} {layer}")
    device = _solving_device(model, list(widths.values()))
    made: dict[str, Any] = {"tokens": tokens, "fingerprint": digest, "corpus": corpus}
    moments = {}
    for layer in layers:
        matrix = matrices[layer].to(device)
        moments[layer] = SecondMoment(layer=layer, matrix=matrix, model=model.fingerprint, **made)
    return moments


def _solving_device(model: Model, widths: Sequence[int]) -> torch.device:
    """The model's GPU if the matrices, their float64 factors and one more in the making fit there,
    else the CPU, which has float64 too.
    """
    needed = sum(12 * width**2 for width in widths) + 16 * max(widths) ** 2
    fits = model.device.type == "cuda" and needed < free_bytes(model.device)
    return model.device if fits else torch.device("cpu")


def token_rows(model: Model, corpus: str, tokens: int) -> Tensor:
    """Token ids (rows, ROW), each row the front tokens and running text; together at least so many
    tokens.
    """
    length = row_length(model) - len(front(model))
    count = -(-tokens // length)
    rows = list(itertools.islice(packed(model, corpus_texts(corpus), ahead=256), count))
    if len(rows) < count:
        problem = f"fills {len(rows)} rows of {length} tokens, {count} are needed"
        raise BadInput(f"corpus {corpus!r} {problem}; give more text or ask for fewer tokens")
    return torch.tensor(rows)


@torch.no_grad()
def _collect(model: Model, widths: dict[int, int], rows: Tensor, tokens: int) -> dict[int, Tensor]:
    """The matrices by layer, on the CPU."""
    device = model.device
    sums = {layer: torch.zeros(width, width, device=device) for layer, width in widths.items()}
    remaining = tokens
    skipped = len(front(model))
    projections = {layer: model.down_projection(layer) for layer in widths}
    with recorded(projections, inputs=True) as keys:
        for batch in tqdm(rows.split(16), desc="second moments", unit="batch", disable=None):
            batch = batch.to(device)
            with stop_after(model.blocks[max(widths)]):
                model.network(input_ids=batch, logits_to_keep=1, use_cache=False)
            for layer, total in sums.items():
                key = keys[layer].view(*batch.shape, -1)[:, skipped:]
                key = key.flatten(0, 1)[:remaining].float().to(total.device)  # (tokens, d_in)
                _add_products(total, key)
            remaining = max(0, remaining - batch[:, skipped:].numel())
    for layer, total in sums.items():
        if not torch.isfinite(total).all():
            raise BadInput(f"layer {layer}: keys are NaN or infinite; load the model in float32")
    whole = {layer: total.triu() + total.triu(1).T for layer, total in sums.items()}
    return {layer: (total / tokens).cpu() for layer, total in whole.items()}


def _add_products(total: Tensor, key: Tensor) -> None:
    """Add k k' of the keys (n, d_in) to the total (d_in, d_in), what lies above the diagonal only
    and, beside it, little more: five eighths of the work.
    """
    width = len(total)
    step = -(-width // 4)
    for start in range(0, width, step):
        end = start + step
        total[start:end, start:].addmm_(key[:, start:end].T, key[:, start:])
