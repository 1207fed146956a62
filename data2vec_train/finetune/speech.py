"""The four speech heads: transcripts, a class per recording, a class per frame, speaker vectors.

Letters: B recordings, S samples, T frames, U symbols, D width.
"""

import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.dataset import random_crop
from data2vec_train.data.sources.files import RawSample, Source
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.finetune.base import (
    NO_LABEL,
    NOTHING_KNOWN,
    Examples,
    HeadTask,
    Inputs,
    Scores,
    padded,
    real_places,
)
from data2vec_train.finetune.metrics import classification_scores, equal_error_rate, transcript_scores
from data2vec_train.finetune.transcribe import BeamDecoder
from data2vec_train.finetune.transcripts import APOSTROPHES, Writing, has_no_spaces, is_turkic
from data2vec_train.objective.masking import SpanMasker
from data2vec_train.system.constraints import require
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.tokenizers import LIBRISPEECH_SYMBOLS, CTCTokenizer

log = logging.getLogger(__name__)

VOCABULARIES = ("letters", "phones", "librispeech", "keep")
FIRST_SYMBOLS = LIBRISPEECH_SYMBOLS[:5]  # blank, start, end, unknown, word boundary


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Masks in training: spans of frames, and spans of channels over all frames (ALGORITHM.md 4.1).

    Attributes:
        time_fraction: fraction of the frames that spans would mask if none overlapped; 0 = no masks.
        time_span: frames per span.
        channel_fraction: the same for channels.
        channel_span: length of a channel span as a fraction of all channels; 64 of 768 in the original code.
    """

    time_fraction: float
    time_span: int
    channel_fraction: float
    channel_span: float

    def __post_init__(self) -> None:
        require(**vars(self))

    def frames(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) bool, True = masked."""
        return _hidden(count, self.time_fraction, self.time_span, rng)

    def channels(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) bool, True = masked."""
        return _hidden(count, self.channel_fraction, max(1, round(self.channel_span * count)), rng)


def _hidden(count: int, fraction: float, span: int, rng: np.random.Generator) -> np.ndarray:
    if fraction == 0 or count <= span + 1:  # a span would mask everything
        return np.zeros(count, dtype=bool)
    rule = {"min_spans": 1, "starts": "inside", "equalise_by": "none"}
    return SpanMasker(nominal_fraction=fraction, span_tokens=span, **rule)(count, None, rng)


class SpeechTask(HeadTask):
    """Base class of the four speech tasks: waveforms in, frames and channels masked at random in training.

    Args:
        inputs: see `Inputs`.
        masks: the masks in training.
        max_seconds: longer recordings are cropped, at random in training; None = no cropping.
    """

    modality = "audio"
    reads_frames: ClassVar[bool] = False  # whether predictions are made frame by frame, so windows can be joined

    def __init__(self, *, inputs: Inputs, masks: SpecAugment, max_seconds: float | None) -> None:
        super().__init__(inputs=inputs)
        self.masks = masks
        self.may_crop = max_seconds is not None
        self.max_samples = None if max_seconds is None else round(max_seconds * inputs.sample_rate_hz)

    def waveform(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> Tensor:
        """The waveform (S,) or (C, S), normalised over the recording, cropped if `max_seconds` is set."""
        wave = self.inputs.transform.train(self.inputs.decode(raw.value))
        return self.cropped(wave, train=train, rng=rng)

    def cropped(self, wave: Tensor, *, train: bool, rng: np.random.Generator) -> Tensor:
        """The recording (..., S), at random cropped to `max_seconds` in training, and to its beginning otherwise."""
        if self.max_samples is not None and wave.shape[-1] > self.max_samples:
            wave = random_crop(wave, self.max_samples, rng) if train else wave[..., : self.max_samples].clone()
        return wave

    def batch_of(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> dict:
        """The model's arguments: waveforms, their mask, and in training the SpecAugment masks."""
        waves = [example["wave"] for example in examples]
        lengths = [wave.shape[-1] for wave in waves]
        rows = padded([wave.mT if wave.dim() == 2 else wave for wave in waves], 0.0)
        rows = rows.mT if rows.dim() == 3 else rows  # (B, S) or (B, C, S)
        inputs = {"input_values": rows, "attention_mask": real_places(lengths)}
        frames = [int(self.inputs.token_count(length)) for length in lengths]
        if train and self.masks.time_fraction:
            inputs["mask_time_indices"] = padded([self.masks.frames(count, rng) for count in frames], False)
        if train and self.masks.channel_fraction:
            rows = [self.masks.channels(self.inputs.dim, rng) for _ in frames]
            inputs["mask_feature_indices"] = padded(rows, False)
        return inputs

    def predict(self, model: PretrainedModel, batch: Examples) -> list[Any]:
        """Predictions; if `reads_frames`, the frame values of each example, (T, ...) on the host, for `read`."""
        if not self.reads_frames:
            return super().predict(model, batch)
        _, outputs = self.loss(model, batch)
        return [
            row[:count] for row, count in zip(self.frame_values(outputs), batch.host["frames"].tolist(), strict=True)
        ]

    def frame_values(self, outputs: Mapping[str, Any]) -> Tensor:
        """(B, T, ...) on the host: the most likely class of each frame."""
        return outputs["logits"].argmax(dim=-1).cpu()

    def model_settings(self) -> dict[str, Any]:
        """Turn off the model's own SpecAugment, which waits for the host in every step; `masks` replaces it."""
        return super().model_settings() | {"apply_spec_augment": False}


# ---------------------------------------------------------------------------------------------------------------------
# Transcripts


class CTC(SpeechTask):
    """Speech to text by connectionist temporal classification: a symbol or a blank for every frame.

    Source: ALGORITHM.md 4.1: the loss is a sum over symbols, divided by the number of recordings. A transcript needs
    one frame for each symbol, and one more, for a blank, between two equal symbols. Records whose transcript cannot be
    spelt are left out of training, counted as broken and listed with the reason. As test records they are listed too;
    they count in the scores but not in the loss. Test records without a transcript are not scored.

    Args:
        text_column: the column of the transcripts.
        vocabulary: "letters" = the letters of the training transcripts, "phones" = their parts between spaces,
            "librispeech" = the 32 symbols of the released models, "keep" = the symbols of the initial weights.
        case, unicode, language: see `transcripts.Writing`.
        remove: regular expression; matches are removed from transcripts. None = nothing is removed.
        words: value of the column -> spoken text, for columns of numbers or codes; None = transcripts.
        metric: "wer" or "cer", which chooses the best weights; "auto" = "cer" for scripts without spaces.
        beam: arguments of `BeamDecoder`; None = the most likely symbol of each frame.
        inputs, masks: see `SpeechTask`.
    """

    model_class = "Data2VecAudioForCTC"
    reads_frames = True
    metric = "wer"
    lower_is_better = True

    def __init__(
        self,
        *,
        text_column: str,
        vocabulary: Literal["letters", "phones", "librispeech", "keep"],
        case: Literal["auto", "upper", "lower", "keep"],
        remove: str | None,
        words: Mapping[Any, str] | None,
        beam: Mapping[str, Any] | None,
        inputs: Inputs,
        masks: SpecAugment,
        unicode: str | None = None,  # defaults for models saved before these three settings existed
        language: str | None = None,
        metric: Literal["auto", "wer", "cer"] = "auto",
    ) -> None:
        super().__init__(inputs=inputs, masks=masks, max_seconds=None)
        if vocabulary not in VOCABULARIES:
            raise ConfigError(f"head.vocabulary={vocabulary!r}: expected one of {', '.join(VOCABULARIES)}")
        if metric not in ("auto", "wer", "cer"):
            raise ConfigError(f"head.metric={metric!r}: expected auto, wer or cer")
        self.text_column = text_column
        self.vocabulary = vocabulary
        self.writing = Writing(unicode=unicode, case=case, language=language)
        self.remove = None if remove is None else _compiled(remove)
        self.words = None if words is None else {str(name): word for name, word in words.items()}
        self.asked_metric = metric
        self.metric = "cer" if metric == "cer" else "wer"
        self.beam = beam
        self.tokenizer: CTCTokenizer | None = None
        self._vocab_size: int | None = None  # number of outputs of the model whose symbols are kept
        self._beam_decoder: BeamDecoder | None = None

    @property
    def label_fields(self) -> list[str]:
        """The column of the transcripts."""
        return [self.text_column]

    def text_of(self, raw: Any) -> str:
        """The value of the column as text, in the form used for training and scores; "" if there is none."""
        if raw is not None and self.words is not None:
            raw = self.words.get(str(raw))
        if not isinstance(raw, str):
            return ""
        return self.writing(raw if self.remove is None else self.remove.sub("", raw))

    @property
    def outputs(self) -> list[str]:
        """The symbols, in the order of the outputs."""
        return sorted(self.tokenizer.vocabulary, key=self.tokenizer.vocabulary.get)

    def usable(self, source: Source) -> np.ndarray:
        """All records; `unusable` lists those whose transcript cannot be spelt."""
        return np.arange(len(source))

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Build the vocabulary from the transcripts, or take the one that `vocabulary` names.

        Raises:
            DataError: no record has a transcript.
        """
        column = source.column(self.text_column)
        column = [column[row] for row in rows]
        if self.writing.language is None and is_turkic("".join(text for text in column if isinstance(text, str))):
            self.writing = replace(self.writing, language="tr")
        texts = list(filter(None, map(self.text_of, column)))
        if not texts:
            raise DataError(
                f"all {len(rows)} transcripts are empty; the first record is {source[int(rows[0])].key} (column "
                f"{self.text_column})"
            )
        if self.vocabulary == "keep" and self.tokenizer is None:
            raise ConfigError("head.vocabulary=keep needs weights with a CTC tokenizer; choose head.vocabulary=letters")
        if self.vocabulary != "keep":
            self._use(_tokenizer_of(self.vocabulary, texts))
        if self.asked_metric == "auto":
            self.metric = "cer" if has_no_spaces(texts) else "wer"
        some = [self.writing(text) for text in texts[:: max(1, len(texts) // 500)]]
        changed = list(filter(self._is_changed, some))
        if changed:
            ids = self.tokenizer(self._fitted(changed[0]))["input_ids"]
            log.warning(
                "%d of %d transcripts change when encoded and decoded with head.vocabulary=%s: %r becomes %r",
                len(changed),
                len(some),
                self.vocabulary,
                changed[0][:60],
                self.tokenizer.decode(ids, group_tokens=False)[:60],
            )

    def _use(self, tokenizer: CTCTokenizer) -> None:
        self.tokenizer = tokenizer
        special = {symbol for symbol in tokenizer.special_symbols if len(symbol) > 1}
        self.writing = self.writing.fitted("".join(symbol for symbol in tokenizer.vocabulary if symbol not in special))
        if tokenizer.phones:  # a phone of several letters has no case of its own
            self.writing = replace(self.writing, letters=None)
        form = self.writing.unicode
        pairs = (
            (symbol, symbol if form is None else unicodedata.normalize(form, symbol)) for symbol in tokenizer.vocabulary
        )
        self._own_forms = {common: own for own, common in pairs if common != own and common not in tokenizer.vocabulary}

    def _is_changed(self, text: str) -> bool:
        """Whether encoding and decoding changes the text, so that even a perfect model could not output it."""
        ids, why = self.spelt(text)
        return not why and self.writing(self.tokenizer.decode(ids, group_tokens=False)) != text

    def _fitted(self, text: str) -> str:
        """The text in the Unicode forms of the vocabulary's symbols."""
        if self.writing.unicode is None or all(letter in self.tokenizer.vocabulary for letter in set(text) - {" "}):
            return text
        if self.tokenizer.phones:
            return " ".join(self._own_forms.get(phone, phone) for phone in text.split())
        known = self.tokenizer.vocabulary
        fitted = []
        for letter in unicodedata.normalize("NFC", text):
            own, parts = self._own_forms.get(letter), unicodedata.normalize("NFD", letter)
            whole = letter in known or (self.tokenizer.do_lower_case and letter.upper() in known)
            fitted.append(letter if whole else own or (parts if all(part in known for part in parts) else letter))
        return "".join(fitted)

    def spelt(self, text: str) -> tuple[list[int], str]:
        """Ids of the symbols of a text, and the reason why they cannot be learned, "" if they can."""
        if not text:
            return [], f"its transcript is empty (column {self.text_column})"
        delimiter = self.tokenizer.word_delimiter
        if delimiter and not self.tokenizer.phones and delimiter in text:
            return [], f"its transcript contains {delimiter}, the symbol for the space between words; see head.remove"
        symbols = self.tokenizer.split(self._fitted(text))
        different = set(symbols)
        special = [symbol for symbol in self.tokenizer.special_symbols if symbol in different and symbol != delimiter]
        if special:
            return [], f"its transcript contains {special[0]}, a special symbol without a sound; see head.remove"
        unknown = sorted(different - self.tokenizer.vocabulary.keys())
        if unknown:
            names = " ".join("(the space)" if symbol in (" ", delimiter) else symbol for symbol in unknown[:10])
            return [], (
                f"its transcript {text[:60]!r} has {names}, which head.vocabulary={self.vocabulary} does not contain; "
                "choose head.vocabulary=letters, or remove it with head.remove"
            )
        return [self.tokenizer.vocabulary[symbol] for symbol in symbols], ""

    def unusable(self, source: Source, rows: np.ndarray) -> list[tuple[int, str]]:
        """Records whose transcripts cannot be spelt with the vocabulary, or not in the recording's number of frames."""
        column = source.column(self.text_column)
        found = []
        for row in rows:
            ids, why = self.spelt(self.text_of(column[row]))
            if not why and source.lengths is not None:
                why = _too_short(ids, int(self.inputs.token_count(int(source.lengths[row]))))
            if why:
                found.append((int(row), why))
        return found

    def check_test(self, source: Source) -> None:
        """Refuse test records without any transcript."""
        if not any(map(self.text_of, source.column(self.text_column))):
            raise DataError(NOTHING_KNOWN)

    def setup_from_pretrained(self, model: PretrainedModel) -> None:
        """Use the tokenizer that is stored beside the weights.

        Raises:
            ConfigError: there is none, or its symbols do not match the model.
        """
        tokenizer = _tokenizer_beside(model)
        size = model.config.vocab_size
        largest = max(tokenizer.vocabulary.values())
        if model.base_model is not model and largest >= size:
            raise ConfigError(
                f"{model.source or 'the weights'}: vocab.json has ids up to {largest}, but the model has {size} "
                "outputs; use the vocab.json of this model"
            )
        if model.config.pad_token_id != tokenizer.pad_token_id:
            log.warning(
                "%s: the blank is %s in config.json but %s (%s) in the tokenizer's files; the tokenizer's value is "
                "used, as in transformers. If transcripts make no sense, this is the cause",
                model.source or "the weights",
                model.config.pad_token_id,
                tokenizer.pad_token_id,
                tokenizer.pad,
            )
        self._use(tokenizer)
        self._vocab_size = size

    def continues(self, model: PretrainedModel) -> bool:
        """Whether the model has the same vocabulary."""
        try:
            return _tokenizer_beside(model).vocabulary == self.tokenizer.vocabulary
        except ConfigError:
            return False

    def model_settings(self) -> dict[str, Any]:
        """Vocabulary size, special symbols, and the loss as a sum over symbols."""
        symbols = self.tokenizer
        special = {"pad_token_id": symbols.pad_token_id}
        special |= {f"{name}_token_id": symbols.vocabulary.get(getattr(symbols, name)) for name in ("bos", "eos")}
        size = max(max(symbols.vocabulary.values()) + 1, self._vocab_size or 0)
        ours = {"vocab_size": size, "ctc_loss_reduction": "sum", "ctc_zero_infinity": True}
        return super().model_settings() | special | ours

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The waveform and the ids of its transcript; no ids if the transcript cannot be spelt."""
        wave = self.waveform(raw, train=train, rng=rng)
        text = self.text_of(raw.fields.get(self.text_column))
        ids, why = self.spelt(text)
        why = why or _too_short(ids, int(self.inputs.token_count(wave.shape[-1])))
        if train and why:
            raise BadSample(why)
        return {"key": raw.key, "wave": wave, "text": text or None, "ids": None if why else ids}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Waveforms and labels; `host["rows"]` holds the indices of the examples that have labels."""
        inputs = self.batch_of(examples, train=train, rng=rng)
        host = {
            "frames": torch.tensor([int(self.inputs.token_count(example["wave"].shape[-1])) for example in examples])
        }
        targets = {}
        rows = [place for place, example in enumerate(examples) if example["ids"] is not None]
        host["rows"] = torch.tensor(rows, dtype=torch.int64)
        if rows:
            ids = [np.array(examples[row]["ids"], dtype=np.int64) for row in rows]
            host["symbols"] = torch.tensor(list(map(len, ids)))
            targets["labels"] = padded(ids, 0)
        return Examples(inputs, targets, host, tuple(example["text"] for example in examples))

    def counted(self, batch: Examples) -> int:
        """The number of examples whose transcript can be spelt."""
        return len(batch.host["rows"])

    def loss(self, model: PretrainedModel, batch: Examples) -> tuple[Tensor | None, Mapping[str, Any]]:
        """The model's own loss, with lengths from the host, so that nothing on the device has to be counted."""
        outputs = model(**batch.inputs)
        if "labels" not in batch.targets:
            return None, outputs
        scores = outputs["logits"].log_softmax(dim=-1, dtype=torch.float32).transpose(0, 1)  # (T, B, V)
        frames, rows = batch.host["frames"], batch.host["rows"]
        if len(rows) < len(batch):
            scores, frames = scores[:, rows.to(scores.device)], frames[rows]
        with torch.backends.cudnn.flags(enabled=False):
            loss = F.ctc_loss(
                scores,
                batch.targets["labels"],
                frames,
                batch.host["symbols"],
                blank=self.tokenizer.pad_token_id,
                reduction="sum",
                zero_infinity=False,  # records that cannot be spelt were removed above
            )
        return loss / len(rows), outputs

    def frame_values(self, outputs: Mapping[str, Any]) -> Tensor:
        """The most likely symbol of each frame, (B, T); all logits (B, T, V) for a beam search."""
        return super().frame_values(outputs) if self.beam is None else outputs["logits"].float().cpu()

    def read(self, frames: Tensor, samples: int) -> dict[str, Any]:
        """The transcript of a recording, `text`, and its `words` with their `start` and `end` in seconds.

        Args:
            frames: (T,) or (T, V), from `frame_values`.
            samples: length of the recording.
        """
        if self.beam is None:
            found = self.tokenizer.decode(frames, output_word_offsets=True)
            text, words = found["text"], found["word_offsets"]
        else:
            text, words = self.beam_decoder.with_times(frames)
        seconds = math.prod(self.inputs.token_count.strides) / self.inputs.sample_rate_hz
        times = [
            {"word": word["word"]} | {end: round(word[f"{end}_offset"] * seconds, 3) for end in ("start", "end")}
            for word in words
        ]
        return {"text": text, "words": times}

    @property
    def beam_decoder(self) -> BeamDecoder:
        """The beam decoder, created on first use."""
        if self._beam_decoder is None:
            self._beam_decoder = BeamDecoder(self.tokenizer, **self.beam)
        return self._beam_decoder

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[str]:
        """Transcripts."""
        values, frames = self.frame_values(outputs), batch.host["frames"].tolist()
        if self.beam is not None:
            return self.beam_decoder(values, frames)
        return [self.tokenizer.decode(row[:count]) for row, count in zip(values, frames, strict=True)]

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        """Word and letter error rates, both sides in the same writing; above 1 with many insertions."""
        return transcript_scores(list(map(self.writing, predictions)), references)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_beam_decoder": None}  # loader processes do not decode


def _tokenizer_of(vocabulary: str, texts: Sequence[str]) -> CTCTokenizer:
    """The vocabulary of a training run; the order of its symbols depends only on the transcripts."""
    if vocabulary == "librispeech":
        return CTCTokenizer()
    if vocabulary == "phones":
        found = sorted({phone for text in texts for phone in text.split()} - set(FIRST_SYMBOLS))
        symbols = (*FIRST_SYMBOLS[:-1], *found)
        return CTCTokenizer({symbol: i for i, symbol in enumerate(symbols)}, word_delimiter=None, phones=True)
    letters = set("".join(texts)) - {" ", FIRST_SYMBOLS[-1]}
    if "'" in letters:  # other apostrophes are replaced by this one, see `Writing`
        letters -= set(APOSTROPHES) - {"'"}
    return CTCTokenizer({symbol: i for i, symbol in enumerate((*FIRST_SYMBOLS, *sorted(letters)))})


def _tokenizer_beside(model: PretrainedModel) -> CTCTokenizer:
    """The tokenizer that was loaded with the model, or the one in its folder."""
    own = next((part for part in model.preparation if isinstance(part, CTCTokenizer)), None)
    if own is not None:
        return own
    if model.source is None or not (model.source / "vocab.json").is_file():
        raise ConfigError(f"{model.source or 'the weights'} has no vocab.json, which maps the outputs to letters")
    return CTCTokenizer.from_pretrained(model.source)


def _too_short(ids: Sequence[int], frames: int) -> str:
    """Why CTC cannot align the symbols with this number of frames; "" if it can."""
    numbers = np.asarray(ids)
    repeats = int((numbers[:-1] == numbers[1:]).sum())
    if len(ids) + repeats <= frames:
        return ""
    between = f" and {repeats} blanks between equal ones" if repeats else ""
    return (
        f"{len(ids)} symbols{between} in {frames} frames: CTC needs a frame for each; does the transcript belong to "
        "another recording?"
    )


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"head.remove={pattern!r} is not a regular expression ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Classes


class UtteranceClassification(SpeechTask):
    """A class for a recording: of sound, or of whatever the modality of a plugin takes.

    Inputs of a plugin go through its transform as in pretraining. They have equal shapes, or differ in their last axis
    and are padded.

    Args:
        layer_sum: read a learned average of all layers instead of the last one, as SUPERB does with frozen encoders.
        inputs, masks, max_seconds: see `SpeechTask`.

    Raises:
        ConfigError: a setting that only the encoder of modality=audio can follow.
    """

    model_class = "Data2VecAudioForSequenceClassification"
    metric = "accuracy"
    needs_classes = True

    def __init__(self, *, layer_sum: bool, inputs: Inputs, masks: SpecAugment, max_seconds: float | None) -> None:
        super().__init__(inputs=inputs, masks=masks, max_seconds=max_seconds)
        self.layer_sum = layer_sum
        self.of_plugin = inputs.modality not in ("", "audio")
        if self.of_plugin:
            self.modality, self.model_class = inputs.modality, "Data2VecPluginForSequenceClassification"
            only = "is for modality=audio, whose encoder"
            if layer_sum:
                raise ConfigError(f"head.layer_sum=true {only} gives a head all its layers; leave it at false")
            for name in ("time_fraction", "channel_fraction"):
                if getattr(masks, name):
                    raise ConfigError(f"head.masks.{name} {only} can hide frames during fine-tuning; leave it at 0")
            if max_seconds is not None and not inputs.sample_rate_hz:
                raise ConfigError(
                    f"head.max_seconds={max_seconds:g}: modality={inputs.modality} has no sample_rate_hz, so seconds "
                    "cannot be counted; choose head.max_seconds=null"
                )

    def model_settings(self) -> dict[str, Any]:
        """Class names, and for speech whether the head reads a weighted sum of all layers."""
        if self.of_plugin:
            return HeadTask.model_settings(self)
        return super().model_settings() | {"use_weighted_layer_sum": self.layer_sum}

    def waveform(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> Tensor:
        """As for all speech; for a plugin the input (..., S) of its encoder, cropped if `max_seconds` is set."""
        if not self.of_plugin:
            return super().waveform(raw, train=train, rng=rng)
        transform = self.inputs.transform
        value = (transform.train if train else transform.evaluate)(self.inputs.decode(raw.value))
        return self.cropped(value, train=train, rng=rng)

    def batch_of(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> dict:
        """As for all speech; for a plugin its inputs, padded at the end of the last axis, and their mask."""
        if not self.of_plugin:
            return super().batch_of(examples, train=train, rng=rng)
        values = [example["wave"] for example in examples]
        lengths = [value.shape[-1] for value in values]
        if len(set(lengths)) == 1:
            return {"inputs": torch.stack(values)}
        rows = [F.pad(value, (0, max(lengths) - value.shape[-1]), value=self.inputs.pad_value) for value in values]
        return {"inputs": torch.stack(rows), "attention_mask": real_places(lengths)}

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The waveform and the class of a record."""
        return {"key": raw.key, "wave": self.waveform(raw, train=train, rng=rng), "label": raw.label}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Waveforms, and labels if all examples have one."""
        inputs = self.batch_of(examples, train=train, rng=rng)
        labels = tuple(example["label"] for example in examples)
        if all(label is not None for label in labels):
            inputs["labels"] = torch.tensor(labels)
        return Examples(inputs, references=labels)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[dict[str, Any]]:
        """Class names with their probabilities."""
        return class_predictions(outputs["logits"], self.class_names)

    def score(self, predictions: Sequence[dict[str, Any]], references: Sequence[int]) -> Scores:
        """Accuracy, F1 and Matthews correlation."""
        return classification_scores(
            [prediction["index"] for prediction in predictions], references, len(self.class_names)
        )


NO_FRAME = "no frame has a class: the labels are empty, or cover no frame of the recording"


class FrameClassification(SpeechTask):
    """A class for every frame.

    Args:
        labels_column: holds either a list of {start, end, label} in seconds, or a list of labels at equal intervals
            over the recording.
        background: class of frames that no segment covers; None = such frames are ignored.
        layer_sum: see `UtteranceClassification`.
        inputs, masks: see `SpeechTask`.
    """

    model_class = "Data2VecAudioForAudioFrameClassification"
    reads_frames = True
    metric = "accuracy"

    def __init__(
        self, *, labels_column: str, background: str | None, layer_sum: bool, inputs: Inputs, masks: SpecAugment
    ) -> None:
        super().__init__(inputs=inputs, masks=masks, max_seconds=None)
        self.labels_column = labels_column
        self.background = background
        self.layer_sum = layer_sum

    @property
    def label_fields(self) -> list[str]:
        """The column of the labels."""
        return [self.labels_column]

    def setup(self, source: Source, rows: np.ndarray) -> None:
        """Collect the classes."""
        column = source.column(self.labels_column)
        names = {str(_name(label)) for row in rows for label in _list_of(column[row])}
        names |= set() if self.background is None else {self.background}
        if len(names) < 2:
            raise DataError(
                f"column {self.labels_column} has the classes {sorted(names) or 'none'}; expected at least two, in "
                "lists of {start, end, label} or of labels"
            )
        self.class_names = sorted(names)

    def check_test(self, source: Source) -> None:
        """Refuse test records with classes that no training record has."""
        names = {str(_name(label)) for labels in source.column(self.labels_column) for label in _list_of(labels)}
        new = sorted(names - set(self.class_names))
        if new:
            raise DataError(f"test records have the class {new[0]}, which no training record has")

    def model_settings(self) -> dict[str, Any]:
        """Class names, and whether the head reads a weighted sum of all layers."""
        return super().model_settings() | {"use_weighted_layer_sum": self.layer_sum}

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The waveform and the class of each frame."""
        wave = self.waveform(raw, train=train, rng=rng)
        labels = raw.fields.get(self.labels_column)
        frames = int(self.inputs.token_count(wave.shape[-1]))
        classes = None if labels is None else self._classes(_list_of(labels), frames, wave.shape[-1])
        if classes is not None and not (classes != NO_LABEL).any():
            if train:
                raise BadSample(NO_FRAME)
            classes = None
        return {"key": raw.key, "wave": wave, "classes": classes}

    def unusable(self, source: Source, rows: np.ndarray) -> list[tuple[int, str]]:
        """Records whose labels are invalid, or give no frame a class."""
        if source.lengths is None:
            return []
        column = source.column(self.labels_column)
        found = []
        for row in rows:
            samples = int(source.lengths[row])
            try:
                classes = self._classes(_list_of(column[row]), int(self.inputs.token_count(samples)), samples)
                why = "" if (classes != NO_LABEL).any() else NO_FRAME
            except BadSample as error:
                why = str(error)
            if why:
                found.append((int(row), why))
        return found

    def _classes(self, labels: list[Any], frames: int, samples: int) -> np.ndarray:
        """(T,) int64: the class at the middle of each frame."""
        number = {name: index for index, name in enumerate(self.class_names)}
        middle = (np.arange(frames) + 0.5) * samples / frames / self.inputs.sample_rate_hz
        empty = NO_LABEL if self.background is None else number[self.background]
        if labels and not isinstance(labels[0], Mapping):
            place = np.minimum((np.arange(frames) + 0.5) * len(labels) / frames, len(labels) - 1).astype(np.int64)
            names = [str(labels[index]) for index in place]
            unknown = next((name for name in names if name not in number), None)
            if unknown is not None:
                raise BadSample(f"the class {unknown} is none of {', '.join(self.class_names[:10])}")
            return np.array([number[name] for name in names], dtype=np.int64)
        classes = np.full(frames, empty, dtype=np.int64)
        for segment in labels:
            try:
                start, end, name = float(segment["start"]), float(segment["end"]), str(segment["label"])
            except (KeyError, TypeError, ValueError) as error:
                raise BadSample(f"a segment of {segment!r}; expected start, end and label") from error
            if name not in number:
                raise BadSample(f"the class {name} is none of {', '.join(self.class_names[:10])}")
            if not 0 <= start < end < math.inf:
                raise BadSample(f"a segment from {start:g} to {end:g} s; expected 0 <= start < end")
            if end > 2 * samples / self.inputs.sample_rate_hz + 1:
                raise BadSample(
                    f"a segment until {end:g} s in a recording of {samples / self.inputs.sample_rate_hz:.2f} s; are "
                    "the times in seconds?"
                )
            classes[(middle >= start) & (middle < end)] = number[name]
        return classes

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Waveforms, and labels if all examples have them; `host` holds lengths in frames and samples."""
        inputs = self.batch_of(examples, train=train, rng=rng)
        classes = tuple(example["classes"] for example in examples)
        if all(labels is not None for labels in classes):
            inputs["labels"] = padded(classes, NO_LABEL)
        frames = torch.tensor([int(self.inputs.token_count(example["wave"].shape[-1])) for example in examples])
        samples = torch.tensor([example["wave"].shape[-1] for example in examples])
        return Examples(inputs, host={"frames": frames, "samples": samples}, references=classes)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[dict[str, Any]]:
        """Segments of frames with the same class, and the class of each frame."""
        lengths = zip(batch.host["frames"].tolist(), batch.host["samples"].tolist(), strict=True)
        return [
            self.read(row[:count], samples)
            for row, (count, samples) in zip(self.frame_values(outputs), lengths, strict=True)
        ]

    def read(self, frames: Tensor, samples: int) -> dict[str, Any]:
        """`segments` of frames with the same class, and `frames`, the class of each frame.

        Args:
            frames: (T,) classes.
            samples: length of the recording.
        """
        seconds = samples / len(frames) / self.inputs.sample_rate_hz
        return {"segments": self._segments(frames.numpy(), seconds), "frames": frames.numpy()}

    def _segments(self, classes: np.ndarray, seconds: float) -> list[dict[str, Any]]:
        edges = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), len(classes)]
        return [
            {
                "start": round(first * seconds, 3),
                "end": round(last * seconds, 3),
                "label": self.class_names[classes[first]],
            }
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]

    def score(self, predictions: Sequence[dict[str, Any]], references: Sequence[np.ndarray]) -> Scores:
        """Accuracy, F1 and Matthews correlation over all frames that have a class."""
        found = np.concatenate([prediction["frames"] for prediction in predictions])
        wanted = np.concatenate(list(references))
        real = wanted != NO_LABEL  # at least one, see `example`
        return classification_scores(found[real], wanted[real], len(self.class_names))


def _list_of(labels: Any) -> list[Any]:
    if isinstance(labels, Mapping):  # `datasets` may store a list of structs as a struct of lists
        return [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]
    return [] if labels is None else list(labels)


def _name(label: Any) -> Any:
    return label.get("label") if isinstance(label, Mapping) else label


class SpeakerVerification(SpeechTask):
    """Vectors that distinguish speakers, including speakers that are not in the training data (x-vectors).

    The score is the equal error rate over all pairs of test recordings, by cosine; test speakers may be new.

    Args:
        layer_sum: see `UtteranceClassification`.
        vector_dim: width of a speaker vector.
        tdnn_dim: widths of the time-delay layers.
        inputs, masks, max_seconds: see `SpeechTask`.
    """

    model_class = "Data2VecAudioForXVector"
    metric = "eer"
    lower_is_better = True
    same_classes = False
    needs_classes = True

    def __init__(
        self,
        *,
        layer_sum: bool,
        vector_dim: int,
        tdnn_dim: Sequence[int],
        inputs: Inputs,
        masks: SpecAugment,
        max_seconds: float | None,
    ) -> None:
        super().__init__(inputs=inputs, masks=masks, max_seconds=max_seconds)
        self.layer_sum = layer_sum
        self.vector_dim = vector_dim
        self.tdnn_dim = list(tdnn_dim)

    def check_test(self, source: Source) -> None:
        """Refuse test records without speakers, or with too few for a score; the speakers may be new."""
        if source.labels() is None:
            raise DataError("test records have no speakers; name their column with data.label_column")
        self._check_pairs(source.labels(), "test records")

    def check_held_out(self, source: Source, rows: np.ndarray) -> None:
        """Refuse held-out records with too few speakers for a score."""
        self._check_pairs(source.labels()[rows], "held-out records", "; raise data.held_out_fraction")

    def _check_pairs(self, labels: np.ndarray, what: str, remedy: str = "") -> None:
        _, counts = np.unique(labels[labels >= 0], return_counts=True)
        if len(counts) < 2 or counts.max() < 2:
            raise DataError(
                f"{what}: {counts.sum()} recordings of {len(counts)} speakers; an equal error rate needs at least two "
                f"speakers, and two recordings of one of them{remedy}"
            )

    def model_settings(self) -> dict[str, Any]:
        """Class names, the widths of the head, and whether it reads a weighted sum of all layers."""
        own = {"xvector_output_dim": self.vector_dim, "tdnn_dim": self.tdnn_dim}
        return super().model_settings() | {"use_weighted_layer_sum": self.layer_sum} | own

    def example(self, raw: RawSample, *, train: bool, rng: np.random.Generator) -> dict[str, Any]:
        """The waveform and the speaker of a record."""
        wave = self.waveform(raw, train=train, rng=rng)
        frames = int(self.inputs.token_count(wave.shape[-1]))
        if frames < 15:  # the receptive field of the time-delay layers
            raise BadSample(f"{frames} frames; speaker vectors need at least 15")
        return {"key": raw.key, "wave": wave, "label": raw.label}

    def collate(self, examples: Sequence[dict[str, Any]], *, train: bool, rng: np.random.Generator) -> Examples:
        """Waveforms, and labels in training."""
        inputs = self.batch_of(examples, train=train, rng=rng)
        labels = tuple(example["label"] for example in examples)
        # The loss has classes for the training speakers only.
        if train and all(label is not None for label in labels):
            inputs["labels"] = torch.tensor(labels)
        return Examples(inputs, references=labels)

    def predictions(self, outputs: Mapping[str, Any], batch: Examples) -> list[np.ndarray]:
        """Speaker vectors of length 1."""
        return list(F.normalize(outputs["embeddings"].float(), dim=-1).cpu().numpy())

    def score(self, predictions: Sequence[np.ndarray], references: Sequence[int]) -> Scores:
        """The equal error rate, `eer`."""
        return {"eer": equal_error_rate(np.stack(list(predictions)), np.array(references))}


def class_predictions(logits: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The most likely class of each row of logits (B, C): its name, number and probability."""
    shares = logits.float().softmax(dim=-1)
    best = shares.argmax(dim=-1)
    pairs = zip(best.tolist(), shares.gather(1, best[:, None])[:, 0].tolist(), strict=True)
    return [{"label": names[index], "index": index, "probability": share} for index, share in pairs]
