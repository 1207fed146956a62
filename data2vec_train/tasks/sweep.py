"""What the members of a sweep share: one process, and the table at the end, also written to `sweep.csv`."""

import csv
import io
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from data2vec_train.outputs import replace_file

_COLUMNS = {
    "steps": "steps",
    "seconds": "seconds",
    "loss_last": "loss_last",
    "target_std": "target_std",
    "probe.knn.trained": "knn",
    "probe.linear.trained": "linear",
}


# ---------------------------------------------------------------------------------------------------------------------
# Members


@contextmanager
def isolated() -> Iterator[None]:
    """Inside, one member runs. What it changes for the whole process is set back, and its W&B run is finished.

    So each member ends in the bits of a run of its own.
    """
    restore = [_environment(), _random_numbers(), _logging(), _signals(), _torch()]
    with warnings.catch_warnings():
        status = 1
        try:
            yield
            status = 0
        finally:
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish(exit_code=status)  # else Lightning logs the next member into the same run
            for undo in restore:
                undo()


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def undo() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    return undo


def _random_numbers() -> Callable[[], None]:
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def undo() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

    return undo


def _logging() -> Callable[[], None]:
    raises = logging.raiseExceptions
    levels = {name: one.level for name, one in _loggers()}

    def undo() -> None:
        logging.raiseExceptions = raises
        for name, one in _loggers():
            one.setLevel(levels.get(name, logging.NOTSET))

    return undo


def _loggers() -> list[tuple[str, logging.Logger]]:
    return [(name, one) for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)]


def _signals() -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}

    def undo() -> None:
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)

    return undo


def _torch() -> Callable[[], None]:
    """What the trainer and the precision set for the whole process."""
    import torch

    cudnn = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic", "enabled")}
    matmul, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    anomaly, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()

    def undo() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.set_anomaly_enabled(anomaly, check_nan)
        for name, value in flags.items():
            setattr(cudnn, name, value)

    return undo


# ---------------------------------------------------------------------------------------------------------------------
# The table


class SweepTable(Callback):
    """Prints what the members of a sweep reached, and writes everything they reported to `sweep.csv`.

    Configured as `hydra.callbacks.sweep_table._target_: data2vec_train.tasks.sweep.SweepTable`.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Reads the run directories below `hydra.sweep.dir`, on the machine that started the sweep."""
        sweep_dir = Path(config.hydra.sweep.dir)
        members = read_members(sweep_dir)
        if not members:
            print(f"no runs in {sweep_dir}")
            return
        _write_csv(members, sweep_dir / "sweep.csv")
        _print_table(_cells(members), f"{sweep_dir} ({sweep_dir / 'sweep.csv'})")


def read_members(sweep_dir: Path) -> list[dict[str, object]]:
    """One flat row per run: directory, the overrides that differ, status, and every number of its `summary.json`."""
    found = {file.parents[1] for file in sweep_dir.glob("**/.hydra/overrides.yaml")}
    found |= {file.parent for file in sweep_dir.glob("**/summary.json")}
    directories = sorted(found, key=lambda path: _order(path.relative_to(sweep_dir)))
    overrides = [_overrides(directory) for directory in directories]
    keys = list(dict.fromkeys(key for one in overrides for key in one))
    differing = [key for key in keys if len({one.get(key) for one in overrides}) > 1]
    rows = []
    for directory, one in zip(directories, overrides, strict=True):
        summary = _summary(directory)
        row: dict[str, object] = {"directory": str(directory.relative_to(sweep_dir))}
        row |= {key: one.get(key, "") for key in (differing or keys)}
        row["status"] = "done" if summary else "failed"
        rows.append(row | summary)
    return rows


def _order(member: Path) -> tuple[int, str]:
    number = re.match(r"\d+", str(member))
    return (int(number[0]) if number else sys.maxsize, str(member))


def _overrides(directory: Path) -> dict[str, str]:
    try:
        lines = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # not there, or damaged
        return {}
    return dict(str(line).partition("=")[::2] for line in lines) if isinstance(lines, list) else {}


def _summary(directory: Path) -> dict[str, object]:
    try:
        found = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # not there, or damaged
        return {}
    return _flat(found) if isinstance(found, dict) else {}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _columns(members: list[dict[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for member in members for key in member))


def _write_csv(members: list[dict[str, object]], file: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(members), restval="")
    writer.writeheader()
    writer.writerows(members)
    replace_file(file, text.getvalue().encode("utf-8", "surrogateescape"))


def _cells(members: list[dict[str, object]]) -> list[list[str]]:
    """The header and a line per member, as text; the probe columns only where a member has them."""
    columns = _columns(members)
    shown = columns[1 : columns.index("status") + 1]
    shown += [column for column in _COLUMNS if column in columns]
    header = [_COLUMNS.get(column, column) for column in shown]
    return [header, *([_text(column, member.get(column)) for column in shown] for member in members)]


def _text(column: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and column.startswith("probe."):
        return f"{100 * value:.1f}%"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(cells: list[list[str]], title: str) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*map(escape, cells[0]), title=escape(title))
        for line in cells[1:]:
            table.add_row(*map(escape, line))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(title)
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)
