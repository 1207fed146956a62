"""Vision transformers of both papers, in one class.

1.0 (BEiT): patches, mask token, class token; no absolute positions but a relative position bias in the attention,
    pre-norm blocks with layer scale and no key bias, a final norm.
2.0: patches plus fixed sine-cosine positions, class token without a position, a norm, post-norm blocks.

The settings in `configs/preset/vision_*.yaml` select the version. Letters: see `encoders.base`; C channels, (Hp, Wp)
patch grid, T = Hp * Wp in row-major order.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.batch import Masks
from data2vec_train.encoders.attention import Bias
from data2vec_train.encoders.base import EncoderOutput, MaskMode, ModalityEncoder, TargetLayer, apply_mask
from data2vec_train.encoders.layers import init_beit, init_bert, scale_down_by_depth
from data2vec_train.encoders.positions import RelativeBias, RelativePositionBias, sincos_grid
from data2vec_train.encoders.transformer import ForwardContext, QKVBias, Transformer
from data2vec_train.system.constraints import checked


@dataclass(frozen=True)
class FixedCount:
    """The same number of tokens for every image."""

    num_tokens: int

    def __call__(self, length: int) -> int:
        """T."""
        return self.num_tokens


class PatchEmbedding(nn.Module):
    """Non-overlapping patches through one linear map (written as a strided convolution)."""

    def __init__(self, *, channels: int, patch_px: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, dim, kernel_size=patch_px, stride=patch_px)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.project(images).flatten(2).mT


class VisionEncoder(ModalityEncoder):
    """Image encoder.

    Args:
        image_px: side of the square input, or (height, width).
        patch_px: side of a patch; must divide the image.
        channels: of the input, any number.
        dim: width D.
        depth: number of blocks, the prenet included.
        prenet_depth: number of first blocks that never serve as targets (2.0 base: 2).
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward part.
        norm_first: pre-norm blocks; else post-norm blocks and a norm before the first one.
        final_norm: a norm after the last block; pre-norm blocks need it in pretraining.
        norm_eps: epsilon of all layer norms.
        activation: of the feed-forward part.
        positions: "sincos" adds fixed positions to the patches, "learned" trained ones to all tokens, "none" leaves
            them to `relative_bias`.
        relative_bias: "shared" by all blocks, "per_layer", "both" added up, or "none".
        class_token: whether to prepend one.
        mask_token: whether there is a learned vector for hidden patches (mask mode "replace").
        qkv_bias: which of query, key, value have biases.
        layer_scale: start value of the learned scales on both branches, None = no scales.
        dropout: on the tokens before the first block and on both branches.
        attention_dropout: on the attention weights.
        activation_dropout: inside the feed-forward part.
        drop_path: stochastic depth of the last block.
        init: "bert" (2.0: normal weights, Xavier patches, class token of unit variance) or "beit" (1.0).
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        attention: backend, see `encoders/backends.py`.

    Raises:
        ValueError: a combination that cannot be built, such as patches that do not tile the image.
    """

    no_decay = frozenset({"class_token"})

    @checked
    def __init__(
        self,
        *,
        image_px: int | list[int],
        patch_px: int,
        channels: int,
        dim: int,
        depth: int,
        prenet_depth: int,
        num_heads: int,
        ffn_dim: int,
        norm_first: bool,
        final_norm: bool,
        norm_eps: float,
        activation: str,
        positions: Literal["sincos", "learned", "none"],
        relative_bias: Literal["shared", "per_layer", "both", "none"],
        class_token: bool,
        mask_token: bool,
        qkv_bias: QKVBias,
        layer_scale: float | None,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        init: Literal["bert", "beit"],
        activation_checkpointing: bool,
        attention: str,
    ) -> None:
        super().__init__()
        height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
        self.dim = dim
        self.depth = depth
        self.prenet_depth = prenet_depth
        self.num_prefix_tokens = int(class_token)
        self.image_size = (height, width)
        self.channels = channels
        self.grid = (height // patch_px, width // patch_px)
        self.token_count = FixedCount(self.grid[0] * self.grid[1])

        self.embedder = PatchEmbedding(channels=channels, patch_px=patch_px, dim=dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if mask_token else None
        fixed = sincos_grid(self.grid, dim)[None] if positions == "sincos" else None  # (1, T, D)
        self.register_buffer("positions", fixed, persistent=False)
        num_positions = self.num_prefix_tokens + self.token_count.num_tokens
        learned = positions == "learned"
        self.learned_positions = nn.Parameter(torch.zeros(1, num_positions, dim)) if learned else None  # (1, S, D)
        # One for each block, then the shared one.
        num_biases = {"shared": 1, "per_layer": depth, "both": depth + 1, "none": 0}[relative_bias]
        self.patch_px = patch_px
        self.relative_biases = nn.ModuleList(
            RelativePositionBias(grid=self.grid, num_heads=num_heads, num_prefix_tokens=self.num_prefix_tokens)
            for _ in range(num_biases)
        )
        self.input_norm = nn.Identity() if norm_first else nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(
            depth=depth,
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
            drop_path=drop_path,
            layer_drop=0.0,
            activation_checkpointing=activation_checkpointing,
            backend=attention,
        )
        self.final_norm = nn.LayerNorm(dim, eps=norm_eps) if final_norm else nn.Identity()
        self._initialise(init)

    def _initialise(self, init: str) -> None:
        extra = [token for token in (self.class_token, self.mask_token) if token is not None]
        if init == "beit":
            init_beit(self)
            scale_down_by_depth(self.transformer.blocks)
            for token in extra:
                nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        else:
            init_bert(self)
            nn.init.xavier_uniform_(self.embedder.project.weight.view(self.dim, -1))
            nn.init.zeros_(self.embedder.project.bias)
            for token in extra:
                nn.init.normal_(token)

    def embed(
        self, inputs: Tensor, attention_mask: Tensor | None = None, *, any_size: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) -> patch tokens (B, T, D), without positions, and `attention_mask` (B, T) unchanged.

        With `any_size`, images may be larger or smaller; `contextualize` then needs their grid.

        Raises:
            ValueError: images with other channels, or of another size, than the encoder was built for.
        """
        if not any_size and inputs.shape[-2:] != self.image_size:
            raise ValueError(f"expected images of {self.image_size} px (height, width), got {tuple(inputs.shape[-2:])}")
        channels = self.embedder.project.in_channels
        if inputs.shape[1] != channels:
            raise ValueError(f"expected images with {channels} channels, got a tensor {tuple(inputs.shape)}")
        return self.embedder(inputs), attention_mask

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
        grid: tuple[int, int] | None = None,
    ) -> EncoderOutput:
        """Mix positions of patches on `grid` (rows, columns), None = the encoder's own grid.

        For another grid, fixed positions are recomputed, learned positions are resized bicubically, relative biases
        bilinearly. The other arguments are those of `ModalityEncoder.contextualize`, and a `ForwardContext`.
        """
        prefix, positions = self._positions(grid)
        # A dropped token is removed with its position. A replaced token needs a position, so it is added afterwards.
        if positions is not None and mode == "drop":
            tokens = tokens + positions
        if masks is not None:
            tokens, attention_mask = apply_mask(
                tokens, attention_mask, masks=masks, mode=mode, mask_token=self.mask_token
            )  # (N, T or V, D)
        if positions is not None and mode != "drop":
            tokens = tokens + positions

        num_rows, num_prefix = tokens.shape[0], self.num_prefix_tokens
        if self.class_token is not None:
            class_token = self.class_token if prefix is None else self.class_token + prefix
            tokens = torch.cat([class_token.to(tokens.dtype).expand(num_rows, -1, -1), tokens], dim=1)  # (N, S, D)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(num_rows, num_prefix), attention_mask], dim=1)
        x, layers = self.transformer(
            self.dropout(self.input_norm(tokens)),
            key_mask=attention_mask,
            biases=self._attention_biases(masks.visible if masks is not None and mode == "drop" else None, grid),
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
        )
        x = self.final_norm(x)
        return EncoderOutput(
            prefix=x[:, :num_prefix], tokens=x[:, num_prefix:], layers=[layer[:, num_prefix:] for layer in layers]
        )

    def _positions(self, grid: tuple[int, int] | None) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the class token (1, E, D) and of the patches (1, T, D); None = nothing to add."""
        if self.learned_positions is None and self.positions is None:
            return None, None
        is_other = grid is not None and grid != self.grid
        if self.learned_positions is None:
            return None, sincos_grid(grid, self.dim)[None].to(self.positions) if is_other else self.positions
        prefix, patches = self.learned_positions.split([self.num_prefix_tokens, self.token_count.num_tokens], dim=1)
        if is_other:
            resized = F.interpolate(patches.mT.unflatten(2, self.grid), size=grid, mode="bicubic", align_corners=False)
            patches = resized.flatten(2).mT
        return prefix, patches

    @torch.no_grad()
    def state_for(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """`state_dict` of the encoder with the same weights for another grid of patches, see `contextualize`."""
        state = dict(self.state_dict())
        if self.learned_positions is not None:
            state["learned_positions"] = torch.cat(self._positions(grid), dim=1)
        for number, bias in enumerate(self.relative_biases):
            state[f"relative_biases.{number}.table"] = bias(grid).table
        return state

    def _attention_biases(self, visible: Tensor | None, grid: tuple[int, int] | None) -> list[Bias | None]:
        """The attention bias of each block."""
        if not len(self.relative_biases):
            return [None] * self.depth
        biases: list[RelativeBias] = [module(grid) for module in self.relative_biases]
        if visible is not None:
            prefix = torch.arange(self.num_prefix_tokens, device=visible.device).expand(visible.shape[0], -1)
            kept = torch.cat([prefix, visible + self.num_prefix_tokens], dim=1)  # (N, S)
            biases = [replace(bias, kept=kept) for bias in biases]
        if len(biases) == 1:
            return biases * self.depth
        if len(biases) > self.depth:
            return [replace(bias, table=bias.table + biases[-1].table) for bias in biases[:-1]]
        return biases
