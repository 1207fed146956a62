"""Helpers that several test files use."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Models here are tiny: a second thread mostly waits for the first, and on a busy machine for much longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.paths import config_directory, recipes_parent

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FlexAttention compute gradients without a GPU: torch has a plain implementation for it, and only refuses."""
    import torch.nn.attention.flex_attention as flex

    from data2vec_train.encoders import backends

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(backends, "_flex", lambda case: "no attention dropout" if case.dropout else None)


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """Compose the real configuration with overrides."""

    def _compose(*overrides: str, config_name: str = "train") -> DictConfig:
        os.environ.setdefault("DATA2VEC_RECIPES", str(recipes_parent()))
        register_resolvers()
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))

    return _compose


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m data2vec_train ...` as a user would; stdout and stderr come back as text."""

    def _run(
        *arguments: str, cwd: Path = CHECKOUT, timeout: float = 300, python_path: Path = CHECKOUT
    ) -> subprocess.CompletedProcess:
        paths = os.pathsep.join(map(str, (CHECKOUT, python_path)))
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "data2vec_train", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return _run
