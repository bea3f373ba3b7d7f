"""Is a fact still there? What the model says under greedy decoding, past stop words, against the
expected answer.

An answer is text: it is retained when what the model says goes on with the whole of it and a word
ends there. That is the reading of "the first token that is no stop word equals the target's" (arXiv
2507.14198) for answers of several tokens; the first token's own reading stands beside it in columns
of its own. Differs from: the paper does not say how long it decodes; here past at most 8 tokens of
stop words.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from workbench import words
from workbench.facts import DATA, BadInput, EditRequest, check_objects
from workbench.models import Model
from workbench.positions import Encoded, encode, padded, statement

GREEDY_TOKENS = 8
BROKEN = "\ufffd"  # what a token says that is a part of a character
MEASURED = [
    "prompt",
    "expected",
    "retained",
    "top_token",
    "p",
    "rank",
    "retained_first",
    "p_first",
    "p_second",
    "margin",
    "top_is_expected",
]


@cache
def stop_words() -> frozenset[str]:
    return frozenset((DATA / "stopwords.txt").read_text(encoding="utf-8").split())


@lru_cache(maxsize=8)
def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token says, (vocab,): to decode one at a time takes longer than to ask the model."""
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which tokens are a stop word, punctuation or white space, (vocab,), bool.

    Special tokens and parts of a character are not.
    """
    mask = torch.tensor([_is_stop(text) for text in token_texts(tokenizer)])
    mask[tokenizer.all_special_ids] = False
    return mask


def _is_stop(text: str) -> bool:
    return BROKEN not in text and (
        text.strip().lower() in stop_words() or not any(map(str.isalnum, text))
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers after their prompts, as tokens.

    `encoded`: n texts, prompt and answer; `start` (n,): position of the answer's first token, which
    may be a lone space; `first` (n,): of the token by which the paper knows the answer, the first
    of its first word that is no stop word; `plain` (n,): whether that token says something of its
    own, and is no part of a character.
    """

    encoded: Encoded
    start: torch.Tensor
    first: torch.Tensor
    plain: torch.Tensor

    @property
    def first_tokens(self) -> list[int]:
        return self.encoded.input_ids[torch.arange(len(self.first)), self.first].tolist()

    def rows(self, indices: Sequence[int]) -> "Answers":
        return Answers(
            encoded=self.encoded.rows(indices),
            start=self.start[indices],
            first=self.first[indices],
            plain=self.plain[indices],
        )


def answers_after(model: Model, prompts: Sequence[str], answers: Sequence[str]) -> Answers:
    """Where answers stand after their prompts.

    Raises:
        BadInput: an answer without a token.
    """
    asked = [prompt.rstrip() for prompt in prompts]
    encoded = encode(
        model, [statement(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    )
    texts, start, first = token_texts(model.tokenizer), [], []
    for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        own = encoded.tokens_from(row, len(prompt))
        known_by = encoded.tokens_from(
            row, len(statement(prompt, answer)) - len(_past_stop_words(answer.strip()))
        )
        ids = encoded.input_ids[row].tolist()
        known_by = next((token for token in known_by if texts[ids[token]].strip()), None)
        if known_by is None:
            raise BadInput(
                f"the answer {answer!r} has no token after {prompt!r:.80}; give a longer answer"
            )
        start.append(own[0])
        first.append(known_by)
    start, first = torch.tensor(start, dtype=torch.long), torch.tensor(first, dtype=torch.long)
    plain = [
        BROKEN not in texts[encoded.input_ids[row, token]]
        for row, token in enumerate(first.tolist())
    ]
    return Answers(
        encoded=encoded, start=start, first=first, plain=torch.tensor(plain, dtype=torch.bool)
    )


def _past_stop_words(answer: str) -> str:
    """The answer from its first word that is no stop word; all of it if there is none."""
    for word in re.finditer(r"\S+", answer):
        if word.group().lower() not in stop_words():
            return answer[word.start() :]
    return answer


def says(said: str, answer: str, ended: bool = False) -> bool | None:
    """Whether text that a model has said so far is an answer, after stop words or at once; None if
    more text must decide.

    Args:
        said: what follows the prompt.
        ended: nothing more will come.
    """
    said, answer = _plain(said), _plain(answer)
    verdicts = [
        _begins(rest, wanted, ended)
        for rest in _rests(said)
        for wanted in {answer, _past_stop_words(answer)}
    ]
    if True in verdicts:
        return True
    return None if None in verdicts and not ended else False


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _rests(said: str) -> list[str]:
    """The text, and what is left of it after each word and mark that may be passed over."""
    rests = [said]
    while rest := re.match(r"\W+|_+", rests[-1]) or _stop_word(rests[-1]):
        rests.append(rests[-1][rest.end() :])
    return rests


def _stop_word(text: str) -> re.Match | None:
    word = re.match(r"\w+(?=\W)", text)
    return word if word and word.group().lower() in stop_words() else None


def _begins(said: str, answer: str, ended: bool) -> bool | None:
    """Whether the text begins with the answer, and a word ends there; None if the text is too short
    to tell.
    """
    if not said.startswith(answer):
        unfinished = answer.startswith(said) or said.endswith(BROKEN) or _may_become_stop_word(said)
        return None if unfinished and not ended else False
    if len(said) > len(answer):
        return words.parts(answer[-1], said[len(answer)])
    return True if ended else None


def _may_become_stop_word(text: str) -> bool:
    return any(word.startswith(text.lower()) for word in stop_words())


@torch.no_grad()
def greedy(model: Model, prompts: Encoded, limits: Sequence[int], done) -> list[list[int]]:
    """Greedy tokens after each of n prompts, at most limits[i] each, until `done(i, tokens)`.

    An end-of-text token ends them too, and so do the model's positions.
    """
    most = getattr(model.network.config, "max_position_embeddings", None) or float("inf")
    end = {
        token
        for token in (model.tokenizer.eos_token_id, model.tokenizer.bos_token_id)
        if token is not None
    }
    rows = [
        prompts.input_ids[row, :length].tolist()
        for row, length in enumerate(prompts.lengths.tolist())
    ]
    new: list[list[int]] = [[] for _ in rows]
    pending = [row for row, limit in enumerate(limits) if limit > 0]
    while pending:
        grown = padded([rows[row] + new[row] for row in pending])
        for batch in grown.batches(tokens_at_once(model)):
            tops = next_logits(model, grown.rows(batch)).argmax(1).tolist()
            for place, token in zip(batch, tops, strict=True):
                new[pending[place]].append(token)
        pending = [
            row
            for row in pending
            if len(new[row]) < limits[row]
            and len(rows[row]) + len(new[row]) <= most
            and new[row][-1] not in end
            and not done(row, new[row])
        ]
    return new


def text_after(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], new: Sequence[int]
) -> str:
    """What new tokens say after others: a space that belongs to a token's place in the text is
    kept.
    """
    lead = tokenizer.decode(before[-4:], clean_up_tokenization_spaces=False)
    return tokenizer.decode([*before[-4:], *new], clean_up_tokenization_spaces=False)[len(lead) :]


def tokens_at_once(model: Model) -> int:
    """Tokens of a batch of questions: on a CPU as many as stay in its caches, which is 1.7 times as
    fast as 4096.
    """
    return 1024 if model.device.type == "cpu" else 4096


def next_logits(model: Model, encoded: Encoded) -> torch.Tensor:
    """Logits (n, vocab), float32, after the last token of each text, in one pass."""
    encoded = encoded.to(model.device)
    return model.logits_at(encoded.input_ids, encoded.attention_mask, encoded.lengths - 1)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a model makes of answers after their prompts, n of each.

    `log_p` (n,): of all the answer's tokens, nats; `least` (n,): the smallest lead of an answer's
    token over the likeliest other one; `probs` (n, 3), where the paper reads the answer's first
    token: of that, of the likeliest and of the second; `rank` (n,): of the answer's token there;
    `at_once` (n,): whether greedy decoding says the answer right after the prompt and then ends the
    word; `said` (n,): the likeliest token right after the prompt.
    """

    log_p: torch.Tensor
    least: torch.Tensor
    said: torch.Tensor
    probs: torch.Tensor
    rank: torch.Tensor
    at_once: torch.Tensor


def hear(
    model: Model, part: Answers, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
) -> Heard:
    """From logits (m, vocab) after the places (row, position) from the one before an answer's first
    token to its last token.
    """
    lengths = part.encoded.lengths
    n, inside = (
        len(lengths),
        positions + 1 < lengths[rows],
    )  # the last place tells whether the word ends
    inner, row = logits[inside], rows[inside]
    wanted = part.encoded.input_ids[row, positions[inside] + 1].to(logits.device)
    probs = inner.softmax(-1)
    own = probs.gather(1, wanted[:, None])[:, 0]
    two, tokens = probs.topk(2)
    lead = own - torch.where(tokens[:, 0] == wanted, two[:, 1], two[:, 0])
    row = row.to(logits.device)
    log_p = torch.zeros(n, device=logits.device).index_add(
        0, row, own.clamp(min=torch.finfo(own.dtype).tiny).log()
    )
    least = torch.ones(n, device=logits.device).scatter_reduce(0, row, lead, "amin")
    known_by = ((positions[inside] + 1) == part.first[rows[inside]]).nonzero()[:, 0]
    rank = (probs[known_by] > own[known_by, None]).sum(1) + 1
    after = logits[~inside].argmax(1).tolist()
    return Heard(
        log_p=log_p,
        least=least,
        said=tokens[(positions[inside] + 1 == part.start[rows[inside]]).nonzero()[:, 0], 0],
        probs=torch.stack([own[known_by], two[known_by, 0], two[known_by, 1]], 1),
        rank=rank,
        at_once=(least > 0)
        & torch.tensor(_ends(model.tokenizer, part, after), device=logits.device),
    )


def _ends(tokenizer: PreTrainedTokenizerBase, part: Answers, after: Sequence[int]) -> list[bool]:
    """Whether each answer's last word ends before the token that follows it."""
    texts, ends = token_texts(tokenizer), []
    for row, token in enumerate(after):
        last = texts[part.encoded.input_ids[row, part.encoded.lengths[row] - 1]]
        following = (
            texts[token] if token < len(texts) and token not in tokenizer.all_special_ids else ""
        )
        ends.append(BROKEN not in following and words.parts(last[-1:], following[:1]))
    return ends


def places(part: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, positions) from the one before each answer's first token to its last token."""
    counts = part.encoded.lengths - part.start + 1
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return rows, part.start[rows] - 1 + within


@torch.no_grad()
def measure_prompts(
    model: Model, prompts: Sequence[str], answers: Sequence[str], past_stop_words: bool = True
) -> pd.DataFrame:
    """What a model says of an answer after each prompt.

    Args:
        past_stop_words: whether it counts what is said after them; if not, `retained` is
            `top_is_expected`, `top_token` the likeliest token, and next to nothing is decoded.

    Returns:
        A row a prompt. `expected`: the answer; `retained`: greedy decoding says it, past stop
        words; `p`: of all its tokens. By the paper's reading, of its first token (of its first word
        that is no stop word, after a lone space): `top_token`, the first greedy token that is no
        stop word; `retained_first`, whether that is the answer's; `p_first`, `rank` (1 = top) and
        `p_second`, of the second likeliest. `margin`: the smallest lead of one of the answer's
        tokens over any other, its own tokens before it given; `top_is_expected`: it is said at
        once.
    """
    asked = answers_after(model, prompts, answers)
    questions = encode(model, [prompt.rstrip() for prompt in prompts])
    rows: list[dict] = [{} for _ in prompts]
    for batch in asked.encoded.batches(
        tokens_at_once(model), order=asked.start * 4096 + asked.encoded.lengths
    ):
        part = asked.rows(batch)
        row, position = places(part)
        on_device = part.encoded.to(model.device)
        logits = model.logits_at(
            on_device.input_ids, on_device.attention_mask, position.to(model.device), row
        )
        heard = hear(model, part, logits, row, position)
        columns = {
            "p": heard.log_p.exp(),
            "rank": heard.rank,
            "p_first": heard.probs[:, 0],
            "p_second": heard.probs[:, 2],
            "margin": heard.least,
            "top_is_expected": heard.at_once,
            "said": heard.said,
        }
        for name, values in columns.items():
            for index, value in zip(batch, values.tolist(), strict=True):
                rows[index][name] = value
    said, at_once = [row.pop("said") for row in rows], [row["top_is_expected"] for row in rows]
    verdicts = judge(model, questions, asked, answers, said, at_once, past_stop_words)
    texts = token_texts(model.tokenizer)
    for index, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
        top = verdict.top
        row |= {
            "prompt": prompts[index],
            "expected": answers[index].strip(),
            "retained": verdict.retained,
        }
        row |= {
            "top_token": texts[top].strip() if top < len(texts) else "",
            "top_is_expected": verdict.at_once,
        }
        row |= {"retained_first": top == asked.first_tokens[index]}
    return pd.DataFrame(rows, columns=MEASURED)


class Verdict(NamedTuple):
    """Of one answer: the first greedy token that is no stop word; whether greedy decoding says the
    answer past stop words, or at once.
    """

    top: int
    retained: bool
    at_once: bool


def judge(
    model: Model,
    questions: Encoded,
    asked: Answers,
    answers: Sequence[str],
    said: Sequence[int],
    at_once: Sequence[bool],
    past_stop_words: bool = True,
) -> list[Verdict]:
    """What greedy decoding after each prompt says of its answer. It goes on only where the first
    token leaves that open.

    Args:
        questions: the prompts alone.
        said: the likeliest token before each answer in `asked`.
        at_once: the answer's tokens are the likeliest ones there, and a word ends after them.
        past_stop_words: see `measure_prompts`.
    """
    first, tokenizer = asked.first_tokens, model.tokenizer
    before = [
        questions.input_ids[row, :length].tolist()
        for row, length in enumerate(questions.lengths.tolist())
    ]
    lengths = (asked.encoded.lengths - asked.start).tolist()
    joined = [
        asked.encoded.input_ids[row, :start].tolist() != before[row]
        for row, start in enumerate(asked.start.tolist())
    ]
    sure = [
        good and not own for good, own in zip(at_once, joined, strict=True)
    ]  # joined: a token holds the end of prompt and more

    def text(row: int, tokens: Sequence[int]) -> str:
        return text_after(tokenizer, before[row], tokens)

    def is_open(row: int, tokens: Sequence[int]) -> bool:
        counting = _counting(tokenizer, tokens, first[row])
        if counting is None:
            return len(tokens) < GREEDY_TOKENS
        if tokens[-1] >= len(
            tokenizer
        ):  # vocabularies of models are padded beyond their tokenizer's
            return False
        return says(text(row, tokens), answers[row]) is None

    undecided = [
        not sure[row] and (joined[row] or (past_stop_words and is_open(row, [token])))
        for row, token in enumerate(said)
    ]
    limits = [
        GREEDY_TOKENS + length + 1 if more else 0
        for length, more in zip(lengths, undecided, strict=True)
    ]
    more = greedy(model, questions, limits, lambda row, tokens: not is_open(row, tokens))
    verdicts = []
    for row, tokens in enumerate(more):
        if sure[row]:
            verdicts.append(Verdict(first[row], True, True))
            continue
        tokens = tokens or [said[row]]
        counting = _counting(tokenizer, tokens[:GREEDY_TOKENS], first[row])
        heard = text(row, tokens)
        now = bool(_begins(_plain(heard), _plain(answers[row]), ended=True))
        later = bool(says(heard, answers[row], ended=True)) if past_stop_words else now
        top = tokens[0] if not past_stop_words else tokens[-1] if counting is None else counting
        verdicts.append(Verdict(top=top, retained=later, at_once=now))
    return verdicts


def _counting(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], expected: int
) -> int | None:
    """The first token that is no stop word, or is the expected one."""
    is_stop = stop_tokens(tokenizer)
    return next(
        (
            token
            for token in tokens
            if token == expected or token >= len(is_stop) or not is_stop[token]
        ),
        None,
    )


def said_words(model: Model, prompts: Sequence[str]) -> list[str]:
    """The first word, past stop words, of what the model says after each prompt; "" if none comes
    within 2 * GREEDY_TOKENS tokens.
    """
    questions = encode(model, [prompt.rstrip() for prompt in prompts])
    before = [
        questions.input_ids[row, :length].tolist()
        for row, length in enumerate(questions.lengths.tolist())
    ]

    def word(row: int, tokens: Sequence[int], ended: bool = False) -> str:
        rest = _rests(_plain(text_after(model.tokenizer, before[row], tokens)))[-1]
        found = re.match(r"\w+(?=\W)" if not ended else r"\w+", rest)
        return found.group() if found else ""

    new = greedy(
        model,
        questions,
        [2 * GREEDY_TOKENS] * len(prompts),
        lambda row, tokens: bool(word(row, tokens)),
    )
    return [word(row, tokens, ended=True) for row, tokens in enumerate(new)]


def measure(model: Model, requests: Sequence[EditRequest], against: str = "target") -> pd.DataFrame:
    """Retention of facts on their own prompts.

    Args:
        against: "target" (was the edit kept?) or "object" (is the true fact still known?).
    Returns:
        DataFrame[fact_id, prompt, expected, retained, top_token, p, rank, retained_first, p_first],
        one row a request; see `measure_prompts`.
    """
    if against not in ("target", "object"):
        raise BadInput(f"against={against!r}: choose target or object")
    if against == "object":
        check_objects(requests)
    answers = [
        request.target if against == "target" else request.fact.object for request in requests
    ]
    table = measure_prompts(model, [request.fact.question for request in requests], answers)
    table.insert(0, "fact_id", [request.fact.id for request in requests])
    return table[
        [
            "fact_id",
            "prompt",
            "expected",
            "retained",
            "top_token",
            "p",
            "rank",
            "retained_first",
            "p_first",
        ]
    ]
