"""Who may import whom, read from the sources: the algorithm needs torch alone, and nothing below knows Hydra.

    L0 layers                                        torch
    L1 encoders, decoders, masking, targets          L0, numpy; of each other only `encoders.base`
    L2 teacher, data2vec                             L0, L1; no framework, no data
    L2 data                                          no objective; the batch from `encoders.base`, masks from `masking`
    L2 heads, hf                                     encoders and heads; never transformers, which only tests import
    L3 module, optim, monitor, probes, bench         L0-L2, Lightning
    L4 config, places, preflight, rules, tasks       everything, Hydra and OmegaConf

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
STDLIB = sys.stdlib_module_names

# Module or package below ours -> what it may import. A name stands for everything below it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "layers": {"torch", "layers", "errors"},
    "encoders.base": {"torch", "numpy", "errors"},
    "encoders": {"torch", "numpy", "layers", "encoders", "errors"},
    "decoders": {"torch", "numpy", "layers", "encoders.base", "errors"},
    "masking": {"torch", "numpy", "layers", "encoders.base", "errors"},
    "targets": {"torch", "numpy", "layers", "encoders.base", "errors"},
    "teacher": {"torch", "numpy", "layers", "encoders", "errors"},
    "heads": {"torch", "errors"},
    "outputs": {"filelock", "errors"},
    "checkpoints": {"torch", "outputs", "errors"},
    "hf": {"torch", "numpy", "safetensors", "tokenizers", "PIL", "layers", "encoders", "heads", "hf", "checkpoints"}
    | {"outputs", "errors", "vocabulary"},
    "vocabulary": {"tokenizers", "errors"},
    "try_tokenizer": {"tokenizers"},
    "data2vec": {"torch", "numpy", "layers", "encoders", "decoders", "targets", "teacher", "errors"},
}
COMMANDS = ("export", "finetune", "probe", "embed", "predict", "benchmark", "plan")
FORBIDDEN_BELOW_TASKS = {"hydra", "omegaconf"}
MAY_USE_HYDRA = ("config", "places", "preflight", "rules", "tasks", "__main__", *COMMANDS, "command")
HEAVY = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "PIL", "transformers", "torchvision"}
NO_OBJECTIVE = {"data2vec", "teacher", "targets", "decoders", "module", "monitor", "probes", "optim", "tasks", "config"}


def module_name(path: Path) -> str:
    """`encoders/base.py` -> "encoders.base"; a package's own file gives the package, ours the empty string."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(source: str, module: str = "") -> Iterator[tuple[int, str]]:
    """(line, what) of every import, ours without the package's name; `from a import b` counts as a.b where b exists."""

    def ours(name: str) -> str:
        return name.removeprefix(PACKAGE).removeprefix(".") if name.split(".")[0] == PACKAGE else name

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, ours(alias.name)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            base = ours(node.module)
            own = node.module.split(".")[0] == PACKAGE
            for alias in node.names:
                longer = f"{base}.{alias.name}".removeprefix(".")
                yield node.lineno, longer if own and longer in MODULES else base


def below(name: str, names: set[str] | tuple[str, ...]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in names)


def rule_of(module: str) -> set[str] | None:
    """The rule of the longest matching name."""
    matching = [name for name in ALLOWED if below(module, (name,))]
    return ALLOWED[max(matching, key=len)] if matching else None


def offences(module: str, source: str) -> list[str]:
    found = []
    for line, name in imports(source, module):
        top = name.split(".")[0]
        if top in STDLIB and top not in MODULES:
            continue
        allowed = rule_of(module)
        if allowed is not None and not below(name, allowed):
            found.append(
                f"{module}:{line} imports {name}; it may import only {', '.join(sorted(allowed)) or 'nothing'}"
            )
        if top in FORBIDDEN_BELOW_TASKS and not below(module, MAY_USE_HYDRA):
            found.append(f"{module}:{line} imports {name}; only {', '.join(MAY_USE_HYDRA)} may")
        if below(module, ("data",)) and below(name, NO_OBJECTIVE):
            found.append(f"{module}:{line} imports {name}; data must not know the objective or what is above it")
        if below(name, ("tasks", "config", "places", "preflight")) and not below(module, (*MAY_USE_HYDRA, "")):
            found.append(f"{module}:{line} imports {name}; entry points are imported by entry points only")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "package")
def test_imports_follow_the_layers(module):
    found = offences(module, MODULES[module].read_text())
    assert not found, "\n".join(found)


def test_every_rule_is_about_something_that_exists():
    assert len(MODULES) > 20
    for name in ALLOWED:
        assert name in MODULES, f"the rule for {name} is about nothing"


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("layers.misc", "import numpy as np", "layers.misc:1 imports numpy; it may import only"),
        ("layers.misc", "from data2vec_train.encoders.base import Batch", "imports encoders.base"),
        ("targets", "from data2vec_train.encoders.vision import VisionEncoder", "imports encoders.vision"),
        ("decoders", "import os\nimport data2vec_train.targets", "decoders:2 imports targets"),
        ("teacher", "def f():\n    import lightning as L", "teacher:2 imports lightning"),
        ("data2vec", "from data2vec_train import masking", "imports masking"),
        ("data2vec", "from PIL import Image", "imports PIL"),
        ("encoders.vision", "from datasets import load_dataset", "imports datasets"),
        (
            "data.vision",
            "from omegaconf import DictConfig",
            "only config, places, preflight, rules, tasks, __main__, export, finetune, probe, embed, predict, ben",
        ),
        ("data.collate", "from data2vec_train.data2vec import Data2Vec", "data must not know"),
        ("monitor", "from data2vec_train.config import build", "entry points are imported by entry points only"),
    ],
)
def test_the_rules_catch_what_they_forbid(module, source, rule):
    assert rule in "\n".join(offences(module, source))


@pytest.mark.parametrize("module", ["data2vec", "encoders.vision", "masking"])
def test_the_algorithm_loads_nothing_but_torch_and_numpy(module):
    code = f"import sys, {PACKAGE}.{module}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "torch" in run.stdout.split() or module == "masking"
    assert not HEAVY & set(run.stdout.split())
