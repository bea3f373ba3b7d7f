"""The weight updates as linear algebra. Tensors in, tensors out; no model.

Shapes: W (d_out, d_in) maps keys to values; column j of K (d_in, n) is the key of request j, column
j of R (d_out, n) what W k_j must still gain; C (d_in, d_in) is the uncentred second moment E[k k']
of the keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAME_KEY = 1e-6  # of 1 - cosine; in float32 one text's key, run in two batches, differs by 1e-13
PIVOT = 4  # roundings of the largest product; doubled keys leave a pivot of less than two


class Singular(ValueError):
    """A linear system has no single solution. The message says which and what to do."""


class Factors(NamedTuple):
    """A change D = left @ right.T, of left (d_out, n) and right (d_in, n)."""

    left: Tensor
    right: Tensor


def factorised(matrix: Tensor, what: str = "the second moment of the keys") -> Tensor:
    """Lower Cholesky factor (d, d), float64, of a symmetric positive definite matrix.

    Raises:
        Singular: the matrix is not finite, or its rank is below d.
    """
    _check_finite(matrix, what)
    cholesky = torch.linalg.cholesky_ex(matrix.double())
    rounding = cholesky.L.diagonal() ** 2 <= 1e-11 * matrix.diagonal()  # pivots that are no more
    if cholesky.info or rounding.any():
        remedy = "collect it from more tokens, at least its width"
        if unused := int((matrix.diagonal() == 0).sum()):
            remedy = f"{unused} of its directions are never used, choose another layer"
        raise Singular(f"{what} is singular (rank below {len(matrix)}); {remedy}")
    return cholesky.L


def _check_finite(matrix: Tensor, what: str) -> None:
    if not torch.isfinite(matrix).all():
        raise Singular(f"{what} holds NaN or infinite numbers; load the model in float32")


def constrained_update(
    keys: Tensor, residuals: Tensor, factor: Tensor | None, at: Tensor | None = None
) -> Factors:
    """Smallest change that moves every key by exactly its residual.

    D = R (K' C^-1 K)^-1 (C^-1 K)', the minimiser of tr(D C D') with D K = R. With one key it is
    ROME's D = r (C^-1 k)' / (k' C^-1 k).

    Args:
        keys: K (d_in, n), float64, n <= d_in, columns independent.
        residuals: R (d_out, n), float64.
        factor: Cholesky factor of C (d_in, d_in), float64; None = the identity.
        at: (d_in, n) where D is to give the residuals exactly, D at = R, if not at K.
    Returns:
        left (d_out, n) and right (d_in, n), float64.
    Raises:
        Singular: keys depend on each other (two requests of one subject, say).
    Source: ROME, arXiv 2202.05262, eq. 2; the batched form is EMMET, arXiv 2403.14236. Differs
    from: one key throughout, no division by a different key's product.
    """
    whitened = _whitened(keys, factor)
    at = keys if at is None else at
    gram = at.T @ whitened  # (n, n)
    # Keys are compared by direction; float32 keys that differ by rounding alone are one.
    scale = gram.diagonal().abs().rsqrt()
    cosines = scale[:, None] * gram * scale
    solution = torch.linalg.solve_ex(gram, residuals.T)
    if solution.info or not torch.linalg.cond(cosines) < 1e8:
        count = keys.shape[1]
        raise Singular(f"the {count} keys are not independent; edit facts of a subject one by one")
    return Factors(solution.result.T, whitened)


def parallel_keys(
    keys: Tensor, apart: float = SAME_KEY, at_once: int = 1024
) -> tuple[int, int] | None:
    """The first two keys (columns of K, (d_in, n)) that are one but for their length and rounding;
    None if there are none.
    """
    unit = keys / keys.norm(dim=0).clamp(min=torch.finfo(keys.dtype).tiny)
    for start in range(0, unit.shape[1], at_once):
        cosines = unit[:, start : start + at_once].T @ unit
        earlier = cosines.tril(start - 1)  # each key with those before it
        pairs = (earlier > 1 - apart).nonzero()
        if len(pairs):
            return int(pairs[0, 1]), start + int(pairs[0, 0])
    return None


def ridge_update(
    keys: Tensor, residuals: Tensor, factor: Tensor | None, weight: float | Tensor
) -> Factors:
    """Smallest change of a linear map that moves the keys by the residuals, as far as it pays.

    D = R K' (w C + K K')^-1, the minimiser of w tr(D C D') + |R - D K|^2; by Woodbury D = R (w I +
    K' C^-1 K)^-1 (C^-1 K)'.

    Args:
        keys: K (d_in, n).
        residuals: R (d_out, n).
        factor: Cholesky factor of C, float64; None = the identity, MALMEN's C.
        weight: w > 0, tokens: how many corpus tokens a request must outweigh.
    Returns:
        left and right of the dtype of the keys; differentiable in keys, residuals and weight.
    Source: MEMIT, arXiv 2210.07229, eq. 14; MALMEN, arXiv 2311.04661. Differs from: solved in the
    dual, so the cost grows with n, not with d_in.
    """
    if not weight > 0:
        raise ValueError(f"weight {weight}: must be > 0")
    whitened = _whitened(keys, factor)
    identity = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
    gram = keys.T @ whitened + weight * identity  # (n, n)
    solution = torch.cholesky_solve(residuals.T.contiguous(), _lower(gram))
    return Factors(solution.T, whitened)


def _whitened(keys: Tensor, factor: Tensor | None) -> Tensor:
    """C^-1 K (d_in, n)."""
    return keys if factor is None else torch.cholesky_solve(keys, factor)


def _lower(gram: Tensor) -> Tensor:
    """Cholesky factor of the system of n keys, (n, n)."""
    cholesky = torch.linalg.cholesky_ex(gram)
    pivots = cholesky.L.diagonal().square()
    # A pivot that is rounding alone has either sign: of doubled keys a third pass for regular.
    if cholesky.info or pivots.min() <= PIVOT * torch.finfo(gram.dtype).eps * gram.diagonal().max():
        raise Singular(f"{len(gram)} keys are singular to rounding; edit fewer facts at once")
    return cholesky.L


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    """A subspace by the thinner of two orthonormal bases (d_in, r): its own, or that of its
    `complement`.
    """

    basis: Tensor
    complement: bool
    rule: str
    threshold: float

    def project(self, vectors: Tensor) -> Tensor:
        """P X of vectors X (d_in, n)."""
        along = self.basis @ (self.basis.T @ vectors)
        return vectors - along if self.complement else along


def null_space(moment: Tensor, rule: str, threshold: float) -> NullSpace:
    """The directions that the corpus hardly uses: eigenvectors of C with small eigenvalues.

    Args:
        moment: C (d_in, d_in).
        rule: "absolute": eigenvalues below the threshold (depends on the scale of the keys);
            "trace": the smallest ones that together hold at most this share of the trace; "rank":
            all but the so many largest.
    Raises:
        Singular: nothing is below the threshold, or C is not finite.
    """
    _check_finite(moment, "the second moment")
    spectrum = torch.linalg.eigh(moment.double())
    values = spectrum.eigenvalues.clamp(min=0)  # ascending
    sizes = {
        "absolute": (values < threshold).sum(),
        "trace": (values.cumsum(0) <= threshold * values.sum()).sum(),
        "rank": len(values) - int(threshold),
    }
    size = int(sizes[rule])
    if size <= 0:
        change = "lower" if rule == "rank" else "raise"
        problem = f"no eigenvalue of the second moment is left by threshold {threshold}"
        raise Singular(f"{problem} ({rule}; the smallest is {values[0]:.2g}); {change} it")
    complement = len(values) - size < size
    half = slice(size, None) if complement else slice(size)
    basis = spectrum.eigenvectors[:, half].contiguous()
    return NullSpace(basis=basis, complement=complement, rule=rule, threshold=threshold)


def projected_update(
    keys: Tensor, residuals: Tensor, space: NullSpace, ridge: float, memory: Tensor
) -> Factors:
    """Smallest change within a subspace that moves the keys by the residuals and earlier keys by
    nothing, as far as it pays.

    D = R K' P ((K K' + Kp Kp') P + a I)^-1, the minimiser over D = D P of |R - D K|^2 + |D Kp|^2 +
    a |D|^2; with A = P [K Kp], D = R E' (A'A + a I)^-1 A', E the first n columns of the identity.

    Args:
        keys: K (d_in, n), float64.
        residuals: R (d_out, n), float64.
        space: of P.
        ridge: a > 0.
        memory: Kp (d_in, m), keys of earlier edits; m may be 0.
    Returns:
        left and right, float64.
    Source: AlphaEdit, arXiv 2410.02355, eq. 14. Differs from: solved in the dual.
    """
    projected = space.project(torch.cat([keys, memory], 1))  # A (d_in, n + m)
    gram = projected.T @ projected
    gram.diagonal().add_(ridge)
    first = torch.eye(len(gram), keys.shape[1], dtype=gram.dtype, device=gram.device)  # E
    return Factors(residuals, projected @ torch.cholesky_solve(first, _lower(gram)))
