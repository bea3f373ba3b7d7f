"""What every editor makes of a tiny model, in as few steps as may be."""

import torch

from workbench import editing
from workbench.positions import encode
from workbench.tracking.retention import next_logits

NUMBERS = {  # of every editor on the tiny models, where they differ from the defaults
    "ft": {"steps": 8},
    "rome": {"steps": 8},
    "memit": {"layers": (0, 1), "steps": 8, "weight": 0.01},
    "alphaedit": {
        "layers": (0, 1),
        "steps": 8,
        "null_space": "trace",
        "threshold": 0.5,
        "ridge": 0.1,
    },
    "malmen": {
        "layers": (1, 2),
        "rank": 8,
        "meta_steps": 2,
        "facts_at_once": 3,
        "learning_rate": 1e-3,
    },
    "grace": {"steps": 3},
    "incontext": {"layers": ()},
}


def edited(model, editor: str, requests, **numbers):
    module = editing.EDITORS[editor]
    hparams = module.HParams(**({"layers": (1,)} | NUMBERS[editor] | numbers))
    return module.edit(model, requests, hparams, module.prepare(model, hparams))


def logits(model, texts):
    with torch.no_grad():
        return next_logits(model, encode(model, texts))
