"""The directory of a run: started anew, gone on with, or finished already."""

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
# What a run may go on without or with more of: nothing here changes what is learned.
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
    "trainer.accumulate_grad_batches",  # judged together with the number of processes, see data.datamodule
)


@dataclass(frozen=True)
class RunDirectory:
    """Where a run stands.

    Attributes:
        path: the directory.
        checkpoint: the folder to go on from; None = from the beginning.
        summary: of a run that is finished; None = there is something to do.
        data: what the checkpoint keeps of the data, see `data.datamodule.ResumableData.facts`.
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
    """Find out what is in a run directory, and keep other processes out; nothing in it is changed.

    Raises:
        ConfigError: it holds another run, or one that cannot be told, or with `resume=never` any.
        DamagedCheckpoint: it has checkpoints, and none is whole.
    """
    if cfg.resume not in ("auto", "never", "changed"):
        raise ConfigError(f"resume={cfg.resume}: expected auto, never, changed, or the directory of a run")
    config = OmegaConf.to_container(cfg, resolve=True)
    summary = _read_summary(path / SUMMARY)
    finished = summary is not None and summary.get("status") == "finished"
    used = finished or (path / METRICS).exists() or (path / checkpoints.FOLDER).exists()
    if used and cfg.resume == "never":
        raise ConfigError(f"{path} already holds a run; choose another hydra.run.dir, or resume=auto to go on with it")
    checkpoint = checkpoints.newest(path / checkpoints.FOLDER)
    content = {} if checkpoint is None else checkpoints.read(checkpoint / checkpoints.STATE, mapped=True)
    if used and "config" not in content and not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} holds {METRICS if (path / METRICS).exists() else SUMMARY} of a run, and neither {CONFIG} nor a "
            "checkpoint that says which run: choose another hydra.run.dir, or remove it"
        )
    if used and cfg.resume != "changed":
        _check_same(with_current_settings(_config_of(path) or content.get("config") or {}), config, path)
    if finished and checkpoint is None and cfg.resume == "changed":
        raise ConfigError(
            f"resume=changed: {path} is finished and has no checkpoints to go on from; choose another hydra.run.dir, "
            "or bring its checkpoints back"
        )
    if finished and cfg.resume != "changed":
        return RunDirectory(path, checkpoint, summary)
    if rank_zero_only.rank == 0:
        lock_directory(path)
    return RunDirectory(path, checkpoint, None, _data_of(content))


def begin(cfg: DictConfig, run: RunDirectory) -> None:
    """Make the directory ready for the run: what lies behind the checkpoint is forgotten."""
    if rank_zero_only.rank == 0:
        _forget(run.path, run)
        if run.checkpoint is None or not (run.path / CONFIG).is_file():
            _keep_settings(cfg, run.path)
    if run.checkpoint is not None:
        log.info("going on after step %d: %s", run.step, run.checkpoint)


def _data_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of the data, without a tie to its file."""
    return copy.deepcopy(content.get("DataModule") or content.get("FinetuneData") or {})


def change(cfg: DictConfig, run: RunDirectory, module: TrainingModule) -> None:
    """With `resume=changed` make the config that of the run, once its checkpoint is known to fit.

    Raises:
        ConfigError: the settings make another model, or give other weights to the optimizer's groups.
    """
    if cfg.resume != "changed" or run.checkpoint is None:
        return
    checkpoint = checkpoints.read(checkpoints.check(run.checkpoint))
    saved, now = checkpoint["state_dict"], module.state_dict()
    was, is_now = ({name: tuple(one.shape) for name, one in state.items()} for state in (saved, now))
    differing = sorted(name for name in was | is_now if was.get(name) != is_now.get(name))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"resume=changed: these settings make another model than that of {run.checkpoint}: {len(differing)} "
            f"tensors differ, {first} is {is_now.get(first, 'absent')}, was {was.get(first, 'absent')}. Choose another "
            "hydra.run.dir"
        )
    optimizers = checkpoint["optimizer_states"][0], module.configure_optimizers().state_dict()
    was, is_now = ([len(group["params"]) for group in one["param_groups"]] for one in optimizers)
    if was != is_now:
        raise ConfigError(
            f"resume=changed: these settings decay, or slow down, other weights than those of {run.checkpoint}: the "
            f"optimizer has groups of {is_now} tensors, and had {was}. Choose another hydra.run.dir"
        )
    if rank_zero_only.rank == 0:
        _keep_settings(cfg, run.path)


def _keep_settings(cfg: DictConfig, path: Path) -> None:
    """The config, and the command for `resume=DIR`: Hydra's own record is of the latest, refused ones included."""
    command = [one for one in HydraConfig.get().overrides.task if not one.startswith("resume=")]
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
    """A run goes on with its own settings.

    Raises:
        ConfigError: settings differ that change what is learned.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    differing = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not any(name == one or name.startswith(f"{one}.") for one in FREE)
    ]
    if differing:
        shown = ", ".join(f"{name}={new.get(name)} (was {old.get(name)})" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"{path} holds a run with other settings: {shown}{more}. Give its own command again, or resume={path} "
            "alone; resume=changed goes on with the new settings, and another hydra.run.dir starts another run"
        )


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _read_summary(file: Path) -> dict[str, Any] | None:
    """What a run reached; None if it has not finished, or the file is damaged: then the last steps say it again."""
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
    """Take away what was written after the checkpoint."""
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
    """As JSON that any reader takes: what is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(one) for key, one in value.items()}
        return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value

    replace_file(file, json.dumps(finite(summary), indent=2, allow_nan=False).encode() + b"\n")


def command_line(module: str = "data2vec_train") -> str:
    """A command that makes this run again, also when it was a member of a sweep."""
    return shlex.join(["python", "-m", module, *HydraConfig.get().overrides.task])
