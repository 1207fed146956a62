"""Fine-tuning as its users meet it: each of the heads from the command line, on 16 samples."""

import json

import numpy as np
import pytest

import data2vec_train as ours

NAMES = ["ctc", "utterance", "frame", "speaker", "sequence", "token", "qa", "multiple_choice", "masked_lm", "causal_lm"]
NAMES += ["image", "segmentation"]


@pytest.mark.parametrize("head", NAMES)
def test_every_head_trains_and_leaves_a_model(command, heads, head):
    status, run_dir = command(head, steps=2)
    assert status == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 2
    assert np.isfinite(summary["best"][heads[head][1]])
    assert (run_dir / "report.html").stat().st_size > 5000
    model = ours.load_pretrained(run_dir)
    again = ours.load_pretrained(run_dir / "checkpoints" / "last")
    assert type(model) is type(again)
    assert model.config.id2label == again.config.id2label


@pytest.mark.slow
@pytest.mark.parametrize("head", NAMES)
def test_every_head_overfits_sixteen_samples(command, heads, head):
    _, metric, wanted, steps = heads[head]
    status, run_dir = command(head, "optimizer.lr=2e-3", steps=steps)
    assert status == 0
    reached = json.loads((run_dir / "summary.json").read_text())["best"][metric]
    assert reached <= wanted if metric in ("wer", "eer") else reached >= wanted, f"{metric} {reached}"
