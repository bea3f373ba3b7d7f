"""Which weight matrices hold more than tuning leaves in them: singular values that stand out.

    D = W_tuned - W_base.   Outlying: sigma > max(BULK w(b) median(sigma), BESIDE median_l'(top))

The first bound is the matrix's own bulk: w(b) median is where Gavish and Donoho cut white noise of
unknown size, b = rows / columns (arXiv 1305.5870, its polynomial for w). Differs from: tuning is no
white noise, so their edge is raised by BULK. The second is the median, over the other blocks, of
the same matrix's largest singular value. Both factors were chosen on models tuned without an edit.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.deltas import Change
from workbench.models import Model
from workbench.records import BadInput

OMEGA = (0.56, -0.95, 1.82, 1.43)
BULK = 8.0
BESIDE = 3.0
ROUNDING = 1e-5  # of the largest singular value, below which float32 weights say nothing


def differences(model: Model, base: Model | None) -> dict[str, dict[int, Tensor]]:
    """D of every matrix in a block, by its name in the block and the block: as it is stored, but
    for down-projections, (d_out, d_in). Without a base the weights themselves.

    Raises:
        BadInput: the two are not of one shape, or do not differ.
    """
    weights = _matrices(model)
    if base is None:
        return weights
    earlier = _matrices(base)
    for name, layers in weights.items():
        for layer, weight in layers.items():
            other = earlier.get(name, {}).get(layer)
            if other is None or other.shape != weight.shape:
                what = f"{base.name} has no {name} of this shape in block {layer}"
                raise BadInput(f"{what}; name the model that {model.name} was made of")
            layers[layer] = weight - other
    if not any(change.any() for layers in weights.values() for change in layers.values()):
        raise BadInput(f"{model.name} and {base.name} have the same weights; name two models")
    return weights


def _matrices(model: Model) -> dict[str, dict[int, Tensor]]:
    """The matrices of the blocks, float32."""
    matrices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                is_down = name == f"{model.architecture.down_projection}.weight"
                weight = model.weight(layer) if is_down else parameter
                matrices[name][layer] = weight.detach().float()
    return matrices


def noise_edge(values: Tensor, shape: torch.Size) -> float:
    """Where white noise of this median singular value is cut."""
    ratio = min(shape) / max(shape)
    return numpy.polyval(OMEGA, ratio) * values.median().item()


def table(changes: Mapping[str, Mapping[int, Tensor]]) -> pd.DataFrame:
    """A row a matrix and block.

    Returns:
        matrix, layer, norm (of Frobenius), top (largest singular value), edge, outlying (how many
        are above it), energy (their share of norm squared, of the first where none is) and
        energy_beside (the median share of as many in the other blocks).
    """
    rows = []
    for name, layers in tqdm(changes.items(), desc="spectra", leave=False, disable=None):
        spectra = {layer: torch.linalg.svdvals(change) for layer, change in layers.items()}
        for layer, values in spectra.items():
            beside = [other for key, other in spectra.items() if key != layer] or [values * 0]
            tops = torch.stack([other[0] for other in beside])
            own_edge = BULK * noise_edge(values, layers[layer].shape)
            rounding = ROUNDING * values[0].item()
            edge = max(own_edge, BESIDE * tops.median().item(), rounding)
            outlying = int((values > edge).sum())
            count = max(outlying, 1)
            shares = torch.stack([_share(other, count) for other in beside])
            row = {"matrix": name, "layer": layer, "norm": values.norm().item()}
            row |= {"top": values[0].item(), "edge": edge, "outlying": outlying}
            row["energy"] = _share(values, count).item()
            rows.append(row | {"energy_beside": shares.median().item()})
    return pd.DataFrame(rows)


def parts(model: Model, base: Model | None) -> tuple[pd.DataFrame, dict[int, Change]]:
    """The table, and the outlying parts of the down-projections' change."""
    changes = differences(model, base)
    matrices = table(changes)
    down = f"{model.architecture.down_projection}.weight"
    return matrices, outlying(changes[down], matrices[matrices.matrix == down])


def outlying(changes: Mapping[int, Tensor], rows: pd.DataFrame) -> dict[int, Change]:
    """Of each block whose matrix stands out, by its row of the table, the outlying part of its
    change (d_out, d_in): left (d_out, r) holds U_r S_r, right (d_in, r) V_r.
    """
    standing = {}
    for row in rows[rows.outlying > 0].itertuples():
        left, values, right = torch.linalg.svd(changes[row.layer], full_matrices=False)
        kept = slice(row.outlying)
        standing[row.layer] = Change(left=left[:, kept] * values[kept], right=right[kept].T)
    return standing


def _share(values: Tensor, count: int) -> Tensor:
    squares = values.square()
    return squares[:count].sum() / squares.sum().clamp(min=1e-30)
