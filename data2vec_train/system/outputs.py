"""What commands write: whole or not at all, and by one process at a time.

A file or folder is written under a hidden name beside its place and renamed when its content is on the disk; an earlier
one with that name stays until then. A lock file keeps other processes out meanwhile. The system releases the lock when
the process ends, however it ends, and the next writer removes what an ended one left unfinished.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from data2vec_train.errors import ConfigError

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
MANIFEST = "manifest.json"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems

_held: dict[int, Path] = {}  # lock files by their descriptors in this process


# ---------------------------------------------------------------------------------------------------------------------
# Locks


class Locked(ConfigError):
    """Another process has the lock. The text says which."""


def take_lock(file: Path, what: str, *, wait: bool = False) -> int | None:
    """Lock a file that exists for this purpose only; it is created if it does not exist.

    Args:
        file: the lock file.
        what: the thing that it protects, for messages.
        wait: wait for the process that has the lock.

    Returns:
        What `release` takes. None if the file system has no locks, which the log then says.

    Raises:
        Locked: another process has the lock.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_descriptor(handle, blocking=False):
                if not wait:
                    raise Locked(
                        f"{what}: another process is at work there ({_owner(handle)}); wait for its end, or stop it"
                    )
                log.info("%s: waiting for another process (%s)", what, _owner(handle))
                lock_descriptor(handle)
            if _is_at(handle, file):
                _sign(handle)
                _held[handle] = file
                return handle
            os.close(handle)  # the process that had it has removed the file: another one may have made it again
        except OSError as error:
            os.close(handle)
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning("%s: this file system has no locks; do not start the same command twice at once", what)
            return None
        except BaseException:
            os.close(handle)
            raise


def lock_directory(path: Path) -> None:
    """Keep other processes out of a directory until this one ends, and remove what ended ones left unfinished.

    Raises:
        Locked: another process is in it.
    """
    file = path.resolve() / "lock"
    if file not in _held.values():
        take_lock(file, str(path))
    sweep(path)


def release(handle: int, *, remove: bool = False) -> None:
    """Give a lock back; with `remove` the lock file goes too."""
    file = _held.pop(handle)
    if remove and os.name != "nt":  # where open files cannot be removed
        file.unlink(missing_ok=True)
    os.close(handle)


def lost(path: Path) -> bool:
    """Whether a directory that this process has locked was removed, or replaced by another of its name."""
    file = path.resolve() / "lock"
    return any(held == file and not _is_at(handle, file) for handle, held in _held.items())


def _is_at(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say who has the lock. The first byte stays empty: it is what Windows locks, and nobody else can read it there."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    os.lseek(handle, 0, os.SEEK_SET)
    os.truncate(handle, 0)
    os.write(handle, f" {note}\n".encode())


def _owner(handle: int) -> str:
    os.lseek(handle, 1, os.SEEK_SET)
    try:
        note = json.loads(os.read(handle, 4096))
        return f"process {note['pid']} on {note['host']}, since {note['since']}"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has not signed yet
        return "it does not say which"


def _forget_locks() -> None:
    """In a forked child: a loader process that outlives its parent must not keep the parent's locks."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def output_path(value: object, *, make_parents: bool = False) -> Path:
    """What the setting `out` says, in a folder that exists or, with `make_parents`, is made.

    Raises:
        ConfigError: it names no file in an existing folder.
    """
    out = Path("" if value is None else str(value)).expanduser()
    if out.name in ("", "..") or "\0" in str(out):
        raise ConfigError(f"out={value}: expected the name of a file or folder to make")
    if make_parents:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.absolute().parent}")
    return out


def refuse_existing(out: Path) -> None:
    """Only what is not there is made.

    Raises:
        ConfigError: it exists.
    """
    if os.path.lexists(out):
        raise ConfigError(f"out={out} exists already; choose another name, or remove it")


@contextmanager
def sole_writer(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Inside, no other process writes `out`; what ended ones left unfinished is removed first.

    Args:
        out: a file or folder.
        wait: wait for another process that writes it.

    Raises:
        Locked: another process writes it.
    """
    file = out.with_name(f".{out.name}.lock")
    handle = take_lock(file, str(out), wait=wait)
    try:
        if handle is not None:
            for path in _unfinished(out):
                remove(path)
        yield
    finally:
        if handle is not None:
            release(handle, remove=True)
        else:
            file.unlink(missing_ok=True)


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Gives a name beside `out`; the file or folder that is made under it takes the place of `out` at the end.

    After an error it is removed, and `out` is as it was. A folder takes the place of an earlier one.
    """
    unfinished = _beside(out)
    try:
        yield unfinished
        sync(unfinished)
        if out.is_dir():
            earlier = _beside(out)
            out.rename(earlier)
            unfinished.rename(out)
            remove(earlier)
        else:
            unfinished.replace(out)
        sync_directory(out.parent)
    except OSError as error:
        error.filename = error.filename or str(out)  # a failed write does not know its file
        raise
    finally:
        remove(unfinished)


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{UNFINISHED}")


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that one process makes for all that need it, now or later.

    Its manifest.json has the SHA-256 of each file. A folder that is not what was written is made anew.

    Args:
        folder: below a cache.
        make: writes the files into a folder that is empty.

    Returns:
        `folder`.
    """
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(folder, wait=True):
            if not _is_whole(folder):  # else another process made it meanwhile
                if folder.exists():
                    log.warning("%s is not what was written; it is made anew", folder)
                with writing(folder) as unfinished:
                    unfinished.mkdir()
                    make(unfinished)
                    manifest = {path.name: _hash(path) for path in unfinished.iterdir()}
                    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return all(_hash(folder / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with a line of JSON for each; damaged lines are left out, and counted in the log."""
    rows, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        log.warning("%s: %d damaged lines are left out", path, damaged)
    return rows


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of a small file; readers see the old or the new one, never a part."""
    with writing(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)


def sweep(directory: Path) -> None:
    """Remove what interrupted writers left behind in a directory whose lock this process has.

    Outputs that other commands make there have locks of their own, and stay.
    """
    for path in directory.glob(f".*{UNFINISHED}"):
        name = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}", path.name)
        if name is None or not (directory / f".{name[1]}.lock").exists():
            remove(path)


def _unfinished(out: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}")
    return [path for path in out.parent.iterdir() if name.fullmatch(path.name)]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put the content of a file, or of all files below a folder, on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_directory(path)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Put the names in a directory on the disk."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that keep names in order by themselves
            raise
    finally:
        os.close(handle)
