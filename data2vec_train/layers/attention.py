"""Attention behind one signature, whatever computes it.

    out = softmax(q k^T / sqrt(Dh) + bias + key mask) v

Shapes: B rows, H heads, S positions, Dh head width.
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
        q: (B, H, S, Dh), as k and v.
        k: see q.
        v: see q.
        backend: a name in `BACKENDS`.
        key_mask: (B, S) bool, True = a real position that may be attended to.
        bias: added to the logits, broadcastable to (B, H, S, S).
        dropout_p: share of attention weights dropped; 0 outside training.

    Returns:
        (B, H, S, Dh).
    """
    return BACKENDS[backend](q, k, v, key_mask, bias, dropout_p)


def check_backend(backend: str) -> str:
    """Return `backend`; raise ConfigError when there is none of that name."""
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return backend


def _eager(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, S, S)
    if bias is not None:
        logits = logits + bias
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None]  # (B, 1, 1, S) bool
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "sdpa": _sdpa}
