"""One look at a model: every probed prompt's retention, mass by category, ranks; and for the facts' own prompts the lens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from workbench.facts import EditRequest, check_objects
from workbench.models import Model
from workbench.positions import Encoded, encode
from workbench.tracking import lens
from workbench.tracking.categories import CATEGORIES, mass, token_categories
from workbench.tracking.retention import expected_tokens, first_words, tokens_at_once

TOP = 10


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt to ask: `target` is the answer that counts as retained; `true` and `edited` name the categories."""

    group: str
    request: EditRequest
    prompt: str
    target: str
    true: str
    edited: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """Tables of one look: probes (a row a question), lens (fact, layer, category), tokens (fact, layer, rank 1 to 10)."""

    probes: pd.DataFrame
    lens: pd.DataFrame
    tokens: pd.DataFrame


def questions(edited: Sequence[EditRequest], intrinsic: Sequence[EditRequest]) -> list[Question]:
    """What is asked of a model with these edits. A neighbour that was itself edited, or is asked already, is left out."""
    check_objects((*edited, *intrinsic))
    found, prompts = [], set()

    def ask(group: str, request: EditRequest, prompt: str, target: str, true: str) -> None:
        if prompt not in prompts:
            prompts.add(prompt)
            found.append(Question(group=group, request=request, prompt=prompt, target=target, true=true, edited=request.target))

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
    """The same questions asked of the model again and again; tokens and categories are worked out once.

    Args:
        related: category -> objects, see facts.objects_of.
    """

    model: Model
    questions: Sequence[Question]
    related: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        prompts = [question.prompt for question in self.questions]
        tokenizer = self.model.tokenizer
        self._encoded: Encoded = encode(tokenizer, prompts)
        self._expected = expected_tokens(tokenizer, prompts, [question.target for question in self.questions])
        self._true = expected_tokens(tokenizer, prompts, [question.true for question in self.questions])
        self._edited = expected_tokens(tokenizer, prompts, [question.edited for question in self.questions])
        self._category: dict[int, torch.Tensor] = {}
        self._took: dict[str, bool] = {}

    def category_of(self, number: int, vocabulary: int) -> torch.Tensor:
        if number not in self._category:
            related = self.related.get(self.questions[number].request.fact.category, ())
            self._category[number] = token_categories(self.model, vocabulary, self._true[number], self._edited[number], related)
        return self._category[number]

    @torch.no_grad()
    def look(self, step: int, epoch: float = 0.0) -> Look:
        """Ask all questions now. `step` -1 is before the edit, 0 after it; `took` is whether the fact's edit had succeeded at step 0."""
        probes: list[dict] = []
        readings: list[dict] = []
        tokens: list[dict] = []
        for batch in self._encoded.batches(tokens_at_once(self.model)):
            part = self._encoded.rows(batch)
            logits = lens.layer_logits(self.model, part)  # (n, n_blocks, vocab)
            tops = first_words(self.model, part, logits[:, -1], [self._expected[number] for number in batch])
            probs = logits.softmax(-1).cpu()
            for place, number in enumerate(batch):
                probes.append(self._row(number, probs[place, -1], tops[place]) | {"number": number})
                if self.questions[number].group in ("edited", "intrinsic"):
                    readings += self._lens_rows(number, probs[place])
                    tokens += self._token_rows(number, probs[place])
        table = pd.DataFrame(probes).sort_values("number").drop(columns="number").reset_index(drop=True)
        if step == 0:
            own = table[table.group.isin(["edited", "intrinsic"])]
            self._took = dict(zip(own.fact_id, own.retained, strict=True))
        table.insert(7, "took", [self._took.get(fact_id) for fact_id in table.fact_id])
        frames = [table.astype({"took": "boolean"}), pd.DataFrame(readings), pd.DataFrame(tokens)]
        for frame in frames:
            frame.insert(0, "step", step)
        frames[0].insert(1, "epoch", epoch)
        return Look(probes=frames[0], lens=frames[1], tokens=frames[2])

    def _row(self, number: int, probs: torch.Tensor, top: int) -> dict:
        question = self.questions[number]
        fact = question.request.fact
        by_category = mass(probs, self.category_of(number, len(probs))).tolist()
        known = bool(self.related.get(fact.category))
        rank = {name: int((probs > probs[token]).sum()) + 1 for name, token in (("true", self._true[number]), ("edited", self._edited[number]))}
        return {
            "group": question.group,
            "fact_id": fact.id,
            "relation": fact.relation,
            "prompt": question.prompt,
            "target": question.target,
            "retained": top == self._expected[number],
            "top_token": self.model.tokenizer.decode([top]).strip(),
            **{f"p_{name}": p if known or name != "related" else None for name, p in zip(CATEGORIES, by_category, strict=True)},
            "rank_true": rank["true"],
            "rank_edited": rank["edited"],
        }

    def _lens_rows(self, number: int, probs: torch.Tensor) -> list[dict]:
        fact_id = self.questions[number].request.fact.id
        by_category = mass(probs, self.category_of(number, probs.shape[-1])).tolist()  # (n_blocks, 5)
        token = {"true": self._true[number], "edited": self._edited[number]}
        rank = {name: ((probs > probs[:, [index]]).sum(1) + 1).tolist() for name, index in token.items()}
        return [
            {"fact_id": fact_id, "layer": layer, "category": name, "probability": p, "rank": rank[name][layer] if name in rank else None}
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
