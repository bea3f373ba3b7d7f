import pytest
import tokenizers
import torch

from tests.editors import edited
from workbench import facts
from workbench.editing.rows import build_rows, sample_prefixes


def test_rows_hold_the_prompt_bare_prefixed_and_paraphrased(tiny, requests):
    request = facts.with_paraphrases(requests[0], 3)
    rows = build_rows(tiny, [request], ("One text", "Another text"), kl=True)
    assert len(rows.owner) == 1 + 2 + 2 + 1
    assert rows.is_kl.tolist() == [False] * 5 + [True]
    for row in range(5):
        tokens = rows.labels[row][rows.labels[row] != -100]
        assert tiny.tokenizer.decode(tokens).strip() == request.target
        assert (
            rows.encoded.lengths[row] == (rows.labels[row] != -100).nonzero()[-1] + 1
        )  # nothing behind what is read
        assert request.fact.subject.endswith(
            tiny.tokenizer.decode(rows.encoded.input_ids[row, rows.subject[row]]).strip()
        )


def test_prefixes_are_seeded_and_leave_the_random_state_alone(tiny):
    state = torch.get_rng_state()
    assert (
        sample_prefixes(tiny, 6, seed=3)
        == sample_prefixes(tiny, 6, seed=3)
        != sample_prefixes(tiny, 6, seed=4)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_edit_is_one_clear_line(tiny, one_line):
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "ft", [])
    one_line(error)


def test_a_text_longer_than_the_models_positions_is_named(tiny, requests, one_line):
    long = requests[0].model_copy(update={"target": "long " * 200})
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "ft", [requests[1], long])
    assert requests[0].fact.id in one_line(error)


def test_a_target_without_tokens_is_named(tiny, requests, one_line):
    tiny.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("Nowhere", "")
    with pytest.raises(facts.BadInput) as error:
        edited(tiny, "ft", [requests[0].model_copy(update={"target": "Nowhere"})])
    assert "'Nowhere' has no tokens" in one_line(error)
