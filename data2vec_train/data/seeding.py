"""Random generators keyed by purpose, independent of when they are used.

Sample order, augmentation and masks come from counter-based generators keyed by (run seed, purpose, epoch, sample,
...). So they do not depend on worker count, prefetching or restarts, and no generator state has to be saved.
"""

from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

Purpose = Literal["order", "augment", "mask", "replace", "step", "crop", "corrupt", "equalise", "batch"]
_STREAMS: dict[Purpose, int] = {"order": 1, "augment": 2, "mask": 3, "replace": 4, "step": 5}
_STREAMS |= {"crop": 6, "corrupt": 7, "equalise": 8, "batch": 9}


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """An independent generator for this purpose and key."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, *key)))


def torch_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A 63-bit seed for torch for this purpose and key."""
    return int(_sequence(seed, purpose, *key).generate_state(1, np.uint64)[0] >> 1)


def _sequence(seed: int, purpose: Purpose, *key: int) -> np.random.SeedSequence:
    words = (seed, _STREAMS[purpose], *key)
    # numpy splits each number into words of 32 bits; if all fit into one word, an array takes half the time.
    return np.random.SeedSequence(np.array(words, dtype=np.uint32) if 0 <= min(words) <= max(words) < 2**32 else words)


@contextmanager
def torch_seeded(seed: int, purpose: Purpose, *key: int):
    """Seed torch's CPU generator for this purpose and key, and restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(seed, purpose, *key))
        yield
