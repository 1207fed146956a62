"""configs/README.md has every group and setting, as the YAML files say them."""

import shutil
from pathlib import Path

import pytest
import yaml

from data2vec_train.config.commented import read
from data2vec_train.config.help import REFERENCE
from data2vec_train.config.reference import PRIMARY, reference, settings_without_a_line
from data2vec_train.paths import config_directory

FOLDER = config_directory()


def test_the_reference_is_current():
    assert (FOLDER / REFERENCE).read_text(encoding="utf-8") == reference(FOLDER), "run make docs"


def test_every_setting_has_a_line():
    missing = settings_without_a_line(FOLDER)
    assert not missing, "write a comment beside: " + ", ".join(missing)


def test_a_setting_without_a_comment_is_found(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "configs")
    file = tmp_path / "configs" / "trainer" / "default.yaml"
    file.write_text(file.read_text() + "new_one: 3\nexplained: 4  # by this\n")
    assert settings_without_a_line(tmp_path / "configs") == ["trainer/default: trainer.new_one"]
    text = reference(tmp_path / "configs")
    assert "| `trainer.explained` | whole number | `4` | by this |" in text


def test_every_setting_is_in_the_reference():
    text = (FOLDER / REFERENCE).read_text(encoding="utf-8")
    tables = text.count("| setting |")
    names = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    absent = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        group = path.parent.relative_to(FOLDER).as_posix().replace("/", ".")
        found = read(path)
        prefix = "" if found.is_global or group == "." else f"{group}."
        for setting in found.settings:
            last = setting.path.rpartition(".")[2]
            if setting.default is not None and not last.startswith("_") and prefix + setting.path not in names:
                absent.append(f"{path}: {setting.path}")
    assert not absent
    assert tables > 30


def test_every_choice_among_several_says_what_it_is():
    for group in (folder for folder in FOLDER.iterdir() if folder.is_dir() and folder.name != "hydra"):
        files = list(group.glob("*.yaml"))
        for file in files if len(files) > 1 else ():
            assert read(file).purpose, f"{file}: a line below the command has to say what this choice is"


@pytest.mark.parametrize("verb", PRIMARY)
def test_every_group_of_a_verb_is_a_section(verb):
    text = (FOLDER / REFERENCE).read_text(encoding="utf-8")
    for group in read(FOLDER / f"{PRIMARY[verb]}.yaml").choices:
        assert f"\n### {group}\n" in text or group.startswith("hydra/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1  # one\n", {"a": ("1", "one")}),
        ("a: 1           # one\n               # and more\nb: 2\n", {"a": ("1", "one and more"), "b": ("2", "")}),
        ("a: '#'  # a hash\n", {"a": ("'#'", "a hash")}),
        ("# python -m x\n# the file\na: 1\n", {"a": ("1", "")}),
        ("b: 0\n# about a\n# and on\na: 1\n", {"b": ("0", ""), "a": ("1", "about a and on")}),
        ("m:  # a map\n  # below\n  k: [1, 2]  # two\n", {"m": (None, "a map"), "m.k": ("[1, 2]", "two")}),
        ("l:  # items\n  - 1  # not this\n  - x\n", {"l": ("[1, x]", "items")}),
        ("t: >-  # folded\n  some\n  text\n", {"t": ("some text", "folded")}),
        ("r: ${share:0.1,${a}}   # a share\n", {"r": ("${share:0.1,${a}}", "a share")}),
        ("f: {}  # empty\n", {"f": ("{}", "empty")}),
    ],
)
def test_comments_belong_to_their_settings(tmp_path, text, expected):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    assert yaml.safe_load(text)
    found = {setting.path: (setting.default, setting.said) for setting in read(file).settings}
    assert found == expected


def test_the_top_of_a_file_is_its_command_and_purpose(tmp_path):
    file = Path(tmp_path / "some.yaml")
    file.write_text("# @package _global_\n# python -m x y=z     what it is\n# and more\na: 1\n")
    found = read(file)
    assert (found.command, found.purpose, found.is_global) == ("python -m x y=z", "what it is and more", True)
