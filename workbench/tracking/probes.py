"""One look at a model: every probed prompt's retention, mass by category, ranks; and for the facts'
own prompts the lens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.return_types import topk as Top

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
        self._pairs = first[["true", "edited"]].to_numpy().tolist()
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
        through_lens = {}  # the shares by block, of the facts' own prompts
        tops: dict[int, Top] = {}  # (1, n_blocks, TOP)
        cells: dict[int, tuple[Top, Tensor]] = {}  # of every position, with p_true and p_edited
        with recorded(dict(enumerate(self.model.blocks))) as states:
            for one in retention.passes(self.model, self._asked):
                heard.append(retention.readings(self.model, self._asked, one))
                logits = one.logits_at(self._place)
                for index, probs in zip(one.indices, logits.softmax(-1).cpu(), strict=True):
                    shares[index] = self._shares(index, probs[None])
                for index, probs in self._lenses(one, states, logits):
                    through_lens[index] = self._shares(index, probs[-1])
                    tops[index] = probs[-1:].topk(TOP)
                    if self._about.group[index] == "edited":
                        cells[index] = probs.topk(TOP_EVERYWHERE), probs[..., self._pairs[index]]
        self._decode_words(tops)
        probes = self._probes(pd.concat(heard).sort_index(), shares)
        if step == 0:
            edits = probes[probes.group.isin(OWN)]
            self._took = dict(zip(edits.fact_id, edits.retained, strict=True))
        probes["took"] = probes.fact_id.map(self._took).astype("boolean")
        lenses = self._lens(through_lens)
        tokens = self._tokens(tops)
        positions = self._positions(cells)
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

    def _positions(self, cells: dict[int, tuple[Top, Tensor]]) -> pd.DataFrame:
        """The table of the edited facts' prompts."""
        if not cells:
            return pd.DataFrame(columns=POSITIONS)
        table = self._likeliest({index: top for index, (top, _) in cells.items()})
        at, p = [], []
        for index, (top, answers) in cells.items():
            length, n_blocks, count = top.values.shape
            end = int(self._place[index]) + 1
            prompt = self._asked.encoded.input_ids[index, end - length : end]
            at.append(prompt.repeat_interleave(n_blocks * count))
            p.append(answers.flatten(0, 1).repeat_interleave(count, 0))
        table["at"] = self._texts(torch.cat(at))
        table[["p_true", "p_edited"]] = torch.cat(p).numpy()
        return table[POSITIONS]

    def _likeliest(self, tops: dict[int, Top]) -> pd.DataFrame:
        """A row for each of the likeliest tokens (positions, n_blocks, count) of some questions."""
        parts = []
        for top in tops.values():
            first = torch.tensor([1 - len(top.values), 0, 1])
            parts.append(first + torch.ones_like(top.values).nonzero())
        table = pd.DataFrame(torch.cat(parts).numpy(), columns=CELL)
        sizes = [len(part) for part in parts]
        table["index"] = numpy.repeat(list(tops), sizes)
        table["fact_id"] = self._about.fact_id[table["index"]].array
        flat = [top.indices.flatten() for top in tops.values()]
        ids = torch.cat(flat)
        table["id"] = ids.numpy()
        table["token"] = self._texts(ids)
        values = [top.values.flatten() for top in tops.values()]
        table["probability"] = torch.cat(values).numpy()
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
        pair = probs[:, self._pairs[index]]
        is_above = probs[:, None] > pair[..., None]  # (k, 2, vocab)
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

    def _lens(self, shares: dict[int, tuple[Tensor, Tensor]]) -> pd.DataFrame:
        """The table of the lens: (n_blocks, 5) and (n_blocks, 2) of each of the facts."""
        if not shares:
            return pd.DataFrame(columns=LENS)
        masses, known = map(torch.stack, zip(*shares.values(), strict=True))
        ranks = F.pad(known.double(), (0, len(CATEGORIES) - 2), value=torch.nan)
        axes = self._about.fact_id[list(shares)], range(masses.shape[1]), CATEGORIES
        table = pd.MultiIndex.from_product(axes, names=LENS[:3]).to_frame(index=False)
        return table.assign(probability=masses.double().flatten(), rank=ranks.flatten())

    def _tokens(self, tops: dict[int, Top]) -> pd.DataFrame:
        """The table of the likeliest tokens, with the word that each begins."""
        if not tops:
            return pd.DataFrame(columns=TOKENS)
        table = self._likeliest(tops)
        cells = zip(table["index"], table.id, table.token, strict=True)
        words = [self._words.get((index, token), text.strip()) for index, token, text in cells]
        return table.assign(word=words, probability=table.probability.astype(float))[TOKENS]

    def _decode_words(self, tops: dict[int, Top]) -> None:
        """Which words the edited facts' likeliest tokens begin, where that is not known yet."""
        fresh = []
        for index, top in tops.items():
            if self._about.group[index] == "edited":
                last = top.indices[-1, -1]  # after the last block
                places = [(index, token) for token in last[:IN_WORDS].tolist()]
                fresh += [place for place in places if place not in self._words]
        prompts = [self._about.prompt[index] for index, _ in fresh]
        words = retention.begun_words(self.model, prompts, [token for _, token in fresh])
        self._words |= dict(zip(fresh, words, strict=True))
