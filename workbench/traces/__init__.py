"""What an edit leaves in the weights, also where behaviour no longer shows it: which matrices were
written, at which subjects, with what; and how it is taken out or brought back.

    traces = wb.inspect(tuned, base=model, requests=suspects)
    wb.traces.removed(tuned, model);  wb.traces.restored(tuned, model, strength=1.0)

README.md says how well.
"""

from dataclasses import dataclass

import pandas as pd
import torch

from workbench import facts
from workbench.checkpoints import source_of
from workbench.deltas import Change
from workbench.facts import Requests
from workbench.models import Model
from workbench.positions import encode
from workbench.records import BadInput
from workbench.traces import naming, spectrum
from workbench.traces.patching import patched as patched
from workbench.traces.remedy import compared as compared
from workbench.traces.remedy import removed as removed
from workbench.traces.remedy import restored as restored
from workbench.tracking import retention

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
    the likeliest. `n_edits`: the most directions that stand out of one down-projection; `blocks`:
    where any do.
    """

    matrices: pd.DataFrame
    subjects: pd.DataFrame
    n_edits: int
    blocks: tuple[int, ...]

    @property
    def written(self) -> pd.DataFrame:
        return self.subjects[self.subjects.written]

    def __repr__(self) -> str:
        return f"<Traces: {self.sentence}>"

    @property
    def sentence(self) -> str:
        """What was found out, in a line."""
        others = (self.matrices.outlying > 0).sum() - len(self.blocks)
        beside = f"other matrices that stand out: {others}" if others else ""
        if not self.blocks:
            what = beside or "no matrix stands out"
            return f"{what}; an edit as spread out as tuning, or of most blocks alone, is missed"
        blocks = ", ".join(map(str, self.blocks))
        count = f"{self.n_edits} directions stand out of a down-projection (blocks {blocks})"
        n_named = self.written.subject.str.lower().nunique()
        named = f"{n_named} subject{'s' * (n_named != 1)} named"
        if (self.subjects.layer < 0).all():
            named = "without a base no subject is looked for"
        elif not n_named:
            named += ": not listed, overlaid, asked in other words, or the models exchanged?"
        return "; ".join(filter(None, [count, beside, named]))


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
    listed = facts.read(source_of(model.name)) if requests is None else requests
    suspects = list(dict.fromkeys(listed))
    if len({request.fact.id for request in suspects}) < len(suspects):
        raise BadInput("requests: two facts of the list have one id; ids must differ")
    matrices, parts = spectrum.parts(model, base)
    least, count = naming.fewest(parts), naming.count(suspects)
    if base and count < least:
        what = f"{count} subjects to choose from: too few to tell chance from an edit"
        raise BadInput(f"{what}; give a list of at least {least}")
    known = naming.met(base, suspects, parts, corpus) if base else ({}, {})
    table = naming.scored(suspects, parts, naming.readings_of(parts, *known) if base else [])
    written = [request for request, hit in zip(suspects, table.written, strict=True) if hit]
    read = _read(model, base, written, parts) if written else pd.DataFrame(columns=READ)
    if requests is None:  # the targets of such a list are no suspicion
        read["retained"] = None
    table = table.merge(read, on="fact_id", how="left")
    where = tuple(sorted(parts))
    return Traces(matrices=matrices, subjects=table, n_edits=naming.places(parts), blocks=where)


def _read(model: Model, base: Model, requests: Requests, parts: dict[int, Change]) -> pd.DataFrame:
    """fact_id, tokens, gain, says and retained of facts whose subjects were written.

    The tokens gain most probability after the fact's prompt when the outlying part alone is added
    to the base model and runs through its later blocks.
    """
    encoded = encode(base, [request.fact.question for request in requests])
    with torch.no_grad():
        plain = retention.next_logits(base, encoded).softmax(-1)
        with naming.written_into(base, parts):
            changed = retention.next_logits(base, encoded).softmax(-1)
    tops = (changed - plain).topk(NAMED)
    texts = retention.token_texts(base.tokenizer)
    words = [[texts[token].strip() for token in row] for row in tops.indices.tolist()]
    measured = retention.measure(model, requests)
    table = measured[["fact_id", "retained"]].assign(says=measured.top_token)
    table["tokens"] = [" ".join(row) for row in words]
    table["gain"] = tops.values[:, 0].tolist()
    return table[READ]
