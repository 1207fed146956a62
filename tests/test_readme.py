"""What README.md and the README of each folder tell people to type, and the files that they point to, are right."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from data2vec_train import Data2VecVisionConfig, Data2VecVisionForImageClassification, save_pretrained
from data2vec_train.config.check.overrides import find_faults
from data2vec_train.paths import recipes_parent
from data2vec_train.system.plugins import load_plugins
from data2vec_train.weights.preprocessing import ImageProcessor
from tests.documents import COMMANDS, DOCUMENTS, FENCE, ROOT, code


# Each once, in whichever document it stands first
@pytest.mark.parametrize(("task", "arguments"), list(dict.fromkeys(command[1:] for command in COMMANDS)))
def test_a_command_is_accepted(task, arguments, monkeypatch, tmp_path):
    # PATH, DIR, N and so on stand for what the reader has, and runs/NAME for what an earlier command has made.
    words = [re.sub(r"=N$", "=0", word) for word in shlex.split(arguments)]
    monkeypatch.chdir(tmp_path)
    for word in words:
        key, _, place = word.partition("=")
        if key in ("init_from", "checkpoint"):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            Path(place).touch()
    if "encoder.path=FOLDER" in words:
        kind = "wav2vec2" if "modality=audio" in words else "vit"
        Path("FOLDER").unlink(missing_ok=True)
        Path("FOLDER").mkdir()
        Path("FOLDER", "config.json").write_text(json.dumps({"model_type": kind}))
        words += [] if kind == "wav2vec2" else ["modality.image_px=224", "modality.patch_px=16"]
    if "modality=eeg" in words:
        monkeypatch.syspath_prepend(str(ROOT / "tests" / "plugins"))
        monkeypatch.setenv("DATA2VEC_PLUGINS", "eeg")
        load_plugins()
    is_named = any(word.startswith("modality=") for word in words)
    if task in ("probe", "embed", "predict") and not is_named:  # found beside the weights
        words.append("modality=vision")
    faults = find_faults([word for word in words if word != "-m"], config_name=task, multirun="-m" in words)
    if "visoin" in arguments:
        assert len(faults) == 2
        # Other tests of the same process may have added choices.
        text = DOCUMENTS["data2vec_train/config/README.md"]
        assert all(f"  {fault.partition(' Choices')[0]}" in text for fault in faults)
    else:
        assert faults == []


def test_the_commands_are_found():
    assert len(COMMANDS) > 60
    assert {task for _, task, _ in COMMANDS} == {
        *("train", "finetune", "probe", "embed", "predict", "export", "plan", "benchmark")
    }
    assert any("strategy.num_nodes=2" in arguments for _, _, arguments in COMMANDS)


def test_other_commands_name_what_is_there():
    makefile = (ROOT / "Makefile").read_text()
    found = set()
    for name, text in DOCUMENTS.items():
        for line in code(text):
            if command := re.match(r"make ([\w-]+)", line):
                assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), f"{name}: {line}"
            elif command := re.match(r"pytest (tests\S*)", line):
                assert (ROOT / command[1]).exists(), f"{name}: {line}"
            elif command := re.match(r"python -m (tests\.\S+)(.*)", line):
                spec = find_spec(command[1])
                assert spec is not None, f"{name}: {line}"
                for flag in re.findall(r"--[\w-]+", command[2]):
                    assert f'"{flag}"' in Path(spec.origin).read_text(), f"{name}: {line}"
            else:
                continue
            found.add(command[0].split()[0])
    assert found == {"make", "pytest", "python"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the Python in the documents expects: a model in DIR, and two images."""
    folder = tmp_path_factory.mktemp("python")
    config = Data2VecVisionConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, intermediate_size=8)
    config.num_attention_heads = 2
    save_pretrained(Data2VecVisionForImageClassification(config), folder / "DIR")
    ImageProcessor(size=32).save_pretrained(folder / "DIR")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32)).save(folder / name)
    return folder


# tests/test_plugin.py makes the calls of the modality eeg.
PYTHON = [
    (name, block)
    for name, text in DOCUMENTS.items()
    for language, block in FENCE.findall(text)
    if language == "python" and "eeg" not in block
]


# What the Python in the documents calls images, and settings that make its runs small.
IMAGES = [Image.new("RGB", (40, 32), (10 * shade, 99, 0)) for shade in range(20)]
TINY = {"size.dim": 32, "size.depth": 2, "size.num_heads": 2, "size.ffn_dim": 64, "modality.image_px": 32}
TINY |= {"modality.patch_px": 8, "data.num_workers": 0, "report": False}


@pytest.mark.parametrize(("document", "block"), PYTHON)
def test_python_runs(document, block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    block = re.sub(r"max_steps=\d+\)", "max_steps=1)", block)
    block = block.replace("data=images,", "data=images, **tiny,")
    exec(compile(block, document, "exec"), {"images": IMAGES, "tiny": TINY})
    if "OUT" in block:
        assert (folder / "OUT" / "model.safetensors").is_file()


def test_python_is_found():
    assert {name for name, _ in PYTHON} >= {"README.md", "data2vec_train/weights/README.md"}


def anchors(text):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", DOCUMENTS[document])):
        if target.startswith("https:"):
            continue
        place, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / place).resolve() if place else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_readme_is_short():
    text = DOCUMENTS["README.md"]
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


def test_every_recipe_is_in_the_table():
    for path in (recipes_parent() / "recipes").rglob("*.yaml"):
        name = str(path.relative_to(recipes_parent() / "recipes").with_suffix(""))
        assert f"`{name}`" in DOCUMENTS["recipes/README.md"], name


def test_every_readme_is_linked():
    """From README.md, directly or through another one."""
    reached, left = set(), ["README.md"]
    while left:
        document = left.pop()
        reached.add(document)
        for target in re.findall(r"\]\(([^)#]+)", DOCUMENTS[document]):
            file = ((ROOT / document).parent / target).resolve()
            if file.is_dir():  # whose README is shown
                file /= "README.md"
            name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
            if name in DOCUMENTS and name not in reached:
                left.append(name)
    assert {name for name in DOCUMENTS if name.endswith("README.md")} <= reached
