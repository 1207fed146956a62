"""What the report shows of a run on spectrograms: masks and features on the grid of patches, neighbours."""

from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.raw import time_statistics
from data2vec_train.report.page import Section
from data2vec_train.report.pictures.shared import (
    features_of,
    good_samples,
    masks_of,
    recording_neighbours,
    shown_set,
    title,
)
from data2vec_train.report.spectrograms import spectrogram_features_section, spectrogram_masks_section

NUM_CLIPS = 4
NUM_QUERIES = 6


def pictures(
    *, student: ModalityEncoder, untrained: ModalityEncoder, data: DataModule, drawn_as: str, frames_per_second: float
) -> list[Section]:
    """Sections for the report; see `pictures.vision.pictures`."""
    shown = shown_set(data)
    if shown is None:
        return []
    samples = good_samples(shown, NUM_QUERIES)
    clips = samples[:NUM_CLIPS]
    names = [title(shown.source[sample.id].key, sample.label, data.class_names) for sample in samples]
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
    sections.append(recording_neighbours(data, encoders, ("log-mel statistics", time_statistics), samples, names))
    return sections
