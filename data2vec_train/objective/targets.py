"""Targets of the student: normalised, averaged representations of the teacher's last K layers.

    y = N_mean( 1/K sum_k N_layer(a_k) ),  a_k (B, T, D) the target layer of block k, see `TargetBuilder`

N_layer and N_mean are sequences of norms without parameters: "instance" (each channel of a sample over time), "layer"
(each position over channels) and "batch" (each channel over samples and time). Which model uses which: ALGORITHM.md
1.2, and the presets. All in float32 with eps 1e-5.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.encoders.base import TargetLayer
from data2vec_train.system.constraints import checked

Norm = Literal["instance", "layer", "batch"]
EPS = 1e-5


class TargetBuilder:
    """Turns layers of the teacher into targets.

    Args:
        target_layer: "ffn" for the raw output of a block's FFN, "block" for the block's output.
        top_k_layers: K, how many of the last layers to average.
        layer_norms: applied to every layer, in this order.
        mean_norms: applied to the mean.
        reference_padding: include padded positions in the statistics of instance and batch norm, as the originals do.

    Raises:
        ValueError: unknown target layer or norm, or K below 1.
    """

    @checked
    def __init__(
        self,
        *,
        target_layer: TargetLayer,
        top_k_layers: int,
        layer_norms: Sequence[Norm],
        mean_norms: Sequence[Norm],
        reference_padding: bool,
    ) -> None:
        self.target_layer: TargetLayer = target_layer
        self.top_k_layers = top_k_layers
        self.layer_norms = tuple(layer_norms)
        self.mean_norms = tuple(mean_norms)
        self.reference_padding = reference_padding

    def __call__(self, layers: list[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """Targets for all positions.

        Args:
            layers: K tensors (B, T, D), lowest layer first.
            attention_mask: (B, T) bool, True = real; padded positions are left out of the statistics.

        Returns:
            (B, T, D) float32.

        Raises:
            ValueError: not K layers, or instance norm over a single position.
        """
        if len(layers) != self.top_k_layers:
            raise ValueError(f"expected the last {self.top_k_layers} layers, got {len(layers)}")
        if layers[0].shape[1] < 2 and "instance" in self.layer_norms + self.mean_norms:
            raise ValueError("instance norm over time needs at least two positions; the input is too short")
        real = None if attention_mask is None or self.reference_padding else attention_mask[..., None]
        mean = torch.zeros_like(layers[0], dtype=torch.float32)
        for layer in layers:
            mean += normalise(layer.float(), self.layer_norms, real)
        return normalise(mean / len(layers), self.mean_norms, real)


def normalise(x: Tensor, norms: Sequence[Norm], real: Tensor | None = None) -> Tensor:
    """Apply `norms` to x (B, T, D) float32; `real` (B, T, 1) bool restricts statistics over time to real positions."""
    for norm in norms:
        if norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], eps=EPS)
        else:
            x = _normalise_over(x, (1,) if norm == "instance" else (0, 1), real)
    return x


def _normalise_over(x: Tensor, axes: tuple[int, ...], real: Tensor | None) -> Tensor:
    if real is None:
        variance, mean = torch.var_mean(x, dim=axes, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + EPS)
    count = real.sum(dim=axes, keepdim=True)
    mean = (x * real).sum(dim=axes, keepdim=True) / count
    centred = (x - mean) * real
    variance = centred.square().sum(dim=axes, keepdim=True) / count
    return centred * torch.rsqrt(variance + EPS)
