"""Attacks on what ends a run: loader processes, signals, other processes. Nothing may hang, and all has its status.

Each attack runs in a process that is forked for it, which exits as the program would (`stopping.judged`).
"""

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from data2vec_train.config import compose
from data2vec_train.data import loading
from data2vec_train.data.loading import Loader
from data2vec_train.errors import DataError, Interrupted, LostProcess
from data2vec_train.system import stopping
from data2vec_train.system.compat import loader_fault
from data2vec_train.system.stopping import Gone, judged, listener, look_after

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def ending(attack, tmp_path: Path, *, limit: float = 25.0) -> tuple[int | None, str, float]:
    """Exit status (None: it hung), what it wrote, seconds."""
    log, started = tmp_path / "log", time.monotonic()
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        status = 0
        try:
            with listener.listening():
                listener.patience_s = 1.0
                try:
                    attack()
                except BaseException as error:
                    failure, status = judged(error)
                    os.write(2, f"{type(failure).__name__}: {failure}\n".encode())
        finally:
            os._exit(status)
    while time.monotonic() - started < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), log.read_text(), time.monotonic() - started
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, log.read_text(), limit


# ---------------------------------------------------------------------------------------------------- loader processes


class Does(Dataset):
    """Four samples; the third does something in the loader process."""

    def __init__(self, what) -> None:
        self.what = what

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        found = self.what() if index == 2 else None
        return torch.full((8,), index) if found is None else found


def kills(number: int):
    return lambda: os.kill(os.getpid(), number)


def raises(error: BaseException):
    def _raise():
        raise error

    return _raise


def load(what, **options) -> list:
    options = {"num_workers": 1, "batch_size": 1, "collate": list} | options
    return list(Loader(Does(what), **options))


FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
LOADER = {
    "a loader process is killed by the system": (kills(signal.SIGKILL), 76, "was killed"),
    "a decoder crashes its loader process": (kills(signal.SIGSEGV), 2, "crashed"),
    "a library aborts its loader process": (kills(signal.SIGABRT), 2, "crashed"),
    "shared memory ends with a bus error": (kills(signal.SIGBUS), 2, "--shm-size"),
    "a loader process exits by itself": (lambda: os._exit(3), 2, "crashed"),
    "a decoder calls sys.exit": (raises(SystemExit(0)), 2, "crashed"),
    "a decoder raises KeyboardInterrupt": (raises(KeyboardInterrupt()), 2, "crashed"),
    "a decoder finds no file descriptor left": (raises(OSError(errno.EMFILE, "Too many open files")), 2, "ulimit -n"),
    "the system has no file descriptor left": (raises(OSError(errno.ENFILE, "Too many open files in system")), 2,
                                               "ulimit -n"),
    "torch finds no shared memory": (raises(RuntimeError(FULL)), 2, "--shm-size"),
    "a decoder runs out of memory": (raises(MemoryError("no")), 1, "MemoryError"),
    "a sample cannot be pickled": (lambda: (lambda: 0), 1, "pickle"),
    "a sample holds a lock": (threading.Lock, 1, "pickle"),
    "a sample is a generator": (lambda: (nothing for nothing in ()), 1, "pickle"),
    "Ctrl-C reaches the loader process": (kills(signal.SIGINT), 0, ""),
    "the job's SIGTERM reaches the loader process": (kills(signal.SIGTERM), 0, ""),
    "the terminal of the loader process is closed": (kills(signal.SIGHUP), 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADER)
def test_a_loader_process_in_trouble(name, tmp_path):
    what, expected, text = LOADER[name]
    status, log, _ = ending(lambda: load(what), tmp_path)
    assert status == expected, log
    assert text in log
    assert "Traceback" not in log or status == 1


def limited(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    load(None.__class__)


def low_soft_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    assert len(load(type(None))) == 4


def without(name: str, value: object) -> None:
    setattr(loading, name, value)
    assert len(load(type(None))) == 4


def little_room(free: int, **options) -> None:
    loading.shutil.disk_usage = lambda path: type("Usage", (), {"free": free})
    load(type(None), **options)


def missing_plugin() -> None:
    loading.plugin_modules.append("no_such_plugin")
    load(type(None))


def same_values() -> None:
    base = torch.arange(12, dtype=torch.float64).view(3, 4)
    sample = {"view": base[:, 1], "half": base.half(), "bool": base > 3, "none": None, "empty": torch.empty(0, 3)}
    found = load(lambda: sample)[2][0]
    assert found.pop("none") is None
    assert all(torch.equal(value, sample[name]) and value.dtype == sample[name].dtype for name, value in found.items())


def killed_between_batches() -> None:
    batches = iter(Loader(Does(type(None)), num_workers=2, batch_size=1, prefetch_factor=1, collate=list))
    next(batches)
    for worker in __import__("multiprocessing").active_children():
        os.kill(worker.pid, signal.SIGKILL)
    try:
        time.sleep(0.3)
    except RuntimeError as error:  # torch's, in the middle of a step
        raise AssertionError("raised where no batch was asked for") from error
    list(batches)


def stopped_loader() -> None:
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    listener.noting = True
    load(kills(signal.SIGSTOP))


ROOM = {
    "the limit of open files is forty": (lambda: limited(40), 2, "ulimit -n"),
    "the soft limit of open files is low, the hard one is not": (low_soft_limit, 0, ""),
    "the system has no /dev/shm": (lambda: without("_SHM", Path("/no/such/folder")), 0, ""),
    "the system knows no limits of files": (lambda: without("resource", None), 0, ""),
    "shared memory is smaller than one batch": (lambda: little_room(10), 2, "--shm-size"),
    "shared memory is too little for sixteen processes": (lambda: little_room(1000, sharers=16), 2, "48 batches"),
    "shared memory is just large enough": (lambda: little_room(200), 0, ""),
    "a prefetch factor takes the shared memory": (lambda: little_room(200, prefetch_factor=9), 2, "prefetch_factor"),
    "no loader processes, and no shared memory": (lambda: little_room(0, num_workers=0), 0, ""),
    "files run out without loader processes": (lambda: load(raises(OSError(errno.EMFILE, "x")), num_workers=0), 2,
                                               "ulimit -n"),
    "a plugin is missing in the loader process": (missing_plugin, 1, "no_such_plugin"),
    "views, half floats, bools and nothing are sent": (same_values, 0, ""),
    "loader processes die between two batches": (killed_between_batches, 76, "was killed"),
    "a loader process is stopped, and the job is ended": (stopped_loader, 75, "a batch from a loader process"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOM)
def test_too_little_of_something(name, tmp_path):
    attack, expected, text = ROOM[name]
    status, log, _ = ending(attack, tmp_path)
    assert status == expected, log
    assert text in log


WORDS = {
    "killed in C": ("DataLoader worker (pid 7) is killed by signal: Killed. ", None, LostProcess),
    "terminated in C": ("DataLoader worker (pid 7) is killed by signal: Terminated. ", None, DataError),
    "bus error in C": (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that",
        None,
        DataError,
    ),
    "two gone, one killed": ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", -9, LostProcess),
    "one gone, crashed": ("DataLoader worker (pid(s) 7) exited unexpectedly", -11, DataError),
    "one gone, nothing known": ("DataLoader worker (pid(s) 7) exited unexpectedly", None, LostProcess),
    "descriptors lost on the way": ("received 0 items of ancdata", None, DataError),
    "memory of a GPU": ("CUDA out of memory. Tried to allocate 2 GiB", None, type(None)),
    "a full disk of the user": ("[Errno 28] No space left on device: 'out.parquet'", None, type(None)),
    "a bug that speaks of workers": ("expected 3 workers, got 4", None, type(None)),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_torch_says_of_a_loader_process(name):
    text, code, kind = WORDS[name]
    assert type(loader_fault(RuntimeError(text), code)) is kind


# -------------------------------------------------------------------------------------------------------------- signals


def stuck() -> None:
    """In C, without a way out: a mutex that this thread has locked already."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def told(*numbers: int, every: float = 0.2) -> None:
    def tell() -> None:
        for number in numbers:
            time.sleep(every)
            os.kill(os.getpid(), number)

    threading.Thread(target=tell, daemon=True).start()


def while_stuck(*numbers: int, patience: float = 1.0):
    def attack() -> None:
        listener.patience_s = patience
        told(*numbers)
        stuck()

    return attack


def swallowing(kind: type[BaseException]):
    def attack() -> None:
        told(signal.SIGTERM)
        while True:
            with contextlib.suppress(kind):
                time.sleep(10)

    return attack


def noted() -> None:
    listener.noting, listener.patience_s = True, 60.0
    told(signal.SIGTERM)
    time.sleep(2)
    assert listener.received == signal.SIGTERM


def cleaning_up() -> None:
    told(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    try:
        time.sleep(10)
    finally:
        time.sleep(0.7)
        os.write(2, b"clean\n")


def nobody_reads(streams: tuple[int, ...]):
    def attack() -> None:
        _, end = os.pipe()
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end, b"x" * 4096)
        os.set_blocking(end, True)
        for stream in streams:
            os.dup2(end, stream)
        told(signal.SIGTERM)
        os.write(1, b"x" * 100_000) if 1 in streams else stuck()

    return attack


def without_stderr() -> None:
    os.close(2)
    told(signal.SIGTERM)
    stuck()


def other_thread() -> None:
    thread = threading.Thread(target=time.sleep, args=(20,), daemon=True)
    thread.start()
    threading.Timer(0.2, lambda: signal.pthread_kill(thread.ident, signal.SIGTERM)).start()
    time.sleep(10)


def forked() -> None:
    child = os.fork()
    if not child:
        time.sleep(10)
        os._exit(0)
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    assert not listener.received


def moving() -> None:
    listener.noting = True
    told(signal.SIGTERM)
    for _ in range(20):
        time.sleep(0.1)
        listener.moved()


def saving() -> None:
    listener.noting = True
    told(signal.SIGTERM)
    with listener.patient(10):
        time.sleep(2)


def catastrophic() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -TERM {os.getpid()}"])  # a thread would wait for the interpreter
    re.match(r"(a+)+$", "a" * 40 + "b")


def at_fork_of_a_command() -> None:
    told(signal.SIGTERM)
    subprocess.run(SLEEP, check=False)


def composing() -> None:
    def faults(*_: object) -> list[str]:  # as Hydra does with what it does not know
        with contextlib.suppress(Interrupted):
            told(signal.SIGTERM)
            time.sleep(10)
        return ["train: "]

    compose._faults_of_command, sys.argv = faults, ["data2vec_train"]
    try:
        compose.main(None, config_name="train")
    except SystemExit as ended:
        os._exit(ended.code)


SIGNALLED = {
    "SIGTERM while a config is composed": (composing, 75, "stopping"),
    "SIGTERM while the main thread is stuck in C": (while_stuck(signal.SIGTERM), 75, "for 1 s (stop_seconds)"),
    "SIGUSR1 while the main thread is stuck in C": (while_stuck(signal.SIGUSR1), 75, "stuck (attacks/test_proc"),
    "SIGHUP while the main thread is stuck in C": (while_stuck(signal.SIGHUP), 75, "SIGHUP"),
    "Ctrl-C twice while stuck, with patience": (while_stuck(signal.SIGINT, signal.SIGINT, patience=600), 130, ""),
    "SIGTERM, then Ctrl-C twice": (while_stuck(signal.SIGTERM, signal.SIGINT, signal.SIGINT, patience=600), 130, ""),
    "SIGTERM in code that passes over every Exception": (swallowing(Exception), 75, "Interrupted"),
    "SIGTERM in code that passes over everything": (swallowing(BaseException), 75, "(stop_seconds)"),
    "SIGTERM in a step is noted": (noted, 0, "stopping after this step"),
    "more signals while the first is cleaned up after": (cleaning_up, 75, "clean"),
    "the terminal is gone": (without_stderr, 75, ""),
    "nobody reads what is written to stderr": (nobody_reads((2,)), 75, ""),
    "the main thread waits for a reader of stdout": (nobody_reads((1, 2)), 75, ""),
    "a signal that another thread gets": (other_thread, 75, ""),
    "Ctrl-C twice in a process that was forked": (forked, 0, ""),
    "a signal while the work goes on": (moving, 0, ""),
    "a signal while a checkpoint is written": (saving, 0, ""),
    "a signal in a regular expression without end": (catastrophic, 75, ""),
    "a signal while another program runs": (at_fork_of_a_command, 75, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNALLED)
def test_signals_at_bad_moments(name, tmp_path):
    attack, expected, text = SIGNALLED[name]
    status, log, seconds = ending(attack, tmp_path, limit=15)
    assert status == expected, log
    assert text in log
    assert seconds < 10


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listener.listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_listening_within_listening_leaves_all_as_it_was():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    threads = threading.active_count()
    with listener.listening(), listener.listening():
        assert threading.active_count() == threads + 1
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert threading.active_count() == threads


# ------------------------------------------------------------------------------------------------------ other processes


def gone_while_stuck() -> None:
    stopping.FAREWELL_S = 0.5
    listener.lose(Gone(76, "process 3 was killed"))
    stuck()


def gone_after_the_decision() -> None:
    stopping.FAREWELL_S = 0.2
    listener.decide()
    listener.lose(Gone(76, "process 3 was killed"))
    time.sleep(1.5)


def child_ends(code: str):
    def attack() -> None:
        stopping.FAREWELL_S = 0.2
        look_after([subprocess.Popen([sys.executable, "-c", code])])
        stuck()

    return attack


def children_finish() -> None:
    look_after([subprocess.Popen(["true"]), subprocess.Popen(["true"])])
    assert listener.verdict(1.5) is None


def stopped_child() -> None:
    child = subprocess.Popen(SLEEP)
    look_after([child])
    os.kill(child.pid, signal.SIGSTOP)
    os.write(2, f"child {child.pid}\n".encode())
    told(signal.SIGINT, signal.SIGINT)
    stuck()


OTHERS = {
    "another process is gone while this one is stuck": (gone_while_stuck, 76, "process 3 was killed"),
    "another process leaves after this one has decided to": (gone_after_the_decision, 0, ""),
    "a process of the run is killed": (child_ends("import os; os.kill(os.getpid(), 9)"), 76, "process 1 was killed"),
    "a process of the run refuses the data": (
        child_ends("raise SystemExit(2)"),
        2,
        "process 1 ended with exit status 2",
    ),
    "a process of the run collapses": (child_ends("raise SystemExit(3)"), 3, "exit status 3"),
    "all processes of the run end well": (children_finish, 0, ""),
    "a stopped process of the run is left behind": (stopped_child, 130, "child"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_processes(name, tmp_path):
    attack, expected, text = OTHERS[name]
    status, log, _ = ending(attack, tmp_path)
    assert status == expected, log
    assert text in log
    if child := re.search(r"child (\d+)", log):
        assert not Path(f"/proc/{child[1]}").exists() or " Z " in Path(f"/proc/{child[1]}/stat").read_text()


def test_nobody_waits_for_news_where_there_is_nobody_else():
    started = time.monotonic()
    with listener.listening():
        assert listener.verdict(30) is None
    assert time.monotonic() - started < 5


def test_an_interruption_is_no_failure_that_can_be_passed_over():
    assert not issubclass(Interrupted, Exception)
