"""The table of results at the end of a sweep, printed and written to `sweep.csv`."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from data2vec_train.system.outputs import replace_file

_COLUMNS = {
    "steps": "steps",
    "seconds": "seconds",
    "loss_last": "loss_last",
    "target_std": "target_std",
    "probe.knn.trained": "knn",
    "probe.linear.trained": "linear",
}


class SweepTable(Callback):
    """Prints the main results of each run of a sweep, and writes all its results to `sweep.csv`.

    Configured as `hydra.callbacks.sweep_table._target_: data2vec_train.pretrain.sweep.SweepTable`.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Read the run directories below `hydra.sweep.dir`, on the machine that started the sweep."""
        sweep_dir = Path(config.hydra.sweep.dir)
        members = read_members(sweep_dir)
        if not members:
            print(f"no runs in {sweep_dir}")
            return
        _write_csv(members, sweep_dir / "sweep.csv")
        _print_table(_cells(members), f"{sweep_dir} ({sweep_dir / 'sweep.csv'})")


def read_members(sweep_dir: Path) -> list[dict[str, object]]:
    """One flat row per run: directory, the overrides that differ, status, and every value of its `summary.json`."""
    found = {file.parents[1] for file in sweep_dir.glob("**/.hydra/overrides.yaml")}
    found |= {file.parent for file in sweep_dir.glob("**/summary.json")}
    directories = sorted(found, key=lambda path: _order(path.relative_to(sweep_dir)))
    overrides = [_overrides(directory) for directory in directories]
    keys = list(dict.fromkeys(key for override in overrides for key in override))
    differing = [key for key in keys if len({override.get(key) for override in overrides}) > 1]
    rows = []
    for directory, override in zip(directories, overrides, strict=True):
        summary = _summary(directory)
        row: dict[str, object] = {"directory": str(directory.relative_to(sweep_dir))}
        row |= {key: override.get(key, "") for key in (differing or keys)}
        row["status"] = "done" if summary else "failed"
        rows.append(row | summary)
    return rows


def _order(member: Path) -> tuple[int, str]:
    number = re.match(r"\d+", str(member))
    return (int(number[0]) if number else sys.maxsize, str(member))


def _overrides(directory: Path) -> dict[str, str]:
    try:
        lines = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # missing or damaged
        return {}
    return dict(str(line).partition("=")[::2] for line in lines) if isinstance(lines, list) else {}


def _summary(directory: Path) -> dict[str, object]:
    try:
        found = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # missing or damaged
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
    """The header and one line per run, as text; a probe column only if a run has it."""
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
