"""Heads of speech encoders: letters, classes of recordings or of frames, and speaker vectors.

Features are (B, T, D); a mask (B, T) bool marks the real frames, None = all. Parameter names are those of Hugging
Face's models, so that the heads need no entry in the name tables.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.system.constraints import require


class CTCHead(nn.Module):
    """Dropout, linear: features -> logits of symbols, (B, T, V)."""

    def __init__(self, *, dim: int, vocab_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(dim, vocab_size)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.lm_head(self.dropout(features))


class LayerSum(nn.Module):
    """A learned average of all layers, with weights softmax(w) that start equal."""

    def __init__(self, *, num_layers: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.full((num_layers,), 1.0 / num_layers))

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Tensors (B, T, D) -> (B, T, D)."""
        weights = self.layer_weights.softmax(dim=0)
        return (torch.stack(list(layers), dim=1) * weights.view(-1, 1, 1)).sum(dim=1)


class UtteranceHead(nn.Module):
    """Linear, mean over real frames, linear: features -> logits (B, C)."""

    def __init__(self, *, dim: int, projection_dim: int, num_labels: int) -> None:
        super().__init__()
        self.projector = nn.Linear(dim, projection_dim)
        self.classifier = nn.Linear(projection_dim, num_labels)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D), (B, T) -> (B, C)."""
        x = self.projector(features)
        if mask is None:
            return self.classifier(x.mean(dim=1))
        x = x.masked_fill(~mask[..., None], 0.0)
        return self.classifier(x.sum(dim=1) / mask.sum(dim=1)[:, None])


class TDNNLayer(nn.Module):
    """A dilated convolution over time, then ReLU; the kernel is stored as a linear layer."""

    def __init__(self, *, dim_in: int, dim_out: int, kernel_frames: int, dilation: int) -> None:
        super().__init__()
        self.kernel_frames = kernel_frames
        self.dilation = dilation
        self.kernel = nn.Linear(dim_in * kernel_frames, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T - (kernel_frames - 1) * dilation, D')."""
        weight = self.kernel.weight.unflatten(1, (self.kernel_frames, -1)).mT  # (D', D, kernel)
        return F.relu(F.conv1d(x.mT, weight, self.kernel.bias, dilation=self.dilation).mT)


class AdditiveMargin(nn.Module):
    """Class vectors of the additive-margin softmax; see `losses.additive_margin_loss`."""

    def __init__(self, *, dim: int, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, num_labels))


class XVectorHead(nn.Module):
    """Time-delay layers, mean and standard deviation over time, two linear maps: a vector for each speaker.

    Source: x-vectors (Snyder et al., 2018), as in SUPERB's speaker verification.

    Args:
        dim: D.
        tdnn_dim: widths of the layers; the first is also that of the projection before them.
        tdnn_kernel: their kernels, frames.
        tdnn_dilation: their dilations, frames.
        embedding_dim: width of the speaker vector.
        num_labels: speakers seen in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        tdnn_dim: Sequence[int],
        tdnn_kernel: Sequence[int],
        tdnn_dilation: Sequence[int],
        embedding_dim: int,
        num_labels: int,
    ) -> None:
        super().__init__()
        require(tdnn_dim=tdnn_dim, tdnn_kernel=tdnn_kernel, tdnn_dilation=tdnn_dilation)
        self.projector = nn.Linear(dim, tdnn_dim[0])
        widths = [tdnn_dim[0], *tdnn_dim]
        self.tdnn = nn.ModuleList(
            TDNNLayer(dim_in=widths[i], dim_out=widths[i + 1], kernel_frames=kernel, dilation=dilation)
            for i, (kernel, dilation) in enumerate(zip(tdnn_kernel, tdnn_dilation, strict=True))
        )
        self.feature_extractor = nn.Linear(2 * tdnn_dim[-1], embedding_dim)
        self.classifier = nn.Linear(embedding_dim, embedding_dim)
        self.objective = AdditiveMargin(dim=embedding_dim, num_labels=num_labels)

    def output_lengths(self, num_frames: Tensor, *, ignore_dilation: bool) -> Tensor:
        """Frames (B,) in -> frames (B,) out of the time-delay layers.

        Args:
            num_frames: (B,).
            ignore_dilation: count as Hugging Face does, as if no layer were dilated; some padding then counts as
                speech.
        """
        for layer in self.tdnn:
            num_frames = num_frames - (layer.kernel_frames - 1) * (1 if ignore_dilation else layer.dilation)
        return num_frames

    def forward(
        self, features: Tensor, num_frames: Tensor | None, *, ignore_dilation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features (B, T, D) with (B,) real frames each, None = all -> speaker vectors and logits, (B, E) each.

        Raises:
            ValueError: fewer frames than the time-delay layers need.
        """
        x = self.projector(features)
        reach = x.shape[1] - int(self.output_lengths(torch.tensor(x.shape[1]), ignore_dilation=False))
        if x.shape[1] <= reach:
            raise ValueError(f"{x.shape[1]} frames are too few: the time-delay layers need at least {reach + 1}")
        for layer in self.tdnn:
            x = layer(x)
        if num_frames is None:
            mean = x.mean(dim=1)
            std = x.std(dim=1) if x.shape[1] > 1 else torch.zeros_like(mean)
        else:
            # A recording shorter than the receptive field still has its first output frame.
            count = self.output_lengths(num_frames, ignore_dilation=ignore_dilation).clamp(1, x.shape[1])
            real = (torch.arange(x.shape[1], device=x.device) < count[:, None])[..., None]
            mean = x.masked_fill(~real, 0.0).sum(dim=1) / count[:, None]
            variance = (x - mean[:, None]).masked_fill(~real, 0.0).square().sum(dim=1) / (count[:, None] - 1).clamp(
                min=1
            )
            # Constant channels, such as those of a single frame, are left out: the root's gradient is infinite at 0.
            varies = variance > 0
            std = torch.where(varies, variance, 1.0).sqrt() * varies
        embeddings = self.feature_extractor(torch.cat([mean, std], dim=-1))
        return embeddings, self.classifier(embeddings)
