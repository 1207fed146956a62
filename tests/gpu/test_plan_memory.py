"""Memory as planned against memory as used on a GPU."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from data2vec_train.batch import Batch
from data2vec_train.config.build import build
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.plan.run import drawn_batch, make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Recipe and settings -> samples in the batch.
RUNS = {
    "+recipes=vision/base_imagenet_v2 objective.masks_per_sample=8": 32,
    "+recipes=vision/base_imagenet_v2 objective.masks_per_sample=16": 32,
    "+recipes=audio/base_librispeech_v2 modality.max_seconds=20 objective.masks_per_sample=8": 4,
    "+recipes=text/base_books_wiki_v2 modality.block_tokens=512 objective.masks_per_sample=8": 16,
    "+recipes=vision/base_imagenet_v1": 64,
    "+recipes=audio/base_librispeech_v1": 12,
    "+recipes=text/base_books_wiki_v1": 32,
}


@pytest.mark.parametrize("command", RUNS)
def test_a_plan_predicts_the_peak_within_10_percent(command, composed):
    samples = RUNS[command]
    given = [*command.split(), "trainer.accumulate_grad_batches=1", f"data.batch_size_per_device={samples}"]
    if "audio" in command:
        given.append(f"modality.batch_seconds={20 * samples}")
    cfg = composed(*given, config_name="plan")
    predicted = make_plan(cfg)["memory"]["allocated"]
    measured = peak_of_training(cfg, samples)
    print(f"{command}: planned {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")  # noqa: T201
    assert predicted == pytest.approx(measured, rel=0.1)


def peak_of_training(cfg: DictConfig, samples: int) -> int:
    """The most that three steps have allocated; gradients live until after the next forward pass, as with Lightning."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    objective: Data2Vec = build(cfg.objective).cuda()
    objective.student.transformer.layer_drop = 0.0
    optimizer = build(OmegaConf.merge(cfg.optimizer, {"fused": True}))(
        [objective.student, objective.decoder], no_decay=objective.student.no_decay
    )
    batch = batch_of(cfg, objective, samples).to("cuda")
    for step in range(1, 4):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = objective(batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        objective.step_teacher(step)
        del loss
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def batch_of(cfg: DictConfig, objective: Data2Vec, samples: int) -> Batch:
    """Noise in the shape of the plan's batch."""
    batch = drawn_batch(cfg, objective, samples=samples)
    if batch.inputs.is_floating_point():
        batch.inputs.normal_()
    assert not isinstance(objective.student, WaveformEncoder) or batch.inputs.shape[-1] == 320_000
    return batch
