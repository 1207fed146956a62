"""Helpers that several test files use."""

import copy
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Models here are tiny: a second thread mostly waits for the first, and on a busy machine for much longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.paths import config_directory, recipes_parent

CHECKOUT = Path(__file__).parents[1]
# The files that take longest, in this order: were they not started first, one worker would end alone.
LONGEST = (
    *("test_pretrain.py", "finetune/test_use.py", "attacks/test_outputs.py", "test_stress.py", "test_export.py"),
    *("distributed/test_endings.py", "distributed/test_two_processes.py", "distributed/test_launch.py"),
    *("test_commands.py", "test_values.py", "attacks/test_processes.py", "finetune/test_image_sizes.py"),
    *("test_pretrain_sequences.py", "test_init_from.py", "finetune/test_odd_records.py", "finetune/test_finetune.py"),
    *("finetune/test_windows.py", "attacks/test_speech.py", "test_config_mistakes.py", "test_saving.py"),
    *("benchmark/test_benchmark.py", "data/test_bad_input.py", "test_help.py", "test_packaging.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {CHECKOUT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def _parse_configs_once() -> None:
    """Half of composing a config is the parsing of our YAML files, which do not change while tests run."""
    ours = (str(config_directory()), str(recipes_parent() / "recipes"))
    read: Callable[..., Any] = OmegaConf.load
    parsed: dict[tuple[str, int], Any] = {}

    def load(source: Any) -> Any:
        path = os.path.abspath(str(getattr(source, "name", source)))
        if not path.startswith(ours):
            return read(source)
        key = path, os.stat(path).st_mtime_ns
        if key not in parsed:
            parsed[key] = read(source)
        return copy.deepcopy(parsed[key])

    OmegaConf.load = load


_parse_configs_once()


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


@pytest.fixture(scope="session")
def program_server() -> Iterator[Callable[[dict, float], int]]:
    """Run a command by a process that has imported everything already; gives the exit status."""
    script = Path(__file__).with_name("program_server.py")
    server: subprocess.Popen | None = None

    def start(command: dict, timeout: float) -> int:
        nonlocal server
        if server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            server = subprocess.Popen([sys.executable, script], env=environment, **pipes)
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        process = int(server.stdout.readline())
        if select.select([server.stdout], [], [], timeout)[0]:
            return int(server.stdout.readline())
        os.kill(process, signal.SIGKILL)
        server.stdout.readline()
        raise subprocess.TimeoutExpired(command["arguments"], timeout)

    yield start
    if server is not None:
        server.communicate()


@pytest.fixture(scope="session")
def run_program(program_server, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python -m data2vec_train[.VERB] ...` as a user would; stdout and stderr come back as text.

    Forked from a process that has imported everything, unless it shall be a `new` process.
    """

    def _run(
        *arguments: str,
        verb: str = "",
        cwd: Path = CHECKOUT,
        timeout: float = 300,
        python_path: Path = CHECKOUT,
        new: bool = False,
    ) -> subprocess.CompletedProcess:
        module = f"data2vec_train.{verb}" if verb else "data2vec_train"
        paths = [str(CHECKOUT), str(python_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
        if new:
            command = [sys.executable, "-m", module, *arguments]
            options = {"cwd": cwd, "env": environment, "timeout": timeout}
            return subprocess.run(command, **options, capture_output=True, text=True, check=False)
        folder = tmp_path_factory.mktemp("streams")
        streams = {name: folder / name for name in ("stdout", "stderr")}
        for file in streams.values():
            file.touch()
        command = {"module": module, "arguments": arguments, "cwd": str(cwd), "paths": paths}
        command |= {"environment": environment} | {name: str(file) for name, file in streams.items()}
        status = program_server(command, timeout)
        said = {name: file.read_text() for name, file in streams.items()}
        shutil.rmtree(folder)
        return subprocess.CompletedProcess(arguments, status, **said)

    return _run
