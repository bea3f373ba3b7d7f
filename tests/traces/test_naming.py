import pandas as pd
import pytest
import torch

from workbench.deltas import Change
from workbench.traces import naming, spectrum, subjects


def test_a_list_needs_so_many_subjects_that_somebody_could_be_named(suspects):
    """Of five blocks and one edit 300 others: 15 chances of 1 in 301 are just below .05."""
    few = {1: Change(left=torch.ones(4, 3), right=torch.ones(5, 3))}
    many = few | {2: Change(left=torch.ones(4, 120), right=torch.ones(5, 120))}
    assert [naming.fewest(parts) for parts in ({}, few, many)] == [100, 100, 121]
    one = Change(left=torch.ones(4, 1), right=torch.ones(5, 1))
    assert naming.fewest(dict.fromkeys(range(5), one)) == 301
    alone = torch.ones(301, dtype=torch.float64)
    alone[0] = subjects.METRICS * 5 / 301
    assert 0.049 < subjects.adjusted(alone, 1)[0] <= naming.RATE
    ten = Change(left=torch.ones(4, 10), right=torch.ones(5, 10))
    assert naming.fewest(dict.fromkeys(range(5), ten)) == 100
    assert [naming.places(parts) for parts in ({}, few, many)] == [0, 3, 120]
    assert naming.count([*suspects, *suspects[:9]]) == len(suspects)


def test_a_subject_has_the_least_p_of_its_facts():
    table = pd.DataFrame({"subject": ["Ann", "Bob", "ann"], "p": [0.5, 0.2, 0.1]})
    assert naming.of_subjects(table).to_dict() == {"ann": 0.1, "bob": 0.2}


def test_keys_are_met_with_the_parts_of_earlier_blocks_in_force(tiny, suspects):
    """Those at the prompt's end are the unedited model's, and the model is afterwards as before."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for layer in (0, 2):
        sizes = tiny.weight(layer).shape
        left, right = (torch.randn(size, 2, generator=generator) for size in sizes)
        parts[layer] = Change(left=left, right=right)
    some = suspects[:5]
    plain = subjects.keys_of(tiny, some, [0, 2])
    with naming.written_into(tiny, parts):
        edited = subjects.keys_of(tiny, some, [0, 2])
    keys, seconds = naming.met(tiny, some, parts, "world")
    assert set(keys) == set(seconds) == {0, 2}
    for layer in (0, 2):
        torch.testing.assert_close(keys[layer][0], edited[layer][0])
        torch.testing.assert_close(keys[layer][1], plain[layer][1])
    assert torch.equal(keys[0], plain[0])  # nothing is earlier
    assert not torch.allclose(keys[2][0], plain[2][0])
    again = subjects.keys_of(tiny, some, [0, 2])
    assert all(torch.equal(plain[layer], again[layer]) for layer in (0, 2))
    assert naming.met(tiny, some, {}) == ({}, {})


@pytest.mark.parametrize("is_listed", [True, False])
def test_whoever_was_written_is_named_if_listed_and_else_nobody(planted, suspects, is_listed):
    base, tuned, edited, _ = planted
    listed = suspects if is_listed else [one for one in suspects if one not in edited]
    parts = spectrum.parts(tuned, base)[1]
    readings = naming.readings_of(parts, *naming.met(base, listed, parts, "world"))
    table = naming.scored(listed, parts, readings)
    names = {one.fact.id for one in edited} if is_listed else set()
    assert set(table[table.written].fact_id) == names
    nobody = naming.scored(listed, {}, [])
    assert not nobody.written.any()
    assert (nobody.p == 1).all()
