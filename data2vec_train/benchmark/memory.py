"""Peak memory of one arm: on a GPU from the allocator, on a CPU that of a separate process that runs only the arm."""

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

KIND = {"cpu": "resident memory of a separate process", "cuda": "memory allocated on the GPU"}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(
    make: Callable[[], Callable[[], object]], *, device: torch.device, threads: int, calls: int
) -> tuple[int, int]:
    """Bytes that an arm holds before its first call and at its peak; on a CPU with interpreter and libraries.

    Args:
        make: builds the arm; memory used only while building is not counted if the system can reset the peak. For a CPU
            a module-level function, or a partial of one, because it runs in another process.
        device: device of the arm.
        threads: number of torch threads.
        calls: number of calls of the arm.

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
    """Reset the peak memory of this process, which only Linux supports."""
    if _RESET.exists():
        _RESET.write_text("5")


def _peak() -> int:
    if _STATUS.exists():
        # Not `ru_maxrss`, which a process inherits from its parent.
        [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
