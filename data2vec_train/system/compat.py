"""Everything used of Hydra, Lightning and torch beyond their public interfaces: names, and the texts of errors.

The libraries are imported only when they are needed.
"""

import errno
import importlib
import importlib.metadata
import re
import time
from collections.abc import Iterator
from typing import Any

from data2vec_train.errors import ConfigError, DataError, LostProcess

# ---------------------------------------------------------------------------------------------------------------------
# Names: MODULE:NAME, with () where an object is constructed first. A new version may lack any of them.

PRIVATE = (
    "hydra._internal.utils:_run_hydra",
    "hydra._internal.utils:get_args_parser",
    "hydra._internal.utils:create_config_search_path",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl._apply_overrides_to_config",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl._parse_overrides_and_create_caching_repo",
    "lightning.pytorch:Trainer()._signal_connector.register_signal_handlers",
    "lightning.pytorch:Trainer().fit_loop.epoch_loop._broadcast_sigterm_tensor",
    "lightning.pytorch.strategies.launchers:subprocess_script._launch_process_observer",
    "lightning.pytorch.strategies:DDPStrategy()._ddp_kwargs",
    "lightning.pytorch.strategies:ModelParallelStrategy()._data_parallel_size",
    "lightning.pytorch.plugins:MixedPrecision._after_closure",
    "torch:UntypedStorage()._cdata",
    "torch:ops.aten._scaled_dot_product_efficient_attention",
    "torch:ops.aten._scaled_dot_product_flash_attention",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch._dynamo:config.optimize_ddp",
    "torch._dynamo:config.recompile_limit",
    "torch.utils._python_dispatch:TorchDispatchMode",
    "torch.utils._pytree:tree_leaves",
    "torch.utils._pytree:tree_map",
    "datasets:IterableDataset._resolve_features",
)
_TESTED = {"hydra": "hydra-core==1.3.8", "lightning": "lightning==2.6.6", "torch": "torch==2.14.1"}
_TESTED |= {"datasets": "datasets==5.2.0"}


def private(path: str) -> Any:
    """The object that a name of `PRIVATE` refers to.

    Raises:
        ConfigError: the installed version lacks it.
    """
    module, _, names = path.partition(":")
    package = module.split(".")[0]
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name.removesuffix("()"))
            found = found() if name.endswith("()") else found
    except (ImportError, AttributeError) as error:
        tested = _TESTED[package]
        version = importlib.metadata.version(tested.partition("==")[0])
        raise ConfigError(
            f"{package} {version} has no {path.replace(':', '.')}, which this program needs; it was tested with "
            f"another version: pip install {tested}"
        ) from error
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Loader processes: torch reports their end only in the text of an error

SHARED_MEMORY = (
    "loader processes send batches through shared memory (/dev/shm), which is full: give the container more (docker "
    "run --shm-size=8g), or lower data.num_workers, data.prefetch_factor or the batch; data.num_workers=0 needs none"
)
OPEN_FILES = (
    "too many open files: raise the limit (ulimit -n 65536), or lower data.num_workers or data.prefetch_factor; "
    "data.num_workers=0 needs the fewest"
)
KILLED = (
    "a loader process was killed (out of memory?); the same command continues the run. Lower data.num_workers or "
    "data.prefetch_factor to use less memory"
)
CRASHED = (
    "a loader process crashed ({}): a file that crashes its decoder, or a bug in a library. With data.num_workers=0 it "
    "crashes in this process, and python -X faulthandler shows where"
)
_NO_ROOM = r"No space left on device|unable to (allocate|resize|mmap|write to file).*(shared|shm|torch_)|Bus error"
_NO_FILES = r"Too many open files|received \d+ items of ancdata"
_BROKEN = (ConnectionError, EOFError, FileNotFoundError)  # raised while receiving a batch from a process that has ended
_NO_PROCESS = (errno.EAGAIN, errno.ENOMEM)
_WORKER = (
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) "
    r"(?:is killed by signal: (?P<signal>[\w ]+)|exited unexpectedly(?: with exit code (?P<code>\d+))?)"
)


def loader_fault(error: BaseException, exit_code: int | None = None) -> DataError | LostProcess | None:
    """Error of this package for an error of torch about a loader process; None if it has another cause.

    Args:
        error: raised by torch.
        exit_code: of the loader process, if known; negative after a signal.
    """
    text = str(error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or re.search(_NO_FILES, text):
        return DataError(OPEN_FILES)
    if re.search(_NO_ROOM, text) and ("DataLoader" in text or "torch_" in text or "shared memory" in text):
        return DataError(SHARED_MEMORY)
    found = re.search(_WORKER, text)
    broken = is_broken(error)
    if found is None and not broken:
        return None
    signal_name = None if found is None else found["signal"]
    if exit_code is None and found is not None and found["code"]:
        exit_code = int(found["code"])
    if signal_name == "Killed" or exit_code == -9 or (signal_name is None and exit_code is None):
        return LostProcess(KILLED)
    if exit_code == -7:
        return DataError(SHARED_MEMORY)
    how = signal_name or (f"signal {-exit_code}" if exit_code and exit_code < 0 else f"exit status {exit_code}")
    return DataError(CRASHED.format(how.strip()))


def is_broken(error: BaseException) -> bool:
    """Whether receiving a batch from a loader process failed; errors raised in that process itself do not count."""
    return isinstance(error, _BROKEN) and " in DataLoader worker process" not in str(error)


def start_fault(error: OSError) -> DataError | None:
    """Error of this package if loader processes cannot be started; None for other causes."""
    if error.errno in (errno.ENOSPC, errno.ENOSYS):  # from semaphores, which are in shared memory too
        return DataError(SHARED_MEMORY)
    if error.errno in _NO_PROCESS:
        return DataError(f"loader processes cannot be started ({error.strerror}): lower data.num_workers")
    return None


def exit_code(batches: Iterator | None, *, wait_s: float) -> int | None:
    """Exit code of a loader process of torch's iterator, waiting up to `wait_s`; None if none has ended."""
    workers, end = getattr(batches, "_workers", ()), time.monotonic() + wait_s
    while workers:
        codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
        if codes or time.monotonic() > end:
            return min(codes, default=None)
        time.sleep(0.02)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


def own_processes(trainer: Any) -> None:
    """Replace Lightning's handling of signals and processes.

    Its signal handlers save and communicate in the middle of a step: saved states are inconsistent, and the run hangs
    if only some processes get the signal. With several processes it synchronises with the device twice per step to ask
    for signals. If one process that it started ends early, its observer kills all of them, including this one.
    """
    from lightning.pytorch.strategies.launchers import subprocess_script

    from data2vec_train.system.stopping import look_after

    trainer._signal_connector.register_signal_handlers = _nothing
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
    subprocess_script._launch_process_observer = look_after


def _nothing() -> None:
    """Replaces methods of Lightning."""
