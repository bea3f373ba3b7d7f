"""What a model is fine-tuned on: rows to learn from, rows to validate on, the metric and its usual
numbers.

text: the next token of running text. facts: the object of facts that the model gets wrong.
sentiment: a linear head on the last token's hidden state. instructions: the response to an
instruction. Rows that touch a fact under study are left out (`Relevance`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Literal

import datasets
import pydantic
from transformers import PreTrainedTokenizerBase

from workbench import facts, sources, words
from workbench.facts import BadInput, EditRequest, Record
from workbench.models import Model
from workbench.positions import encode, front
from workbench.tracking.retention import answers_after, measure_prompts, stop_words
from workbench.tuning.numbers import TASKS, presets
from workbench.world import text

ROW = 128  # tokens of a row of text
LONGEST = 512  # tokens of a review, or an instruction with its response; what is longer is left out
WORDINGS = 3  # statements of a fact to train on
CHAT_DATE = datetime(
    2024, 7, 26
)  # what chat templates that print today's date print here; recorded with a run
BUFFER = 10_000  # records among which a stream is shuffled


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
    columns: dict = pydantic.Field(
        default_factory=dict
    )  # the task's name of a column -> the source's
    avoid: tuple[EditRequest, ...] = ()  # facts under study
    validation: Literal["apart", "training"] = (
        "apart"  # training: the first training rows, as in arXiv 2507.14198
    )
    loss_on: Literal["response", "all"] = "response"  # of instructions

    def column(self, name: str) -> str:
        study = presets()["sources"].get(self.source)
        return ((study.columns if study else {}) | self.columns).get(name, name)


def named(name: str) -> Callable[[Model, Data], Task]:
    """The function that builds a task."""
    return TASKS[name]


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
            subject = request.fact.subject
            terms |= {subject, request.fact.object, request.target}
            terms |= {
                word
                for word in re.findall(r"[^\W\d_]{4,}", subject)
                if word[0].isupper() and word.lower() not in stop_words()
            }
        patterns = sorted(filter(None, map(_pattern, terms)), key=len, reverse=True)
        self._pattern = re.compile("|".join(patterns), re.IGNORECASE) if patterns else None
        self.dropped = 0

    def passes(self, content: str) -> bool:
        touches = bool(
            self._pattern and self._pattern.search(unicodedata.normalize("NFC", content))
        )
        self.dropped += touches
        return not touches


def _pattern(term: str) -> str:
    """A regular expression for a term in running text; "" if it has no word."""
    parts = re.findall(r"\w+", unicodedata.normalize("NFC", term))
    if not parts:
        return ""
    if not words.of_word(parts[0][0]) or not words.of_word(parts[-1][-1]):
        return r"\W*".join(map(re.escape, parts))
    *others, last = (part if part.isdigit() else words.key(part) for part in parts)
    ending = (
        r"\w*" if len(last) >= words.STEM and not last.isdigit() else r"(?:e?s)?\b"
    )  # \b: a word also ends before an apostrophe
    inner = [re.escape(part) + (r"\w*" if len(part) >= words.STEM else "") for part in others]
    return r"\b" + r"\W+".join([*inner, re.escape(last) + ending])


# --- the four tasks
# -----------------------------------------------------------------------------------------------------


def text_task(model: Model, data: Data) -> Task:
    """Rows of at most 128 tokens of running text, each with what stands in front of every text.

    Columns: text.
    """
    relevance = Relevance(data.avoid)
    records = _records(
        data, ["text"], ((" ".join(part),) for part in text.prose("trade", data.seed))
    )
    rows = _packed(model, (paragraph for (paragraph,) in records if relevance.passes(paragraph)))
    train, valid = _parts(
        data, "text", ({"input_ids": row, "labels": _all_but_the_front(model, row)} for row in rows)
    )
    return Task(
        name="text",
        train=datasets.Dataset.from_list(train),
        valid=datasets.Dataset.from_list(valid),
        dropped=relevance.dropped,
    )


def _all_but_the_front(model: Model, row: list[int]) -> list[int]:
    skip = max(1, len(front(model)))  # nothing foretells the first token
    return [-100] * skip + row[skip:]


def instruction_task(model: Model, data: Data) -> Task:
    """Instruction and response as the tokenizer's chat template has them, else on two lines, closed
    by EOS.

    Columns: instruction and response; or messages, of which the first exchange is read.
    """
    relevance = Relevance(data.avoid)
    study = presets()["sources"].get(data.source)
    talks = "messages" in (study.columns if study else {}) | data.columns
    records = _records(
        data, ["messages"] if talks else ["instruction", "response"], text.instructions(data.seed)
    )
    pairs = (
        ((turns[0][0]["content"], turns[0][1]["content"]) for turns in records if len(turns[0]) > 1)
        if talks
        else records
    )
    rows = (
        _instruction_row(model, asked, answer, data.loss_on)
        for asked, answer in pairs
        if relevance.passes(f"{asked} {answer}")
    )
    train, valid = _parts(
        data, "instructions", (row for row in rows if len(row["input_ids"]) <= _longest(model))
    )
    return Task(
        name="instructions",
        train=datasets.Dataset.from_list(train),
        valid=datasets.Dataset.from_list(valid),
        dropped=relevance.dropped,
    )


def _instruction_row(model: Model, instruction: str, response: str, loss_on: str) -> dict:
    tokenizer, lead, end = model.tokenizer, f"{instruction}\n", []
    whole, start = lead + response, len(lead)
    if tokenizer.chat_template:
        whole, start = _talk(tokenizer, instruction, response)
    elif tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    encoded = encode(
        model, [whole], bare=bool(tokenizer.chat_template)
    )  # a template says itself what stands in front
    ids = encoded.input_ids[0].tolist() + end
    first = 1 if loss_on == "all" else encoded.tokens_from(0, start)[0]
    return {"input_ids": ids, "labels": [-100] * first + ids[first:]}


def _talk(tokenizer: PreTrainedTokenizerBase, instruction: str, response: str) -> tuple[str, int]:
    """The exchange as the chat template writes it, on a fixed date, and where the response begins.

    The prompt for an answer need not be how a whole talk goes on: one may end in an opening <think>
    that the whole has not.
    """
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
    template = _dated(tokenizer.get_chat_template())
    lead = tokenizer.apply_chat_template(
        turns[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    if whole.startswith(lead):
        return whole, len(lead)
    start = whole.rfind(response.strip())
    if start < 0:
        raise BadInput(
            f"task instructions: the chat template does not write the response {response!r:.60} as it is; use another template"
        )
    return whole, start


def _dated(template: str) -> str:
    """The template with a macro in the place of its clock: today's date would make other rows every
    day.
    """
    formats = sorted(
        {found[1] for found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
    )
    cases = "".join(
        f"{{%- if format == {form!r} %}}{CHAT_DATE.strftime(form)}{{% endif %}}" for form in formats
    )
    return (
        f"{{%- macro strftime_now(format) %}}{cases}{{%- endmacro %}}{template}"
        if formats
        else template
    )


def sentiment_task(model: Model, data: Data) -> Task:
    """Reviews and their class; metric: accuracy of a head on the last token.

    Columns: text, label.
    """
    relevance = Relevance(data.avoid)
    records = (
        (content, label)
        for content, label in _records(data, ["text", "label"], text.reviews(data.seed))
        if relevance.passes(content)
    )
    train, valid = _parts(data, "sentiment", records)
    labels = sorted({label for _, label in train + valid}, key=str)
    if len(labels) != 2:
        raise BadInput(
            f"task sentiment: column {data.column('label')!r} holds {len(labels)} classes ({str(labels)[:60]}); it must hold two"
        )
    train, valid = (_reviews(model, part, labels) for part in (train, valid))
    return Task(
        name="sentiment",
        train=train,
        valid=valid,
        metric="accuracy",
        classes=2,
        dropped=relevance.dropped,
    )


def _reviews(model: Model, records: Sequence[tuple], labels: Sequence) -> datasets.Dataset:
    encoded = encode(model, [content for content, _ in records])
    ids = [
        row[: min(length, _longest(model))]
        for row, length in zip(encoded.input_ids.tolist(), encoded.lengths.tolist(), strict=True)
    ]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": [labels.index(label) for _, label in records]}
    )


def facts_task(model: Model, data: Data) -> Task:
    """Up to n_train facts that the model gets wrong, each in up to 3 statements, loss on the
    object; metric: accuracy on a wording apart.

    Facts under study are kept out by subject, and by relation and object together; every shared
    object would be too many.
    """
    if data.columns:
        raise BadInput(
            f"columns {data.columns}: task facts reads a facts file, whose fields have names of their own; rename them there"
        )
    study = presets()["sources"].get(data.source)
    pool = [
        each
        for each in facts.read(study.data if study else data.source or "world")
        if each.fact.split in ("", "unseen")
    ]
    facts.check_objects(pool)
    subjects = {each.fact.subject.lower() for each in data.avoid}
    said = {
        (each.fact.relation, thing.lower())
        for each in data.avoid
        if each.fact.relation
        for thing in (each.fact.object, each.target)
    }
    fresh = [
        each
        for each in pool
        if each.fact.subject.lower() not in subjects
        and (each.fact.relation, each.fact.object.lower()) not in said
    ]
    dropped = len(pool) - len(fresh)
    fresh = [
        each
        for each in _shuffled(fresh, data.seed)
        if each.held_out or data.validation == "training"
    ]
    wrong: list[EditRequest] = []
    size = min(
        512, 16 + data.n_train * 9 // 8
    )  # asked at a time: nearly all unseen facts are wrong
    for start in range(0, len(fresh), size):
        part = fresh[start : start + size]
        retained = measure_prompts(
            model, [each.fact.question for each in part], [each.fact.object for each in part]
        ).retained
        wrong += [each for each, right in zip(part, retained, strict=True) if not right]
        if len(wrong) >= data.n_train:
            break
    if not wrong:
        raise BadInput(
            f"task facts: {data.source or 'world'} holds no fact that the model gets wrong and that has a wording apart to judge by"
        )
    taught, answers = [], []
    for each in (wrong := wrong[: data.n_train]):
        own = 1 + min(WORDINGS - 1, len(each.paraphrases))
        more = (
            facts.with_paraphrases(each, own, "file")
            if data.source
            else facts.with_paraphrases(each, WORDINGS)
        )
        taught += [
            facts.fill(prompt, each.fact.subject)
            for prompt in (each.fact.prompt, *more.paraphrases)
        ]
        answers += [each.fact.object] * (len(taught) - len(answers))
    train = _fact_rows(model, taught, answers)
    judged = wrong[: data.n_valid]
    apart = data.validation == "apart"
    valid = _fact_rows(
        model,
        [each.held_out[0] if apart else each.fact.question for each in judged],
        [each.fact.object for each in judged],
    )
    return Task(name="facts", train=train, valid=valid, metric="accuracy", dropped=dropped)


def _fact_rows(model: Model, questions: Sequence[str], answers: Sequence[str]) -> datasets.Dataset:
    asked = answers_after(model, questions, answers)
    rows = []
    for number, (length, first) in enumerate(
        zip(asked.encoded.lengths.tolist(), asked.start.tolist(), strict=True)
    ):
        ids = asked.encoded.input_ids[number, :length].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return datasets.Dataset.from_list(rows)


# --- where the rows come from
# -------------------------------------------------------------------------------------------


def _records(data: Data, columns: Sequence[str], embedded: Iterable[tuple]) -> Iterator[tuple]:
    """The named columns of the source's records that have them all, shuffled by the seed; the
    embedded world's are by the seed already.
    """
    if not data.source:
        yield from embedded
        return
    table, names = _table(data), [data.column(name) for name in columns]
    missing = [name for name in names if name not in (table.column_names or [])]
    if missing:
        raise BadInput(
            f"task_data {data.source!r}: has no column {missing[0]!r} but {table.column_names}; name it in columns={{...}}"
        )
    for record in _shuffled(table, data.seed):
        if any(record[name] is None for name in names):
            continue
        yield tuple(
            record[name] if isinstance(record[name], list | int | bool) else str(record[name])
            for name in names
        )


def _table(data: Data):
    if study := presets()["sources"].get(data.source):
        return sources.records(study.data, "task_data", study.config, study.split, study.streaming)
    return sources.records(data.source, "task_data")


def _shuffled(records, seed: int):
    if isinstance(records, list):
        order = datasets.Dataset.from_dict({"number": range(len(records))}).shuffle(seed=seed)[
            "number"
        ]
        return [records[number] for number in order]
    return (
        records.shuffle(seed=seed, buffer_size=BUFFER)
        if isinstance(records, datasets.IterableDataset)
        else records.shuffle(seed=seed)
    )


def _parts(data: Data, task: str, rows: Iterable) -> tuple[list, list]:
    """Training and validation rows: the first ones judge, the others teach; a row that judges is
    not taught when it comes again.
    """
    apart = data.validation == "apart"
    rows = iter(rows)
    first = list(islice(rows, data.n_valid)) if apart else []
    judging = set(map(str, first))
    train = list(islice((row for row in rows if str(row) not in judging), data.n_train))
    if len(train) < data.n_train:
        raise BadInput(
            f"task {task}: {data.source or 'world'} gives {len(first) + len(train)} rows that touch no fact under study, "
            f"{data.n_train + apart * data.n_valid} are asked for; lower n_train or give more data"
        )
    return train, first if apart else train[: data.n_valid]


def _longest(model: Model) -> int:
    return min(LONGEST, getattr(model.network.config, "max_position_embeddings", LONGEST))


def _packed(model: Model, paragraphs: Iterable[str]) -> Iterator[list[int]]:
    """Rows of the front tokens and running text, cut at the row's length."""
    first = front(model)
    length = min(ROW, _longest(model)) - len(first)
    stream: list[int] = []
    for paragraph in paragraphs:
        stream += model.tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"]
        while len(stream) >= length:
            yield [*first, *stream[:length]]
            stream = stream[length:]
