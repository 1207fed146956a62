"""One DataModule for all modalities: which records train, which feed the probes, and the loaders for both."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data2vec_train.data.collate import Collator
from data2vec_train.data.dataset import EvaluationDataset, StreamingDataset, TrainingDataset
from data2vec_train.data.quarantine import Quarantine
from data2vec_train.data.sampler import EndlessBatchSampler
from data2vec_train.data.seeding import generator
from data2vec_train.data.sources import Source, StreamingSource
from data2vec_train.encoders.base import Batch
from data2vec_train.errors import ConfigError, DataError
from data2vec_train.masking import Masker


class TimedLoader:
    """A loader that adds up the seconds its consumer spent waiting for it."""

    def __init__(self, loader: DataLoader) -> None:
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
            self.waited_seconds += time.perf_counter() - start
            yield batch


class DataModule(L.LightningDataModule):
    """Batches for pretraining, and labelled images for the probes.

    Labels never reach the objective. Where the source has labels and there is no `probe_source`, a stratified share of
    it is held out from training and serves as test set; the probes are fitted on samples that train the encoder too.

    Args:
        source: where training samples come from.
        probe_source: labelled test samples of another source, or None.
        held_out_fraction: share of a labelled source that is kept out of training; ignored with a `probe_source`.
        max_probe_samples: at most so many samples to fit the probes on, and to test them on.
        decode: encoded value -> decoded.
        transform: has `train` and `evaluate`, decoded -> tensor.
        masker: draws the masks.
        views: masks per sample.
        grid: token grid of the encoder.
        batch_size_per_device: samples per batch and process.
        num_workers: loader processes, "auto" = one less than the cores at hand, between 1 and 8.
        max_bad_fraction: share of broken samples that stops the run.
        quarantine_path: where broken samples are listed.
        seed: of the run.

    Raises:
        ConfigError: settings that do not fit the data.
    """

    def __init__(
        self,
        *,
        source: Source | StreamingSource,
        probe_source: Source | None,
        held_out_fraction: float,
        max_probe_samples: int,
        decode: Callable[[Any], Any],
        transform: Any,
        masker: Masker,
        views: int,
        grid: tuple[int, int],
        batch_size_per_device: int,
        num_workers: int | Literal["auto"],
        max_bad_fraction: float,
        quarantine_path: Path,
        seed: int,
    ) -> None:
        super().__init__()
        if not 0 <= held_out_fraction < 1:
            raise ConfigError(f"data.held_out_fraction must lie in [0, 1), got {held_out_fraction}")
        self.source = source
        self.decode = decode
        self.transform = transform
        self.seed = seed
        self.batch_size = batch_size_per_device
        self.num_workers = _available_workers() if num_workers == "auto" else num_workers
        self.collate = Collator(masker=masker, views=views, grid=grid, seed=seed)
        self.collate_plain = Collator(masker=None, views=views, grid=grid, seed=seed)
        self.loader: TimedLoader | None = None

        streaming = isinstance(source, StreamingSource)
        self.indices = np.arange(0 if streaming else len(source))
        self.fit_set, self.test_set = None, None
        self.probe_note = "no labels: probes off, RankMe on"
        if streaming:
            self.probe_note = "a stream: probes and RankMe off"
        labels = None if streaming else source.labels()
        if probe_source is not None:
            _check_same_classes(source, probe_source)
        if labels is not None:
            held_out = np.empty(0, dtype=np.int64)
            if probe_source is None:
                held_out = _stratified(labels, held_out_fraction)
                self.indices = np.setdiff1d(self.indices, held_out)
            test = _labelled(probe_source) if probe_source else held_out
            self.probe_note = "too few samples of each class to hold any out: probes off, RankMe on"
            if len(test):
                self.probe_note = f"probes on {min(len(test), max_probe_samples)} held-out samples"
                fit = np.intersect1d(self.indices, _labelled(source))
                self.fit_set = self._evaluation(source, _spread(fit, max_probe_samples))
                self.test_set = self._evaluation(probe_source or source, _spread(test, max_probe_samples))
        if not streaming and not len(self.indices):
            raise DataError("no samples are left to train on")
        self.num_samples = None if streaming else len(self.indices)
        read = None if streaming else len(source) + (len(probe_source) if probe_source else 0)
        self.quarantine = Quarantine(path=quarantine_path, num_samples=read, max_bad_fraction=max_bad_fraction)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that the probes tell apart; None without labels."""
        return self.source.class_names if self.test_set is not None else None

    def train_dataloader(self) -> TimedLoader:
        """An endless loader of masked batches."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        common: dict[str, Any] = {
            "decode": self.decode,
            "transform": self.transform.train,
            "seed": self.seed,
        }
        if isinstance(self.source, StreamingSource):
            dataset = StreamingDataset(source=self.source, rank=rank, world_size=world_size, **common)
            batching: dict[str, Any] = {"batch_size": self.batch_size}
        else:
            dataset = TrainingDataset(source=self.source, indices=self.indices, **common)
            sampler = EndlessBatchSampler(
                num_samples=len(dataset),
                batch_size=self.batch_size,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
            )
            batching = {"batch_sampler": sampler}
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = DataLoader(
            dataset,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=on_gpu,
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=_ignore_interrupts,
            **batching,
        )
        self.loader = TimedLoader(loader)
        return self.loader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take note of broken samples while the batch is still on the host.

        Raises:
            DataError: too many are broken, or nothing in the batch could be used or replaced.
        """
        self.quarantine.add(batch.rejected, num_good=len(batch))
        if not len(batch):
            self.quarantine.stop("nothing usable was found in a whole batch")
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning would wait for the copy of anything that is not a plain tensor."""
        return batch.to(device, non_blocking=True)

    def evaluation_batches(self, dataset: EvaluationDataset) -> Iterator[Batch]:
        """Unmasked, unaugmented batches of `dataset`, in order; broken samples are noted and left out.

        Raises:
            DataError: too many are broken, or all.
        """
        usable = 0
        loader = DataLoader(
            dataset,
            batch_size=max(self.batch_size, 64),
            collate_fn=self.collate_plain,
            num_workers=self.num_workers,
        )
        for batch in loader:
            self.quarantine.add(batch.rejected, num_good=len(batch))
            usable += len(batch)
            if len(batch):
                yield batch
        if not usable:
            self.quarantine.stop("nothing usable was found")

    def training_subset(self, count: int) -> EvaluationDataset | None:
        """Up to `count` training samples without augmentation; None for a stream."""
        if isinstance(self.source, StreamingSource):
            return None
        return self._evaluation(self.source, _spread(self.indices, count))

    def _evaluation(self, source: Source, indices: np.ndarray) -> EvaluationDataset:
        return EvaluationDataset(source=source, indices=indices, decode=self.decode, transform=self._evaluate)

    def _evaluate(self, decoded: Any) -> Tensor:
        return self.transform.evaluate(decoded)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _available_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


def _labelled(source: Source) -> np.ndarray:
    """Indices of the records that have a label."""
    return np.flatnonzero(source.labels() >= 0)


def _check_same_classes(source: Source | StreamingSource, probe_source: Source) -> None:
    """The probes are fitted on the one and tested on the other: labels must mean the same."""
    if isinstance(source, StreamingSource):
        raise ConfigError("data.probe_source: a stream cannot fit probes; set it to null, or read with data=hf")
    for name, one in (("source", source), ("probe_source", probe_source)):
        if one.labels() is None:
            raise ConfigError(f"data.{name} has no labels, and the probes need them; set data.probe_source to null")
    if source.class_names != probe_source.class_names:
        theirs, ours = source.class_names[:10], probe_source.class_names[:10]
        raise ConfigError(f"data.source has the classes {theirs}, data.probe_source {ours}; they must be the same")


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """About the same share of every class, `fraction` of all, chosen once and for all whatever the seed of a run.

    Where a class's share is no whole number, classes take turns by the largest remainder; none is held out entirely.
    """
    classes = np.unique(labels[labels >= 0])
    members = [np.flatnonzero(labels == label) for label in classes]
    wanted = np.array([fraction * len(rows) for rows in members])
    counts = np.floor(wanted).astype(int)
    by_remainder = np.argsort(counts - wanted, kind="stable")
    counts[by_remainder[: round(wanted.sum()) - counts.sum()]] += 1
    chosen = [np.empty(0, dtype=np.int64)]
    for label, rows, count in zip(classes, members, counts, strict=True):
        chosen.append(generator(0, "order", int(label)).permutation(rows)[: min(count, len(rows) - 1)])
    return np.sort(np.concatenate(chosen))


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the indices, a fixed random choice (files are often sorted by class)."""
    if len(indices) <= count:
        return indices
    return np.sort(generator(0, "order", len(indices)).permutation(indices)[:count])
