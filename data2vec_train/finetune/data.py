"""Labelled records as batches: the split into training and test records, and the loaders of both."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data2vec_train.data.datamodule import (
    ResumableData,
    TimedLoader,
)
from data2vec_train.data.dataset import EvaluationDataset, Sample, TrainingDataset
from data2vec_train.data.loading import Loader, available_workers
from data2vec_train.data.quarantine import Quarantine
from data2vec_train.data.sampler import EndlessBatchSampler, LengthBatching, LengthBatchSampler
from data2vec_train.data.seeding import generator, torch_seeded
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.errors import BadSample, DataError
from data2vec_train.finetune.base import NOTHING_KNOWN, Collate, Examples, HeadTask

log = logging.getLogger(__name__)

EVALUATION_BATCH = 32


class ExampleTrainingDataset(TrainingDataset):
    """Training examples of a task; the same key gives the same example, bit for bit, in any process."""

    def __init__(self, *, task: HeadTask, source: Source, indices: np.ndarray, seed: int) -> None:
        super().__init__(source=source, indices=indices, decode=None, transform=None, seed=seed)
        self.task = task

    def _try(self, record_id: int, epoch: int, length: int | None) -> Sample | tuple[str, str]:
        return _example(self.task, self.source, record_id, epoch, seed=self.seed, train=True)


class ExampleTestDataset(EvaluationDataset):
    """Examples of a task without augmentation, in order."""

    def __init__(self, *, task: HeadTask, source: Source, indices: np.ndarray) -> None:
        super().__init__(source=source, indices=indices, decode=None, transform=None)
        self.task = task

    def __getitem__(self, index: int) -> Sample:
        record_id = int(self.indices[index])
        found = _example(self.task, self.source, record_id, 0, seed=0, train=False)
        return found if isinstance(found, Sample) else Sample(None, 0, record_id, None, (found,))


def _example(
    task: HeadTask, source: Source, record_id: int, epoch: int, *, seed: int, train: bool
) -> Sample | tuple[str, str]:
    key = f"#{record_id}"
    try:
        raw = source[record_id]
        key = raw.key
        with torch_seeded(seed, "augment", epoch, record_id):
            example = task.example(raw, train=train, rng=generator(seed, "augment", epoch, record_id))
        return Sample(example, epoch, record_id, raw.label, ())
    except BadSample as error:
        return key, str(error)


class Relabelled(Source):
    """A source whose classes get the numbers of another source."""

    def __init__(self, source: Source, class_names: list[str]) -> None:
        number = {name: index for index, name in enumerate(class_names)}
        self.source = source
        self.class_names = class_names
        self.lengths, self.rejected, self.left_out = source.lengths, source.rejected, source.left_out
        self._labels = np.array([number[name] for name in source.class_names] + [-1])[source.labels()]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> RawSample:
        raw, label = self.source[index], int(self._labels[index])
        return RawSample(raw.key, raw.value, None if label < 0 else label, raw.fields)

    def labels(self) -> np.ndarray:
        """Class numbers, (n,) int64, in the other source's numbering; -1 = no class."""
        return self._labels

    def column(self, name: str) -> list[Any]:
        """The column of the source, unchanged."""
        return self.source.column(name)

    def origins(self) -> np.ndarray:
        """The origins of the source, unchanged."""
        return self.source.origins()


class FinetuneData(ResumableData):
    """Batches for fine-tuning, and examples to test on, which are not used in training.

    Without a `test_source`, a fraction of the records is held out, see `data.split`; records of one origin stay
    together.

    Args:
        task: makes examples from records; its `setup` reads the training records here.
        source: the labelled records.
        test_source: test records of another source; or None.
        held_out_fraction: fraction of `source` that is held out; ignored with a `test_source`. 0 = no test.
        train_samples: train on this many records only, about equally many of each class, drawn by the seed; None = all.
        batching: how records of different lengths share batches; None if all have one length.
        batch_size_per_device: records per batch and process; an upper limit with `batching`, None = its budget alone.
        num_workers: loader processes; "auto" = one less than the available cores, between 1 and 8.
        prefetch_factor: batches that each loader process prepares ahead.
        max_bad_fraction: fraction of broken records above which the run stops.
        tolerated_bad_samples: up to this many broken records never stop the run.
        quarantine_path: where broken records are listed.
        seed: the seed of the run.
        changed_steps: see `ResumableData`.
        split: the split of the run that is resumed, from its checkpoint; None = a new split.

    Raises:
        DataError: the records cannot train or test the head.
    """

    def __init__(
        self,
        *,
        task: HeadTask,
        source: Source,
        test_source: Source | None,
        held_out_fraction: float,
        train_samples: int | None,
        batching: LengthBatching | None,
        batch_size_per_device: int | None,
        num_workers: int | Literal["auto"],
        prefetch_factor: int,
        max_bad_fraction: float,
        tolerated_bad_samples: int,
        quarantine_path: Path,
        seed: int,
        changed_steps: bool = False,
        split: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(changed_steps=changed_steps)
        self.task = task
        self.source = source
        self.batching = batching
        self.batch_size = batch_size_per_device
        self.num_workers = available_workers() if num_workers == "auto" else num_workers
        self.prefetch_factor = prefetch_factor
        self.seed = seed

        rows = task.usable(source)
        if len(rows) < len(source):
            log.info("%d of %d records are left out: they have no labels", len(source) - len(rows), len(source))
        left_out: list[tuple[str, str]] = []
        if source.lengths is not None and batching is not None and not task.may_crop:
            long = source.lengths[rows] > batching.max_length
            why = "longer than the limit in training (modality.max_seconds, modality.block_tokens)"
            left_out = [(source[int(row)].key, why) for row in rows[long][:100]]
            rows = rows[~long]
            if left_out:
                log.warning("%d records are left out, such as %s: %s", long.sum(), left_out[0][0], why)
        test_rows = None
        if test_source is None:
            # With speakers, a group may hold all records of a class: held-out speakers may be new.
            by_class = task.needs_classes and (task.same_classes or source.grouped is None)
            labels = source.labels()[rows] if by_class and source.labels() is not None else None
            test_rows = rows[self._held_out(source.origins()[rows], labels, held_out_fraction, split)]
            rows = np.setdiff1d(rows, test_rows)
            if len(test_rows):
                task.check_held_out(source, test_rows)
        if train_samples is not None:
            rows = few_of(source.labels() if task.needs_classes else None, rows, train_samples, seed=seed)
        if not len(rows):
            raise DataError("no records are left to train on")
        task.setup(source, rows)
        if test_source is not None:
            self._check_classes(test_source)
            if task.needs_classes and test_source.class_names != source.class_names and task.same_classes:
                test_source = Relabelled(test_source, task.class_names)
            test_rows = task.usable(test_source)
            if not len(test_rows):
                raise DataError(NOTHING_KNOWN)
        unusable = task.unusable(source, rows)
        rows = np.setdiff1d(rows, [row for row, _ in unusable])
        self.rows = rows
        self.num_samples = len(rows)
        self.test_set = None
        if len(test_rows):
            self.test_set = ExampleTestDataset(task=task, source=test_source or source, indices=test_rows)
        sources = [records for records in (source, test_source) if records is not None]
        rejected = tuple(pair for records in sources for pair in records.rejected)
        self.quarantine = Quarantine(
            path=quarantine_path,
            num_samples=sum(records.num_documents for records in sources) + len(rejected),
            max_bad_fraction=max_bad_fraction,
            tolerated=tolerated_bad_samples,
        )
        self.quarantine.add(rejected, num_good=0)
        self.quarantine.write([*left_out, *(pair for records in sources for pair in records.left_out)])
        self._list_unusable(unusable)

    def _list_unusable(self, training: list[tuple[int, str]]) -> None:
        """List the training and test records whose labels cannot be used.

        Raises:
            DataError: too many of the training records, or all.
        """
        if training:
            pairs = tuple((self.source[row].key, why) for row, why in training)
            total = len(pairs) + len(self.rows)
            log.warning("%d of %d training records are left out, such as %s: %s", len(pairs), total, *pairs[0])
            self.quarantine.add(pairs, num_good=0)
            if not len(self.rows):
                self.quarantine.stop("nothing is left to train on")
        if self.test_set is not None:
            tested = self.test_set.source
            pairs = [(tested[row].key, why) for row, why in self.task.unusable(tested, self.test_set.indices)]
            if pairs:
                log.warning("%d test records do not count in the loss, such as %s: %s", len(pairs), *pairs[0])
                known = {key for key, _ in pairs} & self.quarantine.written  # training records of the same name
                names = ((f"{key} (test)" if key in known else key, why) for key, why in pairs)
                self.quarantine.write(
                    (key, f"a test record that does not count in the loss: {why}") for key, why in names
                )

    def _check_classes(self, test_source: Source) -> None:
        """Refuse test records with new classes; some classes may be missing."""
        names = test_source.class_names
        if self.task.needs_classes and self.task.same_classes and names and set(names) <= set(self.task.class_names):
            return
        self.task.check_test(test_source)

    def train_dataloader(self) -> TimedLoader:
        """An endless loader of training batches."""
        dataset = ExampleTrainingDataset(task=self.task, source=self.source, indices=self.rows, seed=self.seed)
        order = {"seed": self.seed, **self.place()}
        if self.batching is None or self.source.lengths is None:
            size = min(self.batch_size, len(dataset))
            sampler = EndlessBatchSampler(num_samples=len(dataset), batch_size=size, **order)
        else:
            lengths = np.minimum(self.source.lengths[self.rows], self.batching.max_length)
            sampler = LengthBatchSampler(lengths=lengths, batching=self.batching, batch_size=self.batch_size, **order)
        collate = Collate(self.task, train=True, seed=self.seed)
        self.loader = TimedLoader(Loader(dataset, collate=collate, batch_sampler=sampler, **self.loading()))
        return self.loader

    def on_before_batch_transfer(self, batch: Examples, dataloader_idx: int) -> Examples:
        """Count broken records while the batch is still on the host.

        Raises:
            DataError: too many records are broken, or no record of the batch could be used or replaced.
        """
        self.quarantine.add(batch.rejected, num_good=len(batch))
        if not len(batch):
            self.quarantine.stop("nothing usable was found in a whole batch")
        return batch

    def transfer_batch_to_device(self, batch: Examples, device: torch.device, dataloader_idx: int) -> Examples:
        """Copy the batch asynchronously; Lightning would wait for the copy of anything but a plain tensor."""
        return batch.to(device, non_blocking=True)

    def test_batches(self) -> Iterator[Examples]:
        """Batches of test examples; broken records are counted and left out.

        Raises:
            DataError: too many records are broken, or all.
        """
        usable = 0
        for batch in test_loader(self.test_set, self.task, self.batching, self.num_workers, window=None):
            self.quarantine.add(batch.rejected, num_good=len(batch))
            usable += len(batch)
            if len(batch):
                yield batch
        if not usable:
            self.quarantine.stop("nothing usable was found among the test records")


def test_loader(
    dataset: ExampleTestDataset,
    task: HeadTask,
    batching: LengthBatching | None,
    num_workers: int,
    window: int | None,
) -> Loader:
    """Batches in file order or, if lengths are known, from short to long.

    Args:
        dataset: the examples.
        task: makes batches of them.
        batching: limits the size of a batch; None = `EVALUATION_BATCH` examples.
        num_workers: loader processes.
        window: examples are sorted and batched within windows of this many; None = all together.
    """
    window = window or len(dataset)
    lengths = np.zeros(len(dataset)) if dataset.lengths is None else dataset.lengths
    budget = None if batching is None else 2 * batching.budget
    batches: list[list[int]] = [[]]
    for row in np.lexsort((lengths, np.arange(len(dataset)) // window)):
        last = batches[-1]
        is_full = len(last) == EVALUATION_BATCH or (budget and (len(last) + 1) * int(lengths[row]) > budget)
        if is_full or (last and last[0] // window != row // window):
            batches.append([])
        batches[-1].append(int(row))
    return Loader(
        dataset,
        collate=Collate(task, train=False, seed=0),
        num_workers=num_workers,
        batch_sampler=[batch for batch in batches if batch],
    )


def few_of(labels: np.ndarray | None, rows: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """`count` of the rows, drawn by the seed, about equally many of each class; ascending."""
    shuffled = generator(seed, "order", len(rows)).permutation(rows)
    if labels is not None:
        seen: dict[int, int] = {}
        turn = []
        for row in shuffled:
            turn.append(seen.setdefault(int(labels[row]), 0))
            seen[int(labels[row])] += 1
        shuffled = shuffled[
            np.argsort(turn, kind="stable")
        ]  # the first record of every class, then the second of every class, ...
    return np.sort(shuffled[:count])
