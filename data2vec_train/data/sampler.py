"""The endless order of samples.

The sequence of samples is a new permutation of all samples for each epoch. Batch number b of a rank holds fixed
positions of this sequence, and may cross the border of two epochs. No sample is dropped, no batch is short, and the
position follows from the step alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data2vec_train.data.seeding import generator
from data2vec_train.system.constraints import require


class Key(NamedTuple):
    """Index into a `TrainingDataset`."""

    epoch: int
    index: int  # of a sample
    length: int | None = None  # crop of its last axis; None = no crop


class EndlessBatchSampler(Sampler[list[Key]]):
    """Batches of keys, for ever.

    Args:
        num_samples: of the data set.
        batch_size: samples per batch on this rank.
        seed: of the run.
        first_batch: where to start, counted over all ranks.
        rank: of this process; ranks take turns in one global order of batches.
        world_size: number of processes.
    """

    def __init__(
        self, *, num_samples: int, batch_size: int, seed: int, first_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.first_batch = first_batch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        batch = self.first_batch + self.rank
        while True:
            start = batch * self.batch_size
            keys = []
            for position in range(start, start + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = generator(self.seed, "order", epoch).permutation(self.num_samples)
                keys.append(Key(epoch, int(order[position % self.num_samples])))
            yield keys
            batch += self.world_size


@dataclass(frozen=True)
class LengthBatching:
    """How samples of different lengths share batches; lengths in units of the input (audio samples, tokens).

    Lengths are sorted into bins whose edges differ by a factor 1 - `max_waste`, and a batch takes its samples from one
    bin. So neither cropping to the bin's lower edge nor padding to its longest sample wastes more than `max_waste`.

    Attributes:
        budget: largest total length of a batch.
        max_length: longer samples are cropped to this.
        max_waste: largest share of a sample that is cropped off, or of a batch that is padding.
        crop: True crops all samples of a batch to one length, False pads them.
        fill: True lets any number of short samples fill the budget.
    """

    budget: int
    max_length: int
    max_waste: float
    crop: bool
    fill: bool = False

    def __post_init__(self) -> None:
        require(budget=self.budget, max_length=self.max_length, max_waste=self.max_waste)

    @cached_property
    def edges(self) -> np.ndarray:
        """Lower edges of bins 0 (the longest samples), 1, ..., int64."""
        edges = [self.max_length]
        while edges[-1] > 1:
            edges.append(min(math.ceil(edges[-1] * (1 - self.max_waste)), edges[-1] - 1))
        return np.array(edges)

    def bin(self, lengths: np.ndarray | int) -> np.ndarray:
        """Bin of each length (at least 1): the first whose lower edge it reaches."""
        return np.searchsorted(-self.edges, -np.asarray(lengths))

    def batch_size(self, bin_: int, most: int | None = None) -> int:
        """Number of samples of a bin that fit into the budget; without `fill`, at most `most`."""
        longest = self.edges[bin_] if self.crop or bin_ == 0 else self.edges[bin_ - 1] - 1
        fit = max(1, int(self.budget // longest))
        return fit if most is None or self.fill else min(fit, most)


class LengthBatchSampler(Sampler[list[Key]]):
    """Endless batches of samples of about the same length.

    Every bin is an endless sequence, a new permutation for each epoch, cut into full batches. Let r_j be the number of
    batches that one epoch of bin j fills. Cycle c holds the batches floor(c * r_j) to floor((c + 1) * r_j) of every
    bin j, in random order. In the long run every sample occurs equally often, and the cycle of a batch follows from
    its number.

    Args:
        lengths: (n,) of all samples.
        batching: bins, budget, cropping.
        batch_size: most samples in a batch; None = set by the budget. See `LengthBatching.fill`.
        seed: of the run.
        first_batch: where to start, counted over all ranks.
        rank: of this process; ranks take turns in one global order of batches.
        world_size: number of processes.
    """

    def __init__(
        self,
        *,
        lengths: np.ndarray,
        batching: LengthBatching,
        batch_size: int | None,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        bins = batching.bin(lengths)
        self.bins = np.unique(bins)
        self.members = [np.flatnonzero(bins == bin_) for bin_ in self.bins]
        self.sizes = [
            min(batching.batch_size(bin_, batch_size), len(members))
            for bin_, members in zip(self.bins, self.members, strict=True)
        ]
        self.crops = [int(edge) if batching.crop else None for edge in batching.edges[self.bins]]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bin -> latest epoch and its order of members
        self.seed = seed
        self.first_batch = first_batch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Key]]:
        number = self.first_batch + self.rank
        cycle = self._cycle_of(number)
        while True:
            start, batches = self._before(cycle), self._batches(cycle)
            while number < start + len(batches):
                yield self._keys(*batches[number - start])
                number += self.world_size
            cycle += 1

    def _before(self, cycle: int) -> int:
        """Number of batches before a cycle."""
        return sum(cycle * len(members) // size for members, size in zip(self.members, self.sizes, strict=True))

    def _cycle_of(self, number: int) -> int:
        low, high = 0, 1
        while self._before(high) <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= number else (low, middle)
        return low

    def _batches(self, cycle: int) -> list[tuple[int, int]]:
        """(bin, batch number within the bin) of one cycle, in order."""
        batches = [
            (bin_, batch)
            for bin_, (members, size) in enumerate(zip(self.members, self.sizes, strict=True))
            for batch in range(cycle * len(members) // size, (cycle + 1) * len(members) // size)
        ]
        order = generator(self.seed, "order", cycle).permutation(len(batches))
        return [batches[place] for place in order]

    def _keys(self, bin_: int, batch: int) -> list[Key]:
        members, size = self.members[bin_], self.sizes[bin_]
        keys = []
        # Cached between batches: drawing the order of millions of samples takes longer than a step.
        epoch, order = self._orders.get(bin_, (-1, members))
        for position in range(batch * size, (batch + 1) * size):
            if position // len(members) != epoch:
                epoch = position // len(members)
                order = generator(self.seed, "order", epoch, int(self.bins[bin_])).permutation(members)
            keys.append(Key(epoch, int(order[position % len(members)]), self.crops[bin_]))
        self._orders[bin_] = epoch, order
        return keys
