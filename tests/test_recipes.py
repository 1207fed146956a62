"""Every choice and every recipe composes, passes the preflight and builds; recipes hold the published numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from data2vec_train.config.build import build
from data2vec_train.config.check.overrides import preflight
from data2vec_train.data.identity import hashes_of_numbers
from data2vec_train.data.sampler import LengthBatchSampler
from data2vec_train.data.split import choose
from data2vec_train.paths import recipes_parent
from data2vec_train.training.optim import parameter_groups

RECIPES = sorted(
    str(path.relative_to(recipes_parent() / "recipes").with_suffix(""))
    for path in (recipes_parent() / "recipes").rglob("*.yaml")
)
CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name not in ("base", "sample", "preset", "supervised", "pieces")
]
FINETUNED = [
    recipe
    for recipe in RECIPES
    if "data2vec_train.finetune" in (recipes_parent() / "recipes" / f"{recipe}.yaml").read_text()
]
PRETRAINED = [recipe for recipe in RECIPES if recipe not in FINETUNED]
# What a recipe needs besides data.path.
NEEDS = dict.fromkeys(
    ("audio/spoken_digits", "sound/spoken_digits", "vision/cifar10"), ["data.test_source.path=elsewhere"]
)


def composed_recipe(composed, recipe: str) -> DictConfig:
    return composed(f"+recipes={recipe}", "data.path=somewhere", *NEEDS.get(recipe, []))


@pytest.mark.parametrize("recipe", FINETUNED)
def test_a_recipe_of_fine_tuning_composes(recipe, composed, tmp_path):
    given = [f"+recipes={recipe}", f"init_from={tmp_path}", "data.path=somewhere"]
    text = (recipes_parent() / "recipes" / f"{recipe}.yaml").read_text()
    given += ["data.test_source.path=elsewhere"] if "path: ???" in text else []
    given += ["head.maps=maps"] if "ade20k" in recipe else []
    cfg = composed(*given, config_name="finetune")
    assert preflight(cfg) == []
    assert build(cfg.scheduler)(cfg.scheduler.warmup_steps) == pytest.approx(cfg.optimizer.lr)
    build(cfg.modality.transform)


@pytest.mark.parametrize("recipe", PRETRAINED)
def test_a_recipe_composes_and_builds_on_the_meta_device(recipe, composed):
    cfg = composed_recipe(composed, recipe)
    assert preflight(cfg) == []
    with torch.device("meta"):
        objective = build(cfg.objective)
    masker = build(cfg.modality.masker)
    assert masker.constant_count or cfg.objective.mask_mode != "drop"
    build(cfg.modality.transform)
    build(cfg.modality.batching)
    build(cfg.modality.corruption)
    assert build(cfg.scheduler)(cfg.scheduler.warmup_steps) == pytest.approx(cfg.optimizer.lr)
    groups = parameter_groups(
        [objective.student, objective.decoder], weight_decay=0.05, decay_all=False, no_decay=frozenset()
    )
    assert len(groups) == 2


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_composes_and_passes_the_preflight(choice, composed, tmp_path):
    group, _, option = choice.partition("=")
    if group == "head":
        modality = {"image": "vision", "segmentation": "vision"}.get(option, "text")
        modality = "audio" if option.startswith(("ctc", "utterance", "frame", "speaker")) else modality
        given = [choice, f"modality={modality}", f"init_from={CONFIGS}", "data=folder", "data.path=somewhere"]
        given += ["head.classes=3", "head.maps=maps"] if option == "segmentation" else []
        assert preflight(composed(*given, config_name="finetune")) == []
        return
    if choice == "callbacks=finetune":  # the callbacks of another command, checked with the heads
        return
    path = ["data.path=somewhere"] if group == "data" and option not in ("sample", "objects") else []
    if choice == "encoder=timm":
        path = ["encoder.name=vit_tiny_patch16_224", "modality.image_px=64", "modality.patch_px=16"]
    if choice == "encoder=hf":
        (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 32, "patch_size": 8}')
        path = [f"encoder.path={tmp_path}", "modality.image_px=32", "modality.patch_px=8"]
    command = "plan" if group == "hardware" else "train"
    assert preflight(composed(choice, *path, config_name=command)) == []


def test_recipe_headers_say_how_to_run_them_and_whether_they_were_run():
    for recipe in RECIPES:
        text = (recipes_parent() / "recipes" / f"{recipe}.yaml").read_text()
        assert f"+recipes={recipe}" in text
        for word in ("hardware:", "source:"):
            assert word in text, f"{recipe} lacks {word!r}"
        assert ("Not run" in text) != ("Measured: see README" in " ".join(text.replace("#", " ").split())), recipe


# (recipe, student parameters of the original in millions, without the decoder): ALGORITHM.md 3.5 and the BEiT base and
# large.
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


# The tables of ALGORITHM.md 2.3 and 3.7, as (setting, base v1, large v1, base v2, large v2, huge14 v2).
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
    "objective.targets.target_layer": ("block", "block", "ffn", "ffn", "ffn"),
    "objective.masks_per_sample": (1, 1, 16, 16, 16),
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
        side = cfg.modality.image_px // cfg.modality.patch_px
        assert masker(num_tokens, (side, side), np.random.default_rng(0)).sum() == HIDDEN[which]


# The tables of ALGORITHM.md 1.2, 2.1, 2.2, 3.5 and 3.7 for speech and text.
SEQUENCES = ("base_librispeech_v1", "base_audioset_v1", "base_librispeech_v2", "large_librilight_v2")
SEQUENCES = tuple(f"audio/{name}" for name in SEQUENCES)
SEQUENCES += tuple(f"text/{name}" for name in ("base_books_wiki_v1", "base_books_wiki_v2", "large_books_wiki_v2"))
COMMON = {
    "size.dim": (768, 768, 768, 1024, 768, 768, 1024),
    "size.num_heads": (12, 12, 12, 16, 12, 12, 16),
    "size.depth": (12, 12, 12, 24, 12, 12, 24),
    "size.ffn_dim": (3072, 3072, 3072, 4096, 3072, 3072, 4096),
    "modality.encoder.prenet_depth": (0, 0, 0, 8, 0, 0, 0),
    "modality.encoder.dropout": (0.1,) * 7,
    "modality.encoder.attention_dropout": (0.1,) * 7,
    "modality.encoder.activation_dropout": (0.0,) * 7,
    "modality.encoder.layer_drop": (0.05, 0.05, 0.05, 0, 0, 0, 0),
    "modality.encoder.norm_eps": (1e-5,) * 7,
    "objective.mask_mode": ("replace", "replace", "drop", "drop", "corrupt", "drop", "drop"),
    "objective.masks_per_sample": (1, 1, 8, 12, 1, 8, 8),
    "objective.loss_beta": (0, 0, 0, 0, 4, 0, 0),
    "objective.channel_reduction": (*["sum_over_sqrt_dim"] * 4, *["sum"] * 3),
    "objective.targets.target_layer": ("ffn",) * 7,
    "objective.targets.top_k_layers": (8, 12, 8, 16, 10, 12, 24),
    "objective.targets.layer_norms": (*[["instance"]] * 4, ["layer"], ["instance"], ["layer"]),
    "objective.targets.mean_norms": ([], ["layer"], [], [], [], [], ["instance"]),
    "objective.share_embeddings": (True, True, True, True, False, True, True),
    "objective.copied": (["positions."], [], [], [], ["embedder."], [], []),
    "objective.tau_start": (0.999, 0.999, 0.999, 0.9997, 0.999, 0.9999, 0.9999),
    "objective.tau_end": (0.9999, 0.9999, 0.99999, 1.0, 0.9999, 0.99999, 0.99999),
    "objective.tau_anneal_steps": (30_000, 30_000, 75_000, 300_000, 300_000, 100_000, 100_000),
    "optimizer.lr": (5e-4, 5e-4, 7.5e-4, 4e-4, 2e-4, 2e-4, 1e-4),
    "optimizer.betas": ([0.9, 0.98],) * 7,
    "optimizer.eps": (1e-6,) * 7,
    "optimizer.weight_decay": (0.01,) * 7,
    "scheduler.warmup_steps": (12_000, 10_000, 8_000, 10_000, 10_000, 4_000, 4_000),
    "trainer.max_steps": (400_000, 200_000, 400_000, 600_000, 1_000_000, 1_000_000, 600_000),
    "trainer.gradient_clip_val": (None, None, None, 1, 5, 1, 1),
}
AUDIO = {
    "modality.encoder.conv_dim": 512,
    "modality.encoder.conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "modality.encoder.conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "modality.encoder.position_kernel": 19,
    "modality.encoder.position_depth": 5,
    "modality.encoder.position_groups": 16,
    "modality.encoder.embed_gradient": 1,
    "modality.sample_rate_hz": 16_000,
    "modality.min_seconds": 2.0,
    "modality.max_seconds": 20.0,
}
# Samples of sound per step, 16 kHz: GPUs x samples each. Blocks of text per step.
PER_STEP = (16 * 3.8e6, 24 * 3.4e6, 8 * 1e6, 48 * 320e3, 256, 64, 64)
# depth, kernel, channels, groups, residual, projection layers
SEQUENCE_DECODERS = {
    2: (4, 7, 384, 16, True, 1),
    3: (4, 7, 768, 16, True, 1),
    5: (5, 9, 768, 1, False, 2),
    6: (5, 9, 768, 1, False, 2),
}
# Hidden positions of 499 frames or 512 tokens.
SEQUENCE_HIDDEN = {2: 249, 3: 274, 5: 246, 6: 256}
# Millions of parameters without and with the decoder (ALGORITHM.md 3.5); the vocabulary there has 50,265 entries.
SEQUENCE_MILLIONS = {2: (93.16, 93.78), 3: (313.3, 315.2), 5: (124.05, 153.0)}


@pytest.mark.parametrize("which", range(7), ids=SEQUENCES)
def test_a_recipe_for_speech_or_text_holds_every_published_number(which, composed):
    cfg = composed_recipe(composed, SEQUENCES[which])
    OmegaConf.resolve(cfg)
    for setting, values in COMMON.items():
        assert OmegaConf.select(cfg, setting) == values[which], setting
    speech = cfg.modality.name == "audio"
    if speech:
        for setting, value in AUDIO.items():
            assert OmegaConf.select(cfg, setting) == value, setting
        assert cfg.modality.encoder.alibi == ("none" if which < 2 else "shared")
        per_batch = cfg.modality.batch_seconds * cfg.modality.sample_rate_hz
        assert cfg.modality.batching.budget == per_batch
    else:
        assert cfg.modality.block_tokens == cfg.modality.encoder.max_tokens == 512
        per_batch = cfg.modality.batching.budget / cfg.modality.block_tokens
    assert per_batch * cfg.trainer.accumulate_grad_batches == PER_STEP[which]
    masker = build(cfg.modality.masker)
    if which in SEQUENCE_HIDDEN:
        decoder = cfg.objective.decoder
        shape = (decoder.depth, decoder.kernel, decoder.channels, decoder.groups, decoder.residual)
        assert (*shape, decoder.projection_layers) == SEQUENCE_DECODERS[which]
        assert (decoder.input_dropout, decoder.noise_std) == (0.1, 0.01)
        hidden = masker(499 if speech else 512, None, np.random.default_rng(0)).sum()
        assert hidden == SEQUENCE_HIDDEN[which]
    else:
        nominal, span, starts = (0.65, 10, "inside") if speech else (0.35, 4, "anywhere")
        assert (masker.nominal_fraction, masker.span_tokens, masker.starts) == (nominal, span, starts)
    if which in SEQUENCE_MILLIONS:
        with torch.device("meta"):
            objective = build(cfg.objective)
        counts = [sum(p.numel() for p in part.parameters()) for part in (objective.student, objective.decoder)]
        for measured, wanted in zip((counts[0], sum(counts)), SEQUENCE_MILLIONS[which], strict=True):
            assert measured / 1e6 == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize("recipe", [*(f"vision/{name}" for name in NAMES), *SEQUENCES])
def test_a_recipe_keeps_next_to_nothing_from_training(recipe, composed):
    # A tenth of what has labels is held out otherwise, and sub-folders are labels: those of ImageNet, of two corpora.
    cfg = composed_recipe(composed, recipe)
    if cfg.modality.name == "audio" or cfg.modality.get("cross_documents"):
        labels = None  # neither manifests nor blocks that run from one document into the next have any
    else:
        labels = np.arange(1_000_000) % 1000
    origins = hashes_of_numbers(1_000_000)
    held_out = choose(origins, labels, cfg.data.held_out_fraction).rows(origins, labels)
    assert len(held_out) <= (0 if cfg.modality.name == "vision" else 512)


def test_a_batch_of_short_blocks_has_as_many_tokens_as_one_of_full_blocks(composed):
    cfg = composed("+recipes=text/base_books_wiki_v1", "data.path=somewhere")
    for length in (512, 64):
        sampler = LengthBatchSampler(
            lengths=np.full(1000, length),
            batching=build(cfg.modality.batching),
            batch_size=cfg.data.batch_size_per_device,
            seed=0,
        )
        assert 0.9 * 8192 <= length * len(next(iter(sampler))) <= 8192


def test_the_tri_stage_recipe_holds_90_percent_and_decays_over_7(composed):
    cfg = composed_recipe(composed, SEQUENCES[0])
    schedule = build(cfg.scheduler)
    assert schedule(0) == pytest.approx(5e-6)
    assert schedule(12_000) == schedule(371_999) == pytest.approx(5e-4)
    assert schedule(400_000) == pytest.approx(5e-6)


@pytest.mark.parametrize("modality", ["vision", "audio", "text"])
@pytest.mark.parametrize("objective", ["data2vec", "data2vec2"])
def test_the_report_can_rebuild_the_untrained_encoder_from_the_seed(objective, modality, composed):
    cfg = composed(f"objective={objective}", f"modality={modality}")
    torch.manual_seed(3)
    student = build(cfg.objective).student
    torch.manual_seed(3)
    again = build(cfg.modality.encoder)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


# The tables of ALGORITHM.md 4.3, as (setting, base v1, large v1, base v2, large v2); 1,251 steps of 1,024 images are an
# epoch.
FINETUNED_IMAGES = {
    "optimizer.lr": (4e-3, 5e-3, 1e-3, 5e-4),
    "optimizer.betas": ([0.9, 0.999], [0.9, 0.999], [0.9, 0.95], [0.9, 0.95]),
    "optimizer.eps": (1e-8,) * 4,
    "optimizer.weight_decay": (0, 0.05, 0.05, 0.05),
    "scheduler.start_lr": (0, 0, 1e-6, 1e-7),
    "scheduler.min_lr": (1e-6, 1e-6, 1e-6, 1e-7),
    "scheduler.warmup_steps": (10 * 1251, 5 * 1251, 16_000, 16_000),
    "trainer.max_steps": (100 * 1251, 50 * 1251, 250_200, 125_200),
    "trainer.gradient_clip_val": (None, None, None, 4),
    "data.batch_size_per_device": (128, 64, 32, 32),
    "layer_decay.rate": (0.65, 0.65, 0.65, 0.75),
    "layer_decay.embeddings": (True, True, False, False),
    "rates.drop_path": (0.2, 0.25, 0.1, 0.2),
    "head.mixup": (0.8, 0.8, 0.7, 0.7),
    "head.cutmix": (1, 1, 1, 1),
    "head.mix_probability": (1, 1, 0.9, 0.9),
    "head.label_smoothing": (0.1,) * 4,
    "head.init_scale": (0.001, 0.001, 1, 1),
    "modality.augment.rand_augment": ([2, 27],) * 4,
    "modality.augment.erase": (0.25,) * 4,
}
FINETUNED_IMAGES_NAMES = ("base_imagenet_v1", "large_imagenet_v1", "base_imagenet_v2", "large_imagenet_v2")


@pytest.mark.parametrize("which", range(4), ids=FINETUNED_IMAGES_NAMES)
def test_a_recipe_for_image_classes_holds_every_published_number(which, composed, tmp_path):
    recipe = f"+recipes=vision/finetune_{FINETUNED_IMAGES_NAMES[which]}"
    given = [f"init_from={tmp_path}", "data.path=somewhere", "data.test_source.path=elsewhere"]
    cfg = composed(recipe, *given, config_name="finetune")
    OmegaConf.resolve(cfg)
    for setting, values in FINETUNED_IMAGES.items():
        assert OmegaConf.select(cfg, setting) == values[which], setting
    per_step = cfg.data.batch_size_per_device * cfg.trainer.accumulate_grad_batches
    assert per_step == (1024, 1024, 512, 512)[which]


# The table of ALGORITHM.md 4.1: learning rate, steps, shares of frames and of channels, layer drop, frozen steps.
FINETUNED_SPEECH = {
    "10m": (5e-5, 13_000, 0.65, 0.25, 0.1, 10_000),
    "1h": (5e-5, 13_000, 0.65, 0.25, 0.1, 10_000),
    "10h": (5e-5, 20_000, 0.65, 0.5, 0.05, 10_000),
    "100h": (3e-5, 80_000, 0.65, 0.5, 0.1, 0),
    "960h": (1e-4, 320_000, 0.5, 0.1, 0.1, 0),
}


@pytest.mark.parametrize("split", FINETUNED_SPEECH)
def test_a_recipe_for_transcripts_holds_every_published_number(split, composed, tmp_path):
    given = [f"init_from={tmp_path}", "data.path=somewhere", "data.test_source.path=elsewhere"]
    cfg = composed(f"+recipes=audio/ctc_{split}_base", *given, config_name="finetune")
    OmegaConf.resolve(cfg)
    masks, rates = cfg.head.masks, cfg.rates
    found = (cfg.optimizer.lr, cfg.trainer.max_steps, masks.time_fraction, masks.channel_fraction, rates.layer_drop)
    assert (*found, cfg.freeze.encoder_steps) == FINETUNED_SPEECH[split]
    assert (masks.time_span, round(768 * masks.channel_span), cfg.freeze.front_end) == (10, 64, True)
    assert (rates.dropout, rates.attention_dropout, rates.activation_dropout, rates.head_dropout) == (0, 0, 0.1, 0)
    assert (cfg.optimizer.betas, cfg.optimizer.eps, cfg.optimizer.weight_decay) == ([0.9, 0.98], 1e-8, 0)
    schedule, steps = cfg.scheduler, cfg.trainer.max_steps
    assert (schedule.warmup_steps, schedule.hold_steps, schedule.final_factor) == (0.1 * steps, 0.4 * steps, 0.05)
    assert cfg.trainer.gradient_clip_val is None
    # 3.2 M samples on each of 2 GPUs, 4 times, or on each of 8.
    assert cfg.modality.batch_seconds * 16_000 * cfg.trainer.accumulate_grad_batches == 8 * 3.2e6


# The newer settings there, for 2.0: learning rate, steps, share of frames, samples in a step.
FINETUNED_SPEECH_V2 = {
    "10h": (2e-5, 60_000, 0.5, 4 * 1.28e6),
    "100h": (1e-5, 100_000, 0.4, 8 * 1e6),
    "960h": (1e-5, 200_000, 0.4, 16 * 1e6),
}


@pytest.mark.parametrize("split", FINETUNED_SPEECH_V2)
def test_a_recipe_for_transcripts_of_2_holds_every_published_number(split, composed, tmp_path):
    given = [f"init_from={tmp_path}", "data.path=somewhere", "data.test_source.path=elsewhere"]
    cfg = composed(f"+recipes=audio/ctc_{split}_base_v2", *given, config_name="finetune")
    OmegaConf.resolve(cfg)
    masks, rates, schedule = cfg.head.masks, cfg.rates, cfg.scheduler
    per_step = cfg.modality.batch_seconds * 16_000 * cfg.trainer.accumulate_grad_batches
    found = (cfg.optimizer.lr, cfg.trainer.max_steps, masks.time_fraction, per_step)
    assert found == FINETUNED_SPEECH_V2[split]
    assert (masks.time_span, masks.channel_fraction, round(768 * masks.channel_span)) == (5, 0.1, 64)
    assert (rates.layer_drop, cfg.freeze.encoder_steps, cfg.freeze.front_end) == (0.1, 100, True)
    assert (rates.dropout, rates.attention_dropout, rates.activation_dropout, rates.head_dropout) == (0, 0, 0.1, 0)
    assert (cfg.optimizer.betas, cfg.optimizer.eps, cfg.optimizer.weight_decay) == ([0.9, 0.98], 1e-8, 0)
    assert (schedule.start_lr, schedule.min_lr, schedule.warmup_steps) == (0, 0, 8000)
    assert cfg.trainer.gradient_clip_val is None


# The table of ALGORITHM.md 4.2: batch, warm-up, steps, and the rate of 1.0.
FINETUNED_TEXT = {
    "cola": (16, 320, 5336, 1e-5),
    "mnli": (32, 7432, 123_873, 1e-5),
    "mrpc": (16, 137, 2296, 1e-5),
    "qnli": (32, 1986, 33_112, 1e-5),
    "qqp": (32, 28_318, 113_272, 1e-5),
    "rte": (16, 122, 2036, 2e-5),
    "sst2": (32, 1256, 20_935, 1e-5),
    "stsb": (16, 214, 3598, 2e-5),
}


@pytest.mark.parametrize("task", FINETUNED_TEXT)
def test_a_recipe_for_glue_holds_every_published_number(task, composed, tmp_path):
    given = [f"init_from={tmp_path}", "data.path=somewhere"]
    cfg = composed(f"+recipes=text/glue_{task}", *given, config_name="finetune")
    found = (cfg.data.batch_size_per_device, cfg.scheduler.warmup_steps, cfg.trainer.max_steps, cfg.optimizer.lr)
    assert found == FINETUNED_TEXT[task]
    assert (cfg.optimizer.betas, cfg.optimizer.eps, cfg.optimizer.weight_decay) == ([0.9, 0.98], 1e-6, 0.1)
    assert (cfg.rates.dropout, cfg.rates.attention_dropout, cfg.rates.head_dropout) == (0.1, 0.1, 0)
    assert (cfg.scheduler.end_lr, cfg.scheduler.power, cfg.trainer.gradient_clip_val) == (0, 1, None)
    assert cfg.trainer.accumulate_grad_batches == 1
