"""Private names of Hydra, Lightning, torch and datasets: a version that lacks one is named, and so is the name."""

import ast
import re
from pathlib import Path

import pytest

import data2vec_train
from data2vec_train.errors import ConfigError
from data2vec_train.system import compat

FILES = sorted(Path(data2vec_train.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", compat.PRIVATE)
def test_the_installed_versions_have(path):
    compat.private(path)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("hydra._internal.utils:gone", r"hydra 1\.\S+ has no hydra\._internal\.utils\.gone.*hydra-core==1"),
        ("lightning.pytorch._gone:name", r"lightning 2\.\S+ has no lightning\.pytorch\._gone.*lightning==2"),
        ("torch:ops.aten._gone", r"torch 2\.\S+ has no torch\.ops\.aten\._gone.*torch==2"),
        ("datasets:IterableDataset._gone", r"datasets \S+ has no datasets\.IterableDataset\._gone"),
    ],
)
def test_a_name_that_went_missing_is_said_in_a_line(path, what):
    with pytest.raises(ConfigError, match=what):
        compat.private(path)


def imported_private_names(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and re.match(r"(hydra|lightning|torch|datasets|omegaconf)\b", node.module):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [f"{node.module}: {name}" for name in names if name.startswith("_")]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_private_names_are_imported_through_compat(file):
    assert not imported_private_names(file)
