import warnings

import pytest
import torch

from tests.editors import edited
from workbench import closed_form, deltas, editing, facts, models
from workbench.editing import memit, records, rome
from workbench.editing.records import NotTaken

MISSED = {"took": False, "p_after": 0.01}


@pytest.mark.parametrize(
    ("editor", "numbers", "outcomes", "told"),
    [
        ("memit", {}, [{"p_solved": 0.0}], "where not solved raise steps"),
        (
            "memit",
            {},
            [{"p_solved": 0.9}, {"p_solved": 0.1}],
            "lower weight (now 15000), where not solved raise steps",
        ),
        (
            "alphaedit",
            {"null_space": "rank", "threshold": 200},
            [{"p_solved": 0.9}],
            "protect less by threshold (now 200, rank)",
        ),
        ("alphaedit", {"ridge_unit": "trace"}, [{"p_solved": 0.9}], "lower ridge (now 10, trace)"),
        ("ft", {}, [{"p_solved": None}], "raise steps (now 25)"),
        ("rome", {"layers": (1,)}, [{"p_solved": 0.9}], "change bare_share (now None)"),
    ],
)
def test_the_number_to_change_is_the_one_that_helps(editor, numbers, outcomes, told):
    hparams = editing.EDITORS[editor].HParams(**({"layers": (1,)} | numbers))
    listed = [MISSED | {"fact": "evil\x1b[31m\nid " + "x" * 300} | outcome for outcome in outcomes]
    record = {"editor": editor, "hparams": hparams.model_dump(mode="json"), "outcomes": listed}
    change = deltas.Change(dense=torch.zeros(2, 2))
    by_hand, made = (
        deltas.WeightDelta(
            changes={"h.1.mlp": change}, model="m", revision="", fingerprint="f", record=about
        )
        for about in ({}, record)
    )
    with pytest.warns(NotTaken) as said:
        records.warn_of_missed([by_hand, made])
    line = str(said[0].message)
    assert told in line
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 400


def test_what_was_solved_and_did_not_take_is_said_with_the_number_to_change():
    """MEMIT with a weight that no request outweighs changed nothing, without a word."""
    world = models.load("world-gpt2", "cpu")
    known = [request for request in facts.read("world") if request.fact.split == "tuning"][:2]
    hparams = editing.preset("memit", world)
    resources = memit.prepare(world, hparams)
    heavy = hparams.model_copy(update={"weight": 1e7})
    with pytest.warns(
        NotTaken, match=r"memit: 0 of 2 edits took, .*solved to p 0\.9.*lower weight \(now 1e\+07\)"
    ) as said:
        missed = editing.edit_each("memit", world, [known[:1], known[1:]], heavy, resources)
    assert (
        len([one for one in said if one.category is NotTaken]) == 1
    )  # of all batches, not of each
    outcomes = [outcome for edit in missed for outcome in edit.outcomes]
    assert all(outcome["p_solved"] > 0.9 > outcome["p_after"] for outcome in outcomes)
    with warnings.catch_warnings(action="error", category=NotTaken):
        taken = editing.edit_in_turn("memit", world, [known[:1], known[1:]], hparams, resources)
    assert [outcome["took"] for outcome in taken.outcomes] == [True, True]


@pytest.mark.parametrize("editor", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("prompt", ["", "{} hails from"])
def test_one_subject_edited_twice_at_once_is_one_clear_line(
    tiny, editor, prompt, requests, one_line
):
    """Conflicting targets, or two facts that begin alike: one key, two values.

    MEMIT and AlphaEdit said nothing.
    """
    start, _, rest = requests[0].fact.prompt.partition("{}")
    named = requests[0].fact.model_copy(
        update={"id": "again", "prompt": start + (prompt or "{}" + rest)}
    )
    same = facts.EditRequest(fact=named, target="Elsewhere")
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, editor, [requests[1], requests[0], same], prefixes=2)
    assert (
        f"facts 2 and 3 ({requests[0].fact.id}, again; subject {requests[0].fact.subject})"
        in one_line(error)
    )


def test_the_same_request_twice_is_told_to_be_left_out(tiny, requests, one_line):
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "memit", [requests[1], requests[0], requests[0]], prefixes=2)
    assert "facts 2 and 3" in one_line(error)
    assert "leave one of them out" in one_line(error)


def test_subjects_that_only_look_alike_are_edited_together(tiny, requests):
    near = requests[0].fact.model_copy(
        update={"id": "near", "subject": requests[0].fact.subject + "s"}
    )
    delta = edited(
        tiny, "memit", [requests[0], facts.EditRequest(fact=near, target="Elsewhere")], prefixes=2
    )
    assert len(delta.record["outcomes"]) == 2


def test_moments_of_other_layers_are_refused(tiny, requests, one_line):
    hparams = rome.HParams(layers=(1,), steps=1, prefixes=0)
    resources = rome.prepare(tiny, hparams)
    with pytest.raises(facts.BadInput) as error:
        rome.edit(tiny, requests[:1], rome.HParams(layers=(2,), steps=1), resources)
    assert "[1]" in one_line(error)
    assert "2" in one_line(error)


def test_moments_of_another_model_are_refused(tiny_gpt2, tiny_llama, requests, one_line):
    hparams = rome.HParams(layers=(1,), steps=1, prefixes=0)
    with pytest.raises(facts.BadInput) as error:
        rome.edit(tiny_gpt2, requests[:1], hparams, rome.prepare(tiny_llama, hparams))
    assert "another model" in one_line(error)


def test_singular_moments_say_how_many_tokens_are_needed(tiny, requests, one_line):
    with pytest.raises((facts.BadInput, closed_form.Singular)) as error:
        edited(tiny, "rome", requests[:1], moment_tokens=8, prefixes=0)
    assert "tokens" in one_line(error)
