"""What all measurements of one command share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from data2vec_train.benchmark.measurements import Arm, Case
from data2vec_train.benchmark.memory import KIND, peak_memory
from data2vec_train.benchmark.timing import Effort, interleave
from data2vec_train.errors import ConfigError

T = TypeVar("T", bound=Callable[[], object])
AUTOCAST = {"32-true": None, "32-tf32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """Types of numbers: weights are float32, products what `precision` says; picklable, for a process of its own."""

    device: str
    precision: str  # what `precision.trainer` becomes here

    def __post_init__(self) -> None:
        if self.precision not in AUTOCAST:
            raise ConfigError(f"precision.trainer={self.precision}: expected one of {', '.join(AUTOCAST)}")

    @property
    def dtype(self) -> torch.dtype:
        """That matrices are multiplied in."""
        return AUTOCAST[self.precision] or torch.float32

    def autocast(self) -> AbstractContextManager:
        """The context for a forward pass; how float32 is multiplied stays set for the backward pass."""
        tf32 = self.precision == "32-tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        low = AUTOCAST[self.precision]
        return nullcontext() if low is None else torch.autocast(torch.device(self.device).type, dtype=low)


@dataclass
class Bench:
    """How, on what and against whom to measure.

    Attributes:
        arithmetic: device and types.
        effort: see `timing.Effort`.
        peers: that are installed and asked for.
        measures_memory: also start a process for each arm.
        threads: of torch.
        tolerance: largest difference of outputs, and of gradients as a share, that still counts as the same.
    """

    arithmetic: Arithmetic
    effort: Effort
    peers: list[str]
    measures_memory: bool
    threads: int
    tolerance: float

    @property
    def device(self) -> torch.device:
        """That everything runs on."""
        return torch.device(self.arithmetic.device)

    def memory_of(self, arm: Arm, make: Callable[[], Callable[[], object]]) -> None:
        """Fill in the peak memory of an arm, if that was asked for."""
        if self.measures_memory:
            arm.idle_bytes, arm.peak_bytes = peak_memory(make, device=self.device, threads=self.threads, calls=2)
            arm.memory_kind = KIND[self.device.type]

    def build(self, arm: Arm, make: Callable[[], T]) -> T:
        """An arm, with its peak memory if that was asked for: on a GPU of this very one, in its first calls."""
        if self.device.type != "cuda":
            self.memory_of(arm, make)
            return make()
        built: list[T] = []

        def keep() -> T:
            built.append(make())
            return built[0]

        self.memory_of(arm, keep)
        return built[0] if built else make()

    def time(self, case: Case, runs: dict[str, Callable[[], object]]) -> Case:
        """Measure the runs of a case in turn."""
        interleave(runs, effort=self.effort, device=self.device, arms=case.arms)
        return case
