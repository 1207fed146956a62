"""Maskers: which tokens are hidden from the student.

A masker draws one mask from a numpy generator and has no state, so that a mask is a pure function of its seed. Masks
are True at hidden positions. Letters: T tokens, (Hp, Wp) grid with T = Hp * Wp in row-major order.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from data2vec_train.objective.grid import grid_of
from data2vec_train.system.constraints import checked


class Masker(ABC):
    """Draws masks of T positions. `constant_count`: all masks of the same T hide equally many positions."""

    constant_count: bool

    @abstractmethod
    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden; at least one position is hidden and at least one visible."""

    def equalise(self, masks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """The masks of one batch, (T_i,) each, adjusted to each other; unchanged unless a subclass overrides this."""
        return masks


class BlockMasker(Masker):
    """Rectangles of patches are hidden until a target number is reached (data2vec 1.0 images).

    Each rectangle has an area between `min_block_fraction` of the image and the number still missing, and an aspect
    ratio between `min_aspect` and its inverse, log-uniform. Each has ten tries; if none adds a patch, the mask stays
    below the target number, so counts differ.

    Source: BEiT's mask generator as used by data2vec 1.0 (ALGORITHM.md 2.3), where the target is 120 of 196 patches
    and blocks have at least 16.
    """

    constant_count = False

    @checked
    def __init__(self, *, hidden_fraction: float, min_block_fraction: float, min_aspect: float) -> None:
        self.hidden_fraction = hidden_fraction
        self.min_block_fraction = min_block_fraction
        self.log_aspect = (np.log(min_aspect), np.log(1 / min_aspect))

    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden."""
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
            # With fewer than `smallest` missing the interval is reversed, as in the original.
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

    Squares are drawn with replacement around uniform centres and clipped at the border; then single patches are
    removed or added at random until exactly int(T * (1 - hidden_fraction)) are visible.

    Source: `compute_block_mask_2d` of data2vec 2.0 with the inverse mask (ALGORITHM.md 3.6); `block_patches` is the
    side of a square (3) and `adjust_fraction` raises the number of squares to make up for overlaps.
    """

    constant_count = True

    @checked
    def __init__(self, *, hidden_fraction: float, adjust_fraction: float, block_patches: int) -> None:
        self.hidden_fraction = hidden_fraction
        self.adjust_fraction = adjust_fraction
        self.block_patches = block_patches

    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden."""
        rows, columns = _checked_grid(num_tokens, grid, self)
        kept_fraction = 1 - self.hidden_fraction
        num_kept = _count(int(num_tokens * kept_fraction), num_tokens)
        num_squares = int(num_tokens * (kept_fraction + self.adjust_fraction) / self.block_patches**2)
        centres = rng.integers(0, num_tokens, size=max(num_squares, 1))
        kept = np.zeros(num_tokens, dtype=bool)
        kept[_squares(rows, columns, self.block_patches)[centres]] = True
        return ~_with_count(kept, num_kept, rng)


class RandomMasker(Masker):
    """Independent positions: exactly int(T * (1 - hidden_fraction)) stay visible (2.0 text; MAE)."""

    constant_count = True

    @checked
    def __init__(self, *, hidden_fraction: float) -> None:
        self.hidden_fraction = hidden_fraction

    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden."""
        num_kept = _count(int(num_tokens * (1 - self.hidden_fraction)), num_tokens)
        hidden = np.ones(num_tokens, dtype=bool)
        hidden[rng.permutation(num_tokens)[:num_kept]] = False
        return hidden


class SpanMasker(Masker):
    """Spans of fixed length from random starts; spans may overlap (data2vec 1.0 speech and text).

    There are n = max(min_spans, floor(nominal_fraction * T / span_tokens + u)) distinct starts, u uniform in [0, 1);
    each hides `span_tokens` positions. With starts "inside" (speech) they are drawn from 0 ... T - span - 1, so that
    the last position is never hidden (ALGORITHM.md 7, row 13); with "anywhere" (text) from all positions, and spans
    are cut off at the end.

    Source: fairseq's span masks as used by data2vec 1.0 (ALGORITHM.md 2.1, 2.2): 0.65 and 10 for speech, of which about
    49 % end up hidden; 0.35 and 4 for text, about 31 %.

    Args:
        nominal_fraction: share of the positions that the spans would hide if none overlapped.
        span_tokens: length of a span.
        min_spans: minimum number of spans.
        starts: see above.
        equalise_by: what the rows of a batch share after `equalise`. "count" = the number of hidden positions of the
            row with the fewest, as in the original: a long row in a batch with a short one loses most of its mask.
            "fraction" = the smallest share of hidden positions; equal to "count" for rows of equal length, and safe
            with padding (ALGORITHM.md 7, row 12). "none" = masks are not changed.

    Raises:
        ValueError: a value that cannot work.
    """

    constant_count = False

    @checked
    def __init__(
        self,
        *,
        nominal_fraction: float,
        span_tokens: int,
        min_spans: int,
        starts: Literal["inside", "anywhere"],
        equalise_by: Literal["fraction", "count", "none"],
    ) -> None:
        self.nominal_fraction = nominal_fraction
        self.span_tokens = span_tokens
        self.min_spans = min_spans
        self.starts = starts
        self.equalise_by = equalise_by

    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden."""
        _check_length(num_tokens)
        wanted = int(self.nominal_fraction * num_tokens / self.span_tokens + rng.random())
        num_spans = max(wanted, self.min_spans)
        candidates = num_tokens
        if self.starts == "inside":
            candidates = num_tokens - self.span_tokens
            if candidates <= num_spans:  # the row is too short for so many starts; as in the original
                candidates = num_spans + 1
        starts = rng.choice(candidates, min(num_spans, candidates), replace=False)
        hidden = np.zeros(num_tokens, dtype=bool)
        positions = (starts[:, None] + np.arange(self.span_tokens)).ravel()
        hidden[positions[positions < num_tokens]] = True
        return _neither_all_nor_nothing(hidden, rng)

    def equalise(self, masks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Uncover random single positions in rows that hide more than the row that hides least."""
        if self.equalise_by == "none":
            return masks
        counts = np.array([mask.sum() for mask in masks])
        if self.equalise_by == "count":
            wanted = np.full(len(masks), counts.min())
        else:
            lengths = np.array([len(mask) for mask in masks])
            least = int((counts / lengths).argmin())
            wanted = np.maximum(lengths * counts[least] // lengths[least], 1)
        return [_with_count(mask.copy(), int(count), rng) for mask, count in zip(masks, wanted, strict=True)]


class Block1dMasker(Masker):
    """Short spans around uniform centres, then exactly int(T * hidden_fraction) positions (data2vec 2.0 speech).

    int(T * (hidden_fraction + adjust_fraction) / span_tokens) centres are drawn with replacement, and each hides the
    span around it, clamped at the edges; random single positions are then hidden or uncovered until the number is
    exact.

    Source: `compute_block_mask_1d` of data2vec 2.0 (ALGORITHM.md 3.6).
    """

    constant_count = True

    @checked
    def __init__(self, *, hidden_fraction: float, adjust_fraction: float, span_tokens: int) -> None:
        self.hidden_fraction = hidden_fraction
        self.adjust_fraction = adjust_fraction
        self.span_tokens = span_tokens

    def __call__(self, num_tokens: int, grid: tuple[int | None, int] | None, rng: np.random.Generator) -> np.ndarray:
        """One mask, (T,) bool, True = hidden."""
        _check_length(num_tokens)
        num_spans = int(num_tokens * (self.hidden_fraction + self.adjust_fraction) / self.span_tokens)
        centres = rng.integers(0, num_tokens, size=max(num_spans, 1))
        positions = centres[:, None] + np.arange(self.span_tokens) - self.span_tokens // 2
        hidden = np.zeros(num_tokens, dtype=bool)
        hidden[np.clip(positions, 0, num_tokens - 1)] = True
        return _with_count(hidden, _count(int(num_tokens * self.hidden_fraction), num_tokens), rng)


class TokenCorruption:
    """Replaces the tokens at hidden positions, mostly by the mask token (data2vec 1.0 text).

    A share of the hidden positions gets a random token, and a share keeps its own. The original computes no loss there
    (ALGORITHM.md 2.2), so these no longer count as hidden. BERT's 80/10/10 is 0.1 and 0.1; data2vec uses 0 and 0.

    Args:
        mask_id: the mask token.
        vocab_size: number of token ids.
        special_ids: tokens that are never drawn at random; `mask_id` is always one of them.
        random_fraction: share of hidden positions that get a random token.
        keep_fraction: share of hidden positions that keep their token.

    Raises:
        ValueError: negative shares, shares that sum to 1 or more, or ids outside the vocabulary.
    """

    @checked
    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        special_ids: Sequence[int],
        random_fraction: float,
        keep_fraction: float,
    ) -> None:
        special = {mask_id, *special_ids}
        if not all(0 <= token_id < vocab_size for token_id in special):
            raise ValueError(f"the special ids {sorted(special)} do not lie in a vocabulary of {vocab_size}")
        self.mask_id = mask_id
        self.ordinary = np.setdiff1d(np.arange(vocab_size), sorted(special))
        self.random_fraction = random_fraction
        self.keep_fraction = keep_fraction

    def __call__(self, ids: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) int and hidden (T,) bool -> corrupted ids (T,), and where they are `mask_id` (T,) bool."""
        positions = np.flatnonzero(hidden)
        chance = rng.random(len(positions))
        if (
            self.random_fraction + self.keep_fraction
            and not (chance >= self.random_fraction + self.keep_fraction).any()
        ):
            chance[rng.integers(len(positions))] = 1.0  # at least one position has to be predicted
        swapped = positions[chance < self.random_fraction]
        masked = positions[chance >= self.random_fraction + self.keep_fraction]
        corrupted = ids.copy()
        corrupted[masked] = self.mask_id
        corrupted[swapped] = rng.choice(self.ordinary, len(swapped))
        still_hidden = np.zeros(len(ids), dtype=bool)
        still_hidden[masked] = True
        return corrupted, still_hidden


@functools.cache
def _squares(rows: int, columns: int, side: int) -> np.ndarray:
    """Positions (T, side^2) of the square around each position of a grid, clipped at the border."""
    offsets = np.arange(side) - side // 2
    row = np.clip(np.arange(rows)[:, None] + offsets, 0, rows - 1)  # (rows, side)
    column = np.clip(np.arange(columns)[:, None] + offsets, 0, columns - 1)
    return (row[:, None, :, None] * columns + column[None, :, None, :]).reshape(rows * columns, side**2)


def _with_count(chosen: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`chosen` (T,) bool with random positions removed or added until exactly `count` are True."""
    surplus = int(chosen.sum()) - count
    if surplus:
        candidates = np.flatnonzero(chosen if surplus > 0 else ~chosen)
        chosen[rng.permutation(candidates)[: abs(surplus)]] = surplus < 0
    return chosen


def _count(wanted: float, num_tokens: int) -> int:
    return min(max(round(wanted), 1), num_tokens - 1)


def _neither_all_nor_nothing(hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = int(hidden.sum())
    return _with_count(hidden, _count(count, len(hidden)), rng)


def _check_length(num_tokens: int) -> None:
    if num_tokens < 2:
        raise ValueError(f"a mask needs at least 2 tokens, one hidden and one visible, got {num_tokens}")


def _checked_grid(num_tokens: int, grid: tuple[int | None, int] | None, masker: Masker) -> tuple[int, int]:
    counted = grid_of(num_tokens, grid)
    if counted is None or counted[0] * counted[1] != num_tokens:
        raise ValueError(f"{type(masker).__name__} needs a grid of {num_tokens} tokens, got {grid}")
    return counted
