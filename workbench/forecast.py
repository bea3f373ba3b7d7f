"""How long an experiment takes on this machine: the operations that it asks for, by the speed at
which the machine multiplies matrices of the model's width.

A guide before hours are spent: rows are taken as long as a task's usual ones, and every block as
moving.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch.utils.benchmark import Timer

from workbench import models
from workbench.models import Model
from workbench.positions import ROW
from workbench.spec import Spec
from workbench.tracking import lens

# Operations a weight and token: of a pass; with the way back; and with the weights' gradients.
PASS, SOLVED, TRAINED = 2, 4, 6
PROMPT = 16  # tokens of a question with its answer
QUESTIONS = 8  # about an edited fact: its own, two that judge, five neighbours
ASKED = 4  # facts asked for one that is known
TOKENS = {"instructions": 96, "sentiment": 32, "facts": 16}  # of a row; of other tasks ROW
REACHED = 0.5  # of the speed of large products, by a network whose batches are small
MEASURED = 0.2  # seconds
PROTECTED = 2  # times the work of a step, about


def operations(spec: Spec, model: Model) -> dict[str, float]:
    """Phase of a resolved Spec -> floating-point operations, about; an outline of its model does.

    Looks have the lens in them: its fitting, as if none were in the cache; norm and head after
    every block.
    """
    weights = model.network.num_parameters()
    head = model.unembedding.weight.numel()
    numbers = spec.editor_hparams(model)
    copies = -(-spec.n_edited // spec.edits_per_model)
    looks = spec.max_steps // spec.eval_every + 2
    watched = spec.n_edited + copies * spec.n_intrinsic
    asked = spec.n_edited * QUESTIONS + copies * spec.n_intrinsic
    layers = numbers.layers or (model.n_blocks,)
    statements = spec.n_edited * (1 + getattr(numbers, "prefixes", 0))
    lessons = 3 * getattr(numbers, "facts_at_once", 0) * getattr(numbers, "meta_steps", 0)
    # The blocks that run again and again: above the last edited one, or from the first one on.
    solved = statements * getattr(numbers, "steps", 0) * (1 - max(layers) / model.n_blocks)
    learnt = lessons * (1 - min(layers) / model.n_blocks)
    row = TOKENS.get(spec.task, ROW)
    step = PASS * weights * ROW + SOLVED * head * lens.TOKENS_A_ROW * model.n_blocks
    effects = model.unembedding.weight.shape[1] * lens.ROWS["jacobian"]
    fitting = {"logit": 0, "tuned": lens.STEPS * lens.ROWS_A_STEP * step}
    fitting["jacobian"] = PASS * weights * ROW * effects
    asking = weights * PROMPT * asked + head * model.n_blocks * watched
    dearer = PROTECTED if spec.protect else 1
    trained = copies * spec.max_steps * spec.batch_size * row * dearer
    validated = copies * (looks - 1) * spec.n_valid * row
    return {
        "choosing": PASS * weights * PROMPT * ASKED * (spec.n_edited + spec.n_intrinsic),
        "editing": SOLVED * weights * PROMPT * (solved + learnt),
        "tuning": weights * (TRAINED * trained + PASS * validated),
        "looking": PASS * looks * asking + fitting[spec.lens],
    }


def speed(model: Model, device: str = "auto") -> float:
    """Operations a second of products of a row of tokens with a block's width."""
    device = models.device_named(device)
    width = model.unembedding.weight.shape[1]
    left = torch.rand(4 * ROW, width, device=device)
    right = torch.rand(width, 4 * width, device=device)
    product = "(left @ right)[0, 0].item()"  # a device has finished what it gives back
    given = {"globals": {"left": left, "right": right}, "num_threads": torch.get_num_threads()}
    seconds = Timer(product, **given).blocked_autorange(min_run_time=MEASURED).mean
    return 2 * left.numel() * right.shape[1] / seconds


def minutes(specs: Sequence[Spec], outlines: Sequence[Model]) -> pd.Series:
    """Phase -> minutes on this machine, of all these experiments together, each on its model."""
    work = pd.DataFrame(map(operations, specs, outlines))
    speeds = [speed(model, spec.device) for model, spec in zip(outlines, specs, strict=True)]
    return work.div(speeds, axis=0).sum() / (60 * REACHED)
