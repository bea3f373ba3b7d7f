"""Would the quick tests notice a mistake in the core? Mutation testing of the modules in `TESTS`.

    python -m tests.mutants [--module closed_form]... [--minutes 10] [--seed 0]

A mutant is a module with one small mistake: another operator, another constant, a condition
negated, a statement left out. Its tests run in a copy of the tree. If all of them pass the mutant
has survived: a test is missing, or the code is not needed. Docstrings, messages and annotations are
left as they are. No part of `make test`.
"""

import argparse
import ast
import builtins
import copy
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = "not slow and not browser and not gpu"
WARM = (  # imported once, before anything is tried
    "torch",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "datasets",
    "pandas",
    "hypothesis",
)
TESTS = {  # module -> its quick tests
    "closed_form": ["tests/test_closed_form.py"],
    "positions": ["tests/test_positions.py"],
    "tuning/plans": ["tests/tuning/test_plans.py"],
    "tracking/retention": ["tests/tracking/test_retention.py", "-k", "not of_a_world_model"],
    "deltas": ["tests/test_deltas.py"],
    "editing/target_vectors": [
        "tests/editing/test_target_vectors.py",
        "tests/editing/test_against_plain.py::test_memit[gpt2-published]",
        "tests/editing/test_against_plain.py::test_memit[llama-reference]",
    ],
}
# module (* for all), what only the mutant's line holds, why it computes the same: left out of the
# rate
EQUIVALENT = (
    ("*", "strict=False", "the lengths are equal by construction; the flag is a guard"),
    ("positions", "lru_cache(maxsize=9)", "how many tokenizers are remembered"),
    ("tracking/retention", "else 4097", "how many tokens a GPU takes at once"),
    (
        "deltas",
        "get_rng_state_all() if not torch.cuda.is_available()",
        "without a GPU there are no states either way",
    ),
)

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
PAIRS = {
    "min": "max",
    "max": "min",
    "sqrt": "rsqrt",
    "rsqrt": "sqrt",
    "argmax": "argmin",
    "argmin": "argmax",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "zeros": "ones",
    "ones": "zeros",
    "startswith": "endswith",
    "endswith": "startswith",
}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    line: int
    before: str  # the line as it is
    after: str  # and with the mistake
    source: str  # of the whole module


def places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int, ast.AST]]:
    """(parent, field, index, node) of all that may be changed below a node."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "exc"):
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.AST) and not docstring and not isinstance(node, ast.JoinedStr):
                yield parent, field, index, node
                yield from places(node)


def put(parent: ast.AST, field: str, index: int, node: ast.AST) -> None:
    if isinstance(getattr(parent, field), list):
        getattr(parent, field)[index] = node
    else:
        setattr(parent, field, node)


def altered(node: ast.AST, **fields) -> ast.AST:
    node = copy.copy(node)
    vars(node).update(fields)
    return node


def mistakes(field: str, node: ast.AST) -> Iterator[ast.AST]:
    """What may wrongly stand in the place of a node, the `field` of its parent."""
    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield altered(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            yield altered(node, op=OPERATORS[type(node.op)]())
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(2 * node.value or 1.0)
        case ast.Constant(value=str()) if field in ("defaults", "kw_defaults"):
            yield ast.Constant("")
        case ast.Name() if hasattr(builtins, PAIRS.get(node.id, "")):
            yield altered(node, id=PAIRS[node.id])
        case ast.Attribute() if node.attr in PAIRS:
            yield altered(node, attr=PAIRS[node.attr])
        case ast.keyword() if node.arg in PAIRS:
            yield altered(node, arg=PAIRS[node.arg])
        case ast.Return(value=ast.expr()):
            yield ast.Return(None)
    if field in ("test", "ifs") and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield ast.Pass()
    if isinstance(node, ast.Assign) and has_older_value(node):
        yield ast.Pass()


def has_older_value(node: ast.Assign) -> bool:
    """Whether what is assigned to is something already: without the assignment the code would still
    run.
    """
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    return all(name.id in read for name in names if isinstance(name.ctx, ast.Store))


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module."""
    tree = ast.parse(source)
    plain = ast.unparse(tree).splitlines()
    made = []
    for parent, field, index, node in list(places(tree)):
        for mistake in mistakes(field, node):
            put(parent, field, index, mistake)
            text = ast.unparse(tree)
            put(parent, field, index, node)
            pairs = zip(plain, text.splitlines(), strict=False)
            before, after = next(pair for pair in pairs if pair[0] != pair[1])
            made.append(
                Mutant(line=node.lineno, before=before.strip(), after=after.strip(), source=text)
            )
    return made


def is_equivalent(module: str, mutant: Mutant) -> bool:
    texts = [text for where, text, _ in EQUIVALENT if where in (module, "*")]
    return any(text in mutant.after and text not in mutant.before for text in texts)


def run_tests(tests: list[str]) -> None:
    """In a process of its own, which ends with pytest's exit status."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = [
        "-x",
        "-m",
        QUICK,
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_timeout",
        "--basetemp=temporary",
    ]
    os._exit(pytest.main([*tests, *options]))


def passes(module: str, source: str, limit: float) -> bool:
    """Whether the module's tests pass within so many seconds if this is its source.

    Inside the copied tree.
    """
    path = Path("workbench", f"{module}.py")
    before = path.read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(TESTS[module],))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    path.write_text(before, encoding="utf-8")
    return process.exitcode == 0


def alike(one: str, other: str) -> int:
    """How many characters two texts begin with that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def survey(modules: list[str], seconds: float, seed: int) -> None:
    """Try mutants of each module in turn until the time is up; print the survivors, and the share
    killed.
    """
    queues, limits = {}, {}
    equivalent, killed, survived = Counter(), Counter(), Counter()
    for module in modules:
        source = Path("workbench", f"{module}.py").read_text(encoding="utf-8")
        start = time.monotonic()
        if not passes(module, ast.unparse(ast.parse(source)), 600):
            sys.exit(
                f"{module}: without a mutant {' '.join(TESTS[module])} fails; run pytest on it"
            )
        limits[module] = 10 + 3 * (time.monotonic() - start)
        made = mutants_of(source)
        queues[module] = [mutant for mutant in made if not is_equivalent(module, mutant)]
        equivalent[module] = len(made) - len(queues[module])
        random.Random(seed).shuffle(queues[module])
    sys.dont_write_bytecode = (
        True  # two mutants of one size and second would be taken for one another
    )
    end = time.monotonic() + seconds
    turns = (module for _ in range(max(map(len, queues.values()))) for module in modules)
    for module in turns:
        if not queues[module] or time.monotonic() > end:
            continue
        mutant = queues[module].pop()
        if not passes(module, mutant.source, limits[module]):
            killed[module] += 1
            continue
        survived[module] += 1
        same = max(alike(mutant.before, mutant.after) - 60, 0)
        before, after = mutant.before[same:][:120], mutant.after[same:][:120]
        print(f"workbench/{module}.py:{mutant.line}: {before} -> {after}", flush=True)
    for module in modules:
        tried = killed[module] + survived[module]
        share = f"{killed[module] / tried:.1%}" if tried else "none"
        left_out = f"{equivalent[module]} equivalent left out, {len(queues[module])} not tried"
        print(f"{module}: {killed[module]} of {tried} killed ({share}); {left_out}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", action="append", choices=TESTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in WARM:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # those of the copy are to be imported
    with tempfile.TemporaryDirectory() as folder:
        for name in ("workbench", "tests"):
            shutil.copytree(
                ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "data").symlink_to(ROOT / "data")
        os.chdir(folder)
        sys.path[:0] = [folder]
        os.environ |= {"PYTHONPATH": folder, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        os.environ.pop("WORKBENCH_CACHE", None)  # no mutant is to leave anything to the next
        survey(options.module or list(TESTS), 60 * options.minutes, options.seed)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
