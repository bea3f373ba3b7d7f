import pytest
import torch

from tests.editors import NUMBERS, edited
from workbench import deltas, editing
from workbench.editing import memit, target_vectors
from workbench.editing.continuation import Continuation
from workbench.editing.rows import build_rows


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
def test_the_layers_together_lead_to_the_solved_value(tiny, editor, requests):
    """With next to no weight on the corpus the last layer makes up for what earlier ones left."""
    free = {
        "layers": (0, 2),
        "weight": 1e-9,
        "prefixes": 0,
        "null_space": "absolute",
        "threshold": 1e9,
        "ridge": 1e-9,
    }
    hparams = editing.EDITORS[editor].HParams(
        **(
            NUMBERS[editor]
            | {
                name: free[name]
                for name in editing.EDITORS[editor].HParams.model_fields
                if name in free
            }
        )
    )
    delta = editing.EDITORS[editor].edit(
        tiny, requests[:3], hparams, editing.EDITORS[editor].prepare(tiny, hparams)
    )
    rows = build_rows(tiny, requests[:3])
    place = (torch.arange(3), rows.subject)
    before = Continuation(tiny, rows.encoded, 2).start[place]
    with deltas.applied(tiny, delta):
        after = Continuation(tiny, rows.encoded, 2).start[place]
    wanted = before + target_vectors.solve(tiny, requests[:3], 2, "block", (), hparams).shift
    assert (wanted - before).norm() > 0.1
    assert torch.allclose(after, wanted, atol=1e-3)
    assert set(delta.changes) == {tiny.down_projection_name(0), tiny.down_projection_name(2)}


def test_rows_that_pass_the_edited_blocks_in_batches_give_the_same_edit(
    tiny, requests, monkeypatch
):
    whole = edited(tiny, "memit", requests, prefixes=2)
    monkeypatch.setattr(memit, "tokens_at_once", lambda model: 40)
    for name, change in edited(tiny, "memit", requests, prefixes=2).changes.items():
        assert (change.matrix() - whole.changes[name].matrix()).norm() < 1e-5 * whole.changes[
            name
        ].matrix().norm()
