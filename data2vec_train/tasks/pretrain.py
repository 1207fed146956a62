"""Pretraining: build everything from the config, train, write the run directory."""

import json
import logging
import random
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config import build
from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data2vec import Data2Vec
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.errors import CollapseError, ConfigError
from data2vec_train.hf.convert import PREPROCESSING_FOLDER
from data2vec_train.hf.tokenizers import TextTokenizer
from data2vec_train.module import Data2VecModule
from data2vec_train.monitor import CSVLog, Monitor
from data2vec_train.probes.callback import ProbeCallback
from data2vec_train.tasks.init_from import adopt, initialise

log = logging.getLogger(__name__)


class RunCheckpoints(L.Callback):
    """Puts the resolved config, as plain containers, into every checkpoint, and saves one when a run is interrupted."""

    def __init__(self, config: dict, directory: Path) -> None:
        self.config = config
        self.directory = directory

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Add the key `config`, so that the model can be rebuilt from the file."""
        checkpoint["config"] = self.config

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was learned when the user presses Ctrl-C."""
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step:
            trainer.save_checkpoint(self.directory / "last.ckpt", weights_only=False)
            log.info("interrupted after step %d; saved %s", trainer.global_step, self.directory / "last.ckpt")


def build_objective(cfg: DictConfig) -> Data2Vec:
    """Student, teacher, decoder and loss of a composed config."""
    return build(cfg.objective)


def build_data(cfg: DictConfig, *, encoder: ModalityEncoder, run_dir: Path) -> DataModule:
    """The DataModule of a composed config, for an encoder that says how many tokens an input gives."""
    data, modality = cfg.data, cfg.modality
    source = build(data.source)
    test_source = build(OmegaConf.merge(data.source, data.test_source)) if data.test_source else None
    prepare = build(modality.prepare)
    if prepare is not None:
        source = prepare(source)
        shared = {"tokenizer": source.tokenizer} if hasattr(source, "tokenizer") else {}
        test_source = None if test_source is None else prepare(test_source, **shared)
    collator = Collator(
        masker=build(modality.masker),
        views=cfg.objective.views,
        grid=encoder.grid,
        token_count=encoder.token_count,
        seed=cfg.seed,
        pad_value=modality.pad_value,
        corruption=build(modality.corruption),
        legacy_teacher_input=modality.legacy_teacher_input,
    )
    return DataModule(
        source=source,
        test_source=test_source,
        held_out_fraction=data.held_out_fraction,
        max_probe_samples=data.max_probe_samples,
        decode=build(modality.decode),
        transform=build(modality.transform),
        batching=build(modality.batching),
        collator=collator,
        batch_size_per_device=data.batch_size_per_device,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        tolerated_bad_samples=data.tolerated_bad_samples,
        quarantine_path=run_dir / "quarantine.jsonl",
        seed=cfg.seed,
    )


def write_preprocessing(cfg: DictConfig, data: DataModule, folder: Path) -> None:
    """Say beside the weights how inputs are prepared, in the files that `transformers` reads."""
    described = build(cfg.modality.preprocessing)
    if described is not None:
        described.save_pretrained(folder)
    tokenizer = getattr(data.source, "tokenizer", None)
    if tokenizer is not None and {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} == {0, 1, 2}:
        # With RoBERTa's special tokens, as transformers expects them of data2vec.
        TextTokenizer.from_json(tokenizer.to_json(), model_max_length=cfg.modality.block_tokens).save_pretrained(folder)
    elif tokenizer is not None:
        tokenizer.save(folder)


def pretrain(cfg: DictConfig) -> float | None:
    """Train one encoder and return its last kNN accuracy, or RankMe without labels (for sweeps that optimise).

    Writes into Hydra's run directory: `config.yaml`, `metrics.csv`, `checkpoints/`, `summary.json`, `report.html`, and
    `quarantine.jsonl` when samples were broken.
    """
    started = time.perf_counter()
    quiet_libraries()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if (run_dir / "metrics.csv").exists():
        raise ConfigError(f"{run_dir} already holds a run; choose another hydra.run.dir, or remove that folder")
    start = None
    if cfg.init_from is not None:
        start = adopt(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)

    objective = build_objective(cfg)
    if start is not None:
        log.info("weights: %s", "; ".join([str(cfg.init_from), *initialise(objective, start, str(cfg.init_from))]))
    data = build_data(cfg, encoder=objective.student, run_dir=run_dir)
    write_preprocessing(cfg, data, run_dir / PREPROCESSING_FOLDER)
    module = Data2VecModule(
        objective=objective,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.scheduler),
        seed=cfg.seed,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
    )
    probe, monitor = build(cfg.callbacks.probe), build(cfg.callbacks.monitor)
    loggers = [CSVLog(path=run_dir / "metrics.csv"), *loggers_of(cfg, run_dir)]
    trainer: L.Trainer = build(
        cfg.trainer,
        callbacks=[
            probe,
            monitor,
            RunCheckpoints(config, run_dir / "checkpoints"),
            *_checkpoints(cfg, data, run_dir),
        ],
        logger=loggers,
        default_root_dir=run_dir,
        precision=cfg.precision.trainer,
        **cfg.strategy,
    )
    _describe(cfg, objective, data, run_dir)
    collapse = fit_or_collapse(trainer, module, data)
    if collapse is None and trainer.global_step % cfg.callbacks.checkpoint.every_n_steps:
        trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt", weights_only=False)

    summary = _summary(cfg, trainer, monitor, probe, data, seconds=time.perf_counter() - started)
    summary["status"] = "finished" if collapse is None else "collapsed"
    if trainer.is_global_zero:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if cfg.report:
            from data2vec_train.tasks.run_report import write_run_report

            report = write_run_report(cfg, run_dir=run_dir, objective=objective, data=data, summary=summary)
            log.info("report: %s", report)
    if collapse is not None:
        raise collapse
    return summary["probe"]["knn"]["trained"] if summary["probe"] else summary["rankme"]


def fit_or_collapse(trainer: L.Trainer, module: Data2VecModule, data: DataModule) -> CollapseError | None:
    """Train; a collapse comes back instead of being raised, since its curves are worth a report."""
    try:
        trainer.fit(module, datamodule=data)
    except CollapseError as error:
        return error
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into exit status 1
            raise KeyboardInterrupt from None
        raise
    return None


def _checkpoints(cfg: DictConfig, data: DataModule, run_dir: Path) -> list[ModelCheckpoint]:
    """`last.ckpt`, and with labels `best.ckpt`, the one with the best kNN accuracy so far."""
    common = {"dirpath": run_dir / "checkpoints", "enable_version_counter": False}
    every = cfg.callbacks.checkpoint.every_n_steps
    last = ModelCheckpoint(filename="last", every_n_train_steps=every, **common)
    if data.test_set is None:
        return [last]
    every = cfg.callbacks.probe.every_n_steps
    return [
        last,
        ModelCheckpoint(filename="best", monitor="probe/knn", mode="max", every_n_train_steps=every, **common),
    ]


def loggers_of(cfg: DictConfig, run_dir: Path) -> list:
    """Those that the config names, besides metrics.csv."""
    return [build(node)(save_dir=str(run_dir)) for node in cfg.logger.values()]


def _summary(
    cfg: DictConfig, trainer: L.Trainer, monitor: Monitor, probe: ProbeCallback, data: DataModule, *, seconds: float
) -> dict:
    last = monitor.last
    steps = trainer.global_step
    rate = monitor.samples / max(monitor.train_seconds, 1e-9)
    measured = probe.summary
    if measured["probe"] is not None:
        measured["probe"] |= {
            "fit_samples": len(data.fit_set),
            "test_samples": len(data.test_set),
            "classes": len(data.class_names),
        }
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
        "target_std": last.get("train/target_std"),
        "prediction_std": last.get("train/prediction_std"),
        **measured,
        "probes": data.probe_note,
        "broken_samples": len(data.quarantine.reasons),
    }


def _describe(cfg: DictConfig, objective: Data2Vec, data: DataModule, run_dir: Path) -> None:
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
    log.info("run directory: %s", run_dir)


def quiet_libraries() -> None:
    """Lightning's advertisements and hints that do not apply here; its warnings about real trouble stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*`training_step` returned.*",
        r"Checkpoint directory .* exists and is not empty",
        r".*isinstance\(treespec, LeafSpec\).*",
        r"The number of training batches .* is smaller than the logging interval",
        r"Found \d+ module\(s\) in eval mode",  # the teacher, on purpose
    ):
        warnings.filterwarnings("ignore", message=message)
