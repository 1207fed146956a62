"""Batches of samples of about the same length."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data2vec_train.config.build import build
from data2vec_train.data import sampler as sampler_module
from data2vec_train.data.sampler import LengthBatching, LengthBatchSampler
from data2vec_train.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(1_000, 40_000, size=500)
CROP = LengthBatching(budget=100_000, max_length=32_000, max_waste=0.05, crop=True)
PAD = LengthBatching(budget=100_000, max_length=40_000, max_waste=0.05, crop=False)


def sampler(batching: LengthBatching = CROP, lengths: np.ndarray = LENGTHS, **options) -> LengthBatchSampler:
    return LengthBatchSampler(lengths=lengths, batching=batching, **{"batch_size": None, "seed": 0} | options)


def one_cycle(batches: LengthBatchSampler) -> list:
    return list(itertools.islice(batches, batches._before(1)))


def wasted(keys: list, lengths: np.ndarray, batching: LengthBatching) -> float:
    """Share of a batch's samples that is cropped off, or padding; what exceeds the longest crop is no waste."""
    have = np.minimum(lengths[[key.index for key in keys]], batching.max_length)
    if batching.crop:
        return 1 - sum(key.length for key in keys) / have.sum()
    return 1 - have.sum() / (len(have) * have.max())


@pytest.mark.parametrize("batching", [CROP, PAD], ids=["crop", "pad"])
def test_no_batch_exceeds_the_budget_or_wastes_more_than_allowed(batching):
    for keys in itertools.islice(sampler(batching), 300):
        longest = max(min(LENGTHS[key.index], batching.max_length) for key in keys)
        used = len(keys) * (keys[0].length if batching.crop else longest)
        assert 0 < used <= batching.budget
        assert wasted(keys, LENGTHS, batching) < 0.05
        if batching.crop:
            assert len({key.length for key in keys}) == 1
            assert all(LENGTHS[key.index] >= key.length for key in keys)
        else:
            assert all(key.length is None for key in keys)


def test_every_sample_comes_equally_often():
    batches = sampler()
    cycles = 40
    seen = Counter(key.index for keys in itertools.islice(batches, batches._before(cycles)) for key in keys)
    assert len(seen) == len(LENGTHS)
    assert min(seen.values()) >= cycles - 1 - max(batches.sizes) / min(map(len, batches.members))
    assert max(seen.values()) <= cycles + 1


def test_each_epoch_of_a_bin_has_each_sample_once():
    batches = sampler()
    seen = Counter((key.epoch, key.index) for keys in itertools.islice(batches, batches._before(7)) for key in keys)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("start", [0, 1, 17, 250])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_place_in_the_order_follows_from_the_batch_number(start, world_size):
    options = {"rank": world_size - 1, "world_size": world_size}
    whole = list(itertools.islice(sampler(**options), start + 20))
    assert list(itertools.islice(sampler(first_batch=start * world_size, **options), 20)) == whole[start:]


def test_ranks_share_one_order():
    alone = list(itertools.islice(sampler(), 60))
    ranks = [list(itertools.islice(sampler(rank=rank, world_size=3), 20)) for rank in range(3)]
    assert [keys for row in zip(*ranks, strict=True) for keys in row] == alone


def test_the_order_of_a_bin_is_drawn_once_per_epoch_and_not_for_every_batch(monkeypatch):
    drawn = []
    draw = sampler_module.generator
    monkeypatch.setattr(sampler_module, "generator", lambda *key: drawn.append(key) or draw(*key))
    list(itertools.islice(sampler(lengths=np.full(10_000, 32_000)), 3_000))  # of 3 samples each
    assert len(drawn) <= 4, "with ten million samples a draw takes half a second"


def test_order_and_company_change_from_epoch_to_epoch():
    batches = sampler()
    first, second = one_cycle(batches), list(itertools.islice(batches, batches._before(1), batches._before(2)))
    assert {key.index for keys in first for key in keys} & {key.index for keys in second for key in keys}
    groups = [{frozenset(key.index for key in keys) for keys in part if len(keys) > 1} for part in (first, second)]
    assert len(groups[0] & groups[1]) < 0.3 * len(groups[0])  # bins of one batch keep their company


def test_batch_size_limits_the_number_of_samples():
    assert max(len(keys) for keys in itertools.islice(sampler(batch_size=3), 100)) == 3


def test_lengths_that_are_all_alike_fill_the_budget():
    keys = next(iter(sampler(lengths=np.full(50, 10_000))))
    assert CROP.budget * 0.9 < len(keys) * keys[0].length <= CROP.budget


def test_a_budget_below_the_longest_sample_is_refused():
    with pytest.raises(ConfigError, match="cannot hold the longest"):
        LengthBatching(budget=10, max_length=11, max_waste=0.1, crop=True)


@pytest.mark.parametrize("length", [1, 2, 3, 19, 20, 21, 31_999, 32_000, 32_001, 100_000])
def test_a_length_reaches_the_edge_of_its_bin_and_not_the_next(length):
    bin_ = int(CROP.bin(length))
    assert CROP.edges[bin_] <= length
    assert bin_ == 0 or CROP.edges[bin_ - 1] > length


def test_batches_of_spoken_digits_waste_less_than_five_percent(composed):
    # Durations of the 2,700 training recordings of the Free Spoken Digit Dataset, 8 kHz.
    frames = np.load(Path(__file__).parent / "spoken_digits_frames.npy")
    batching = build(composed("modality=audio", "modality.sample_rate_hz=8000").modality.batching)
    shares = [wasted(keys, frames, batching) for keys in one_cycle(sampler(batching, frames))]
    assert max(shares) < 0.05  # measured: 2.0 % on average, 3.2 % at most, in 63 batches
