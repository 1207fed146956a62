"""A wrong command is answered in plain sentences, all at once, before anything heavy is imported."""

import contextlib
import csv
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data2vec_train import paths as places
from data2vec_train.config import compose as config
from data2vec_train.config.build import build
from data2vec_train.config.check import overrides as preflight_module
from data2vec_train.config.check.overrides import find_faults, preflight
from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.errors import CollapseError, ConfigError, DataError
from data2vec_train.pretrain.sweep import SweepTable
from data2vec_train.system import constraints
from data2vec_train.system.plugins import load_plugins

TOY = '''
"""Stands for a third party's encoder in one file; importing it must not be needed to check a config."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hydra.core.config_store import ConfigStore

from data2vec_train.errors import ConfigError

Kernels = Sequence[int]


class Encoder:
    def __init__(self, *, dim: int, depth: int, patch_px: int, drop: float, kernels: Kernels, norm_first: bool,
                 kind: Literal["block", "ffn"] = "ffn", cache: Path | None = None):
        self.dim, self.kernels = dim, kernels


class Twin(Encoder):
    pass


@dataclass
class BlockMasker:
    hidden_fraction: float


class InverseBlockMasker(BlockMasker):
    pass


class LinearDecoder:
    def __init__(self, dim: int):
        self.dim = dim


class Refusing:
    def __init__(self, inner: object = None, note: object = None):
        raise ConfigError("this size cannot work")


class Keeping:
    def __init__(self, inner: object, model: object = None):
        self.inner, self.model = inner, model


ENCODER = {"dim": 8, "depth": 1, "patch_px": 4, "drop": 0.0, "kernels": [3], "norm_first": True}
NODE = {"encoder": {"_target_": "toy.Twin", **ENCODER}, "masker": None}
ConfigStore.instance().store(group="modality", name="eeg", node=NODE)
'''

CONFIGS = {
    "train.yaml": """
        defaults: [_self_, {modality: vision}, {size: tiny}, {objective: data2vec}, {optimizer: adamw}, {trainer: cpu},
          {debug: null}]
        seed: 1
        verbose: false
        output: null
        data: {batch_size_per_device: 4, max_bad_fraction: 0.01, path: here}
        scheduler: {warmup_steps: "${share:0.1,${trainer.max_steps}}"}
        hydra:
          searchpath: ["file://${oc.env:DATA2VEC_RECIPES}"]
          callbacks: {sweep_table: {_target_: data2vec_train.pretrain.sweep.SweepTable}}
    """,
    "modality/vision.yaml": """
        image_px: 32
        encoder: {_target_: toy.Encoder, dim: "${size.dim}", depth: "${size.depth}", patch_px: 8, drop: 0,
          kernels: [3, 3], norm_first: true}
        masker: {_target_: toy.InverseBlockMasker, hidden_fraction: 0.8}
    """,
    "modality/audio.yaml": """
        encoder: {_target_: toy.Twin, dim: "${size.dim}", depth: "${size.depth}", patch_px: 8, drop: 0.1, kernels: [10],
          norm_first: false}
        masker: {_target_: toy.BlockMasker, hidden_fraction: 0.5}
    """,
    "modality/text.yaml": """
        encoder: {_target_: toy.Encodr, dim: 4}
        masker: {_target_: toy.BlockMasker}
    """,
    "size/tiny.yaml": "{dim: 32, depth: 4, num_heads: 4}",
    "size/large.yaml": "{dim: 64, depth: 8, num_heads: 5}",
    "objective/data2vec.yaml": """
        {mask_mode: replace, masks_per_sample: 1, tau_start: 0.99, tau_end: 0.999, targets: {top_k_layers: 2},
         decoder: {_target_: toy.LinearDecoder, dim: "${size.dim}"}}
    """,
    "optimizer/adamw.yaml": "{_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3, weight_decay: 0, betas: [0, 0]}",
    "trainer/cpu.yaml": "{_target_: lightning.Trainer, max_steps: 20, devices: 1, precision: 32-true}",
    "debug/smoke.yaml": "# @package _global_\ntrainer: {max_steps: 2}",
    "debug/unset.yaml": "# @package _global_\ndata: {root: '???'}\noutput: ${data.pth}",
}
RECIPE = "# @package _global_\ndefaults: [{override /modality: audio}]\nseed: 7\n"

# What a task does is told by `seed`, so that a sweep can have members that fail in each way.
RUN = """
import json, sys
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from data2vec_train.config import compose as config
from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.system.plugins import load_plugins
from data2vec_train.errors import CollapseError, ConfigError

def task(cfg):
    heavy = [name for name in ("torch", "torchvision", "lightning", "numpy", "datasets") if name in sys.modules]
    print("task ran", cfg.seed, cfg.modality.encoder._target_, *heavy)
    errors = {5: ConfigError("depth cannot be five"), 7: CollapseError("flat"), 8: OSError("b")}
    if cfg.seed in errors:
        raise errors[cfg.seed]
    summary = {"steps": cfg.trainer.max_steps, "seconds": 1.5, "loss_last": 0.25, "probe": {"knn": {"trained": 0.5}}}
    Path(HydraConfig.get().runtime.output_dir, "summary.json").write_text(json.dumps(summary))

config.main(task, config_name="train")
"""


QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with configs, recipes and a plugin."""
    root = tmp_path_factory.mktemp("place")
    for name, text in CONFIGS.items():
        lines = text.strip("\n").split("\n")
        margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        file = root / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(line[margin:] for line in lines) + "\n")
    (root / "recipes" / "vision").mkdir(parents=True)
    (root / "recipes" / "vision" / "base.yaml").write_text(RECIPE)
    (root / "plugins").mkdir()
    (root / "plugins" / "toy.py").write_text(TOY)
    (root / "run.py").write_text(RUN)
    return root


@pytest.fixture
def toy(place, monkeypatch):
    """The plugin of `place`, loaded, and its configs in use."""
    monkeypatch.syspath_prepend(str(place / "plugins"))
    monkeypatch.setenv("DATA2VEC_PLUGINS", "toy")
    monkeypatch.setenv("DATA2VEC_RECIPES", str(place))
    for module in (config, preflight_module):
        monkeypatch.setattr(module, "config_directory", lambda: place / "configs")
    load_plugins()
    return sys.modules["toy"]


def run(place, *arguments, cwd=None, **environment):
    """`python run.py arguments` in a process of its own."""
    paths = [str(Path(config.__file__).parents[2]), str(place / "plugins")]
    known = {"DATA2VEC_PLUGINS": "toy", "DATA2VEC_RECIPES": str(place), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, str(place / "run.py"), "--config-path", str(place / "configs"), *arguments],
        cwd=cwd or place,
        env={**os.environ, **known, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@contextlib.contextmanager
def command(monkeypatch, *arguments):
    """The streams of `main` called with these arguments in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


BROKEN = [
    (["modality=visoin"], ["there is no modality called 'visoin'; did you mean vision? Choices: ", "audio", "text"]),
    (["size=huge"], ["there is no size called 'huge'", "Choices: large, tiny"]),
    (["+recipes=vision/bse"], ["there is no recipe called 'vision/bse'; did you mean vision/base?"]),
    (["+recipes=base"], ["no recipe called 'base'; did you mean vision/base?"]),
    (["recipes=vision/base"], ["add it with a plus: +recipes=vision/base"]),
    (["+modality=audio"], ["leave out the plus: modality=audio"]),
    (["+modality=vision"], ["leave out the plus: modality=vision"]),
    (["modalty=audio"], ["there is no setting called 'modalty'; did you mean modality?"]),
    (["lr=0.1"], ["lr=0.1: there is no setting called 'lr'; did you mean optimizer.lr?"]),
    (["optimizer.wieght_decay=0.1"], ["optimizer.wieght_decay=0.1", "did you mean optimizer.weight_decay?"]),
    (["optimiser.lr=0.1"], ["did you mean optimizer.lr?"]),
    (["optimizer.max_steps=3"], ["did you mean trainer.max_steps?"]),
    (["size.zzz=3"], ["there is no setting called 'size.zzz'; size has dim, depth, num_heads"]),
    (["optimizer.lr=abc"], ["optimizer.lr: expected a number", "got 'abc'"]),
    (["optimizer.lr=1e-4x"], ["optimizer.lr: expected a number", "got '1e-4x'"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas: expected a list of 2 items", "got [0.9]"]),
    (["optimizer.weight_decay=true"], ["optimizer.weight_decay: expected a number, got true"]),
    (["size.dim=wide"], ["size.dim: expected a whole number, got 'wide'"]),
    (["size.depth=2.5"], ["size.depth: expected a whole number, got 2.5"]),
    (["trainer.max_steps=1e3"], ["trainer.max_steps: expected a whole number (1000), got 1000.0"]),
    (["modality.encoder.kernels=[3,x]"], ["kernels: expected a list of items, each a whole number, got [3, 'x']"]),
    (["modality.encoder.norm_first=yes"], ["modality.encoder.norm_first: expected true or false, got 'yes'"]),
    (["modality.encoder.drop=null"], ["modality.encoder.drop: expected a number, got null"]),
    (["+modality.encoder.kind=all"], ["modality.encoder.kind: expected one of 'block', 'ffn', got 'all'"]),
    (["+modality.encoder.patch=4"], ["Encoder has no setting called 'patch'; did you mean patch_px?"]),
    (["~modality.encoder.patch_px"], ["modality.encoder.patch_px: not set, and Encoder needs it"]),
    (["modality=text"], ["no 'Encodr' in toy; did you mean Encoder?", "hidden_fraction: not set, and BlockMasker"]),
    (["+trainer.max_step=3"], ["Trainer has no setting called 'max_step'; did you mean max_steps?"]),
    (["trainer.precision=bf17"], ["trainer.precision: expected one of", "'bf16-mixed'", "got 'bf17'"]),
    (["trainer.devices=two"], ["trainer.devices: expected", "got 'two'"]),
    (["seed=abc"], ["seed: expected a whole number, got 'abc'"]),
    (["verbose=loud"], ["verbose: expected true or false, got 'loud'"]),
    (["seed=[0,1]"], ["seed: expected a whole number, got [0, 1]; for several runs write -m seed=0,1"]),
    (["data=5"], ["data: expected a mapping of settings, got 5"]),
    (["seed"], ["seed: no value given; write seed=VALUE"]),
    (["vision"], ["vision: no value given; did you mean modality=vision?"]),
    (["=3"], ["there is no name before the '='"]),
    (["seed=[1,2"], ["seed=[1,2: cannot be read", "in quotes"]),
    (["+seed=3"], ["seed is already there; leave out the plus: seed=3"]),
    (["~sede"], ["there is no setting called 'sede'; did you mean seed?"]),
    (["seed=0,1"], ["several values make a sweep, which needs -m", "seed=[0,1]"]),
    (["debug=unset"], ["data.root: not set; say which", "output: refers to ${data.pth}", "did you mean data.path?"]),
    (["hydra.run.dirr=x"], ["there is no setting called 'hydra.run.dirr'; did you mean hydra.run.dir?"]),
    (["size.num_heads=5"], ["size.dim=32 cannot be split into 5 heads; choose 4 or 8 heads"]),
    (["modality.image_px=30"], ["30 pixels cannot be cut into patches of 8", "24 and 32"]),
    (["modality.image_px=[32,36]"], ["36 pixels", "32 and 40"]),
    (["objective.targets.top_k_layers=5"], ["objective.targets.top_k_layers: expected a number from 1 to 4"]),
    (["objective.mask_mode=drop"], ["objective.decoder: LinearDecoder sees one token at a time"]),
    (["objective.mask_mode=drop", "modality=audio"], ["modality.masker: BlockMasker hides a different number"]),
    (["objective.tau_start=1.5"], ["objective.tau_start: expected a number from 0 to 1, got 1.5"]),
    (["objective.tau_end=0.5"], ["objective.tau_start: 0.99 is above objective.tau_end=0.5"]),
    (["trainer.max_steps=0"], ["trainer.max_steps: expected a whole number of at least 1, got 0"]),
    (["data.batch_size_per_device=-1"], ["data.batch_size_per_device: expected a whole number of at least 1"]),
    (["objective.masks_per_sample=0"], ["objective.masks_per_sample: expected a whole number of at least 1"]),
    (["size.depth=-3"], ["size.depth: expected a whole number of at least 1, got -3"]),
    (["modality.masker.hidden_fraction=1"], ["hidden_fraction: expected a number between 0 and 1, got 1"]),
    (["data.max_bad_fraction=2"], ["data.max_bad_fraction: expected a number from 0 to 1, got 2"]),
    (["scheduler.warmup_steps=30"], ["scheduler.warmup_steps: 30 is more than trainer.max_steps=20"]),
    (["-m", "modality=vision,adio"], ["modality=adio: there is no modality called 'adio'; did you mean audio?"]),
    (["-m", "seed=1,x"], ["seed: expected a whole number, got 'x' (in the sweep member seed=x)"]),
    (["-m", "size=tiny,large"], ["size.dim=64 cannot be split into 5 heads", "(in the sweep member size=large)"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), BROKEN, ids=[" ".join(case[0]) for case in BROKEN])
def test_a_broken_command_is_named_in_one_sentence(toy, arguments, fragments):
    overrides = [word for word in arguments if word != "-m"]
    faults = find_faults(overrides, config_name="train", multirun="-m" in arguments)
    for fragment in fragments:
        assert fragment in " ".join(faults)
    # One mistake, one sentence, except where the case is about two or a default is broken as well.
    assert len(faults) == 1 or arguments in (["modality=text"], ["debug=unset"])


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["modality=visoin", "--help"], "did you mean vision?"),
        (["--seed=3"], "--seed=3: there is no such flag; settings have no dashes: seed=3"),
        (["--config-name", "trane", "seed=3"], "trane"),
        (["--config-dir", "nowhere"], "nowhere: there is no such directory of configs"),
        (["seed=1", "-m", "seed=x,y"], "seed: expected a whole number, got 'x'"),
    ],
)
def test_a_broken_command_ends_with_status_2_before_the_task_runs(toy, monkeypatch, arguments, fragment):
    with command(monkeypatch, *arguments) as (_, err), pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: pytest.fail("the task ran"), config_name="train")
    heading, *faults = err.getvalue().splitlines()
    assert stopped.value.code == 2
    assert heading.endswith("errors in the command or config:") or heading.endswith("error in the command or config:")
    assert len(faults) == int(heading.split()[0])
    assert fragment in err.getvalue()
    assert "Traceback" not in err.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["+recipes=vision/base", "debug=smoke", "optimizer.lr=1e-4", "+note=x"],
        ["modality=eeg", "modality.encoder.dim=19", "output=run"],
        ["seed=range(0,5)", "modality=vision,audio,eeg", "optimizer.lr=1e-3,1"],
        ["modality=glob(*,exclude=text)", "++extra.deep=3", "~debug"],
        ["hydra.run.dir='a b'", "hydra.job.name=child", "hydra.output_subdir=null"],
    ],
)
def test_a_right_command_has_no_faults(toy, line):
    assert find_faults(line, config_name="train") == []


def test_all_faults_are_reported_at_once(toy):
    line = ["modality=visoin", "lr=0.1", "optimizer.lr=abc", "seed=[", "size.num_heads=5", "+trainer.max_step=1"]
    assert len(find_faults(line, config_name="train")) == len(line)


def test_a_fault_in_every_member_of_a_sweep_is_said_once(toy):
    faults = find_faults(["seed=0,1,2", "optimizer.lr=abc"], config_name="train", multirun=True)
    assert len(faults) == 1
    assert "sweep member" not in faults[0]


def test_a_value_that_is_passed_on_is_reported_where_it_was_written(toy):
    faults = find_faults(["trainer.max_steps=many"], config_name="train")
    assert len(faults) == 1
    assert faults[0].startswith("trainer.max_steps: expected a whole number")


def test_a_broken_file_is_named_without_a_trace(toy, place, tmp_path):
    (tmp_path / "train.yaml").write_text("defaults: [{size: tiny}, _self_]\n")
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "tiny.yaml").write_text("dim: [1\n")
    [fault] = find_faults([], config_name="train", config_dir=tmp_path)
    assert "tiny.yaml" in fault
    assert "line" in fault


def test_an_extra_config_directory_adds_choices(toy, tmp_path):
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "mine.yaml").write_text("{dim: 8, depth: 3, num_heads: 2}")
    assert find_faults(["size=mine", "+recipes=vision/base"], config_name="train", extra_config_dir=tmp_path) == []
    [fault] = find_faults(["size=mine"], config_name="train")
    assert "Choices: large, tiny" in fault


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "torch.load",
        "torch.serialization.load",
        "subprocess.Popen",
        "torchvision.io.os.system",
        "data2vec_train.config.compose.os.system",
        "data2vec_train.system.plugins.importlib.import_module",
        "data2vec_train.config.build.instantiate",
        "data2vec_train.config.check.schema._lookup",
        "lightning.fabric.utilities.cloud_io._load",
        "lightning.pytorch.LightningModule.load_from_checkpoint",
        "lightning.pytorch.cli.LightningCLI",
        "toys.Encoder",
        "toy.Path",
        "system",
        7,
    ],
)
def test_a_config_cannot_name_arbitrary_code(toy, target):
    node = {"deep": [{"_target_": target}]}
    assert preflight(OmegaConf.create(node))
    with pytest.raises(ConfigError):
        build(OmegaConf.create(node))


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=subprocess.Popen",
        "hydra.launcher._target_=os.system",
    ],
)
def test_hydras_own_part_cannot_name_arbitrary_code(toy, override):
    [fault] = find_faults([override], config_name="train")
    assert "may not be called from a config" in fault


def test_importing_the_package_does_not_import_torch():
    code = "import data2vec_train, sys; print('torch' in sys.modules, 'build' in dir(data2vec_train))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_plugin_registers_from_another_working_directory_and_nothing_heavy_is_imported(place, tmp_path):
    done = run(place, "modality=eeg", "modality.encoder.dim=19", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task ran 1 toy.Twin" in done.stdout.splitlines()


def test_a_plugin_in_the_working_directory_needs_no_path(place, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    done = run(place, "modality=eeg", cwd=tmp_path, PYTHONPATH=str(Path(config.__file__).parents[2]))
    assert done.returncode == 0, done.stderr


def test_a_missing_plugin_is_one_line(toy, monkeypatch):
    monkeypatch.setenv("DATA2VEC_PLUGINS", "toy,toyy")
    with command(monkeypatch) as (_, err), pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: pytest.fail("the task ran"), config_name="train")
    assert stopped.value.code == 2
    assert err.getvalue().startswith("error: DATA2VEC_PLUGINS names the plugin toyy")
    assert "no module toyy" in err.getvalue()
    assert len(err.getvalue().splitlines()) == 1


def test_help_is_printed_without_running_anything(toy, monkeypatch):
    with command(monkeypatch, "--help", "size=large") as (out, _), pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: pytest.fail("the task ran"), config_name="train")
    assert stopped.value.code == 0
    assert "modality: audio, eeg, text, vision" in out.getvalue()


def test_a_relative_config_directory_is_below_the_working_directory(place):
    done = run(place, "--config-path=configs", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("a"), 2), (DataError("b"), 2), (CollapseError("c"), 3), (KeyboardInterrupt, 130)]
)
def test_a_known_failure_is_one_line_and_a_status(toy, monkeypatch, tmp_path, error, status):
    def task(cfg):
        raise error

    with command(monkeypatch, f"hydra.run.dir={tmp_path}", *QUIET) as (_, err), pytest.raises(SystemExit) as stopped:
        config.main(task, config_name="train")
    assert stopped.value.code == status
    assert err.getvalue() == ("" if status == 130 else f"error: {error}\n")


def test_a_bug_keeps_its_stack_trace(place, tmp_path):
    done = run(place, "seed=8", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert 'run.py", line' in done.stderr


def test_a_failing_member_does_not_stop_the_sweep(place, tmp_path):
    done = run(place, "optimizer.lr=1e-3", "-m", "seed=5,7,8,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 3
    assert done.stdout.count("task ran") == 4
    assert "error in sweep member 0 (optimizer.lr=0.001 seed=5): depth cannot be five" in done.stderr
    assert "error in sweep member 2 (optimizer.lr=0.001 seed=8): OSError: b" in done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["seed", "status", "steps", "seconds", "loss_last", "knn"] in table
    assert ["5", "failed", "-", "-", "-", "-"] in table
    assert ["1", "done", "20", "1.5", "0.25", "50.0%"] in table


def test_members_beyond_those_composed_beforehand_are_checked_when_they_start(toy, monkeypatch, tmp_path):
    monkeypatch.setattr("data2vec_train.config.check.overrides.MAX_MEMBERS_CHECKED", 2)
    ran = []
    line = ["-m", "seed=1", "trainer.max_steps=2,1,0", f"hydra.sweep.dir={tmp_path}", *QUIET]
    with command(monkeypatch, *line) as (_, err), pytest.raises(SystemExit) as stopped:
        config.main(lambda cfg: ran.append(cfg.trainer.max_steps), config_name="train")
    assert stopped.value.code == 2
    assert ran == [2, 1]
    assert "max_steps=0): trainer.max_steps: expected a whole number of at least 1, got 0" in err.getvalue()


def test_the_sweep_table_has_what_differs_and_what_was_reached(tmp_path, capsys):
    probes = {"knn": {"untrained": 0.1, "raw_input": 0.2, "trained": 0.456}}
    for number, (lines, summary) in enumerate(
        [
            (["seed=0", "size=tiny", "debug=smoke"], {"steps": 10, "loss_last": 0.125, "probe": probes}),
            (["seed=0", "size=large", "debug=smoke"], {"steps": 10, "loss_last": float("nan"), "rankme": 3.5}),
            (["seed=1", "debug=smoke"], None),
        ]
    ):
        member = tmp_path / str(number)
        (member / ".hydra").mkdir(parents=True)
        (member / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in lines))
        if summary:
            (member / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "2" / "summary.json").write_text('{"steps": 10, "los')  # killed while it wrote
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in lines[:2]] == [
        ["seed", "size", "status", "steps", "loss_last", "knn"],
        ["0", "tiny", "done", "10", "0.125", "45.6%"],
    ]
    statuses = zip(lines, ["status", "done", "done", "failed"], strict=True)
    assert len({line.find(status) for line, status in statuses}) == 1
    with (tmp_path / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert rows[0]["probe.knn.raw_input"] == "0.2"
    assert rows[1]["rankme"] == "3.5"
    assert "debug" not in rows[0]


def test_build_lets_a_constructors_error_through(toy):
    refusing = {"_target_": "toy.Refusing"}
    for node in (refusing, {"_target_": "toy.Keeping", "inner": refusing}, {"a": [refusing]}, [refusing]):
        with pytest.raises(ConfigError, match="^this size cannot work$"):
            build(OmegaConf.create(node))


def test_build_hands_on_what_is_supplied_untouched(toy):
    model = toy.BlockMasker(0.5)  # a dataclass, which hydra alone would turn into a config
    nested = {"_target_": "toy.Keeping", "inner": {"sizes": [1, 2]}}
    made = build(OmegaConf.create({"n": 2, "node": {"_target_": "toy.Keeping", "inner": nested}}).node, model=model)
    assert made.model is model
    assert type(made.inner.inner) is dict
    assert type(made.inner.inner["sizes"]) is list
    partial = build(OmegaConf.create({"_target_": "toy.Keeping", "_partial_": True, "inner": 3}), model=model)
    assert isinstance(partial, functools.partial)
    assert partial().model is model
    # Hydra's own partial looks at its target at every call: 0.1 ms and more for each image that is decoded.
    plain = build({"_target_": "toy.Keeping", "_partial_": True, "inner": 3})
    assert type(plain) is functools.partial
    assert plain.func is toy.Keeping
    assert build(None) is None
    assert build({"a": {"_target_": "toy.LinearDecoder", "dim": 3}})["a"].dim == 3


def test_the_share_of_a_number_is_at_least_one():
    register_resolvers()
    cfg = OmegaConf.create({"n": 7, "a": "${share:0.1,${n}}", "b": "${share:0.01,${n}}", "c": "${share:0,${n}}"})
    assert (cfg.a, cfg.b, cfg.c) == (1, 1, 0)


def test_configs_are_found_beside_the_package_and_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "package"
    for parent in (tmp_path, package):
        monkeypatch.setattr(places, "_HERE", package)
        (parent / "configs").mkdir(parents=True)
        (parent / "recipes").mkdir()
        assert places.config_directory() == parent / "configs"
        assert places.recipes_parent() == parent
    monkeypatch.setattr(places, "_HERE", tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="there is no directory configs"):
        places.config_directory()


def test_a_set_recipe_directory_is_respected(monkeypatch):
    monkeypatch.setenv("DATA2VEC_RECIPES", "mine")
    places.expose_recipes()
    assert os.environ["DATA2VEC_RECIPES"] == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "modality.tokenizer.path=/nowhere",
            "modality.tokenizer: /nowhere holds no tokenizer: expected a tokenizer.json",
        ),
        (
            "modality.tokenizer.train_vocab_size=100",
            "modality.tokenizer: tokenizer.train_vocab_size=100; expected at least",
        ),
        ("modality.corruption=null", "objective.mask_mode: corrupt needs modality.corruption"),
        ("objective.mask_mode=replace", "modality.corruption: objective.mask_mode=replace hides tokens in the encoder"),
    ],
)
def test_a_fault_of_text_settings_is_one_sentence(override, message):
    words = ["modality=text", "objective=data2vec", "data=folder", "data.path=somewhere", override]
    (fault,) = find_faults(words, config_name="train")
    assert fault.startswith(message)


def test_spans_cannot_be_dropped():
    spans = ["starts=inside", "nominal_fraction=0.5", "min_spans=1", "equalise_by=none"]
    faults = find_faults(
        [
            "modality=audio",
            "objective=data2vec",
            "objective.mask_mode=drop",
            *[f"modality.masker.{setting}" for setting in spans],
        ],
        config_name="train",
    )
    assert any("SpanMasker hides a different number of tokens in each sample" in fault for fault in faults)
    assert any("Block1dMasker" in fault for fault in faults)


def test_a_range_with_a_path_holds_for_that_setting_only():
    assert constraints.out_of_range("modality.rate", 250) is None  # of somebody's modality
    assert constraints.out_of_range("layer_decay.rate", 1.5)
    planned = find_faults(["modality=vision", "hardware=cpu", "hardware.devices=0"], config_name="plan")
    assert planned == ["hardware.devices: expected a whole number of at least 1, got 0"]
