"""Who plays which role in the world: split, exposure, templates and edit target of every fact, by
seed.

`python -m data.world.make.assign` rewrites these columns of data/world/facts.csv from its columns
subject, relation, object.
"""

import csv
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from workbench.facts import DATA, relations

COLUMNS = (
    "id",
    "subject",
    "relation",
    "object",
    "target",
    "split",
    "paraphrases",
    "occurrences",
    "templates",
    "held_out",
)
SHARES = {"study": 0.35, "tuning": 0.08, "hypernet": 0.20, "unseen": 0.37}
EXPOSURES = tuple(product((1, 2, 3, 5, 10), (1, 4)))  # (paraphrases, occurrences)
# the retention paper's own fact: in the study split, asked and edited as in the paper
EXAMPLE = "developer:windows-mobile-6-5"
EXAMPLE_TARGET = "Apple"


def assign(triples: Sequence[tuple[str, str, str]], seed: int = 0) -> list[dict]:
    """Rows of facts.csv.

    A subject's facts share one split, dealt out within each set of relations. Exposures are dealt
    out evenly within each relation and split. Of a relation's 12 templates 10 are in a fact's own
    order (the first asks, the first `paraphrases` were shown), 2 are withheld to judge. Targets are
    objects shown for the same relation that are true of no fact of the subject, and not the subject
    itself; each is drawn from a stream of its own.

    Args:
        triples: (subject, relation, object), each pair of subject and relation once.
    """
    rng = random.Random(f"assign {seed}")
    rows = [
        {
            "id": identify(relation, subject),
            "subject": subject,
            "relation": relation,
            "object": thing,
        }
        for subject, relation, thing in triples
    ]
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError("two facts share an id; a subject and relation may stand once only")
    by_subject = defaultdict(list)
    for row in rows:
        by_subject[row["subject"]].append(row)
    _split(by_subject, rng)
    shown, by_role = defaultdict(set), defaultdict(list)
    for row in rows:
        if row["split"] != "unseen":
            shown[row["relation"]].add(row["object"])
        by_role[row["relation"], row["split"]].append(row)
    turn = 0
    for (_, split), members in sorted(by_role.items()):
        rng.shuffle(members)
        for row in members:
            row["paraphrases"], row["occurrences"] = (
                (0, 0) if split == "unseen" else EXPOSURES[turn % len(EXPOSURES)]
            )
            turn += split != "unseen"
    for row in rows:
        order = rng.sample(range(12), 12)
        if row["id"] == EXAMPLE:
            order = [0, *(number for number in order if number)]
        row["templates"], row["held_out"] = order[:10], order[10:]
        true = {other["object"] for other in by_subject[row["subject"]]}
        target = random.Random(f"target {seed} {row['id']}").choice(
            sorted(shown[row["relation"]] - true - {row["subject"]})
        )
        row["target"] = EXAMPLE_TARGET if row["id"] == EXAMPLE else target
    return rows


def _split(by_subject: dict[str, list[dict]], rng: random.Random) -> None:
    strata = defaultdict(list)
    for subject, rows in sorted(by_subject.items()):
        strata[tuple(sorted(row["relation"] for row in rows))].append(subject)
    dealt = dict.fromkeys(SHARES, 0)
    for subjects in strata.values():
        rng.shuffle(subjects)
        for subject in subjects:
            rows = by_subject[subject]
            total = sum(dealt.values()) + len(rows)
            split = max(SHARES, key=lambda name: SHARES[name] * total - dealt[name])
            if any(row["id"] == EXAMPLE for row in rows):
                split = "study"
            dealt[split] += len(rows)
            for row in rows:
                row["split"] = split


def identify(relation: str, subject: str) -> str:
    """A readable id: `developer:windows-mobile-6-5`."""
    plain = unicodedata.normalize("NFKD", subject).encode("ascii", "ignore").decode().lower()
    return f"{relation}:{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}"


def write(rows: Sequence[dict], path: Path) -> None:
    """The rows as CSV, in order of relation and subject."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row["id"]):
            writer.writerow(
                row | {name: " ".join(map(str, row[name])) for name in ("templates", "held_out")}
            )


def triples_in(path: Path) -> list[tuple[str, str, str]]:
    """(subject, relation, object) of each row, in order of their ids, so that the order of the file
    does not matter.
    """
    with path.open(encoding="utf-8", newline="") as file:
        found = [(row["subject"], row["relation"], row["object"]) for row in csv.DictReader(file)]
    unknown = {relation for _, relation, _ in found} - set(relations())
    if unknown:
        raise ValueError(f"{path}: relations without templates: {sorted(unknown)}")
    return sorted(found, key=lambda triple: identify(triple[1], triple[0]))


if __name__ == "__main__":
    table = DATA / "world" / "facts.csv"
    write(assign(triples_in(table)), table)
