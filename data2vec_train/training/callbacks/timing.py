"""Wall time of a whole run by part, from the start of the process to the report (`callbacks.timing`).

The parts are those of a pretraining step, what comes before and after, and the callbacks. Methods of the run's objects
are wrapped in timers; a run without this callback has none of them. Times are the host's: on a GPU the work of a part
may still run during the next part.
"""

import csv
import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

import data2vec_train
from data2vec_train.data.datamodule import DataModule, TimedLoader
from data2vec_train.system.outputs import replace_file
from data2vec_train.training.callbacks.checkpointing import Checkpointing
from data2vec_train.training.callbacks.monitor import Monitor
from data2vec_train.training.callbacks.probe import ProbeCallback
from data2vec_train.training.module import Data2VecModule

COMMAND, SETUP, WAIT = "command, config, imports", "setup: model, data, trainer", "data wait"
TEACHER, STUDENT, BACKWARD = "forward: teacher and targets", "forward: student, decoder, loss", "backward"
CLIP, OPTIMIZER, EMA = "clip", "optimizer", "EMA"
PROBES, ENCODE, LOG, SAVE = "probes: the rest", "probes: forward", "monitor and logs", "checkpoints"
REPORT, REST = "report", "Lightning and the rest"
PARTS = (COMMAND, SETUP, WAIT, TEACHER, STUDENT, BACKWARD, CLIP, OPTIMIZER, EMA, ENCODE, PROBES, LOG, SAVE, REST)
PARTS += (REPORT,)
TRAINING = (TEACHER, STUDENT, BACKWARD, OPTIMIZER, EMA)


class Timing:
    """A clock that charges one part at a time; a nested part pauses the outer one.

    Wall time counts from the import of this package, CPU time from the start of the process.
    """

    def __init__(self) -> None:
        self.seconds = {part: [0.0, 0.0] for part in PARTS}  # wall, CPU of all threads
        self._open = [COMMAND]
        self._since = (data2vec_train.STARTED, 0.0)
        self.switch(SETUP)

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        spent = self.seconds[self._open[-1]]
        spent[0] += max(0.0, now[0] - self._since[0])
        spent[1] += max(0.0, now[1] - self._since[1])
        self._since = now

    def switch(self, part: str) -> None:
        """From now on charge `part`, except inside nested parts."""
        self._charge()
        self._open[-1] = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge `name` inside this context; forward passes of probes are charged to `ENCODE`."""
        if name in (TEACHER, STUDENT, ENCODE):
            outer = self._open[-1]
            name = ENCODE if PROBES in self._open else outer if name == ENCODE else name
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def watch(self, trainer: L.Trainer, module: Data2VecModule, data: DataModule) -> None:
        """Wrap in timers what `trainer.fit` is about to call."""
        self.switch(REST)
        objective = module.objective
        self._time(objective, "forward", STUDENT)
        self._time(objective, "compute_targets", TEACHER)
        self._time(objective, "step_teacher", EMA)
        for encoder in (objective.student, objective.teacher.encoder):
            self._time(encoder, "embed", ENCODE)
            self._time(encoder, "contextualize", ENCODE)
        self._time(module, "backward", BACKWARD)
        self._time(module, "configure_gradient_clipping", CLIP)
        for callback in trainer.callbacks:
            for kind, name in ((ProbeCallback, PROBES), (Monitor, LOG), (Checkpointing, SAVE)):
                if isinstance(callback, kind):
                    self._time(callback, "on_train_start", name)
                    self._time(callback, "on_train_batch_end", name)
                    self._time(callback, "on_train_end", name)
        configure, load = module.configure_optimizers, data.train_dataloader

        def configure_optimizers() -> Any:
            optimizer = configure()
            step = optimizer.step

            def timed(closure: Callable[[], Any]) -> Any:
                def rest() -> Any:  # forward, backward and clip are nested
                    with self.part(REST):
                        return closure()

                with self.part(OPTIMIZER):
                    return step(rest)

            optimizer.step = timed
            return optimizer

        def train_dataloader() -> TimedLoader:
            loader = load()
            loader.loader = _Timed(loader.loader, self)
            return loader

        module.configure_optimizers, data.train_dataloader = configure_optimizers, train_dataloader

    def _time(self, owner: object, method: str, part: str) -> None:
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        setattr(owner, method, timed)

    def rows(self) -> list[dict[str, str | float]]:
        """One row per part, then the sum and the time outside `TRAINING`: seconds and shares of wall and CPU time."""
        self._charge()
        sums = {part: tuple(spent) for part, spent in self.seconds.items()}
        total = [sum(column) or 1.0 for column in zip(*sums.values(), strict=True)]
        inside = [sum(sums[part][clock] for part in TRAINING) for clock in (0, 1)]
        sums["all"] = tuple(total)
        sums["outside forward, backward, optimizer, EMA"] = tuple(a - b for a, b in zip(total, inside, strict=True))
        return [
            {
                "part": part,
                "wall_s": round(wall, 3),
                "wall_share": round(wall / total[0], 4),
                "cpu_s": round(cpu, 3),
                "cpu_share": round(cpu / total[1], 4),
            }
            for part, (wall, cpu) in sums.items()
        ]

    def write(self, path: Path) -> str:
        """Write the table as CSV, and return it as text."""
        rows = self.rows()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, text.getvalue().encode())
        return table(rows)


class _Timed:
    """Batches of a loader; the wait for them is charged to `WAIT`."""

    def __init__(self, batches: Iterable, timing: Timing) -> None:
        self.batches = batches
        self.timing = timing

    def __iter__(self) -> Iterator:
        with self.timing.part(WAIT):
            batches = iter(self.batches)
        while True:
            with self.timing.part(WAIT):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def table(rows: list[dict[str, str | float]]) -> str:
    """The rows as a text table."""
    lines = [f"{'part':<42} {'wall s':>8} {'share':>6} {'CPU s':>8} {'share':>6}"]
    for row in rows:
        shares = f"{row['wall_s']:>8.2f} {row['wall_share']:>6.1%} {row['cpu_s']:>8.2f} {row['cpu_share']:>6.1%}"
        lines.append(f"{row['part']:<42} {shares}")
    return "\n".join(lines)
