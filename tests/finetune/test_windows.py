"""Long recordings in predictions: overlapping windows, one transcript with times."""

import json
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch

import data2vec_train as ours
from data2vec_train.data.audio import AudioWindows
from data2vec_train.data.sources.files import FolderSource
from data2vec_train.errors import ConfigError
from data2vec_train.weights.preprocessing import AudioFeatureExtractor
from data2vec_train.weights.tokenizers import CTCTokenizer

RATE, HOP = 8000, 160


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = np.repeat(rng.uniform(200, 3000, round(seconds * 10) + 1), RATE // 10)[: len(time)]
    return (0.5 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.05 * rng.standard_normal(len(time))).astype(
        np.float32
    )


def save(path, sound: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(sound, -1, 1) * 20000).astype(np.int16).tobytes())


@pytest.fixture(scope="module")
def reader(weights, tmp_path_factory):
    """A folder with a head whose answers change from frame to frame."""
    folder = tmp_path_factory.mktemp("reader")
    config = ours.load_pretrained(weights("audio")).config
    config.vocab_size, config.pad_token_id = 32, 0
    torch.manual_seed(0)
    model = ours.Data2VecAudioForCTC(config)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if name.endswith("lm_head.weight")).normal_(
            std=3.0
        )
    model.save_pretrained(folder)
    AudioFeatureExtractor(sampling_rate=RATE).save_pretrained(folder)
    CTCTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def said(reader, program_of, tmp_path):
    """Lines of `predict` for the recordings in a folder, by key."""

    def predict(*more: str) -> dict[str, dict]:
        out = tmp_path / f"said{len(list(tmp_path.glob('said*')))}.jsonl"
        given = [f"checkpoint={reader}", "data=folder", f"data.path={tmp_path / 'data'}", f"out={out}"]
        assert program_of("predict", *given, "data.num_workers=0", f"cache_dir={tmp_path}/cache", *more) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len({row["key"] for row in rows}) == len(rows), "one line for each recording"
        return {row["key"]: row for row in rows}

    return predict


WINDOWS = ["window_seconds=2", "stride_seconds=0.4"]


def test_windows_are_those_of_the_pipeline_of_transformers(said, reader, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, seconds in {"a": 1.5, "b": 2.0, "c": 2.02, "d": 3.2, "e": 9.37}.items():
        save(tmp_path / "data" / f"{name}.wav", speech_like(seconds, ord(name)))
    found = said(*WINDOWS)
    pipeline = transformers.AutomaticSpeechRecognitionPipeline(
        model=transformers.Data2VecAudioForCTC.from_pretrained(reader).eval(),
        feature_extractor=transformers.AutoFeatureExtractor.from_pretrained(reader),
        tokenizer=transformers.Wav2Vec2CTCTokenizer.from_pretrained(reader),
    )
    import soundfile

    for key, row in found.items():
        sound, _ = soundfile.read(tmp_path / "data" / key, dtype="float32")
        wanted = pipeline({"raw": sound, "sampling_rate": RATE}, chunk_length_s=2, stride_length_s=0.4,
                          return_timestamps="word")  # fmt: skip
        assert row["prediction"] == wanted["text"]
        times = [(word["word"], word["start"], word["end"]) for word in row["words"]]
        assert times == [(chunk["text"], *(round(t, 3) for t in chunk["timestamp"])) for chunk in wanted["chunks"]]


def test_a_short_recording_is_read_in_one_pass_and_a_long_one_nearly_so(said, tmp_path):
    save(tmp_path / "data" / "long.wav", speech_like(8.0))
    save(tmp_path / "data" / "short.wav", speech_like(1.9))
    parts, whole = said(*WINDOWS), said()
    assert parts["short.wav"] == whole["short.wav"]
    assert said("window_seconds=null") == whole
    assert abs(len(parts["long.wav"]["prediction"]) - len(whole["long.wav"]["prediction"])) <= 20
    assert len(whole["long.wav"]["prediction"]) > 100


def test_windows_cover_every_frame_once(tmp_path):
    lengths = [300, 15_999, 16_000, 16_001, 25_600, 25_601, 100_000]
    for number, samples in enumerate(lengths):
        save(tmp_path / f"{number}.wav", speech_like(samples / RATE + 0.001)[:samples])
    source = FolderSource(path=str(tmp_path), extensions=[".wav"], class_from_folder=False)
    cut = {"sample_rate_hz": RATE, "min_seconds": 0.01, "window_samples": 16_000, "stride_samples": 3_200}
    windows = AudioWindows(source, cache_dir=None, **cut)
    assert windows.samples.tolist() == lengths
    for recording, samples in enumerate(lengths):
        rows = np.flatnonzero(windows.recordings == recording)
        starts = (windows._starts[rows] * RATE).round().astype(int)
        ends = starts + windows.lengths[rows]
        assert starts[0] == 0
        assert ends[-1] == samples
        assert (np.diff(starts) == windows.step_samples).all()
        assert (windows.lengths[rows][:-1] == 16_000).all()
        assert len(rows) == 1 or windows.lengths[rows][-1] > 2 * 3_200


@pytest.mark.parametrize("rate", [8000, 16_000, 11_025, 44_100])
def test_other_rates_are_cut_at_the_same_moments(said, tmp_path, rate):
    import torchaudio

    sound = torchaudio.functional.resample(torch.from_numpy(speech_like(7.0)), RATE, rate).numpy()
    save(tmp_path / "data" / "a.wav", sound, rate)
    row = said(*WINDOWS)["a.wav"]
    last = row["words"][-1]["end"]
    assert 6.5 < last <= 7.0


def test_silence_within_a_recording_is_heard_and_all_of_it_is_an_error(said, tmp_path):
    sound = speech_like(12.0)
    sound[3 * RATE : 9 * RATE] = 0
    save(tmp_path / "data" / "pause.wav", sound)
    save(tmp_path / "data" / "silent.wav", np.zeros(6 * RATE))
    found = said(*WINDOWS)
    assert found["pause.wav"]["words"][-1]["end"] > 9
    assert found["silent.wav"]["error"] == "silence: all samples are equal"


def test_a_window_that_is_broken_makes_no_shorter_transcript(said, tmp_path):
    import soundfile

    save(tmp_path / "data" / "good.wav", speech_like(5.0))
    sound = speech_like(9.0)
    sound[4 * RATE] = np.nan
    soundfile.write(tmp_path / "data" / "bad.wav", sound, RATE, subtype="FLOAT")
    found = said(*WINDOWS)
    assert "not finite" in found["bad.wav"]["error"]
    assert "prediction" in found["good.wav"]


def test_lines_stay_in_order_where_a_recording_crosses_a_group(said, tmp_path, monkeypatch):
    from data2vec_train.predict import run as prediction_task

    for number in range(5):
        save(tmp_path / "data" / f"{number}.wav", speech_like(1.0 + 2.3 * number, number))
    whole = said(*WINDOWS)
    monkeypatch.setattr(prediction_task, "WINDOW", 3)
    parts = said(*WINDOWS)
    assert list(parts) == list(whole) == [f"{number}.wav" for number in range(5)]
    assert {key: row["prediction"] for key, row in parts.items()} == {
        key: row["prediction"] for key, row in whole.items()
    }


def test_a_beam_search_reads_the_joined_windows(said, tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    save(tmp_path / "data" / "a.wav", speech_like(7.0))
    beam = "{beam_size:20,beam_threshold:50,lm:null,lexicon:null,lm_weight:0,word_score:0}"
    row = said(*WINDOWS, f"+head.beam={beam}")["a.wav"]
    greedy = said(*WINDOWS)["a.wav"]
    words = row["words"]
    assert " ".join(word["word"] for word in words).replace(" ", "") == row["prediction"].replace(" ", "")
    assert all(word["start"] < word["end"] for word in words)
    assert words[-1]["end"] > 6
    assert abs(len(row["prediction"]) - len(greedy["prediction"])) < 40


def test_classes_over_time_are_joined_with_times_of_the_recording(command, program_of, tmp_path):
    status, run_dir = command("frame", "report=false", steps=1)
    assert status == 0
    save(tmp_path / "data" / "a.wav", speech_like(9.0))
    given = [f"checkpoint={run_dir}", "data=folder", f"data.path={tmp_path}/data", f"out={tmp_path}/out.jsonl"]
    assert program_of("predict", *given, "data.num_workers=0", *WINDOWS) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    segments = row["prediction"]["segments"]
    assert segments[0]["start"] == 0
    assert segments[-1]["end"] == pytest.approx(9.0, abs=0.01)
    assert all(segment["end"] == other["start"] for segment, other in zip(segments[:-1], segments[1:], strict=True))


@pytest.mark.parametrize("wrong", [["window_seconds=1", "stride_seconds=0.5"], ["stride_seconds=0.001"]])
def test_windows_without_a_middle_are_refused(reader, program_of, tmp_path, capsys, wrong):
    save(tmp_path / "data" / "a.wav", speech_like(3.0))
    given = [f"checkpoint={reader}", "data=folder", f"data.path={tmp_path}/data", f"out={tmp_path}/out.jsonl"]
    assert program_of("predict", *given, "data.num_workers=0", *wrong) == 2
    assert "stride_seconds=" in capsys.readouterr().err


def test_parts_of_recordings_have_no_transcript_of_their_own(command, capsys):
    assert command("ctc", "modality.segment_seconds=0.5", steps=1)[0] == 2
    assert "whole recordings" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_recording(reader, tmp_path):
    peaks = []
    for minutes in (2, 30):
        data = tmp_path / str(minutes)
        save(data / "a.wav", np.tile(speech_like(60.0), minutes))
        command = [sys.executable, "-c", MEASURED, f"checkpoint={reader}", "modality=audio", "data=folder"]
        command += [f"data.path={data}", f"out={tmp_path}/{minutes}.jsonl", "data.num_workers=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.15 * peaks[0], f"KiB {peaks}"


MEASURED = """
import resource, sys
from data2vec_train.config import compose as config
from data2vec_train import predict
try:
    config.main(predict._run, config_name="predict", weights="checkpoint")
except SystemExit:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_window_needs_a_middle(tmp_path):
    save(tmp_path / "a.wav", speech_like(1.0))
    source = FolderSource(path=str(tmp_path), extensions=[".wav"], class_from_folder=False)
    with pytest.raises(ConfigError, match="more than two strides"):
        AudioWindows(source, cache_dir=None, sample_rate_hz=RATE, min_seconds=0.1, window_samples=320,
                     stride_samples=160)  # fmt: skip
