"""However its processes are started, a run has one directory, and only the first process writes into it."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from data2vec_train.config.check.overrides import find_faults
from tests.stress import tiny

TWO = ["strategy=ddp", "strategy.accelerator=cpu", "strategy.devices=2"]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def arguments_of(folder: Path, steps: int) -> list[str]:
    own = tiny.make_data(folder / "data")["vision"]
    return [*own, *TWO, "data.num_workers=0", f"trainer.max_steps={steps}"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def the_run(folder: Path) -> Path:
    """The only run directory below `folder`, with the files of one process."""
    [run] = (folder / "runs" / "vision").iterdir()
    assert (run / "summary.json").is_file()
    assert [file.name for file in run.glob("*.log")] == ["train.log"]
    assert "run directory" in (run / "train.log").read_text()
    assert tiny.step_of(run) > 0
    return run


def test_torchrun_leaves_one_directory(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "data2vec_train"]
    subprocess.run([*command, *arguments_of(tmp_path, 3)], cwd=tmp_path, env=environment(), check=True, timeout=200)
    the_run(tmp_path)


def srun(arguments: list[str], folder: Path, **more: str) -> list[subprocess.Popen]:
    """Two processes with the variables that srun sets."""
    place = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    place |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    command = [sys.executable, "-m", "data2vec_train", *arguments]
    processes = []
    for rank in range(2):
        env = environment(**place, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **more)
        with (folder / f"{rank}.txt").open("a") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
    return processes


@pytest.mark.slow
def test_a_job_of_slurm_is_queued_again_and_goes_on(tmp_path):
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    processes = srun(arguments_of(tmp_path, 5000), tmp_path, PATH=path)
    run = tmp_path / "runs" / "vision" / "slurm-4711"
    while tiny.step_of(run) < 3:
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    assert [process.wait(60) for process in processes] == [75, 75]
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    stopped = tiny.step_of(run)
    again = srun(["resume=changed", *arguments_of(tmp_path, stopped + 3)], tmp_path, PATH=path)
    assert [process.wait(120) for process in again] == [0, 0]
    assert the_run(tmp_path) == run
    assert tiny.step_of(run) == stopped + 3
    assert f"after step {stopped}" in (tmp_path / "0.txt").read_text()


def faults(*overrides: str, multirun: bool = False) -> str:
    more = ["hydra.mode=MULTIRUN"] if multirun else []
    found = find_faults(
        ["modality=vision", *overrides, *more], config_name="train", multirun=multirun, on_this_machine=True
    )
    return "\n".join(found)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    for name in [
        variable for variable in os.environ if variable.startswith(("SLURM_", "TORCHELASTIC_", "DATA2VEC_LAUNCH"))
    ]:
        monkeypatch.delenv(name)


def test_a_sweep_of_many_processes_says_what_works(monkeypatch):
    assert "hydra/launcher=slurm" in faults(*TWO, "seed=0,1", multirun=True)
    assert not faults("seed=0,1", multirun=True)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert faults(*TWO, "seed=0,1", multirun=True).startswith("-m: under torchrun")


def test_processes_that_do_not_match_are_refused(monkeypatch):
    assert faults(*TWO, "strategy.num_nodes=2").startswith("strategy.num_nodes")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert not faults(*TWO)
    assert "strategy.devices=2 strategy.num_nodes=1 strategy=ddp" in faults()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert faults(*TWO, "strategy.num_nodes=2").startswith("hydra.run.dir")
    assert not faults(*TWO, "strategy.num_nodes=2", "hydra.run.dir=there")


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs pip install data2vec-train[slurm]")
def test_a_sweep_on_slurm_has_a_task_for_each_device():
    from hydra import compose, initialize_config_dir

    from data2vec_train.paths import config_directory, expose_recipes

    assert not faults(*TWO, "seed=0,1", "hydra/launcher=slurm", multirun=True)
    expose_recipes()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("train", ["modality=vision", *TWO, "hydra/launcher=slurm"], return_hydra_config=True)
    assert (cfg.hydra.launcher.tasks_per_node, cfg.hydra.launcher.nodes) == (2, 1)
