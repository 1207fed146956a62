"""Log-mel spectrograms of recordings, as EAT takes them (ALGORITHM.md 8.1). Letters: S samples, F mel bins.

Recordings are read by `data.audio`; what comes out counts frames instead of samples.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.audio import prepare_audio
from data2vec_train.data.sources.files import Source, StreamingSource
from data2vec_train.errors import ConfigError

SILENCE = math.log(2**-23)  # what an energy of 0 becomes: Kaldi's floor is the smallest step of a float32 at 1


class SpectrogramTransform:
    """From a decoded waveform to a normalised spectrogram, by torchaudio's filterbank that is compatible with Kaldi.

    A clip ends with a whole patch: what is missing is silence.

    Args:
        sample_rate_hz: of the waveforms.
        window_ms: length of the symmetric Hann window.
        frames_per_second: how often it is taken; 100 = every 10 ms.
        mel_bins: F.
        low_hz: lower end of the first mel filter.
        high_hz: upper end of the last one; 0 = half the sample rate.
        mean: of the log-mel values, which are normalised to (x - mean) / (2 std).
        std: see `mean`.
        max_frames: longer clips are cropped to this.
        patch: frames of a patch.
        crop: where in training: "random", or "first" as in the original.
        reference_padding: fill every clip up to `max_frames` with log-mel values of 0 before they are normalised, as
            the original does: a sound louder than the average (ALGORITHM.md 7, row 27).

    Raises:
        ConfigError: settings that give no filterbank.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        window_ms: float,
        frames_per_second: float,
        mel_bins: int,
        low_hz: float,
        high_hz: float,
        mean: float,
        std: float,
        max_frames: int,
        patch: int,
        crop: Literal["random", "first"],
        reference_padding: bool,
    ) -> None:
        if crop not in ("random", "first"):
            raise ConfigError(f"crop is 'random' or 'first', got {crop!r}")
        highest = high_hz if high_hz > 0 else sample_rate_hz / 2 + high_hz
        if not 0 <= low_hz < highest <= sample_rate_hz / 2:
            raise ConfigError(
                f"mel filters from low_hz={low_hz:g} to high_hz={high_hz:g} do not lie between 0 and half of "
                f"sample_rate_hz={sample_rate_hz}"
            )
        self.sample_rate_hz = sample_rate_hz
        self.window_ms = window_ms
        self.shift_ms = 1000 / frames_per_second
        # As Kaldi counts them.
        self.window_samples = int(sample_rate_hz * window_ms * 0.001)
        self.shift_samples = int(sample_rate_hz * self.shift_ms * 0.001)
        if self.window_samples < 2 or self.shift_samples < 1:
            raise ConfigError(
                f"window_ms={window_ms:g} and frames_per_second={frames_per_second:g}: at {sample_rate_hz} Hz one of "
                "them comes to less than a sample"
            )
        self.mel_bins = mel_bins
        self.low_hz = low_hz
        self.high_hz = high_hz
        self.mean = mean
        self.std = std
        self.max_frames = max_frames // patch * patch
        self.patch = patch
        self.crop = crop
        self.reference_padding = reference_padding

    def train(self, waveform: np.ndarray) -> Tensor:
        """Waveform (S,) float32 -> (F, frames)."""
        mel = self.log_mel(waveform)
        surplus = mel.shape[1] - self.max_frames
        start = int(torch.randint(surplus + 1, ())) if surplus > 0 and self.crop == "random" else 0
        return self._finished(mel[:, start : start + self.max_frames])

    def evaluate(self, waveform: np.ndarray) -> Tensor:
        """The same without chance: the first `max_frames`."""
        return self._finished(self.log_mel(waveform)[:, : self.max_frames])

    def log_mel(self, waveform: np.ndarray) -> Tensor:
        """Waveform (S,) -> (F, n) not normalised, n = 1 + floor((S - window) / shift)."""
        from torchaudio.compliance.kaldi import fbank

        wave = torch.from_numpy(waveform)
        wave = F.pad(wave - wave.mean(), (0, max(self.window_samples - len(wave), 0)))
        return fbank(
            wave[None],
            sample_frequency=self.sample_rate_hz,
            frame_length=self.window_ms,
            frame_shift=self.shift_ms,
            window_type="hanning",
            num_mel_bins=self.mel_bins,
            low_freq=self.low_hz,
            high_freq=self.high_hz,
            dither=0.0,
            use_energy=False,
        ).mT

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Frames of clips with so many samples, as `train` and `evaluate` give them."""
        if self.reference_padding:
            return np.full_like(samples, self.max_frames)
        frames = 1 + (np.maximum(samples, self.window_samples) - self.window_samples) // self.shift_samples
        return np.minimum(-(-frames // self.patch) * self.patch, self.max_frames)

    def _finished(self, mel: Tensor) -> Tensor:
        wanted = self.max_frames if self.reference_padding else -(-mel.shape[1] // self.patch) * self.patch
        mel = F.pad(mel, (0, wanted - mel.shape[1]), value=0.0 if self.reference_padding else SILENCE)
        return ((mel - self.mean) / (2 * self.std)).contiguous()


def prepare_spectrograms(
    source: Source | StreamingSource,
    *,
    transform: SpectrogramTransform,
    min_seconds: float,
    segment_seconds: float,
    cache_dir: str | None,
) -> Source | StreamingSource:
    """Recordings cut into utterances as in `prepare_audio`, with lengths in frames."""
    segments = prepare_audio(
        source,
        sample_rate_hz=transform.sample_rate_hz,
        min_seconds=min_seconds,
        segment_seconds=segment_seconds,
        cache_dir=cache_dir,
    )
    if isinstance(segments, Source):
        segments.lengths = transform.lengths(segments.lengths)
    return segments
