"""What the README tells people to type is right."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from data2vec_train import Data2VecVisionConfig, Data2VecVisionForImageClassification, save_pretrained
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.paths import recipes_parent
from data2vec_train.system.plugins import load_plugins
from data2vec_train.weights.preprocessing import ImageProcessor

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m data2vec_train([^\n`]*)", README.replace("\\\n", " "))))


def _words(command: str) -> list[str]:
    # IMAGENET, DIR, N and so on stand for what the reader has.
    return [re.sub(r"=(N)$", "=0", word) for word in shlex.split(command.partition("    #")[0])]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_accepted(command, monkeypatch, tmp_path):
    words = _words(command)
    if "modality=eeg" in words:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugins"))
        monkeypatch.setenv("DATA2VEC_PLUGINS", "eeg")
        load_plugins()
    task = "train"
    if words[0].startswith("."):
        task = words.pop(0).removeprefix(".")
    (tmp_path / "PATH").touch()
    words = [word.replace("=PATH", f"={tmp_path}/PATH") for word in words]
    if task in ("probe", "embed", "predict"):  # found beside the weights
        words.append("modality=vision")
    faults = find_faults([word for word in words if word != "-m"], config_name=task, multirun="-m" in words)
    if "visoin" in command:
        assert len(faults) == 2
        # Other tests of the same process may have added choices.
        assert all(f"  {fault.partition(' Choices')[0]}" in README for fault in faults)
    else:
        assert faults == []


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    config = Data2VecVisionConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, intermediate_size=8)
    config.num_attention_heads = 2
    save_pretrained(Data2VecVisionForImageClassification(config), tmp_path / "DIR")
    ImageProcessor(size=32).save_pretrained(tmp_path / "DIR")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "OUT" / "model.safetensors").is_file()


def test_every_recipe_is_in_the_table():
    for path in (recipes_parent() / "recipes").rglob("*.yaml"):
        name = str(path.relative_to(recipes_parent() / "recipes").with_suffix(""))
        assert f"`{name}`" in README, name


def test_files_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
