"""Speech and other recordings: from files or bytes to normalised waveforms, reading only the segments needed.

soundfile decodes (its wheels bring libsndfile: wav, flac, ogg, opus, mp3 and more), torchaudio resamples. A recording
that is too long for one utterance is cut into segments; each segment is an utterance. Letters: S samples, C channels.
"""

import functools
import hashlib
import io
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.files import open_file, version_of
from data2vec_train.data.sources.files import BROKEN_ARCHIVE, RawSample, Source, StreamingSource
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.system.constraints import require
from data2vec_train.system.outputs import writing

log = logging.getLogger(__name__)

MAX_RATE_RATIO = 100  # between a file's sample rate and the model's: more is a damaged header
MAX_CHANNELS = 64
MAX_FILTER = 2_000_000  # numbers in the filters of a resampler: 44.1 kHz to 16 kHz takes 70,560, 44,101 Hz 7e8
CANCELLED = 1e-3  # channels cancel out if their mix divided by the loudest channel is below this (standard deviations)
LONG_SECONDS = 120.0  # the end of longer FLAC files is checked too; the check seeks, which takes time
# Larger sizes in a header mean "unknown": programs that stream their output cannot go back to fill in the size.
MAX_HEADER_BYTES = 0x7FFFF000
# How libsndfile reports that the size in a header (of WAV, AIFF, AU, W64) differs from that of the file.
PROMISED = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
HEADER_CHECKS = "2"  # raise it when a header check is added: cached durations are then read again
HEADER_THREADS = 8
WINDOW_SECONDS, HOP_SECONDS, NUM_MELS = 0.025, 0.010, 80  # of log-mel spectrograms


@dataclass(frozen=True)
class Segment:
    """Part of a recording."""

    value: bytes | Path | np.ndarray | str
    start_seconds: float
    seconds: float | None  # None = to the end
    may_be_silent: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# One recording


def decode_audio(
    value: Segment | bytes | Path | np.ndarray | str | BadSample,
    *,
    sample_rate_hz: int,
    channels: int,
    min_seconds: float,
    min_level: float,
    max_level: float,
) -> np.ndarray:
    """A waveform, float32, (S,) for one channel or (C, S).

    Args:
        value: file content, a file, or a segment of one; only the segment is read. An array (S,) or (C, S) of floats
            or 16-bit integers must already be at `sample_rate_hz`.
        sample_rate_hz: of the result.
        channels: C. 1 averages all channels of the file; otherwise the file must have exactly C channels.
        min_seconds: shorter waveforms are refused.
        min_level: standard deviation below which a recording is silence; 1 is full scale.
        max_level: absolute value above which the file is broken or its number format wrong.

    Known limits: wrong bytes within uncompressed sound are not detected. A truncated Ogg file, or a truncated mp3
    without a Xing or VBRI header, decodes as a shorter recording. A wrong but plausible sample rate is not detected.

    Raises:
        BadSample: not a usable recording; the text is a short reason.
    """
    if isinstance(value, BadSample):
        raise value
    segment = value if isinstance(value, Segment) else Segment(value, 0.0, None)
    if isinstance(segment.value, str):
        raise BadSample("a text, not a recording")
    if isinstance(segment.value, np.ndarray):
        waveform, rate = _from_array(segment, sample_rate_hz), sample_rate_hz  # (S, C)
    else:
        waveform, rate = _read_segment(segment, sample_rate_hz)
    if not len(waveform):
        raise BadSample("no samples")
    if len(waveform) < min_seconds * rate - 1:
        raise BadSample(f"{len(waveform) / rate:.3f} s, shorter than modality.min_seconds={min_seconds:g}")
    if channels not in (1, waveform.shape[1]):
        raise BadSample(f"{waveform.shape[1]} channels, expected modality.channels={channels}")
    if not np.isfinite(waveform).all():
        raise BadSample("values that are not finite")
    peak = float(np.abs(waveform).max())
    if peak > max_level:
        raise BadSample(f"a value of {peak:.3g}, louder than modality.decode.max_level={max_level:g}; full scale is 1")
    loudest = float(waveform.std(axis=0, dtype=np.float64).max())
    if channels == 1 and waveform.shape[1] > 1:
        waveform = waveform.mean(axis=1, keepdims=True)
        if loudest > 0 and float(waveform.std(dtype=np.float64)) < CANCELLED * loudest:
            raise BadSample("its channels cancel each other out when they are mixed to one")
    if segment.may_be_silent and not loudest >= min_level:
        waveform = np.zeros_like(waveform)
    elif not (waveform != waveform[0]).any():
        raise BadSample("silence: all samples are equal")
    elif loudest < min_level:
        raise BadSample(f"silence: a deviation of {loudest:.1g}, below modality.decode.min_level={min_level:g}")
    waveform = np.ascontiguousarray(waveform.T)  # (C, S)
    if rate != sample_rate_hz:
        waveform = _resampled(waveform, rate, sample_rate_hz)
    return waveform[0] if channels == 1 else waveform


def _read_segment(segment: Segment, sample_rate_hz: int) -> tuple[np.ndarray, int]:
    """Frames of a segment, (S, C) float32, and their rate."""
    with _opened(segment.value, sample_rate_hz) as file:
        rate = file.samplerate
        start = min(round(segment.start_seconds * rate), file.frames)
        wanted = file.frames - start if segment.seconds is None else round(segment.seconds * rate)
        wanted = min(wanted, file.frames - start)
        try:
            if start:
                file.seek(start)
            waveform = file.read(wanted, dtype="float32", always_2d=True)
        except RuntimeError as error:  # soundfile.LibsndfileError is one
            raise BadSample(f"broken audio file: {_what(error)}") from error
    # Some encoders write a length that is off by one or two codec frames.
    if len(waveform) < wanted - max(0.1 * rate, 0.02 * wanted):
        raise BadSample(f"truncated: {len(waveform)} frames of {wanted} that its header promises")
    return waveform, rate


@contextmanager
def _opened(value: bytes | Path, sample_rate_hz: int) -> Iterator[Any]:
    """An open `soundfile.SoundFile` whose header has been checked."""
    import soundfile

    with ExitStack() as stack:
        # Opened by descriptor: by path, libsndfile reports only "System error" and rejects names that are not UTF-8.
        file = stack.enter_context(open_file(value)) if isinstance(value, Path) else None
        if (len(value) if file is None else os.fstat(file.fileno()).st_size) == 0:
            raise BadSample("empty file")
        try:
            encoded = io.BytesIO(value) if file is None else file.fileno()
            sound = stack.enter_context(soundfile.SoundFile(encoded, closefd=False))
        except (RuntimeError, TypeError, ValueError) as error:  # TypeError: raw formats, which have no header
            raise BadSample(f"not an audio file: {_what(error)}") from error
        _check_header(sound, sample_rate_hz)
        yield sound


def _check_header(sound: Any, sample_rate_hz: int) -> None:
    """Refuse implausible headers and truncated files."""
    if not sample_rate_hz / MAX_RATE_RATIO <= sound.samplerate <= sample_rate_hz * MAX_RATE_RATIO:
        raise BadSample(f"a sample rate of {sound.samplerate} Hz, for a model of {sample_rate_hz} Hz")
    if sound.channels > MAX_CHANNELS:
        raise BadSample(f"{sound.channels} channels, more than {MAX_CHANNELS}")
    if sound.frames < 1:
        raise BadSample("no samples")
    for promised, there in PROMISED.findall(sound.extra_info):
        if int(there) < int(promised) < MAX_HEADER_BYTES and _lacks(int(there), int(promised), sound):
            raise BadSample(f"truncated: {there} bytes of sound of {promised} that its header promises")


def _lacks(there: int, promised: int, sound: Any) -> bool:
    """Whether more bytes are missing than rounding explains."""
    return there < promised - max(0.1 * sound.samplerate * there / sound.frames, 0.02 * promised)


def _from_array(segment: Segment, rate: int) -> np.ndarray:
    array = np.atleast_2d(segment.value)
    if array.ndim != 2 or segment.value.ndim == 0:
        raise BadSample(f"an array of shape {segment.value.shape}; expected (samples,) or (channels, samples)")
    if array.dtype == np.int16:
        array = array / np.float32(2**15)
    if array.dtype.kind != "f":
        raise BadSample(f"{array.dtype} array; expected floats or int16")
    start = round(segment.start_seconds * rate)
    stop = array.shape[1] if segment.seconds is None else start + round(segment.seconds * rate)
    with np.errstate(over="ignore"):  # overflow gives infinity, which is refused afterwards
        return array.T[start:stop].astype(np.float32)


def _resampled(waveform: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    """The waveform (C, S) at another rate."""
    common = math.gcd(source_hz, target_hz)
    if source_hz * target_hz // common**2 <= MAX_FILTER:
        return _resampler(source_hz, target_hz)(torch.from_numpy(waveform)).numpy()
    # Rates without a large common divisor: the filters above would take gigabytes, a spectrum as much as the sound.
    length = math.ceil(waveform.shape[1] * target_hz / source_hz)
    spectrum = torch.fft.rfft(torch.from_numpy(waveform))
    return (torch.fft.irfft(spectrum, n=length) * (length / waveform.shape[1])).numpy()


@functools.lru_cache(maxsize=16)
def _resampler(source_hz: int, target_hz: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(source_hz, target_hz)  # keeps its filter: computing it takes longer than applying it


def _what(error: BaseException) -> str:
    """Message of an error, first line; libsndfile's without the name of the opened object."""
    text = getattr(error, "error_string", None) or str(error)
    return (text.removeprefix("Error : ").strip().splitlines() or [type(error).__name__])[0]


class AudioTransform:
    """From a decoded waveform to the input tensor of a model.

    The whole utterance is normalised, as in the originals (ALGORITHM.md 2.1); it is cropped to the length of its batch
    afterwards.

    Args:
        normalise: scale every channel to mean 0 and variance 1 over the utterance (eps 1e-5).
        sample_rate_hz: of the waveforms.
        max_seconds: evaluation uses only this many seconds from the start.
    """

    def __init__(self, *, normalise: bool, sample_rate_hz: int, max_seconds: float) -> None:
        self.normalise = normalise
        self.max_samples = round(max_seconds * sample_rate_hz)

    def train(self, waveform: np.ndarray) -> Tensor:
        """Waveform (S,) or (C, S) float32 -> the same shape."""
        tensor = torch.from_numpy(waveform)
        return F.layer_norm(tensor, tensor.shape[-1:]) if self.normalise else tensor

    def evaluate(self, waveform: np.ndarray) -> Tensor:
        """As `train`, cropped to the first `max_seconds`."""
        return self.train(waveform)[..., : self.max_samples]


# ---------------------------------------------------------------------------------------------------------------------
# Many recordings


def prepare_audio(
    source: Source | StreamingSource,
    *,
    sample_rate_hz: int,
    min_seconds: float,
    segment_seconds: float,
    cache_dir: str | None,
) -> Source | StreamingSource:
    """Recordings cut into utterances of known length: `AudioSegments`, or `StreamedSegments` of a stream."""
    require(min_seconds=min_seconds, segment_seconds=segment_seconds)
    options = {"sample_rate_hz": sample_rate_hz, "min_seconds": min_seconds, "segment_seconds": segment_seconds}
    if isinstance(source, StreamingSource):
        return StreamedSegments(source, **options)
    return AudioSegments(source, cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(), **options)


class AudioSegments(Source):
    """Utterances of another source.

    Durations come from file headers. They are read by `HEADER_THREADS` threads and, for files, cached in `cache_dir`.
    Recordings longer than `segment_seconds` are cut into equal parts of at most that length. An epoch visits every
    part, and only one part at a time is in memory. Recordings shorter than `min_seconds` are left out.

    Args:
        source: recordings as bytes, files or arrays.
        sample_rate_hz: rate in which `lengths` are counted.
        min_seconds: shortest recording.
        segment_seconds: longest part.
        cache_dir: cache of the durations of files; None = no cache.

    Raises:
        DataError: nothing usable is left.
    """

    def __init__(
        self,
        source: Source,
        *,
        sample_rate_hz: int,
        min_seconds: float,
        segment_seconds: float,
        cache_dir: Path | None,
    ) -> None:
        self.source = source
        self.class_names = source.class_names
        seconds, rejected = _durations(source, sample_rate_hz, cache_dir)
        self.rejected = (*source.rejected, *rejected)
        short = np.flatnonzero(seconds < min_seconds - 1e-9)  # broken recordings have NaN and are not among them
        self.left_out = tuple(
            (source[int(row)].key, f"{seconds[row]:.3f} s, shorter than modality.min_seconds={min_seconds:g}")
            for row in short
        )
        usable = np.flatnonzero(seconds >= min_seconds - 1e-9)
        if not len(usable):
            first = next(iter(self.rejected + self.left_out), ("", "no recordings"))
            raise DataError(
                f"none of {len(source)} recordings can be used; the first is {first[0]}: {first[1]}. Give other data, "
                "or lower modality.min_seconds"
            )
        parts = np.maximum(np.ceil(seconds[usable] / segment_seconds), 1).astype(np.int64)
        self._records = np.repeat(usable, parts)  # of each segment
        self._seconds = np.repeat(seconds[usable] / parts, parts)
        self.grouped = None if source.grouped is None else source.grouped[self._records]
        first = np.repeat(np.cumsum(parts) - parts, parts)
        self._part = np.arange(len(first)) - first
        self._cut = np.repeat(parts > 1, parts)
        self.lengths = np.floor(self._seconds * sample_rate_hz + 1e-6).astype(np.int64)
        total = seconds[usable].sum()
        log.info(
            "%d recordings, %s, as %d utterances; %d are shorter than modality.min_seconds=%g%s, %d broken",
            len(usable),
            f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes",
            len(self),
            len(short),
            min_seconds,
            f" (such as {self.left_out[0][0]})" if self.left_out else "",
            len(self.rejected),
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> RawSample:
        raw = self.source[int(self._records[index])]
        if not self._cut[index]:
            return RawSample(raw.key, Segment(raw.value, 0.0, None), raw.label, raw.fields)
        return _segment(raw, float(self._part[index] * self._seconds[index]), float(self._seconds[index]))

    def labels(self) -> np.ndarray | None:
        """Labels of the recordings, one for each utterance."""
        labels = self.source.labels()
        return None if labels is None else labels[self._records]

    def column(self, name: str) -> list[Any]:
        """Values of the recordings, one for each utterance."""
        values = self.source.column(name)
        return [values[row] for row in self._records]

    def origins(self) -> np.ndarray:
        """Origins of the recordings, one for each utterance."""
        return self.source.origins()[self._records]


class AudioWindows(AudioSegments):
    """Whole recordings; long ones as overlapping windows whose middles cover the recording once.

    The windows are those of transformers' pipeline for speech recognition: each starts `window_samples` -
    2 `stride_samples` after the previous one, and the last ends with the recording. All windows of a recording have
    its key.

    Args:
        source: recordings as bytes, files or arrays.
        sample_rate_hz: rate in which samples are counted.
        min_seconds: shorter recordings are left out.
        window_samples: length of a window; recordings that fit in one window are not cut.
        stride_samples: context at each end of a window, whose outputs are dropped except at the ends of the recording.
        cache_dir: cache of the durations of files; None = no cache.

    Raises:
        ConfigError: two strides leave no middle of the window.
        DataError: nothing usable is left.
    """

    def __init__(
        self,
        source: Source,
        *,
        sample_rate_hz: int,
        min_seconds: float,
        window_samples: int,
        stride_samples: int,
        cache_dir: Path | None,
    ) -> None:
        step = window_samples - 2 * stride_samples
        if step <= 0:
            raise ConfigError(
                f"window_seconds={window_samples / sample_rate_hz:g} and stride_seconds="
                f"{stride_samples / sample_rate_hz:g}: expected a window of more than two strides"
            )
        super().__init__(
            source,
            sample_rate_hz=sample_rate_hz,
            min_seconds=min_seconds,
            segment_seconds=math.inf,
            cache_dir=cache_dir,
        )
        whole = self.lengths
        self.parts = np.maximum(-(-(whole - window_samples) // step), 0) + 1  # of each recording
        self.recordings = np.repeat(np.arange(len(whole)), self.parts)  # of each window
        self.first = np.cumsum(self.parts) - self.parts  # window of each recording
        starts = (np.arange(len(self.recordings)) - self.first[self.recordings]) * step
        ends = np.minimum(starts + window_samples, whole[self.recordings])
        self.samples = whole  # of each recording
        self.step_samples, self.stride_samples = step, stride_samples
        self._records = self._records[self.recordings]
        self._starts = starts / sample_rate_hz
        # The last window reads to the end of the recording, so that rounding of the sample rate loses no samples.
        last = starts + window_samples >= whole[self.recordings]
        self._seconds = np.where(last, np.inf, window_samples / sample_rate_hz)
        self.lengths = ends - starts

    def __getitem__(self, index: int) -> RawSample:
        raw = self.source[int(self._records[index])]
        seconds = None if np.isinf(self._seconds[index]) else float(self._seconds[index])
        may_be_silent = bool(self.parts[self.recordings[index]] > 1)
        return RawSample(
            raw.key, Segment(raw.value, float(self._starts[index]), seconds, may_be_silent), None, raw.fields
        )


class StreamedSegments(StreamingSource):
    """`AudioSegments` of a stream: durations are read while streaming. Options as in `AudioSegments`."""

    def __init__(
        self, source: StreamingSource, *, sample_rate_hz: int, min_seconds: float, segment_seconds: float
    ) -> None:
        self.source = source
        self.class_names = source.class_names
        self.sample_rate_hz = sample_rate_hz
        self.min_seconds = min_seconds
        self.segment_seconds = segment_seconds

    def shards(self) -> list[tuple[str, int]]:
        """Shards of the recordings."""
        return self.source.shards()

    def stream(self, **place: int) -> Iterator[RawSample]:
        """Utterances; broken recordings are passed on, and decoding reports them. See `StreamingSource.stream`."""
        short = 0
        for raw in self.source.stream(**place):
            try:
                seconds = _seconds(raw.value, self.sample_rate_hz)
            except BadSample:
                yield raw
                continue
            if seconds < self.min_seconds:
                short += 1
                continue
            parts = max(1, int(np.ceil(seconds / self.segment_seconds)))
            for part in range(parts):
                yield raw if parts == 1 else _segment(raw, part * seconds / parts, seconds / parts)
        if short:
            log.info("%d recordings are shorter than modality.min_seconds=%g", short, self.min_seconds)


def _segment(raw: RawSample, start: float, seconds: float) -> RawSample:
    return RawSample(f"{raw.key}@{start:.0f}s", Segment(raw.value, start, seconds), raw.label, raw.fields)


def _seconds(value: bytes | Path | np.ndarray | str | BadSample, sample_rate_hz: int) -> float:
    """Duration by the header, without decoding."""
    if isinstance(value, BadSample):
        raise value
    if isinstance(value, np.ndarray):
        return value.shape[-1] / sample_rate_hz if value.ndim else 0.0
    if isinstance(value, str):
        raise BadSample("a text, not a recording")
    with _opened(value, sample_rate_hz) as file:
        seconds = file.frames / file.samplerate
        # In other formats the length follows from the file size, or seeking would read the whole file.
        if seconds > LONG_SECONDS and file.format == "FLAC":
            _check_end(file)
    return seconds


def _check_end(sound: Any) -> None:
    """Refuse a long recording whose end is missing: otherwise each of its parts would count as a broken sample."""
    back = min(sound.frames, round(max(0.1 * sound.samplerate, 0.02 * sound.frames)))
    try:
        sound.seek(sound.frames - back)
        there = len(sound.read(1))
    except RuntimeError as error:
        raise BadSample(f"truncated or broken: no end after {sound.frames} frames ({_what(error)})") from error
    if not there:
        raise BadSample(f"truncated: no end after the {sound.frames} frames that its header promises")


def _durations(source: Source, sample_rate_hz: int, cache_dir: Path | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Seconds of every record, (n,) float64, NaN where it cannot be opened; and (key, reason) of those records."""
    cached = _cache_file(source, sample_rate_hz, cache_dir)
    if cached is not None and cached.exists():
        try:
            return _load(cached)
        except BROKEN_ARCHIVE as error:
            log.warning("the cached durations in %s are damaged (%s); read again", cached, type(error).__name__)
    started = reported = time.monotonic()
    seconds = np.full(len(source), np.nan)
    rejected: list[tuple[str, str]] = []

    def measure(row: int) -> float | tuple[str, str]:
        key = f"#{row}"
        try:
            raw = source[row]
            key = raw.key
            return _seconds(raw.value, sample_rate_hz)
        except BadSample as error:
            return key, str(error)

    # In chunks: `map` submits all its work at once and keeps every result that has not been read yet.
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for start in range(0, len(source), 1024):
            rows = range(start, min(start + 1024, len(source)))
            for row, found in zip(rows, pool.map(measure, rows), strict=True):
                if isinstance(found, tuple):
                    rejected.append(found)
                else:
                    seconds[row] = found
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                log.info("read the headers of %d of %d recordings", rows.stop, len(source))
    if cached is not None and time.monotonic() - started > 1:
        _save(cached, seconds, rejected)
    return seconds, rejected


def _cache_file(source: Source, sample_rate_hz: int, cache_dir: Path | None) -> Path | None:
    """Cache file for the durations of exactly these files; None unless all records are files."""
    if cache_dir is None or not len(source):
        return None
    identity = hashlib.sha256(f"{HEADER_CHECKS}|{sample_rate_hz}\n".encode())
    try:
        for row in range(len(source)):
            value = source[row].value
            if not isinstance(value, Path):
                return None
            identity.update(f"{version_of(value)}\n".encode("utf-8", "replace"))
    except BadSample:
        return None
    return cache_dir / "durations" / f"{identity.hexdigest()[:32]}.npz"


def _load(path: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    with np.load(path, allow_pickle=False) as archive:  # verifies checksums
        pairs = zip(archive["keys"].tolist(), archive["reasons"].tolist(), strict=True)
        return archive["seconds"], list(pairs)


def _save(path: Path, seconds: np.ndarray, rejected: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys, reasons = (np.array([pair[part] for pair in rejected], dtype=str) for part in (0, 1))
    with writing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, seconds=seconds, keys=keys, reasons=reasons)


# ---------------------------------------------------------------------------------------------------------------------
# Spectrograms: the baseline of the probes, and pictures


def log_mel(waveform: Tensor | np.ndarray, *, sample_rate_hz: int) -> np.ndarray:
    """Log-mel spectrogram of one waveform (S,): (mels, frames), a frame every 10 ms, natural logarithm of power."""
    return _log_mel(torch.as_tensor(waveform).float()[None], sample_rate_hz)[0].numpy()


def log_mel_statistics(waveforms: Tensor, lengths: Tensor, *, sample_rate_hz: int) -> np.ndarray:
    """Mean and standard deviation over time of each log-mel channel, (B, 2 * mels).

    Args:
        waveforms: (B, S), or (B, C, S), of which the channels are averaged.
        lengths: (B,) samples without padding; frames that reach into the padding are left out, except the first.
        sample_rate_hz: of the waveforms.
    """
    if waveforms.dim() == 3:
        waveforms = waveforms.mean(dim=1)
    mels = _log_mel(waveforms.float(), sample_rate_hz)  # (B, mels, frames)
    hop = _hop(sample_rate_hz)
    real = torch.arange(mels.shape[-1]) < (lengths[:, None] // hop).clamp(min=1)  # (B, frames)
    weight = (real / real.sum(dim=1, keepdim=True))[:, None]  # (B, 1, frames)
    mean = (mels * weight).sum(dim=-1)
    deviation = ((mels - mean[..., None]).square() * weight).sum(dim=-1).sqrt()
    return torch.cat([mean, deviation], dim=1).numpy()


def _hop(sample_rate_hz: int) -> int:
    return max(round(HOP_SECONDS * sample_rate_hz), 1)


def _log_mel(waveforms: Tensor, sample_rate_hz: int) -> Tensor:
    return (_mel_spectrogram(sample_rate_hz)(waveforms) + 1e-6).log()


@functools.lru_cache(maxsize=4)
def _mel_spectrogram(sample_rate_hz: int) -> Any:
    from torchaudio.transforms import MelSpectrogram

    window = max(round(WINDOW_SECONDS * sample_rate_hz), 16)
    size = 1 << (window - 1).bit_length()
    # Low mel channels are narrower than a bin of a short transform and would stay empty: use a longer transform.
    # Short windows get fewer mels.
    mels = min(NUM_MELS, size // 4)
    return MelSpectrogram(
        sample_rate=sample_rate_hz,
        n_fft=4 * size,
        win_length=window,
        hop_length=_hop(sample_rate_hz),
        n_mels=mels,
        center=True,
        pad_mode="constant",
    )
