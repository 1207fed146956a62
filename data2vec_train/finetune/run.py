"""Fine-tuning: train a head on pretrained weights, and write a folder that transformers and `predict` read."""

import copy
import logging
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from data2vec_train import checkpoints
from data2vec_train.config.build import build
from data2vec_train.config.inputs import MODALITIES, inherit, look_at_images
from data2vec_train.data.audio import AudioWindows
from data2vec_train.data.groups import group
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.encoders.waveform import multiply_convolutions
from data2vec_train.errors import ConfigError
from data2vec_train.finetune.base import HeadTask, Inputs
from data2vec_train.finetune.data import FinetuneData
from data2vec_train.finetune.inputs import inputs_of
from data2vec_train.finetune.module import Evaluation, FinetuneModule
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.outputs import writing
from data2vec_train.training.assemble import build_trainer, fit_or_collapse, global_batch, quiet_libraries
from data2vec_train.training.callbacks.checkpointing import Checkpointing
from data2vec_train.training.callbacks.monitor import Monitor
from data2vec_train.training.precision import choose_precision, device_type
from data2vec_train.training.records import same_data, same_outputs
from data2vec_train.training.run_directory import (
    QUARANTINE,
    SUMMARY,
    RunDirectory,
    begin,
    change,
    open_run,
    write_summary,
)
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.convert import MODEL_FOLDER, load_pretrained, with_head
from data2vec_train.weights.files import write_json
from data2vec_train.weights.plugin import PluginConfig, preparation_of

log = logging.getLogger(__name__)

WHOLE = 2**60  # window length in samples, longer than any recording
FACTS_NAME = "finetuning.json"  # beside the weights: the settings of the head


class DescribedModel(L.Callback):
    """Stores in every checkpoint the class and config of the model, besides the config of the run."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: FinetuneModule, checkpoint: dict) -> None:
        """Add the key `model`, so that the model can be rebuilt from the file."""
        model = pl_module.model
        checkpoint["model"] = {"class": type(model).__name__, "config": model.config.to_dict()}


def finetune(cfg: DictConfig, *, callbacks: Sequence[L.Callback] = (), loggers: Sequence[Logger] = ()) -> float | None:
    """Train one head and return its best test score, for sweeps that optimise; None without test records.

    `callbacks` and `loggers` act beside those of the config.

    Writes into Hydra's run directory: `config.yaml`, `metrics.csv`, `checkpoints/`, `summary.json`, `report.html`,
    `model/` with the best weights, their preprocessing and class names, and `quarantine.jsonl` with broken records.
    """
    started = time.perf_counter()
    quiet_libraries()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)

    start = load_pretrained(cfg.init_from, weights=cfg.weights)
    start = inherit(cfg, start, f"init_from={cfg.init_from}")
    inputs = inputs_of(cfg, start)
    task: HeadTask = build(cfg.head)(inputs=inputs)
    if task.modality != cfg.modality.name:
        raise ConfigError(f"this head is for {task.modality}, but modality={cfg.modality.name}; choose another head")
    run = open_run(cfg, run_dir)
    if run.summary is not None:
        log.info("%s is finished already", run_dir)
        return (run.summary.get("best") or {}).get(run.summary.get("metric"))
    if getattr(task, "vocabulary", None) == "keep":
        task.setup_from_pretrained(start)
    data = build_records(cfg, task, run)
    model, notes = with_head(
        start,
        task.model_class,
        settings=task.model_settings() | _pooling(task),
        rates=dict(cfg.rates),
        random_weights=cfg.random_weights,
        keep_head=task.continues(start),
        start_head=task.start_head,
    )
    if isinstance(model.config, PluginConfig):
        model.config.modality = preparation_of(OmegaConf.to_container(cfg.modality, resolve=True))
    model.set_attn_implementation(cfg.attention.backend)
    multiply_convolutions(model)
    log.info("%s: %s", cfg.init_from, "; ".join(notes))
    module = FinetuneModule(
        model=model,
        task=task,
        optimizer=build(cfg.optimizer),
        encoder_frozen_steps=cfg.freeze.encoder_steps,
        front_end_frozen=cfg.freeze.front_end,
        decay_embeddings=cfg.layer_decay.embeddings,
        schedule=build(cfg.scheduler),
        seed=cfg.seed,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
    )
    change(cfg, run, module)
    evaluation, monitor = build(cfg.callbacks.evaluation), build(cfg.callbacks.monitor)
    checkpointing: Checkpointing = build(cfg.callbacks.checkpoint)(
        directory=run_dir / checkpoints.FOLDER,
        config=OmegaConf.to_container(cfg, resolve=True),
    )
    precision = choose_precision(cfg.precision.trainer, device_type(cfg.strategy.accelerator))
    trainer = build_trainer(
        cfg, run, [*callbacks, DescribedModel(), evaluation, monitor], checkpointing, precision, loggers
    )
    _describe(task, model, data, run_dir)
    log.info("global batch: %s", global_batch(cfg, trainer.world_size))
    collapse = fit_or_collapse(trainer, module, data, run)
    if collapse is not None:
        raise collapse
    summary = _summary(cfg, task, trainer, monitor, evaluation, data, seconds=seconds_since(started))
    if trainer.is_global_zero:
        model = _best(run_dir, model, evaluation, trainer.global_step)
        with writing(run_dir / MODEL_FOLDER) as folder:
            save_finetuned(cfg, model, task, folder)
        model.source = run_dir / MODEL_FOLDER
        log.info("weights: %s", run_dir / MODEL_FOLDER)
        if cfg.report:
            from data2vec_train.finetune.report import write_finetune_report

            log.info("report: %s", write_finetune_report(cfg, run_dir, model, task, data, summary))
        write_summary(run_dir / SUMMARY, summary)  # written last: the file marks a complete run
    return evaluation.best.get(task.metric)


def _pooling(task: HeadTask) -> dict[str, Any]:
    """Image classification reads the normalised mean of the patches, not the class token (ALGORITHM.md 4.3)."""
    return {"use_mean_pooling": True} if task.model_class.endswith("ImageClassification") else {}


def build_source(
    cfg: DictConfig, task: HeadTask, changes: DictConfig | None = None, *, labelled: bool = True
) -> Source:
    """The records of a composed config, with the columns that the task reads.

    Args:
        cfg: the config.
        task: the task that reads them.
        changes: settings that differ, such as `data.test_source`.
        labelled: whether labels are read.

    Raises:
        ConfigError: the source is a stream, whose labels cannot be read before training.
    """
    merged = cfg.data.source if changes is None else OmegaConf.merge(cfg.data.source, changes)
    node = OmegaConf.to_container(merged, resolve=True)
    target = node["_target_"].rpartition(".")[2]
    fields = [*task.input_fields, *(task.label_fields if labelled else [])]
    grouped = labelled and changes is None and not cfg.data.test_source
    group_column = cfg.data.get("group_column") if grouped else None
    fields = list(dict.fromkeys([*fields, *([group_column] if group_column else [])]))
    if target in ("HFSource", "HFStreamingSource", "handed_over"):
        column = node["column"] or task.column
        node |= {"column": column, "fields": [name for name in fields if name != column]}
        # A column that the task reads itself is not checked as a class column.
        node |= {} if task.needs_classes and labelled else {"label_column": False}
    elif target == "FolderSource" and (fields or (labelled and node["label_column"])):
        of_folders = not node["label_column"] and fields == [group_column] and task.needs_classes
        node |= {"metadata": node["metadata"] or "auto", "fields": fields, "class_from_folder": of_folders}
    elif target == "FolderSource":
        node |= {"class_from_folder": task.needs_classes and labelled, "label_column": None}
    elif target == "ManifestSource":
        node |= {"fields": fields}
    source = build(node)
    if isinstance(source, StreamingSource):
        raise ConfigError("data=stream cannot be used here: labels are read before training; choose data=hf")
    look_at_images(cfg, source)
    if grouped:
        group(source, column=cfg.data.get("group_column"), pattern=cfg.data.get("group_pattern"))
    return source


def prepared(cfg: DictConfig, task: HeadTask, source: Source, *, labelled: bool = True) -> Source:
    """The records in the form that the task reads: utterances, blocks of ids."""
    if cfg.modality.name == "audio" and not labelled and getattr(task, "reads_frames", False):
        source = windows_of(cfg, task, source)
    elif cfg.modality.name == "audio":
        if getattr(task, "reads_frames", False) and cfg.modality.segment_seconds < math.inf:
            raise ConfigError(
                f"modality.segment_seconds={cfg.modality.segment_seconds:g}: the labels of this head belong to whole "
                "recordings, not to segments; leave the setting out"
            )
        source = build(cfg.modality.prepare)(source)
    elif cfg.modality.name not in MODALITIES and cfg.modality.prepare is not None:
        source = build(cfg.modality.prepare)(source)
    return task.prepare(source) if labelled else source


def windows_of(cfg: DictConfig, task: HeadTask, source: Source) -> AudioWindows:
    """Recordings for a head that reads frames, as windows that start at the start of a frame."""
    hop = math.prod(task.inputs.token_count.strides)

    def samples(seconds: float) -> int:
        return round(seconds * task.inputs.sample_rate_hz / hop) * hop

    if cfg.stride_seconds is None:
        raise ConfigError("stride_seconds: expected a number above 0, got null")
    never = cfg.window_seconds is None
    window, stride = (WHOLE, 0) if never else (samples(cfg.window_seconds), samples(cfg.stride_seconds))
    if not never and task.inputs.token_count(window) * hop < window - stride:
        raise ConfigError(
            f"stride_seconds={cfg.stride_seconds:g}: shorter than the encoder's receptive field; expected at least "
            f"{(window / hop - task.inputs.token_count(window)) * hop / task.inputs.sample_rate_hz:.2g}"
        )
    return AudioWindows(
        source,
        sample_rate_hz=task.inputs.sample_rate_hz,
        min_seconds=cfg.modality.min_seconds,
        window_samples=window,
        stride_samples=stride,
        cache_dir=None if cfg.cache_dir is None else Path(cfg.cache_dir).expanduser(),
    )


def build_records(cfg: DictConfig, task: HeadTask, run: RunDirectory) -> FinetuneData:
    """Training and test records of a composed config, for a run that starts or resumes.

    Raises:
        ConfigError: they are not the records that the run started with.
    """
    data = cfg.data
    if data.on_device:
        raise ConfigError("data.on_device=true is for pretraining; fine-tuning normalises in the loader's processes")
    sources = {"source": build_source(cfg, task)}
    if data.test_source:
        sources["test_source"] = build_source(cfg, task, data.test_source)
    identity = same_data(cfg, run, sources)
    begin(cfg, run)
    ready = {name: prepared(cfg, task, source) for name, source in sources.items()}
    records = FinetuneData(
        task=task,
        source=ready["source"],
        test_source=ready.get("test_source"),
        held_out_fraction=data.held_out_fraction,
        train_samples=data.train_samples,
        batching=build(cfg.modality.batching),
        batch_size_per_device=data.batch_size_per_device,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        max_bad_fraction=data.max_bad_fraction,
        tolerated_bad_samples=data.tolerated_bad_samples,
        quarantine_path=run.path / QUARANTINE,
        seed=cfg.seed,
        changed_steps=cfg.resume == "changed",
        split=run.data.get("split"),
    )
    records.facts |= {"identity": identity, "outputs": task.outputs}
    same_outputs(run, task.outputs)
    return records


def save_finetuned(cfg: DictConfig, model: PretrainedModel, task: HeadTask, folder: Path) -> None:
    """Write weights, config with class names, preprocessing, and the head's settings into one folder.

    transformers can read the folder if it supports the encoder (1.0, and text).
    """
    model.save_pretrained(folder)
    described = build(cfg.modality.preprocessing)
    if described is not None:
        described.save_pretrained(folder)
    if task.inputs.tokenizer is not None:
        tokenizer = copy.copy(task.inputs.tokenizer)
        tokenizer.model_max_length = task.inputs.max_tokens
        tokenizer.save_pretrained(folder)
    task.save(folder)
    write_json(folder / FACTS_NAME, {"head": OmegaConf.to_container(cfg.head, resolve=True)})


def task_of(model: PretrainedModel, inputs: Inputs, head: dict[str, Any]) -> HeadTask:
    """The task of a trained model's head, built from the head's settings."""
    task: HeadTask = build(head)(inputs=inputs)
    if type(model).__name__ != task.model_class:
        raise ConfigError(f"the head's settings are for {task.model_class}, the weights are a {type(model).__name__}")
    task.setup_from_pretrained(model)
    return task


def _best(run_dir: Path, model: PretrainedModel, evaluation: Evaluation, step: int) -> PretrainedModel:
    """The model with the weights of the best evaluation; `model` has those of `step`."""
    if evaluation.best_step not in (None, step):
        best = run_dir / checkpoints.FOLDER / checkpoints.name_of(evaluation.best_step)
        content = checkpoints.read(checkpoints.check(best))
        state = {name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()}
        model.load_state_dict(state)
    return model.eval()


def _describe(task: HeadTask, model: PretrainedModel, data: FinetuneData, run_dir: Path) -> None:
    tested = "no test records" if data.test_set is None else f"{len(data.test_set)} test records"
    names = task.class_names or ()
    classes = f", {len(names)} classes" if len(names) > 1 else ""  # regression has one "class", which is not counted
    millions = model.num_parameters() / 1e6
    log.info(
        "%s, %.2f M parameters; %d training records, %s%s",
        type(model).__name__,
        millions,
        data.num_samples,
        tested,
        classes,
    )
    log.info("run directory: %s", run_dir)


def _summary(
    cfg: DictConfig,
    task: HeadTask,
    trainer: L.Trainer,
    monitor: Monitor,
    evaluation: Evaluation,
    data: FinetuneData,
    *,
    seconds: float,
) -> dict[str, Any]:
    return {
        "modality": cfg.modality.name,
        "head": HydraConfig.get().runtime.choices["head"],
        "status": "finished",
        "seed": cfg.seed,
        "init_from": str(cfg.init_from),
        "random_weights": cfg.random_weights,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "train_seconds": round(monitor.train_seconds, 1),
        "samples_per_second": round(monitor.samples / max(monitor.train_seconds, 1e-9), 1),
        "loss_first": monitor.first.get("train/loss"),
        "loss_last": monitor.last.get("train/loss"),
        "metric": task.metric,
        "best": dict(evaluation.best) or None,
        "last": {name.removeprefix("test/"): value for name, value in evaluation.metrics.items()} or None,
        "train_records": data.num_samples,
        "test_records": 0 if data.test_set is None else len(data.test_set),
        "classes": None if task.class_names is None else len(task.class_names),
        "broken_samples": len(data.quarantine.reasons),
    }
