"""Where raw samples come from: arrays, folders, Hugging Face datasets, parquet and tar shards.

A source gives *encoded* records (bytes, a file to read, an array, a text); decoding them is the modality's business,
and a record that cannot be decoded is the caller's to quarantine. Sources with random access are `Source`; those too
large to be copied to a local disk are `StreamingSource`.
"""

import logging
import os
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data2vec_train.errors import BadSample, ConfigError, DataError

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

EMBEDDED_DIGITS = Path(__file__).parent.parent / "samples" / "mnist_5k.npz"
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# File suffix -> the builder of `datasets` that reads it.
BUILDERS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
NEED_FILES = {*BUILDERS.values(), "imagefolder", "audiofolder"}

Kind = Literal["image", "audio", "text"]
# What a WebDataset tar calls the member that holds the sample.
MEMBERS: dict[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus"),
    "text": ("txt", "text", "transcript"),
}
LABEL_NAMES = ("label", "labels", "cls")

STREAM_BATCH = 16  # records fetched at once while streaming; larger only costs memory
# A streamed image folder has one shard per file: beyond this many, shards are read in groups.
MAX_SHARD_GROUPS = 4096


@dataclass(frozen=True)
class RawSample:
    """One record as it was found.

    Attributes:
        key: Stable and human-readable: a relative path, or "file.parquet:123". What quarantine.jsonl shows.
        value: Encoded content, a file to read, an array that is already decoded, or a text. Empty bytes if the record
            has no content.
        label: Index into `class_names`, None if unlabelled.
    """

    key: str
    value: bytes | Path | np.ndarray | str
    label: int | None = None


class Source(ABC):
    """Records with random access.

    Attributes:
        class_names: What label 0, 1, ... mean; None if there are no labels.
    """

    class_names: list[str] | None

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


class StreamingSource(ABC):
    """Records in one pass, with neither a length nor random access.

    Attributes:
        class_names: What label 0, 1, ... mean; None if there are no labels, or their names are unknown before reading.
    """

    class_names: list[str] | None

    @abstractmethod
    def stream(
        self, *, epoch: int, seed: int, worker: int, num_workers: int, rank: int, world_size: int
    ) -> Iterator[RawSample]:
        """Records of one worker of one rank, shuffled by (seed, epoch); over all workers and ranks each comes once."""


class ArraySource(Source):
    """Arrays in an .npz file: `x` (n, ...) and `y` (n,), labels 0, 1, ...; the value of a record is a row of `x`.

    The test split is the last `held_out` samples of each class in file order, so it depends on nothing but the file.
    In the embedded digits neighbours in the file are often by the same hand (a digit's nearest neighbour lies within 5
    places 10 % of the time, 2 % by chance): a contiguous tail shares fewer writers with the training part than every
    k-th digit would.

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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is not an .npz archive with arrays 'x' and 'y' ({reason(error)})") from error
        if labels.shape != self._x.shape[:1] or labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
            raise DataError(
                f"{file}: y is {labels.dtype} {labels.shape}, expected one class number for each of x's rows"
            )
        self._labels = labels.astype(np.int64)
        self._rows = stratified_rows(self._labels, split=split, held_out=held_out)
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


def stratified_rows(labels: np.ndarray, *, split: str, held_out: int) -> np.ndarray:
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
        extensions: Accepted endings, with or without the dot, upper or lower case alike.
        class_from_folder: True: the first-level sub-folders are the classes. False: no labels. "auto": classes if every
            file lies in a sub-folder and there are at least 2 and fewer than half as many sub-folders as files.

    Raises:
        ConfigError: `path` is a file, or `class_from_folder` asks for classes that the folders do not give.
        DataError: a folder is missing or unreadable, or holds no accepted file.
    """

    def __init__(
        self, *, path: str | Sequence[str], extensions: Sequence[str], class_from_folder: bool | Literal["auto"]
    ):
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise ConfigError("path is an empty list; give the folder of the data")
        if class_from_folder not in (True, False, "auto"):
            raise ConfigError(f"class_from_folder={class_from_folder!r}; expected true, false or auto")
        accepted = tuple("." + extension.lower().lstrip(".") for extension in extensions)
        roots = [usable_folder(Path(root).expanduser()) for root in paths]
        if len({os.path.realpath(root) for root in roots}) < len(roots):
            raise ConfigError(f"path names the same folder twice: {', '.join(map(str, roots))}")

        ignored: Counter[str] = Counter()
        self._roots = [str(root) for root in roots]
        found = [sorted(walk(root, accepted, ignored)) for root in self._roots]
        sizes = [len(files) for files in found]
        files = [file for files in found for file in files]
        where = ", ".join(self._roots)
        if not files:
            raise DataError(nothing_found(where, ignored, accepted))

        self._root_ends = np.cumsum(sizes)
        self._files = PackedStrings(files)
        names, labels = folder_classes(files, where, class_from_folder)
        self.class_names, self._labels = names, labels
        log.info(
            "%s: %d files, %d ignored because of their extension, %s",
            where,
            len(files),
            ignored.total(),
            f"{len(names)} classes from folder names" if names else "no labels",
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> RawSample:
        relative = self._files[index]
        # A negative index must find the same root as its positive twin.
        root = self._roots[int(np.searchsorted(self._root_ends, index % len(self), side="right"))]
        path = os.path.join(root, relative)
        label = None if self._labels is None else int(self._labels[index])
        return RawSample(relative if len(self._roots) == 1 else path, Path(path), label)

    def labels(self) -> np.ndarray | None:
        """Labels, (len,) int64, or None."""
        return self._labels


class PackedStrings:
    """A list of strings in two arrays.

    A million small Python objects would be copied into every forked worker, one memory page at a time, as the workers
    touch their reference counts.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]])


def walk(root: str, accepted: tuple[str, ...], ignored: Counter[str]) -> Iterator[str]:
    """Relative "/" paths of the accepted files below `root`; the extensions of the others are counted in `ignored`."""
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    unreadable = []
    while stack:
        folder, ancestors = stack.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:  # a symbolic link back to a parent would never end
                continue
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if entry.is_dir():
                        stack.append((folder + name + "/", ancestors | {identity}))
                    # A dangling link stays in: a broken sample to report, not a file to overlook. A pipe would hang.
                    elif name.lower().endswith(accepted) and (entry.is_file() or entry.is_symlink()):
                        yield folder + name
                    else:
                        ignored[os.path.splitext(name)[1].lower()] += 1
        except PermissionError as error:
            if not folder:
                raise DataError(f"{root} is not readable: permission denied") from error
            unreadable.append(folder)
    if unreadable:
        log.warning("%s: %d folders skipped, permission denied, first %s", root, len(unreadable), unreadable[0])


def folder_classes(
    files: Sequence[str], where: str, wanted: bool | Literal["auto"]
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names, sorted, and the label of each file, (len,) int64; or (None, None)."""
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


def usable_folder(path: Path) -> Path:
    """`path` if it is a folder, else the error that says what to give instead."""
    try:
        if path.is_dir():
            return path
        if path.is_file():
            if builder_of(path.name) in ("parquet", "webdataset"):
                raise ConfigError(f"{path} is a file of many samples: use data=hf data.path={path}")
            raise ConfigError(f"{path} is a file: give the folder that contains it, {path.parent}")
    except PermissionError as error:
        raise DataError(f"{path} is not readable: permission denied") from error
    raise DataError(missing(path))


def missing(path: Path) -> str:
    """One line about a path that does not exist, with the part of it that does."""
    path = path.absolute()
    parent = next(folder for folder in path.parents if folder.exists())
    return f"{path} does not exist; the nearest existing folder is {parent}"


def nothing_found(where: str, ignored: Counter[str], accepted: tuple[str, ...]) -> str:
    """One line about folders without a single usable file."""
    if not ignored:
        return f"{where}: no files at all (hidden ones are skipped); expected files ending in {', '.join(accepted)}"
    seen = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in ignored.most_common(5))
    hint = "; .parquet and .tar files are read with data=hf" if {".parquet", ".tar"} & set(ignored) else ""
    return f"{where}: {ignored.total()} files ({seen}), none of them ending in {', '.join(accepted)}{hint}"


class HFSource(Source):
    """Records of a Hugging Face dataset, with random access through its local arrow cache. Never runs remote code.

    `path` is one of: a hub id; a folder written by `save_to_disk`; an image or audio folder; a file, a glob or a folder
    of .parquet, WebDataset .tar, .arrow, .csv or .json files (a file or a glob *is* the asked split); a builder's name
    ("parquet", "imagefolder", ...) with `data_files`, as in `datasets.load_dataset`.

    Args:
        path: See above.
        name: Configuration of a hub dataset that has several.
        split: "train", "test", ..., also slices ("train[:10%]"); None: the only one.
        column: Where the samples are; None: the first column of that kind (in tars: the member with a known extension).
        label_column: Where the labels are; None: the first ClassLabel column, else an integer column called label,
            labels or cls; False: no labels.
        data_files: Files of a builder or a hub dataset: a pattern, a list, or a mapping from split to either.
        revision: Commit, tag or branch of a hub dataset.
        cache_dir: Where the arrow cache is written; None: the library's own place.
        kind: What is looked for when `column` is None, and how that column is read.

    Raises:
        ConfigError: no such split or column, or settings that do not fit.
        DataError: nothing there, unreachable, or unreadable.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None,
        split: str | None,
        column: str | None,
        label_column: str | Literal[False] | None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
        revision: str | None,
        cache_dir: str | None,
        kind: Kind = "image",
    ):
        dataset = load(path, name, split, data_files, revision, cache_dir, kind, column, streaming=False)
        if len(dataset) == 0:
            raise DataError(f"{path}: split {split!r} has no rows")
        columns, label = pick_columns(dataset.features, path, kind, column, label_column)
        if all(dataset.data.column(name).null_count == len(dataset) for name in columns):
            raise DataError(
                f"{path}: no row has anything under {', '.join(columns)}; say where the {kind}s are with column"
            )
        self.class_names, self._labels = column_classes(dataset, path, label)
        self._columns = columns
        self._name = record_name(path, data_files, split)
        extra = [name for name in ("__key__", "__url__") if name in dataset.features]
        self._dataset = undecoded(dataset.select_columns([*columns, *extra]), columns, kind)
        classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
        log.info("%s: %d records, %s", path, len(self), classes)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        index = range(len(self))[index]
        label = None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])
        return raw_sample(self._dataset[index], self._columns, f"{self._name}:{index}", label)

    def labels(self) -> np.ndarray | None:
        """Labels, (len,) int64, -1 where one is missing; None without labels."""
        return self._labels


class HFStreamingSource(StreamingSource):
    """The same datasets as `HFSource`, read once per epoch, from wherever they are, without a local copy.

    Labels that are not a ClassLabel are handed through as they are, and `class_names` is None. Whole shards are dealt
    to the workers of all ranks; shards that do not divide evenly are shared row by row, so that every worker gets about
    the same share.

    Args:
        path: As in `HFSource`.
        name: As in `HFSource`.
        split: As in `HFSource`, without slices.
        column: As in `HFSource`.
        label_column: As in `HFSource`.
        data_files: As in `HFSource`.
        revision: As in `HFSource`.
        cache_dir: As in `HFSource`.
        shuffle_buffer: Encoded records each worker keeps in memory to draw from; 1 shuffles the order of shards only.
        kind: As in `HFSource`.

    Raises:
        ConfigError: no such split or column, or settings that do not fit.
        DataError: nothing there, unreachable, or unreadable; also while streaming.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None,
        split: str | None,
        column: str | None,
        label_column: str | Literal[False] | None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
        revision: str | None,
        cache_dir: str | None,
        shuffle_buffer: int,
        kind: Kind = "image",
    ):
        import datasets

        if shuffle_buffer < 1:
            raise ConfigError(f"shuffle_buffer={shuffle_buffer}; expected at least 1 record")
        dataset = load(path, name, split, data_files, revision, cache_dir, kind, column, streaming=True)
        try:
            first = next(iter(dataset.take(1)), None) if dataset.features is None else None
        except load_errors() as error:
            raise DataError(cannot_read(path, error)) from error
        if first is not None:  # csv and json say nothing about their columns before they are read
            import pyarrow as pa

            dataset = dataset.cast(datasets.Features.from_arrow_schema(pa.Table.from_pylist([first]).schema))
        if dataset.features is None:
            raise DataError(f"{path}: split {split!r} has no rows")
        self._columns, self._label = pick_columns(dataset.features, path, kind, column, label_column)
        feature = dataset.features[self._label] if self._label else None
        if self._label and not is_class_label(feature) and not is_integer(feature):
            raise ConfigError(
                f"{path}: label_column={self._label!r} is {describe(feature)}; a stream needs class numbers. "
                "Set label_column=false, or read with random access"
            )
        self.class_names = list(feature.names) if is_class_label(feature) else None
        self._name = record_name(path, data_files, split)
        self._path = path
        self._shuffle_buffer = shuffle_buffer
        extra = [name for name in (self._label, "__key__", "__url__") if name in dataset.features]
        self._dataset = undecoded(dataset.select_columns([*self._columns, *extra]), self._columns, kind)
        log.info("%s: streaming %d shards", path, dataset.num_shards)

    def stream(
        self, *, epoch: int, seed: int, worker: int, num_workers: int, rank: int, world_size: int
    ) -> Iterator[RawSample]:
        """Records of one worker of one rank, shuffled by (seed, epoch); over all workers and ranks each comes once.

        Args:
            epoch: Counts from 0.
            seed: The run's seed, the same everywhere.
            worker: This worker within its rank, from 0.
            num_workers: Workers per rank; 1 when the rank reads the data itself.
            rank: This rank, from 0.
            world_size: Number of ranks.

        Raises:
            DataError: a shard cannot be read.
        """
        consumers = world_size * max(1, num_workers)
        consumer = (
            worker * world_size + rank
        )  # neighbouring consumers are on different ranks: leftovers spread over ranks
        groups = min(self._dataset.num_shards, MAX_SHARD_GROUPS)
        order = np.random.default_rng([seed, epoch]).permutation(groups)
        records = (
            record
            for group, part, parts in shards_of(order, consumer=consumer, consumers=consumers)
            for record in self._read(int(group), groups, part, parts)
        )
        yield from shuffled(records, self._shuffle_buffer, np.random.default_rng([seed, epoch, consumer]))

    def _read(self, group: int, groups: int, part: int, parts: int) -> Iterator[RawSample]:
        """Rows `part`, `part` + `parts`, ... of a group of shards."""
        # `iter(batch_size)` and not `__iter__`: the latter divides the shards among DataLoader workers by itself, and
        # this group, being one shard, would go to worker 0 whole.
        batches = self._dataset.shard(num_shards=groups, index=group).iter(batch_size=STREAM_BATCH)
        row = 0
        while True:
            try:
                batch = next(batches, None)
            except load_errors() as error:
                raise DataError(cannot_read(self._path, error)) from error
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                if row % parts == part:
                    record = dict(zip(batch, values, strict=True))
                    label = record.get(self._label) if self._label else None
                    yield raw_sample(record, self._columns, f"{self._name}[{group}]:{row}", label)
                row += 1


def shards_of(order: np.ndarray, *, consumer: int, consumers: int) -> Iterator[tuple[int, int, int]]:
    """The shards that one of `consumers` reads: (shard, part, parts), rows `part` mod `parts` of each.

    Every consumer gets the same number of whole shards. The m shards left over are shared, each by the consumers that
    are equal mod m, so that nobody reads more than one shard in vain, however many consumers there are.
    """
    whole = len(order) // consumers * consumers
    for shard in order[:whole][consumer::consumers]:
        yield int(shard), 0, 1
    left = order[whole:]
    if len(left):
        column = consumer % len(left)
        yield int(left[column]), consumer // len(left), len(range(column, consumers, len(left)))


def shuffled(records: Iterable[RawSample], size: int, rng: np.random.Generator) -> Iterator[RawSample]:
    """The same records in an order drawn from `rng`, with `size` of them in memory."""
    buffer: list[RawSample] = []
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
            continue
        slot = int(rng.integers(size))
        yield buffer[slot]
        buffer[slot] = record
    rng.shuffle(buffer)
    yield from buffer


def load(
    path: str,
    name: str | None,
    split: str | None,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
    revision: str | None,
    cache_dir: str | None,
    kind: Kind,
    column: str | None,
    *,
    streaming: bool,
) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of the dataset at `path`, columns untouched."""
    import datasets

    builder_name, local = path, Path(path).expanduser()
    options = {"name": name, "revision": revision, "cache_dir": cache_dir, "data_files": plain(data_files)}
    try:
        if local.is_dir() and any((local / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(local))
            if isinstance(saved, datasets.Dataset):
                own = str(saved.split or "train")
                dataset = one_split({split if split == "all" else own: saved}, path, split)
            else:
                dataset = one_split(saved, path, split)
            return dataset.to_iterable_dataset(num_shards=min(64, len(dataset) or 1)) if streaming else dataset

        if local.is_dir():
            builder_name = str(local)
        elif (local.is_file() or re.search(r"[*?\[]", path)) and builder_of(path):
            files = str(local.absolute())
            builder_name, options["data_files"] = builder_of(path), {split_name(split) or "train": files}
        elif local.is_file():
            raise ConfigError(f"{path} is not a data set: expected a folder, or a file ending in {', '.join(BUILDERS)}")
        elif builder_of(path) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise DataError(missing(local))
        elif path in NEED_FILES and data_files is None:
            raise ConfigError(
                f"path={path} names a file format: say which files with data_files, or give their folder as path"
            )

        builder = datasets.load_dataset_builder(builder_name, **options)
        if builder.name == "webdataset":
            # Left to itself the library takes the columns from the first five members: a tar that mixes jpg and png is
            # an error, or loses the images of the other kind without a word.
            builder = datasets.load_dataset_builder(builder_name, features=tar_features(kind, column), **options)
        if streaming:
            return one_split(builder.as_streaming_dataset(), path, split)
        builder.download_and_prepare()
        splits = dict.fromkeys(builder.info.splits)
        if split is not None and split != "all":
            for part in split.split("+"):
                one_split(splits, path, split_name(part))
            return builder.as_dataset(split=split)
        return builder.as_dataset(split=split or one_split({name: name for name in splits}, path, None))
    except load_errors() as error:
        if isinstance(error, ConfigError | DataError):
            raise
        raise DataError(cannot_read(path, error)) from error


def load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises when it cannot load or read something."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the hub's own error is its HTTP library's, which changed twice: requests, httpx, httpx2.
    network = HfHubHTTPError.__bases__
    # RuntimeError: the data set is a script, which is never run. ValueError covers pyarrow's.
    return (OSError, ValueError, KeyError, TypeError, RuntimeError, tarfile.TarError, DatasetsError, *network)


def cannot_read(path: str, error: Exception) -> str:
    """One line about a data set that failed to load, from the innermost cause."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    text = f"cannot read {path}: {reason(error if isinstance(error, ConnectionError) else inner)}"
    if isinstance(error, ConnectionError):
        text += (
            "; check the name and the network, or download the data set once where there is one "
            "and give its folder as path"
        )
    return text


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; its type if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def one_split(splits: Mapping, path: str, split: str | None):
    """`splits[split]`, or the only one."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    got = "several splits" if split is None else f"no split {split!r}"
    raise ConfigError(f"{path} has {got}; choose split= one of {', '.join(map(str, splits))}")


def split_name(split: str | None) -> str | None:
    """A split without its slice: "train" of "train[:10%]"."""
    return None if split is None else split.split("[")[0].strip()


def builder_of(path: str) -> str | None:
    """The builder of `datasets` that reads files with this ending."""
    return BUILDERS.get(Path(re.sub(r"\.(gz|zst|bz2|xz)$", "", path.lower())).suffix)


def record_name(path: str, data_files: object, split: str | None) -> str:
    """What keys start with: the file if there is a single one, else the data set and the split."""
    if isinstance(data_files, str):
        path, split = data_files, None if builder_of(data_files) else split
    name = Path(path).name or path
    return name if builder_of(name) or split is None else f"{name}/{split}"


def plain(value: object) -> object:
    """Lists and dictionaries in place of a configuration's own containers, which `datasets` does not know."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def tar_features(kind: Kind, column: str | None) -> "datasets.Features":
    """The members of a WebDataset sample that are read; `datasets` leaves out all others."""
    import datasets

    feature = {"image": datasets.Image, "audio": datasets.Audio, "text": lambda decode: datasets.Value("string")}[kind]
    names = MEMBERS[kind] if column is None else (column,)
    members = [*names, *(name.upper() for name in names)] if column is None else names
    return datasets.Features(
        {member: feature(decode=False) for member in members}
        | {"cls": datasets.Value("int64"), "__key__": datasets.Value("string"), "__url__": datasets.Value("string")}
    )


def pick_columns(
    features: "datasets.Features", path: str, kind: Kind, column: str | None, label_column: str | Literal[False] | None
) -> tuple[list[str], str | None]:
    """Where the samples are, the first that is not empty counts; and where the labels are, None without."""
    listing = ", ".join(f"{name} ({describe(feature)})" for name, feature in features.items())
    for wanted, option in ((column, "column"), (label_column, "label_column")):
        if wanted not in (None, False) and wanted not in features:
            raise ConfigError(f"{path} has no {option}={wanted!r}; its columns: {listing}")
    if column is not None:
        columns = [column]
    elif "__url__" in features and "__key__" in features:
        columns = [name for name in features if name.lower() in MEMBERS[kind]]
    else:
        columns = [name for name, feature in features.items() if holds(feature, kind, exactly=True)]
        columns = (columns or [name for name, feature in features.items() if holds(feature, kind, exactly=False)])[:1]
    if not columns:
        raise ConfigError(f"{path} has no {kind} column; name it with column=... Its columns: {listing}")
    if label_column is False:
        return columns, None
    if label_column is not None:
        return columns, label_column
    classes = [name for name, feature in features.items() if is_class_label(feature)]
    numbers = [name for name in LABEL_NAMES if name in features and is_integer(features[name])]
    return columns, next(iter(classes + numbers), None)


def holds(feature: object, kind: Kind, *, exactly: bool) -> bool:
    """Whether a column is of this kind; not `exactly`: whether it may be, as plain parquet files do not say."""
    import datasets

    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    if exactly:
        return isinstance(feature, datasets.Image if kind == "image" else datasets.Audio)
    encoded = isinstance(feature, dict) and "bytes" in feature
    return encoded or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))


def is_class_label(feature: object) -> bool:
    """Whether a column holds class numbers that have names."""
    import datasets

    return isinstance(feature, datasets.ClassLabel)


def is_integer(feature: object) -> bool:
    """Whether a column holds integers."""
    return getattr(feature, "dtype", None) in {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def describe(feature: object) -> str:
    """A column's type in one word."""
    if isinstance(feature, dict):
        return "struct of " + ", ".join(feature)
    kind = type(feature).__name__
    return str(getattr(feature, "dtype", kind)) if kind == "Value" else kind


def undecoded(dataset, columns: Sequence[str], kind: Kind):
    """The data set with its sample columns as {"bytes", "path"}; texts stay as they are."""
    import datasets

    if kind == "text":
        return dataset
    for column in columns:
        dataset = dataset.cast_column(column, (datasets.Image if kind == "image" else datasets.Audio)(decode=False))
    return dataset


def column_classes(
    dataset: "datasets.Dataset", path: str, column: str | None
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names, and the label of each row, (len,) int64, -1 where one is missing; or (None, None)."""
    if column is None:
        return None, None
    feature = dataset.features[column]
    values = dataset.select_columns(column).with_format("arrow")[:].column(column)
    if values.null_count == len(values):
        return None, None
    if is_class_label(feature):
        return list(feature.names), values.fill_null(-1).to_numpy().astype(np.int64)
    if not is_integer(feature) and not holds(feature, "text", exactly=True):
        raise ConfigError(
            f"{path}: label_column={column!r} is {describe(feature)}; expected integers, names or a ClassLabel"
        )
    # Any numbers will do, 1 to 10 for instance: what counts is their rank.
    codes = values.combine_chunks().dictionary_encode()
    classes = codes.dictionary.to_pylist()
    rank = {value: place for place, value in enumerate(sorted(classes))}
    ranks = np.array([rank[value] for value in classes] + [-1], dtype=np.int64)
    return [str(value) for value in sorted(classes)], ranks[codes.indices.fill_null(-1).to_numpy()]


def raw_sample(record: Mapping, columns: Sequence[str], key: str, label: int | None) -> RawSample:
    """A row of a data set as a `RawSample`; its key is the file or the tar member where there is one.

    Raises:
        BadSample: the row points to a file that cannot be read.
    """
    if record.get("__url__") and record.get("__key__"):
        key = f"{Path(record['__url__']).name}:{record['__key__']}"
    value = next((record[column] for column in columns if record[column] is not None), b"")
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            key, value = path, read_remote(path) if "://" in path else Path(path)
    return RawSample(key, b"" if value is None else value, label)


def read_remote(url: str) -> bytes:
    """Content of a file on the hub or inside a remote archive."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except load_errors() as error:
        raise BadSample(f"cannot be downloaded: {reason(error)}") from error
