"""Pretraining: build everything from the config, train, write the run directory."""

import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from data2vec_train import checkpoints
from data2vec_train.config.build import build
from data2vec_train.config.inputs import given_settings
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.tokenizer import Tokenizer
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.system.clock import seconds_since
from data2vec_train.training.assemble import (
    build_data,
    build_module,
    build_objective,
    build_trainer,
    fit_or_collapse,
    global_batch,
    make_fast,
    quiet_libraries,
)
from data2vec_train.training.callbacks.checkpointing import Checkpointing
from data2vec_train.training.callbacks.monitor import Monitor
from data2vec_train.training.callbacks.probe import ProbeCallback
from data2vec_train.training.callbacks.timing import REPORT, Timing
from data2vec_train.training.init_from import config_from_pretrained, initialise
from data2vec_train.training.precision import (
    uncompiled,
)
from data2vec_train.training.records import build_sources, same_data, same_tokenizer
from data2vec_train.training.run_directory import (
    PROFILE,
    SUMMARY,
    begin,
    change,
    open_run,
    write_summary,
)
from data2vec_train.weights.convert import PREPROCESSING_FOLDER
from data2vec_train.weights.files import write_json
from data2vec_train.weights.tokenizers import EXAMPLES_NAME, TextTokenizer

log = logging.getLogger(__name__)


def write_preprocessing(cfg: DictConfig, data: DataModule, folder: Path) -> None:
    """Write the preprocessing of the inputs beside the weights, in the files that `transformers` reads."""
    described = build(cfg.modality.preprocessing)
    if described is not None:
        described.save_pretrained(folder)
    if hasattr(data.source, "tokenizer"):
        write_tokenizer(data.source.tokenizer, getattr(data.source, "examples", []), folder, cfg.modality.block_tokens)


def write_tokenizer(tokenizer: Tokenizer, texts: Sequence[str], folder: Path, block_tokens: int) -> None:
    """Write a tokenizer's files, read them back, and compare the ids of texts.

    Args:
        tokenizer: the tokenizer of the run.
        texts: some texts of its data; stored with their ids, so that `export` can compare other readers with them.
        folder: where the files are written.
        block_tokens: the longest input, in tokens.

    Raises:
        ConfigError: the tokenizer read back from the files gives other ids.
    """
    content, names = tokenizer.to_json(), tokenizer.special_tokens
    TextTokenizer.from_json(content, tokens=names, model_max_length=block_tokens).save_pretrained(folder)
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    again = TextTokenizer.from_pretrained(folder)
    for text, row in zip(texts, ids, strict=True):
        found = again(text, add_special_tokens=False)["input_ids"]
        if found != row:
            raise ConfigError(
                f"modality.tokenizer: {text[:60]!r} has the ids {row[:10]} in training, but {found[:10]} with the "
                f"tokenizer files in {folder}, which other programs read; use another tokenizer"
            )
    write_json(folder / EXAMPLES_NAME, {"texts": list(texts), "ids": ids})


def pretrain(cfg: DictConfig, *, callbacks: Sequence[L.Callback] = (), loggers: Sequence[Logger] = ()) -> float | None:
    """Train one encoder and return its last kNN accuracy, or RankMe without labels (for sweeps that optimise).

    `callbacks` and `loggers` act beside those of the config.

    Writes into Hydra's run directory: `config.yaml`, `metrics.csv`, `checkpoints/`, `summary.json`, `report.html`, and
    `quarantine.jsonl` when samples were broken. Resumes when the directory has a checkpoint of this run.
    """
    started = time.perf_counter()
    quiet_libraries()
    timing = Timing() if cfg.callbacks.timing else None
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    start = None
    if cfg.init_from is not None:
        start = config_from_pretrained(cfg, given_settings())
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
    module = build_module(cfg, objective)
    change(cfg, run, module)
    probe, monitor = build(cfg.callbacks.probe), build(cfg.callbacks.monitor)
    checkpointing: Checkpointing = build(cfg.callbacks.checkpoint)(
        directory=run_dir / checkpoints.FOLDER,
        config=OmegaConf.to_container(cfg, resolve=True),
    )
    trainer = build_trainer(cfg, run, [*callbacks, probe, monitor], checkpointing, precision, loggers)
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
            from data2vec_train.report.pretraining import write_run_report

            with uncompiled():
                report = write_run_report(cfg, run_dir=run_dir, objective=objective, data=data, summary=summary)
            log.info("report: %s", report)
        write_summary(run_dir / SUMMARY, summary)  # written last: the file marks a complete run
        if timing is not None:
            log.info("%s", timing.write(run_dir / PROFILE))
    if collapse is not None:
        raise collapse
    return _score(summary)


def _score(summary: dict) -> float | None:
    return summary["probe"]["knn"]["trained"] if summary.get("probe") else summary.get("rankme")


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
