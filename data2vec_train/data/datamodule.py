"""One DataModule for all modalities: splits records into training and evaluation, and builds the loaders for both."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from data2vec_train.batch import Batch
from data2vec_train.data.collate import Collator
from data2vec_train.data.dataset import EvaluationDataset, StreamingDataset, TrainingDataset
from data2vec_train.data.loading import Loader, available_workers
from data2vec_train.data.quarantine import Quarantine
from data2vec_train.data.sampler import EndlessBatchSampler, LengthBatching, LengthBatchSampler
from data2vec_train.data.seeding import generator
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.data.split import UNLABELLED_HELD_OUT, Split, again, choose
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.constraints import require

log = logging.getLogger(__name__)

EVALUATION_BATCH = 64


class TimedLoader:
    """A loader that adds up the seconds its consumer waits for batches."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:  # training loaders are endless
                raise DataError("data.source gave no samples") from None
            self.waited_seconds += seconds_since(start)
            yield batch


class ResumableData(L.LightningDataModule):
    """Base of the data modules: batches are numbered over all processes, and a resumed run continues at the next one.

    Args:
        changed_steps: allow a resumed run to take another number of batches per optimizer step.

    Attributes:
        facts: stored in checkpoints for `training.run_directory`: the identity of the sources, and the split.
    """

    quarantine: Quarantine
    num_workers: int
    prefetch_factor: int
    on_device: bool | None = None  # whether samples are normalised on the device; None where this is not possible

    def __init__(self, *, changed_steps: bool) -> None:
        super().__init__()
        self.changed_steps = changed_steps
        self.facts: dict[str, Any] = {}
        self.loader: TimedLoader | None = None
        self._first_batch, self._first_step = 0, 0  # where this process started
        self._batches_per_step: int | None = None  # of the resumed run

    def place(self) -> dict[str, int]:
        """Arguments of a sampler: where this process starts.

        Raises:
            ConfigError: a step would take another number of batches than before the run was resumed.
        """
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        before, now = self._batches_per_step, self._per_step()
        if before not in (None, now) and not self.changed_steps:
            world_size = self.trainer.world_size
            wanted = f"set trainer.accumulate_grad_batches={before // world_size}"
            wanted = wanted if before % world_size == 0 else f"use a number of processes that divides {before}"
            raise ConfigError(
                f"a step of this run took {before} batches, and now would take {now} ({world_size} processes, "
                f"{now // world_size} batches each); {wanted}, or continue with resume=changed"
            )
        self._first_step = self.trainer.global_step
        return {
            "first_batch": self._first_batch,
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
        }

    def loading(self) -> dict[str, Any]:
        """Arguments of the training loader: its processes, and how many training processes share this machine."""
        trainer = self.trainer
        return {
            "num_workers": self.num_workers,
            "prefetch_factor": self.prefetch_factor,
            "pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda",
            "sharers": 1 if trainer is None else max(1, trainer.world_size // trainer.num_nodes),
        }

    def _per_step(self) -> int:
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _held_out(
        self, origins: np.ndarray, labels: np.ndarray | None, fraction: float, before: dict[str, Any] | None
    ) -> np.ndarray:
        """Indices of the held-out records; `before` is the split of the resumed run, as `Split.state` stored it."""
        split = choose(origins, labels, fraction) if before is None else again(Split.of(before), origins, labels)
        self.facts["split"] = split.state()
        return split.rows(origins, labels)

    def state_dict(self) -> dict[str, Any]:
        """Number of batches taken by all steps so far, and by one step; also shares the quarantine among processes."""
        if self.trainer.world_size > 1:
            self.quarantine.share()
        steps = self.trainer.global_step - self._first_step
        batches = self._first_batch + steps * self._per_step()
        return {"batches": batches, "batches_per_step": self._per_step(), **self.facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that `state_dict` counted."""
        self._first_batch, self._batches_per_step = state_dict["batches"], state_dict["batches_per_step"]


class DataModule(ResumableData):
    """Batches for pretraining, and evaluation samples that never train the encoder.

    Labels never reach the objective. Without a `test_source` a share of the source is held out from training, see
    `data.split`; records of one origin (`Source.origins`) stay together. The probes are fitted on samples that also
    train the encoder, and tested on held-out samples.

    Args:
        source: training samples.
        test_source: test samples, with labels where `source` has labels; or None.
        held_out_fraction: share of `source` that is held out, without labels at most `UNLABELLED_HELD_OUT` samples;
            ignored with a `test_source`.
        max_probe_samples: largest number of samples to fit the probes on, and to test them on.
        decode: encoded value -> decoded.
        transform: has `train` and `evaluate`, decoded -> tensor.
        batching: how samples of different lengths share batches; None where all have the same length.
        collator: makes batches with masks.
        batch_size_per_device: samples per batch and process; with `batching` an upper limit, None = set by its budget.
        num_workers: loader processes; "auto" = one less than the available cores, between 1 and 8.
        prefetch_factor: batches that each loader process keeps ready.
        max_bad_fraction: share of broken samples above which the run stops.
        tolerated_bad_samples: up to this number, broken samples never stop the run.
        quarantine_path: file that lists broken samples.
        seed: of the run.
        changed_steps: see `ResumableData`.
        on_device: load training samples as bytes and normalise them on the model's device; the values are the same.
        split: of the resumed run, from its checkpoint; None = choose one.

    Raises:
        ConfigError: settings that do not fit the data.
    """

    def __init__(
        self,
        *,
        source: Source | StreamingSource,
        test_source: Source | None,
        held_out_fraction: float,
        max_probe_samples: int,
        decode: Callable[[Any], Any],
        transform: Any,
        batching: LengthBatching | None,
        collator: Collator,
        batch_size_per_device: int | None,
        num_workers: int | Literal["auto"],
        prefetch_factor: int,
        max_bad_fraction: float,
        tolerated_bad_samples: int,
        quarantine_path: Path,
        seed: int,
        changed_steps: bool = False,
        on_device: bool = False,
        split: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(changed_steps=changed_steps)
        require(held_out_fraction=held_out_fraction)
        self.source = source
        self.decode = decode
        self.transform = transform
        self.batching = batching
        self.seed = seed
        self.batch_size = batch_size_per_device
        self.num_workers = available_workers() if num_workers == "auto" else num_workers
        self.prefetch_factor = prefetch_factor
        self.collate = collator
        if hasattr(transform, "train_bytes"):
            self.on_device = on_device
        elif on_device:
            raise ConfigError("data.on_device=true works only for images, which are bytes before normalisation")
        if on_device and transform.erases:
            raise ConfigError("data.on_device=true: erasing comes after normalising; set modality.augment.erase=0")
        self._places: dict[int, tuple[int, int]] = {}  # of a stream: worker -> epoch, records read in it
        self._streams: list[dict[str, Any]] | None = None  # of all processes of the resumed run

        streaming = isinstance(source, StreamingSource)
        if not streaming:
            _check_lengths(source, collator.token_count, batching)
        self.indices = np.arange(0 if streaming else len(source))
        # Three evaluation sets: to fit the probes, to test them, and for the pretext task.
        self.fit_set, self.test_set, self.held_out_set = None, None, None
        self.probe_note = "no labels: probes off, RankMe on"
        if streaming:
            self.probe_note = "a stream: probes and RankMe off"
        labels = None if streaming else source.labels()
        if test_source is not None:
            _check_same_classes(source, test_source)
        held_out = np.empty(0, dtype=np.int64)
        if not streaming and test_source is None:
            held_out = self._held_out(source.origins(), labels, held_out_fraction, split)
            self.indices = np.setdiff1d(self.indices, held_out)
        if labels is not None:
            test = _labelled(test_source) if test_source else held_out[labels[held_out] >= 0]
            self.probe_note = "too few samples of each class to hold any out: probes off, RankMe on"
            if len(test):
                self.probe_note = f"probes on {min(len(test), max_probe_samples)} held-out samples"
                fit = np.intersect1d(self.indices, _labelled(source))
                self.fit_set = self._evaluation(source, _spread(fit, max_probe_samples))
                self.test_set = self._evaluation(test_source or source, _spread(test, max_probe_samples))
        if test_source is not None or len(held_out):
            rows = np.arange(len(test_source)) if test_source else held_out
            self.held_out_set = self._evaluation(test_source or source, _spread(rows, UNLABELLED_HELD_OUT))
        if not streaming and not len(self.indices):
            raise DataError("no samples are left to train on")
        self.num_samples = None if streaming else len(self.indices)
        sources = [known for known in (source, test_source) if isinstance(known, Source)]
        rejected = tuple(pair for known in sources for pair in known.rejected)
        self.quarantine = Quarantine(
            path=quarantine_path,
            num_samples=None if streaming else sum(known.num_documents for known in sources) + len(rejected),
            max_bad_fraction=max_bad_fraction,
            tolerated=tolerated_bad_samples,
        )
        self.quarantine.add(rejected, num_good=0)
        self.quarantine.write(pair for known in sources for pair in known.left_out)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of the probes; None without labels."""
        return self.source.class_names if self.test_set is not None else None

    def train_dataloader(self) -> TimedLoader:
        """An endless loader of masked batches."""
        place = self.place()
        common: dict[str, Any] = {
            "decode": self.decode,
            "transform": self.transform.train_bytes if self.on_device else self.transform.train,
            "seed": self.seed,
        }
        if isinstance(self.source, StreamingSource):
            place = {"rank": place["rank"], "world_size": place["world_size"], **self._stream_places()}
            dataset = StreamingDataset(
                source=self.source, batching=self.batching, batch_size=self.batch_size, **place, **common
            )
            batches: dict[str, Any] = {"batch_size": self.batch_size if self.batching is None else None}
        else:
            dataset = TrainingDataset(source=self.source, indices=self.indices, **common)
            order = {"batch_size": self.batch_size, "seed": self.seed, **place}
            if self.batching is None:
                sampler = EndlessBatchSampler(num_samples=len(dataset), **order)
            else:
                lengths = self.source.lengths[self.indices]
                sampler = LengthBatchSampler(lengths=lengths, batching=self.batching, **order)
            batches = {"batch_sampler": sampler}
        self.loader = TimedLoader(Loader(dataset, collate=self.collate, **self.loading(), **batches))
        return self.loader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Record broken samples while the batch is still on the host.

        Raises:
            DataError: too many are broken, or no sample of the batch could be used or replaced.
        """
        if batch.place is not None:
            worker, *place = batch.place
            self._places[worker] = tuple(place)
        self.quarantine.add(batch.rejected, num_good=len(batch))
        if not len(batch):
            self.quarantine.stop("nothing usable was found in a whole batch")
        return batch

    def state_dict(self) -> dict[str, Any]:
        """As `ResumableData`; of a stream also the position of each worker of each process."""
        state = super().state_dict()
        if isinstance(self.source, StreamingSource):
            mine = {"workers": max(1, self.num_workers), "places": self._places}
            everyone = [mine]
            if self.trainer.world_size > 1:
                everyone = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(everyone, mine)
            state["streams"] = everyone
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was made."""
        super().load_state_dict(state_dict)
        self._streams = state_dict.get("streams")

    def _stream_places(self) -> dict[str, Any]:
        """Arguments of a `StreamingDataset`: the positions of the resumed run."""
        if self._streams is None or self.trainer is None:
            return {}
        workers = max(1, self.num_workers)
        now = [workers] * self.trainer.world_size
        before = [stream["workers"] for stream in self._streams]
        if before != now:
            epochs = [epoch for stream in self._streams for epoch, _ in stream["places"].values()]
            epoch = min(epochs, default=0)
            log.warning(
                "the stream was read by %s workers (one number per process) and is now read by %s: epoch %d starts "
                "again, so samples of it are repeated",
                before,
                now,
                epoch,
            )
            return {"places": {worker: (epoch, 0) for worker in range(workers)}}
        if self.batching is not None:
            log.info("the stream continues; samples that were waiting for a batch of their length may be repeated")
        self._places = dict(self._streams[self.trainer.global_rank]["places"])
        batches = self._first_batch // self.trainer.world_size
        return {"places": self._places, "first_worker": batches % workers}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy without blocking; Lightning copies anything but plain tensors with blocking."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise images that were loaded as bytes."""
        return replace(batch, inputs=self.transform.normalise_on_device(batch.inputs)) if self.on_device else batch

    def evaluation_batches(
        self, dataset: EvaluationDataset, *, masked: bool = False, shuffle: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """Unaugmented batches of `dataset`; broken samples are quarantined and left out.

        Args:
            dataset: one of the evaluation sets.
            masked: with the masks of epoch 0, the same every time.
            shuffle: draws the order of the batches; None = from short to long.

        Raises:
            DataError: too many samples are broken, or all.
        """
        usable = 0
        order = self._evaluation_order(dataset)
        if shuffle is not None:
            order = [order[place] for place in shuffle.permutation(len(order))]
        collate = self.collate if masked else self.collate.without_masks()
        loader = Loader(dataset, collate=collate, num_workers=self.num_workers, batch_sampler=order)
        for batch in loader:
            self.quarantine.add(batch.rejected, num_good=len(batch))
            usable += len(batch)
            if len(batch):
                yield batch
        if not usable:
            self.quarantine.stop("nothing usable was found")

    def _evaluation_order(self, dataset: EvaluationDataset) -> list[list[int]]:
        """Batches in file order or, where lengths differ, from short to long, to keep padding small."""
        count = max(self.batch_size or 0, EVALUATION_BATCH)
        lengths = dataset.lengths
        if self.batching is None or lengths is None:
            rows = range(len(dataset))
            return [list(rows[start : start + count]) for start in range(0, len(dataset), count)]
        batches: list[list[int]] = [[]]
        for row in np.argsort(lengths, kind="stable"):
            length = min(int(lengths[row]), self.batching.max_length)
            if len(batches[-1]) == count or (len(batches[-1]) + 1) * length > 2 * self.batching.budget:
                batches.append([])
            batches[-1].append(int(row))
        return [batch for batch in batches if batch]

    def training_subset(self, count: int) -> EvaluationDataset | None:
        """Up to `count` training samples without augmentation; None for a stream."""
        if isinstance(self.source, StreamingSource):
            return None
        return self._evaluation(self.source, _spread(self.indices, count))

    def _evaluation(self, source: Source, indices: np.ndarray) -> EvaluationDataset:
        # The data set is pickled for the loader processes: it must hold no bound method of this object.
        return EvaluationDataset(source=source, indices=indices, decode=self.decode, transform=self.transform.evaluate)


def _labelled(source: Source) -> np.ndarray:
    """Indices of the records that have a label."""
    return np.flatnonzero(source.labels() >= 0)


def _check_same_classes(source: Source | StreamingSource, test_source: Source) -> None:
    """The probes are fitted on `source` and tested on `test_source`: labels must mean the same."""
    if isinstance(source, StreamingSource):
        raise ConfigError("data.test_source: a stream cannot fit probes; set it to null, or read with data=hf")
    if source.labels() is None and test_source.labels() is None:  # used for the pretext task only
        return
    for name, data_source in (("source", source), ("test_source", test_source)):
        if data_source.labels() is None:
            raise ConfigError(f"data.{name} has no labels, and the probes need them; set data.test_source to null")
    if source.class_names != test_source.class_names:
        theirs, ours = source.class_names[:10], test_source.class_names[:10]
        raise ConfigError(f"data.source has the classes {theirs}, data.test_source {ours}; they must be the same")


def _check_lengths(source: Source, token_count: Callable[[int], int], batching: LengthBatching | None) -> None:
    """Every sample must give at least two tokens, one masked and one visible."""
    if source.lengths is None or not len(source.lengths):
        return
    shortest = int(source.lengths.min())
    shortest = shortest if batching is None else min(shortest, batching.max_length)
    if token_count(shortest) < 2:
        raise ConfigError(
            f"the shortest sample has a length of {shortest} and gives {token_count(shortest)} tokens, expected at "
            "least 2; raise the smallest accepted length of the modality, or change the encoder's strides"
        )


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the indices, a fixed random subset (files are often sorted by class)."""
    if len(indices) <= count:
        return indices
    return np.sort(generator(0, "order", len(indices)).permutation(indices)[:count])
