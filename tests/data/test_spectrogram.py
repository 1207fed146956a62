"""Spectrograms of recordings: settings, lengths, crops, padding. That they are EAT's is in `parity/test_eat.py`."""

import pickle

import numpy as np
import pytest
import soundfile
import torch

from data2vec_train.data.sources.files import FolderSource
from data2vec_train.data.spectrogram import SILENCE, SpectrogramTransform, prepare_spectrograms
from data2vec_train.errors import ConfigError

RATE = 16_000


def transform(**changes) -> SpectrogramTransform:
    options = {
        "sample_rate_hz": RATE,
        "window_ms": 25.0,
        "frames_per_second": 100,
        "mel_bins": 32,
        "low_hz": 20.0,
        "high_hz": 0.0,
        "mean": -4.0,
        "std": 2.0,
        "max_frames": 96,
        "patch": 16,
        "crop": "random",
        "reference_padding": False,
    }
    return SpectrogramTransform(**options | changes)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("reference_padding", [False, True])
@pytest.mark.parametrize("samples", [10, 400, 559, 560, 2800, 2960, 9000, 15_440, 15_600, 16_000, 48_000])
def test_lengths_are_known_before_anything_is_decoded(samples, reference_padding):
    made = transform(reference_padding=reference_padding)
    wave = noise(samples / RATE)
    expected = int(made.lengths(np.array([samples]))[0])
    assert made.train(wave).shape == made.evaluate(wave).shape == (32, expected)
    assert expected % 16 == 0


def test_a_clip_ends_with_a_whole_patch_of_silence():
    made = transform()
    wave = noise(0.5)  # 48 frames
    assert made.evaluate(wave).shape == (32, 48)
    mel = made.evaluate(noise(0.52))  # 50 frames, so 14 more
    floor = torch.tensor((SILENCE + 4.0) / 4.0)
    torch.testing.assert_close(mel[:, 50:], floor.expand(32, 14))
    assert (mel[:, :50] > floor + 0.1).float().mean() > 0.9


def test_reference_padding_fills_up_with_a_loud_constant():
    mel = transform(reference_padding=True).evaluate(noise(0.5))
    torch.testing.assert_close(mel[:, 48:], torch.full((32, 48), 1.0))  # (0 + 4) / (2 * 2)


def test_a_level_that_is_not_zero_changes_nothing():
    wave = noise(0.5)
    torch.testing.assert_close(transform().evaluate(wave), transform().evaluate(wave + 0.25), rtol=0, atol=2e-3)


def test_crops_are_drawn_from_torchs_generator_and_are_those_of_the_spectrogram():
    made, wave = transform(), noise(4.0)
    whole = transform(max_frames=1024).evaluate(wave)
    starts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        crop = made.train(wave)
        torch.manual_seed(seed)
        assert torch.equal(crop, made.train(wave))
        found = [s for s in range(whole.shape[1] - 95) if torch.equal(whole[:, s : s + 96], crop)]
        assert len(found) == 1
        starts.update(found)
    assert len(starts) > 10
    assert max(starts) > 200
    assert torch.equal(made.evaluate(wave), whole[:, :96])


def test_the_first_crop_is_the_original():
    wave = noise(4.0)
    assert torch.equal(transform(crop="first").train(wave), transform().evaluate(wave))


def test_other_rates_windows_and_mel_bins():
    made = transform(sample_rate_hz=8000, window_ms=32.0, frames_per_second=50, mel_bins=48, high_hz=3800.0, patch=8)
    mel = made.evaluate(np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000).astype(np.float32))
    assert mel.shape == (48, 56)  # 49 frames
    bins = mel[:, :49].mean(dim=1)
    position = (1127 * np.log(1 + 1000 / 700) - 1127 * np.log(1 + 20 / 700)) / (
        1127 * np.log(1 + 3800 / 700) - 1127 * np.log(1 + 20 / 700)
    )
    assert abs(int(bins.argmax()) - (position * 49 - 1)) < 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "last"}, "crop is 'random' or 'first'"),
        ({"low_hz": 9000.0}, "do not lie between 0 and half"),
        ({"high_hz": 9000.0}, "do not lie between 0 and half"),
        ({"window_ms": 0.05}, "less than a sample"),
        ({"frames_per_second": 32_000}, "less than a sample"),
    ],
)
def test_settings_that_give_no_filterbank(changes, message):
    with pytest.raises(ConfigError, match=message):
        transform(**changes)


def test_it_travels_to_loader_processes():
    copied = pickle.loads(pickle.dumps(transform()))
    assert torch.equal(copied.evaluate(noise(0.5)), transform().evaluate(noise(0.5)))


def test_a_folder_counts_frames(tmp_path):
    for number, seconds in enumerate((0.5, 2.0, 7.0)):
        soundfile.write(tmp_path / f"{number}.wav", noise(seconds), RATE)
    source = FolderSource(path=str(tmp_path), extensions=[".wav"], class_from_folder=False)
    made = prepare_spectrograms(source, transform=transform(), min_seconds=0.1, segment_seconds=4.0, cache_dir=None)
    assert made.lengths.tolist() == [48, 96, 96, 96]  # the last recording in two parts
    assert [made[row].key for row in range(4)][2:] == ["2.wav@0s", "2.wav@4s"]
