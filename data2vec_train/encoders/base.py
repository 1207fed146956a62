"""The interface between the algorithm and an encoder.

An encoder has two halves: `embed` computes local features (patches, convolutional front end, token embedding), and
`contextualize` mixes positions. Tokens are hidden between the two.

Shape letters, for the whole package: B samples, M masks per sample, N = B * M rows, sample-major; T tokens,
V visible tokens of a row, E prefix tokens (class token), P hidden tokens in the batch, D width, L layers, K averaged
layers, H heads, S = E + T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data2vec_train.batch import Masks

MaskMode = Literal["replace", "drop", "corrupt"]
TargetLayer = Literal["ffn", "block"]


class EncoderOutput(NamedTuple):
    """Result of `contextualize`. A tuple, because every version of FSDP finds the tensors inside a tuple."""

    prefix: Tensor  # (N, E, D) class and other extra positions
    tokens: Tensor  # (N, T, D), or (N, V, D) in mask mode "drop"
    layers: list[Tensor]  # the target layers, lowest first, each (N, T, D) without prefix


class ModalityEncoder(nn.Module, ABC):
    """Base of all encoders. Subclasses set the attributes below in their constructor."""

    embedder: nn.Module | None  # all weights that `embed` uses; None in a teacher that shares the student's
    dim: int
    depth: int  # number of blocks, the prenet included
    prenet_depth: int  # number of first blocks that never serve as targets
    num_prefix_tokens: int
    # Rows and columns of the token grid, rows None = as many as the input fills; None for sequences.
    grid: tuple[int | None, int] | None
    # Length of an input's last axis -> T. Loader workers call it, so it must not refer to the encoder or its weights.
    token_count: Callable[[int], int]
    no_decay: frozenset[str] = frozenset()  # parameter names exempt from weight decay, besides biases and 1-d tensors

    @abstractmethod
    def embed(self, inputs: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Inputs -> tokens (B, T, D) and the attention mask at token rate, (B, T) bool or None."""

    @abstractmethod
    def contextualize(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        *,
        masks: Masks | None = None,
        mode: MaskMode = "replace",
        target_layer: TargetLayer | None = None,
        top_k_layers: int = 0,
    ) -> EncoderOutput:
        """Mix positions.

        Args:
            tokens: (B, T, D) from `embed`; (N, T, D) in mode "corrupt", where each mask has its own inputs.
            attention_mask: (B, T) bool, True = real.
            masks: None = everything is visible and N = B.
            mode: "replace" replaces hidden tokens by a learned vector, "drop" removes them, "corrupt" changes no token
                because the inputs were changed.
            target_layer: which tensor of a block to return in `layers`: the raw output of the second linear layer of
                its FFN ("ffn") or the block's output ("block"); None = none.
            top_k_layers: K, the number of last blocks to return it for.
        """

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """Encode inputs with every token visible."""
        tokens, token_mask = self.embed(inputs, attention_mask)
        return self.contextualize(tokens, token_mask)


def apply_mask(
    tokens: Tensor,
    attention_mask: Tensor | None,
    *,
    masks: Masks,
    mode: MaskMode,
    mask_token: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Repeat the tokens for every mask and hide what it hides.

    Args:
        tokens: (B, T, D); in mode "corrupt" (N, T, D), returned as it is.
        attention_mask: (B, T) bool or None.
        masks: what to hide.
        mode: see `ModalityEncoder.contextualize`.
        mask_token: broadcastable to (N, T, D), for mode "replace".

    Returns:
        tokens (N, T, D) or, in mode "drop", (N, V, D); and the attention mask of the same rows and positions.

    Raises:
        ValueError: mode "drop" with rows that differ in their number of visible tokens, or "replace" without a mask
            token.
    """
    masks_per_sample = masks.masked.shape[1]
    if mode == "drop":
        return gather_visible(tokens, attention_mask, masks)
    attention_mask = repeat_per_mask(attention_mask, masks_per_sample)  # (N, T)
    if mode == "corrupt":
        return tokens, attention_mask
    if mask_token is None:
        raise ValueError("mask mode 'replace' needs an encoder with a mask token (mask_token: true)")
    tokens = repeat_per_mask(tokens, masks_per_sample)
    return torch.where(masks.masked.flatten(0, 1)[..., None], mask_token.to(tokens.dtype), tokens), attention_mask


def gather_visible(tokens: Tensor, attention_mask: Tensor | None, masks: Masks) -> tuple[Tensor, Tensor | None]:
    """The visible tokens under every mask, (N, V, D), from tokens (B, T, D) or (N, T, D); and their attention mask.

    Raises:
        ValueError: rows differ in their number of visible tokens.
    """
    if masks.visible is None:
        raise ValueError("mask mode 'drop' needs masks that hide the same number of tokens in every row")
    num_rows, num_visible = masks.visible.shape
    source = torch.arange(num_rows, device=tokens.device)[:, None] // (num_rows // tokens.shape[0])
    flat = (source * tokens.shape[1] + masks.visible).flatten()  # (N * V,) into the flattened tokens
    tokens = tokens.flatten(0, 1).index_select(0, flat).view(num_rows, num_visible, -1)
    if attention_mask is not None:
        attention_mask = repeat_per_mask(attention_mask, num_rows // attention_mask.shape[0]).gather(1, masks.visible)
    return tokens, attention_mask


def repeat_per_mask(x: Tensor | None, masks_per_sample: int) -> Tensor | None:
    """(B, ...) -> (N, ...), sample-major: every sample once per mask."""
    return x if x is None or masks_per_sample == 1 else x.repeat_interleave(masks_per_sample, dim=0)
