"""Every choice and every recipe composes, passes the preflight and builds; recipes hold the published numbers."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data2vec_train.config import build
from data2vec_train.optim import parameter_groups
from data2vec_train.places import recipes_parent
from data2vec_train.preflight import preflight

RECIPES = sorted(
    str(path.relative_to(recipes_parent() / "recipes").with_suffix(""))
    for path in (recipes_parent() / "recipes").rglob("*.yaml")
)
CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name not in ("sample", "preset")
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_builds_on_the_meta_device(recipe, composed):
    cfg = composed(f"+recipes={recipe}", "data.path=somewhere")
    assert preflight(cfg) == []
    with torch.device("meta"):
        objective = build(cfg.objective)
    masker = build(cfg.modality.masker)
    assert masker.constant_count or cfg.objective.mask_mode != "drop"
    build(cfg.modality.transform)
    assert build(cfg.scheduler)(cfg.scheduler.warmup_steps) == pytest.approx(cfg.optimizer.lr)
    groups = parameter_groups(
        [objective.student, objective.decoder], weight_decay=0.05, decay_all=False, no_decay=frozenset()
    )
    assert len(groups) == 2


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_composes_and_passes_the_preflight(choice, composed):
    group, _, option = choice.partition("=")
    path = ["data.path=somewhere"] if group == "data" and option != "sample" else []
    assert preflight(composed(choice, *path)) == []


def test_recipe_headers_say_how_to_run_them_and_whether_they_were_run():
    for recipe in RECIPES:
        text = (recipes_parent() / "recipes" / f"{recipe}.yaml").read_text()
        assert f"+recipes={recipe}" in text
        for word in ("hardware:", "source:", "Not run"):
            assert word in text, f"{recipe} lacks {word!r}"


# (recipe, student parameters of the original in millions, without the decoder): spec 3.5 and the BEiT base and large.
PARAMETERS = [
    ("vision/base_imagenet_v2", 88.4 - 2.6),
    ("vision/large_imagenet_v2", 309.3 - 6.0),
]


@pytest.mark.parametrize(("recipe", "millions"), PARAMETERS)
def test_parameter_counts_are_the_originals(recipe, millions, composed):
    cfg = composed(f"+recipes={recipe}", "data.path=somewhere")
    with torch.device("meta"):
        student = build(cfg.modality.encoder)
    # The original counts its fixed positions, 196 x D, as parameters.
    fixed = student.grid[0] * student.grid[1] * student.dim
    count = sum(parameter.numel() for parameter in student.parameters()) + fixed
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


# The tables of spec 2.3 and 3.7, as (setting, base v1, large v1, base v2, large v2, huge14 v2).
PUBLISHED = {
    "size.dim": (768, 1024, 768, 1024, 1280),
    "size.num_heads": (12, 16, 12, 16, 16),
    "size.depth": (12, 24, 12, 24, 32),
    "modality.encoder.prenet_depth": (0, 0, 2, 0, 0),
    "modality.patch_px": (16, 16, 16, 16, 14),
    "modality.encoder.drop_path": (0.25, 0.2, 0, 0, 0),
    "modality.encoder.attention_dropout": (0.05, 0.15, 0, 0, 0),
    "modality.encoder.layer_scale": (1e-4, 1e-5, None, None, None),
    "modality.encoder.positions": ("none", "none", "sincos", "sincos", "sincos"),
    "modality.encoder.relative_bias": ("shared", "shared", "none", "none", "none"),
    "modality.encoder.norm_first": (True, True, False, False, False),
    "objective.targets.top_k_layers": (6, 6, 10, 18, 24),
    "objective.targets.tap": ("block", "block", "ffn", "ffn", "ffn"),
    "objective.views": (1, 1, 16, 16, 16),
    "objective.loss_beta": (2, 2, 0, 0, 0),
    "objective.class_token_weight": (0, 0, 2.56, 1.28, 1.28),
    "objective.tau_start": (0.9998, 0.9998, 0.9998, 0.9998, 0.9998),
    "objective.tau_end": (0.9998, 0.9998, 0.99999, 0.99999, 1.0),
    "objective.tau_anneal_steps": (0, 0, 100_000, 150_000, 300_000),
    "optimizer.lr": (2e-3, 1e-3, 1e-3, 4e-4, 4e-4),
    "optimizer.betas": ([0.9, 0.999], [0.9, 0.999], [0.9, 0.95], [0.9, 0.95], [0.9, 0.95]),
    "optimizer.weight_decay": (0.05,) * 5,
    "optimizer.eps": (1e-8,) * 5,
    "scheduler.warmup_steps": (10 * 625, 80 * 312, 50040, 50040, 50040),
    "scheduler.min_lr": (1e-5, 1e-5, 0, 0, 0),
    "trainer.max_steps": (800 * 625, 800 * 312, 375300, 375300, 500_000),
    "trainer.gradient_clip_val": (3, 3, 4, 4, 4),
    "modality.augment.crop_scale": ([0.08, 1], [0.08, 1], [0.2, 1], [0.2, 1], [0.2, 1]),
    "modality.augment.color_jitter": ([0.4, 0.4, 0.4], [0.4, 0.4, 0.4], None, None, None),
}
GLOBAL_BATCH = (2048, 4096, 256, 128, 256)
DECODERS = {2: (6, 3, 768), 3: (3, 5, 1024), 4: (3, 5, 1024)}  # depth, kernel, channels
HIDDEN = {2: 157, 3: 147, 4: 192}
NAMES = ("base_imagenet_v1", "large_imagenet_v1", "base_imagenet_v2", "large_imagenet_v2", "huge14_imagenet_v2")


@pytest.mark.parametrize("which", range(5), ids=NAMES)
def test_a_recipe_holds_every_published_number(which, composed):
    cfg = composed(f"+recipes=vision/{NAMES[which]}", "data.path=somewhere")
    OmegaConf.resolve(cfg)
    for setting, values in PUBLISHED.items():
        assert OmegaConf.select(cfg, setting) == values[which], setting
    assert cfg.data.batch_size_per_device * cfg.trainer.accumulate_grad_batches == GLOBAL_BATCH[which]
    if which in DECODERS:
        decoder = cfg.objective.decoder
        assert (decoder.depth, decoder.kernel, decoder.channels) == DECODERS[which]
        assert decoder.groups == 16
        num_tokens = (cfg.modality.image_px // cfg.modality.patch_px) ** 2
        masker = build(cfg.modality.masker)
        import numpy as np

        side = cfg.modality.image_px // cfg.modality.patch_px
        assert masker(num_tokens, (side, side), np.random.default_rng(0)).sum() == HIDDEN[which]


@pytest.mark.parametrize("objective", ["data2vec", "data2vec2"])
def test_the_report_can_rebuild_the_untrained_encoder_from_the_seed(objective, composed):
    cfg = composed(f"objective={objective}")
    torch.manual_seed(3)
    student = build(cfg.objective).student
    torch.manual_seed(3)
    again = build(cfg.modality.encoder)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
