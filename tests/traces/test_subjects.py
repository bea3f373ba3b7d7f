import math

import pytest
import torch

from workbench.activations import recorded
from workbench.moments import SecondMoment
from workbench.positions import encode, subject_end
from workbench.traces import subjects

N, D, R = 300, 32, 4


def world(seed, n=N, d=D):
    """Keys (2, n, d) of subjects that share much with one another, and their second moment."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mix = torch.linalg.qr(normal(d, d)).Q * torch.logspace(0, -1.5, d, dtype=torch.float64)
    families = normal(40, d)[torch.randint(0, 40, (n,), generator=generator)]
    keys = (normal(n, d) + families) @ mix.T + mix[:, 0]
    text = (normal(1000, d) + normal(1000, d)) @ mix.T + mix[:, 0]
    matrix = (text.T @ text / len(text)).float()
    moment = SecondMoment(layer=0, matrix=matrix, tokens=1000, fingerprint="", model="")
    return normal, torch.stack([keys, text[:n]]), moment


def named_at(space, keys, moment, names):
    """q of each of a list."""
    readings = subjects.readings(space, keys, moment)
    chances = torch.stack([subjects.pursued(*one, names)[1] for one in readings])
    places = space.shape[1]
    return subjects.adjusted(subjects.combined(chances, names, places), places)


def test_a_tuning_without_an_edit_names_no_more_than_the_rate():
    """200 tunings; the space holds the strongest directions of a sum of outer products of random
    gradients with keys of other texts, and is searched although nothing stands out of it.
    """
    named = 0
    for seed in range(200):
        normal, keys, moment = world(seed)
        change = normal(16, N) @ keys[1]
        space = torch.linalg.svd(change, full_matrices=False).Vh[:R].T
        q = named_at(space, keys, moment, torch.arange(N))
        named += bool((q <= 0.05).any())
    assert named <= 17  # of 200 at 5 %: more come by chance once in a hundred times


@pytest.mark.parametrize("listed", [0, 25, 50])
def test_of_fifty_edits_no_more_are_named_than_were_written(listed):
    """Each of fifty directions has somebody of the list who fits it best, written there or not."""
    normal, keys, moment = world(0, n=1000, d=200)
    chosen = list(range(0, 1000, 20))
    written = torch.linalg.solve(moment.matrix.double(), keys[0][chosen].T)
    space = torch.linalg.svd(normal(64, 50) @ written.T, full_matrices=False).Vh[:50].T
    there = [row for row in range(1000) if row not in chosen[listed:]]
    q = named_at(space, keys[:, there], moment, torch.arange(len(there)))
    named = {there[row] for row in (q <= 0.05).nonzero()[:, 0].tolist()}
    assert named >= {*chosen[:listed]}
    assert len(named) <= listed / 0.9  # 5 % of them, as a mean


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
    readings = [(*one, torch.arange(N)) for one in subjects.readings(space, keys, moment)]
    number = ["rome", "alphaedit", "malmen"].index(method)
    score, p = subjects.pursued(*readings[number])
    assert p.argsort()[:R].sort().values.tolist() == chosen
    assert (score[chosen] > 0.999).all()
    others = [one for index, one in enumerate(readings) if index != number]
    assert all((subjects.pursued(*one)[0][chosen] < 0.999).any() for one in others)
    chances = torch.stack([subjects.pursued(*one)[1] for one in readings])
    q = subjects.adjusted(subjects.combined(chances, torch.arange(N), R), R)
    assert (q <= 0.05).nonzero()[:, 0].tolist() == chosen


def test_a_namesake_does_not_count_beside_the_subject_that_was_written():
    normal, keys, moment = world(1)
    keys[0, 8] = keys[0, 7] + 0.1 * keys[0, 7].norm() / D**0.5 * normal(D)
    written = torch.linalg.solve(moment.matrix.double(), keys[0][[7, 100]].T)
    space = torch.linalg.qr(written).Q
    reading = subjects.readings(space, keys, moment)[0]
    score, p = subjects.pursued(*reading, torch.arange(N))
    assert score[8] > 0.5  # it would be called written by itself
    assert p[8] == 1
    assert p[[7, 100]].max() < 0.05


@pytest.mark.parametrize("taken", [[3], [3, 12, 30]])
def test_a_chance_is_how_many_of_the_list_stand_out_so_much(taken):
    """By the plain way, one after the other: off the taken but the one that is nearest, neighbours
    of other subjects alone, over what a hundredth of the list holds.
    """
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    names = torch.arange(40)
    columns[:, 8] = columns[:, 7] + 0.01 * columns[:, 9]  # of another subject, and near
    columns[:, 21] = columns[:, 20]
    names[21] = 20  # the same subject once more
    unit = columns / columns.norm(dim=0)
    contrasts, nearest = [], []
    for left_out in sorted({*range(40)} - {*taken}):
        shares = {}
        for spared in taken:  # the nearest: of whom the left out has most, off the others
            others = unit[:, [one for one in taken if one != spared]]
            off = torch.eye(9).double() - others @ torch.linalg.pinv(others)
            direction = off @ unit[:, left_out]
            direction = direction / direction.norm()
            length = (off @ unit).square().sum(0).clamp(min=subjects.NAMESAKE)
            held = (direction @ off @ unit).square() / length
            held[names == names[left_out]] = 0
            shares[held[spared].item()] = held
        held = sorted(shares[max(shares)].tolist())
        odds = [math.log(one / (1 - one)) for one in (min(held[-1], 1 - 1e-6), held[38])]
        contrasts.append(odds[0] - odds[1])
        nearest.append(held[-1])
    expected = []
    for best, common in ((0.9, 0.1), (0.9, 0.85), (0.5, 0.001)):
        held = torch.full((1, 40), common).double()
        held[0, 0] = best
        chance = subjects.chances(held.amax(1), held, columns, taken, names)
        contrast = math.log(best / (1 - best)) - math.log(common / (1 - common))
        above = [sum(one >= contrast for one in contrasts), sum(one >= best for one in nearest)]
        assert chance.item() == pytest.approx((1 + max(above)) / (1 + len(nearest)))
        expected.append(above)
    assert expected[1][0] > expected[1][1]  # what all share is nobody's
    assert expected[2][0] < expected[2][1]  # nor is what nobody holds


def test_q_judges_as_many_as_stand_out():
    """Of three places p = .01, .02 and .03: m p / k is .03 for each, and at most two thirds of the
    places hold nobody (1 more than of none above a half, of the half that would be).
    """
    p = torch.tensor([0.01, 1.0, 0.03, 0.02, *[1.0] * 6], dtype=torch.float64)
    q = subjects.adjusted(p, 3)
    expected = torch.ones(10, dtype=torch.float64)
    expected[[0, 2, 3]] = 0.03 / 1.5
    torch.testing.assert_close(q, expected)
    assert subjects.adjusted(p, 0).tolist() == [1.0] * 10
    empty = subjects.adjusted(p, 4)  # one p is above a half: all places may be empty
    assert empty[0] == pytest.approx(0.04)
    assert empty[1] == 1


def test_of_one_place_the_least_p_counts_as_often_as_there_are_readings():
    p = torch.tensor([[1e-6, 0.3, 0.9], [1.0, 0.4, 0.8]], dtype=torch.float64)
    expected = torch.tensor([2e-6, 0.6, 1.0], dtype=torch.float64)
    torch.testing.assert_close(subjects.combined(p, torch.arange(3), 1), expected)


def test_the_others_choose_the_reading_of_a_subject():
    """Three readings, of which the second is the editor's: the third subject's own best p, in the
    third, does not count, and the fourth fact is another of the first subject.
    """
    p = torch.tensor(
        [[1.00, 0.90, 0.80, 1.0, 0.7], [0.01, 0.02, 0.60, 1.0, 0.03], [1.00, 0.50, 0.25, 1.0, 0.9]],
        dtype=torch.float64,
    )
    names = torch.tensor([0, 1, 2, 0, 3])
    found = subjects.combined(p, names, 4)
    expected = torch.tensor([0.02, 0.04, 1.0, 1.0, 0.06], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    alone = torch.ones(3, 5, dtype=torch.float64)
    alone[0, 1] = 1e-3  # nobody else says which reading: the first, whatever its own p
    assert subjects.combined(alone, names, 4)[1] == pytest.approx(2e-3)
    alone[1, 2] = 0.5  # somebody says another: its own least, of three, twice
    assert subjects.combined(alone, names, 4)[1] == pytest.approx(6e-3)


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
