"""A facts file reads as it was written, or one line says where it does not and what to do."""

import json
import re
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests import fuzz_facts
from tests.layouts import (
    FILLED,
    LAYOUTS,
    PROMPT,
    as_csv,
    as_json,
    as_jsonl,
    counterfact,
    flat,
    knowedit,
    mquake,
    mzsre,
    own,
    own_filled,
    ripple,
    tracing,
    wikibigedit,
    written,
    zsre,
)
from workbench import facts, readers
from workbench.facts import BadInput, EditRequest
from workbench.readers import template

HEADER = "subject,prompt,object,target"
GOOD = "Karelo,{} is brewed in,Vint,Sorn"


def only(source: Path) -> EditRequest:
    (request,) = facts.read(source)
    return request


def complaint(source: Path, place: str) -> str:
    """The one line that refuses a file; it names the file and this place."""
    with pytest.raises(BadInput) as caught:
        facts.read(source)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert len(line) <= 300
    line.encode("utf-8")
    assert Path(source).name in line
    assert place in line
    return line


def as_text(folder: Path, *records: str) -> Path:
    """A JSON list of records that are written out by hand."""
    return written(folder / "facts.json", f"[{', '.join(records)}]")


def spelled(**fields: str) -> str:
    """A record of our own layout, these fields' values spelled in JSON."""
    values = {name: json.dumps(value) for name, value in own().items()} | fields
    return f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in values.items())}}}"


# --- CSV ------------------------------------------------------------------------------------------


def test_an_unquoted_comma_is_refused_not_cut(tmp_path):
    row = "Ann,{} lives in,York, England,Rome"
    path = written(tmp_path / "a.csv", f"{HEADER}\n{GOOD}\n{row}\n")
    line = complaint(path, "record 2, line 3: ")
    assert "has 5 cells, the header has 4; put a cell that holds a comma in quotes" in line
    quoted = row.replace("York, England", '"York, England"')
    assert only(written(tmp_path / "b.csv", f"{HEADER}\n{quoted}\n")).fact.object == "York, England"


def test_the_other_rows_of_a_csv_with_a_bad_row_are_read(tmp_path):
    rows = f"{GOOD}\nPelu,{{}} is,Vint\nSten,{{}} is,Oro,Una"
    path = written(tmp_path / "a.csv", f"{HEADER}\n{rows}\n")
    requests, problems = facts.inspect(path)
    assert [request.fact.subject for request in requests] == ["Karelo", "Sten"]
    assert len(problems) == 1


def test_the_line_of_a_csv_record_counts_the_breaks_within_cells(tmp_path):
    rows = '"Karelo","In a song:\n{} is from",Vint,Sorn\r\n\r\nPelu,{} is,Vint'
    path = written(tmp_path / "a.csv", f"{HEADER}\n{rows}")
    assert "has 3 cells" in complaint(path, "record 2, line 5: ")


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = written(tmp_path / "a.csv", f"{HEADER}, target\n{GOOD},Oro\n")
    assert "the column 'target' stands twice" in complaint(path, "a.csv")


def test_a_column_without_a_name_is_refused_if_it_holds_something(tmp_path):
    path = written(tmp_path / "a.csv", f"{HEADER},\n{GOOD},\nPelu,{{}} is,Vint,Sorn,Oro\n")
    assert "'Oro'; name it in the header" in complaint(path, "record 2")
    assert only(written(tmp_path / "b.csv", f"{HEADER},\n{GOOD},\n")).target == "Sorn"


@pytest.mark.parametrize("separator", [";", "\t"])
def test_cells_that_no_comma_sets_apart_are_refused(tmp_path, separator):
    path = written(tmp_path / "a.csv", f"{HEADER}\n{GOOD}\n".replace(",", separator))
    assert "set cells apart by commas" in complaint(path, "a.csv")


def test_spaces_after_the_commas_change_nothing(tmp_path):
    row = 'Karelo, "{} is brewed in", "Vint, old", Sorn'
    request = only(written(tmp_path / "a.csv", f"{HEADER.replace(',', ', ')}\n{row}\n"))
    assert (request.fact.prompt, request.fact.object) == ("{} is brewed in", "Vint, old")


def test_a_name_that_swallowed_a_line_is_refused(tmp_path):
    rows = 'Karelo,{} is,"Vint,Sorn\nPelu,{} is",Oro\n'
    line = complaint(written(tmp_path / "a.csv", f"{HEADER}\n{rows}"), "record 1, line 2: ")
    assert "'object' holds a line break" in line


def test_empty_rows_are_no_records(tmp_path):
    path = written(tmp_path / "a.csv", f"\n{HEADER}\n,,,\n{GOOD}\n , ,,\n")
    assert only(path).fact.id == "1"


@pytest.mark.parametrize("cell", ["['Vint', 'Sorn']", '["Vint"]', "[['Vint', 'Vinta'], ['Oro']]"])
def test_a_list_written_into_a_cell_is_refused(tmp_path, cell):
    path = as_csv(tmp_path, zsre() | {"answers": cell})
    assert "'answers' holds a list written as a text" in complaint(path, "record 1")
    assert only(as_csv(tmp_path, own(object="[REC]"))).fact.object == "[REC]"


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [as_json, as_jsonl])
@pytest.mark.parametrize("where", ["object", "answers", "pred"])
def test_a_key_that_stands_twice_is_refused(tmp_path, store, where):
    path = store(tmp_path, zsre(), zsre("Pelu") | {where: {"marked": 1}}, zsre("Sten"))
    twice = path.read_text(encoding="utf-8").replace('"marked": 1', '"once": "a", "once": "b"')
    line = complaint(written(path, twice), "record 2")
    assert "'once' stands twice" in line
    requests, _ = facts.inspect(path)
    assert [request.fact.subject for request in requests] == ["Karelo", "Sten"]


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["id", "object", "note"])
def test_numbers_that_json_lacks_are_refused(tmp_path, name, field):
    line = complaint(as_text(tmp_path, spelled(), spelled(**{field: name})), "record 2")
    assert f"{name} is no value of JSON" in line


@pytest.mark.parametrize("number", ["1945", "-3", "0", "1.50", "1e400", "12345678901234567890.10"])
def test_a_number_is_the_text_it_is_written_as(tmp_path, number):
    prompt = json.dumps(f"Of {number} it is said that")
    fields = {"id": number, "subject": number, "prompt": prompt, "paraphrases": f"[{prompt}]"}
    request = only(as_text(tmp_path, spelled(**fields, object=number)))
    assert (request.fact.id, request.fact.subject, request.fact.object) == (number,) * 3
    assert request.fact.prompt == request.paraphrases[0] == "Of {} it is said that"


OF_TEXT = {
    counterfact: "case_id paraphrase_prompts neighborhood_prompts",
    flat: "case_id relation_id subject prompt ground_truth target_new rephrase_prompt",
    zsre: "case_id subject src answers alt rephrase loc loc_ans",
    mquake: "case_id",
    knowedit: "case_id subject prompt target_new rephrase_prompt rephrase",
    tracing: "case_id relation_id subject prompt target_true target_false",
    wikibigedit: "case_id relation_id subject update ans rephrase personas loc loc_ans",
    own: "id relation category subject prompt object target paraphrases held_out neighbourhood",
}
FIELDS_OF_TEXT = [(layout, name) for layout, names in OF_TEXT.items() for name in names.split()]
FIELDS_OF_TEXT += [(flat, "locality_prompt"), (flat, "locality_ground_truth")]


@pytest.mark.parametrize("value", [True, False, {"str": "Vint"}, [["Vint"]], [True], [{}]])
@pytest.mark.parametrize(("layout", "field"), FIELDS_OF_TEXT)
def test_what_is_no_text_is_named_with_its_field(tmp_path, layout, field, value):
    line = complaint(as_json(tmp_path, layout(), layout() | {field: value}), "record 2")
    assert f"'{field}' must be a" in line


@pytest.mark.parametrize("part", ["prompt", "subject", "target_new", "target_true", "relation_id"])
@pytest.mark.parametrize("value", [True, ["Vint"]])
def test_what_is_no_text_in_a_rewrite_is_named_with_its_field(tmp_path, part, value):
    record = counterfact()
    record["requested_rewrite"][part] = {"str": value} if part.startswith("target") else value
    line = complaint(as_json(tmp_path, counterfact(), record), "record 2")
    assert f"'requested_rewrite.{part}" in line
    assert "must be a text" in line


@pytest.mark.parametrize("ids", [(4, "4"), ("a", " a"), (2, None)])
def test_ids_that_read_the_same_are_refused(tmp_path, ids):
    records = [own(subject, id=number) for subject, number in zip(("Ann", "Bo"), ids, strict=True)]
    assert "stands twice" in complaint(as_json(tmp_path, *records), "record 2")


@pytest.mark.parametrize("store", [as_json, as_jsonl])
@pytest.mark.parametrize("depth", [5_000, 200_000])
def test_deep_nesting_is_one_line(tmp_path, store, depth):
    path = store(tmp_path, own(), own("Pelu", note="deep"))
    deep = "[" * depth + "]" * depth
    written(path, path.read_text(encoding="utf-8").replace('"deep"', deep))
    assert "nested too deeply" in complaint(path, "record")


@pytest.mark.parametrize("field", ["id", "subject", "prompt", "object", "target", "held_out"])
@pytest.mark.parametrize("damage", ["\\ud800", "\\udc00\\ud800", "\\u0000", "\\u001b", "\\u0092"])
def test_what_is_no_text_within_a_text_is_one_line(tmp_path, field, damage):
    value = json.dumps("Karelo is ").replace(" is", f" is{damage}")
    line = complaint(as_text(tmp_path, spelled(), spelled(**{field: value})), "record 2")
    assert f"'{field}' holds '\\" in line


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    assert only(as_text(tmp_path, spelled(object='"\\ud83d\\ude00"'))).fact.object == "😀"


def test_damage_in_a_field_that_no_one_reads_is_harmless(tmp_path):
    record = own() | {"no\ud800te": "\x00"}
    with pytest.warns(UserWarning, match=r"'no\\+ud800te'"):
        assert only(written(tmp_path / "a.json", json.dumps(record))).target == "Sorn"


def test_records_are_counted_from_one(tmp_path):
    bad = own("", id="x")
    for number in (1, 3):
        records = [own(id=n) for n in range(1, number)] + [bad]
        complaint(as_json(tmp_path, *records), f"record {number}: ")
        complaint(as_jsonl(tmp_path, *records), f"record {number}, line {number}: ")
        complaint(as_csv(tmp_path, *records), f"record {number}, line {number + 1}: ")


def test_a_record_without_an_id_has_its_number_for_one(tmp_path):
    requests = facts.read(as_json(tmp_path, own(), own("Pelu", id="seven"), own("Sten", id="")))
    assert [request.fact.id for request in requests] == ["1", "seven", "3"]


@pytest.mark.parametrize("indent", ["\t", 2, None])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_is_json_however_it_is_indented(tmp_path, indent, end):
    text = json.dumps([flat(), flat("Pelu")], indent=indent).replace("\n", end)
    requests = facts.read(written(tmp_path / "a.json", f"{end}{text}{end}"))
    assert [request.fact.subject for request in requests] == ["Karelo", "Pelu"]


@pytest.mark.parametrize(
    "text",
    [
        "[{}, ]",
        "[{} {}]",
        "[{}, {}",
        "[{}",
        "[",
        "[{}]]",
        "{} {}",
        "{}\n{}",
        "[,{}]",
        "[{}, {'a': 1}]",
    ],
)
def test_a_broken_list_is_broken_json(tmp_path, text):
    text = text.replace("{}", spelled())
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    place = f"broken JSON at line {caught.value.lineno}, column {caught.value.colno}: "
    complaint(written(tmp_path / "a.json", text), place)


def test_a_broken_line_leaves_the_other_lines_as_they_are(tmp_path):
    lines = [spelled(), spelled()[:-1], f"{spelled()} {spelled()}", spelled()]
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    requests, problems = facts.inspect(path)
    assert [request.fact.id for request in requests] == ["1", "4"]
    assert ["record 2, line 2: broken JSON" in problems[0], "record 3" in problems[1]] == [True] * 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_told_so(tmp_path, name, encoding):
    text = f"{HEADER}\n{GOOD}\n" if name == "a.csv" else spelled()
    line = complaint(written(tmp_path / name, text.encode(encoding)), name)
    assert "UTF-16; save the file as UTF-8" in line


def test_a_file_that_cannot_be_opened_is_one_line():
    expected = r"^\.\.\.a{92}\.json: cannot be read \(File name too long\); check its name"
    with pytest.raises(BadInput, match=expected):
        facts.read("a" * 5000 + ".json")


def test_a_long_path_leaves_room_for_what_is_wrong(tmp_path):
    folder = tmp_path / ("deep" * 50) / ("deeper" * 30)
    folder.mkdir(parents=True)
    line = complaint(as_json(folder, own(), own(object="x" * 400, target="x" * 400)), "record 2")
    assert line.endswith("choose another target")


# --- lists that belong together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "answers"),
    [
        (["Pelu is by", "Sten is by"], ["Oro"]),
        (["Pelu is by"], ["Oro", "Ilm"]),
        (["Pelu is by", "Sten is by"], "Oro"),
        (["Pelu is by", "Sten is by"], None),
        ([], ["Oro"]),
        ([None, "Sten is by"], ["Ilm"]),
    ],
)
def test_texts_and_answers_of_unequal_number_are_refused(tmp_path, texts, answers):
    for record, names in [
        (flat(locality_prompt=texts, locality_ground_truth=answers), "'locality_prompt' holds"),
        (zsre(loc=texts, loc_ans=answers), "'loc' holds"),
    ]:
        assert names in complaint(as_json(tmp_path, flat(), record), "record 2")


@pytest.mark.parametrize(
    ("texts", "answers", "pairs"),
    [
        (["Pelu is by", None, ""], ["Oro", "Una", "Ilm"], (("Pelu is by", "Oro"),)),
        (["Pelu is by", "Sten is by"], [None, "Ilm"], (("Sten is by", "Ilm"),)),
        ("Pelu is by", None, ()),
        ("Pelu is by", ["Oro"], (("Pelu is by", "Oro"),)),
        ([], None, ()),
        ([], "", ()),
        ([0], [1945], (("0", "1945"),)),
    ],
)
def test_a_pair_counts_if_neither_part_is_empty(tmp_path, texts, answers, pairs):
    record = flat(locality_prompt=texts, locality_ground_truth=answers)
    assert only(as_json(tmp_path, record)).neighbourhood == pairs


@pytest.mark.parametrize("pair", [[None, "Oro"], ["Pelu is by", None], ["", "Oro"], ["Pelu", " "]])
def test_a_neighbour_of_our_own_layout_without_an_answer_is_refused(tmp_path, pair):
    record = own(neighbourhood=[["Sten is by", 7], pair])
    line = complaint(as_json(tmp_path, own(), record), "record 2")
    assert "'neighbourhood' must be" in line
    request = only(as_json(tmp_path, own(neighbourhood=[["Sten is by", 7]])))
    assert request.neighbourhood == (("Sten is by", "7"),)


# --- the subject in its prompt --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("Ann, the sister of Annabel, works as a", "Ann", "{}, the sister of Annabel, works as a"),
        ("Joann says that Ann met Joann in", "Ann", "Joann says that {} met Joann in"),
        ("Ann, sister of Ann-Marie, works as a", "Ann", "{}, sister of Ann-Marie, works as a"),
        ("Ann-Marie works as a", "Ann", "{}-Marie works as a"),
        ("The U.S. and the U.S.A. are in", "U.S.", "The {} and the U.S.A. are in"),
        ("Ann told Ann's friend", "Ann", "Ann told {}'s friend"),
        ("Ann_1 and Ann and Ann2", "Ann", "Ann_1 and {} and Ann2"),
        ("(Ann)", "Ann", "({})"),
        ("aaa aa aaa", "aa", "aaa {} aaa"),
        ("Ёлка и Ёлкам", "Ёлка", "{} и Ёлкам"),
        ("東京は東京タワーの", "東京", "東京は{}タワーの"),
        ("ソウルの서울은", "서울", "ソウルの{}은"),
        ("เมืองหลวงของไทยคือ", "ไทย", "เมืองหลวงของ{}คือ"),
        ("新しいSonyの", "Sony", "新しい{}の"),
        ("😀😀 lives in", "😀", "😀{} lives in"),
    ],
)
def test_the_subject_is_found_as_a_word(text, subject, expected):
    assert template(text, subject) == expected


@pytest.mark.parametrize("layout", FILLED)
@pytest.mark.parametrize("longer", ["Karelos", "OldKarelo", "Karelo2", "Karelo\u0300", "_Karelo"])
def test_a_subject_within_a_longer_word_alone_is_refused(tmp_path, layout, longer):
    record = layout() | {FILLED[layout]: f"{longer} is brewed in"}
    line = complaint(as_json(tmp_path, layout(), record), "record 2")
    assert "only within a longer word" in line


@pytest.mark.parametrize("layout", FILLED)
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_two_unicode_forms_of_a_name_are_told_so(tmp_path, layout, forms):
    subject, mention = (unicodedata.normalize(form, "Åse Ødegård") for form in forms)
    record = layout(subject) | {FILLED[layout]: f"{mention} lives in"}
    line = complaint(as_json(tmp_path, layout(), record), "record 2")
    assert "differ only in Unicode form; normalise the file to NFC" in line
    mixed = layout(subject) | {FILLED[layout]: f"{subject} says that {mention} lives in"}
    assert "Unicode form" in complaint(as_json(tmp_path, layout(), mixed), "record 2")


@pytest.mark.parametrize("layout", FILLED)
def test_a_subject_that_is_empty_is_said_to_be_so(tmp_path, layout):
    record = layout(subject="", prompt="Brewed{}in")
    line = complaint(as_json(tmp_path, layout(), record), "record 2")
    assert "the subject is empty" in line


@pytest.mark.parametrize("prompt", ["A barrel of a{}b is in", "A barrel of {} is in"])
def test_braces_of_the_subject_are_no_place_for_it(tmp_path, prompt):
    request = only(as_json(tmp_path, own("a{}b", prompt, paraphrases=prompt, held_out=prompt)))
    assert request.fact.prompt == request.paraphrases[0] == "A barrel of {} is in"
    assert request.held_out == ("A barrel of a{}b is in",)


# --- fields that no one reads ---------------------------------------------------------------------


def test_fields_of_no_use_are_named_once_a_file(tmp_path):
    records = [own(colour="red", target_="Oro"), own("Pelu", colour="blue", note=None)]
    with pytest.warns(UserWarning, match="ignored") as caught:
        assert len(facts.read(as_json(tmp_path, *records))) == 2
    (line,) = [str(warning.message) for warning in caught]
    assert line.endswith("facts.json: fields that no one reads, ignored: 'colour', 'target_'")


def test_of_many_fields_of_no_use_a_handful_is_named(tmp_path):
    more = {f"{'x' * 400}{number}": 1 for number in range(4)} | {f"f\n{n}": 1 for n in range(5)}
    with pytest.warns(UserWarning, match=r" \.\.\.$") as caught:
        facts.read(as_json(tmp_path, own(**more)))
    line = str(caught[0].message)
    assert len(line.splitlines()) == 1
    assert len(line) <= 300


UNUSED = {
    counterfact: ["case_id", "pararel_idx", "attribute_prompts", "generation_prompts"],
    flat: ["case_id", "relation_id"],
    zsre: ["case_id", "pred", "cond", "portability"],
    mquake: ["case_id", "answer", "answer_alias", "new_answer_alias", "orig"],
    knowedit: ["case_id", "cond"],
    mzsre: ["case_id"],
    tracing: ["relation", "relation_id", "relation_prefix", "relation_suffix"],
    wikibigedit: ["tag", "subject_id", "relation", "object_id", "mhop", "mhop_ans"],
    own: ["id", "relation", "category"],
}


@pytest.mark.parametrize("layout", [*LAYOUTS, wikibigedit])
def test_the_fields_of_a_public_layout_are_not_named(tmp_path, layout):
    record = layout(**dict.fromkeys(UNUSED[layout], "7"))
    if layout is counterfact:
        record["requested_rewrite"] |= {"question": "", "target_true": {"str": "Vint", "id": "Q1"}}
    with warnings.catch_warnings(action="error"):
        facts.read(as_json(tmp_path, record))


# --- layouts of one shape each --------------------------------------------------------------------


def test_lists_of_lists_of_names_are_the_object_and_its_aliases(tmp_path):
    request = only(as_json(tmp_path, knowedit(rephrase_prompt="Karelo is by", rephrase=["By"])))
    assert (request.fact.object, request.fact.aliases) == ("Vint", ("Vinta", "Vinto"))
    assert request.held_out == ("Karelo is by", "By")
    assert not request.fact.object_from_model


ANSWERS = ["Oro", ["Oro", "Orro"], [["Oro", "Orro"], ["Una"]], [[], ["Oro"]]]


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_kind_of_locality_is_neighbourhood(tmp_path, answer):
    near = [{"prompt": ["Sten is by"], "ground_truth": answer}]
    near += [{"prompt": "Ilm", "ground_truth": []}]
    kinds = {"Relation_Specificity": near, "For.get": near[:1], "None": None}
    request = only(as_json(tmp_path, knowedit(locality=kinds)))
    assert request.neighbourhood == (("Sten is by", "Oro"), ("Sten is by", "Oro"))


@pytest.mark.parametrize(
    ("locality", "named"),
    [
        ([], "'locality' must be an object"),
        ({"Forgetfulness": {"prompt": "Ilm"}}, "'Forgetfulness' must be a list of objects"),
        ({"Forgetfulness": ["Ilm"]}, "'Forgetfulness' must be a list of objects"),
        ({"Forgetfulness": [{"prompt": ["a", "b"], "ground_truth": "c"}]}, "several prompts"),
        ({"Forgetfulness": [{"prompt": "a", "ground_truth": [[["c"]]]}]}, "must be a text"),
    ],
)
def test_a_locality_of_another_shape_is_refused(tmp_path, locality, named):
    assert named in complaint(as_json(tmp_path, knowedit(locality=locality)), "record 1")


@pytest.mark.parametrize("empty", ["", [], [[]], [""]])
def test_an_answer_that_is_empty_is_no_answer_left_out(tmp_path, empty):
    line = complaint(as_json(tmp_path, knowedit(ground_truth=empty)), "record 1")
    assert "'ground_truth' is empty" in line


@pytest.mark.parametrize("record", [knowedit(ground_truth=None), wikibigedit()])
def test_a_source_without_the_true_object_is_read_and_marked(tmp_path, record):
    fact = only(as_json(tmp_path, record)).fact
    assert (fact.object, fact.object_from_model) == ("", True)


@pytest.mark.parametrize("layout", [flat, zsre, own, counterfact, tracing])
def test_other_layouts_must_say_the_true_object(tmp_path, layout):
    line = complaint(as_json(tmp_path, layout(object=" ")), "record 1")
    assert "is empty" in line


def test_the_fields_of_wikibigedit_are_read(tmp_path):
    more = {"relation_id": "P9", "rephrase": "Who brews?", "personas": "Yo, who?", "tag": "new"}
    record = wikibigedit(**more, loc="Pelu is by", loc_ans="Oro")
    request = only(as_json(tmp_path, record))
    assert (request.fact.prompt, request.fact.relation) == (PROMPT, "P9")
    assert (request.target, request.held_out) == ("Sorn", ("Who brews?", "Yo, who?"))
    assert request.neighbourhood == (("Pelu is by", "Oro"),)


def test_each_rewrite_of_a_case_is_a_request(tmp_path):
    case = mquake(case_id=7)
    other = counterfact("Pelu", "{} is of", "Una", "Oro")["requested_rewrite"]
    case["requested_rewrite"].append(other | {"question": "Of what is Pelu?"})
    first, second = facts.read(as_json(tmp_path, case))
    assert (first.fact.id, first.fact.object, first.fact.aliases) == ("7-0", "Vint", ("Vinta",))
    assert (second.fact.id, second.fact.subject, second.target) == ("7-1", "Pelu", "Oro")
    assert (second.fact.aliases, second.held_out) == (("Uno",), ("Of what is Pelu?",))


def test_a_bad_rewrite_is_named_and_the_others_are_read(tmp_path):
    case = mquake()
    case["requested_rewrite"].append({"subject": "Pelu"})
    requests, problems = facts.inspect(as_json(tmp_path, own(), case))
    assert [request.fact.id for request in requests] == ["1", "2-0"]
    assert "record 2, edit 1: the field 'requested_rewrite.target_true.str' is" in problems[0]
    assert len(problems) == 1


def test_each_language_is_a_request(tmp_path):
    german = zsre("Karelo", "Wo braut man {}?", "Vinte", "Sorne", colour="red")
    with pytest.warns(UserWarning, match="ignored: 'colour'"):
        first, second = facts.read(as_json(tmp_path, mzsre(de=german)))
    assert [first.fact.id, second.fact.id] == ["1-en", "1-de"]
    assert [first.target, second.target] == ["Sorn", "Sorne"]
    assert second.fact.prompt == "Wo braut man {}?"


RIPPLES = [
    ("NATIVE_LANGUAGE", "The mother tongue of {} is"),
    ("MOTHER", "The name of the mother of {} is"),
    ("SIBLING", "The names of the siblings of {} are"),
    ("COUNTRY", "The name of the country which {} is associated with is"),
    ("AWARD_RECEIVED", "The name of the award {} won is"),
]


@pytest.mark.parametrize(("relation", "question"), RIPPLES)
@pytest.mark.parametrize("subject", ["Karelo", "Isle of Man", "The Who"])
def test_the_statement_of_a_ripple_edit_is_taken_apart(tmp_path, relation, question, subject):
    record = ripple(subject, question, "Vint", "Washington, D.C.")
    record["edit"]["relation"] = relation
    request = only(as_json(tmp_path, record))
    assert (request.fact.subject, request.fact.prompt) == (subject, question)
    assert (request.fact.object, request.target) == ("Vint", "Washington, D.C.")
    assert request.neighbourhood == (("The eye color of Karelo is", "red"),)


def test_a_recent_ripple_edit_has_no_true_object(tmp_path):
    record = ripple()
    del record["edit"]["original_fact"]
    fact = only(as_json(tmp_path, record)).fact
    assert (fact.subject, fact.object, fact.object_from_model) == ("Karelo", "", True)


def test_what_was_true_before_settles_where_the_question_ends(tmp_path):
    record = ripple(target="what is spoken")
    assert only(as_json(tmp_path, record)).target == "what is spoken"
    del record["edit"]["original_fact"]
    assert "cannot be told" in complaint(as_json(tmp_path, record), "record 1")


STRANGE = ["Who is {}, that is", "{} is followed by", "The mother of {} is"]


@pytest.mark.parametrize("question", STRANGE)
def test_a_statement_that_can_not_be_taken_apart_is_refused(tmp_path, question):
    line = complaint(as_json(tmp_path, ripple(question=question)), "record 1")
    assert "cannot be told" in line
    assert line.endswith("write the record with subject, prompt, object and target")


@pytest.mark.parametrize(
    "record",
    [
        zsre(target="Vinta", answers=["Vint", "Vinta"]),
        flat(target="Vinta", ground_truth=["Vint", "Vinta"]),
        knowedit(target="Vinto"),
        mquake(target="Vinta"),
        own(target="Vinta", aliases=["Vinta"]),
    ],
)
def test_a_target_that_is_another_name_of_the_object_is_refused(tmp_path, record):
    assert "equals the true object" in complaint(as_json(tmp_path, record), "record 1")


def test_the_aliases_of_a_cell_are_set_apart_by_bars(tmp_path):
    request = only(as_csv(tmp_path, own(aliases="Vinta | Vinto")))
    assert request.fact.aliases == ("Vinta", "Vinto")


# --- the Hub --------------------------------------------------------------------------------------


def test_records_of_a_hub_dataset_are_read_as_those_of_a_file(monkeypatch):
    import datasets

    rows = [
        own(id=7, object=1945, paraphrases=["In a song {} is", None]),
        own(id=8, object=float("nan")),
        own(id=9, object=b"Vint"),
        own_filled(id=10, object=0.5),
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    requests, problems = facts.inspect("someone/facts")
    objects = {request.fact.id: request.fact.object for request in requests}
    assert objects == {"7": "1945", "10": "0.5"}
    assert requests[0].paraphrases == ("In a song {} is",)
    assert ["someone/facts, record 2: " in problems[0], "record 3: " in problems[1]] == [True, True]
    assert all("'object' must be a text" in problem for problem in problems)


# --- damage ---------------------------------------------------------------------------------------


def assert_nothing_is_read_wrong(count: int) -> None:
    outcomes, wrong = fuzz_facts.fuzz(count, seed=0)
    assert wrong == []
    totals = sum(outcomes.values(), Counter())
    assert sum(totals.values()) == count
    assert all(totals[name] > count / 10 for name in ("all read", "some read", "file refused"))


def test_damaged_files_are_refused_or_read_as_they_stand():
    assert_nothing_is_read_wrong(1_500)


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_read_as_they_stand():
    assert_nothing_is_read_wrong(40_000)


def _last_mention(text: str, subject: str) -> str:
    start = text.rfind(subject)
    return f"{text[:start]}{{}}{text[start + len(subject) :]}"


def _loosely_paired(record: dict, prompts: str, answers: str) -> list:
    return list(zip(record.get(prompts) or [], record.get(answers) or [], strict=False))


def _loose_row(header: list[str], row: list[str]) -> dict:
    return dict(zip(header, row, strict=False))


LOOSE = {
    "cells": (readers, "_csv_record", _loose_row),
    "keys": (readers, "_members", dict),
    "constants": (readers, "_constant", lambda name: 0),
    "lists": (readers, "_paired", _loosely_paired),
    "words": (readers, "template", _last_mention),
    "characters": (readers, "_NO_TEXT", re.compile("(?!)")),
    "texts": (readers, "_text", lambda value, name: str(value).strip()),
    "line breaks": (readers, "_one_line_name", lambda text, name: text),
    "unknown fields": (readers, "warn_of_ignored", lambda source, read: None),
    "counting": (facts, "enumerate", lambda members, start: enumerate(members)),
    "messages": (facts, "one_line", str),
}


@pytest.mark.parametrize("rule", LOOSE)
def test_a_reader_without_one_of_its_rules_is_caught(monkeypatch, rule):
    module, name, replacement = LOOSE[rule]
    monkeypatch.setattr(module, name, replacement, raising=False)
    _, wrong = fuzz_facts.fuzz(400, seed=1)
    assert wrong


FOLLOWING = [
    (
        knowedit(
            portability={
                "Logical Generalization": [
                    {"prompt": "Of Karelo's kin", "ground_truth": [["Sorno", "S."]]},
                    {"prompt": "", "ground_truth": []},
                ]
            }
        ),
        (("Logical Generalization", "Of Karelo's kin", "Sorno"),),
    ),
    (
        flat(portability_prompt="Those who read Karelo read", portability_ground_truth="Sorno"),
        (("portability", "Those who read Karelo read", "Sorno"),),
    ),
    (wikibigedit(mhop="Whose?", mhop_ans="Una"), (("mhop", "Whose?", "Una"),)),
    (mquake(new_answer="Una"), (("hops", "Whose?", "Una"),)),
    (mquake(), ()),  # nobody says what the answer becomes
    (
        mquake(new_answer="Una") | {"requested_rewrite": 2 * mquake()["requested_rewrite"]},
        (),  # what two edits bring about follows from neither alone
    ),
    (
        ripple() | {"Compositionality_I": ripple()["Relation_Specificity"]},
        (("Compositionality_I", "The eye color of Karelo is", "red"),),
    ),
]


@pytest.mark.parametrize(("record", "follows"), FOLLOWING)
def test_what_should_follow_from_an_edit_is_read_with_its_kind(tmp_path, record, follows):
    for request in facts.read(as_json(tmp_path, record)):
        assert request.portability == follows


@pytest.mark.parametrize("value", [7, [], {"kind": 7}, {"kind": [{"prompt": ["a", "b"]}]}])
def test_what_should_follow_is_refused_where_it_is_in_no_form(tmp_path, value, one_line):
    with pytest.raises(BadInput) as error:
        facts.read(as_json(tmp_path, knowedit(portability=value)))
    assert "portability" in one_line(error) or "kind" in one_line(error)
