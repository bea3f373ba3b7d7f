import pytest
import torch

from workbench.activations import recorded
from workbench.moments import SecondMoment
from workbench.positions import encode, subject_end
from workbench.traces import subjects

N, D, R = 300, 32, 4


def world(seed):
    """Keys (2, n, d) of subjects that share much with one another, and their second moment."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mix = torch.linalg.qr(normal(D, D)).Q * torch.logspace(0, -1.5, D, dtype=torch.float64)
    families = normal(40, D)[torch.randint(0, 40, (N,), generator=generator)]
    keys = (normal(N, D) + families) @ mix.T + mix[:, 0]
    text = (normal(1000, D) + normal(1000, D)) @ mix.T + mix[:, 0]
    matrix = (text.T @ text / len(text)).float()
    moment = SecondMoment(layer=0, matrix=matrix, tokens=1000, fingerprint="", model="")
    return normal, torch.stack([keys, text[:N]]), moment


def test_a_tuning_without_an_edit_names_no_more_than_the_rate():
    """200 tunings; the space holds the strongest directions of a sum of outer products of random
    gradients with keys of other texts, and is searched although nothing stands out of it.
    """
    named = 0
    for seed in range(200):
        normal, keys, moment = world(seed)
        change = normal(16, N) @ keys[1]
        space = torch.linalg.svd(change, full_matrices=False).Vh[:R].T
        chances = [subjects.pursued(*one)[1] for one in subjects.readings(space, keys, moment)]
        q = subjects.adjusted(subjects.combined(torch.stack(chances)))
        named += bool((q <= 0.05).any())
    assert named <= 17  # of 200 at 5 %: more come by chance once in a hundred times


@pytest.mark.parametrize("method", ["rome", "alphaedit", "malmen"])
def test_what_each_editor_writes_is_read_where_it_writes(method):
    normal, keys, moment = world(0)
    chosen = [3, 70, 201, 233]
    matrix = moment.matrix.double()
    vectors = torch.linalg.eigh(matrix).eigenvectors
    if method == "rome":
        written = torch.linalg.solve(matrix, keys[0][chosen].T)
    elif method == "alphaedit":
        off = vectors[:, : D // 2]
        written = off @ off.T @ keys[0][chosen].T
    else:
        written = keys[1][chosen].T
    space = torch.linalg.svd(normal(24, R) @ written.T, full_matrices=False).Vh[:R].T
    readings = subjects.readings(space, keys, moment)
    number = ["rome", "alphaedit", "malmen"].index(method)
    score, p = subjects.pursued(*readings[number])
    assert p.argsort()[:R].sort().values.tolist() == chosen
    assert (score[chosen] > 0.999).all()
    others = [one for index, one in enumerate(readings) if index != number]
    assert all((subjects.pursued(*one)[0][chosen] < 0.999).any() for one in others)
    chances = torch.stack([subjects.pursued(*one)[1] for one in readings])
    q = subjects.adjusted(subjects.combined(chances))
    assert (q <= 0.05).nonzero()[:, 0].tolist() == chosen


def test_a_namesake_does_not_count_beside_the_subject_that_was_written():
    normal, keys, moment = world(1)
    keys[0, 8] = keys[0, 7] + 0.1 * keys[0, 7].norm() / D**0.5 * normal(D)
    written = torch.linalg.solve(moment.matrix.double(), keys[0][[7, 100]].T)
    space = torch.linalg.qr(written).Q
    score, p = subjects.pursued(*subjects.readings(space, keys, moment)[0])
    assert score[8] > 0.5  # it would be called written by itself
    assert p[8] > 1e-3 > p[[7, 100]].max()


def test_the_tail_is_that_of_log_odds_that_fall_off_exponentially():
    """Exact where they do; a list of which a few are written errs to the safe side."""
    n = 2000
    above = (torch.arange(n) + 0.5) / n
    odds = -torch.log(above.double()) - 3
    p = subjects.tail(torch.sigmoid(odds))
    upper = above < 0.24
    torch.testing.assert_close(p[upper], above[upper].double(), rtol=0.1, atol=0)
    spoilt = torch.cat([odds, torch.full((5,), 5.0, dtype=torch.float64)])
    ratio = subjects.tail(torch.sigmoid(spoilt))[:n] / p
    assert ratio[upper].max() < 6
    assert (ratio[upper] >= 0.99).all()  # the safe side


def test_q_is_that_of_benjamini_and_hochberg():
    p = torch.tensor([0.01, 0.5, 0.03, 0.02, 0.9], dtype=torch.float64)
    q = subjects.adjusted(p)
    torch.testing.assert_close(q, torch.tensor([0.05, 0.625, 0.05, 0.05, 0.9]).double())


def test_several_ps_are_combined_by_cauchy():
    p = torch.tensor([[1e-6, 0.3], [1.0, 0.3]], dtype=torch.float64)
    first, second = subjects.combined(p).tolist()
    assert first == pytest.approx(2e-6, rel=1e-3)
    assert second == pytest.approx(0.3)


def test_keys_are_those_of_a_plain_pass(tiny, requests):
    keys = subjects.keys_of(tiny, requests, [0, 2])
    for row, request in enumerate(requests):
        encoded = encode(tiny, [request.fact.question])
        end = encoded.token_at(0, subject_end(request.fact.prompt, request.fact.subject))
        modules = {layer: tiny.down_projection(layer) for layer in (0, 2)}
        with recorded(modules, inputs=True) as record, torch.no_grad():
            tiny.network(**encoded.arguments())
        for layer in (0, 2):
            plain = record[layer].view(encoded.input_ids.shape[1], -1)[[end, -1]].double()
            torch.testing.assert_close(keys[layer][:, row], plain, rtol=1e-4, atol=1e-5)
