"""Vision transformers of timm: `VisionTransformer`, which are ViT, DeiT, DINOv2 and many more."""

import functools
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data2vec_train.encoders.vision import FixedCount
from data2vec_train.errors import ConfigError
from data2vec_train.wrapped.base import WrappedImages


class TimmViT(WrappedImages):
    """A `VisionTransformer` of timm, with random weights; see `load_library_state`.

    Args:
        name: as `timm.create_model` takes it, such as `vit_small_patch16_224`.
        image_px: side of the square input, or (height, width).
        patch_px: side of a patch.
        channels: of the input.
        mask_token: whether there is a learned vector for hidden patches (mask mode "replace").
        prenet_depth: number of first blocks that never serve as targets.
        dropout: on the tokens before the first block and after the two branches of a block.
        attention_dropout: on the attention weights.
        drop_path: stochastic depth of the last block.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ConfigError: timm is not installed, has no such model, or the model is of another kind.
    """

    library = "timm"

    def __init__(
        self,
        *,
        name: str,
        image_px: int | list[int],
        patch_px: int,
        channels: int,
        mask_token: bool,
        prenet_depth: int,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.arguments = model_arguments(image_px, patch_px, channels)
        self.rates = {"proj_drop_rate": dropout, "pos_drop_rate": dropout, "attn_drop_rate": attention_dropout}
        model = create(name, **self.arguments, **self.rates, drop_path_rate=drop_path)
        self.name, self.dim, self.num_prefix_tokens = name, model.embed_dim, model.num_prefix_tokens
        self.channels, self.patch_px = channels, patch_px
        self.image_size = (image_px, image_px) if isinstance(image_px, int) else tuple(image_px)
        self.grid = tuple(model.patch_embed.grid_size)
        self.token_count = FixedCount(self.grid[0] * self.grid[1])
        self.activation_checkpointing = activation_checkpointing
        # Used by pooling only, which is not done here; kept for the library.
        model.fc_norm.requires_grad_(False)
        undecayed = {f"model.{one}" for one in model.no_weight_decay()}
        self.adopt(model, moved={"embedder": "patch_embed"}, mask_token=mask_token, prenet_depth=prenet_depth)
        self.no_decay = frozenset(undecayed & {one for one, _ in self.named_parameters()})

    def blocks(self) -> nn.ModuleList:
        """The library's blocks, lowest first."""
        return self.model.blocks

    def ffn_of(self, block: nn.Module) -> nn.Module:
        """The second linear layer, where the feed-forward part is one that has it by that name."""
        return getattr(block.mlp, "fc2", block.mlp)

    def run_block(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """The block's output for x (N, S, D)."""
        return block(x)

    def positions(self) -> tuple[list[Tensor], Tensor | None]:
        """Class token, then registers; their positions are part of `pos_embed` in all but a few models."""
        model = self.model
        prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if model.pos_embed is None or model.no_embed_class or not prefix:
            return prefix, model.pos_embed
        ahead, patches = model.pos_embed.split([self.num_prefix_tokens, self.token_count.num_tokens], dim=1)
        return [torch.cat(prefix, dim=1) + ahead], patches

    def before_blocks(self, x: Tensor) -> Tensor:
        """Dropout, and a norm in some models."""
        return self.model.norm_pre(self.model.pos_drop(x))

    def after_blocks(self, x: Tensor) -> Tensor:
        """The last norm, unless the model has it after pooling."""
        return self.model.norm(x)

    def read_library_weights(self, path: Path) -> dict[str, Tensor]:
        """The weights in a file of timm, with positions and patches resized to those of this encoder.

        Raises:
            ConfigError: it cannot be read.
        """
        from timm.models._helpers import load_state_dict
        from timm.models.vision_transformer import checkpoint_filter_fn

        if path.is_dir():  # as timm's `local-dir:` has it
            names = ("model.safetensors", "pytorch_model.bin")
            path = next((path / name for name in names if (path / name).is_file()), path)
        try:
            found = load_state_dict(str(path), weights_only=True)
            return checkpoint_filter_fn(found, create(self.name, **self.arguments))
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"init_from={path}: timm cannot read weights of {self.name} from it ({reason})"
            ) from error

    def save_for_library(self, folder: Path) -> None:
        """Write model.safetensors and config.json; see `WrappedEncoder.save_for_library`."""
        from timm.models import save_for_hf

        save_for_hf(self.library_model(), folder, safe_serialization=True)

    def reading_call(self) -> str:
        """The call that reads it; `local-dir:DIR` reads config.json as well."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f'timm.create_model("{self.name}", {given}, checkpoint_path="DIR/model.safetensors")'

    def read_back(self, folder: Path, inputs: Tensor) -> Tensor:
        """Features that timm computes; see `WrappedEncoder.read_back`."""
        import timm

        path = str(folder / "model.safetensors")
        model = timm.create_model(self.name, checkpoint_path=path, **self.arguments).eval()
        return model.forward_features(inputs)[:, self.num_prefix_tokens :]

    def library_model(self) -> nn.Module:
        """The library's own model with these weights, without a head."""
        model = create(self.name, **self.arguments)
        model.load_state_dict(self.library_state())
        return model.eval()


def model_arguments(image_px: int | list[int], patch_px: int, channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` for images of this kind, without a head."""
    size = image_px if isinstance(image_px, int) else tuple(image_px)
    fixed = {"dynamic_img_size": False}  # else patches come as a grid
    return {"img_size": size, "patch_size": patch_px, "in_chans": channels, "num_classes": 0} | fixed


def create(name: str, **arguments: Any) -> nn.Module:
    """A `VisionTransformer` of timm with random weights.

    Raises:
        ConfigError: see `TimmViT`.
    """
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ConfigError(f"encoder=timm needs {error.name}: pip install 'data2vec-train[timm]'") from error
    base = name.partition(".")[0]
    # Other names, such as `hf-hub:NAME`, are read from the network or from files.
    if not base.isidentifier() or not timm.is_model(base):
        near = timm.list_models(f"*{base[:8]}*")[:3]
        raise ConfigError(
            f"encoder.name: timm has no model called {name}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    try:
        model = timm.create_model(base, pretrained=False, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"encoder.name: timm cannot build {name} for these images ({error})") from error
    if type(model) is not VisionTransformer or model.attn_pool is not None or model.has_class_token is False:
        raise ConfigError(
            f"encoder.name: {name} is not a plain vision transformer of timm with a class token; hiding patches is "
            "possible in those only, such as vit_small_patch16_224, deit_small_patch16_224, vit_small_patch14_dinov2"
        )
    return model


@functools.cache
def facts(name: str) -> dict[str, int]:
    """The sizes of a model: dim, depth, num_heads, ffn_dim; no weights are made."""
    with torch.device("meta"):
        model = create(name, num_classes=0)
    heads = model.blocks[0].attn.num_heads
    ffn = getattr(model.blocks[0].mlp, "fc1", None)
    width = ffn.out_features if ffn is not None else 4 * model.embed_dim
    return {"dim": model.embed_dim, "depth": len(model.blocks), "num_heads": heads, "ffn_dim": width}
