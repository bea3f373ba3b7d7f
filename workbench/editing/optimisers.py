"""What moves the shifts of n requests, each by its own loss: Adam, and L-BFGS in a trust region.

Both work row by row: a request gets the shift it would get alone. An optimiser holds the `shift`
(n, d) at which the loss is read next. With `index` (m,) the requests that still move, `loss` (m,)
and its `gradient` (m, d) at their shifts, `kept` says whether each now stands where it was read,
(m,) bool, and `step` moves the shifts of these and no others. No shift is longer than its `bound`
(n,).
"""

import torch
from torch import Tensor


class Adam:
    """Adam; every step is kept. A shift beyond the bound is scaled back to it."""

    def __init__(self, bound: Tensor, width: int, rate: float):
        self.shift = torch.zeros(len(bound), width, device=bound.device)
        self.bound = bound
        self.adam = torch.optim.Adam([self.shift], lr=rate)

    def kept(self, index: Tensor, loss: Tensor) -> Tensor:
        return torch.ones_like(loss, dtype=torch.bool)

    def step(self, index: Tensor, loss: Tensor, gradient: Tensor) -> None:
        before = self.shift.clone()
        self.shift.grad = torch.zeros_like(before).index_copy(0, index, gradient)
        self.adam.step()
        moved = shortened(self.shift[index], self.bound[index])
        self.shift.copy_(before.index_copy(0, index, moved))


class LBFGS:
    """L-BFGS without a line search: a step is no longer than a radius and kept if the loss falls.

    With H the two-loop recursion's inverse Hessian from the last `HISTORY` pairs (s, y) of steps
    and changes of the gradient, from the best shift so far

        d = -H g,   shift = best + d min(1, radius / |d|)

    Each radius starts at `widest`; after a step s of no use it is `SHRINK` |s|, and `widest` again
    once the loss has fallen. A pair is taken where s'y > 0, of steps that were not kept too. The
    recursion starts from the diagonal matrix D (s'y) / (y'Dy) of the newest pair, with

        D = 1 / (|g_0| + EVEN mean |g_0|),   g_0 the first gradient

    and without a pair from D times as much as makes the step a radius long. D spreads the shift
    over the coordinates, as Adam does; with D = I a few of steep gradient take most of it. At the
    bound g and d are without what leads beyond it.

    Source: Liu and Nocedal 1989; Nocedal and Wright, Numerical Optimization, algorithm 7.4. Differs
    from: the radius in place of a line search, so that each step is one evaluation for all; D; the
    bound.
    """

    HISTORY = 6
    SHRINK = 0.35
    EVEN = 0.3

    def __init__(self, bound: Tensor, width: int, widest: Tensor):
        n = len(bound)
        self.shift = bound.new_zeros(n, width)
        self.bound = bound
        self.widest = widest  # (n,)
        self.radius = widest.clone()
        self.best = torch.zeros_like(self.shift)
        self.loss = torch.full_like(bound, torch.inf)  # there, with its gradient
        self.gradient = torch.zeros_like(self.shift)
        self.spread = torch.zeros_like(self.shift)  # D; 0 before the first gradient
        self.s = bound.new_zeros(self.HISTORY, n, width)  # the newest last
        self.y = torch.zeros_like(self.s)
        self.curvature = torch.full_like(self.s[..., 0], torch.inf)  # s'y; of no pair infinite

    def kept(self, index: Tensor, loss: Tensor) -> Tensor:
        return loss < self.loss[index]

    def step(self, index: Tensor, loss: Tensor, gradient: Tensor) -> None:
        s = self.shift[index] - self.best[index]
        gradient = -tangent(-gradient, self.shift[index], self.bound[index])
        self._remember(index, s, gradient - self.gradient[index])
        self._scale(index, gradient)
        kept = self.kept(index, loss)
        self.radius[index] = torch.where(kept, self.widest[index], self.SHRINK * s.norm(dim=1))
        better = index[kept]
        self.best[better] = self.shift[better]
        self.loss[better] = loss[kept]
        self.gradient[better] = gradient[kept]
        direction = tangent(self._direction(index), self.best[index], self.bound[index])
        moved = self.best[index] + shortened(direction, self.radius[index])
        self.shift[index] = shortened(moved, self.bound[index])

    def _scale(self, index: Tensor, gradient: Tensor) -> None:
        """D of those whose first gradient this is."""
        first = self.loss[index].isinf()
        steepness = gradient[first].abs()
        mean = steepness.mean(1, keepdim=True).clamp(min=1e-12)
        self.spread[index[first]] = 1 / (steepness + self.EVEN * mean)

    def _remember(self, index: Tensor, s: Tensor, y: Tensor) -> None:
        """Pairs (m, d) along which the gradient grows; each drops the oldest of its request."""
        curvature = (s * y).sum(1)
        grows = curvature > 0
        index = index[grows]
        pairs = ((self.s, s), (self.y, y), (self.curvature, curvature))
        for history, newest in pairs:
            history[:-1, index] = history[1:, index]
            history[-1, index] = newest[grows]

    def _direction(self, index: Tensor) -> Tensor:
        """-H g (m, d) by the two-loop recursion."""
        s = self.s[:, index]
        y = self.y[:, index]
        curvature = self.curvature[:, index, None]
        direction = -self.gradient[index]
        along = []
        for number in reversed(range(self.HISTORY)):
            share = (s[number] * direction).sum(1, keepdim=True) / curvature[number]
            direction = direction - share * y[number]
            along.append(share)
        direction = direction * self.spread[index]
        length = direction.norm(dim=1).clamp(min=1e-12)
        first = self.radius[index] / length
        squared = y[-1].square() * self.spread[index]
        newest = curvature[-1] / squared.sum(1, keepdim=True)
        direction = direction * torch.where(curvature[-1].isinf(), first[:, None], newest)
        for number, share in enumerate(reversed(along)):
            again = (y[number] * direction).sum(1, keepdim=True) / curvature[number]
            direction = direction + (share - again) * s[number]
        return direction


def shortened(vectors: Tensor, bound: Tensor) -> Tensor:
    """Vectors (m, d), those longer than their bound (m,) scaled back to it."""
    share = bound / vectors.norm(dim=1).clamp(min=1e-12)
    return vectors * share.clamp(max=1)[:, None]


def tangent(vectors: Tensor, shift: Tensor, bound: Tensor) -> Tensor:
    """Vectors (m, d) at shifts (m, d), without what leads beyond the bound (m,) those that are
    there.
    """
    norm = shift.norm(dim=1).clamp(min=1e-12)
    outward = shift / norm[:, None]
    beyond = (vectors * outward).sum(1).clamp(min=0) * (norm > 0.999 * bound)
    return vectors - beyond[:, None] * outward
