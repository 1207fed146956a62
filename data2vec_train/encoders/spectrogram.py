"""Encoder of log-mel spectrograms: EAT (ALGORITHM.md 8), data2vec 2.0 on patches of sound.

A spectrogram is an image of one channel whose rows are time and whose columns are mel bins. The encoder is that of
images, with fixed positions; only the number of rows follows from the input. Letters: see `encoders.base`; F mel bins,
S frames, (H, W) patches in time and mel, T = H * W with time as the slow index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data2vec_train.batch import Masks
from data2vec_train.encoders.base import EncoderOutput, MaskMode, TargetLayer
from data2vec_train.encoders.positions import sincos_grid
from data2vec_train.encoders.transformer import ForwardContext
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.system.constraints import checked


@dataclass(frozen=True)
class PatchCount:
    """Number of patches of a spectrogram; frames at its end that do not fill a patch are left out."""

    patch: int
    columns: int  # W

    def __call__(self, frames: int) -> int:
        """S -> T."""
        return frames // self.patch * self.columns


class SpectrogramEncoder(VisionEncoder):
    """Sound as log-mel spectrograms of any length.

    Args:
        mel_bins: F.
        patch: side of a patch, in frames and mel bins; must divide `mel_bins`.
        max_frames: length for which positions are stored; those of longer inputs are computed in each forward pass.
        dim: width D.
        depth: number of blocks, the prenet included.
        prenet_depth: number of first blocks that never serve as targets (EAT: none).
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward part.
        norm_eps: epsilon of all layer norms.
        activation: of the feed-forward part.
        class_token: whether to prepend one.
        mask_token: whether there is a learned vector for hidden patches (mask mode "replace").
        dropout: on the tokens before the first block and on both branches.
        attention_dropout: on the attention weights.
        activation_dropout: inside the feed-forward part.
        drop_path: stochastic depth of the last block.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        attention: backend, see `encoders/backends.py`.

    Raises:
        ValueError: sizes that cannot be built, such as patches that do not tile the mel bins.
    """

    @checked
    def __init__(
        self,
        *,
        mel_bins: int,
        patch: int,
        max_frames: int,
        dim: int,
        depth: int,
        prenet_depth: int,
        num_heads: int,
        ffn_dim: int,
        norm_eps: float,
        activation: str,
        class_token: bool,
        mask_token: bool,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        activation_checkpointing: bool,
        attention: str,
    ) -> None:
        super().__init__(
            image_px=[max_frames // patch * patch, mel_bins],
            patch_px=patch,
            channels=1,
            dim=dim,
            depth=depth,
            prenet_depth=prenet_depth,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            norm_first=False,
            final_norm=False,
            norm_eps=norm_eps,
            activation=activation,
            positions="sincos",
            relative_bias="none",
            class_token=class_token,
            mask_token=mask_token,
            qkv_bias="qkv",
            layer_scale=None,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            drop_path=drop_path,
            init="bert",
            activation_checkpointing=activation_checkpointing,
            attention=attention,
        )
        # The patch embedding keeps torch's bias, which images start at zero (ALGORITHM.md 8.2).
        nn.init.uniform_(self.embedder.project.bias, -1 / patch, 1 / patch)
        self.mel_bins = mel_bins
        self.grid = (None, mel_bins // patch)
        self.token_count = PatchCount(patch, mel_bins // patch)

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Spectrograms (B, F, S) -> patches (B, T, D), without positions, and their mask (B, T) bool or None.

        A patch is real when all its frames are.

        Raises:
            ValueError: another number of mel bins, or fewer frames than a patch has.
        """
        if inputs.dim() != 3 or inputs.shape[1] != self.mel_bins:
            raise ValueError(f"expected spectrograms of {self.mel_bins} mel bins, got a tensor {tuple(inputs.shape)}")
        num_tokens = self.token_count(inputs.shape[-1])
        if not num_tokens:
            raise ValueError(f"{inputs.shape[-1]} frames are too few for a patch of {self.patch_px}")
        if attention_mask is not None:
            real = self.token_count(attention_mask.sum(dim=1))  # (B,)
            attention_mask = torch.arange(num_tokens, device=inputs.device) < real[:, None]
        return self.embedder(inputs.mT[:, None]), attention_mask

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
        columns = self.grid[1]
        return super().contextualize(
            tokens,
            attention_mask,
            masks=masks,
            mode=mode,
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
            grid=(tokens.shape[1] // columns, columns),
        )

    def _positions(self, grid: tuple[int, int]) -> tuple[None, Tensor]:
        """None for the class token and (1, T, D): time is the slow index, so that shorter inputs use the first rows."""
        num_tokens = grid[0] * grid[1]
        if num_tokens > self.positions.shape[1]:
            return None, sincos_grid(grid, self.dim)[None].to(self.positions)
        return None, self.positions[:, :num_tokens]
