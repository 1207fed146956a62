"""Recordings: decoding, segments, durations, and what is wrong with broken ones."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from data2vec_train.data.audio import (
    AudioSegments,
    AudioTransform,
    Segment,
    StreamedSegments,
    decode_audio,
    log_mel,
    log_mel_statistics,
    prepare_audio,
)
from data2vec_train.data.sources.files import FolderSource, ManifestSource, RawSample, Source, StreamingSource
from data2vec_train.data.sources.hf import HFSource
from data2vec_train.errors import BadSample, ConfigError, DataError

EXTENSIONS = [".wav", ".flac", ".ogg", ".mp3"]


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * time)
    return wave if channels == 1 else np.stack([wave, *[0.5 * wave] * (channels - 1)], axis=1)


def decode(value, **changes) -> np.ndarray:
    options = {"sample_rate_hz": 16_000, "channels": 1, "min_seconds": 0.1, "min_level": 1e-6, "max_level": 65536.0}
    return decode_audio(value, **options | changes)


def strongest_hertz(wave: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave))


# ------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("extension", "rate", "channels"),
    [(".wav", 8000, 1), (".flac", 44_100, 2), (".ogg", 16_000, 1), (".mp3", 22_050, 2), (".wav", 48_000, 6)],
)
@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_any_format_rate_and_number_of_channels_becomes_one_channel_at_the_models_rate(
    tmp_path, extension, rate, channels, kind
):
    path = tmp_path / f"tone{extension}"
    soundfile.write(path, tone(1.0, rate, channels), rate)
    wave = decode(path if kind == "file" else path.read_bytes())
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) < 1600  # mp3 pads
    assert strongest_hertz(wave, 16_000) == pytest.approx(440, abs=2)


def test_channels_are_averaged_or_kept(tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, tone(0.5, 16_000, 2), 16_000, subtype="FLOAT")
    both = decode(path, channels=2)
    assert both.shape == (2, 8000)
    np.testing.assert_allclose(decode(path), both.mean(axis=0), atol=1e-6)
    with pytest.raises(BadSample, match=r"2 channels, expected modality\.channels=3"):
        decode(path, channels=3)


@pytest.mark.parametrize("extension", [".wav", ".flac", ".ogg"])
def test_a_segment_is_that_part_of_the_whole(tmp_path, extension):
    path = tmp_path / f"noise{extension}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * 16_000)
    soundfile.write(path, noise, 16_000)
    whole, part = decode(path), decode(Segment(path, 2.0, 1.5))
    assert len(part) == 24_000
    np.testing.assert_allclose(part, whole[32_000:56_000], atol=2e-3)


BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"these are words, not sound\n" * 50, "not an audio file"),
    "cut header": (b"RIFF\x24\x00", "not an audio file"),
}


@pytest.mark.parametrize("which", BROKEN)
@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_what_is_no_recording_gets_a_reason(tmp_path, which, kind):
    content, reason = BROKEN[which]
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(BadSample, match=reason):
        decode(path if kind == "file" else content)


def wav(samples: np.ndarray, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype=subtype)
    return file.getvalue()


def test_values_that_cannot_be_learnt_from_get_a_reason(tmp_path):
    noise = np.random.default_rng(0).normal(size=16_000)
    noise[77] = np.nan
    with pytest.raises(BadSample, match="not finite"):
        decode(wav(noise))
    with pytest.raises(BadSample, match="silence"):
        decode(wav(np.zeros(16_000)))
    with pytest.raises(BadSample, match=r"0\.001 s, shorter than modality\.min_seconds=0\.1"):
        decode(wav(tone(0.001, 16_000)))
    with pytest.raises(BadSample, match="missing"):
        decode(tmp_path / "nowhere.wav")


def test_a_flac_file_that_ends_early_is_truncated(tmp_path):
    path = tmp_path / "noise.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 80_000), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadSample, match=r"truncated|broken audio file"):
        decode(path)


def test_arrays_count_as_being_at_the_models_rate():
    wave = tone(1.0, 16_000)
    np.testing.assert_allclose(decode(wave), wave, atol=1e-6)
    np.testing.assert_allclose(decode((wave * 2**15).astype(np.int16)), wave, atol=1e-3)
    with pytest.raises(BadSample, match="int64 array"):
        decode(np.arange(16_000))


def test_an_utterance_is_normalised_as_a_whole():
    transform = AudioTransform(normalise=True, sample_rate_hz=100, max_seconds=2.0)
    wave = np.random.default_rng(0).normal(3.0, 5.0, 500).astype(np.float32)
    result = transform.train(wave)
    assert (result.mean().item(), result.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)
    assert torch.equal(transform.evaluate(wave), result[:200])
    channels = transform.train(np.stack([wave, 2 * wave + 7]))
    torch.testing.assert_close(channels[0], channels[1], atol=1e-4, rtol=0)
    plain = AudioTransform(normalise=False, sample_rate_hz=100, max_seconds=2.0)
    assert torch.equal(plain.train(wave), torch.from_numpy(wave))


# ------------------------------------------------------------------------------------------------------- segments


def folder(tmp_path, seconds: dict[str, float], rate: int = 16_000) -> FolderSource:
    for name, length in seconds.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(length, rate), rate)
    return FolderSource(path=str(tmp_path / "data"), extensions=EXTENSIONS, class_from_folder="auto")


OPTIONS = {"sample_rate_hz": 16_000, "min_seconds": 0.2, "segment_seconds": 4.0}


def test_long_recordings_become_equal_segments_and_short_ones_stay_out(tmp_path, caplog):
    source = folder(tmp_path, {"a.wav": 1.0, "b.wav": 9.0, "c.wav": 0.1, "d.flac": 4.0})
    caplog.set_level("INFO")
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    assert "3 recordings, 0.2 minutes, as 5 utterances; 1 are shorter than" in caplog.text
    assert [segments[i].key for i in range(len(segments))] == ["a.wav", "b.wav@0s", "b.wav@3s", "b.wav@6s", "d.flac"]
    assert segments.lengths.tolist() == [16_000, 48_000, 48_000, 48_000, 64_000]
    assert segments.origins().tolist() == source.hashes()[[0, 1, 1, 1, 3]].tolist()
    assert segments.left_out == (("c.wav", "0.100 s, shorter than modality.min_seconds=0.2"),)
    assert segments.rejected == ()
    for index in range(len(segments)):
        assert len(decode(segments[index].value)) == segments.lengths[index]


def test_lengths_are_those_of_the_resampled_waveform(tmp_path):
    source = folder(tmp_path, {f"{n}.wav": 0.3 + 0.0137 * n for n in range(12)}, rate=11_025)
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    for index in range(len(segments)):
        assert 0 <= len(decode(segments[index].value)) - segments.lengths[index] <= 1


def test_broken_files_are_named_and_the_others_are_used(tmp_path):
    source = folder(tmp_path, {"a.wav": 1.0})
    (tmp_path / "data" / "empty.wav").touch()
    (tmp_path / "data" / "words.mp3").write_text("no sound")
    source = FolderSource(path=str(tmp_path / "data"), extensions=EXTENSIONS, class_from_folder="auto")
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    assert len(segments) == 1
    assert dict(segments.rejected).keys() == {"empty.wav", "words.mp3"}
    assert dict(segments.rejected)["empty.wav"] == "empty file"


def test_nothing_usable_is_an_error_that_names_the_first(tmp_path):
    source = folder(tmp_path, {"a.wav": 0.05})
    with pytest.raises(DataError, match=r"none of 1 recordings.*a\.wav: 0\.050 s"):
        AudioSegments(source, cache_dir=None, **OPTIONS)


def test_durations_are_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    import data2vec_train.data.audio as module

    source = folder(tmp_path, {"a.wav": 1.0, "b.wav": 2.0})
    (tmp_path / "data" / "bad.wav").write_text("x")
    source = FolderSource(path=str(tmp_path / "data"), extensions=EXTENSIONS, class_from_folder="auto")
    clock = iter(range(0, 10_000, 2))  # quick scans are not kept
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    first = AudioSegments(source, cache_dir=tmp_path / "cache", **OPTIONS)
    opened = []
    original = module._seconds
    monkeypatch.setattr(module, "_seconds", lambda *args: opened.append(1) or original(*args))
    again = AudioSegments(source, cache_dir=tmp_path / "cache", **OPTIONS)
    assert not opened
    assert (again.lengths.tolist(), again.rejected) == (first.lengths.tolist(), first.rejected)
    soundfile.write(tmp_path / "data" / "b.wav", tone(3.0, 16_000), 16_000)
    changed = AudioSegments(source, cache_dir=tmp_path / "cache", **OPTIONS)
    assert opened
    assert changed.lengths.tolist() == [16_000, 48_000]


def test_labels_and_classes_come_from_the_recordings(tmp_path):
    source = folder(tmp_path, {f"{kind}/{n}.wav": 1.0 + 4 * (n == 0) for kind in "xy" for n in range(3)})
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    assert segments.class_names == ["x", "y"]
    assert segments.labels().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert segments[0].label == 0


class Stream(StreamingSource):
    class_names = None

    def __init__(self, source: Source) -> None:
        self.source = source

    def stream(self, **place):
        yield from (self.source[index] for index in range(len(self.source)))
        yield RawSample("broken", b"words")


def test_a_stream_is_cut_on_the_way_and_lets_broken_recordings_through(tmp_path):
    source = Stream(folder(tmp_path, {"a.wav": 1.0, "b.wav": 9.0, "c.wav": 0.1}))
    prepared = prepare_audio(source, cache_dir=None, **OPTIONS)
    assert isinstance(prepared, StreamedSegments)
    place = {"epoch": 0, "seed": 0, "worker": 0, "num_workers": 1, "rank": 0, "world_size": 1}
    samples = list(prepared.stream(**place))
    assert [sample.key for sample in samples] == ["a.wav", "b.wav@0s", "b.wav@3s", "b.wav@6s", "broken"]
    with pytest.raises(BadSample, match="not an audio file"):
        decode(samples[-1].value)


def test_impossible_lengths_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="min_seconds: 5 is more than segment_seconds"):
        prepare_audio(folder(tmp_path, {"a.wav": 1.0}), cache_dir=None, **OPTIONS | {"min_seconds": 5})


def test_parquet_with_undecoded_audio(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"audio": {"bytes": wav(tone(0.5 + n, 16_000)), "path": None}, "word": "ab"[n % 2]} for n in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "speech.parquet")
    options = {"name": None, "split": None, "data_files": None, "revision": None, "cache_dir": str(tmp_path / "hf")}
    path = str(tmp_path / "speech.parquet")
    source = HFSource(path=path, column=None, label_column="word", kind="audio", **options)
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    assert segments.lengths.tolist() == [8_000, 24_000, 40_000, 56_000]
    assert segments.class_names == ["a", "b"]
    assert len(decode(segments[2].value)) == 40_000


LONG = """
import json, resource, sys
from pathlib import Path
from data2vec_train.data.audio import AudioSegments, decode_audio
from data2vec_train.data.sources.files import FolderSource
import torchaudio
source = FolderSource(path=sys.argv[1], extensions=[".flac"], class_from_folder=False)
segments = AudioSegments(source, sample_rate_hz=16000, min_seconds=0.2, segment_seconds=30.0, cache_dir=None)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
options = dict(sample_rate_hz=16000, channels=1, min_seconds=0.2, min_level=1e-6, max_level=65536.0)
decode_audio(segments[0].value, **options)
before = peak()
for index in range(1, len(segments), 20):
    decode_audio(segments[index].value, **options)
print(json.dumps({"segments": len(segments), "grown_mb": peak() - before}))
"""


def test_memory_does_not_grow_with_a_long_recording(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", samplerate=16_000, channels=1) as file:
        block = np.random.default_rng(0).normal(scale=0.01, size=16_000 * 60)
        for _ in range(120):  # two hours
            file.write(block)
    run = subprocess.run([sys.executable, "-c", LONG, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["segments"] == 240
    assert measured["grown_mb"] < 30  # two hours at 16 kHz are 440 MB


# ------------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_of_fairseq(tmp_path):
    soundfile.write(tmp_path / "one two.wav", tone(1.0, 16_000), 16_000)
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\none two.wav\t16000\nsub/gone.wav\t5\n")
    source = ManifestSource(path=str(tmp_path / "train.tsv"))
    assert (len(source), source[0].key, source.labels()) == (2, "one two.wav", None)
    segments = AudioSegments(source, cache_dir=None, **OPTIONS)
    assert len(segments) == 1
    assert segments.rejected == (("sub/gone.wav", "file is missing"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no files"),
        ("{root}\n", "lists no files"),
        ("{root}/nowhere\na.wav\t5\n", "line 1: .*nowhere does not exist"),
        ("{root}\na.wav\t5\nb.wav 7\n", "line 3: expected path<TAB>frames, got 'b.wav 7'"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "train.tsv").write_text(content.format(root=tmp_path))
    with pytest.raises(DataError, match=message):
        ManifestSource(path=str(tmp_path / "train.tsv"))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match="nearest existing folder"):
        ManifestSource(path=str(tmp_path / "none.tsv"))


# ------------------------------------------------------------------------------------------------------- log-mel


def test_log_mel_finds_the_tone_and_its_statistics_leave_padding_out():
    low, high = (log_mel(tone(1.0, 16_000, hertz=hertz), sample_rate_hz=16_000) for hertz in (200.0, 3000.0))
    assert low.shape == (80, 101)
    assert low.mean(axis=1).argmax() < 12 < 40 < high.mean(axis=1).argmax()
    wave = torch.from_numpy(tone(1.0, 16_000)).float() + 0.1 * torch.randn(16_000)
    padded = torch.zeros(2, 24_000)
    padded[0, :16_000] = wave
    padded[1] = torch.randn(24_000)
    alone = log_mel_statistics(wave[None], torch.tensor([16_000]), sample_rate_hz=16_000)
    together = log_mel_statistics(padded, torch.tensor([16_000, 24_000]), sample_rate_hz=16_000)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-3)
    assert np.isfinite(log_mel_statistics(torch.randn(1, 300), torch.tensor([300]), sample_rate_hz=8_000)).all()
    assert np.isfinite(log_mel_statistics(torch.randn(1, 3, 300), torch.tensor([300]), sample_rate_hz=50)).all()
