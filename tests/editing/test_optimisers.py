"""Adam and L-BFGS on losses whose minimum is known, row by row and within their bounds."""

import pytest
import torch

from workbench.editing.optimisers import LBFGS, Adam, shortened, tangent

N, WIDTH = 5, 12


@pytest.fixture
def bowls():
    """Matrices A (n, d, d) and minima m (n, d) of the losses (x - m)' A (x - m) / 2 - 1."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(N, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    matrices = roots @ roots.mT + 0.1 * torch.eye(WIDTH)
    return matrices, torch.randn(N, WIDTH, generator=generator)


def optimiser(name, bound, radius=1.0):
    bounds = torch.full((N,), float(bound))
    if name == "adam":
        return Adam(bounds, WIDTH, rate=0.1)
    return LBFGS(bounds, WIDTH, torch.full((N,), radius))


def descend(made, bowls, index, steps):
    """Where the losses were read (steps, n, d), the losses and whether they were kept, (steps, n),
    of these rows; of others as they stand.
    """
    matrices, minima = bowls
    places, losses, kept = [], [], []
    for _ in range(steps):
        away = made.shift - minima
        gradient = (matrices @ away[..., None])[..., 0]
        loss = (away * gradient).sum(1) / 2 - 1
        places.append(made.shift.clone())
        losses.append(loss)
        kept.append(made.kept(torch.arange(N), loss))
        made.step(index, loss[index], gradient[index])
    return torch.stack(places), torch.stack(losses), torch.stack(kept)


EVERY = torch.arange(N)


@pytest.mark.parametrize(("name", "steps"), [("adam", 300), ("lbfgs", 40)])
def test_both_come_to_the_minimum(bowls, name, steps):
    places, _, kept = descend(optimiser(name, 100), bowls, EVERY, steps)
    last = torch.stack([places[kept[:, row], row][-1] for row in range(N)])
    assert torch.allclose(last, bowls[1], atol=0.02)
    assert not torch.allclose(places[steps // 10], bowls[1], atol=0.02)


def test_a_step_follows_the_two_loop_recursion(bowls):
    """The direction is -H g with H made of its formula, pair by pair, as a matrix."""
    first = -(bowls[0] @ bowls[1][..., None])[..., 0]  # the gradient at 0
    made = optimiser("lbfgs", 100, radius=0.3)
    descend(made, bowls, EVERY, 9)  # more pairs than are held
    direction = made._direction(EVERY)
    for row in range(N):
        s, y, curvature = made.s[:, row], made.y[:, row], made.curvature[:, row]
        assert torch.isfinite(curvature).all()
        assert torch.allclose((s * y).sum(1), curvature)
        steepness = first[row].abs()
        spread = 1 / (steepness + LBFGS.EVEN * steepness.mean())
        inverse = torch.diag(spread) * curvature[-1] / (y[-1] @ (spread * y[-1]))
        for pair in range(LBFGS.HISTORY):
            left = torch.eye(WIDTH) - torch.outer(s[pair], y[pair]) / curvature[pair]
            inverse = left @ inverse @ left.T + torch.outer(s[pair], s[pair]) / curvature[pair]
        expected = -inverse @ made.gradient[row]
        assert torch.allclose(direction[row], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_a_row_gets_what_it_would_get_alone(bowls, name):
    """The others' losses, steepness and end do not reach it."""
    together = descend(optimiser(name, 3), bowls, EVERY, 12)[0]
    for row in range(N):
        alone = descend(optimiser(name, 3), bowls, torch.tensor([row]), 12)[0]
        assert torch.allclose(alone[:, row], together[:, row], atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_a_row_that_has_stopped_stays(bowls, name):
    made = optimiser(name, 3)
    descend(made, bowls, EVERY, 4)
    there = made.shift.clone()
    descend(made, bowls, torch.tensor([1, 3]), 4)
    moved = (made.shift != there).any(1)
    assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_no_shift_is_longer_than_its_bound(bowls, name):
    bound = 0.5 * bowls[1].norm(dim=1).min().item()  # all minima are farther away
    places, losses, _ = descend(optimiser(name, bound), bowls, EVERY, 60)
    norms = places.norm(dim=2)
    assert (norms <= bound * (1 + 1e-5)).all()
    assert torch.allclose(norms.max(0).values, torch.full((N,), bound))
    assert (losses.min(0).values < losses[0]).all()


def test_at_the_bound_lbfgs_goes_on_until_all_that_is_left_leads_beyond(bowls):
    """The gradient at the best shift is along that shift; Adam turns around the place."""
    bound = 0.5 * bowls[1].norm(dim=1).min().item()
    cosines = {}
    for name in ("adam", "lbfgs"):
        places, losses, _ = descend(optimiser(name, bound), bowls, EVERY, 100)
        best = places[losses.argmin(0), EVERY]
        gradient = (bowls[0] @ (best - bowls[1])[..., None])[..., 0]
        cosines[name] = torch.cosine_similarity(gradient, -best)
    assert (cosines["lbfgs"] > 0.999).all()
    assert not (cosines["adam"] > 0.999).all()


def test_a_step_is_as_long_as_its_radius_at_most_which_failing_shortens(bowls):
    made = optimiser("lbfgs", 100, radius=3.0)
    places, _, kept = descend(made, bowls, EVERY, 40)
    best = places[0].clone()
    radius = torch.full((N,), 3.0)
    shorter = longer = 0
    for number in range(39):
        tried = (places[number] - best).norm(dim=1)
        failed = ~kept[number]
        best = torch.where(failed[:, None], best, places[number])
        narrow = radius
        radius = torch.where(failed, LBFGS.SHRINK * tried, 3.0)
        step = (places[number + 1] - best).norm(dim=1)
        assert (step <= radius * (1 + 1e-4) + 1e-6).all()
        longer += int((step > 1.01 * narrow).sum())
        shorter += int(failed.sum())
    assert torch.allclose((places[1] - places[0]).norm(dim=1), torch.full((N,), 3.0))
    assert shorter
    assert longer  # the radius is whole again after a step of use


def test_only_a_lower_loss_is_kept(bowls):
    _, losses, kept = descend(optimiser("lbfgs", 100, radius=3.0), bowls, EVERY, 40)
    lowest = torch.full((N,), torch.inf)
    for loss, is_kept in zip(losses, kept, strict=True):
        assert is_kept.tolist() == (loss < lowest).tolist()
        lowest = torch.minimum(lowest, loss)
    assert not kept.all()


def test_vectors_beyond_their_bound_are_scaled_back_and_no_others():
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    shorter = shortened(vectors, torch.tensor([1.0, 1.0, 0.0]))
    assert torch.allclose(shorter, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_what_leads_beyond_the_bound_is_left_out_and_only_that():
    shift = torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    vectors = torch.tensor([[3.0, 4.0], [-3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    expected = torch.tensor([[0.0, 4.0], [-3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    assert torch.allclose(tangent(vectors, shift, torch.full((4,), 2.0)), expected)


def test_at_the_bound_a_step_is_along_it():
    """With D other than I, -D g leads beyond though g does not."""
    made = LBFGS(torch.ones(1), 3, torch.tensor([0.5]))
    there = made.best = torch.full((1, 3), 3**-0.5)
    made.shift = there.clone()
    gradient = torch.tensor([[5.0, -1.0, -4.0]])
    made.step(torch.tensor([0]), torch.zeros(1), gradient)
    direction = -gradient / (gradient.abs() + LBFGS.EVEN * gradient.abs().mean())
    direction = 0.5 * direction / direction.norm()
    assert (direction * there).sum() > 0.1
    moved = there + direction - (direction * there).sum() * there
    assert torch.allclose(made.shift, moved / moved.norm(), atol=1e-5)
