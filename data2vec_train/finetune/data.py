"""Labelled records as batches: which train, which test, and the loaders for both."""

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
    """A source whose classes are numbered as in another one."""

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
        """See `Source.labels`."""
        return self._labels

    def column(self, name: str) -> list[Any]:
        """See `Source.column`."""
        return self.source.column(name)

    def origins(self) -> np.ndarray:
        """See `Source.origins`."""
        return self.source.origins()


class FinetuneData(ResumableData):
    """Batches for fine-tuning, and examples that never train, to test on.

    Without a `test_source` a share of the records is held out, see `data.split`; records of one origin stay together.

    Args:
        task: makes examples of records; it studies the training records here.
        source: where labelled records come from.
        test_source: test records of another source; or None.
        held_out_fraction: share of `source` that is held out; ignored with a `test_source`. 0 = no test.
        train_samples: train on so many records only, about as many of each class, drawn by the seed; None = all.
        batching: how records of different lengths share batches; None where all are alike.
        batch_size_per_device: records per batch and process; with `batching` the most, None = as its budget allows.
        num_workers: loader processes, "auto" = one less than the cores at hand, between 1 and 8.
        prefetch_factor: batches that each of them keeps ready.
        max_bad_fraction: share of broken records above which the run stops.
        tolerated_bad_samples: so few broken records never stop it.
        quarantine_path: where broken records are listed.
        seed: of the run.
        changed_steps: see `ResumableData`.
        split: of the run that goes on, as its checkpoint has it; None = chosen now.

    Raises:
        DataError: records that cannot teach or test the head.
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
            log.info(
                "%d of %d records are left out: they do not say what is right", len(source) - len(rows), len(source)
            )
        left_out: list[tuple[str, str]] = []
        if source.lengths is not None and batching is not None and not task.may_crop:
            long = source.lengths[rows] > batching.max_length
            why = "longer than the longest that training takes (modality.max_seconds, modality.block_tokens)"
            left_out = [(source[int(row)].key, why) for row in rows[long][:100]]
            rows = rows[~long]
            if left_out:
                log.warning("%d records are left out, such as %s: %s", long.sum(), left_out[0][0], why)
        test_rows = None
        if test_source is None:
            # Of speakers a group may be all that there is: those held out may be strangers.
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
        sources = [one for one in (source, test_source) if one is not None]
        rejected = tuple(pair for one in sources for pair in one.rejected)
        self.quarantine = Quarantine(
            path=quarantine_path,
            num_samples=sum(one.num_documents for one in sources) + len(rejected),
            max_bad_fraction=max_bad_fraction,
            tolerated=tolerated_bad_samples,
        )
        self.quarantine.add(rejected, num_good=0)
        self.quarantine.write([*left_out, *(pair for one in sources for pair in one.left_out)])
        self._list_unusable(unusable)

    def _list_unusable(self, training: list[tuple[int, str]]) -> None:
        """Name the records that teach nothing, of the training and of the test.

        Raises:
            DataError: too many of the training's, or all.
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
                log.warning("%d test records have no part in the loss, such as %s: %s", len(pairs), *pairs[0])
                known = {key for key, _ in pairs} & self.quarantine.written  # training records of the same name
                names = ((f"{key} (test)" if key in known else key, why) for key, why in pairs)
                self.quarantine.write((key, f"a test record without a part in the loss: {why}") for key, why in names)

    def _check_classes(self, test_source: Source) -> None:
        """New classes in the test are an error; fewer of them are not."""
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
        """Take note of broken records while the batch is still on the host.

        Raises:
            DataError: too many are broken, or nothing in the batch could be used or replaced.
        """
        self.quarantine.add(batch.rejected, num_good=len(batch))
        if not len(batch):
            self.quarantine.stop("nothing usable was found in a whole batch")
        return batch

    def transfer_batch_to_device(self, batch: Examples, device: torch.device, dataloader_idx: int) -> Examples:
        """Lightning would wait for the copy of anything that is not a plain tensor."""
        return batch.to(device, non_blocking=True)

    def test_batches(self) -> Iterator[Examples]:
        """The test examples; broken ones are noted and left out.

        Raises:
            DataError: too many are broken, or all.
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
    """Batches in file order or, where lengths are known, from short to long.

    Args:
        dataset: the examples.
        task: makes batches of them.
        batching: how much a batch may hold; None = `EVALUATION_BATCH` examples.
        num_workers: loader processes.
        window: only so many neighbours are sorted, and no batch reaches beyond them; None = all.
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
    """`count` of the rows, about as many of each class, drawn by the seed; ascending."""
    shuffled = generator(seed, "order", len(rows)).permutation(rows)
    if labels is not None:
        seen: dict[int, int] = {}
        turn = []
        for row in shuffled:
            turn.append(seen.setdefault(int(labels[row]), 0))
            seen[int(labels[row])] += 1
        shuffled = shuffled[np.argsort(turn, kind="stable")]  # every class's first, then every class's second, ...
    return np.sort(shuffled[:count])
