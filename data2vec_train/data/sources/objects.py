"""In-memory data of a Python call: lists, arrays, tensors, images, data frames, torch and Hugging Face data sets.

A config can hold only numbers and names. A call therefore stores its objects in a context variable under a name, and
the source that `data=objects` builds reads them from there.
"""

import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from data2vec_train.data.identity import hash_of
from data2vec_train.data.sources.files import RawSample, Source, StreamingSource
from data2vec_train.data.sources.hf import (
    LABEL_NAMES,
    NOT_SAMPLES,
    USUAL_NAMES,
    HFSource,
    HFStreamingSource,
)
from data2vec_train.data.sources.hf import Kind as KnownKind
from data2vec_train.data.sources.metadata import classes_of, text_column
from data2vec_train.errors import BadSample, ConfigError, DataError

log = logging.getLogger(__name__)

Kind = Literal["image", "audio", "text", "any"]  # "any" = what the `decode` of a plugin's modality takes
LOOKED_AT = 16  # images inspected to find out whether values lie in [0, 1]
ACCEPTED = (
    "a list, an array, a tensor, a data set of torch or Hugging Face, a frame of pandas or polars, or a dict of columns"
)


@dataclass(frozen=True)
class Handed:
    """The `data` and `labels` arguments of a call, see `as_source`."""

    data: Any
    labels: Any = None


_handed: ContextVar[Mapping[str, Handed]] = ContextVar("handed", default=MappingProxyType({}))


@contextmanager
def handing_over(objects: Mapping[str, Handed]) -> Iterator[None]:
    """Make these objects available to `handed_over`, by name."""
    token = _handed.set(objects)
    try:
        yield
    finally:
        _handed.reset(token)


def handed_over(
    *,
    name: str,
    kind: Kind,
    column: str | None,
    label_column: str | Literal[False] | None,
    fields: Sequence[str] = (),
) -> Source | StreamingSource:
    """The source that `data=objects` builds: the objects that the current Python call stored under `name`.

    Raises:
        ConfigError: no call stored objects, as in a command.
    """
    objects = _handed.get()
    if name not in objects:
        raise ConfigError(
            "data=objects is for Python calls, such as data2vec_train.pretrain(data=[...]); in a command choose "
            "data=folder, data=hf or data=manifest"
        )
    found = objects[name]
    return as_source(
        found.data,
        name=name,
        kind=kind,
        labels=found.labels,
        column=column,
        label_column=label_column,
        fields=fields,
    )


def as_source(
    data: Any,
    *,
    kind: Kind,
    name: str = "data",
    labels: Any = None,
    column: str | None = None,
    label_column: str | Literal[False] | None = None,
    fields: Sequence[str] = (),
) -> Source | StreamingSource:
    """A source of the objects in `data`.

    Args:
        data: a `Source`, returned as it is; a Hugging Face `Dataset` or `IterableDataset`; a torch `Dataset` or
            `IterableDataset`; a frame of pandas or polars, or a dict of columns; or anything with a length and an
            index: a list, an array (n, ...), a tensor. An item is

            - an image: of PIL, an array (h, w) or (h, w, C), a tensor (h, w) or (C, h, w), a path, bytes of a file;
            - a recording: (waveform, rate), {"array": waveform, "sampling_rate": rate}, a waveform (S,) or (C, S) at
              the model's rate, a path, bytes of a file;
            - a text: a str, or the path of a file;
            - for the modality of a plugin, whatever its `decode` takes; a str is the path of a file.

            A tuple (item, label), or (waveform, rate, label) for recordings, has a label; a dict has columns.
        kind: type of the items.
        name: prefix of the keys of the records: "data[12]".
        labels: numbers or names of classes, one for each item; None = labels in the data; False = none.
        column: the column with the samples; None = the one with a usual name.
        label_column: the column with the labels; None = the one with a usual name; False = no labels.
        fields: other columns to return with each record.

    Raises:
        ConfigError: another type of object, or a missing column.
        DataError: no records.
    """
    if isinstance(data, (Source, StreamingSource)):
        return data
    label_column = False if labels is not None else label_column
    labels = None if labels is False else labels
    library = type(data).__module__.partition(".")[0]
    if library == "datasets":
        if kind == "any":
            raise ConfigError(
                f"{name}: which column of a data set of Hugging Face a plugin's modality reads, and how, is not known; "
                "give a list or a torch Dataset"
            )
        return _of_hugging_face(
            data, name=name, kind=kind, labels=labels, column=column, label_column=label_column, fields=fields
        )
    if isinstance(data, torch.utils.data.IterableDataset):
        return Stream(data, name=name, kind=kind)
    if library in ("pandas", "polars"):
        data = {str(column): _cells(data[column]) for column in data.columns}
    if isinstance(data, Mapping):
        data = Columns(data)
    elif isinstance(data, (str, bytes, Path)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        once = "; a generator can be read only once; pass a list" if isinstance(data, Iterator) else ""
        raise ConfigError(f"{name}: got {_type_name(data)}, expected {ACCEPTED}{once}")
    return Objects(data, name=name, kind=kind, labels=labels, column=column, label_column=label_column, fields=fields)


class Columns(Sequence):
    """Columns of equal length, as a sequence of rows (dicts)."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = {str(name): values for name, values in columns.items()}
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"columns of different lengths: {', '.join(f'{n} {m}' for n, m in lengths.items())}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


class Reader:
    """Takes the sample out of an item; the first items tell its columns, and whether images have values in [0, 1].

    Args:
        first: the first items, at least one; more than one is read only for images of floating-point numbers.
        name: of the data, for messages.
        kind: see `as_source`.
        column: see `as_source`.

    Raises:
        ConfigError: it is not clear which column has the samples, or images have values below 0.
    """

    def __init__(self, first: Iterable[Any], *, name: str, kind: Kind, column: str | None) -> None:
        items = iter(first)
        item = next(items)
        self.kind = kind
        self.columns = tuple(item) if isinstance(item, Mapping) and not _is_sample(item, kind) else ()
        self.column = _sample_column(self.columns, kind, column, name) if self.columns else None
        self.in_unit_range = False
        if kind == "image" and _is_float(self.sample(item)):
            samples = map(self.sample, itertools.chain([item], items))
            arrays = [np.asarray(sample) for sample in samples if _is_float(sample)]
            if any((array < 0).any() for array in arrays):
                raise ConfigError(f"{name}: images with values below 0; pass images that are not normalised")
            self.in_unit_range = all((array <= 1).all() for array in arrays)

    def sample(self, item: Any) -> Any:
        """The item without its label: an image, a text, a waveform or (waveform, rate), a path."""
        if self.column is not None:
            item = item[self.column]
        elif isinstance(item, tuple):
            item = item[:2] if self.kind == "audio" and len(item) > 1 and _is_rate(item[1]) else item[0]
        return Path(item) if isinstance(item, str) and self.kind != "text" else item

    def value(self, item: Any) -> Any:
        """The sample as a `RawSample.value`, see `_encoded`."""
        return _encoded(self.sample(item), self.kind, unit=self.in_unit_range)


class Objects(Source):
    """Items with a length and an index, see `as_source`."""

    def __init__(
        self,
        data: Any,
        *,
        name: str,
        kind: Kind,
        labels: Any,
        column: str | None,
        label_column: str | Literal[False] | None,
        fields: Sequence[str],
    ) -> None:
        if not len(data):
            raise DataError(f"{name}: it is empty")
        self._data, self._name = data, name
        first = (data[index] for index in range(min(len(data), LOOKED_AT)))
        self._reader = Reader(first, name=name, kind=kind, column=column)
        known = self._reader.columns
        self._fields = {field: _present(text_column(field, known, name), known, name) for field in fields}
        given = labels if labels is not None or label_column is False else self._own_labels(data[0], label_column)
        self.class_names, self._labels = None, None
        if given is not None:
            self.class_names, self._labels = _classes(given, len(data), name)
        if self._reader.in_unit_range:
            log.info("%s: values lie in [0, 1]; 1 is white", name)
        classes = f", {len(self.class_names)} classes" if self.class_names else ", no labels"
        log.info("%s: %d records%s", name, len(self), classes)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> RawSample:
        index = range(len(self))[index]
        item = self._data[index]
        label = None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])
        value = self._reader.value(item)
        key = str(value) if isinstance(value, Path) else self.name_of(index)
        fields = {name: item[column] for name, column in self._fields.items()}
        return RawSample(key, value, label, fields)

    def name_of(self, index: int) -> str:
        """Name of the record in quarantine.jsonl."""
        return f"{self._name}[{index}]"

    def names(self) -> Iterator[str]:
        """Paths of files; positions of other objects. Reads no file."""
        for index in range(len(self)):
            sample = self._reader.sample(self._data[index]) if isinstance(self._data, (list, tuple)) else None
            yield str(sample) if isinstance(sample, Path) else self.name_of(index)

    def versions(self) -> np.ndarray:
        """Hash of the size of each object of a list; zeros for a data set, which would have to be read."""
        if not isinstance(self._data, (list, tuple, Columns, np.ndarray, torch.Tensor)):
            return np.zeros(len(self), dtype=np.uint64)
        sizes = (_size(self._reader.sample(self._data[index])) for index in range(len(self)))
        return np.fromiter((hash_of(size.encode()) for size in sizes), dtype=np.uint64, count=len(self))

    def labels(self) -> np.ndarray | None:
        """Labels, (len,) int64, -1 where one is missing; None without labels."""
        return self._labels

    def column(self, name: str) -> list[Any]:
        """Values of a column in `fields`, for all records."""
        column = self._fields[name]
        if isinstance(self._data, Columns):
            return list(self._data.columns[column])
        return [self._data[index][column] for index in range(len(self))]

    def _own_labels(self, first: Any, label_column: str | None) -> Sequence[Any] | None:
        known = self._reader.columns
        if known:
            usual = [name for name in LABEL_NAMES if name in known and name != self._reader.column]
            name = _present(label_column, known, self._name) if label_column else next(iter(usual), None)
            if name is None:
                return None
            if isinstance(self._data, Columns):
                return self._data.columns[name]
            return [self._data[index][name] for index in range(len(self._data))]
        if label_column:
            raise ConfigError(f"{self._name}: label_column={label_column!r}, and the items have no columns")
        if not isinstance(first, tuple):
            return None
        place = 2 if self._reader.kind == "audio" and len(first) > 1 and _is_rate(first[1]) else 1
        if len(first) <= place:
            return None
        targets = getattr(self._data, "targets", None)  # of torchvision's data sets: reads no image
        if targets is not None and len(targets) == len(self._data):
            names = getattr(self._data, "classes", None)
            found = [int(target) for target in targets]
            return [names[target] for target in found] if names is not None else found
        return [self._data[index][place] for index in range(len(self._data))]


class Stream(StreamingSource):
    """An `IterableDataset` of torch. With n consumers, each takes every n-th item.

    Items are as in `as_source`; their labels are ignored. The data set must not divide its items among loader processes
    by itself, since it would then be divided twice.
    """

    class_names = None

    def __init__(self, data: torch.utils.data.IterableDataset, *, name: str, kind: Kind) -> None:
        self._data, self._name, self._kind = data, name, kind

    def stream(
        self, *, epoch: int, seed: int, worker: int, num_workers: int, rank: int, world_size: int
    ) -> Iterator[RawSample]:
        """Records of one worker of one rank, in the order of the data set; shuffling is up to the data set."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch)
        consumer, consumers = worker * world_size + rank, world_size * max(1, num_workers)
        items = iter(self._data)
        first = list(itertools.islice(items, LOOKED_AT))
        if not first:
            return
        reader = Reader(first, name=self._name, kind=self._kind, column=None)
        own = itertools.islice(enumerate(itertools.chain(first, items)), consumer, None, consumers)
        for index, item in own:
            yield RawSample(f"{self._name}[{index}]", reader.value(item), None)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def _of_hugging_face(data: Any, *, name: str, kind: KnownKind, labels: Any, **columns: Any) -> Source | StreamingSource:
    import datasets

    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ConfigError(f"{name}: splits {', '.join(data)}; choose one, as in data=splits[{next(iter(data))!r}]")
    if isinstance(data, datasets.IterableDataset):
        columns.pop("fields")
        return HFStreamingSource.of(data, name=name, kind=kind, **columns)
    if labels is not None:
        if len(labels) != len(data):
            raise ConfigError(f"{name}: {len(data)} records and {len(labels)} labels")
        data = data.remove_columns([name for name in ("label",) if name in data.column_names])
        data, columns["label_column"] = data.add_column("label", _plain(labels)), "label"
    return HFSource.of(data, name=name, kind=kind, **columns)


def _cells(column: Any) -> list[Any]:
    """The values of a column of a data frame; NaN becomes None."""
    values = column.to_list()
    return [None if isinstance(value, float) and value != value else value for value in values]


def _plain(labels: Any) -> list[Any]:
    """Labels as plain numbers and texts."""
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return [label.item() if hasattr(label, "item") else label for label in labels]


def _classes(labels: Any, count: int, name: str) -> tuple[list[str], np.ndarray]:
    plain = _plain(labels)
    if len(plain) != count:
        raise ConfigError(f"{name}: {count} records and {len(plain)} labels")
    return classes_of(plain)


def _is_sample(item: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a dict is a recording decoded by the datasets library, and not a row of columns."""
    return kind == "audio" and "array" in item and "sampling_rate" in item


def _is_rate(value: Any) -> bool:
    """Whether the second element of a tuple is a sample rate and not the name of a class."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_float(sample: Any) -> bool:
    if isinstance(sample, torch.Tensor):
        return sample.is_floating_point()
    return isinstance(sample, np.ndarray) and sample.dtype.kind == "f"


def _present(wanted: str, names: Sequence[str], where: str) -> str:
    if wanted not in names:
        raise ConfigError(f"{where} has no column {wanted!r}; it has {', '.join(map(str, names)) or 'no columns'}")
    return wanted


def _sample_column(names: Sequence[str], kind: Kind, column: str | None, where: str) -> str:
    if column is not None:
        return _present(column, names, where)
    usual = [name for name in USUAL_NAMES.get(kind, ()) if name in names]
    others = [name for name in names if name not in LABEL_NAMES and not NOT_SAMPLES.search(name)]
    if usual or len(others) == 1:
        return (usual or others)[0]
    what = "samples" if kind == "any" else f"{kind}s"
    raise ConfigError(f"{where}: which column has the {what}? It has {', '.join(names)}; name it with data.column")


def _size(sample: Any) -> str:
    if isinstance(sample, tuple):
        return "|".join(map(_size, sample))
    if isinstance(sample, (str, bytes)):
        return str(len(sample))
    if isinstance(sample, Path):
        return str(sample.stat().st_size) if sample.is_file() else ""
    return str(tuple(getattr(sample, "shape", getattr(sample, "size", ()))))


def _encoded(sample: Any, kind: Kind, *, unit: bool) -> Any:
    """The sample as a `RawSample.value`."""
    if kind == "any":
        return sample
    if isinstance(sample, (bytes, Path)) or (isinstance(sample, str) and kind == "text"):
        return sample
    try:
        return {"image": _image, "audio": _recording, "text": _no_text}[kind](sample, unit)
    except (TypeError, ValueError) as error:
        return BadSample(f"{_type_name(sample)} is not the {kind} that is expected ({error})")


def _no_text(sample: Any, unit: bool) -> BadSample:
    return BadSample(f"{_type_name(sample)}, expected a str or a Path")


def _image(sample: Any, unit: bool) -> bytes | np.ndarray:
    if type(sample).__module__.startswith("PIL.") or hasattr(sample, "getbands"):
        return _png(sample)
    if isinstance(sample, torch.Tensor):
        array = sample.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    else:
        array = np.asarray(sample)
        if array.dtype == object:
            raise TypeError("expected a picture of PIL, an array, a tensor, a path or bytes")
    if not unit or array.dtype.kind != "f":
        return array
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"values from {array.min():g} to {array.max():g}; those of the first images lie in [0, 1]")
    return np.floor(array * 255.0 + 0.5).astype(np.uint8)


def _png(picture: Any) -> bytes | np.ndarray:
    """The bytes of a PNG file, or the array if PIL's mode needs no conversion, so that the rules for files apply."""
    if picture.mode in ("L", "RGB", "RGBA", "F") and not picture.info.get("exif"):
        return np.asarray(picture)
    buffer = io.BytesIO()
    picture = picture if picture.mode in ("1", "LA", "P", "I;16", "I", "L", "RGB", "RGBA") else picture.convert("RGB")
    picture.save(buffer, format="PNG", compress_level=1, exif=picture.info.get("exif", b""))
    return buffer.getvalue()


def _recording(sample: Any, unit: bool) -> bytes | np.ndarray:
    if isinstance(sample, Mapping):
        sample = (sample["array"], sample["sampling_rate"])
    pair = isinstance(sample, tuple)
    waveform, rate = sample if pair else (sample, None)
    waveform = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if waveform.dtype == object or waveform.ndim not in (1, 2):
        raise TypeError(f"a waveform of shape {waveform.shape}; expected (samples,) or (channels, samples)")
    if waveform.ndim == 2 and waveform.shape[0] > waveform.shape[1]:
        waveform = waveform.T  # (samples, channels), as soundfile reads
    if not pair:
        return waveform
    import soundfile

    buffer = io.BytesIO()
    whole = waveform.dtype == np.int16
    frames = waveform.T if whole else waveform.T.astype(np.float32)
    soundfile.write(buffer, frames, int(rate), format="WAV", subtype="PCM_16" if whole else "FLOAT")
    return buffer.getvalue()


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
