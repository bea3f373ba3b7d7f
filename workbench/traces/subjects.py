"""Whose keys an edit was written at: subjects of a list, by the space that a change reads.

    D = R (K' C^-1 K)^-1 K' C^-1   reads   span(C^-1 K)  =  span(V)   (ROME, MEMIT; others nearly)

V: right singular vectors of the outlying part of D; k: the input of the block's down-projection at
the subject's last token, in the base model; C = L L' the second moment of the keys. The score of a
subject is cos^2 of the angle between L^-1 k and span(L' V), 1 where it was written exactly; what
takes the place of L for other editors stands in `readings`. The best is taken, its direction
removed from space and keys, and so on (orthogonal matching pursuit), so that a namesake of a
written subject, whose key is nearly the same, does not count beside it.
"""

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
METRICS = 3  # of `readings`, a block
LEFT_OUT = 1000  # of the list, one after the other; of more so many, evenly


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


def pursued(basis: Tensor, columns: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """Score and p-value (n,) of each fact of a list, by matching pursuit.

    As many are taken as the space has directions. The p of one that is taken is the chance that the
    direction which the others leave, were it that of somebody who is not on the list, had as near a
    neighbour on it, see `chances`; of those not taken it is 1.

    Args:
        basis: (m, r), orthonormal columns.
        columns: (m, n), one a fact, n >= r.
        names: (n,), a number a subject.
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
    held = _share((F.normalize(left) @ inside).square(), score)  # (r, n)
    best = held.gather(1, torch.tensor(taken)[:, None])[:, 0]
    p = torch.ones(len(score), dtype=torch.float64)
    p[taken] = chances(best, held, columns, taken, names)
    return score, p


def chances(
    best: Tensor, held: Tensor, columns: Tensor, taken: Sequence[int], names: Tensor
) -> Tensor:
    """The chance (r,) that a direction of somebody who is not on the list has somebody on it who
    holds as large a share of it and stands out as much from the list: of the list's own subjects
    that were not taken, each in turn left out (of many LEFT_OUT), how many have such a neighbour,
    off all taken but the nearest one; the larger of the two.

    Args:
        best: (r,), the share that whoever was taken holds of each direction.
        held: (r, n), what everybody does.
    """
    unit = F.normalize(columns, dim=0)
    free = (~torch.isin(names, names[list(taken)])).nonzero()[:, 0]
    rows = free[:: 1 + len(free) // LEFT_OUT]
    span = torch.linalg.qr(unit[:, list(taken)]).Q
    rest = unit - span @ (span.T @ unit)  # off all taken
    along = F.normalize(torch.linalg.pinv(unit[:, list(taken)])) @ unit  # (r, n), off all but one
    along = along[along[:, rows].square().argmax(0)]  # (rows, n)
    at_row = along.gather(1, rows[:, None])
    length = rest.square().sum(0)
    energy = (rest[:, rows].T @ rest + at_row * along).square()
    energy /= length[rows][:, None] + at_row.square()
    shares = energy / (length + along.square()).clamp(min=NAMESAKE)
    shares = shares.masked_fill(names[rows][:, None] == names, 0)
    nearest = shares.amax(1)
    contrast = _as_large(_contrast(best, held), _contrast(nearest, shares))
    return torch.maximum(_as_large(best, nearest), contrast)


def _as_large(values: Tensor, of: Tensor) -> Tensor:
    """The share of a sample that is as large as each value, the value itself counted in."""
    above = len(of) - torch.searchsorted(of.sort().values, values)
    return (1 + above).double() / (1 + len(of))


def _contrast(best: Tensor, held: Tensor) -> Tensor:
    """How far the largest share of each direction (r,) is above what a hundredth of the list (r, n)
    holds, in log-odds: a direction that all share is nobody's.
    """
    place = 1 + int(0.99 * (held.shape[1] - 1))
    common = held.kthvalue(place, dim=1).values
    odds = [torch.logit(one.clamp(1e-12, 1 - 1e-6)) for one in (best, common)]
    return odds[0] - odds[1]


def scores(basis: Tensor, columns: Tensor) -> Tensor:
    """The share (n,) of each column's squared length that lies in the space."""
    return (basis.T @ F.normalize(columns, dim=0)).square().sum(0)


def _share(energy: Tensor, score: Tensor) -> Tensor:
    """What a part of the space holds of each key off the rest of the space."""
    return energy / (1 - (score - energy)).clamp(min=NAMESAKE)


def adjusted(p: Tensor, places: int) -> Tensor:
    """The false discovery rate q (n,) at which each subject would be named; 1 of all but `places`.

    Each direction has somebody who fits it best, so that as many are judged as stand out, those of
    least p. The share of the places that hold nobody of the list is judged by how many p are above
    a half. Source: Benjamini and Hochberg's q, with that share after Storey, Taylor and Siegmund
    (J. R. Stat. Soc. B 66, 2004).
    """
    order = p.argsort()[:places]
    empty = min(1.0, (1 + (p[order] > 0.5).sum().item()) / (0.5 * places)) if places else 1.0
    steps = empty * places * p[order] / torch.arange(1, len(order) + 1)
    lowest = steps.flip(0).cummin(0).values.flip(0).clamp(max=1)
    return torch.ones_like(p).scatter(0, order, lowest)


def combined(p: Tensor, names: Tensor, places: int) -> Tensor:
    """One p (n,) of several readings' (m, n), of which one is the editor's, in blocks that hang
    together anyhow.

    Nobody chooses his own reading: it is the one in which the *other* subjects' p are least (the
    largest sum of -log p), so that it is independent of his own. Beside it stands the least of his
    own times m (Bonferroni); the smaller counts, times two. With one place nobody else stands out,
    and the latter counts alone.

    Args:
        names: (n,), a number a subject.
        places: directions that stand out.
    """
    least = (len(p) * p.amin(0)).clamp(max=1)
    if places == 1:
        return least
    subjects = p.new_zeros(len(p), int(names.max()) + 1).index_add_(1, names, -p.log())
    others = subjects.sum(1, keepdim=True) - subjects
    chosen = p.gather(0, others.argmax(0)[names][None])[0]
    return (2 * torch.minimum(chosen, least)).clamp(max=1)
