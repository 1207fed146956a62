"""Report pictures of an image run: masks, patch features and neighbours, before and after training."""

import numpy as np

from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.raw import raw_pixels
from data2vec_train.report.page import Section, masks_section, neighbours_section, pca_section
from data2vec_train.report.pictures.shared import features_of, good_samples, masks_of, neighbours, shown_set

NUM_IMAGES = 6
NUM_NEIGHBOURS = 6


def pictures(*, student: ModalityEncoder, untrained: ModalityEncoder, data: DataModule, drawn_as: str) -> list[Section]:
    """Sections for the report.

    Args:
        student: after training.
        untrained: the same encoder before training.
        data: of the run.
        drawn_as: a phrase that describes the masks.
    """
    shown = shown_set(data)
    if shown is None:
        return []
    queries = good_samples(shown, NUM_IMAGES)
    images = np.stack([data.transform.display(sample.inputs) for sample in queries])
    sections = [
        masks_section(images, np.stack(masks_of(data, queries)), student.grid, drawn_as=drawn_as),
        pca_section(
            images, np.stack(features_of(untrained, queries)), np.stack(features_of(student, queries)), student.grid
        ),
    ]
    if len(data.indices) < 2:
        return sections
    encoders = {"trained": student, "untrained": untrained}
    found, ids, labels = neighbours(
        data, encoders, ("raw pixels", raw_pixels), queries, pooling="mean", count=NUM_NEIGHBOURS
    )
    pictured = {}
    for row in {int(row) for rows in found.values() for row in rows.flat}:
        raw = data.source[int(ids[row])]
        pictured[row] = data.transform.display(data.transform.evaluate(data.decode(raw.value)))
    labelled = labels is not None and data.class_names is not None and data.test_set is not None
    sections.append(
        neighbours_section(
            images,
            {name: np.stack([[pictured[int(i)] for i in row] for row in rows]) for name, rows in found.items()},
            query_labels=np.array([sample.label for sample in queries]) if labelled else None,
            found_labels={name: labels[rows] for name, rows in found.items()} if labelled else None,
            class_names=data.class_names,
        )
    )
    return sections
