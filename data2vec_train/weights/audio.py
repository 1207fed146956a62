"""Hugging Face's five speech classes, on our encoder.

Letters: see `encoders.base`; S samples, V symbols, C labels.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.heads.losses import (
    additive_margin_loss,
    classification_loss,
    connectionist_loss,
    infer_problem_type,
)
from data2vec_train.heads.speech import CTCHead, LayerSum, UtteranceHead, XVectorHead
from data2vec_train.weights.base import Layers, PretrainedModel, attentions_of, choose_layers, hidden_states_of
from data2vec_train.weights.checks import build_encoder
from data2vec_train.weights.configs import Data2VecAudioConfig
from data2vec_train.weights.names import hf_audio
from data2vec_train.weights.outputs import ModelOutput


def encoder_arguments(config: Data2VecAudioConfig) -> dict[str, Any]:
    """Arguments of `WaveformEncoder`."""
    if config.encoder is not None:
        return {**config.encoder, "attention": config.attn_implementation}
    has_mask_token = config.keep_mask_token
    if has_mask_token is None:
        has_mask_token = config.mask_time_prob > 0 or config.mask_feature_prob > 0
    return {
        "channels": 1,
        "conv_dim": list(config.conv_dim),
        "conv_kernel": list(config.conv_kernel),
        "conv_stride": list(config.conv_stride),
        "conv_bias": config.conv_bias,
        "conv_activation": config.feat_extract_activation,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "prenet_depth": 0,
        "num_heads": config.num_attention_heads,
        "ffn_dim": config.intermediate_size,
        "norm_eps": config.layer_norm_eps,
        "activation": config.hidden_act,
        "position_kernel": config.conv_pos_kernel_size,
        "position_depth": config.num_conv_pos_embeddings,
        "position_groups": config.num_conv_pos_embedding_groups,
        "alibi": "none",
        "mask_token": has_mask_token,
        # transformers lets the positional convolutions carry padding into real frames, so that a recording's features
        # depend on what it shares a batch with (TRANSFORMERS.md, fault 1). We do not.
        "reference_padding": config.hf_compat,
        "embed_gradient": 1.0,
        "conv_as_matmul": False,
        "input_dropout": config.feat_proj_dropout,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "drop_path": 0.0,
        "layer_drop": config.layerdrop,
        "activation_checkpointing": False,
        "attention": config.attn_implementation,
    }


class Adapter(nn.Module):
    """Strided convolutions with gated linear units after the encoder: fewer frames, optionally another width."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__()
        width = config.output_hidden_size
        same = width == config.hidden_size
        self.proj = None if same else nn.Linear(config.hidden_size, width)
        self.proj_layer_norm = None if same else nn.LayerNorm(width)
        self.layers = nn.ModuleList(AdapterLayer(config) for _ in range(config.num_adapter_layers))
        # transformers skips layers at random in training, and each skipped one doubles the length of the output
        # (TRANSFORMERS.md, fault 6). We never do.
        self.layer_drop = config.layerdrop if config.hf_compat else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T', D')."""
        if self.proj is not None:
            x = self.proj_layer_norm(self.proj(x))
        for layer in self.layers:
            if self.training and self.layer_drop and np.random.random() <= self.layer_drop:
                continue
            x = layer(x)
        return x


class AdapterLayer(nn.Module):
    """A strided convolution with gated linear units."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__()
        width = config.output_hidden_size
        self.conv = nn.Conv1d(width, 2 * width, config.adapter_kernel_size, config.adapter_stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T', D)."""
        return F.glu(self.conv(x.mT), dim=1).mT


def spans(
    shape: tuple[int, int], *, fraction: float, length: int, min_spans: int, real: Iterable[int] | None = None
) -> np.ndarray:
    """Random spans to hide, (rows, size) bool, drawn from numpy's global generator as transformers draws them.

    Args:
        shape: rows and size.
        fraction: share of each row that spans would hide if they did not overlap.
        length: of a span.
        min_spans: least number of spans in each row.
        real: number of positions at the start of each row that may be hidden; None = all.

    Raises:
        ConfigError: a span is longer than a row.
    """
    rows, size = shape
    if length > size:
        raise ConfigError(f"SpecAugment spans of {length} do not fit into {size}; make mask_*_length smaller")
    rounding = np.random.rand()

    def count(available: int) -> int:
        wanted = max(int(fraction * available / length + rounding), min_spans)
        if wanted * length > size:
            wanted = size // length
        return max(min(wanted, available - (length - 1)), 0)

    hidden = np.zeros(shape, dtype=bool)
    if count(size) == 0:
        return hidden
    for row, available in enumerate([size] * rows if real is None else real):
        starts = np.random.choice(np.arange(available - (length - 1)), count(available), replace=False)
        # A row too short for any span hides its last position, which then is padding.
        starts = starts if len(starts) else np.array([size - 1])
        for start in starts:
            hidden[row, start : start + length] = True
    return hidden


class AudioPretrainedModel(PretrainedModel):
    """Base of the speech classes."""

    config_class = Data2VecAudioConfig
    base_model_prefix = "data2vec_audio"
    main_input_name = "input_values"
    heads = (
        "adapter.",
        "lm_head.",
        "projector.",
        "classifier.",
        "layer_weights",
        "tdnn.",
        "feature_extractor.weight",
        "feature_extractor.bias",
        "objective.",
    )

    @classmethod
    def _adapt(cls, config: Data2VecAudioConfig, names: set[str]) -> None:
        # transformers drops a file's mask token when the config's mask probabilities are 0; we keep it.
        if config.encoder is None:
            config.keep_mask_token = "masked_spec_embed" in names

    def get_input_embeddings(self) -> nn.Module:
        """Speech models have no token embedding; transformers raises here, too.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("speech models have no token embedding")

    def freeze_feature_encoder(self) -> None:
        """Freeze the convolutions on the waveform."""
        self.get_encoder().embedder.features.requires_grad_(False)

    def init_weights(self) -> None:
        """Fresh weights as transformers draws them (TRANSFORMERS.md 3)."""
        super().init_weights()
        encoder = self.get_encoder()
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    bound = (module.groups / (module.in_channels * module.kernel_size[0])) ** 0.5
                    nn.init.uniform_(module.bias, -bound, bound)
        for module in encoder.positions.convolutions:
            nn.init.zeros_(module.bias)
        bound = encoder.embedder.project.in_features**-0.5
        nn.init.uniform_(encoder.embedder.project.weight, -bound, bound)
        nn.init.uniform_(encoder.embedder.project.bias, -bound, bound)
        if encoder.mask_token is not None:
            nn.init.uniform_(encoder.mask_token)

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor | int, add_adapter: bool | None = None) -> Any:
        """Samples -> frames after the front end, and after the adapter if there is one.

        transformers counts the adapter's frames as if its kernel were 3 (TRANSFORMERS.md 1.1).
        """
        lengths = self.get_encoder().token_count(input_lengths)
        if self.config.add_adapter if add_adapter is None else add_adapter:
            kernel = 3 if self.config.hf_compat else self.config.adapter_kernel_size
            for _ in range(self.config.num_adapter_layers):
                lengths = (lengths + 2 - kernel) // self.config.adapter_stride + 1
        return lengths

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Tensor, add_adapter: bool | None = None
    ) -> Tensor:
        """The mask of samples (B, S) at frame rate, (B, T) bool; padding has to be at the end."""
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(dim=-1), add_adapter=add_adapter)
        return torch.arange(feature_vector_length, device=attention_mask.device) < lengths[:, None]


class Data2VecAudioModel(AudioPretrainedModel):
    """Waveforms to features; without `hf_compat`, the amount and content of padding change nothing."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(WaveformEncoder, encoder_arguments(config))
        self.adapter = Adapter(config) if config.add_adapter else None
        if config.encoder is None:
            self.init_weights()

    def encoder_names(self) -> dict[str, str]:
        """{Hugging Face's name: ours, relative to the encoder}."""
        return hf_audio(self.encoder.state_dict())

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
        mask_feature_indices: Tensor | None = None,
    ) -> ModelOutput | tuple:
        """Waveforms (B, S), normalised, and masks -> `last_hidden_state` (B, T, D), `extract_features` (B, T, C').

        Args:
            input_values: (B, S) float.
            attention_mask: (B, S), 1 = real; padding at the end.
            mask_time_indices: (B, T) bool, frames to hide, in training and evaluation. transformers ignores it when
                `config.apply_spec_augment` is off (TRANSFORMERS.md, fault 10), we do so with `hf_compat` only.
            output_attentions: also return weights (B, H, T, T) of every block, with any attention backend.
            output_hidden_states: also return the first block's input and every block's output; numbers select some.
            return_dict: False = a tuple of the fields that are not None.
            mask_feature_indices: (B, D) bool, channels to set to 0 in all frames, in training and evaluation; not in
                transformers.

        Raises:
            ConfigError: frames are to be hidden, but the model has no mask token.
        """
        encoder = self.encoder
        features, mask = encoder.local_features(input_values, None if attention_mask is None else attention_mask.bool())
        tokens = self._hide(encoder.project(features), mask, mask_time_indices, mask_feature_indices)
        if mask is not None:
            tokens = tokens * mask[..., None]
        context = self._forward_context(output_attentions, output_hidden_states)
        x = encoder.contextualize(tokens, mask, context=context).tokens
        output = ModelOutput(
            last_hidden_state=x if self.adapter is None else self.adapter(x),
            extract_features=features,
            hidden_states=hidden_states_of(context, output_hidden_states),
            attentions=attentions_of(context),
        )
        return self._result(return_dict, output)

    def _hide(self, tokens: Tensor, mask: Tensor | None, hidden: Tensor | None, channels: Tensor | None) -> Tensor:
        """SpecAugment: given frames and channels, or in training random spans of them."""
        config = self.config
        num_rows, num_tokens, dim = tokens.shape
        if not config.apply_spec_augment and config.hf_compat:
            return tokens
        random = self.training and config.apply_spec_augment
        if hidden is None and random and config.mask_time_prob > 0:
            drawn = spans(
                (num_rows, num_tokens),
                fraction=config.mask_time_prob,
                length=config.mask_time_length,
                min_spans=config.mask_time_min_masks,
                real=None if mask is None else mask.sum(dim=1).tolist(),
            )
            hidden = torch.from_numpy(drawn).to(tokens.device)
        if hidden is not None:
            if self.encoder.mask_token is None and config.encoder is None:
                raise ConfigError(
                    "frames are to be hidden, but the model has no mask token; set mask_time_prob above 0"
                )
            # 2.0 has no mask token: hidden frames become 0 (in the originals 0 or noise, ALGORITHM.md 4.1).
            token = tokens.new_zeros(()) if self.encoder.mask_token is None else self.encoder.mask_token
            tokens = torch.where(hidden.bool()[..., None], token.to(tokens.dtype), tokens)
        if channels is None and random and config.mask_feature_prob > 0:
            drawn = spans(
                (num_rows, dim),
                fraction=config.mask_feature_prob,
                length=config.mask_feature_length,
                min_spans=config.mask_feature_min_masks,
            )
            channels = torch.from_numpy(drawn).to(tokens.device)
        return tokens if channels is None else tokens.masked_fill(channels.bool()[:, None], 0.0)


class Data2VecAudioForCTC(AudioPretrainedModel):
    """Speech to text: logits of symbols for every frame."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        self.data2vec_audio = Data2VecAudioModel(config)
        width = config.output_hidden_size if config.add_adapter else config.hidden_size
        self.head = CTCHead(dim=width, vocab_size=config.vocab_size, dropout=config.final_dropout)
        self.head.apply(_init_linear(config))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> ModelOutput | tuple:
        """`logits` (B, T, V), and with labels (B, U) the CTC `loss`; -100 and the blank are padding among labels.

        `more` goes to `Data2VecAudioModel.forward`.

        Raises:
            ValueError: a label that is not in the vocabulary.
        """
        return_dict = more.pop("return_dict", None)
        outputs = self.data2vec_audio(input_values, attention_mask, **more, return_dict=True)
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            samples = (
                torch.full((len(logits),), input_values.shape[-1], device=logits.device)
                if attention_mask is None
                else attention_mask.sum(dim=-1)
            )
            loss = connectionist_loss(
                logits,
                labels,
                num_frames=self._get_feat_extract_output_lengths(samples),
                blank_id=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )
        return self._result(
            return_dict,
            ModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions),
        )


class LayeredAudioModel(AudioPretrainedModel):
    """A base model, optionally with a learned average of its layers."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        self.data2vec_audio = Data2VecAudioModel(config)
        self.layer_sum = LayerSum(num_layers=config.num_hidden_layers + 1) if config.use_weighted_layer_sum else None

    def names(self, *, own: bool | None = None) -> dict[str, str]:
        """{name in files: name in `state_dict`} of every tensor; files leave out `layer_sum.`."""
        return {theirs.removeprefix("layer_sum."): ours for theirs, ours in super().names(own=own).items()}

    def _features(
        self, input_values: Tensor, attention_mask: Tensor | None, more: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Features (B, T, D), the frames' mask (B, T), and the fields of the output that come from the base model."""
        wanted = more.pop("output_hidden_states", None)
        wanted = self.config.output_hidden_states if wanted is None else wanted
        keep = True if self.layer_sum is not None else wanted
        outputs = self.data2vec_audio(input_values, attention_mask, **more, output_hidden_states=keep, return_dict=True)
        features = outputs.last_hidden_state
        if self.layer_sum is not None:
            features = self.layer_sum(outputs.hidden_states)
        mask = None
        if attention_mask is not None:
            # The average of layers has as many frames as the layers; an adapter changes the last one only.
            adapted = None if self.layer_sum is None else False
            mask = self._get_feature_vector_attention_mask(features.shape[1], attention_mask, add_adapter=adapted)
        hidden_states = (
            outputs.hidden_states if self.layer_sum is None else choose_layers(outputs.hidden_states, wanted)
        )
        rest = {"hidden_states": hidden_states, "attentions": outputs.attentions}
        return features, mask, rest


class Data2VecAudioForSequenceClassification(LayeredAudioModel):
    """A class for a recording."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        _no_adapter(self, config)
        self.head = UtteranceHead(
            dim=config.hidden_size, projection_dim=config.classifier_proj_size, num_labels=config.num_labels
        )
        self.head.apply(_init_linear(config))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> ModelOutput | tuple:
        """`logits` (B, C), and with labels the `loss` of `config.problem_type`; None = inferred from the labels.

        transformers always uses cross entropy (TRANSFORMERS.md, fault 7), as do we with `hf_compat`. `more` goes to
        `Data2VecAudioModel.forward`.
        """
        return_dict = more.pop("return_dict", None)
        features, mask, rest = self._features(input_values, attention_mask, more)
        logits = self.head(features, mask)
        loss = None
        if labels is not None:
            kind = self.config.problem_type or infer_problem_type(labels, self.config.num_labels)
            kind = "single_label_classification" if self.config.hf_compat else kind
            loss = classification_loss(logits, labels, problem_type=kind)
        return self._result(return_dict, ModelOutput(loss=loss, logits=logits, **rest))


class Data2VecAudioForAudioFrameClassification(LayeredAudioModel):
    """A class for every frame: who speaks when, which phone."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        _no_adapter(self, config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.apply(_init_linear(config))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> ModelOutput | tuple:
        """`logits` (B, T, C), and with labels the cross-entropy `loss`.

        Labels are (B, T) class numbers, -100 = none, or (B, T, C) with the class at its maximum. Padded frames do not
        count; in transformers they do, and class numbers fail (TRANSFORMERS.md 1.1): `hf_compat` counts them too.
        `more` goes to `Data2VecAudioModel.forward`.
        """
        return_dict = more.pop("return_dict", None)
        features, mask, rest = self._features(input_values, attention_mask, more)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            classes = labels.argmax(dim=-1) if labels.dim() == 3 else labels
            if mask is not None and not self.config.hf_compat:
                classes = classes.masked_fill(~mask, -100)
            loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten())
        return self._result(return_dict, ModelOutput(loss=loss, logits=logits, **rest))


class Data2VecAudioForXVector(LayeredAudioModel):
    """Speaker vectors: `embeddings` to compare recordings with, trained to tell `config.num_labels` speakers apart."""

    def __init__(self, config: Data2VecAudioConfig) -> None:
        super().__init__(config)
        self.head = XVectorHead(
            dim=config.hidden_size,
            tdnn_dim=config.tdnn_dim,
            tdnn_kernel=config.tdnn_kernel,
            tdnn_dilation=config.tdnn_dilation,
            embedding_dim=config.xvector_output_dim,
            num_labels=config.num_labels,
        )
        self.head.apply(_init_linear(config))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> ModelOutput | tuple:
        """`embeddings` and `logits`, both (B, E), and with labels (B,) the additive-margin `loss`.

        With padding, transformers ignores the dilation of the time-delay layers and so counts some padded frames
        (TRANSFORMERS.md 1.1); `hf_compat` does the same. `more` goes to `Data2VecAudioModel.forward`.
        """
        return_dict = more.pop("return_dict", None)
        features, mask, rest = self._features(input_values, attention_mask, more)
        embeddings, logits = self.head(
            features, None if mask is None else mask.sum(dim=1), ignore_dilation=self.config.hf_compat
        )
        loss = None
        if labels is not None:
            loss = additive_margin_loss(logits, self.head.objective.weight, labels, scale=30.0, margin=0.4)
        return self._result(return_dict, ModelOutput(loss=loss, logits=logits, embeddings=embeddings, **rest))


def _no_adapter(model: PretrainedModel, config: Data2VecAudioConfig) -> None:
    if config.add_adapter:
        raise ConfigError(f"{type(model).__name__} supports no adapter; set add_adapter=False")


def _init_linear(config: Data2VecAudioConfig) -> Any:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)

    return initialise
