"""MALMEN: a hyper-network learns from other facts how to edit; its wishes for many facts are fitted
by one ridge regression.

    d = -lr_l (k . k~) g~,   (k~, g~) = hyper-network of (k, g);      D_l = d K' (K K' + e^lambda_l
    I)^-1

k is the key and g the gradient of the target's loss after the down-projection, at the answer's
tokens of every statement of the requests (the prompt and each paraphrase). `prepare` trains the
hyper-network on facts of its own: after edits of `facts_at_once` facts, the loss on another wording
of each plus `locality` times KL(before || after) on the answers of other training facts, neighbours
among them. One whose edits of its training facts do not take is refused.

Source: arXiv 2311.04661, eq. 5-9; hyper-network after MEND, arXiv 2110.11309.
Differs from:
    - The meta-gradient is the same, by autograd through the ridge regression instead of in two
      stages; solved in the dual. The loss runs through the blocks from the first edited one only.
    - No mini-batches over the facts of an edit: of GPT-2 XL, with statements of 12 tokens, an edit
      of 512 facts takes 10 GB beside the model and one of 8,192 takes 158 GB (`edit` has the sum).
    - g is of the summed loss: a fact's wish does not depend on how many are edited at once.
    - A residual block is x + relu(scale (x A) + shift) B, with scale and shift of its rank; theirs
      is x + scale relu(x A B + bias) + shift, of its width.
    - Mean and deviation of keys and gradients are measured once, before the training; theirs run
      on. No unit counts as deviating by less than LEAST_DEVIATION of its layer's scale, nor as
      further than MOST_DEVIATIONS from its mean: units that are 0 in all that was measured, as
      ReLU leaves some, would swamp the others as soon as one edit reaches them.
"""

import hashlib
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from pydantic import Field
from torch import Tensor, nn

from workbench import cache, closed_form, deltas, facts, runs
from workbench.activations import replaced
from workbench.checkpoints import source_of
from workbench.closed_form import Factors
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation, changed
from workbench.editing.records import Numbers, Requests, Resources, described, finite, solvable
from workbench.editing.rows import Rows, build_rows
from workbench.facts import BadInput, EditRequest
from workbench.models import Model

LEARNS = "first trains a hyper-network for these blocks, once a model, which takes minutes"
DEPTHS = tuple(layer / 48 for layer in range(42, 48))  # of GPT-2 XL, as published
REMEDY = "raise meta_steps (now {meta_steps})"
TRAINED_BY = ("malmen.py", "rows.py", "continuation.py", "../closed_form.py", "../positions.py")
SAVE_EVERY = 200  # meta-steps; a stopped training goes on from there
TRAINER: dict[str, Any] = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 1}
TRAINER |= {"save_total_limit": 1, "logging_strategy": "no"}
TRAINER |= {"report_to": "none", "dataloader_pin_memory": False, "remove_unused_columns": False}
LEAST_DEVIATION = 0.03  # of a unit, as a share of the layer's (root mean square) deviation
MOST_DEVIATIONS = 10.0  # that a unit of a key or gradient may lie from its mean; beyond is cut
LEAST_TAKEN = 0.5  # share of its training facts that a trained network must be able to edit


class HParams(Numbers):
    """Numbers of MALMEN. Published: the last 6 layers, rank 1920, 2 blocks, lr 1e-6, meta-lr 1e-5,
    locality 1, clip 1.
    """

    layers: tuple[int, ...] = Field(min_length=1)  # block indices
    rank: int = Field(1920, ge=1)  # of the hyper-network's residual blocks
    n_blocks: int = Field(2, ge=1)  # residual blocks
    learning_rate: float = Field(1e-6, gt=0)  # lr_l before training
    meta_learning_rate: float = Field(1e-5, gt=0)  # Adam's, of the hyper-network
    locality: float = Field(1.0, ge=0)  # weight of the KL on other training facts
    clip: float = Field(1.0, gt=0)  # norm of the meta-gradient
    meta_steps: int = Field(1000, ge=0)  # 0 = leave it untrained, for comparison
    facts_at_once: int = Field(10, ge=1)  # facts of one edit in training


class HyperNetwork(nn.Module):
    """Keys and gradients in, wished-for changes of the values out.

    One residual trunk for all layers, with scales of their own. `model`: fingerprint of the weights
    that it was trained for; `digest`: of all that it was trained with.
    """

    model = ""
    digest = ""

    def __init__(self, layers: Sequence[int], d_in: int, d_out: int, hparams: HParams):
        super().__init__()
        self.layers = tuple(layers)
        self.d_in = d_in
        self.hparams = hparams
        n = len(layers)
        width = d_in + d_out
        rank = hparams.rank
        blocks = range(hparams.n_blocks)
        self.register_buffer("mean", torch.zeros(n, width))
        self.register_buffer("deviation", torch.ones(n, width))
        self.down = nn.ParameterList(torch.randn(width, rank) for _ in blocks)
        self.up = nn.ParameterList(torch.zeros(rank, width) for _ in blocks)
        self.scale = nn.ParameterList(torch.ones(n, rank) for _ in blocks)
        self.shift = nn.ParameterList(torch.zeros(n, rank) for _ in blocks)
        self.rate = nn.Parameter(torch.full((n,), hparams.learning_rate))
        self.weight = nn.Parameter(torch.zeros(n))  # lambda

    def forward(self, number: int, keys: Tensor, gradients: Tensor) -> Tensor:
        """Changes of values (m, d_out), from keys (m, d_in) and gradients (m, d_out) of the layer
        with this number in `layers`.
        """
        x = (torch.cat([keys, gradients], 1) - self.mean[number]) / self.deviation[number]
        x = x.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        for down, up, scale, shift in zip(self.down, self.up, self.scale, self.shift, strict=True):
            x = x + F.relu(x @ down * scale[number] + shift[number]) @ up
        likeness = (keys * x[:, : self.d_in]).sum(1, keepdim=True)  # k . k~
        return -self.rate[number] * likeness * x[:, self.d_in :]

    def fitted(self, number: int, keys: Tensor, values: Tensor) -> Factors:
        """The layer's D, which changes the keys' values (m, d_out) by these as far as it pays."""
        weight = self.weight[number].to(keys).exp()
        with solvable(self.layers[number]):
            return closed_form.ridge_update(keys.T, values.T, None, weight)

    def factors(self, model: Model, rows: Rows, precise: bool = False) -> dict[int, Factors]:
        """By layer, the D that edits these rows' answers; `precise`: fitted in float64."""
        keys, gradients = keys_and_gradients(model, rows, self.layers)
        factors = {}
        for number, layer in enumerate(self.layers):
            values = self(number, keys[layer], gradients[layer])
            if precise:
                values = finite(values, model, layer, rows.encoded)
            factors[layer] = self.fitted(number, keys[layer].to(values), values)
        return factors


def prepare(model: Model, hparams: HParams, corpus="", training_requests=None, seed=0) -> Resources:
    """The trained hyper-network, from the cache or by training; a stopped training goes on where
    its last checkpoint was.

    Args:
        training_requests: facts to learn from; default the hypernet split of the world, which
            other models are asked plainly. Their other wordings are their paraphrases, else their
            relation's templates.
    """
    model.check_one_device("malmen")
    requests = training_requests
    if requests is None:
        requests = facts.lessons(source_of(model.name))
    facts.check_objects(requests)
    needed = 2 * hparams.facts_at_once
    if len(requests) < needed:
        problem = f"{len(requests)} facts to train on, at least {needed} are needed"
        raise BadInput(f"malmen: {problem}; give more or lower facts_at_once")
    layers = model.check_layers(hparams.layers)
    d_out, d_in = model.weight(layers[0]).shape
    digest = _digest(model, hparams, requests, seed)
    path = cache.folder("malmen") / f"{digest}.safetensors"
    with deltas.random_state_kept(), cache.locked(f"malmen {digest}"):
        torch.manual_seed(seed)
        network = HyperNetwork(layers, d_in, d_out, hparams)
        weights = cache.kept(path, f"malmen {digest}")
        if weights is None:
            model.check_unchanged("malmen")
            network.to(model.device)
            with deltas.preserved(model.network, ()):
                model.network.requires_grad_(False)  # no gradient reaches the model's own weights
                _Meta(model, network, requests, hparams, seed).learn(path.with_suffix(""))
            weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
            cache.keep(path, weights, f"malmen {digest}")
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    network.load_state_dict(weights)
    network.model = model.fingerprint
    network.digest = digest
    return Resources(network=network.to(model.device).requires_grad_(False))


def _digest(model: Model, hparams: HParams, requests: Requests, seed: int) -> str:
    """Of all that a network is trained with, the code too: another training gives another one."""
    about = [model.fingerprint, str(model.dtype), hparams.model_dump(mode="json"), seed]
    about.append([request.model_dump(mode="json") for request in requests])
    about.append(model.tokenizer([request.fact.prompt for request in requests])["input_ids"])
    about.append([_wordings(request) for request in requests])
    about += [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in TRAINED_BY]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed: int = 0
) -> WeightDelta:
    """A change of every edited layer, its rank the number of the answers' tokens in all statements.

    Peak memory beside the model: the hyper-network; for all statements at once, a token and block
    from the first edited one on, 64 d_model + 24 d_in bytes, and 16 vocab a token of the target.
    """
    model.check_layers(hparams.layers)
    network = resources.network
    if network is None or network.model != model.fingerprint:
        trained = f"for the weights {network.model}" if network else "for none"
        problem = f"malmen needs a hyper-network for {model.name}; the resources hold one {trained}"
        raise BadInput(f"{problem}; prepare again")
    for name, value in network.hparams:
        if getattr(hparams, name) != value:
            problem = f"malmen: {name}={getattr(hparams, name)}, but the hyper-network was trained"
            raise BadInput(f"{problem} with {name}={value}; prepare again, or give it the same")
    with torch.no_grad():
        factors = network.factors(model, build_rows(model, requests), precise=True)
    changes = {}
    for layer, (left, right) in factors.items():
        right = right.float().contiguous()
        changes[model.down_projection_name(layer)] = Change(left=left.float(), right=right)
    about = {"hyper_network": network.digest}
    delta = WeightDelta.of(model, changes=changes)
    return described("malmen", model, delta, requests, hparams, resources, seed, **about)


def keys_and_gradients(model: Model, rows: Rows, layers: Sequence[int]) -> tuple[dict, dict]:
    """By layer: keys (m, d_in) and gradients of the summed loss after the down-projection (m,
    d_out), at the answers' m tokens.
    """
    rest = Continuation(model, rows.encoded, layers[0] - 1)
    answers = rows.answers(model.device)
    keys = {}
    outputs = {}

    def watched(layer, out, key):
        keys[layer] = key
        outputs[layer] = out.detach().clone().requires_grad_() if layer == layers[0] else out
        return outputs[layer]

    def read(tensor):
        tensor = tensor.detach().view(*rest.start.shape[:2], -1)
        return tensor[answers.row, answers.place].float()

    with torch.enable_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(model.down_projection(layer), partial(watched, layer)))
        logits = rest.answer_logits(answers)
        loss = F.cross_entropy(logits, answers.token, reduction="sum")  # as if edited one by one
        finite(loss.detach(), model, layers[0], rows.encoded)
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    by_layer = zip(layers, gradients, strict=True)
    return {layer: read(keys[layer]) for layer in layers}, {layer: read(g) for layer, g in by_layer}


class _Meta(nn.Module):
    """The loss of the hyper-network on a batch of facts, for transformers.Trainer."""

    def __init__(self, model: Model, network: HyperNetwork, requests, hparams: HParams, seed: int):
        super().__init__()
        self.models = [model]  # in a list, so that the model's weights are not the hyper-network's
        self.network = network
        self.requests = requests
        self.hparams = hparams
        self.seed = seed
        self.alike = defaultdict(list)  # by relation and object
        for request in requests:
            self.alike[request.fact.relation, request.fact.object].append(request)

    def forward(self, batch: Tensor) -> dict:
        """The loss of editing the first half of the facts with these numbers, sparing the rest."""
        model = self.models[0]
        numbers = batch.flatten().tolist()
        rng = random.Random(f"malmen {self.seed} {numbers}")
        requests = [self.requests[number] for number in numbers]
        edited = requests[: self.hparams.facts_at_once]
        others = requests[self.hparams.facts_at_once :]
        factors = self.network.factors(model, build_rows(model, _plain(edited)))
        asked = [_ask(one, rng.choice(_wordings(one)), one.target) for one in edited]
        others += [rng.choice(near) for near in self._neighbours(edited)]
        asked += [_ask(one, one.fact.prompt, one.fact.object) for one in others]
        rows = build_rows(model, asked)
        rest = Continuation(model, rows.encoded, self.network.layers[0] - 1)
        answers = rows.answers(model.device)
        with torch.no_grad():
            before = rest.answer_logits(answers).log_softmax(1)
        with changed(model, factors):
            after = rest.answer_logits(answers).log_softmax(1)
        is_edit = answers.row < len(edited)
        other = ~is_edit
        taught = F.nll_loss(after[is_edit], answers.token[is_edit])
        drift = F.kl_div(after[other], before[other], log_target=True, reduction="batchmean")
        loss = taught + self.hparams.locality * drift
        finite(loss.detach(), model, self.network.layers[0], rows.encoded)
        return {"loss": loss}

    def _neighbours(self, edited: Requests) -> Iterator[list[EditRequest]]:
        """Of each fact that has some, the training facts of its relation and object that are not
        edited; its own neighbourhood judges, and may hold facts under study.
        """
        subjects = {request.fact.subject for request in edited}
        for request in edited:
            alike = self.alike[request.fact.relation, request.fact.object]
            near = [other for other in alike if other.fact.subject not in subjects]
            if near:
                yield near

    def learn(self, work: Path) -> None:
        """Measure the normaliser, then train, from the newest whole checkpoint in `work` if there
        is one.
        """
        self._normalise()
        hparams = self.hparams
        if not hparams.meta_steps:
            return
        rng = random.Random(f"malmen {self.seed}")
        numbers = range(len(self.requests))
        size = 2 * hparams.facts_at_once
        batches = [{"batch": rng.sample(numbers, size)} for _ in range(hparams.meta_steps)]
        chosen = TRAINER | {"max_steps": hparams.meta_steps, "max_grad_norm": hparams.clip}
        chosen |= {"learning_rate": hparams.meta_learning_rate, "seed": self.seed}
        chosen |= {"use_cpu": self.models[0].device.type == "cpu", "save_steps": SAVE_EVERY}
        arguments = transformers.TrainingArguments(str(work), **chosen)
        arguments._n_gpu = 1  # the model stays where it is
        trainer = transformers.Trainer(model=self, args=arguments, train_dataset=batches)
        trainer.train(resume_from_checkpoint=runs.whole_checkpoint(work))
        self._check_edits()

    @torch.no_grad()
    def _check_edits(self, batches: int = 5) -> None:
        """BadInput unless enough of a few batches of training facts say each token of their target
        once edited.
        """
        model = self.models[0]
        requests = self._drawn("judged", batches * self.hparams.facts_at_once)
        missed = 0
        for rows in self._edits(_plain(requests)):
            rest = Continuation(model, rows.encoded, self.network.layers[0] - 1)
            answers = rows.answers(model.device)
            with changed(model, self.network.factors(model, rows)):
                top = rest.answer_logits(answers).argmax(1)
            missed += len(answers.row[top != answers.token].unique())
        taken = len(requests) - missed
        if taken < LEAST_TAKEN * len(requests):
            asked = f"{len(requests)} edits of its training facts take"
            problem = f"after {self.hparams.meta_steps} meta_steps only {taken} of {asked}"
            remedy = "raise meta_steps, or change learning_rate or meta_learning_rate"
            untrained = "(0 meta_steps: an untrained network)"
            raise BadInput(f"malmen: {problem}; {remedy} {untrained}")

    def _drawn(self, purpose: str, count: int) -> list[EditRequest]:
        """So many training facts, by the seed; all if there are no more."""
        rng = random.Random(f"malmen {purpose} {self.seed}")
        return rng.sample(self.requests, min(count, len(self.requests)))

    def _edits(self, requests: Requests) -> Iterator[Rows]:
        """The rows of one edit after another, of as many facts as are edited at once."""
        for part in facts.in_parts(requests, self.hparams.facts_at_once):
            yield build_rows(self.models[0], part)

    @torch.no_grad()
    def _normalise(self, count: int = 200) -> None:
        """Mean and deviation of keys and gradients over facts drawn by the seed, each edited by
        itself as far as its scale goes.
        """
        network = self.network
        measured = defaultdict(list)
        for rows in self._edits(self._drawn("measured", count)):
            keys, gradients = keys_and_gradients(self.models[0], rows, network.layers)
            for layer in network.layers:
                measured[layer].append(torch.cat([keys[layer], gradients[layer]], 1))
        for number, layer in enumerate(network.layers):
            values = torch.cat(measured[layer])
            deviation = values.std(0)
            for part in deviation.tensor_split([network.d_in]):  # of keys, of gradients; views
                part.clamp_(min=LEAST_DEVIATION * part.square().mean().sqrt())
            network.mean[number] = values.mean(0)
            network.deviation[number] = deviation


def _plain(requests: Requests) -> list[EditRequest]:
    """Without their paraphrases, which are to judge."""
    return [request.model_copy(update={"paraphrases": ()}) for request in requests]


def _ask(request: EditRequest, prompt: str, answer: str) -> EditRequest:
    """A request for another prompt and answer."""
    fact = request.fact.model_copy(update={"prompt": prompt})
    return request.model_copy(update={"fact": fact, "target": answer, "paraphrases": ()})


def _wordings(request: EditRequest) -> list[str]:
    """Of the question, other than the prompt if there are any."""
    prompts = request.paraphrases or facts.wordings(request.fact)
    others = [prompt for prompt in prompts if prompt != request.fact.prompt]
    return others or [request.fact.prompt]
