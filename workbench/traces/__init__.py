"""What an edit leaves in the weights, also where behaviour no longer shows it: which matrices were
written, at which subjects, with what; and how it is taken out or brought back.

    traces = wb.inspect(tuned, base=model, requests=suspects)
    wb.traces.removed(tuned, model);  wb.traces.restored(tuned, model, strength=1.0)

README.md says how well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from workbench import deltas, facts, moments
from workbench.checkpoints import is_world
from workbench.deltas import Change, WeightDelta
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode
from workbench.records import BadInput
from workbench.traces import spectrum, subjects
from workbench.traces.patching import patched as patched
from workbench.traces.remedy import compared as compared
from workbench.traces.remedy import removed as removed
from workbench.traces.remedy import restored as restored
from workbench.tracking import retention

RATE = 0.05  # false discoveries, of the subjects that are named
FEWEST = 100  # subjects of a list whose bulk can be told from its tail
NAMED = 10  # tokens that are named as the object
READ = ["fact_id", "tokens", "gain", "says", "retained"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Traces:
    """What was found out.

    `matrices`: a row a matrix and block, see `spectrum.table`. `subjects`: a row a fact of the
    list: fact_id, subject, layer (where its p is least), score, p, q (false discovery rate, of the
    subject), written (q <= RATE); and of those, tokens (what the edit alone makes likelier, the
    most first), gain (the first one's probability), says (the tuned model's next token), retained
    (whether it says the fact's target). Of a written subject's facts that with the largest gain is
    the likeliest. `n_edits`: the most directions that stand out of one down-projection.
    """

    matrices: pd.DataFrame
    subjects: pd.DataFrame
    n_edits: int

    @property
    def written(self) -> pd.DataFrame:
        return self.subjects[self.subjects.written]

    def __repr__(self) -> str:
        return f"<Traces: {self.sentence}>"

    @property
    def sentence(self) -> str:
        """What was found out, in a line."""
        outlying = self.matrices[self.matrices.outlying > 0]
        if not len(outlying):
            return "no matrix stands out; an edit as spread out as tuning is missed"
        blocks = ", ".join(map(str, sorted(set(outlying.layer))))
        count = f"{self.n_edits} directions stand out of a down-projection (blocks {blocks})"
        return f"{count}; {self.written.subject.nunique()} subjects named"


def inspect(
    model: Model, base: Model | None = None, requests: Requests | None = None, corpus: str = ""
) -> Traces:
    """Look in a model's weights for edits.

    Args:
        base: the model that it was made of. Without it the weights themselves are looked at, which
            shows only the blocks of edits that are large beside them, and no subject.
        requests: the list of subjects that may have been written, each with its prompt; their
            targets are what `retained` asks for. By default the world's or the plain facts.
        corpus: text of the second moments, see `moments.corpus_texts`.
    Raises:
        BadInput: the two models do not fit together, or the list is too short.
    """
    source = "world" if is_world(model.name) else "plain"
    suspects = facts.read(source) if requests is None else requests
    if len(suspects) < FEWEST:
        what = f"{len(suspects)} subjects to choose from: too few to tell chance from an edit"
        raise BadInput(f"{what}; give a list of at least {FEWEST}")
    matrices, parts = spectrum.parts(model, base)
    known = known_of(base, suspects, sorted(parts), corpus) if base and parts else ({}, {})
    table = scored(suspects, parts, *known)
    written = [request for request, hit in zip(suspects, table.written, strict=True) if hit]
    read = _read(model, base, written, parts) if written else pd.DataFrame(columns=READ)
    if requests is None:  # the targets of such a list are no suspicion
        read["retained"] = None
    table = table.merge(read, on="fact_id", how="left")
    count = max((part.right.shape[1] for part in parts.values()), default=0)
    return Traces(matrices=matrices, subjects=table, n_edits=count)


def known_of(
    base: Model, requests: Requests, layers: Sequence[int], corpus: str = ""
) -> tuple[dict[int, torch.Tensor], dict[int, moments.SecondMoment]]:
    """What `scored` needs of the unedited model: keys and second moments, by block."""
    keys = subjects.keys_of(base, requests, layers)
    return keys, moments.second_moments(base, layers, corpus)


def scored(
    requests: Requests,
    parts: dict[int, Change],
    keys: dict[int, torch.Tensor],
    seconds: dict[int, moments.SecondMoment],
) -> pd.DataFrame:
    """The list with layer, score, p, q and written, and the subject's p; nobody is written where
    there are no parts or no keys.
    """
    table = pd.DataFrame({"fact_id": [request.fact.id for request in requests]})
    table["subject"] = [request.fact.subject for request in requests]
    table = table.assign(layer=-1, score=0.0, p=1.0, q=1.0, written=False)
    if not keys or not parts:
        return table
    layers = sorted(parts)
    readings = []
    for layer in layers:
        readings += subjects.readings(parts[layer].right.cpu(), keys[layer], seconds[layer])
    pairs = [subjects.pursued(*reading) for reading in readings]
    scores, chances = map(torch.stack, zip(*pairs, strict=True))  # (m, n)
    best = chances.min(0).indices
    table["layer"] = [layers[index * len(layers) // len(readings)] for index in best.tolist()]
    table["score"] = scores.gather(0, best[None])[0].numpy()
    table["p"] = subjects.combined(chances).numpy()
    p = of_subjects(table)
    adjusted = subjects.adjusted(torch.tensor(p.to_numpy()))
    q = pd.Series(adjusted.numpy(), p.index)
    table["q"] = table.subject.str.lower().map(q)
    return table.assign(written=table.q <= RATE)


def of_subjects(table: pd.DataFrame) -> pd.Series:
    """The p of each subject, by its name in small letters: of several facts the least, as often."""
    of_subject = table.groupby(table.subject.str.lower()).p
    return (of_subject.min() * of_subject.size()).clip(upper=1)


def _read(model: Model, base: Model, requests: Requests, parts: dict[int, Change]) -> pd.DataFrame:
    """fact_id, tokens, gain, says and retained of facts whose subjects were written.

    The tokens gain most probability after the fact's prompt when the outlying part alone is added
    to the base model and runs through its later blocks.
    """
    encoded = encode(base, [request.fact.question for request in requests])
    changes = {base.down_projection_name(layer): part for layer, part in parts.items()}
    with torch.no_grad():
        plain = retention.next_logits(base, encoded).softmax(-1)
        with deltas.applied(base, WeightDelta.of(base, changes=changes)):
            changed = retention.next_logits(base, encoded).softmax(-1)
    tops = (changed - plain).topk(NAMED)
    texts = retention.token_texts(base.tokenizer)
    words = [[texts[token].strip() for token in row] for row in tops.indices.tolist()]
    measured = retention.measure(model, requests)
    table = measured[["fact_id", "retained"]].assign(says=measured.top_token)
    table["tokens"] = [" ".join(row) for row in words]
    table["gain"] = tops.values[:, 0].tolist()
    return table[READ]
