"""Loader processes: how they start, send batches, check their limits and end.

Batches are sent through shared memory, with an open file for each tensor. torch does this in a thread of the loader
process; an error there is lost, and the main process waits for ever. Here the collate function does it, so errors are
reported.
"""

import atexit
import contextlib
import functools
import importlib
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data2vec_train.errors import DataError
from data2vec_train.system.compat import OPEN_FILES, SHARED_MEMORY, exit_code, is_broken, loader_fault, start_fault
from data2vec_train.system.plugins import plugin_modules
from data2vec_train.system.stopping import SIGNALS, end_loaders, listener

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

_SHM = Path("/dev/shm")
_FILES_TO_START = 32  # files that a process needs besides those for batches


class Loader(DataLoader):
    """torch's DataLoader, which raises an error with a reason where torch's waits for ever.

    Args:
        dataset: samples; pickled for the loader processes, as the other arguments.
        collate: samples -> batch.
        num_workers: loader processes; 0 = none.
        prefetch_factor: batches that each loader process keeps ready.
        pin_memory: as in torch.
        sharers: training processes on this machine, each with `num_workers` loader processes.
        **order: `batch_sampler` or `batch_size`, as in torch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        collate: Callable[[Sequence[Any]], Any],
        num_workers: int,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        sharers: int = 1,
        **order: Any,
    ) -> None:
        self.need = _Need(batches=num_workers * prefetch_factor + 1, of_worker=prefetch_factor + 1, sharers=sharers)
        super().__init__(
            dataset,
            collate_fn=_Sent(collate, self.need) if num_workers else collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=functools.partial(begin_worker, plugins=tuple(plugin_modules)) if num_workers else None,
            **order,
        )

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            DataError: the limits of shared memory, files or processes are too low, or a loader process crashed.
            LostProcess: a loader process was killed.
        """
        batches = None
        try:
            if self.num_workers:
                _allow_files(_FILES_TO_START + 16 * self.num_workers)
                self.need.free = shutil.disk_usage(_SHM).free if _SHM.is_dir() else None
            batches = super().__iter__()
            if self.num_workers:
                _deaths.install()
            while (batch := _deaths.next(batches)) is not _END:
                listener.moved()
                if isinstance(batch, _Unsent):
                    raise DataError(batch.why)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            fault = None
            if batches is not None and self.num_workers:
                fault = loader_fault(error, exit_code(batches, wait_s=3.0 if is_broken(error) else 0.5))
            elif not is_broken(error):
                fault = loader_fault(error)
            if fault is None and batches is None and isinstance(error, OSError):
                fault = start_fault(error)
            if fault is None:
                raise
            raise fault from error


class _Deaths:
    """Detects the death of a loader process and raises the error where a batch is waited for.

    torch's SIGCHLD handler raises wherever the main thread is: in a save, in an optimizer step, in a callback that
    takes the error for its own. Only while reading a batch may the main thread block for ever, on a pipe that the dead
    process left unfinished: there torch's handler is called at once, elsewhere before the next batch.
    """

    def __init__(self) -> None:
        self._torch_handler: Callable[[int, FrameType | None], object] | None = None
        self._waiting = self._died = False

    def install(self) -> None:
        """Replace torch's handler, which torch installs when it starts loader processes."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        found = signal.getsignal(signal.SIGCHLD)
        if callable(found) and found != self._handle:
            self._torch_handler = found
            signal.signal(signal.SIGCHLD, self._handle)

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch, or `_END`.

        Raises:
            RuntimeError: raised by torch; a loader process has died.
        """
        self._waiting = True
        try:
            if self._died:
                self._died = False
                self._torch_handler(signal.SIGCHLD, None)
            return next(batches, _END)
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._torch_handler(number, frame)
        else:
            self._died = True


_END = object()
_deaths = _Deaths()


@dataclass
class _Need:
    """Shared memory and files that queued batches need, compared with the limits before the first batch is sent."""

    batches: int  # queued by all loader processes, and the one in use
    of_worker: int  # those of one loader process
    sharers: int
    free: int | None = None  # bytes of shared memory before the loader processes start; None where it is not limited

    def lacking(self, size: int, tensors: int) -> str | None:
        """Message if batches of `size` bytes in `tensors` tensors exceed a limit; None if they do not."""
        needed = size * self.batches * self.sharers
        if self.free is not None and needed > self.free:
            sums = f"{self.batches * self.sharers} batches of {_mb(size)} need {_mb(needed)}, {_mb(self.free)} are free"
            return f"{sums}; {SHARED_MEMORY}"
        try:
            _allow_files(2 * tensors * self.of_worker)
        except DataError as error:
            return str(error)
        return None


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


class _Sent:
    """Collates a batch and moves it to shared memory; checks the first batch of each loader process against limits."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any], need: _Need) -> None:
        self.collate = collate
        self.need = need
        self.measured = False

    def __call__(self, samples: Sequence[Any]) -> "_Parcel | _Unsent":
        batch = self.collate(samples)
        pickler = _Measuring()
        try:
            pickler.dump(batch)
        except (RuntimeError, OSError) as error:
            fault = loader_fault(error) or (start_fault(error) if isinstance(error, OSError) else None)
            if fault is None:
                raise
            return _Unsent(str(fault))
        why = None if self.measured else self.need.lacking(pickler.size, pickler.tensors)
        self.measured = True
        return _Parcel(pickler.content.getvalue()) if why is None else _Unsent(why)


class _Measuring(ForkingPickler):
    """Moves tensors to shared memory and adds up their bytes."""

    def __init__(self) -> None:
        self.content = io.BytesIO()
        self.size = self.tensors = 0
        super().__init__(self.content)

    def persistent_id(self, value: Any) -> None:
        """Called for every pickled object."""
        if isinstance(value, torch.UntypedStorage):
            self.size += value.nbytes()
            self.tensors += 1


@dataclass(frozen=True)
class _Parcel:
    """A batch in shared memory; unpickling it in the main process gives the batch."""

    content: bytes

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return ForkingPickler.loads, (self.content,)


@dataclass(frozen=True)
class _Unsent:
    """Sent instead of a batch that cannot be sent."""

    why: str


def _allow_files(count: int) -> None:
    """Raise the limit of open files so that this process can open `count` more.

    Raises:
        DataError: the hard limit is too low.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = Path("/proc/self/fd")
    needed = count + (len(os.listdir(descriptors)) if descriptors.is_dir() else 0)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(f"{needed} open files are needed, and the limit is {hard}; {OPEN_FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def begin_worker(worker: int, plugins: Sequence[str] = ()) -> None:
    """Initialise a loader process: ignore signals, import plugins.

    Ctrl-C and the end of a terminal or a job reach every process; the main process handles them. A forked process has
    imported the plugins already.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _excepthook
    for name in plugins:
        importlib.import_module(name)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Hide broken-pipe errors of the thread that sends tensors: the main process may have ended before it."""
    if threading.current_thread() is threading.main_thread() or not is_broken(error):
        sys.__excepthook__(kind, error, trace)


@atexit.register
def _end_workers() -> None:
    """End loader processes that an error left running; Python sends SIGTERM, which they ignore, and waits for them."""
    if hasattr(signal, "SIGCHLD"):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failure of the loader
    end_loaders()


def cores_at_hand() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_workers() -> int:
    """Default number of loader processes: one less than the cores, between 1 and 8."""
    return max(1, min(8, cores_at_hand() - 1))
