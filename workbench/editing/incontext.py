"""In-context editing: the new fact is put in front of the question, and no weight changes.

    p(. | x)  becomes  p(. | "New Fact: s r o*.\\nPrompt: " x)

Source: IKE, arXiv 2305.12740, in its simplest form, without demonstrations. Differs from: there the
fact stands before every question about the edit, which its evaluation knows; here before the texts
that name its subject, which a user of the model can know (scope="all" puts every fact before every
text). Each paraphrase adds a statement.
"""

from typing import Literal

from workbench.editing.records import Numbers, Requests, Resources, described
from workbench.edits import Context, stated
from workbench.facts import BadInput
from workbench.models import Model

DEPTHS = ()
REMEDY = "the model does not go by its context; state more (paraphrases), or choose a larger one"


class HParams(Numbers):
    """Numbers of in-context editing; it has no layers."""

    layers: tuple[int, ...] = ()
    scope: Literal["subject", "all"] = "subject"  # which texts the facts stand in front of


def check(model: Model, requests: Requests, hparams: HParams, resources: Resources) -> None:
    """BadInput if layers are named."""
    if hparams.layers:
        raise BadInput("incontext: changes no layer; leave layers out")


def edit(
    model: Model, requests: Requests, hparams: HParams, resources: Resources, seed: int = 0
) -> Context:
    """The facts as statements. Nothing is computed but whether the model then says them."""
    check(model, requests, hparams, resources)
    statements = []
    for request in requests:
        subject = request.fact.subject
        for prompt in (request.fact.prompt, *request.paraphrases):
            statements.append((subject, stated(prompt, subject, request.target)))
    context = Context.of(model, statements=tuple(statements), scope=hparams.scope)
    return described("incontext", model, context, requests, hparams, resources, seed)
