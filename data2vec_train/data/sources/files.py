"""Sources of raw samples: the base classes, arrays, folders and manifests; `hf` has datasets and shards.

A source gives *encoded* records (bytes, a file to read, an array, a text). The modality decodes them, and the caller
quarantines those that cannot be decoded. A `Source` has random access; a `StreamingSource` is read in one pass, for
data too large for the local disk.
"""

import logging
import os
import textwrap
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data2vec_train.data.identity import hashes_of, hashes_of_numbers, mixed
from data2vec_train.data.sources.metadata import (
    classes_of,
    find_metadata,
    join_metadata,
    other_tables,
    read_metadata,
    text_column,
)
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.paths import SAMPLES

log = logging.getLogger(__name__)

EMBEDDED_DIGITS = SAMPLES / "mnist_5k.npz"
# Exceptions of numpy on broken archives; MemoryError, because a header may claim any size.
BROKEN_ARCHIVE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
STAT_THREADS = 8
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class RawSample:
    """One record, not decoded.

    Attributes:
        key: Stable, human-readable name: a relative path, or "file.parquet:123". quarantine.jsonl shows it.
        value: Encoded content, a file to read, a decoded array, or a text. Empty bytes if the record has no content; a
            `BadSample`, which decoding raises, if the reason is known.
        label: Index into `class_names`, None if unlabelled.
        fields: Values of the requested other columns, not decoded.
    """

    key: str
    value: bytes | Path | np.ndarray | str | BadSample
    label: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class Source(ABC):
    """Records with random access.

    Attributes:
        class_names: Meaning of labels 0, 1, ...; None if there are no labels.
        lengths: Length of each record, (len,) int64 in units of the model's input (samples, tokens); None if all have
            the same length, as images after cropping.
        rejected: (key, reason) of records that were found broken when the source was opened; they have no index.
        left_out: (key, reason) of intact records that the settings exclude; they have no index either.
        grouped: (len,) uint64, a hash of the group of each record; None = every record is a group of its own.
    """

    class_names: list[str] | None
    lengths: np.ndarray | None = None
    rejected: tuple[tuple[str, str], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    grouped: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abstractmethod
    def __getitem__(self, index: int) -> RawSample:
        """Record `index`, not decoded.

        Raises:
            BadSample: this record is unusable.
        """

    @abstractmethod
    def labels(self) -> np.ndarray | None:
        """Labels of all records, (len,) int64, -1 where one is missing; None without labels. Reads no sample."""

    @property
    def num_documents(self) -> int:
        """Number of records, or of documents if records are their blocks: the total for the share of broken samples."""
        return len(self)

    def column(self, name: str) -> list[Any]:
        """The values of one of `fields` for all records; reads no sample.

        Raises:
            KeyError: there is no such field.
        """
        raise KeyError(name)

    def name_of(self, index: int) -> str:
        """Unique name of record `index`, relative to the data folder."""
        try:
            return self[index].key
        except BadSample:
            return f"#{index}"

    def names(self) -> Iterator[str]:
        """`name_of` all records; override it where reading all records is slow."""
        return map(self.name_of, range(len(self)))

    def hashes(self) -> np.ndarray:
        """(len,) uint64: hash of the name of each record, independent of the location of the data."""
        return hashes_of(self.names())

    def versions(self) -> np.ndarray:
        """(len,) uint64: a value that changes with the record or its columns, such as the size of its file.

        Zeros where it would need reading every record.
        """
        return np.zeros(len(self), dtype=np.uint64)

    def origins(self) -> np.ndarray:
        """(len,) uint64: hash of the recording, document or group that each record comes from.

        Records of one origin are held out together; the hash alone decides whether (see `data.split`).
        """
        return self.hashes() if self.grouped is None else self.grouped


class StreamingSource(ABC):
    """Records in one pass, with neither a length nor random access.

    Attributes:
        class_names: Meaning of labels 0, 1, ...; None without labels, or if names are unknown before reading.
    """

    class_names: list[str] | None

    @abstractmethod
    def stream(
        self, *, epoch: int, seed: int, worker: int, num_workers: int, rank: int, world_size: int
    ) -> Iterator[RawSample]:
        """Records of one worker of one rank, shuffled by (seed, epoch); exactly one worker reads each record."""

    def first(self) -> Iterator[RawSample]:
        """The first records, to inspect them."""
        yield from self.stream(epoch=0, seed=0, worker=0, num_workers=1, rank=0, world_size=1)

    def shards(self) -> list[tuple[str, int]]:
        """Name and size of each file; empty if unknown."""
        return []

    def name_of(self, index: int) -> str:
        """Name of shard `index`."""
        return self.shards()[index][0]


class ArraySource(Source):
    """Arrays in an .npz file: `x` (n, ...) and `y` (n,), labels 0, 1, ...; the value of a record is a row of `x`.

    The test split is the last `held_out` samples of each class in file order, so it depends only on the file. In the
    embedded digits, neighbours in the file often have the same writer (a digit's nearest neighbour lies within 5
    places 10 % of the time, 2 % by chance). So the end of the file shares fewer writers with the training part than
    every k-th digit would.

    Args:
        path: The file; None means the 5,000 embedded MNIST digits, `x` uint8 (28, 28).
        split: "train", "test" or "all".
        held_out: Samples per class that form "test".

    Raises:
        ConfigError: unknown split, or a class without `held_out` + 1 samples.
        DataError: the file is missing or is not such an archive.
    """

    def __init__(self, *, path: str | None, split: str, held_out: int):
        file = EMBEDDED_DIGITS if path is None else Path(path).expanduser()
        try:
            with np.load(file, allow_pickle=False) as archive:
                self._x, labels = archive["x"], archive["y"]
        except FileNotFoundError as error:
            raise DataError(missing(file)) from error
        except BROKEN_ARCHIVE as error:
            raise DataError(f"{file} is not an .npz archive with arrays 'x' and 'y' ({reason(error)})") from error
        if labels.shape != self._x.shape[:1] or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
            raise DataError(
                f"{file}: y is {labels.dtype} {labels.shape}, expected one class number for each of x's rows"
            )
        self._labels = labels.astype(np.int64)
        self._rows = _stratified_rows(self._labels, split=split, held_out=held_out)
        self._file = file.name
        self.class_names = [str(label) for label in range(self._labels.max() + 1)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        row = int(self._rows[index])
        return RawSample(f"{self._file}:{row}", self._x[row], int(self._labels[row]))

    def labels(self) -> np.ndarray:
        """Labels of this split, (len,) int64."""
        return self._labels[self._rows]

    def hashes(self) -> np.ndarray:
        """Hashes of the row numbers in the file."""
        return hashes_of_numbers(len(self._x))[self._rows]

    def versions(self) -> np.ndarray:
        """Checksums of the rows."""
        return np.fromiter((zlib.crc32(np.ascontiguousarray(self._x[row])) for row in self._rows), dtype=np.uint64)


def _stratified_rows(labels: np.ndarray, *, split: str, held_out: int) -> np.ndarray:
    """Rows of a split, ascending, (n,) int64: "test" is the last `held_out` rows of each class, "train" the others."""
    if split not in ("train", "test", "all"):
        raise ConfigError(f"split={split!r}; expected 'train', 'test' or 'all'")
    if split == "all":
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    if not 0 <= held_out < counts.min() or (split == "test" and held_out == 0):
        raise ConfigError(
            f"held_out={held_out} samples per class with split={split!r}: the smallest class has {counts.min()}; "
            f"choose {int(split == 'test')} to {counts.min() - 1}"
        )
    in_test = np.zeros(len(labels), dtype=bool)
    for label in classes:
        rows = np.flatnonzero(labels == label)
        in_test[rows[len(rows) - held_out :]] = True
    return np.flatnonzero(in_test if split == "test" else ~in_test)


class FolderSource(Source):
    """Files below one or several folders, at any depth, sorted by path.

    Hidden files and folders are skipped, symbolic links are followed. Keys are paths relative to the folder, or full
    paths when there are several folders.

    Args:
        path: The folder, or a list of them.
        extensions: Accepted endings, with or without the dot, in any case.
        class_from_folder: True: the first-level sub-folders are the classes. False: no labels. "auto": classes if every
            file lies in a sub-folder and there are at least 2 and fewer than half as many sub-folders as files.
        metadata: A file that describes the others, see `sources.metadata`; "auto": the one in the folder. It is read
            only if `fields` or `label_column` need it; files that it does not name are then left out.
        label_column: The column of `metadata` with the classes, instead of the folders.
        fields: Columns of `metadata` to return with each file.

    Raises:
        ConfigError: `path` is a file, the folders give no classes although `class_from_folder` is true, or there is no
            such column.
        DataError: a folder is missing or unreadable, or holds no accepted file; or `metadata` names missing files.
    """

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        extensions: Sequence[str],
        class_from_folder: bool | Literal["auto"],
        metadata: str | None = None,
        label_column: str | None = None,
        fields: Sequence[str] = (),
    ):
        if not path:
            raise ConfigError("path is empty; give the folder of the data")
        accepted = tuple("." + extension.lower().lstrip(".") for extension in extensions)
        self._roots = [_usable_folder(Path(root).expanduser()) for root in ([path] if isinstance(path, str) else path)]
        if len({root.resolve() for root in self._roots}) < len(self._roots):
            raise ConfigError(f"path names the same folder twice: {', '.join(map(str, self._roots))}")

        ignored: Counter[str] = Counter()
        found = [sorted(_accepted_files(root, accepted, ignored)) for root in self._roots]
        where = ", ".join(map(str, self._roots))
        if not any(found):
            raise DataError(_nothing_found(where, ignored, accepted))
        self._fields: list[dict[str, Any]] | None = None
        if metadata is not None and (fields or label_column):
            found = self._describe(found, metadata, list(dict.fromkeys([*fields, *filter(None, [label_column])])))
        files = [file for below in found for file in below]

        self._root_ends = np.cumsum([len(below) for below in found])
        # One array: with a million Python objects, reference counting would copy their memory pages into every forked
        # worker.
        self._files = np.array([os.fsencode(file) for file in files])
        if label_column is None:
            self.class_names, self._labels = _folder_classes(files, where, class_from_folder)
        elif self._fields is None:
            raise ConfigError(f"label_column={label_column} needs metadata, the file that has this column")
        else:
            self.class_names, self._labels = classes_of(row[label_column] for row in self._fields)
        log.info(
            "%s: %d files, %d ignored because of their extension, %s",
            where,
            len(files),
            ignored.total(),
            f"{len(self.class_names)} classes" if self.class_names else "no labels",
        )

    def _describe(self, found: list[list[str]], metadata: str, wanted: list[str]) -> list[list[str]]:
        """Return the files that metadata describes; store their columns in `_fields`."""
        kept, self._fields = [], []
        for root, files in zip(self._roots, found, strict=True):
            paths = find_metadata(root) if metadata == "auto" else [Path(metadata).expanduser()]
            if not paths:
                tables = other_tables(root)
                there = f"; it has {', '.join(tables[:5])}" if tables else ""
                raise DataError(
                    f"{root} has no metadata.csv, .tsv, .jsonl or *.trans.txt that gives {', '.join(wanted)} for its "
                    f"files; add one with a column file_name, or name it with data.metadata{there}"
                )
            described = {name: row for path in paths for name, row in read_metadata(path, root).items()}
            known = dict.fromkeys(column for row in described.values() for column in row)
            meant = {column: text_column(column, known, str(paths[0])) for column in wanted}
            absent = [column for column in meant.values() if column not in known]
            if absent:
                raise ConfigError(f"{paths[0]} has no column {', '.join(absent)}; it has {', '.join(known)}")
            columns = join_metadata(files, described, str(paths[0])) if files else []
            pairs = [(file, row) for file, row in zip(files, columns, strict=True) if row is not None]
            self.left_out += tuple(
                (file, f"{paths[0].name} does not name it")
                for file, row in zip(files, columns, strict=True)
                if row is None
            )
            if len(pairs) < len(files):
                log.warning("%s does not name %d of %d files", paths[0], len(files) - len(pairs), len(files))
            kept.append([file for file, _ in pairs])
            self._fields += [{column: row.get(meant[column]) for column in wanted} for _, row in pairs]
        return kept

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> RawSample:
        index = range(len(self))[index]
        path = self._path(index)
        label = None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])
        key = os.fsdecode(self._files[index]) if len(self._roots) == 1 else str(path)
        return RawSample(key, path, label, {} if self._fields is None else self._fields[index])

    def _path(self, index: int) -> Path:
        root = self._roots[int(np.searchsorted(self._root_ends, index, side="right"))]
        return root / os.fsdecode(self._files[index])

    def labels(self) -> np.ndarray | None:
        """Labels, (len,) int64, or None."""
        return self._labels

    def name_of(self, index: int) -> str:
        """The path relative to its folder, with "/", so that renaming or reordering folders changes no name."""
        return os.fsdecode(self._files[index]).replace(os.sep, "/")

    def versions(self) -> np.ndarray:
        """Hash of the size of each file and of its metadata."""
        sizes = file_sizes([self._path(index) for index in range(len(self))])
        if self._fields is None:
            return sizes
        return mixed(sizes, hashes_of(repr(sorted(row.items())) for row in self._fields))

    def column(self, name: str) -> list[Any]:
        """Values of a column of `metadata`, for all files."""
        if not self._fields or name not in self._fields[0]:
            raise KeyError(name)
        return [row[name] for row in self._fields]


class ManifestSource(Source):
    """Files listed in a manifest of fairseq: the root directory, then one "relative/path<TAB>frames" on each line.

    Args:
        path: The .tsv file.
        fields: Only `text` exists: the transcripts in the .wrd or .ltr file beside the manifest.

    Raises:
        ConfigError: another field is requested.
        DataError: the manifest is missing, malformed or empty, or its root directory does not exist; or the transcripts
            are missing, or their number differs.
    """

    class_names = None

    def __init__(self, *, path: str, fields: Sequence[str] = ()):
        manifest = Path(path).expanduser()
        try:
            lines = manifest.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise DataError(missing(manifest)) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{manifest} cannot be read as a manifest ({reason(error)})") from error
        if len(lines) < 2:
            raise DataError(f"{manifest} lists no files: expected a directory, then lines of path<TAB>frames")
        self._root = Path(lines[0].strip()).expanduser()
        if not self._root.is_dir():
            raise DataError(f"{manifest}, line 1: {missing(self._root)}")
        files, lengths = [], []
        for number, line in enumerate(lines[1:], start=2):
            file, tab, frames = line.rpartition("\t")
            if not tab or not file or not frames.strip().isdigit():
                raise DataError(f"{manifest}, line {number}: expected path<TAB>frames, got {line[:80]!r}")
            files.append(os.fsencode(file))
            lengths.append(int(frames))
        self._files = np.array(files)
        self._frames = np.array(lengths, dtype=np.uint64)
        if set(fields) - {"text"}:
            raise ConfigError(f"a manifest has no column {', '.join(fields)}; it gives transcripts, called text")
        self._texts = _transcripts_beside(manifest, len(files)) if fields else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> RawSample:
        relative = os.fsdecode(self._files[index])
        fields = {} if self._texts is None else {"text": self._texts[index]}
        return RawSample(relative, self._root / relative, None, fields)

    def labels(self) -> None:
        """A manifest has no labels."""
        return

    def name_of(self, index: int) -> str:
        """The path relative to the root directory, as in the manifest."""
        return os.fsdecode(self._files[index])

    def versions(self) -> np.ndarray:
        """Hash of the number of frames in the manifest and of the transcript."""
        return self._frames if self._texts is None else mixed(self._frames, hashes_of(self._texts))

    def column(self, name: str) -> list[Any]:
        """The transcripts; other columns do not exist."""
        if name != "text" or self._texts is None:
            raise KeyError(name)
        return list(self._texts)


def _transcripts_beside(manifest: Path, count: int) -> list[str]:
    """Transcript of each recording: a line of the .wrd file, or of the .ltr file, which has letters: "A N D |"."""
    for suffix in (".wrd", ".ltr"):
        path = manifest.with_suffix(suffix)
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read as transcripts ({reason(error)})") from error
            if len(lines) != count:
                raise DataError(f"{path} has {len(lines)} lines, {manifest} lists {count} recordings")
            return lines if suffix == ".wrd" else [line.replace(" ", "").replace("|", " ").strip() for line in lines]
    raise DataError(f"{manifest} has no transcripts: expected {manifest.with_suffix('.wrd').name} or .ltr beside it")


def _accepted_files(root: Path, accepted: tuple[str, ...], ignored: Counter[str]) -> Iterator[str]:
    """Relative "/" paths of the accepted files below `root`; the extensions of the others are counted in `ignored`."""
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and not _leads_back(str(root), folder, name)
        ]
        relative = os.path.relpath(folder, root)
        for name in names:
            # Dangling links are kept, so that they are reported as broken samples.
            if name.startswith("."):
                continue
            if name.lower().endswith(accepted):
                yield name if relative == "." else f"{relative}/{name}"
            else:
                ignored[os.path.splitext(name)[1].lower()] += 1
    if any(Path(error.filename or root) == root for error in unreadable):
        raise DataError(f"{root} is not readable: {unreadable[0].strerror.lower()}")
    if unreadable:
        log.warning("%s: %d folders skipped, first: %s", root, len(unreadable), unreadable[0])


def _leads_back(root: str, folder: str, name: str) -> bool:
    """Whether a sub-folder is a symbolic link to one of the folders above it; following it would never end."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    # Compare the resolved path of every folder above, since two folders may hold links to each other.
    target, above = Path(path).resolve(), Path(folder)
    passed = [above, *(parent for parent in above.parents if parent.is_relative_to(root))]
    return any(visited.resolve().is_relative_to(target) for visited in passed)


def _folder_classes(
    files: Sequence[str], where: str, wanted: bool | Literal["auto"]
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names, sorted, and the label of each file, (len,) int64; or (None, None)."""
    if wanted not in (True, False, "auto"):
        raise ConfigError(f"class_from_folder={wanted!r}; expected true, false or auto")
    if wanted is False:
        return None, None
    loose = next((file for file in files if "/" not in file), None)
    if loose is not None:
        if wanted is True:
            raise ConfigError(
                f"class_from_folder=true, but {loose} lies directly in {where}; "
                "move every file into its class folder, or set class_from_folder=false"
            )
        return None, None
    folders = [file.split("/", 1)[0] for file in files]
    names = sorted(set(folders))
    if wanted == "auto":
        if SPLIT_NAMES.issuperset(name.lower() for name in names):
            log.warning(
                "%s: sub-folders %s look like splits, not classes: all their files are used, without labels; "
                "name one of them in the path for labels",
                where,
                ", ".join(names),
            )
            return None, None
        if not 2 <= len(names) < len(files) / 2:
            return None, None
    elif len(names) == len(files):
        raise ConfigError(
            f"class_from_folder=true, but each of the {len(files)} sub-folders of {where} holds a single file: "
            "these are no classes; set class_from_folder=false"
        )
    index = {name: label for label, name in enumerate(names)}
    return names, np.array([index[folder] for folder in folders], dtype=np.int64)


def file_sizes(paths: Sequence[Path]) -> np.ndarray:
    """(n,) uint64: bytes of each file, 0 if it cannot be accessed. Uses threads, since network disks are slow."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except (OSError, ValueError):
            return 0

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        # In chunks: `map` submits all its work at once.
        chunks = (pool.map(size, paths[start : start + 1024]) for start in range(0, len(paths), 1024))
        return np.fromiter((size_bytes for chunk in chunks for size_bytes in chunk), dtype=np.uint64)


def _usable_folder(path: Path) -> Path:
    """`path` if it is a folder; otherwise raise an error that says what to give instead."""
    try:
        if path.is_dir():
            return path
        if path.is_file():
            if path.suffix in (".parquet", ".tar"):
                raise ConfigError(f"{path} is a file of many samples: use data=hf data.path={path}")
            raise ConfigError(f"{path} is a file: give the folder that contains it, {path.parent}")
    except PermissionError as error:
        raise DataError(f"{path} is not readable: permission denied") from error
    raise DataError(missing(path))


class UnreadableShard(DataError):
    """A DataError that keeps its one-line message when a loader process raises it.

    torch raises the error again in the main process with the stack trace of the loader process as its text; the last
    line of it is the message.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rstrip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__name__}: "))


def missing(path: Path) -> str:
    """Message for a path that does not exist; it names the nearest existing folder."""
    path = path.absolute()
    parent = next(folder for folder in path.parents if folder.exists())
    return f"{path} does not exist; the nearest existing folder is {parent}"


def _nothing_found(where: str, ignored: Counter[str], accepted: tuple[str, ...]) -> str:
    """Message for folders without an accepted file."""
    if not ignored:
        return f"{where}: no files at all (hidden ones are skipped); expected files ending in {', '.join(accepted)}"
    seen = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in ignored.most_common(5))
    hint = "; .parquet and .tar files are read with data=hf" if {".parquet", ".tar"} & set(ignored) else ""
    return f"{where}: {ignored.total()} files ({seen}), none of them ending in {', '.join(accepted)}{hint}"


def reason(error: BaseException) -> str:
    """Message of an error in one line of at most 300 characters; its type if the message is empty."""
    return textwrap.shorten(str(error), 300, placeholder="...") or type(error).__name__
