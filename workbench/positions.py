"""Text to tokens and back to places in the text: one pass of the tokenizer over the whole string, and its character offsets.

The only place that knows of BOS, of the space before a target and of padding (always on the right).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from workbench.facts import BadInput


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of several texts, BOS in front.

    `input_ids` and `attention_mask` (n, length), padded on the right. `offsets[i][t]` = (start, end), characters of text i that token t covers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    offsets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each text, BOS counted, (n,)."""
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
        offsets = tuple(pairs[:length] for pairs, length in zip(self.offsets, lengths.tolist(), strict=True))
        return Encoded(input_ids=self.input_ids[:, :longest], attention_mask=mask[:, :longest], offsets=offsets)

    def arguments(self) -> dict:
        """What a network takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def batches(self, tokens: int = 4096) -> Iterator[list[int]]:
        """Indices of texts of like length, at most this many tokens a batch (one text at least)."""
        batch: list[int] = []
        for index in self.lengths.argsort().tolist():
            if batch and (len(batch) + 1) * int(self.lengths[index]) > tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def to(self, device) -> "Encoded":
        return Encoded(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device), offsets=self.offsets)

    def token_at(self, row: int, character: int) -> int:
        """The last token that covers the character of the row's text or, if a normalizer took the character away, what stands before it."""
        for token in reversed(range(len(self.offsets[row]))):
            start, end = self.offsets[row][token]
            if start <= character and start < end:
                return token
        raise BadInput(f"no token covers character {character} of text {row}; the tokenizer drops it")

    def tokens_from(self, row: int, character: int) -> list[int]:
        """The tokens that cover the text from this character on."""
        return [token for token, (_, end) in enumerate(self.offsets[row]) if end > character]


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token put in front of every text: BOS, or the end-of-text token of a model that has none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise BadInput("the tokenizer has neither a BOS nor an EOS token; set tokenizer.bos_token")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], bos: bool = True) -> Encoded:
    """Token ids and character offsets of whole texts."""
    if not tokenizer.is_fast:
        raise BadInput(f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer")
    plain = {"input_ids": [], "offset_mapping": []}
    if texts:  # a tokenizer fails on none
        plain = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    first = [bos_id(tokenizer)] if bos else []
    rows = [first + ids for ids in plain["input_ids"]]
    offsets = tuple(tuple([(0, 0)] * len(first) + [tuple(pair) for pair in pairs]) for pairs in plain["offset_mapping"])
    input_ids = torch.full((len(rows), max(map(len, rows), default=0)), bos_id(tokenizer))
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
        attention_mask[number, : len(row)] = 1
    return Encoded(input_ids=input_ids, attention_mask=attention_mask, offsets=offsets)


def statement(prompt: str, target: str) -> str:
    """Prompt and target as running text: one space between them, unless the prompt ends in white space already."""
    return f"{prompt}{'' if prompt[-1:].isspace() else ' '}{target.strip()}"


def first_tokens(tokenizer: PreTrainedTokenizerBase, objects: Sequence[str], prompt: str = "it is") -> list[int]:
    """The first token of each object as it stands after a prompt."""
    encoded = encode(tokenizer, [statement(prompt, thing) for thing in objects])
    return [encoded.input_ids[row, encoded.tokens_from(row, len(prompt.rstrip()))[0]].item() for row in range(len(objects))]


def subject_end(prompt: str, subject: str) -> int:
    """Index of the subject's last character in the filled prompt; the prompt has one `{}`."""
    return prompt.index("{}") + len(subject.rstrip()) - 1
