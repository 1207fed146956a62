"""The errors a user can cause, or has to know about. Entry points print them as one message, without a stack trace."""


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


class Interrupted(RuntimeError):
    """A signal ended the run at the edge of a step, after saving it; the same command goes on there."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped and saved after step {step}; the same command goes on from there")
        self.signal_number = signal_number
        self.step = step


class WeightMismatch(ConfigError):
    """A file of weights and a model that do not fit each other. The text lists every tensor concerned."""
