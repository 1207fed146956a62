"""The first thing that every command does: hear signals, before it imports anything that takes time."""

import atexit
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from data2vec_train.errors import ConfigError, Interrupted
from data2vec_train.system.stopping import listener, told

_to_the_end = contextlib.ExitStack()
atexit.register(_to_the_end.close)  # the first to be registered is the last to be called


def run_command(task: Callable[[Any], object], **options: Any) -> None:
    """`config.main`, which imports Hydra: a second on a busy machine."""
    _to_the_end.enter_context(listener.listening())
    try:
        from data2vec_train.config.compose import main

        main(task, **options)
    except Interrupted as error:
        sys.exit(told(error))
    except ConfigError as error:  # another version of Hydra
        sys.exit(f"error: {error}")
