"""Who of a list was written: the subjects whose keys the outlying parts read, judged together."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

import pandas as pd
import torch
from torch import Tensor

from workbench import deltas, moments
from workbench.deltas import Change, WeightDelta
from workbench.facts import Requests
from workbench.models import Model
from workbench.moments import SecondMoment
from workbench.traces import subjects

RATE = 0.05  # false discoveries, of the subjects that are named
FEWEST = 100  # subjects of a list whose bulk can be told from its tail


def fewest(parts: Mapping[int, Change]) -> int:
    """Subjects that a list must have at least: from fewer nobody could be named, however well all
    that stand out fit (see `subjects.combined` and `subjects.adjusted`).
    """
    n = places(parts)
    surest = 2 * min(1.0, 2 / n) if n > 1 else subjects.METRICS * len(parts)  # q, times left out
    return max(FEWEST, n + math.ceil(surest / RATE))


def count(requests: Requests) -> int:
    """Its subjects."""
    return len({request.fact.subject.lower() for request in requests})


def places(parts: Mapping[int, Change]) -> int:
    """The most directions that stand out of one block: so many edits there were."""
    return max((part.right.shape[1] for part in parts.values()), default=0)


def met(
    base: Model, requests: Requests, parts: Mapping[int, Change], corpus: str = ""
) -> tuple[dict[int, Tensor], dict[int, SecondMoment]]:
    """What `scored` needs of the unedited model, by block of the parts: keys (2, n, d_in), see
    `subjects.keys_of`, and second moments. At the subject they are those that an editor meets which
    writes one block after the other, with the parts of the earlier ones in force.
    """
    if not parts:
        return {}, {}
    layers = sorted(parts)
    keys = subjects.keys_of(base, requests, layers)
    with written_into(base, parts):
        changed = subjects.keys_of(base, requests, layers)
    keys = {layer: torch.stack([changed[layer][0], keys[layer][1]]) for layer in layers}
    return keys, moments.second_moments(base, layers, corpus)


def written_into(base: Model, parts: Mapping[int, Change]) -> AbstractContextManager[Model]:
    """The unedited model with these parts of its down-projections' change."""
    changes = {base.down_projection_name(layer): part for layer, part in parts.items()}
    return deltas.applied(base, WeightDelta.of(base, changes=changes))


def scored(
    requests: Requests, parts: dict[int, Change], readings: list[tuple[Tensor, Tensor]]
) -> pd.DataFrame:
    """The list with layer, score, p, q and written, and the subject's p; nobody is written where
    nothing is read.
    """
    table = pd.DataFrame({"fact_id": [request.fact.id for request in requests]})
    table["subject"] = [request.fact.subject for request in requests]
    table = table.assign(layer=-1, score=0.0, p=1.0, q=1.0, written=False)
    if not readings:
        return table
    layers = sorted(parts)
    names = torch.tensor(pd.factorize(table.subject.str.lower())[0])
    pairs = [subjects.pursued(*reading, names) for reading in readings]
    scores, chances = map(torch.stack, zip(*pairs, strict=True))  # (m, n)
    best = chances.min(0).indices
    table["layer"] = [layers[index * len(layers) // len(readings)] for index in best.tolist()]
    table["score"] = scores.gather(0, best[None])[0].numpy()
    table["p"] = subjects.combined(chances, names, places(parts)).numpy()
    p = of_subjects(table)
    adjusted = subjects.adjusted(torch.tensor(p.to_numpy()), places(parts))
    q = pd.Series(adjusted.numpy(), p.index)
    table["q"] = table.subject.str.lower().map(q)
    return table.assign(written=table.q <= RATE)


def readings_of(
    parts: dict[int, Change], keys: dict[int, Tensor], seconds: dict[int, SecondMoment]
) -> list[tuple[Tensor, Tensor]]:
    """Those of `subjects.readings`, block by block."""
    readings = []
    for layer in sorted(parts):
        readings += subjects.readings(parts[layer].right.cpu(), keys[layer], seconds[layer])
    return readings


def of_subjects(table: pd.DataFrame) -> pd.Series:
    """The p of each subject, by its name in small letters: of several facts the least, since it is
    that of the list's best.
    """
    return table.groupby(table.subject.str.lower()).p.min()
