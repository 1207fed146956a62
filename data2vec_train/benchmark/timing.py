"""Measures arms in turn, so that other load on the machine affects all of them equally."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data2vec_train.benchmark.measurements import Arm


@dataclass(frozen=True)
class Effort:
    """Length of a measurement.

    Attributes:
        rounds: number of measurements of every arm.
        warmups: calls of each arm before that.
        min_seconds: a measurement is the mean of as many calls as take this long.
    """

    rounds: int
    warmups: int
    min_seconds: float


def interleave(runs: dict[str, Callable[[], object]], *, effort: Effort, device: torch.device, arms: list[Arm]) -> None:
    """Measure `runs` in the order a b c, a b c, ... and add the times to the arms of the same names."""
    named = {arm.name: arm for arm in arms}
    for name, run in runs.items():
        for _ in range(effort.warmups):
            run()
        once, _ = timed(run, calls=1, device=device)
        named[name].calls = max(1, math.ceil(effort.min_seconds / once)) if once < effort.min_seconds else 1
    was_collecting = gc.isenabled()
    try:
        for _ in range(effort.rounds):
            for name, run in runs.items():
                gc.collect()
                gc.disable()
                wall, cpu = timed(run, calls=named[name].calls, device=device)
                named[name].seconds.append(wall)
                named[name].cpu_seconds.append(cpu)
    finally:
        if was_collecting:
            gc.enable()


def timed(run: Callable[[], object], *, calls: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of one call, as means over `calls`; on a GPU the time between two CUDA events."""
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    before.record()
    for _ in range(calls):
        run()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000 / calls, (time.process_time() - cpu) / calls
