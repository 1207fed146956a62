"""Hugging Face's three image classes, on our encoder.

Letters: see `encoders.base`; C channels or labels, (H, W) pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from data2vec_train.batch import Masks
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.heads.losses import classification_loss, infer_problem_type
from data2vec_train.heads.vision import ImagePooler, SegmentationHead, segmentation_loss
from data2vec_train.weights.base import PretrainedModel, attentions_of, hidden_states_of
from data2vec_train.weights.checks import build_encoder
from data2vec_train.weights.configs import Data2VecVisionConfig
from data2vec_train.weights.names import hf_vision
from data2vec_train.weights.outputs import ModelOutput


def encoder_arguments(config: Data2VecVisionConfig) -> dict[str, Any]:
    """Arguments of `VisionEncoder`.

    Raises:
        ConfigError: patches that are not square.
    """
    if config.encoder is not None:
        return {**config.encoder, "attention": config.attn_implementation}
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    if not isinstance(config.patch_size, int) and len(set(config.patch_size)) > 1:
        raise ConfigError(f"patch_size={config.patch_size}: patches are square")
    size = config.image_size
    shared, own = config.use_shared_relative_position_bias, config.use_relative_position_bias
    keep = config.use_mask_token if config.keep_mask_token is None else config.keep_mask_token
    return {
        "image_px": size if isinstance(size, int) else list(size),
        "patch_px": patch,
        "channels": config.num_channels,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "prenet_depth": 0,
        "num_heads": config.num_attention_heads,
        "ffn_dim": config.intermediate_size,
        "norm_first": True,
        "final_norm": not config.use_mean_pooling,
        "norm_eps": config.layer_norm_eps,
        "activation": config.hidden_act,
        "positions": "learned" if config.use_absolute_position_embeddings else "none",
        "relative_bias": {(0, 0): "none", (1, 0): "shared", (0, 1): "per_layer", (1, 1): "both"}[shared, own],
        "class_token": True,
        "mask_token": keep,
        "qkv_bias": "qv",
        "layer_scale": config.layer_scale_init_value if config.layer_scale_init_value > 0 else None,
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "activation_dropout": 0.0,
        "drop_path": config.drop_path_rate,
        "init": "beit",
        "activation_checkpointing": False,
        "attention": config.attn_implementation,
    }


class VisionPretrainedModel(PretrainedModel):
    """Base of the image classes."""

    config_class = Data2VecVisionConfig
    base_model_prefix = "data2vec_vision"
    main_input_name = "pixel_values"
    heads = ("pooler.", "layernorm.", "classifier.", "fpn1.", "fpn2.", "decode_head.", "auxiliary_head.")

    @classmethod
    def _adapt(cls, config: Data2VecVisionConfig, names: set[str]) -> None:
        # Released files hold a mask token although their config says that there is none; transformers drops it, we do
        # not.
        if "embeddings.mask_token" in names:
            config.use_mask_token = True

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.get_encoder().embedder

    def init_weights(self) -> None:
        """Fresh weights as transformers draws them (TRANSFORMERS.md 3)."""
        super().init_weights()
        encoder = self.get_encoder()
        for token in (encoder.class_token, encoder.mask_token):
            if token is not None:
                nn.init.zeros_(token)


class Data2VecVisionModel(VisionPretrainedModel):
    """Images, of any size that patches tile, to features."""

    def __init__(self, config: Data2VecVisionConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.encoder = build_encoder(VisionEncoder, encoder_arguments(config))
        # transformers swaps rows and columns when it resizes the bias table of a grid that is not square
        # (TRANSFORMERS.md, fault 4).
        for bias in self.encoder.relative_biases:
            bias.transposed = config.hf_compat
        self.pooler = None
        if add_pooling_layer:
            self.pooler = ImagePooler(
                dim=self.encoder.dim, norm_eps=config.layer_norm_eps, mean=config.use_mean_pooling
            )
        if config.encoder is None:
            self.init_weights()

    def encoder_names(self) -> dict[str, str]:
        """{Hugging Face's name: ours, relative to the encoder}."""
        return hf_vision(self.encoder.state_dict(), relative_bias=encoder_arguments(self.config)["relative_bias"])

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """Images (B, C, H, W) -> `last_hidden_state` (B, 1 + T, D), class token first, and `pooler_output` (B, D).

        Args:
            pixel_values: normalised.
            bool_masked_pos: (B, T) bool, patches that the mask token replaces.
            output_attentions: also return weights (B, H, S, S) of every block; with sdpa, transformers returns None
                (TRANSFORMERS.md, fault 9).
            output_hidden_states: also return the first block's input and every block's output, before the final norm.
            interpolate_pos_encoding: has no effect: positions and biases always follow the size of the images.
            return_dict: False = a tuple of the fields that are not None.

        Raises:
            ConfigError: patches are to be hidden, but the model has no mask token.
        """
        encoder = self.encoder
        tokens, _ = encoder.embed(pixel_values.to(self.dtype), any_size=True)
        grid = (pixel_values.shape[2] // encoder.patch_px, pixel_values.shape[3] // encoder.patch_px)
        masks = None
        if bool_masked_pos is not None:
            if encoder.mask_token is None:
                raise ConfigError("bool_masked_pos needs a model with a mask token; set use_mask_token=True")
            masked = bool_masked_pos.bool()[:, None]  # (B, 1, T)
            masks = Masks(masked=masked, hidden=masked.new_empty(0, dtype=torch.int64), visible=None)
        context = self._forward_context(output_attentions, output_hidden_states)
        encoded = encoder.contextualize(tokens, masks=masks, context=context, grid=grid)
        output = ModelOutput(
            last_hidden_state=torch.cat([encoded.prefix, encoded.tokens], dim=1),
            pooler_output=None if self.pooler is None else self.pooler(encoded.prefix, encoded.tokens),
            hidden_states=hidden_states_of(context, output_hidden_states),
            attentions=attentions_of(context),
        )
        return self._result(return_dict, output)


class Data2VecVisionForImageClassification(VisionPretrainedModel):
    """A class for an image."""

    def __init__(self, config: Data2VecVisionConfig) -> None:
        super().__init__(config)
        self.data2vec_vision = Data2VecVisionModel(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        if config.num_labels:
            nn.init.normal_(self.classifier.weight, std=config.initializer_range)
            nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """`logits` (B, C), and with labels the `loss` of `config.problem_type`; None = inferred from the labels.

        The other arguments are those of `Data2VecVisionModel.forward`.
        """
        outputs = self.data2vec_vision(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            kind = self.config.problem_type or infer_problem_type(labels, self.config.num_labels)
            loss = classification_loss(logits, labels, problem_type=kind)
        output = ModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return self._result(return_dict, output)


class Data2VecVisionForSemanticSegmentation(VisionPretrainedModel):
    """A class for every pixel, at a quarter of the patch size."""

    def __init__(self, config: Data2VecVisionConfig) -> None:
        super().__init__(config)
        if len(config.out_indices) != 4:
            raise ConfigError(f"segmentation reads 4 layers, got out_indices={config.out_indices}")
        outside = [index for index in config.out_indices if not 0 <= index < config.num_hidden_layers]
        if outside and not config.hf_compat:
            raise ConfigError(
                f"out_indices={config.out_indices}: the model has layers 0 to {config.num_hidden_layers - 1}"
            )
        self.data2vec_vision = Data2VecVisionModel(config)
        self.head = SegmentationHead(
            dim=config.hidden_size,
            pool_scales=config.pool_scales,
            num_labels=config.num_labels,
            auxiliary=config.use_auxiliary_head,
            auxiliary_channels=config.auxiliary_channels,
            auxiliary_num_convs=config.auxiliary_num_convs,
            auxiliary_concat_input=config.auxiliary_concat_input,
        )
        for module in self.head.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """`logits` (B, C, 4h, 4w) for an (h, w) grid of patches, and with labels (B, H, W) the cross-entropy `loss`.

        `config.out_indices` are the blocks, counted from 0, whose outputs are read. transformers is off by two: for
        3, 5, 7, 11 it reads blocks 1, 3, 5, 9, the last two blocks get no gradient, and an index of 0 is dropped
        (TRANSFORMERS.md, fault 3); `hf_compat` does the same. The other arguments are those of
        `Data2VecVisionModel.forward`.

        Raises:
            ValueError: labels with a single class.
        """
        config = self.config
        if labels is not None and config.num_labels == 1:
            raise ValueError("segmentation needs at least two classes, got num_labels=1")
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.data2vec_vision(
            pixel_values, output_attentions=output_attentions, output_hidden_states=True, return_dict=True
        )
        offset = -1 if config.hf_compat else 1
        wanted_layers = [index + offset for index in sorted(config.out_indices) if index + offset >= 0]
        layers = [outputs.hidden_states[index][:, 1:] for index in wanted_layers]
        patch = self.get_encoder().patch_px
        logits, auxiliary = self.head(layers, (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch))
        loss = None
        if labels is not None:
            loss = segmentation_loss(
                logits,
                auxiliary,
                labels,
                ignore_id=config.semantic_loss_ignore_index,
                auxiliary_weight=config.auxiliary_loss_weight,
            )
        output = ModelOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )
        return self._result(return_dict, output)
