"""When a run is saved, how it is stopped, and how it goes on: between Lightning's trainer and `checkpoints.py`."""

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

    A failure to write is kept in `failure`, since the other processes wait for this one at that moment.

    Args:
        asynchronous: copy the state to the host's memory and write it in a thread. The next save waits for the last.
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
        """Until what is being written is on the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load_checkpoint(self, path: str | Path, *args: object, **kwargs: object) -> dict[str, Any]:
        """The content of the folder `path`."""
        return checkpoints.read(checkpoints.check(Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Never asked for: `checkpoints.write` removes what is not kept."""
        raise NotImplementedError

    def teardown(self) -> None:
        """See `wait`."""
        self.wait()


def _on_host(value: Any) -> Any:
    """A copy of a state that later steps cannot change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(one) for one in value)
    return value


class Checkpointing(L.Callback):
    """Saves the run every n steps, at the end, and after the best measurement so far.

    Must come after the callbacks that measure and log in the list, so that a checkpoint has the results of its step.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep_last: how many of the newest stay; the best stays as well.
        asynchronous: see `FolderCheckpointIO`.
        directory: `RUN/checkpoints`.
        config: of the run, as plain containers; every checkpoint has it, so that the model can be rebuilt from it.
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
        """Clear away what an interrupted writer left."""
        if trainer.is_global_zero:
            sweep(self.directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on is saved already."""
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Save when it is time."""
        step = trainer.global_step
        if step == self.saved_at:
            return
        is_best = self._is_best(trainer)
        if is_best or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer, is_best=is_best)

    def _is_best(self, trainer: L.Trainer) -> bool:
        """Whether this step was measured, and better than all before."""
        measuring = measuring_callback(trainer)
        step = None if measuring is None else measuring.best_step
        if trainer.world_size > 1 and measuring is not None and measuring.measured_at == trainer.global_step:
            step = trainer.strategy.broadcast(step)  # scores may differ in their last bits, and all decide alike
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
        """Have a checkpoint of this step on the disk, on all processes together.

        Raises:
            SaveError: it could not be written.
        """
        if self.saved_at != trainer.global_step:
            self.save(trainer)
        self._finish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last checkpoint."""
        self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        with listener.patient(10):
            self.io.wait()
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        """All processes learn whether the one that writes could."""
        failure = self.io.failure
        text = None if failure is None else _describe(failure, self.directory)
        text = trainer.strategy.broadcast(text) if trainer.world_size > 1 else text
        if text is not None:
            raise SaveError(text)


def _describe(error: OSError, directory: Path) -> str:
    run = directory.parent if directory.name == checkpoints.FOLDER else directory
    if lost(run):
        return (
            f"{run} was removed, or replaced by another directory, while the run was at work in it; nothing more is "
            "written there. Give the same command again, or another hydra.run.dir"
        )
    return (
        f"the run could not be saved in {directory}: {error.strerror or error}. Earlier checkpoints there are as they "
        "were. Make room or bring the disk back, and give the same command again: the run goes on from the last of them"
    )


@contextlib.contextmanager
def disk_trouble(directory: Path) -> Iterator[None]:
    """Inside, a disk that is full, gone or not writable ends the run with one sentence.

    Raises:
        SaveError: it happened.
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
    """Whether a step was not finite, on its way from the device to the host."""

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

    The module keeps such a step from the optimizer and the teacher; here it is counted and its samples are listed. On
    a GPU the answer is read one step later, when it has arrived. Gradients that overflow in float16 because the loss
    was scaled too far are not counted: the next scale is lower.

    Args:
        max_in_a_row: so many of these steps in a row stop the run.
        path: the JSON-lines file with the steps and their samples; it appears with the first.
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
        """Count.

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
            log.warning("step %d: loss or gradient is not finite; the step was passed over", found.step)
        if self.in_a_row >= self.max_in_a_row:
            self.checkpointing.save_before_leaving(trainer)
            names = ", ".join(map(str, row["samples"][:8])) + (", ..." if len(row["samples"]) > 8 else "")
            raise CollapseError(
                f"training diverged: loss or gradient was not finite {self.in_a_row} times in a row, up to step "
                f"{found.step}; neither weights nor teacher have seen these steps, and the run is saved. The samples "
                f"of the last were {names}"
                f" (all in {self.path}). Look at them, or start anew with a lower optimizer.lr or a longer warm-up"
            )

    def state_dict(self) -> dict[str, int]:
        """Counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See `state_dict`."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _of_all_processes(names: list[int | str], trainer: L.Trainer) -> list[int | str]:
    """All of them are at this place: a step that one skips is skipped by all."""
    if trainer.world_size == 1:
        return names
    everywhere: list[list[int | str]] = [[]] * trainer.world_size
    dist.all_gather_object(everywhere, names)
    return [name for one in everywhere for name in one]


class Interruption(L.Callback):
    """Ends the run at the edge of a step, saved, on all processes together, when any of them got a signal.

    At the end of each step the processes exchange what they were told in the background, over the host's network, and
    read the answer one step later: nobody waits, and all see the same answer at the same step. Before the first step
    a signal ends the process where it is (`stopping.Listener`).

    Must be the last callback. `listening` has to be open around `trainer.fit`.

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
        """Inside, signals are heard.

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
        """Look after the other processes."""
        if trainer.world_size > 1:
            self._peers = Peers()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a channel between the processes beside the one for gradients."""
        self._seen_step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        listener.noting = True

    def on_train_batch_start(self, *_: object) -> None:
        """The data has come."""
        listener.moved()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Stop when it is time.

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
        """Tell the other processes that this one leaves."""
        if self._peers is not None:
            self._peers.leave(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Likewise, when all is done."""
        if self._peers is not None:
            self._peers.leave(None)

    def _exchanged(self, *, last: bool) -> int:
        """What was received anywhere, as of the step before this one; after the last step, of this one."""
        if self._group is None:
            return listener.received
        answer = self._answer()
        note = torch.tensor(listener.received)
        self._exchange = (dist.all_reduce(note, dist.ReduceOp.MAX, group=self._group, async_op=True), note)
        return max(answer, self._answer()) if last else answer

    def _answer(self) -> int:
        """What the latest exchange gave."""
        if self._exchange is None:
            return 0
        work, note = self._exchange
        self._exchange = None
        work.wait()
        return int(note)
