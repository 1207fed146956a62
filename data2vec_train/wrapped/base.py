"""What all wrapped encoders share: the library's blocks run one by one, and their outputs are target layers.

A wrapper takes the weights and blocks of the library's model. It adds positions, hides tokens and puts prefix tokens in
front itself, because most models do so in one function. The feed-forward output of a block is read by a hook on the
library's module, so that no block is written again here.

The parts of the model that `embed` needs are moved to `embedder`, as the contract wants it; `library_state` gives the
weights by the library's own names. Letters: see `encoders/base.py`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data2vec_train.batch import Masks
from data2vec_train.encoders.base import EncoderOutput, MaskMode, ModalityEncoder, TargetLayer, apply_mask
from data2vec_train.encoders.transformer import ForwardContext
from data2vec_train.errors import ConfigError


class WrappedEncoder(ModalityEncoder):
    """Base of the wrappers.

    Attributes:
        library: name of the library, timm or hf.
        model: the library's model without the parts that were moved.
        moved: name here -> name in the library's model, such as embedder -> patch_embed.
        mask_token: learned vector for hidden tokens; None without mask mode "replace".
    """

    library: str  # as `encoder=` and `format=` say it
    model: nn.Module
    moved: dict[str, str]
    mask_token: nn.Parameter | None
    activation_checkpointing: bool = False

    def adopt(self, model: nn.Module, *, moved: dict[str, str], mask_token: bool, prenet_depth: int) -> None:
        """Take over a model, with some of its parts moved out of it.

        Raises:
            ConfigError: `prenet_depth` leaves no block.
        """
        self.model, self.moved = model, moved
        for here, there in moved.items():
            self.set_submodule(here, model.get_submodule(there))
            model.set_submodule(there, nn.Identity())
        self.depth, self.prenet_depth = len(self.blocks()), prenet_depth
        if not 0 <= prenet_depth < self.depth:
            raise ConfigError(f"encoder.prenet_depth={prenet_depth}: it must leave at least one of {self.depth} blocks")
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.04, b=0.04)

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The library's blocks, lowest first."""

    @abstractmethod
    def ffn_of(self, block: nn.Module) -> nn.Module:
        """The module of a block whose output is that of the second linear layer of its feed-forward part."""

    def run_block(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """The block's output for x (N, S, D); `mask` is what `block_mask` made of the attention mask."""
        return block(x, mask)

    def run_blocks(
        self,
        x: Tensor,
        mask: Tensor | None,
        *,
        target_layer: TargetLayer | None,
        top_k_layers: int,
        context: ForwardContext | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks: x (N, S, D) -> the last output and the target layers, each (N, S, D)."""
        layers: list[Tensor] = []
        keep = context is not None and context.keep_hidden_states
        if keep:
            context.hidden_states.append(x)
        for layer, block in enumerate(self.blocks()):
            is_target = target_layer is not None and layer >= self.depth - top_k_layers
            if is_target and target_layer == "ffn":
                with _output_of(self.ffn_of(block)) as found:
                    x = self.run_block(block, x, mask)
                layers += found
            elif self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(self.run_block, block, x, mask, use_reentrant=False)
            else:
                x = self.run_block(block, x, mask)
            if is_target and target_layer == "block":
                layers.append(x)
            if keep:
                context.hidden_states.append(x)
        return x, layers

    @abstractmethod
    def read_library_weights(self, path: Path) -> dict[str, Tensor]:
        """The weights in a file or folder of the library, by its names; executes no code from it.

        Raises:
            ConfigError: it cannot be read.
        """

    @abstractmethod
    def library_model(self) -> nn.Module:
        """The library's own model with these weights, without a head."""

    @abstractmethod
    def save_for_library(self, folder: Path) -> None:
        """Write the weights in the library's own format."""

    @abstractmethod
    def reading_call(self) -> str:
        """The call that reads what `save_for_library` wrote into a folder DIR."""

    @abstractmethod
    def read_back(self, folder: Path, inputs: Tensor) -> Tensor:
        """Features (B, T, D) that the library computes from what `save_for_library` wrote."""

    @abstractmethod
    def example(self) -> Tensor:
        """Two inputs."""

    def library_state(self) -> dict[str, Tensor]:
        """The weights by the library's names; the mask token, which the library does not have, is left out."""
        return {self._their_name(name): tensor for name, tensor in self.state_dict().items() if name != "mask_token"}

    def _their_name(self, name: str) -> str:
        for here, there in self.moved.items():
            if name.startswith(f"{here}."):
                return f"{there}{name.removeprefix(here)}"
        return name.removeprefix("model.")

    def load_library_state(self, tensors: dict[str, Tensor], *, where: str) -> None:
        """Load weights by the library's names; those of heads are left out.

        Raises:
            ConfigError: tensors are missing or of another shape.
        """
        own = self.library_state()
        wrong = [f"there is no {name}" for name in own if name not in tensors]
        wrong += [
            f"{name} is {tuple(tensors[name].shape)}, and the encoder's is {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if wrong:
            raise ConfigError(f"{where} does not fit the encoder: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
        ours = {self._their_name(name): name for name in self.state_dict() if name != "mask_token"}
        self.load_state_dict({ours[name]: tensors[name] for name in own}, strict=False)


class WrappedImages(WrappedEncoder):
    """Wrapped encoders of patches: prefix tokens and absolute positions."""

    image_size: tuple[int, int]
    patch_px: int
    channels: int

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) -> patch tokens (B, T, D) without positions.

        Raises:
            ValueError: images of another size or other channels.
        """
        expected = (self.channels, *self.image_size)
        if tuple(inputs.shape[1:]) != expected:
            raise ValueError(f"expected images (channels, height, width) {expected}, got {tuple(inputs.shape[1:])}")
        return self.embedder(inputs), attention_mask

    def example(self) -> Tensor:
        """Two images of noise."""
        return torch.randn(2, self.channels, *self.image_size, generator=torch.Generator().manual_seed(0))

    @abstractmethod
    def positions(self) -> tuple[list[Tensor], Tensor | None]:
        """Prefix tokens with their positions, each (1, E', D), and the positions of the patches (1, T, D) or None."""

    def before_blocks(self, x: Tensor) -> Tensor:
        """What the library does with the sequence (N, S, D) before the first block."""
        return x

    @abstractmethod
    def after_blocks(self, x: Tensor) -> Tensor:
        """What it does with it after the last one, without pooling and heads."""

    def block_mask(self, masks: Masks | None, x: Tensor) -> Tensor | None:
        """What blocks get besides the tokens; `masks` are given if tokens were dropped."""
        return None

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
        """See `ModalityEncoder.contextualize`.

        Raises:
            ValueError: an attention mask, which no image has.
        """
        if attention_mask is not None:
            raise ValueError("images have no padding")
        prefix, positions = self.positions()
        # A dropped token is removed with its position. A replaced token needs a position, so it is added afterwards.
        if positions is not None and mode == "drop":
            tokens = tokens + positions
        if masks is not None:
            tokens, _ = apply_mask(tokens, None, masks=masks, mode=mode, mask_token=self.mask_token)  # (N, T or V, D)
        if positions is not None and mode != "drop":
            tokens = tokens + positions
        x = torch.cat([*(token.to(tokens.dtype).expand(len(tokens), -1, -1) for token in prefix), tokens], dim=1)
        x = self.before_blocks(x)
        mask = self.block_mask(masks if mode == "drop" else None, x)
        x, layers = self.run_blocks(x, mask, target_layer=target_layer, top_k_layers=top_k_layers, context=context)
        x, first = self.after_blocks(x), self.num_prefix_tokens
        # The objective takes the last prefix token for the class token; libraries put it before the registers.
        ahead = x[:, :first].roll(-1, dims=1) if first > 1 else x[:, :first]
        return EncoderOutput(prefix=ahead, tokens=x[:, first:], layers=[layer[:, first:] for layer in layers])


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of a module."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
