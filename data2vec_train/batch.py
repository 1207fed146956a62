"""Input of the model: a batch of any modality, and its masks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _TensorRecord:
    """Base class of records that move their tensors together; other fields are kept."""

    def _map(self, change: Any) -> Any:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, _TensorRecord):
                changed[field.name] = value._map(change)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """A copy with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        """A copy with its tensors in pinned host memory."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True)
class Masks(_TensorRecord):
    """Which tokens are hidden from the student, as a boolean mask and as indices.

    The index tensors contain the same information as `masked`. They are made on the host, where their sizes are known,
    so that the device need not count the hidden tokens first.
    """

    masked: Tensor  # (B, M, T) bool, True = hidden from the student
    hidden: Tensor  # (P,) int64: hidden positions in the flattened (N, T)
    visible: Tensor | None  # (N, V) int64: visible positions of each row, ascending; None when rows differ in V

    @classmethod
    def from_masked(cls, masked: Tensor, attention_mask: Tensor | None = None) -> Masks:
        """Make the index tensors of masks. Call it on the host: their sizes depend on the values.

        Args:
            masked: (B, M, T) bool; padding is not masked.
            attention_mask: (B, T) bool at token rate, True = real, with the padding at the end. Shorter samples have
                fewer visible tokens; their rows of `visible` are filled up with padding, which attention ignores.
        """
        rows = masked.flatten(0, 1)  # (N, T)
        shown = ~rows
        real = shown if attention_mask is None else shown & attention_mask.repeat_interleave(masked.shape[1], dim=0)
        num_visible = int(real.sum(dim=1).max())
        visible = None
        # Every row needs V unmasked positions, padding included; without padding all rows must show equally many.
        if bool((shown.sum(dim=1) >= num_visible).all()):
            visible = shown.int().argsort(dim=1, descending=True, stable=True)[:, :num_visible].contiguous()
        return cls(masked=masked, hidden=rows.flatten().nonzero()[:, 0], visible=visible)


@dataclass(frozen=True)
class Batch(_TensorRecord):
    """One batch of any modality."""

    inputs: Tensor  # input of the encoder, (B, ...)
    attention_mask: Tensor | None = None  # (B, ...) bool at the rate of the inputs, True = real
    masks: Masks | None = None  # None outside pretraining
    corrupted: Tensor | None = None  # (B, M, ...) like inputs: what the student sees in mask mode "corrupt"
    teacher_inputs: Tensor | None = None  # (B, ...) like inputs: given to the teacher instead of `inputs`
    teacher_attention_mask: Tensor | None = None  # of `teacher_inputs`
    ids: Tensor | None = None  # (B,) int64, sample ids
    labels: Tensor | None = None  # (B,)
    rejected: tuple[tuple[str, str], ...] = ()  # (key, reason) of samples that could not be used
    place: tuple[int, int, int] | None = None  # of a stream: worker, epoch, and number of records read in it

    def __len__(self) -> int:
        return self.inputs.shape[0]
