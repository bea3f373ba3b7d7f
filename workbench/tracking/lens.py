"""Lenses: what each block would say if the model ended after it.

Row l is softmax(head(norm(h + A_l h + b_l))), h the hidden state after block l. The last block's A
and b are 0: its row is the model's own next-token distribution.

    - logit lens: A = 0, b = 0. It takes every block to write what the last one does, which early
      blocks do not.
    - tuned lens: the A and b, from 0 on, with the least KL(the model's own || the lens's) on a
      corpus.
    - Jacobian lens: I + A_l = J_l, the mean of d h_final(t') / d h_l(t), both before the final
      norm: summed over every position t' of a row, so over t and what comes after it; then
      averaged over the positions t and the rows, without those in front. It says what a state
      makes the model say, now or later on; b = 0. Where the subject ends, right after MEMIT's
      blocks, it alone of the three has the edited object higher than before the edit.

Sources: nostalgebraist (2020); arXiv 2303.08112; Gurnee et al., "Verbalizable Representations Form
a Global Workspace in Language Models" (2026).
Differs from:
    - No row for the embeddings.
    - Tuned: Adam on 64 tokens a step, where theirs takes 262,144 (SGD).
    - Jacobian: exact, a vector-Jacobian product a dimension of h_final, as theirs; over 8 rows of
      the corpus, where theirs takes up to 1,000 and leaves out their first 16 positions and the
      last.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from workbench import cache, deltas, moments, prose, runs
from workbench.activations import recorded, replaced
from workbench.models import Model
from workbench.positions import encode, front, row_length
from workbench.records import BadInput, check_choice
from workbench.tracking.retention import next_logits, token_text

KINDS = ("logit", "tuned", "jacobian")
ROWS = {"tuned": 128, "jacobian": 8}  # of the corpus
STEPS = 250  # of Adam, for the tuned lens
LEARNING_RATE = 1e-3
ROWS_A_STEP, TOKENS_A_ROW = 4, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens:
    """What is done to the hidden states: A (n_blocks, d_model, d_model) and b (n_blocks, d_model),
    float32, the last block's 0; none for the logit lens. `model`: fingerprint of the weights that
    it was fitted for.
    """

    kind: str = "logit"
    model: str = ""
    matrix: Tensor | None = None
    bias: Tensor | None = None

    def moved(self, hidden: Tensor) -> Tensor:
        """h + A h + b of hidden states (m, n_blocks, d_model)."""
        if self.matrix is None or self.bias is None:
            return hidden
        wide = hidden.float()
        change = torch.einsum("mld,led->mle", wide, self.matrix.to(wide)) + self.bias.to(wide)
        return (wide + change).to(hidden)


LOGIT = Lens()


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Next-token distributions of one prompt, layer by layer.

    `probs` (n_blocks, vocab), float32; `tokens`: the prompt's tokens, what stands in front of them
    first; `position`: where the distribution was read.
    """

    probs: Tensor
    tokens: tuple[str, ...]
    position: int = -1


@torch.no_grad()
def trajectory(model: Model, prompt: str, lens: Lens = LOGIT) -> Trajectory:
    """The lens after one prompt, in one pass of the network."""
    encoded = encode(model, [prompt])
    with recorded(dict(enumerate(model.blocks))) as states:
        last = next_logits(model, encoded)
    logits = read(model, states, torch.tensor([0]), encoded.lengths - 1, lens)
    logits[:, -1] = last  # bit for bit
    tokens = [token_text(model.tokenizer, token) for token in encoded.input_ids[0].tolist()]
    return Trajectory(probs=logits[0].softmax(-1).cpu(), tokens=tuple(tokens))


def read(
    model: Model, states: Mapping[int, Tensor], rows: Tensor, at: Tensor, lens: Lens = LOGIT
) -> Tensor:
    """Logits (m, n_blocks, vocab), float32, at a position of each of some rows.

    Args:
        states: block -> hidden states after it (n, length, d_model).
        rows, at: (m,).
    Raises:
        BadInput: the lens is for another model.
    """
    if lens.model not in ("", model.fingerprint):
        what = f"the {lens.kind} lens was fitted for the weights {lens.model}"
        raise BadInput(f"{what}, {model.name} has {model.fingerprint}; fit one for it")
    device = model.device
    places = rows.to(device), at.to(device)
    hidden = [states[layer].to(device)[places] for layer in range(model.n_blocks)]
    return _logits(model, lens.moved(torch.stack(hidden, dim=1))).to(device)


def _logits(model: Model, hidden: Tensor) -> Tensor:
    return model.unembedding(model.final_norm(hidden)).float()


def table(model: Model, lens: Trajectory) -> pd.DataFrame:
    """What each block would say: its likeliest token, that token's probability, the second and the
    third token.
    """
    probs, tokens = lens.probs.topk(3)
    table = pd.DataFrame(tokens.tolist(), columns=["likeliest", "second", "third"])
    table = table.map(lambda token: token_text(model.tokenizer, token).strip())
    table.insert(1, "p", probs[:, 0].tolist())
    return table.rename_axis("block")


def disagreement(model: Model, prompt: str, corpus: str = "") -> pd.DataFrame:
    """By block, the likeliest token through each kind of lens, and whether all three `agree`."""
    likeliest = {}
    for kind in KINDS:
        through = trajectory(model, prompt, fitted(model, kind, corpus))
        likeliest[kind] = table(model, through).likeliest
    compared = pd.DataFrame(likeliest)
    return compared.assign(agree=compared.nunique(axis=1) == 1)


# --- Fitting


def fitted(model: Model, kind: str, corpus: str = "") -> Lens:
    """A lens for the unedited model, from the cache or by fitting, which takes up to a minute on
    the world's models and grows with depth, width and vocabulary. To be used on edited states too.

    Args:
        corpus: see `moments.corpus_texts`; "" = `prose.corpus_of` the model.
    Raises:
        BadInput: no such kind; it would have to be fitted, and the model has been changed, lies on
            several devices or gives numbers that are not finite; the corpus is too short.
    """
    check_choice("lens", kind, KINDS)
    if kind == "logit":
        return LOGIT
    width = row_length(model) - len(front(model))
    rows = moments.token_rows(model, prose.corpus_of(model.name, corpus), ROWS[kind] * width)
    about = f"{kind} {model.fingerprint} {model.dtype} {STEPS}\n{Path(__file__).read_text('utf-8')}"
    digest = hashlib.sha256(about.encode() + rows.numpy().tobytes()).hexdigest()[:16]
    path = cache.folder("lenses") / f"{digest}.safetensors"
    with cache.locked(f"lens {digest}"):
        maps = cache.kept(path, f"lens {digest}")
        if maps is None:
            model.check_unchanged(f"{kind} lens")
            model.check_one_device(f"{kind} lens")
            runs.progress(f"fitting the {kind} lens")
            with deltas.preserved(model.network, ()), torch.enable_grad():
                model.network.requires_grad_(False)  # no gradient reaches the model's own weights
                torch.manual_seed(0)
                fit = _tuned if kind == "tuned" else _jacobian
                maps = fit(model, rows.to(model.device))
            if not all(values.isfinite().all() for values in maps.values()):
                advice = "load the model in float32"
                raise BadInput(f"{kind} lens: its numbers are NaN or infinite; {advice}")
            cache.keep(path, maps, f"lens {digest}")
    maps = {name: values.to(model.device) for name, values in maps.items()}
    return Lens(kind=kind, model=model.fingerprint, **maps)


def _tuned(model: Model, rows: Tensor) -> dict[str, Tensor]:
    """A and b with the least KL, by Adam."""
    maps = _zeros(model)
    matrix, bias = (values.requires_grad_() for values in maps.values())
    adam = torch.optim.Adam([matrix, bias], lr=LEARNING_RATE)
    skipped = len(front(model))
    for _ in tqdm(range(STEPS), desc="tuned lens", unit="step", disable=None):
        batch = rows[torch.randperm(len(rows))[:ROWS_A_STEP]]
        with torch.no_grad(), recorded(dict(enumerate(model.blocks))) as states:
            model.network(input_ids=batch, logits_to_keep=1, use_cache=False)
        at = torch.randint(skipped, rows.shape[1], (len(batch), TOKENS_A_ROW))
        places = torch.arange(len(batch))[:, None], at
        with torch.no_grad():
            goal = _logits(model, states[model.n_blocks - 1][places]).log_softmax(-1).flatten(0, 1)
        for layer in range(model.n_blocks - 1):  # one after another, for the memory
            hidden = states[layer][places].flatten(0, 1).float()
            moved = hidden + hidden @ matrix[layer].T + bias[layer]
            reading = _logits(model, moved.to(model.dtype)).log_softmax(-1)
            F.kl_div(reading, goal, log_target=True, reduction="batchmean").backward()
        adam.step()
        adam.zero_grad()
    return {name: values.detach().cpu() for name, values in maps.items()}


def _jacobian(model: Model, rows: Tensor) -> dict[str, Tensor]:
    """A = J - I and b = 0, one row of J after another, of all blocks at once."""
    maps = _zeros(model)
    skipped = len(front(model))
    embeddings = model.network.get_input_embeddings()
    begun = replaced(embeddings, lambda out, _: out.clone().requires_grad_())
    with begun, recorded(dict(enumerate(model.blocks))) as states:
        model.network(input_ids=rows, logits_to_keep=1, use_cache=False)
    after = [states[layer] for layer in range(model.n_blocks)]
    width = after[-1].shape[-1]
    for number in tqdm(range(width), desc="jacobian lens", unit="dimension", disable=None):
        total = after[-1][..., number].sum()
        for layer, effect in enumerate(torch.autograd.grad(total, after, retain_graph=True)):
            maps["matrix"][layer, number] = effect[:, skipped:].float().mean((0, 1))
    maps["matrix"].diagonal(dim1=1, dim2=2).sub_(1)
    return {name: values.cpu() for name, values in maps.items()}


def _zeros(model: Model) -> dict[str, Tensor]:
    n, width = model.n_blocks, model.unembedding.weight.shape[1]
    kinds = {"device": model.device, "dtype": torch.float32}
    return {"matrix": torch.zeros(n, width, width, **kinds), "bias": torch.zeros(n, width, **kinds)}
