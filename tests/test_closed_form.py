"""The weight updates solve the problems that their docstrings state; float64, no model.

Each identity is also tried on a formula or an input that is slightly wrong, and must fail there.
"""

from contextlib import nullcontext

import pytest
import torch

from workbench.closed_form import (
    Singular,
    constrained_update,
    factorised,
    null_space,
    projected_update,
    ridge_update,
)

D_IN, D_OUT = 24, 10
SEEDS = pytest.mark.parametrize("seed", range(3))
COUNTS = pytest.mark.parametrize("n", [1, 2, 7, D_IN])


def problem(seed: int, n: int):
    """K (d_in, n), R (d_out, n), C (d_in, d_in) of condition 100, and its factor; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN, **draw)).Q
    samples = (
        torch.randn(200, D_IN, **draw) * torch.logspace(0, -1, D_IN, dtype=torch.float64)
    ) @ turn
    C = samples.T @ samples / len(samples)
    return torch.randn(D_IN, n, **draw), torch.randn(D_OUT, n, **draw), C, factorised(C)


def matrix(factors) -> torch.Tensor:
    left, right = factors
    return left @ right.T


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return ((found - expected).norm() / expected.norm()).item()


def cost(D: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """tr(D C D')."""
    return (D @ C @ D.T).trace()


# ROME: one key


@SEEDS
def test_after_rome_the_key_leads_to_the_value(seed):
    key, residual, _, factor = problem(seed, 1)
    W = torch.randn(
        D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100)
    )
    value = W @ key + residual
    D = matrix(constrained_update(key, residual, factor))
    assert off((W + D) @ key, value) < 1e-12
    assert off((W - D) @ key, value) > 1e-2
    assert off((W + D) @ (key * 1.001), value) > 1e-5


@SEEDS
def test_rome_is_the_update_of_one_key(seed):
    key, residual, C, factor = problem(seed, 1)
    k, r = key[:, 0], residual[:, 0]
    D = matrix(constrained_update(key, residual, factor))
    turned = torch.linalg.inv(C) @ k
    assert off(D, torch.outer(r, turned) / (k @ turned)) < 1e-12
    assert off(D, torch.outer(r, turned) / (k @ k)) > 1e-2
    assert off(D, torch.outer(r, k) / (k @ k)) > 1e-2
    assert off(D, torch.outer(r, turned) / ((k + 0.01) @ turned)) > 1e-5  # another key's product


@COUNTS
def test_the_rank_is_the_number_of_keys(n):
    keys, residuals, _, factor = problem(0, n)
    left, right = constrained_update(keys, residuals, factor)
    assert left.shape == (D_OUT, n)
    assert right.shape == (D_IN, n)
    assert left.dtype == right.dtype == torch.float64
    assert torch.linalg.matrix_rank(left @ right.T) == min(n, D_OUT)


# many keys


@SEEDS
@COUNTS
def test_the_constrained_update_moves_every_key_by_its_residual(seed, n):
    keys, residuals, _, factor = problem(seed, n)
    D = matrix(constrained_update(keys, residuals, factor))
    assert off(D @ keys, residuals) < 1e-9
    assert off(D @ (keys + 1e-3), residuals) > 1e-5


def without_the_moment(keys, residuals):
    """Also moves every key by its residual, but with more effort: R (K'K)^-1 K'."""
    return residuals @ torch.linalg.inv(keys.T @ keys) @ keys.T


@SEEDS
@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_other_change_that_moves_the_keys_costs_more(seed, n):
    keys, residuals, C, factor = problem(seed, n)
    D = matrix(constrained_update(keys, residuals, factor))
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1.0):
        other = size * torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=generator)
        other -= other @ keys @ torch.linalg.pinv(keys)  # moves no key
        assert off((D + other) @ keys, residuals) < 1e-7
        assert cost(D + other, C) > cost(D, C)
        assert cost(D + other, C).item() == pytest.approx(
            (cost(D, C) + cost(other, C)).item(), rel=1e-6
        )  # at right angles: the minimum
    worse = without_the_moment(keys, residuals)
    assert off(worse @ keys, residuals) < 1e-8
    assert cost(worse, C) > 1.01 * cost(D, C)


def dense_ridge(keys, residuals, C, weight):
    return residuals @ keys.T @ torch.linalg.inv(weight * C + keys @ keys.T)


@SEEDS
@COUNTS
@pytest.mark.parametrize("weight", [3.0, 100.0])
def test_the_ridge_update_equals_the_dense_formula(seed, n, weight):
    keys, residuals, C, factor = problem(seed, n)
    D = matrix(ridge_update(keys, residuals, factor, weight))
    assert off(D, dense_ridge(keys, residuals, C, weight)) < 1e-10
    assert off(D, dense_ridge(keys, residuals, C, 1.01 * weight)) > 1e-5
    assert off(D, dense_ridge(keys, residuals, torch.eye(D_IN, dtype=torch.float64), weight)) > 1e-2


@SEEDS
def test_the_ridge_update_is_where_its_objective_is_lowest(seed):
    keys, residuals, C, factor = problem(seed, 5)
    D = matrix(ridge_update(keys, residuals, factor, 3.0)).requires_grad_()
    (3.0 * cost(D, C) + (residuals - D @ keys).square().sum()).backward()
    assert D.grad.norm() < 1e-8 * residuals.norm()
    near = (1.001 * D).detach().requires_grad_()
    (3.0 * cost(near, C) + (residuals - near @ keys).square().sum()).backward()
    assert near.grad.norm() > 1e-5 * residuals.norm()


def with_the_weight_squared(keys, residuals, factor, weight):
    return ridge_update(keys, residuals, factor, weight**2)


@SEEDS
@pytest.mark.parametrize(("update", "ratio"), [(ridge_update, 10), (with_the_weight_squared, 100)])
def test_the_ridge_update_nears_the_constrained_one_linearly(seed, update, ratio):
    keys, residuals, _, factor = problem(seed, 4)
    exact = matrix(constrained_update(keys, residuals, factor))
    distances = [
        off(matrix(update(keys, residuals, factor, weight)), exact) for weight in (1e-2, 1e-3)
    ]
    assert distances[0] / distances[1] == pytest.approx(ratio, rel=0.05)
    assert distances[1] < 1e-3


def test_a_large_weight_leaves_things_as_they_are():
    keys, residuals, _, factor = problem(0, 4)
    small, smaller = (
        matrix(ridge_update(keys, residuals, factor, weight)).norm().item() for weight in (1e8, 1e9)
    )
    assert small < 1e-3
    assert small / smaller == pytest.approx(10, rel=1e-3)


# what has no single solution


def test_the_factor_gives_the_matrix_back():
    _, _, C, factor = problem(0, 1)
    assert off(factor @ factor.T, C) < 1e-14
    assert torch.equal(factor, factor.tril())
    assert factor.dtype == factorised(C.float()).dtype == torch.float64


@pytest.mark.parametrize(
    "C",
    [
        torch.zeros(4, 4),
        torch.ones(4, 4),
        torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])),
        -torch.eye(4),
    ],
)
def test_a_singular_moment_is_named(one_line, C):
    with pytest.raises(Singular) as error:
        factorised(C, "the second moment of layer 3")
    message = one_line(error)
    assert "the second moment of layer 3 is singular" in message
    assert ("never used" if (C.diagonal() == 0).any() else "more tokens") in message


@pytest.mark.parametrize("seed", range(12))
def test_a_moment_of_fewer_tokens_than_its_width_is_singular(one_line, seed):
    keys = torch.randn(
        D_IN - 1, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    with pytest.raises(Singular) as error:
        factorised(keys.T @ keys / len(keys))
    assert "singular" in one_line(error)


def test_a_moment_of_few_tokens_that_span_its_width_is_not_singular():
    keys = torch.randn(
        D_IN + 5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(factorised(keys.T @ keys / len(keys))).all()
    assert torch.isfinite(
        factorised(torch.diag(torch.logspace(0, -10, D_IN, dtype=torch.float64)))
    ).all()  # uneven, but regular


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_named(one_line, value):
    C = torch.eye(4)
    C[1, 2] = value
    for read, what in (
        (lambda: factorised(C, "the second moment of layer 3"), "the second moment of layer 3"),
        (lambda: factorised(C), "the second moment of the keys"),
        (lambda: null_space(C, "rank", 2), "the second moment"),
    ):
        with pytest.raises(Singular) as error:
            read()
        assert one_line(error).startswith(f"{what} holds NaN or infinite numbers")


def pair(cosine: float) -> torch.Tensor:
    """Products of two vectors of length 1, float64: the second pivot is 1 - cosine^2, the condition
    (1 + cosine) / (1 - cosine).
    """
    return torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)


def test_a_moment_is_singular_where_a_pivot_is_rounding_alone():
    assert torch.isfinite(factorised(pair((1 - 1.5e-11) ** 0.5))).all()
    with pytest.raises(Singular, match="singular"):
        factorised(pair((1 - 0.7e-11) ** 0.5))


def doubled(keys):
    return torch.cat([keys, keys[:, :1]], 1)


def in_one_plane(keys):
    return torch.cat([keys, 0.3 * keys[:, :1] - 2 * keys[:, 1:2]], 1)


def one_is_zero(keys):
    return torch.cat([keys, 0 * keys[:, :1]], 1)


def too_many(keys):
    return torch.cat([keys, keys.flip(0), keys.roll(1, 0)], 1)


@SEEDS
@pytest.mark.parametrize("dependent", [doubled, in_one_plane, one_is_zero, too_many])
def test_keys_that_depend_on_each_other_are_refused(one_line, seed, dependent):
    keys, residuals, _, factor = problem(seed, 9)
    constrained_update(keys, residuals, factor)
    wrong = dependent(keys)
    with pytest.raises(Singular) as error:
        constrained_update(wrong, torch.ones(D_OUT, wrong.shape[1], dtype=torch.float64), factor)
    assert f"the {wrong.shape[1]} keys are not independent" in one_line(error)


def test_a_key_of_zeros_is_refused(one_line):
    keys, residuals, _, factor = problem(0, 1)
    with pytest.raises(Singular) as error:
        constrained_update(0 * keys, residuals, factor)
    one_line(error)


@pytest.mark.parametrize("dependent", [doubled, in_one_plane, too_many])
def test_the_ridge_update_shares_out_among_keys_that_depend_on_each_other(dependent):
    keys, _, C, factor = problem(0, 9)
    wrong = dependent(keys)
    residuals = torch.ones(D_OUT, wrong.shape[1], dtype=torch.float64)
    D = matrix(ridge_update(wrong, residuals, factor, 2.0))
    assert off(D, dense_ridge(wrong, residuals, C, 2.0)) < 1e-10
    assert off(D, dense_ridge(keys, residuals[:, :9], C, 2.0)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ridge_too_small_to_part_doubled_keys_is_refused_whatever_the_rounding(dtype):
    """About a third of such systems have a factor, of which one pivot is rounding alone."""
    factored = 0
    for seed in range(60):
        wrong = doubled(problem(seed, 4)[0]).to(dtype)
        gram = wrong.T @ wrong
        factored += int(torch.linalg.cholesky_ex(gram).info == 0)
        with pytest.raises(Singular, match="singular to rounding"):
            ridge_update(wrong, torch.ones(D_OUT, 5, dtype=dtype), None, 1e-30)
    assert factored > 5


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(one_line, weight):
    keys, residuals, _, factor = problem(0, 2)
    with pytest.raises(ValueError, match="must be > 0") as error:
        ridge_update(keys, residuals, factor, weight)
    assert f"weight {weight}" in one_line(error)


@pytest.mark.parametrize(("update", "weight"), [(constrained_update, ()), (ridge_update, (1.0,))])
def test_the_arguments_stay_as_they_were(update, weight):
    keys, residuals, _, factor = problem(0, 3)
    copies = keys.clone(), residuals.clone(), factor.clone()
    update(keys, residuals, factor, *weight)
    assert all(map(torch.equal, (keys, residuals, factor), copies))


# EMMET and ROME away from their keys


@SEEDS
def test_the_residuals_can_be_met_at_other_keys(seed):
    keys, residuals, C, factor = problem(seed, 3)
    at = keys + 0.3 * torch.randn(
        keys.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    D = matrix(constrained_update(keys, residuals, factor, at))
    assert off(D @ at, residuals) < 1e-10
    assert off(D @ keys, residuals) > 1e-2
    assert (
        torch.linalg.matrix_rank(torch.cat([D, (torch.linalg.inv(C) @ keys).T])) == 3
    )  # in the span of C^-1 K


# MALMEN: the ridge without a moment


@SEEDS
@COUNTS
def test_without_a_factor_the_moment_is_the_identity(seed, n):
    keys, residuals, _C, factor = problem(seed, n)
    D = matrix(ridge_update(keys, residuals, None, 0.7))
    assert (
        off(
            D,
            residuals
            @ keys.T
            @ torch.linalg.inv(keys @ keys.T + 0.7 * torch.eye(D_IN, dtype=torch.float64)),
        )
        < 1e-10
    )
    assert off(D, matrix(ridge_update(keys, residuals, factorised(torch.eye(D_IN)), 0.7))) < 1e-12
    assert off(D, matrix(ridge_update(keys, residuals, factor, 0.7))) > 1e-3


def test_the_ridge_update_is_differentiable_in_all_that_malmen_learns():
    keys, residuals, *_ = problem(0, 4)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda k, r, w: matrix(ridge_update(k, r, None, w)),
        (keys.requires_grad_(), residuals.requires_grad_(), weight),
    )


# AlphaEdit: the ridge within a null space

RULES = pytest.mark.parametrize(
    ("rule", "threshold"),
    [("absolute", 0.2), ("trace", 0.1), ("trace", 0.6), ("rank", 5), ("rank", 20)],
)


def dense_projector(C, rule, threshold):
    values, vectors = torch.linalg.eigh(C)
    if rule == "absolute":
        small = values < threshold
    elif rule == "trace":
        small = torch.tensor(
            [values[: number + 1].sum() <= threshold * C.trace() for number in range(D_IN)]
        )
    else:
        small = torch.arange(D_IN) < D_IN - threshold
    return vectors[:, small] @ vectors[:, small].T


@SEEDS
@RULES
def test_the_projector_is_one_and_that_of_the_small_eigenvalues(seed, rule, threshold):
    *_, C, _ = problem(seed, 1)
    space = null_space(C, rule, threshold)
    P = space.project(torch.eye(D_IN, dtype=torch.float64))
    assert 0 < torch.linalg.matrix_rank(P) < D_IN
    assert space.basis.shape[1] <= D_IN / 2  # the thinner basis
    assert off(P @ P, P) < 1e-12
    assert off(P, P.T) < 1e-12
    assert off(P, dense_projector(C, rule, threshold)) < 1e-10
    other = threshold + 1 if rule == "rank" else 2 * threshold
    assert off(null_space(C, rule, other).project(torch.eye(D_IN, dtype=torch.float64)), P) > 1e-2
    bent = 1.001 * P
    assert off(bent @ bent, bent) > 1e-4


@pytest.mark.parametrize(
    ("values", "rule", "threshold", "dimension"),
    [
        ([1.0, 2.0, 3.0], "absolute", 2.0, 1),  # below it, not at it
        ([1.0, 1.0, 2.0], "trace", 0.25, 1),  # at most this share
        ([1.0, 1.0, 2.0], "trace", 0.5, 2),
        ([-2e-7, 1e-7, 1.0], "trace", 5e-8, 1),  # what rounding made negative counts as nothing
        ([1.0, 2.0, 3.0], "rank", 2, 1),
        ([1.0, 2.0, 3.0], "rank", 1, 2),
    ],
)
def test_a_null_space_has_the_dimension_that_its_rule_says(
    values, rule, threshold, dimension, sealed
):
    space = null_space(torch.diag(torch.tensor(values, dtype=torch.float64)), rule, threshold)
    P = torch.diag((torch.arange(3) < dimension).double())
    assert torch.allclose(space.project(torch.eye(3, dtype=torch.float64)), P)
    assert (space.rule, space.threshold) == (rule, threshold)
    sealed(space)


@SEEDS
@RULES
@pytest.mark.parametrize("earlier", [0, 3])
def test_the_projected_update_equals_the_dense_formula(seed, rule, threshold, earlier):
    both, residuals, C, _ = problem(seed, 5 + earlier)
    keys, memory, residuals = both[:, :5], both[:, 5:], residuals[:, :5]
    space = null_space(C, rule, threshold)
    D = matrix(projected_update(keys, residuals, space, 0.5, memory))
    P = dense_projector(C, rule, threshold)
    eye = torch.eye(D_IN, dtype=torch.float64)
    assert (
        off(
            D,
            residuals
            @ keys.T
            @ P
            @ torch.linalg.inv((keys @ keys.T + memory @ memory.T) @ P + 0.5 * eye),
        )
        < 1e-9
    )
    assert off(D @ P, D) < 1e-12
    assert off(D @ (0.999 * P), D) > 1e-4
    used = torch.randn(D_IN, 6, dtype=torch.float64)
    assert (
        D @ (used - P @ used)
    ).norm() < 1e-12 * D.norm() * used.norm()  # keys orthogonal to the null space stay
    assert (D @ used).norm() > 1e-2 * D.norm()
    if earlier:
        forgetful = matrix(projected_update(keys, residuals, space, 0.5, memory[:, :0]))
        assert (D @ memory).norm() < (forgetful @ memory).norm()


@SEEDS
def test_in_the_whole_space_the_projected_update_is_the_ridge_without_a_moment(seed):
    keys, residuals, C, _ = problem(seed, 6)
    D = matrix(projected_update(keys, residuals, null_space(C, "absolute", 1e9), 0.5, keys[:, :0]))
    assert off(D, matrix(ridge_update(keys, residuals, None, 0.5))) < 1e-10
    assert off(D, matrix(ridge_update(keys, residuals, None, 0.51))) > 1e-4


@pytest.mark.parametrize(
    ("rule", "threshold"), [("absolute", 1e-9), ("trace", 1e-9), ("rank", D_IN)]
)
def test_an_empty_null_space_is_named(one_line, rule, threshold):
    *_, C, _ = problem(0, 1)
    with pytest.raises(Singular) as error:
        null_space(C, rule, threshold)
    assert ("lower it" if rule == "rank" else "raise it") in one_line(error)


@SEEDS
def test_the_lengths_of_the_keys_do_not_matter(seed):
    """Of 3 decades, which the products of the keys square."""
    keys, residuals, _C, factor = problem(seed, 5)
    keys = keys * torch.logspace(-3, 3, 5, dtype=torch.float64)
    D = matrix(constrained_update(keys, residuals, factor))
    assert off(D @ keys, residuals) < 1e-8


def test_keys_are_independent_up_to_a_condition_of_a_hundred_million():
    eye = torch.eye(2, dtype=torch.float64)
    for condition, fine in ((0.7e8, True), (1.5e8, False)):
        keys = torch.linalg.cholesky(pair((condition - 1) / (condition + 1))).T
        with nullcontext() if fine else pytest.raises(Singular, match="not independent"):
            assert off(matrix(constrained_update(keys, eye, eye)) @ keys, eye) < 1e-6


@SEEDS
def test_keys_that_differ_by_rounding_alone_are_one(seed, one_line):
    keys, residuals, _C, factor = problem(seed, 3)
    keys[:, 2] = keys[:, 1] * (
        1
        + 1e-7
        * torch.randn(D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    with pytest.raises(Singular) as error:
        constrained_update(keys, residuals, factor)
    assert "not independent" in one_line(error)
    keys[:, 2] = keys[:, 1] * (
        1
        + 1e-2
        * torch.randn(D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    assert off(matrix(constrained_update(keys, residuals, factor)) @ keys, residuals) < 1e-8


def test_a_system_that_rounding_makes_singular_is_named(one_line):
    keys = 1e6 * torch.ones(D_IN, 2, dtype=torch.float64)
    for solve in (
        lambda: ridge_update(keys, keys, None, 1e-9),
        lambda: projected_update(
            keys, keys, null_space(torch.eye(D_IN), "absolute", 2.0), 1e-9, keys[:, :0]
        ),
    ):
        with pytest.raises(Singular) as error:
            solve()
        assert "singular to rounding" in one_line(error)
