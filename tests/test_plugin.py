"""A modality of a third party, in one file, without an edit here: encoder, masks, probes, report, checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data2vec_train import checkpoints
from data2vec_train.testing import check_encoder

PLUGINS = Path(__file__).parent / "plugins"


@pytest.fixture
def eeg(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGINS))
    import eeg as module

    return module


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Two kinds of 19-channel oscillations in noise, in folders that name them."""
    rng = np.random.default_rng(0)
    time = np.arange(500) / 250
    for kind, hertz in (("theta", 5), ("beta", 20)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(20):
            wave = np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6)) * rng.uniform(0.5, 1, (19, 1))
            signal = wave + rng.normal(size=(19, 500))
            np.save(tmp_path / "data" / kind / f"{number}.npy", signal.astype(np.float32))
    return tmp_path / "data"


def test_the_plugin_is_one_short_file():
    assert len((PLUGINS / "eeg.py").read_text().splitlines()) <= 80


def test_its_encoder_keeps_the_contract(eeg):
    encoder = eeg.EEGEncoder(channels=19, window=25, dim=32, depth=2, num_heads=4, ffn_dim=64, attention="sdpa")
    check_encoder(encoder, torch.randn(3, 19, 1000), mode="drop", variable_length=True)


def test_the_contract_kit_finds_an_encoder_that_peeks(eeg):
    class Peeking(eeg.EEGEncoder):
        def contextualize(self, tokens, attention_mask=None, **options):
            output = super().contextualize(tokens, attention_mask, **options)
            output.tokens.add_(tokens.mean())
            return output

    encoder = Peeking(channels=19, window=25, dim=32, depth=2, num_heads=4, ffn_dim=64, attention="sdpa")
    with pytest.raises(AssertionError, match="hidden tokens change"):
        check_encoder(encoder, torch.randn(3, 19, 1000), mode="drop", variable_length=False)


def test_it_trains_with_probes_report_and_checkpoints(run_program, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA2VEC_PLUGINS", "eeg")
    run = tmp_path / "run"
    np.save(recordings / "theta" / "strange.npy", np.zeros((3, 500), np.float32))
    result = run_program(
        "modality=eeg",
        "data=folder",
        f"data.path={recordings}",
        "trainer.max_steps=4",
        "data.num_workers=0",
        "size.dim=32",
        "objective.masks_per_sample=2",
        f"hydra.run.dir={run}",
        python_path=PLUGINS,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["modality"] == "eeg"
    assert set(summary["probe"]["knn"]) == {"raw_input", "untrained", "trained", "teacher"}
    assert summary["broken_samples"] == 1
    assert "3 channels, expected 19" in (run / "quarantine.jsonl").read_text()
    checkpoint = checkpoints.read(checkpoints.resolve(run))
    assert checkpoint["config"]["modality"]["encoder"]["_target_"] == "eeg.EEGEncoder"
    page = (run / "report.html").read_text()
    assert "What the student sees" in page
    assert "mask 1" in page
