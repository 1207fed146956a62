"""Files that say something about other files: transcripts, class names, anything with a column `file_name`.

Four kinds are read: metadata.csv and metadata.jsonl of Hugging Face's folders, LibriSpeech's *.trans.txt, and the .wrd
or .ltr file beside a manifest of fairseq.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_train.data.files import open_file
from data2vec_train.errors import BadSample, ConfigError, DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
TRANSCRIPTS = ".trans.txt"  # LibriSpeech: "<name without extension> <words>" on each line
FILE_COLUMN = "file_name"


def find_metadata(root: Path) -> list[Path]:
    """Files at `root` that describe the others: one metadata file, or LibriSpeech's transcripts at any depth."""
    found = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    return found[:1] or sorted(one for one in root.rglob(f"*{TRANSCRIPTS}") if one.is_file())


def read_metadata(path: Path, root: Path) -> dict[str, dict[str, Any]]:
    """{path of a file relative to `root`, without extension for transcripts: its columns}.

    Args:
        path: the file that describes others; paths in it are relative to its own folder.
        root: folder of the data.

    Raises:
        DataError: the file cannot be read, or has no column `file_name`.
    """
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, BadSample, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    place = os.path.relpath(path.parent, root)
    rows: dict[str, dict[str, Any]] = {}
    for number, row in _rows(path, text):
        name = row.pop(FILE_COLUMN, None)
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}, line {number}: no {FILE_COLUMN}; got {', '.join(map(str, row)) or 'nothing'}")
        rows[os.path.normpath(os.path.join(place, name)).replace(os.sep, "/")] = row
    if not rows:
        raise DataError(f"{path} is empty; expected a line for every file")
    return rows


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.splitlines()
    if path.name.endswith(TRANSCRIPTS):
        for number, line in enumerate(lines, start=1):
            name, _, words = line.strip().partition(" ")
            if name:
                yield number, {FILE_COLUMN: name, "text": words}
    elif path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not a line of JSON ({error})") from error
            yield number, row if isinstance(row, dict) else {}
    elif path.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if name is not None}
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not a table ({error})") from error
    else:
        raise ConfigError(f"{path}: expected a .csv, .tsv or .jsonl file, or *{TRANSCRIPTS}")


def join_metadata(
    files: Sequence[str], described: Mapping[str, dict[str, Any]], where: str
) -> list[dict[str, Any] | None]:
    """The columns of each file, None where nothing is said about it.

    Args:
        files: relative paths.
        described: what `read_metadata` gave.
        where: for messages.

    Raises:
        DataError: names without a file.
    """
    used: set[str] = set()
    columns: list[dict[str, Any] | None] = []
    for file in files:
        name = file if file in described else os.path.splitext(file)[0]
        columns.append(described.get(name))
        used.add(name)
    absent = [name for name in described if name not in used]
    if absent:
        raise DataError(
            f"{where} names {len(absent)} of {len(described)} files that are not there; the first is {absent[0]}. "
            f"Names are relative to the file that holds them; the data has {files[0]}, for example"
        )
    return columns


def classes_of(values: Iterable[Any]) -> tuple[list[str], np.ndarray]:
    """Class names, in order, and the class of each value, (n,) int64, -1 for None and ''.

    Raises:
        DataError: a value that is neither a text nor a number.
    """
    values = [None if value == "" else value for value in values]
    odd = next((value for value in values if not isinstance(value, (str, int, float, type(None)))), None)
    if odd is not None:
        raise DataError(f"a class is called {odd!r}; expected a text or a number")
    present = {value for value in values if value is not None}
    names = sorted(present, key=lambda one: (not isinstance(one, (int, float)), one))
    rank = {value: place for place, value in enumerate(names)}
    return [str(name) for name in names], np.array([rank.get(value, -1) for value in values], dtype=np.int64)
