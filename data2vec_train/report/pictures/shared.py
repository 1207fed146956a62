"""Helpers for the pictures of all modalities: samples to show, their masks and features, nearest neighbours."""

import itertools

import numpy as np
import torch
from torch.utils.data import Subset

from data2vec_train.batch import Batch
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import EvaluationDataset, Sample
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.embedding import pool
from data2vec_train.features.measures import nearest
from data2vec_train.report.page import Section
from data2vec_train.report.sequences import text_neighbours_section
from data2vec_train.training.callbacks.probe import Pooling, RawFeatures, token_features

GALLERY = 2000
RECORDING_NEIGHBOURS = 4


def shown_set(data: DataModule) -> EvaluationDataset | None:
    """Samples to show, held-out ones if there are any; None for a stream, whose samples cannot be read again."""
    for dataset in (data.test_set, data.held_out_set):
        if dataset is not None:
            return dataset
    return data.training_subset(GALLERY)


def good_samples(dataset: EvaluationDataset, count: int) -> list[Sample]:
    """Up to `count` usable samples, spread over the data set."""
    order = np.linspace(0, len(dataset) - 1, num=min(len(dataset), 4 * count)).astype(int)
    usable = (dataset[int(index)] for index in np.random.default_rng(0).permutation(np.unique(order)))
    return list(itertools.islice((sample for sample in usable if sample.inputs is not None), count))


def masks_of(data: DataModule, samples: list[Sample]) -> list[np.ndarray]:
    """The masks (M, T_i) bool of each sample."""
    rows, masks_per_sample = data.collate.draw(samples), data.collate.masks_per_sample
    return [np.stack(rows[start : start + masks_per_sample]) for start in range(0, len(rows), masks_per_sample)]


@torch.no_grad()
def features_of(encoder: ModalityEncoder, samples: list[Sample]) -> list[np.ndarray]:
    """Token features (T_i, D) of the last block, one sample at a time: they may differ in length."""
    batches = [Batch(inputs=sample.inputs[None]) for sample in samples]
    return [tokens[0].cpu().numpy() for tokens, _, _ in token_features(encoder, batches)]


def neighbours(
    data: DataModule,
    encoders: dict[str, ModalityEncoder],
    raw: tuple[str, RawFeatures],
    queries: list[Sample],
    *,
    pooling: Pooling,
    count: int,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Nearest neighbours of the queries among training samples under each kind of feature.

    Args:
        data: gives the gallery, at most `GALLERY` samples.
        encoders: by name.
        raw: name and function of the raw features.
        queries: q samples.
        pooling: of an encoder's tokens.
        count: neighbours of each query.

    Returns:
        By feature, the neighbours' rows in the gallery (q, k), nearest first and without the query itself; the ids of
        the gallery's samples (n,); and their labels (n,) or None.
    """
    gallery = data.fit_set if data.fit_set is not None else data.training_subset(GALLERY)
    # A random choice, since files are often sorted by class.
    rows = np.random.default_rng(0).permutation(len(gallery))[:GALLERY]
    subset = Subset(gallery, rows.tolist())
    subset.lengths = None if gallery.lengths is None else gallery.lengths[rows]
    name, raw_features = raw
    parts: dict[str, list[np.ndarray]] = {}
    queried: dict[str, np.ndarray] = {}
    ids: list[np.ndarray] = []
    labels: list[np.ndarray | None] = []
    for which, encoder in encoders.items():
        parts[which] = []
        for tokens, mask, batch in token_features(encoder, data.evaluation_batches(subset)):
            parts[which].append(pool(tokens, mask, pooling).cpu().numpy())
            if which == next(iter(encoders)):
                parts.setdefault(name, []).append(raw_features(batch.inputs, batch.attention_mask))
                ids.append(batch.ids.numpy())
                labels.append(None if batch.labels is None else batch.labels.numpy())
        single = token_features(encoder, [Batch(inputs=query.inputs[None]) for query in queries])
        queried[which] = np.concatenate([pool(tokens, None, pooling).cpu().numpy() for tokens, _, _ in single])
    queried[name] = np.concatenate([raw_features(query.inputs[None], None) for query in queries])
    gallery_ids = np.concatenate(ids)
    # Without a test set the query itself is in the gallery.
    own_ids = np.array([query.id if data.test_set is None else -1 for query in queries])
    found = {}
    for which, features in parts.items():
        ranked = nearest(queried[which], np.concatenate(features), min(count + 1, len(gallery_ids)))
        others = [[i for i in row if gallery_ids[i] != own_id] for row, own_id in zip(ranked, own_ids, strict=True)]
        keep = min(min(len(row) for row in others), count)
        found[which] = np.array([row[:keep] for row in others])
    ordered = {which: found[which] for which in [*encoders, name]}
    known = all(part is not None for part in labels)
    return ordered, gallery_ids, np.concatenate(labels) if known else None


def title(key: str, label: int | None, class_names: list[str] | None) -> str:
    """A recording's name, and its class where there is one."""
    return key if label is None or class_names is None else f"{key} ({class_names[int(label)]})"


def recording_neighbours(
    data: DataModule,
    encoders: dict[str, ModalityEncoder],
    raw: tuple[str, RawFeatures],
    queries: list[Sample],
    names: list[str],
) -> Section:
    """Nearest neighbours of recordings, by their names; arguments as in `neighbours`, `names` are those of queries."""
    found, ids, labels = neighbours(data, encoders, raw, queries, pooling="mean_std", count=RECORDING_NEIGHBOURS)
    labelled = labels is not None and data.class_names is not None and data.test_set is not None
    gallery = {
        int(row): title(data.source[int(ids[row])].key, labels[row] if labelled else None, data.class_names)
        for rows in found.values()
        for row in rows.flat
    }
    return text_neighbours_section(
        names,
        {name: [[gallery[int(i)] for i in row] for row in rows] for name, rows in found.items()},
        query_labels=np.array([query.label for query in queries]) if labelled else None,
        found_labels={name: labels[rows] for name, rows in found.items()} if labelled else None,
    )
