"""Checkpoint folders: written atomically, and verified before they are read.

    RUN/checkpoints/step-00001200/state.ckpt       tensors and plain containers
    RUN/checkpoints/step-00001200/manifest.json    size and SHA-256 of that file
    RUN/checkpoints/last, RUN/checkpoints/best     the name of one of those folders

A folder is made under a temporary name on the same file system, synced to the disk and renamed. Then the names in
`last` and `best` are replaced, and then older folders are removed. If the process ends in between, the earlier
checkpoints are unchanged.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data2vec_train.errors import ConfigError
from data2vec_train.system.outputs import UNFINISHED, replace_file, sync_directory

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # of a run directory
GONE = "was removed while it was read, as a run that is training does with older ones; give the command again"
STATE, MANIFEST = "state.ckpt", "manifest.json"
POINTERS = ("last", "best")
_NAME = re.compile(r"step-(\d+)(\.replaced)?")


class DamagedCheckpoint(ConfigError):
    """A checkpoint that is truncated or has changed bytes."""


def name_of(step: int) -> str:
    """Name of the folder with the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Number of finished optimizer steps, from the folder's name."""
    return int(_NAME.fullmatch(folder.name)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(content: dict[str, Any], folder: Path, *, pointers: Iterable[str], keep_last: int) -> None:
    """Write one checkpoint, then write its name into `pointers`, then remove old checkpoints.

    Args:
        content: tensors and plain containers.
        folder: `RUN/checkpoints/step-N`.
        pointers: those of `POINTERS` that will name it.
        keep_last: number of newest checkpoints to keep; those that a pointer names are kept as well.

    Raises:
        OSError: the disk is full, lost or not writable; earlier checkpoints are unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        unfinished.mkdir()
        digest, size = _write_state(content, unfinished / STATE)
        manifest = {STATE: {"bytes": size, "sha256": digest}}
        _write_bytes(unfinished / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
        sync_directory(unfinished)
        replaced = folder.with_name(f"{folder.name}.replaced")
        if folder.exists():  # of an earlier start; it stays valid under the other name until the new one exists
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        unfinished.rename(folder)
        sync_directory(folder.parent)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # frees space on a full disk
        raise
    for pointer in pointers:
        replace_file(folder.parent / pointer, f"{folder.name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(folder.parent, keep_last)


class _Hashed(io.RawIOBase):
    """A writable file that hashes the data passed to it, not the data on the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        if not self.file.closed:
            self.file.close()
        super().close()


def _write_state(content: dict[str, Any], path: Path) -> tuple[str, int]:
    file = _Hashed(path.open("wb"))
    try:
        torch.save(content, file)
        file.file.flush()
        os.fsync(file.file.fileno())
    except RuntimeError as error:  # torch's zip writer hides the OSError of a failed write
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        file.close()
    return file.digest.hexdigest(), file.size


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _prune(directory: Path, keep_last: int) -> None:
    named = {pointed(directory / pointer) for pointer in POINTERS}
    for folder in _folders(directory)[keep_last:]:
        if folder not in named:
            # Renamed first: a partly removed folder must not look like a damaged checkpoint.
            doomed = folder.with_name(f".{folder.name}{UNFINISHED}")
            folder.rename(doomed)
            shutil.rmtree(doomed)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _folders(directory: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def pointed(pointer: Path) -> Path | None:
    """The folder named in `last` or `best`; None if there is none."""
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        name = file.read(100).decode("utf-8", "replace").strip()
    return pointer.parent / name if _NAME.fullmatch(name) and (pointer.parent / name).is_dir() else None


def check(folder: Path) -> Path:
    """The state file of a checkpoint, after comparing it with its manifest.

    Raises:
        DamagedCheckpoint: it does not match the manifest.
    """
    manifest, state = folder / MANIFEST, folder / STATE
    if not manifest.is_file() or not state.is_file():
        raise DamagedCheckpoint(f"{folder}: {STATE if manifest.is_file() else MANIFEST} is missing")
    try:
        expected = json.loads(manifest.read_bytes())[STATE]
        size, digest = expected["bytes"], expected["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError) as error:
        raise DamagedCheckpoint(f"{manifest} cannot be read ({type(error).__name__})") from None
    try:
        if state.stat().st_size != size:
            raise DamagedCheckpoint(f"{state} has {state.stat().st_size} bytes, {size} were written")
        with state.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DamagedCheckpoint(f"{state}: the bytes are not those that were written (SHA-256 differs)")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{folder} {GONE}") from error
    return state


def newest(directory: Path) -> Path | None:
    """The newest intact folder in `RUN/checkpoints`; damaged ones are logged and skipped.

    Raises:
        DamagedCheckpoint: all folders are damaged.
    """
    damaged = []
    for folder in _folders(directory):
        try:
            check(folder)
        except DamagedCheckpoint as error:
            log.warning("skipped: %s", error)
            damaged.append(folder)
            continue
        return folder
    if damaged:
        raise DamagedCheckpoint(
            f"none of the {len(damaged)} checkpoints in {directory} is intact; restore one from a copy, or remove the "
            "folder to start again"
        )
    return None


def resolve(path: Path) -> Path | None:
    """The verified state file that a path refers to; None if it refers to no checkpoint.

    A run directory and `RUN/checkpoints` refer to the newest intact checkpoint; `last`, `best` and a folder `step-N` to
    one checkpoint, and a state file to itself.

    Raises:
        DamagedCheckpoint: the checkpoint does not match its manifest.
    """
    if path.name == STATE and (path.parent / MANIFEST).is_file():
        return check(path.parent)
    if path.name in POINTERS and path.is_file():
        folder = pointed(path)
        if folder is None:
            raise DamagedCheckpoint(f"{path} names no checkpoint beside it")
        return check(folder)
    if not path.is_dir():
        return None
    if (path / MANIFEST).is_file():
        return check(path)
    inside = path if path.name == FOLDER else path / FOLDER
    folder = newest(inside) if inside.is_dir() else None
    return None if folder is None else folder / STATE


def run_of(state: Path) -> Path:
    """The run directory RUN of a state file RUN/checkpoints/step-N/state.ckpt."""
    parents = state.resolve().parents
    return parents[min(2, len(parents) - 1)]


def read(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Content of a state file; executes no code from it.

    Args:
        path: the file.
        mapped: memory-map the tensors, to read the small entries only.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} {GONE}") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
