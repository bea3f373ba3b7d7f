"""Facts come in as they were written, whatever the layout; what cannot be used is one line."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.layouts import (
    FILLED,
    LAYOUTS,
    as_csv,
    as_json,
    as_jsonl,
    counterfact,
    flat,
    own,
    own_filled,
    written,
    zsre,
)
from workbench import facts, words
from workbench.facts import (
    NEIGHBOURS,
    BadInput,
    EditRequest,
    Exposure,
    Fact,
    fill,
    inspect,
    objects_of,
    read,
    relations,
    with_paraphrases,
    world_rows,
)

SUBJECTS = (
    "Karelo",
    "Old {Karelo}",
    "a{}b",
    "{}",
    "{0}",
    'Bo "the Bell" Ruun',
    "O'Teele",
    "back\\slash",
    "Åse Ødegård",
    "Ёлка",
    "東京タワー",
    "قهوة",
    "😀 & co.",
    "two  spaces",
    "comma, semicolon; bar",
    "1984",
)


def only(source: Path) -> EditRequest:
    (request,) = read(source)
    return request


def complaint(source, **options) -> str:
    with pytest.raises(BadInput) as caught:
        read(source, **options)
    return one_line(caught.value)


def one_line(error: BadInput) -> str:
    line = str(error)
    assert "\n" not in line
    assert line.strip()
    return line


# --- layouts
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_layout_says_the_same_fact(tmp_path, layout, subject):
    request = only(
        as_json(
            tmp_path, layout(subject, "The maker of {} is", "Vint & {sons}", 'the "Sorn" works')
        )
    )
    assert (request.fact.subject, request.fact.prompt) == (subject, "The maker of {} is")
    assert (request.fact.object, request.target) == ("Vint & {sons}", 'the "Sorn" works')
    assert request.fact.question == f"The maker of {subject} is"


@pytest.mark.parametrize("store", [as_json, as_jsonl, as_csv])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_file_kind_says_the_same_fact(tmp_path, store, subject):
    request = only(
        store(tmp_path, own(subject, "The maker of {} is", "Vint, {sons}", 'the "Sorn" works'))
    )
    assert (request.fact.question, request.fact.object, request.target) == (
        f"The maker of {subject} is",
        "Vint, {sons}",
        'the "Sorn" works',
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_jsonl_record_ends_at_a_line_feed_only(tmp_path, separator):
    request = only(as_jsonl(tmp_path, own(subject=f"Kar{separator}elo")))
    assert request.fact.subject == f"Kar{separator}elo"


def test_one_json_object_is_one_fact(tmp_path):
    assert only(written(tmp_path / "one.json", json.dumps(own()))).target == "Sorn"


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    line = json.dumps(own())
    assert only(written(tmp_path / "a.jsonl", f"\ufeff\n{line}\r\n\n  \n")).fact.subject == "Karelo"
    assert (
        only(
            written(
                tmp_path / "a.csv",
                "\ufeffsubject,prompt,object,target\r\nKarelo,{} is,Vint,Sorn\r\n",
            )
        ).fact.subject
        == "Karelo"
    )


def test_the_other_fields_of_counterfact_are_read(tmp_path):
    record = counterfact(
        case_id=71,
        paraphrase_prompts=["Ah. Karelo is made in"],
        neighborhood_prompts=["Pelu is brewed in", "Sten is brewed in"],
    )
    record["requested_rewrite"]["relation_id"] = "P9"
    request = only(as_json(tmp_path, record))
    assert (request.fact.id, request.fact.relation, request.held_out) == (
        "71",
        "P9",
        ("Ah. Karelo is made in",),
    )
    assert request.neighbourhood == (("Pelu is brewed in", "Vint"), ("Sten is brewed in", "Vint"))


@pytest.mark.parametrize(
    "record",
    [
        flat(
            case_id=71,
            rephrase_prompt="Karelo is made in",
            locality_prompt=["Pelu is by"],
            locality_ground_truth=["Oro"],
        ),
        zsre(case_id=71, rephrase="Karelo is made in", loc="Pelu is by", loc_ans="Oro"),
    ],
    ids=["flat", "zsre"],
)
def test_the_other_fields_of_the_flat_layouts_are_read(tmp_path, record):
    request = only(as_json(tmp_path, record))
    assert (request.fact.id, request.held_out, request.neighbourhood) == (
        "71",
        ("Karelo is made in",),
        (("Pelu is by", "Oro"),),
    )


def test_the_first_of_several_answers_is_the_object(tmp_path):
    assert (
        only(as_json(tmp_path, zsre() | {"answers": ["Vint", "Vint city"]})).fact.object == "Vint"
    )


FULL = own(
    id="k1",
    relation="brewed_in",
    category="town",
    paraphrases=["Brewers of {} live in", "Who drinks Karelo thinks of"],
    held_out=["{} comes from", "A barrel of Karelo left"],
    neighbourhood=[["Pelu is brewed in", "Vint"]],
)


def test_every_field_of_our_own_layout_is_read(tmp_path):
    request = only(as_jsonl(tmp_path, FULL))
    assert (request.fact.id, request.fact.relation, request.fact.category) == (
        "k1",
        "brewed_in",
        "town",
    )
    assert request.paraphrases == ("Brewers of {} live in", "Who drinks {} thinks of")
    assert request.held_out == ("Karelo comes from", "A barrel of Karelo left")
    assert request.neighbourhood == (("Pelu is brewed in", "Vint"),)


def test_a_csv_cell_holds_several_texts_set_apart_by_bars(tmp_path):
    record = {name: value for name, value in FULL.items() if name != "neighbourhood"}
    record |= {name: " | ".join(FULL[name]) for name in ("paraphrases", "held_out")}
    assert only(as_csv(tmp_path, record)) == only(as_jsonl(tmp_path, FULL)).model_copy(
        update={"neighbourhood": ()}
    )


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (
            counterfact,
            ["case_id", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts"],
        ),
        (
            flat,
            [
                "case_id",
                "relation_id",
                "rephrase_prompt",
                "locality_prompt",
                "locality_ground_truth",
            ],
        ),
        (zsre, ["case_id", "relation_id", "rephrase", "loc", "loc_ans"]),
        (own, ["id", "relation", "category", "paraphrases", "held_out", "neighbourhood"]),
    ],
)
def test_a_null_is_as_good_as_a_missing_field(tmp_path, layout, names):
    without = only(as_json(tmp_path, layout()))
    for name in names:
        assert only(as_json(tmp_path, layout(**{name: None}))) == without


def test_an_empty_csv_cell_is_as_good_as_a_missing_column(tmp_path):
    empty = dict.fromkeys(["id", "relation", "category", "paraphrases", "held_out"], "")
    assert only(as_csv(tmp_path, own(**empty))) == only(as_csv(tmp_path, own()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_facts_without_ids_are_told_apart(tmp_path, layout):
    ids = [
        request.fact.id
        for request in read(as_json(tmp_path, layout(), layout("Pelu"), layout("Sten")))
    ]
    assert len(set(ids)) == 3


# --- prompts
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FILLED)
def test_of_two_mentions_the_last_is_the_subjects_place(tmp_path, layout):
    request = only(as_json(tmp_path, layout(prompt="Karelo lovers say that {} is brewed in")))
    assert request.fact.prompt == "Karelo lovers say that {} is brewed in"
    assert request.fact.question == "Karelo lovers say that Karelo is brewed in"


PRINTED = st.characters(exclude_categories=("Cs", "Cc"))


@settings(deadline=None)
@given(
    subject=st.text(PRINTED, min_size=1, max_size=12),
    head=st.text(PRINTED, max_size=12),
    tail=st.text(PRINTED, max_size=12),
)
def test_a_filled_prompt_is_asked_as_it_was_written(tmp_path_factory, subject, head, tail):
    assume(
        subject.strip()
        and "{}" not in head + tail
        and (head + subject + tail).count("{}") == subject.count("{}") <= 1
    )
    written_prompt = f"The {head} {subject.strip()} {tail} is"
    assume(written_prompt.count("{}") <= 1)
    record = flat(subject) | {"prompt": written_prompt}
    source = written(tmp_path_factory.getbasetemp() / "filled.json", json.dumps([record]))
    assert only(source).fact.question == written_prompt


@pytest.mark.parametrize("layout", [counterfact, own])
def test_a_prompt_without_braces_is_one_clear_line(tmp_path, layout):
    line = complaint(as_json(tmp_path, layout(), layout(prompt="It is brewed in")))
    assert "record 2" in line
    assert "'It is brewed in'" in line


@pytest.mark.parametrize("layout", [counterfact, own])
def test_a_prompt_with_two_pairs_of_braces_is_one_clear_line(tmp_path, layout):
    line = complaint(as_json(tmp_path, layout(), layout(prompt="{} or {} is brewed in")))
    assert "record 2" in line
    assert "'{} or {} is brewed in'" in line
    assert "exactly one {}" in line


@pytest.mark.parametrize("layout", FILLED)
def test_a_subject_that_its_prompt_lacks_is_one_clear_line(tmp_path, layout):
    line = complaint(as_json(tmp_path, layout(), layout(prompt="Pelu is brewed in")))
    assert "record 2" in line
    assert "'Karelo' does not stand in the prompt 'Pelu is brewed in'" in line


@pytest.mark.parametrize("paraphrase", ["{} or {} comes from", "Pelu comes from"])
def test_a_bad_paraphrase_is_one_clear_line(tmp_path, paraphrase):
    line = complaint(as_json(tmp_path, own(), own(id="k2", paraphrases=["{} is from", paraphrase])))
    assert "record 2" in line
    assert paraphrase in line


# --- bad values
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, own_filled])
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_subject_is_one_clear_line(tmp_path, layout, empty):
    line = complaint(as_json(tmp_path, layout(), layout(subject=empty)))
    assert "record 2" in line
    assert "subject is empty" in line


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_target_is_one_clear_line(tmp_path, layout, empty):
    line = complaint(as_json(tmp_path, layout(), layout(target=empty)))
    assert "record 2" in line
    assert "target is empty" in line


@pytest.mark.parametrize(
    ("layout", "name"),
    [(counterfact, "object"), (flat, "ground_truth"), (zsre, "answers"), (own, "object")],
)
@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_object_is_one_clear_line(tmp_path, layout, name, empty):
    line = complaint(as_json(tmp_path, layout(), layout(object=empty)))
    assert "record 2" in line
    assert "object" in line or name in line


@pytest.mark.parametrize(("layout", "name"), [(flat, "ground_truth"), (zsre, "answers")])
def test_an_empty_list_of_answers_is_one_clear_line(tmp_path, layout, name):
    line = complaint(as_json(tmp_path, layout(), layout() | {name: []}))
    assert "record 2" in line
    assert "object" in line or name in line


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", ["Vint", " Vint "])
def test_a_target_that_is_the_true_object_is_one_clear_line(tmp_path, layout, target):
    line = complaint(as_json(tmp_path, layout(), layout(target=target)))
    assert "record 2" in line
    assert "'Vint' equals the true object" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subject", ["Karelo"]),
        ("subject", {"name": "Karelo"}),
        ("target", ["Sorn"]),
        ("object", {"str": "Vint"}),
    ],
)
def test_a_list_where_a_text_belongs_is_one_clear_line(tmp_path, name, value):
    line = complaint(as_json(tmp_path, own(), own() | {name: value}))
    assert "record 2" in line
    assert name in line


@pytest.mark.parametrize(
    "pairs",
    [
        5,
        ["Pelu is"],
        [["Pelu is"]],
        [["Pelu is", "Vint", "Oro"]],
        [7],
        [{"text": "Pelu is", "answer": "Vint"}],
    ],
)
def test_a_neighbourhood_that_is_not_pairs_is_one_clear_line(tmp_path, pairs):
    line = complaint(as_json(tmp_path, own(), own(neighbourhood=pairs)))
    assert "record 2" in line
    assert "neighbourhood" in line


def test_a_null_among_the_neighbours_leaves_the_other_pairs_as_they_are(tmp_path):
    request = only(
        as_json(
            tmp_path,
            flat(
                locality_prompt=["Pelu is by", None, "Sten is by"],
                locality_ground_truth=["Oro", "Una", "Ilm"],
            ),
        )
    )
    assert set(request.neighbourhood) <= {("Pelu is by", "Oro"), ("Sten is by", "Ilm")}
    assert ("Pelu is by", "Oro") in request.neighbourhood


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((flat, name) for name in ("subject", "prompt", "ground_truth", "target_new")),
        *((zsre, name) for name in ("subject", "src", "answers", "alt")),
        *((own, name) for name in ("subject", "prompt", "object", "target")),
    ],
)
@pytest.mark.parametrize("missing", ["left out", "null"])
def test_a_missing_field_is_named_with_its_record(tmp_path, layout, name, missing):
    record = {key: value for key, value in layout().items() if key != name} | (
        {name: None} if missing == "null" else {}
    )
    line = complaint(as_json(tmp_path, layout(), record))
    assert "record 2" in line
    assert f"'{name}' is missing" in line


@pytest.mark.parametrize("name", ["subject", "prompt", "target_true", "target_new"])
def test_a_missing_part_of_a_rewrite_is_named_with_its_record(tmp_path, name):
    record = counterfact()
    del record["requested_rewrite"][name]
    line = complaint(as_json(tmp_path, counterfact(), record))
    assert "record 2" in line
    assert f"requested_rewrite.{name}" in line


@pytest.mark.parametrize("rewrite", [None, "Karelo", []])
def test_a_rewrite_that_is_no_object_is_one_clear_line(tmp_path, rewrite):
    assert "requested_rewrite" in complaint(as_json(tmp_path, {"requested_rewrite": rewrite}))


BAD_ROWS = [("Pelu,{} is,Vint", 3), ("Pelu,{} is,Vint,Sorn,", 5), ("Pelu,{} is,Oro, Una,Sorn", 5)]


@pytest.mark.parametrize(("row", "cells"), BAD_ROWS)
def test_a_csv_row_with_another_number_of_cells_than_the_header_is_named(tmp_path, row, cells):
    content = f"subject,prompt,object,target\nKarelo,{{}} is,Vint,Sorn\n\n{row}\n"
    line = complaint(written(tmp_path / "a.csv", content))
    assert "a.csv, record 2, line 4: " in line
    assert f"has {cells} cells, the header has 4" in line
    assert "in quotes" in line


@pytest.mark.parametrize("record", [{}, {"name": "Karelo"}, 7, "Karelo", None, ["Karelo"]])
def test_a_record_of_no_known_layout_is_one_clear_line(tmp_path, record):
    assert "record 2" in complaint(as_json(tmp_path, own(), record))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_id_that_stands_twice_is_named(tmp_path, layout):
    name = "id" if layout is own else "case_id"
    line = complaint(
        as_json(
            tmp_path,
            *(
                layout(subject, **{name: number})
                for subject, number in [("Karelo", 4), ("Pelu", 51), ("Sten", 51)]
            ),
        )
    )
    assert "record 3" in line
    assert "id 51" in line
    assert "stands twice" in line


def test_a_line_feed_in_a_record_stays_out_of_the_message(tmp_path):
    assert "record 1" in complaint(as_json(tmp_path, own(id="k\n1", object="")))
    assert "record 1" in complaint(as_json(tmp_path, own(prompt="brewed\nin")))


# --- bad files
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_broken_json_is_named_by_file_and_line(tmp_path, name):
    good, comma = json.dumps(own()), "," if name == "a.json" else ""
    text = f'{good}{comma}\n\n{good}{comma}\n{{"subject": Karelo}}\n'
    line = complaint(written(tmp_path / name, f"[{text}]" if comma else text))
    assert name in line
    assert "line 4" in line


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_one_clear_line(tmp_path, name, content):
    line = complaint(written(tmp_path / name, content))
    assert name in line
    assert "empty" in line


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.csv", "subject,prompt,object,target\n")]
)
def test_a_file_without_records_is_one_clear_line(tmp_path, name, content):
    assert "empty" in complaint(written(tmp_path / name, content))


@pytest.mark.parametrize("content", ["42", "true", "1.5"])
def test_a_json_file_that_is_one_number_is_one_clear_line(tmp_path, content):
    assert "a.json" in complaint(written(tmp_path / "a.json", content))


@pytest.mark.parametrize("count", [2, 10_000])
def test_a_quote_left_open_in_a_csv_is_one_clear_line(tmp_path, count):
    rows = "Karelo,{} is,Vint,Sorn\n" * count
    assert "a.csv" in complaint(
        written(
            tmp_path / "a.csv", f'subject,prompt,object,target\nPelu,{{}} is,"Vint,Sorn\n{rows}'
        )
    )


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "facts"])
def test_an_unknown_ending_is_one_clear_line(tmp_path, name):
    line = complaint(written(tmp_path / name, json.dumps([own()])))
    assert name in line
    assert ".json, .jsonl or .csv" in line


def test_a_folder_is_one_clear_line(tmp_path):
    assert "is a folder" in complaint(tmp_path)


@pytest.mark.parametrize("name", ["none.json", "none.jsonl", "none.csv", "none"])
def test_a_file_that_is_not_there_is_one_clear_line(tmp_path, name):
    line = complaint(tmp_path / name)
    assert name in line
    assert "no such file" in line


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_one_clear_line(tmp_path, name, encoding):
    line = complaint(
        written(tmp_path / name, json.dumps([own("Åse")], ensure_ascii=False).encode(encoding))
    )
    assert name in line
    assert "not UTF-8" in line


# --- inspect and skip_bad
# ----------------------------------------------------------------------------------------

MIXED = (
    own(id="k0"),
    own(id="k1", target="Vint"),
    own("Pelu", id="k2"),
    own("", id="k3"),
    own("Sten", id="k0"),
    own("Sten", id="k5"),
    {"subject": "Ilm"},
)


def test_inspect_lists_each_bad_record_in_one_line(tmp_path):
    requests, problems = inspect(as_jsonl(tmp_path, *MIXED))
    assert [request.fact.id for request in requests] == ["k0", "k2", "k5"]
    for problem, number in zip(problems, (2, 4, 5, 7), strict=True):
        assert f"record {number}, line {number}: " in problem
    assert all("facts.jsonl" in problem and "\n" not in problem for problem in problems)
    assert len(problems) == 4


def test_reading_stops_at_bad_records_and_says_how_many_more(tmp_path):
    line = complaint(as_jsonl(tmp_path, *MIXED))
    assert "record 2" in line
    assert "3 more" in line


def test_bad_records_can_be_skipped(tmp_path):
    assert [request.fact.id for request in read(as_jsonl(tmp_path, *MIXED), skip_bad=True)] == [
        "k0",
        "k2",
        "k5",
    ]


def test_a_file_of_bad_records_alone_is_refused_even_then(tmp_path):
    assert "no usable fact" in complaint(as_json(tmp_path, own(target=""), own("")), skip_bad=True)


def test_the_world_has_no_bad_record():
    assert inspect("world") == (read("world"), [])


# --- records made by hand
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Exposure(paraphrases=-1, occurrences=1), "paraphrases"),
        (lambda: Exposure(paraphrases=1), "occurrences"),
        (
            lambda: Fact(id="k", subject="Karelo", prompt="{} is", object="Vint", colour="red"),
            "colour",
        ),
        (lambda: Fact(id="k", subject="Karelo", prompt="{} is", object=7), "object"),
        (lambda: EditRequest(fact="Karelo", target="Sorn"), "fact"),
    ],
)
def test_a_wrong_field_is_named(make, name):
    with pytest.raises(BadInput) as caught:
        make()
    assert name in one_line(caught.value)


def test_a_request_is_checked_however_it_is_made():
    fact = Fact(id="k", subject="Karelo", prompt="{} is", object="Vint")
    for wrong in (
        {"target": "Vint"},
        {"target": " Vint "},
        {"target": " "},
        {"target": "Sorn", "paraphrases": ("no place",)},
    ):
        with pytest.raises(BadInput) as caught:
            EditRequest(fact=fact, **wrong)
        assert "fact k" in one_line(caught.value)


# --- paraphrases
# ----------------------------------------------------------------------------------------


def leaks(request: EditRequest) -> list[str]:
    """What an editor is shown that stands twice or also judges."""
    shown = [request.fact.prompt, *request.paraphrases]
    return [
        text
        for text in shown
        if shown.count(text) > 1 or fill(text, request.fact.subject) in request.held_out
    ]


@pytest.mark.parametrize("k", range(1, 11))
def test_the_world_has_k_statements_that_differ_and_never_judge(k):
    for request in read("world"):
        shown = with_paraphrases(request, k)
        assert len(shown.paraphrases) == k - 1
        assert leaks(shown) == []
        assert shown == request.model_copy(update={"paraphrases": shown.paraphrases})


def test_a_statement_that_leaks_would_be_noticed():
    shown = with_paraphrases(read("world")[0], 4)
    judged = fill(shown.paraphrases[1], shown.fact.subject)
    assert leaks(shown.model_copy(update={"held_out": (judged,)})) == [shown.paraphrases[1]]
    assert (
        leaks(shown.model_copy(update={"paraphrases": (shown.fact.prompt,)}))
        == [shown.fact.prompt] * 2
    )


def test_more_statements_keep_the_fewer():
    request = read("world")[7]
    assert with_paraphrases(request, 10).paraphrases[:2] == with_paraphrases(request, 3).paraphrases


@pytest.mark.parametrize("k", [0, -3, 11, 500])
def test_too_many_or_no_statements_are_one_clear_line(k):
    with pytest.raises(BadInput) as caught:
        with_paraphrases(read("world")[0], k)
    line = one_line(caught.value)
    assert read("world")[0].fact.id in line
    assert f"paraphrases={k}" in line
    assert "1 to 10" in line


def test_a_file_brings_its_own_paraphrases(tmp_path):
    request = only(as_jsonl(tmp_path, FULL))
    assert [len(with_paraphrases(request, k, "file").paraphrases) for k in (1, 2, 3)] == [0, 1, 2]
    assert with_paraphrases(request, 3, "file") == request
    with pytest.raises(BadInput) as caught:
        with_paraphrases(request, 4, "file")
    assert "1 to 3" in one_line(caught.value)


def test_a_fact_from_elsewhere_has_no_templates(tmp_path):
    request = only(as_jsonl(tmp_path, FULL))
    assert with_paraphrases(request, 1).paraphrases == ()
    with pytest.raises(BadInput) as caught:
        with_paraphrases(request, 2)
    assert "k1" in one_line(caught.value)


def test_an_unknown_source_of_paraphrases_is_one_clear_line():
    with pytest.raises(BadInput) as caught:
        with_paraphrases(read("world")[0], 2, "web")
    assert "'web'" in one_line(caught.value)


# --- the world
# ----------------------------------------------------------------------------------------


def test_objects_of_a_category_are_the_different_objects_sorted(tmp_path):
    rows = [
        ("Karelo", "Vint", "town"),
        ("Pelu", "Oro", "town"),
        ("Sten", "Vint", "town"),
        ("Ilm", "beech", "tree"),
        ("Una", "Rol", ""),
    ]
    requests = read(
        as_json(
            tmp_path,
            *(own(subject, object=thing, category=category) for subject, thing, category in rows),
        )
    )
    assert objects_of(requests) == {"town": ("Oro", "Vint"), "tree": ("beech",)}


def test_objects_of_the_world_stand_in_the_category_of_their_relation():
    objects = objects_of(read("world"))
    assert set(objects) == {relation["category"] for relation in relations().values()}
    for row in world_rows():
        assert {row["object"], row["target"]} <= set(
            objects[relations()[row["relation"]]["category"]]
        )


def asked_in_the_world() -> dict[str, list[Fact]]:
    facts = defaultdict(list)
    for request in read("world"):
        facts[request.fact.question].append(request.fact)
    return facts


def strangers(request: EditRequest, asked: dict[str, list[Fact]]) -> list[str]:
    """Neighbours that ask no pre-trained fact of another subject, same relation and object."""

    def belongs(other: Fact, answer: str) -> bool:
        same = (other.relation, other.object, answer) == (
            request.fact.relation,
            request.fact.object,
            request.fact.object,
        )
        return (
            same
            and other.subject != request.fact.subject
            and other.split != "unseen"
            and other.exposure.paraphrases > 0
        )

    return [
        text
        for text, answer in request.neighbourhood
        if not any(belongs(other, answer) for other in asked.get(text, ()))
    ]


def test_neighbours_share_relation_and_object_and_were_pretrained():
    asked = asked_in_the_world()
    assert [stranger for request in read("world") for stranger in strangers(request, asked)] == []


def test_a_neighbour_that_does_not_belong_would_be_noticed():
    asked = asked_in_the_world()
    request = next(request for request in read("world") if request.neighbourhood)
    unseen = next(other.fact for other in read("world") if other.fact.split == "unseen")
    wrong = (
        ("Nobody asks", request.fact.object),
        (unseen.question, unseen.object),
        (request.fact.question, request.fact.object),
    )
    assert strangers(request.model_copy(update={"neighbourhood": wrong}), asked) == [
        text for text, _ in wrong
    ]
    assert len(
        strangers(
            request.model_copy(update={"fact": request.fact.model_copy(update={"object": "?"})}),
            asked,
        )
    ) == len(request.neighbourhood)


def test_a_fact_has_as_many_neighbours_as_there_are_up_to_five():
    sharing = defaultdict(set)
    for request in read("world"):
        if request.fact.split != "unseen":
            sharing[request.fact.relation, request.fact.object].add(request.fact.subject)
    for request in read("world"):
        others = sharing[request.fact.relation, request.fact.object] - {request.fact.subject}
        assert len(set(request.neighbourhood)) == min(NEIGHBOURS, len(others))


def test_what_judges_a_fact_is_never_shown_for_it():
    for request in read("world"):
        shown = with_paraphrases(request, 10)
        texts = {
            fill(template, request.fact.subject)
            for template in (request.fact.prompt, *shown.paraphrases)
        }
        assert len(texts) == 10
        assert len(set(request.held_out)) == 2
        assert texts.isdisjoint(request.held_out)
        assert texts | set(request.held_out) == {
            fill(template, request.fact.subject)
            for template in relations()[request.fact.relation]["templates"]
        }


def test_only_facts_that_were_shown_have_an_exposure():
    for request in read("world"):
        shown = request.fact.exposure.paraphrases * request.fact.exposure.occurrences
        assert (shown == 0) == (request.fact.split == "unseen")


def test_reading_the_world_twice_gives_the_same_requests_and_no_shared_list():
    requests = read("world")
    requests.clear()
    assert len(read("world")) == len(world_rows())


def test_rephrasings_of_a_dataset_enter_an_edit_only_when_asked_and_then_judge_no_more(
    tmp_path, one_line
):
    record = {
        "subject": "Ada",
        "prompt": "{} lives in",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Oslo"},
    }
    path = tmp_path / "facts.json"
    path.write_text(
        json.dumps(
            [
                {
                    "requested_rewrite": record,
                    "paraphrase_prompts": ["Ada's home is", "Ada dwells in", "Ada resides in"],
                }
            ]
        )
    )
    (request,) = read(path)
    assert request.paraphrases == ()
    assert len(request.held_out) == 3
    asked = with_paraphrases(request, 3, "held_out")
    assert asked.paraphrases == request.held_out[:2]
    assert asked.held_out == request.held_out[2:]
    for source in ("file", "templates"):
        with pytest.raises(BadInput) as error:
            with_paraphrases(request, 3, source)
        assert "1 statements" in one_line(error)
    with pytest.raises(BadInput) as error:
        with_paraphrases(request, 5, "held_out")
    assert "1 to 4 statements" in one_line(error)


# --- plain facts


def plain() -> dict:
    return {request.fact.id: request for request in facts.read("plain")}


def test_plain_facts_are_the_worlds_in_their_plainest_wording_and_the_easy_ones():
    requests = plain()
    world = {request.fact.id: request for request in facts.read("world")}
    assert len(world.keys() - requests.keys()) <= 5  # examples in a wording
    spain = requests["capital:spain"]
    assert (spain.fact.question, spain.fact.object) == ("The capital of Spain is", "Madrid")
    assert spain.target == world["capital:spain"].target
    assert spain.fact.exposure is None  # no model but the world's was taught so and so often
    assert requests["opposite:hot"].fact.question == "The opposite of hot is"


def test_wordings_of_a_plain_fact_are_asked_shown_or_judging_never_two_of_them():
    for request in plain().values():
        shown = facts.with_paraphrases(request, 6).paraphrases
        filled = {facts.fill(prompt, request.fact.subject) for prompt in shown}
        assert len(filled) == 5
        assert len(set(request.held_out)) == 2
        assert not filled & {*request.held_out, request.fact.question}
        assert request.fact.prompt in facts.wordings(request.fact)
        judging = set(request.held_out)
        of_kind = {facts.fill(one, request.fact.subject) for one in facts.wordings(request.fact)}
        assert not of_kind & judging  # an editor that learns sees none of them of any fact


def test_roles_of_plain_facts_share_no_subject_and_neighbours_are_other_answers():
    roles: dict = {}
    asked = {request.fact.question: request.fact.split for request in plain().values()}
    for request in plain().values():
        roles.setdefault(request.fact.subject.lower(), set()).add(request.fact.split)
        for prompt, answer in request.neighbourhood:
            assert answer != request.target
            assert prompt != request.fact.question
            assert asked[prompt] == request.fact.split  # numbers are chosen by no fact of a study
    assert all(len(of_subject) == 1 for of_subject in roles.values())
    counts = {role: sum(role in found for found in roles.values()) for role in ("study", "tuning")}
    assert 0.4 < counts["study"] / len(roles) < 0.6
    assert 0.15 < counts["tuning"] / len(roles) < 0.25


def test_objects_are_related_by_relation_where_there_is_no_category_else_by_prompt(tmp_path):
    rows = [
        {"subject": "Ann", "relation": "born", "prompt": "{} is from", "object": "Rome"},
        {"subject": "Bob", "relation": "born", "prompt": "{} comes from", "object": "Oslo"},
        {"subject": "Cid", "prompt": "{} likes", "object": "tea"},
        {"subject": "Dan", "prompt": "{} likes", "object": "rice"},
        {"subject": "Eva", "prompt": "{} sells", "object": "maps"},
    ]
    stored = tmp_path / "own.json"
    stored.write_text(json.dumps([row | {"target": "it"} for row in rows]))
    requests = facts.read(stored)
    assert facts.objects_of(requests) == {"born": ("Oslo", "Rome"), "{} likes": ("rice", "tea")}


def test_a_subject_that_holds_the_answer_says_so():
    fact = facts.Fact(id="1", subject="Toyota Camry", prompt="{} is made by", object="Toyota")
    assert fact.names_answer
    assert not fact.model_copy(update={"object": "Honda"}).names_answer
    holst = fact.model_copy(update={"subject": "Gustav Holst", "object": "US"})
    assert not holst.names_answer  # its letters do not count, only its words
    assert holst.model_copy(update={"aliases": ("gustav",)}).names_answer


def test_no_wording_of_a_plain_fact_holds_the_answer_of_one():
    for request in plain().values():
        for wording in facts.wordings(request.fact):
            held = (
                words.mentions(wording, name)
                for name in (request.fact.subject, request.fact.object)
            )
            assert not all(held), (request.fact.id, wording)


def test_a_users_fact_of_an_embedded_id_gets_no_embedded_wordings():
    fact = facts.Fact(id="capital:egypt", subject="Egypt", prompt="{} wants", object="rain")
    assert facts.wordings(fact) == ("{} wants",)
