"""Weights of spectrogram encoders (EAT), and how their inputs are prepared; transformers has no such model.

Letters: B clips, F mel bins, S frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from data2vec_train.data.spectrogram import SpectrogramTransform
from data2vec_train.encoders.spectrogram import SpectrogramEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.checks import build_encoder, check_values
from data2vec_train.weights.configs import Data2VecConfig
from data2vec_train.weights.files import write_json
from data2vec_train.weights.outputs import ModelOutput
from data2vec_train.weights.preprocessing import PREPROCESSOR_NAME, read_preparation


@dataclass(kw_only=True)
class Data2VecSoundConfig(Data2VecConfig):
    """`encoder` holds the arguments of `SpectrogramEncoder`."""

    model_type: ClassVar[str] = "data2vec_train-sound"

    @classmethod
    def own_type(cls) -> str:
        """The model type: transformers can read none of these."""
        return cls.model_type


REMOTE_CODE = "eat"  # model type of EAT's folders on Hugging Face, which bring code along; none of it is run


def as_fairseq(tensors: dict[str, Tensor], described: dict[str, Any]) -> dict[str, Any]:
    """The content of EAT's folder on Hugging Face as that of its checkpoint, which has the same tensors by other names.

    Args:
        tensors: of the folder.
        described: its config.json.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("pre_norm.", "context_encoder.norm.")
        outside = name.startswith(("blocks.", "fc_norm.", "head."))
        renamed[name if outside else f"modality_encoders.IMAGE.{name}"] = tensor
    return {"model": renamed, "cfg": {"model": {"num_heads": described.get("num_heads")}}}


# How EAT prepares recordings for pretraining (ALGORITHM.md 8.1).
OF_AUDIOSET: dict[str, Any] = {
    "sampling_rate": 16_000,
    "window_ms": 25.0,
    "frames_per_second": 100.0,
    "low_hz": 20.0,
    "high_hz": 0.0,
    "mean": -4.268,
    "std": 4.569,
}


def encoder_arguments(config: Data2VecSoundConfig) -> dict[str, Any]:
    """What `SpectrogramEncoder` is to be built with.

    Raises:
        ConfigError: the config does not say.
    """
    if config.encoder is None:
        raise ConfigError("a config of a spectrogram encoder has its arguments under encoder")
    return {**config.encoder, "attention": config.attn_implementation}


class Data2VecSoundModel(PretrainedModel):
    """Spectrograms of any length to features."""

    config_class = Data2VecSoundConfig
    base_model_prefix = "data2vec_sound"
    main_input_name = "input_values"
    heads = ()

    def __init__(self, config: Data2VecSoundConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(SpectrogramEncoder, encoder_arguments(config))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> ModelOutput | tuple:
        """Spectrograms (B, F, S) and their mask (B, S) -> `last_hidden_state` (B, 1 + T, D), class token first."""
        mask = None if attention_mask is None else attention_mask.bool()
        encoded = self.encoder(input_values.to(self.dtype), mask)
        together = torch.cat([encoded.prefix, encoded.tokens], dim=1)
        return self._result(return_dict, ModelOutput(last_hidden_state=together))


class SpectrogramExtractor:
    """Waveforms to a padded batch of spectrograms, see `SpectrogramTransform`.

    Args:
        sampling_rate: of the waveforms, Hz.
        window_ms: see `SpectrogramTransform`, as all that follow.
        frames_per_second: as there.
        mel_bins: as there.
        low_hz: as there.
        high_hz: as there.
        mean: as there.
        std: as there.
        patch: as there.
    """

    parts = ("feature_extractor", "audio_processor")
    kind = "SpectrogramExtractor"

    def __init__(
        self,
        *,
        sampling_rate: int,
        window_ms: float,
        frames_per_second: float,
        mel_bins: int,
        low_hz: float,
        high_hz: float,
        mean: float,
        std: float,
        patch: int,
    ) -> None:
        self.sampling_rate = sampling_rate
        self.settings = {
            "window_ms": window_ms,
            "frames_per_second": frames_per_second,
            "mel_bins": mel_bins,
            "low_hz": low_hz,
            "high_hz": high_hz,
            "mean": mean,
            "std": std,
            "patch": patch,
        }

    def transform(self) -> SpectrogramTransform:
        """What makes the spectrogram of one waveform, whole."""
        return SpectrogramTransform(
            sample_rate_hz=self.sampling_rate,
            max_frames=2**40,
            crop="first",
            reference_padding=False,
            **self.settings,
        )

    def __call__(self, raw_speech: Sequence[np.ndarray], *, sampling_rate: int | None = None) -> dict[str, Tensor]:
        """Waveforms (S_i,) -> `input_values` (B, F, S) float32 and `attention_mask` (B, S) bool.

        Args:
            raw_speech: mono recordings.
            sampling_rate: of these; a check.

        Raises:
            ValueError: another sampling rate.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"recordings at {sampling_rate} Hz, and the model wants {self.sampling_rate} Hz: resample")
        transform = self.transform()
        rows = [transform.evaluate(np.asarray(row, np.float32)) for row in raw_speech]
        lengths = torch.tensor([row.shape[1] for row in rows])
        values = rows[0].new_zeros(len(rows), len(rows[0]), int(lengths.max()))
        for value, row in zip(values, rows, strict=True):
            value[:, : row.shape[1]] = row
        return {"input_values": values, "attention_mask": torch.arange(values.shape[2]) < lengths[:, None]}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SpectrogramExtractor":
        """The extractor that a folder describes.

        Raises:
            ConfigError: it describes none, or another kind.
        """
        content = read_preparation(Path(folder), cls.parts)
        kind = content.pop("feature_extractor_type", None)
        hints = get_type_hints(cls.__init__)
        missing = sorted(set(hints) - set(content) - {"return"})
        if kind != cls.kind or missing:
            raise ConfigError(f"{folder}: inputs of a {kind or 'model without a name'}, expected {cls.kind}")
        given = {name: value for name, value in content.items() if name in hints}
        check_values(given, hints, f"{folder}, how recordings are prepared")
        return cls(**given)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        content = {"feature_extractor_type": self.kind, "sampling_rate": self.sampling_rate, **self.settings}
        write_json(Path(folder) / PREPROCESSOR_NAME, content)
