"""Optimizer groups and learning-rate schedules.

A schedule is a pure function of the number n of finished optimizer steps: it gives the learning rate of step n + 1, so
that there is no scheduler state to save or to restore. Formulas and sampled values: ALGORITHM.md 2 and 3.7,
`tests/statistics.json`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear from `start_lr` to `lr` over `warmup_steps`, then half a cosine down to `min_lr` at `max_steps`."""

    lr: float
    start_lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.start_lr + (self.lr - self.start_lr) * step / self.warmup_steps
        progress = (min(step, self.max_steps) - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TriStageSchedule:
    """Linear warm-up from start_factor * lr, constant, then exponential decay to final_factor * lr at `max_steps`.

    Source: fairseq's tri-stage scheduler (1.0 speech and CTC fine-tuning).
    """

    lr: float
    start_factor: float
    final_factor: float
    warmup_steps: int
    hold_steps: int
    max_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        decay_steps = self.max_steps - self.warmup_steps - self.hold_steps
        into_decay = step - self.warmup_steps - self.hold_steps
        if step < self.warmup_steps:
            return self.lr * (self.start_factor + (1 - self.start_factor) * step / self.warmup_steps)
        if into_decay < 0:
            return self.lr
        if into_decay >= decay_steps:
            return self.lr * self.final_factor
        return self.lr * math.exp(math.log(self.final_factor) * into_decay / decay_steps)


@dataclass(frozen=True, kw_only=True)
class PolynomialSchedule:
    """Linear from 0 to `lr` over `warmup_steps`, then (1 - progress)^power down to `end_lr` at `max_steps`."""

    lr: float
    end_lr: float
    power: float
    warmup_steps: int
    max_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if step >= self.max_steps:
            return self.end_lr
        remaining = 1 - (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.end_lr + (self.lr - self.end_lr) * remaining**self.power


Schedule = Callable[[int], float]


def parameter_groups(
    modules: Iterable[nn.Module], *, weight_decay: float, decay_all: bool, no_decay: frozenset[str]
) -> list[dict]:
    """Trainable parameters in two groups, with and without weight decay.

    Args:
        modules: modules with the parameters; frozen parameters are left out.
        weight_decay: of the first group.
        decay_all: decay everything, as the originals of 2.0 do through a bug (ALGORITHM.md 7, row 3).
        no_decay: parameter names, or their ends after a dot, that are exempt, besides biases and 1-d tensors.

    Returns:
        Groups for a torch optimizer, without empty ones.
    """
    decayed, exempt = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            free = _is_exempt(name, parameter, no_decay) and not decay_all
            (exempt if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_exempt(name: str, parameter: nn.Parameter, no_decay: frozenset[str]) -> bool:
    """Whether a parameter is exempt from decay. `no_decay` has names in an encoder; a model's names are longer."""
    named = any(f".{name}".endswith(f".{exempt}") for exempt in no_decay)
    return parameter.ndim == 1 or name.endswith("bias") or named


def adamw(
    modules: Iterable[nn.Module],
    *,
    no_decay: frozenset[str],
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    decay_all: bool,
    fused: bool,
) -> AdamW:
    """AdamW over `parameter_groups`.

    torch's AdamW adds eps after the bias correction, fairseq's Adam before it; with the published eps of 1e-8 to 1e-6
    the difference is negligible after the first steps (ALGORITHM.md 3.8).
    """
    groups = parameter_groups(modules, weight_decay=weight_decay, decay_all=decay_all, no_decay=no_decay)
    return _with_own_settings(AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused))


def layered_adamw(
    model: nn.Module,
    *,
    block_of: Callable[[str], int],
    no_decay: frozenset[str],
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    decay_all: bool,
    fused: bool,
    layer_decay: float,
) -> AdamW:
    """AdamW for fine-tuning, with lower rates for lower blocks.

    Args:
        model: encoder and head; frozen parameters are left out.
        block_of: name of a parameter -> number of layers above it; 0 = full rate.
        no_decay: see `parameter_groups`.
        lr: learning rate of the top layer.
        betas: see `adamw`.
        eps: see `adamw`.
        weight_decay: see `adamw`.
        decay_all: see `adamw`.
        fused: see `adamw`.
        layer_decay: rate of a layer as a share of that of the layer above; 1 = the same rate for all.

    Source: BEiT (ALGORITHM.md 4.3).
    """
    rows: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = _is_exempt(name, parameter, no_decay) and not decay_all
        rows.setdefault((layer_decay ** block_of(name), 0.0 if free else weight_decay), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale} for (scale, decay), parameters in rows.items()
    ]
    return _with_own_settings(AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused))


def _with_own_settings(optimizer: AdamW) -> AdamW:
    """Make the optimizer keep its settings when it loads a state, from which torch would take decay, betas and eps."""

    def keep(optimizer: Optimizer, state: dict) -> dict:
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        return state | {"param_groups": [own | {"params": saved["params"]} for saved, own in pairs]}

    optimizer.register_load_state_dict_pre_hook(keep)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group `lr`, times the group's own `lr_scale` where it has one (layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
