"""The six pairs of modality and objective, as `python -m data2vec_train` builds them, small; and one step of each."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from omegaconf import DictConfig
from torch.optim import Optimizer

from data2vec_train.batch import Batch
from data2vec_train.config.build import build
from data2vec_train.data.collate import Collator
from data2vec_train.data.dataset import Sample
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.training.module import Data2VecModule
from data2vec_train.training.optim import CosineSchedule, adamw

PAIRS = [(modality, objective) for modality in ("vision", "audio", "text") for objective in ("data2vec", "data2vec2")]
SMALL = ["size.dim=32", "size.num_heads=4", "size.ffn_dim=64", "size.conv_dim=16"]
SMALL += ["size.depth=2", "objective.targets.top_k_layers=2"]
SCHEDULE = CosineSchedule(lr=1e-3, start_lr=1e-3, min_lr=1e-3, warmup_steps=0, max_steps=100)
LENGTHS = (40, 77, 128)  # tokens of each sample; images have one size


def config_of(composed: Callable[..., DictConfig], modality: str, objective: str, *overrides: str) -> DictConfig:
    return composed(f"modality={modality}", f"objective={objective}", *SMALL, *overrides)


def model_of(cfg: DictConfig) -> Data2Vec:
    torch.manual_seed(0)
    return build(cfg.objective).train()


def batch_of(cfg: DictConfig, model: Data2Vec, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    make = {
        "vision": lambda _: torch.randn(cfg.modality.channels, *[cfg.modality.image_px] * 2, generator=generator),
        "audio": lambda length: torch.randn(400 + 320 * (length - 1), generator=generator),
        "text": lambda length: torch.randint(4, 4000, (length,), generator=generator),
    }[cfg.modality.name]
    collator = Collator(
        masker=build(cfg.modality.masker),
        masks_per_sample=cfg.objective.masks_per_sample,
        grid=model.student.grid,
        token_count=model.student.token_count,
        seed=seed,
        pad_value=cfg.modality.pad_value,
        corruption=build(cfg.modality.corruption),
    )
    return collator([Sample(make(length), 0, number, None, ()) for number, length in enumerate(lengths)])


def module_of(model: Data2Vec, *, fused: bool) -> tuple[Data2VecModule, Optimizer]:
    """The LightningModule as a trainer of one process holds it, before its first step, which is a logged one."""

    def optimizer(modules, *, no_decay):
        options = {"lr": 1.0, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.1, "decay_all": False}
        return adamw(modules, no_decay=no_decay, fused=fused, **options)

    module = Data2VecModule(objective=model, optimizer=optimizer, schedule=SCHEDULE, seed=0, log_every_n_steps=1)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, max_steps=100, accumulate_grad_batches=1
    )
    return module, module.configure_optimizers()


def take_step(
    module: Data2VecModule, optimizer: Optimizer, batch: Batch, *, dtype: torch.dtype = torch.float32
) -> None:
    """What Lightning calls for one step, in its order; only what `training_step` does is in half precision."""

    def closure():
        device, half = batch.inputs.device.type, dtype != torch.float32
        low = torch.autocast(device, dtype=dtype, cache_enabled=False) if half else nullcontext()
        with low:
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer, gradient_clip_val=1.0)
        return loss

    module.optimizer_step(0, 0, optimizer, closure)
    module.trainer.global_step += 1
