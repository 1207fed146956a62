"""`modality=sound` as a user would run it: train on a folder, go on, probe, embed, continue, load in Python."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pyarrow import parquet

from data2vec_train import load_pretrained, save_pretrained
from data2vec_train.batch import Batch, Masks
from data2vec_train.config.build import build
from data2vec_train.data.sources.files import FolderSource
from data2vec_train.features.embedding import embed_inputs
from data2vec_train.training.assemble import build_collator
from data2vec_train.weights.sound import SpectrogramExtractor

RATE = 16_000
SMALL = [
    "modality=sound",
    "size.dim=32",
    "size.depth=2",
    "size.num_heads=2",
    "size.ffn_dim=64",
    "modality.mel_bins=32",
    "modality.patch=8",
    "modality.visible_block_patches=2",
    "modality.max_seconds=1.28",
    "modality.batch_seconds=8",
    "objective.masks_per_sample=2",
    "objective.class_token_weight=2",
]

STEPS = ["trainer.max_steps=6", "callbacks.probe.every_n_steps=3", "trainer.log_every_n_steps=1", "precision=fp32"]
STEPS += ["data.num_workers=1"]


def chirp(seconds: float, start_hz: float, end_hz: float, seed: int) -> np.ndarray:
    """A tone that rises or falls, in noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (start_hz * time + (end_hz - start_hz) * time**2 / (2 * seconds)))
    return 0.3 * tone + 0.02 * np.random.default_rng(seed).normal(size=len(time))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, ends in (("rising", (300, 3000)), ("falling", (3000, 300))):
        (folder / name).mkdir()
        for number in range(12):
            wave = chirp(0.4 + 0.15 * number, *ends, seed=number)
            soundfile.write(folder / name / f"{number:02}.wav", wave, RATE)
    (folder / "falling" / "broken.wav").write_text("no sound")
    return folder


def run(verb: str, *arguments: str, folder: Path) -> str:
    module = "data2vec_train" if verb == "train" else f"data2vec_train.{verb}"
    given = [*arguments, f"cache_dir={folder}/cache"]
    done = subprocess.run([sys.executable, "-m", module, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(recordings, tmp_path_factory) -> Path:
    """A run of 6 steps, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("runs")
    where = ["data=folder", f"data.path={recordings}", f"hydra.run.dir={folder}/run"]
    run("train", *SMALL, *where, *STEPS, folder=folder)
    return folder / "run"


def test_a_folder_of_sounds_trains_with_probes_and_a_report(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["modality"]) == ("finished", 6, "sound")
    assert {"untrained", "raw_input", "trained"} <= set(summary["probe"]["linear"])
    assert json.loads((trained / "quarantine.jsonl").read_text())["key"] == "falling/broken.wav"
    page = (trained / "report.html").read_text()
    for heading in ("What the student hears", "Patch features as colours", "Nearest neighbours", "rising"):
        assert heading in page
    names = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_regression", "train/loss_class_token"} <= set(names)


def test_a_run_goes_on_where_it_was(trained, recordings, tmp_path):
    """From the checkpoint at step 3 the same weights are reached, bit for bit."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    for pointer in ("best", "last"):
        (copy / "checkpoints" / pointer).write_text("step-00000003")
    (copy / "summary.json").unlink()
    where = ["data=folder", f"data.path={recordings}", f"hydra.run.dir={copy}"]
    said = run("train", *SMALL, *where, *STEPS, folder=trained.parent)
    assert "step 3" in said
    before, after = (load_pretrained(folder).state_dict() for folder in (trained, copy))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_probe_embed_and_python_read_the_run(trained, recordings, tmp_path):
    data = ["modality=sound", "data=folder", f"data.path={recordings}"]
    said = run(
        "probe", f"checkpoint={trained}", *data, "probes=[linear]", f"hydra.run.dir={tmp_path}/p", folder=tmp_path
    )
    assert "inputs are prepared as for" in said
    assert "mel_bins=32" in said
    assert "linear" in (tmp_path / "p" / "probe.csv").read_text()
    out = tmp_path / "out.parquet"
    run("embed", f"checkpoint={trained}", *data, "modality.max_seconds=4", f"out={out}", folder=tmp_path)
    table = parquet.read_table(out).to_pydict()
    assert len(table["key"]) == 24
    files = [recordings / key for key in table["key"][:3]]
    vectors = embed_inputs(trained, [str(file) for file in files])
    for vector, written in zip(vectors, table["layer_2"], strict=False):
        np.testing.assert_allclose(vector[0], written, rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_go_round_and_bring_their_front_end(trained, recordings, tmp_path):
    model = load_pretrained(trained)
    save_pretrained(model, tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    extractor = SpectrogramExtractor.from_pretrained(tmp_path / "saved")
    waves = [soundfile.read(recordings / "rising" / f"{number:02}.wav", dtype="float32")[0] for number in (0, 7)]
    batch = extractor(waves, sampling_rate=RATE)
    features = again(**batch).last_hidden_state
    alone = again(**extractor(waves[:1])).last_hidden_state[0]
    torch.testing.assert_close(features[0, : len(alone)], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="resample"):
        extractor(waves, sampling_rate=8000)


def test_pretraining_goes_on_from_a_run(trained, recordings, tmp_path):
    """On longer clips: size, patches and front end come with the weights."""
    start = [f"init_from={trained}", "modality=sound", "modality.max_seconds=2", "modality.batch_seconds=8"]
    where = ["data=folder", f"data.path={recordings}", f"hydra.run.dir={tmp_path}/run", "data.num_workers=0"]
    run("train", *start, *where, "trainer.max_steps=2", "report=false", folder=trained.parent)
    model, before = load_pretrained(tmp_path / "run"), load_pretrained(trained)
    assert (model.get_encoder().mel_bins, model.get_encoder().dim) == (32, 32)
    first, second = (encoder.get_encoder().embedder.project.weight for encoder in (before, model))
    assert 0 < (first - second).abs().max() < 0.1  # it has moved from there


def test_reference_padding_makes_every_clip_the_longest(composed, recordings):
    """The original's batches: no mask, and padding that is hidden, scored and averaged."""
    padded, plain = (
        composed(*SMALL, f"modality.reference_padding={way}", "modality.crop=first") for way in ("true", "false")
    )
    source = FolderSource(path=str(recordings), extensions=[".wav"], class_from_folder="auto")
    shapes = {}
    for name, cfg in (("padded", padded), ("plain", plain)):
        encoder = build(cfg.modality.encoder)
        transform, decode = build(cfg.modality.transform), build(cfg.modality.decode)
        prepared = build(cfg.modality.prepare)(source)
        values = [transform.evaluate(decode(prepared[row].value)) for row in range(len(prepared))]
        assert [value.shape[1] for value in values] == prepared.lengths.tolist()
        shapes[name] = {value.shape[1] for value in values}
        assert build_collator(cfg, encoder=encoder).grid == (None, 4)
    assert shapes["padded"] == {128}
    assert len(shapes["plain"]) > 5


def test_the_class_token_weight_does_not_depend_on_the_batch(composed):
    """Twice the same clips give the same loss, and so do two copies of a mask."""
    cfg = composed(*SMALL, "objective.class_token_weight=7", "objective.decoder.noise_std=0")
    torch.manual_seed(0)
    model = build(cfg.objective).eval()
    inputs = torch.randn(2, 32, 64)
    masked = torch.zeros(2, 2, 32, dtype=torch.bool)
    masked[:, 0, :25], masked[:, 1, 7:] = True, True
    once = model(Batch(inputs=inputs, masks=Masks.from_masked(masked)))
    twice = model(Batch(inputs=inputs.repeat(2, 1, 1), masks=Masks.from_masked(masked.repeat(2, 1, 1))))
    for name, term in once.terms.items():
        torch.testing.assert_close(term, twice.terms[name])
    half = build(composed(*SMALL, "objective.class_token_weight=3.5", "objective.decoder.noise_std=0").objective).eval()
    half.load_state_dict(model.state_dict())
    less = half(Batch(inputs=inputs, masks=Masks.from_masked(masked)))
    torch.testing.assert_close(2 * less.terms["class_token"], once.terms["class_token"])
