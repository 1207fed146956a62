"""What every process finds out by itself lands in the files of the run, once, by the hand of the first process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_launch import TWO, arguments_of, environment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


def torchrun(module: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, module, *arguments]
    env = environment(PYTHONPATH=str(Path(__file__).parents[2]))
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_broken_samples_of_all_processes_are_listed_once(tmp_path):
    run = tmp_path / "run"
    arguments = [*arguments_of(tmp_path, 6), "report=false", f"hydra.run.dir={run}", "data.held_out_fraction=0"]
    broken = [tmp_path / "data" / "images" / f"{number:02d}.png" for number in (3, 8, 14, 19)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    result = torchrun("data2vec_train", arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    listed = [json.loads(line)["key"] for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(set(listed))
    assert {Path(key).name for key in listed} == {file.name for file in broken}
    assert json.loads((run / "summary.json").read_text())["broken_samples"] == len(broken)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_collapse_ends_all_processes_with_a_report(strategy, tmp_path):
    run = tmp_path / "run"
    own = [
        word for word in arguments_of(tmp_path, 6) if not word.startswith(("strategy=", "callbacks.monitor", "report"))
    ]
    limits = ["callbacks.monitor.min_target_std=100", "callbacks.monitor.grace_steps=3", f"strategy={strategy}"]
    result = torchrun("data2vec_train", [*own, *limits, f"hydra.run.dir={run}"], tmp_path)
    assert "collapse at step 3" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed/elastic")[0]
    assert json.loads((run / "summary.json").read_text())["status"] == "collapsed"
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_fine_tune(tmp_path):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    arguments = [*arguments_of(tmp_path, 3), "report=false", f"hydra.run.dir={run}"]
    assert torchrun("data2vec_train", arguments, tmp_path).returncode == 0
    images = tmp_path / "data" / "images"
    for number, file in enumerate(sorted(images.glob("*.png"))):
        (images / "ab"[number % 2]).mkdir(exist_ok=True)
        file.rename(images / "ab"[number % 2] / file.name)
    own = ["modality=vision", "head=image", f"init_from={run}", "data=folder", f"data.path={images}", *TWO]
    own += ["data.num_workers=0", "data.batch_size_per_device=4", "trainer.max_steps=6", "freeze.encoder_steps=3"]
    own += ["data.held_out_fraction=0.2", f"hydra.run.dir={tuned}", "trainer.log_every_n_steps=1"]
    result = torchrun("data2vec_train.finetune", own, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tuned / "report.html").is_file()
    assert (tuned / "model" / "model.safetensors").is_file()
    assert json.loads((tuned / "summary.json").read_text())["steps"] == 6
