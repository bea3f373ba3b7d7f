"""Requests as rows of tokens: prompts bare, after sampled prefixes, paraphrased, and "{subject} is
a"; with the places that editors read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.editing.records import Requests, finite
from workbench.facts import BadInput, fill
from workbench.models import Model
from workbench.positions import UNREAD, Encoded, any_front, encode, padded, statement, subject_end

SAMPLING = {"do_sample": True, "top_k": 5, "temperature": 1.0, "top_p": 1.0}  # of the prefixes


class Answers(NamedTuple):
    """Where the targets' m tokens are read, each (m,): the row, the place in it, and the token."""

    row: Tensor
    place: Tensor
    token: Tensor


@dataclass(frozen=True)
class Rows:
    """Prompts of n requests, ready to run; no row is longer than what is read of it.

    `encoded`: r texts; `owner` (r,): index of the request, whose first row is its bare prompt;
    `subject` (r,): position of the subject's last token; `labels` (r, length): the target's tokens
    one place before they stand, -100 elsewhere; `is_kl` (r,): rows "{subject} is a".
    """

    encoded: Encoded
    owner: Tensor
    subject: Tensor
    labels: Tensor
    is_kl: Tensor

    @property
    def n(self) -> int:
        return int(self.owner.max()) + 1

    @property
    def bare(self) -> Tensor:
        """The row of each request's bare prompt, (n,)."""
        return torch.searchsorted(self.owner, torch.arange(self.n))

    def answers(self, device: torch.device) -> Answers:
        """Where the targets' tokens are read."""
        places = (self.labels != UNREAD).nonzero(as_tuple=True)
        return Answers(*(tensor.to(device) for tensor in (*places, self.labels[places])))

    def indices(self, requests: Tensor) -> Tensor:
        """The numbers of all rows of some requests."""
        return torch.isin(self.owner, requests).nonzero()[:, 0]

    def select(self, requests: Tensor) -> "Rows":
        """The rows of some requests (indices, ascending), renumbered."""
        index = self.indices(requests)
        owner = torch.searchsorted(requests, self.owner[index])
        encoded = self.encoded.rows(index.tolist())
        labels = self.labels[index][:, : encoded.input_ids.shape[1]]
        return Rows(encoded, owner, self.subject[index], labels, self.is_kl[index])

    def up_to_subject(self) -> Encoded:
        """The texts cut after the subject's last token."""
        return self.encoded.cut(self.subject + 1)

    def context_weights(self, bare_share: float | None = None) -> Tensor:
        """Weights (r,), summing to 1 over a request's rows: all alike, or the bare prompt's share
        and the rest shared alike.
        """
        count = torch.bincount(self.owner).double()
        if bare_share is None:
            return (1 / count)[self.owner]
        weights = ((1 - bare_share) / (count - 1))[self.owner]
        weights[self.bare] = torch.where(count > 1, bare_share, 1.0).double()
        return weights

    def total(self, values: Tensor) -> Tensor:
        """The sum of values (r, d) over each request's rows, (n, d)."""
        zeros = values.new_zeros(self.n, values.shape[1])
        return zeros.index_add(0, self.owner.to(values.device), values)


class _Text(NamedTuple):
    """A question about a request's subject, which ends at `subject_end`; the target, which may be
    none; and both as one text.
    """

    owner: int
    question: str
    target: str
    whole: str
    subject_end: int


def _texts(requests: Requests, prefixes: tuple, kl: bool) -> Iterator[_Text]:
    for owner, request in enumerate(requests):
        subject = request.fact.subject
        prompts = [(prefix, request.fact.prompt, request.target) for prefix in ("", *prefixes)]
        prompts += [("", paraphrase, request.target) for paraphrase in request.paraphrases]
        if kl:
            prompts.append(("", "{} is a", ""))
        for prefix, prompt, target in prompts:
            lead = f"{prefix}. " if prefix else ""
            end = len(lead) + subject_end(prompt, subject)
            question = lead + fill(prompt, subject)
            whole = statement(question, target) if target else question
            yield _Text(owner, question, target, whole, end)


def build_rows(model: Model, requests: Requests, prefixes: tuple = (), kl: bool = False) -> Rows:
    """Each request's prompt bare and after every prefix, its paraphrases bare, and "{subject} is a"
    where the KL is read.

    Text and target are tokenised as one string; the places come from character offsets.
    """
    if not requests:
        raise BadInput("no request to edit; give at least one")
    texts = list(_texts(requests, prefixes, kl))
    encoded = encode(model, [text.whole for text in texts])
    names = [f"fact {requests[text.owner].fact.id}" for text in texts]
    model.check_length(encoded.input_ids, names[int(encoded.lengths.argmax())])
    ends = [encoded.token_at(row, text.subject_end) for row, text in enumerate(texts)]
    subject = torch.tensor(ends)
    labels = torch.full_like(encoded.input_ids, UNREAD)
    for row, text in enumerate(texts):
        if not text.target:
            continue
        tokens = encoded.tokens_from(row, len(text.question.rstrip()))
        ids = encoded.input_ids[row, tokens]
        if not model.tokenizer.decode(ids).strip():
            raise BadInput(f"{names[row]}: the target {text.target!r} has no tokens")
        if tokens[0] <= ends[row]:
            problem = "one token holds the end of the subject and the start of the target"
            raise BadInput(f"{names[row]}: {problem}; change the prompt")
        labels[row, torch.tensor(tokens) - 1] = ids
    places = torch.arange(labels.shape[1])
    last = torch.where(labels == UNREAD, subject[:, None], places).amax(1)  # that is read
    encoded = encoded.cut(last + 1)
    labels = labels[:, : encoded.input_ids.shape[1]]
    owner = torch.tensor([text.owner for text in texts])
    is_kl = torch.tensor([not text.target for text in texts])
    return Rows(encoded, owner, subject, labels, is_kl)


def sample_prefixes(model: Model, count: int, seed: int) -> tuple[str, ...]:
    """Short texts that the model itself says after its front tokens, sampled from its 5 likeliest
    tokens; half of 5 tokens, half of 10.
    """
    texts = []
    front = any_front(model)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length, share in ((5, count - count // 2), (10, count // 2)):
            if not share:
                continue
            start = padded([front] * share).to(model.device)
            logits = model.network(**start.arguments()).logits
            finite(logits, model, model.n_blocks - 1, start)
            tokens = {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": front[0]}
            rows = model.network.generate(**start.arguments(), **tokens, **SAMPLING)
            continuations = rows[:, len(front) :]
            texts += model.tokenizer.batch_decode(continuations, skip_special_tokens=True)
    return tuple(text.strip() for text in texts)
