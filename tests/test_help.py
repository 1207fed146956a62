"""`--help`, `--version` and the console script: every verb answers at once, with what it accepts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data2vec_train import __version__
from data2vec_train.config.check.overrides import choices_of, find_faults
from data2vec_train.config.command import VERBS
from data2vec_train.config.commented import read
from data2vec_train.config.help import help_text, suited_recipes
from data2vec_train.paths import config_directory, expose_recipes

CHECKOUT = Path(__file__).parents[1]
CONSOLE = "import sys; sys.argv[0] = 'data2vec-train'; from data2vec_train.config.command import console; console()"
# Loaded by a program at its end, see the last line that `answer` prints.
HEAVY = {"torch", "numpy", "lightning", "transformers", "datasets", "matplotlib", "torchaudio", "torchvision"}
# What a verb cannot do without, besides a group.
NEEDS = {
    "finetune": ["init_from=."],
    "probe": ["checkpoint=."],
    "embed": ["checkpoint=.", "out=o.parquet"],
    "predict": ["checkpoint=.", "out=o.jsonl"],
    "export": ["checkpoint=.", "out=o"],
}
HEADS = {"vision": "image", "audio": "ctc", "text": "sequence"}


def name_of(verb: str) -> str:
    return "train" if verb == "pretrain" else verb


def answer(*arguments: str) -> subprocess.CompletedProcess:
    """A module and its arguments, run as `python -m` does; the last line of stderr has the packages that it loaded."""
    code = "import runpy, sys\nmodule, *sys.argv[1:] = sys.argv[1:]\n"
    code += "try:\n    runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
    code += "finally:\n    print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def console(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CONSOLE, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(params=VERBS)
def verb(request) -> str:
    return request.param


def test_help_of_every_verb_is_short_and_loads_nothing_heavy(verb):
    done = answer(VERBS[verb], "--help")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.splitlines()[-1].split())
    text = done.stdout
    assert len(text.splitlines()) < 110
    assert f"  python -m {VERBS[verb]} " in text
    for setting in read(config_directory() / f"{name_of(verb)}.yaml").settings:
        name = setting.path.rpartition(".")[2]
        assert setting.default is None or re.fullmatch(r"_\w+_", name) or f"\n  {setting.path}=" in text
    assert "configs/README.md" in text


@pytest.mark.parametrize("verb", ["finetune", "probe", "embed", "predict"])
def test_help_leaves_out_the_data_that_a_verb_refuses(verb):
    choices = choices_of([], config_name=verb, folders=[config_directory()])
    assert choices["data"] == ["folder", "hf", "manifest"]


def commands(verb: str):
    """(choice, commands one of which has to be accepted) for everything that the help of a verb offers."""
    name = name_of(verb)
    choices = choices_of([], config_name=name, folders=[config_directory()])
    groups = [group for group in choices if group not in ("recipes", "sample", "preset", "supervised", "pieces")]
    for group in groups:
        for choice in choices[group]:
            settings = {"modality": "vision"} if "modality" in groups else {}
            if "data" in groups and name not in ("train", "plan"):
                settings |= {"data": "folder"}
            if group == "head":
                modalities = HEADS
            else:
                modalities = {choice: None} if group == "modality" else {"vision": None} if settings else {"": None}
            options = []
            for modality in modalities:
                wanted = settings | ({"modality": modality} if modality else {})
                wanted |= {"head": HEADS[modality]} if "head" in groups else {}
                wanted |= {group: choice}
                line = [f"{key}={value}" for key, value in wanted.items()] + NEEDS.get(verb, [])
                line += ["data.path=d"] if wanted.get("data", "sample") != "sample" else []
                line += ["head.maps=m", "head.classes=3"] if choice == "segmentation" else []
                line += {"timm": ["encoder.name=test_vit"], "hf": ["encoder.path=d"]}.get(choice, [])
                options.append(line)
            yield f"{group}={choice}", options


@pytest.mark.slow
def test_every_choice_that_help_offers_is_accepted(verb):
    refused = {}
    for choice, options in commands(verb):
        faults = [find_faults(line, config_name=name_of(verb)) for line in options]
        faults = [[fault for fault in found if "there is no file or folder" not in fault] for found in faults]
        if all(faults):
            refused[choice] = faults
    assert not refused


@pytest.mark.parametrize(
    ("verb", "line", "fragment"),
    [
        ("finetune", ["callbacks=default"], "callbacks: these are for another command; choose callbacks=finetune"),
        ("train", ["callbacks=finetune"], "callbacks: these are for another command; choose callbacks=default"),
        ("embed", ["data=sample"], "data: the embedded samples are for pretraining"),
        ("predict", ["data=stream", "data.path=d"], "data: a stream is only for pretraining"),
    ],
)
def test_what_help_leaves_out_is_refused(verb, line, fragment):
    line = [*line, "modality=vision", *NEEDS.get(verb, [])]
    line += ["head=image", "data=folder", "data.path=d"] if verb == "finetune" else []
    assert fragment in " ".join(find_faults(line, config_name=verb))


def test_recipes_are_listed_with_the_verb_that_runs_them():
    expose_recipes()
    names = ["vision/base_imagenet_v2", "text/glue_sst2", "text/speeches_words"]
    assert suited_recipes("train", names) == suited_recipes("plan", names) == ["vision/base_imagenet_v2"]
    assert suited_recipes("finetune", names) == ["text/glue_sst2", "text/speeches_words"]


def test_a_primary_config_of_the_user_has_help_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("# my own settings\ndefaults:\n  - train\n\nspeed: 3  # of the tests\n")
    text = help_text("mine", {}, [tmp_path])
    assert text.startswith("my own settings\n")
    assert re.search(r"\n  speed=3 +of the tests\n", text)


@pytest.mark.parametrize("verb", ["pretrain", "embed"])
def test_version_names_this_program(verb):
    done = answer(VERBS[verb], "--version")
    assert (done.returncode, done.stdout) == (0, f"data2vec-train {__version__}\n")
    assert "hydra" not in done.stderr.splitlines()[-1].split()
    assert console("--version").stdout == done.stdout


def test_the_console_script_runs_a_verb_as_python_does(verb):
    assert console(verb, "--help").stdout == answer(VERBS[verb], "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["modality=visoin"], "modality=visoin: there is no modality called 'visoin'"),
        (["seed", "=", "3x"], "write it without spaces: seed=3x"),
        (["-m", "seed=x,y"], "seed: expected a whole number, got 'x'"),
        (["embed", "outt=3"], "there is no setting called 'outt'"),
    ],
)
def test_without_a_verb_the_console_script_pretrains(arguments, fragment):
    done = console(*arguments)
    assert done.returncode == 2
    assert fragment in done.stderr


def test_a_verb_that_is_not_there_is_one_line():
    done = console("finetunes", "modality=text")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no verb called 'finetunes'; verbs are pretrain, finetune, probe, ")
    assert len(done.stderr.splitlines()) == 1


def test_the_console_script_is_declared():
    assert 'data2vec-train = "data2vec_train.config.command:console"' in (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_console_script_trains_in_two_processes(tmp_path):
    """Lightning starts the second process from what it finds in `sys.argv` and `__main__`."""
    line = ["modality=vision", "strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu", "trainer.max_steps=2"]
    line += [
        "size.dim=16",
        "size.depth=2",
        "data.num_workers=0",
        "report=false",
        "precision=fp32",
        "objective.masks_per_sample=1",
    ]
    line += [f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    script = tmp_path / "data2vec-train"
    script.write_text("import sys\nfrom data2vec_train.config.command import console\nsys.exit(console())\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "pretrain", *line]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert len(list((tmp_path / "run").glob("checkpoints/*"))) > 0
