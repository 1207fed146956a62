"""What tells a transformer where a token is: fixed sine-cosine grids and learned relative biases.

Letters: D width, H heads, E prefix tokens, (Hp, Wp) patch grid, T = Hp * Wp, S = E + T.
"""

import torch
from torch import Tensor, nn


def sincos_grid(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed two-dimensional positions, (T, D): the first half of D encodes the column, the second the row.

    Each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (D/4)).
    Source: data2vec 2.0 images (spec 3.4); the same as in MAE.

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
    prefix -> patch, patch -> prefix and prefix -> prefix. Source: BEiT (spec 2.3).
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


class RelativePositionBias(nn.Module):
    """A learned number per head and relative offset of two patches, added to the attention logits; starts at zero."""

    def __init__(self, *, grid: tuple[int, int], num_heads: int, num_prefix_tokens: int) -> None:
        super().__init__()
        rows, columns = grid
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, num_heads))
        index = relative_position_index(grid, num_prefix_tokens)
        self.register_buffer("index", index.flatten(), persistent=False)
        self.size = index.shape[0]

    def forward(self) -> Tensor:
        """(1, H, S, S)."""
        return self.table[self.index].view(self.size, self.size, -1).permute(2, 0, 1)[None]


def bias_between(bias: Tensor, kept: Tensor) -> Tensor:
    """The bias among the positions that each row kept: (1, H, S, S) and kept (N, S') -> (N, H, S', S')."""
    num_rows, num_kept = kept.shape
    pairs = kept[:, :, None] * bias.shape[-1] + kept[:, None, :]  # (N, S', S') into the flattened (S, S)
    return bias[0].flatten(1)[:, pairs.flatten()].view(-1, num_rows, num_kept, num_kept).transpose(0, 1)
