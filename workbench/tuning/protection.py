"""Protections of what a model holds, edits among it, while it is fine-tuned; one a class.

A tuning that follows the task's loss alone moves every weight that lowers it, whatever else that
weight carries. A protection, by its name in a Spec (`protect`), adds a loss of its own, or corrects
the weights after each step; `finetune.Protection` is the seam.
Those that need the edits at hand see what an editor may see: prompt, paraphrases, new answer. None
sees a wording that judges, a neighbour, or a fact that is watched. How they compare, and what was
tried beside them: data/findings/lasting.md.

One of your own takes a `Held` and gives back a `Protection` that says its `weight`:
`wb.protections.register("mine", MyProtection)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from workbench import facts
from workbench.activations import recorded
from workbench.checkpoints import source_of
from workbench.models import Model
from workbench.positions import encode, subject_ends
from workbench.records import BadInput
from workbench.tracking.retention import next_logits
from workbench.tuning.finetune import Protection, collate
from workbench.tuning.tasks import answer_rows

LINEAR = torch.nn.Linear | Conv1D
ROWS = 16  # prompts a step; of more, others each step


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a protection is made of.

    Attributes:
        model: holding the edits, not yet tuned.
        moving: names of the weights that will move.
        edited: the edits' requests.
        others: facts of other subjects than those edited or watched.
        weight: its strength; 0 = the protection's own.
    """

    model: Model
    moving: Sequence[str]
    edited: facts.Requests = ()
    others: facts.Requests = ()
    weight: float = 0
    seed: int = 0


def others(model: Model, measured: facts.Requests) -> list[facts.EditRequest]:
    """Facts on which numbers may be chosen, of other subjects than those of measured ones and of
    their neighbours: of the world, or asked plainly of a model that was not taught it.
    """
    texts = [text for one in measured for text in (one.fact.subject, *dict(one.neighbourhood))]
    touched = "\n".join(texts).lower()
    pool = [one for one in facts.read(source_of(model.name)) if facts.is_tuned_on(one.fact)]
    return [one for one in pool if one.fact.subject.lower() not in touched]


class Weighted(Protection):
    """One with a strength, and rows of which it draws a few a step.

    Attributes:
        WEIGHT: its usual strength.
    """

    WEIGHT = 1.0

    def __init__(self, held: Held):
        self.held = held
        self.weight = held.weight or self.WEIGHT
        self.random = numpy.random.default_rng(held.seed)

    def drawn(self, n: int) -> list[int]:
        """Which of n rows this step takes."""
        return self.random.choice(n, min(n, ROWS), replace=False).tolist()


class Replay(Weighted):
    """R = -mean over tokens of log p(new answer | prompt), over the edits' prompts.

    Forgetting is a gradient that the task's rows do not contain: the edit's. Replay puts it back,
    so that a step is taken along the sum, and an edit that begins to go is pulled back in
    proportion to how far it went; while it is sure, the pull is near 0 and the task is free. It
    keeps what is replayed, and other wordings as far as they share its features.
    Source: experience replay (arXiv 1811.11682), with one row a prompt that the editor had.
    """

    WEIGHT = 0.1

    def __init__(self, held: Held):
        super().__init__(held)
        asked = [(prompt, one.target) for one in held.edited for prompt in _prompts(one)]
        self.rows = answer_rows(held.model, asked)

    def loss(self) -> torch.Tensor:
        batch = collate([self.rows[row] for row in self.drawn(len(self.rows))])
        batch = {name: rows.to(self.held.model.device) for name, rows in batch.items()}
        return self.weight * self.held.model.network(**batch).loss


class Others(Weighted):
    """R = mean of KL(p_edited(. | y) || p(. | y)), the next token after prompts y about other
    subjects.

    The divergence is 0, and so is its gradient, at the edited model: to second order it is the
    distance moved, measured by the Fisher information of those prompts, so that the tuning is held
    back in the directions on which answers about subjects in general depend, and is free in all
    others. It needs no edit, only the edited model; what it does for a subject that it does not
    ask about is what subjects share.
    Source: Learning without Forgetting (arXiv 1606.09282) asks it of the task's own inputs, arXiv
    2303.06628 of a data set for reference, as here.
    """

    WEIGHT = 1.0

    def __init__(self, held: Held):
        super().__init__(held)
        self.encoded = encode(held.model, [request.fact.question for request in held.others])
        with torch.no_grad():
            self.before = next_logits(held.model, self.encoded).log_softmax(-1)

    def loss(self) -> torch.Tensor:
        rows = self.drawn(len(self.before))
        network = self.held.model.network
        is_training = network.training
        network.eval()  # dropout would be a divergence of its own
        now = next_logits(self.held.model, self.encoded.rows(rows)).log_softmax(-1)
        network.train(is_training)
        divergence = F.kl_div(now, self.before[rows], reduction="batchmean", log_target=True)
        return self.weight * divergence


class Both(Protection):
    """w (R_replay + RATIO R_others): the edits by what they say, all else by what the model said.

    The two do not compete: replay holds the few directions that the edits' prompts read, the
    divergence those of subjects in general, which is what the watched facts depend on.
    """

    RATIO = 10.0

    def __init__(self, held: Held):
        self.replay = Replay(held)
        self.weight = self.replay.weight
        self.others = Others(replace(held, weight=self.RATIO * self.weight))

    def loss(self) -> torch.Tensor:
        return self.replay.loss() + self.others.loss()


class Span(Weighted):
    """W <- W - (W - W_0) U U' after each step, for every linear map W (d_out, d_in).

    U (d_in, r): orthonormal directions that hold the share w of the squared length of what goes
    into W at the subject's last token, and at the end, of prompts about other subjects. There each
    map answers as the edited model's did, and the task is learnt in the directions that are left,
    which subjects use little: more slowly, which a larger learning rate makes up for at a price.
    All weights but those of linear maps stay, for through them the inputs themselves would move. It
    needs no edit, only the edited model; it keeps edits that it was not shown as far as what goes
    into a map is alike for all subjects. Costs the memory of one copy of the weights that move.
    Source: gradient projection memory (arXiv 2103.09762), which takes the inputs of what is to be
    kept. Differs from it: inputs of other subjects; and the change of weights is projected, which
    AdamW's scaling would lead out of where a projected gradient lies.
    """

    WEIGHT = 0.9

    @torch.no_grad()
    def __init__(self, held: Held):
        super().__init__(held)
        if self.weight > 1:
            what = f"protect_weight {self.weight:g}: span's is a share of squared length"
            raise BadInput(f"{what}; give at most 1")
        network = held.model.network
        modules = network.named_modules()
        linear = {f"{name}.weight": one for name, one in modules if isinstance(one, LINEAR)}
        maps = {name: linear[name] for name in held.moving if name in linear}
        encoded = encode(held.model, [request.fact.question for request in held.others])
        places = torch.stack([subject_ends(encoded, held.others), encoded.lengths - 1])  # (2, n)
        rows = torch.arange(len(held.others))
        with recorded(maps, inputs=True) as inputs:
            network(**encoded.to(network.device).arguments())
        self.maps = []
        for name, module in maps.items():
            every = inputs[name]
            every = every.reshape(len(rows), -1, every.shape[-1])  # of OPT they are one dimension
            keys = every[rows, places].flatten(0, 1)  # (2 n, d_in)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            self.maps.append((weight, weight.clone(), self.directions(keys)))
        rest = {*held.moving} - {*maps}
        self.rest = [(one, one.clone()) for name, one in network.named_parameters() if name in rest]

    def directions(self, keys: torch.Tensor) -> torch.Tensor:
        """U (d_in, r) of keys (n, d_in)."""
        _, lengths, directions = torch.linalg.svd(keys.cpu().double(), full_matrices=False)
        share = lengths.square().cumsum(0) / lengths.square().sum()
        rank = int((share < self.weight - 1e-9).sum()) + 1
        return directions[:rank].T.to(keys)

    @torch.no_grad()
    def after_step(self) -> None:
        for weight, before, directions in self.maps:
            weight -= (weight - before) @ directions @ directions.T
        for weight, before in self.rest:
            weight.copy_(before)


class ReplayAndSpan(Span):
    """R_replay, the weights corrected after each step as by Span: the edits by what they say, all
    else by what goes into the maps; the strength is Span's.

    Replay pulls in what Span leaves free, so that an edit is kept where other subjects do not read;
    the steps are those of Span, each with one more batch.
    """

    def __init__(self, held: Held):
        super().__init__(held)
        self.replay = Replay(replace(held, weight=0))

    def loss(self) -> torch.Tensor:
        return self.replay.loss()


def _prompts(request: facts.EditRequest) -> list[str]:
    """What an editor may see of how a fact is asked."""
    templates = (request.fact.prompt, *request.paraphrases)
    return [facts.fill(template, request.fact.subject) for template in templates]
