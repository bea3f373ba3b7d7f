"""Text to tokens and back to places in the text: one pass of the tokenizer over the whole string,
and its character offsets.

The only place that knows what stands in front of a text, of the space before a target and of
padding (always on the right).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench import words
from workbench.facts import BadInput, Requests
from workbench.models import Model

# between documents, in the pre-training of GPT-2 and of many others since
SEPARATOR = "<|endoftext|>"
ROW = 128  # tokens of a row of running text
UNREAD = -100  # label of a token that no loss reads


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of several texts, with the model's front tokens before each.

    `input_ids` and `attention_mask` (n, length), padded on the right. `offsets[i][t]` = (start,
    end), characters of text i that token t covers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    offsets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, those in front counted, (n,)."""
        return self.attention_mask.sum(1)

    def rows(self, indices: Sequence[int]) -> "Encoded":
        """Some of the texts, cut to the longest of them."""
        ids, mask = self.input_ids[indices], self.attention_mask[indices]
        offsets = tuple(self.offsets[index] for index in indices)
        chosen = Encoded(input_ids=ids, attention_mask=mask, offsets=offsets)
        return chosen.cut(chosen.lengths)

    def cut(self, lengths: Tensor) -> "Encoded":
        """The first lengths[i] tokens of each text."""
        longest = int(lengths.max())
        kept = torch.arange(longest) < lengths[:, None]
        pairs = zip(self.offsets, lengths.tolist(), strict=True)
        return Encoded(
            input_ids=self.input_ids[:, :longest],
            attention_mask=self.attention_mask[:, :longest] * kept,
            offsets=tuple(offsets[:length] for offsets, length in pairs),
        )

    def arguments(self) -> dict:
        """What a network takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def batches(self, tokens: int = 4096, order: Tensor | None = None) -> Iterator[list[int]]:
        """Indices of texts of like length, at most this many tokens a batch (one text at least);
        `order` (n,) puts like ones together.
        """
        lengths = self.lengths.tolist()
        order = self.lengths if order is None else order
        batch: list[int] = []
        longest = 0
        for index in order.argsort(stable=True).tolist():
            longest = max(longest, lengths[index])
            if batch and (len(batch) + 1) * longest > tokens:
                yield batch
                batch = []
                longest = lengths[index]
            batch.append(index)
        if batch:
            yield batch

    def to(self, device) -> "Encoded":
        ids = self.input_ids.to(device)
        return replace(self, input_ids=ids, attention_mask=self.attention_mask.to(device))

    def token_at(self, row: int, character: int) -> int:
        """The last token that covers the character of the row's text or, if a normalizer took the
        character away, what stands before it.
        """
        for token in reversed(range(len(self.offsets[row]))):
            start, end = self.offsets[row][token]
            if start <= character and start < end:
                return token
        raise BadInput(f"the tokenizer drops character {character} of text {row}")

    def tokens_from(self, row: int, character: int) -> list[int]:
        """The tokens that cover the text from this character on."""
        return [token for token, (_, end) in enumerate(self.offsets[row]) if end > character]


def front(model: Model) -> tuple[int, ...]:
    """The tokens that stand in front of every text: in editing, measuring, second moments, prefixes
    and training alike.

    `model.start` names them: "" is the rule, "none" nothing, else a token's text, of which "bos"
    and "eos" are short forms. The rule: what the tokenizer itself adds; if that is nothing, what
    separated documents in pre-training (`<|endoftext|>` where the vocabulary has it); else BOS;
    else EOS. The BOS of an instruct model may be a token of its chats, which no plain text follows.

    Raises:
        BadInput: there is no such token.
    """
    tokenizer = model.tokenizer
    if model.start == "none":
        return ()
    short = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    if model.start:
        names = [short.get(model.start, model.start)]
    else:
        added = _added(tokenizer)
        if added:
            return added
        names = [SEPARATOR, *short.values()]
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary:
            return (vocabulary[name],)
    wanted = model.start or f"{SEPARATOR}, BOS or EOS"
    raise BadInput(f"{model.name}: its tokenizer has no {wanted}; choose another start, or none")


def front_text(model: Model) -> str:
    """What stands in front of every text, as text."""
    return model.tokenizer.decode(list(front(model)))


@lru_cache(maxsize=8)
def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    n_added = [*encoding["special_tokens_mask"], 0].index(0)
    return tuple(encoding["input_ids"][:n_added])


def any_front(model: Model) -> tuple[int, ...]:
    """The front tokens, or one token where nothing stands in front: what sampling begins with."""
    return front(model) or front(replace(model, start=""))


def encode(model: Model, texts: Sequence[str], bare: bool = False) -> Encoded:
    """Token ids and character offsets of whole texts; `bare` leaves out what stands in front."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise BadInput(f"{type(tokenizer).__name__}: no character offsets; use the fast tokenizer")
    # What the edits in force put in front is one text with what it stands before.
    edits = [] if bare else model.in_force
    contexts = ["".join(edit.before(text) for edit in edits) for text in texts]
    plain: dict = {"input_ids": [], "offset_mapping": []}
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if texts:  # a tokenizer fails on none
        whole = [context + text for context, text in zip(contexts, texts, strict=True)]
        plain = tokenizer(whole, return_offsets_mapping=True, **options)
    first = () if bare else front(model)
    offsets = []
    for context, pairs in zip(contexts, plain["offset_mapping"], strict=True):
        shift = len(context)
        within = [(max(0, start - shift), max(0, end - shift)) for start, end in pairs]
        offsets.append(((0, 0),) * len(first) + tuple(within))
    return padded([[*first, *ids] for ids in plain["input_ids"]], tuple(offsets))


def padded(rows: Sequence[Sequence[int]], offsets: tuple = ()) -> Encoded:
    """Rows of token ids, padded on the right.

    What the padding is does not matter: the mask hides it.
    """
    return Encoded(
        input_ids=pad(rows),
        attention_mask=pad([[1] * len(row) for row in rows]),
        offsets=offsets or ((),) * len(rows),
    )


def pad(rows: Sequence[Sequence[int]], filler: int = 0) -> Tensor:
    """Rows of numbers as one tensor (n, length), int64, filled up on the right."""
    length = max(map(len, rows), default=0)
    filled = [[*row, *[filler] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long).view(len(rows), length)


def row_length(model: Model, most: int = ROW) -> int:
    """Tokens of a row: `most`, or as many as the model has positions."""
    return min(most, getattr(model.network.config, "max_position_embeddings", most))


def packed(
    model: Model, texts: Iterable[str], most: int = ROW, ahead: int = 1
) -> Iterator[list[int]]:
    """Rows of `row_length(model, most)` tokens: those in front, then running text, cut anywhere.

    A last row that would be shorter is left out. So many texts are read `ahead` of need.
    """
    first = front(model)
    length = row_length(model, most) - len(first)
    texts = iter(texts)
    stream: list[int] = []
    while part := list(islice(texts, ahead)):
        for ids in model.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += ids
        for start in range(0, len(stream) - length + 1, length):
            yield [*first, *stream[start : start + length]]
        stream = stream[len(stream) - len(stream) % length :]


def tokens_at_once(model: Model, on_cpu: int = 1024) -> int:
    """Tokens of a batch: on a CPU few, which stay in its caches, elsewhere four times as many."""
    return on_cpu if model.device.type == "cpu" else 4 * on_cpu


def statement(prompt: str, target: str) -> str:
    """Prompt and target as running text: one space between them, none where the prompt's script
    sets words apart by none.
    """
    if prompt[-1:].isspace() or (prompt and words.unspaced(prompt[-1])):
        return prompt + target.strip()
    return f"{prompt} {target.strip()}"


def subject_end(prompt: str, subject: str) -> int:
    """Index of the subject's last character in the filled prompt; the prompt has one `{}`."""
    return prompt.index("{}") + len(subject.rstrip()) - 1


def subject_ends(encoded: Encoded, requests: Requests) -> Tensor:
    """The last token of each request's subject in its question, (n,)."""
    ends = [subject_end(request.fact.prompt, request.fact.subject) for request in requests]
    return torch.tensor([encoded.token_at(row, end) for row, end in enumerate(ends)])
