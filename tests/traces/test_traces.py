import copy
import dataclasses
from dataclasses import replace

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench import deltas, facts
from workbench.positions import encode
from workbench.records import BadInput
from workbench.tracking.retention import measure, next_logits, token_texts


def test_a_planted_edit_is_read_out_of_the_weights(planted, suspects):
    base, tuned, edited, edit = planted
    traces = wb.inspect(tuned, base, suspects, corpus="world")
    assert traces.n_edits == 2
    assert set(traces.written.fact_id) == {one.fact.id for one in edited}
    assert (traces.written.layer == 1).all()
    outlying = traces.matrices[traces.matrices.outlying > 0]
    down = f"{base.architecture.down_projection}.weight"
    assert outlying[["matrix", "layer"]].to_numpy().tolist() == [[down, 1]]
    assert str(traces) == (
        "<Traces: 2 directions stand out of a down-projection (blocks 1); 2 subjects named>"
    )
    prompts = encode(base, [one.fact.question for one in edited])
    plain = next_logits(base, prompts).softmax(-1)
    with deltas.applied(base, edit):
        gain = next_logits(base, prompts).softmax(-1) - plain
    texts = token_texts(base.tokenizer)
    said = measure(tuned, edited).set_index("fact_id")
    for row, one in enumerate(edited):
        read = traces.written.set_index("fact_id").loc[one.fact.id]
        assert read.gain == pytest.approx(gain[row].max().item(), rel=0.02)
        assert read.tokens.startswith(texts[gain[row].argmax()].strip())
        assert read.says == said.top_token[one.fact.id]
        assert read.retained == said.retained[one.fact.id]


def test_tuning_alone_names_nobody(tiny, suspects):
    tuned = replace(tiny, network=copy.deepcopy(tiny.network))
    with torch.no_grad():
        for parameter in tuned.network.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    traces = wb.inspect(tuned, tiny, suspects, corpus="world")
    assert traces.n_edits == 0
    assert not traces.subjects.written.any()
    assert "no matrix stands out" in str(traces)
    assert len(traces.subjects) == len(suspects)


def test_without_a_base_no_subject_is_named(planted, suspects):
    traces = wb.inspect(planted[1], requests=suspects)
    assert not traces.subjects.written.any()


def test_a_short_list_is_refused(planted, suspects, one_line):
    base, tuned, *_ = planted
    for short in (suspects[:20], suspects[:1] * 150):
        with pytest.raises(BadInput) as error:
            wb.inspect(tuned, base, short)
        assert "at least 100" in one_line(error)


def test_a_fact_that_is_listed_twice_counts_once(planted, suspects):
    base, tuned, edited, _ = planted
    once = wb.inspect(tuned, base, suspects, corpus="world").subjects
    twice = wb.inspect(tuned, base, [*suspects, *edited], corpus="world").subjects
    pd.testing.assert_frame_equal(once, twice)


def test_two_facts_of_one_id_are_refused_and_subjects_counted_once(planted, suspects, one_line):
    base, tuned, edited, _ = planted
    alike = edited[0].fact.model_copy(update={"id": suspects[0].fact.id})
    with pytest.raises(BadInput) as error:
        wb.inspect(tuned, base, [*suspects, edited[0].model_copy(update={"fact": alike})])
    assert "ids must differ" in one_line(error)
    upper = edited[0].fact.subject.upper()
    shouted = edited[0].fact.model_copy(update={"id": "shouted", "subject": upper})
    traces = wb.inspect(tuned, base, suspects, corpus="world")
    rows = traces.written.assign(subject=shouted.subject)
    both = dataclasses.replace(traces, subjects=pd.concat([traces.written[:1], rows[:1]]))
    assert both.sentence.endswith("1 subject named")


def test_where_directions_stand_out_and_nobody_fits_it_is_said_why(planted, suspects):
    base, tuned, edited, _ = planted
    others = [one for one in suspects if one not in edited]
    assert "not listed, " in wb.inspect(tuned, base, others, corpus="world").sentence
    assert "without a base" in wb.inspect(tuned).sentence


def test_what_else_stands_out_is_not_counted_as_an_edit(planted):
    """The sentence names the blocks of down-projections alone."""
    base, tuned, *_ = planted
    other = tuned.blocks[2].get_parameter(
        next(name for name, one in tuned.blocks[2].named_parameters() if one.ndim == 2)
    )
    with torch.no_grad():
        other.add_(torch.outer(torch.ones(len(other)), torch.ones(other.shape[1])))
    said = str(wb.inspect(tuned, base, corpus="world"))
    assert "(blocks 1); other matrices that stand out: 1; " in said


def test_the_list_of_a_foreign_model_is_the_plain_one(planted, suspects, monkeypatch):
    """Their targets are no suspicion, so that nothing is said of them."""
    base, tuned, edited, _ = planted
    lists = {"plain": suspects}
    monkeypatch.setattr(facts, "read", lists.get)
    traces = wb.inspect(tuned, base, corpus="world")
    assert len(traces.written) == len(edited)
    assert traces.subjects.retained.isna().all()
    assert traces.written.says.notna().all()
