"""What one processor can do, and what the solver of target vectors and the tuning make of it.

    python -m tests.benchmarks.processor [MODEL] [--facts 10] [--compile]

GFLOP a CPU second of matrix products of the solver's shapes, float32 and bfloat16; then of the
solver (MEMIT's preset, the FLOPs of matrix products as torch counts them) as it is and under
bfloat16 autocast, with what its vectors do as edits; and of steps of the tuning. --compile: a
step of the network's blocks forward and backward, compiled, with the seconds that compiling takes.
Least of 3 calls, of the solver 2; one thread.
"""

import argparse
import time
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.outcomes import known_facts
from workbench import deltas, editing, models
from workbench.evaluation import efficacy

ROWS = (30, 150, 600, 1024)  # tokens at once: of a few facts, of a chunk, of a batch of the tuning


def least(function, times: int = 3) -> float:
    """CPU seconds."""
    function()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def rate(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    repeats = max(1, 2 * 10**9 // (2 * m * k * n))

    def products():
        for _ in range(repeats):
            a @ b

    return 2e-9 * m * k * n * repeats / least(products)


def counted(function) -> float:
    """GFLOP."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def shapes(model) -> None:
    d_out, d_in = model.weight(0).shape
    vocabulary = len(model.unembedding.weight)
    for k, n in ((d_out, d_in), (d_in, d_out), (d_out, vocabulary), (1024, 1024)):
        for m in ROWS:
            pair = [rate(m, k, n, dtype) for dtype in (torch.float32, torch.bfloat16)]
            print(f"({m}, {k}) @ ({k}, {n}): {pair[0]:.0f} and {pair[1]:.0f} GFLOP/s", flush=True)


def solver(model, n: int) -> None:
    hparams = editing.preset("memit", model)
    module = editing.EDITORS["memit"]
    requests = known_facts(model, "study")[:n]
    resources = module.prepare(model, hparams)
    table = efficacy.asked(model, requests, [])
    for name, inside in (
        ("float32", nullcontext),
        ("bfloat16 autocast", lambda: torch.autocast("cpu", torch.bfloat16)),
    ):

        def solve(inside=inside):
            with inside():
                return module.targets(model, requests, hparams, resources)

        gflop = counted(solve)
        seconds = []
        for _ in range(2):
            start = time.process_time()
            solution = solve()
            seconds.append(time.process_time() - start)
        seconds = min(seconds)
        edit = module.edit(model, requests, hparams, resources, solution=solution)
        shares = efficacy.outcome(model, edit, table)
        did = f"efficacy {shares.efficacy.mean():.2f}, withheld {shares.held_out.mean():.2f}"
        done = f"steps {solution.steps.float().mean():.1f}, {did}"
        print(f"solver, {name}: {seconds:.2f} s, {gflop / seconds:.0f} GFLOP/s, {done}", flush=True)


def tuning(model, compiles: bool) -> None:
    network = model.network
    ids = torch.randint(0, network.config.vocab_size, (8, 128))
    with deltas.preserved(network):
        network.requires_grad_(True)

        def step(run=network):
            run(input_ids=ids, labels=ids).loss.backward()
            network.zero_grad()

        def in_bf16():
            with torch.autocast("cpu", torch.bfloat16):
                step()

        gflop = counted(step)
        for name, function in (("float32", step), ("bfloat16 autocast", in_bf16)):
            seconds = least(function)
            print(f"tuning, {name}: {seconds:.2f} s a step, {gflop / seconds:.0f} GFLOP/s")
        if compiles:
            compiled = torch.compile(network)
            start, wall = time.process_time(), time.perf_counter()
            step(compiled)
            first = time.process_time() - start, time.perf_counter() - wall
            seconds = least(lambda: step(compiled))
            print(f"tuning, compiled: {seconds:.2f} s a step; {first[0]:.0f} CPU s of this process")
            print(f"and {first[1]:.0f} s by the clock for the first")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="world-gpt2")
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}", end=", ")
    print(f"oneDNN {torch.backends.mkldnn.is_available()}, {torch.get_num_threads()} threads")
    model = models.load(options.model, device="cpu")
    shapes(model)
    tuning(model, options.compile)
    solver(model, options.facts)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
