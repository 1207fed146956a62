"""The recipes of EAT hold the published numbers, and their models the published tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data2vec_train.config.build import build
from data2vec_train.weights.names import fairseq_image

NAMES = json.loads((Path(__file__).parent / "golden" / "eat_checkpoint_names.json").read_text())
POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
# ALGORITHM.md 8.3 to 8.5: base, large.
PUBLISHED = {
    "modality.reference_padding": (True, True),
    "modality.crop": ("first", "first"),
    "modality.transform.max_frames": (1024, 1024),
    "modality.mel_bins": (128, 128),
    "modality.masker.hidden_fraction": (0.8, 0.75),
    "modality.masker.adjust_fraction": (0.07, 0.1),
    "modality.masker.block_patches": (5, 5),
    "modality.encoder.prenet_depth": (0, 0),
    "modality.encoder.norm_eps": (1e-6, 1e-6),
    "objective.masks_per_sample": (16, 16),
    "objective.class_token_weight": (192, 192),
    "objective.tau_start": (0.9998, 0.9998),
    "objective.tau_end": (0.99999, 0.99999),
    "objective.tau_anneal_steps": (100_000, 150_000),
    "objective.targets.top_k_layers": (12, 24),
    "objective.decoder.depth": (6, 3),
    "objective.decoder.kernel": (3, 5),
    "objective.decoder.groups": (16, 16),
    "optimizer.lr": (5e-4, 4e-4),
    "optimizer.betas": ([0.9, 0.95], [0.9, 0.95]),
    "optimizer.eps": (1e-8, 1e-8),
    "optimizer.weight_decay": (0.05, 0.05),
    "scheduler.warmup_steps": (53_333, 53_333),
    "trainer.max_steps": (400_000, 400_000),
    "trainer.gradient_clip_val": (4, 4),
}
SHOWN = (102, 128)
SIZES = ("base", "large")


def recipe(composed, size: str):
    return composed(f"+recipes=sound/{size}_audioset_v2", "data.path=somewhere")


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_holds_every_published_number(size, composed):
    cfg, which = recipe(composed, size), SIZES.index(size)
    OmegaConf.resolve(cfg)
    for setting, values in PUBLISHED.items():
        assert OmegaConf.select(cfg, setting) == values[which], setting
    batching = build(cfg.modality.batching)
    clips = min(batching.batch_size(0), cfg.data.batch_size_per_device)
    assert clips * cfg.trainer.accumulate_grad_batches == 48
    assert cfg.objective.class_token_weight == clips * cfg.objective.masks_per_sample
    hidden = build(cfg.modality.masker)(512, (None, 8), np.random.default_rng(0))
    assert (~hidden).sum() == SHOWN[which]


@pytest.mark.parametrize("size", SIZES)
def test_the_tensors_are_the_published_ones(size, composed):
    """Names, shapes and counts of student and decoder, and of the teacher, which has no decoder."""
    cfg, published = recipe(composed, size), NAMES[size]
    with torch.device("meta"):
        objective = build(cfg.objective)
    names = fairseq_image(
        depth=cfg.size.depth,
        prenet_depth=0,
        decoder_depth=cfg.objective.decoder.depth,
        projection_layers=cfg.objective.decoder.projection_layers,
    )
    assert set(names) == set(published["student"])
    state = {name: list(tensor.shape) for name, tensor in objective.state_dict().items()}
    ours = {theirs: state[name] for theirs, name in names.items() if theirs != POSITIONS}
    assert ours == {name: shape for name, shape in published["student"].items() if name != POSITIONS}
    teacher = {name for name in names if ".decoder." not in name}
    assert teacher == set(published["teacher"])
    counts = [
        sum(parameter.numel() for parameter in part.parameters()) for part in (objective.student, objective.decoder)
    ]
    assert counts == [published["params"]["without_decoder"], published["params"]["decoder"]]
    # Positions are no weights here: those of 64 steps are kept, and any more follow from the formula.
    assert objective.student.positions.shape == (1, 512, cfg.size.dim)
    assert published["student"][POSITIONS] == [1, 768 * 8, cfg.size.dim]
