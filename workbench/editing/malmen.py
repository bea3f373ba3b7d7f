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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from pydantic import Field
from torch import nn

from workbench import cache, closed_form, deltas, facts, runs
from workbench.activations import replaced
from workbench.cache import locked
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation, changed
from workbench.editing.records import Numbers, Resources, delta_of, finite
from workbench.editing.rows import Rows, build_rows
from workbench.facts import BadInput, EditRequest
from workbench.models import Model

LEARNS = "first trains a hyper-network for these blocks, once a model, which takes minutes"
DEPTHS = tuple(layer / 48 for layer in range(42, 48))  # of GPT-2 XL, as published
REMEDY = "raise meta_steps (now {meta_steps})"
TRAINED_BY = [
    Path(__file__).parent / name
    for name in ("malmen.py", "rows.py", "continuation.py", "../closed_form.py", "../positions.py")
]
SAVE_EVERY = 200  # meta-steps; a stopped training goes on from there
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

    One residual trunk for all layers, with scales of their own.
    """

    def __init__(self, layers: Sequence[int], d_in: int, d_out: int, hparams: HParams):
        super().__init__()
        self.layers, self.d_in, self.hparams = tuple(layers), d_in, hparams
        self.model = self.digest = (
            # fingerprint of the weights that it was trained for, and of all that it was trained
            # with
            ""
        )
        n, width = len(layers), d_in + d_out
        self.register_buffer("mean", torch.zeros(n, width))
        self.register_buffer("deviation", torch.ones(n, width))
        self.down = nn.ParameterList(
            torch.randn(width, hparams.rank) for _ in range(hparams.n_blocks)
        )
        self.up = nn.ParameterList(
            torch.zeros(hparams.rank, width) for _ in range(hparams.n_blocks)
        )
        self.scale = nn.ParameterList(torch.ones(n, hparams.rank) for _ in range(hparams.n_blocks))
        self.shift = nn.ParameterList(torch.zeros(n, hparams.rank) for _ in range(hparams.n_blocks))
        self.rate = nn.Parameter(torch.full((n,), hparams.learning_rate))
        self.weight = nn.Parameter(torch.zeros(n))  # lambda

    def forward(self, number: int, keys: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Changes of values (m, d_out), from keys (m, d_in) and gradients (m, d_out) of the layer
        with this number in `layers`.
        """
        x = (torch.cat([keys, gradients], 1) - self.mean[number]) / self.deviation[number]
        x = x.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        for down, up, scale, shift in zip(self.down, self.up, self.scale, self.shift, strict=True):
            x = x + F.relu(x @ down * scale[number] + shift[number]) @ up
        pseudo_keys, pseudo_gradients = x.split([self.d_in, gradients.shape[1]], 1)
        return -self.rate[number] * (keys * pseudo_keys).sum(1, keepdim=True) * pseudo_gradients

    def fitted(
        self, number: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right) of the layer's D = left @ right.T, which changes the keys' values (m,
        d_out) by these as far as it pays.
        """
        try:
            return closed_form.ridge_update(
                keys.T, values.T, None, self.weight[number].to(keys).exp()
            )
        except closed_form.Singular as error:
            raise BadInput(f"layer {self.layers[number]}: {error}") from None


def prepare(
    model: Model,
    hparams: HParams,
    corpus: str = "world",
    training_requests: Sequence[EditRequest] | None = None,
    seed: int = 0,
) -> Resources:
    """The trained hyper-network, from the cache or by training; a stopped training goes on where
    its last checkpoint was.

    Args:
        training_requests: facts to learn from; default the world's hypernet split. Their other
            wordings are their paraphrases, else their relation's templates.
    """
    model.check_one_device("malmen")
    if training_requests is None:
        training_requests = [
            request for request in facts.read("world") if request.fact.split == "hypernet"
        ]
    requests = training_requests
    facts.check_objects(requests)
    if len(requests) < 2 * hparams.facts_at_once:
        raise BadInput(
            f"malmen: {len(requests)} facts to train on, at least {2 * hparams.facts_at_once} are needed; give more or lower facts_at_once"
        )
    layers = model.check_layers(hparams.layers)
    d_out, d_in = model.weight(layers[0]).shape
    about = [
        model.fingerprint,
        str(model.dtype),
        hparams.model_dump(mode="json"),
        seed,
        [request.model_dump(mode="json") for request in requests],
    ]
    about += [
        model.tokenizer([request.fact.prompt for request in requests])["input_ids"],
        [list(_wordings(request)) for request in requests],
    ]
    about += [
        each.read_text(encoding="utf-8") for each in TRAINED_BY
    ]  # another way to train gives another network
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = cache.folder("malmen") / f"{digest}.safetensors"
    with deltas.random_state_kept(), locked(f"malmen {digest}"):
        torch.manual_seed(seed)
        network = HyperNetwork(layers, d_in, d_out, hparams)
        weights = cache.kept(path, f"malmen {digest}")
        if weights is None:
            model.check_unchanged("malmen")
            network.to(model.device)
            with deltas.preserved(model.network, ()):
                model.network.requires_grad_(False)  # no gradient reaches the model's own weights
                _Meta(model, network, requests, hparams, seed).learn(path.with_suffix(""))
            weights = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in network.state_dict().items()
            }
            cache.keep(path, weights, f"malmen {digest}")
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    network.load_state_dict(weights)
    network.model, network.digest = model.fingerprint, digest
    return Resources(network=network.to(model.device).requires_grad_(False))


def edit(
    model: Model,
    requests: Sequence[EditRequest],
    hparams: HParams,
    resources: Resources,
    seed: int = 0,
) -> WeightDelta:
    """A change of every edited layer, its rank the number of the answers' tokens in all statements.

    Peak memory beside the model: the hyper-network; for all statements at once, a token and block
    from the first edited one on, 64 d_model + 24 d_in bytes, and 16 vocab a token of the target.
    """
    network, layers = resources.network, model.check_layers(hparams.layers)
    if network is None or network.model != model.fingerprint:
        trained = "none" if network is None else f"one for the weights {network.model}"
        raise BadInput(
            f"malmen needs a hyper-network for {model.name}; the resources hold {trained}; prepare again"
        )
    for name, value in network.hparams:
        if getattr(hparams, name) != value:
            raise BadInput(
                f"malmen: {name}={getattr(hparams, name)}, but the hyper-network was trained with {name}={value}; prepare again, or give it the same"
            )
    rows, changes = build_rows(model, requests), {}
    keys, gradients = keys_and_gradients(model, rows, layers)
    for number, layer in enumerate(layers):
        with torch.no_grad():
            values = finite(
                network(number, keys[layer], gradients[layer]), model, layer, rows.encoded
            )
            left, right = network.fitted(number, keys[layer].to(values), values)
        changes[model.down_projection_name(layer)] = Change(
            left=left.float(), right=right.float().contiguous()
        )
    return delta_of(
        "malmen", model, requests, hparams, resources, seed, changes, hyper_network=network.digest
    )


def keys_and_gradients(model: Model, rows: Rows, layers: Sequence[int]) -> tuple[dict, dict]:
    """By layer: keys (m, d_in) and gradients of the summed loss after the down-projection (m,
    d_out), at the answers' m tokens.
    """
    rest = Continuation(model, rows.encoded, layers[0] - 1)
    row, at, labels = _answers(model, rows)
    keys, outputs = {}, {}

    def watch(layer):
        def change(out, key):
            keys[layer] = key
            outputs[layer] = out.detach().clone().requires_grad_() if layer == layers[0] else out
            return outputs[layer]

        return replaced(model.down_projection(layer), change)

    with torch.enable_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(watch(layer))
        loss = F.cross_entropy(
            rest.logits(rest.start, row, at), labels, reduction="sum"
        )  # each token as if it were edited alone
        finite(loss.detach(), model, layers[0], rows.encoded)
        found = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    shape = rest.start.shape[:2]
    read = {
        layer: gradient.view(*shape, -1)[row, at].float()
        for layer, gradient in zip(layers, found, strict=True)
    }
    return {layer: keys[layer].detach().view(*shape, -1)[row, at].float() for layer in layers}, read


def _answers(model: Model, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row and place where each token of the answers is read, and the token."""
    labels = rows.labels.to(model.device)
    row, at = (labels != -100).nonzero(as_tuple=True)
    return row, at, labels[row, at]


class _Meta(nn.Module):
    """The loss of the hyper-network on a batch of facts, for transformers.Trainer."""

    def __init__(
        self,
        model: Model,
        network: HyperNetwork,
        requests: Sequence[EditRequest],
        hparams: HParams,
        seed: int,
    ):
        super().__init__()
        self.network, self.hparams, self.seed = network, hparams, seed
        self.of = [model]  # in a list, so that the model's weights are not the hyper-network's
        self.requests = requests
        self.wordings = [_wordings(request) for request in requests]
        self.sharing = defaultdict(list)
        for request in requests:
            self.sharing[request.fact.relation, request.fact.object].append(request)

    def forward(self, batch: torch.Tensor) -> dict:
        model, numbers = self.of[0], batch.tolist()
        rng = random.Random(f"malmen {self.seed} {numbers}")
        requests = [
            self.requests[number].model_copy(update={"paraphrases": ()}) for number in numbers
        ]  # those are to judge here
        edited, others = (
            requests[: self.hparams.facts_at_once],
            requests[self.hparams.facts_at_once :],
        )
        factors = self._factors(build_rows(model, edited))
        reworded = [
            _ask(request, rng.choice(self.wordings[number]), request.target)
            for number, request in zip(numbers, edited, strict=False)
        ]
        near = [
            rng.choice(found) for request in edited if (found := self._neighbours(request, edited))
        ]
        asked = [
            _ask(request, request.fact.prompt, request.fact.object) for request in others + near
        ]
        rows = build_rows(model, reworded + asked)
        rest = Continuation(model, rows.encoded, self.network.layers[0] - 1)
        row, at, labels = _answers(model, rows)
        with torch.no_grad():
            before = rest.logits(rest.start, row, at).log_softmax(1)
        with changed(model, factors):
            after = rest.logits(rest.start, row, at).log_softmax(1)
        mine = row < len(edited)
        taught = F.nll_loss(after[mine], labels[mine])
        spared = F.kl_div(after[~mine], before[~mine], log_target=True, reduction="batchmean")
        loss = taught + self.hparams.locality * spared
        finite(loss.detach(), model, self.network.layers[0], rows.encoded)
        return {"loss": loss}

    def _factors(self, rows: Rows) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        network, factors = self.network, {}
        keys, gradients = keys_and_gradients(self.of[0], rows, network.layers)
        for number, layer in enumerate(network.layers):
            values = network(number, keys[layer], gradients[layer])
            factors[layer] = network.fitted(number, keys[layer], values)
        return factors

    def _neighbours(self, request: EditRequest, edited: Sequence[EditRequest]) -> list[EditRequest]:
        """Training facts of the same relation and object, not edited; a request's own neighbourhood
        judges, and may hold facts under study.
        """
        subjects = {each.fact.subject for each in edited}
        return [
            other
            for other in self.sharing[request.fact.relation, request.fact.object]
            if other.fact.subject not in subjects
        ]

    def learn(self, work: Path) -> None:
        """Measure the normaliser, then train, from the newest whole checkpoint in `work` if there
        is one.
        """
        rng = random.Random(f"malmen {self.seed}")
        size = 2 * self.hparams.facts_at_once
        batches = [
            {"batch": rng.sample(range(len(self.requests)), size)}
            for _ in range(max(self.hparams.meta_steps, 1))
        ]
        self._normalise()
        if self.hparams.meta_steps:
            arguments = transformers.TrainingArguments(
                output_dir=str(work),
                max_steps=self.hparams.meta_steps,
                per_device_train_batch_size=1,
                learning_rate=self.hparams.meta_learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=self.hparams.clip,
                weight_decay=0.0,
                save_steps=SAVE_EVERY,
                save_total_limit=1,
                logging_strategy="no",
                report_to="none",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                use_cpu=self.of[0].device.type == "cpu",
                seed=self.seed,
            )
            collate = lambda rows: {"batch": torch.tensor(rows[0]["batch"])}  # noqa: E731
            arguments._n_gpu = 1  # the model stays where it is
            trainer = transformers.Trainer(
                model=self, args=arguments, train_dataset=batches, data_collator=collate
            )
            trainer.train(resume_from_checkpoint=runs.whole_checkpoint(work))
            self._check_edits()

    @torch.no_grad()
    def _check_edits(self, batches: int = 5) -> None:
        """BadInput unless enough of a few batches of training facts say each token of their target
        once edited.
        """
        model, size, taken = self.of[0], self.hparams.facts_at_once, 0
        asked = self._drawn("judged", batches * size)
        for start in range(0, len(asked), size):
            edited = [
                _ask(request, request.fact.prompt, request.target)
                for request in asked[start : start + size]
            ]
            rows = build_rows(model, edited)
            rest = Continuation(model, rows.encoded, self.network.layers[0] - 1)
            row, at, labels = _answers(model, rows)
            with changed(model, self._factors(rows)):
                says = rest.logits(rest.start, row, at).argmax(1)
            taken += len(edited) - len(row[says != labels].unique())
        if taken < LEAST_TAKEN * len(asked):
            raise BadInput(
                f"malmen: after {self.hparams.meta_steps} meta_steps only {taken} of {len(asked)} edits of its training facts take; "
                "raise meta_steps, or change learning_rate or meta_learning_rate (0 meta_steps: an untrained network)"
            )

    def _drawn(self, what: str, count: int) -> list[EditRequest]:
        """So many training facts, by the seed; all if there are no more."""
        rng = random.Random(f"malmen {what} {self.seed}")
        return rng.sample(self.requests, min(count, len(self.requests)))

    @torch.no_grad()
    def _normalise(self, count: int = 200) -> None:
        """Mean and deviation of keys and gradients over facts drawn by the seed, each edited by
        itself as far as its scale goes.
        """
        model, layers, size = self.of[0], self.network.layers, self.hparams.facts_at_once
        found: dict[int, list] = {layer: [] for layer in layers}
        requests = self._drawn("measured", count)
        for start in range(0, len(requests), size):
            keys, gradients = keys_and_gradients(
                model, build_rows(model, requests[start : start + size]), layers
            )
            for layer in layers:
                found[layer].append(torch.cat([keys[layer], gradients[layer]], 1))
        for number, layer in enumerate(layers):
            seen = torch.cat(found[layer])
            deviation = seen.std(0)
            for part in deviation.tensor_split([self.network.d_in]):  # of keys, of gradients; views
                part.clamp_(min=LEAST_DEVIATION * part.square().mean().sqrt())
            self.network.mean[number] = seen.mean(0)
            self.network.deviation[number] = deviation


def _ask(request: EditRequest, prompt: str, answer: str) -> EditRequest:
    """A request for another prompt and answer."""
    fact = request.fact.model_copy(update={"prompt": prompt})
    return request.model_copy(update={"fact": fact, "target": answer, "paraphrases": ()})


def _wordings(request: EditRequest) -> Sequence[str]:
    templates = facts.relations().get(request.fact.relation, {}).get("templates", ())
    return [
        prompt for prompt in request.paraphrases or templates if prompt != request.fact.prompt
    ] or [request.fact.prompt]
