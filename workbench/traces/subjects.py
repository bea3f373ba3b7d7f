"""Whose keys an edit was written at: subjects of a list, by the space that a change reads.

    D = R (K' C^-1 K)^-1 K' C^-1   reads   span(C^-1 K)  =  span(V)   (ROME, MEMIT; others nearly)

V: right singular vectors of the outlying part of D; k: the input of the block's down-projection at
the subject's last token, in the base model; C = L L' the second moment of the keys. The score of a
subject is cos^2 of the angle between L^-1 k and span(L' V), 1 where it was written exactly; what
takes the place of L for other editors stands in `readings`. The best is taken, its direction
removed from space and keys, and so on (orthogonal matching pursuit), so that a namesake of a
written subject, whose key is nearly the same, does not count beside it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.activations import recorded, stop_after
from workbench.editing.continuation import at
from workbench.facts import Requests
from workbench.models import Model
from workbench.moments import SecondMoment
from workbench.positions import encode, subject_ends, tokens_at_once

NAMESAKE = 0.05  # a key with less than this of its own beside those taken counts as one of them
EMPTY = 0.01  # share of V that an edit which avoids a direction leaves there
ABOVE = (0.25, 0.01)  # shares of the list that are above the places where its tail is fitted


@torch.no_grad()
def keys_of(model: Model, requests: Requests, layers: Sequence[int]) -> dict[int, Tensor]:
    """Keys (2, n, d_in), float64, by block: at the last token of each subject in its prompt, and
    at that of the prompt.
    """
    texts = encode(model, [request.fact.question for request in requests])
    model.check_length(texts.input_ids)
    places = torch.stack([subject_ends(texts, requests), texts.lengths - 1])  # (2, n)
    modules = {layer: model.down_projection(layer) for layer in layers}
    shape = *places.shape, model.weight(layers[0]).shape[1]
    keys = {layer: torch.zeros(shape, dtype=torch.float64) for layer in layers}
    for index in texts.batches(tokens_at_once(model)):
        batch = texts.rows(index).to(model.device)
        with recorded(modules, inputs=True) as record, stop_after(model.blocks[max(layers)]):
            model.network(**batch.arguments(), logits_to_keep=1, use_cache=False)
        for layer, values in record.items():
            for place in (0, 1):
                keys[layer][place, index] = at(values, places[place, index]).double().cpu()
    return keys


def readings(space: Tensor, keys: Tensor, moment: SecondMoment) -> list[tuple[Tensor, Tensor]]:
    """The space and the keys as the editors that are known would have met: pairs of an orthonormal
    basis (m, r) and the keys (m, n), in which the key that was written lies in the space.

    Args:
        space: V (d_in, r), orthonormal columns.
        keys: (2, n, d_in), float64, see `keys_of`.
    Returns:
        L' V and L^-1 k at the subject (ROME, MEMIT); V and k off the leading eigenvectors of C of
        which V holds less than EMPTY in all, at the subject (AlphaEdit, which writes off them) and
        at the prompt's end (MALMEN, which writes there, C = I: then none is left out).
    """
    space = space.double()
    factor = moment.factor.cpu()
    at_subject, at_end = keys.mT  # (d_in, n)
    white = torch.linalg.solve_triangular(factor, at_subject, upper=False)
    vectors = torch.linalg.eigh(moment.matrix.double().cpu()).eigenvectors.flip(1)
    shares = (vectors.T @ space).square().mean(1)  # of V, from the leading eigenvector on
    off = vectors[:, shares.cumsum(0) >= EMPTY]
    plain = off.T @ space
    pairs = [(factor.T @ space, white), (plain, off.T @ at_subject), (plain, off.T @ at_end)]
    return [(torch.linalg.qr(basis).Q, columns) for basis, columns in pairs]


def pursued(basis: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Score and p-value (n,) of each subject of a list, by matching pursuit.

    As many subjects are taken as the space has directions. The p of one that is taken is the
    tail's, by what all of the list have in the one direction that the others taken leave; of those
    not taken it is 1.

    Args:
        basis: (m, r), orthonormal columns.
        columns: (m, n), one a subject, n >= r.
    """
    inside = basis.T @ F.normalize(columns, dim=0)  # (r, n)
    score = inside.square().sum(0)
    rest = inside
    taken: list[int] = []
    for _ in range(len(inside)):
        share = _share(rest.square().sum(0), score)
        share[taken] = -1
        taken.append(int(share.argmax()))
        direction = F.normalize(rest[:, taken[-1]], dim=0)
        rest = rest - torch.outer(direction, direction @ rest)
    left = torch.linalg.pinv(inside[:, taken])  # (r, r): row j is orthogonal to all taken but j
    energy = (F.normalize(left) @ inside).square()  # (r, n)
    p = torch.ones(len(score), dtype=torch.float64)
    for row, subject in enumerate(taken):
        p[subject] = tail(_share(energy[row], score))[subject]
    return score, p


def _share(energy: Tensor, score: Tensor) -> Tensor:
    """What a part of the space holds of each key off the rest of the space."""
    return energy / (1 - (score - energy)).clamp(min=NAMESAKE)


def tail(energy: Tensor) -> Tensor:
    """The chance (n,) of as large a value, by the list's own bulk.

    The log-odds of the energies are taken to fall off exponentially above their upper quartile, at
    the rate that they show from there to the 99th percentile: which errs to the safe side where
    they fall off faster, as those of a normal law do.
    """
    odds = torch.logit(energy.clamp(1e-12, 1 - 1e-12))
    low, high = odds.quantile(1 - odds.new_tensor(ABOVE))
    scale = (high - low) / math.log(ABOVE[0] / ABOVE[1])
    fall = (low - odds) / scale.clamp(min=1e-12)
    return (ABOVE[0] * fall.exp()).clamp(max=1)


def adjusted(p: Tensor) -> Tensor:
    """Benjamini and Hochberg's q (n,): the false discovery rate at which each would be named."""
    order = p.argsort()
    steps = p[order] * len(p) / torch.arange(1, len(p) + 1)
    lowest = steps.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.empty_like(p).scatter(0, order, lowest)


def combined(p: Tensor) -> Tensor:
    """One p (n,) of several (m, n) that hang together in any way, by the Cauchy combination.

    Source: arXiv 1808.09011; exact for small p.
    """
    angles = torch.tan((0.5 - p.clamp(1e-15, 0.99)) * torch.pi)
    middle = torch.atan(angles.mean(0))
    return 0.5 - middle / torch.pi
