"""Members of a sweep that share a process."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def isolated() -> Iterator[None]:
    """Inside, one member runs. What it changes for the whole process is set back, and its W&B run is finished.

    So each member gives the same bits as a run of its own.
    """
    restore = [_environment(), _random_numbers(), _logging(), _signals(), _torch()]
    with warnings.catch_warnings():
        status = 1
        try:
            yield
            status = 0
        finally:
            wandb = sys.modules.get("wandb")
            if wandb is not None and wandb.run is not None:
                wandb.finish(exit_code=status)  # else Lightning logs the next member into the same run
            for undo in restore:
                undo()


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def undo() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    return undo


def _random_numbers() -> Callable[[], None]:
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def undo() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

    return undo


def _logging() -> Callable[[], None]:
    raises = logging.raiseExceptions
    levels = {name: logger.level for name, logger in _loggers()}

    def undo() -> None:
        logging.raiseExceptions = raises
        for name, logger in _loggers():
            logger.setLevel(levels.get(name, logging.NOTSET))

    return undo


def _loggers() -> list[tuple[str, logging.Logger]]:
    return [
        (name, logger) for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    ]


def _signals() -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}

    def undo() -> None:
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python cannot be set again
                signal.signal(number, handler)

    return undo


def _torch() -> Callable[[], None]:
    """Settings of torch that the trainer and the precision change for the whole process."""
    import torch

    cudnn = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic", "enabled")}
    matmul, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    anomaly, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()

    def undo() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.set_anomaly_enabled(anomaly, check_nan)
        for name, value in flags.items():
            setattr(cudnn, name, value)

    return undo
