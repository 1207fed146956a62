"""Stacks samples into a `Batch` and draws their masks, in the loader's worker."""

import numpy as np
import torch

from data2vec_train.data.dataset import Sample
from data2vec_train.data.seeding import generator
from data2vec_train.encoders.base import Batch, Masks
from data2vec_train.masking import Masker


class Collator:
    """Samples -> Batch.

    A mask is a pure function of (run seed, epoch, sample id, view).

    Args:
        masker: draws one mask; None makes batches without masks, for evaluation.
        views: M, masks per sample.
        grid: rows and columns of tokens.
        seed: of the run.
    """

    def __init__(self, *, masker: Masker | None, views: int, grid: tuple[int, int], seed: int) -> None:
        self.masker = masker
        self.views = views
        self.grid = grid
        self.seed = seed

    def __call__(self, samples: list[Sample]) -> Batch:
        """Samples without inputs are left out; `rejected` names everything that was broken."""
        rejected = tuple(pair for sample in samples for pair in sample.rejected)
        good = [sample for sample in samples if sample.inputs is not None]
        if not good:
            return Batch(inputs=torch.empty(0), rejected=rejected)
        masks = None
        if self.masker is not None:
            masked = np.stack([[self._mask(sample, view) for view in range(self.views)] for sample in good])
            masks = Masks.from_masked(torch.from_numpy(masked))  # (B, M, T)
        labels = None
        if all(sample.label is not None for sample in good):
            labels = torch.tensor([sample.label for sample in good])
        return Batch(
            inputs=torch.stack([sample.inputs for sample in good]),
            masks=masks,
            ids=torch.tensor([sample.id for sample in good]),
            labels=labels,
            rejected=rejected,
        )

    def _mask(self, sample: Sample, view: int) -> np.ndarray:
        rng = generator(self.seed, "mask", sample.epoch, sample.id, view)
        return self.masker(self.grid[0] * self.grid[1], self.grid, rng)
