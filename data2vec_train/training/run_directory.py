"""The directory of a run: new, to be continued, or finished."""

import copy
import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data2vec_train import checkpoints
from data2vec_train.config.saved import COMMAND, HEAL, read_yaml
from data2vec_train.errors import ConfigError
from data2vec_train.system.moved import with_current_settings
from data2vec_train.system.outputs import lock_directory, read_rows, replace_file
from data2vec_train.training.callbacks.monitor import CSVLog
from data2vec_train.training.module import TrainingModule

log = logging.getLogger(__name__)

METRICS, SUMMARY, CONFIG, QUARANTINE, NONFINITE, PROFILE = (
    "metrics.csv",
    "summary.json",
    "config.yaml",
    "quarantine.jsonl",
    "nonfinite.jsonl",
    "profile.csv",
)
# Settings that may change when a run continues: none of them changes what is learned.
FREE = (
    "resume",
    "report",
    "cache_dir",
    "logger",
    "strategy",
    "compile",
    "stop_seconds",
    "modality.preprocessing",  # repeats other settings, for files beside the weights
    "data.num_workers",
    "data.prefetch_factor",
    "callbacks.checkpoint",
    "callbacks.monitor.progress",
    "callbacks.monitor.max_data_wait",
    "callbacks.monitor.data_wait_rows",
    "callbacks.timing",
    "trainer.accumulate_grad_batches",  # checked together with the number of processes, see data.datamodule
)


@dataclass(frozen=True)
class RunDirectory:
    """The state of a run directory.

    Attributes:
        path: the directory.
        checkpoint: the folder to continue from; None = start from the beginning.
        summary: of a finished run; None = the run is not finished.
        data: the checkpoint's record of the data, see `data.datamodule.ResumableData.facts`.
    """

    path: Path
    checkpoint: Path | None
    summary: dict[str, Any] | None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of optimizer steps that are done."""
        return 0 if self.checkpoint is None else checkpoints.step_of(self.checkpoint)


def open_run(cfg: DictConfig, path: Path) -> RunDirectory:
    """Read the state of a run directory and lock it against other processes; nothing in it is changed.

    Raises:
        ConfigError: it holds another run, a run that cannot be identified, or with `resume=never` any run.
        DamagedCheckpoint: it has checkpoints, and all are damaged.
    """
    if cfg.resume not in ("auto", "never", "changed"):
        raise ConfigError(f"resume={cfg.resume}: expected auto, never, changed, or the directory of a run")
    config = OmegaConf.to_container(cfg, resolve=True)
    summary = _read_summary(path / SUMMARY)
    finished = summary is not None and summary.get("status") == "finished"
    used = finished or (path / METRICS).exists() or (path / checkpoints.FOLDER).exists()
    if used and cfg.resume == "never":
        raise ConfigError(f"{path} already holds a run; choose another hydra.run.dir, or resume=auto to continue it")
    checkpoint = checkpoints.newest(path / checkpoints.FOLDER)
    content = {} if checkpoint is None else checkpoints.read(checkpoint / checkpoints.STATE, mapped=True)
    if used and "config" not in content and not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} holds {METRICS if (path / METRICS).exists() else SUMMARY} of a run, but neither {CONFIG} nor a "
            "checkpoint that identifies the run; choose another hydra.run.dir, or remove it"
        )
    if used and cfg.resume != "changed":
        _check_same(with_current_settings(_config_of(path) or content.get("config") or {}), config, path)
    if finished and checkpoint is None and cfg.resume == "changed":
        raise ConfigError(
            f"resume=changed: {path} is finished and has no checkpoints to continue from; choose another "
            "hydra.run.dir, or restore its checkpoints"
        )
    if finished and cfg.resume != "changed":
        return RunDirectory(path, checkpoint, summary)
    if rank_zero_only.rank == 0:
        lock_directory(path)
    return RunDirectory(path, checkpoint, None, _data_of(content))


def begin(cfg: DictConfig, run: RunDirectory) -> None:
    """Prepare the directory for the run: what was written after the checkpoint is removed."""
    if rank_zero_only.rank == 0:
        _forget(run.path, run)
        if run.checkpoint is None or not (run.path / CONFIG).is_file():
            _keep_settings(cfg, run.path)
    if run.checkpoint is not None:
        log.info("continuing after step %d: %s", run.step, run.checkpoint)


def _data_of(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of the data, copied, so that it does not refer to the mapped file."""
    return copy.deepcopy(content.get("DataModule") or content.get("FinetuneData") or {})


def change(cfg: DictConfig, run: RunDirectory, module: TrainingModule) -> None:
    """With `resume=changed`, check that the checkpoint fits the config and store the config in the run directory.

    Raises:
        ConfigError: the settings make another model, or other groups of the optimizer.
    """
    if cfg.resume != "changed" or run.checkpoint is None:
        return
    checkpoint = checkpoints.read(checkpoints.check(run.checkpoint))
    saved, now = checkpoint["state_dict"], module.state_dict()
    was, is_now = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (saved, now))
    differing = sorted(name for name in was | is_now if was.get(name) != is_now.get(name))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"resume=changed: these settings make another model than that of {run.checkpoint}: {len(differing)} "
            f"tensors differ, {first} is {is_now.get(first, 'absent')}, was {was.get(first, 'absent')}. Choose another "
            "hydra.run.dir"
        )
    optimizers = checkpoint["optimizer_states"][0], module.configure_optimizers().state_dict()
    was, is_now = ([len(group["params"]) for group in state["param_groups"]] for state in optimizers)
    if was != is_now:
        raise ConfigError(
            f"resume=changed: these settings apply weight decay or layer-wise rates to other weights than "
            f"{run.checkpoint}: the optimizer has groups of {is_now} tensors, and had {was}. Choose another "
            "hydra.run.dir"
        )
    if rank_zero_only.rank == 0:
        _keep_settings(cfg, run.path)


def _keep_settings(cfg: DictConfig, path: Path) -> None:
    """Store the config, and the command for `resume=DIR`; Hydra's own record may be of a later, refused command."""
    command = [override for override in HydraConfig.get().overrides.task if not override.startswith("resume=")]
    replace_file(path / COMMAND, OmegaConf.to_yaml(command).encode())
    replace_file(path / CONFIG, OmegaConf.to_yaml(cfg, resolve=True).encode())


def _config_of(path: Path) -> dict[str, Any] | None:
    file = path / CONFIG
    if not file.is_file():
        return None
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is damaged: it holds no settings; {HEAL}")
    return config


def _check_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Check that a run continues with its own settings.

    Raises:
        ConfigError: settings differ that change what is learned.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    differing = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(name == free or name.startswith(f"{free}.") for free in FREE)
    ]
    if differing:
        shown = ", ".join(f"{name}={new.get(name)} (was {old.get(name)})" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"{path} holds a run with other settings: {shown}{more}. Repeat its own command, or give resume={path} "
            "alone; resume=changed continues with the new settings, another hydra.run.dir starts another run"
        )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _read_summary(file: Path) -> dict[str, Any] | None:
    """The summary of a run; None if there is none, or it is damaged: a run that continues then writes it again."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        log.warning("%s is damaged, and is written again", file)
        return None
    return found


def _forget(path: Path, run: RunDirectory) -> None:
    """Remove what was written after the checkpoint."""
    if run.checkpoint is None:
        for name in (METRICS, QUARANTINE, NONFINITE, SUMMARY, "wandb_id"):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / "tensorboard", ignore_errors=True)
        return
    CSVLog(path=path / METRICS).cut(run.step)
    nonfinite = path / NONFINITE
    if nonfinite.exists():
        rows = [row for row in read_rows(nonfinite) if isinstance(row.get("step"), int) and row["step"] <= run.step]
        replace_file(nonfinite, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_summary(file: Path, summary: dict[str, Any]) -> None:
    """Write strict JSON: numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value

    replace_file(file, json.dumps(finite(summary), indent=2, allow_nan=False).encode() + b"\n")


def command_line(module: str = "data2vec_train") -> str:
    """The command that repeats this run, also if it was a member of a sweep."""
    return shlex.join(["python", "-m", module, *HydraConfig.get().overrides.task])
