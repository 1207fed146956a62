"""Assembles the report of a run: tables and curves for all modalities, and the pictures of its modality."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.build import build
from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.report.page import (
    Section,
    curves_section,
    facts_section,
    probe_section,
    r2_section,
    read_metrics,
    write_report,
)
from data2vec_train.report.pictures.shared import good_samples, masks_of, shown_set
from data2vec_train.report.sequences import sequence_masks_section
from data2vec_train.training.run_directory import command_line

# A phrase that describes the masks of each masker.
DRAWN_AS = {
    "BlockMasker": "rectangles",
    "InverseBlockMasker": "all but a few squares",
    "RandomMasker": "single positions",
    "SpanMasker": "spans",
    "Block1dMasker": "spans, and single positions to make the number exact",
}


def write_run_report(cfg: DictConfig, *, run_dir: Path, objective: Data2Vec, data: DataModule, summary: dict) -> Path:
    """Write `report.html` into the run directory and return its path."""
    metrics = read_metrics(run_dir / "metrics.csv")
    sections = [
        probe_section(summary),
        r2_section(summary),
        curves_section(metrics, baselines=summary["probe"] or {}),
        *_pictures(cfg, objective.student, data),
        facts_section(summary, command=command_line()),
    ]
    title = f"data2vec pretraining: {cfg.modality.name}, {summary['objective']}"
    return write_report(
        run_dir / "report.html",
        title=title,
        sections=[section for section in sections if section is not None],
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
    )


def _pictures(cfg: DictConfig, student: ModalityEncoder, data: DataModule) -> list[Section]:
    masker = cfg.modality.masker._target_.rpartition(".")[2]
    drawn_as = DRAWN_AS.get(masker, masker)
    draw = build(cfg.modality.pictures)
    if draw is None:
        shown = shown_set(data)
        if shown is None:
            return []
        return [sequence_masks_section(masks_of(data, good_samples(shown, 4)), drawn_as=drawn_as)]
    # The same seed gives the same initial weights: the encoder before training.
    torch.manual_seed(cfg.seed)
    untrained = build(cfg.objective.encoder).to(next(student.parameters()).device)
    return draw(student=student, untrained=untrained, data=data, drawn_as=drawn_as)
