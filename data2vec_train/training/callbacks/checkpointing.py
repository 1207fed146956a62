"""Saving, stopping and continuing a run: connects Lightning's trainer with `checkpoints.py`."""

import contextlib
import errno
import json
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from data2vec_train import checkpoints
from data2vec_train.errors import CollapseError, Interrupted, SaveError, disk_fault
from data2vec_train.system.outputs import lost, sweep
from data2vec_train.system.stopping import listener
from data2vec_train.training.distributed import Peers
from data2vec_train.training.module import TrainingModule
from data2vec_train.training.step_result import StepResult

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


class FolderCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as the folders of `checkpoints.py`.

    A write error is stored in `failure` and not raised, since the other processes wait for this one at that moment.

    Args:
        asynchronous: copy the state to host memory and write it in a thread. The next save waits for that thread.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self.failure: OSError | None = None
        self._writer: threading.Thread | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` as the folder `path`; `storage_options` are the arguments of `checkpoints.write`."""
        self.wait()
        if not self.asynchronous:
            self._write(checkpoint, Path(path), storage_options)
            return
        copied = _on_host(checkpoint)
        self._writer = threading.Thread(target=self._write, args=(copied, Path(path), storage_options))
        self._writer.start()

    def _write(self, checkpoint: dict[str, Any], path: Path, options: dict[str, Any]) -> None:
        try:
            if lost(path.parents[1]):
                raise FileNotFoundError(errno.ENOENT, "the run directory is gone", str(path.parents[1]))
            checkpoints.write(checkpoint, path, **options)
        except OSError as error:
            self.failure = error

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load_checkpoint(self, path: str | Path, *args: object, **kwargs: object) -> dict[str, Any]:
        """The content of the folder `path`."""
        return checkpoints.read(checkpoints.check(Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Never called: `checkpoints.write` removes old checkpoints."""
        raise NotImplementedError

    def teardown(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        self.wait()


def _on_host(value: Any) -> Any:
    """A copy of a state on the host, which later steps cannot change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item) for item in value)
    return value


class Checkpointing(L.Callback):
    """Saves the run every n steps, at the end, and after the best measurement so far.

    It must follow the callbacks that measure and log in the list, so that a checkpoint has the results of its step.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep_last: number of newest checkpoints to keep; the best is kept as well.
        asynchronous: see `FolderCheckpointIO`.
        directory: `RUN/checkpoints`.
        config: of the run, as plain containers; stored in every checkpoint, so that the model can be rebuilt from it.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        keep_last: int,
        asynchronous: bool,
        directory: Path,
        config: dict[str, Any],
    ) -> None:
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.directory = directory
        self.config = config
        self.io = FolderCheckpointIO(asynchronous=asynchronous)
        self.saved_at = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the files of an interrupted writer."""
        if trainer.is_global_zero:
            sweep(self.directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step: a run that continues is already saved there."""
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Save every n steps, at the last step and after the best measurement."""
        step = trainer.global_step
        if step == self.saved_at:
            return
        is_best = self._is_best(trainer)
        if is_best or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer, is_best=is_best)

    def _is_best(self, trainer: L.Trainer) -> bool:
        """Whether this step has the best measurement so far."""
        measuring = measuring_callback(trainer)
        step = None if measuring is None else measuring.best_step
        if trainer.world_size > 1 and measuring is not None and measuring.measured_at == trainer.global_step:
            step = trainer.strategy.broadcast(step)  # scores may differ in their last bits; all processes must agree
        return step == trainer.global_step

    def save(self, trainer: L.Trainer, *, is_best: bool = False) -> None:
        """Write a checkpoint of this step, on all processes together.

        Raises:
            SaveError: it could not be written.
        """
        with listener.patient(10):
            self._save(trainer, is_best=is_best)

    def _save(self, trainer: L.Trainer, *, is_best: bool) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.save()
        options = {"pointers": ("last", "best") if is_best else ("last",), "keep_last": self.keep_last}
        trainer.save_checkpoint(self.directory / checkpoints.name_of(step), weights_only=False, storage_options=options)
        self._check(trainer)
        self.saved_at = step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Add the config."""
        checkpoint["config"] = self.config

    def save_before_leaving(self, trainer: L.Trainer) -> None:
        """Make sure that a checkpoint of this step is on the disk; all processes must call this.

        Raises:
            SaveError: it could not be written.
        """
        if self.saved_at != trainer.global_step:
            self.save(trainer)
        self._finish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, which is not due if a callback stopped the run, and wait for it."""
        self.save_before_leaving(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        with listener.patient(10):
            self.io.wait()
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        """Raise in all processes if the writing process failed."""
        failure = self.io.failure
        text = None if failure is None else _describe(failure, self.directory)
        text = trainer.strategy.broadcast(text) if trainer.world_size > 1 else text
        if text is not None:
            raise SaveError(text)


def _describe(error: OSError, directory: Path) -> str:
    run = directory.parent if directory.name == checkpoints.FOLDER else directory
    if lost(run):
        return (
            f"{run} was removed, or replaced by another directory, during the run; nothing more is written there. "
            "Repeat the command, or choose another hydra.run.dir"
        )
    return (
        f"the run could not be saved in {directory}: {error.strerror or error}. Earlier checkpoints there are "
        "unchanged. Free or reconnect the disk and give the same command again: the run continues from the last"
    )


@contextlib.contextmanager
def disk_trouble(directory: Path) -> Iterator[None]:
    """Turn the error of a full, missing or read-only disk into a message of one sentence.

    Raises:
        SaveError: there was such an error.
    """
    try:
        yield
    except OSError as error:
        if disk_fault(error) is None and not lost(directory):
            raise
        raise SaveError(_describe(error, directory)) from error


def measuring_callback(trainer: L.Trainer) -> L.Callback | None:
    """The callback with the scores of the latest measurement (`ProbeCallback`, `Evaluation`)."""
    return next((callback for callback in trainer.callbacks if hasattr(callback, "measured_at")), None)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class _NonFinite:
    """Whether a step was not finite, copied from the device to the host in the background."""

    def __init__(self, result: StepResult) -> None:
        self.step = result.step
        self.samples = result.samples
        self.flag = result.non_finite  # () bool
        self._arrived = None
        if self.flag.device.type == "cuda":
            on_device, self.flag = self.flag, torch.empty((), dtype=torch.bool, pin_memory=True)
            self.flag.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self.flag)

    def names(self) -> list[int | str]:
        batches = [batch.tolist() if isinstance(batch, Tensor) else batch for batch in self.samples]
        return [name for batch in batches for name in batch]


class FiniteSteps(L.Callback):
    """Stops a run whose loss or gradient is not finite several steps in a row.

    In such a step the module skips optimizer and teacher; this callback counts it and lists its samples. On a GPU the
    flag is read one step later, when it has arrived. Float16 gradients that overflow because the loss scale is too high
    are not counted: the next scale is lower.

    Args:
        max_in_a_row: number of such steps in a row that stops the run.
        path: the JSON-lines file with the steps and their samples; created at the first such step.
        checkpointing: saves the run before it stops.
    """

    def __init__(self, *, max_in_a_row: int, path: Path, checkpointing: Checkpointing) -> None:
        self.max_in_a_row = max_in_a_row
        self.path = path
        self.checkpointing = checkpointing
        self.skipped = 0
        self.in_a_row = 0
        self._latest: _NonFinite | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        """Count the steps that are not finite.

        Raises:
            CollapseError: too many in a row.
        """
        if pl_module.step_result is None:
            return  # in the middle of an accumulation
        found, before = _NonFinite(pl_module.step_result), self._latest
        self._latest = found
        if found.flag.is_pinned():
            found = before
        if found is None:
            return
        if not found:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        row = {"step": found.step, "samples": _of_all_processes(found.names(), trainer)}
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.in_a_row == 1:
            log.warning("step %d: loss or gradient is not finite; the step was skipped", found.step)
        if self.in_a_row >= self.max_in_a_row:
            self.checkpointing.save_before_leaving(trainer)
            names = ", ".join(map(str, row["samples"][:8])) + (", ..." if len(row["samples"]) > 8 else "")
            raise CollapseError(
                f"training diverged: loss or gradient was not finite {self.in_a_row} times in a row, up to step "
                f"{found.step}; optimizer and teacher skipped these steps, and the run is saved. The samples "
                f"of the last were {names}"
                f" (all in {self.path}). Inspect them, or start again with a lower optimizer.lr or a longer warm-up"
            )

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _of_all_processes(names: list[int | str], trainer: L.Trainer) -> list[int | str]:
    """Gather the names of all processes. All get here, since a step that one process skips is skipped by all."""
    if trainer.world_size == 1:
        return names
    everywhere: list[list[int | str]] = [[]] * trainer.world_size
    dist.all_gather_object(everywhere, names)
    return [name for process_names in everywhere for name in process_names]


class Interruption(L.Callback):
    """Saves and ends the run at the end of a step, on all processes together, after any of them got a signal.

    At the end of each step the processes exchange the signals they received, in the background and over the host's
    network, and read the result one step later: no process waits, and all see the same result at the same step. Before
    the first step a signal ends the process at once (`stopping.Listener`).

    Must be the last callback; `trainer.fit` must run inside `listening`.

    Args:
        checkpointing: saves the run.
    """

    def __init__(self, *, checkpointing: Checkpointing) -> None:
        self.checkpointing = checkpointing
        self._peers: Peers | None = None
        self._group: dist.ProcessGroup | None = None
        self._exchange: tuple[dist.Work, Tensor] | None = None
        self._seen_step = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside this context.

        Raises:
            Interrupted: a signal came after the last step.
        """
        with listener.listening():
            try:
                yield
            finally:
                listener.noting = False
            if listener.received:
                raise Interrupted(listener.received, self.checkpointing.saved_at)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start to watch the other processes."""
        if trainer.world_size > 1:
            self._peers = Peers()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a process group for signals, separate from that for gradients."""
        self._seen_step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        listener.noting = True

    def on_train_batch_start(self, *_: object) -> None:
        """Report progress: the batch has arrived."""
        listener.moved()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Save and stop after a signal.

        Raises:
            Interrupted: a process got a signal; the run is saved.
        """
        listener.moved()
        if trainer.global_step == self._seen_step:
            return  # in the middle of an accumulation
        self._seen_step = trainer.global_step
        received = self._exchanged(last=trainer.global_step == trainer.max_steps)
        if received:
            self.checkpointing.save_before_leaving(trainer)
            raise Interrupted(received, trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the other processes that this one exits."""
        if self._peers is not None:
            self._peers.leave(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the other processes that this one has finished."""
        if self._peers is not None:
            self._peers.leave(None)

    def _exchanged(self, *, last: bool) -> int:
        """The signal that any process received by the end of the previous step; after the last step, of this one."""
        if self._group is None:
            return listener.received
        answer = self._answer()
        note = torch.tensor(listener.received)
        self._exchange = (dist.all_reduce(note, dist.ReduceOp.MAX, group=self._group, async_op=True), note)
        return max(answer, self._answer()) if last else answer

    def _answer(self) -> int:
        """Result of the latest exchange."""
        if self._exchange is None:
            return 0
        work, note = self._exchange
        self._exchange = None
        work.wait()
        return int(note)
