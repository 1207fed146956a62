"""Settings and functions that all measurements of one command share."""

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
    """Dtypes of a measurement: weights are float32, products have `precision`; picklable, for use in a new process."""

    device: str
    precision: str  # `precision.trainer` with "auto" resolved

    def __post_init__(self) -> None:
        if self.precision not in AUTOCAST:
            raise ConfigError(f"precision.trainer={self.precision}: expected one of {', '.join(AUTOCAST)}")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return AUTOCAST[self.precision] or torch.float32

    def autocast(self) -> AbstractContextManager:
        """The context for a forward pass; also sets how float32 is multiplied, which the backward pass keeps."""
        tf32 = self.precision == "32-tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        low = AUTOCAST[self.precision]
        return nullcontext() if low is None else torch.autocast(torch.device(self.device).type, dtype=low)


@dataclass
class Bench:
    """How to measure, on which device, and compared with which programs.

    Attributes:
        arithmetic: device and dtypes.
        effort: see `timing.Effort`.
        peers: installed programs to compare with.
        measures_memory: whether to start a process for each arm to measure its memory.
        threads: number of torch threads.
        tolerance: largest difference that counts as equal: absolute for outputs, a fraction for gradients.
    """

    arithmetic: Arithmetic
    effort: Effort
    peers: list[str]
    measures_memory: bool
    threads: int
    tolerance: float

    @property
    def device(self) -> torch.device:
        """The device of all measurements."""
        return torch.device(self.arithmetic.device)

    def memory_of(self, arm: Arm, make: Callable[[], Callable[[], object]]) -> None:
        """Measure the peak memory of an arm if `measures_memory`."""
        if self.measures_memory:
            arm.idle_bytes, arm.peak_bytes = peak_memory(make, device=self.device, threads=self.threads, calls=2)
            arm.memory_kind = KIND[self.device.type]

    def build(self, arm: Arm, make: Callable[[], T]) -> T:
        """Build an arm and measure its peak memory if `measures_memory`; on a GPU, in the first calls of this arm."""
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
