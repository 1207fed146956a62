"""Every value that the check accepts is run once on tiny data; what this machine cannot do is refused before it starts.

The values come from the tables of the check and from the folders of configs, so that a new one is run too.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data2vec_train.config.check import rules
from data2vec_train.config.check import schema as signatures
from data2vec_train.config.check.overrides import find_faults

ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys, traceback
from data2vec_train.__main__ import _pretrain
from data2vec_train.config.compose import main

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
TINY += "size.depth=2 size.dim=16 size.ffn_dim=16 size.num_heads=2 callbacks.probe.every_n_steps=2 "
TINY += "objective.masks_per_sample=1 objective.targets.top_k_layers=1 "
TINY += "modality.encoder.prenet_depth=0 callbacks.monitor.grace_steps=10 "
SOUND = "modality=audio modality.encoder.position_groups=1 size.conv_dim=4 "
TEXT = "modality=text modality.tokenizer.train_vocab_size=300 "
OF_MODALITY = {"vision": "modality=vision ", "audio": SOUND, "text": TEXT}
# Besides the choice: the share of a published schedule that is held leaves no warm-up in two steps.
BESIDES = {"scheduler=tri_stage": " scheduler.hold_steps=0"}
WHY_NOT_HERE = re.compile(r"GPU|needs the package|of Apple's computers")

RUNNING = ("precision.trainer", "strategy.accelerator", "callbacks.monitor.progress")
SLOWLY = ("compile", "modality.encoder.activation", "attention.backend")
GROUPS = ("objective", "attention", "precision", "strategy", "optimizer", "scheduler", "logger", "debug")
# What is no setting of pretraining, or has a test of its own where the command is tested.
ELSEWHERE = {"weights", "format", "pooling", "dtype", "probes", "what", "against", "modalities"}
ELSEWHERE |= {"modality.pages", "step.objectives", "encoder.modes", "step.beside", "backends.names", "backends.bias"}


def values_of(setting):
    return [f"{setting}={value}" for value in rules._NAMES[setting]()]


def options(group):
    lines = [f"{group}={file.stem}" for file in sorted((ROOT / "configs" / group).glob("*.yaml"))]
    return [line + BESIDES.get(line, "") for line in lines]


def check(line):
    return find_faults((TINY + line).split(), config_name="train", on_this_machine=True)


def able(lines):
    """Those that this machine can run; of every other the check says in one sentence what the machine lacks."""
    refused = {line: faults for line in lines if (faults := check(line))}
    assert all(len(faults) == 1 and WHY_NOT_HERE.search(faults[0]) for faults in refused.values()), refused
    return [line for line in lines if line not in refused]


def run(lines, folder):
    """Runs in one process; every run has to end well."""
    assert lines
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), json.dumps([TINY + line for line in lines])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert len(statuses) == len(lines)
    assert {line: status for line, status in statuses.items() if status} == {}, done.stderr[-2000:]


def literals(annotation, module):
    """The values that `Literal[...]` and `bool` allow, as a command line has them."""
    for part in signatures._alternatives(annotation, module):
        if part.name == "Literal":
            yield from (str(value.value).lower() for value in part.arguments)
        elif part.name == "bool":
            yield from ("true", "false")
        elif part.name in signatures._LISTS and part.arguments:
            yield from (f"[{value}]" for value in literals(part.arguments[0], part.module))


def choices_of(node, path=""):
    """Every setting whose annotation lists its values, as `path=value`, of a composed config that is not resolved."""
    if not isinstance(node, dict):
        return
    definition = signatures.find(node["_target_"]) if "_target_" in node else None
    known = signatures.signature(definition).parameters if definition else {}
    for name, value in node.items():
        passed_on = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(value))
        if name in known and known[name].annotation is not None:
            place = passed_on[1] if passed_on else f"{path}{name}"
            yield from (f"{place}={value}" for value in literals(known[name].annotation, known[name].module))
        yield from choices_of(value, f"{path}{name}.")


def test_every_enumerated_setting_is_looked_at():
    assert set(rules._NAMES) == {*RUNNING, *SLOWLY, *ELSEWHERE}


@pytest.mark.slow
def test_precisions_accelerators_and_progress_run_or_are_refused(tmp_path):
    columns = [able(values_of(setting)) for setting in RUNNING]
    run([" ".join(filter(None, row)) for row in itertools.zip_longest(*columns)], tmp_path)


@pytest.mark.slow
def test_all_choices_of_pretraining_run_or_are_refused(tmp_path):
    lines = [line for group in GROUPS for line in options(group)]
    lines += [value for setting in SLOWLY for value in values_of(setting)]
    lines += [f"{sound}{line}" for sound in (SOUND, TEXT) for line in options("objective")]
    run(able(lines), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("modality", OF_MODALITY)
def test_every_choice_of_a_part_runs_or_is_refused(modality, composed, tmp_path):
    """What fits no other setting here is refused in sentences; what the check passes has to run."""
    lines = {}
    for objective in ("data2vec2", "data2vec"):
        cfg = composed(f"modality={modality}", f"objective={objective}", config_name="train")
        for choice in choices_of(OmegaConf.to_container(cfg, resolve=False)):
            if choice.startswith(("hydra.", "trainer.", "data.source.kind", "compile=")):
                continue  # Hydra's and Lightning's own; what the data are
            line = f"{OF_MODALITY[modality]}objective={objective} {choice}"
            if choice not in lines and not check(line):
                lines[choice] = line
    run(list(lines.values()), tmp_path)


@pytest.mark.parametrize(
    "setting", ["precision.trainer=bf16-true", "precision.trainer=64-true", "precision.trainer=16-true",
                "strategy.accelerator=tpu", "strategy.strategy=ddp", "strategy.strategy=fsdp",
                "strategy.strategy=deepspeed_stage_2", "strategy.strategy=single_device", "strategy.devices=2"]
)  # fmt: skip
def test_a_value_that_cannot_be_run_is_refused(setting):
    [fault] = find_faults(setting.split(), config_name="train", on_this_machine=True)
    assert fault.startswith("strategy" if "strategy" in setting else "precision")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("objective=data2vec modality.encoder.mask_token=false", "modality.encoder.mask_token"),
        ("objective.mask_mode=replace", "modality.encoder.mask_token"),
        ("modality=audio objective=data2vec modality.encoder.mask_token=false", "modality.encoder.mask_token"),
        ("modality=text objective.mask_mode=replace", "objective.mask_mode"),
        (
            "modality=text objective=data2vec objective.mask_mode=replace modality.corruption=null",
            "objective.mask_mode",
        ),
    ],
)
def test_hidden_tokens_are_replaced_only_where_the_encoder_has_a_mask_token(line, named):
    [fault] = find_faults(line.split(), config_name="train")
    assert fault.startswith(f"{named}: ")
    assert "replace" in fault


def test_a_mask_token_may_be_asked_for():
    assert find_faults(["objective.mask_mode=replace", "modality.encoder.mask_token=true"], config_name="train") == []
