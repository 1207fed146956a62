"""Prepares recordings and images for models exactly as transformers does, and reads and writes its files.

    AudioFeatureExtractor   Wav2Vec2FeatureExtractor     preprocessor_config.json
    ImageProcessor          BeitImageProcessorPil        preprocessor_config.json

Both are read from processor_config.json too, where transformers 5 puts the settings of all parts of a processor.

Letters: B samples, S audio samples, C channels, (H, W) pixels. Source: TRANSFORMERS.md 4.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.errors import ConfigError
from data2vec_train.weights.checks import check_values
from data2vec_train.weights.files import read_json, stacked, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PREPROCESSOR_NAME, PROCESSOR_NAME = "preprocessor_config.json", "processor_config.json"


def is_described(folder: Path, parts: Sequence[str]) -> bool:
    """Whether a folder describes how inputs are prepared; see `read_preparation`."""
    nested = folder / PROCESSOR_NAME
    return (folder / PREPROCESSOR_NAME).is_file() or (
        nested.is_file() and any(part in read_json(nested) for part in parts)
    )


def read_preparation(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """How inputs are prepared for the weights in a folder, by the names of transformers.

    processor_config.json has precedence over preprocessor_config.json, as in transformers; a warning is logged if the
    two disagree.

    Args:
        folder: with either file, or both.
        parts: keys of processor_config.json that may hold the settings.

    Raises:
        ConfigError: there are no settings, or they are not a JSON object.
    """
    old, new = folder / PREPROCESSOR_NAME, folder / PROCESSOR_NAME
    nested = read_json(new) if new.is_file() else {}
    found = next((nested[part] for part in parts if nested.get(part) is not None), None)
    if found is None:
        found = read_json(old)
    elif not isinstance(found, dict):
        raise ConfigError(f"{new}: {parts[0]} is a {type(found).__name__}, expected an object")
    elif old.is_file():
        other = read_json(old)
        for name in sorted(set(found) & set(other)):
            if found[name] != other[name]:
                log.warning(
                    "%s says %s=%s, but %s says %s; the first is used, as in transformers",
                    *(new, name, found[name], old.name, other[name]),
                )
    return {name: value for name, value in found.items() if value is not None}


class AudioFeatureExtractor:
    """Waveforms to a normalised, padded batch.

    Args:
        sampling_rate: of the recordings, Hz.
        do_normalize: give each recording mean 0 and variance 1.
        return_attention_mask: whether to return the mask of real samples. transformers' default is False, but data2vec
            needs the mask, because its front end has layer norms.
        padding_value: fills shorter recordings, after normalising.
        feature_size: 1, a waveform.
    """

    parts = ("feature_extractor", "audio_processor")
    theirs = "Wav2Vec2FeatureExtractor"

    def __init__(
        self,
        *,
        sampling_rate: int = 16_000,
        do_normalize: bool = True,
        return_attention_mask: bool = True,
        padding_value: float = 0.0,
        feature_size: int = 1,
    ) -> None:
        if feature_size != 1:
            raise ConfigError(f"feature_size={feature_size}: a waveform has 1 value per sample")
        self.sampling_rate = sampling_rate
        self.do_normalize = do_normalize
        self.return_attention_mask = return_attention_mask
        self.padding_value = padding_value
        self.feature_size = feature_size

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> dict[str, Any]:
        """`input_values` (B, S) float32 and `attention_mask` (B, S) int32; lists of arrays without `return_tensors`.

        Args:
            raw_speech: one waveform or a list of them, mono: arrays, tensors or lists of numbers.
            padding: True or "longest", "max_length", or False.
            max_length: samples, for truncation and padding.
            truncation: cut recordings to `max_length`.
            pad_to_multiple_of: round lengths up to a multiple.
            return_attention_mask: None = the extractor's setting. Without a mask, mean and variance are those of the
                padded row, and padding is normalised too, as in transformers.
            return_tensors: "pt", "np" or None.
            sampling_rate: of these recordings, to compare with the extractor's.

        Raises:
            ValueError: another sampling rate, several channels, or settings that contradict each other.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"recordings at {sampling_rate} Hz, but the model expects {self.sampling_rate} Hz; resample them"
            )
        rows = self._rows(raw_speech)
        if truncation and max_length is None:
            raise ValueError("truncation needs max_length")
        if truncation:
            kept = _multiple(max_length, pad_to_multiple_of)
            rows = [row[:kept] for row in rows]
        strategy = {True: "longest", False: None, "do_not_pad": None}.get(padding, padding)
        if strategy not in (None, "longest", "max_length"):
            raise ValueError(f"padding is True, False, 'longest' or 'max_length', got {padding!r}")
        if strategy == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        with_mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        lengths = [len(row) for row in rows]
        if strategy is not None:
            size = _multiple(max(lengths) if strategy == "longest" else max_length, pad_to_multiple_of)
            missing = [max(size - length, 0) for length in lengths]
            pairs = zip(rows, missing, strict=True)
            rows = [np.pad(row, (0, more), constant_values=self.padding_value) for row, more in pairs]
        masks = [np.arange(len(row)) < length for row, length in zip(rows, lengths, strict=True)]
        if self.do_normalize:
            by_mask = with_mask and strategy is not None
            rows = [
                self._normalised(row, length if by_mask else len(row))
                for row, length in zip(rows, lengths, strict=True)
            ]
        output: dict[str, Any] = {"input_values": rows}
        if with_mask:
            output["attention_mask"] = [mask.astype(np.int32) for mask in masks]
        return {name: stacked(values, return_tensors) for name, values in output.items()}

    def _rows(self, raw: Any) -> list[np.ndarray]:
        several = isinstance(raw, (list, tuple)) and len(raw) and np.ndim(raw[0]) > 0
        if isinstance(raw, (np.ndarray, Tensor)):
            several = raw.ndim > 1
        rows = [np.asarray(row) for row in (raw if several else [raw])]
        wrong = [row.shape for row in rows if row.ndim != 1]
        if wrong:
            raise ValueError(f"expected mono recordings, one number per sample; got an array of shape {wrong[0]}")
        return [row.astype(np.float32) if row.dtype != np.float32 else row for row in rows]

    def _normalised(self, row: np.ndarray, length: int) -> np.ndarray:
        real = row[:length]
        row = (row - real.mean()) / np.sqrt(real.var() + 1e-7)
        row[length:] = self.padding_value
        return row

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AudioFeatureExtractor":
        """The extractor that a folder describes.

        Raises:
            ConfigError: it describes none, or another kind.
        """
        content = read_preparation(Path(folder), cls.parts)
        kind = content.get("feature_extractor_type", cls.theirs)
        if kind != cls.theirs:
            raise ConfigError(f"{folder}: the feature extractor is a {kind}; expected {cls.theirs}, for waveforms")
        if content.get("padding_side", "right") != "right":
            raise ConfigError(f"{folder}: padding_side is not right; recordings are padded on the right")
        hints = get_type_hints(cls.__init__)
        given = {name: value for name, value in content.items() if name in hints}
        check_values(given, hints, f"{folder}, how recordings are prepared")
        return cls(**given)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        names = ("sampling_rate", "do_normalize", "return_attention_mask", "padding_value", "feature_size")
        content = {name: getattr(self, name) for name in names}
        kind = {"feature_extractor_type": self.theirs, "padding_side": "right"}
        write_json(Path(folder) / PREPROCESSOR_NAME, kind | content)


class ImageProcessor:
    """Images to a normalised batch: resize (bicubic, aspect not kept), optionally crop, rescale, normalise.

    Args:
        size: height and width, or one number for both, pixels; None = leave the size.
        resample: PIL's number of the filter, 3 = bicubic.
        crop_size: height and width of a crop from the middle; None = no crop.
        rescale_factor: 8-bit values are multiplied by this; None = no rescaling.
        image_mean: of each channel, after rescaling; None = do not normalise.
        image_std: of each channel; None if `image_mean` is.
        do_reduce_labels: in segmentation maps, 0 becomes 255 (no class), the others decrease by 1.
        hf_compat: resize segmentation maps bicubically, which invents classes (TRANSFORMERS.md, fault 8), instead of
            taking the nearest pixel.
        fit: "stretch" resizes both sides to `size`; "cover", which transformers does not have, says that a model was
            trained with `data.image.ImageTransform`, which keeps the aspect and crops the middle. It is a note for our
            programs: `__call__` stretches.
        channels: number of channels; a mean or deviation of one number is used for all. None = as many as the mean has.
        max_value: the stored value that `data.image.decode_image` maps to 255; a note, like `fit`.
        pages: the pages of a TIFF that are read; a note, like `fit`.
    """

    parts = ("image_processor",)

    def __init__(
        self,
        *,
        size: int | Sequence[int] | None = (224, 224),
        resample: int = 3,
        crop_size: tuple[int, int] | None = None,
        rescale_factor: float | None = 1 / 255,
        image_mean: Sequence[float] | None = (0.5, 0.5, 0.5),
        image_std: Sequence[float] | None = (0.5, 0.5, 0.5),
        do_reduce_labels: bool = False,
        hf_compat: bool = False,
        fit: Literal["stretch", "cover"] = "stretch",
        channels: int | None = None,
        max_value: float | None = None,
        pages: Literal["first", "channels"] | None = None,
    ) -> None:
        if (image_mean is None) != (image_std is None):
            raise ConfigError("image_mean and image_std go together")
        if fit not in ("stretch", "cover"):
            raise ConfigError(f"fit is stretch or cover, got {fit!r}")
        self.fit = fit
        self.notes = {"max_value": max_value, "pages": pages}
        self.size = (size, size) if isinstance(size, int) else size
        self.resample = resample
        self.crop_size = crop_size
        self.rescale_factor = rescale_factor
        self.image_mean = _for_all(image_mean, channels)
        self.image_std = _for_all(image_std, channels)
        self.do_reduce_labels = do_reduce_labels
        self.hf_compat = hf_compat

    def __call__(self, images: Any, segmentation_maps: Any = None, return_tensors: str | None = None) -> dict[str, Any]:
        """`pixel_values` (B, C, H, W) float32, and `labels` (B, H, W) int64 when there are maps.

        Args:
            images: one or several: PIL images, or 8-bit arrays or tensors (H, W, C), (C, H, W) or (H, W).
            segmentation_maps: as many maps, (H, W).
            return_tensors: "pt", "np", or None = lists of arrays.

        Raises:
            ValueError: an input that is not an image, or other channels than the mean and deviation have.
        """
        output: dict[str, Any] = {"pixel_values": [self._image(image) for image in _several(images, 3)]}
        if segmentation_maps is not None:
            output["labels"] = [self._map(classes) for classes in _several(segmentation_maps, 2)]
        return {name: stacked(values, return_tensors) for name, values in output.items()}

    def _image(self, image: Any) -> np.ndarray:
        channels = 3 if self.image_mean is None else len(self.image_mean)
        x = self._crop(self._resize(_pixels(image, channels), self.resample))
        if self.rescale_factor is not None:
            x = (x.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.image_mean is None:
            return x
        if x.shape[0] != channels:
            raise ValueError(f"an image with {x.shape[0]} channels; expected {channels}, as the mean has")
        x = x.astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.image_mean, self.image_std))
        return (x - mean) / std

    def _map(self, classes: Any) -> np.ndarray:
        x = np.array(classes)[None]
        if self.do_reduce_labels:
            x = np.where(x == 0, 255, x - 1)
            x = np.where(x == 254, 255, x)
        return self._crop(self._resize(x.astype(np.uint8), self.resample if self.hf_compat else 0))[0].astype(np.int64)

    def _resize(self, x: np.ndarray, resample: int) -> np.ndarray:
        """(C, H, W) 8-bit -> the same at `size`."""
        from PIL import Image

        if self.size is None:
            return x
        last = x[0] if x.shape[0] == 1 else x.transpose(1, 2, 0)
        height, width = self.size
        resized = np.array(Image.fromarray(np.ascontiguousarray(last)).resize((width, height), resample=resample))
        return resized[None] if resized.ndim == 2 else resized.transpose(2, 0, 1)

    def _crop(self, x: np.ndarray) -> np.ndarray:
        if self.crop_size is None:
            return x
        height, width = self.crop_size
        more = [max(height - x.shape[1], 0), max(width - x.shape[2], 0)]
        # Smaller images are padded with zeros on both sides, the larger half first.
        x = np.pad(x, ((0, 0), *((math.ceil(pixels / 2), pixels // 2) for pixels in more)))
        top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
        return x[:, top : top + height, left : left + width]

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Class maps (H, W) int64 from logits (B, C, h, w), or an output that has them, resized bilinearly.

        Raises:
            ValueError: another number of sizes than of images.
        """
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target sizes for {len(logits)} images")
        return [
            F.interpolate(image_logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for image_logits, size in zip(logits, target_sizes, strict=True)
        ]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, hf_compat: bool = False) -> "ImageProcessor":
        """The processor that a folder describes, old files of BeitFeatureExtractor included.

        Raises:
            ConfigError: it describes none, or one that keeps the aspect.
        """
        content = read_preparation(Path(folder), cls.parts)

        def size_of(name: str, on: str, default: bool) -> tuple[int, int] | None:
            if not content.get(on, default):
                return None
            found = content.get(name, {"height": 224, "width": 224})
            if isinstance(found, int):
                return (found, found)
            if not isinstance(found, dict) or set(found) != {"height", "width"}:
                raise ConfigError(f"{name}={found}: expected a height and a width")
            return (found["height"], found["width"])

        normalise = content.get("do_normalize", True)
        given = dict(
            size=size_of("size", "do_resize", True),
            resample=content.get("resample", 3),
            crop_size=size_of("crop_size", "do_center_crop", False),
            rescale_factor=content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else None,
            image_mean=content.get("image_mean", [0.5] * 3) if normalise else None,
            image_std=content.get("image_std", [0.5] * 3) if normalise else None,
            do_reduce_labels=content.get("do_reduce_labels", content.get("reduce_labels", False)),
            hf_compat=hf_compat,
            fit=content.get("fit", "stretch"),
            max_value=content.get("max_value"),
            pages=content.get("pages"),
        )
        check_values(given, get_type_hints(cls.__init__), f"{folder}, how images are prepared")
        if normalise and len(given["image_mean"]) != len(given["image_std"]):
            raise ConfigError(f"{folder}: image_mean and image_std are of different lengths")
        return cls(**given)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        height, width = self.size or (224, 224)
        crop_height, crop_width = self.crop_size or (224, 224)
        content = {
            "image_processor_type": "BeitImageProcessor",
            "do_resize": self.size is not None,
            "size": {"height": height, "width": width},
            "resample": self.resample,
            "do_center_crop": self.crop_size is not None,
            "crop_size": {"height": crop_height, "width": crop_width},
            "do_rescale": self.rescale_factor is not None,
            "rescale_factor": self.rescale_factor or 1 / 255,
            "do_normalize": self.image_mean is not None,
            "image_mean": list(self.image_mean or [0.5] * 3),
            "image_std": list(self.image_std or [0.5] * 3),
            "do_reduce_labels": self.do_reduce_labels,
            "fit": self.fit,
            **{name: value for name, value in self.notes.items() if value is not None},
        }
        write_json(Path(folder) / PREPROCESSOR_NAME, content)


def _multiple(length: int, of: int | None) -> int:
    return length if of is None else math.ceil(length / of) * of


def _for_all(values: Sequence[float] | None, channels: int | None) -> Sequence[float] | None:
    return values if values is None or channels is None or len(values) > 1 else [values[0]] * channels


def _several(images: Any, dimensions: int) -> list[Any]:
    """A list of images, from one or several."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim > dimensions:
        return list(images)
    return [images]


def _pixels(image: "np.ndarray | Tensor | Image", channels: int) -> np.ndarray:
    """An image as an 8-bit array (C, H, W)."""
    from PIL import Image

    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB" if channels == 3 else "L"))
    x = np.asarray(image)
    if x.dtype != np.uint8:
        raise ValueError(f"expected an image of 8-bit values from 0 to 255, got {x.dtype}")
    if x.ndim == 2:
        x = np.broadcast_to(x, (channels, *x.shape))
    elif x.ndim == 3 and x.shape[0] not in (1, 3, 4) and x.shape[2] in (1, 3, 4):
        x = x.transpose(2, 0, 1)
    if x.ndim != 3:
        raise ValueError(f"expected an image (H, W, C), (C, H, W) or (H, W), got an array of shape {x.shape}")
    return x
