"""Where a fact is recalled: causal tracing of the MLPs at the subject's last token.

The subject's embeddings get noise (SPREAD times their deviation over the vocabulary), which hides
it; then the clean outputs of a window of MLPs are put back at the subject's last token. restored_L:
p(true) with the window around block L, less p(true) without: the indirect effect, in [-1, 1];
clean, corrupted: p(true), in [0, 1], of the answer's first token. One batched pass a window.
Source: arXiv 2202.05262, section 2. That it says where to edit is disputed (arXiv 2301.04213).
"""

from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from workbench.activations import put, recorded, replaced
from workbench.facts import Requests, check_objects
from workbench.models import Model
from workbench.positions import Encoded, subject_ends
from workbench.tracking.retention import Answers, answers_after

SPREAD = 3.0  # deviations
SAMPLES = 5  # of the noise, for each fact
WINDOW = 10 / 48  # of the depth, as published for GPT-2 XL


@torch.no_grad()
def ask(model: Model, requests: Requests) -> pd.DataFrame:
    check_objects(requests)
    asked = _asked(model, requests)
    repeated = [request for request in requests for _ in range(SAMPLES)]
    many = _asked(model, repeated)
    ends, is_subject = _subjects(repeated, many.encoded)
    mlps = {layer: model.mlp(layer) for layer in range(model.n_blocks)}
    with recorded(mlps) as outputs:
        values = {"clean": _p(model, asked)}
    row = torch.arange(len(ends))
    kept = [outputs[layer][row // SAMPLES, ends] for layer in mlps]
    embeddings = model.network.get_input_embeddings()
    noise = _noise(embeddings.weight, is_subject)
    corrupt = replaced(embeddings, lambda output, _: output + noise.to(output))
    size = max(1, round(WINDOW * model.n_blocks))
    with corrupt:
        values["corrupted"] = _p(model, many)
        for layer in mlps:
            first = layer - size // 2
            with ExitStack() as stack:
                for inside in mlps.keys() & set(range(first, first + size)):
                    change = partial(put, ends, kept[inside])
                    stack.enter_context(replaced(mlps[inside], change))
                values[f"restored_{layer}"] = _p(model, many) - values["corrupted"]
    table = pd.DataFrame({name: p.view(len(requests), -1).mean(1) for name, p in values.items()})
    table["fact_id"] = [request.fact.id for request in requests]
    return table.melt("fact_id", var_name="quantity")


def _asked(model: Model, requests: Requests) -> Answers:
    questions = [request.fact.question for request in requests]
    return answers_after(model, questions, [request.fact.object for request in requests])


def _subjects(requests: Requests, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The last token of each subject (n,), and which tokens are of it (n, length)."""
    ends = subject_ends(encoded, requests)
    starts = [request.fact.prompt.index("{}") for request in requests]
    first = [encoded.tokens_from(row, start)[0] for row, start in enumerate(starts)]
    column = torch.arange(encoded.input_ids.shape[1])
    is_subject = (torch.tensor(first)[:, None] <= column) & (column <= ends[:, None])
    return ends, is_subject


def _noise(weight: Tensor, is_subject: Tensor) -> Tensor:
    """Noise for each text (n, length, d_model), 0 but at the subject."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((*is_subject.shape, weight.shape[1]), generator=generator)
    return noise * SPREAD * weight.float().std().cpu() * is_subject[..., None]


def _p(model: Model, asked: Answers) -> Tensor:
    """p of each answer's first token after its prompt."""
    inputs = asked.encoded.to(model.device).arguments()
    logits = model.logits_at(**inputs, positions=(asked.start - 1).to(model.device))
    token = asked.encoded.input_ids[torch.arange(len(asked.start)), asked.start]
    return logits.softmax(-1).cpu().gather(1, token[:, None])[:, 0]
