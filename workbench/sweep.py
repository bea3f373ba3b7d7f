"""A grid of notebook runs on Dask: checked whole before the first starts, every combination once,
resumed by running it again.

There is no scheduler here: `--workers` starts Dask's own local cluster, `--scheduler` uses one that
is running. A worker executes one notebook at a time through `batch.run`, which takes a lock, so
that two sweeps on one folder share the work.
"""

import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import dask
import distributed
import psutil
import pydantic
import yaml
from tqdm.auto import tqdm

from workbench import batch, files, inert, runs, spec
from workbench.facts import BadInput, Record

WAIT = 15  # seconds for a scheduler to answer
LOOPBACK = "127.0.0.1"
NO_PAGES = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}  # Dask's HTTP servers answer nothing
START = (
    "start one with `dask scheduler`; for tls:// set distributed.comm.tls in Dask's configuration"
)
OPEN = (
    "scheduler {}: not encrypted, and whoever reaches it or a worker can run code as you; on a network that others share use "
    "tls:// with certificates in Dask's configuration (distributed.comm.tls)"
)


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
        """The parameters of each run; BadInput if there are none, or one twice."""
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise BadInput(f"grid: {empty[0]!r} has no values; give at least one, or leave it out")
        product = (
            [
                dict(zip(self.grid, values, strict=True))
                for values in itertools.product(*self.grid.values())
            ]
            if self.grid
            else []
        )
        found = [self.parameters | cell for cell in product + self.cells]
        found = [
            cell
            for cell in found
            if not any(
                all(cell.get(name) == value for name, value in rule.items())
                for rule in self.exclude
            )
        ]
        if not found:
            raise BadInput("the grid is empty: give grid or cells, and exclude less")
        for number, cell in enumerate(found):
            if cell in found[:number]:
                raise BadInput(f"the grid holds {cell} twice; take one out")
        return found


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run to be: its parameters and its folder."""

    parameters: Mapping
    folder: Path

    @property
    def finished(self) -> bool:
        return runs.finished(self.folder)

    @property
    def failure(self) -> str:
        told = batch.failure_of(self.folder)[1]
        return told.read_text(encoding="utf-8").strip() if told.exists() else ""


def read(path: str | Path) -> Grid:
    """The grid that a YAML file describes; its notebook's path counts from here, or from the file."""
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(
            f"grid {path}: cannot be read ({' '.join(str(error).split())[:120]})"
        ) from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise BadInput(f"grid {path}: holds no fields; it needs notebook, and grid or cells")
    grid = Grid(**fields)
    beside = path.parent / grid.notebook
    return (
        grid
        if Path(grid.notebook).is_file() or not beside.is_file()
        else grid.model_copy(update={"notebook": str(beside)})
    )


def planned(grid: Grid, out: str | Path) -> list[Planned]:
    """Every run of the grid, checked as far as it can be before a model is loaded: names, types,
    ranges, layers and plan against the depth.
    """
    notebook, found = Path(grid.notebook), []
    for cell in grid.combinations():
        try:
            given, made = batch.checked(notebook, cell, grid.preset)
            found.append(
                Planned(parameters=given, folder=Path(out) / batch.identify(notebook, given, made))
            )
            if not found[-1].finished:
                made.blocks()
        except BadInput as error:
            raise BadInput(f"{error} (in the run with {cell})") from None
    return found


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
    out = batch.place(grid.notebook, out)
    every = planned(grid, out)
    _writable(out)
    runs.clean(out)
    todo = [each for each in every if not each.finished and (retry_failed or not each.failure)]
    print_plan(every, todo, out)
    if todo:
        with _cluster(workers, scheduler) as client:
            _check(client)
            gpus = [] if scheduler else _gpus()  # workers of a cluster that is running have theirs
            try:
                _work(client, Path(grid.notebook).resolve(), todo, out.resolve(), gpus)
            finally:
                runs.clean(out)
    return [each for each in every if not each.finished]


def print_plan(every: list[Planned], todo: list[Planned], out: Path) -> None:
    """How many runs, and how long and how much room they may take, judging by those of the grid
    that are finished, else by any that lie there.
    """
    done = [each.folder for each in every if each.finished]
    failed = len(every) - len(done) - len(todo)
    text = f"{len(every)} runs in {out}: {len(done)} finished, {len(todo)} to do" + (
        f", {failed} failed before (--retry-failed)" if failed else ""
    )
    like = [
        folder
        for folder in done or [path.parent for path in out.glob("[!.]*/run.json")]
        if runs.finished(folder)
    ]
    if todo and like:
        seconds = sum(
            sum(runs.read(folder).about.get("seconds", {}).values()) for folder in like
        ) / len(like)
        size = sum(
            path.stat().st_size for folder in like for path in folder.rglob("*") if path.is_file()
        ) / len(like)
        of = "the finished ones" if done else f"{len(like)} other runs there"
        text += f"; about {seconds * len(todo) / 60:.0f} worker minutes and {size * len(todo) / 1e6:.0f} MB more, judging by {of}"
    elif todo:
        text += "; how long they take is told once one is done"
    tqdm.write(text, file=sys.stderr)


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None


@contextmanager
def _cluster(workers: int, scheduler: str) -> Iterator[distributed.Client]:
    if workers < 0:
        raise BadInput(
            f"workers {workers}: at least one is needed; 0 is one a GPU, or one where there is none"
        )
    with _remote_cluster(scheduler) if scheduler else _local_cluster(workers) as client:
        yield client


@contextmanager
def _remote_cluster(scheduler: str) -> Iterator[distributed.Client]:
    """A cluster that is running.

    Its certificates are the ones that Dask's own configuration names (distributed.comm.tls).
    """
    if not scheduler.startswith("tls://"):
        tqdm.write(OPEN.format(scheduler), file=sys.stderr)
    try:
        client = distributed.Client(scheduler, timeout=WAIT)
    except (
        OSError,
        TimeoutError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # the last two: TLS without or with broken certificates
        raise BadInput(
            f"scheduler {scheduler!r}: no answer ({type(error).__name__}: {error}); {START}"
        ) from None
    log = logging.getLogger("distributed.client")
    level = log.level
    log.setLevel(logging.CRITICAL)  # a scheduler that dies is told in one line of ours
    try:
        with client:
            yield client
    finally:
        log.setLevel(level)


@contextmanager
def _local_cluster(workers: int) -> Iterator[distributed.Client]:
    """So many workers on this machine, 0 for one a GPU.

    Ctrl-C ends them, their kernels and no other child of the caller.
    """
    handler, others, ours = signal.getsignal(signal.SIGINT), _children(), set()
    logged = logging.root.manager.disable
    with suppress(ValueError):  # not in the main thread, where no Ctrl-C arrives
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited by the workers: Ctrl-C is for the sweep alone, which ends them
    with dask.config.set(NO_PAGES):
        cluster = distributed.LocalCluster(**_closed(workers))
    with suppress(ValueError):
        signal.signal(signal.SIGINT, handler)
    try:
        with cluster, distributed.Client(cluster) as client:
            try:
                yield client
            except KeyboardInterrupt:
                ours = (
                    _children()
                )  # kernels too, which are nobody's children once their worker has ended
                logging.disable(logging.CRITICAL)  # what is cut off in the middle complains
                raise
    except KeyboardInterrupt:  # perhaps the second one, while the first was being obeyed
        for child in (ours | _children()) - others:  # of the caller's own none
            with suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(
                    child.cmdline()
                ):  # Python's own; it ends by itself
                    child.kill()
        raise
    finally:
        logging.disable(logged)


def _closed(workers: int) -> dict:
    """A local cluster that nobody else can use: every listener on loopback, behind certificates
    that live in memory alone.

    Whoever reaches a Dask worker or nanny runs code as its owner, so other users of the machine are
    kept out too. The cores are shared out, so that workers do not fight for them.
    """
    workers = workers or max(1, len(_gpus()))
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return {
        "n_workers": workers,
        "threads_per_worker": 1,
        "host": LOOPBACK,
        "security": distributed.Security.temporary(),
        "dashboard_address": None,
        "scheduler_kwargs": {
            "dashboard_address": f"{LOOPBACK}:0"
        },  # else the port of everybody's dashboard
        "memory_limit": 0,
        "env": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        "silence_logs": logging.CRITICAL,
    }


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _check(client: distributed.Client) -> None:
    """BadInput if a worker has other code than this process."""
    client.wait_for_workers(1, timeout=60)
    mine = spec.code_fingerprint()
    for address, theirs in client.run(spec.code_fingerprint).items():
        if theirs != mine:
            raise BadInput(
                f"worker {address} runs another version of the workbench; install the same on every machine"
            )


def _work(
    client: distributed.Client, notebook: Path, todo: list[Planned], out: Path, gpus: list[str]
) -> None:
    """Hand the runs out; show done, failed, left, and the last error.

    A worker that dies loses its current run, which another takes up.
    """
    futures = {}
    for planned_run in todo:
        key = f"{planned_run.folder.name}-{time.time_ns()}"
        task = (_one, str(notebook), dict(planned_run.parameters), str(out), gpus)
        futures[client.submit(*task, pure=False, retries=0, key=key)] = planned_run
    failed = 0
    with tqdm(total=len(todo), desc="runs", unit="run") as bar:
        for future, error in distributed.as_completed(
            futures, with_results=True, raise_errors=False
        ):
            if future.status == "cancelled":  # nobody here takes a run back
                raise RuntimeError(
                    f"the scheduler {client.scheduler.address} is gone; finished runs are kept, so start it, and the sweep, again"
                )
            problem = error
            if (
                future.status != "finished"
            ):  # a result may be lost with its worker, though the run is there
                said = error[1] if isinstance(error, tuple) else error
                problem = (
                    ""
                    if futures[future].finished
                    else f"{future.status}: {' '.join(str(said).split())[:200]}"
                )
            if problem:
                failed += 1
                told = batch.failure_of(futures[future].folder)[1]
                if not told.exists():
                    with files.written(told) as partial:
                        partial.write_text(problem + "\n", encoding="utf-8")
                text = f"failed: {futures[future].folder.name}: {problem}"
                tqdm.write(inert.printable(text), file=sys.stderr)
            bar.update()
            running = min(len(client.scheduler_info(n_workers=-1)["workers"]), len(todo) - bar.n)
            bar.set_postfix_str(f"{running} running" + (f", {failed} failed" if failed else ""))


def _one(notebook: str, parameters: dict, out: str, gpus: list[str]) -> str:
    """In a worker: one run, its kernel on the GPU of that worker's number; "" or what went wrong in
    one line.
    """
    os.environ["WORKBENCH_SWEEP"] = "1"
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[distributed.get_worker().name % len(gpus)]
    try:
        batch.run(notebook, parameters, out=out)
    except Exception as error:
        return " ".join(
            f"{'' if isinstance(error, BadInput | RuntimeError) else type(error).__name__ + ': '}{error}".split()
        )
    return ""
