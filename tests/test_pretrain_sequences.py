"""`python -m data2vec_train modality=audio|text` as a user would run it, on folders as users have them."""

import json

import numpy as np
import pytest
import soundfile

AUDIO = [
    "modality=audio",
    "size.dim=32",
    "size.depth=2",
    "size.conv_dim=16",
    "objective.masks_per_sample=2",
    "data.num_workers=1",
]
TEXT = ["modality=text", "size.dim=32", "size.depth=2", "objective.masks_per_sample=2", "data.num_workers=1"]
SHORT = ["trainer.max_steps=6", "callbacks.probe.every_n_steps=3"]
WORDS = "We hold that a sentence, however short, is worth more than the paper it was printed on. "


def quarantined(run) -> dict[str, str]:
    lines = (run / "quarantine.jsonl").read_text().splitlines()
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture
def recordings(tmp_path):
    """Files as they lie on people's disks, four of them of no use."""
    folder, rng = tmp_path / "data" / "deep" / "er", np.random.default_rng(0)
    folder.mkdir(parents=True)

    def speech(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
        loudness = np.interp(np.arange(seconds * rate), np.linspace(0, seconds * rate, 40), rng.uniform(0, 0.3, 40))
        return (loudness * rng.normal(size=len(loudness)))[:, None].repeat(channels, axis=1)

    for number in range(6):
        soundfile.write(folder / f"phone{number}.wav", speech(1 + 0.3 * number, 8_000), 8_000)
        soundfile.write(folder / f"studio{number}.flac", speech(1.5, 44_100, 2), 44_100)
    soundfile.write(folder / "song.mp3", speech(3, 22_050, 2), 22_050)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "click.wav", speech(10 / 16_000, 16_000), 16_000)
    (folder / "words.wav").write_text(WORDS)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    with soundfile.SoundFile(folder / "long.flac", "w", samplerate=16_000, channels=1) as file:
        block = speech(60, 16_000)
        for _ in range(120):  # two hours
            file.write(block)
    return tmp_path / "data"


@pytest.mark.parametrize("objective", [pytest.param("data2vec", marks=pytest.mark.slow), "data2vec2"])
def test_a_folder_of_recordings_trains_on_the_good_ones_and_lists_the_bad(
    run_program, recordings, tmp_path, objective, monkeypatch
):
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    limits = ["modality.max_seconds=2", "modality.batch_seconds=8", "callbacks.probe.rank_samples=20"]
    where = [f"data.path={recordings}", f"hydra.run.dir={run}", f"objective={objective}"]
    options_of_objective = [word for word in AUDIO if objective == "data2vec2" or "masks_per_sample" not in word]
    result = run_program(*options_of_objective, "data=folder", *where, *SHORT, *limits)
    assert result.returncode == 0, result.stderr
    assert "1 are shorter than modality.min_seconds=0.2 (such as deep/er/click.wav)" in result.stdout
    bad = quarantined(run)
    assert bad.pop("deep/er/click.wav") == "0.001 s, shorter than modality.min_seconds=0.2"
    assert bad.pop("deep/er/empty.wav") == "empty file"
    assert bad.pop("deep/er/words.wav").startswith("not an audio file")
    # The header of this one is sound: it is found out when, and if, its turn to be decoded comes.
    assert set(bad) <= {"deep/er/nan.wav"}
    assert all(reason == "values that are not finite" for reason in bad.values())
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["modality"]) == ("finished", 6, "audio")
    assert summary["r2"]["trained"] < 1
    page = (run / "report.html").read_text()
    for heading in ("What the student hears", "Features over time as colours", "The task on held-out samples"):
        assert heading in page
    assert "patch" not in page.partition("Resolved configuration")[0].lower()


@pytest.fixture
def texts(tmp_path):
    """UTF-8, Latin-1, lines of JSON, and three files of no use."""
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"utf8_{number}.txt").write_text(f"Größe {number}: " + WORDS * (5 + number), encoding="utf-8")
        (folder / f"latin_{number}.txt").write_bytes(("Müßiggang ist aller Laster Anfang. " * 20).encode("latin-1"))
    lines = [json.dumps({"text": WORDS * 6}), "{broken", json.dumps({"text": WORDS * 7})]
    (folder / "many.jsonl").write_text("\n".join(lines))
    (folder / "empty.txt").touch()
    (folder / "program.txt").write_bytes(bytes(range(256)) * 20)
    return tmp_path / "data"


@pytest.mark.parametrize("objective", ["data2vec", pytest.param("data2vec2", marks=pytest.mark.slow)])
def test_a_folder_of_texts_trains_on_the_good_ones_and_lists_the_bad(
    run_program, texts, tmp_path, objective, monkeypatch
):
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    where = [f"data.path={texts}", f"hydra.run.dir={run}", f"objective={objective}"]
    options = ["modality.block_tokens=32", "modality.tokenizer.train_vocab_size=400", "data.batch_size_per_device=8"]
    options_of_objective = [word for word in TEXT if objective == "data2vec2" or "masks_per_sample" not in word]
    result = run_program(*options_of_objective, "data=folder", *where, *SHORT, *options)
    assert result.returncode == 0, result.stderr
    assert "trained a tokenizer of 400 entries" in result.stdout
    bad = quarantined(run)
    assert bad == {
        "deep/empty.txt": "empty file",
        "deep/program.txt": "a binary file, or UTF-16 or UTF-32 without a byte order mark",
        "deep/many.jsonl:2": "not a line of JSON",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    page = (run / "report.html").read_text()
    for heading in ("What the student reads", "Token features as colours", "The task on held-out samples"):
        assert heading in page
    assert "<mark" in page


@pytest.mark.slow
def test_a_stream_of_texts_and_of_recordings_trains(run_program, texts, tmp_path, monkeypatch):
    import io

    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)

    def wav() -> bytes:
        file = io.BytesIO()
        soundfile.write(file, rng.normal(scale=0.1, size=int(rng.integers(8_000, 24_000))), 16_000, format="WAV")
        return file.getvalue()

    sounds = [{"audio": {"bytes": wav(), "path": None}} for _ in range(30)]
    words = [{"text": WORDS * int(rng.integers(1, 9))} for _ in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(sounds), tmp_path / "sounds.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(words), tmp_path / "words.parquet")
    for modality, file, options in (
        (AUDIO, "sounds", ["modality.max_seconds=1.5", "modality.batch_seconds=6"]),
        (TEXT, "words", ["modality.block_tokens=32", "data.batch_size_per_device=4"]),
    ):
        run = tmp_path / f"run_{file}"
        where = [f"data.path={tmp_path / file}.parquet", f"data.cache_dir={tmp_path / 'hf'}", f"hydra.run.dir={run}"]
        result = run_program(*modality, "data=stream", *where, *SHORT, *options)
        assert result.returncode == 0, result.stderr
        assert json.loads((run / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_the_demo_ends_with_a_report_and_solves_the_task_on_held_out_samples(run_program, tmp_path, modality):
    result = run_program(f"modality={modality}", f"hydra.run.dir={tmp_path / 'run'}", timeout=900)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("report.html")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["r2"]["trained"] > 0.05 > summary["r2"]["untrained"]
    assert summary["probe"]["linear"]["trained"] > summary["probe"]["linear"]["untrained"]
