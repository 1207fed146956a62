"""Settings with the comments that stand beside them: what `--help` and configs/README.md say about a setting.

Beside a value a comment describes it, and may go on in the lines below, at the same column; above a key, at the key's
column, it describes a key that has none beside it. The first lines of a file are its command and what the file is for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_NEAR = 4  # columns: a comment line this near to the column of the one above goes on with it


@dataclass(frozen=True)
class Setting:
    """One key of a file.

    Attributes:
        path: dotted, without the package that the file is composed into.
        default: as it is written; None for a mapping.
        said: its comment in one line; empty without one.
    """

    path: str
    default: str | None
    said: str


@dataclass(frozen=True)
class Commented:
    """What a file of configs says in comments.

    Attributes:
        command: of the first line; empty without one.
        purpose: the rest of the lines at the top.
        is_global: composed into the root of the config, not below the name of its group.
        settings: in the order of the file, `defaults` and Hydra's own part left out.
        choices: group -> (choice, comment) of the defaults list.
        bases: files of the same folder that it builds on.
    """

    command: str
    purpose: str
    is_global: bool
    settings: tuple[Setting, ...]
    choices: dict[str, tuple[str, str]]
    bases: tuple[str, ...]


def read(file: Path) -> Commented:
    """The settings and comments of one file."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    top = [line.lstrip("# ") for line in lines[: next((n for n, line in enumerate(lines) if line[:1] != "#"), 0)]]
    command, purpose = "", [line for line in top if not line.startswith("@package")]
    if purpose and purpose[0].startswith("python -m"):
        command, _, rest = purpose[0].partition("   ")
        purpose[0] = rest.strip()
    root = yaml.compose(text, Loader=yaml.CSafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    settings = [
        setting
        for key, value in pairs
        if key.value not in ("defaults", "hydra")
        for setting in _walk(key, value, lines)
    ]
    entries = next((value.value for key, value in pairs if key.value == "defaults"), [])
    return Commented(
        command=command,
        purpose=" ".join(line for line in purpose if line),
        is_global="@package _global_" in lines[0],
        settings=tuple(settings),
        choices=dict(_choice(entry, lines) for entry in entries if isinstance(entry, yaml.MappingNode)),
        bases=tuple(entry.value for entry in entries if isinstance(entry, yaml.ScalarNode) and entry.value[0] != "_"),
    )


def _walk(key: yaml.Node, value: yaml.Node, lines: list[str], above: str = "") -> Iterator[Setting]:
    path = f"{above}.{key.value}" if above else key.value
    said = _beside(key, value, lines) or _above(key, lines)
    if not isinstance(value, yaml.MappingNode) or value.flow_style:
        yield Setting(path, _written(value, lines), said)
        return
    yield Setting(path, None, said)
    for inner, content in value.value:
        yield from _walk(inner, content, lines, path)


def _choice(entry: yaml.MappingNode, lines: list[str]) -> tuple[str, tuple[str, str]]:
    [(key, value)] = entry.value
    return key.value.split()[-1], (value.value, _beside(key, value, lines))


def _is_block(value: yaml.Node) -> bool:
    """Whether a value begins in a line below its key."""
    scalar = isinstance(value, yaml.ScalarNode)
    return value.style in ("|", ">") if scalar else not value.flow_style


def _written(value: yaml.Node, lines: list[str]) -> str:
    first, last = value.start_mark, value.end_mark
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        return value.value.strip()
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        return f"[{', '.join(_written(item, lines) for item in value.value)}]"
    if first.line == last.line:
        return lines[first.line][first.column : last.column]
    parts = [lines[first.line][first.column :], *lines[first.line + 1 : last.line], lines[last.line][: last.column]]
    return " ".join(part.partition(" #")[0].strip() for part in parts)


def _beside(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    place = key.end_mark if _is_block(value) else value.end_mark
    found = re.search(r"(?<=\s)#\s?(.*)", lines[place.line][place.column :])
    if found is None:
        return ""
    column, said = place.column + found.start(), [found[1]]
    for line in lines[place.line + 1 :]:
        text = line.lstrip()
        start = len(line) - len(text)
        is_about_the_first_inside = _is_block(value) and start == value.start_mark.column
        if not text.startswith("#") or abs(start - column) > _NEAR or is_about_the_first_inside:
            break
        said.append(text.lstrip("# "))
    return " ".join(said).strip()


def _above(key: yaml.Node, lines: list[str]) -> str:
    said: list[str] = []
    number = key.start_mark.line - 1
    while number >= 0 and lines[number].startswith(" " * key.start_mark.column + "#"):
        said.insert(0, lines[number].lstrip("# "))
        number -= 1
    return "" if number < 0 else " ".join(said)  # the lines at the top are about the file
