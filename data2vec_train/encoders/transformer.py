"""The transformer that all three modalities share.

    pre-norm    x = x + g1 * attn(LN1(x));  x = x + g2 * ffn(LN2(x))
    post-norm   x = LN1(x + attn(x));       x = LN2(x + ffn(x))
    ffn(x) = fc2(gelu(fc1(x)))

g1 and g2 are learned scales per channel, or 1. Every branch passes dropout and drop path. A block also returns the raw
output of fc2, which is what most variants of data2vec regress (target_layer="ffn"), before dropout, scale,
residual and norm.

`ForwardContext` carries what pretraining does not need: keys and values of earlier tokens, states of another encoder to
attend to, and lists that collect attention weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data2vec_train.encoders.attention import Bias, attention, attention_weights, check_backend, dense, fastest
from data2vec_train.encoders.base import TargetLayer
from data2vec_train.encoders.layers import DropPath, activation_of
from data2vec_train.system.constraints import checked

QKVBias = Literal["qkv", "qv", "none"]


class KeyValueCache:
    """Keys and values of the tokens that a decoder has processed, so that each is computed once."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}  # block -> (N, H, S, Dh)
        self.values: dict[int, Tensor] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # block -> keys and values of the encoder states

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; returns all of the block's, each (N, H, S, Dh)."""
        if block in self.keys:
            k, v = torch.cat([self.keys[block], k], dim=2), torch.cat([self.values[block], v], dim=2)
        self.keys[block], self.values[block] = k, v
        return k, v

    def reorder(self, rows: Tensor) -> None:
        """Select rows (N',) int64 of every cached tensor, for beam search."""
        self.keys = {block: k[rows] for block, k in self.keys.items()}
        self.values = {block: v[rows] for block, v in self.values.items()}
        self.memory = {block: (k[rows], v[rows]) for block, (k, v) in self.memory.items()}


@dataclass
class ForwardContext:
    """Optional inputs of a forward pass (a decoder's cache and memory) and intermediate results that it collects."""

    cache: KeyValueCache | None = None
    memory: Tensor | None = None  # (N, S', D) states of another encoder
    memory_mask: Tensor | None = None  # (N, S') bool, True = real
    keep_attentions: bool = False
    keep_hidden_states: bool = False
    omit_dropped: bool = False  # a block that layer drop skips adds no entry to `hidden_states`
    attentions: list[Tensor] = field(default_factory=list)  # (N, H, Q, S) of each block that ran
    cross_attentions: list[Tensor] = field(default_factory=list)  # (N, H, Q, S')
    hidden_states: list[Tensor] = field(default_factory=list)  # (N, S, D): the first block's input, then all outputs


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection; rows of `qkv` are q, then k, then v."""

    @checked
    def __init__(self, *, dim: int, num_heads: int, qkv_bias: QKVBias, attention_dropout: float, block: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.block = block
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        bias: Bias | Tensor | None,
        context: ForwardContext | None = None,
        *,
        backend: str,
    ) -> Tensor:
        """X (N, Q, D), key_mask (N, S) or (N, Q, S) bool, bias broadcastable to (N, H, Q, S) -> (N, Q, D)."""
        qkv_bias = self.qkv.bias
        if self.q_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, H, Q, Dh)
        if context is not None and context.cache is not None:
            k, v = context.cache.extend(self.block, k, v)
        collect = context.attentions if context is not None and context.keep_attentions else None
        dropout_p = self.attention_dropout if self.training else 0.0
        mixed = _mix(q, k, v, key_mask, bias, dropout_p=dropout_p, backend=backend, collect=collect)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention to the states of another encoder."""

    def __init__(self, *, dim: int, num_heads: int, attention_dropout: float, block: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.block = block
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: ForwardContext, *, backend: str) -> Tensor:
        """X (N, Q, D), attending to `context.memory` -> (N, Q, D)."""
        q = self._heads(self.query(x))
        if context.cache is not None and self.block in context.cache.memory:
            k, v = context.cache.memory[self.block]
        else:
            k, v = self._heads(self.key(context.memory)), self._heads(self.value(context.memory))
            if context.cache is not None:
                context.cache.memory[self.block] = (k, v)
        collect = context.cross_attentions if context.keep_attentions else None
        dropout_p = self.attention_dropout if self.training else 0.0
        mixed = _mix(q, k, v, context.memory_mask, None, dropout_p=dropout_p, backend=backend, collect=collect)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, Q, Dh)


def _mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Bias | Tensor | None,
    *,
    dropout_p: float,
    backend: str,
    collect: list[Tensor] | None,
) -> Tensor:
    """Attention; with `collect`, appends the attention weights to it, which fused backends do not return."""
    if collect is None:
        return attention(q, k, v, backend=backend, key_mask=key_mask, bias=bias, dropout_p=dropout_p)
    weights = attention_weights(q, k, key_mask=key_mask, bias=bias, dropout_p=dropout_p)
    collect.append(weights)
    return weights @ v


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, *, dim: int, ffn_dim: int, activation: str, activation_dropout: float) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.activation_dropout = nn.Dropout(activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))


class Block(nn.Module):
    """One transformer block; see the equations above.

    With cross-attention, a post-norm block attends to another encoder's states between its two branches, if it gets
    any: x = LNc(x + cross(x)).
    """

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
        activation: str,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        cross_attention: bool,
        block: int,
    ) -> None:
        super().__init__()
        if cross_attention and norm_first:
            raise ValueError("cross_attention needs post-norm blocks: norm_first=False")
        self.norm_first = norm_first
        attend = dict(dim=dim, num_heads=num_heads, attention_dropout=attention_dropout, block=block)
        self.attention = SelfAttention(qkv_bias=qkv_bias, **attend)
        self.cross = CrossAttention(**attend) if cross_attention else None
        self.norm_cross = nn.LayerNorm(dim, eps=norm_eps) if cross_attention else None
        self.ffn = FeedForward(dim=dim, ffn_dim=ffn_dim, activation=activation, activation_dropout=activation_dropout)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def _branch(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.dropout(branch)
        return self.drop_path(branch if scale is None else scale * branch)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        bias: Bias | Tensor | None,
        context: ForwardContext | None = None,
        *,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """X (N, S, D) -> the block's output and the raw FFN output, both (N, S, D)."""
        if self.norm_first:
            x = x + self._branch(self.attention(self.norm1(x), key_mask, bias, context, backend=backend), self.scale1)
            ffn = self.ffn(self.norm2(x))
            return x + self._branch(ffn, self.scale2), ffn
        x = self.norm1(x + self._branch(self.attention(x, key_mask, bias, context, backend=backend), self.scale1))
        if self.cross is not None and context is not None and context.memory is not None:
            x = self.norm_cross(x + self._branch(self.cross(x, context, backend=backend), None))
        ffn = self.ffn(x)
        return self.norm2(x + self._branch(ffn, self.scale2)), ffn


def blocks_of(module: nn.Module) -> list[Block]:
    """All transformer blocks in a module."""
    return [child for child in module.modules() if isinstance(child, Block)]


class Transformer(nn.Module):
    """A stack of blocks.

    Drop path grows linearly from 0 at the first block to `drop_path` at the last. Layer drop skips whole blocks in
    training, each with probability `layer_drop`, for all rows alike.

    Attributes:
        backend: of attention, see `encoders/backends.py`; "auto" = the fastest for the shape.
        layer_seed: seed that alone decides which blocks are skipped; None = draw from torch's generator.
    """

    @checked
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
        activation: str = "gelu",
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.layer_drop = layer_drop
        self.layer_seed: int | None = None
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
                activation=activation,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                drop_path=drop_path * layer / max(depth - 1, 1),
                cross_attention=cross_attention,
                block=layer,
            )
            for layer in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None,
        biases: Iterable[Bias | Tensor | None],
        target_layer: TargetLayer | None,
        top_k_layers: int,
        context: ForwardContext | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks.

        Args:
            x: (N, S, D).
            key_mask: (N, S) or (N, S, S) bool, True = may be attended to, or None.
            biases: one attention bias (or None) for each block, lowest first.
            target_layer: see `ModalityEncoder.contextualize`.
            top_k_layers: as there.
            context: see `ForwardContext`.

        Returns:
            The last block's output (N, S, D) and the target layers, each (N, S, D); a skipped block has none.
        """
        biases = list(biases)
        backend = self._backend(x, key_mask, biases[0])
        if backend != "flex":
            # Expanded once for all blocks that share a bias, outside the part that activation checkpointing recomputes.
            unique = {id(bias): bias for bias in biases if bias is not None}
            expanded = {key: dense(bias) for key, bias in unique.items()}
            biases = [expanded.get(id(bias)) for bias in biases]
        layers: list[Tensor] = []
        first_target = len(self.blocks) - top_k_layers
        draws = None if self.layer_seed is None else torch.Generator().manual_seed(self.layer_seed)
        keep = context is not None and context.keep_hidden_states
        if keep:
            context.hidden_states.append(x)
        for layer, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            # Drawn on the host: a draw on the device would need a sync before the block.
            if self.training and self.layer_drop and float(torch.rand((), generator=draws)) < self.layer_drop:
                if keep and not context.omit_dropped:
                    context.hidden_states.append(x)
                continue
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x, ffn = checkpoint(block, x, key_mask, bias, context, backend=backend, use_reentrant=False)
            else:
                x, ffn = block(x, key_mask, bias, context, backend=backend)
            if keep:
                context.hidden_states.append(x)
            if target_layer is not None and layer >= first_target:
                layers.append(ffn if target_layer == "ffn" else x)
        return x, layers

    def _backend(self, x: Tensor, key_mask: Tensor | None, bias: Bias | Tensor | None) -> str:
        if self.backend != "auto":
            return self.backend
        dropout_p = self.attention_dropout if self.training else 0.0
        return fastest(x, num_heads=self.num_heads, key_mask=key_mask, bias=bias, dropout_p=dropout_p)
