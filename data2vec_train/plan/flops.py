"""How many floating-point operations a computation takes: two for each multiplication of its matrix products.

    matmul (n, k) x (k, m)      2 n k m
    convolution                 2 x positions x weights, forward and for each gradient; grouped ones hold fewer weights
    attention                   2 matmuls forward, 4 backward, whichever kernel computes it

Additions, norms and activations are left out, as everywhere else. Works on meta tensors, where nothing is computed.
Two things differ from `torch.utils.flop_counter`, which this builds on: its backward of a convolution in G groups
counts (1 + G) / 2 times the work, and its backward of fused attention counts the scores that the kernel computes
again, so that the same model would seem to work harder with one backend than with another.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_ATEN = torch.ops.aten


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call; what the call does besides, it does."""
    return sum(flops_by_operation(function).values())


def flops_by_operation(function: Callable[[], Any]) -> dict[str, int]:
    """Name of the operation, such as `aten.mm` -> floating-point operations of one call."""
    counter = FlopCounterMode(display=False, custom_mapping=_corrected())
    counter.mod_tracker = _NoModules()
    with counter:
        function()
    return {str(operation): count for operation, count in counter.get_flop_counts().get("Global", {}).items()}


class _NoModules(nullcontext):
    """Instead of torch's, which tells modules apart by hooks and fails in a teacher with a student's tokens."""

    parents = ("Global",)


def _convolution_backward(
    grad_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: list[bool],
    **_: object,
) -> int:
    """Weights are (C_out, C_in / groups, ...): each gradient takes as many products as the forward pass."""
    positions = x_shape[0] * math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * positions * math.prod(weight_shape) * sum(output_mask[:2])


def _attention(q_shape: list[int], k_shape: list[int], v_shape: list[int], *_: object, **__: object) -> int:
    """Queries (B, H, Q, Dh) with S keys, and the weights with S values."""
    return 2 * math.prod(q_shape[:3]) * k_shape[2] * (q_shape[3] + v_shape[3])


def _attention_backward(_grad_shape: list[int], *shapes: Any, **_: object) -> int:
    return 2 * _attention(*shapes)


def _without_recomputed_scores(formula: Callable[..., int]) -> Callable[..., int]:
    """Torch's own count of a backward pass, less the first of its five matmuls; they are all of one size."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs) * 4 // 5

    count._get_raw = True  # the counter hands it tensors; the formula takes their shapes by itself
    return count


def _corrected() -> dict[Any, Callable[..., int]]:
    """Operation -> formula; made anew, since kernels register theirs when they are imported."""
    fused = {op: formula for op, formula in flop_registry.items() if "att" in str(op) and str(op).endswith("backward")}
    return {
        _ATEN.convolution_backward: _convolution_backward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        **{operation: _without_recomputed_scores(formula) for operation, formula in fused.items()},
    }
