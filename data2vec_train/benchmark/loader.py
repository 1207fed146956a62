"""Samples per second of the loader, by number of workers, and what a sample costs by part."""

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
    """A case for the numbers of workers, and one for the parts.

    Args:
        bench: how to measure.
        name: of the data.
        make: number of workers -> the data.
        workers: their numbers; the first one is the reference.
        batches: in a measurement, after as many that are not counted.
        samples: that the parts are measured on.
    """
    names = {count: f"{count} workers" for count in workers}
    case = Case("loader", f"{name}, batches with masks", names[workers[0]], [Arm(one) for one in names.values()])
    modules = {count: make(count) for count in workers}
    for _ in range(bench.effort.rounds):
        for count, module in modules.items():
            arm = case.arm(names[count])
            arm.items["samples"] = _time_batches(module, arm, batches)
    case.notes.append("one call is a batch; CPU seconds are those of the process that trains, not of its workers")
    yield case
    dataset = modules[workers[0]].train_dataloader().loader.dataset
    if isinstance(dataset, TrainingDataset):
        yield _parts(bench, f"{name}, parts of a sample", modules[workers[0]], dataset, samples)


def _time_batches(module: DataModule, arm: Arm, batches: int) -> float:
    """Adds a measurement to the arm; returns samples per batch."""
    iterator = iter(module.train_dataloader())
    for _ in range(batches):  # until the workers are there and have filled their queues
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
    pairs = [(number, one, _or_nothing(dataset.decode, one.value)) for number, one in enumerate(raw)]
    usable = [(number, one, decoded) for number, one, decoded in pairs if decoded is not None]
    samples = [Sample(dataset.transform(decoded), 0, number, one.label, ()) for number, one, decoded in usable]
    numbers = [int(index) for index in dataset.indices[: len(raw)]]
    runs = {
        "read": lambda: [dataset.source[index] for index in numbers],
        "decode": lambda: [_or_nothing(dataset.decode, one.value) for one in raw],
        "transform": lambda: [dataset.transform(decoded) for _, _, decoded in usable],
        "collate": lambda: module.collate.without_masks()(samples),
        "collate and mask": lambda: module.collate(samples),
    }
    case = Case("loader", name, None, [Arm(one, items={"samples": len(samples)}) for one in runs])
    case.notes.append(f"one call is {len(samples)} samples, in one process")
    return bench.time(case, runs)


def _or_nothing(decode: Callable[[object], object], value: object) -> object | None:
    """A broken sample is quarantined in training; here it is passed over."""
    try:
        return decode(value)
    except BadSample:
        return None
