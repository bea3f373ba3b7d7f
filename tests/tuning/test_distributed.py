"""Two processes share the rows of a tuning; the configuration for several GPUs is one that
accelerate reads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

CONFIG = Path(__file__).parents[2] / "notebooks" / "presets" / "accelerate-fsdp2.yaml"
STUDY = """
import json, os, sys
from accelerate import PartialState
from workbench import deltas, models
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune

model = models.load(sys.argv[1], device="cpu")
task = tasks.text_task(model, tasks.Data(n_train=16, n_valid=4))
looks = []
with deltas.preserved(model.network):
    settings = Settings(max_steps=4, eval_every=2, batch_size=2, learning_rate=1e-3, threshold=0.0)
    plan = plans.resolve(model, "window:1-1")
    history = finetune(model, task, plan, settings, lambda step, epoch: looks.append(step))
    weights = sum(parameter.double().sum().item() for parameter in model.network.parameters())
state = PartialState()
told = {"kind": str(state.distributed_type), "backend": state.backend, "weights": weights}
told |= {"metric": history.log.metric.tolist(), "looks": looks}
with open(os.path.join(sys.argv[2], f"{state.process_index}.json"), "w") as file:
    json.dump(told, file)
"""


def test_two_processes_tune_one_model_together(tiny_folders, tmp_path):
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    settings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [*launch, str(script), str(tiny_folders["gpt2"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["kind"] for each in told] == ["DistributedType.MULTI_CPU"] * 2
    assert told[0]["backend"] == "gloo"
    assert told[0] == told[1]
    assert told[0]["looks"] == [0, 2, 4]


def test_the_configuration_for_several_gpus_is_read_by_accelerate():
    config = load_config_from_file(str(CONFIG))
    assert str(config.distributed_type) == "DistributedType.FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known


@pytest.mark.parametrize("name", ["num_processes", "mixed_precision"])
def test_the_configuration_says_that_it_was_not_run(name):
    assert "has not been run" in CONFIG.read_text()
    assert name in CONFIG.read_text()
