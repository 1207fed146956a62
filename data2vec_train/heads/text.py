"""Heads of text encoders. Features are (B, T, D). Parameter names are those of Hugging Face's models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageHead(nn.Module):
    """Linear, GELU, layer norm, and a linear map to the vocabulary that may share the encoder's embedding.

    Args:
        dim: D.
        vocab_size: V.
        norm_eps: of the layer norm.
    """

    def __init__(self, *, dim: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dense = nn.Linear(dim, dim)
        self.layer_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.decoder = nn.Linear(dim, vocab_size)

    def tie(self, embedding: nn.Parameter) -> None:
        """Use the encoder's token embedding (V, D) as the last linear map."""
        self.decoder.weight = embedding
        self.decoder.bias = self.bias

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(features))))


class SentenceHead(nn.Module):
    """Dropout, linear, tanh, dropout, linear on the first token."""

    def __init__(self, *, dim: int, dropout: float, num_labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(dim, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, C)."""
        x = torch.tanh(self.dense(self.dropout(features[:, 0])))
        return self.out_proj(self.dropout(x))


class Pooler(nn.Module):
    """Linear and tanh on the first token."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        return torch.tanh(self.dense(features[:, 0]))
