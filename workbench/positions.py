"""Text to tokens and back to places in the text: one pass of the tokenizer over the whole string,
and its character offsets.

The only place that knows what stands in front of a text, of the space before a target and of
padding (always on the right).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from workbench import words
from workbench.facts import BadInput
from workbench.models import Model

SEPARATOR = (
    "<|endoftext|>"  # between documents, in the pre-training of GPT-2 and of many others since
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of several texts, with the model's front tokens before each.

    `input_ids` and `attention_mask` (n, length), padded on the right. `offsets[i][t]` = (start,
    end), characters of text i that token t covers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    offsets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each text, those in front counted, (n,)."""
        return self.attention_mask.sum(1)

    def rows(self, indices: Sequence[int]) -> "Encoded":
        """Some of the texts, cut to the longest of them."""
        mask = self.attention_mask[indices]
        length = int(mask.sum(1).max())
        return Encoded(
            input_ids=self.input_ids[indices][:, :length],
            attention_mask=mask[:, :length],
            offsets=tuple(self.offsets[index] for index in indices),
        )

    def cut(self, lengths: torch.Tensor) -> "Encoded":
        """The first lengths[i] tokens of each text."""
        longest = int(lengths.max())
        mask = self.attention_mask * (torch.arange(self.attention_mask.shape[1]) < lengths[:, None])
        offsets = tuple(
            pairs[:length] for pairs, length in zip(self.offsets, lengths.tolist(), strict=True)
        )
        return Encoded(
            input_ids=self.input_ids[:, :longest], attention_mask=mask[:, :longest], offsets=offsets
        )

    def arguments(self) -> dict:
        """What a network takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def batches(self, tokens: int = 4096, order: torch.Tensor | None = None) -> Iterator[list[int]]:
        """Indices of texts of like length, at most this many tokens a batch (one text at least);
        `order` (n,) puts like ones together.
        """
        batch: list[int] = []
        longest, lengths = 0, self.lengths.tolist()
        for index in (self.lengths if order is None else order).argsort(stable=True).tolist():
            longest = max(longest, lengths[index])
            if batch and (len(batch) + 1) * longest > tokens:
                yield batch
                batch, longest = [], lengths[index]
            batch.append(index)
        if batch:
            yield batch

    def to(self, device) -> "Encoded":
        return Encoded(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            offsets=self.offsets,
        )

    def token_at(self, row: int, character: int) -> int:
        """The last token that covers the character of the row's text or, if a normalizer took the
        character away, what stands before it.
        """
        for token in reversed(range(len(self.offsets[row]))):
            start, end = self.offsets[row][token]
            if start <= character and start < end:
                return token
        raise BadInput(
            f"no token covers character {character} of text {row}; the tokenizer drops it"
        )

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
    tokenizer, start = model.tokenizer, model.start
    if start == "none":
        return ()
    if start:
        token = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}.get(start, start)
        number = tokenizer.get_vocab().get(token)
        if number is None:
            raise BadInput(
                f"start {start!r}: the tokenizer of {model.name} has no such token; choose none, bos, eos or a token's text"
            )
        return (number,)
    if added := _added(tokenizer):
        return added
    separator = tokenizer.get_vocab().get(SEPARATOR)
    for number in (separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return (number,)
    raise BadInput(
        f"{model.name}: its tokenizer has neither {SEPARATOR} nor BOS nor EOS; name a token in start, or start='none'"
    )


def front_text(model: Model) -> str:
    """What stands in front of every text, as text."""
    return model.tokenizer.decode(list(front(model)))


@lru_cache(maxsize=8)
def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next(
        (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0
    )
    return tuple(whole[:before])


def any_front(model: Model) -> tuple[int, ...]:
    """The front tokens, or one token where nothing stands in front: what sampling begins with."""
    return front(model) or front(replace(model, start=""))


def encode(model: Model, texts: Sequence[str], bare: bool = False) -> Encoded:
    """Token ids and character offsets of whole texts; `bare` leaves out what stands in front."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer"
        )
    plain = {"input_ids": [], "offset_mapping": []}
    if texts:  # a tokenizer fails on none
        plain = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
    first = [] if bare else list(front(model))
    befores = [first if bare else first + _context(model, text) for text in texts]
    offsets = tuple(
        tuple([(0, 0)] * len(before) + [tuple(pair) for pair in pairs])
        for before, pairs in zip(befores, plain["offset_mapping"], strict=True)
    )
    rows = [before + ids for before, ids in zip(befores, plain["input_ids"], strict=True)]
    return padded(rows, offsets)


def _context(model: Model, text: str) -> list[int]:
    """Tokens that the edits in force put between the front tokens and a text."""
    before = "".join(edit.before(text) for edit in model.in_force)
    return model.tokenizer(before, add_special_tokens=False)["input_ids"] if before else []


def padded(rows: Sequence[Sequence[int]], offsets: tuple = ()) -> Encoded:
    """Rows of token ids, padded on the right.

    What the padding is does not matter: the mask hides it.
    """
    length = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.long).view(
        len(rows), length
    )
    mask = torch.tensor(
        [[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.long
    ).view(len(rows), length)
    return Encoded(input_ids=ids, attention_mask=mask, offsets=offsets or ((),) * len(rows))


def statement(prompt: str, target: str) -> str:
    """Prompt and target as running text: one space between them, none where the prompt's script
    sets words apart by none.
    """
    joined = prompt[-1:].isspace() or (prompt and words.unspaced(prompt[-1]))
    return f"{prompt}{'' if joined else ' '}{target.strip()}"


def subject_end(prompt: str, subject: str) -> int:
    """Index of the subject's last character in the filled prompt; the prompt has one `{}`."""
    return prompt.index("{}") + len(subject.rstrip()) - 1
