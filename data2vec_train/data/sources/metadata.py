"""Metadata files: tables with a column of file names, and transcripts.

Supported: metadata.csv, metadata.tsv and metadata.jsonl as in Hugging Face's folders, similar tables such as Common
Voice's, and LibriSpeech's *.trans.txt. The .wrd and .ltr files of fairseq are read in `files.py`.
"""

import codecs
import csv
import io
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_train.data.files import open_file
from data2vec_train.errors import BadSample, ConfigError, DataError

log = logging.getLogger(__name__)

METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
TRANSCRIPTS = ".trans.txt"  # LibriSpeech: "<name without extension> <words>" on each line
FILE_COLUMNS = ("file_name", "path", "file", "audio", "audio_path", "filename", "image")  # the first match is used
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")  # names of columns with transcripts
DELIMITERS = (",", "\t", ";", "|")


def find_metadata(root: Path) -> list[Path]:
    """Files at `root` that describe the others: one metadata file, or LibriSpeech's transcripts at any depth.

    Raises:
        ConfigError: there are several metadata files.
    """
    found = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(f"{root} has {names}; say which one describes the files: data.metadata={found[0]}")
    return found or sorted(path for path in root.rglob(f"*{TRANSCRIPTS}") if path.is_file())


def other_tables(root: Path) -> list[str]:
    """Names of other tables at `root`, such as train.tsv, to suggest in an error."""
    return sorted(path.name for path in root.iterdir() if path.suffix in (".csv", ".tsv", ".jsonl") and path.is_file())


def read_metadata(path: Path, root: Path) -> dict[str, dict[str, Any]]:
    """{path of a file relative to `root`, without extension for transcripts: its columns}.

    Args:
        path: the file that describes others; paths in it are relative to its own folder, or absolute.
        root: folder of the data.

    Raises:
        DataError: the file cannot be read, has no column of file names, or describes a file twice, differently.
    """
    try:
        with open_file(path) as file:
            content = file.read()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, BadSample, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    place = os.path.relpath(path.parent, root)
    rows: dict[str, dict[str, Any]] = {}
    for number, name, row in _rows(path, text):
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}, line {number}: no file name; got {', '.join(map(str, row)) or 'nothing'}")
        whole = os.path.relpath(name, root) if os.path.isabs(name) else os.path.join(place, name)
        key = os.path.normpath(whole).replace(os.sep, "/")
        if rows.setdefault(key, row) != row:
            raise DataError(f"{path}, line {number}: {name} is described twice, differently")
    if not rows:
        raise DataError(f"{path} is empty; expected a line for every file")
    return rows


def _rows(path: Path, text: str) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Line, file and other columns of each row."""
    if path.name.endswith(TRANSCRIPTS):
        for number, line in enumerate(text.split("\n"), start=1):
            name, _, words = line.strip().partition(" ")
            if name:
                yield number, name, {"text": words}
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not a line of JSON ({error})") from error
            row = row if isinstance(row, dict) else {}
            yield number, row.pop(_file_column(list(row)), None), row
    elif path.suffix in (".csv", ".tsv"):
        yield from _table(path, text)
    else:
        raise ConfigError(f"{path}: expected a .csv, .tsv or .jsonl file, or *{TRANSCRIPTS}")


def _table(path: Path, text: str) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """Rows of a table whose first line names its columns; the delimiter is inferred from that line."""
    first = next(iter(text.lstrip("\r\n").replace("\r", "\n").split("\n", 1)))
    usual = "\t" if path.suffix == ".tsv" else ","
    between = next((delimiter for delimiter in (usual, *DELIMITERS) if _file_column(_cells(first, delimiter))), None)
    if between is None:
        raise DataError(
            f"{path}: its first line is {first[:100]!r}; expected the names of the columns, one of them "
            f"{', '.join(FILE_COLUMNS[:4])}, separated by a comma, a tab or ;"
        )
    names = _cells(first, between)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{path} has two columns called {double or 'nothing'!r}")
    column = _file_column(names)
    for number, cells in _lines(path, text, between)[1:]:
        if len(cells) > len(names) and any(cells[len(names) :]):
            raise DataError(
                f"{path}, line {number}: {len(cells)} cells, but the first line names {len(names)} columns; put a text "
                f"with {between!r} in double quotes"
            )
        row = dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=False))
        yield number, row.pop(column), row


def _lines(path: Path, text: str, between: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    try:
        found = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        if between != "\t":
            raise DataError(f"{path}, line {reader.line_num}: not a table ({error}); a quote is not closed?") from error
        found = None
    # Common Voice's tables have tabs and no quoting: a quote is a plain character, and must not join lines to one cell.
    if found is None or (between == "\t" and any("\n" in cell for _, cells in found for cell in cells)):
        lines = (line.rstrip("\r").split("\t") for line in text.split("\n"))
        found = [(number, cells) for number, cells in enumerate(lines, start=1) if any(cells)]
    return found


def _cells(line: str, between: str) -> list[str]:
    """Names in the first line of a table."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=between), [])]
    except csv.Error:
        return []


def _file_column(names: Sequence[str]) -> str | None:
    """The column with the names of files."""
    return next((column for column in FILE_COLUMNS if column in names), None)


def text_column(wanted: str, known: Iterable[str], where: str) -> str:
    """`wanted`; but if it is `text` and there is no such column, the column in `TEXT_COLUMNS`.

    Raises:
        ConfigError: there are several.
    """
    usual = [column for column in TEXT_COLUMNS if column in known]
    if wanted != "text" or not usual or usual[0] == "text":
        return wanted
    if len(usual) > 1:
        raise ConfigError(f"{where} has no column text, but {' and '.join(usual)}; choose one with head.text_column")
    log.info("%s: the column %s is read as text", where, usual[0])
    return usual[0]


def join_metadata(
    files: Sequence[str], described: Mapping[str, dict[str, Any]], where: str
) -> list[dict[str, Any] | None]:
    """The columns of each file, None if the metadata does not name it.

    Names may be relative to a sub-folder, such as Common Voice's clips, and may lack the extension.

    Args:
        files: relative paths.
        described: result of `read_metadata`.
        where: the metadata file, for messages.

    Raises:
        DataError: names without a file.
    """
    known = {*files, *(os.path.splitext(file)[0] for file in files)}
    absent = [name for name in described if name not in known]
    if absent:
        described = _below_a_folder(files, described, known) or _written_elsewhere(files, described) or described
        absent = [name for name in described if name not in known]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(described)} files named in {where} do not exist; the first is {absent[0]}. "
            f"Names must be relative to the folder of that file; the data has {files[0]}, for example"
        )
    return [described.get(file, described.get(os.path.splitext(file)[0])) for file in files]


def _below_a_folder(
    files: Sequence[str], described: Mapping[str, dict[str, Any]], known: set[str]
) -> dict[str, dict[str, Any]] | None:
    """`described` with the sub-folder added that contains all the files; None if there is none."""
    for folder in sorted({os.path.dirname(file) for file in files} - {""}):
        if all(f"{folder}/{name}" in known for name in described):
            return {f"{folder}/{name}": row for name, row in described.items()}
    return None


def _written_elsewhere(
    files: Sequence[str], described: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]] | None:
    """`described` with the paths of `files`, if they differ only by backslashes (Windows) or Unicode form (macOS)."""
    common = {unicodedata.normalize("NFC", file): file for file in files}
    names = {name: unicodedata.normalize("NFC", name.replace("\\", "/")) for name in described}
    if not set(names.values()) <= common.keys():
        return None
    return {common[names[name]]: row for name, row in described.items()}


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
    names = sorted(present, key=lambda name: (not isinstance(name, (int, float)), name))
    rank = {value: place for place, value in enumerate(names)}
    return [str(name) for name in names], np.array([rank.get(value, -1) for value in values], dtype=np.int64)
