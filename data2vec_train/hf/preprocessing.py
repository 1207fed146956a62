"""From recordings, images and texts to what models eat, exactly as transformers prepares them, and its files.

    AudioFeatureExtractor   Wav2Vec2FeatureExtractor     preprocessor_config.json
    ImageProcessor          BeitImageProcessorPil        preprocessor_config.json
    TextTokenizer           RobertaTokenizer             tokenizer.json, tokenizer_config.json
    CTCTokenizer            Wav2Vec2CTCTokenizer         vocab.json, tokenizer_config.json

Letters: B samples, S audio samples, C channels, (H, W) pixels, T tokens, U symbols. Source: contract section 4.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers
    from PIL.Image import Image

PREPROCESSOR_NAME = "preprocessor_config.json"
# Symbols of the released CTC models, by id; the first is also CTC's blank.
LIBRISPEECH_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


class AudioFeatureExtractor:
    """Waveforms to a normalised, padded batch.

    Args:
        sampling_rate: of the recordings, Hz.
        do_normalize: give each recording mean 0 and variance 1.
        return_attention_mask: whether to say what is padding. transformers' default is False, which suits other
            models: data2vec's front end has layer norms and wants the mask.
        padding_value: what shorter recordings are filled up with, after normalising.
        feature_size: 1, a waveform.
    """

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
            max_length: samples, for truncating and for padding to.
            truncation: cut what is longer than `max_length`.
            pad_to_multiple_of: round lengths up to a multiple.
            return_attention_mask: None = as the extractor was made. Without a mask, mean and variance are those of the
                padded row, and padding is normalised too: what transformers does.
            return_tensors: "pt", "np" or None.
            sampling_rate: of these recordings; a check.

        Raises:
            ValueError: another sampling rate, several channels, or settings that contradict each other.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(f"recordings at {sampling_rate} Hz, and the model wants {self.sampling_rate} Hz: resample")
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
        return {name: _stacked(values, return_tensors) for name, values in output.items()}

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
        content = _read(Path(folder) / PREPROCESSOR_NAME)
        if content.get("padding_side", "right") != "right":
            raise ConfigError("recordings are padded on the right; padding_side says otherwise")
        names = ("sampling_rate", "do_normalize", "return_attention_mask", "padding_value", "feature_size")
        return cls(**{name: content[name] for name in names if name in content})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        names = ("sampling_rate", "do_normalize", "return_attention_mask", "padding_value", "feature_size")
        content = {name: getattr(self, name) for name in names}
        kind = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "padding_side": "right"}
        _write(Path(folder) / PREPROCESSOR_NAME, kind | content)


class ImageProcessor:
    """Images to a normalised batch: resize (bicubic, aspect not kept), perhaps crop, rescale, normalise.

    Args:
        size: height and width, or one number for both, pixels; None = leave the size.
        resample: PIL's number of the filter, 3 = bicubic.
        crop_size: height and width of a crop from the middle; None = no crop.
        rescale_factor: 8-bit values are multiplied by this; None = not.
        image_mean: of each channel, after rescaling; None = do not normalise.
        image_std: likewise.
        do_reduce_labels: in segmentation maps, 0 becomes 255 (no class), the others decrease by 1.
        hf_compat: resize segmentation maps bicubically, which invents classes (contract, bug 8), instead of taking the
            nearest pixel.
    """

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
    ) -> None:
        if (image_mean is None) != (image_std is None):
            raise ConfigError("image_mean and image_std go together")
        self.size = (size, size) if isinstance(size, int) else size
        self.resample = resample
        self.crop_size = crop_size
        self.rescale_factor = rescale_factor
        self.image_mean = image_mean
        self.image_std = image_std
        self.do_reduce_labels = do_reduce_labels
        self.hf_compat = hf_compat

    def __call__(self, images: Any, segmentation_maps: Any = None, return_tensors: str | None = None) -> dict[str, Any]:
        """`pixel_values` (B, C, H, W) float32, and `labels` (B, H, W) int64 when there are maps.

        Args:
            images: one or several: PIL images, or 8-bit arrays or tensors (H, W, C), (C, H, W) or (H, W).
            segmentation_maps: as many, (H, W).
            return_tensors: "pt", "np", or None = lists of arrays.

        Raises:
            ValueError: something that is no image, or other channels than the mean and deviation have.
        """
        output: dict[str, Any] = {"pixel_values": [self._image(one) for one in _several(images, 3)]}
        if segmentation_maps is not None:
            output["labels"] = [self._map(one) for one in _several(segmentation_maps, 2)]
        return {name: _stacked(values, return_tensors) for name, values in output.items()}

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
        mean, std = (np.array(one, dtype=np.float32)[:, None, None] for one in (self.image_mean, self.image_std))
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
        # Smaller images are surrounded with zeros, the larger half first.
        x = np.pad(x, ((0, 0), *((math.ceil(one / 2), one // 2) for one in more)))
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
            F.interpolate(one[None], size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for one, size in zip(logits, target_sizes, strict=True)
        ]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, hf_compat: bool = False) -> "ImageProcessor":
        """The processor that a folder describes, old files of BeitFeatureExtractor included.

        Raises:
            ConfigError: it describes none, or one that keeps the aspect.
        """
        content = _read(Path(folder) / PREPROCESSOR_NAME)

        def size_of(name: str, on: str, default: bool) -> tuple[int, int] | None:
            if not content.get(on, default):
                return None
            found = content.get(name, {"height": 224, "width": 224})
            if isinstance(found, int):
                return (found, found)
            if set(found) != {"height", "width"}:
                raise ConfigError(f"{name}={found}: expected a height and a width")
            return (found["height"], found["width"])

        normalise = content.get("do_normalize", True)
        return cls(
            size=size_of("size", "do_resize", True),
            resample=content.get("resample", 3),
            crop_size=size_of("crop_size", "do_center_crop", False),
            rescale_factor=content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else None,
            image_mean=content.get("image_mean", [0.5] * 3) if normalise else None,
            image_std=content.get("image_std", [0.5] * 3) if normalise else None,
            do_reduce_labels=content.get("do_reduce_labels", content.get("reduce_labels", False)),
            hf_compat=hf_compat,
        )

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
        }
        _write(Path(folder) / PREPROCESSOR_NAME, content)


class TextTokenizer:
    """Byte-level BPE with RoBERTa's special tokens: `<s> text </s>`, or `<s> A </s></s> B </s>` for two.

    Make one with `from_pretrained` or `from_files`.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", *, model_max_length: int | None = None) -> None:
        self._inner = inner
        self.model_max_length = model_max_length
        absent = [one for one in ("<s>", "<pad>", "</s>", "<mask>") if inner.token_to_id(one) is None]
        if absent:
            raise ConfigError(f"the tokenizer has no {', '.join(absent)}; expected RoBERTa's special tokens")
        self.pad_token_id = inner.token_to_id("<pad>")
        self.mask_token_id = inner.token_to_id("<mask>")

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, *, model_max_length: int | None = None
    ) -> "TextTokenizer":
        """From vocab.json and merges.txt; `<mask>` takes the space before it.

        Raises:
            ConfigError: a file is missing or broken.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        try:
            inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{vocab} and {merges} are no byte-level BPE ({error})") from error
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        return cls(with_special_tokens(inner), model_max_length=model_max_length)

    @classmethod
    def from_json(cls, content: str, *, model_max_length: int | None = None) -> "TextTokenizer":
        """From the content of a tokenizer.json of a byte-level BPE that may lack special tokens; they are added."""
        import tokenizers

        return cls(with_special_tokens(tokenizers.Tokenizer.from_str(content)), model_max_length=model_max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextTokenizer":
        """From a folder with a tokenizer.json, or with vocab.json and merges.txt.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        import tokenizers

        folder = Path(folder)
        settings = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        longest = settings.get("model_max_length")
        longest = longest if isinstance(longest, int) and longest < 10**9 else None
        if not (folder / "tokenizer.json").is_file():
            if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
                raise ConfigError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
            return cls.from_files(folder / "vocab.json", folder / "merges.txt", model_max_length=longest)
        try:
            inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{folder / 'tokenizer.json'} is no tokenizer ({error})") from error
        return cls(inner, model_max_length=longest)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.save(str(folder / "tokenizer.json"))
        mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False}
        content = {
            "tokenizer_class": "RobertaTokenizer",
            "add_prefix_space": False,
            "trim_offsets": True,
            **{f"{name}_token": token for name, token in (("bos", "<s>"), ("cls", "<s>"), ("eos", "</s>"))},
            **{f"{name}_token": token for name, token in (("sep", "</s>"), ("unk", "<unk>"), ("pad", "<pad>"))},
            "mask_token": mask | {"rstrip": False, "single_word": False, "special": True},
        }
        if self.model_max_length is not None:
            content["model_max_length"] = self.model_max_length
        _write(folder / "tokenizer_config.json", content)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask`: (B, T) int64 with `return_tensors`, else lists; of one text without B.

        Args:
            text: one or several.
            text_pair: as many second texts.
            padding: True or "longest", "max_length", or False; padding is on the right.
            truncation: cut what is longer than `max_length`, the longer of two texts first.
            max_length: tokens, special ones included; None = `model_max_length`.
            add_special_tokens: the ones around the text.
            return_tensors: "pt", "np" or None.

        Raises:
            ValueError: settings that contradict each other, or rows that differ in length and should be a tensor.
        """
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        pairs = text_pair if text_pair is None else [text_pair] if single else list(text_pair)
        longest = self.model_max_length if max_length is None else max_length
        if (truncation or padding == "max_length") and longest is None:
            raise ValueError("truncation and padding='max_length' need max_length")
        if truncation:
            self._inner.enable_truncation(longest)
        else:
            self._inner.no_truncation()
        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self._inner.encode_batch(inputs, add_special_tokens=add_special_tokens)
        rows = [one.ids for one in encoded]
        size = {True: max(map(len, rows)), "longest": max(map(len, rows)), "max_length": longest}.get(padding, 0)
        masks = [[1] * len(row) + [0] * (size - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (size - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": rows[0], "attention_mask": masks[0]} if single else _ids(rows, masks)
        return {
            name: _stacked([np.array(one) for one in values], return_tensors)
            for name, values in _ids(rows, masks).items()
        }

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids (T,) to a text."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        """Several rows of ids to texts."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def with_special_tokens(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A byte-level BPE that recognises RoBERTa's special tokens in texts and puts them around texts."""
    from tokenizers import AddedToken, processors

    inner.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in SPECIAL_TOKENS[:-1]])
    inner.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    ends = [(token, inner.token_to_id(token)) for token in ("</s>", "<s>")]
    inner.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return inner


SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class CTCTokenizer:
    """Letters for CTC: text to ids, and frames' ids to text.

    Args:
        vocabulary: symbol -> id.
        do_lower_case: the vocabulary is in upper case: turn texts into it. Otherwise lower-case letters are unknown.
        word_delimiter: what stands for a space.
        hf_compat: with `skip_special_tokens`, transformers also drops the blanks before it merges repeated symbols, so
            that LETTER is read as LETER; do the same.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int] | None = None,
        *,
        do_lower_case: bool = False,
        word_delimiter: str = "|",
        hf_compat: bool = False,
    ) -> None:
        self.hf_compat = hf_compat
        self.vocabulary = dict(vocabulary or {symbol: i for i, symbol in enumerate(LIBRISPEECH_SYMBOLS)})
        absent = [one for one in ("<pad>", "<unk>", word_delimiter) if one not in self.vocabulary]
        if absent:
            raise ConfigError(f"the vocabulary lacks {', '.join(absent)}")
        self.symbols = {number: symbol for symbol, number in self.vocabulary.items()}
        self.do_lower_case = do_lower_case
        self.word_delimiter = word_delimiter
        self.pad_token_id = self.vocabulary["<pad>"]

    def __call__(self, text: str | Sequence[str]) -> dict[str, Any]:
        """`input_ids` of one text (U,), or of several, as lists."""
        if not isinstance(text, str):
            return {"input_ids": [self._encode(one) for one in text]}
        return {"input_ids": self._encode(text)}

    def _encode(self, text: str) -> list[int]:
        text = text.upper() if self.do_lower_case else text
        unknown = self.vocabulary["<unk>"]
        return [self.vocabulary.get(one, unknown) for one in text.replace(" ", self.word_delimiter)]

    def decode(
        self,
        ids: Sequence[int] | Tensor,
        skip_special_tokens: bool = False,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """Ids of frames (T,) -> text, or a mapping of `text`, `char_offsets` and `word_offsets` in frames.

        Args:
            ids: the likeliest symbol of each frame.
            skip_special_tokens: leave out `<s>`, `</s>` and `<unk>`, too, before repetitions are counted.
            group_tokens: count a repeated symbol once.
            output_char_offsets: also say where each symbol starts and ends.
            output_word_offsets: also say where each word starts and ends.
        """
        numbers = [int(one) for one in ids]
        if skip_special_tokens:
            left_out = {self.vocabulary.get(one) for one in SPECIAL_TOKENS if one != "<pad>" or self.hf_compat}
            numbers = [one for one in numbers if one not in left_out]
        start = 0
        found: list[dict[str, Any]] = []
        for number, run in groupby(numbers):
            length = sum(1 for _ in run)
            pieces = [(start, start + length)] if group_tokens else [(start + i, start + i + 1) for i in range(length)]
            start += length
            symbol = self.symbols.get(number, "<unk>")
            if symbol == "<pad>":
                continue
            char = " " if symbol == self.word_delimiter else symbol
            found += [{"char": char, "start_offset": first, "end_offset": last} for first, last in pieces]
        text = "".join(one["char"] for one in found).strip()
        if self.do_lower_case:
            text = text.lower()
        if not (output_char_offsets or output_word_offsets):
            return text
        output: dict[str, Any] = {"text": text}
        if output_char_offsets:
            output["char_offsets"] = found
        if output_word_offsets:
            output["word_offsets"] = _words(found)
        return output

    def batch_decode(self, rows: Any, **options: Any) -> list[Any]:
        """Several rows; see `decode`."""
        return [self.decode(row, **options) for row in rows]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CTCTokenizer":
        """From vocab.json and, if there is one, tokenizer_config.json.

        Raises:
            ConfigError: there is no vocabulary.
        """
        folder = Path(folder)
        settings = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        return cls(
            _read(folder / "vocab.json"),
            do_lower_case=settings.get("do_lower_case", False),
            word_delimiter=settings.get("word_delimiter_token", "|"),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json and tokenizer_config.json."""
        folder = Path(folder)
        _write(folder / "vocab.json", self.vocabulary)
        content = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "do_lower_case": self.do_lower_case,
            "word_delimiter_token": self.word_delimiter,
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        }
        _write(folder / "tokenizer_config.json", content)


# ---------------------------------------------------------------------------------------------------------------------


def _words(chars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    words = []
    for is_space, run in groupby(chars, key=lambda one: one["char"] == " "):
        run = list(run)
        if not is_space:
            word = "".join(one["char"] for one in run)
            words.append({"word": word, "start_offset": run[0]["start_offset"], "end_offset": run[-1]["end_offset"]})
    return words


def _multiple(length: int, of: int | None) -> int:
    return length if of is None else math.ceil(length / of) * of


def _ids(rows: list[list[int]], masks: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": rows, "attention_mask": masks}


def _stacked(values: list[np.ndarray], kind: str | None) -> Any:
    if kind is None:
        return values
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors is 'pt', 'np' or None, got {kind!r}")
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(f"samples of different shapes make no tensor: {sorted(shapes)[:3]}; set padding=True")
    return torch.from_numpy(np.stack(values)) if kind == "pt" else np.stack(values)


def _several(images: Any, dimensions: int) -> list[Any]:
    """A list of images, from one or several."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim > dimensions:
        return list(images)
    return [images]


def _pixels(image: "np.ndarray | Tensor | Image", channels: int) -> np.ndarray:
    """(C, H, W) 8-bit."""
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


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
