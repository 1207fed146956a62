"""What the report shows of a run on spectrograms: masks and features on the grid of patches, neighbours."""

import numpy as np

from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.raw import time_statistics
from data2vec_train.report.page import Section
from data2vec_train.report.pictures.shared import features_of, good_samples, masks_of, neighbours, shown_set
from data2vec_train.report.sequences import text_neighbours_section
from data2vec_train.report.spectrograms import spectrogram_features_section, spectrogram_masks_section

NUM_CLIPS = 4
NUM_QUERIES = 6
NUM_NEIGHBOURS = 4


def pictures(
    *, student: ModalityEncoder, untrained: ModalityEncoder, data: DataModule, drawn_as: str, frames_per_second: float
) -> list[Section]:
    """Sections for the report; see `pictures.vision.pictures`."""
    shown = shown_set(data)
    if shown is None:
        return []
    samples = good_samples(shown, NUM_QUERIES)
    clips = samples[:NUM_CLIPS]
    names = [title(shown.source[one.id].key, one.label, data.class_names) for one in samples]
    columns = student.grid[1]
    spectrograms = [sample.inputs.numpy() for sample in clips]
    titles = [
        f"{name}, {mel.shape[1] / frames_per_second:.2f} s" for name, mel in zip(names, spectrograms, strict=False)
    ]
    masks = [rows.reshape(len(rows), -1, columns) for rows in masks_of(data, clips)]
    sections = [
        spectrogram_masks_section(spectrograms, masks, titles, drawn_as=drawn_as),
        spectrogram_features_section(
            spectrograms, titles, features_of(untrained, clips), features_of(student, clips), columns=columns
        ),
    ]
    if len(data.indices) < 2:
        return sections
    encoders = {"trained": student, "untrained": untrained}
    found, ids, labels = neighbours(
        data, encoders, ("log-mel statistics", time_statistics), samples, pooling="mean_std", count=NUM_NEIGHBOURS
    )
    labelled = labels is not None and data.class_names is not None and data.test_set is not None
    gallery = {
        int(row): title(data.source[int(ids[row])].key, labels[row] if labelled else None, data.class_names)
        for rows in found.values()
        for row in rows.flat
    }
    sections.append(
        text_neighbours_section(
            names,
            {name: [[gallery[int(i)] for i in row] for row in rows] for name, rows in found.items()},
            query_labels=np.array([sample.label for sample in samples]) if labelled else None,
            found_labels={name: labels[rows] for name, rows in found.items()} if labelled else None,
        )
    )
    return sections


def title(key: str, label: int | None, class_names: list[str] | None) -> str:
    """A recording's name, and its class where there is one."""
    return key if label is None or class_names is None else f"{key} ({class_names[int(label)]})"
