"""One look at a model: every probed prompt's retention, mass by category, ranks; and for the facts'
own prompts the lens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from workbench.activations import recorded
from workbench.facts import EditRequest, Requests, check_objects
from workbench.models import Model
from workbench.tracking import lens, retention
from workbench.tracking.categories import CATEGORIES, first_tokens, mass, token_categories

TOP = 10
TOP_EVERYWHERE = 5  # at every token of a prompt, of which there are many
FARTHEST = 64  # tokens of a prompt, the last ones, at which the lens is read
OWN = ("edited", "intrinsic")  # groups of the facts' own prompts
MASSES = [f"p_{category}" for category in CATEGORIES]
RANKS = ["rank_true", "rank_edited"]
ABOUT = ["group", "fact_id", "relation", "prompt", "target"]
OBJECTS = ["true", "edited", "related"]
SAID = ["retained", "retained_first", "top_token", "top_category"]
PROBES = ["step", "epoch", *ABOUT, "took", *SAID, *MASSES, *RANKS, "clear", "p_answer"]
LENS = ["fact_id", "layer", "category", "probability", "rank"]
TOKENS = ["fact_id", "layer", "rank", "token", "word", "probability"]
CELL = ["position", "layer", "rank"]
TOKEN = ["question", "fact_id", "id", "token", "probability"]
POSITIONS = ["fact_id", *CELL, "at", "token", "probability", "p_true", "p_edited"]
IN_WORDS = 3  # of the likeliest tokens after the last block, on the edited facts' prompts


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt to ask: `target` is the answer that counts as retained."""

    group: str
    request: EditRequest
    prompt: str
    target: str

    @property
    def true(self) -> str:
        """The answer of the category "true": a neighbour has one of its own."""
        return self.target if self.group == "neighbourhood" else self.request.fact.object


@dataclass(frozen=True, kw_only=True)
class Look:
    """Tables of one look: probes (a row a question), lens (fact, layer, category), tokens (fact,
    layer, rank 1 to 10), positions (edited fact, position of its prompt, layer, rank 1 to 5).
    """

    probes: pd.DataFrame
    lens: pd.DataFrame
    tokens: pd.DataFrame
    positions: pd.DataFrame


def questions(edited: Requests, intrinsic: Requests) -> list[Question]:
    """What is asked of a model with these edits.

    A neighbour that was itself edited, or is asked already, is left out.
    """
    check_objects((*edited, *intrinsic))
    asked: dict[str, Question] = {}

    def ask(group: str, request: EditRequest, prompt: str, target: str) -> None:
        question = Question(group=group, request=request, prompt=prompt, target=target)
        asked.setdefault(prompt, question)

    for request in edited:
        ask("edited", request, request.fact.question, request.target)
    for request in intrinsic:
        ask("intrinsic", request, request.fact.question, request.fact.object)
    for request in edited:
        for prompt in request.held_out:
            ask("paraphrase", request, prompt, request.target)
    subjects = {request.fact.subject for request in edited}
    for request in edited:
        for prompt, answer in request.neighbourhood:
            if not any(subject in prompt for subject in subjects):
                ask("neighbourhood", request, prompt, answer)
    return list(asked.values())


@dataclass
class Probe:
    """The same questions asked of the model again and again; tokens and categories are worked out
    once.

    Args:
        related: kind of fact -> objects, see facts.objects_of.
        fitted: the lens, see `lens.fitted`.
    """

    model: Model
    questions: Sequence[Question]
    related: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fitted: lens.Lens = lens.LOGIT

    def __post_init__(self):
        self._took: dict[str, bool] = {}
        self._words: dict[tuple[int, int], str] = {}  # by question and token, as first decoded
        self._encode()

    def _encode(self) -> None:
        """The questions as tokens, with what the edits in force put in front of them."""
        self._in_front = [id(edit) for edit in self.model.in_force]
        rows = []
        for question in self.questions:
            request = question.request
            fact = request.fact
            asked = (question.group, fact.id, fact.relation, question.prompt, question.target)
            objects = (question.true, request.target, self.related.get(fact.kind, ()))
            rows.append((*asked, *objects))
        about = pd.DataFrame(rows, columns=[*ABOUT, *OBJECTS])
        self._asked = retention.answers_after(self.model, about.prompt, about.target)
        first = first_tokens(self.model, about.prompt, about.true, about.edited, about.related)
        self._first = first
        self._about = about.assign(clear=first.clear)
        # where first tokens are not clear they may stand elsewhere than the answer asked for
        place = torch.tensor(first.place.to_numpy()).maximum(self._asked.start - 1)
        self._place = place.minimum(self._asked.encoded.lengths - 1)
        self._categories = []
        for index, true, edited, related in first[OBJECTS].itertuples():
            self._categories.append(token_categories(self.model, true, edited, related))
            if about.group[index] == "edited" and first.clear[index]:
                self._words[index, true] = about.true[index]
                self._words[index, edited] = about.edited[index]

    @torch.no_grad()
    def look(self, step: int, epoch: float = 0.0) -> Look:
        """Ask all questions now.

        `step` -1 is before the edit, 0 after it; `took` is whether the fact's edit had succeeded at
        step 0.
        """
        if self._in_front != [id(edit) for edit in self.model.in_force]:
            self._encode()
        heard = []
        shares = {}
        lens_rows: list[tuple] = []
        likeliest: list[pd.DataFrame] = []
        cells: list[pd.DataFrame] = []
        with recorded(dict(enumerate(self.model.blocks))) as states:
            for one in retention.passes(self.model, self._asked):
                heard.append(retention.readings(self.model, self._asked, one))
                logits = one.logits_at(self._place)
                for index, probs in zip(one.indices, logits.softmax(-1).cpu(), strict=True):
                    shares[index] = self._shares(index, probs[None])
                for index, probs in self._lenses(one, states, logits):
                    lens_rows += self._lens_rows(index, probs[-1])
                    likeliest.append(self._likeliest(index, probs[-1:], TOP))
                    if self._about.group[index] == "edited":
                        cells.append(self._cells(index, probs))
        probes = self._probes(pd.concat(heard).sort_index(), shares)
        if step == 0:
            edits = probes[probes.group.isin(OWN)]
            self._took = dict(zip(edits.fact_id, edits.retained, strict=True))
        probes["took"] = probes.fact_id.map(self._took).astype("boolean")
        lenses = pd.DataFrame(lens_rows, columns=LENS)
        tokens = self._worded(_joined(likeliest, [*CELL, *TOKEN]))[TOKENS]
        positions = _joined(cells, POSITIONS)
        for table in (probes, lenses, tokens, positions):
            table.insert(0, "step", step)
        probes.insert(1, "epoch", epoch)
        return Look(probes=probes[PROBES], lens=lenses, tokens=tokens, positions=positions)

    def _lenses(self, one: retention.Pass, states: dict, logits: Tensor) -> Iterator[tuple]:
        """Of the facts' own prompts in a pass: which, and probs (positions, n_blocks, vocab) of the
        lens. The last position is where the answer is read; of edited facts those before it are
        there too.
        """
        for row, index in enumerate(one.indices):
            group = self._about.group[index]
            if group in OWN:
                end = int(self._place[index]) + 1
                start = max(0, end - FARTHEST) if group == "edited" else end - 1
                at = torch.arange(start, end)
                read = lens.read(self.model, states, torch.full_like(at, row), at, self.fitted)
                read[-1, -1] = logits[row]  # what the model itself says, bit for bit
                yield index, read.softmax(-1).cpu()

    def _cells(self, index: int, probs: Tensor) -> pd.DataFrame:
        """The table of probs (positions, n_blocks, vocab)."""
        table = self._likeliest(index, probs, TOP_EVERYWHERE)
        times = len(table) // len(probs)
        end = int(self._place[index]) + 1
        prompt = self._asked.encoded.input_ids[index, end - len(probs) : end]
        table["at"] = self._texts(prompt.repeat_interleave(times))
        for name, first in (("p_true", self._first.true), ("p_edited", self._first.edited)):
            p = probs[..., first[index]].flatten()
            table[name] = p.repeat_interleave(TOP_EVERYWHERE)
        return table

    def _likeliest(self, index: int, probs: Tensor, count: int) -> pd.DataFrame:
        """The likeliest tokens at each position and layer of probs (positions, n_blocks, vocab)."""
        length, n_blocks, _ = probs.shape
        cells = range(1 - length, 1), range(n_blocks), range(1, count + 1)
        table = pd.MultiIndex.from_product(cells, names=CELL).to_frame(index=False)
        values, ids = probs.topk(count)
        table["question"] = index
        table["fact_id"] = self._about.fact_id[index]
        table["id"] = ids.flatten()
        table["token"] = self._texts(ids.flatten())
        table["probability"] = values.flatten()
        return table

    def _texts(self, tokens: Tensor) -> pd.Series:
        """Each token's text."""
        tokenizer, known = self.model.tokenizer, tokens.unique().tolist()
        texts = {token: retention.token_text(tokenizer, token) for token in known}
        return pd.Series(tokens).map(texts)

    def _shares(self, index: int, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Mass by category (k, 5), NaN where first tokens are not clear, and the ranks of the true
        and the edited answer (k, 2); of probs (k, vocab).
        """
        masses = mass(probs, self._categories[index])
        if not self._first.clear[index]:
            masses.fill_(torch.nan)
        tokens = [self._first.true[index], self._first.edited[index]]
        is_above = probs[:, None] > probs[:, tokens, None]  # (k, 2, vocab)
        return masses, is_above.sum(-1) + 1

    def _probes(self, heard: pd.DataFrame, shares: dict[int, tuple]) -> pd.DataFrame:
        """The table of all questions, but for `took` and when it was."""
        masses, ranks = zip(*(shares[index] for index in heard.index), strict=True)
        judged = retention.judged(self.model, self._asked, heard)
        table = self._about.join(judged[["token", "p", *SAID[:3]]])
        table = table.rename(columns={"p": "p_answer"})
        counting = zip(self._categories, table.token, strict=True)
        categories = [CATEGORIES[of_tokens[token]] for of_tokens, token in counting]
        table["top_category"] = pd.Series(categories).where(table.clear, None)
        table[MASSES] = torch.cat(masses).double()
        table[RANKS] = torch.cat(ranks)
        table["p_related"] = table.p_related.where(self._about.related.map(bool))
        return table

    def _lens_rows(self, index: int, probs: Tensor) -> Iterator[tuple]:
        fact_id = self._about.fact_id[index]
        masses, ranks = self._shares(index, probs)
        for layer in range(len(probs)):
            ranked = [*ranks[layer].tolist(), None, None, None]
            for row in zip(CATEGORIES, masses[layer].tolist(), ranked, strict=True):
                yield fact_id, layer, *row

    def _worded(self, tokens: pd.DataFrame) -> pd.DataFrame:
        """The table with the word that each token begins: a known answer's, else as decoding goes
        on after the last block's likeliest.
        """
        places = list(zip(tokens.question, tokens.id, strict=True))
        is_asked = (tokens.layer == self.model.n_blocks - 1) & (tokens["rank"] <= IN_WORDS)
        is_asked &= tokens.question.map(self._about.group) == "edited"
        asked = [place for place, is_one in zip(places, is_asked, strict=True) if is_one]
        fresh = [place for place in asked if place not in self._words]
        prompts = [self._about.prompt[index] for index, _ in fresh]
        words = retention.begun_words(self.model, prompts, [token for _, token in fresh])
        self._words |= dict(zip(fresh, words, strict=True))
        known = zip(places, tokens.token, strict=True)
        words = [self._words.get(place, text.strip()) for place, text in known]
        return tokens.assign(word=words, probability=tokens.probability.astype(float))


def _joined(tables: Iterable[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """These columns of all tables; of none, a table without rows."""
    tables = [table[columns] for table in tables]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
