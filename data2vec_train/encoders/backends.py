"""Attention backends and their limits. Imports no torch, so that commands can be checked without it.

eager   plain matrix products, for reading, comparing and attention weights
sdpa    torch's scaled_dot_product_attention, which picks a kernel itself
flash   torch's FlashAttention; on a GPU padding goes through its kernel for sequences of different lengths
flex    compiled FlexAttention: biases and masks are computed inside the kernel, from their parameters
auto    measures these once for each shape and takes the fastest
"""

from dataclasses import dataclass

NAMES = ("eager", "sdpa", "flash", "flex")


@dataclass(frozen=True)
class Case:
    """Properties of an attention call that decide which backends support it."""

    device: str  # "cpu", "cuda", ...
    dtype: str  # "float32", "bfloat16", "float16"
    head_dim: int | None  # Dh; None = not known yet
    bias: bool  # something is added to the logits
    padding: bool  # some keys are masked
    per_query: bool  # which keys are masked depends on the query
    dropout: bool  # of attention weights


def refusal(backend: str, case: Case) -> str | None:
    """Why `backend` does not support `case`; None if it does."""
    if backend == "flash":
        return _flash(case)
    if backend == "flex":
        return _flex(case)
    return None


def able(case: Case) -> list[str]:
    """The backends that support `case`."""
    return [name for name in NAMES if refusal(name, case) is None]


def _flash(case: Case) -> str | None:
    on_gpu = case.device == "cuda"
    if case.bias:
        return "it supports no position bias"
    if not on_gpu and case.device != "cpu":
        return f"it has no kernel for {case.device}"
    if on_gpu and case.dtype not in ("bfloat16", "float16"):
        return f"its kernels support bfloat16 and float16, not {case.dtype}"
    if on_gpu and case.head_dim is not None and (case.head_dim % 8 or case.head_dim > 256):
        return f"its head width must be a multiple of 8 up to 256, not {case.head_dim}"
    if on_gpu and case.per_query:
        return "it supports no mask that differs between queries"
    if case.dropout and (case.padding or not on_gpu):
        return "it supports attention dropout only on a GPU and without padding"
    return None


def _flex(case: Case) -> str | None:
    if case.device != "cuda":
        return "it has no backward pass without a GPU"
    if case.dropout:
        return "it supports no attention dropout"
    if case.head_dim is not None and case.head_dim < 16:
        return f"its head width must be at least 16, not {case.head_dim}"
    return None
