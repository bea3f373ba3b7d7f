"""Where the loss of an edit happens: a part of one model is set to what it is in another, and read.

    wb.traces.patched(tuned, untuned, requests, edit.layers)    # what brings the edits back
    wb.traces.patched(untuned, tuned, requests, edit.layers)    # what alone takes them away

untuned: the edited model from before the tuning. A part is weights, or what a block, its attention
or its MLP puts out at one token of the prompt. What is read is the first token of the new answer.
Source: activation patching, arXiv 2202.05262 and 2309.16042. Differs from: not the prompts but the
models are unlike, so that weights can be patched too.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench import deltas
from workbench.activations import recorded, replaced
from workbench.facts import Requests
from workbench.models import ATTENTIONS, Model
from workbench.positions import subject_end
from workbench.records import BadInput
from workbench.tracking.retention import answers_after, next_logits, token_text

Part = tuple[str, int]  # and block, -1 of all


@torch.no_grad()
def patched(
    model: Model,
    source: Model,
    requests: Requests,
    layers: Sequence[int] = (),
    by: Sequence[str] = ("weights", "subject", "end"),
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
        first token of the new answer is the likeliest; p: its probability; margin: the lead of its
        logit over the largest other one, nats; top: the likeliest token.
    Raises:
        BadInput: the models are not two, or not of one shape.
    """
    shapes = [[one.shape for one in two.network.parameters()] for two in (model, source)]
    if shapes[0] != shapes[1] or model.network is source.network:
        what = f"{model.name} and {source.name}: not two models of one shape"
        raise BadInput(f"{what}; load one twice, without an adapter")
    about = pd.DataFrame({"fact_id": [request.fact.id for request in requests]})
    questions = [request.fact.question for request in requests]
    asked = answers_after(model, questions, [request.target for request in requests])
    prompts = asked.encoded.cut(asked.start)
    tokens = asked.encoded.input_ids[about.index, asked.start]
    ends = [subject_end(request.fact.prompt, request.fact.subject) for request in requests]
    at_subject = torch.tensor([*map(prompts.token_at, about.index, ends)])
    with recorded(_modules(source)) as outputs:
        next_logits(source, prompts)
    patches: dict[tuple, AbstractContextManager] = {}
    for part, names in parts(model, layers).items():
        patches["weights", *part] = _set_to(model, source, names)
    for token, places in (("subject", at_subject), ("end", asked.start - 1)):
        for part, module in _modules(model).items():
            put = partial(_put, outputs[part], places)
            patches[token, *part] = replaced(module, put)
    wanted = [patch for patch in patches if patch[0] in by]
    tables = []
    for patch in tqdm(wanted, desc="patching", leave=False, disable=None):
        with patches[patch]:
            logits = next_logits(model, prompts).cpu()
        read = about.assign(by=patch[0], part=patch[1], layer=patch[2])
        read["margin"] = margins(logits, tokens)
        read["p"] = logits.softmax(1).gather(1, tokens[:, None])
        read["top"] = [token_text(model.tokenizer, top) for top in logits.argmax(1).tolist()]
        tables.append(read.assign(retained=read.margin > 0))
    return pd.concat(tables, ignore_index=True)


def parts(model: Model, layers: Sequence[int] = ()) -> dict[Part, list[str]]:
    """Names of the parameters of nothing and everything; of all attention, MLPs, norms and
    embeddings (the head with them); of the down-projections of the edited layers; of each block.
    """
    edited = [f"{model.down_projection_name(layer)}.weight" for layer in layers]
    named: dict[Part, list[str]] = defaultdict(list)
    named |= {("nothing", -1): [], ("edited matrices", -1): edited}
    block = re.compile(rf"{re.escape(model.architecture.blocks)}\.(\d+)\.")
    for name, _ in model.network.named_parameters():
        module = model.network.get_submodule(name.rpartition(".")[0])
        inside = block.match(name)
        kind = "mlps" if inside else "embeddings"
        if "norm" in type(module).__name__.lower():
            kind = "norms"
        if set(ATTENTIONS) & set(name.split(".")):
            kind = "attention"
        named[kind, -1].append(name)
        named["everything", -1].append(name)
        if inside:
            named["block", int(inside[1])].append(name)
    return dict(named)


def margins(logits: Tensor, tokens: Tensor) -> Tensor:
    """The lead (n,) of each token's logit over the largest other one of its row (n, vocab)."""
    rivals = logits.scatter(1, tokens[:, None], -torch.inf).amax(1)
    return logits.gather(1, tokens[:, None])[:, 0] - rivals


def _modules(model: Model) -> dict[Part, nn.Module]:
    kinds = {"block": model.blocks.__getitem__, "attention": model.attention, "mlp": model.mlp}
    layers = range(model.n_blocks)
    return {(part, layer): module(layer) for part, module in kinds.items() for layer in layers}


@contextmanager
def _set_to(model: Model, source: Model, names: Sequence[str]) -> Iterator[None]:
    with deltas.preserved(model.network, names):
        for name in names:
            model.network.get_parameter(name).copy_(source.network.get_parameter(name))
        yield


def _put(values: Tensor, places: Tensor, output: Tensor, _: Tensor) -> Tensor:
    """The output with the values, both (n, length, d) in any shape, at one place of each text."""
    rows = torch.arange(len(places))
    shape = len(places), -1, output.shape[-1]  # of OPT texts and tokens are one dimension
    changed = output.clone().view(shape)
    changed[rows, places] = values.view(shape)[rows, places].to(changed)
    return changed.view_as(output)
