"""Time the editors against the plainly written ones (tests/plain.py), side by side in one run.

    python -m tests.benchmarks.editors [MODEL ...] [--facts 1,10,50,200] [--plain-facts 10] [--steps
    20] [--no-patience]
        [--editors rome,memit,alphaedit,ft,malmen] [--edits-alone]
    python -m tests.benchmarks.editors MODEL --optimisers [--editors memit] [--facts 50] [--split
        study]
    python -m tests.benchmarks.editors [MODEL ...] --table T.csv [--editors rome,memit,alphaedit]

MODEL: world-gpt2, world-llama, or gpt2-small (random weights of that shape; a quarter of the steps
and no patience, since they never reach a target). The plain editors work fact by fact: they are run
on 1 and on --plain-facts facts, and the line through their seconds and FLOPs is read at the number
in the row. Steps are the same on both sides; `patience` rows let our editors stop per fact as the
presets of the world models do not; `took`, the share of the facts that the edited model says, is
what that costs. FLOPs are those of matrix products (not of attention's), counted by torch in a
second call on at most 50 facts, prompts or rows of text and scaled (not MALMEN's: torch's counter
does not take its gradients); share of peak is against a product of two large matrices measured in
the same run; peak MB is by how much the process grew in the call, beside the model and what
`prepare` loaded, stated MB what the docstrings say that it may be.

With `--optimisers`: an editor with the numbers of its preset, its target vectors solved by Adam and
by L-BFGS, 10 facts a model (ROME one). CPU seconds are those of the solver for all facts at once;
beside them what the edits did, with 95 % intervals over facts (of those watched: over these), and
the difference from the first row, fact by fact.

With `--table`: a row a model, editor and number of facts, all in one edit by the numbers of the
preset on both sides: CPU seconds of the plain editor (by the line as above, so of more than
--plain-facts facts scaled) and of ours, and what ours did to the facts, to withheld wordings,
neighbours and 100 others. The file is written row by row, and a row that it has is not made again.
"""

import argparse
import ctypes
import gc
import resource
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests import plain
from tests.benchmarks.outcomes import interval, known_facts
from workbench import checkpoints, editing, facts, inert, models, moments
from workbench.editing import target_vectors
from workbench.editing.rows import build_rows
from workbench.evaluation import efficacy
from workbench.tracking import retention

FIXED = {"stop_loss": 0.0, "prefixes": 5}
OPTIMISERS = {
    "adam": {"optimiser": "adam"},
    "lbfgs": {"optimiser": "lbfgs"},
    "lbfgs, stop .005": {"optimiser": "lbfgs", "stop_loss": 0.005},
}
WATCHED = 100
COUNTED = 50  # facts, prompts or rows whose FLOPs are counted; more are scaled


def peak_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a float32 matrix product."""
    a = torch.randn(size, size)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def measured(function, *parts, counted: bool = True) -> dict:
    """Seconds and memory of one call with the parts (facts, prompts or rows), FLOPs of another with
    at most `COUNTED` of them.
    """
    with _watched() as peak:
        start = time.perf_counter()
        result = function(*parts)
        seconds = time.perf_counter() - start
    gflop = float("nan")
    if counted:
        with FlopCounterMode(display=False) as counter:
            function(*(each[:COUNTED] for each in parts))
        gflop = counter.get_total_flops() / 1e9 * max(1, len(parts[0]) / COUNTED)
    return {"seconds": seconds, "gflop": gflop, "result": result, "mb": peak[0] / 1e6}


@contextmanager
def _watched():
    """A list whose one number is, afterwards, by how many bytes this process had grown at most;
    looked at a hundred times a second.
    """
    process, ended, peak = psutil.Process(), threading.Event(), [0]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # or what earlier calls left to the allocator would hide what this one takes
    before = process.memory_info().rss

    def watch():
        while not ended.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def stated_bytes(model, editor, hparams, requests, resources) -> int:
    """What the docstrings of the editor and of the solver say that an edit takes beside the model
    and what `prepare` has loaded already.
    """
    d_out, d_in = model.weight(0).shape
    solves = hasattr(hparams, "kl_weight")
    rows = build_rows(model, requests, resources.prefixes, kl=solves)
    matrices = {"ft": 24 * d_out * d_in, "malmen": 0}.get(
        editor, (8 * len(hparams.layers) + 16) * d_in**2
    )
    blocks = model.n_blocks - (max(hparams.layers) + 1 if solves else min(hparams.layers))
    text = model.network.config.get_text_config()
    d_kv = (
        d_out
        * getattr(text, "num_key_value_heads", text.num_attention_heads)
        // text.num_attention_heads
    )
    spreads = solves and editor != "rome"
    largest = (
        8 * d_out * rows.up_to_subject().input_ids.numel() + 20 * (d_in + d_out) * rows.n
        if spreads
        else 0
    )
    for part in (
        target_vectors._chunks(rows, target_vectors.tokens_at_once(model))
        if solves
        else [torch.arange(rows.n)]
    ):
        some = rows.select(part)
        first = some.subject if solves else torch.zeros_like(some.subject)
        later = (some.encoded.lengths - first).max()
        read = (some.labels != -100).sum() + some.is_kl.sum()
        kept = 8 * (d_kv + d_out) * (first.max() + later) if solves else 0
        largest = max(
            largest,
            int(
                blocks * len(first) * (kept + (64 * d_out + 24 * d_in) * later)
                + 16 * text.vocab_size * read
            ),
        )
    return matrices + largest


def load(name: str):
    if name != "gpt2-small":
        return models.load(name, device="cpu")
    tokenizer = models.load("world-gpt2", device="cpu").tokenizer
    torch.manual_seed(0)
    network = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0))
        .eval()
        .requires_grad_(False)
    )
    models.fuse(network)
    return models.Model(
        network=network,
        tokenizer=tokenizer,
        architecture=models.architecture_of(network.config),
        name=name,
    )


def trained(model) -> bool:
    return model.name in checkpoints.WORLD_MODELS


def one_a_subject() -> list:
    """Study facts; to random weights two facts of one subject are one key."""
    requests = [request for request in facts.read("world") if request.fact.split == "study"]
    return list({request.fact.subject: request for request in requests}.values())


def editors_of(model, options):
    """(editor, module, HParams, resources) of each."""
    third = model.n_blocks // 4
    numbers = {
        "rome": {"layers": (third,)},
        "memit": {"layers": (third - 2, third - 1, third)},
        "alphaedit": {
            "layers": (third - 2, third - 1, third),
            "null_space": "trace",
            "threshold": 0.1,
        },
        "ft": {"layers": (third,), "learning_rate": 5e-4},
        "malmen": {
            "layers": tuple(range(model.n_blocks - 6, model.n_blocks)),
            "rank": 256,
            "meta_steps": 0,
        },  # untrained: as fast
    }
    for editor in options.editors.split(","):
        module = editing.EDITORS[editor]
        given = (
            FIXED
            | {"steps": options.steps if trained(model) else -(-options.steps // 4)}
            | numbers[editor]
        )
        hparams = module.HParams(
            **{name: value for name, value in given.items() if name in module.HParams.model_fields}
        )
        yield editor, module, hparams, module.prepare(model, hparams)


def plainly(editor, model, requests, hparams, resources):
    if editor in ("ft", "rome", "malmen"):
        written = {
            "ft": lambda *those: plain.ft(*those[:3]),
            "rome": plain.emmet,
            "malmen": plain.malmen,
        }
        return written[editor](model, requests, hparams, resources)
    projectors = None
    if editor == "alphaedit":
        projectors = {
            layer: plain.projector(moment.matrix, hparams.null_space, hparams.threshold)
            for layer, moment in resources.moments.items()
        }
    return plain.memit(model, requests, hparams, resources, None, projectors)


def edits(model, requests, counts, options) -> list[dict]:
    found = []
    for editor, module, hparams, resources in editors_of(model, options):
        plainly(editor, model, requests[:1], hparams, resources)  # so that no first call is timed
        slow = [
            measured(
                lambda part, e=editor, h=hparams, r=resources: plainly(e, model, part, h, r),
                requests[:k],
                counted=editor != "malmen",
            )
            for k in (1, options.plain_facts)
        ]
        for n in counts:
            row = {"model": model.name, "what": editor, "facts": n, "plain peak MB": slow[1]["mb"]}
            for name, measure in (("plain s", "seconds"), ("plain GFLOP", "gflop")):
                each = (slow[1][measure] - slow[0][measure]) / (
                    options.plain_facts - 1
                )  # a fact; what is done once for all does not scale
                row[name] = slow[0][measure] + (n - 1) * each
            stops = options.patience and trained(model) and hasattr(module, "targets")
            for label, numbers in [("", {})] + (
                [(" patience 2", {"patience": 2})] if stops else []
            ):
                ours = hparams.model_copy(
                    update=numbers | ({"at_once": 1000} if editor == "rome" else {})
                )
                for moment in resources.moments.values():
                    moment.__dict__.pop("factor", None)  # each row factorises C itself
                    moment.matrix.sum()  # what was mapped from a file is read
                fast = measured(
                    lambda part, m=module, h=ours, r=resources: m.edit(model, part, h, r),
                    requests[:n],
                    counted=editor != "malmen",
                )
                found.append(
                    row
                    | {
                        "what": editor + label,
                        "s": fast["seconds"],
                        "GFLOP": fast["gflop"],
                        "peak MB": fast["mb"],
                    }
                    | {
                        "stated MB": stated_bytes(model, editor, ours, requests[:n], resources)
                        / 1e6
                    }
                    | {"took": sum(one["took"] for one in fast["result"].outcomes) / n}
                    | {
                        "steps": sum(fast["result"].record["steps"]) / n
                        if "steps" in fast["result"].record
                        else None
                    }
                )
    return found


def optimised(model, editor, edited, watched) -> pd.DataFrame:
    """A row an optimiser: CPU seconds of the solver, steps, the share of each measure and by how
    much it is above the first row's, both with intervals over facts.
    """
    module, preset = editing.EDITORS[editor], editing.preset(editor, model)
    resources = module.prepare(model, preset)
    size = 1 if editor == "rome" else 10
    batches = [edited[start : start + size] for start in range(0, len(edited), size)]
    tables = [efficacy.asked(model, batch, []) for batch in batches]
    asked = [[one.fact.question for one in watched], [one.fact.object for one in watched]]
    module.targets(model, edited[:1], preset, resources)  # so that no first call is timed
    rows, first = [], {}
    for name, numbers in OPTIMISERS.items():
        hparams = preset.model_copy(update=numbers)
        start = time.process_time()
        solution = module.targets(model, edited, hparams, resources)
        row = {"editor": editor, "optimiser": name, "CPU s": time.process_time() - start}
        row["steps"] = solution.steps.float().mean().item()
        parts, kept = [], []
        for batch, part, table in zip(
            batches, solution.split([len(batch) for batch in batches]), tables, strict=True
        ):
            edit = module.edit(model, batch, hparams, resources, solution=part)
            parts.append(efficacy.outcome(model, edit, table))
            with edit.applied(model):
                answers = retention.measure_prompts(model, *asked)
            kept.append(answers.retained.astype(float))
        shares = pd.concat(parts, ignore_index=True)
        measures = {
            "efficacy": shares.efficacy,
            "withheld": shares.held_out,
            "neighbours": shares.neighbourhood_kept,
            "intrinsic": pd.concat(kept, axis=1).mean(axis=1),
        }
        first = first or measures
        for measure, values in measures.items():
            row[measure] = _with_interval(values)
            row[f"{measure}, more"] = _with_interval(values - first[measure])
        rows.append(row)
    return pd.DataFrame(rows)


def _with_interval(values: pd.Series) -> str:
    low, high = interval(values.dropna())
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def compare_optimisers(name, options) -> None:
    model = load(name)
    source = "world" if trained(model) else "plain"
    requests = known_facts(model, options.split, source=source)
    requests = [request for request in requests if not request.fact.names_answer]
    edited = requests[: int(options.facts.split(",")[0])]
    subjects = {request.fact.subject for request in edited}
    others = [request for request in requests if request.fact.subject not in subjects]
    watched = others[:WATCHED]
    print(f"{name}: {len(edited)} facts of split {options.split}, {len(watched)} watched")
    for editor in options.editors.split(","):
        table = optimised(model, editor, edited, watched)
        print(table.round(1).T.to_string(header=False), flush=True)


def fill(path: Path, options) -> None:
    """Make the rows that the table lacks, and print it."""
    done = (
        pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["model", "editor", "facts"])
    )
    rows = set(done[["model", "editor", "facts"]].itertuples(index=False, name=None))
    counts = [int(number) for number in options.facts.split(",")]
    for name in options.models:
        wanted = [(name, editor, n) for editor in options.editors.split(",") for n in counts]
        missing = [row for row in wanted if row not in rows]
        if not missing:
            continue
        model = load(name)
        source = "world" if trained(model) else "plain"
        requests = known_facts(model, options.split, source=source)
        for editor in dict.fromkeys(editor for _, editor, _ in missing):
            compared = against_plain(model, editor, requests, options)
            for n in (n for _, one, n in missing if one == editor):
                done = pd.concat([done, pd.DataFrame([compared(n)])], ignore_index=True)
                inert.write_csv(done, path)
                print(done.tail(1).round(3).to_string(index=False, header=False), flush=True)
    print(done.round(3).to_string(index=False))


def two_continuations(model, requests) -> dict:
    """What the papers' code asks: the probability of the target and of the true object after each
    prompt, the same on both sides. CPU seconds, the least of 3.
    """
    asked = [
        (request.fact.question, answer)
        for request in requests
        for answer in (request.target, request.fact.object)
    ]
    prompts, answers = map(list, zip(*asked, strict=True))
    ways = {
        "plain s": lambda: plain.likelihoods(model, prompts, answers),
        "s": lambda: retention.measure_prompts(model, prompts, answers, past_stop_words=False).p,
    }
    given = {name: torch.tensor(list(ask())) for name, ask in ways.items()}
    torch.testing.assert_close(given["s"], given["plain s"], rtol=1e-3, atol=1e-6)
    times = {name: min(_cpu(ask)[0] for _ in range(3)) for name, ask in ways.items()}
    about = {"model": model.name, "what": "two continuations", "facts": len(prompts) // 2}
    return about | times


def against_plain(model, editor, requests, options):
    """A function that gives the row of so many facts."""
    module, hparams = editing.EDITORS[editor], editing.preset(editor, model)
    if editor == "rome":
        hparams = hparams.model_copy(update={"at_once": 1000})
    resources = module.prepare(model, hparams)
    module.edit(model, requests[:1], hparams, resources)  # so that no first call is timed
    sizes = (1, options.plain_facts)
    slow = [
        _cpu(lambda k=k: plainly(editor, model, requests[:k], hparams, resources))[0] for k in sizes
    ]

    def row(n: int) -> dict:
        edited, watched = requests[:n], requests[n : n + WATCHED]
        for moment in resources.moments.values():
            moment.__dict__.pop("factor", None)  # each row factorises C itself
        seconds, edit = _cpu(lambda: module.edit(model, edited, hparams, resources))
        shares = efficacy.outcome(model, edit, efficacy.asked(model, edited, watched))
        a_fact = (slow[1] - slow[0]) / (options.plain_facts - 1)
        plain_seconds = slow[0] + (n - 1) * a_fact
        about = {"model": model.name, "editor": editor, "facts": n, "plain facts": sizes[1]}
        times = {"plain s": plain_seconds, "s": seconds, "faster": plain_seconds / seconds}
        taken = {"efficacy": shares.efficacy.mean(), "withheld": shares.held_out.mean()}
        kept = {"neighbours": shares.neighbourhood_kept.mean(), "intrinsic": shares.intrinsic[0]}
        return about | times | taken | kept

    return row


def _cpu(function) -> tuple:
    """CPU seconds of a call, and what it gave."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def collected(model, layers) -> dict:
    """A row of second moments of these layers."""
    tokens = moments.TOKENS_PER_WIDTH * model.weight(0).shape[1]
    rows = moments.token_rows(model, "world", tokens)
    widths = {layer: model.weight(layer).shape[1] for layer in layers}
    slow = measured(lambda some: plain.moments(model, layers, some, tokens), rows)
    fast = measured(lambda some: moments._collect(model, widths, some, tokens), rows)
    names = f"{len(layers)} layers" if len(layers) > 1 else f"layer {layers[0]}"
    return {
        "model": model.name,
        "what": f"moments, {names}",
        "facts": tokens,
        "plain s": slow["seconds"],
        "plain GFLOP": slow["gflop"],
        "s": fast["seconds"],
        "GFLOP": fast["gflop"],
    }


def moments_and_answers(model, requests) -> list[dict]:
    prompts = [request.fact.question for request in requests]
    objects = [request.fact.object for request in requests]
    stop = set(retention.stop_tokens(model.tokenizer).nonzero()[:, 0].tolist())
    slow_answers = measured(lambda some: plain.answers(model, some, stop), prompts)
    fast_answers = measured(lambda *some: retention.measure_prompts(model, *some), prompts, objects)
    return [
        collected(model, list(range(model.n_blocks))),
        collected(model, [model.n_blocks // 4]),
        two_continuations(model, requests),
        {"model": model.name, "what": "answers", "facts": len(prompts)}
        | {
            "plain s": slow_answers["seconds"],
            "plain GFLOP": slow_answers["gflop"],
            "s": fast_answers["seconds"],
            "GFLOP": fast_answers["gflop"],
        },
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*checkpoints.WORLD_MODELS, "gpt2-small"])
    parser.add_argument("--facts", default="1,10,50,200")
    parser.add_argument("--plain-facts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--editors", default="rome,memit,alphaedit,ft,malmen")
    parser.add_argument("--edits-alone", action="store_true", help="leave moments and answers out")
    parser.add_argument("--optimisers", action="store_true", help="Adam and L-BFGS alone")
    parser.add_argument("--table", type=Path, help="a CSV file: fill the table of all editors")
    parser.add_argument("--split", default="study", help="whose facts are edited")
    parser.add_argument("--no-patience", dest="patience", action="store_false")
    options = parser.parse_args()
    if options.plain_facts < 2:
        parser.error("--plain-facts: a line needs two points, give 2 or more")
    if options.table:
        fill(options.table, options)
        return
    if options.optimisers:
        for name in options.models:
            compare_optimisers(name, options)
        return
    counts = [int(number) for number in options.facts.split(",")]
    peak = peak_flops()
    print(
        f"float32 matrix product: {peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads",
        flush=True,
    )
    for name in options.models:
        model = load(name)
        requests = known_facts(model, "study") if trained(model) else one_a_subject()
        table = pd.DataFrame(
            ([] if options.edits_alone else moments_and_answers(model, requests[:200]))
            + edits(model, requests, counts, options)
        )
        table["faster"] = table["plain s"] / table["s"]
        table["fewer FLOPs"] = table["plain GFLOP"] / table["GFLOP"]
        table["share of peak"] = table["GFLOP"] * 1e9 / table["s"] / peak
        table["plain share"] = table["plain GFLOP"] * 1e9 / table["plain s"] / peak
        print(f"{name}: weights {models.weights_bytes(model, 'float32') / 1e6:.0f} MB")
        print(table.round(2).to_string(index=False))
        print(
            f"peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
