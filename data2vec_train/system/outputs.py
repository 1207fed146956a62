"""Atomic writing of outputs, by one process at a time.

A file or folder is written under a hidden name in the same folder and renamed after its content is synced to the disk;
an existing output of that name stays until then. Meanwhile a lock file excludes other processes. The system releases
the lock whenever the process ends, and the next writer removes unfinished outputs.
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
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems without locks

_held: dict[int, Path] = {}  # lock files by their descriptors in this process


# ---------------------------------------------------------------------------------------------------------------------
# Locks


class Locked(ConfigError):
    """Another process holds the lock; the text names it."""


def take_lock(file: Path, what: str, *, wait: bool = False) -> int | None:
    """Lock a lock file; it is created if it does not exist.

    Args:
        file: the lock file.
        what: the protected output, for messages.
        wait: wait for the process that holds the lock.

    Returns:
        Argument of `release`. None, with a warning, if the file system has no locks.

    Raises:
        Locked: another process holds the lock.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_descriptor(handle, blocking=False):
                if not wait:
                    raise Locked(
                        f"{what}: another process is using it ({_owner(handle)}); wait until it ends, or stop it"
                    )
                log.info("%s: waiting for another process (%s)", what, _owner(handle))
                lock_descriptor(handle)
            if _is_at(handle, file):
                _sign(handle)
                _held[handle] = file
                return handle
            os.close(handle)  # its previous owner removed the file, and another process may have created it again
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
    """Lock a directory until this process ends, and remove the unfinished outputs of ended processes.

    Raises:
        Locked: another process holds the lock.
    """
    file = path.resolve() / "lock"
    if file not in _held.values():
        take_lock(file, str(path))
    sweep(path)


def release(handle: int, *, remove: bool = False) -> None:
    """Release a lock; with `remove` also remove the lock file."""
    file = _held.pop(handle)
    if remove and os.name != "nt":  # Windows cannot remove open files
        file.unlink(missing_ok=True)
    os.close(handle)


def lost(path: Path) -> bool:
    """Whether a directory that this process has locked was removed or replaced."""
    file = path.resolve() / "lock"
    return any(held == file and not _is_at(handle, file) for handle, held in _held.items())


def _is_at(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write the owner into the lock file. Windows locks the first byte against reading, so the note starts after it."""
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
    except (ValueError, TypeError, KeyError, RecursionError):  # not written yet
        return "its id is unknown"


def _forget_locks() -> None:
    """Run in a forked child: a loader process that outlives its parent must not keep the parent's locks."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def output_path(value: object, *, make_parents: bool = False) -> Path:
    """Path of the setting `out`; its folder must exist or, with `make_parents`, is made.

    Raises:
        ConfigError: it is not a file name in an existing folder.
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
    """Refuse to overwrite an output.

    Raises:
        ConfigError: `out` exists.
    """
    if os.path.lexists(out):
        raise ConfigError(f"out={out} exists already; choose another name, or remove it")


@contextmanager
def sole_writer(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock `out` for writing; unfinished outputs of ended processes are removed first.

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
    """Yield a temporary path beside `out`; the file or folder made there replaces `out` at the end.

    After an error it is removed, and `out` is unchanged. An existing folder is replaced too.
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
        error.filename = error.filename or str(out)  # the error of a failed write has no file name
        raise
    finally:
        remove(unfinished)


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{UNFINISHED}")


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """A cached folder; one process makes it, others wait for it.

    Its manifest.json has the SHA-256 of each file. A folder that does not match it is made again.

    Args:
        folder: path in a cache.
        make: writes the files into an empty folder.

    Returns:
        `folder`.
    """
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(folder, wait=True):
            if not _is_whole(folder):  # another process may have made it in the meantime
                if folder.exists():
                    log.warning("%s is damaged; it is made again", folder)
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
    """The objects in a file of JSON lines; damaged lines are skipped, and their number is logged."""
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
        log.warning("%s: %d damaged lines are skipped", path, damaged)
    return rows


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a small file; readers see the old or the new content, never a part."""
    with writing(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)


def sweep(directory: Path) -> None:
    """Remove unfinished outputs in a directory whose lock this process holds.

    Outputs that another command is writing there have a lock file of their own, and stay.
    """
    for path in directory.glob(f".*{UNFINISHED}"):
        name = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}", path.name)
        if name is None or not (directory / f".{name[1]}.lock").exists():
            remove(path)


def _unfinished(out: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}")
    return [path for path in out.parent.iterdir() if name.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync the content of a file, or of all files below a folder, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_directory(path)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory to the disk."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync directories
            raise
    finally:
        os.close(handle)
