"""Heads of image encoders: a pooled vector, and maps of classes.

Parameter names are those of Hugging Face's models. Letters: B images, D width, (h, w) a grid, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImagePooler(nn.Module):
    """One vector for an image: the normalised mean of its patches, or its class token."""

    def __init__(self, *, dim: int, norm_eps: float, mean: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(dim, eps=norm_eps) if mean else None

    def forward(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Class token (B, 1, D) and patches (B, T, D) -> (B, D)."""
        return prefix[:, 0] if self.layernorm is None else self.layernorm(tokens.mean(dim=1))


class ConvLayer(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, *, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D', h, w)."""
        return F.relu(self.normalization(self.convolution(x)))


class PoolingBlock(nn.Module):
    """Average-pool the map to `scale` x `scale` cells, convolve, and resize to the map's size."""

    def __init__(self, *, scale: int, channels: int) -> None:
        super().__init__()
        self.pooling = nn.AdaptiveAvgPool2d(scale)
        self.conv = ConvLayer(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> the same shape."""
        return _resize(self.conv(self.pooling(x)), x.shape[2:])


class PyramidPooling(nn.Module):
    """A `PoolingBlock` for each scale."""

    def __init__(self, *, scales: Sequence[int], channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PoolingBlock(scale=scale, channels=channels) for scale in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, D, h, w) -> one map of the same shape for each scale."""
        return [block(x) for block in self.blocks]


class UPerHead(nn.Module):
    """Feature pyramid with pyramid pooling on top: four maps -> logits at the size of the finest.

    Source: UPerNet (arXiv:1807.10221), as configured for BEiT.
    """

    def __init__(self, *, dim: int, scales: Sequence[int], num_labels: int, levels: int = 4) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(dim, num_labels, kernel_size=1)
        self.psp_modules = PyramidPooling(scales=scales, channels=dim)
        self.psp_bottleneck = ConvLayer((1 + len(scales)) * dim, dim, kernel=3)
        self.lateral_convs = nn.ModuleList(ConvLayer(dim, dim, kernel=1) for _ in range(levels - 1))
        self.fpn_convs = nn.ModuleList(ConvLayer(dim, dim, kernel=3) for _ in range(levels - 1))
        self.fpn_bottleneck = ConvLayer(levels * dim, dim, kernel=3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, D, h, w), finest first -> (B, C, h, w) at the size of the first."""
        top = maps[-1]
        merged = [self.psp_bottleneck(torch.cat([top, *self.psp_modules(top)], dim=1))]
        levels = list(zip(self.lateral_convs, maps, strict=False))  # three, without the top
        for lateral, finer in reversed(levels):
            x = lateral(finer)
            merged.insert(0, x + _resize(merged[0], x.shape[2:]))
        smooth = [conv(x) for conv, x in zip(self.fpn_convs, merged[:-1], strict=True)] + merged[-1:]
        size = smooth[0].shape[2:]
        together = torch.cat([smooth[0], *(_resize(x, size) for x in smooth[1:])], dim=1)
        return self.classifier(self.fpn_bottleneck(together))


class FCNHead(nn.Module):
    """A few convolutions on one map: the auxiliary head in training.

    Source: FCN (arXiv:1411.4038), as configured for BEiT.
    """

    def __init__(self, *, dim: int, channels: int, num_convs: int, concat_input: bool, num_labels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvLayer(dim if i == 0 else channels, channels, kernel=3) for i in range(num_convs))
        self.conv_cat = ConvLayer(dim + channels, channels, kernel=3) if concat_input else None
        self.classifier = nn.Conv2d(channels, num_labels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w)."""
        y = x
        for conv in self.convs:
            y = conv(y)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], dim=1))
        return self.classifier(y)


class SegmentationHead(nn.Module):
    """Four layers of the encoder -> logits at four times the resolution of the patches, and auxiliary ones."""

    def __init__(
        self,
        *,
        dim: int,
        pool_scales: Sequence[int],
        num_labels: int,
        auxiliary: bool,
        auxiliary_channels: int,
        auxiliary_num_convs: int,
        auxiliary_concat_input: bool,
    ) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.decode_head = UPerHead(dim=dim, scales=pool_scales, num_labels=num_labels)
        self.auxiliary_head = None
        if auxiliary:
            self.auxiliary_head = FCNHead(
                dim=dim,
                channels=auxiliary_channels,
                num_convs=auxiliary_num_convs,
                concat_input=auxiliary_concat_input,
                num_labels=num_labels,
            )

    def forward(self, layers: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Patches (B, T, D) of four layers, lowest first -> (B, C, 4h, 4w) and (B, C, h, w) or None."""
        maps = [layer.mT.unflatten(2, grid) for layer in layers]
        scales = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        scaled = [fpn(x) for fpn, x in zip(scales, maps, strict=False)]  # see `hf_compat` for three layers
        return self.decode_head(scaled), None if self.auxiliary_head is None else self.auxiliary_head(scaled[2])


def segmentation_loss(
    logits: Tensor, auxiliary: Tensor | None, labels: Tensor, *, ignore_id: int, auxiliary_weight: float
) -> Tensor:
    """Cross entropy at the size of the labels (B, H, W) int64, plus the weighted auxiliary cross entropy -> ()."""
    size = labels.shape[-2:]
    loss = F.cross_entropy(_resize(logits, size), labels, ignore_index=ignore_id)
    if auxiliary is None:
        return loss
    return loss + auxiliary_weight * F.cross_entropy(_resize(auxiliary, size), labels, ignore_index=ignore_id)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
