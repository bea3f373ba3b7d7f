"""Where the loss of an edit happens: a part of one model is set to what it is in another, and read.

    wb.traces.patched(tuned, untuned, requests, edit.layers)    # what brings the edits back
    wb.traces.patched(untuned, tuned, requests, edit.layers)    # what alone takes them away

untuned: the edited model from before the tuning. A part is weights, or what a block, its attention
or its MLP puts out at one token of the prompt. What is read is the first token of the new answer.
Source: activation patching, arXiv 2202.05262 and 2309.16042. Differs from: not the prompts but the
models are unlike, so that weights can be patched too.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench import deltas
from workbench.activations import put, recorded, replaced
from workbench.editing.continuation import at
from workbench.facts import Requests
from workbench.models import ATTENTIONS, Model
from workbench.positions import encode, subject_ends
from workbench.records import BadInput
from workbench.tracking.retention import answers_after, next_logits

Part = tuple[str, int]  # and block, -1 of all
PATCHED = ("weights", "subject", "end")


@torch.no_grad()
def patched(
    model: Model,
    source: Model,
    requests: Requests,
    layers: Sequence[int] = (),
    by: Sequence[str] = PATCHED,
) -> pd.DataFrame:
    """What the model says with one part as it is in the source, a part after the other. Both are
    bit for bit as before afterwards.

    Args:
        source: another model of the same shape.
        layers: the edited blocks, whose down-projections are a part of their own.
        by: what is patched, see below.
    Returns:
        A row a part and request. by: "weights" (see `parts`), or the token at which activations are
        put in: "subject", its last one, and "end", the prompt's; part is then block (the residual
        stream behind it), attention or mlp. layer: the block, -1 of all. fact_id; retained: the
        first token of the new answer is the likeliest; margin: the lead of its logit over the
        largest other one, nats.
    Raises:
        BadInput: the models are not two, or not of one shape, or carry an adapter; they read the
            prompts as unlike tokens; no such layer, or `by`; there are no requests.
    """
    ours = [weight.shape for weight in model.network.parameters()]
    theirs = [weight.shape for weight in source.network.parameters()]
    has_adapter = any(hasattr(one.down_projection(0), "merge") for one in (model, source))
    if ours != theirs or has_adapter or model.network is source.network:
        what = f"{model.name} and {source.name}: not two models of one shape"
        raise BadInput(f"{what}; load one twice, without an adapter")
    if not requests:
        raise BadInput("no facts to ask of; give the requests of the edit")
    unknown = sorted({*by} - {*PATCHED})
    if unknown or isinstance(by, str) or not by:
        raise BadInput(f"by={by!r}: give a list of some of {', '.join(PATCHED)}")
    layers = model.check_layers(layers)
    questions = [request.fact.question for request in requests]
    if not torch.equal(encode(model, questions).input_ids, encode(source, questions).input_ids):
        what = f"{model.name} and {source.name}: read the prompts as unlike tokens"
        raise BadInput(f"{what}; give both one tokenizer and start, and neither an edit in context")
    targets = [request.target for request in requests]
    asked = answers_after(model, questions, targets)
    prompts = asked.encoded.cut(asked.start)
    rows = range(len(requests))
    tokens = asked.encoded.input_ids[rows, asked.start]
    with recorded(_modules(source)) as outputs:
        next_logits(source, prompts)
    patches: dict[tuple, AbstractContextManager] = {}
    for part, names in parts(model, layers).items():
        patches["weights", *part] = _set_to(model, source, names)
    places = {"subject": subject_ends(prompts, requests), "end": asked.start - 1}
    for token, place in places.items():
        for part, module in _modules(model).items():
            values = at(outputs[part], place)
            patches[token, *part] = replaced(module, partial(put, place, values))
    wanted = [patch for patch in patches if patch[0] in by]
    about = pd.DataFrame({"fact_id": [request.fact.id for request in requests]})
    tables = []
    for patch in tqdm(wanted, desc="patching", leave=False, disable=None):
        with patches[patch]:
            logits = next_logits(model, prompts).cpu()
        table = about.assign(**dict(zip(("by", "part", "layer"), patch, strict=True)))
        table["margin"] = margins(logits, tokens)
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    return table.assign(retained=table.margin > 0)


def parts(model: Model, layers: Sequence[int] = ()) -> dict[Part, list[str]]:
    """Names of the parameters of nothing and everything; of all attention, MLPs, norms and
    embeddings (the head with them); of the down-projections of the edited layers; of each block.
    """
    edited = [f"{model.down_projection_name(layer)}.weight" for layer in layers]
    named: dict[Part, list[str]] = defaultdict(list)
    named["nothing", -1] = []
    if edited:
        named["edited matrices", -1] = edited
    blocks = f"{model.architecture.blocks}."
    for name, _ in model.network.named_parameters():
        path = name.split(".")
        module = model.network.get_submodule(".".join(path[:-1]))
        kind = "mlps" if name.startswith(blocks) else "embeddings"
        if "norm" in type(module).__name__.lower():
            kind = "norms"
        if set(ATTENTIONS) & set(path):
            kind = "attention"
        named[kind, -1].append(name)
        named["everything", -1].append(name)
    for layer in range(model.n_blocks):
        block = f"{model.block_name(layer)}."
        every = named["everything", -1]
        named["block", layer] = [name for name in every if name.startswith(block)]
    return dict(named)


def margins(logits: Tensor, tokens: Tensor) -> Tensor:
    """The lead (n,) of each token's logit over the largest other one of its row (n, vocab)."""
    column = tokens[:, None]
    rivals = logits.scatter(1, column, -torch.inf)
    values = logits.gather(1, column)
    return values[:, 0] - rivals.amax(1)


def _modules(model: Model) -> dict[Part, nn.Module]:
    modules: dict[Part, nn.Module] = {}
    for layer, block in enumerate(model.blocks):
        modules["block", layer] = block
        modules["attention", layer] = model.attention(layer)
        modules["mlp", layer] = model.mlp(layer)
    return modules


@contextmanager
def _set_to(model: Model, source: Model, names: Sequence[str]) -> Iterator[None]:
    with deltas.preserved(model.network, names):
        for name in names:
            weight = model.network.get_parameter(name)
            weight.copy_(source.network.get_parameter(name))
        yield
