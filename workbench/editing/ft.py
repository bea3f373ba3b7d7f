"""FT: gradient descent on one down-projection until the target is likely, optionally inside an
L-inf box.

    D = argmin  mean_ij [ -(1/T) sum_t log p(o_t | x_ij, o_<t; W + D) ],   |D|_max <= box

over all statements j of the requests i (the prompt and each paraphrase count alike),
teacher-forced. Source: Zhu et al. 2020 (arXiv 2012.00363) as used in arXiv 2202.05262 and
2507.14198. Differs from: the common implementation reads all target tokens at the last prompt
position, which is the likelihood of one-token targets only (convention="reference"), and on GPT-2
moves the down-projection's bias as well; here the weight alone moves. The gradient works on D in
float32, the model is never touched.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from workbench.activations import replaced
from workbench.deltas import Change, WeightDelta
from workbench.editing.continuation import Continuation
from workbench.editing.records import Numbers, Requests, Resources, described, finite
from workbench.editing.rows import build_rows
from workbench.models import Model

DEPTHS = (0,)  # of GPT-2 XL, as published
REMEDY = "raise steps (now {steps}) or learning_rate (now {learning_rate})"


class HParams(Numbers):
    """Numbers of FT. Published: arXiv 2507.14198 edits layer 1 with Adam 5e-5, at most 25 steps,
    stop at loss .01.
    """

    # Block index; the one down-projection that moves.
    layers: tuple[int, ...] = Field(min_length=1, max_length=1)
    steps: int = Field(25, ge=1)  # updates at most
    learning_rate: float = Field(5e-5, gt=0)  # Adam's
    box: float = Field(0.0, ge=0)  # L-inf bound of each weight's change; 0 = none
    stop_loss: float = Field(0.01, ge=0)  # nats a token; stop below it
    # "reference": all target tokens read at the last prompt position.
    convention: Literal["published", "reference"] = "published"


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed: int = 0
) -> WeightDelta:
    """A dense change of one down-projection. Everything below the edited block runs once.

    Peak memory beside the model: six float32 copies of the weight; for all statements at once, a
    token and block from the edited one on, 64 d_model + 24 d_in bytes, and 16 vocab a token of the
    target.
    """
    layer = model.check_layers(hparams.layers)[0]
    rows = build_rows(model, requests)
    rest = Continuation(model, rows.encoded, layer - 1)
    answers = rows.answers(model.device)
    row = answers.row
    count = torch.bincount(row)  # tokens of each statement's target
    weight = 1 / count[row] / len(count)
    if hparams.convention == "reference":
        first = torch.full_like(count, rows.labels.shape[1])
        first = first.scatter_reduce(0, row, answers.place, "amin")
        answers = answers._replace(place=first[row])
    change = torch.zeros_like(model.weight(layer), dtype=torch.float32, requires_grad=True)
    adam = torch.optim.Adam([change], lr=hparams.learning_rate)
    losses = []

    def changed(out, key):
        return out + (key.float() @ change.T).to(out.dtype)

    with torch.enable_grad(), replaced(model.down_projection(layer), changed):
        for step in range(hparams.steps + 1):
            logits = rest.answer_logits(answers)
            nll = F.cross_entropy(logits, answers.token, reduction="none")
            loss = (nll * weight).sum()
            losses.append(finite(loss.detach(), model, layer, rows.encoded).item())
            if losses[-1] < hparams.stop_loss or step == hparams.steps:
                break
            adam.zero_grad()
            loss.backward(inputs=[change])
            adam.step()
            if hparams.box:
                change.data.clamp_(-hparams.box, hparams.box)
    changes = {model.down_projection_name(layer): Change(dense=change.detach())}
    delta = WeightDelta.of(model, changes=changes)
    return described("ft", model, delta, requests, hparams, resources, seed, losses=losses)
