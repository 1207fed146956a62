"""Outputs are there whole or not at all, one process makes them, and another one is told which."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from data2vec_train.errors import ConfigError, disk_fault
from data2vec_train.system import outputs
from data2vec_train.system.outputs import (
    Locked,
    cached_folder,
    lock_directory,
    replace_file,
    sole_writer,
    take_lock,
    writing,
)

HOLD = """
import sys, time
from pathlib import Path
from data2vec_train.system.outputs import take_lock
take_lock(Path(sys.argv[1]), "it")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that has the lock of a file; ends it afterwards."""
    started = []

    def start(file):
        process = subprocess.Popen([sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_loser_is_told_who_has_it_and_a_killed_process_gives_it_back(tmp_path, holder):
    other = holder(tmp_path / ".out.lock")
    said = rf"out: another process .*\(process {other.pid} on .*, since 20"
    with pytest.raises(Locked, match=said), sole_writer(tmp_path / "out"):
        pass
    other.kill()
    other.wait()
    with sole_writer(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_run_directory_is_locked_until_its_process_ends(tmp_path, holder):
    other = holder(tmp_path / "lock")
    with pytest.raises(ConfigError, match=f"process {other.pid} on"):
        lock_directory(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock_directory(tmp_path)
    lock_directory(tmp_path)  # as members of a sweep that go on in one directory
    with pytest.raises(Locked, match=f"process {os.getpid()} on"):
        take_lock(tmp_path / "lock", "it")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    code = HOLD.replace("time.sleep(600)", "import os\nif os.fork() == 0:\n    time.sleep(600)\nelse:\n    os._exit(0)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    process.wait()
    try:
        time.sleep(0.5)  # the child lets go when it first runs
        outputs.release(take_lock(tmp_path / "lock", "it"))
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_worked_on(number, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs, "lock_descriptor", refuse)
    with caplog.at_level(logging.WARNING), sole_writer(tmp_path / "out"):
        replace_file(tmp_path / "out", b"x")
    assert "this file system has no locks" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_what_belongs_to_others_stays(tmp_path):
    for name in (".a.01234567.unfinished", ".a.b.01234567.unfinished", ".b.01234567.unfinished", ".a.lock"):
        (tmp_path / name).write_text("x")
    with sole_writer(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".a.b.01234567.unfinished", ".b.01234567.unfinished"]


def test_an_error_leaves_the_earlier_file_and_no_other(tmp_path):
    replace_file(tmp_path / "a", b"old")

    def interrupted():
        with writing(tmp_path / "a") as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path):
    for content in ("old", "new"):
        with writing(tmp_path / "a") as unfinished:
            (unfinished / "b").mkdir(parents=True)
            (unfinished / "b" / content).write_text(content)
            assert not (tmp_path / "a" / "b" / "new").exists()
    assert os.listdir(tmp_path / "a" / "b") == ["new"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_that_its_owner_has_removed_is_taken_anew(tmp_path, holder):
    file = tmp_path / "lock"
    first = os.open(file, os.O_RDWR | os.O_CREAT)  # as a process that opened it before the owner removed it
    file.unlink()
    handle = take_lock(file, "it")
    assert os.path.samestat(os.fstat(handle), file.stat())
    with pytest.raises(Locked):
        take_lock(file, "it")
    os.close(first)
    outputs.release(handle)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "manifest", "list"])
def test_a_damaged_folder_of_the_cache_is_made_anew(damage, tmp_path, caplog):
    def make(folder):
        (folder / "ids").write_bytes(bytes(1000))

    folder = cached_folder(tmp_path / "cache" / "a", make)
    match damage:
        case "flipped":
            (folder / "ids").write_bytes(bytes(999) + b"\1")
        case "short":
            (folder / "ids").write_bytes(bytes(10))
        case "missing":
            (folder / "ids").unlink()
        case "manifest":
            (folder / "manifest.json").write_bytes(b"\0" * 50)
        case "list":
            (folder / "manifest.json").write_bytes(b"[]")
    cached_folder(folder, make)
    assert (folder / "ids").read_bytes() == bytes(1000)
    assert "is damaged" in caplog.text
    assert os.listdir(tmp_path / "cache") == ["a"]


def test_who_needs_what_another_makes_waits_for_it(tmp_path):
    code = """
import sys, time
from pathlib import Path
from data2vec_train.system.outputs import cached_folder
def make(folder):
    print("making", flush=True)
    time.sleep(1)
    (folder / "a").write_text("x")
cached_folder(Path(sys.argv[1]), make)
"""
    folder = tmp_path / "a"
    both = [subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) for _ in range(2)]
    said = b"".join(process.communicate(timeout=60)[0] for process in both)
    assert said == b"making\n"
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(os.listdir(folder)) == ["a", "manifest.json"]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError("1000 requested and 24 written"), "No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(errno.ENOENT, "No such file", "/a/b"), None),
        (OSError(errno.EACCES, "Permission denied"), None),  # of no file
        (RuntimeError("a bug"), None),
    ],
)
def test_faults_of_a_disk_are_known_whoever_met_them(error, said):
    found = disk_fault(error)
    assert found is None if said is None else found.startswith(said)


def test_a_cause_is_looked_for_and_what_is_said_to_be_none_is_not():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("unexpected pos")
    wrapped.__context__ = full
    assert "No space left" in disk_fault(wrapped)
    wrapped.__suppress_context__ = True
    assert disk_fault(wrapped) is None


def test_the_lock_says_since_when(tmp_path):
    handle = take_lock(tmp_path / "lock", "it")
    note = json.loads((tmp_path / "lock").read_text())
    assert note["pid"] == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", note["since"])
    assert abs(time.mktime(time.strptime(note["since"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    outputs.release(handle)
