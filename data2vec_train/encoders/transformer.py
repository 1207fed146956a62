"""The transformer that all three modalities share.

    pre-norm    x = x + g1 * attn(LN1(x));  x = x + g2 * ffn(LN2(x))
    post-norm   x = LN1(x + attn(x));       x = LN2(x + ffn(x))
    ffn(x) = fc2(gelu(fc1(x)))

g1 and g2 are learned scales per channel, or 1. Every branch passes dropout and drop path. A block also returns the raw
output of fc2, which is what most variants of data2vec regress ("ffn" tap), before dropout, scale, residual and norm.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data2vec_train.encoders.base import Tap
from data2vec_train.layers.attention import attention, check_backend
from data2vec_train.layers.misc import DropPath

QKVBias = Literal["qkv", "qv", "none"]


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection; rows of `qkv` are q, then k, then v."""

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: QKVBias, attention_dropout: float, backend: str) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {num_heads}")
        if qkv_bias not in ("qkv", "qv", "none"):
            raise ValueError(f"qkv_bias is 'qkv', 'qv' or 'none', got {qkv_bias!r}")
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.backend = check_backend(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """X (N, S, D), key_mask (N, S) bool, bias broadcastable to (N, H, S, S) -> (N, S, D)."""
        qkv_bias = self.qkv.bias
        if self.q_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, H, S, Dh)
        mixed = attention(
            q, k, v,
            backend=self.backend,
            key_mask=key_mask,
            bias=bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, *, dim: int, ffn_dim: int, activation_dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.activation_dropout = nn.Dropout(activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.activation_dropout(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """One transformer block; see the equations above."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        norm_first: bool,
        norm_eps: float,
        qkv_bias: QKVBias,
        layer_scale: float | None,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = SelfAttention(
            dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout, backend=backend
        )
        self.ffn = FeedForward(dim=dim, ffn_dim=ffn_dim, activation_dropout=activation_dropout)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def _branch(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.dropout(branch)
        return self.drop_path(branch if scale is None else scale * branch)

    def forward(self, x: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """X (N, S, D) -> the block's output and the raw FFN output, both (N, S, D)."""
        if self.norm_first:
            x = x + self._branch(self.attention(self.norm1(x), key_mask, bias), self.scale1)
            ffn = self.ffn(self.norm2(x))
            return x + self._branch(ffn, self.scale2), ffn
        x = self.norm1(x + self._branch(self.attention(x, key_mask, bias), self.scale1))
        ffn = self.ffn(x)
        return self.norm2(x + self._branch(ffn, self.scale2)), ffn


class Transformer(nn.Module):
    """A stack of blocks.

    Drop path grows linearly from 0 at the first block to `drop_path` at the last. Layer drop skips whole blocks in
    training, each with probability `layer_drop`, for all rows alike.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        norm_first: bool,
        norm_eps: float,
        qkv_bias: QKVBias,
        layer_scale: float | None,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        layer_drop: float,
        activation_checkpointing: bool,
        backend: str,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a transformer needs at least one block, got depth={depth}")
        if not 0.0 <= layer_drop < 1.0:
            raise ValueError(f"layer_drop is a probability in [0, 1), got {layer_drop}")
        self.layer_drop = layer_drop
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                norm_first=norm_first,
                norm_eps=norm_eps,
                qkv_bias=qkv_bias,
                layer_scale=layer_scale,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                drop_path=drop_path * layer / max(depth - 1, 1),
                backend=backend,
            )
            for layer in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None,
        biases: Iterator[Tensor | None],
        tap: Tap | None,
        last: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks.

        Args:
            x: (N, S, D).
            key_mask: (N, S) bool, True = real, or None.
            biases: one attention bias (or None) for each block, lowest first.
            tap: see `ModalityEncoder.contextualize`.
            last: how many of the last blocks to tap.

        Returns:
            The last block's output (N, S, D) and the tapped tensors, each (N, S, D); a dropped block has none.
        """
        layers: list[Tensor] = []
        first_tapped = len(self.blocks) - last
        for layer, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            # Drawn on the host, so that no device has to be asked whether to run the block.
            if self.training and self.layer_drop and float(torch.rand(())) < self.layer_drop:
                continue
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x, ffn = checkpoint(block, x, key_mask, bias, use_reentrant=False)
            else:
                x, ffn = block(x, key_mask, bias)
            if tap is not None and layer >= first_tapped:
                layers.append(ffn if tap == "ffn" else x)
        return x, layers
