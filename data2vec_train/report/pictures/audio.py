"""Report pictures of a speech run: masks over waveform and spectrogram, features over time, neighbours."""

import numpy as np

from data2vec_train.data.audio import log_mel as log_mel_picture
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import Sample
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.features.raw import log_mel
from data2vec_train.report.page import Section
from data2vec_train.report.pictures.shared import (
    features_of,
    good_samples,
    masks_of,
    recording_neighbours,
    shown_set,
    title,
)
from data2vec_train.report.sequences import audio_masks_section, sequence_features_section

NUM_CLIPS = 4
NUM_QUERIES = 6


def pictures(
    *, student: ModalityEncoder, untrained: ModalityEncoder, data: DataModule, drawn_as: str, sample_rate_hz: int
) -> list[Section]:
    """Sections for the report; arguments as in `pictures.vision.pictures`."""
    shown = shown_set(data)
    if shown is None:
        return []
    samples = good_samples(shown, NUM_QUERIES)
    clips = samples[:NUM_CLIPS]
    names = [_name(data, shown, sample) for sample in samples]
    waveforms = [_mono(sample) for sample in clips]
    seconds_per_token = float(np.prod(student.token_count.strides)) / sample_rate_hz
    spectrograms = [log_mel_picture(wave, sample_rate_hz=sample_rate_hz) for wave in waveforms]
    sections = [
        audio_masks_section(
            list(zip(waveforms, spectrograms, names, strict=False)),
            masks_of(data, clips),
            sample_rate_hz=sample_rate_hz,
            seconds_per_token=seconds_per_token,
            drawn_as=drawn_as,
        ),
        sequence_features_section(
            names[:NUM_CLIPS],
            features_of(untrained, clips),
            features_of(student, clips),
            seconds_per_token=seconds_per_token,
        ),
    ]
    if len(data.indices) < 2:
        return sections

    def raw(inputs, mask):  # noqa: ANN001, ANN202 - see RawFeatures
        return log_mel(inputs, mask, sample_rate_hz=sample_rate_hz)

    encoders = {"trained": student, "untrained": untrained}
    sections.append(recording_neighbours(data, encoders, ("log-mel statistics", raw), samples, names))
    return sections


def _mono(sample: Sample) -> np.ndarray:
    wave = sample.inputs.numpy()
    return wave if wave.ndim == 1 else wave.mean(axis=0)


def _name(data: DataModule, shown: object, sample: Sample) -> str:
    return title(shown.source[sample.id].key, sample.label, data.class_names)
