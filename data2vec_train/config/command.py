"""The first step of every command: it listens to signals before the slow imports."""

import atexit
import contextlib
import os
import re
import runpy
import sys
from collections.abc import Callable
from typing import Any

from data2vec_train import __version__
from data2vec_train.errors import ConfigError, Interrupted
from data2vec_train.system.stopping import listener, told

_to_the_end = contextlib.ExitStack()
atexit.register(_to_the_end.close)  # the first to be registered is the last to be called


# What `data2vec-train VERB` runs, as `python -m` does.
VERBS = {"pretrain": "data2vec_train"}
VERBS |= {
    name: f"data2vec_train.{name}" for name in ("finetune", "probe", "embed", "predict", "export", "plan", "benchmark")
}


def console() -> None:
    """`data2vec-train [VERB] ...`: `python -m data2vec_train[.VERB] ...`; pretraining when no verb is given."""
    # As `python -m data2vec_train` does: loader processes look for no module in the working directory.
    os.environ["PYTHONSAFEPATH"] = "1"
    first, second = [*sys.argv[1:3], "", ""][:2]
    has_verb = re.fullmatch(r"\w[\w-]*", first) is not None and not second.startswith("=")  # else it is `name = value`
    verb = first if has_verb else "pretrain"
    if verb not in VERBS:
        sys.stderr.write(
            f"error: there is no verb called '{verb}'; verbs are {', '.join(VERBS)}; a setting is name=value\n"
        )
        sys.exit(2)
    # Lightning starts the other processes of a run from what stands here, as `python -m MODULE ARGUMENTS`.
    sys.argv = [sys.argv[0], *sys.argv[1 + has_verb :]]
    runpy.run_module(VERBS[verb], run_name="__main__", alter_sys=True)


def run_command(task: Callable[[Any], object], **options: Any) -> None:
    """Runs `config.compose.main`, imported here because Hydra takes up to a second to import."""
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"data2vec-train {__version__}\n")
        return
    _to_the_end.enter_context(listener.listening())
    try:
        from data2vec_train.config.compose import main

        main(task, **options)
    except Interrupted as error:
        sys.exit(told(error))
    except ConfigError as error:  # another version of Hydra
        sys.exit(f"error: {error}")
