"""Speech encoders of both papers, in one class; by config, also encoders of other sensors.

Both have a convolutional front end on the waveform, positions from a stack of convolutions, and post-norm blocks:

1.0: hidden frames are replaced by a learned vector before the positions are computed.
2.0: hidden frames are set to zero, positions are computed over the whole sequence, and then the hidden frames are
    dropped. ALiBi uses the distances of the remaining frames in the whole sequence.

The settings in `configs/preset/audio_*.yaml` select the version. Letters: see `encoders.base`; S samples, C channels.
Several channels or other rates need other numbers only: strides decide how many samples a token covers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data2vec_train.batch import Masks
from data2vec_train.encoders.attention import Bias
from data2vec_train.encoders.base import (
    EncoderOutput,
    MaskMode,
    ModalityEncoder,
    TargetLayer,
    apply_mask,
    gather_visible,
    repeat_per_mask,
)
from data2vec_train.encoders.layers import activation_of, init_bert
from data2vec_train.encoders.positions import ALiBi, ConvPositions
from data2vec_train.encoders.transformer import ForwardContext, Transformer
from data2vec_train.system.constraints import checked


@dataclass(frozen=True)
class ConvLengths:
    """Number of frames after convolutions without padding: floor((length - kernel) / stride) + 1 at each layer."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, length: int | Tensor) -> int | Tensor:
        """Samples -> frames; 0 if there are too few samples for one frame."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            length = (length - kernel) // stride + 1
        return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)


class ConvLayer(nn.Module):
    """Convolution, layer norm over channels in float32, activation; channels come last.

    Args:
        channels_in: C.
        channels_out: C'.
        kernel: samples.
        stride: samples.
        bias: of the convolution.
        activation: its name.
        as_matmul: compute the convolution as matrix products, one for each group of `stride` kernel taps. A group reads
            every sample at most once, so the input is not copied, and norm and activation read contiguous channels.
            Faster than the convolution, but rounds differently from transformers.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int,
        stride: int,
        bias: bool,
        activation: str,
        as_matmul: bool,
    ) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.conv = nn.Conv1d(channels_in, channels_out, kernel, stride, bias=bias)
        self.norm = nn.LayerNorm(channels_out)
        self.as_matmul = as_matmul

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S', C')."""
        # Exported programs take any length, which `unfold` cannot express in general.
        as_matmul = self.as_matmul and not torch.compiler.is_exporting()
        x = self._multiply(x) if as_matmul else self.conv(x.mT).mT
        # In float32, since the squares overflow in half precision (ALGORITHM.md 7, row 16).
        x = F.layer_norm(
            x.float(), self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps
        ).to(x.dtype)
        # Activate after transposing, as transformers does; otherwise the last bit can differ from it.
        return self.activation(x) if as_matmul else self.activation(x.mT).mT

    def _multiply(self, x: Tensor) -> Tensor:
        (kernel,), (stride,) = self.conv.kernel_size, self.conv.stride
        num_frames = (x.shape[1] - kernel) // stride + 1  # S'
        out = None
        for first in range(0, kernel, stride):
            taps = self.conv.weight[..., first : first + stride]  # (C', C, taps)
            windows = x[:, first:].unfold(1, taps.shape[2], stride)[:, :num_frames]  # (B, S', C, taps)
            part = F.linear(windows.mT.flatten(2), taps.mT.flatten(1), self.conv.bias if out is None else None)
            out = part if out is None else out + part
        return out


def multiply_convolutions(model: nn.Module) -> None:
    """Compute all speech front ends of a model as matrix products (`as_matmul` of `ConvLayer`)."""
    for layer in model.modules():
        if isinstance(layer, ConvLayer):
            layer.as_matmul = True


class WaveformEmbedding(nn.Module):
    """Convolutional front end, layer norm, linear projection."""

    def __init__(
        self,
        *,
        channels: int,
        conv_dim: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        bias: bool,
        activation: str,
        norm_eps: float,
        dim: int,
        as_matmul: bool,
    ) -> None:
        super().__init__()
        widths = [channels, *conv_dim]
        self.features = nn.ModuleList(
            ConvLayer(
                widths[i],
                widths[i + 1],
                kernel=kernel,
                stride=stride,
                bias=bias,
                activation=activation,
                as_matmul=as_matmul,
            )
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )
        self.activation_checkpointing = False  # of the convolutions
        self.norm = nn.LayerNorm(widths[-1], eps=norm_eps)
        self.project = nn.Linear(widths[-1], dim)

    def local_features(self, x: Tensor) -> Tensor:
        """(B, C, S) -> normalised features before the projection, (B, T, C')."""
        x = x.mT
        for layer in self.features:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S) -> (B, T, D)."""
        return self.project(self.local_features(x))


class WaveformEncoder(ModalityEncoder):
    """Speech and other time series.

    Args:
        channels: of the input; 1 takes (B, S), more take (B, C, S).
        conv_dim: channels of the front end's layers, one number for all or one for each.
        conv_kernel: their kernels, in samples of their input.
        conv_stride: their strides.
        conv_bias: whether they have biases.
        conv_activation: activation of the front end and of the positional convolutions.
        dim: width D.
        depth: number of blocks, the prenet included.
        prenet_depth: number of first blocks that never serve as targets (2.0 large: 8).
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward part.
        norm_eps: epsilon of all layer norms except those inside the front end's convolutions.
        activation: of the feed-forward part.
        position_kernel: width of the positional convolutions, frames.
        position_depth: number of positional convolutions.
        position_groups: groups of the positional convolutions.
        alibi: "none" (1.0), "shared" by all blocks (2.0), or "per_layer".
        mask_token: whether there is a learned vector for hidden frames (mask mode "replace").
        reference_padding: see `ConvPositions`.
        embed_gradient: factor on the gradient that reaches the front end and its projection: 1 in the originals (there
            `feature_grad_mult`, `local_grad_mult`), 0 leaves both at their initial weights.
        input_dropout: on the front end's output, before frames are hidden.
        dropout: after the input norm and on both branches of a block.
        attention_dropout: on the attention weights.
        activation_dropout: inside the feed-forward part.
        drop_path: stochastic depth of the last block.
        layer_drop: probability that a block is skipped in training.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        attention: backend, see `encoders/backends.py`.
        conv_as_matmul: see `ConvLayer`.

    Raises:
        ValueError: lists that do not fit together, or sizes that cannot be built.
    """

    no_decay = frozenset({"alibi.scale"})

    @checked
    def __init__(
        self,
        *,
        channels: int,
        conv_dim: int | Sequence[int],
        conv_kernel: Sequence[int],
        conv_stride: Sequence[int],
        conv_bias: bool,
        conv_activation: str,
        dim: int,
        depth: int,
        prenet_depth: int,
        num_heads: int,
        ffn_dim: int,
        norm_eps: float,
        activation: str,
        position_kernel: int,
        position_depth: int,
        position_groups: int,
        alibi: Literal["none", "shared", "per_layer"],
        mask_token: bool,
        reference_padding: bool,
        embed_gradient: float,
        input_dropout: float,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        layer_drop: float,
        activation_checkpointing: bool,
        attention: str,
        conv_as_matmul: bool = True,  # the default serves models that were saved before this setting existed
    ) -> None:
        super().__init__()
        widths = [conv_dim] * len(conv_kernel) if isinstance(conv_dim, int) else list(conv_dim)
        self.embed_gradient = embed_gradient
        self.channels = channels
        self.dim = dim
        self.depth = depth
        self.prenet_depth = prenet_depth
        self.num_prefix_tokens = 0
        self.grid = None
        self.token_count = ConvLengths(tuple(conv_kernel), tuple(conv_stride))

        self.embedder = WaveformEmbedding(
            channels=channels,
            conv_dim=widths,
            kernels=conv_kernel,
            strides=conv_stride,
            bias=conv_bias,
            activation=conv_activation,
            norm_eps=norm_eps,
            dim=dim,
            as_matmul=conv_as_matmul,
        )
        self.input_dropout = nn.Dropout(input_dropout)
        self.mask_token = nn.Parameter(torch.rand(dim)) if mask_token else None
        self.positions = ConvPositions(
            dim=dim,
            kernel=position_kernel,
            depth=position_depth,
            groups=position_groups,
            reference_padding=reference_padding,
            activation=conv_activation,
        )
        num_scales = {"none": 0, "shared": 1, "per_layer": depth}[alibi]
        self.alibi = ALiBi(num_heads=num_heads, num_scales=num_scales) if num_scales else None
        self.input_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(
            depth=depth,
            dim=dim,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            norm_first=False,
            norm_eps=norm_eps,
            qkv_bias="qkv",
            layer_scale=None,
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            drop_path=drop_path,
            layer_drop=layer_drop,
            activation_checkpointing=activation_checkpointing,
            backend=attention,
        )
        # Projection and positional convolutions keep torch's defaults (ALGORITHM.md 2.1, 3.4).
        init_bert(self.transformer)
        for layer in self.embedder.features:
            nn.init.kaiming_normal_(layer.conv.weight)

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B, S), or (B, C, S) for several channels -> frames (B, T, D) and their mask (B, T) bool or None.

        A frame is real when all samples it covers are.

        Raises:
            ValueError: another number of channels, or fewer samples than one frame needs.
        """
        features, attention_mask = self.local_features(inputs, attention_mask)
        return self.project(features), attention_mask

    def local_features(self, inputs: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The first part of `embed`: normalised outputs of the convolutions (B, T, C') and the mask (B, T)."""
        if inputs.dim() == 2:
            inputs = inputs[:, None]
        if inputs.dim() != 3 or inputs.shape[1] != self.channels:
            raise ValueError(f"expected waveforms of {self.channels} channels, got a tensor {tuple(inputs.shape)}")
        num_tokens = self.token_count(inputs.shape[-1])
        if num_tokens < 1:
            raise ValueError(f"{inputs.shape[-1]} samples are too few for one frame of the front end")
        if attention_mask is not None:
            real = self.token_count(attention_mask.sum(dim=1))  # (B,)
            attention_mask = torch.arange(num_tokens, device=inputs.device) < real[:, None]
        return self.embedder.local_features(inputs), attention_mask

    def project(self, features: Tensor) -> Tensor:
        """The second part of `embed`: (B, T, C') -> frames (B, T, D)."""
        tokens = self.embedder.project(features)
        if self.embed_gradient != 1:
            tokens = self.embed_gradient * tokens + (1 - self.embed_gradient) * tokens.detach()
        return self.input_dropout(tokens)

    def contextualize(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        *,
        masks: Masks | None = None,
        mode: MaskMode = "replace",
        target_layer: TargetLayer | None = None,
        top_k_layers: int = 0,
        context: ForwardContext | None = None,
    ) -> EncoderOutput:
        """Mix positions; arguments as in `ModalityEncoder.contextualize`."""
        dropped = masks is not None and mode == "drop"
        if dropped:
            masks_per_sample = masks.masked.shape[1]
            attention_mask = repeat_per_mask(attention_mask, masks_per_sample)
            tokens = repeat_per_mask(tokens, masks_per_sample) * ~masks.masked.flatten(0, 1)[..., None]  # (N, T, D)
        elif masks is not None:
            tokens, attention_mask = apply_mask(
                tokens, attention_mask, masks=masks, mode=mode, mask_token=self.mask_token
            )
        tokens = tokens + self.positions(tokens, attention_mask)
        if dropped:
            tokens, attention_mask = gather_visible(tokens, attention_mask, masks)  # (N, V, D)
        biases: list[Bias | None] = [None] * self.depth
        if self.alibi is not None:
            positions = masks.visible if dropped else torch.arange(tokens.shape[1], device=tokens.device)[None]
            biases = self.alibi(positions)
            biases = biases * self.depth if len(biases) == 1 else biases
        x, layers = self.transformer(
            self.dropout(self.input_norm(tokens)),
            key_mask=attention_mask,
            biases=biases,
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
        )
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=layers)
