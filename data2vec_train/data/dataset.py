"""From raw records to samples the collate function can stack; broken ones are replaced and reported."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from data2vec_train.data.sampler import Key
from data2vec_train.data.seeding import generator, torch_seeded
from data2vec_train.data.sources import RawSample, Source, StreamingSource
from data2vec_train.errors import BadSample

MAX_REPLACEMENTS = 20


@dataclass(frozen=True)
class Sample:
    """One decoded and transformed sample."""

    inputs: Tensor | None  # None = neither it nor any of its replacements could be used
    epoch: int
    id: int
    label: int | None
    rejected: tuple[tuple[str, str], ...]  # (key, reason) of what was tried before


class TrainingDataset(Dataset[Sample]):
    """Random access by (epoch, index); the same key gives the same sample, bit for bit, in any process.

    Args:
        source: raw records.
        indices: (n,) which records of the source belong to this data set.
        decode: encoded value -> decoded; raises BadSample.
        transform: decoded -> tensor, drawing from torch's global generator; raises BadSample.
        seed: of the run.
    """

    def __init__(
        self,
        *,
        source: Source,
        indices: np.ndarray,
        decode: Callable[[Any], Any],
        transform: Callable[[Any], Tensor],
        seed: int,
    ) -> None:
        self.source = source
        self.indices = indices
        self.decode = decode
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        rejected: list[tuple[str, str]] = []
        candidate = index
        for attempt in range(MAX_REPLACEMENTS + 1):
            result = self._try(int(self.indices[candidate]), epoch)
            if isinstance(result, Sample):
                return replace(result, rejected=tuple(rejected))
            rejected.append(result)
            candidate = self._replacement(epoch, index, attempt)
        return Sample(None, epoch, int(self.indices[index]), None, tuple(rejected))

    def _replacement(self, epoch: int, index: int, attempt: int) -> int:
        return int(generator(self.seed, "replace", epoch, index, attempt).integers(len(self.indices)))

    def _try(self, record_id: int, epoch: int) -> Sample | tuple[str, str]:
        key = f"#{record_id}"
        try:
            raw: RawSample = self.source[record_id]
            key = raw.key
            decoded = self.decode(raw.value)
            with torch_seeded(self.seed, "augment", epoch, record_id):
                return Sample(self.transform(decoded), epoch, record_id, raw.label, ())
        except BadSample as error:
            return key, str(error)


class EvaluationDataset(Dataset[Sample]):
    """The same records without randomness, in order; broken ones have `inputs` None."""

    def __init__(
        self, *, source: Source, indices: np.ndarray, decode: Callable[[Any], Any], transform: Callable[[Any], Tensor]
    ) -> None:
        self.source = source
        self.indices = indices
        self.decode = decode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        record_id = int(self.indices[index])
        key = f"#{record_id}"
        try:
            raw = self.source[record_id]
            key = raw.key
            return Sample(self.transform(self.decode(raw.value)), 0, record_id, raw.label, ())
        except BadSample as error:
            return Sample(None, 0, record_id, None, ((key, str(error)),))


class StreamingDataset(IterableDataset[Sample]):
    """A stream, epoch after epoch.

    A sample's identity is a checksum of its key, so that masks and augmentation do not depend on which worker reads
    it; its place in the order does.
    """

    def __init__(
        self,
        *,
        source: StreamingSource,
        decode: Callable[[Any], Any],
        transform: Callable[[Any], Tensor],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source = source
        self.decode = decode
        self.transform = transform
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        rejected: list[tuple[str, str]] = []
        epoch = 0
        while True:
            seen = 0
            stream = self.source.stream(
                epoch=epoch,
                seed=self.seed,
                worker=number,
                num_workers=count,
                rank=self.rank,
                world_size=self.world_size,
            )
            for raw in stream:
                seen += 1
                record_id = zlib.crc32(raw.key.encode())
                try:
                    decoded = self.decode(raw.value)
                    with torch_seeded(self.seed, "augment", epoch, record_id):
                        inputs = self.transform(decoded)
                except BadSample as error:
                    rejected.append((raw.key, str(error)))
                    if len(rejected) > MAX_REPLACEMENTS:
                        yield Sample(None, epoch, record_id, None, tuple(rejected))
                        rejected = []
                    continue
                yield Sample(inputs, epoch, record_id, raw.label, tuple(rejected))
                rejected = []
            if seen == 0:  # this worker got no share of the stream
                return
            epoch += 1
