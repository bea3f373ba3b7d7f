import pytest
import torch

from workbench.activations import replaced
from workbench.editing.continuation import Continuation
from workbench.editing.rows import build_rows


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_the_later_blocks_alone_give_what_the_whole_network_gives(tiny, requests, layer):
    rows = build_rows(tiny, requests, ("A short text",), kl=True)
    row, at = rows.encoded.attention_mask.nonzero(as_tuple=True)
    rest = Continuation(tiny, rows.encoded, layer)
    whole = tiny.network(
        input_ids=rows.encoded.input_ids, attention_mask=rows.encoded.attention_mask
    ).logits[row, at]
    assert torch.allclose(rest.logits(rest.start, row, at), whole, atol=1e-4)
    assert not torch.allclose(rest.logits(rest.start.roll(1, -1), row, at), whole, atol=1e-2)


def test_a_shift_in_the_solver_is_a_shift_of_the_mlp_output(tiny, requests):
    rows = build_rows(tiny, requests)
    shift = torch.randn(len(requests), tiny.weight(1).shape[0])
    place = (torch.arange(len(requests)), rows.subject)
    rest = Continuation(tiny, rows.encoded, 1)
    last = rows.encoded.lengths - 1
    found = rest.logits(rest.start.index_put(place, shift, accumulate=True), place[0], last)
    with replaced(tiny.mlp(1), lambda out, key: out.index_put(place, shift, accumulate=True)):
        whole = tiny.logits_at(rows.encoded.input_ids, rows.encoded.attention_mask, last)
    assert torch.allclose(found, whole, atol=1e-4)
