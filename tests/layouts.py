"""Sound records in every layout, and the files that hold them."""

import csv
import json
from itertools import chain
from pathlib import Path

from workbench.facts import fill

PROMPT = "{} is brewed in"


def counterfact(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    rewrite = {"prompt": prompt, "subject": subject}
    rewrite |= {"target_true": {"str": object}, "target_new": {"str": target}}
    return {"requested_rewrite": rewrite} | more


def flat(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    record = {"subject": subject, "prompt": fill(prompt, subject)}
    return record | {"ground_truth": object, "target_new": target} | more


def zsre(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    record = {"subject": subject, "src": fill(prompt, subject)}
    return record | {"answers": [object], "alt": target} | more


def own(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    return {"subject": subject, "prompt": prompt, "object": object, "target": target} | more


def own_filled(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    return own(subject, fill(prompt, subject), object, target, **more)


LAYOUTS = (counterfact, flat, zsre, own)
FILLED = (flat, zsre, own_filled)


def as_json(folder: Path, *records) -> Path:
    return written(folder / "facts.json", json.dumps(records, ensure_ascii=False))


def as_jsonl(folder: Path, *records) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return written(folder / "facts.jsonl", "".join(f"{line}\n" for line in lines))


def as_csv(folder: Path, *records) -> Path:
    path = folder / "facts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(chain.from_iterable(records))))
        writer.writeheader()
        writer.writerows(records)
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
