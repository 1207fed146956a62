"""Encoders of transformers: ViT, BEiT and DINOv2; wav2vec 2.0 and HuBERT; BERT and RoBERTa.

A model is built from the text of its config.json, which a run keeps, and nothing in it is executed. Layer drop, which
skips whole blocks in training, is left out.
"""

import functools
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data2vec_train.batch import Masks
from data2vec_train.encoders.base import (
    EncoderOutput,
    MaskMode,
    TargetLayer,
    apply_mask,
    gather_visible,
    repeat_per_mask,
)
from data2vec_train.encoders.text import same_count
from data2vec_train.encoders.transformer import ForwardContext
from data2vec_train.encoders.vision import FixedCount
from data2vec_train.encoders.waveform import ConvLengths
from data2vec_train.errors import ConfigError
from data2vec_train.wrapped.base import WrappedEncoder, WrappedImages

# model_type in config.json -> the class here, the library's class
FAMILIES = {
    "vit": ("HFImages", "ViTModel"),
    "beit": ("HFImages", "BeitModel"),
    "dinov2": ("HFImages", "Dinov2Model"),
    "wav2vec2": ("HFSpeech", "Wav2Vec2Model"),
    "hubert": ("HFSpeech", "HubertModel"),
    "bert": ("HFText", "BertModel"),
    "roberta": ("HFText", "RobertaModel"),
}
_HAS_POOLER = ("vit", "beit", "bert", "roberta")


class _FromConfig(WrappedEncoder):
    """What the classes of this file share.

    Args:
        path: the folder that the config came from, for the record.
        config: text of a config.json.
        inputs: settings of the modality, see the classes.
        mask_token: whether there is a learned vector for hidden tokens (mask mode "replace").
        prenet_depth: number of first blocks that never serve as targets.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ConfigError: transformers is not installed, or the model does not fit the inputs.
    """

    library = "hf"

    def __init__(
        self,
        *,
        path: str,
        config: str,
        inputs: dict[str, Any],
        mask_token: bool,
        prenet_depth: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.path = path
        self.content = self.fitted(read_config(config, path), inputs)
        self.activation_checkpointing = activation_checkpointing
        model = build_model(self.content)
        self.dim = model.config.hidden_size
        self.num_prefix_tokens, self.grid = 0, None
        self.set_up(model)
        self.adopt(model, moved=self.parts(model), mask_token=mask_token, prenet_depth=prenet_depth)
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[2] in ("mask_token", "masked_spec_embed"):  # the library's own, kept as it is
                parameter.requires_grad_(False)
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False

    @abstractmethod
    def fitted(self, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The config for these inputs."""

    @abstractmethod
    def set_up(self, model: nn.Module) -> None:
        """Set the attributes that the contract wants."""

    @abstractmethod
    def parts(self, model: nn.Module) -> dict[str, str]:
        """What is moved, see `WrappedEncoder.adopt`."""

    def blocks(self) -> nn.ModuleList:
        """The library's blocks, lowest first."""
        if hasattr(self.model, "layers"):
            return self.model.layers
        return getattr(self.model.encoder, "layers", None) or self.model.encoder.layer

    def read_library_weights(self, path: Path) -> dict[str, Tensor]:
        """The weights in a folder of transformers, which knows the names of its older versions too.

        Raises:
            ConfigError: it cannot be read, or tensors are missing.
        """
        import transformers
        from safetensors import SafetensorError

        own = build_model(self.content)
        level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()  # what is wrong is said below
        transformers.logging.disable_progress_bar()
        pooling = {"add_pooling_layer": False} if self.content["model_type"] in _HAS_POOLER else {}
        try:
            model, report = type(own).from_pretrained(
                path,
                config=own.config,
                attn_implementation="sdpa",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # said below
                **pooling,
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"init_from={path}: transformers cannot read its weights ({reason})") from error
        finally:
            transformers.logging.set_verbosity(level)
            if bar:
                transformers.logging.enable_progress_bar()
        kept = ("mask_token", "masked_spec_embed")
        missing = [name for name in report["missing_keys"] if name.rpartition(".")[2] not in kept]
        if missing:
            raise ConfigError(f"init_from={path} has no {', '.join(sorted(missing)[:3])} ({len(missing)} in all)")
        for name, theirs, ours in sorted(report["mismatched_keys"]):
            raise ConfigError(
                f"init_from={path}: {name} is {tuple(theirs)}, and the encoder's is {tuple(ours)}; set the sizes of "
                "the inputs (modality.image_px, patch_px, channels) to those of its config.json"
            )
        return model.state_dict()

    def save_for_library(self, folder: Path) -> None:
        """Write model.safetensors and config.json; see `WrappedEncoder.save_for_library`."""
        self.library_model().save_pretrained(folder)

    def reading_call(self) -> str:
        """The call that reads it."""
        return 'transformers.AutoModel.from_pretrained("DIR")'

    def read_back(self, folder: Path, inputs: Tensor) -> Tensor:
        """Features that transformers computes; see `WrappedEncoder.read_back`."""
        import transformers

        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        return model(inputs).last_hidden_state[:, self.num_prefix_tokens :]

    def library_model(self) -> nn.Module:
        """The library's own model with these weights, without a head."""
        model = build_model(self.content)
        model.load_state_dict(self.library_state())
        return model.eval()


class HFImages(_FromConfig, WrappedImages):
    """ViT, BEiT or DINOv2; `inputs` has image_px, patch_px and channels."""

    def fitted(self, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The config for images of this size."""
        side = inputs["image_px"]
        self.image_size = (side, side) if isinstance(side, int) else tuple(side)
        self.patch_px, self.channels = inputs["patch_px"], inputs["channels"]
        size = side if isinstance(side, int) else list(side)
        return config | {"image_size": size, "patch_size": self.patch_px, "num_channels": self.channels}

    def set_up(self, model: nn.Module) -> None:
        """Class token and grid; class token and positions have no weight decay."""
        self.num_prefix_tokens = 1
        self.grid = (self.image_size[0] // self.patch_px, self.image_size[1] // self.patch_px)
        self.token_count = FixedCount(self.grid[0] * self.grid[1])
        names = {"model.embeddings.cls_token", "model.embeddings.position_embeddings"}
        self.no_decay = frozenset(names & {f"model.{name}" for name, _ in model.named_parameters()})

    def parts(self, model: nn.Module) -> dict[str, str]:
        """The patches."""
        return {"embedder": "embeddings.patch_embeddings"}

    def ffn_of(self, block: nn.Module) -> nn.Module:
        """The feed-forward part, which ends with its second linear layer."""
        return block.mlp

    def positions(self) -> tuple[list[Tensor], Tensor | None]:
        """Class token and patches share one table; BEiT may have none."""
        embeddings = self.model.embeddings
        table = embeddings.position_embeddings
        if table is None:
            return [embeddings.cls_token], None
        return [embeddings.cls_token + table[:, :1]], table[:, 1:]

    def before_blocks(self, x: Tensor) -> Tensor:
        """Dropout."""
        return self.model.embeddings.dropout(x)

    def after_blocks(self, x: Tensor) -> Tensor:
        """The last norm; BEiT with mean pooling has it after pooling."""
        return self.model.layernorm(x)

    def block_mask(self, masks: Masks | None, x: Tensor) -> Tensor | None:
        """Of BEiT, which positions (N, S) are there, class token included; None = all."""
        if self.content["model_type"] != "beit" or masks is None:
            return None
        visible = masks.visible + 1  # (N, V)
        return torch.cat([visible.new_zeros(len(visible), 1), visible], dim=1)

    def run_block(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """The block's output for x (N, S, D); BEiT's are told here, as they know no dropped tokens."""
        if self.content["model_type"] != "beit":
            return block(x)
        own = (self.model.shared_position_bias, block.relative_position_bias)
        tables = [table for table in own if table is not None]
        bias = sum(table(self.grid) for table in tables) if tables else None  # (1, H, S', S') of all positions
        if bias is not None and mask is not None:
            bias = bias[0].permute(1, 2, 0)[mask[:, :, None], mask[:, None, :]].permute(0, 3, 1, 2)  # (N, H, S, S)
        mixed, _ = block.attention(block.layernorm_before(x), attention_mask=bias)
        x = x + block.drop_path(block.lambda_1 * block.dropout(mixed))
        ffn = block.mlp(block.layernorm_after(x))
        return x + block.drop_path(block.lambda_2 * block.dropout(ffn))


class _Sequences(_FromConfig):
    """Speech and text: no prefix tokens, inputs of any length."""

    def block_keys(self, attention_mask: Tensor | None) -> Tensor | None:
        """(N, S) -> (N, 1, 1, S), True = may be attended to."""
        return None if attention_mask is None else attention_mask[:, None, None, :]


class HFSpeech(_Sequences):
    """wav2vec 2.0 or HuBERT, on waveforms of one channel; `inputs` has channels."""

    def fitted(self, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The config as it is.

        Raises:
            ConfigError: several channels, or adapters.
        """
        if inputs.get("channels", 1) != 1:
            raise ConfigError(f"modality.channels={inputs['channels']}: {config['model_type']} takes one channel")
        if config.get("add_adapter") or config.get("adapter_attn_dim") is not None:
            raise ConfigError(f"encoder.path: {self.path} has adapters, which are not supported")
        return config

    def set_up(self, model: nn.Module) -> None:
        """Lengths of the front end."""
        self.channels = 1
        self.token_count = ConvLengths(tuple(model.config.conv_kernel), tuple(model.config.conv_stride))
        # A norm over time sees the padding, so that rows of different lengths go through the front end one by one.
        self.has_norm_over_time = model.config.feat_extract_norm == "group"
        self.is_pre_norm = model.config.do_stable_layer_norm
        self.embedder = nn.Module()

    def parts(self, model: nn.Module) -> dict[str, str]:
        """Front end, projection, and the positional convolution by the name that the presets know."""
        return {
            "embedder.features": "feature_extractor",
            "embedder.project": "feature_projection",
            "positions": "encoder.pos_conv_embed",
        }

    def ffn_of(self, block: nn.Module) -> nn.Module:
        """The second linear layer."""
        return block.feed_forward.output_dense

    def example(self) -> Tensor:
        """Two waveforms of noise."""
        return torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B, S) -> frames (B, T, D) and their mask (B, T) bool or None; a frame is real if all samples are.

        Raises:
            ValueError: fewer samples than one frame needs.
        """
        num_tokens = self.token_count(inputs.shape[-1])
        if num_tokens < 1:
            raise ValueError(f"{inputs.shape[-1]} samples are too few for one frame of the front end")
        if attention_mask is None:
            features = self.embedder.features(inputs)  # (B, C', T)
        else:
            lengths = attention_mask.sum(dim=1)
            attention_mask = torch.arange(num_tokens, device=inputs.device) < self.token_count(lengths)[:, None]
            if self.has_norm_over_time:
                rows = [self.embedder.features(row[None, :size]) for row, size in zip(inputs, lengths, strict=True)]
                features = torch.cat([nn.functional.pad(row, (0, num_tokens - row.shape[-1])) for row in rows])
            else:
                features = self.embedder.features(inputs)
        projected = self.embedder.project(features.mT)
        return projected[0] if isinstance(projected, tuple) else projected, attention_mask

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
        """See `ModalityEncoder.contextualize`; positions come from visible frames only."""
        dropped = masks is not None and mode == "drop"
        if dropped:
            masks_per_sample = masks.masked.shape[1]
            attention_mask = repeat_per_mask(attention_mask, masks_per_sample)
            tokens = repeat_per_mask(tokens, masks_per_sample) * ~masks.masked.flatten(0, 1)[..., None]  # (N, T, D)
        elif masks is not None:
            tokens, attention_mask = apply_mask(
                tokens, attention_mask, masks=masks, mode=mode, mask_token=self.mask_token
            )
        if attention_mask is not None:
            tokens = tokens * attention_mask[..., None]
        tokens = tokens + self.positions(tokens)
        if dropped:
            tokens, attention_mask = gather_visible(tokens, attention_mask, masks)  # (N, V, D)
        around = self.model.encoder
        x = around.dropout(tokens if self.is_pre_norm else around.layer_norm(tokens))
        x, layers = self.run_blocks(
            x,
            self.block_keys(attention_mask),
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
        )
        x = around.layer_norm(x) if self.is_pre_norm else x
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=layers)


class HFText(_Sequences):
    """BERT or RoBERTa; `inputs` has vocab_size, pad_id and max_tokens."""

    def fitted(self, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The config as it is.

        Raises:
            ConfigError: the tokenizer has more tokens than the model, or blocks are longer than its positions.
        """
        known = config.get("vocab_size", 30522)
        if inputs["vocab_size"] > known:
            raise ConfigError(
                f"modality.vocab_size={inputs['vocab_size']}: {self.path} has {known} tokens; set "
                "modality.tokenizer.path to the tokenizer that it was trained with"
            )
        # RoBERTa's positions start after the id of its padding.
        self.first = config.get("pad_token_id", 1) + 1 if config["model_type"] == "roberta" else 0
        longest = config.get("max_position_embeddings", 512) - self.first
        self.max_tokens = inputs["max_tokens"]
        if self.max_tokens > longest:
            raise ConfigError(f"modality.block_tokens={self.max_tokens}: {self.path} has positions for {longest}")
        return config

    def set_up(self, model: nn.Module) -> None:
        """One token for each id."""
        self.token_count = same_count

    def parts(self, model: nn.Module) -> dict[str, str]:
        """Embeddings of tokens, positions and types, with their norm."""
        return {"embedder": "embeddings"}

    def ffn_of(self, block: nn.Module) -> nn.Module:
        """The second linear layer."""
        return block.output.dense

    def example(self) -> Tensor:
        """Two texts of random tokens, without padding."""
        size, known = (2, min(self.max_tokens, 24)), self.model.config.vocab_size
        return torch.randint(min(5, known - 1), known, size, generator=torch.Generator().manual_seed(0))

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) int64 -> (B, T, D) and `attention_mask` (B, T) unchanged; padding is at the end.

        Raises:
            ValueError: more tokens than the encoder was built for.
        """
        if inputs.shape[1] > self.max_tokens:
            raise ValueError(f"got {inputs.shape[1]} tokens; the encoder was built for at most {self.max_tokens}")
        numbers = torch.arange(self.first, self.first + inputs.shape[1], device=inputs.device)[None]
        x = self.embedder(input_ids=inputs, position_ids=numbers, token_type_ids=torch.zeros_like(inputs))
        return x, attention_mask

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
        """See `ModalityEncoder.contextualize`."""
        if masks is not None:
            tokens, attention_mask = apply_mask(
                tokens, attention_mask, masks=masks, mode=mode, mask_token=self.mask_token
            )
        x, layers = self.run_blocks(
            tokens,
            self.block_keys(attention_mask),
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
        )
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=layers)


def build_model(config: dict[str, Any]) -> nn.Module:
    """The library's model of a config, with random weights and without pooling and heads.

    Raises:
        ConfigError: transformers is not installed, has another version, or the family is not supported.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"encoder.path: a model of type {kind}; supported are {', '.join(FAMILIES)}")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("encoder=hf needs transformers: pip install transformers") from error
    # What a file may say about attention could be code to download.
    plain = {name: value for name, value in config.items() if not name.startswith("_") and "attn_impl" not in name}
    plain = {name: value for name, value in plain.items() if name not in ("model_type", "auto_map", "is_decoder")}
    own = getattr(transformers, FAMILIES[kind][1])
    try:
        described = own.config_class(**plain)
        pooling = {"add_pooling_layer": False} if kind in _HAS_POOLER else {}
        return own._from_config(described, attn_implementation="sdpa", **pooling)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"encoder.path: transformers cannot build this {kind} ({error})") from error


def read_config(text: str, where: str) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        ConfigError: it is none, or of a family that is not supported.
    """
    try:
        config = dict(json.loads(text))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"encoder.path: {where} is no config.json of transformers") from error
    if kind not in FAMILIES:
        raise ConfigError(f"encoder.path: {where} is a model of type {kind}; supported are {', '.join(FAMILIES)}")
    return config


@functools.cache
def facts(path: str) -> dict[str, Any]:
    """What the config.json in a folder says: target (our class), config, dim, depth, num_heads, ffn_dim.

    Raises:
        ConfigError: there is none, or it is of a family that is not supported.
    """
    folder = Path(path).expanduser()
    file = folder / "config.json" if folder.is_dir() else folder
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"encoder.path: there is no file or folder {path}; nothing is downloaded: give a folder with config.json"
        ) from error
    config = read_config(text, str(file))
    with torch.device("meta"):
        described = build_model(config).config
    ffn = getattr(described, "intermediate_size", None) or int(described.hidden_size * described.mlp_ratio)
    return {
        "target": f"data2vec_train.wrapped.hf.{FAMILIES[config['model_type']][0]}",
        "config": json.dumps(config),
        "dim": described.hidden_size,
        "depth": described.num_hidden_layers,
        "num_heads": described.num_attention_heads,
        "ffn_dim": ffn,
    }
