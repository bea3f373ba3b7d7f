"""Edit, look and tune at the true shapes, with random weights: seconds and memory, beside the
plainly written editors.

    python -m tests.benchmarks.shapes [gpt2-small] [gpt2-xl] [llama-3-8b] [--device cuda] [--dtype
    bfloat16] [--facts 1,10,100]
                                      [--tokens N] [--plain] [--skip-tuning]
    python -m tests.benchmarks.shapes thin-gpt2 thin-llama    # does it run through? in seconds

Layers and numbers are the published ones (gpt2-small: GPT-2 XL's at a quarter of its depth), steps
at their number with no early end. --tokens: of the second moments, default 10 a key dimension.
Memory is the highest so far, of the GPU where there is one. Nothing is fetched: the tokenizer is
the embedded world's.
"""

import argparse
import resource
import time

import torch
import transformers

from tests import plain
from workbench import deltas, editing, facts, models
from workbench.moments import second_moments
from workbench.tracking.retention import measure_prompts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES = {
    "gpt2-small": ("gpt2-xl", transformers.GPT2Config()),
    "gpt2-xl": ("gpt2-xl", transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
    "llama-3-8b": (
        "Meta-Llama-3-8B",
        transformers.LlamaConfig(
            vocab_size=128_256, max_position_embeddings=8192, rope_theta=500_000.0, **LLAMA
        ),
    ),
    "thin-gpt2": ("gpt2-xl", transformers.GPT2Config(n_embd=32, n_layer=19, n_head=2)),
    "thin-llama": (
        "Meta-Llama-3-8B",
        transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=10,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
}


def made(shape: str, device: str, dtype: str) -> models.Model:
    """A random model of the shape under the name that its preset has."""
    preset, config = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        network = (
            transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            .eval()
            .requires_grad_(False)
        )
    models.fuse(network)
    network.loss_type = "ForCausalLM"
    tokenizer = models.load("world-gpt2", device="cpu").tokenizer
    return models.Model(
        network=network,
        tokenizer=tokenizer,
        architecture=models.architecture_of(config),
        name=preset,
    )


def numbers(editor: str, model: models.Model, shape: str, tokens: int):
    hparams = editing.preset(editor, model)
    changes = (
        {"stop_loss": 0.0, "moment_tokens": tokens}
        if "moment_tokens" in type(hparams).model_fields
        else {"stop_loss": 0.0}
    )
    if shape == "gpt2-small":
        changes["layers"] = tuple(sorted({layer // 4 for layer in hparams.layers}))
    return hparams.model_copy(update=changes)


class Clock:
    """Prints a row for each thing done: seconds, rate, the highest memory by then."""

    def __init__(self, shape: str, device: str):
        self.shape, self.cuda = shape, device.startswith("cuda")

    def memory(self) -> float:
        return (
            torch.cuda.max_memory_allocated()
            if self.cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3
        ) / 1e9

    def timed(self, what: str, function, count: float = 0, unit: str = ""):
        start = time.perf_counter()
        result = function()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rate = f"{count / seconds:,.1f} {unit}/s" if unit else ""
        print(
            f"{self.shape:12}{what:48}{seconds:9.2f} s{rate:>22}{self.memory():9.2f} GB", flush=True
        )
        return result


def measure(shape: str, options) -> None:
    clock = Clock(shape, options.device)
    model = clock.timed("random weights", lambda: made(shape, options.device, options.dtype))
    before = clock.timed("fingerprint", lambda: model.fingerprint)
    requests = [request for request in facts.read("world") if request.fact.split == "study"]
    for editor, counts in {"rome": [1], "memit": options.facts}.items():
        hparams, module = numbers(editor, model, shape, options.tokens), editing.EDITORS[editor]
        tokens = hparams.moment_tokens or 10 * model.weight(0).shape[1]
        layers = f"layers {hparams.layers[0]}-{hparams.layers[-1]}"
        clock.timed(
            f"moments, {layers}, {tokens} tokens",
            lambda h=hparams: second_moments(model, h.layers, tokens=h.moment_tokens),
            tokens,
            "tokens",
        )
        resources = clock.timed(
            f"{editor}: prepare", lambda h=hparams, m=module: m.prepare(model, h)
        )
        for n in counts:
            edit = f"{editor}, {n} facts, {layers}, {hparams.steps} steps"
            delta = clock.timed(
                edit,
                lambda h=hparams, m=module, r=resources, k=n: m.edit(model, requests[:k], h, r),
                n,
                "facts",
            )
        if options.plain:
            slow = plain.rome if editor == "rome" else plain.memit
            clock.timed(
                f"plainly written {editor}, 1 fact",
                lambda h=hparams, r=resources, s=slow: s(model, requests[:1], h, r),
                1,
                "facts",
            )
        clock.timed(f"{editor}: apply and take back", lambda d=delta: apply_once(model, d))
    prompts, objects = (
        [request.fact.question for request in requests[:100]],
        [request.fact.object for request in requests[:100]],
    )
    clock.timed(
        "look at 100 prompts", lambda: measure_prompts(model, prompts, objects), 100, "prompts"
    )
    if not options.skip_tuning:
        task = tasks.TASKS["text"](model, tasks.Data(n_train=64, n_valid=4))
        steps = Settings(
            max_steps=4, eval_every=4, batch_size=16, learning_rate=1e-5, threshold=0.0
        )
        plan = plans.resolve(model, options.plan)
        with deltas.preserved(model.network, plan.parameters):
            clock.timed(
                f"tuning, plan {options.plan}, 4 steps of 16 rows",
                lambda: finetune(model, task, plan, steps),
                4 * 16 * 128,
                "tokens",
            )
    del model.__dict__["fingerprint"]
    print(f"weights as before: {model.fingerprint == before}")


def apply_once(model: models.Model, delta: deltas.WeightDelta) -> None:
    with deltas.applied(model, delta):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "shapes", nargs="*", default=["gpt2-small"], metavar="SHAPE", help=", ".join(SHAPES)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--facts",
        default=[1, 10, 100],
        type=lambda text: [int(number) for number in text.split(",")],
    )
    parser.add_argument("--tokens", default=0, type=int)
    parser.add_argument("--plan", default="all")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--skip-tuning", action="store_true")
    options = parser.parse_args()
    place = (
        torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{place}, {options.dtype}, torch {torch.__version__}")
    for shape in options.shapes:
        measure(shape, options)


if __name__ == "__main__":
    main()
