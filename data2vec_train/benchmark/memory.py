"""Peak memory of one arm: on a GPU its allocator's, on a CPU that of a process in which nothing else happens."""

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

KIND = {"cpu": "resident memory of a process of its own", "cuda": "memory allocated on the GPU"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(
    make: Callable[[], Callable[[], object]], *, device: torch.device, threads: int, calls: int
) -> tuple[int, int]:
    """Bytes that an arm holds before it works and at most, on a CPU with its interpreter and libraries.

    Args:
        make: builds the arm; what it needs while it builds is not counted where the system can forget it. For a CPU a
            function of a module, or a partial of one, since it runs in another process.
        device: that the arm runs on.
        threads: of torch.
        calls: of the arm.

    Raises:
        RuntimeError: the other process failed.
    """
    if device.type == "cuda":
        return _on_gpu(make, device, calls)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, make, threads, calls))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = "it ended without an answer"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"the process that measures memory failed with status {process.exitcode}: {answer}")
    return answer


def _on_gpu(make: Callable[[], Callable[[], object]], device: torch.device, calls: int) -> tuple[int, int]:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    run = make()
    held = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(calls):
        run()
    torch.cuda.synchronize(device)
    return held, torch.cuda.max_memory_allocated(device) - before


def _measure(answer: Connection, make: Callable[[], Callable[[], object]], threads: int, calls: int) -> None:
    try:
        torch.set_num_threads(threads)
        run = make()
        gc.collect()
        _forget_peak()
        held = _peak()
        for _ in range(calls):
            run()
        answer.send((held, _peak()))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
        raise


def _forget_peak() -> None:
    """Linux lets a process start its peak anew; elsewhere it stays what it was."""
    if _RESET.exists():
        _RESET.write_text("5")


def _peak() -> int:
    if _STATUS.exists():
        # Not `ru_maxrss`, which a process inherits from the one that started it.
        [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
