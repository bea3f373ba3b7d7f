"""Requests as rows of tokens: prompts bare, after sampled prefixes, paraphrased, and "{subject} is
a"; with the places that editors read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench.editing.records import finite
from workbench.facts import BadInput, EditRequest, fill
from workbench.models import Model
from workbench.positions import Encoded, any_front, encode, statement, subject_end


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts of n requests, ready to run; no row is longer than what is read of it.

    `encoded`: r texts; `owner` (r,): index of the request, whose first row is its bare prompt;
    `subject` (r,): position of the subject's last token; `labels` (r, length): the target's tokens
    one place before they stand, -100 elsewhere; `is_kl` (r,): rows "{subject} is a".
    """

    encoded: Encoded
    owner: torch.Tensor
    subject: torch.Tensor
    labels: torch.Tensor
    is_kl: torch.Tensor

    @property
    def n(self) -> int:
        return int(self.owner.max()) + 1

    @property
    def bare(self) -> torch.Tensor:
        """The row of each request's bare prompt, (n,)."""
        return torch.searchsorted(self.owner, torch.arange(self.n))

    def of(self, requests: torch.Tensor) -> tuple["Rows", torch.Tensor]:
        """The rows of some requests (indices, ascending), renumbered, and their indices among these
        rows.
        """
        number = torch.full((self.n,), -1)
        number[requests] = torch.arange(len(requests))
        index = (number[self.owner] >= 0).nonzero()[:, 0]
        encoded = self.encoded.rows(index.tolist())
        labels = self.labels[index][:, : encoded.input_ids.shape[1]]
        owner = number[self.owner[index]]
        return Rows(
            encoded=encoded,
            owner=owner,
            subject=self.subject[index],
            labels=labels,
            is_kl=self.is_kl[index],
        ), index

    def up_to_subject(self) -> Encoded:
        """The texts cut after the subject's last token."""
        return self.encoded.cut(self.subject + 1)

    def context_weights(self, bare_share: float | None = None) -> torch.Tensor:
        """Weights (r,), summing to 1 over a request's rows: all alike, or the bare prompt's share
        and the rest shared alike.
        """
        count = torch.bincount(self.owner, minlength=self.n).double()
        weights = (1 / count)[self.owner]
        if bare_share is not None:
            many = count[self.owner] > 1
            weights[many] = ((1 - bare_share) / (count - 1))[self.owner][many]
            weights[self.bare] = torch.where(count > 1, bare_share, 1.0).double()
        return weights

    def mean(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum over each request's rows of values (r, d): (n, d), float64."""
        total = torch.zeros(self.n, values.shape[1], dtype=torch.float64, device=values.device)
        return total.index_add(
            0, self.owner.to(values.device), values.double() * weights.to(values.device)[:, None]
        )


def build_rows(
    model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str] = (), kl: bool = False
) -> Rows:
    """Each request's prompt bare and after every prefix, its paraphrases bare, and "{subject} is a"
    where the KL is read.

    Text and target are tokenised as one string; the places come from character offsets.
    """
    if not requests:
        raise BadInput("no request to edit; give at least one")
    texts, owner, ends, starts = [], [], [], []

    def add(number: int, prefix: str, prompt: str, target: str) -> None:
        lead = f"{prefix}. " if prefix else ""
        filled = fill(prompt, requests[number].fact.subject)
        texts.append(lead + (statement(filled, target) if target else filled))
        owner.append(number)
        ends.append(len(lead) + subject_end(prompt, requests[number].fact.subject))
        starts.append(len(lead) + len(filled.rstrip()) if target else -1)

    for number, request in enumerate(requests):
        for prefix in ("", *prefixes):
            add(number, prefix, request.fact.prompt, request.target)
        for paraphrase in request.paraphrases:
            add(number, "", paraphrase, request.target)
        if kl:
            add(number, "", "{} is a", "")
    encoded = encode(model, texts)
    model.check_length(
        encoded.input_ids, f"fact {requests[owner[int(encoded.lengths.argmax())]].fact.id}"
    )
    subject = torch.tensor([encoded.token_at(row, end) for row, end in enumerate(ends)])
    labels = torch.full_like(encoded.input_ids, -100)
    read = subject + 1
    for row, start in enumerate(starts):
        target_tokens = encoded.tokens_from(row, start) if start >= 0 else []
        if start >= 0 and not model.tokenizer.decode(encoded.input_ids[row, target_tokens]).strip():
            raise BadInput(
                f"fact {requests[owner[row]].fact.id}: the target {requests[owner[row]].target!r} has no tokens"
            )
        for token in target_tokens:
            labels[row, token - 1] = encoded.input_ids[row, token]
            read[row] = token
        if target_tokens and target_tokens[0] <= subject[row]:
            raise BadInput(
                f"fact {requests[owner[row]].fact.id}: one token holds the end of the subject and the start of the target; change the prompt"
            )
    encoded = encoded.cut(read)
    labels = labels[:, : encoded.input_ids.shape[1]]
    return Rows(
        encoded=encoded,
        owner=torch.tensor(owner),
        subject=subject,
        labels=labels,
        is_kl=torch.tensor(starts) < 0,
    )


def sample_prefixes(
    model: Model, count: int, seed: int, lengths: Sequence[int] = (5, 10)
) -> tuple[str, ...]:
    """Short texts that the model itself says after its front tokens, sampled from its 5 likeliest
    tokens; half of each length.
    """
    texts, front = [], any_front(model)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for number, length in enumerate(lengths):
            share = count // len(lengths) + (number < count % len(lengths))
            if not share:
                continue
            start = torch.tensor([front] * share, device=model.device)
            encoded = Encoded(input_ids=start, attention_mask=torch.ones_like(start), offsets=())
            finite(model.network(**encoded.arguments()).logits, model, model.n_blocks - 1, encoded)
            out = model.network.generate(
                **encoded.arguments(),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=True,
                top_k=5,
                temperature=1.0,
                top_p=1.0,
                pad_token_id=front[0],
            )
            texts += [
                model.tokenizer.decode(row[len(front) :], skip_special_tokens=True).strip()
                for row in out
            ]
    return tuple(texts)
