"""Callbacks that a command or a recipe adds: `+callbacks.NAME._target_=lightning.pytorch.callbacks.EarlyStopping`."""

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import DictConfig

from data2vec_train.config.build import build
from data2vec_train.errors import ConfigError
from data2vec_train.system.constraints import OWN_CALLBACKS
from data2vec_train.training.callbacks.checkpointing import measuring_callback


def extra_callbacks(callbacks: DictConfig) -> list[L.Callback]:
    """The callbacks of a config that are not the program's own.

    Raises:
        ConfigError: a target is not a callback of Lightning.
    """
    found = []
    for name in sorted(set(callbacks) - set(OWN_CALLBACKS)):
        # There are no validation epochs here; `AfterMeasurement` calls it instead.
        is_stopping = str(callbacks[name].get("_target_")).endswith(".EarlyStopping")
        callback = build(callbacks[name], **({"check_on_train_epoch_end": False} if is_stopping else {}))
        if not isinstance(callback, L.Callback):
            raise ConfigError(f"callbacks.{name}: {callbacks[name]._target_} is not a callback of Lightning")
        found.append(callback)
    return found


class AfterMeasurement(L.Callback):
    """Runs early stopping after each measurement of the probes or of the test.

    Stands behind the measuring callback in the trainer's list, and before the one that saves.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what early stopping monitors before the first step.

        Raises:
            ConfigError: the run does not measure it.
        """
        self._seen_at = trainer.global_step
        measuring = measuring_callback(trainer)
        if measuring is None or measuring.metrics:
            _check(trainer, measuring)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Compare the newest measurement with those before."""
        measuring, step = measuring_callback(trainer), trainer.global_step
        if measuring is None or measuring.measured_at != step or step == self._seen_at:
            return
        self._seen_at = step
        _check(trainer, measuring)
        for callback in _stopping(trainer):
            callback.on_validation_end(trainer, pl_module)


def _check(trainer: L.Trainer, measuring: L.Callback | None) -> None:
    known = [] if measuring is None else sorted(measuring.metrics)
    for callback in _stopping(trainer):
        if callback.monitor not in known:
            raise ConfigError(
                f"callbacks: EarlyStopping monitors {callback.monitor!r}; this run measures "
                f"{', '.join(known) or 'nothing: it has no test records'}"
            )


def _stopping(trainer: L.Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]
