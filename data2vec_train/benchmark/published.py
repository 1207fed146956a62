"""The published settings of each modality and objective at base size, without randomness.

Numbers come from the recipes; dropout, drop path, layer drop and the noise at masked positions are off, so that two
programs with the same weights must agree.
"""

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from data2vec_train.batch import Batch
from data2vec_train.benchmark.steps import Update
from data2vec_train.config.build import build
from data2vec_train.config.resolvers import register_resolvers
from data2vec_train.data.dataset import Sample
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.paths import config_directory, expose_recipes
from data2vec_train.training.assemble import build_collator

RECIPES = {
    ("vision", "data2vec"): "vision/base_imagenet_v1",
    ("vision", "data2vec2"): "vision/base_imagenet_v2",
    ("audio", "data2vec"): "audio/base_librispeech_v1",
    ("audio", "data2vec2"): "audio/base_librispeech_v2",
    ("text", "data2vec"): "text/base_books_wiki_v1",
    ("text", "data2vec2"): "text/base_books_wiki_v2",
}
_SEED = 0


def base_config(modality: str, objective: str, *overrides: str) -> DictConfig:
    """The recipe for a modality and objective, without randomness in the step; `overrides` as on a command line."""
    off = [f"modality.encoder.{name}=0.0" for name in ("dropout", "attention_dropout", "activation_dropout")]
    off.append("modality.encoder.drop_path=0.0")
    if modality != "vision":
        off.append("modality.encoder.layer_drop=0.0")
    if objective == "data2vec2":
        off += ["objective.decoder.input_dropout=0.0", "objective.decoder.noise_std=0.0"]
    expose_recipes()
    register_resolvers()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("train", overrides=[f"+recipes={RECIPES[modality, objective]}", *off, *overrides])


def base_objective(cfg: DictConfig) -> Data2Vec:
    """Student, teacher, decoder and loss, with the same weights in every call."""
    torch.manual_seed(_SEED)
    return build(cfg.objective)


def base_update(cfg: DictConfig) -> Update:
    """The recipe's optimizer settings."""
    return Update(
        lr=cfg.optimizer.lr,
        betas=tuple(cfg.optimizer.betas),
        eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
        clip_norm=cfg.trainer.gradient_clip_val,
    )


def base_batch(cfg: DictConfig, ours: Data2Vec, *, samples: int, length: int) -> Batch:
    """Random inputs with masks from the recipe's masker.

    Args:
        cfg: from `base_config`.
        ours: from `base_objective`.
        samples: B.
        length: length of each sample, in audio samples or tokens; images have the size of the encoder.
    """
    collator = build_collator(cfg, encoder=ours.student)
    generator = torch.Generator().manual_seed(_SEED)
    return collator(
        [
            Sample(inputs=_random_input(cfg, ours, length, generator), epoch=0, id=number, label=None, rejected=())
            for number in range(samples)
        ]
    )


def _random_input(cfg: DictConfig, ours: Data2Vec, length: int, generator: torch.Generator) -> Tensor:
    if cfg.modality.name == "vision":
        return torch.randn(cfg.modality.channels, *ours.student.image_size, generator=generator)
    if cfg.modality.name == "audio":
        return torch.randn(length, generator=generator)
    # The embedded vocabulary begins with four special tokens and ends with the mask.
    return torch.randint(4, cfg.modality.vocab_size - 1, (length,), generator=generator)
