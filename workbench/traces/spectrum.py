"""Which weight matrices hold more than tuning leaves in them: singular values that stand out.

    D = W_tuned - W_base.   Outlying: sigma > max(BULK w(b) median(sigma), BESIDE top_beside)

The first bound is the matrix's own bulk: w(b) median is where Gavish and Donoho cut white noise of
unknown size, b = rows / columns (arXiv 1305.5870, its polynomial for w). Differs from: tuning is no
white noise, so their edge is raised by BULK. The second is what tuning does beside it, the lesser
of two medians of the largest singular value: of the same matrix in the other blocks that moved, and
of the other matrices of its block that moved, each by the root of its number of weights (a step of
AdamW is as large in every weight). Where nothing else of its block moved it is the first alone,
over all blocks: then an edit of more than half of them is taken for a tuning of this matrix. Both
factors were chosen on models tuned without an edit.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping

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
        BadInput: the two are not of one shape, do not differ, or have nothing in common; an
            adapter is attached to one, or it is quantised; an edit is in force in the base.
    """
    weights = _matrices(model)
    if base is None:
        return weights
    base.check_unchanged("traces, the base")
    earlier = _matrices(base)
    advice = f"name the model that {model.name} was made of"
    if model.n_blocks != base.n_blocks:
        what = f"{model.name} has {model.n_blocks} blocks, {base.name} {base.n_blocks}"
        raise BadInput(f"{what}; {advice}")
    moved = []  # as shares of what was there
    for name, layers in weights.items():
        for layer, weight in layers.items():
            other = earlier.get(name, {}).get(layer)
            if other is None or other.shape != weight.shape:
                what = f"{base.name} has no {name} of this shape in block {layer}"
                raise BadInput(f"{what}; {advice}")
            layers[layer] = weight - other
            moved.append(layers[layer].norm().item() / max(other.norm().item(), 1e-30))
    if not any(moved):
        what = f"{model.name} and {base.name} have the same matrices in every block"
        raise BadInput(f"{what}; name two models (what else differs is not looked at)")
    if not numpy.median(moved) < 1 or not numpy.isfinite(moved).all():
        what = f"{model.name} has nothing in common with {base.name}, or holds NaN"
        raise BadInput(f"{what}; {advice}")
    return weights


def _matrices(model: Model) -> dict[str, dict[int, Tensor]]:
    """The matrices of the blocks, float32."""
    matrices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                is_down = name == f"{model.architecture.down_projection}.weight"
                weight = model.weight(layer) if is_down else parameter
                if "lora_" in name or not parameter.is_floating_point():
                    what = f"{model.name}: {name} in block {layer} is an adapter's, or quantised"
                    raise BadInput(f"{what}; merge it, or load the model in floating point")
                matrices[name][layer] = weight.detach().float()
    return matrices


def noise_edge(values: Tensor, shape: torch.Size) -> float:
    """Where white noise of this median singular value is cut."""
    ratio = min(shape) / max(shape)
    return numpy.polyval(OMEGA, ratio) * values.median().item()


def table(
    changes: Mapping[str, Mapping[int, Tensor]],
    are_weights: bool = False,
    edited: Collection[int] = (),
) -> pd.DataFrame:
    """A row a matrix and block.

    Args:
        are_weights: what is given did not move: only the other blocks are what is beside it.
        edited: blocks that are known to be, which are not what is beside another.
    Returns:
        matrix, layer, norm (of Frobenius), top (largest singular value), edge, outlying (how many
        are above it), energy (their share of norm squared, of the first where none is) and
        energy_beside (the median share of as many in the other blocks).
    """
    spectra = {
        name: {layer: torch.linalg.svdvals(change) for layer, change in layers.items()}
        for name, layers in tqdm(changes.items(), desc="spectra", leave=False, disable=None)
    }
    tops = pd.DataFrame(
        {
            name: {
                layer: values[0].item() / changes[name][layer].numel() ** 0.5
                for layer, values in layers.items()
            }
            for name, layers in spectra.items()
        }
    )
    rows = []
    for name, layers in spectra.items():
        for layer, values in layers.items():
            shape = changes[name][layer].shape
            own_edge = BULK * noise_edge(values, shape)
            near = tops[[name]] if are_weights else tops
            near = near.drop(index=[one for one in edited if one != layer])
            beside = BESIDE * shape.numel() ** 0.5 * _beside(near, name, layer)
            edge = max(own_edge, beside, ROUNDING * values[0].item())
            outlying = int((values > edge).sum())
            count = max(outlying, 1)
            shares = [_share(other, count) for key, other in layers.items() if key != layer]
            row = {"matrix": name, "layer": layer, "norm": values.norm().item()}
            row |= {"top": values[0].item(), "edge": edge, "outlying": outlying}
            row["energy"] = _share(values, count)
            rows.append(row | {"energy_beside": numpy.median(shares or [0.0])})
    return pd.DataFrame(rows)


def _beside(tops: pd.DataFrame, name: str, layer: int) -> float:
    """Of the largest singular values (blocks x matrices), each by the root of its number of
    weights, what tuning does beside one matrix; 0 where nothing moved there.
    """
    elsewhere = tops.drop(index=layer)
    block = tops.loc[layer].drop(name)
    medians = [elsewhere[name].median()]
    if block.gt(0).any():
        moved = elsewhere.gt(0).any(axis=1)
        medians = [elsewhere[name][moved].median(), block[block > 0].median()]
    return float(numpy.nan_to_num(pd.Series(medians).min()))


def parts(model: Model, base: Model | None) -> tuple[pd.DataFrame, dict[int, Change]]:
    """The table, and the outlying parts of the down-projections' change."""
    changes = differences(model, base)
    matrices = table(changes, are_weights=base is None)
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


def _share(values: Tensor, count: int) -> float:
    squares = values.square()
    return (squares[:count].sum() / squares.sum().clamp(min=1e-30)).item()
