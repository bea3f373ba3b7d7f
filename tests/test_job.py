import json
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from workbench import job, study
from workbench.facts import BadInput

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"
FACT = "developer:windows-mobile-6-5"


def test_the_notebook_is_given_what_differs_from_its_defaults():
    spec = study.Spec(
        fact=FACT,
        editor="memit",
        layers=[2, 3],
        learning_rate=1e-5,
        n_intrinsic=20,
        n_edited=7,
        subject="O'Neil: #1\n\U0001f600",
    )
    given = job.parameters(NOTEBOOK, spec)
    assert given == {
        "editor": "memit",
        "layers": [2, 3],
        "learning_rate": 1e-5,
        "subject": spec.subject,
    }
    for value in given.values():
        text = job._yaml(value)
        assert "\n" not in text
        assert yaml.safe_load(text) == value
    varied = NOTEBOOK.with_name("02_retention.ipynb")
    others = {"vary": "editor", "values": ["ft", "rome"]}
    assert job.parameters(varied, study.Spec(), others=others)["values"] == ["ft", "rome"]
    others["values"] = ["ft", "memit", "alphaedit"]  # the notebook's own
    assert not {"vary", "values"} & set(job.parameters(varied, study.Spec(), others=others))
    with pytest.raises(BadInput, match="declares no parameter n_edited"):
        job.parameters(NOTEBOOK, spec, ["editor", "n_edited"])


def test_a_kernel_that_ends_takes_its_run_along(tmp_path):
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    code = f"""import sys, time, pathlib
from workbench import job
sys.executable = {str(script)!r}
from workbench.spec import Spec
job.Job(pathlib.Path({str(NOTEBOOK)!r}), pathlib.Path({str(tmp_path)!r})).start(Spec())
while not pathlib.Path({str(tmp_path / "pid")!r}).exists(): time.sleep(0.05)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_run_is_watched_by_its_log_and_progress_and_its_folder_goes_with_it(
    tmp_path, monkeypatch
):
    script = tmp_path / "python"
    script.write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
pathlib.Path(os.environ["WORKBENCH_PROGRESS"]).write_text(json.dumps({{"phase": "tuning"}}))
print(json.dumps(sys.argv[1:]), flush=True)
sys.stderr.write("10%\\r20%\\n[IPKernelApp] WARNING\\n")
sys.exit(3)
"""
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(job.sys, "executable", str(script))
    one = job.Job(NOTEBOOK, tmp_path / "runs")
    one.start(study.Spec(fact=FACT, task="text", editor="memit", layers=[2, 3]))
    assert one.status() == 3
    assert not one.running
    command = ["-m", "workbench", "run", str(NOTEBOOK), "-p", "editor", "memit"]
    command += ["-p", "layers", "[2, 3]"]
    assert json.loads(one.last("stdout")) == [*command, "--out", str(tmp_path / "runs")]
    assert one.last("stderr") == "20%"
    assert one.progress() == {"phase": "tuning"}
    one.stop()  # changes nothing once it has ended
    assert not one.stopped
    one.close()
    assert not one.folder.exists()
