"""Which tokens to hide from the student.

A masker draws one mask from a numpy generator and has no state, so that a mask is a pure function of its seed. Masks
are True where the student may not look. Letters: T tokens, (Hp, Wp) grid with T = Hp * Wp in row-major order.
"""

from abc import ABC, abstractmethod

import numpy as np


class Masker(ABC):
    """Draws masks of T positions. `constant_count` says that every mask of the same T hides equally many."""

    constant_count: bool

    @abstractmethod
    def __call__(self, num_tokens: int, grid: tuple[int, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden; at least one position is hidden and at least one visible."""


class BlockMasker(Masker):
    """Rectangles of patches are hidden until a wanted number is reached (data2vec 1.0 images).

    Each rectangle has an area between `min_block_fraction` of the image and what is still wanted, and a side ratio
    between `min_aspect` and its inverse, uniform in the logarithm. Ten tries each; when none adds anything the mask
    stays below the wanted number, so counts differ.

    Source: BEiT's mask generator as used by data2vec 1.0 (spec 2.3), where 120 of 196 patches are wanted and blocks
    have at least 16.
    """

    constant_count = False

    def __init__(self, *, hidden_fraction: float, min_block_fraction: float, min_aspect: float) -> None:
        self.hidden_fraction = _checked_fraction(hidden_fraction)
        self.min_block_fraction = min_block_fraction
        self.log_aspect = (np.log(min_aspect), np.log(1 / min_aspect))

    def __call__(self, num_tokens: int, grid: tuple[int, int] | None, rng: np.random.Generator) -> np.ndarray:
        """See `Masker`."""
        rows, columns = _checked_grid(num_tokens, grid, self)
        wanted = _count(self.hidden_fraction * num_tokens, num_tokens)
        smallest = self.min_block_fraction * num_tokens
        hidden = np.zeros((rows, columns), dtype=bool)
        count = 0
        while count < wanted:
            added = self._hide_one_block(hidden, wanted - count, smallest, rng)
            if added == 0:
                break
            count += added
        if count == 0:  # only on grids too small for any block
            hidden.flat[rng.choice(num_tokens, wanted, replace=False)] = True
        return hidden.ravel()

    def _hide_one_block(self, hidden: np.ndarray, remaining: int, smallest: float, rng: np.random.Generator) -> int:
        rows, columns = hidden.shape
        for _ in range(10):
            # With less than `smallest` to go the interval turns round, in the original as well.
            area = smallest + (remaining - smallest) * rng.random()
            aspect = np.exp(rng.uniform(*self.log_aspect))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top = rng.integers(0, rows - height, endpoint=True)
            left = rng.integers(0, columns - width, endpoint=True)
            block = hidden[top : top + height, left : left + width]
            added = block.size - int(block.sum())
            if 0 < added <= remaining:
                block[:] = True
                return added
        return 0


class InverseBlockMasker(Masker):
    """Small squares of patches stay visible, the rest is hidden (data2vec 2.0 images).

    Squares are drawn with replacement around uniform centres and cut at the border; then single patches are taken
    away or added at random until exactly int(T * (1 - hidden_fraction)) are visible.

    Source: `compute_block_mask_2d` of data2vec 2.0 with the inverse mask (spec 3.6); `block_patches` is the side of a
    square (3) and `adjust_fraction` raises the number of squares to make up for overlaps.
    """

    constant_count = True

    def __init__(self, *, hidden_fraction: float, adjust_fraction: float, block_patches: int) -> None:
        self.hidden_fraction = _checked_fraction(hidden_fraction)
        self.adjust_fraction = adjust_fraction
        self.block_patches = block_patches

    def __call__(self, num_tokens: int, grid: tuple[int, int] | None, rng: np.random.Generator) -> np.ndarray:
        """See `Masker`."""
        rows, columns = _checked_grid(num_tokens, grid, self)
        kept_fraction = 1 - self.hidden_fraction
        num_kept = _count(int(num_tokens * kept_fraction), num_tokens)
        num_squares = int(num_tokens * (kept_fraction + self.adjust_fraction) / self.block_patches**2)
        centres = rng.integers(0, num_tokens, size=max(num_squares, 1))
        offsets = np.arange(self.block_patches) - self.block_patches // 2
        row = np.minimum(np.maximum(centres[:, None] // columns + offsets, 0), rows - 1)  # (squares, side)
        column = np.minimum(np.maximum(centres[:, None] % columns + offsets, 0), columns - 1)
        kept = np.zeros((rows, columns), dtype=bool)
        kept[row[:, :, None], column[:, None, :]] = True
        return ~_with_count(kept.ravel(), num_kept, rng)


class RandomMasker(Masker):
    """Independent positions: exactly int(T * (1 - hidden_fraction)) stay visible (2.0 text; MAE)."""

    constant_count = True

    def __init__(self, *, hidden_fraction: float) -> None:
        self.hidden_fraction = _checked_fraction(hidden_fraction)

    def __call__(self, num_tokens: int, grid: tuple[int, int] | None, rng: np.random.Generator) -> np.ndarray:
        """See `Masker`."""
        num_kept = _count(int(num_tokens * (1 - self.hidden_fraction)), num_tokens)
        hidden = np.ones(num_tokens, dtype=bool)
        hidden[rng.permutation(num_tokens)[:num_kept]] = False
        return hidden


def _with_count(chosen: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`chosen` (T,) bool with random positions removed or added until exactly `count` are True."""
    surplus = int(chosen.sum()) - count
    if surplus:
        candidates = np.flatnonzero(chosen if surplus > 0 else ~chosen)
        chosen[rng.permutation(candidates)[: abs(surplus)]] = surplus < 0
    return chosen


def _count(wanted: float, num_tokens: int) -> int:
    return min(max(round(wanted), 1), num_tokens - 1)


def _checked_fraction(fraction: float) -> float:
    if not 0 < fraction < 1:
        raise ValueError(f"hidden_fraction must lie between 0 and 1, got {fraction}")
    return fraction


def _checked_grid(num_tokens: int, grid: tuple[int, int] | None, masker: Masker) -> tuple[int, int]:
    if grid is None or grid[0] * grid[1] != num_tokens:
        raise ValueError(f"{type(masker).__name__} needs a grid of {num_tokens} tokens, got {grid}")
    return grid
