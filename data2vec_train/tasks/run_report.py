"""Collects what `report.html` shows of an image run: masks, patch features and neighbours, before and after."""

import itertools
import shlex
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Subset

from data2vec_train.config import build
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import Sample
from data2vec_train.data2vec import Data2Vec
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.probes.callback import patch_features, raw_pixels
from data2vec_train.probes.measures import nearest
from data2vec_train.report import (
    Section,
    curves_section,
    facts_section,
    masks_section,
    neighbours_section,
    pca_section,
    probe_section,
    read_metrics,
    write_report,
)

NUM_IMAGES = 6
NUM_NEIGHBOURS = 6
GALLERY = 2000


def write_run_report(cfg: DictConfig, *, run_dir: Path, objective: Data2Vec, data: DataModule, summary: dict) -> Path:
    """Write `report.html` into the run directory and return its path."""
    metrics = read_metrics(run_dir / "metrics.csv")
    sections = [
        probe_section(summary),
        curves_section(metrics, baselines=summary["probe"] or {}),
        *_pictures(cfg, objective.student, data),
        facts_section(summary, command=command_line()),
    ]
    title = f"data2vec pretraining: {cfg.modality.name}, {summary['objective']}"
    return write_report(
        run_dir / "report.html", title=title, sections=sections, config_yaml=OmegaConf.to_yaml(cfg, resolve=True)
    )


def command_line() -> str:
    """A command that makes this run again, also when it was a member of a sweep."""
    return shlex.join(["python", "-m", "data2vec_train", *HydraConfig.get().overrides.task])


def _pictures(cfg: DictConfig, student: ModalityEncoder, data: DataModule) -> list[Section]:
    shown = data.test_set if data.test_set is not None else data.training_subset(GALLERY)
    if shown is None:  # a stream has no samples to come back to
        return []
    queries = _good(shown, NUM_IMAGES)
    images = np.stack([data.transform.display(sample.inputs) for sample in queries])
    masked = np.stack([[data.collate._mask(sample, view) for view in range(data.collate.views)] for sample in queries])
    # The same seed gives the same start: the encoder as it was before training.
    torch.manual_seed(cfg.seed)
    untrained = build(cfg.modality.encoder).to(next(student.parameters()).device)
    gallery = data.fit_set if data.fit_set is not None else shown
    sections = [
        masks_section(images, masked, student.grid, drawn_as=_drawn_as(cfg)),
        pca_section(images, _patches(untrained, queries), _patches(student, queries), student.grid),
    ]
    if len(gallery) > 1:
        sections.append(_neighbours(data, untrained, student, queries, images, gallery))
    return sections


def _good(dataset: torch.utils.data.Dataset, count: int) -> list[Sample]:
    """Up to `count` usable samples, spread over the data set."""
    order = np.linspace(0, len(dataset) - 1, num=min(len(dataset), 4 * count)).astype(int)
    usable = (dataset[int(index)] for index in np.random.default_rng(0).permutation(np.unique(order)))
    return list(itertools.islice((sample for sample in usable if sample.inputs is not None), count))


@torch.no_grad()
def _patches(encoder: ModalityEncoder, samples: list[Sample]) -> np.ndarray:
    """(n, T, D) patch features of the last block."""
    encoder.eval()
    inputs = torch.stack([sample.inputs for sample in samples]).to(next(encoder.parameters()).device)
    return encoder(inputs).tokens.float().cpu().numpy()


def _neighbours(
    data: DataModule,
    untrained: ModalityEncoder,
    student: ModalityEncoder,
    queries: list[Sample],
    images: np.ndarray,
    gallery: torch.utils.data.Dataset,
) -> Section:
    # A random choice: files are often sorted by class.
    some = Subset(gallery, np.random.default_rng(0).permutation(len(gallery))[:GALLERY].tolist())
    query_inputs = torch.stack([sample.inputs for sample in queries])
    found, found_labels = {}, {}
    inputs, ids, labels = [], [], []
    features: dict[str, list[np.ndarray]] = {"trained": [], "untrained": [], "raw input": []}
    for tokens, batch in patch_features(student, data.evaluation_batches(some)):
        features["trained"].append(tokens.mean(dim=1).cpu().numpy())
        features["raw input"].append(raw_pixels(batch.inputs))
        inputs.append(batch.inputs.half())
        ids.append(batch.ids.numpy())
        labels.append(None if batch.labels is None else batch.labels.numpy())
    for tokens, _ in patch_features(untrained, data.evaluation_batches(some)):
        features["untrained"].append(tokens.mean(dim=1).cpu().numpy())
    inputs, ids = torch.cat(inputs), np.concatenate(ids)
    own = np.array([sample.id for sample in queries])
    queried = {
        "trained": _patches(student, queries).mean(axis=1),
        "untrained": _patches(untrained, queries).mean(axis=1),
        "raw input": raw_pixels(query_inputs),
    }
    for name, parts in features.items():
        ranked = nearest(queried[name], np.concatenate(parts), min(NUM_NEIGHBOURS + 1, len(ids)))
        same_source = data.test_set is None  # then a query is in the gallery itself
        chosen = [[i for i in row if not (same_source and ids[i] == me)] for row, me in zip(ranked, own, strict=True)]
        keep = min(min(len(row) for row in chosen), NUM_NEIGHBOURS)
        index = np.array([row[:keep] for row in chosen])  # (q, k)
        found[name] = np.stack([[data.transform.display(inputs[i].float()) for i in row] for row in index])
        if data.class_names is not None:
            found_labels[name] = np.concatenate(labels)[index]
    labelled = data.class_names is not None
    return neighbours_section(
        images,
        found,
        query_labels=np.array([sample.label for sample in queries]) if labelled else None,
        found_labels=found_labels if labelled else None,
        class_names=data.class_names,
    )


def _drawn_as(cfg: DictConfig) -> str:
    kind = cfg.modality.masker._target_.rpartition(".")[2]
    return {"BlockMasker": "rectangles", "InverseBlockMasker": "all but a few squares", "RandomMasker": "random"}.get(
        kind, kind
    )
