"""What a model is fine-tuned on: rows to learn from, rows to validate on, the metric and its usual
numbers.

text: the next token of running text. facts: the object of facts that the model gets wrong.
sentiment: a linear head on the last token's hidden state. instructions: the response to an
instruction. Rows that touch a fact under study are left out (`Relevance`).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain, islice
from typing import Literal

import datasets
import numpy
import pydantic
from transformers import PreTrainedTokenizerBase

from workbench import facts, prose, sources, words
from workbench.checkpoints import is_world
from workbench.facts import BadInput, EditRequest, Record
from workbench.models import Model
from workbench.positions import UNREAD, encode, front, packed, row_length
from workbench.tracking.retention import answers_after, measure, stop_words, token_lists
from workbench.tuning.numbers import TASKS, Source, presets  # noqa: F401
from workbench.world import text

LONGEST = 512  # tokens of a review, or an instruction with its response; what is longer is left out
WORDINGS = 3  # statements of a fact to train on
# what chat templates that print today's date print here; recorded with a run
CHAT_DATE = datetime(2024, 7, 26)
BUFFER = 10_000  # records among which a stream is shuffled
AT_ONCE = 512  # facts that a model is asked for at once, to find those that it gets wrong


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data to tune on.

    Attributes:
        train, valid: datasets of input_ids and labels; -100 is not read; for a classifier one label
            a row.
        metric: "loss" (nats a token, lower is better) or "accuracy" (share of rows wholly right),
            on `valid`.
        classes: of the classifier's head; 0 = the model's own head.
        dropped: records left out because they touch a fact under study.
    """

    name: str
    train: datasets.Dataset
    valid: datasets.Dataset
    metric: str = "loss"
    classes: int = 0
    dropped: int = 0

    def reached(self, metric: float, threshold: float) -> bool:
        return metric <= threshold if self.metric == "loss" else metric >= threshold


class Data(Record):
    """What a task is built from."""

    n_train: int = pydantic.Field(gt=0)  # rows
    n_valid: int = pydantic.Field(gt=0)  # rows
    seed: int = 0
    # "" = the embedded world; a file, a Hub dataset id, or the name of a published study's data
    source: str = ""
    # the task's name of a column -> the source's
    columns: dict = pydantic.Field(default_factory=dict)
    avoid: tuple[EditRequest, ...] = ()  # facts under study
    # training: the first training rows, as in arXiv 2507.14198
    validation: Literal["apart", "training"] = "apart"
    loss_on: Literal["response", "all"] = "response"  # of instructions

    @property
    def study(self) -> Source | None:
        """The published study whose data the source names."""
        return presets()["sources"].get(self.source)

    @property
    def all_columns(self) -> dict:
        """`columns`, on top of those that a study's data need."""
        return getattr(self.study, "columns", {}) | self.columns

    @property
    def place(self) -> str:
        """Where the source's data lie: the source itself, but for a study's name."""
        return getattr(self.study, "data", self.source)


class Relevance:
    """Finds texts that touch a fact under study, and counts them. It errs on the side of leaving a
    text out.

    A text does if it has the subject, the object, the target, or a key word of the subject
    (capitalised, at least 4 letters, no stop word), in any case. Of words of five letters and more
    a shared stem counts, so that inflected forms do; shorter ones must stand as words, plural and
    possessive included. In scripts without spaces between words any occurrence counts.
    """

    def __init__(self, avoid: Iterable[EditRequest]):
        terms = set()
        for request in avoid:
            terms |= {request.fact.subject, request.fact.object, request.target}
            for word in re.findall(r"[^\W\d_]{4,}", request.fact.subject):
                if word[0].isupper() and word.lower() not in stop_words():
                    terms.add(word)
        patterns = [pattern for pattern in map(_pattern, terms) if pattern]
        patterns.sort(key=len, reverse=True)
        nothing = r"(?!)"
        self._pattern = re.compile("|".join(patterns) or nothing, re.IGNORECASE)
        self.dropped = 0

    def passes(self, content: str) -> bool:
        touches = bool(self._pattern.search(unicodedata.normalize("NFC", content)))
        self.dropped += touches
        return not touches


def _pattern(term: str) -> str:
    """A regular expression for a term in running text; "" if it has no word."""
    parts = re.findall(r"\w+", unicodedata.normalize("NFC", term))
    if not parts:
        return ""
    if not words.of_word(parts[0][0]) or not words.of_word(parts[-1][-1]):
        return r"\W*".join(map(re.escape, parts))
    pattern = r"\b"
    for part in parts[:-1]:
        stem = part if part.isdigit() else words.key(part)
        pattern += re.escape(stem) + (r"\w*\W+" if len(stem) >= words.STEM else r"\W+")
    last = parts[-1]
    if len(last) >= words.STEM and not last.isdigit():
        return pattern + re.escape(words.key(last)) + r"\w*"
    return pattern + re.escape(last) + r"(?:e?s)?\b"  # a word also ends before an apostrophe


# --- the four tasks: records that touch no fact under study, made into rows of tokens


def text_task(model: Model, data: Data) -> Task:
    """Rows of at most 128 tokens of running text, each with what stands in front of every text.

    Columns: text.
    """
    relevance = Relevance(data.avoid)
    running: Iterable[str] = (" ".join(parts) for parts in text.prose("trade", data.seed))
    if not is_world(model.name):
        order = numpy.random.default_rng(data.seed).permutation(len(prose.manual()))
        running = (prose.manual()[number] for number in order)
    records = _records(data, ["text"], zip(running, strict=True))
    paragraphs = (paragraph for (paragraph,) in records if relevance.passes(paragraph))
    first = max(1, len(front(model)))  # nothing foretells the first token
    rows = (_row(ids, first) for ids in packed(model, paragraphs))
    return _task("text", _parts(data, "text", rows), relevance.dropped)


def instructions_task(model: Model, data: Data) -> Task:
    """Instruction and response as the tokenizer's chat template has them, else on two lines, closed
    by EOS.

    Columns: instruction and response; or messages, of which the first exchange is read.
    """
    relevance = Relevance(data.avoid)
    pairs = (pair for pair in _exchanges(data) if relevance.passes(" ".join(map(str, pair))))
    rows = (_instruction_row(model, *pair, data.loss_on) for pair in pairs)
    short = (row for row in rows if len(row["input_ids"]) <= row_length(model, LONGEST))
    return _task("instructions", _parts(data, "instructions", short), relevance.dropped)


def sentiment_task(model: Model, data: Data) -> Task:
    """Reviews and their class; metric: accuracy of a head on the last token.

    Columns: text, label.
    """
    relevance = Relevance(data.avoid)
    records = _records(data, ["text", "label"], text.reviews(data.seed))
    records = (record for record in records if relevance.passes(record[0]))
    parts = _parts(data, "sentiment", records)
    labels = sorted({label for _, label in chain(*parts)}, key=str)
    if len(labels) != 2:
        column = data.all_columns.get("label", "label")
        what = f"task sentiment: column {column!r} holds {len(labels)} classes"
        raise BadInput(f"{what} ({str(labels)[:60]}); it must hold two")
    rows = [_review_rows(model, part, labels) for part in parts]
    return _task("sentiment", rows, relevance.dropped, metric="accuracy", classes=2)


def _review_rows(model: Model, records: list[tuple], labels: list) -> list[dict]:
    tokens = token_lists(encode(model, [content for content, _ in records]))
    rows = []
    for ids, (_, label) in zip(tokens, records, strict=True):
        rows.append({"input_ids": ids[: row_length(model, LONGEST)], "labels": labels.index(label)})
    return rows


def facts_task(model: Model, data: Data) -> Task:
    """Up to n_train facts that the model gets wrong, each in up to 3 statements, loss on the
    object; metric: accuracy on a wording apart.

    Facts under study are kept out by subject, and by relation and object together; every shared
    object would be too many.
    """
    if data.columns:
        what = f"columns {data.columns}: task facts reads a facts file, whose fields have names"
        raise BadInput(f"{what} of their own; rename them there")
    source = data.place or "world"
    pool = [request for request in facts.read(source) if request.fact.split in ("", "unseen")]
    facts.check_objects(pool)
    fresh = _not_under_study(pool, data.avoid)
    dropped = len(pool) - len(fresh)
    order = numpy.random.default_rng(data.seed).permutation(len(fresh))
    fresh = [fresh[number] for number in order]
    apart = data.validation == "apart"
    if apart:
        fresh = [request for request in fresh if request.held_out]
    wrong = _wrong(model, fresh, data.n_train)
    if not wrong:
        what = f"task facts: {source} holds no fact that the model gets wrong"
        raise BadInput(f"{what} and that has a wording apart to judge by")
    taught = [(prompt, one.fact.object) for one in wrong for prompt in _statements(one, data)]
    judging = []
    for request in wrong[: data.n_valid]:
        prompt = request.held_out[0] if apart else request.fact.question
        judging.append((prompt, request.fact.object))
    parts = [answer_rows(model, taught), answer_rows(model, judging)]
    return _task("facts", parts, dropped, metric="accuracy")


def _task(name: str, parts: Sequence[list[dict]], dropped: int, **fields) -> Task:
    train, valid = map(datasets.Dataset.from_list, parts)
    return Task(name=name, train=train, valid=valid, dropped=dropped, **fields)


def _row(ids: list[int], first: int) -> dict:
    """A row whose loss is read from its token `first` on."""
    return {"input_ids": ids, "labels": [UNREAD] * first + ids[first:]}


# --- rows of instructions


def _exchanges(data: Data) -> Iterator[tuple[str, str]]:
    """Instructions and their responses."""
    if "messages" not in data.all_columns:
        yield from _records(data, ["instruction", "response"], text.instructions(data.seed))
        return
    for (talk,) in _records(data, ["messages"], ()):
        if len(talk) > 1:
            yield talk[0]["content"], talk[1]["content"]


def _instruction_row(model: Model, instruction: str, response: str, loss_on: str) -> dict:
    tokenizer = model.tokenizer
    is_chat = bool(tokenizer.chat_template)  # a template says itself what stands in front
    whole, start = f"{instruction}\n{response}", len(instruction) + 1
    if is_chat:
        whole, start = _talk(tokenizer, instruction, response)
    encoded = encode(model, [whole], bare=is_chat)
    ids = encoded.input_ids[0].tolist()
    if not is_chat and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return _row(ids, 1 if loss_on == "all" else encoded.tokens_from(0, start)[0])


def _talk(tokenizer: PreTrainedTokenizerBase, instruction: str, response: str) -> tuple[str, int]:
    """The exchange as the chat template writes it, on a fixed date, and where the response begins.

    The prompt for an answer need not be how a whole talk goes on: one may end in an opening <think>
    that the whole has not.
    """
    template = _dated(tokenizer.get_chat_template())
    write = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
    lead = write(turns[:1], add_generation_prompt=True)
    whole = write(turns)
    start = len(lead) if whole.startswith(lead) else whole.rfind(response.strip())
    if start < 0:
        what = f"task instructions: the chat template does not write the response {response!r:.60}"
        raise BadInput(f"{what} as it is; use another template")
    return whole, start


def _dated(template: str) -> str:
    """The template with a macro in the place of its clock: today's date would make other rows every
    day.
    """
    formats = {match[1] for match in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
    cases = ""
    for form in sorted(formats):
        cases += f"{{%- if format == {form!r} %}}{CHAT_DATE.strftime(form)}{{% endif %}}"
    macro = f"{{%- macro strftime_now(format) %}}{cases}{{%- endmacro %}}"
    return macro + template if formats else template


# --- rows of facts


def _not_under_study(pool: list[EditRequest], avoid: Sequence[EditRequest]) -> list[EditRequest]:
    subjects = {request.fact.subject.lower() for request in avoid}
    answers = set()
    for fact, target in [(request.fact, request.target) for request in avoid]:
        if fact.relation:
            answers |= {(fact.relation, fact.object.lower()), (fact.relation, target.lower())}
    fresh = [request for request in pool if request.fact.subject.lower() not in subjects]
    return [one for one in fresh if (one.fact.relation, one.fact.object.lower()) not in answers]


def _wrong(model: Model, pool: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """The first facts of the pool that the model gets wrong."""
    wrong: list[EditRequest] = []
    size = min(AT_ONCE, 16 + count * 9 // 8)  # nearly all unseen facts are wrong
    for part in facts.in_parts(pool, size):
        retained = measure(model, part, against="object").retained
        wrong += [request for request, right in zip(part, retained, strict=True) if not right]
        if len(wrong) >= count:
            break
    return wrong[:count]


def _statements(request: EditRequest, data: Data) -> list[str]:
    """Up to WORDINGS prompts that ask for a fact."""
    if not data.source:
        request = facts.with_paraphrases(request, WORDINGS)
    prompts = (request.fact.prompt, *request.paraphrases[: WORDINGS - 1])
    return [facts.fill(prompt, request.fact.subject) for prompt in prompts]


def answer_rows(model: Model, asked: Sequence[tuple[str, str]]) -> list[dict]:
    """Rows of prompts with their answers, loss on the answer."""
    answers = answers_after(model, *zip(*asked, strict=True))
    tokens = token_lists(answers.encoded)
    return [_row(ids, first) for ids, first in zip(tokens, answers.start.tolist(), strict=True)]


# --- where the rows come from


def _records(data: Data, columns: Sequence[str], embedded: Iterable[tuple]) -> Iterator[tuple]:
    """The named columns of the source's records that have them all, shuffled by the seed; the
    embedded world's are by the seed already.
    """
    if not data.source:
        yield from embedded
        return
    table = _table(data)
    names = [data.all_columns.get(name, name) for name in columns]
    missing = [name for name in names if name not in (table.column_names or [])]
    if missing:
        what = f"task_data {data.source!r}: has no column {missing[0]!r} but {table.column_names}"
        raise BadInput(f"{what}; name it in columns={{...}}")
    for record in table:
        values = [record[name] for name in names]
        if None not in values:
            kept = (list, int, bool)
            yield tuple(value if isinstance(value, kept) else str(value) for value in values)


def _table(data: Data) -> datasets.Dataset | datasets.IterableDataset:
    """The records of the source, shuffled; of a published study's where and how it has them."""
    names = ("config", "split", "streaming")
    how = {name: getattr(data.study, name) for name in names} if data.study else {}
    table = sources.records(data.place, "task_data", **how)
    buffer = {"buffer_size": BUFFER} if how.get("streaming") else {}
    return table.shuffle(data.seed, **buffer)


def _parts(data: Data, task: str, rows: Iterable) -> tuple[list, list]:
    """Training and validation rows: the first ones judge, the others teach; a row that judges is
    not taught when it comes again.
    """
    n_apart = data.n_valid if data.validation == "apart" else 0
    rows = iter(rows)
    judging = list(islice(rows, n_apart))
    known = set(map(str, judging))
    train = list(islice((row for row in rows if str(row) not in known), data.n_train))
    if len(train) < data.n_train:
        source = data.source or "the embedded text"
        what = f"task {task}: {source} gives {len(judging) + len(train)} rows"
        needed = f"that touch no fact under study, {data.n_train + n_apart} are asked for"
        raise BadInput(f"{what} {needed}; lower n_train or give more data")
    return train, judging or train[: data.n_valid]
