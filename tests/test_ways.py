"""Ways to edit that are held against a preset: each does what its formula says."""

from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import ways
from workbench import deltas, editing
from workbench.editing import memit, records
from workbench.editing.target_vectors import Solution
from workbench.models import Model
from workbench.positions import encode

HPARAMS = memit.HParams(layers=(0, 1), prefixes=0)


def after_block(model: Model, requests, block: int) -> torch.Tensor:
    """Hidden states (n, d_model) behind a block at the subject's last token of the bare prompt."""
    states = []
    for request in requests:
        fact = request.fact
        ids = encode(model, [fact.prompt.partition("{}")[0] + fact.subject]).input_ids
        hidden = model.network(ids, output_hidden_states=True).hidden_states
        states.append(hidden[block + 1][0, -1])
    return torch.stack(states)


@torch.no_grad()
def test_an_anchored_target_is_as_long_as_what_it_replaces(tiny, requests):
    requests = requests[:3]
    shift = torch.randn(3, tiny.network.config.hidden_size, generator=torch.manual_seed(0))
    nothing = torch.zeros(3)
    solved = Solution(shift, nothing, nothing, nothing)
    anchored = ways.anchored(tiny, requests, HPARAMS, records.Resources(), solved)
    hidden = after_block(tiny, requests, 1)
    before, after = hidden + shift, hidden + anchored.shift
    torch.testing.assert_close(after.norm(dim=1), hidden.norm(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.cosine_similarity(after, before), torch.ones(3), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(anchored.shift, shift)


def test_the_adapter_is_the_change_that_is_returned(tiny, requests):
    """What was learnt inside the network is what it says with the change in its weights."""
    names = [tiny.down_projection_name(layer) for layer in HPARAMS.layers]
    random = torch.manual_seed(0)
    factors = []
    for layer in HPARAMS.layers:
        factors += [torch.randn(size, 2, generator=random) for size in tiny.weight(layer).shape]
    ids = encode(tiny, [requests[0].fact.question]).input_ids
    with torch.no_grad():
        with ways._adapted(tiny, names, factors):
            inside = tiny.network(ids).logits
        pairs = zip(names, factors[::2], factors[1::2], strict=True)
        changes = {name: deltas.Change(left=left, right=right) for name, left, right in pairs}
        with deltas.applied(tiny, deltas.WeightDelta.of(tiny, changes=changes)):
            written = tiny.network(ids).logits
    torch.testing.assert_close(inside, written, rtol=1e-3, atol=1e-4)


def test_a_sharpness_aware_step_takes_the_slope_from_where_the_loss_is_worst(
    monkeypatch, tiny, requests
):
    """One step of Adam goes by the signs of the gradient at the top of the ball."""
    monkeypatch.setattr(ways, "STEPS", 1)
    monkeypatch.setattr(ways, "RADIUS", 3.0)
    requests = requests[:2]
    change = ways.sharpness_aware(tiny, requests, HPARAMS, seed=0).changes
    names = [tiny.down_projection_name(layer) for layer in HPARAMS.layers]
    start = torch.Generator().manual_seed(0)
    lefts, rights = [], []
    for layer in HPARAMS.layers:
        d_out, d_in = tiny.weight(layer).shape
        rights.append(torch.randn(d_in, ways.RANK, generator=start) / d_in**0.5)
        lefts.append(torch.zeros(d_out, ways.RANK))

    def slopes(lefts):
        factors = [one.requires_grad_() for one in lefts]
        pairs = [one for pair in zip(factors, rights, strict=True) for one in pair]
        with ways._adapted(tiny, names, pairs):
            loss = 0
            for request in requests:
                fact = request.fact
                new, true = (
                    log_p(tiny, fact.question, one) for one in (request.target, fact.object)
                )
                loss -= (new + torch.sigmoid(new - true).log()) / len(requests)
        return torch.autograd.grad(loss, factors)

    first = slopes(lefts)
    norm = torch.stack([one.norm() for one in first]).norm()
    worst = slopes([3.0 * one / norm for one in first])
    turned = 0
    for name, at_start, slope in zip(names, first, worst, strict=True):
        moved = change[name].left
        clear = slope.abs() > 1e-3 * slope.abs().max()
        turned += (at_start.sign() != slope.sign())[clear].sum()
        torch.testing.assert_close(
            moved[clear], -ways.RATE * slope[clear].sign(), rtol=1e-2, atol=0
        )
    assert turned  # where the slope at the start says another sign


def log_p(model: Model, prompt: str, answer: str) -> torch.Tensor:
    """Of all tokens of an answer after a prompt."""
    asked = encode(model, [prompt]).input_ids
    whole = encode(model, [f"{prompt} {answer}"]).input_ids
    log_probs = model.network(whole).logits[0, :-1].log_softmax(-1)
    tokens = whole[0, 1:]
    return log_probs.gather(1, tokens[:, None])[asked.shape[1] - 1 :].sum()


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ValueError, match="firm"):
        ways.made(SimpleNamespace(), "memit", [], None, 0, "firmer")
    with pytest.raises(ValueError, match="anchor: rome's targets are no hidden states"):
        ways.made(SimpleNamespace(), "rome", [], None, 0, "anchor")


@pytest.mark.filterwarnings("ignore")
def test_an_editor_without_targets_edits_by_its_preset_in_several_statements_or_too_far(
    monkeypatch, tiny, requests
):
    """`1` is the preset's edit: what others are held against."""

    def edited(how):
        edit = ways.made(tiny, "ft", requests[:2], records.Resources(), 0, how)
        return torch.cat([one.matrix().flatten() for one in edit.changes.values()])

    plain = tiny_preset(tiny, requests[:2])
    monkeypatch.setattr(ways, "OVER", 2)
    assert torch.equal(edited("1"), plain)
    assert not torch.equal(edited("3"), plain)
    torch.testing.assert_close(edited("over"), 2 * plain)


def tiny_preset(tiny, requests):
    """FT's preset edit, as its own room makes it."""
    hparams = editing.preset("ft", tiny)
    edit = editing.EDITORS["ft"].edit(tiny, requests, hparams, records.Resources(), seed=0)
    return torch.cat([one.matrix().flatten() for one in edit.changes.values()])


def test_a_flat_loss_is_read_where_it_rises_most_steeply(monkeypatch):
    """Of |x - a|^2, a tenth of |v_0| further from a than x, which is 2 from it."""
    monkeypatch.setattr(ways, "FLAT", 0.1)
    batch = SimpleNamespace(v0=torch.tensor([5.0]))
    goal = torch.tensor([1.0, 0.0])

    def evaluate(_, shift, hparams):
        return ((shift - goal).square().sum(1), hparams)

    at = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss, passed = ways.at_worst(evaluate)(batch, at, "numbers")
    torch.testing.assert_close(loss, torch.tensor([2.5**2]))
    assert passed == "numbers"


def test_a_target_short_of_its_lead_over_its_rivals_is_dearer(monkeypatch):
    """It leads the mean of the two likeliest others by 2 nats, of the LEAD that is wanted."""
    monkeypatch.setattr(ways, "RIVALS", 2)
    monkeypatch.setattr(ways, "LEAD", 8)
    batch = SimpleNamespace(
        weight=torch.tensor([0.5]),
        answers=SimpleNamespace(token=torch.tensor([1])),
        answer_owner=torch.tensor([0]),
        _log_probs=lambda shift: torch.tensor([[-3.0, -2.0, -5.0, -9.0]]),
        _total=lambda owner, values: torch.zeros(1).index_add(0, owner, values),
    )
    [loss] = ways.suppressing(lambda *_: (torch.tensor([1.0]),))(batch, None, None)
    torch.testing.assert_close(loss, torch.tensor([1 + 0.5 * (1 - 2 / 8)]))
