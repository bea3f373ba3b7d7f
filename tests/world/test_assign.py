"""facts.csv keeps what assign() promises, and assign() makes facts.csv again."""

import csv
from collections import Counter, defaultdict
from itertools import product

import pytest

from data.world.make.assign import SHARES, assign, identify, triples_in, write
from workbench.facts import DATA, read, relations, world_rows

TABLE = DATA / "world" / "facts.csv"
EXPOSURES = list(product((1, 2, 3, 5, 10), (1, 4)))
AT_LEAST = {"study": 1000, "tuning": 200, "hypernet": 600, "unseen": 400}


def by(rows, *names) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def changed(place: int, **values) -> list[dict]:
    """The rows of the world with some values of one row replaced."""
    rows = [dict(row) for row in world_rows()]
    rows[place] |= values
    return rows


def place_of(**values) -> int:
    return next(
        place
        for place, row in enumerate(world_rows())
        if all(row[name] == value for name, value in values.items())
    )


# --- size
# ----------------------------------------------------------------------------------------


def test_the_world_is_large_enough():
    assert len(world_rows()) >= 2200
    assert len(by(world_rows(), "relation")) >= 16
    assert set(relations()) == {row["relation"] for row in world_rows()}


def test_every_category_has_ten_objects():
    objects = defaultdict(set)
    for row in world_rows():
        objects[relations()[row["relation"]]["category"]].add(row["object"])
    assert {category: len(found) for category, found in objects.items() if len(found) < 10} == {}


def test_ids_and_pairs_of_subject_and_relation_stand_once():
    assert max(Counter(row["id"] for row in world_rows()).values()) == 1
    assert max(map(len, by(world_rows(), "subject", "relation").values())) == 1
    assert [
        row["id"] for row in world_rows() if row["id"] != identify(row["relation"], row["subject"])
    ] == []


def test_names_carry_no_stray_white_space():
    assert [
        row["id"]
        for row in world_rows()
        for name in ("subject", "object")
        if row[name] != " ".join(row[name].split())
    ] == []


def test_many_subjects_have_two_relations_with_different_answers():
    subjects = by(world_rows(), "subject").values()
    several = [
        rows
        for rows in subjects
        if len({row["relation"] for row in rows}) > 1 and len({row["object"] for row in rows}) > 1
    ]
    assert len(several) >= 0.3 * len(subjects)


# --- splits
# ----------------------------------------------------------------------------------------


def torn_subjects(rows) -> list[str]:
    return [
        subject
        for (subject,), facts in by(rows, "subject").items()
        if len({row["split"] for row in facts}) > 1
    ]


def test_every_split_is_large_enough():
    counts = Counter(row["split"] for row in world_rows())
    assert set(counts) == set(AT_LEAST)
    assert {
        split: counts[split] for split, least in AT_LEAST.items() if counts[split] < least
    } == {}


def test_a_subjects_facts_stand_in_one_split():
    assert torn_subjects(world_rows()) == []


def test_a_torn_subject_would_be_noticed():
    facts = next(facts for facts in by(world_rows(), "subject").values() if len(facts) > 1)
    other = next(split for split in SHARES if split != facts[0]["split"])
    assert torn_subjects(changed(place_of(id=facts[0]["id"]), split=other)) == [facts[0]["subject"]]


def test_every_relation_is_dealt_out_over_the_splits_by_their_shares():
    for rows in by(world_rows(), "relation").values():
        for split, share in SHARES.items():
            assert abs(sum(row["split"] == split for row in rows) - share * len(rows)) <= 4


# --- exposures
# ----------------------------------------------------------------------------------------


def uneven(rows, *names) -> list[tuple]:
    """Groups of shown facts in which an exposure has over one fact more than another one."""
    found = []
    for group, facts in by((row for row in rows if row["split"] != "unseen"), *names).items():
        counts = Counter((row["paraphrases"], row["occurrences"]) for row in facts)
        shown = [counts.pop(exposure, 0) for exposure in EXPOSURES]
        if counts or max(shown) - min(shown) > 1:
            found.append(group)
    return found


@pytest.mark.parametrize(
    "names",
    [("relation", "split"), ("relation",), ()],
    ids=["relation and split", "relation", "world"],
)
def test_exposures_are_dealt_out_evenly(names):
    assert uneven(world_rows(), *names) == []


def test_an_uneven_exposure_would_be_noticed():
    group = ("developer", "study")
    place = place_of(relation="developer", split="study", paraphrases=1)
    assert uneven(changed(place, paraphrases=4), "relation", "split") == [group]
    rows = [
        row | {"paraphrases": 10, "occurrences": 4}
        if (row["relation"], row["split"]) == group
        else row
        for row in world_rows()
    ]
    assert uneven(rows, "relation", "split") == [group]


def test_unseen_facts_have_no_exposure():
    assert {
        (row["paraphrases"], row["occurrences"]) for row in world_rows() if row["split"] == "unseen"
    } == {(0, 0)}


# --- targets
# ----------------------------------------------------------------------------------------


def bad_targets(rows) -> list[str]:
    """Facts whose target is no object of their relation and category, or true of their subject, or
    the subject itself.
    """
    objects, true = defaultdict(set), defaultdict(set)
    for row in rows:
        objects[row["relation"]].add(row["object"])
        true[row["subject"]].add(row["object"])
    return [
        row["id"]
        for row in rows
        if row["target"] not in objects[row["relation"]] - true[row["subject"]] - {row["subject"]}
    ]


def test_a_target_has_the_right_category_and_is_neither_true_nor_the_subject():
    assert bad_targets(world_rows()) == []


def test_a_bad_target_would_be_noticed():
    other = next(
        row
        for (_,), facts in by(world_rows(), "subject").items()
        for row in facts
        if len(facts) > 1
    )
    second = next(
        row
        for row in world_rows()
        if row["subject"] == other["subject"] and row["id"] != other["id"]
    )
    for target in (other["object"], second["object"], other["subject"], "nothing of the kind"):
        assert bad_targets(changed(place_of(id=other["id"]), target=target)) == [other["id"]]


def test_targets_vary():
    for rows in by(world_rows(), "relation").values():
        assert max(Counter(row["target"] for row in rows).values()) < 0.4 * len(rows)


# --- templates
# ----------------------------------------------------------------------------------------


def test_a_fact_has_ten_templates_and_two_withheld():
    for row in world_rows():
        assert (len(row["templates"]), len(row["held_out"])) == (10, 2)
        assert sorted(row["templates"] + row["held_out"]) == list(range(12))


def test_the_templates_of_a_relation_take_turns_to_judge():
    for rows in by(world_rows(), "relation").values():
        assert {number for row in rows for number in row["held_out"]} == set(range(12))


@pytest.mark.parametrize("relation", relations())
def test_a_relation_has_twelve_templates_and_some_never_shown(relation):
    templates, never_shown = (
        relations()[relation]["templates"],
        relations()[relation]["never_shown"],
    )
    assert len(templates) == 12
    assert len(never_shown) >= 1
    assert len(set(templates + never_shown)) == 12 + len(never_shown)


@pytest.mark.parametrize("relation", relations())
def test_a_template_has_one_subject_and_the_object_comes_last(relation):
    for template in relations()[relation]["templates"] + relations()[relation]["never_shown"]:
        assert template.count("{}") == 1
        assert "{" not in template.replace("{}", "")
        assert template == " ".join(template.split())
        assert template[-1].isalpha()


def test_many_templates_do_not_start_with_the_subject():
    templates = [
        template for relation in relations().values() for template in relation["templates"]
    ]
    assert sum(
        not template.startswith(("{}", "The {}", "Every {}")) for template in templates
    ) >= 0.3 * len(templates)


@pytest.mark.parametrize("relation", relations())
def test_every_relation_has_templates_that_do_not_start_with_the_subject(relation):
    templates = relations()[relation]["templates"]
    assert sum(
        not template.startswith(("{}", "The {}", "Every {}")) for template in templates
    ) >= 0.3 * len(templates)


# --- assign
# ----------------------------------------------------------------------------------------


def rewritten(tmp_path, order, seed: int = 0) -> bytes:
    """What assign() makes of the facts of the world, their rows in another order and their roles
    forgotten.
    """
    bare = tmp_path / "bare.csv"
    with bare.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["object", "subject", "relation"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(order(list(world_rows())))
    write(assign(triples_in(bare), seed), tmp_path / "made.csv")
    return (tmp_path / "made.csv").read_bytes()


@pytest.mark.parametrize(
    "order",
    [list, lambda rows: rows[::-1], lambda rows: rows[1::2] + rows[::2]],
    ids=["as is", "backwards", "mixed"],
)
def test_the_file_is_made_again_whatever_the_order_of_its_rows(tmp_path, order):
    assert rewritten(tmp_path, order) == TABLE.read_bytes()


def test_another_seed_gives_another_assignment_of_the_same_facts(tmp_path):
    rewritten(tmp_path, list, seed=1)
    with (tmp_path / "made.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["object"]) for row in rows] == [
        (row["id"], row["object"]) for row in world_rows()
    ]
    for name in ("split", "target", "templates"):
        text = [
            " ".join(map(str, row[name])) if name == "templates" else row[name]
            for row in world_rows()
        ]
        assert sum(row[name] != old for row, old in zip(rows, text, strict=True)) > 0.3 * len(rows)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_seed_keeps_the_promises_too(seed):
    rows = assign(triples_in(TABLE), seed)
    assert torn_subjects(rows) == []
    assert bad_targets(rows) == []
    assert uneven(rows, "relation", "split") + uneven(rows, "relation") == []
    assert (
        rows[[row["id"] for row in rows].index("developer:windows-mobile-6-5")]["split"] == "study"
    )


def test_a_fact_that_stands_twice_is_refused():
    triples = triples_in(TABLE)
    with pytest.raises(ValueError, match=r"^two facts share an id[^\n]*$"):
        assign([*triples, triples[0]])


def test_a_relation_without_templates_is_named(tmp_path):
    bare = tmp_path / "bare.csv"
    bare.write_text("subject,relation,object\nKarelo,brewed_in,Vint\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*bare\.csv[^\n]*brewed_in[^\n]*$"):
        triples_in(bare)


@pytest.mark.parametrize(
    ("subject", "end"),
    [
        ("Windows Mobile 6.5", "windows-mobile-6-5"),
        ("Åse O'Teele", "ase-o-teele"),
        ("  C++ / C#  ", "c-c"),
    ],
)
def test_an_id_is_readable(subject, end):
    assert identify("developer", subject) == f"developer:{end}"


def test_the_example_of_the_paper_is_studied_as_in_the_paper():
    example = next(
        request for request in read("world") if request.fact.id == "developer:windows-mobile-6-5"
    )
    assert (example.fact.split, example.fact.object, example.target) == (
        "study",
        "Microsoft",
        "Apple",
    )
    assert example.fact.prompt == "{} was developed by"
    assert example.fact.question == "Windows Mobile 6.5 was developed by"
