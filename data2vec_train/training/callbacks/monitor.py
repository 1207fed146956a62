"""Monitoring a run: one row of metrics per logged step, a progress bar, and an error when representations collapse."""

import csv
import io
import logging
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from data2vec_train.data.loading import cores_at_hand
from data2vec_train.errors import CollapseError, ConfigError
from data2vec_train.system.constraints import checked, missing
from data2vec_train.system.outputs import replace_file
from data2vec_train.training.callbacks.checkpointing import measuring_callback
from data2vec_train.training.module import TrainingModule

log = logging.getLogger(__name__)

LONGEST_ROW = 100_000  # characters of metrics.csv; longer rows count as damaged
_ADVICE = (
    "Try a lower optimizer.lr, a longer warm-up or a higher objective.tau_start; callbacks.monitor holds the thresholds"
)


class CSVLog(Logger):
    """`metrics.csv`: a column `step`, then one per metric in the order they first appeared; one row per call.

    Lightning's own CSV logger sorts columns by name and merges nothing, which puts `step` between the others.

    Args:
        path: the file; rows are on disk when `log_metrics` returns.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = ["step", "train/loss"]
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                found = next(csv.reader([file.readline(LONGEST_ROW)]), [])
            if found[:1] == ["step"] and len(set(found)) == len(found):
                self.columns = found
            else:
                kept = self.path.with_name(f"{self.path.name}.damaged")
                log.warning("%s is damaged: a new file is started, and the old one is kept as %s", self.path, kept)
                self.path.replace(kept)

    def cut(self, step: int) -> None:
        """Remove the rows after `step`: a run that continues there logs them again."""
        if not self.path.exists():
            return
        content = self.path.read_text(encoding="utf-8", errors="replace")
        rows = list(csv.DictReader(line for line in content.splitlines() if len(line) < LONGEST_ROW))
        if not content.endswith("\n"):  # the process was killed while writing the last row
            rows = rows[:-1]
        whole = [row for row in rows if _is_row(row)]
        if len(whole) < len(rows):
            log.warning("%s: %d damaged rows are left out", self.path, len(rows) - len(whole))
        self._rewrite([row for row in whole if int(row["step"]) <= step])

    @rank_zero_only
    def save(self) -> None:
        """Flush all rows to the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> int:
        """There is one file per run."""
        return 0

    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Do nothing: the run directory holds the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; new metrics get columns at the end, earlier rows keep them empty."""
        row = {"step": step, **metrics}
        new = [column for column in row if column not in self.columns]
        if new or not self.path.exists():
            rows = []
            if self.path.exists():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, fieldnames=self.columns).writerow(row)

    def _rewrite(self, rows: list[dict]) -> None:
        """Replace the whole file at once: if the process is killed, the old or the new content is there."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.columns)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.path, text.getvalue().encode())


def _is_row(row: dict) -> bool:
    """Whether each cell is a number or empty, and there is one for each column."""
    try:
        int(row["step"])
        for cell in row.values():
            float(cell or 0)
    except (ValueError, TypeError):
        return False
    return True


class Monitor(L.Callback):
    """Composes the row of each logged step, passes it to the loggers and the progress bar, and checks for collapse.

    It must follow the callback that measures (`ProbeCallback`, `Evaluation`) in the list, because it reads its results.

    Args:
        min_target_std: a lower `train/target_std` is a collapse; None = not checked.
        min_prediction_std: a lower `train/prediction_std` is a collapse; None = not checked.
        grace_steps: no checks before this step, except at the last step of a run.
        max_data_wait: warn once if a larger share of the time is spent waiting for data, and advise what to change.
        data_wait_rows: logged steps over which the share is measured; the first, when workers start, is left out.
        progress: "bar", "lines" (one line per logged step), "none", or "auto": a bar on a terminal, lines elsewhere.
        min_feature_ratio: `train/feature_std` below this share of its value at the first step is a collapse, which the
            norms of the targets can hide from the two checks above; None = not checked.
        min_rank_ratio: the same for `probe/rankme` - 1, relative to the untrained encoder.
    """

    @checked
    def __init__(
        self,
        *,
        min_target_std: float | None,
        min_prediction_std: float | None,
        grace_steps: int,
        max_data_wait: float,
        data_wait_rows: int,
        progress: str = "auto",
        min_feature_ratio: float | None = None,
        min_rank_ratio: float | None = None,
    ) -> None:
        limits = {"train/target_std": min_target_std, "train/prediction_std": min_prediction_std}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.min_feature_ratio = min_feature_ratio
        self.min_rank_ratio = min_rank_ratio
        self.grace_steps = grace_steps
        self.max_data_wait = max_data_wait
        self.data_wait_rows = data_wait_rows
        # Rows so far; seconds of training and of waiting at its start.
        self._wait_window: tuple[int, float, float] | None = None
        self._warned_of_wait = False
        self.progress = ("bar" if sys.stderr.isatty() else "lines") if progress == "auto" else progress
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.train_seconds = 0.0  # without probes
        self.samples = 0
        self._since_log = (0.0, 0, 0.0)  # seconds, samples and seconds of waiting at the last logged step
        self._bar: _Bar | None = None
        self._started = 0.0
        self._probed_at = 0  # step of the last probe that was logged
        self._waited_before = 0.0  # for the first batch, before the clock starts
        self.waited_seconds = 0.0  # for data, while the clock runs

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock after the baselines of the probes."""
        if self.progress == "bar" and trainer.is_global_zero:
            self._bar = _Bar(trainer.max_steps, trainer.global_step)
        probe = measuring_callback(trainer)
        if trainer.global_step == 0:  # else it was logged before the run was interrupted
            self._log_row(trainer, dict(probe.metrics) if probe else {})
        self._probed_at = trainer.global_step
        self._waited_before = trainer.datamodule.loader.waited_seconds - self.waited_seconds
        self._started = time.perf_counter() - (probe.seconds if probe else 0.0) - self.train_seconds
        self._since_log = (self.train_seconds, self.samples, self.waited_seconds)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: TrainingModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log this step, without the time of its probes, and check it for collapse."""
        self.samples += len(batch) * trainer.world_size
        step = trainer.global_step
        if self._bar is not None:
            self._bar.advance(step)
        probe = measuring_callback(trainer)
        just_measured = probe is not None and probe.measured_at == step and step > self._probed_at
        result = pl_module.step_result
        if result is None or not result.metrics:  # in the middle of an accumulation, or not a logged step
            if just_measured:  # between two logged steps
                self._probed_at = step
                self._log_row(trainer, probe.metrics)
                self._check_rank(trainer)
            return
        row = {name: float(value) for name, value in result.metrics.items()}
        if math.isnan(row.get("train/feature_std", 0.0)):
            del row["train/feature_std"]  # not defined for a batch of one sample
        spent = time.perf_counter() - self._started - (probe.seconds if probe else 0.0)
        self.train_seconds = max(self.train_seconds, spent)  # a clock may run backward
        row |= self._throughput(trainer.datamodule)
        self._watch_loader(trainer)
        if just_measured:
            self._probed_at = step
            row |= probe.metrics
        self._log_row(trainer, row)
        self._check_collapse(trainer, row)
        if just_measured:
            self._check_rank(trainer)

    def _throughput(self, data: L.LightningDataModule) -> dict[str, float]:
        self.waited_seconds = data.loader.waited_seconds - self._waited_before
        seconds, samples, waits = self._since_log
        self._since_log = (self.train_seconds, self.samples, self.waited_seconds)
        elapsed = self.train_seconds - seconds
        row = {}
        if elapsed > 0:
            row["train/samples_per_second"] = (self.samples - samples) / elapsed
            row["train/data_wait"] = max(0.0, self.waited_seconds - waits) / elapsed
        if data.num_samples:
            row["train/epoch"] = self.samples / data.num_samples
        return row

    def _watch_loader(self, trainer: L.Trainer) -> None:
        """Warn once when data loading limits throughput."""
        if self._warned_of_wait:
            return
        rows, seconds, waited = self._wait_window or (-1, 0.0, 0.0)
        rows += 1
        if rows == self.data_wait_rows:
            share = (self.waited_seconds - waited) / max(self.train_seconds - seconds, 1e-9)
            self._warned_of_wait = share > self.max_data_wait
            if self._warned_of_wait and trainer.is_global_zero:
                data = trainer.datamodule
                cores = max(1, cores_at_hand() // trainer.num_devices)
                advice = loader_advice(workers=data.num_workers, cores=cores, on_device=data.on_device)
                log.warning("%.0f %% of the time is spent waiting for data: %s", 100 * share, advice)
            rows = 0
        if rows == 0:
            seconds, waited = self.train_seconds, self.waited_seconds
        self._wait_window = (rows, seconds, waited)

    def _log_row(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        if not row:
            return
        if "train/loss" in row:
            self.first = self.first or row
            self.last = row
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.show(trainer.global_step, row)
        elif self.progress == "lines":
            remaining = (trainer.max_steps - trainer.global_step) * self.train_seconds / max(trainer.global_step, 1)
            text = describe(row)
            eta = f"  ETA {_clock_time(remaining)}" if "train/loss" in row else ""
            log.info("step %d/%d  %s%s", trainer.global_step, trainer.max_steps, text, eta)

    def _check_collapse(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        """Check the metrics of a logged step.

        Raises:
            CollapseError: training diverged, or the network gives nearly the same output for different inputs.
        """
        if not math.isfinite(row["train/loss"]):
            return  # the step was skipped; `FiniteSteps` counts these
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        for name, limit in self.limits.items():
            if not math.isfinite(row[name]):
                raise CollapseError(
                    f"at step {step} {name} is {row[name]}, not a number: training diverged. Try a lower optimizer.lr "
                    "or a longer warm-up"
                )
            # Untrained predictions are small and shrink before they grow (images of 1.0: to a seventh). If the run ends
            # within the grace period, only a fall to a twentieth is a collapse.
            fallen = last and row[name] < self.first.get(name, 0.0) / 20
            if (step >= self.grace_steps or fallen) and row[name] < limit:
                raise CollapseError(
                    f"collapse at step {step}: {name} is {row[name]:.4g}, below the threshold of {limit:g}: the "
                    f"network gives (nearly) the same output everywhere. {_ADVICE}"
                )
        name = "train/feature_std"
        if self.min_feature_ratio is None or name not in row or name not in self.first:
            return
        limit = self.min_feature_ratio * self.first[name]
        if (step >= self.grace_steps or last) and row[name] < limit:
            raise CollapseError(
                f"collapse at step {step}: {name} is {row[name]:.4g}, below the threshold of {limit:.4g} "
                f"({self.min_feature_ratio:g} of the {self.first[name]:.4g} at the first step): the teacher's last "
                f"layer is (nearly) the same for different inputs, though normalised targets still vary. {_ADVICE}"
            )

    def _check_rank(self, trainer: L.Trainer) -> None:
        """Check the RankMe that the probe measured at this step; needs no labels.

        Raises:
            CollapseError: the features of all samples lie in one direction.
        """
        step, probe = trainer.global_step, measuring_callback(trainer)
        ranks = getattr(probe, "ranks", {})  # an evaluation of fine-tuning has none
        early = step < self.grace_steps and step != trainer.max_steps
        if self.min_rank_ratio is None or early or not {"untrained", "trained"} <= set(ranks):
            return
        limit = 1 + self.min_rank_ratio * (ranks["untrained"] - 1)
        if ranks["trained"] < limit:
            raise CollapseError(
                f"collapse at step {step}: probe/rankme is {ranks['trained']:.4f}, below the threshold of {limit:.4f} "
                f"(the untrained encoder has {ranks['untrained']:.4f}; at 1 the features of all samples differ only in "
                f"scale). {_ADVICE}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The numbers that the summary is made of."""
        numbers = {"first": self.first, "last": self.last, "train_seconds": self.train_seconds}
        return numbers | {"samples": self.samples, "waited_seconds": self.waited_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the numbers of `state_dict`."""
        self.first, self.last = state_dict["first"], state_dict["last"]
        self.train_seconds, self.samples = state_dict["train_seconds"], state_dict["samples"]
        self.waited_seconds = state_dict["waited_seconds"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def tensorboard_logger(*, save_dir: str, step: int) -> Logger:
    """A TensorBoard logger; TensorBoard hides what an interrupted run wrote after `step`."""
    from lightning.pytorch.loggers import TensorBoardLogger

    resumed = {"purge_step": step + 1} if step else {}
    return TensorBoardLogger(save_dir=save_dir, name="tensorboard", version="", **resumed)


def wandb_logger(
    *,
    project: str,
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    save_dir: str,
    step: int,
) -> Logger:
    """A Weights & Biases logger; offline if there is no API key, so that it never prompts.

    Args:
        project: name of the project.
        entity: user or team that owns it; None = the user's default.
        name: name of the run; None = chosen by W&B.
        group: name that several runs share.
        tags: tags of the run.
        save_dir: the run directory.
        step: number of steps done before this start.

    A run that continues keeps its id, stored in `wandb_id` in the run directory; W&B ignores steps that it already has.

    Raises:
        ConfigError: wandb is not installed.
    """
    if absent := missing("wandb", "wandb"):
        raise ConfigError(f"logger=wandb: {absent}")
    from lightning.pytorch.loggers import WandbLogger

    note = Path(save_dir) / "wandb_id"
    identity = None  # only the first process logs
    if rank_zero_only.rank == 0:
        identity = note.read_bytes()[:100].decode("utf-8", "replace").strip() if step and note.is_file() else ""
        if not re.fullmatch(r"[0-9a-f]{8}", identity):
            identity = secrets.token_hex(4)
            replace_file(note, identity.encode())
    offline = "WANDB_API_KEY" not in os.environ
    return WandbLogger(
        project=project,
        entity=entity,
        name=name,
        group=group,
        tags=list(tags),
        save_dir=save_dir,
        offline=offline,
        id=identity,
        resume="allow",
    )


def loader_advice(*, workers: int, cores: int, on_device: bool | None) -> str:
    """Advice for a run that waits for its data.

    Args:
        workers: loader processes of this process.
        cores: CPU cores for this process and its loader.
        on_device: whether samples go to the device as bytes; None if they cannot.
    """
    have = (
        f"the loader has {workers} process{'es' * (workers != 1)}, and there {'is' if cores == 1 else 'are'} {cores} "
    )
    have += "core" + "s" * (cores != 1)
    if workers < cores:
        return f"{have}; set data.num_workers={min(max(2 * workers, 1), cores)}"
    more = " or normalise on the device (data.on_device=true)" if on_device is False else ""
    return (
        f"{have}, so more would not help; read from a faster disk, store samples smaller or in shards (data=hf, "
        f"data=stream), augment less{more}"
    )


def describe(row: dict[str, float]) -> str:
    """A row as text for the terminal."""
    formats = {
        "train/loss": "loss {:.3f}",
        "train/target_std": "target std {:.3f}",
        "train/samples_per_second": "{:.0f} samples/s",
        "train/data_wait": "data wait {:.0%}",
        "probe/knn": "kNN {:.1%}",
        "probe/linear": "linear {:.1%}",
        "probe/rankme": "RankMe {:.1f}",
    }
    scores = [name for name in row if name.startswith("test/")]
    formats |= {name: name.removeprefix("test/").replace("loss", "test loss") + " {:.4g}" for name in scores}
    return "  ".join(text.format(row[name]) for name, text in formats.items() if name in row)


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Bar:
    """A rich progress bar."""

    def __init__(self, total: int, completed: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("ETA", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # On a narrow terminal only this text wraps.
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=False)),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task("", total=total, completed=completed, text="")
        self.latest: dict[str, float] = {}
        self.progress.start()

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def show(self, step: int, row: dict[str, float]) -> None:
        self.latest |= row
        self.progress.update(self.task, completed=step, text=describe(self.latest))

    def stop(self) -> None:
        self.progress.stop()
