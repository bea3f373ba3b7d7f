"""One look at a model: every probed prompt's retention, mass by category, ranks; and for the facts'
own prompts the lens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from workbench.activations import recorded
from workbench.facts import EditRequest, check_objects
from workbench.models import Model
from workbench.positions import encode
from workbench.tracking import lens
from workbench.tracking.categories import CATEGORIES, first_tokens, mass, token_categories
from workbench.tracking.retention import (
    Heard,
    answers_after,
    hear,
    judge,
    places,
    token_texts,
    tokens_at_once,
)

TOP = 10


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt to ask: `target` is the answer that counts as retained; `true` and `edited` name
    the categories.
    """

    group: str
    request: EditRequest
    prompt: str
    target: str
    true: str
    edited: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """Tables of one look: probes (a row a question), lens (fact, layer, category), tokens (fact,
    layer, rank 1 to 10).
    """

    probes: pd.DataFrame
    lens: pd.DataFrame
    tokens: pd.DataFrame


def questions(edited: Sequence[EditRequest], intrinsic: Sequence[EditRequest]) -> list[Question]:
    """What is asked of a model with these edits.

    A neighbour that was itself edited, or is asked already, is left out.
    """
    check_objects((*edited, *intrinsic))
    found, prompts = [], set()

    def ask(group: str, request: EditRequest, prompt: str, target: str, true: str) -> None:
        if prompt not in prompts:
            prompts.add(prompt)
            found.append(
                Question(
                    group=group,
                    request=request,
                    prompt=prompt,
                    target=target,
                    true=true,
                    edited=request.target,
                )
            )

    for request in edited:
        ask("edited", request, request.fact.question, request.target, request.fact.object)
    for request in intrinsic:
        ask("intrinsic", request, request.fact.question, request.fact.object, request.fact.object)
    for request in edited:
        for prompt in request.held_out:
            ask("paraphrase", request, prompt, request.target, request.fact.object)
    subjects = {request.fact.subject for request in edited}
    for request in edited:
        for prompt, answer in request.neighbourhood:
            if not any(subject in prompt for subject in subjects):
                ask("neighbourhood", request, prompt, answer, answer)
    return found


@dataclass
class Probe:
    """The same questions asked of the model again and again; tokens and categories are worked out
    once.

    Args:
        related: category -> objects, see facts.objects_of.
    """

    model: Model
    questions: Sequence[Question]
    related: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        self._took: dict[str, bool] = {}
        self._encode()

    def _encode(self) -> None:
        """The questions as tokens, with what the edits in force put in front of them."""
        self._in_front = tuple(map(id, self.model.in_force))
        prompts = [question.prompt for question in self.questions]
        self._answers = [question.target for question in self.questions]
        self._prompts = encode(self.model, [prompt.rstrip() for prompt in prompts])
        self._asked = answers_after(self.model, prompts, self._answers)
        true, edited = (
            [getattr(question, name) for question in self.questions] for name in ("true", "edited")
        )
        related = [
            self.related.get(question.request.fact.category, ()) for question in self.questions
        ]
        self._first = first_tokens(self.model, prompts, true, edited, related)
        self._category: dict[int, torch.Tensor] = {}

    def category_of(self, number: int, vocabulary: int) -> torch.Tensor:
        if number not in self._category:
            first = self._first
            self._category[number] = token_categories(
                self.model,
                vocabulary,
                first.true[number],
                first.edited[number],
                first.related[number],
            )
        return self._category[number]

    @torch.no_grad()
    def look(self, step: int, epoch: float = 0.0) -> Look:
        """Ask all questions now.

        `step` -1 is before the edit, 0 after it; `took` is whether the fact's edit had succeeded at
        step 0.
        """
        if self._in_front != tuple(map(id, self.model.in_force)):
            self._encode()
        probes: list[dict] = [{}] * len(self.questions)
        readings: list[dict] = []
        tokens: list[dict] = []
        order = self._asked.start * 4096 + self._asked.encoded.lengths
        for batch in self._asked.encoded.batches(tokens_at_once(self.model), order):
            heard, own, probs, own_probs = self._hear(batch)
            for place, number in enumerate(batch):
                probes[number] = self._row(number, probs[place]) | {
                    "p_answer": heard.log_p[place].exp().item(),
                    "said": heard.said[place].item(),
                    "at_once": bool(heard.at_once[place]),
                }
            for place, number in enumerate(own):
                readings += self._lens_rows(number, own_probs[place])
                tokens += self._token_rows(number, own_probs[place])
        table = self._judged(probes)
        if step == 0:
            own = table[table.group.isin(["edited", "intrinsic"])]
            self._took = dict(zip(own.fact_id, own.retained, strict=True))
        table.insert(5, "took", [self._took.get(fact_id) for fact_id in table.fact_id])
        frames = [table.astype({"took": "boolean"}), pd.DataFrame(readings), pd.DataFrame(tokens)]
        for frame in frames:
            frame.insert(0, "step", step)
        frames[0].insert(1, "epoch", epoch)
        return Look(probes=frames[0], lens=frames[1], tokens=frames[2])

    def _hear(self, batch: list[int]) -> tuple[Heard, list[int], torch.Tensor, torch.Tensor]:
        """One pass: what is heard of the answers; the numbers of the facts' own prompts among them;
        the distributions (n, vocab) in which first tokens are looked for, and of the facts' own
        prompts at every layer (m, n_blocks, vocab).
        """
        model, part = self.model, self._asked.rows(batch)
        rows, positions = places(part)
        on_device = part.encoded.to(model.device)
        with recorded(dict(enumerate(model.blocks))) as states:
            logits = model.logits_at(
                on_device.input_ids, on_device.attention_mask, positions.to(model.device), rows
            )
        heard = hear(model, part, logits, rows, positions)
        at = self._first.place[batch]
        final = logits[(positions == at[rows]).nonzero()[:, 0]]
        own = torch.tensor(
            [
                place
                for place, number in enumerate(batch)
                if self.questions[number].group in ("edited", "intrinsic")
            ],
            dtype=torch.long,
        )
        layers = lens.read(model, states, own, at[own], final[own]).softmax(-1).cpu()
        return heard, [batch[place] for place in own.tolist()], final.softmax(-1).cpu(), layers

    def _judged(self, probes: list[dict]) -> pd.DataFrame:
        """The rows of all questions, with what the model says."""
        said, at_once = ([row.pop(name) for row in probes] for name in ("said", "at_once"))
        verdicts = judge(self.model, self._prompts, self._asked, self._answers, said, at_once)
        tops = [verdict.top for verdict in verdicts]
        texts = token_texts(self.model.tokenizer)
        table = pd.DataFrame(probes)
        table.insert(5, "retained", [verdict.retained for verdict in verdicts])
        table.insert(
            6,
            "retained_first",
            [top == first for top, first in zip(tops, self._asked.first_tokens, strict=True)],
        )
        table.insert(
            7, "top_token", [texts[top].strip() if top < len(texts) else "" for top in tops]
        )
        return table

    def _row(self, number: int, probs: torch.Tensor) -> dict:
        question, clear = self.questions[number], self._first.clear[number]
        fact = question.request.fact
        by_category = mass(probs, self.category_of(number, len(probs))).tolist()
        known = {
            name
            for name in CATEGORIES
            if clear and (name != "related" or self.related.get(fact.category))
        }
        first = {"true": self._first.true[number], "edited": self._first.edited[number]}
        rank = {name: int((probs > probs[token]).sum()) + 1 for name, token in first.items()}
        return {
            "group": question.group,
            "fact_id": fact.id,
            "relation": fact.relation,
            "prompt": question.prompt,
            "target": question.target,
            **{
                f"p_{name}": p if name in known else None
                for name, p in zip(CATEGORIES, by_category, strict=True)
            },
            "rank_true": rank["true"],
            "rank_edited": rank["edited"],
            "clear": clear,
        }

    def _lens_rows(self, number: int, probs: torch.Tensor) -> list[dict]:
        fact_id, clear = self.questions[number].request.fact.id, self._first.clear[number]
        by_category = mass(
            probs, self.category_of(number, probs.shape[-1])
        ).tolist()  # (n_blocks, 5)
        token = {"true": self._first.true[number], "edited": self._first.edited[number]}
        rank = {
            name: ((probs > probs[:, [index]]).sum(1) + 1).tolist() for name, index in token.items()
        }
        return [
            {
                "fact_id": fact_id,
                "layer": layer,
                "category": name,
                "probability": p if clear else None,
                "rank": rank[name][layer] if name in rank else None,
            }
            for layer, masses in enumerate(by_category)
            for name, p in zip(CATEGORIES, masses, strict=True)
        ]

    def _token_rows(self, number: int, probs: torch.Tensor) -> list[dict]:
        fact_id = self.questions[number].request.fact.id
        return [
            {"fact_id": fact_id, "layer": layer, "rank": rank, "token": token, "probability": p}
            for layer, found in enumerate(lens.top_tokens(self.model, probs, TOP))
            for rank, (token, p) in enumerate(found, 1)
        ]
