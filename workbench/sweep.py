"""A grid of notebook runs on Dask: checked whole before the first starts, every combination once,
resumed by running it again.

There is no scheduler here: `--workers` starts Dask's own local cluster, `--scheduler` uses one that
is running. A worker executes one notebook at a time through `batch.run`, which takes a lock, so
that two sweeps on one folder share the work.
"""

import functools
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import dask
import distributed
import pydantic
from tqdm.auto import tqdm

from workbench import batch, files, runs, spec
from workbench.records import BadInput, Record, fields_of, one_line, refused

WAIT = 15  # seconds for a scheduler to answer
LOOPBACK = "127.0.0.1"
PAGES = ("distributed.scheduler.http.routes", "distributed.worker.http.routes")
START = "start one with `dask scheduler`; for tls:// set Dask's distributed.comm.tls"
OPEN = "not encrypted, and whoever reaches it can run code as you; better use tls://"


class Grid(Record):
    """What a grid file says: every combination of `grid`, and each of `cells`, over the fixed
    `parameters`, less what `exclude` matches.
    """

    notebook: str
    preset: str = ""
    parameters: dict = pydantic.Field(default_factory=dict)
    grid: dict[str, list] = pydantic.Field(default_factory=dict)
    cells: list[dict] = pydantic.Field(default_factory=list)
    exclude: list[dict] = pydantic.Field(default_factory=list)

    def combinations(self) -> list[dict]:
        """The parameters of each run; BadInput if there are none."""
        for name, values in self.grid.items():
            if not values:
                raise BadInput(f"grid: {name!r} has no values, so that the grid is empty; give one")
        products = itertools.product(*self.grid.values()) if self.grid else []
        cells = [dict(zip(self.grid, values, strict=True)) for values in products]
        every = [self.parameters | cell for cell in cells + self.cells]
        rules = [rule.items() for rule in self.exclude]
        kept = [cell for cell in every if not any(rule <= cell.items() for rule in rules)]
        for number, cell in enumerate(kept):
            if cell in kept[:number]:
                raise BadInput(f"the grid holds {cell} twice; take one out")
        if not kept:
            raise BadInput("the grid is empty: give cells, or each name a value; exclude less")
        return kept


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run to be: its parameters and its folder."""

    parameters: Mapping
    folder: Path

    @property
    def failure(self) -> str:
        """The error that an earlier attempt left, or nothing."""
        note = batch.failure_of(self.folder)[1]
        return note.read_text(encoding="utf-8").strip() if note.exists() else ""


def read(path: str | Path) -> Grid:
    """The grid of a YAML file; its notebook's path counts from here, or from the file."""
    path = Path(path)
    grid = Grid(**fields_of(path, "grid"))
    beside = path.parent / grid.notebook
    if beside.is_file() and not Path(grid.notebook).is_file():
        return grid.model_copy(update={"notebook": str(beside)})
    return grid


def planned(grid: Grid, out: str | Path) -> list[Planned]:
    """Every run of the grid, checked as far as it can be before a model is loaded: names, types,
    ranges, layers and plan against the depth.
    """
    every = []
    for cell in grid.combinations():
        try:
            parameters, experiment = batch.checked(Path(grid.notebook), cell, grid.preset)
            folder = Path(out) / batch.identify(Path(grid.notebook), parameters, experiment)
            run = Planned(parameters=parameters, folder=folder)
            if not runs.finished(folder):
                experiment.blocks()
        except BadInput as error:
            raise BadInput(f"{error} (in the run with {cell})") from None
        every.append(run)
    return every


def sweep(
    grid: Grid,
    out: str | Path = "",
    workers: int = 0,
    scheduler: str = "",
    retry_failed: bool = False,
) -> list[Planned]:
    """Run what is not finished; returns the runs that failed, each with its error beside where its
    folder would be.

    Finished runs are kept. Runs that failed are not tried again unless `retry_failed`. Ctrl-C ends
    it; a second start goes on.
    """
    out = runs.place(out, grid.notebook).resolve()
    every = planned(grid, out)
    files.check_writable(out)
    runs.clean(out)
    unfinished = [run for run in every if not runs.finished(run.folder)]
    todo = [run for run in unfinished if retry_failed or not run.failure]
    finished = len(every) - len(unfinished)
    failed = len(unfinished) - len(todo)
    counts = f"{finished} finished, {len(todo)} to do, {failed} failed before (--retry-failed)"
    tqdm.write(f"{len(every)} runs in {out}: {counts}", file=sys.stderr)
    if todo:
        logged = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # what dies is told in one line of ours
        try:
            with _remote_client(scheduler) if scheduler else _local_client(workers) as client:
                _check_code(client)
                # Workers of a cluster that is running have their GPUs.
                _work(client, Path(grid.notebook).resolve(), todo, [] if scheduler else _gpus())
        finally:
            logging.disable(logged)
            runs.clean(out)
    return [run for run in every if not runs.finished(run.folder)]


def _remote_client(scheduler: str) -> distributed.Client:
    """Its certificates are the ones that Dask's own configuration names (distributed.comm.tls)."""
    if not scheduler.startswith("tls://"):
        tqdm.write(f"scheduler {scheduler}: {OPEN}", file=sys.stderr)
    with refused(f"scheduler {scheduler!r}: no answer", START):
        return distributed.Client(scheduler, timeout=WAIT)


@contextmanager
def _local_client(workers: int) -> Iterator[distributed.Client]:
    """A client of so many workers on this machine, 0 for one a GPU; Ctrl-C ends them and their
    kernels.
    """
    options = _local_options(workers)
    with ExitStack() as stack:
        with _deaf_to_ctrl_c(), dask.config.set({route: [] for route in PAGES}):
            cluster = stack.enter_context(distributed.LocalCluster(**options))
        client = stack.enter_context(distributed.Client(cluster))
        try:
            yield client
        except KeyboardInterrupt:
            with _deaf_to_ctrl_c():  # a second one, while the first is being obeyed
                for nanny in cluster.workers.values():
                    batch.kill(batch.family(nanny.pid))
                stack.close()
            raise


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started in the block stays deaf to it: it is for the sweep alone, which ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _local_options(workers: int) -> dict:
    """A local cluster that nobody else can use: every listener on loopback, behind certificates
    that live in memory alone.

    Whoever reaches a Dask worker or nanny runs code as its owner, so other users of the machine are
    kept out too. The free cores are shared out, so that workers do not fight for them;
    OMP_NUM_THREADS, if it is set, is the number of threads of each.
    """
    from workbench.models import free_cores  # with torch, which a plan of the runs has loaded

    if workers < 0:
        raise BadInput(f"workers {workers}: give at least one, or 0 for one a GPU")
    workers = workers or max(1, len(_gpus()))
    share = str(max(1, free_cores(os.cpu_count() or 1) // workers))
    threads = os.environ.get("OMP_NUM_THREADS", share)
    return {
        "n_workers": workers,
        "threads_per_worker": 1,
        "host": LOOPBACK,
        "security": distributed.Security.temporary(),
        "dashboard_address": None,
        "scheduler_kwargs": {"dashboard_address": f"{LOOPBACK}:0"},  # else everybody's port
        "memory_limit": 0,
        "env": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        "silence_logs": logging.CRITICAL,
    }


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process may use."""
    import torch

    every = [str(number) for number in range(torch.cuda.device_count())]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[: len(every)] if named else every


def _check_code(client: distributed.Client) -> None:
    """BadInput if a worker has other code than this process."""
    client.wait_for_workers(1, timeout=60)
    for address, fingerprint in client.run(spec.code_fingerprint).items():
        if fingerprint != spec.code_fingerprint():
            raise BadInput(f"worker {address}: another version of the workbench; install this one")


def _work(client: distributed.Client, notebook: Path, todo: list[Planned], gpus: list[str]) -> None:
    """Hand the runs out; show done, failed, time left, and each error.

    A worker that dies loses its current run, which another takes up.
    """
    task = functools.partial(_run_one, str(notebook), gpus)
    keys = [f"{run.folder.name}-{time.time_ns()}" for run in todo]
    futures = dict(zip(client.map(task, todo, key=keys), todo, strict=True))
    done = distributed.as_completed(futures, with_results=True, raise_errors=False)
    failed = 0
    with tqdm(done, total=len(todo), desc="runs", unit="run") as bar:
        for future, result in bar:
            if future.status == "cancelled":  # nobody here takes a run back
                what = f"the scheduler {client.scheduler.address} is gone"
                raise RuntimeError(f"{what}; start it, and this, again")
            run = futures[future]
            # Its worker may have died, and the run be there all the same.
            if future.status != "finished" and not runs.finished(run.folder):
                reason = result[1] if isinstance(result, tuple) else result
                problem = one_line(str(reason) or future.status)
                failed += 1
                bar.set_postfix_str(f"{failed} failed")
                if not run.failure:
                    batch.note_failure(run.folder, problem)
                tqdm.write(f"failed: {run.folder.name}: {problem}", file=sys.stderr)


def _run_one(notebook: str, gpus: Sequence[str], run: Planned) -> None:
    """In a worker: one run, its kernel on the GPU of that worker's number."""
    os.environ["WORKBENCH_SWEEP"] = "1"
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[distributed.get_worker().name % len(gpus)]
    batch.run(notebook, run.parameters, out=run.folder.parent)
