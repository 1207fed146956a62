"""`python -m tests.distributed.endings FOLDER CASE ...`: ends runs in many ways, and says in JSON what came of it.

One program that imports everything and then forks: starting Python for each run takes longer than the runs.
"""

import ctypes
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from data2vec_train import checkpoints
from tests.stress import tiny

CHECKOUT = Path(__file__).parents[2]
WORKERS = ["data.num_workers=2", "callbacks.probe.rank_samples=8"]
LONG = ["trainer.max_steps=2000", "callbacks.checkpoint.every_n_steps=5", "stop_seconds=3"]


def small_shared_memory(size: str) -> Callable[[], None]:
    """In a name space of its own, /dev/shm is that small."""

    def mount() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x00020000):  # CLONE_NEWNS
            os._exit(99)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)

    return mount


def open_files(count: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def started_by(method: str) -> Callable[[], None]:
    return lambda: multiprocessing.set_start_method(method, force=True)


def state_of(process: int) -> tuple[str, int] | None:
    """Letter and parent of a process; None when it is dead."""
    try:
        state, parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else (state, int(parent))


def children(process: int) -> list[int]:
    """Living processes that this one has started."""
    every = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [child for child in every if (state_of(child) or ("", 0))[1] == process]


def in_steps(processes: tiny.Processes, step: int = 3) -> None:
    end = time.monotonic() + 60
    while processes.running() and tiny.step_of(processes.run) < step and time.monotonic() < end:
        time.sleep(0.005)
    assert len(processes.running()) == len(processes.ids), processes.log.read_text()


def outcome(processes: tiny.Processes, seconds: float, loaders: list[int] | None = None) -> dict:
    """How a run ended that was to end within so many seconds."""
    started = time.monotonic()
    ended = processes.wait(seconds)
    end = time.monotonic() + 8  # loader processes of a process that was forked here notice its end every 5 s
    while (left := [loader for loader in loaders or [] if state_of(loader)]) and time.monotonic() < end:
        time.sleep(0.05)
    saved = processes.run and checkpoints.newest(processes.run / "checkpoints")
    return {
        "ended": ended,
        "statuses": [processes.statuses.get(child) for child in processes.ids],
        "seconds": time.monotonic() - started,
        "saved": None if not saved else checkpoints.step_of(saved),
        "left": len(left),
        "log": processes.log.read_text(),
    }
