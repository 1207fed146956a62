"""Hugging Face datasets, parquet files and WebDataset tars, with random access or as a stream. Never runs remote code.

`load` opens one split of a data set, `_pick_columns` finds its samples and labels.
"""

import glob
import itertools
import logging
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data2vec_train.data.identity import hashes_of, hashes_of_numbers, mixed
from data2vec_train.data.sources.files import (
    RawSample,
    Source,
    StreamingSource,
    UnreadableShard,
    file_sizes,
    missing,
    reason,
)
from data2vec_train.data.sources.metadata import text_column
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.system.constraints import require

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

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

Kind = Literal["image", "audio", "text"]
# Endings of the member of a WebDataset record that holds the sample.
MEMBERS: dict[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus"),
    "text": ("txt", "text", "transcript"),
}
# Usual names of the column with the samples, most likely first. The type alone does not tell: other columns of the
# same type may hold something else.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values", "photo", "picture", "rgb"),
    "audio": ("audio", "wav", "flac", "mp3", "speech", "recording", "sound"),
    "text": ("text", "content", "document", "sentence", "article", "transcript", "transcription", "sentences"),
}
NOT_SAMPLES = re.compile(r"mask|seg|label|annot|depth|target|truth|(^|_)(map|gt)s?$", re.IGNORECASE)
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id")
LOOKED_AT = 256  # members of a tar that are read to find the names of its samples

STREAM_BATCH = 16  # records fetched at once while streaming; more take memory without gain
# A streamed image folder has one shard per file: more shards than this are read in groups.
MAX_SHARD_GROUPS = 4096


class HFSource(Source):
    """Records of a Hugging Face dataset, with random access through its local arrow cache.

    `path` is one of: a hub id; a folder written by `save_to_disk`; an image or audio folder; a file, a glob or a folder
    of .parquet, WebDataset .tar, .arrow, .csv or .json files (a file or a glob *is* the requested split); a builder's
    name ("parquet", "imagefolder", ...) with `data_files`, as in `datasets.load_dataset`.

    Args:
        path: See above.
        name: Configuration of a hub dataset that has several.
        split: "train", "test", ..., also slices ("train[:10%]"); None: the only one.
        column: Column of the samples; None: the column of that kind, by its usual name if there are several (in tars:
            the member with a known extension), see `_sample_column`.
        label_column: Column of the labels; None: a ClassLabel or integer column with one of `LABEL_NAMES`, else the
            only ClassLabel column; False: no labels.
        data_files: Files of a builder or a hub dataset: a pattern, a list, or a mapping from split to either.
        revision: Commit, tag or branch of a hub dataset.
        cache_dir: Folder of the arrow cache; None: the default of `datasets`.
        kind: Kind of column to find if `column` is None, and how that column is read.
        fields: Other columns to return with each record; images among them stay encoded.

    Raises:
        ConfigError: no such split or column, or conflicting settings.
        DataError: the data set is missing, unreachable or unreadable.
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
        fields: Sequence[str] = (),
    ):
        options = {"name": name, "data_files": data_files, "revision": revision, "cache_dir": cache_dir}
        dataset, files = load(path, split, kind, column, options, streaming=False)
        self._name, self._asked = _record_name(path, data_files, split), _asked_places(path, data_files)
        self._path, self._files = path, files
        if len(dataset) == 0:
            raise DataError(f"{path}: split {split!r} has no rows")
        self._use(dataset, column=column, label_column=label_column, kind=kind, fields=fields)

    @classmethod
    def of(
        cls,
        dataset: "datasets.Dataset",
        *,
        name: str,
        column: str | None,
        label_column: str | Literal[False] | None,
        kind: Kind,
        fields: Sequence[str] = (),
    ) -> "HFSource":
        """The source of a data set in memory, called `name` in messages and keys."""
        source = cls.__new__(cls)
        source._name, source._asked, source._path, source._files = name, (), name, ()
        if len(dataset) == 0:
            raise DataError(f"{name} has no rows")
        source._use(dataset, column=column, label_column=label_column, kind=kind, fields=fields)
        return source

    def _use(
        self,
        dataset: "datasets.Dataset",
        *,
        column: str | None,
        label_column: str | Literal[False] | None,
        kind: Kind,
        fields: Sequence[str],
    ) -> None:
        path = self._path
        columns, label = _pick_columns(dataset.features, path, kind, column, label_column)
        filled = [name for name in columns if dataset.data.column(name).null_count < len(dataset)]
        if not filled:
            raise DataError(
                f"{path}: no row has a value in {', '.join(columns)}; name the column of the {kind}s with data.column"
            )
        columns = filled
        self.class_names, self._labels = _column_classes(dataset, path, label)
        self._columns = columns
        for name in fields:
            meant = text_column(name, dataset.features, path)
            dataset = dataset if meant == name else dataset.rename_column(meant, name)
        absent = [name for name in fields if name not in dataset.features]
        if absent:
            listing = ", ".join(f"{name} ({_describe(feature)})" for name, feature in dataset.features.items())
            raise ConfigError(f"{path} has no column {', '.join(absent)}; its columns: {listing}")
        self._fields = list(fields)
        self._kind = kind
        self._dataset = _undecoded(dataset, path, columns, kind, fields)
        self._array_types = _array_types(self._dataset.features, columns)
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        log.info("%s: %d records, %s%s", path, len(self), _taken(kind, columns, label), classes)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> RawSample:
        index = range(len(self))[index]
        label = None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])
        record = self._dataset[index]
        fields = {name: _with_names(self._dataset.features[name], record[name]) for name in self._fields}
        key = f"{self._name}:{index}"
        return _raw_sample(record, self._columns, key, label, self._asked, self._array_types, fields)

    def labels(self) -> np.ndarray | None:
        """Labels, (len,) int64, -1 where one is missing; None without labels."""
        return self._labels

    def name_of(self, index: int) -> str:
        """Name of the table and row; reads no record."""
        return f"{self._name}:{index}"

    def hashes(self) -> np.ndarray:
        """Hashes: of the name for tar members and files, of the text itself, of file and row for other records."""
        return _row_hashes(self._dataset, self._columns, self._kind, self._path, self._files)

    def versions(self) -> np.ndarray:
        """Hash of the number of bytes, characters or entries of each sample, and of the values of its fields."""
        found = np.zeros(len(self), dtype=np.uint64)
        for name in self._columns:
            found = mixed(found, _lengths(self._dataset, name))
        for name in self._fields:
            is_file = _is_bytes(self._dataset.features[name]) or hasattr(self._dataset.features[name], "decode")
            values = _lengths(self._dataset, name) if is_file else hashes_of(map(repr, _chunks(self._dataset, name)))
            found = mixed(found, values)
        return found

    def column(self, name: str) -> list[Any]:
        """Values of a column, for all records; classes by name."""
        feature = self._dataset.features[name]
        return [_with_names(feature, value) for value in self._dataset.select_columns(name)[:][name]]


class HFStreamingSource(StreamingSource):
    """The data sets of `HFSource`, streamed once per epoch without a local copy.

    Labels that are not a ClassLabel are returned unchanged, and `class_names` is None. The workers of all ranks get
    whole shards; the shards left over are shared row by row, so that every worker gets about the same number of rows.

    Args: as in `HFSource`, but `split` without slices, and
        shuffle_buffer: Encoded records that each worker keeps in memory for shuffling; 1 shuffles only the shards.

    Raises: as `HFSource`, also while streaming.
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
        require(shuffle_buffer=shuffle_buffer)
        options = {"name": name, "data_files": data_files, "revision": revision, "cache_dir": cache_dir}
        dataset, files = load(path, split, kind, column, options, streaming=True)
        self._name, self._asked = _record_name(path, data_files, split), _asked_places(path, data_files)
        self._path, self._files = path, files
        self._shuffle_buffer = shuffle_buffer
        self._open(dataset, column=column, label_column=label_column, kind=kind)

    @classmethod
    def of(
        cls,
        dataset: "datasets.IterableDataset",
        *,
        name: str,
        column: str | None,
        label_column: str | Literal[False] | None,
        kind: Kind,
        shuffle_buffer: int = 1000,
    ) -> "HFStreamingSource":
        """The source of a stream that is open already, called `name` in messages and keys."""
        source = cls.__new__(cls)
        source._name, source._asked, source._path, source._files = name, (), name, ()
        source._shuffle_buffer = shuffle_buffer
        # A stream that was mapped, or made of a generator, does not say what it has before it is read.
        dataset = dataset if dataset.features is not None else dataset._resolve_features()
        source._open(dataset, column=column, label_column=label_column, kind=kind)
        return source

    def _open(
        self,
        dataset: "datasets.IterableDataset",
        *,
        column: str | None,
        label_column: str | Literal[False] | None,
        kind: Kind,
    ) -> None:
        path = self._path
        self._columns, label = _pick_columns(dataset.features, path, kind, column, label_column)
        feature = dataset.features[label] if label else None
        if label and not _is_class_label(feature) and not _is_integer(feature):
            raise ConfigError(
                f"{path}: label_column={label!r} is {_describe(feature)}; a stream needs class numbers. "
                "Set data.label_column=false, or read with random access"
            )
        self.class_names = list(feature.names) if _is_class_label(feature) else None
        self._label = label
        self._dataset = _undecoded(dataset, path, self._columns, kind, [label] if label else [])
        self._array_types = _array_types(self._dataset.features, self._columns)
        log.info("%s: streaming %d shards, %s", path, dataset.num_shards, _taken(kind, self._columns, label))

    def stream(
        self, *, epoch: int, seed: int, worker: int, num_workers: int, rank: int, world_size: int
    ) -> Iterator[RawSample]:
        """Records of one worker of one rank, see `StreamingSource`.

        Raises:
            DataError: a shard cannot be read.
        """
        consumers = world_size * max(1, num_workers)
        consumer = worker * world_size + rank  # neighbours are on different ranks: left-over shards spread over ranks
        groups = min(self._dataset.num_shards, MAX_SHARD_GROUPS)
        order = np.random.default_rng([seed, epoch]).permutation(groups)
        records = (
            record
            for group, part, parts in shards_of(order, consumer=consumer, consumers=consumers)
            for record in self._read(int(group), groups, part, parts)
        )
        yield from _shuffled(records, self._shuffle_buffer, np.random.default_rng([seed, epoch, consumer]))

    def first(self) -> Iterator[RawSample]:
        """The records of the first shards, not shuffled."""
        yield from self._read(0, min(self._dataset.num_shards, MAX_SHARD_GROUPS), 0, 1)

    def shards(self) -> list[tuple[str, int]]:
        """Name and size of each file; size 0 for remote files."""
        return [(Path(file).name, Path(file).stat().st_size if Path(file).is_file() else 0) for file in self._files]

    def _read(self, group: int, groups: int, part: int, parts: int) -> Iterator[RawSample]:
        """Rows `part`, `part` + `parts`, ... of a group of shards."""
        # `iter(batch_size)`, not `__iter__`: the latter divides the shards among DataLoader workers by itself, and all
        # of this group, which is one shard, would go to worker 0.
        batches = self._dataset.shard(num_shards=groups, index=group).iter(batch_size=STREAM_BATCH)
        row, tars = 0, set()
        while True:
            try:
                batch = next(batches, None)
            except _load_errors() as error:
                raise UnreadableShard(_cannot_read(self._path, error)) from error
            if batch is None:
                for file in sorted(tars if part == 0 else ()):
                    _check_tar(file)
                return
            tars.update(batch.get("__url__", ()))
            for values in zip(*batch.values(), strict=True):
                if row % parts == part:
                    record = dict(zip(batch, values, strict=True))
                    label = record.get(self._label) if self._label else None
                    key = f"{self._name}[{group}]:{row}"
                    yield _raw_sample(record, self._columns, key, label, self._asked, self._array_types)
                row += 1


def shards_of(order: np.ndarray, *, consumer: int, consumers: int) -> Iterator[tuple[int, int, int]]:
    """The shards that one of `consumers` reads: (shard, part, parts), rows `part` mod `parts` of each.

    Every consumer gets the same number of whole shards. Each of the m shards left over is shared by the consumers whose
    numbers are equal mod m, so a consumer skips rows of at most one shard, for any number of consumers.
    """
    whole = len(order) // consumers * consumers
    for shard in order[:whole][consumer::consumers]:
        yield int(shard), 0, 1
    left = order[whole:]
    if len(left):
        column = consumer % len(left)
        yield int(left[column]), consumer // len(left), len(range(column, consumers, len(left)))


def _shuffled(records: Iterable[RawSample], size: int, rng: np.random.Generator) -> Iterator[RawSample]:
    """The records shuffled with `rng` through a buffer of `size` records."""
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


# ---------------------------------------------------------------------------------------------------------------------
# One split of a data set


def load(
    path: str, split: str | None, kind: Kind, column: str | None, options: dict[str, object], *, streaming: bool
) -> "tuple[datasets.Dataset | datasets.IterableDataset, list[str]]":
    """One split of the dataset at `path`, with all its columns, and the files it is read from, as far as known.

    `options` are arguments of `load_dataset_builder`.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs errors that it also raises
    try:
        local = Path(path).expanduser()
        if any((local / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(local))
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            dataset = splits[_one_split(splits, path, split)]
            files = [file["filename"] for file in dataset.cache_files]
            shards = min(64, len(dataset) or 1)
            return (dataset.to_iterable_dataset(num_shards=shards), files) if streaming else (dataset, [])

        builder = _builder(path, local, split, kind, column, options)
        if streaming:
            splits = builder.as_streaming_dataset()
            name = _one_split(splits, path, split)
            # the columns of csv and json are unknown before reading
            dataset = splits[name] if splits[name].features else splits[name]._resolve_features()
            return dataset, list((builder.config.data_files or {}).get(name, ()))
        if builder.name == "webdataset":
            wanted = None if split in (None, "all") else re.findall(r"[\w.]+", split)
            for name, files in (builder.config.data_files or {}).items():
                for file in files if wanted is None or name in wanted else ():
                    _check_tar(file)
        builder.download_and_prepare()
        if split is not None and re.search(r"[\[+]|^all$", split):
            return builder.as_dataset(split=split), []
        name = _one_split(builder.info.splits, path, split)
        return builder.as_dataset(split=name), list((builder.config.data_files or {}).get(name, ()))
    except (ConfigError, DataError):  # the next clause would catch them
        raise
    except _load_errors() as error:
        raise DataError(_cannot_read(path, error)) from error


def _builder(
    path: str, local: Path, split: str | None, kind: Kind, column: str | None, options: dict[str, object]
) -> "datasets.DatasetBuilder":
    import datasets

    if local.is_dir():
        path = str(local)
    elif (local.is_file() or re.search(r"[*?\[]", path)) and _format_of(path):
        if "://" not in path and not glob.glob(str(local), recursive=True):
            raise DataError(f"cannot read {path}: no file has such a name")
        options = options | {"data_files": {(split or "train").split("[")[0]: str(local.absolute())}}
        path = _format_of(path)
    elif local.is_file():
        raise ConfigError(f"{path} is not a data set: expected a folder, or a file ending in {', '.join(BUILDERS)}")
    elif _format_of(path) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise DataError(missing(local))
    elif path in BUILDERS.values() and options["data_files"] is None:
        # The library would read any files in the working directory.
        raise ConfigError(f"path={path} is a file format: name the files with data_files, or give their folder as path")
    builder = datasets.load_dataset_builder(path, **options)
    if builder.name == "webdataset":
        # By default the library infers the columns from the first five members: a tar that mixes jpg and png is then an
        # error, or silently loses the images of the other format.
        names = [column] if column is not None else _members(builder.config.data_files or {}, path, kind)
        builder = datasets.load_dataset_builder(path, features=_tar_features(kind, names), **options)
    return builder


def _one_split(splits: Iterable[str], path: str, split: str | None) -> str:
    """The name of the requested split, or of the only one."""
    names = [str(name) for name in splits]
    if split in names:
        return split
    if split is None and len(names) == 1:
        return names[0]
    got = "several splits" if split is None else f"no split {split!r}"
    raise ConfigError(f"{path} has {got}; choose data.split= one of {', '.join(names)}")


def _load_errors() -> tuple[type[Exception], ...]:
    """Exceptions of `datasets` when it cannot load or read something."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's error derives from that of its HTTP library, which changed twice: requests, httpx, httpx2.
    network = HfHubHTTPError.__bases__
    # RuntimeError: the data set is a script, which is never run. ValueError covers pyarrow's.
    return (OSError, ValueError, KeyError, TypeError, RuntimeError, tarfile.TarError, DatasetsError, *network)


def _cannot_read(path: str, error: BaseException) -> str:
    """Message for a data set that failed to load, from the innermost cause."""
    if isinstance(error, ConnectionError):
        return f"cannot read {path}: {reason(error)}; check the name and the network, or give a local folder as path"
    while error.__cause__ is not None:
        error = error.__cause__
    text = reason(error)
    # Messages of the library for a table without rows, and for files without records.
    if "BatchSize must be greater than 0" in text or "corresponds to no data" in text:
        text = "it has no rows"
    if "torchcodec" in text:  # for a folder of recordings, which data=folder reads without it
        text = f"{text}; install torchcodec, or read a local folder with data=folder"
    return f"cannot read {path}: {text}"


def _check_tar(file: str) -> None:
    """Refuse a local tar with a damaged header: the members after it would be lost silently.

    Raises:
        DataError: there is one.
    """
    if not file.endswith(".tar") or not Path(file).is_file():
        return
    try:
        with tarfile.open(file, "r:") as archive:
            while archive.next() is not None:
                archive.members.clear()  # the list would grow with the archive
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UnreadableShard(
                    f"cannot read {file}: a damaged header at byte {archive.offset}; all data after it is lost"
                )
    except (OSError, tarfile.TarError) as error:
        raise UnreadableShard(_cannot_read(file, error)) from error


def _format_of(path: str) -> str | None:
    """The builder of `datasets` that reads files with this ending."""
    return BUILDERS.get(Path(re.sub(r"\.(gz|zst|bz2|xz)$", "", path.lower())).suffix)


def _record_name(path: str, data_files: object, split: str | None) -> str:
    """Prefix of keys: the file if there is a single one, else the data set and the split."""
    name = Path(data_files if isinstance(data_files, str) else path).name
    return name if _format_of(name) or split is None else f"{name}/{split}"


def _members(data_files: Mapping[str, Sequence[str]], path: str, kind: Kind) -> list[str]:
    """Names of the members with the samples of WebDataset tars, found in the first members of local tars.

    The part of a member's name before the first dot names the record, the rest the member.

    Raises:
        ConfigError: several members may be the samples.
    """
    local = [file for files in data_files.values() for file in files if Path(file).is_file()]
    records: dict[str, list[str]] = {}
    for file in local[:4]:
        # A broken tar is reported when it is read.
        with suppress(OSError, EOFError, zlib.error, tarfile.TarError), tarfile.open(file, "r:*") as archive:
            for member in itertools.islice(archive, LOOKED_AT):
                folder, slash, name = member.name.rpartition("/")
                base, _, rest = name.partition(".")
                if member.isfile() and base and rest:
                    records.setdefault(f"{file}:{folder}{slash}{base}", []).append(rest)
    known = MEMBERS[kind]
    usual = [case for name in known for case in (name, name.upper())]
    found = list(dict.fromkeys(name for names in records.values() for name in names if _ending(name) in known))
    if not found:
        return usual
    plain = [name for name in found if "." not in name]
    named = [name for name in found if name.partition(".")[0].lower() in USUAL_NAMES[kind]]
    chosen = plain or named or [name for name in found if not NOT_SAMPLES.search(name)]
    several = next((names for names in records.values() if len(set(names) & set(chosen)) > 1), None)
    if several is None and (plain or len({name.rpartition(".")[0] for name in chosen}) == 1):
        return [*usual, *chosen] if plain else chosen
    raise ConfigError(
        f"{path}: it is not clear which members are the {kind}s: {', '.join((several or found)[:8])} (what follows the "
        f"first dot of a name); choose one with data.column={(chosen or found)[0]}, for example"
    )


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _tar_features(kind: Kind, names: Sequence[str]) -> "datasets.Features":
    """The members of a WebDataset record to read; `datasets` ignores all others."""
    import datasets

    # Plain bytes: for an image feature the library would open the file of that name in the working directory.
    member = datasets.Value("string" if kind == "text" else "binary")
    return datasets.Features(
        dict.fromkeys(names, member)
        | {"cls": datasets.Value("int64"), "__key__": datasets.Value("string"), "__url__": datasets.Value("string")}
    )


def _encoded_feature(kind: Kind) -> object:
    """The column type that gives a sample as {"bytes", "path"}, or as a text."""
    import datasets

    if kind == "text":
        return datasets.Value("string")
    if kind == "image":
        return datasets.Image(decode=False)
    from data2vec_train.data.encoded_audio import EncodedAudio

    return EncodedAudio()


# ---------------------------------------------------------------------------------------------------------------------
# Its columns


def _pick_columns(
    features: "datasets.Features", path: str, kind: Kind, column: str | None, label_column: str | Literal[False] | None
) -> tuple[list[str], str | None]:
    """Columns of the samples, of which the first that is not empty is used; and the column of the labels or None."""
    listing = ", ".join(f"{name} ({_describe(feature)})" for name, feature in features.items())
    for wanted, option in ((column, "column"), (label_column, "label_column")):
        if wanted not in (None, False) and wanted not in features:
            raise ConfigError(f"{path} has no {option}={wanted!r}; its columns: {listing}")
    if column is not None:
        columns = [column]
    elif "__url__" in features and "__key__" in features:
        columns = [name for name in features if _ending(name) in MEMBERS[kind]]
    else:
        columns = [_sample_column(features, path, kind)]
    if columns in ([], [None]):
        raise ConfigError(f"{path} has no {kind} column; name it with data.column=... Its columns: {listing}")
    if label_column is not None:
        return columns, label_column or None
    return columns, _label_column(features, path)


def _sample_column(features: "datasets.Features", path: str, kind: Kind) -> str | None:
    """The column with the samples. Columns of the exact type come first, then bytes, then arrays.

    Within each group, the one with a usual name is chosen, or the only one.

    Raises:
        ConfigError: there are several, none with a usual name; or all have names of masks or labels.
    """
    named = {name.lower(): name for name in reversed(features)}
    of_type = [name for name, feature in features.items() if _is_kind(feature, kind)]
    bytes_ = [name for name, feature in features.items() if _is_bytes(feature) and kind != "text"]
    arrays = [name for name, feature in features.items() if kind == "image" and _is_picture(feature)]
    for group in (of_type, bytes_, arrays):
        likely = [name for name in group if not NOT_SAMPLES.search(name)]
        usual = [named[name] for name in USUAL_NAMES[kind] if named.get(name) in likely]
        if usual or len(likely) == 1:
            return (usual or likely)[0]
        if likely:
            raise ConfigError(
                f"{path}: several columns could be the {kind}s: {', '.join(likely)}; choose one with "
                f"data.column={likely[0]}, for example"
            )
    unlikely = of_type + bytes_ + arrays
    if unlikely:
        raise ConfigError(
            f"{path}: the only possible {kind} columns are named like masks or labels: {', '.join(unlikely)}; to use "
            f"one, write data.column={unlikely[0]}"
        )
    return None


def _label_column(features: "datasets.Features", path: str) -> str | None:
    """The column with the labels; None if there is none, or if several may be."""
    classes = [name for name, feature in features.items() if _is_class_label(feature)]
    usual = [name for name in LABEL_NAMES if name in classes or (name in features and _is_integer(features[name]))]
    if not usual and len(classes) > 1:
        log.warning("%s: no labels: they may be %s; choose with data.label_column=", path, " or ".join(classes))
        return None
    return next(iter(usual + classes), None)


def _taken(kind: Kind, columns: Sequence[str], label: str | None) -> str:
    """Description of the columns, for the log."""
    names = "/".join(columns[:4]) + ("/..." if len(columns) > 4 else "")
    return f"{kind}s from {names}, {f'labels from {label}' if label else 'no labels'}"


def _is_kind(feature: object, kind: Kind) -> bool:
    import datasets

    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.Image if kind == "image" else datasets.Audio)


def _is_bytes(feature: object) -> bool:
    """Whether a column may hold encoded files: plain parquet stores them as bytes, without their kind."""
    return (isinstance(feature, dict) and "bytes" in feature) or getattr(feature, "dtype", "").endswith("binary")


def _is_class_label(feature: object) -> bool:
    import datasets

    return isinstance(feature, datasets.ClassLabel)


def _with_names(feature: object, value: Any) -> Any:
    """A class number, or a list of them, replaced by class names; other values unchanged."""
    if _is_class_label(feature):
        return None if value is None or value < 0 else feature.names[value]
    inner = getattr(feature, "feature", None)
    return [_with_names(inner, item) for item in value] if _is_class_label(inner) and value is not None else value


def _is_integer(feature: object) -> bool:
    return re.fullmatch(r"u?int\d+", str(getattr(feature, "dtype", ""))) is not None


def _array_type(feature: object) -> str | None:
    """The type of the numbers in a column of arrays or of (nested) lists; None for other columns."""
    import datasets

    arrays = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)
    if isinstance(feature, arrays):
        return feature.dtype
    if not isinstance(feature, (datasets.List, datasets.LargeList)):
        return None
    inner = feature.feature
    if isinstance(inner, datasets.Value):
        return inner.dtype if re.fullmatch(r"u?int\d+|float\d+|bool", inner.dtype) else None
    return _array_type(inner)


def _is_picture(feature: object) -> bool:
    """Whether a column holds arrays with two or three axes of numbers."""
    import datasets

    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return True
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    return depth in (2, 3) and re.fullmatch(r"u?int\d+|float\d+", str(getattr(feature, "dtype", ""))) is not None


def _array_types(features: "datasets.Features", columns: Sequence[str]) -> dict[str, str]:
    """`_array_type` of the columns that have one."""
    return {column: kind for column in columns if (kind := _array_type(features[column])) is not None}


def _describe(feature: object) -> str:
    """Name of a column's type."""
    if isinstance(feature, dict):
        return "struct of " + ", ".join(feature)
    kind = type(feature).__name__
    return str(getattr(feature, "dtype", kind)) if kind == "Value" else kind


def _undecoded(dataset, path: str, columns: list[str], kind: Kind, more: Sequence[str] = ()):
    """The data set reduced to its samples (not decoded), their names in a tar, and the columns `more`.

    Raises:
        DataError: a column cannot be read as samples of `kind`.
    """
    extra = [name for name in (*more, "__key__", "__url__") if name in dataset.features]
    dataset = dataset.select_columns(list(dict.fromkeys([*columns, *extra])))
    encoded = dict.fromkeys(columns if kind != "text" else (), kind)
    pictures = [name for name in more if _is_kind(dataset.features[name], "image") and name not in columns]
    for column, its_kind in (encoded | dict.fromkeys(pictures, "image")).items():
        if its_kind == "image" and _array_type(dataset.features[column]) is not None:
            continue  # a cast would take numbers modulo 256, or take 8 bits for 16
        try:
            dataset = dataset.cast_column(column, _encoded_feature(its_kind))
        except _load_errors() as error:
            raise DataError(f"{path}: column {column!r} holds no {its_kind}s ({reason(error)})") from error
    return dataset


def _column_classes(
    dataset: "datasets.Dataset", path: str, column: str | None
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names, and the label of each row, (len,) int64, -1 where one is missing; or (None, None)."""
    if column is None:
        return None, None
    feature = dataset.features[column]
    if not (_is_class_label(feature) or _is_integer(feature) or _is_kind(feature, "text")):
        raise ConfigError(
            f"{path}: label_column={column!r} is {_describe(feature)}; expected integers, names or a ClassLabel"
        )
    values = dataset.select_columns(column)[:][column]
    # Without a ClassLabel the numbers may be arbitrary, such as 1 to 10: the label is their rank.
    classes = sorted({value for value in values if value is not None})
    if not classes:
        return None, None
    if _is_class_label(feature):
        classes = range(len(feature.names))
    rank = {value: place for place, value in enumerate(classes)}
    names = feature.names if _is_class_label(feature) else map(str, classes)
    return list(names), np.array([rank.get(value, -1) for value in values], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Identity of its records, from short columns, without reading the samples


def _row_hashes(
    dataset: "datasets.Dataset", columns: Sequence[str], kind: Kind, path: str, files: Sequence[str]
) -> np.ndarray:
    """(n,) uint64: hash of each record, as `HFSource.hashes` describes."""
    if "__url__" in dataset.features and "__key__" in dataset.features:
        pairs = zip(dataset["__url__"], dataset["__key__"], strict=True)
        return hashes_of(f"{Path(url or '').name}:{key}" for url, key in pairs)
    if kind == "text":
        texts = zip(*(_chunks(dataset, name) for name in columns), strict=True)
        found = (next((value for value in row if value is not None), "") for row in texts)
        return hashes_of(value if isinstance(value, str) else repr(value) for value in found)  # lists of words
    names = _file_names(dataset, columns[0], path)
    if names is not None:
        return hashes_of(names)
    places = _places_in_files(dataset, files)
    return hashes_of_numbers(len(dataset)) if places is None else places


def _chunks(dataset: "datasets.Dataset", name: str) -> Iterator[Any]:
    """The values of a column, read in batches."""
    for batch in dataset.select_columns(name).with_format(None).iter(batch_size=4096):
        yield from batch[name]


def _file_names(dataset: "datasets.Dataset", column: str, path: str) -> list[str] | None:
    """The file that each row was made from, relative to `path`; None unless all rows have one, mostly different."""
    feature = dataset.features[column]
    if not hasattr(feature, "decode"):
        return None
    names = _storage(dataset, column, "path")
    if names is None or names.null_count or len(names) == 0:
        return None
    names = [str(name).replace("\\", "/") for name in names.to_pylist()]
    if len(set(names)) <= len(names) / 2:
        return None
    root = f"{Path(path).expanduser().absolute()}/".replace("\\", "/")
    return [name.removeprefix(root) for name in names]


def _places_in_files(dataset: "datasets.Dataset", files: Sequence[str]) -> np.ndarray | None:
    """(n,) uint64: hash of file and row, so that adding a file changes none; None if the files of rows are unknown."""
    from pyarrow import ArrowException, parquet

    if not files or not all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        return None
    try:
        counts = [parquet.read_metadata(file).num_rows for file in files]
    except (OSError, ArrowException):
        return None
    if sum(counts) != len(dataset):
        return None
    names = hashes_of(Path(file).name for file in files)
    rows = [mixed(np.full(count, name), np.arange(count)) for name, count in zip(names, counts, strict=True)]
    return np.concatenate(rows)


def _storage(dataset: "datasets.Dataset", column: str, field: str | None) -> Any:
    """The arrow array of a column, or of the `field` of its struct, in row order; None if there is no paths column."""
    import pyarrow

    values = dataset.with_format("arrow").data.column(column)
    if isinstance(values.type, pyarrow.ExtensionType):
        values = pyarrow.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)
    if field is not None and pyarrow.types.is_struct(values.type):
        if values.type.get_field_index(field) < 0:
            return pyarrow.nulls(len(dataset))
        kind = values.type.field(field).type
        values = pyarrow.chunked_array([chunk.field(field) for chunk in values.chunks], kind)
    elif field == "path":
        return None
    if dataset._indices is not None:
        values = values.take(dataset._indices.column(0))
    return values


def _lengths(dataset: "datasets.Dataset", column: str) -> np.ndarray:
    """(n,) uint64: bytes or entries in each row of a column; size of the file where only a path is stored; else 0."""
    import pyarrow
    import pyarrow.compute

    values = _storage(dataset, column, "bytes")
    is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    if is_text or pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type):
        lengths = pyarrow.compute.binary_length(values)
    elif pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        lengths = pyarrow.compute.list_value_length(values)
    else:
        return np.zeros(len(dataset), dtype=np.uint64)
    found = lengths.fill_null(0).to_numpy().astype(np.uint64)
    paths = _storage(dataset, column, "path")
    if paths is not None and values.null_count:
        known = values.is_valid().to_numpy()
        found[~known] = file_sizes([Path(paths[int(row)].as_py() or "") for row in np.flatnonzero(~known)])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Its records


def _raw_sample(
    record: Mapping,
    columns: Sequence[str],
    key: str,
    label: int | None,
    asked: tuple[str, ...],
    array_types: Mapping[str, str],
    fields: Mapping[str, object] | None = None,
) -> RawSample:
    """A row of a data set as a `RawSample`; its key is the file or the tar member, if there is one.

    The value is a `BadSample` if its URL cannot be read, or does not start with one of `asked`.
    """
    if record.get("__url__") and record.get("__key__"):
        key = f"{Path(record['__url__']).name}:{record['__key__']}"
    present = [column for column in columns if record[column] is not None]
    column = next(iter(present), None)
    value = b"" if column is None else record[column]
    if len(present) > 1:
        value = BadSample(f"has several members: {', '.join(present)}; choose one with data.column={present[0]}")
    if column in array_types:
        try:
            value = np.array(value, dtype=array_types[column])
        except ValueError:
            value = BadSample("lists of different lengths, not an array")
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            key, value = path, _read_remote(path, asked) if "://" in path else Path(path)
    return RawSample(key, b"" if value is None else value, label, fields or {})


def _asked_places(path: str, data_files: object) -> tuple[str, ...]:
    """Allowed prefixes of URLs in records: the hub for a hub data set, and the hosts named in the settings.

    Otherwise a local table could make this machine send requests to any host.
    """
    import datasets

    named = tuple(re.findall(r"\w+://[^/'\"]+/", f"{path} {data_files}"))
    builder = path in (*BUILDERS.values(), "imagefolder", "audiofolder")
    return (
        named
        if builder or Path(path).expanduser().exists() or _format_of(path)
        else (*named, "hf://", f"{datasets.config.HF_ENDPOINT}/")
    )


def _read_remote(url: str, asked: tuple[str, ...]) -> bytes | BadSample:
    """Content of a file on the hub or inside an archive."""
    place = url.rpartition("::")[2]  # the last part of zip://file::place
    if "://" in place and not place.startswith((*asked, "file://")):
        return BadSample("a URL outside the data set's hosts, which is not fetched")
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except _load_errors() as error:
        return BadSample(f"cannot be downloaded: {reason(error)}")
