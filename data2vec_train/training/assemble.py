"""Builds the parts of a run from a composed config: objective, data, trainer."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.build import build
from data2vec_train.config.inputs import look_at_images
from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.errors import CollapseError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.system.compat import own_processes
from data2vec_train.system.stopping import listener
from data2vec_train.training.callbacks.checkpointing import Checkpointing, Interruption, disk_trouble
from data2vec_train.training.callbacks.extra import AfterMeasurement, extra_callbacks
from data2vec_train.training.callbacks.monitor import CSVLog
from data2vec_train.training.distributed import keep_whole
from data2vec_train.training.module import Data2VecModule
from data2vec_train.training.precision import (
    choose_precision,
    compile_blocks,
    device_type,
    trainer_precision,
    use_float8,
)
from data2vec_train.training.records import Sources
from data2vec_train.training.run_directory import (
    METRICS,
    NONFINITE,
    QUARANTINE,
    RunDirectory,
)

log = logging.getLogger(__name__)


def build_objective(cfg: DictConfig) -> Data2Vec:
    """Student, teacher, decoder and loss of a composed config."""
    return build(cfg.objective)


def build_collator(cfg: DictConfig, *, encoder: ModalityEncoder) -> Collator:
    """The collator that makes batches with masks, for the number of tokens that `encoder` makes of an input."""
    modality = cfg.modality
    return Collator(
        masker=build(modality.masker),
        masks_per_sample=cfg.objective.masks_per_sample,
        grid=encoder.grid,
        token_count=encoder.token_count,
        seed=cfg.seed,
        pad_value=modality.pad_value,
        corruption=build(modality.corruption),
        legacy_teacher_input=modality.legacy_teacher_input,
    )


def build_data(
    cfg: DictConfig, sources: Sources, *, encoder: ModalityEncoder, run_dir: Path, split: dict[str, Any] | None = None
) -> DataModule:
    """The DataModule of a composed config.

    Args:
        cfg: the config.
        sources: from `build_sources`.
        encoder: gives the number of tokens of an input.
        run_dir: where broken samples are listed.
        split: of the run that is continued, see `DataModule`.
    """
    data, modality = cfg.data, cfg.modality
    source, test_source = sources["source"], sources.get("test_source")
    look_at_images(cfg, source)
    prepare = build(modality.prepare)
    if prepare is not None:
        source = prepare(source)
        shared = {"tokenizer": source.tokenizer} if hasattr(source, "tokenizer") else {}
        test_source = None if test_source is None else prepare(test_source, **shared)
    return DataModule(
        source=source,
        test_source=test_source,
        held_out_fraction=data.held_out_fraction,
        max_probe_samples=data.max_probe_samples,
        decode=build(modality.decode),
        transform=build(modality.transform),
        batching=build(modality.batching),
        collator=build_collator(cfg, encoder=encoder),
        batch_size_per_device=data.batch_size_per_device,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        max_bad_fraction=data.max_bad_fraction,
        tolerated_bad_samples=data.tolerated_bad_samples,
        quarantine_path=run_dir / QUARANTINE,
        seed=cfg.seed,
        changed_steps=cfg.resume == "changed",
        on_device=data.on_device,
        split=split,
    )


def build_module(cfg: DictConfig, objective: Data2Vec) -> Data2VecModule:
    """What Lightning trains: the objective with its optimizer and schedule."""
    return Data2VecModule(
        objective=objective,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.scheduler),
        seed=cfg.seed,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
    )


def make_fast(cfg: DictConfig, objective: Data2Vec) -> str:
    """Compile the blocks and convert them to float8, as configured; returns the precision of the run."""
    device = device_type(cfg.strategy.accelerator)
    precision = choose_precision(cfg.precision.trainer, device)
    if precision == "fp8-mixed":
        use_float8(objective.student)
    lengths_vary = cfg.modality.batching is not None
    compile_blocks(objective, how=cfg.compile, device=device, lengths_vary=lengths_vary, backend="inductor")
    return precision


def build_trainer(
    cfg: DictConfig,
    run: RunDirectory,
    callbacks: list[L.Callback],
    checkpointing: Checkpointing,
    precision: str,
    loggers: Sequence[Logger] = (),
) -> L.Trainer:
    """Lightning's trainer with what all runs have: checkpoints, a check for finite steps, signals, loggers.

    Args:
        cfg: the config.
        run: the run directory.
        callbacks: those that measure, then the monitor.
        checkpointing: saves the run.
        precision: result of `choose_precision`.
        loggers: that act beside those of the config.
    """
    arithmetic = trainer_precision(precision)
    finite = build(cfg.callbacks.finite)(path=run.path / NONFINITE, checkpointing=checkpointing)
    own = [build(node)(save_dir=str(run.path), step=run.step) for node in cfg.logger.values()]
    trainer: L.Trainer = build(
        cfg.trainer,
        callbacks=[
            *extra_callbacks(cfg.callbacks),
            *callbacks,
            AfterMeasurement(),
            checkpointing,
            finite,
            Interruption(checkpointing=checkpointing),
        ],
        logger=[CSVLog(path=run.path / METRICS), *own, *loggers],
        plugins=[checkpointing.io, *arithmetic.pop("plugins", [])],
        default_root_dir=run.path,
        enable_checkpointing=False,  # Lightning's own; `checkpointing` saves
        **arithmetic,
        **build(cfg.strategy),
    )
    for logger in (*own, *loggers):
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    own_processes(trainer)
    listener.patience_s = cfg.stop_seconds
    return trainer


def fit_or_collapse(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, run: RunDirectory
) -> CollapseError | None:
    """Train; returns a collapse instead of raising it, so that a report can show its curves.

    Raises:
        Interrupted: a signal came.
        SaveError: the disk is full, gone or not writable.
    """
    interruption = next(callback for callback in trainer.callbacks if isinstance(callback, Interruption))
    try:
        with interruption.listening(), disk_trouble(run.path):
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
    except CollapseError as error:
        collapse = error
    else:
        collapse = None
    keep_whole(module)  # the first process writes the report alone
    broken = data.quarantine.reasons
    if broken:
        log.info("left out: %d broken sample%s, see %s", len(broken), "s"[: len(broken) > 1], data.quarantine.path)
    return collapse


def global_batch(cfg: DictConfig, devices: int) -> str:
    """The global batch of one optimizer step as text; an upper limit if lengths vary."""
    size, micro, batching = (
        cfg.data.batch_size_per_device,
        cfg.trainer.accumulate_grad_batches,
        build(cfg.modality.batching),
    )
    times = f"{micro} micro-batch{'es' * (micro != 1)} x {devices} device{'s' * (devices != 1)}"
    amounts = [] if size is None else [f"{size * micro * devices:,} samples ({size} x {times})"]
    if batching is not None:
        rate = cfg.modality.get("frames_per_second") or cfg.modality.get("sample_rate_hz")
        unit, budget = ("s of sound", batching.budget / rate) if rate else ("tokens", batching.budget)
        amounts.append(f"{budget * micro * devices:,.10g} {unit} ({budget:,.10g} x {times})")
    return f"{'at most ' * (batching is not None)}{' and '.join(amounts)} in an optimizer step"


def quiet_libraries() -> None:
    """Silence Lightning's advertisements and the hints that do not apply here; its other warnings stay.

    Of several processes, only the first logs more than warnings.
    """
    logging.raiseExceptions = False  # with the terminal closed, each log line would print a traceback
    if rank_zero_only.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*`training_step` returned.*",
        r"Checkpoint directory .* exists and is not empty",
        r".*isinstance\(treespec, LeafSpec\).*",
        r"The number of training batches .* is smaller than the logging interval",
        r"Found \d+ module\(s\) in eval mode",  # the teacher, on purpose
        r"FSDP2-wrapped module \(.*\) returned a view tensor",  # no code changes the view in place
    ):
        warnings.filterwarnings("ignore", message=message)
