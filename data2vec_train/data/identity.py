"""Identity of a data set, small enough for a checkpoint: a resumed run compares it to detect changed data.

It covers the names of the records relative to the data folder (so the folder may move), their sizes, and the content
of `CONTENT_SAMPLES` records, since a file may be replaced by another of the same name and size. It leaves out
modification times, which differ between copies.
"""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data2vec_train.data.files import open_file
from data2vec_train.errors import BadSample

if TYPE_CHECKING:
    from data2vec_train.data.sources.files import Source, StreamingSource

log = logging.getLogger(__name__)

CONTENT_SAMPLES = 256  # records whose content is hashed: those with the smallest hashes of names
CONTENT_BYTES = 65_536  # hashed at either end of each
LISTED_RECORDS = 65_536  # up to this number, a checkpoint lists every record, so that new ones can be named


# ---------------------------------------------------------------------------------------------------------------------
# Hashes


def hash_of(value: bytes) -> int:
    """64 bits, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")


def hashes_of(names: Iterable[str]) -> np.ndarray:
    """(n,) uint64: of each name in Unicode form NFC; file systems differ in the form they return."""
    return np.fromiter((hash_of(_canonical(name)) for name in names), dtype=np.uint64)


def hashes_of_numbers(count: int) -> np.ndarray:
    """(count,) uint64: of the numbers 0, 1, ..., for rows without a name."""
    return mixed(np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64))


def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of each pair of 64-bit numbers (the finalizer of SplitMix64)."""
    x = first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + second.astype(np.uint64) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _canonical(name: str) -> bytes:
    if name.isascii():
        return name.encode()
    return unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass")


def content_hash(value: Any) -> int | None:
    """Hash of a record's value (both ends of a file or of long bytes); None if it cannot be read."""
    if isinstance(value, Path):
        try:
            with open_file(value) as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(CONTENT_BYTES)
                file.seek(max(0, size - CONTENT_BYTES))
                return hash_of(ends + file.read(CONTENT_BYTES))
        except (BadSample, OSError):
            return None
    if isinstance(value, np.ndarray):
        value = f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hash_of(bytes(value[:CONTENT_BYTES]) + bytes(value[-CONTENT_BYTES:]))
    return hash_of(str(value).encode("utf-8", "replace"))


def content_sample(source: "Source", hashes: np.ndarray) -> np.ndarray:
    """(m, 2) uint64: hash of the name and of the content of the records with the smallest hashes.

    Args:
        source: the records.
        hashes: (n,) uint64, of their names.
    """
    found = []
    for row in np.argsort(hashes, kind="stable")[:CONTENT_SAMPLES]:
        try:
            sample = source[int(row)]
        except BadSample:
            continue
        content = content_hash(sample.value)
        if content is not None:
            found.append((int(hashes[row]), content))
    return np.array(found, dtype=np.uint64).reshape(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def identify(source: "Source | StreamingSource") -> dict[str, Any]:
    """Identity of `source`, as plain containers and tensors, for a checkpoint.

    Keys: `count` (records, or shards of a stream), `classes`, `digest` (of all names and versions, in order),
    `records` ((n, 2) int64: name and version of each; None if more than `LISTED_RECORDS`), `content`
    (see `content_sample`).
    """
    from data2vec_train.data.sources.files import Source

    if isinstance(source, Source):
        hashes = source.hashes()
        versions, content = mixed(source.versions(), _class_hashes(source)), content_sample(source, hashes)
    else:
        shards = source.shards()
        hashes = hashes_of(name for name, _ in shards)
        versions = np.array([size for _, size in shards], dtype=np.int64).astype(np.uint64)
        content = np.empty((0, 2), dtype=np.uint64)
    records = np.stack([hashes, versions], axis=1)
    return {
        "count": len(records),
        "classes": None if source.class_names is None else list(source.class_names),
        "digest": hashlib.sha256(np.ascontiguousarray(records).tobytes()).hexdigest(),
        "records": _tensor(records) if len(records) <= LISTED_RECORDS else None,
        "content": _tensor(content),
    }


def _class_hashes(source: "Source") -> np.ndarray:
    """(n,) uint64: hash of the class name of each record, since class numbers may change; 0 without a class."""
    labels = source.labels()
    if labels is None or source.class_names is None:
        return np.zeros(len(source), dtype=np.uint64)
    return np.append(hashes_of(source.class_names), np.uint64(0))[labels]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int64).copy())


def difference(before: dict[str, Any], now: dict[str, Any], source: "Source | StreamingSource") -> str | None:
    """How the data changed, in words; None if they did not.

    Args:
        before: result of `identify` before the run was resumed.
        now: result of `identify` now.
        source: the data now, to name records.
    """
    changes = []
    if before["classes"] != now["classes"]:
        changes.append(f"the classes were {_listed(before['classes'])}, and are {_listed(now['classes'])}")
    if before["digest"] != now["digest"]:
        changes.append(_counted(before, now, source))
    else:
        old, new = dict(before["content"].tolist()), dict(now["content"].tolist())
        both = old.keys() & new.keys()
        changed = sum(old[name] != new[name] for name in both)
        if changed:
            changes.append(f"{changed} of {len(both)} compared records have other content")
    return "; ".join(changes) or None


def _listed(classes: list[str] | None) -> str:
    if classes is None:
        return "none"
    return f"[{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}] ({len(classes)})"


def _counted(before: dict[str, Any], now: dict[str, Any], source: "Source | StreamingSource") -> str:
    counts = f"{before['count']} records then, {now['count']} now"
    if before["records"] is None or now["records"] is None:
        return counts
    old = dict(before["records"].tolist())
    new = now["records"].tolist()
    added = [row for row, (name, _) in enumerate(new) if name not in old]
    changed = [row for row, (name, version) in enumerate(new) if name in old and old[name] != version]
    removed = len(old.keys() - {name for name, _ in new})
    parts = [f"{len(added)} new{_example(source, added)}"] if added else []
    parts += [f"{removed} missing"] if removed else []
    parts += [f"{len(changed)} changed{_example(source, changed)}"] if changed else []
    return f"{counts}: {', '.join(parts) or 'the same records in another order, or some repeated'}"


def _example(source: "Source | StreamingSource", rows: list[int]) -> str:
    return f" (such as {source.name_of(rows[0])})"
