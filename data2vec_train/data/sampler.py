"""The endless order of samples.

Epochs follow each other without an edge: batch number b of a rank holds fixed positions of one long sequence, which is
epoch after epoch a new permutation of all samples. Nothing is dropped and no batch is short, whatever the sizes, and
the position can be computed from the step alone.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from data2vec_train.data.seeding import generator

Key = tuple[int, int]  # (epoch, index of a sample)


class EndlessBatchSampler(Sampler[list[Key]]):
    """Batches of (epoch, index) keys, for ever.

    Args:
        num_samples: of the data set.
        batch_size: samples per batch on this rank.
        seed: of the run.
        first_batch: where to begin.
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
        batch = self.first_batch
        while True:
            start = (batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(start, start + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = generator(self.seed, "order", epoch).permutation(self.num_samples)
                keys.append((epoch, int(order[position % self.num_samples])))
            yield keys
            batch += 1
