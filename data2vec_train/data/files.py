"""Opens data files; paths that cannot be read as files (pipes, broken links, ...) raise `BadSample` with a reason."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from data2vec_train.errors import BadSample

SPECIAL_FILES = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; pipes are refused, since opening one would block.

    Raises:
        BadSample: it is missing, cannot be read, or is not a file.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind in SPECIAL_FILES:
            raise BadSample(f"not readable: a {SPECIAL_FILES[kind]}, not a file")
        return path.open("rb")
    except FileNotFoundError as error:
        raise BadSample("a link to a file that is missing" if path.is_symlink() else "file is missing") from error
    except PermissionError as error:
        raise BadSample("not readable: permission denied") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # too many open files: not a fault of this file
            raise
        raise BadSample(f"not readable: {error.strerror or error}") from error
    except BadSample:  # a ValueError, which the next clause would catch
        raise
    except ValueError as error:
        raise BadSample("not readable: a NUL in its name") from error


def read_file(path: Path, *, max_bytes: float, limit: str) -> bytes:
    """Content of a file.

    Args:
        path: the file.
        max_bytes: larger ones are refused before they are read.
        limit: the setting that `max_bytes` follows from, for the message.

    Raises:
        BadSample: as `open_file`; or the file is too large.
    """
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise BadSample(f"a file of {size} bytes, more than {max_bytes} by {limit}")
            return file.read()
        except OSError as error:
            raise BadSample(f"not readable: {error.strerror or error}") from error


def version_of(path: Path) -> str:
    """Path, size and modification time, to detect changes; the path alone if the file cannot be accessed."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return f"{path.absolute()}|None"
    return f"{path.absolute()}|{(status.st_size, status.st_mtime_ns)}"
