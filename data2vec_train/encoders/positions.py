"""Position encodings.

Images: fixed sine-cosine grids and learned relative biases. Speech: stacked convolutions and ALiBi.
Letters: N rows, T tokens, V visible tokens, D width, H heads, E prefix tokens, (Hp, Wp) patch grid, S = E + T.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.encoders.attention import Bias
from data2vec_train.encoders.layers import activation_of


def sincos_grid(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed two-dimensional positions, (T, D): the first half of D encodes the column, the second the row.

    Each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (D/4)).
    Source: data2vec 2.0 images (ALGORITHM.md 3.4); the same as in MAE.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {dim}")
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * frequency  # (T, D/4)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def relative_position_index(grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Row of the bias table for every (query, key) pair, (S, S) int64.

    Patches look up their offset (query minus key), of which there are (2 Hp - 1)(2 Wp - 1); three more rows serve
    prefix -> patch, patch -> prefix and prefix -> prefix. Source: BEiT (ALGORITHM.md 2.3).
    """
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    offset_row = row[:, None] - row[None, :] + rows - 1
    offset_column = column[:, None] - column[None, :] + columns - 1
    num_offsets = (2 * rows - 1) * (2 * columns - 1)
    size = num_prefix_tokens + rows * columns
    index = torch.empty(size, size, dtype=torch.int64)
    index[num_prefix_tokens:, num_prefix_tokens:] = offset_row * (2 * columns - 1) + offset_column
    index[:num_prefix_tokens, num_prefix_tokens:] = num_offsets
    index[num_prefix_tokens:, :num_prefix_tokens] = num_offsets + 1
    index[:num_prefix_tokens, :num_prefix_tokens] = num_offsets + 2
    return index


@dataclass(frozen=True)
class RelativeBias(Bias):
    """A bias that is looked up in a table, at row `index` for each pair of positions."""

    table: Tensor  # (R, H)
    index: Tensor  # (S, S) int64, a row of the table for every query and key
    kept: Tensor | None = None  # (N, S') int64: the positions that each row kept, None = all

    @property
    def learned(self) -> Tensor:
        """The table."""
        return self.table

    def dense(self) -> Tensor:
        """(1, H, S, S), or (N, H, S', S')."""
        index = self.index[None]
        if self.kept is not None:
            index = self.index[self.kept[:, :, None], self.kept[:, None, :]]  # (N, S', S')
        return F.embedding(index, self.table).permute(0, 3, 1, 2)

    def at(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """One value of the bias."""
        if self.kept is not None:
            query, key = self.kept[row, query], self.kept[row, key]
        return self.table[self.index[query, key], head]


class RelativePositionBias(nn.Module):
    """A learned number per head and relative offset of two patches, added to the attention logits; starts at zero.

    Attributes:
        transposed: resize the table as Hugging Face does, which swaps rows and columns: wrong for grids that are not
            square, even at their own size. Set by `hf_compat`.
    """

    def __init__(self, *, grid: tuple[int, int], num_heads: int, num_prefix_tokens: int) -> None:
        super().__init__()
        rows, columns = grid
        self.grid = (rows, columns)
        self.num_prefix_tokens = num_prefix_tokens
        self.transposed = False
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads))
        index = relative_position_index(grid, num_prefix_tokens)
        self.register_buffer("index", index, persistent=False)

    def forward(self, grid: tuple[int, int] | None = None) -> RelativeBias:
        """The bias for `grid`, None = the encoder's own; for another grid, the table is resized bilinearly."""
        table, index = self.table, self.index
        if grid is not None and (grid != self.grid or self.transposed):
            table = self._resized(grid)
            index = relative_position_index(grid, self.num_prefix_tokens).to(table.device)
        return RelativeBias(table, index)

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        shape = [2 * side - 1 for side in (self.grid[::-1] if self.transposed else self.grid)]
        offsets, prefix = self.table[:-3], self.table[-3:]
        offsets = offsets.mT.unflatten(1, shape)[None]  # (1, H, 2 Hp - 1, 2 Wp - 1)
        size = tuple(2 * side - 1 for side in grid)
        offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
        return torch.cat([offsets[0].flatten(1).mT, prefix])


class ConvPositions(nn.Module):
    """Relative positions from a stack of grouped convolutions over time; the result is to be added to the tokens.

    Each layer is a convolution, a layer norm over channels without parameters and a GELU.
    Source: data2vec 1.0 and 2.0 speech (ALGORITHM.md 2.1), five layers with kernel 19.

    Args:
        dim: D.
        kernel: width of the convolutions, frames.
        depth: number of layers; 0 adds nothing.
        groups: of the convolutions.
        reference_padding: True zeroes padded frames before the first layer only, as the originals do; the values that
            later layers write there leak into real frames (ALGORITHM.md 7, row 14). False zeroes them before every
            layer, so that padding does not change the result of a sample.
        activation: replaces the GELU.
    """

    def __init__(
        self, *, dim: int, kernel: int, depth: int, groups: int, reference_padding: bool, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.reference_padding = reference_padding
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)
        )

    def forward(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens (N, T, D), attention_mask (N, T) bool or None -> (N, T, D)."""
        if not len(self.convolutions):
            return torch.zeros_like(tokens)
        x = tokens.mT  # (N, D, T)
        for layer, convolution in enumerate(self.convolutions):
            if attention_mask is not None and (layer == 0 or not self.reference_padding):
                x = x * attention_mask[:, None]
            x = convolution(x)[..., : tokens.shape[1]]  # an even kernel gives one frame too many
            x = self.activation(F.layer_norm(x.mT, x.shape[1:2])).mT
        return x.mT


def alibi_slopes(num_heads: int) -> Tensor:
    """(H,) float32: 2^(-8 i / H) for i = 1 ... H when H is a power of two.

    Otherwise the slopes for the next lower power of two, then every second slope for twice that power.
    Source: ALiBi (arXiv:2108.12409), as in data2vec 2.0 (ALGORITHM.md 3.3).
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 / lower * torch.arange(1, lower + 1, dtype=torch.float64))
    if lower < num_heads:
        between = 2.0 ** (-4 / lower * torch.arange(1, 2 * lower + 1, 2, dtype=torch.float64))
        slopes = torch.cat([slopes, between[: num_heads - lower]])
    return slopes.float()


@dataclass(frozen=True)
class LinearBias(Bias):
    """A bias proportional to the distance of two positions, -slope * |i - j|."""

    slope: Tensor  # (H,) float32
    positions: Tensor  # (1 or N, S) int64

    @property
    def learned(self) -> Tensor:
        """The slopes."""
        return self.slope

    def dense(self) -> Tensor:
        """(1 or N, H, S, S) float32."""
        distance = (self.positions[:, :, None] - self.positions[:, None, :]).abs()[:, None]  # (1 or N, 1, S, S)
        return -self.slope[:, None, None] * distance

    def at(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """One value of the bias."""
        row = row if len(self.positions) > 1 else 0
        return -self.slope[head] * (self.positions[row, query] - self.positions[row, key]).abs()


class ALiBi(nn.Module):
    """Symmetric linear bias -scale * slope * |i - j| on the attention logits, with a learned scale per head.

    Scales start at 1; negative ones act as 0. Source: data2vec 2.0 speech (ALGORITHM.md 3.3).

    Args:
        num_heads: H.
        num_scales: number of sets of scales: 1, shared by all blocks, or one for each block.
    """

    def __init__(self, *, num_heads: int, num_scales: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_scales, 1, num_heads, 1, 1))
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)  # (H,)

    def forward(self, positions: Tensor) -> list[LinearBias]:
        """Positions (1 or N, S) of the tokens before any were dropped -> one bias for each set of scales."""
        return [LinearBias(self.slopes * scale.flatten().clamp(min=0), positions) for scale in self.scale]
