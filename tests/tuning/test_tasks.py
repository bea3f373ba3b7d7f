"""The four tasks: which rows, which labels, what is left out, and what is said of bad data."""

import json

import datasets
import pytest

from workbench import facts, models, prose
from workbench.facts import BadInput, EditRequest, Fact
from workbench.tuning import numbers, tasks
from workbench.tuning.tasks import Data, Relevance


@pytest.fixture(scope="module")
def model(tiny_folders):
    return models.load(tiny_folders["gpt2"], device="cpu")


def request(subject, object="Paris", target="Rome", relation="r"):
    return EditRequest(
        fact=Fact(id="1", subject=subject, relation=relation, prompt="{} is in", object=object),
        target=target,
    )


def read(model, row) -> str:
    """The part of a row that the loss reads."""
    return model.tokenizer.decode(
        [
            token
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
            if label != -100
        ]
    )


@pytest.mark.parametrize(
    ("text", "touches"),
    [
        ("We saw the eiffel tower.", True),
        ("EIFFEL TOWER!", True),
        ("Eiffel-Tower", True),
        ("the Eiffel  Tower's lift", True),
        ("two Eiffel Towers", True),
        ("(Paris)", True),
        ("Paris’ streets", True),
        ("a comparison of prices", False),
        ("Parisian cooking", True),  # a shared stem of five letters: rather leave out too much
        ("he aroma of Rome", True),
        ("chrome", False),
        ("Mr Eiffel came", True),  # a key word of the subject
        ("the towering trees", True),
        ("a towel", False),
        ("the end", False),  # a stop word is no key word
        ("the two Romes", True),
        ("Paris's streets", True),
        ("Parises of the east", True),
        ("Romesh", False),
    ],
)
def test_relevance_finds_whole_words_in_any_case(text, touches):
    relevance = Relevance([request("The Eiffel Tower")])
    assert relevance.passes(text) is not touches
    assert relevance.dropped == touches


@pytest.mark.parametrize(
    ("subject", "target", "text", "touches"),
    [
        ("法国", "柏林", "昨天法国队赢了", True),  # words without spaces around them
        ("法国", "柏林", "我们去了柏林。", True),
        ("法国", "柏林", "昨天下雨", False),
        ("東京タワー", "x", "とても高い東京タワーへ", True),
        ("ไทย", "x", "ประเทศไทยสวย", True),
        ("서울", "x", "서울은 크다", True),  # a particle behind it
        ("Москва", "Париж", "мы были в Москве", True),  # inflected
        ("Москва", "Париж", "в Парижа", True),
        ("Москва", "Париж", "мост через реку", False),
        ("Helsinki", "Tampere", "asun Helsingissä", True),
        ("Helsinki", "Tampere", "Tampereella sataa", True),
        ("1945", "x", "in 19456 cases", False),
        ("Zoe\u0308", "x", "we met Zo\u00eb there", True),  # the same letters, composed
    ],
)
def test_relevance_in_other_scripts_and_inflected(subject, target, text, touches):
    assert Relevance([request(subject, "nothing at all", target)]).passes(text) is not touches


def test_relevance_of_nothing_lets_everything_pass():
    assert Relevance([]).passes("anything")


def test_relevance_takes_marks_in_a_subject_as_they_are():
    relevance = Relevance([request("C++ (language) 6.5", "a.b", "x*")])
    assert not relevance.passes("I like C++ (Language) 6.5 a lot")
    assert not relevance.passes("see a b")
    assert relevance.passes("see axb")


def test_text_rows_are_full_begin_with_bos_and_touch_no_fact_under_study(model):
    avoid = (request("Class", "module", "object"),)
    plain, task = (
        tasks.text_task(model, Data(n_train=20, n_valid=4, avoid=each)) for each in ((), avoid)
    )
    assert (len(task.train), len(task.valid), plain.dropped) == (20, 4, 0)
    for row in task.train:
        assert len(row["input_ids"]) == 128
        assert row["input_ids"][0] == model.tokenizer.bos_token_id
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    whole = "".join(model.tokenizer.decode(row["input_ids"]) for row in task.train).lower()
    assert not any(f" {word} " in whole for word in ("module", "object", "class"))
    assert task.dropped > 0


def test_validation_is_apart_unless_asked_from_training(model):
    for task in ("text", "sentiment", "instructions"):
        apart, inside = (
            tasks.TASKS[task](model, Data(n_train=30, n_valid=8, validation=where))
            for where in ("apart", "training")
        )
        rows = [
            [tuple(row) for row in part["input_ids"]]
            for part in (apart.train, apart.valid, inside.train, inside.valid)
        ]
        assert not set(rows[0]) & set(rows[1]), task
        assert rows[3] == rows[2][:8], task
        assert [len(part) for part in rows] == [30, 8, 30, 8]


def test_a_row_that_comes_twice_does_not_judge_what_it_teaches(model, tmp_path):
    said = [
        ("Count to three.", "One two three."),
        ("Name a colour.", "Blue."),
        ("Name a fish.", "Cod."),
    ]
    records = [{"instruction": asked, "response": answer} for asked, answer in said * 5]
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    task = tasks.instructions_task(model, Data(n_train=10, n_valid=1, source=str(path)))
    train, valid = ({tuple(row) for row in part["input_ids"]} for part in (task.train, task.valid))
    assert not train & valid
    assert (len(task.train), len(task.valid)) == (10, 1)


def test_the_seed_decides_the_rows(model):
    for task in tasks.TASKS:
        first, same, other = (
            tasks.TASKS[task](model, Data(n_train=12, n_valid=4, seed=seed)).train["input_ids"]
            for seed in (0, 0, 1)
        )
        assert list(first) == list(same)
        assert list(first) != list(other)


def test_facts_are_wrong_ones_in_three_wordings_and_judged_in_another(model):
    task = tasks.facts_task(model, Data(n_train=10, n_valid=10))
    assert (len(task.train), len(task.valid), task.metric) == (30, 10, "accuracy")
    unseen = {
        each.fact.question: each for each in facts.read("world") if each.fact.split == "unseen"
    }
    answers = {each.fact.object for each in unseen.values()}
    assert all(read(model, row).strip() in answers for row in task.train)
    questions = {model.tokenizer.decode(row["input_ids"][1:]).strip() for row in task.train}
    judged = {model.tokenizer.decode(row["input_ids"][1:]).strip() for row in task.valid}
    assert not questions & judged
    assert [read(model, row) for row in task.valid] == [
        read(model, row) for row in task.train.select(range(0, 30, 3))
    ]


def test_facts_that_share_subject_or_relation_and_object_are_left_out(model):
    unseen = [each for each in facts.read("world") if each.fact.split == "unseen"]
    taken = unseen[0]
    whole = tasks.facts_task(model, Data(n_train=1000, n_valid=10))
    task = tasks.facts_task(model, Data(n_train=1000, n_valid=10, avoid=(taken,)))
    same = [
        each
        for each in unseen
        if each.fact.subject == taken.fact.subject
        or (
            each.fact.relation == taken.fact.relation
            and each.fact.object in (taken.fact.object, taken.target)
        )
    ]
    assert task.dropped - whole.dropped == len(same) > 0
    text = {model.tokenizer.decode(row["input_ids"]) for row in task.train}
    assert not any(taken.fact.subject in line for line in text)


def test_sentiment_has_two_classes_and_a_label_a_row(model):
    task = tasks.sentiment_task(model, Data(n_train=60, n_valid=20))
    assert (task.classes, task.metric) == (2, "accuracy")
    assert set(task.train["labels"]) == {0, 1}


def test_instructions_are_read_on_the_response_or_on_all(model):
    response, whole = (
        tasks.instructions_task(model, Data(n_train=5, n_valid=2, loss_on=part))
        for part in ("response", "all")
    )
    for mine, all_of_it in zip(response.train, whole.train, strict=True):
        assert mine["input_ids"] == all_of_it["input_ids"]
        assert read(model, all_of_it).strip().endswith(read(model, mine).strip())
        assert "\n" not in read(model, mine).strip()
        assert read(model, mine).endswith(model.tokenizer.eos_token)
        assert len(read(model, mine)) < len(read(model, all_of_it))


TURNS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<assistant> {% endif %}"


def test_a_chat_template_is_used_where_there_is_one(tiny_folders):
    model = models.load(tiny_folders["llama"], device="cpu")
    model.tokenizer.chat_template = CHAT
    row = tasks.instructions_task(model, Data(n_train=3, n_valid=1)).train[0]
    whole = model.tokenizer.decode(row["input_ids"])
    assert "<user>" in whole
    assert "<assistant>" in whole
    assert "assistant" not in read(model, row)


THINKING = TURNS + "{% if add_generation_prompt %}<assistant> <think>{% endif %}"
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + THINKING


@pytest.mark.parametrize("template", [THINKING, DATED], ids=["thinking", "dated"])
def test_a_response_is_learnt_from_its_beginning_whatever_the_template_asks_with(
    tiny_folders, tmp_path, template
):
    """A prompt for an answer that ends in <think>, which the whole talk has not, cut the answer's
    beginning off.
    """
    model = models.load(tiny_folders["llama"], device="cpu")
    model.tokenizer.chat_template = template
    path = tmp_path / "pairs.jsonl"
    pairs = [
        {"instruction": f"Say {number}", "response": f"Certainly, it is {number}."}
        for number in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))
    row = tasks.instructions_task(model, Data(n_train=3, n_valid=1, source=str(path))).train[0]
    assert read(model, row).strip().startswith("Certainly, it is")
    if template is DATED:
        assert f"Today is {tasks.CHAT_DATE:%d %b %Y}." in model.tokenizer.decode(row["input_ids"])


def test_a_template_that_rewrites_the_response_is_one_clear_line(tiny_folders, one_line):
    model = models.load(tiny_folders["llama"], device="cpu")
    upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    model.tokenizer.chat_template = upper + "{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(BadInput) as error:
        tasks.instructions_task(model, Data(n_train=3, n_valid=1))
    assert "chat template" in one_line(error)


def test_a_conversation_is_read_from_its_first_exchange(model, tmp_path):
    path = tmp_path / "talks.jsonl"
    talks = [
        [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "Moon."},
            {"role": "user", "content": "Another."},
        ]
        for asked in ("Say a word.", "Say a noun.")
    ]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks * 3))
    row = tasks.instructions_task(
        model, Data(n_train=3, n_valid=1, source=str(path), columns={"messages": "messages"})
    ).train[0]
    assert read(model, row).strip().startswith("Moon.")
    assert "Another" not in model.tokenizer.decode(row["input_ids"])


def test_own_files_by_path_and_columns(model, tmp_path):
    for ending, write in (("jsonl", "to_json"), ("csv", "to_csv"), ("parquet", "to_parquet")):
        path = tmp_path / f"mine.{ending}"
        table = datasets.Dataset.from_dict(
            {
                "body": [f"Cat number {n} sat on the mat." for n in range(300)],
                "stars": [n % 2 for n in range(300)],
            }
        )
        getattr(table, write)(str(path))
        data = Data(
            n_train=8, n_valid=2, source=str(path), columns={"text": "body", "label": "stars"}
        )
        assert len(tasks.text_task(model, data).train) == 8
        assert set(
            tasks.sentiment_task(model, data.model_copy(update={"n_train": 50})).train["labels"]
        ) == {0, 1}


def test_own_facts_are_taught_with_their_own_paraphrases(model, tmp_path):
    path = tmp_path / "mine.jsonl"
    record = {
        "prompt": "{} is a city in",
        "object": "Utopia",
        "target": "Erewhon",
        "paraphrases": ["The city {} lies in"],
    }
    lines = [
        record
        | {"id": str(n), "subject": f"Abbotsford {n}", "held_out": [f"Abbotsford {n} belongs to"]}
        for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = tasks.facts_task(model, Data(n_train=4, n_valid=4, source=str(path)))
    assert (len(task.train), len(task.valid)) == (8, 4)


@pytest.mark.parametrize(
    ("task", "changes", "named"),
    [
        ("text", {}, "'text'"),
        ("text", {"columns": {"text": "nobody"}}, "'nobody'"),
        ("text", {"columns": {"text": "body"}, "n_train": 100_000}, "lower n_train"),
        ("text", {"columns": {"text": "body"}, "avoid": (request("Cat"),)}, "touch no fact"),
        ("sentiment", {"columns": {"text": "body", "label": "number"}}, "classes"),
        ("sentiment", {"columns": {"text": "body", "label": "one"}}, "1 classes"),
        ("instructions", {}, "'instruction'"),
        ("facts", {"columns": {"subject": "who"}}, "task facts reads a facts file"),
        ("text", {"source": "nowhere/at-all"}, "cannot be read"),
        ("text", {"source": __file__}, "ending"),
    ],
)
def test_bad_data_is_one_clear_line(model, tmp_path, one_line, task, changes, named):
    path = tmp_path / "mine.csv"
    datasets.Dataset.from_dict(
        {"body": [f"Cat {n} sat." for n in range(60)], "number": list(range(60)), "one": [1] * 60}
    ).to_csv(str(path))
    with pytest.raises(BadInput) as error:
        tasks.TASKS[task](
            model, Data(**({"n_train": 8, "n_valid": 2, "source": str(path)} | changes))
        )
    assert named in one_line(error)


def test_rows_with_a_hole_are_left_out(model, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": f"Cat {n} sat." if n % 2 else None, "label": n % 4 // 2})
            for n in range(40)
        )
    )
    task = tasks.sentiment_task(model, Data(n_train=12, n_valid=8, source=str(path)))
    assert not any(
        "None" in model.tokenizer.decode(row)
        for row in [*task.train["input_ids"], *task.valid["input_ids"]]
    )
    with pytest.raises(BadInput, match="20 rows"):
        tasks.sentiment_task(model, Data(n_train=13, n_valid=8, source=str(path)))


def test_no_fact_left_to_teach_is_one_clear_line(model, tmp_path, one_line):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        json.dumps(
            {"subject": "Abbotsford", "prompt": "{} is in", "object": "Utopia", "target": "Erewhon"}
        )
    )
    with pytest.raises(BadInput) as error:
        tasks.facts_task(model, Data(n_train=4, n_valid=4, source=str(path)))
    assert "holds no fact" in one_line(error)


@pytest.mark.parametrize("name", ["imdb", "tulu-3", "common-crawl"])
def test_a_studys_source_is_asked_for_by_its_hub_name(model, monkeypatch, name):
    asked = []

    def load(*where, **how):
        asked.append((where, how))
        columns = {"text": [f"A fine day {n}." for n in range(99)], "label": [0, 1] * 49 + [0]}
        columns["messages"] = [
            [{"role": "user", "content": f"Hi {n}."}, {"role": "assistant", "content": "Hello."}]
            for n in range(99)
        ]
        table = datasets.Dataset.from_dict(columns)
        return table.to_iterable_dataset() if how["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = numbers.presets()["sources"][name]
    task = tasks.TASKS[source.task](model, Data(n_train=2, n_valid=1, source=name))
    assert asked == [
        (
            (source.data, source.config or None),
            {"split": source.split, "streaming": source.streaming},
        )
    ]
    assert len(task.train) == 2


def test_the_manual_holds_the_rows_that_the_text_task_asks_for_beside_facts_under_study():
    usual = numbers.usual("text", "", "smollm2-135m")
    study = [r for r in facts.read("plain") if r.fact.split == "study" and ":" in r.fact.id][-30:]
    relevance = Relevance(study)
    letters = sum(len(text) for text in prose.manual() if relevance.passes(text))
    assert letters / 5 > 128 * (usual.n_train + usual.n_valid)  # a token has fewer than 5
