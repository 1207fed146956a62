"""The errors a user can cause, or has to know about. Entry points print them as one message, without a stack trace."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. The text says what came, what to do."""


class DataError(RuntimeError):
    """The data cannot be used: nothing there, or more broken files than `data.max_bad_fraction` allows."""


class BadSample(ValueError):
    """One sample that cannot be used (truncated, not an image, too large, ...): quarantined and replaced, not fatal."""


class CollapseError(RuntimeError):
    """Targets or predictions no longer vary between positions: the run has nothing left to learn."""


class WeightMismatch(ConfigError):
    """A file of weights and a model that do not fit each other. The text lists every tensor concerned."""
