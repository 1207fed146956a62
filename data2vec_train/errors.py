"""The errors a user can cause, or has to know about. Entry points print them as one message, without a stack trace."""

import errno
import os
import re


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. The text says what came, what to do."""


class DataError(RuntimeError):
    """The data cannot be used: nothing there, or more broken files than `data.max_bad_fraction` allows."""


class BadSample(ValueError):
    """One sample that cannot be used (truncated, not an image, too large, ...): quarantined and replaced, not fatal."""


class CollapseError(RuntimeError):
    """Targets or predictions no longer vary between positions: the run has nothing left to learn."""


class SaveError(RuntimeError):
    """The run could not be saved: the disk is full, gone or not writable. Earlier checkpoints are as they were."""


class Interrupted(BaseException):
    """A signal ends the command: at the edge of a step, after saving it, or before there was anything to save.

    Not an `Exception`, so that nobody on the way takes it for a failure that can be dealt with.

    Attributes:
        signal_number: of the signal.
        step: the last step that is saved; None outside training.
    """

    def __init__(self, signal_number: int, step: int | None = None) -> None:
        where = "stopped" if step is None else f"stopped and saved after step {step}"
        super().__init__(f"{where}; the same command goes on from there")
        self.signal_number = signal_number
        self.step = step


class LostProcess(RuntimeError):
    """Another process, of the run or of its loaders, was killed from outside; the same command goes on."""


class WeightMismatch(ConfigError):
    """A file of weights and a model that do not fit each other. The text lists every tensor concerned."""


# A disk that is full or gone, whatever library met it first; and places that nobody can write to.
_FULL_OR_GONE = {errno.ENOSPC, errno.EROFS, errno.EIO, errno.EFBIG}
_FULL_OR_GONE |= {getattr(errno, name) for name in ("EDQUOT", "ESTALE", "ENOTCONN") if hasattr(errno, name)}
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}


def disk_fault(error: BaseException) -> str | None:
    """One sentence on the file and what is wrong when a disk is the cause of an error; None for other errors."""
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
    """The system's number of an error, as numpy and libraries in Rust or C++ pass it on."""
    if re.search(r"\d+ requested and \d+ written", text):
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    return None if found is None else int(found[1] or found[2])
