"""From raw records to samples that the collator can stack; broken records are replaced and reported."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from data2vec_train.data.sampler import Key, LengthBatching
from data2vec_train.data.seeding import generator, torch_seeded
from data2vec_train.data.sources.files import RawSample, Source, StreamingSource
from data2vec_train.errors import BadSample

MAX_REPLACEMENTS = 20
POOLED_BATCHES = 16  # total length of the samples that wait for a batch of their length, in budgets of a batch
MAX_LOST = 50  # placeholders for 21 broken records in a row each, passed on even if no batch is ready


@dataclass(frozen=True)
class Sample:
    """One decoded and transformed sample."""

    inputs: Tensor | None  # None = neither the record nor any of its replacements could be used
    epoch: int
    id: int
    label: int | None
    rejected: tuple[tuple[str, str], ...]  # (key, reason) of the broken records tried before
    key: str = ""  # of the record; set by `EvaluationDataset` only
    place: tuple[int, int, int] | None = None  # in a stream: worker, epoch, and number of its record, from 1


class TrainingDataset(Dataset[Sample]):
    """Random access by `Key`; the same key gives the same sample, bit for bit, in any process.

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
        epoch, index, length = key
        rejected: list[tuple[str, str]] = []
        candidate = index
        for attempt in range(MAX_REPLACEMENTS + 1):
            record_id = int(self.indices[candidate])
            # Only a late replacement may be shorter than `length`; it is padded.
            wanted = None if length is None else min(length, int(self.source.lengths[record_id]))
            result = self._try(record_id, epoch, wanted)
            if isinstance(result, Sample):
                return replace(result, rejected=tuple(rejected))
            rejected.append(result)
            candidate = self._replacement(epoch, index, attempt, length)
        return Sample(None, epoch, int(self.indices[index]), None, tuple(rejected))

    def _replacement(self, epoch: int, index: int, attempt: int, length: int | None) -> int:
        rng = generator(self.seed, "replace", epoch, index, attempt)
        # If the headers of the longest records are wrong, no record may be long enough: late attempts accept any.
        if self.source.lengths is None or attempt >= MAX_REPLACEMENTS // 2:
            return int(rng.integers(len(self.indices)))
        lengths = self.source.lengths[self.indices]
        # A batch that is not cropped is padded to its longest sample: a replacement must not be longer.
        fits = lengths <= lengths[index] if length is None else lengths >= length
        return int(rng.choice(np.flatnonzero(fits)))

    def _try(self, record_id: int, epoch: int, length: int | None) -> Sample | tuple[str, str]:
        key = f"#{record_id}"
        try:
            raw: RawSample = self.source[record_id]
            key = raw.key
            decoded = self.decode(raw.value)
            with torch_seeded(self.seed, "augment", epoch, record_id):
                inputs = self.transform(decoded)
            if length is not None:
                inputs = random_crop(inputs, length, generator(self.seed, "crop", epoch, record_id))
            return Sample(inputs, epoch, record_id, raw.label, ())
        except BadSample as error:
            return key, str(error)


def random_crop(inputs: Tensor, length: int, rng: np.random.Generator) -> Tensor:
    """`length` consecutive positions of the last axis, a copy.

    Raises:
        BadSample: the input is shorter.
    """
    surplus = inputs.shape[-1] - length
    if surplus < 0:
        raise BadSample(f"shorter than its header says: {inputs.shape[-1]} samples, expected at least {length}")
    start = int(rng.integers(surplus, endpoint=True))
    return inputs[..., start : start + length].clone()


class EvaluationDataset(Dataset[Sample]):
    """The same records without randomness, in order; broken ones have `inputs` None."""

    def __init__(
        self, *, source: Source, indices: np.ndarray, decode: Callable[[Any], Any], transform: Callable[[Any], Tensor]
    ) -> None:
        self.source = source
        self.indices = indices
        self.decode = decode
        self.transform = transform

    @property
    def lengths(self) -> np.ndarray | None:
        """(len,) in units of the input, see `Source`."""
        return None if self.source.lengths is None else self.source.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        record_id = int(self.indices[index])
        key = f"#{record_id}"
        try:
            raw = self.source[record_id]
            key = raw.key
            return Sample(self.transform(self.decode(raw.value)), 0, record_id, raw.label, (), key)
        except BadSample as error:
            return Sample(None, 0, record_id, None, ((key, str(error)),))


class StreamingDataset(IterableDataset[Sample | list[Sample]]):
    """A stream, epoch after epoch.

    A sample's id is a checksum of its key, so its masks and augmentation do not depend on which worker reads it. The
    order of the samples does.

    Args:
        source: raw records.
        decode: encoded value -> decoded; raises BadSample.
        transform: decoded -> tensor, drawing from torch's global generator; raises BadSample.
        seed: of the run.
        batching: None gives single samples. Otherwise batches of samples of about the same length: each worker
            collects samples until a bin has enough for a batch; it holds at most `POOLED_BATCHES` budgets.
        batch_size: most samples in such a batch; None = set by the budget.
        rank: of this process.
        world_size: number of processes.
        places: worker -> (epoch, number of its records to skip), where each worker continues; a missing worker starts
            at the first record. Skipped records are read again, but not decoded.
        first_worker: number of the worker whose batch comes first.
    """

    def __init__(
        self,
        *,
        source: StreamingSource,
        decode: Callable[[Any], Any],
        transform: Callable[[Any], Tensor],
        seed: int,
        batching: LengthBatching | None = None,
        batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        places: Mapping[int, tuple[int, int]] | None = None,
        first_worker: int = 0,
    ) -> None:
        self.source = source
        self.decode = decode
        self.transform = transform
        self.seed = seed
        self.batching = batching
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.places = dict(places or {})
        self.first_worker = first_worker

    def __iter__(self) -> Iterator[Sample | list[Sample]]:
        return self._samples() if self.batching is None else self._batches(self.batching)

    def _batches(self, batching: LengthBatching) -> Iterator[list[Sample]]:
        pool: dict[int, list[Sample]] = {}
        pooled = 0  # length of all samples in the pool
        lost: list[Sample] = []
        for sample in self._samples():
            if sample.inputs is None:
                lost.append(sample)
                if len(lost) == MAX_LOST:
                    yield lost
                    lost = []
                continue
            bin_ = int(batching.bin(sample.inputs.shape[-1]))
            if batching.crop:
                rng = generator(self.seed, "crop", sample.epoch, sample.id)
                sample = replace(sample, inputs=random_crop(sample.inputs, int(batching.edges[bin_]), rng))
            pool.setdefault(bin_, []).append(sample)
            pooled += sample.inputs.shape[-1]
            full = batching.batch_size(bin_, self.batch_size)
            if len(pool[bin_]) < full:
                if pooled <= POOLED_BATCHES * batching.budget:
                    continue
                bin_ = max(pool, key=lambda candidate: sum(kept.inputs.shape[-1] for kept in pool[candidate]))
            batch = pool.pop(bin_)
            pooled -= sum(kept.inputs.shape[-1] for kept in batch)
            waiting = [kept.place for samples in pool.values() for kept in samples]
            if waiting:  # a resumed run reads these again, together with some it has trained on
                worker, epoch, number = min(waiting)
                batch[-1] = replace(batch[-1], place=(worker, epoch, number - 1))
            yield [*lost, *batch]
            lost = []

    def _samples(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        number = (number + self.first_worker) % count
        rejected: list[tuple[str, str]] = []
        epoch, done = self.places.get(number, (0, 0))
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
                if seen <= done:
                    continue
                place = (number, epoch, seen)
                record_id = zlib.crc32(raw.key.encode("utf-8", "backslashreplace"))
                try:
                    decoded = self.decode(raw.value)
                    with torch_seeded(self.seed, "augment", epoch, record_id):
                        inputs = self.transform(decoded)
                except BadSample as error:
                    rejected.append((raw.key, str(error)))
                    if len(rejected) > MAX_REPLACEMENTS:
                        yield Sample(None, epoch, record_id, None, tuple(rejected), place=place)
                        rejected = []
                    continue
                yield Sample(inputs, epoch, record_id, raw.label, tuple(rejected), place=place)
                rejected = []
            if seen == 0:  # this worker got no share of the stream
                return
            epoch, done = epoch + 1, 0
