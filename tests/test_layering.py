"""Who may import whom: nouns from lowest to highest, then verbs. Each imports what stands above its own row.

Imports inside functions count: they only move the moment at which a dependency is missing.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = "data2vec_train"
ROOT = Path(find_spec(PACKAGE).origin).parent
ANYTHING = None

# Folder or file of the package -> the libraries it may import. It may import every folder above it in this table.
ORDER: dict[str, set[str] | None] = {
    "errors": set(),
    "system": {"filelock", "lightning"},
    "paths": set(),
    "batch": {"torch"},
    "checkpoints": {"torch"},
    "encoders": {"torch"},
    "wrapped": {"torch", "timm", "transformers", "safetensors"},
    "objective": {"torch", "numpy"},
    "heads": {"torch"},
    "data": {"torch", "numpy", "lightning", "PIL", "tifffile", "torchvision", "soundfile", "torchaudio", "tokenizers"}
    | {"datasets", "pyarrow", "huggingface_hub"},
    "weights": {"torch", "numpy", "safetensors", "tokenizers", "PIL"},
    "features": {"torch", "numpy", "sklearn", "threadpoolctl"},
    "testing": {"torch", "numpy"},
    "config": {"hydra", "omegaconf", "yaml", "numpy", "torch"},
    "training": ANYTHING,
    "report": ANYTHING,
}
VERBS = ("pretrain", "finetune", "probe", "embed", "predict", "export", "plan", "benchmark")
# A verb stands on nouns only, with these exceptions: prediction runs what fine-tuning trained, and the benchmark counts
# operations as the planner does.
VERBS_ON_VERBS = {("predict", "finetune"), ("benchmark", "plan")}
ENTRY = ("", "__main__", "api")  # the package's own file, `python -m data2vec_train`, and the calls of all verbs
DATA_NEEDS_OF_OBJECTIVE = {"objective.masking"}
ALGORITHM = ("encoders", "objective", "heads", "batch")
AT_THE_ROOT = {"__init__", "__main__", "api", "batch", "checkpoints", "errors", "paths", "testing"}


def module_name(path: Path) -> str:
    """`encoders/base.py` -> "encoders.base"; a package's own file gives the package, ours the empty string."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(source: str, module: str = "") -> Iterator[tuple[int, str, bool]]:
    """(line, what, whether it is ours) of every import; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.removeprefix(f"{PACKAGE}."), alias.name.split(".")[0] == PACKAGE
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            ours = node.module.split(".")[0] == PACKAGE
            base = node.module.removeprefix(PACKAGE).removeprefix(".") if ours else node.module
            for alias in node.names:
                longer = f"{base}.{alias.name}".removeprefix(".")
                yield node.lineno, longer if ours and longer in MODULES else base, ours


def offences(module: str, source: str) -> list[str]:
    """What a module imports and may not, one sentence each."""
    room, order, found = module.split(".")[0], list(ORDER), []
    if room in ENTRY:
        return []
    for line, name, ours in imports(source, module):
        there = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if not ours:
            allowed = ORDER.get(room, ANYTHING)
            if allowed is not ANYTHING and there not in sys.stdlib_module_names and there not in allowed:
                found.append(f"{where}; {room} may import {', '.join(sorted(allowed)) or 'no library'}")
        elif there in ("", PACKAGE, room):
            continue
        elif there in VERBS:
            if room not in VERBS:
                found.append(f"{where}; nouns know nothing of verbs")
            elif (room, there) not in VERBS_ON_VERBS:
                found.append(f"{where}; what two verbs share belongs into a noun")
        elif room in order and order.index(there) > order.index(room):
            found.append(f"{where}; {there} stands above {room}")
        elif room == "data" and there in ("objective", "heads") and name not in DATA_NEEDS_OF_OBJECTIVE:
            found.append(f"{where}; data knows of the objective only how masks are drawn")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "package")
def test_imports_point_downwards(module):
    found = offences(module, MODULES[module].read_text())
    assert not found, "\n".join(found)


def test_the_table_names_every_folder():
    assert {name.split(".")[0] for name in MODULES} == {*ORDER, *VERBS, *ENTRY}


def test_the_root_holds_few_files():
    assert {path.stem for path in ROOT.glob("*.py")} <= AT_THE_ROOT


@pytest.mark.parametrize("folder", sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/**/__init__.py")))
def test_every_folder_says_what_lives_there(folder):
    """In at most five lines: what it is, what to open first, what to touch for the commonest change."""
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    assert 1 < len(said.splitlines()) <= 5, said
    named = [word.strip("`,.;:()") for word in said.split() if ".py" in word]
    assert named, "it names no file to open"
    for name in named:
        assert (ROOT / folder / name).is_file() or (ROOT / name).is_file(), f"{folder}: there is no {name}"


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("encoders.layers", "import numpy as np", "encoders.layers:1 imports numpy; encoders may import torch"),
        ("encoders.layers", "from data2vec_train.objective.targets import x", "objective stands above encoders"),
        ("objective.decoders", "import os\nimport data2vec_train.data.text", "objective.decoders:2 imports data.text"),
        ("objective.teacher", "def f():\n    import lightning as L", "objective.teacher:2 imports lightning"),
        ("objective.data2vec", "from PIL import Image", "imports PIL"),
        ("encoders.vision", "from datasets import load_dataset", "imports datasets"),
        ("data.image", "from omegaconf import DictConfig", "imports omegaconf; data may import"),
        ("data.collate", "from data2vec_train.objective.data2vec import Data2Vec", "only how masks are drawn"),
        ("features.raw", "from data2vec_train.config.build import build", "config stands above features"),
        ("training.module", "from data2vec_train.pretrain import run", "nouns know nothing of verbs"),
        ("embed.run", "from data2vec_train.pretrain.run import pretrain", "two verbs share"),
    ],
)
def test_the_rules_catch_what_they_forbid(module, source, rule):
    assert rule in "\n".join(offences(module, source))


@pytest.mark.parametrize("module", ["objective.data2vec", "encoders.vision", "objective.masking"])
def test_the_algorithm_loads_nothing_but_torch_and_numpy(module):
    code = f"import sys, {PACKAGE}.{module}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(run.stdout.split())
    heavy = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "PIL", "transformers", "torchvision"}
    assert "torch" in loaded or module == "objective.masking"
    assert not heavy & loaded
