"""Facts of half the kinds of object, to be edited, and others to be taught: of the same kinds, and
of the other half, which shares no relation with them.

    python -m tests.benchmarks.kinds                 # the files, into runs/kinds
    workbench sweep data/findings/kinds.yaml --out runs/findings

Which half is drawn once, by seed 0.
"""

import argparse
import json
import random
from pathlib import Path

from workbench import facts, files

OUT = Path("runs/kinds")


def halves() -> dict[str, list[facts.EditRequest]]:
    """The facts of each file, by its name."""
    pool = facts.read("world")
    kinds = sorted({request.fact.category for request in pool})
    random.Random(0).shuffle(kinds)
    same = set(kinds[: len(kinds) // 2])
    unseen = [request for request in pool if request.fact.split == "unseen"]
    return {
        "to-edit": [one for one in pool if one.fact.split == "study" and one.fact.category in same],
        "same-kinds": [one for one in unseen if one.fact.category in same],
        "other-kinds": [one for one in unseen if one.fact.category not in same],
    }


def record(request: facts.EditRequest) -> dict:
    """A line of a facts file; the same three statements as where the world itself is taught."""
    given = facts.with_paraphrases(request, 3)
    about = given.fact.model_dump(include={"id", "subject", "relation", "category", "prompt"})
    names = ("target", "paraphrases", "held_out", "neighbourhood")
    lists = {name: getattr(given, name) for name in names}
    return about | {"object": given.fact.object, "aliases": given.fact.aliases} | lists


def write(out: Path) -> None:
    """The three files, in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, requests in halves().items():
        lines = [json.dumps(record(request), ensure_ascii=False) for request in requests]
        with files.written(out / f"{name}.jsonl") as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(out / f"{name}.jsonl", len(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
