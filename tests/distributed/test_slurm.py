"""Sweeps with `hydra/launcher=slurm` and the sbatch script, with stand-ins for SLURM's commands."""

import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distributed import fake_slurm
from tests.distributed.test_launch import TWO, arguments_of
from tests.stress import tiny

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "recipes" / "cluster" / "pretrain.sbatch"


def log_of_job(folder: Path) -> str:
    """What the job wrote, once it has ended."""
    end = time.monotonic() + 200
    while not (folder / "ended").exists():
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.2)
    return (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="needs pip install data2vec-train[slurm]")
def test_members_of_a_sweep_are_jobs_of_several_processes(tmp_path):
    env = fake_slurm.install(tmp_path / "bin", PYTHONPATH=str(CHECKOUT))
    sweep = tmp_path / "sweep"
    arguments = [*arguments_of(tmp_path, 3), "report=false", "seed=0,1", "hydra/launcher=slurm"]
    command = [sys.executable, "-m", "data2vec_train", "-m", *arguments, f"hydra.sweep.dir={sweep}"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr + log_of_job(tmp_path / "bin")
    for member in ("0", "1"):
        assert tiny.step_of(sweep / member) == 3
        assert (sweep / member / "summary.json").is_file()
        assert [file.name for file in (sweep / member).glob("*.log")] == ["train.log"]
    script = next(sweep.glob(".submitit/*/*_submission.sh")).read_text()
    assert "#SBATCH --signal=USR1@120" in script
    assert "#SBATCH --requeue" in script
    assert f"#SBATCH --ntasks-per-node={TWO[-1][-1]}" in script
    # Options of sbatch, each of which it would refuse the job for if it did not know it.
    known = "array cpus-per-task error gpus-per-node job-name nodes ntasks-per-node open-mode output requeue signal "
    assert set(re.findall(r"#SBATCH --([\w-]+)", script)) <= set(f"{known} time wckey".split())


@pytest.mark.slow
def test_the_script_trains_in_a_directory_named_after_the_job(tmp_path):
    env = fake_slurm.install(tmp_path / "bin", PYTHONPATH=str(CHECKOUT))
    here = Path(sys.executable).parent  # the script says python
    env["PATH"] = f"{tmp_path / 'bin'}:{here}:{env['PATH']}"
    arguments = [*arguments_of(tmp_path, 3), "report=false"]
    command = ["sbatch", "--nodes=1", "--ntasks-per-node=2", str(SCRIPT), *arguments]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60)
    said = log_of_job(tmp_path / "bin")
    run = tmp_path / "runs" / "vision" / f"slurm-{fake_slurm.JOB}"
    assert tiny.step_of(run) == 3, said
    assert (run / "summary.json").is_file()
    assert "exit status 0" in said
