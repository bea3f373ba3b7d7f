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


def mquake(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    """A case of one rewrite; its hops know another name of the true object."""
    rewrite = counterfact(subject, prompt, object, target)["requested_rewrite"]
    hops = [{"question": "Who?", "answer": "Una", "answer_alias": ["Uno"]}]
    hops += [{"question": "Where?", "answer": object, "answer_alias": ["Vinta"]}]
    return {"requested_rewrite": [rewrite], "questions": ["Whose?"], "single_hops": hops} | more


def knowedit(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    near = {"prompt": "Pelu is by", "ground_truth": [["Oro", "Orro"]]}
    record = flat(subject, prompt, [[object, "Vinta"], ["Vinto"]], target)
    return record | {"locality": {"Relation_Specificity": [near]}} | more


def mzsre(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    return {"en": zsre(subject, prompt, object, target)} | more


def tracing(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    record = {"subject": subject, "prompt": fill(prompt, subject)}
    return record | {"target_true": f" {object}", "target_false": f" {target}"} | more


def wikibigedit(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    """The new object alone: no field says what was true before."""
    record = {"subject": subject, "update": fill(prompt, subject)}
    return record | {"object": target, "ans": target} | more


def ripple(subject="Karelo", question="The mother tongue of {} is", object="Vint", target="Sorn"):
    """Relations other than NATIVE_LANGUAGE need the question that goes with them."""
    asked = fill(question, subject)
    edit = {"prompt": f"{asked} {target}.", "subject_id": "Q1", "target_id": "Q2"}
    edit |= {"relation": "NATIVE_LANGUAGE", "original_fact": {"prompt": f"{asked} {object}."}}
    near = {"prompt": "The eye color of Karelo is", "answers": [{"value": "red", "aliases": []}]}
    tests = [{"test_queries": [near], "test_condition": "OR", "condition_queries": [near]}]
    return {"example_type": "popular", "edit": edit, "Relation_Specificity": tests}


def own(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    return {"subject": subject, "prompt": prompt, "object": object, "target": target} | more


def own_filled(subject="Karelo", prompt=PROMPT, object="Vint", target="Sorn", **more) -> dict:
    return own(subject, fill(prompt, subject), object, target, **more)


LAYOUTS = (counterfact, flat, zsre, mquake, knowedit, mzsre, tracing, own)
FILLED = {  # layouts whose prompt holds the subject, and its field
    flat: "prompt",
    zsre: "src",
    knowedit: "prompt",
    tracing: "prompt",
    wikibigedit: "update",
    own_filled: "prompt",
}


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
