"""Attention behind one signature, whatever computes it.

    out = softmax(q k^T / sqrt(Dh) + bias + key mask) v

Shapes: B rows, H heads, Q queries and S keys (the same positions in self-attention), Dh head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.errors import ConfigError


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (B, H, Q, Dh).
        k: (B, H, S, Dh), as v.
        v: see k.
        backend: a name in `BACKENDS`.
        key_mask: (B, S) or (B, Q, S) bool, True = a real position that may be attended to. The output of a query that
            may attend to nothing is finite and means nothing: it differs between backends.
        bias: added to the logits, broadcastable to (B, H, Q, S).
        dropout_p: share of attention weights dropped; 0 outside training.

    Returns:
        (B, H, Q, Dh).
    """
    return BACKENDS[backend](q, k, v, key_mask, bias, dropout_p)


def attention_weights(
    q: Tensor, k: Tensor, *, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float
) -> Tensor:
    """What `attention` weighs values with, after dropout: (B, H, Q, S); arguments as there."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, Q, S)
    if bias is not None:
        logits = logits + bias
    if key_mask is not None:
        # Not -inf: a row in which everything is masked would become NaN, and spread.
        logits = logits.masked_fill(~_per_query(key_mask), torch.finfo(logits.dtype).min)
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout_p)


def check_backend(backend: str) -> str:
    """Return `backend`; raise ConfigError when there is none of that name."""
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return backend


def _per_query(key_mask: Tensor) -> Tensor:
    """(B, S) or (B, Q, S) -> (B, 1, 1 or Q, S)."""
    return key_mask[:, None, None] if key_mask.dim() == 2 else key_mask[:, None]


def _eager(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    return attention_weights(q, k, key_mask=key_mask, bias=bias, dropout_p=dropout_p) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    mask = None if key_mask is None else _per_query(key_mask)
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "sdpa": _sdpa}
