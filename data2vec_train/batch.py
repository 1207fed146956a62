"""What the program hands to the model: a batch of any modality, and which of its tokens are masked."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _TensorRecord:
    """Fields that move together; whatever is no tensor stays where it is."""

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
        """The same record with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        """The same record with its tensors in pinned host memory."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True)
class Masks(_TensorRecord):
    """Which tokens the student may not see, in the two forms it is needed in.

    The index tensors say the same as `masked`. They are made on the host, where their sizes are known, so that nothing
    on the device has to count the hidden tokens first.
    """

    masked: Tensor  # (B, M, T) bool, True = hidden from the student
    hidden: Tensor  # (P,) int64: hidden positions in the flattened (N, T)
    visible: Tensor | None  # (N, V) int64: visible positions of each row, ascending; None when rows differ in V

    @classmethod
    def from_masked(cls, masked: Tensor, attention_mask: Tensor | None = None) -> Masks:
        """Index tensors for masks. Call it on the host: it counts.

        Args:
            masked: (B, M, T) bool; padding is not masked.
            attention_mask: (B, T) bool at token rate, True = real, with the padding at the end. Shorter samples show
                fewer tokens; padding fills up their rows of `visible`, and attention does not see it.
        """
        rows = masked.flatten(0, 1)  # (N, T)
        shown = ~rows
        real = shown if attention_mask is None else shown & attention_mask.repeat_interleave(masked.shape[1], dim=0)
        num_visible = int(real.sum(dim=1).max())
        visible = None
        # Without padding to fill up with, this says that all rows show equally many.
        if bool((shown.sum(dim=1) >= num_visible).all()):
            visible = shown.int().argsort(dim=1, descending=True, stable=True)[:, :num_visible].contiguous()
        return cls(masked=masked, hidden=rows.flatten().nonzero()[:, 0], visible=visible)


@dataclass(frozen=True)
class Batch(_TensorRecord):
    """One batch of any modality."""

    inputs: Tensor  # what the encoder eats, (B, ...)
    attention_mask: Tensor | None = None  # (B, ...) bool at the rate of the inputs, True = real
    masks: Masks | None = None  # None outside pretraining
    corrupted: Tensor | None = None  # (B, M, ...) like inputs: what the student sees in mask mode "corrupt"
    teacher_inputs: Tensor | None = None  # (B, ...) like inputs: what the teacher sees instead of them
    teacher_attention_mask: Tensor | None = None  # of `teacher_inputs`
    ids: Tensor | None = None  # (B,) int64, sample ids
    labels: Tensor | None = None  # (B,)
    rejected: tuple[tuple[str, str], ...] = ()  # (key, reason) of samples that could not be used
    place: tuple[int, int, int] | None = None  # of a stream: worker, epoch, and records of it that are done with

    def __len__(self) -> int:
        return self.inputs.shape[0]
