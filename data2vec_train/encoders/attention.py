"""One attention function for all backends.

    out = softmax(q k^T / sqrt(Dh) + bias + key mask) v

Shapes: B rows, H heads, Q queries and S keys (the same positions in self-attention), Dh head width. Backends and their
limits: `encoders/backends.py`.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data2vec_train.encoders.backends import NAMES, Case, able, refusal
from data2vec_train.errors import ConfigError

log = logging.getLogger(__name__)

# Used instead of -inf, with which a fully masked row would become NaN, and the NaN would spread.
LOWEST = torch.finfo(torch.float32).min


class Bias(ABC):
    """Additive attention bias, stored as its parameters and expanded on use."""

    @property
    @abstractmethod
    def learned(self) -> Tensor:
        """The tensor that receives gradients."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole bias, (1 or B, H, Q, S)."""

    @abstractmethod
    def at(self, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """One value of the bias; all indices are () integer tensors."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    key_mask: Tensor | None = None,
    bias: Bias | Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (B, H, Q, Dh).
        k: (B, H, S, Dh).
        v: (B, H, S, Dh).
        backend: a name in `BACKENDS`.
        key_mask: (B, S) or (B, Q, S) bool, True = a real position that may be attended to. A query without such a key
            gets a finite output without meaning, which differs between backends.
        bias: added to the logits; a tensor is broadcastable to (B, H, Q, S).
        dropout_p: share of attention weights dropped; 0 outside training.

    Returns:
        (B, H, Q, Dh).

    Raises:
        ConfigError: the backend does not support these arguments; the message names the backends that do.
    """
    case = case_of(q.device.type, q.dtype, q.shape[-1], key_mask=key_mask, bias=bias, dropout_p=dropout_p)
    reason = refusal(backend, case)
    if reason is not None:
        raise ConfigError(f"attention={backend}: {reason}; choose one of {', '.join(able(case))}")
    return BACKENDS[backend](q, k, v, key_mask, bias, dropout_p)


def attention_weights(
    q: Tensor, k: Tensor, *, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
) -> Tensor:
    """The attention weights after dropout, (B, H, Q, S); arguments as in `attention`."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, Q, S)
    if bias is not None:
        logits = logits + dense(bias)
    if key_mask is not None:
        logits = logits.masked_fill(~_per_query(key_mask), torch.finfo(logits.dtype).min)
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout_p)


def dense(bias: Bias | Tensor) -> Tensor:
    """The bias as a tensor to add to the logits."""
    return bias.dense() if isinstance(bias, Bias) else bias


def check_backend(backend: str) -> str:
    """Return `backend`; raise ConfigError if it does not exist."""
    if backend not in (*NAMES, "auto"):
        raise ConfigError(f"attention backend {backend!r} does not exist; choose one of {', '.join(NAMES)}, auto")
    return backend


def case_of(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    key_mask: Tensor | None,
    bias: Bias | Tensor | None,
    dropout_p: float,
) -> Case:
    """Describe a call of `attention`: device type, dtype and head width of the queries, the rest as in `attention`."""
    return Case(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        bias=bias is not None,
        padding=key_mask is not None,
        per_query=key_mask is not None and key_mask.dim() == 3,
        dropout=dropout_p > 0,
    )


def _per_query(key_mask: Tensor) -> Tensor:
    """(B, S) or (B, Q, S) -> (B, 1, 1 or Q, S)."""
    return key_mask[:, None, None] if key_mask.dim() == 2 else key_mask[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _eager(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
) -> Tensor:
    return attention_weights(q, k, key_mask=key_mask, bias=bias, dropout_p=dropout_p) @ v


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
) -> Tensor:
    mask = None if key_mask is None else _per_query(key_mask)
    if bias is not None:
        added = dense(bias).to(q.dtype)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _flash(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: None, dropout_p: float) -> Tensor:
    if key_mask is not None and q.is_cuda:
        return _flash_with_padding(q, k, v, key_mask)
    mask = None if key_mask is None else _per_query(key_mask)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _flash_with_padding(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """FlashAttention over rows of different lengths, packed end to end, without a sync between device and host."""
    from torch.nn.attention.varlen import varlen_attn

    num_rows, _, num_queries, _ = q.shape
    query_edges, key_edges, order = padding_as_sequences(key_mask, num_queries)
    order = order[:, None, :, None].expand_as(k)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k.gather(2, order), v.gather(2, order)))
    mixed = varlen_attn(q, k, v, query_edges, key_edges, num_queries, key_mask.shape[1])  # (B * Q, H, Dh)
    return mixed.unflatten(0, (num_rows, num_queries)).transpose(1, 2)


def padding_as_sequences(key_mask: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split every row into two sequences: its real keys with all of its queries, and its padding with no query.

    The number of sequences is then known without counting the real keys on the device.

    Args:
        key_mask: (B, S) bool, True = real.
        num_queries: Q.

    Returns:
        Boundaries of the 2 B sequences among the B * Q queries and among the B * S keys, (2 B + 1,) int32 each; and the
        order of keys in each row, real ones first, (B, S) int64.
    """
    num_rows, num_keys = key_mask.shape
    rows = torch.arange(num_rows, device=key_mask.device)
    real = key_mask.sum(dim=1)
    queries = torch.stack([rows * num_queries, (rows + 1) * num_queries], dim=1).flatten()
    keys = torch.stack([rows * num_keys, rows * num_keys + real], dim=1).flatten()
    query_edges = F.pad(queries, (0, 1), value=num_rows * num_queries).int()
    key_edges = F.pad(keys, (0, 1), value=num_rows * num_keys).int()
    return query_edges, key_edges, key_mask.int().argsort(dim=1, descending=True, stable=True)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
) -> Tensor:
    if isinstance(bias, Tensor):
        bias = bias.expand(*q.shape[:3], k.shape[2])

    def score(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias is not None:
            added = bias[row, head, query, key] if isinstance(bias, Tensor) else bias.at(row, head, query, key)
            logit = logit + added
        if key_mask is not None:
            real = key_mask[row, key] if key_mask.dim() == 2 else key_mask[row, query, key]
            logit = torch.where(real, logit, LOWEST)
        return logit

    return _flex_attention()(q, k, v, score_mod=None if key_mask is None and bias is None else score)


def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled block, FlexAttention is compiled with the block.
    return (
        flex_attention if torch.compiler.is_compiling() or not torch.cuda.is_available() else _compiled(flex_attention)
    )


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "sdpa": _sdpa, "flash": _flash, "flex": _flex}


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the fastest backend


_fastest: dict[tuple, str] = {}
_REPETITIONS = 5


def fastest(
    like: Tensor,
    *,
    num_heads: int,
    key_mask: Tensor | None,
    bias: Bias | Tensor | None,
    dropout_p: float,
) -> str:
    """The fastest backend for self-attention over x (B, S, D), measured once for each kind of shape.

    Numbers of rows and lengths are rounded up to a power of two. Timings vary between runs, so the chosen backend and
    with it the last bits of the results may vary too.

    Args:
        like: x, of which only shape, device and dtype matter; if it requires a gradient, the backward pass is measured
            as well.
        num_heads: H.
        key_mask: see `attention`, like the rest.
        bias: see `attention`.
        dropout_p: see `attention`.
    """
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    backward = torch.is_grad_enabled() and like.requires_grad
    num_rows, length, dim = like.shape
    mask_dim = None if key_mask is None else key_mask.dim()
    rounded = [1 << (size - 1).bit_length() for size in (num_rows, length)]
    key = (device, dtype, *rounded, num_heads, dim, mask_dim, type(bias), dropout_p > 0, backward)
    if key not in _fastest:
        shape = (num_rows, num_heads, length, dim // num_heads)
        q, k, v = (torch.randn(shape, device=like.device, dtype=dtype, requires_grad=backward) for _ in range(3))
        case = case_of(device, dtype, shape[-1], key_mask=key_mask, bias=bias, dropout_p=dropout_p)
        seconds = {name: _measure(name, q, k, v, key_mask, bias, dropout_p) for name in able(case)}
        _fastest[key] = min(seconds, key=seconds.__getitem__)
        measured = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
        left_out = "".join(f"; not {name}: {refusal(name, case)}" for name in NAMES if name not in seconds)
        which = "forward and backward" if backward else "forward"
        log.info(
            "attention: %s for %d x %d tokens, %d heads, %s, %s: %s%s",
            *(_fastest[key], num_rows, length, num_heads, str(dtype).removeprefix("torch."), which, measured, left_out),
        )
    return _fastest[key]


def _measure(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Bias | Tensor | None,
    dropout_p: float,
) -> float:
    """Seconds of one call, the minimum of several."""
    learned = bias.learned if isinstance(bias, Bias) else bias
    wanted = [q, k, v] if learned is None or not learned.requires_grad else [q, k, v, learned]
    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    seconds = []
    for _ in range(_REPETITIONS + 1):  # the first one compiles
        wait()
        start = time.perf_counter()
        mixed = attention(q, k, v, backend=backend, key_mask=key_mask, bias=bias, dropout_p=dropout_p)
        if q.requires_grad:
            torch.autograd.grad(mixed, wanted, torch.ones_like(mixed))
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
