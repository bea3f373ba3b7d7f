"""The weight updates as linear algebra. Tensors in, tensors out; no model.

Shapes: W (d_out, d_in) maps keys to values; column j of K (d_in, n) is the key of request j, column j of R (d_out, n) what W k_j
must still gain; C (d_in, d_in) is the uncentred second moment E[k k'] of the keys.
"""

import torch


class Singular(ValueError):
    """A linear system has no single solution. The message says which and what to do."""


def factorised(matrix: torch.Tensor, what: str = "the second moment of the keys") -> torch.Tensor:
    """Lower Cholesky factor (d, d), float64, of a symmetric positive definite matrix."""
    if not torch.isfinite(matrix).all():
        raise Singular(f"{what} holds NaN or infinite numbers; look for overflow in the activations (load the model in float32)")
    factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if failed or (factor.diagonal() ** 2 <= 1e-11 * matrix.diagonal()).any():  # a pivot this small is nothing but rounding
        raise Singular(f"{what} is singular (rank below {len(matrix)}); collect it from more tokens, at least its width")
    return factor


def constrained_update(keys: torch.Tensor, residuals: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest change that moves every key by exactly its residual.

    D = R (K' C^-1 K)^-1 (C^-1 K)', the minimiser of tr(D C D') with D K = R. With one key it is ROME's
    D = r (C^-1 k)' / (k' C^-1 k).

    Args:
        keys: K (d_in, n), float64, n <= d_in, columns independent.
        residuals: R (d_out, n), float64.
        factor: Cholesky factor of C (d_in, d_in), float64.
    Returns:
        Factors (left, right) of D = left @ right.T: left (d_out, n), right (d_in, n), float64.
    Raises:
        Singular: keys depend on each other (two requests of one subject, say).
    Source: ROME, arXiv 2202.05262, eq. 2; the batched form is EMMET, arXiv 2403.14236. Differs from: one key throughout, no division
    by a different key's product.
    """
    whitened = torch.cholesky_solve(keys, factor)  # C^-1 K, (d_in, n)
    gram = keys.T @ whitened  # (n, n)
    scale = gram.diagonal().rsqrt()
    solved, failed = torch.linalg.solve_ex(gram, residuals.T)
    if failed or not torch.linalg.cond(scale[:, None] * gram * scale) < 1e14:  # cosines: the lengths of the keys do not matter
        raise Singular(f"the {keys.shape[1]} keys are not independent; edit facts of one subject one after another")
    return solved.T, whitened


def ridge_update(keys: torch.Tensor, residuals: torch.Tensor, factor: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest change of a linear map that moves the keys by the residuals, as far as it pays.

    D = R K' (w C + K K')^-1, the minimiser of w tr(D C D') + |R - D K|^2; by Woodbury D = R (w I + K' C^-1 K)^-1 (C^-1 K)'.

    Args:
        keys: K (d_in, n), float64.
        residuals: R (d_out, n), float64.
        factor: Cholesky factor of C, float64.
        weight: w > 0, tokens: how many corpus tokens a request must outweigh.
    Returns:
        Factors (left, right) of D = left @ right.T, float64.
    Source: MEMIT, arXiv 2210.07229, eq. 14. Differs from: solved in the dual, so the cost grows with n, not with d_in.
    """
    if not weight > 0:
        raise ValueError(f"weight {weight}: must be > 0")
    whitened = torch.cholesky_solve(keys, factor)
    gram = keys.T @ whitened
    gram.diagonal().add_(weight)
    return torch.cholesky_solve(residuals.T.contiguous(), torch.linalg.cholesky(gram)).T, whitened
