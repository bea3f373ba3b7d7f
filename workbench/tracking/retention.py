"""Is a fact still there? What the model says under greedy decoding, past stop words, against the
expected answer.

An answer is text: it is retained when what the model says goes on with the whole of it and a word
ends there. That is the reading of "the first token that is no stop word equals the target's" (arXiv
2507.14198) for answers of several tokens; the first token's own reading stands beside it in columns
of its own. Differs from: the paper does not say how long it decodes; here past at most 8 tokens of
stop words.

How it is measured: one pass over each prompt with its answer gives every probability, and shows
whether greedy decoding says the answer at once (`passes`, `readings`). Only where that leaves the
verdict open is the model decoded token by token (`greedy`, `judge`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from workbench import words
from workbench.facts import DATA, Requests, check_objects
from workbench.models import Model
from workbench.positions import Encoded, encode, padded, statement, tokens_at_once
from workbench.records import BadInput, check_choice

Texts = Sequence[str]
GREEDY_TOKENS = 8
BROKEN = "\ufffd"  # how a token is decoded that is a part of a character
MEASURED = ["prompt", "expected", "retained", "top_token", "p", "rank", "retained_first", "p_first"]
MORE = ["p_second", "margin", "top_is_expected", "p_token"]


@cache
def stop_words() -> frozenset[str]:
    return frozenset((DATA / "stopwords.txt").read_text(encoding="utf-8").split())


@lru_cache(maxsize=8)
def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token, (vocab,); decoding one at a time takes longer than the model does."""
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; "" of one that only the model has: vocabularies of models are padded."""
    texts = token_texts(tokenizer)
    return texts[token] if token < len(texts) else ""


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: Tokenizer) -> Tensor:
    """Which tokens are a stop word, punctuation or white space, (vocab,), bool.

    Special tokens and parts of a character are not.
    """
    mask = torch.tensor([_is_stop(text) for text in token_texts(tokenizer)])
    mask[tokenizer.all_special_ids] = False
    return mask


def _is_stop(text: str) -> bool:
    if BROKEN in text:
        return False
    return text.strip().lower() in stop_words() or not any(map(str.isalnum, text))


def token_lists(encoded: Encoded) -> list[list[int]]:
    """The tokens of each text, without padding."""
    rows = zip(encoded.input_ids.tolist(), encoded.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


# --- answers as tokens


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers after their prompts, as text and as tokens.

    `encoded`: n texts, prompt and answer; `start` (n,): position of the answer's first token, which
    may be a lone space; `first` (n,): of the token by which the paper knows the answer, the first
    of its first word that is no stop word.
    """

    prompts: list[str]
    texts: list[str]
    encoded: Encoded
    start: Tensor
    first: Tensor

    @property
    def first_tokens(self) -> list[int]:
        rows = torch.arange(len(self.first))
        return self.encoded.input_ids[rows, self.first].tolist()


def answers_after(model: Model, prompts: Sequence[str], answers: Sequence[str]) -> Answers:
    """Where answers stand after their prompts.

    Raises:
        BadInput: an answer without a token.
    """
    prompts = [prompt.rstrip() for prompt in prompts]
    wholes = [statement(*pair) for pair in zip(prompts, answers, strict=True)]
    encoded = encode(model, wholes)
    texts = token_texts(model.tokenizer)
    places = []  # (start, first) of each answer
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = encoded.input_ids[row].tolist()
        meaning = _past_stop_words(answer.strip())
        tokens = encoded.tokens_from(row, len(wholes[row]) - len(meaning))
        tokens = [token for token in tokens if texts[ids[token]].strip()]
        if not tokens:
            what = f"the answer {answer!r} has no token after {prompt!r:.80}"
            raise BadInput(f"{what}; give a longer answer")
        places.append((encoded.tokens_from(row, len(prompt))[0], tokens[0]))
    start, first = torch.tensor(places, dtype=torch.long).view(-1, 2).T
    texts = list(answers)
    return Answers(prompts=prompts, texts=texts, encoded=encoded, start=start, first=first)


def _past_stop_words(answer: str) -> str:
    """The answer from its first word that is no stop word; all of it if there is none."""
    for word in re.finditer(r"\S+", answer):
        if word.group().lower() not in stop_words():
            return answer[word.start() :]
    return answer


# --- answers as text


def says(text: str, answer: str, ended: bool = False) -> bool | None:
    """Whether text that a model has said so far is an answer, after stop words or at once; None if
    more text must decide.

    Args:
        text: what follows the prompt.
        ended: nothing more will come.
    """
    answer = _plain(answer)
    forms = {answer, _past_stop_words(answer)}
    verdicts = [_begins(rest, form, ended) for rest in _rests(_plain(text)) for form in forms]
    if True in verdicts:
        return True
    return None if None in verdicts else False


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _rests(text: str) -> list[str]:
    """The text, and what is left of it after each word and mark that may be passed over."""
    rests = [text]
    while length := _passed_over(rests[-1]):
        rests.append(rests[-1][length:])
    return rests


def _passed_over(text: str) -> int:
    """Characters of the marks, or of the stop word, with which a text begins."""
    marks = re.match(r"\W+|_+", text)
    if marks:
        return marks.end()
    word = re.match(r"\w+(?=\W)", text)
    return word.end() if word and word.group().lower() in stop_words() else 0


def _begins(text: str, answer: str, ended: bool) -> bool | None:
    """Whether the text begins with the answer, and a word ends there; None if the text is too short
    to tell.
    """
    if text.startswith(answer):
        if len(text) > len(answer):
            return words.parts(answer[-1], text[len(answer)])
        return True if ended else None
    is_stop_word = any(word.startswith(text.lower()) for word in stop_words())
    may_become = answer.startswith(text) or text.endswith(BROKEN) or is_stop_word
    return None if may_become and not ended else False


# --- one pass over prompts with their answers


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the network over some answers after their prompts.

    `indices`: which of the answers. `logits` (m, vocab) stand after m places, each a `position` of
    the answer whose index is `row`: from the one before the answer's first token to its last token.
    """

    indices: list[int]
    row: Tensor
    position: Tensor
    logits: Tensor

    def logits_at(self, position: Tensor) -> Tensor:
        """Logits (len(indices), vocab) after one position of each answer, given for all answers."""
        return self.logits[self.position == position[self.row]]


@torch.no_grad()
def passes(model: Model, asked: Answers) -> Iterator[Pass]:
    """The network's passes over all answers, those that begin at like places together."""
    order = asked.start * 4096 + asked.encoded.lengths
    for indices in asked.encoded.batches(tokens_at_once(model), order):
        encoded = asked.encoded.rows(indices)
        start = asked.start[indices]
        column = torch.arange(encoded.input_ids.shape[1])
        is_place = (column >= start[:, None] - 1) & encoded.attention_mask.bool()
        row, position = is_place.nonzero(as_tuple=True)
        inputs = encoded.to(model.device).arguments()
        logits = model.logits_at(**inputs, positions=position.to(model.device), rows=row)
        numbers = torch.tensor(indices)
        yield Pass(indices=indices, row=numbers[row], position=position, logits=logits)


def readings(model: Model, asked: Answers, one: Pass) -> pd.DataFrame:
    """What a pass shows of its answers, by their indices.

    Returns:
        `p`: of all the answer's tokens; `p_token`: their geometric mean; `margin`: the smallest
        lead of one of them over the likeliest other token; `rank`, `p_first` and `p_second` (of
        the second likeliest), where the paper reads the answer's first token; `top`: the likeliest
        token right after the prompt; `at_once`: greedy decoding says the answer there and then
        ends the word.
    """
    device = one.logits.device
    lengths = asked.encoded.lengths
    is_last = one.position + 1 == lengths[one.row]  # shows what follows the answer
    row = one.row[~is_last]  # (t,), of each token of an answer
    position = one.position[~is_last] + 1
    token = asked.encoded.input_ids[row, position].to(device)
    probs = one.logits[~is_last].softmax(-1)  # (t, vocab)
    p = probs.gather(1, token[:, None])[:, 0]
    likeliest = probs.topk(2)
    p_top, p_second = likeliest.values.unbind(1)
    top = likeliest.indices[:, 0]
    lead = p - torch.where(top == token, p_second, p_top)
    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
    answer = row.to(device)
    total = torch.zeros(len(lengths), device=device).index_add(0, answer, log_p)
    margin = torch.ones(len(lengths), device=device).scatter_reduce(0, answer, lead, "amin")
    is_first = position == asked.first[row]
    rank = (probs[is_first] > p[is_first, None]).sum(1) + 1
    table = pd.DataFrame(index=one.indices)
    log_p = total[one.indices].cpu()
    table["p"] = log_p.exp().tolist()
    table["p_token"] = (log_p / (lengths - asked.start)[one.indices]).exp().tolist()
    table["rank"] = rank.tolist()
    table["p_first"] = p[is_first].tolist()
    table["p_second"] = p_second[is_first].tolist()
    table["margin"] = margin[one.indices].tolist()
    table["top"] = top[position == asked.start[row]].tolist()
    last = token[position + 1 == lengths[row]].tolist()
    following = one.logits[is_last].argmax(1).tolist()
    ends = map(partial(_ends_word, model.tokenizer), last, following)
    table["at_once"] = (table.margin > 0) & pd.Series(ends, table.index)
    return table


def _ends_word(tokenizer: Tokenizer, token: int, following: int) -> bool:
    """Whether a word ends between two tokens."""
    text = token_text(tokenizer, token)
    after = token_text(tokenizer, following)
    if following in tokenizer.all_special_ids:
        return True
    return BROKEN not in after and words.parts(text[-1:], after[:1])


# --- greedy decoding, where one pass leaves it open


@torch.no_grad()
def greedy(
    model: Model, prompts: list[list[int]], is_open: Callable, pending: Iterable[int]
) -> dict[int, list[int]]:
    """Greedy tokens after the pending ones of the prompts, one at least, as long as
    `is_open(index, tokens)`.

    An end-of-text token ends them too, and so do the model's positions.
    """
    most = getattr(model.network.config, "max_position_embeddings", None) or float("inf")
    ends = {model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    decoded: dict[int, list[int]] = {index: [] for index in pending}

    def goes_on(index: int) -> bool:
        tokens = decoded[index]
        fits = len(prompts[index]) + len(tokens) <= most
        return fits and tokens[-1] not in ends and is_open(index, tokens)

    waiting = list(decoded)
    while waiting:
        grown = padded([prompts[index] + decoded[index] for index in waiting])
        for batch in grown.batches(tokens_at_once(model)):
            tops = next_logits(model, grown.rows(batch)).argmax(1).tolist()
            for place, token in zip(batch, tops, strict=True):
                decoded[waiting[place]].append(token)
        waiting = [index for index in waiting if goes_on(index)]
    return decoded


def text_after(tokenizer: Tokenizer, before: list[int], new: list[int]) -> str:
    """The text of new tokens after others: a space that belongs to a token's place is kept."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    lead = before[-4:]
    return decode(lead + new)[len(decode(lead)) :]


def next_logits(model: Model, encoded: Encoded) -> Tensor:
    """Logits (n, vocab), float32, after the last token of each text, in one pass."""
    encoded = encoded.to(model.device)
    return model.logits_at(**encoded.arguments(), positions=encoded.lengths - 1)


class _Judge:
    """Compares the answers with what is decoded after their prompts.

    `is_joined`: a token of prompt and answer holds the end of the prompt and more, so that the
    prompt alone is another text. `is_certain`: one pass has shown that the answer is said at once.
    """

    def __init__(self, model: Model, asked: Answers, at_once: list[bool], past_stop_words: bool):
        self.past_stop_words = past_stop_words
        self.tokenizer = model.tokenizer
        self.answers = asked.texts
        self.firsts = asked.first_tokens
        self.lengths = (asked.encoded.lengths - asked.start).tolist()
        self.prompts = token_lists(encode(model, asked.prompts))
        leads = token_lists(asked.encoded.cut(asked.start))
        self.is_joined = [lead != alone for lead, alone in zip(leads, self.prompts, strict=True)]
        pairs = zip(at_once, self.is_joined, strict=True)
        self.is_certain = [is_said and not is_joined for is_said, is_joined in pairs]

    def counting(self, index: int, tokens: list[int]) -> int | None:
        """The first token that is no stop word, or is the expected one."""
        is_stop = stop_tokens(self.tokenizer)
        for token in tokens[:GREEDY_TOKENS]:
            if token == self.firsts[index] or token >= len(is_stop) or not is_stop[token]:
                return token
        return None

    def text(self, index: int, tokens: list[int]) -> str:
        return text_after(self.tokenizer, self.prompts[index], tokens)

    def is_open(self, index: int, tokens: list[int]) -> bool:
        """Whether more tokens must decide; one that the tokenizer does not have is no answer."""
        if self.is_certain[index]:
            return False
        if self.counting(index, tokens) is None:
            return len(tokens) < GREEDY_TOKENS
        if tokens[-1] >= len(self.tokenizer) or len(tokens) > GREEDY_TOKENS + self.lengths[index]:
            return False
        return says(self.text(index, tokens), self.answers[index]) is None

    def verdict(self, index: int, tokens: list[int]) -> tuple[int, bool, bool]:
        """The first token that counts; whether the answer is said past stop words, and at once."""
        if self.is_certain[index]:
            return self.firsts[index], True, True
        text = self.text(index, tokens)
        answer = self.answers[index]
        at_once = _begins(_plain(text), _plain(answer), ended=True)
        if not self.past_stop_words:
            return tokens[0], at_once, at_once
        counting = self.counting(index, tokens)
        top = tokens[-1] if counting is None else counting
        return top, says(text, answer, ended=True), at_once


def judged(model: Model, asked: Answers, table: pd.DataFrame, past_stop_words=True) -> pd.DataFrame:
    """The readings of answers with what greedy decoding after each prompt says of its answer. It
    goes on only where the first token leaves that open.

    Args:
        table: `top` and `at_once` of `readings`, in the order of the answers.
        past_stop_words: see `measure_prompts`.
    Returns:
        The table with `retained`, `retained_first`, `top_token` and `top_is_expected` of
        `measure_prompts`.
    """
    judge = _Judge(model, asked, table.at_once.tolist(), past_stop_words)
    decoded = {index: [top] for index, top in enumerate(table.top.tolist())}
    undecided = []
    for index, tokens in decoded.items():
        if judge.is_joined[index] or (past_stop_words and judge.is_open(index, tokens)):
            undecided.append(index)
    decoded |= greedy(model, judge.prompts, judge.is_open, undecided)
    verdicts = [judge.verdict(*numbered) for numbered in decoded.items()]
    columns = ["token", "retained", "top_is_expected"]
    table = table.join(pd.DataFrame(verdicts, columns=columns))
    table["retained_first"] = table.token == asked.first_tokens
    table["top_token"] = [token_text(model.tokenizer, token).strip() for token in table.token]
    return table


# --- what others ask


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
        once; `p_token`: the geometric mean of its tokens' probabilities.
    """
    columns = [*MEASURED, *MORE]
    if not len(prompts):
        return pd.DataFrame(columns=columns)
    asked = answers_after(model, prompts, answers)
    parts = [readings(model, asked, one) for one in passes(model, asked)]
    table = judged(model, asked, pd.concat(parts).sort_index(), past_stop_words)
    expected = [answer.strip() for answer in answers]
    return table.assign(prompt=list(prompts), expected=expected)[columns]


def said_words(model: Model, prompts: Sequence[str]) -> list[str]:
    """The first word, past stop words, of what the model says after each prompt; "" if none comes
    within 2 * GREEDY_TOKENS tokens.
    """

    def is_open(text: str, count: int) -> bool:
        return count < 2 * GREEDY_TOKENS and not re.match(r"\w+(?=\W)", _meaning(text))

    texts = _said_after(model, prompts, [[]] * len(prompts), is_open)
    return [re.match(r"\w*", _meaning(text)).group() for text in texts]


def _meaning(text: str) -> str:
    """What is left of a text past all stop words and marks."""
    return _rests(_plain(text))[-1]


def begun_words(model: Model, prompts: Sequence[str], tokens: Sequence[int]) -> list[str]:
    """The word that each token begins after its prompt, as greedy decoding ends it."""

    def is_open(text: str, count: int) -> bool:
        return count < GREEDY_TOKENS and bool(re.fullmatch(r"[^\S\n]*\w+", text))

    texts = _said_after(model, prompts, [[token] for token in tokens], is_open)
    whole = [re.match(r"[^\S\n]*\w*", one).group().strip() for one in texts]
    alone = [token_text(model.tokenizer, token).strip() for token in tokens]
    return [word or token for word, token in zip(whole, alone, strict=True)]


def _said_after(model: Model, prompts: Texts, first: list, is_open: Callable) -> list[str]:
    """What follows each prompt: its first tokens (n, a list each), and greedy ones as long as
    `is_open(text, count of the greedy ones)`.
    """
    before = token_lists(encode(model, [prompt.rstrip() for prompt in prompts]))
    begun = [ids + new for ids, new in zip(before, first, strict=True)]

    def text(index: int, new: list[int]) -> str:
        return text_after(model.tokenizer, before[index], first[index] + new)

    def goes_on(index: int, new: list[int]) -> bool:
        return is_open(text(index, new), len(new))

    decoded = greedy(model, begun, goes_on, range(len(begun)))
    return [text(*numbered) for numbered in decoded.items()]


def measure(model: Model, requests: Requests, against: str = "target") -> pd.DataFrame:
    """Retention of facts on their own prompts.

    Args:
        against: "target" (was the edit kept?) or "object" (is the true fact still known?).
    Returns:
        DataFrame[fact_id, prompt, expected, retained, top_token, p, rank, retained_first, p_first],
        one row a request; see `measure_prompts`.
    """
    check_choice("against", against, ("target", "object"))
    answers = [request.target for request in requests]
    if against == "object":
        check_objects(requests)
        answers = [request.fact.object for request in requests]
    questions = [request.fact.question for request in requests]
    table = measure_prompts(model, questions, answers)[MEASURED]
    table.insert(0, "fact_id", [request.fact.id for request in requests])
    return table
