"""Decoders, from the student's output to predictions at the hidden positions.

1.0 regresses from the output at each hidden position (linear or MLP). 2.0 does not encode those positions: visible
tokens are scattered to their positions, hidden ones get noise, and a small convolutional network predicts from both.
Letters: see `encoders.base`.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.encoders.layers import init_beit, init_bert
from data2vec_train.objective.grid import grid_of


class Decoder(nn.Module, ABC):
    """Base of all decoders. `restores_dropped`: it works without tokens at hidden positions."""

    restores_dropped: bool

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        *,
        hidden: Tensor,
        visible: Tensor | None,
        num_tokens: int,
        grid: tuple[int | None, int] | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Predictions (P, D).

        Args:
            tokens: student output, (N, T, D), or (N, V, D) when hidden tokens were dropped.
            hidden: (P,) int64 into the flattened (N, T).
            visible: (N, V) int64 positions of the tokens that were kept, None when none were dropped.
            num_tokens: T.
            grid: rows and columns of the T positions, see `ModalityEncoder.grid`.
            attention_mask: (N, T) bool, True = real, None without padding.
        """


class TokenDecoder(Decoder):
    """Each prediction comes from the student's output at its own position: the heads of 1.0."""

    restores_dropped = False
    project: nn.Module

    def forward(
        self,
        tokens: Tensor,
        *,
        hidden: Tensor,
        visible: Tensor | None,
        num_tokens: int,
        grid: tuple[int | None, int] | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Predictions (P, D) from the tokens at hidden positions."""
        return self.project(tokens.flatten(0, 1).index_select(0, hidden))


class LinearDecoder(TokenDecoder):
    """One linear layer: the regression head of 1.0 speech and images.

    Args:
        dim: D.
        init_std: standard deviation of the initial weights, truncated at one sigma as in BEiT; None = torch's default.
    """

    def __init__(self, *, dim: int, init_std: float | None) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        if init_std is not None:
            init_beit(self, std=init_std)


class MLPDecoder(TokenDecoder):
    """Linear, GELU, linear with an inner width of `ratio` * D: the head of 1.0 text (ratio 2).

    Args:
        dim: D.
        ratio: inner width over D.
        init_std: standard deviation of the initial weights; None = torch's default.
    """

    def __init__(self, *, dim: int, ratio: int, init_std: float | None) -> None:
        super().__init__()
        self.project = mlp(dim, ratio * dim, dim)
        if init_std is not None:
            init_bert(self, std=init_std)


class ConvDecoder(Decoder):
    """Convolutions over all T positions, then a linear layer: the decoder of 2.0.

    Each layer is a convolution, a layer norm over channels without parameters and a GELU, added to its input if the
    widths agree and `residual` is set.

    Args:
        dim: D.
        channels: width of the convolutions.
        depth: number of convolutions.
        kernel: width (or side) of the kernels in tokens.
        groups: of the convolutions.
        residual: whether layers add to their input.
        projection_layers: 1 = linear, 2 = linear, GELU, linear with inner width 2 * channels.
        input_dropout: on the visible tokens.
        noise_std: of the vectors at hidden positions; there is no learned mask token.
        init_std: standard deviation of the initial weights of the linear layers; None = torch's default.
        reference_padding: True lets convolutions carry padding into real positions, as the originals do (ALGORITHM.md
            7, row 15). False zeroes padding before every layer.
    """

    restores_dropped = True
    convolution: type[nn.Conv1d] | type[nn.Conv2d]

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        depth: int,
        kernel: int,
        groups: int,
        residual: bool,
        projection_layers: int,
        input_dropout: float,
        noise_std: float,
        init_std: float | None,
        reference_padding: bool,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.noise_std = noise_std
        self.reference_padding = reference_padding
        self.input_dropout = nn.Dropout(input_dropout)
        self.convolutions = nn.ModuleList(
            self.convolution(dim if layer == 0 else channels, channels, kernel, padding=kernel // 2, groups=groups)
            for layer in range(depth)
        )
        if projection_layers not in (1, 2):
            raise ValueError(f"projection_layers is 1 or 2, got {projection_layers}")
        self.project = nn.Linear(channels, dim) if projection_layers == 1 else mlp(channels, 2 * channels, dim)
        if init_std is not None:
            init_bert(self, std=init_std)

    @abstractmethod
    def shape(self, num_tokens: int, grid: tuple[int | None, int] | None) -> tuple[int, ...]:
        """Sizes of the axes that the convolutions run over; their product is T."""

    def forward(
        self,
        tokens: Tensor,
        *,
        hidden: Tensor,
        visible: Tensor | None,
        num_tokens: int,
        grid: tuple[int | None, int] | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Predictions (P, D) from visible tokens and noise at hidden positions."""
        shape = self.shape(num_tokens, grid)
        x = self.input_dropout(tokens)
        if visible is not None:
            x = scatter_tokens(x, visible=visible, num_tokens=num_tokens, noise_std=self.noise_std)  # (N, T, D)
        x = x.mT.unflatten(2, shape)  # (N, D, *shape)
        real = None
        if attention_mask is not None and not self.reference_padding:
            real = attention_mask[:, None].unflatten(2, shape)  # (N, 1, *shape)
        for convolution in self.convolutions:
            x = x if real is None else x * real
            y = convolution(x)[(..., *(slice(size) for size in shape))]  # an even kernel gives one position too many
            y = F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2])).movedim(-1, 1)
            x = x + y if self.residual and x.shape == y.shape else y
        return self.project(x.flatten(2).mT.flatten(0, 1).index_select(0, hidden))


class Conv1dDecoder(ConvDecoder):
    """The decoder of 2.0 speech and text, see `ConvDecoder`."""

    convolution = nn.Conv1d

    def shape(self, num_tokens: int, grid: tuple[int | None, int] | None) -> tuple[int, ...]:
        """(T,)."""
        return (num_tokens,)


class Conv2dDecoder(ConvDecoder):
    """The decoder of 2.0 images, see `ConvDecoder`."""

    convolution = nn.Conv2d

    def shape(self, num_tokens: int, grid: tuple[int | None, int] | None) -> tuple[int, ...]:
        """(Hp, Wp)."""
        if grid is None:
            raise ValueError("Conv2dDecoder needs tokens on a grid, got a sequence; use Conv1dDecoder")
        return grid_of(num_tokens, grid)


def scatter_tokens(tokens: Tensor, *, visible: Tensor, num_tokens: int, noise_std: float) -> Tensor:
    """Visible tokens (N, V, D) at their positions among T, fresh N(0, noise_std) vectors elsewhere: (N, T, D)."""
    num_rows, _, dim = tokens.shape
    noise = torch.randn(num_rows, num_tokens, dim, device=tokens.device, dtype=tokens.dtype) * noise_std
    return noise.scatter(1, visible[..., None].expand(-1, -1, dim), tokens)


def mlp(dim_in: int, dim_hidden: int, dim_out: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.GELU(), nn.Linear(dim_hidden, dim_out))
