"""Hyper-parameter files of EasyEdit and of the ROME, MEMIT and AlphaEdit repositories: what each
name becomes here, or why it is ignored.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from workbench.facts import BadInput

ALGORITHMS = {"FT": "ft", "FT-L": "ft", "FT-M": "ft", "ROME": "rome", "R-ROME": "rome"}
AS_PUBLISHED = ("R-ROME", "FT-M")  # mend what their project's own ROME and FT do otherwise
ALGORITHMS |= {"MEMIT": "memit", "ALPHAEDIT": "alphaedit", "MALMEN": "malmen"}

SOLVER = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_weight",
}
NAMES: dict[str, dict[str, str]] = {
    "ft": {"num_steps": "steps", "lr": "learning_rate"},
    "rome": SOLVER,
    "memit": SOLVER | {"mom2_update_weight": "weight"},
    "alphaedit": SOLVER | {"nullspace_threshold": "threshold", "L2": "ridge"},
    "malmen": {
        "rank": "rank",
        "n_blocks": "n_blocks",
        "lr": "learning_rate",
        "meta_lr": "meta_learning_rate",
        "loc_coef": "locality",
        "max_grad_norm": "clip",
        "n_edits": "facts_at_once",
        "max_iters": "meta_steps",
    },
}
# Names that stand for something the workbench asks elsewhere, or does in one way only.
IGNORED = {
    "alg_name|alg": "named the editor",
    "model_name|tokenizer_class|tokenizer_name|model_class|model": "the model is named when it is loaded",
    "device|model_parallel|fp16|bf16": "said when the model is loaded: device, device_map, dtype",
    ".*_module(_tmp)?": "the architecture table has the module names",
    "stats_dir|results_dir|P_loc|archive": "the cache folder is WORKBENCH_CACHE",
    "fact_token": "keys are read at the subject's last token",
    "mom2_dataset": "the text of the second moments is the parameter corpus",
    "mom2_n_samples": "counted in tokens: moment_tokens, 10 a key dimension",
    "mom2_dtype": "second moments are float32, solved in float64",
    "v_loss_layer": "the loss is read at the model's output",
    "layer_selection": "all layers named are edited",
    "max_length|max_epochs|(.*_)?batch_size": "said by the calls: edit takes the facts it is to edit at once",
}
# name -> the value that means what the editors here do
ONLY = {"fact_token": "subject_last", "layer_selection": "all"}
ONLY_OF = {
    "ft": {"kl_factor": 0, "weight_decay": 0},
    "memit": {"mom2_adjustment": True},
    "alphaedit": {"mom2_adjustment": True},
}


def is_foreign(fields: Mapping) -> bool:
    """Whether these are fields of those projects and not of an HParams here."""
    names = {name for table in NAMES.values() for name in table} - {"rank", "n_blocks"}
    return bool(names & set(fields)) or "alg_name" in fields or "rewrite_module_tmp" in fields


def editor_of(path: str | Path, fields: Mapping) -> str:
    """The editor that a file is for: by `alg_name`, else by the folder it lies in, as in
    hparams/ROME/gpt2-xl.json.
    """
    for said in (str(fields.get("alg_name", "")), Path(path).resolve().parent.name):
        if said.upper() in ALGORITHMS:
            return ALGORITHMS[said.upper()]
    raise BadInput(
        f"preset {path}: names no editor known here (alg_name {fields.get('alg_name')!r}); it has {', '.join(ALGORITHMS)}"
    )


def translated(editor: str, path: str | Path, fields: Mapping) -> tuple[dict, pd.DataFrame]:
    """Fields of the editor's HParams, and the table: name, value, became ("" = ignored), note.

    Raises:
        BadInput: a value that asks for what no editor here does.
    """
    said = ALGORITHMS.get(str(fields.get("alg_name", "")).upper(), editor)
    if said != editor:
        raise BadInput(f"preset {path}: is for {said}, not for {editor}")
    only = ONLY | ONLY_OF.get(editor, {})
    found, rows = {}, []
    for name, value in fields.items():
        if name in only and value != only[name]:
            raise BadInput(
                f"preset {path}: {name} {value!r} is not to be had here, only {only[name]!r}"
            )
        try:
            became, note = _one(editor, name, value)
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"preset {path}: {name} {value!r:.60} is not of the form it has in that project"
            ) from None
        found |= became
        told = ", ".join(f"{field}={number}" for field, number in became.items())
        rows.append({"name": name, "value": str(value), "became": told, "note": note})
    if editor != "malmen" and "convention" not in found:
        published = str(fields.get("alg_name", "")).upper() in AS_PUBLISHED
        found["convention"] = "published" if published else "reference"
        note = (
            "their code's habits: how steps are counted, ROME's keys, FT's objective, no floor on C"
        )
        note = (
            "one key, all target tokens; steps are updates, theirs are one fewer"
            if published
            else note
        )
        became = f"convention={found['convention']}"
        rows.append({"name": "convention", "value": "", "became": became, "note": note})
    return found, pd.DataFrame(rows, columns=["name", "value", "became", "note"])


def _one(editor: str, name: str, value) -> tuple[dict, str]:
    """What one field becomes, and a note."""
    if name == "layers":
        return {"layers": value}, "block indices from 0 in both"
    if name in ("inner_params", "edit_modules") and editor == "malmen":
        return {"layers": sorted({int(re.search(r"\.(\d+)\.", each)[1]) for each in value})}, ""
    if name == "norm_constraint" and editor == "ft":
        return {"box": float(value or 0)}, "L-inf bound; 0 = none"
    if name == "objective_optimization" and editor == "ft":
        return {
            "convention": "reference" if value == "prompt_last" else "published"
        }, "reference: all target tokens read at the last prompt position"
    if name == "mom2_adjustment":
        used = {True: "corpus", False: "identity"}[value]
        return (
            {"moments": used} if editor == "rome" else {}
        ), "corpus: C of the keys; identity: C = I"
    if name == "context_template_length_params" and editor != "ft":
        return {
            "prefixes": sum(int(count) for _, count in value)
        }, "sampled, half of 5 and half of 10 tokens"
    if name in NAMES[editor]:
        note = "counts evaluations, one more than updates" if name == "v_num_grad_steps" else ""
        return {NAMES[editor][name]: value}, note
    for pattern, why in IGNORED.items():
        if re.fullmatch(pattern, name):
            return {}, why
    return {}, f"{editor} has nothing of the kind"
