"""Hugging Face's seven text classes, on our encoder.

Letters: see `encoders.base`; V symbols, C labels or choices.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.transformer import KeyValueCache
from data2vec_train.errors import ConfigError
from data2vec_train.heads.losses import classification_loss, infer_problem_type, question_answering_loss
from data2vec_train.heads.text import LanguageHead, Pooler, SentenceHead
from data2vec_train.weights.base import Layers, PretrainedModel, attentions_of, hidden_states_of
from data2vec_train.weights.checks import build_encoder
from data2vec_train.weights.configs import Data2VecTextConfig
from data2vec_train.weights.generation import generate
from data2vec_train.weights.names import hf_text
from data2vec_train.weights.outputs import ModelOutput

log = logging.getLogger(__name__)


def encoder_arguments(config: Data2VecTextConfig) -> dict[str, Any]:
    """Arguments of `TextEncoder`."""
    if config.encoder is not None:
        return {**config.encoder, "attention": config.attn_implementation}
    return {
        "vocab_size": config.vocab_size,
        "max_tokens": config.max_position_embeddings - config.pad_token_id - 1,
        "pad_id": config.pad_token_id,
        "num_token_types": config.type_vocab_size,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "prenet_depth": 0,
        "num_heads": config.num_attention_heads,
        "ffn_dim": config.intermediate_size,
        "norm_eps": config.layer_norm_eps,
        "activation": config.hidden_act,
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "layer_drop": 0.0,
        "activation_checkpointing": False,
        "attention": config.attn_implementation,
        "cross_attention": config.add_cross_attention,
    }


class TextPretrainedModel(PretrainedModel):
    """Base of the text classes."""

    config_class = Data2VecTextConfig
    base_model_prefix = "data2vec_text"
    main_input_name = "input_ids"
    heads = ("pooler.", "lm_head.", "classifier.", "qa_outputs.")

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, (V, D)."""
        return self.get_encoder().embedder.tokens

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.get_encoder().embedder.tokens = table
        self.tie_weights()

    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """Shorten the vocabulary, or append new symbols, also in the language head; returns the token embedding."""
        old = self.get_input_embeddings()
        new = nn.Embedding(vocab_size, old.embedding_dim, padding_idx=old.padding_idx).to(old.weight)
        nn.init.normal_(new.weight, std=self.config.initializer_range)
        kept = min(vocab_size, old.num_embeddings)
        new.weight.data[:kept] = old.weight.data[:kept]
        head = getattr(self, "lm_head", None)
        if head is not None:
            bias = torch.zeros(vocab_size).to(old.weight)
            bias[:kept] = head.bias.data[:kept]
            decoder = nn.Linear(old.embedding_dim, vocab_size).to(old.weight)
            nn.init.normal_(decoder.weight, std=self.config.initializer_range)
            decoder.weight.data[:kept] = head.decoder.weight.data[:kept]
            decoder.bias.data.zero_()
            decoder.bias.data[:kept] = head.decoder.bias.data[:kept]
            head.bias, head.decoder = nn.Parameter(bias), decoder
        self.config.vocab_size = vocab_size
        if self.config.encoder is not None:
            self.config.encoder["vocab_size"] = vocab_size
        self.set_input_embeddings(new)
        return new


class Data2VecTextModel(TextPretrainedModel):
    """Token ids to features; with `config.is_decoder` each token sees only itself and earlier ones."""

    def __init__(self, config: Data2VecTextConfig, add_pooling_layer: bool = True) -> None:
        if config.add_cross_attention and not config.is_decoder:
            raise ConfigError("add_cross_attention needs a decoder; set is_decoder=True")
        super().__init__(config)
        self.encoder = build_encoder(TextEncoder, encoder_arguments(config))
        self.pooler = Pooler(dim=self.encoder.dim) if add_pooling_layer else None
        if config.encoder is None:
            self.init_weights()

    @classmethod
    def _build(cls, config: Data2VecTextConfig, tensors: dict[str, Tensor]) -> "Data2VecTextModel":
        # For files without a pooler, transformers makes a random one, whose `pooler_output` has no meaning.
        return cls(config, add_pooling_layer=any("pooler." in name for name in tensors))

    def encoder_names(self) -> dict[str, str]:
        """{Hugging Face's name: ours, relative to the encoder}."""
        return hf_text(self.encoder.state_dict())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """Ids (B, T) -> `last_hidden_state` (B, T, D) and `pooler_output` (B, D).

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or (B, past + T) after a cache; 1 = real.
            token_type_ids: (B, T) segments, None = 0.
            position_ids: (B, T) rows of the table of positions, where the first token has `pad_token_id` + 1. None =
                count the tokens that are not padding.
            inputs_embeds: (B, T, D) instead of ids.
            encoder_hidden_states: (B, T', D) for cross-attention; only decoders use it.
            encoder_attention_mask: (B, T'), 1 = real.
            past_key_values: a decoder's cache of earlier tokens; new tokens are appended to it.
            use_cache: whether a decoder returns `past_key_values`; None = as set in the config.
            output_attentions: also return weights (B, H, T, T) of every block, with any attention backend.
            output_hidden_states: also return the first block's input and every block's output; numbers select some.
            return_dict: False = a tuple of the fields that are not None.

        Raises:
            ValueError: not exactly one of ids and embeddings, or more tokens than there are positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        config, embedder = self.config, self.encoder.embedder
        given = input_ids if input_ids is not None else inputs_embeds
        num_rows, num_tokens = given.shape[:2]
        recomputes = self.training and self.is_gradient_checkpointing
        if not config.is_decoder or recomputes:
            use_cache = False  # recomputing a block would append its keys a second time
        elif use_cache is None:
            use_cache = config.use_cache
        cache = KeyValueCache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        if past + num_tokens > self.encoder.max_tokens:
            raise ValueError(
                f"got {past + num_tokens} tokens; the model has positions for at most {self.encoder.max_tokens}"
            )
        if position_ids is None and input_ids is not None:
            real = input_ids != embedder.pad_id
            position_ids = (real.cumsum(dim=1) + past) * real + embedder.pad_id
        elif position_ids is None:
            position_ids = torch.arange(num_tokens, device=given.device)[None] + past + embedder.pad_id + 1
            position_ids = position_ids.expand(num_rows, -1)
        tokens = embedder.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = embedder.combine(tokens, position_ids, types=token_type_ids)

        mask = None if attention_mask is None else attention_mask.bool()
        if config.is_decoder:
            key = torch.arange(past + num_tokens, device=given.device)
            causal = (key <= key[past:, None])[None]  # (1, T, past + T)
            mask = causal.expand(num_rows, -1, -1) if mask is None else causal & mask[:, None]
        context = self._forward_context(
            output_attentions,
            output_hidden_states,
            cache=cache,
            memory=encoder_hidden_states if config.is_decoder else None,
            memory_mask=None if encoder_attention_mask is None else encoder_attention_mask.bool(),
        )
        x = self.encoder.contextualize(tokens, mask, context=context).tokens
        crossed = context.keep_attentions and config.add_cross_attention
        output = ModelOutput(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x),
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states_of(context, output_hidden_states),
            attentions=attentions_of(context),
            cross_attentions=tuple(context.cross_attentions) if crossed else None,
        )
        return self._result(return_dict, output)


class HeadedTextModel(TextPretrainedModel):
    """A base model with a head."""

    pooled = False

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        self.data2vec_text = Data2VecTextModel(config, add_pooling_layer=self.pooled)

    def _finish(
        self, return_dict: bool | None, outputs: ModelOutput, *, loss: Tensor | None, **fields: Any
    ) -> ModelOutput | tuple:
        output = ModelOutput(loss=loss, **fields, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return self._result(return_dict, output)

    def _init_linear(self, *modules: nn.Module) -> None:
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=self.config.initializer_range)
                    nn.init.zeros_(layer.bias)

    @property
    def _head_dropout(self) -> float:
        config = self.config
        return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class LanguageModel(HeadedTextModel):
    """A base model with a language head; by default the head shares the token embedding."""

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        self.lm_head = LanguageHead(
            dim=config.hidden_size, vocab_size=config.vocab_size, norm_eps=config.layer_norm_eps
        )
        self._init_linear(self.lm_head)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the token embedding and the bias, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.tie(self.get_input_embeddings().weight)

    def aliases(self) -> dict[str, str]:
        """{name in files: the name under which the same tensor is written}, for tied embeddings."""
        if not self.config.tie_word_embeddings:
            return {}
        tokens = "data2vec_text.encoder.embedder.tokens.weight"
        table = next(theirs for theirs, ours in self.names().items() if ours == tokens)
        return {"lm_head.decoder.weight": table, "lm_head.decoder.bias": "lm_head.bias"}

    def get_output_embeddings(self) -> nn.Linear:
        """The last linear map, D to V."""
        return self.lm_head.decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        """Replace the last linear map."""
        self.lm_head.decoder = decoder
        self.lm_head.bias = decoder.bias


class Data2VecTextForMaskedLM(LanguageModel):
    """Predicts hidden tokens. data2vec does not train this head: that of the released model has fresh weights."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """`logits` (B, T, V), and with labels (B, T), -100 = none, the cross-entropy `loss`.

        The other arguments are those of `Data2VecTextModel.forward`.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        given = (*given, encoder_hidden_states, encoder_attention_mask)
        outputs = self.data2vec_text(*given, **more, return_dict=True)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._finish(return_dict, outputs, loss=loss, logits=logits)


class Data2VecTextForCausalLM(LanguageModel):
    """Predicts the next token; `generate` continues texts."""

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        if not config.is_decoder:
            log.warning("%s without is_decoder=True: every token sees later ones", type(self).__name__)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """`logits` (B, T, V), and with labels (B, T), -100 = none, the `loss` of predicting each from earlier tokens.

        The other arguments are those of `Data2VecTextModel.forward`; labels turn the cache off. Labels usually are the
        ids themselves: they are shifted here. `logits_to_keep` is the number of last positions to return, or their
        indices; 0 = all. With `num_items_in_batch` the loss is the sum divided by it, for gradient accumulation.
        """
        outputs = self.data2vec_text(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            **more,
            past_key_values=past_key_values,
            use_cache=False if labels is not None else use_cache,
            return_dict=True,
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            scores, following = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            if num_items_in_batch is None:
                loss = F.cross_entropy(scores, following)
            else:
                loss = F.cross_entropy(scores, following, reduction="sum") / num_items_in_batch
        output = ModelOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return self._result(return_dict, output)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Continue texts; see `weights.generation.generate`."""
        return generate(self, input_ids, attention_mask, **settings)


class Data2VecTextForSequenceClassification(HeadedTextModel):
    """One class, several classes or a number for a text."""

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        self.classifier = SentenceHead(dim=config.hidden_size, dropout=self._head_dropout, num_labels=config.num_labels)
        self._init_linear(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """`logits` (B, C), and with labels the `loss` of `config.problem_type`; None = inferred from the labels.

        The other arguments are those of `Data2VecTextModel.forward`. transformers writes the inferred type into the
        config, so that later labels of another kind fail; we do so with `hf_compat` only.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.data2vec_text(*given, **more, return_dict=True)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            kind = self.config.problem_type or infer_problem_type(labels, self.config.num_labels)
            if self.config.hf_compat:
                self.config.problem_type = kind
            loss = classification_loss(logits, labels, problem_type=kind)
        return self._finish(return_dict, outputs, loss=loss, logits=logits)


class Data2VecTextForTokenClassification(HeadedTextModel):
    """A class for every token."""

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(self._head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_linear(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """`logits` (B, T, C), and with labels (B, T), -100 = none, the cross-entropy `loss`.

        The other arguments are those of `Data2VecTextModel.forward`.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.data2vec_text(*given, **more, return_dict=True)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._finish(return_dict, outputs, loss=loss, logits=logits)


class Data2VecTextForMultipleChoice(HeadedTextModel):
    """Chooses one of several texts."""

    pooled = True

    def __init__(self, config: Data2VecTextConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._init_linear(self.classifier)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """Ids (B, C, T) -> `logits` (B, C), and with labels (B,) the cross-entropy `loss`.

        The order of arguments is transformers'; each is that of `Data2VecTextModel.forward` with C choices per row.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        num_choices = given.shape[1]

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1)

        outputs = self.data2vec_text(
            flat(input_ids),
            flat(attention_mask),
            flat(token_type_ids),
            flat(position_ids),
            flat(inputs_embeds),
            **more,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self._finish(return_dict, outputs, loss=loss, logits=logits)


class Data2VecTextForQuestionAnswering(HeadedTextModel):
    """Predicts where an answer begins and ends."""

    def __init__(self, config: Data2VecTextConfig) -> None:
        if config.num_labels != 2:
            raise ConfigError(
                f"question answering has 2 outputs, a start and an end; got num_labels={config.num_labels}"
            )
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_linear(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """`start_logits` and `end_logits`, both (B, T), and with `start_positions` and `end_positions` (B,) the `loss`.

        The other arguments are those of `Data2VecTextModel.forward`. Positions outside of the text are ignored.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.data2vec_text(*given, **more, return_dict=True)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(start_logits, end_logits, start_positions, end_positions)
        return self._finish(
            return_dict, outputs, loss=loss, start_logits=start_logits.contiguous(), end_logits=end_logits.contiguous()
        )
