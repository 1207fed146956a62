"""The endless order of samples.

Epochs follow each other without an edge: batch number b of a rank holds fixed positions of one long sequence, which is
epoch after epoch a new permutation of all samples. Nothing is dropped and no batch is short, whatever the sizes, and
the position can be computed from the step alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data2vec_train.data.seeding import generator
from data2vec_train.errors import ConfigError


class Key(NamedTuple):
    """What a data set is asked for."""

    epoch: int
    index: int  # of a sample
    length: int | None = None  # to which its last axis is cropped; None = not at all


class EndlessBatchSampler(Sampler[list[Key]]):
    """Batches of keys, for ever.

    Args:
        num_samples: of the data set.
        batch_size: samples per batch on this rank.
        seed: of the run.
        first_batch: where to begin, counted over all ranks.
        rank: of this process; ranks share one global order, batch by batch.
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
    """How samples of different lengths share batches; lengths in units of the input (samples of sound, tokens).

    Lengths are sorted into bins whose edges differ by `max_waste`, and a batch takes its samples from one bin: then
    neither cropping to the bin's lower edge nor padding to its longest sample wastes more than that.

    Attributes:
        budget: the most a batch may hold, in total.
        max_length: longer samples are cropped to this.
        max_waste: largest share of a sample that is cropped off, or of a batch that is padding.
        crop: True crops all samples of a batch to one length, False pads them.
        fill: True lets short samples fill the budget, however many they are.
    """

    budget: int
    max_length: int
    max_waste: float
    crop: bool
    fill: bool = False

    def __post_init__(self) -> None:
        if self.budget < self.max_length:
            raise ConfigError(
                f"a batch of {self.budget} cannot hold the longest sample, {self.max_length}; raise the batch's budget "
                "or lower the longest length"
            )
        if not 0 < self.max_waste < 1:
            raise ConfigError(f"max_waste is a share between 0 and 1, got {self.max_waste}")

    @cached_property
    def edges(self) -> np.ndarray:
        """Lower edges of bins number 0 (the longest samples), 1, ..., int64."""
        edges = [self.max_length]
        while edges[-1] > 1:
            edges.append(min(math.ceil(edges[-1] * (1 - self.max_waste)), edges[-1] - 1))
        return np.array(edges)

    def bin(self, lengths: np.ndarray | int) -> np.ndarray:
        """Number of the bin of each length (at least 1): the first whose lower edge it reaches."""
        return np.searchsorted(-self.edges, -np.asarray(lengths))

    def batch_size(self, bin_: int, most: int | None = None) -> int:
        """How many samples of a bin fit into the budget, and unless they may fill it, no more than `most`."""
        longest = self.edges[bin_] if self.crop or bin_ == 0 else self.edges[bin_ - 1] - 1
        fit = max(1, int(self.budget // longest))
        return fit if most is None or self.fill else min(fit, most)


class LengthBatchSampler(Sampler[list[Key]]):
    """Endless batches of samples of about the same length.

    Every bin is an endless sequence of its own, epoch after epoch in a new order, cut into full batches. Cycle number
    c of the whole gives bin j its batches floor(c * r_j) to floor((c + 1) * r_j), with r_j the number of batches that
    one epoch of the bin fills, in random order: in the long run every sample comes equally often, and the cycle that
    holds a batch follows from its number.

    Args:
        lengths: (n,) of all samples.
        batching: bins, budget, cropping.
        batch_size: the most samples in a batch; None = as the budget allows. See `LengthBatching.fill`.
        seed: of the run.
        first_batch: where to begin, counted over all ranks.
        rank: of this process; ranks share one global order, batch by batch.
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
        self.members = [np.flatnonzero(bins == one) for one in self.bins]
        self.sizes = [
            min(batching.batch_size(one, batch_size), len(members))
            for one, members in zip(self.bins, self.members, strict=True)
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
        """How many batches come before a cycle."""
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
        """(bin, batch number within the bin) of one cycle, in the order in which they come."""
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
        # Kept from batch to batch: to draw the order of millions takes longer than a step.
        epoch, order = self._orders.get(bin_, (-1, members))
        for position in range(batch * size, (batch + 1) * size):
            if position // len(members) != epoch:
                epoch = position // len(members)
                order = generator(self.seed, "order", epoch, int(self.bins[bin_])).permutation(members)
            keys.append(Key(epoch, int(order[position % len(members)]), self.crops[bin_]))
        self._orders[bin_] = epoch, order
        return keys
