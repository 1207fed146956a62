"""Early end of a command: after a signal, or when another process of the run has ended.

Python runs signal handlers in the main thread, between two instructions of Python. A main thread that blocks in C (on
other processes, on a lost disk) never runs them. So a second thread reads the signals too, and ends the process if the
main thread does not end in time.

Imports nothing slow, so that signals are handled from the start of a command.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from data2vec_train.errors import CollapseError, ConfigError, DataError, Interrupted, LostProcess, SaveError, disk_fault
from data2vec_train.system import launch
from data2vec_train.system.compat import is_broken, loader_fault

# Windows has the first two only.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
INTERRUPTED, INTERRUPTED_BY_USER, LOST = 75, 130, 76  # exit statuses
PATIENCE_S = 30.0  # see `Listener.patience_s`
NEWS_S = 5.0  # after an error, time to learn whether another process has ended
FAREWELL_S = 10.0  # time for the main thread to end by itself after another process has ended


@dataclass(frozen=True)
class Gone:
    """Another process of the run has ended; this one cannot continue.

    Attributes:
        status: exit status for this process.
        line: what happened.
    """

    status: int
    line: str


class Listener:
    """Signals and lost processes that this process has to react to.

    Attributes:
        received: number of the first signal; 0 = none.
        noting: True: a signal is only recorded, and the training loop checks for it after each step. False: it is
            raised as `Interrupted` in the main thread at once.
        patience_s: after a signal, the process is ended if it makes no progress for this long.
        gone: another process of the run that has ended; None while all are running.
        accompanied: whether the other processes of the run are monitored, so that `gone` will be set.
        decided: this process ends for a reason of its own; the end of others is ignored.
        children: processes of the run that this one has started.
    """

    def __init__(self) -> None:
        self.patience_s = PATIENCE_S
        self._reset()
        self._found = threading.Event()

    def _reset(self) -> None:
        self.received = 0
        self.noting = False
        self.gone: Gone | None = None
        self.accompanied = False
        self.decided = False
        self.children: list[subprocess.Popen] = []
        self._raised = False
        self._announced = False
        self._interrupts = 0
        self._moved = time.monotonic()
        self._leave_at: float | None = None  # set when another process has ended
        self._factor = 1.0
        self._process: int | None = None
        self._wake: socket.socket | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the context and restore the handlers on exit. Nested contexts do nothing."""
        if self._process == os.getpid() or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
        self._found.clear()
        self._process = os.getpid()
        reader, self._wake = socket.socketpair()
        reader.setblocking(False)
        self._wake.setblocking(False)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, self._handle) for number in heard}
        fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(reader, frozenset(heard)), daemon=True, name="signals")
        watch.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._process = None
            self._wake.shutdown(socket.SHUT_RDWR)  # closing is not enough: forked processes hold it open too
            watch.join()
            self._wake.close()
            reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a newly forked process
            return
        self.received = self.received or number
        if not self.noting and not self._raised:
            self._raised = True
            raise Interrupted(number)

    # ------------------------------------------------------------------------------------------------ the other thread

    def moved(self) -> None:
        """Report progress: restart the time of `patience_s`."""
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def patient(self, factor: float) -> Iterator[None]:
        """Multiply `patience_s` by `factor` inside the context, while a checkpoint is written."""
        self.moved()
        self._factor = factor
        try:
            yield
        finally:
            self._factor = 1.0
            self.moved()

    def lose(self, gone: Gone) -> None:
        """Another process has ended: end this one too."""
        if self.gone is None and not self.decided:
            self.gone = gone
            self._leave_at = time.monotonic() + FAREWELL_S
            self._found.set()
            self._nudge()

    def decide(self) -> None:
        """Set `decided`."""
        self.decided = True
        self.gone = self._leave_at = None

    def verdict(self, seconds: float) -> Gone | None:
        """`gone`, after waiting up to `seconds` for it if the other processes are monitored."""
        if self.accompanied:
            self._found.wait(seconds)
        return self.gone

    def _nudge(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b"\0")

    def _watch(self, reader: socket.socket, heard: frozenset[int]) -> None:
        while True:
            busy = self.received or self._leave_at is not None
            select.select([reader], [], [], 0.5 if busy else None)
            try:
                numbers = reader.recv(4096)
            except BlockingIOError:
                numbers = None
            if numbers == b"":
                return
            for number in numbers or ():
                if number in heard:
                    self._told(number)
            now = time.monotonic()
            gone, leave_at = self.gone, self._leave_at
            if gone is not None and leave_at is not None and now > leave_at:
                self._say(gone.line)
                leave(gone.status)
            if self.received and now > self._moved + self._factor * self.patience_s:
                self._give_up()

    def _told(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                leave(INTERRUPTED_BY_USER, wait_s=0)
        # `received` does not tell whether this was announced: the handler in the main thread may have set it first.
        if not self._announced or number == signal.SIGINT:
            self._announced = True
            self.moved()
            again = "; press Ctrl-C again to leave without saving" if number == signal.SIGINT else ""
            self._say(f"\nstopping{' after this step' if self.noting else ''}{again}")
        self.received = self.received or number

    def _give_up(self) -> None:
        waited = self._factor * self.patience_s
        self._say(
            f"{signal.Signals(self.received).name}: no progress for {waited:g} s (stop_seconds), so process "
            f"{launch.rank()} ends without saving; it was waiting for {whereabouts()}. The same command continues from "
            "the last save"
        )
        if self.received == getattr(signal, "SIGUSR1", None) and (answer := launch.requeue()):
            self._say(answer)
        leave(status_of(self.received))

    @staticmethod
    def _say(text: str) -> None:
        # Not through logging: the stuck code may hold its locks. The terminal may be closed, or stderr a full pipe.
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [2], [], 0)[1]:
                os.write(2, f"{text}\n".encode())


listener = Listener()
_masks: list[set[int]] = []


def _before_fork() -> None:
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _in_child() -> None:
    """Detach a forked process from the parent's wakeup socket; otherwise the parent would count one Ctrl-C twice."""
    signal.set_wakeup_fd(-1)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def told(error: Interrupted) -> int:
    """Print why the command ends, requeue a SLURM job after SIGUSR1, and return the exit status."""
    if launch.rank() == 0:
        sys.stderr.write(f"{error}\n")
    if error.signal_number == getattr(signal, "SIGUSR1", None) and (answer := launch.requeue()):
        sys.stderr.write(f"{answer}\n")
    return status_of(error.signal_number)


def judged(error: BaseException) -> tuple[BaseException, int]:
    """The known cause of an error, or the error itself, and the exit status; 1 = unknown error."""
    if isinstance(error, Interrupted):
        return error, status_of(error.signal_number)
    known = {CollapseError: 3, LostProcess: LOST, ConfigError: 2, DataError: 2, SaveError: 2}
    failure = error
    if not isinstance(error, tuple(known)):
        fault = disk_fault(error)
        failure = (None if is_broken(error) else loader_fault(error)) or (error if fault is None else DataError(fault))
    return failure, next((status for kind, status in known.items() if isinstance(failure, kind)), 1)


def status_of(number: int) -> int:
    """Exit status after a signal."""
    return INTERRUPTED_BY_USER if number == signal.SIGINT else INTERRUPTED


def look_after(processes: Sequence[subprocess.Popen]) -> None:
    """Monitor, in a thread, the processes of the run that this one has started (ranks 1, 2, ...)."""
    listener.children = list(processes)
    listener.accompanied = True

    def watch() -> None:
        running = True
        while running:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes, start=1):
                if code:
                    status = LOST if code < 0 else code
                    listener.lose(Gone(status, lost_line(rank) if code < 0 else left_line(rank, status)))
                    return
            running = None in codes
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True, name="children").start()


def lost_line(rank: int) -> str:
    """Message for a process that was killed."""
    return f"process {rank} was killed (out of memory?); the same command continues the run"


def left_line(rank: int, status: int) -> str:
    """Message for a process that exited with an error."""
    return f"process {rank} ended with exit status {status}, and the others cannot continue without it"


def leave(status: int, *, wait_s: float = 5.0) -> NoReturn:
    """End this process and its children, which get `wait_s` to end by themselves."""
    end = time.monotonic() + wait_s
    for child in listener.children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
        child.kill()
    with contextlib.suppress(RuntimeError):  # the main thread starts or ends one at the same time
        end_loaders()
    os._exit(status)  # without cleaning up: the main thread may hold any lock


def end_loaders() -> None:
    """Kill the loader processes, which ignore signals."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def whereabouts() -> str:
    """What the main thread is waiting for, for messages."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    frames: list[tuple[str, str, int]] = []
    while frame is not None:
        frames.append((frame.f_code.co_filename.replace(os.sep, "/"), frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    for part, words in _PLACES.items():
        if any(part in file for file, _, _ in frames):
            return words
    file, name, line = next(
        (entry for entry in frames if "/data2vec_train/" in entry[0]), frames[0] if frames else ("?",) * 3
    )
    return f"{name} ({'/'.join(file.split('/')[-2:])}, line {line})"


_PLACES = {
    "torch/utils/data/dataloader.py": "a batch from a loader process (a disk that does not answer?)",
    "torch/distributed/": "the other processes (one of them stopped or lost?)",
    "data2vec_train/checkpoints.py": "the disk with the checkpoints",
    "torch/autograd/graph.py": "the backward pass, in which the processes exchange gradients",
}
