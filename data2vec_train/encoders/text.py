"""Text encoders of both papers: token and position embeddings, a layer norm, post-norm blocks (RoBERTa's layout).

1.0 corrupts the token ids, 2.0 drops hidden tokens; the encoder is the same. Letters: see `encoders.base`.
"""

import torch
from torch import Tensor, nn

from data2vec_train.batch import Masks
from data2vec_train.encoders.base import EncoderOutput, MaskMode, ModalityEncoder, TargetLayer, apply_mask
from data2vec_train.encoders.layers import init_bert
from data2vec_train.encoders.transformer import ForwardContext, Transformer
from data2vec_train.system.constraints import checked


class TextEmbedding(nn.Module):
    """Token plus position (plus token type), layer norm, dropout; zero at padding.

    Position numbers start after the padding id: the first real token has `pad_id` + 1, padding has `pad_id`
    (ALGORITHM.md 2.2). The table therefore has `max_tokens` + `pad_id` + 1 rows.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        pad_id: int,
        num_token_types: int,
        dim: int,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.tokens = nn.Embedding(vocab_size, dim, padding_idx=pad_id)
        self.positions = nn.Embedding(max_tokens + pad_id + 1, dim, padding_idx=pad_id)
        self.types = nn.Embedding(num_token_types, dim) if num_token_types else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Ids (B, T) int64, attention_mask (B, T) bool or None -> (B, T, D)."""
        if attention_mask is None:
            numbers = torch.arange(self.pad_id + 1, self.pad_id + 1 + ids.shape[1], device=ids.device)[None]
        else:
            numbers = attention_mask.cumsum(dim=1) * attention_mask + self.pad_id
        x = self.combine(self.tokens(ids), numbers, types=None)
        return x if attention_mask is None else x * attention_mask[..., None]

    def combine(self, tokens: Tensor, numbers: Tensor, *, types: Tensor | None) -> Tensor:
        """Embedded tokens (B, T, D), position numbers (1 or B, T) and token types (B, T) or None = 0 -> (B, T, D)."""
        if self.types is not None:
            tokens = tokens + self.types(torch.zeros_like(numbers) if types is None else types)
        return self.dropout(self.norm(tokens + self.positions(numbers)))


def same_count(length: int) -> int:
    """One token for each id."""
    return length


class TextEncoder(ModalityEncoder):
    """Text encoder.

    Args:
        vocab_size: number of token ids.
        max_tokens: longest input.
        pad_id: id of padding; position numbers start after it.
        num_token_types: number of token types (BERT's segments); 0 = no table of them.
        dim: width D.
        depth: number of blocks.
        prenet_depth: number of first blocks that never serve as targets.
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward part.
        norm_eps: epsilon of all layer norms.
        activation: of the feed-forward part.
        dropout: on the embeddings and on both branches of a block.
        attention_dropout: on the attention weights.
        activation_dropout: inside the feed-forward part.
        drop_path: stochastic depth of the last block.
        layer_drop: probability that a block is skipped in training.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        attention: backend, see `encoders/backends.py`.
        cross_attention: blocks can attend to the states of another encoder, as decoders do.

    Raises:
        ValueError: sizes that do not fit together.
    """

    @checked
    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        pad_id: int,
        num_token_types: int,
        dim: int,
        depth: int,
        prenet_depth: int,
        num_heads: int,
        ffn_dim: int,
        norm_eps: float,
        activation: str,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        drop_path: float,
        layer_drop: float,
        activation_checkpointing: bool,
        attention: str,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id={pad_id} is not among the {vocab_size} token ids")
        self.max_tokens = max_tokens
        self.dim = dim
        self.depth = depth
        self.prenet_depth = prenet_depth
        self.num_prefix_tokens = 0
        self.grid = None
        self.token_count = same_count
        self.embedder = TextEmbedding(
            vocab_size=vocab_size,
            max_tokens=max_tokens,
            pad_id=pad_id,
            num_token_types=num_token_types,
            dim=dim,
            norm_eps=norm_eps,
            dropout=dropout,
        )
        self.transformer = Transformer(
            depth=depth,
            dim=dim,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            norm_first=False,
            norm_eps=norm_eps,
            qkv_bias="qkv",
            layer_scale=None,
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            drop_path=drop_path,
            layer_drop=layer_drop,
            activation_checkpointing=activation_checkpointing,
            backend=attention,
            cross_attention=cross_attention,
        )
        init_bert(self)
        with torch.no_grad():
            for embedding in (self.embedder.tokens, self.embedder.positions):
                embedding.weight[pad_id] = 0.0

    def embed(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) int64 -> (B, T, D) and `attention_mask` (B, T) unchanged.

        Raises:
            ValueError: more tokens than the encoder was built for.
        """
        if inputs.shape[1] > self.max_tokens:
            raise ValueError(f"got {inputs.shape[1]} tokens; the encoder was built for at most {self.max_tokens}")
        return self.embedder(inputs, attention_mask), attention_mask

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
        """Mix positions; an attention mask (B, T, S) gives the keys that each token may attend to."""
        if masks is not None:
            tokens, attention_mask = apply_mask(tokens, attention_mask, masks=masks, mode=mode, mask_token=None)
        x, layers = self.transformer(
            tokens,
            key_mask=attention_mask,
            biases=[None] * self.depth,
            target_layer=target_layer,
            top_k_layers=top_k_layers,
            context=context,
        )
        return EncoderOutput(prefix=x[:, :0], tokens=x, layers=layers)
