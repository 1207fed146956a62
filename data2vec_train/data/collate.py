"""Stacks samples into a `Batch` and draws their masks, in the loader process."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data2vec_train.batch import Batch, Masks
from data2vec_train.data.dataset import Sample
from data2vec_train.data.seeding import generator
from data2vec_train.errors import ConfigError
from data2vec_train.objective.masking import Masker, TokenCorruption


class Collator:
    """Samples -> Batch.

    Before the masks of a batch are equalised, each is a pure function of (run seed, epoch, sample id, mask number).

    Args:
        masker: draws one mask; None makes batches without masks, for evaluation.
        masks_per_sample: M.
        grid: rows and columns of tokens, see `ModalityEncoder.grid`.
        token_count: length of an input's last axis -> number of tokens.
        seed: of the run.
        pad_value: appended to shorter samples.
        corruption: changes the token ids at masked positions; None where the encoder applies the mask.
        legacy_teacher_input: give the teacher only the masked tokens and replace all others by padding, as the released
            code of 1.0 text does by mistake (ALGORITHM.md 7, row 1).

    Raises:
        ConfigError: `legacy_teacher_input` with several masks per sample.
    """

    def __init__(
        self,
        *,
        masker: Masker | None,
        masks_per_sample: int,
        grid: tuple[int | None, int] | None,
        token_count: Callable[[int], int],
        seed: int,
        pad_value: int = 0,
        corruption: TokenCorruption | None = None,
        legacy_teacher_input: bool = False,
    ) -> None:
        if legacy_teacher_input and masks_per_sample != 1:
            raise ConfigError(
                f"legacy_teacher_input needs one mask per sample, got objective.masks_per_sample={masks_per_sample}"
            )
        self.masker = masker
        self.masks_per_sample = masks_per_sample
        self.grid = grid
        self.token_count = token_count
        self.seed = seed
        self.pad_value = pad_value
        self.corruption = corruption
        self.legacy_teacher_input = legacy_teacher_input

    def without_masks(self) -> "Collator":
        """A copy whose batches have no masks."""
        plain = copy.copy(self)
        plain.masker = None
        return plain

    def __call__(self, samples: list[Sample]) -> Batch:
        """Samples without inputs are left out; `rejected` names all broken records."""
        rejected = tuple(pair for sample in samples for pair in sample.rejected)
        good = [sample for sample in samples if sample.inputs is not None]
        if not good:
            return Batch(inputs=torch.empty(0), rejected=rejected, place=samples[-1].place)
        lengths = torch.tensor([sample.inputs.shape[-1] for sample in good])
        inputs = self._stack([sample.inputs for sample in good])
        labels = None
        if all(sample.label is not None for sample in good):
            labels = torch.tensor([sample.label for sample in good])
        return Batch(
            inputs=inputs,
            attention_mask=_real(lengths),
            ids=torch.tensor([sample.id for sample in good]),
            labels=labels,
            rejected=rejected,
            place=samples[-1].place,
            **self._hide(good, lengths),
        )

    def _hide(self, good: list[Sample], lengths: Tensor) -> dict[str, Masks | Tensor | None]:
        """Masks and, for token ids, the corrupted ids that the student sees."""
        if self.masker is None:
            return {}
        rows = self.draw(good)  # N of (T_i,)
        rows = self.masker.equalise(rows, generator(self.seed, "equalise", good[0].epoch, good[0].id))
        fields: dict[str, Masks | Tensor | None] = {}
        if self.legacy_teacher_input:
            selected = [torch.from_numpy(row) for row in rows]
            seen = [sample.inputs.where(row, self.pad_value) for sample, row in zip(good, selected, strict=True)]
            fields["teacher_inputs"] = self._stack(seen)
            fields["teacher_attention_mask"] = _stack_rows(selected, int(lengths.max()), False)
        if self.corruption is not None:
            changed = []
            for number, row in enumerate(rows):
                sample, mask_number = good[number // self.masks_per_sample], number % self.masks_per_sample
                rng = generator(self.seed, "corrupt", sample.epoch, sample.id, mask_number)
                ids, rows[number] = self.corruption(sample.inputs.numpy(), row, rng)
                changed.append(torch.from_numpy(ids))
            fields["corrupted"] = self._stack(changed).unflatten(0, (len(good), self.masks_per_sample))  # (B, M, T)
        num_tokens = torch.tensor([len(row) for row in rows[:: self.masks_per_sample]])
        masked = _stack_rows([torch.from_numpy(row) for row in rows], int(num_tokens.max()), False)
        masked = masked.unflatten(0, (len(good), self.masks_per_sample))  # (B, M, T)
        return fields | {"masks": Masks.from_masked(masked, _real(num_tokens))}

    def draw(self, samples: list[Sample]) -> list[np.ndarray]:
        """B * M masks (T_i,), sample-major, before they are equalised."""
        return [
            self.masker(
                self.token_count(sample.inputs.shape[-1]),
                self.grid,
                generator(self.seed, "mask", sample.epoch, sample.id, mask_number),
            )
            for sample in samples
            for mask_number in range(self.masks_per_sample)
        ]

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        return _stack_rows(tensors, max(tensor.shape[-1] for tensor in tensors), self.pad_value)


def _stack_rows(tensors: list[Tensor], length: int, value: int | bool) -> Tensor:
    """Tensors padded to `length` in their last axis, stacked."""
    if all(tensor.shape[-1] == length for tensor in tensors):
        return torch.stack(tensors)
    stacked = tensors[0].new_full((len(tensors), *tensors[0].shape[:-1], length), value)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[..., : tensor.shape[-1]] = tensor
    return stacked


def _real(lengths: Tensor) -> Tensor | None:
    """(B, max length) bool, True where a sample has not ended; None when all are equally long."""
    longest = int(lengths.max())
    return None if bool((lengths == longest).all()) else torch.arange(longest) < lengths[:, None]
