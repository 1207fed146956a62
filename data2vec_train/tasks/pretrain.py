"""Pretraining: build everything from the config, train, write the run directory."""

import logging
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data2vec_train import checkpoints
from data2vec_train.clock import seconds_since
from data2vec_train.compat import own_processes
from data2vec_train.config import build
from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.tokenizer import Tokenizer
from data2vec_train.data2vec import Data2Vec
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.errors import CollapseError, ConfigError
from data2vec_train.hf.convert import PREPROCESSING_FOLDER
from data2vec_train.hf.files import write_json
from data2vec_train.hf.tokenizers import EXAMPLES_NAME, TextTokenizer
from data2vec_train.module import Data2VecModule
from data2vec_train.monitor import CSVLog, Monitor
from data2vec_train.parallel import keep_whole
from data2vec_train.probes.callback import ProbeCallback
from data2vec_train.runtime import (
    choose_precision,
    compile_blocks,
    device_type,
    trainer_precision,
    uncompiled,
    use_float8,
)
from data2vec_train.saving import Checkpointing, Interruption, disk_trouble
from data2vec_train.stopping import listener
from data2vec_train.tasks.init_from import adopt, initialise
from data2vec_train.tasks.inputs import given_settings, look_at_images
from data2vec_train.tasks.records import Sources, build_sources, same_data, same_tokenizer
from data2vec_train.tasks.run_directory import (
    METRICS,
    NONFINITE,
    PROFILE,
    QUARANTINE,
    SUMMARY,
    RunDirectory,
    begin,
    change,
    open_run,
    write_summary,
)
from data2vec_train.timing import REPORT, Timing

log = logging.getLogger(__name__)


def build_objective(cfg: DictConfig) -> Data2Vec:
    """Student, teacher, decoder and loss of a composed config."""
    return build(cfg.objective)


def build_collator(cfg: DictConfig, *, encoder: ModalityEncoder) -> Collator:
    """What makes batches with masks, for an encoder that says how many tokens an input gives."""
    modality = cfg.modality
    return Collator(
        masker=build(modality.masker),
        views=cfg.objective.views,
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
        sources: of `build_sources`.
        encoder: says how many tokens an input gives.
        run_dir: where broken samples are listed.
        split: of the run that goes on, see `DataModule`.
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


def write_preprocessing(cfg: DictConfig, data: DataModule, folder: Path) -> None:
    """Say beside the weights how inputs are prepared, in the files that `transformers` reads."""
    described = build(cfg.modality.preprocessing)
    if described is not None:
        described.save_pretrained(folder)
    if hasattr(data.source, "tokenizer"):
        write_tokenizer(data.source.tokenizer, getattr(data.source, "examples", []), folder, cfg.modality.block_tokens)


def write_tokenizer(tokenizer: Tokenizer, texts: Sequence[str], folder: Path, block_tokens: int) -> None:
    """Write a tokenizer's files, read them back, and compare the ids of texts.

    Args:
        tokenizer: of the run.
        texts: some of its data; they are kept with their ids, for `export` to compare other readers on.
        folder: where to.
        block_tokens: longest input.

    Raises:
        ConfigError: what is read back gives other ids.
    """
    content, names = tokenizer.to_json(), tokenizer.special_tokens
    TextTokenizer.from_json(content, tokens=names, model_max_length=block_tokens).save_pretrained(folder)
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    again = TextTokenizer.from_pretrained(folder)
    for text, row in zip(texts, ids, strict=True):
        found = again(text, add_special_tokens=False)["input_ids"]
        if found != row:
            raise ConfigError(
                f"modality.tokenizer: {text[:60]!r} has the ids {row[:10]} here and {found[:10]} in {folder}, from "
                "where later programs read it; use another tokenizer"
            )
    write_json(folder / EXAMPLES_NAME, {"texts": list(texts), "ids": ids})


def pretrain(cfg: DictConfig) -> float | None:
    """Train one encoder and return its last kNN accuracy, or RankMe without labels (for sweeps that optimise).

    Writes into Hydra's run directory: `config.yaml`, `metrics.csv`, `checkpoints/`, `summary.json`, `report.html`, and
    `quarantine.jsonl` when samples were broken. Where the directory has a checkpoint of this run, it goes on there.
    """
    started = time.perf_counter()
    quiet_libraries()
    timing = Timing() if cfg.callbacks.timing else None
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    start = None
    if cfg.init_from is not None:
        start = adopt(cfg, given_settings())
    run = open_run(cfg, run_dir)
    if run.summary is not None:
        log.info("%s is finished already", run_dir)
        return _score(run.summary)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)

    objective = build_objective(cfg)
    if start is not None and run.checkpoint is None:
        notes = initialise(objective, start, str(cfg.init_from), fresh_teacher=cfg.fresh_teacher)
        log.info("weights: %s", "; ".join([str(cfg.init_from), *notes]))
    precision = make_fast(cfg, objective)
    sources = build_sources(cfg.data)
    identity = same_data(cfg, run, sources)
    begin(cfg, run)
    data = build_data(cfg, sources, encoder=objective.student, run_dir=run_dir, split=run.data.get("split"))
    data.facts |= {"identity": identity, "tokenizer": same_tokenizer(run, data.source)}
    if rank_zero_only.rank == 0:
        write_preprocessing(cfg, data, run_dir / PREPROCESSING_FOLDER)
    module = Data2VecModule(
        objective=objective,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.scheduler),
        seed=cfg.seed,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
    )
    change(cfg, run, module)
    probe, monitor = build(cfg.callbacks.probe), build(cfg.callbacks.monitor)
    checkpointing: Checkpointing = build(cfg.callbacks.checkpoint)(
        directory=run_dir / checkpoints.FOLDER,
        config=OmegaConf.to_container(cfg, resolve=True),
    )
    trainer = build_trainer(cfg, run, [probe, monitor], checkpointing, precision)
    _describe(cfg, objective, data, run_dir, trainer.world_size)
    if timing is not None:
        timing.watch(trainer, module, data)
    collapse = fit_or_collapse(trainer, module, data, run)

    if timing is not None:
        timing.switch(REPORT)
    summary = _summary(cfg, trainer, monitor, probe, data, seconds=seconds_since(started))
    summary["precision"] = precision
    summary["status"] = "finished" if collapse is None else "collapsed"
    if trainer.is_global_zero:
        if cfg.report:
            from data2vec_train.tasks.run_report import write_run_report

            with uncompiled():
                report = write_run_report(cfg, run_dir=run_dir, objective=objective, data=data, summary=summary)
            log.info("report: %s", report)
        write_summary(run_dir / SUMMARY, summary)  # last: it says that all the rest is there
        if timing is not None:
            log.info("%s", timing.write(run_dir / PROFILE))
    if collapse is not None:
        raise collapse
    return _score(summary)


def make_fast(cfg: DictConfig, objective: Data2Vec) -> str:
    """Compile the blocks, and put float8 into them, where the config says so; returns the precision of the run."""
    device = device_type(cfg.strategy.accelerator)
    precision = choose_precision(cfg.precision.trainer, device)
    if precision == "fp8-mixed":
        use_float8(objective.student)
    lengths_vary = cfg.modality.batching is not None
    compile_blocks(objective, how=cfg.compile, device=device, lengths_vary=lengths_vary, backend="inductor")
    return precision


def _score(summary: dict) -> float | None:
    return summary["probe"]["knn"]["trained"] if summary.get("probe") else summary.get("rankme")


def build_trainer(
    cfg: DictConfig, run: RunDirectory, callbacks: list[L.Callback], checkpointing: Checkpointing, precision: str
) -> L.Trainer:
    """Lightning's trainer with what all runs have: checkpoints, a watch over numbers, signals, loggers.

    Args:
        cfg: the config.
        run: where the run stands.
        callbacks: those that measure, then the monitor.
        checkpointing: saves the run.
        precision: what `choose_precision` says.
    """
    arithmetic = trainer_precision(precision)
    finite = build(cfg.callbacks.finite)(path=run.path / NONFINITE, checkpointing=checkpointing)
    loggers = [build(node)(save_dir=str(run.path), step=run.step) for node in cfg.logger.values()]
    trainer: L.Trainer = build(
        cfg.trainer,
        callbacks=[*callbacks, checkpointing, finite, Interruption(checkpointing=checkpointing)],
        logger=[CSVLog(path=run.path / METRICS), *loggers],
        plugins=[checkpointing.io, *arithmetic.pop("plugins", [])],
        default_root_dir=run.path,
        enable_checkpointing=False,  # Lightning's own
        **arithmetic,
        **build(cfg.strategy),
    )
    own_processes(trainer)
    listener.patience_s = cfg.stop_seconds
    return trainer


def fit_or_collapse(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, run: RunDirectory
) -> CollapseError | None:
    """Train; a collapse comes back instead of being raised, since its curves are worth a report.

    Raises:
        Interrupted: by a signal.
        SaveError: the disk is full, gone or not writable.
    """
    interruption = next(one for one in trainer.callbacks if isinstance(one, Interruption))
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


def _summary(
    cfg: DictConfig, trainer: L.Trainer, monitor: Monitor, probe: ProbeCallback, data: DataModule, *, seconds: float
) -> dict:
    last = monitor.last
    steps = trainer.global_step
    rate = monitor.samples / max(monitor.train_seconds, 1e-9)
    measured = probe.summary
    if measured["probe"] is not None:
        measured["probe"]["classes"] = len(data.class_names)
    return {
        "modality": cfg.modality.name,
        "objective": HydraConfig.get().runtime.choices["objective"],
        "seed": cfg.seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "train_seconds": round(monitor.train_seconds, 1),
        "samples_per_second": round(rate, 1),
        "data_wait": round(monitor.waited_seconds / max(monitor.train_seconds, 1e-9), 4),
        "loss_first": monitor.first.get("train/loss"),
        "loss_last": last.get("train/loss"),
        "feature_std": last.get("train/feature_std"),
        "target_std": last.get("train/target_std"),
        "prediction_std": last.get("train/prediction_std"),
        **measured,
        "probes": data.probe_note,
        "broken_samples": len(data.quarantine.reasons),
    }


def _describe(cfg: DictConfig, objective: Data2Vec, data: DataModule, run_dir: Path, devices: int) -> None:
    millions = sum(p.numel() for p in objective.student.parameters()) / 1e6
    samples = "a stream of samples" if data.num_samples is None else f"{data.num_samples} samples"
    log.info(
        "%s, %s: %.2f M parameters, %s, %s",
        cfg.modality.name,
        HydraConfig.get().runtime.choices["objective"],
        millions,
        samples,
        data.probe_note,
    )
    log.info("global batch: %s", global_batch(cfg, devices))
    log.info("run directory: %s", run_dir)


def global_batch(cfg: DictConfig, devices: int) -> str:
    """What all devices learn from in one optimizer step, in words; lengths that vary have only an upper limit."""
    size, micro, batching = (
        cfg.data.batch_size_per_device,
        cfg.trainer.accumulate_grad_batches,
        build(cfg.modality.batching),
    )
    times = f"{micro} micro-batch{'es' * (micro != 1)} x {devices} device{'s' * (devices != 1)}"
    amounts = [] if size is None else [f"{size * micro * devices:,} samples ({size} x {times})"]
    if batching is not None:
        rate = cfg.modality.get("sample_rate_hz")
        unit, budget = ("s of sound", batching.budget / rate) if rate else ("tokens", batching.budget)
        amounts.append(f"{budget * micro * devices:,.10g} {unit} ({budget:,.10g} x {times})")
    return f"{'at most ' * (batching is not None)}{' and '.join(amounts)} in an optimizer step"


def quiet_libraries() -> None:
    """Lightning's advertisements and hints that do not apply here; its warnings about real trouble stay.

    Of several processes the first one talks.
    """
    logging.raiseExceptions = False  # a terminal that is gone is no reason to fill what is left of it
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
        r"FSDP2-wrapped module \(.*\) returned a view tensor",  # which nothing changes in place
    ):
        warnings.filterwarnings("ignore", message=message)
