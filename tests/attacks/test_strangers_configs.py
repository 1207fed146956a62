"""A stranger's recipe, folder of configs or run directory against a user who runs it: nothing is written or imported.

Every attack names a file outside the run directory, the canary, which has to stay as it is; the command has to end with
status 2 and one line for each fault, before a run begins.
"""

import contextlib
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from data2vec_train.config import compose as config
from data2vec_train.config.check import overrides as preflight
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.config.compose import main

ROOT = Path(__file__).parents[2]
BEFORE = "alias ll='ls -l'\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory beside a start-up file of a shell, the canary."""
    (tmp_path / "work" / "recipes").mkdir(parents=True)
    (tmp_path / "canary").write_text(BEFORE)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DATA2VEC_RECIPES", str(tmp_path / "work"))
    return tmp_path


def snapshot(folder):
    """Every path below a folder, and what is in the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def command(monkeypatch, *words, name="train"):
    """(exit status, lines on stderr) of a command whose task only says that it ran."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    ran, errors = [], io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(ran.append, config_name=name)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
    assert not ran, "the task ran"
    return status, errors.getvalue().splitlines()


def refused(home, monkeypatch, *words, name="train"):
    before = snapshot(home)
    status, lines = command(monkeypatch, *words, name=name)
    assert status == 2, lines
    assert not any("Traceback" in line for line in lines)
    assert len(lines) <= 9, lines  # a heading, and one for each fault
    assert snapshot(home) == before
    return "\n".join(lines)


# What a recipe says; HOME is the folder with the canary.
LOG = "hydra: {job_logging: {%s}}"
RECIPES = {
    "its log file is a start-up file": LOG % "handlers: {file: {filename: HOME/canary}}",
    "its log file is emptied first": LOG % "handlers: {file: {filename: HOME/canary, mode: w}}",
    "the lines of its log are shell commands": LOG % "formatters: {simple: {format: 'touch HOME/x; #'}}",
    "it brings a second log file": LOG
    % "handlers: {x: {class: logging.FileHandler, filename: HOME/canary}}, root: {handlers: [x]}",
    "a rotating log renames a file": LOG
    % "handlers: {file: {class: logging.handlers.RotatingFileHandler, filename: HOME/canary, maxBytes: 1}}",
    "its log is a module in the working directory": LOG % "handlers: {file: {filename: wandb.py}}",
    "its log file has a name made of two settings": "note: HOME/\n"
    + LOG % "handlers: {file: {filename: '${note}canary'}}",
    "the log of the sweep goes elsewhere": "hydra: {hydra_logging: {handlers: {console: {class: logging.FileHandler, "
    "filename: HOME/canary}}}}",
    "its logging has a filter with a factory": LOG % "filters: {x: {(): logging.Filter, name: x}}",
    "a logger of a library writes its own file": LOG
    % "handlers: {x: {class: logging.FileHandler, filename: HOME/canary}}, loggers: {lightning: {handlers: [x]}}",
    "a level is a mapping that calls": LOG % "root: {level: {(): os.system}}",
    "its run directory is elsewhere": "hydra: {run: {dir: HOME/elsewhere}}",
    "its run directory climbs out": "hydra: {run: {dir: runs/../../..}}",
    "its run directory is the working directory": "hydra: {run: {dir: .}}",
    "its sweep is elsewhere": "hydra: {sweep: {dir: HOME/elsewhere}}",
    "a member of its sweep climbs out": "hydra: {sweep: {subdir: ../../..}}",
    "Hydra's own record climbs out": "hydra: {output_subdir: ../../..}",
    "the name of the job climbs out": "hydra: {job: {name: ../../canary}}",
    "the job changes the working directory": "hydra: {job: {chdir: true}}",
    "the job changes the environment": "hydra: {job: {env_set: {PYTHONPATH: HOME}}}",
    "the job copies the environment into its record": "hydra: {job: {env_copy: [HOME]}}",
    "it turns a run into a sweep": "hydra: {mode: MULTIRUN}",
    "it adds members to a sweep": "hydra: {sweeper: {params: {cache_dir: HOME/x}}}",
    "its launcher runs a shell command": "hydra: {launcher: {setup: ['touch HOME/x']}}",
    "its launcher gives options to srun": "hydra: {launcher: {srun_args: ['--output=HOME/canary']}}",
    "its launcher writes its scripts elsewhere": "hydra: {launcher: {submitit_folder: HOME/elsewhere}}",
    "a partition has a second line": 'hydra: {launcher: {partition: "x\\n#SBATCH --output=HOME/canary"}}',
    "it adds a callback of Hydra that writes pickles": "hydra: {callbacks: {x: {_target_: "
    "hydra.experimental.callbacks.PickleJobInfoCallback}}}",
    "it makes itself the command line": "hydra: {overrides: {task: [cache_dir=HOME/x]}}\ncache_dir: HOME/x",
    "it makes itself the command line of Hydra": "hydra: {overrides: {hydra: [hydra.run.dir=HOME]}, run: {dir: HOME}}",
    "the modality's name climbs out of the runs": "modality: {name: ../../..}",
    "it moves the cache": "cache_dir: HOME/elsewhere",
    "it moves the cache with a variable": "cache_dir: '${oc.env:HOME}/elsewhere'",
    "it moves the cache of durations": "defaults: [{override /modality: audio}]\n"
    "modality: {prepare: {cache_dir: HOME/elsewhere}}",
    "it moves the cache of tables": "defaults: [{override /data: hf}]\ndata: {path: HOME, cache_dir: HOME/elsewhere}",
    "it moves the cache of the test records": "data: {test_source: {cache_dir: HOME/elsewhere}}",
    "checkpoints are made elsewhere": "callbacks: {checkpoint: {directory: HOME/elsewhere}}",
    "checkpoints stand where an image is decoded": "modality: {decode: {_target_: "
    "data2vec_train.training.callbacks.checkpointing.Checkpointing, directory: HOME/elsewhere, config: {}, "
    "every_n_steps: 1, keep_last: 1, asynchronous: false}}",
    "steps without a number are listed elsewhere": "callbacks: {finite: {path: HOME/canary}}",
    "a table of metrics stands for a transform": "modality: {transform: {_target_: "
    "data2vec_train.training.callbacks.monitor.CSVLog, path: HOME/canary}}",
    "a list of bad files stands for a transform": "modality: {transform: {_target_: "
    "data2vec_train.data.quarantine.Quarantine, path: HOME/canary}}",
    "a lock stands for a transform": "modality: {transform: {_target_: data2vec_train.data.files.one_at_a_time, "
    "path: HOME/elsewhere}}",
    "a path comes without a name": "modality: {transform: {_target_: data2vec_train.data.image.ImageTransform, "
    "_args_: [HOME/canary]}}",
    "a data module stands for a transform": "modality: {transform: {_target_: "
    "data2vec_train.data.datamodule.DataModule, quarantine_path: HOME/canary}}",
    "it brings checkpoints of Lightning": "callbacks: {x: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, "
    "dirpath: HOME/elsewhere}}",
    "it brings a logger of Lightning": "logger: {x: {_target_: lightning.pytorch.loggers.CSVLogger, _partial_: true, "
    "save_dir: HOME/elsewhere}}",
    "its TensorBoard is elsewhere": "logger: {x: {_target_: "
    "data2vec_train.training.callbacks.monitor.tensorboard_logger, _partial_: true, save_dir: HOME/elsewhere}}",
    "it brings a profiler": "trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, dirpath: HOME, "
    "filename: x}}",
    "it brings a plugin of Lightning": "trainer: {plugins: [{_target_: lightning.pytorch.plugins.AsyncCheckpointIO}]}",
    "it brings a strategy of Lightning": "strategy: {strategy: {_target_: "
    "lightning.pytorch.strategies.DeepSpeedStrategy, config: HOME/canary}}",
    "the trainer has a folder": "trainer: {default_root_dir: HOME/elsewhere}",
    "a trainer stands where an image is decoded": "modality: {decode: {_target_: lightning.pytorch.Trainer, "
    "default_root_dir: HOME/elsewhere, logger: true}}",
    "it brings a folder of configs": "hydra: {searchpath: [pkg://evil]}",
    "it chooses a launcher of its own folder": "defaults: [{override /hydra/launcher: evil}]",
    "it chooses logging of its own folder": "defaults: [{override /hydra/job_logging: evil}]",
    "it adds a callback that nobody reads": "callbacks: {watch: {every_n_steps: 3}}",
    "it misspells the monitor": "callbacks: {monitr: {min_target_std: 0}}",
    "it sets a setting of the data that there is none of": "data: {held_out_fractoin: 0.5}",
}
GROUPS = {
    "hydra/launcher/evil.yaml": "{_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher, x: HOME}",
    "hydra/job_logging/evil.yaml": "{version: 1, handlers: {x: {class: logging.FileHandler, filename: HOME/canary}}, "
    "root: {handlers: [x]}}",
}


def write_recipe(home, text, name="evil"):
    for group, body in GROUPS.items():
        file = home / "work" / group
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body.replace("HOME", str(home)))
    body = text.replace("oc.env:HOME", "oc.env:home").replace("HOME", str(home)).replace("oc.env:home", "oc.env:HOME")
    (home / "work" / "recipes" / f"{name}.yaml").write_text(f"# @package _global_\n{body}\n")


@pytest.mark.parametrize("attack", RECIPES)
def test_a_recipe_of_a_stranger_is_refused(attack, home, monkeypatch):
    write_recipe(home, RECIPES[attack])
    refused(home, monkeypatch, "+recipes=evil")


def test_a_harmless_recipe_is_taken(home):
    """Levels of logging, and what a job of a cluster gets, may come from a file."""
    write_recipe(home, "seed: 3\nhydra: {verbose: true, job_logging: {root: {level: WARNING}, "
                       "loggers: {lightning.pytorch: {level: ERROR}}}}")  # fmt: skip
    assert find_faults(["+recipes=evil"], config_name="train") == []


def test_the_command_line_still_says_where(home):
    there = ["hydra.run.dir=/tmp/x", "hydra.job.name=mine", "hydra.sweep.dir=/tmp/y", "cache_dir=/tmp/z"]
    assert find_faults([*there, "hydra.output_subdir=null"], config_name="train") == []


def test_the_last_member_of_a_long_sweep_is_refused_before_the_first_one_runs(home, monkeypatch):
    for number in range(4):
        write_recipe(home, "seed: 1", f"good{number}")
    write_recipe(home, RECIPES["its log file is a start-up file"])
    monkeypatch.setattr(preflight, "MAX_MEMBERS_CHECKED", 2)
    said = refused(home, monkeypatch, "-m", "+recipes=good0,good1,good2,good3,evil", "seed=0,1")
    assert "hydra.job_logging" in said


@pytest.mark.parametrize("flag", ["--config-dir", "--config-path"])
def test_a_folder_of_configs_is_judged_like_a_recipe(flag, home, monkeypatch):
    folder = home / "work" / "configs"
    (folder / "debug").mkdir(parents=True)
    (folder / "debug" / "x.yaml").write_text(
        "# @package _global_\nhydra: {job_logging: {handlers: {file: {mode: w}}}}\n"
    )
    (folder / "mine.yaml").write_text(f"seed: 1\nhydra: {{run: {{dir: {home}/elsewhere}}}}\n")
    words = ["debug=x"] if flag == "--config-dir" else ["--config-name", "mine"]
    said = refused(home, monkeypatch, flag, str(folder), *words)
    assert ("hydra.job_logging" if flag == "--config-dir" else "hydra.run.dir") in said


def test_a_file_of_configs_does_not_say_where_features_go(home, monkeypatch):
    folder = home / "work" / "configs" / "pieces"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(f"# @package _global_\nout: {home}/new.parquet\n")
    words = ["--config-dir", str(folder.parent), "pieces=x", "modality=vision", f"checkpoint={home}", "data=folder"]
    assert "out: only the command" in refused(home, monkeypatch, *words, f"data.path={home}", name="embed")


# What a run directory that somebody else made says its command was.
SAVED = {
    "its log file is a start-up file": "- hydra.job_logging.handlers.file.filename=HOME/canary",
    "it goes on elsewhere": "- hydra.run.dir=HOME/elsewhere",
    "it says so in one mapping": "- 'hydra={run: {dir: HOME/elsewhere}}'",
    "it adds a key of Hydra": "- ++hydra.job.env_set.X=1",
    "it moves the cache": "- cache_dir=HOME/elsewhere",
    "it moves the cache of the test records": "- +data.test_source={}\n- ++modality.prepare.cache_dir=HOME/elsewhere",
    "it resumes another run": "- resume=HOME/other",
    "it holds a flag": "- --config-dir=HOME/work",
    "it is a mapping": "seed: 3",
    "it is a number": "3",
    "it has a mapping for a line": "- {seed: 3}",
    "it is no YAML": "- [",
    "it is bytes of zero": "\0\0\0",
    "it is a call": "- +callbacks.x={_target_: os.system, command: touch HOME/x}",
    "it is a tag of Python": "- !!python/object/apply:os.system ['touch HOME/x']",
}


@pytest.mark.parametrize("attack", SAVED)
def test_a_run_of_a_stranger_is_refused(attack, home, monkeypatch):
    run = home / "work" / "run"
    run.mkdir()
    (run / ".command.yaml").write_text(SAVED[attack].replace("HOME", str(home)) + "\n")
    refused(home, monkeypatch, f"resume={run}")


@pytest.mark.parametrize(
    "line", ["hydra.launcher.setup=['touch x']", "hydra.sweeper.params={cache_dir: /x}", "hydra.sweep.subdir=../.."]
)
def test_a_sweep_of_a_stranger_is_refused(line, home, monkeypatch):
    sweep = home / "work" / "sweep"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text(f'hydra: {{overrides: {{task: ["seed=0,1"], hydra: ["{line}"]}}}}\n')
    assert "only the command line may" in refused(home, monkeypatch, f"resume={sweep}")


@pytest.mark.parametrize("name", ["metrics.csv", "train.log", "checkpoints", ".hydra/config.yaml", "a/b"])
def test_a_link_in_a_run_of_a_stranger_is_not_followed(name, home, monkeypatch):
    run = home / "work" / "run"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / ".command.yaml").write_text("- seed=1\n")
    (run / name).symlink_to(home / "canary")
    assert "outside of the run" in refused(home, monkeypatch, f"resume={run}")


def test_links_that_stay_in_the_run_and_a_command_that_is_repeated_are_taken(home, monkeypatch):
    run = home / "work" / "run"
    run.mkdir()
    (run / ".command.yaml").write_text("- cache_dir=/tmp/x\n- seed=4\n")
    (run / "last").symlink_to(run / ".command.yaml")
    seen = []
    monkeypatch.setattr(config, "find_faults", lambda overrides, **_: seen.extend(overrides) or ["stop"])
    status, _ = command(monkeypatch, f"resume={run}", "cache_dir=/tmp/x")
    assert status == 2
    assert "seed=4" in seen


# ---------------------------------------------------------------------------------------------------------------------
# What Python imports

HIDES = ("yaml", "omegaconf", "hydra", "antlr4", "argparse", "numpy", "wandb", "soundfile", "hydra_plugins/evil")


def program(folder, *words, code=None, **environment):
    arguments = ["-m", "data2vec_train", *words] if code is None else ["-c", code]
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "DATA2VEC_PLUGINS")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**known, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_modules_in_a_folder_of_data_are_not_imported(tmp_path):
    """Files of the user's folder, each named after a library."""
    for name in HIDES:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'canary')!r}, 'a').write({name!r})\n")
    done = program(tmp_path, "seed=x")
    assert done.returncode == 2, done.stderr
    assert "seed: expected a whole number" in done.stderr
    assert not (tmp_path / "canary").exists(), (tmp_path / "canary").read_text()


def test_processes_that_a_command_starts_do_not_look_there_either(tmp_path):
    (tmp_path / "child.py").write_text(
        "import subprocess, sys\n"
        "code = 'import os, sys; print(os.getcwd() in map(os.path.abspath, sys.path))'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n"
    )
    done = program(tmp_path, "seed=x", DATA2VEC_PLUGINS="child")
    assert done.stdout.split() == ["False"], done.stderr
    assert done.returncode == 2


def test_a_checkout_that_is_not_installed_runs_from_its_own_root(tmp_path):
    done = program(ROOT, "seed=x", PYTHONPATH="")
    assert done.returncode == 2, done.stderr
    assert "seed: expected a whole number" in done.stderr


def test_importing_the_package_leaves_the_path_of_a_notebook_alone(tmp_path):
    (tmp_path / "mine.py").write_text("print('mine')\n")
    done = program(tmp_path, code="import data2vec_train, mine")
    assert done.stdout == "mine\n"


@pytest.mark.skipif(find_spec("submitit") is None, reason="needs pip install data2vec-train[slurm]")
def test_a_recipe_may_say_how_much_a_job_gets_and_nothing_else(home):
    choose = "defaults: [{override /hydra/launcher: slurm}]\n"
    write_recipe(home, choose + "hydra: {launcher: {partition: gpu, timeout_min: 60, gpus_per_node: 8}}")
    assert find_faults(["+recipes=evil"], config_name="train") == []
    write_recipe(home, choose + "hydra: {launcher: {additional_parameters: {wrap: touch x}}}")
    [fault] = find_faults(["+recipes=evil"], config_name="train")
    assert "hydra.launcher" in fault
