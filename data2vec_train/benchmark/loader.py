"""Samples per second of the loader by number of workers, and the time of a sample by part."""

import itertools
import time
from collections.abc import Callable, Iterator

from data2vec_train.benchmark.context import Bench
from data2vec_train.benchmark.measurements import Arm, Case
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import Sample, TrainingDataset
from data2vec_train.data.sources.files import BadSample


def measure_loader(
    bench: Bench, *, name: str, make: Callable[[int], DataModule], workers: list[int], batches: int, samples: int
) -> Iterator[Case]:
    """One case for the numbers of workers, and one for the parts of a sample.

    Args:
        bench: how to measure.
        name: name of the data.
        make: number of workers -> the data.
        workers: numbers of workers; the first one is the reference.
        batches: batches per measurement, after the same number of warm-up batches.
        samples: number of samples that the parts are measured on.
    """
    names = {count: f"{count} workers" for count in workers}
    case = Case("loader", f"{name}, batches with masks", names[workers[0]], [Arm(label) for label in names.values()])
    modules = {count: make(count) for count in workers}
    for _ in range(bench.effort.rounds):
        for count, module in modules.items():
            arm = case.arm(names[count])
            arm.items["samples"] = _time_batches(module, arm, batches)
    case.notes.append("one call is a batch; CPU seconds are of the training process, without its workers")
    yield case
    dataset = modules[workers[0]].train_dataloader().loader.dataset
    if isinstance(dataset, TrainingDataset):
        yield _parts(bench, f"{name}, parts of a sample", modules[workers[0]], dataset, samples)


def _time_batches(module: DataModule, arm: Arm, batches: int) -> float:
    """Add a measurement to the arm; returns samples per batch."""
    iterator = iter(module.train_dataloader())
    for _ in range(batches):  # wait until the workers have started and filled their queues
        next(iterator)
    wall, cpu, seen = time.perf_counter(), time.process_time(), 0
    for batch in itertools.islice(iterator, batches):
        seen += len(batch)
    arm.seconds.append((time.perf_counter() - wall) / batches)
    arm.cpu_seconds.append((time.process_time() - cpu) / batches)
    arm.calls = batches
    iterator.close()
    return seen / batches


def _parts(bench: Bench, name: str, module: DataModule, dataset: TrainingDataset, count: int) -> Case:
    raw = [dataset.source[int(index)] for index in dataset.indices[:count]]
    pairs = [(number, record, _or_nothing(dataset.decode, record.value)) for number, record in enumerate(raw)]
    usable = [(number, record, decoded) for number, record, decoded in pairs if decoded is not None]
    samples = [Sample(dataset.transform(decoded), 0, number, record.label, ()) for number, record, decoded in usable]
    numbers = [int(index) for index in dataset.indices[: len(raw)]]
    runs = {
        "read": lambda: [dataset.source[index] for index in numbers],
        "decode": lambda: [_or_nothing(dataset.decode, record.value) for record in raw],
        "transform": lambda: [dataset.transform(decoded) for _, _, decoded in usable],
        "collate": lambda: module.collate.without_masks()(samples),
        "collate and mask": lambda: module.collate(samples),
    }
    case = Case("loader", name, None, [Arm(part, items={"samples": len(samples)}) for part in runs])
    case.notes.append(f"one call is {len(samples)} samples, in one process")
    return bench.time(case, runs)


def _or_nothing(decode: Callable[[object], object], value: object) -> object | None:
    """The decoded value; None for a broken sample, which training would quarantine."""
    try:
        return decode(value)
    except BadSample:
        return None
