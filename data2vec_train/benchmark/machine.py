"""A description of the machine, and its speed of matrix products."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from data2vec_train.benchmark.timing import timed


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about the machine that affects the measurements."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": load_average(),
    }
    if device.type == "cuda":
        facts["device_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda
    return facts


def load_average() -> list[float] | None:
    """Average number of runnable processes over the last 1, 5 and 15 minutes, including these measurements."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def matmul_rates(*, side: int, repeats: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Floating-point operations per second of square matrix products of this size, one number for each repeat."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return [2 * side**3 / timed(lambda: torch.mm(a, b), calls=1, device=device)[0] for _ in range(repeats)]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
