"""Every value that the check accepts is run once on tiny data; what this machine cannot do is refused before it starts.

The values come from the tables of the check and from the folders of configs, so that a new one is run too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data2vec_train import rules
from data2vec_train.preflight import find_faults

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, traceback
from data2vec_train.__main__ import _pretrain
from data2vec_train.config import main

folder, lines = sys.argv[1], json.loads(sys.argv[2])
statuses = {}
for number, line in enumerate(lines):
    sys.argv = ["train", *line.split(), f"hydra.run.dir={folder}/{number}", f"cache_dir={folder}/cache"]
    try:
        main(_pretrain, config_name="train")
        statuses[line] = 0
    except SystemExit as stopped:
        statuses[line] = stopped.code or 0
    except Exception:
        statuses[line] = traceback.format_exc()[-500:]
print(json.dumps(statuses))
"""
TINY = "trainer.max_steps=2 data.batch_size_per_device=4 data.max_probe_samples=40 data.num_workers=0 report=false "
TINY += "size.depth=2 size.dim=16 size.ffn_dim=16 size.num_heads=2 callbacks.probe.every_n_steps=2 objective.views=1 "
TINY += "modality.encoder.prenet_depth=0 objective.targets.top_k_layers=1 callbacks.monitor.grace_steps=10 "
SOUND = "modality=audio modality.encoder.position_groups=1 size.conv_dim=4 "

RUNNING = ("precision.trainer", "strategy.accelerator", "callbacks.monitor.progress")
SLOWLY = ("compile", "modality.encoder.activation", "attention.backend")
GROUPS = ("objective", "attention", "precision", "strategy", "optimizer", "scheduler", "logger", "debug")
# What is no setting of pretraining, or has a test of its own where the command is tested.
ELSEWHERE = {"weights", "format", "pooling", "dtype", "probes", "what", "against", "modalities"}
ELSEWHERE |= {"modality.pages", "step.objectives", "encoder.modes", "step.beside", "backends.names", "backends.bias"}


def values_of(setting):
    return [f"{setting}={value}" for value in rules._NAMES[setting]()]


def options(group):
    return [f"{group}={file.stem}" for file in sorted((ROOT / "configs" / group).glob("*.yaml"))]


def run_or_refuse(lines, tmp_path):
    """Runs in one process what the check lets pass; every run has to end well."""
    checked = {line: find_faults((TINY + line).split(), config_name="train", on_this_machine=True) for line in lines}
    refused = {line for line, faults in checked.items() if faults}
    assert all(len(checked[line]) == 1 for line in refused), checked
    able = [TINY + line for line in lines if line not in refused]
    assert able
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(able)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert {line: status for line, status in statuses.items() if status} == {}, done.stderr[-2000:]
    return refused


def test_every_enumerated_setting_is_looked_at():
    assert set(rules._NAMES) == {*RUNNING, *SLOWLY, *ELSEWHERE}


@pytest.mark.slow
def test_precisions_accelerators_and_progress_run_or_are_refused(tmp_path):
    refused = run_or_refuse([value for setting in RUNNING for value in values_of(setting)], tmp_path)
    assert all(one.startswith(("precision", "strategy")) for one in refused)


@pytest.mark.slow
def test_all_choices_of_pretraining_run_or_are_refused(tmp_path):
    lines = [one for group in GROUPS for one in options(group)]
    lines += [value for setting in SLOWLY for value in values_of(setting)]
    lines += [f"{sound}{one}" for sound in (SOUND, "modality=text ") for one in options("objective")]
    run_or_refuse(lines, tmp_path)


@pytest.mark.parametrize(
    "setting", ["precision.trainer=bf16-true", "precision.trainer=64-true", "precision.trainer=16-true",
                "strategy.accelerator=tpu", "strategy.strategy=ddp", "strategy.strategy=fsdp",
                "strategy.strategy=deepspeed_stage_2", "strategy.strategy=single_device", "strategy.devices=2"]
)  # fmt: skip
def test_a_value_that_cannot_be_run_is_refused(setting):
    [fault] = find_faults(setting.split(), config_name="train", on_this_machine=True)
    assert fault.startswith("strategy" if "strategy" in setting else "precision")
