"""The number of floating-point operations of a computation: two for each multiplication in its matrix products.

    matmul (n, k) x (k, m)      2 n k m
    convolution                 2 x positions x weights, forward and for each gradient; grouped ones have fewer weights
    attention                   2 matmuls forward, 4 backward, for every kernel

Additions, norms and activations are not counted, as is usual. Works on meta tensors, where nothing is computed.
This differs in two points from `torch.utils.flop_counter`, which it uses: torch counts (1 + G) / 2 times the work for
the backward pass of a convolution in G groups, and it counts the scores that fused attention recomputes in its backward
pass, so that the count of a model would depend on the attention backend.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_ATEN = torch.ops.aten


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call; the call runs with all its side effects."""
    return sum(flops_by_operation(function).values())


def flops_by_operation(function: Callable[[], Any]) -> dict[str, int]:
    """Name of the operation, such as `aten.mm` -> floating-point operations of one call."""
    counter = FlopCounterMode(display=False, custom_mapping=_corrected())
    counter.mod_tracker = _NoModules()
    with counter:
        function()
    return {str(operation): count for operation, count in counter.get_flop_counts().get("Global", {}).items()}


class _NoModules(nullcontext):
    """Replaces torch's module tracker, which uses hooks and fails if a teacher processes tokens of a student."""

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
    """Scores of queries (B, H, Q, Dh) with S keys, and the weighted sum of S values."""
    return 2 * math.prod(q_shape[:3]) * k_shape[2] * (q_shape[3] + v_shape[3])


def _attention_backward(_grad_shape: list[int], *shapes: Any, **_: object) -> int:
    return 2 * _attention(*shapes)


def _without_recomputed_scores(formula: Callable[..., int]) -> Callable[..., int]:
    """Torch's count of a backward pass without the first of its five matmuls, which all have the same size."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs) * 4 // 5

    count._get_raw = True  # the counter passes tensors, from which the formula takes the shapes
    return count


def _corrected() -> dict[Any, Callable[..., int]]:
    """Operation -> formula; built for each call, because kernels register their formulas when they are imported."""
    fused = {op: formula for op, formula in flop_registry.items() if "att" in str(op) and str(op).endswith("backward")}
    return {
        _ATEN.convolution_backward: _convolution_backward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        **{operation: _without_recomputed_scores(formula) for operation, formula in fused.items()},
    }
