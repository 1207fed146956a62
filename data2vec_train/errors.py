"""Errors that a user causes or must react to. Commands print them as one message, without a stack trace."""

import errno
import os
import re


class ConfigError(ValueError):
    """An invalid setting or combination of settings. The text says what was given and what to change."""


class DataError(RuntimeError):
    """The data cannot be used: missing, or more broken files than `data.max_bad_fraction` allows."""


class BadSample(ValueError):
    """One sample that cannot be used (truncated, not an image, too large, ...): quarantined and replaced, not fatal."""


class CollapseError(RuntimeError):
    """Targets or predictions no longer vary between positions: training further is useless."""


class SaveError(RuntimeError):
    """The run could not be saved: the disk is full, lost or not writable. Earlier checkpoints are unchanged."""


class Interrupted(BaseException):
    """A signal ends the command: after a step and its checkpoint, or before training.

    Not an `Exception`, so that no `except Exception` handles it as a failure.

    Attributes:
        signal_number: of the signal.
        step: the last saved step; None outside training.
    """

    def __init__(self, signal_number: int, step: int | None = None) -> None:
        where = "stopped" if step is None else f"stopped and saved after step {step}"
        super().__init__(f"{where}; the same command continues from there")
        self.signal_number = signal_number
        self.step = step


class LostProcess(RuntimeError):
    """Another process of the run, or a loader process, was killed; the same command continues the run."""


class WeightMismatch(ConfigError):
    """A file of weights does not fit the model. The text lists every such tensor."""


# Errors of a full or lost disk, and of paths that cannot be written.
_FULL_OR_GONE = {errno.ENOSPC, errno.EROFS, errno.EIO, errno.EFBIG}
_FULL_OR_GONE |= {getattr(errno, name) for name in ("EDQUOT", "ESTALE", "ENOTCONN") if hasattr(errno, name)}
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}


def disk_fault(error: BaseException) -> str | None:
    """Message with the file and the fault if a disk is the cause of an error, in any library; None for other errors."""
    if isinstance(error, OSError) and error.errno in _NO_PLACE and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another place, or change what is there"
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) and cause.errno else _number_in(str(cause))
        if number in _FULL_OR_GONE:
            name = getattr(cause, "filename", None) or getattr(error, "filename", None)
            where = "" if name is None else f"{name}: "
            return f"{where}{os.strerror(number)}; make room or bring the disk back, and give the same command again"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _number_in(text: str) -> int | None:
    """The system's error number in messages of numpy and of libraries in Rust or C++."""
    if re.search(r"\d+ requested and \d+ written", text):
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    return None if found is None else int(found[1] or found[2])
