"""Fine-tuning as its users meet it: each of the heads from the command line, on 16 samples."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data2vec_train as ours
from data2vec_train.finetune.base import Examples
from data2vec_train.finetune.module import FinetuneModule

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


class MeanTask:
    """The loss of an example is its input times a weight."""

    def loss(self, model, batch):
        return (model.weight * batch.inputs["x"]).mean(), {}


def test_the_logged_loss_is_the_mean_over_all_examples_of_the_step():
    """Of micro-batches with three examples and one; the plain mean of their losses is 3."""
    options = {"optimizer": None, "encoder_frozen_steps": 0, "front_end_frozen": False, "decay_embeddings": True}
    options |= {"schedule": lambda step: 0.1, "seed": 0, "log_every_n_steps": 1}
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    module = FinetuneModule(model=model, task=MeanTask(), **options)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, max_steps=9, accumulate_grad_batches=2
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for values in ([0.0, 1.0, 2.0], [5.0]):
        batch = Examples(inputs={"x": torch.tensor(values)}, keys=tuple(map(str, values)))
        (module.training_step(batch, 0) / 2).backward()
        assert module.step_result is None

    def closure():
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer)

    module.optimizer_step(0, 0, optimizer, closure)
    result = module.step_result
    assert float(result.metrics["train/loss"]) == 2.0
    assert float(result.metrics["train/grad_norm"]) == 2.0, "the gradient is that of the logged loss"
    assert result.samples == (("0.0", "1.0", "2.0"), ("5.0",))
    assert result.step == 1
    assert not result.skip_step
