"""From records to masked batches: order, repeatability, broken samples and what is held out."""

import itertools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data2vec_train.batch import Batch
from data2vec_train.data.collate import Collator
from data2vec_train.data.datamodule import DataModule
from data2vec_train.data.dataset import MAX_REPLACEMENTS, EvaluationDataset, Sample, StreamingDataset, TrainingDataset
from data2vec_train.data.identity import hashes_of_numbers
from data2vec_train.data.image import ImageTransform
from data2vec_train.data.quarantine import Quarantine
from data2vec_train.data.sampler import EndlessBatchSampler, Key, LengthBatching
from data2vec_train.data.seeding import generator, torch_seeded
from data2vec_train.data.sources.files import RawSample, Source, StreamingSource
from data2vec_train.data.split import UNLABELLED_HELD_OUT, choose
from data2vec_train.errors import BadSample, ConfigError, DataError
from data2vec_train.objective.masking import InverseBlockMasker, RandomMasker

GRID = (3, 4)
MASKER = RandomMasker(hidden_fraction=0.5)


def twelve(length: int) -> int:
    return 12


class Numbers(Source):
    """Record i is the number i; some are broken, each in one of three places."""

    class_names = ["even", "odd"]

    def __init__(self, count: int, broken: tuple[int, ...] = (), labelled: bool = False) -> None:
        self.count, self.broken, self.labelled = count, broken, labelled

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken and index % 3 == 0:
            raise BadSample("cannot be read")
        return RawSample(f"file{index}", np.array(index), index % 2 if self.labelled else None)

    def labels(self):
        return np.arange(self.count) % 2 if self.labelled else None


class Breaks:
    """Decoder and transform that know the broken records."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def decode(self, value):
        if int(value) in self.broken and value % 3 == 1:
            raise BadSample("cannot be decoded")
        return int(value)

    def train(self, number):
        if number in self.broken:
            raise BadSample("cannot be transformed")
        return torch.tensor([float(number), torch.rand(()).item()])

    def evaluate(self, number):
        return torch.tensor([float(number), 0.0])


def training_set(count: int = 10, broken: tuple[int, ...] = (), indices=None, seed: int = 0) -> TrainingDataset:
    stages = Breaks(broken)
    return TrainingDataset(
        source=Numbers(count, broken),
        indices=np.arange(count) if indices is None else np.array(indices),
        decode=stages.decode,
        transform=stages.train,
        seed=seed,
    )


def data_module(folder: Path, source, *, broken: tuple[int, ...] = (), **changes) -> DataModule:
    stages = Breaks(broken)
    options = {
        "test_source": None,
        "held_out_fraction": 0.2,
        "max_probe_samples": 1000,
        "batching": None,
        "batch_size_per_device": 4,
        "num_workers": 0,
        "prefetch_factor": 2,
        "max_bad_fraction": 0.5,
        "tolerated_bad_samples": 0,
        "seed": 0,
    }
    changes.setdefault("collator", collator(masks_per_sample=2))
    fixed = {"decode": stages.decode, "transform": stages, "quarantine_path": folder / "quarantine.jsonl"}
    return DataModule(source=source, **fixed | options | changes)


def first(loader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), count))


# ------------------------------------------------------------------------------------------------------------- order


def keys_of(count: int, *, batches: int, batch_size: int, world_size: int = 1, **options) -> list[list]:
    """Keys in global order: batch by batch, rank by rank."""
    ranks = [
        EndlessBatchSampler(num_samples=count, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    rows = zip(*(itertools.islice(sampler, batches) for sampler in ranks), strict=True)
    return [key for row in rows for keys in row for key in keys]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_epoch_has_each_sample_once_and_no_batch_is_short(count, batch_size, world_size):
    keys = keys_of(count, batches=9, batch_size=batch_size, world_size=world_size, seed=0)
    assert len(keys) == 9 * batch_size * world_size
    for epoch in range(len(keys) // count):
        part = keys[epoch * count : (epoch + 1) * count]
        assert {key.epoch for key in part} == {epoch}
        assert sorted(key.index for key in part) == list(range(count))


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    def order(epoch, **options):
        return [
            key.index for key in keys_of(20, batches=10, batch_size=4, **{"seed": 0} | options) if key.epoch == epoch
        ]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    # Ranks share one order: more ranks with smaller batches see the same sequence.
    assert order(0) == [
        key.index for key in keys_of(20, batches=10, batch_size=2, world_size=2, seed=0) if key.epoch == 0
    ]


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_first_batch_continues_exactly(start):
    options = {"num_samples": 10, "batch_size": 4, "seed": 3, "rank": 1, "world_size": 2}
    whole = list(itertools.islice(EndlessBatchSampler(**options), 12))
    resumed = list(itertools.islice(EndlessBatchSampler(first_batch=2 * start, **options), 12 - start))
    assert resumed == whole[start:]


# ------------------------------------------------------------------------------------------------------------- masks


def collator(masks_per_sample: int = 3, seed: int = 0, masker=MASKER) -> Collator:
    return Collator(masker=masker, masks_per_sample=masks_per_sample, grid=GRID, token_count=twelve, seed=seed)


def sample(number: int, epoch: int = 0) -> Sample:
    return Sample(torch.tensor([float(number)]), epoch, number, None, ())


def test_a_mask_depends_on_seed_epoch_sample_and_view_only():
    together = collator()([sample(5), sample(6), sample(7)]).masks.masked  # (B, M, T)
    assert torch.equal(collator()([sample(6)]).masks.masked[0], together[1])
    assert torch.equal(collator()([sample(7), sample(6)]).masks.masked[1], together[1])
    assert torch.equal(collator(masks_per_sample=1)([sample(6)]).masks.masked[0], together[1, :1])
    for other in (collator()([sample(6, epoch=1)]), collator(seed=1)([sample(6)]), collator()([sample(8)])):
        assert not torch.equal(other.masks.masked[0], together[1])
    assert len({tuple(row.tolist()) for row in together.flatten(0, 1)}) > 6


def test_index_forms_say_the_same_as_the_masks():
    masks = collator()([sample(n) for n in range(4)]).masks
    rows = masks.masked.flatten(0, 1)
    assert masks.hidden.tolist() == [
        12 * row + position for row in range(12) for position in range(12) if rows[row, position]
    ]
    assert masks.visible.tolist() == [[p for p in range(12) if not row[p]] for row in rows]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    broken = (3, 4, 5)
    results = []
    for num_workers in (0, workers):
        torch.manual_seed(num_workers)
        data = data_module(tmp_path, Numbers(11, broken), broken=broken, num_workers=num_workers)
        results.append(first(data.train_dataloader(), 7))
    for batch, other in zip(*results, strict=True):
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(batch.masks.masked, other.masks.masked)
        assert torch.equal(batch.ids, other.ids)
        assert batch.rejected == other.rejected


def test_augmentation_is_new_in_every_epoch_and_leaves_the_global_generator_alone():
    data = training_set()
    before = torch.get_rng_state()
    data[Key(0, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(data[Key(0, 3)].inputs, data[Key(0, 3)].inputs)
    assert data[Key(0, 3)].inputs[0] == data[Key(1, 3)].inputs[0] == 3
    assert data[Key(0, 3)].inputs[1] != data[Key(1, 3)].inputs[1]
    with torch_seeded(0, "augment", 0, 3):
        assert data[Key(0, 3)].inputs[1] == torch.rand(())


def test_labels_and_ids_travel_with_their_samples():
    samples = [Sample(torch.tensor([n]), 0, n, n % 2, ()) for n in (4, 7)]
    batch = collator()(samples)
    assert (batch.ids.tolist(), batch.labels.tolist()) == ([4, 7], [0, 1])
    assert collator()([*samples, sample(3)]).labels is None
    assert collator(masker=None)(samples).masks is None


# ---------------------------------------------------------------------------------------------------- broken samples


def test_broken_samples_are_replaced_deterministically_and_reported():
    broken = (3, 4, 5)
    data, again = training_set(10, broken), training_set(10, broken)
    reasons = {"#3": "cannot be read", "file4": "cannot be decoded", "file5": "cannot be transformed"}
    for epoch, index in itertools.product(range(3), range(10)):
        got, repeated = data[Key(epoch, index)], again[Key(epoch, index)]
        assert got.id not in broken
        assert got.inputs[0] == got.id
        assert torch.equal(got.inputs, repeated.inputs)
        assert got.rejected == repeated.rejected
        assert all(reasons[key] == reason for key, reason in got.rejected)
        assert (got.id == index and not got.rejected) == (index not in broken)
        if index in broken:
            assert got.rejected[0][1] == reasons["#3" if index == 3 else f"file{index}"]
    assert len({data[Key(epoch, 3)].id for epoch in range(20)}) > 3  # not always the same stand-in


def test_replacements_come_from_the_training_indices():
    data = training_set(10, broken=(3,), indices=[1, 3, 8])
    assert {data[Key(epoch, 1)].id for epoch in range(30)} == {1, 8}


def test_where_batches_are_padded_no_replacement_is_longer_than_what_it_replaces():
    data = training_set(100, broken=tuple(range(1, 80, 3)))
    data.source.lengths = np.repeat([1_000, 20_000], [80, 20])
    assert max(data[Key(epoch, 1)].id for epoch in range(100)) < 80, "a batch of many short ones would be padded"
    assert max(data[Key(epoch, 79)].id for epoch in range(100)) < 80


def test_a_sample_without_usable_replacement_is_left_out_of_its_batch():
    hopeless = training_set(3, broken=(0, 1, 2))[Key(0, 1)]
    assert hopeless.inputs is None
    assert len(hopeless.rejected) == MAX_REPLACEMENTS + 1
    batch = collator()([sample(4), hopeless, sample(6)])
    assert batch.ids.tolist() == [4, 6]
    assert batch.masks.masked.shape[0] == len(batch) == 2
    assert batch.rejected == hopeless.rejected
    assert len(collator()([hopeless])) == 0


def test_evaluation_goes_through_all_records_in_order_and_skips_broken_ones():
    broken, stages = (3, 4), Breaks((3, 4))
    data = EvaluationDataset(
        source=Numbers(6, broken, labelled=True),
        indices=np.array([5, 4, 3, 0]),
        decode=stages.decode,
        transform=stages.evaluate,
    )
    loader = DataLoader(data, batch_size=4, collate_fn=collator(masker=None))
    (batch,) = loader
    assert batch.ids.tolist() == [5, 0]
    assert batch.labels.tolist() == [1, 0]
    assert batch.rejected == (("file4", "cannot be decoded"), ("#3", "cannot be read"))


# --------------------------------------------------------------------------------------------------------- quarantine


def quarantine(folder: Path, *, num_samples: int | None = 10, max_bad_fraction: float = 0.2) -> Quarantine:
    return Quarantine(path=folder / "q.jsonl", num_samples=num_samples, max_bad_fraction=max_bad_fraction, tolerated=0)


def test_quarantine_lists_each_broken_sample_once(tmp_path):
    list_ = quarantine(tmp_path)
    list_.add((), num_good=4)
    assert not list_.path.exists()
    list_.add((("a/ü.png", "truncated"), ("b", "empty"), ("a/ü.png", "truncated")), num_good=4)
    list_.add((("b", "empty"),), num_good=4)
    lines = [json.loads(line) for line in list_.path.read_text().splitlines()]
    assert lines == [{"key": "a/ü.png", "reason": "truncated"}, {"key": "b", "reason": "empty"}]


def test_more_broken_samples_than_allowed_stop_the_run(tmp_path):
    list_ = quarantine(tmp_path)
    list_.add((("a", "truncated"), ("b", "empty")), num_good=1)  # 2 of 10 are 0.2: allowed
    with pytest.raises(DataError, match=r"3 of 10 .*max_bad_fraction=0\.2.*a: truncated.*q\.jsonl"):
        list_.add((("c", "empty"),), num_good=1)
    assert len(list_.path.read_text().splitlines()) == 3


def test_nothing_broken_is_allowed_when_the_fraction_is_0(tmp_path):
    list_ = quarantine(tmp_path, max_bad_fraction=0.0)
    list_.add((), num_good=1)
    with pytest.raises(DataError, match="1 of 10"):
        list_.add((("a", "empty"),), num_good=1)


def test_a_stream_is_judged_as_if_it_had_a_thousand_samples_at_least(tmp_path):
    list_ = quarantine(tmp_path, num_samples=None, max_bad_fraction=0.1)
    list_.add(tuple((str(n), "empty") for n in range(100)), num_good=1)  # 100 of 101, but the stream has just begun
    with pytest.raises(DataError, match="101 of 103"):
        list_.add((("one more", "empty"),), num_good=1)


def test_the_share_of_a_stream_that_is_broken_is_that_of_all_processes(tmp_path, monkeypatch):
    everywhere, all_there = [], threading.Barrier(4)

    def gather(answers: list, mine: object) -> None:
        everywhere.append(mine)
        all_there.wait(timeout=60)
        answers[:] = everywhere

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    lists = [quarantine(tmp_path, num_samples=None, max_bad_fraction=0.01) for _ in range(4)]
    for rank, list_ in enumerate(lists):
        list_.add(tuple((f"{rank}-{n}", "empty") for n in range(6)), num_good=994)
    with ThreadPoolExecutor(4) as processes:
        list(processes.map(Quarantine.share, lists))
    for list_ in lists:
        list_.add((), num_good=1)  # 24 of 4,000 are 0.006: allowed
        assert len(list_.reasons) == 24
    with pytest.raises(DataError, match="41 of 4018"):
        lists[0].add(tuple((f"new {n}", "empty") for n in range(17)), num_good=0)


def test_only_the_first_process_cuts_off_an_unfinished_line(tmp_path, monkeypatch):
    path = tmp_path / "q.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea')
    for rank, size in ((1, 2), (0, 1)):
        monkeypatch.setattr("data2vec_train.data.quarantine.rank_zero_only.rank", rank, raising=False)
        assert quarantine(tmp_path).written == {"a"}
        assert len(path.read_text().splitlines()) == size


def test_a_training_run_reports_broken_samples_through_the_quarantine(tmp_path):
    broken = (3, 4, 5)
    data = data_module(tmp_path, Numbers(11, broken), broken=broken, held_out_fraction=0.0)
    batches = first(data.train_dataloader(), 6)
    for batch in batches:
        assert data.on_before_batch_transfer(batch, 0) is batch
        assert len(batch) == 4
        assert not set(batch.ids.tolist()) & set(broken)
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["#3", "file4", "file5"]


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_samples_end_in_an_error_that_names_one(tmp_path, workers):
    broken = tuple(range(5))
    data = data_module(
        tmp_path, Numbers(5, broken), broken=broken, max_bad_fraction=1.0, num_workers=workers, held_out_fraction=0.0
    )
    (batch,) = first(data.train_dataloader(), 1)
    assert len(batch) == 0
    with pytest.raises(DataError, match="5 of 5 .*nothing usable was found.*cannot be"):
        data.on_before_batch_transfer(batch, 0)


# ------------------------------------------------------------------------------------------------------------ held out


def test_held_out_records_never_train_and_are_what_probes_are_tested_on(tmp_path):
    data = data_module(tmp_path, Numbers(50, labelled=True))
    held_out = set(data.test_set.indices.tolist())
    assert 5 <= len(held_out) <= 15  # about 20 %
    assert {number % 2 for number in held_out} == {0, 1}
    epoch = 50 - len(held_out)
    trained = [number for batch in first(data.train_dataloader(), 3 * epoch) for number in batch.ids.tolist()]
    assert len(trained) == 4 * 3 * epoch  # twelve epochs of the others, in batches of 4
    assert Counter(trained) == {number: 12 for number in range(50) if number not in held_out}
    assert set(data.fit_set.indices.tolist()) == set(trained)
    assert data.num_samples == epoch
    assert data.class_names == ["even", "odd"]


def test_broken_records_are_not_replaced_by_held_out_ones(tmp_path):
    broken = tuple(range(0, 20))
    data = data_module(tmp_path, Numbers(50, broken, labelled=True), broken=broken, max_bad_fraction=1.0)
    held_out = set(data.test_set.indices.tolist())
    for batch in first(data.train_dataloader(), 30):
        assert not held_out & set(batch.ids.tolist())


def test_rows_are_not_searched_again_for_every_class(monkeypatch):
    labels = np.random.default_rng(0).integers(-1, 500, 5_000)
    searched = []
    search = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda values: searched.append(1) or search(values))
    origins = hashes_of_numbers(len(labels))
    rows = choose(origins, labels, 0.1).rows(origins, labels)
    assert len(searched) < 5, "with 20,000 classes of ten million files it takes minutes"
    assert len(rows) == pytest.approx(0.1 * (labels >= 0).sum(), rel=0.15)
    assert (labels[rows] >= 0).all()
    unknown = np.full(5, -1)
    assert len(choose(origins[:5], unknown, 0.5).rows(origins[:5], unknown)) == 0


def test_what_is_held_out_does_not_depend_on_the_seed_of_the_run(tmp_path):
    first_data, other = (data_module(tmp_path, Numbers(50, labelled=True), seed=seed) for seed in (0, 1))
    assert first_data.test_set.indices.tolist() == other.test_set.indices.tolist()


def test_probes_see_at_most_so_many_samples_of_all_classes(tmp_path):
    data = data_module(tmp_path, Numbers(200, labelled=True), max_probe_samples=15)
    assert len(data.fit_set) == len(data.test_set) == 15
    assert not set(data.fit_set.indices.tolist()) & set(data.test_set.indices.tolist())
    assert {int(index) % 2 for index in data.fit_set.indices} == {0, 1}


def test_a_test_source_leaves_the_whole_source_for_training(tmp_path):
    data = data_module(tmp_path, Numbers(20, labelled=True), test_source=Numbers(7, labelled=True))
    assert data.num_samples == 20
    assert len(data.test_set) == 7
    assert data.test_set.source is not data.fit_set.source


def test_without_labels_there_are_no_probes_and_a_part_is_held_out_for_the_pretext_task(tmp_path):
    data = data_module(tmp_path, Numbers(20))
    held_out = data.held_out_set.indices
    assert 0 < len(held_out) < 15  # which follows from the names, and is a fifth on average
    assert data.num_samples == 20 - len(held_out)
    assert sorted([*held_out, *data.indices]) == list(range(20))
    assert data.test_set is None
    assert data.class_names is None
    subset = data.training_subset(5)
    assert len(subset) == 5
    assert len(data.training_subset(100)) == data.num_samples
    everything = data_module(tmp_path, Numbers(20), held_out_fraction=0.0)
    assert (everything.num_samples, everything.held_out_set) == (20, None)
    many = data_module(tmp_path, Numbers(10_000))
    assert 10_000 - UNLABELLED_HELD_OUT <= many.num_samples <= 10_000 - 0.3 * UNLABELLED_HELD_OUT


def test_evaluation_batches_are_plain_and_in_order(tmp_path):
    data = data_module(tmp_path, Numbers(50, labelled=True))
    (batch,) = data.evaluation_batches(data.test_set)
    assert batch.masks is None
    assert batch.ids.tolist() == data.test_set.indices.tolist()
    assert (batch.inputs[:, 1] == 0).all()  # no augmentation
    assert batch.labels.tolist() == [number % 2 for number in batch.ids.tolist()]


def test_broken_records_are_noted_when_probes_meet_them(tmp_path):
    broken = (0, 1, 2, 3, 4)
    data = data_module(tmp_path, Numbers(50, broken, labelled=True), broken=broken, held_out_fraction=0.5)
    ids = [n for part in (data.fit_set, data.test_set) for b in data.evaluation_batches(part) for n in b.ids.tolist()]
    # A training transform can fail where the evaluation transform does not: 2 is usable here.
    assert sorted(ids) == [2, *range(5, 50)]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["#0", "#3", "file1", "file4"]


def test_a_broken_record_alone_in_the_last_evaluation_batch_is_left_out(tmp_path):
    last = 192
    test = Numbers(last + 1, (last,), labelled=True)
    data = data_module(tmp_path, Numbers(20, labelled=True), test_source=test, broken=(last,), max_bad_fraction=0.5)
    assert len(data.test_set) == 3 * 64 + 1  # batches of 64
    assert data.test_set.indices[-1] == last
    assert sum(len(batch) for batch in data.evaluation_batches(data.test_set)) == 3 * 64


def test_a_source_whose_labels_are_all_missing_trains_without_probes(tmp_path):
    class Missing(Numbers):
        def labels(self):
            return np.full(self.count, -1)

    data = data_module(tmp_path, Missing(20, labelled=True))
    assert data.num_samples == 20
    assert data.test_set is None


def test_settings_that_do_not_fit_the_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"held_out_fraction: expected a number from 0 to below 1, got 1"):
        data_module(tmp_path, Numbers(20, labelled=True), held_out_fraction=1)
    with pytest.raises(ConfigError, match="test_source has no labels"):
        data_module(tmp_path, Numbers(20, labelled=True), test_source=Numbers(7))
    with pytest.raises(DataError, match="no samples"):
        data_module(tmp_path, Numbers(0))


# ----------------------------------------------------------------------------------------------------------- streams


class Stream(StreamingSource):
    """Numbers dealt out to workers and ranks; an order of its own for every epoch."""

    class_names = None

    def __init__(self, count: int) -> None:
        self.count = count

    def stream(self, *, epoch, seed, worker, num_workers, rank, world_size):
        order = np.random.default_rng((seed, epoch)).permutation(self.count)
        for number in order[rank * num_workers + worker :: num_workers * world_size]:
            yield RawSample(f"n{number}", np.array(number))


def stream_set(count: int, broken: tuple[int, ...] = (), **options) -> StreamingDataset:
    stages = Breaks(broken)
    return StreamingDataset(source=Stream(count), decode=stages.decode, transform=stages.train, seed=0, **options)


def test_a_stream_never_ends_and_has_every_sample_in_each_epoch():
    samples = list(itertools.islice(stream_set(5), 23))
    numbers = [int(s.inputs[0]) for s in samples]
    for epoch in range(4):
        assert sorted(numbers[5 * epoch : 5 * epoch + 5]) == list(range(5))
        assert {s.epoch for s in samples[5 * epoch : 5 * epoch + 5]} == {epoch}
    inputs_of = {(s.epoch, s.id): s.inputs for s in samples}
    assert len(inputs_of) == 23
    # The same sample of the same epoch is augmented alike, whoever reads it.
    for rank in range(2):
        for s in itertools.islice(stream_set(5, rank=rank, world_size=2), 8):
            if (s.epoch, s.id) in inputs_of:
                assert torch.equal(s.inputs, inputs_of[s.epoch, s.id])


def test_broken_samples_of_a_stream_are_reported_with_the_next_good_one():
    samples = list(itertools.islice(stream_set(6, broken=(1, 2)), 12))
    assert {int(s.inputs[0]) for s in samples} == {0, 3, 4, 5}
    reported = Counter(key for s in samples for key, _ in s.rejected)
    assert set(reported) == {"n1", "n2"}
    assert max(reported.values()) <= 4


def test_a_stream_of_broken_samples_says_so_instead_of_spinning():
    (nothing,) = itertools.islice(stream_set(3, broken=(0, 1, 2)), 1)
    assert nothing.inputs is None
    assert len(nothing.rejected) == MAX_REPLACEMENTS + 1


def test_broken_records_in_a_row_make_no_batch_of_a_stream_sorted_by_length(tmp_path):
    """data.max_bad_fraction decides about them, not how they lie."""
    batching = LengthBatching(budget=9, max_length=3, max_waste=0.3, crop=False)
    order = np.random.default_rng((0, 0)).permutation(400)  # of `Stream` in its first epoch
    broken = tuple(order[9 : 9 + 2 * MAX_REPLACEMENTS + 2].tolist())
    batches = list(itertools.islice(stream_set(400, broken, batching=batching, batch_size=4), 300))
    assert all(any(sample.inputs is not None for sample in batch) for batch in batches)
    found = [key for batch in batches for sample in batch for key, _ in sample.rejected]
    assert set(found) == {f"n{number}" for number in broken}

    nothing = next(iter(stream_set(3, (0, 1, 2), batching=batching, batch_size=4)))
    assert all(sample.inputs is None for sample in nothing)


def test_a_worker_without_a_share_of_the_stream_ends():
    assert list(stream_set(2, rank=2, world_size=3)) == []


def test_a_stream_trains_without_length_and_without_probes(tmp_path):
    masker = InverseBlockMasker(hidden_fraction=0.5, adjust_fraction=0.1, block_patches=2)
    data = data_module(tmp_path, Stream(6), num_workers=2, collator=collator(masks_per_sample=2, masker=masker))
    batches = first(data.train_dataloader(), 7)
    assert [len(batch) for batch in batches] == [4] * 7
    assert data.num_samples is None
    assert data.test_set is None
    assert data.training_subset(5) is None
    assert all(batch.masks.masked.shape == (4, 2, 12) for batch in batches)


@pytest.mark.parametrize("batching", [None, LengthBatching(budget=9, max_length=3, max_waste=0.3, crop=False)])
def test_a_stream_goes_on_where_each_worker_stood(batching):
    """The next samples are those that would have come; those in a pool of lengths may come twice, none is lost."""

    def samples(number: int, **options) -> list[Sample]:
        found = stream_set(40, batching=batching, batch_size=None if batching is None else 4, **options)
        items = itertools.islice(found, number)
        return list(items) if batching is None else [sample for batch in items for sample in batch]

    whole = samples(100)
    for stop in (1, 7, 39, 40, 41, 63):
        before = samples(stop)
        worker, *place = before[-1].place
        after = samples(100 - stop, places={worker: tuple(place)})
        keys = [(sample.epoch, sample.id) for sample in before + after]
        if batching is None:
            assert keys == [(sample.epoch, sample.id) for sample in whole]
        else:
            first = {key for key in keys if key[0] == 0}
            assert first == {(sample.epoch, sample.id) for sample in whole if sample.epoch == 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_that_is_killed_ends_in_the_same_bits(workers, tmp_path):
    from tests.test_saving import Killed, Run, Stop, assert_same, kill

    def run(folder: Path, **options) -> Run:
        made = Run(folder, workers=workers, **options)
        made.data.source = StreamedNoise()
        return made

    whole = run(tmp_path / "whole").fit()
    for step in (2, 5):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            run(folder, callbacks=(Stop(step, kill),)).fit()
        assert_same(run(folder).fit(), whole)


class StreamedNoise(StreamingSource):
    class_names = None

    def stream(self, *, epoch, seed, worker, num_workers, rank, world_size):
        images = np.random.default_rng((seed, epoch)).normal(size=(22, 1, 8, 12)).astype(np.float32)
        for number in range(rank * num_workers + worker, 22, num_workers * world_size):
            yield RawSample(f"n{number}", images[number])


# ----------------------------------------------------------------------------------------------------------- on device


class Pictures(Source):
    """Eight images of noise."""

    rejected = left_out = ()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return RawSample(str(index), np.random.default_rng(index).integers(0, 256, (9, 9), dtype=np.uint8), None)

    def labels(self):
        return None


def images(**changes) -> ImageTransform:
    options = {"image_px": 8, "channels": 1, "crop_scale": [0.5, 1.0], "crop_ratio": [0.8, 1.2], "shift_px": 1}
    options |= {"horizontal_flip": 0.5, "color_jitter": None, "interpolation": "bicubic", "mean": [0.4], "std": [0.3]}
    return ImageTransform(**options | changes)


def unchanged(value):
    return value


@pytest.mark.parametrize("workers", [0, 1])
def test_normalising_on_the_device_changes_no_input_and_only_bytes_travel(tmp_path, workers):
    batches = []
    for on_device in (False, True):
        data = data_module(tmp_path, Pictures(), transform=images(), decode=unchanged, on_device=on_device,
                           num_workers=workers)  # fmt: skip
        for batch in first(data.train_dataloader(), 4):
            assert (batch.inputs.dtype == torch.uint8) == on_device
            batches.append(data.on_after_batch_transfer(batch, 0).inputs)
    assert all(torch.equal(batch, other) for batch, other in zip(batches[:4], batches[4:], strict=True))


def test_what_cannot_travel_as_bytes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.on_device=true works only for images"):
        data_module(tmp_path, Numbers(8), on_device=True)
    with pytest.raises(ConfigError, match=r"set modality\.augment\.erase=0"):
        data_module(tmp_path, Pictures(), transform=images(erase=0.5), on_device=True)


def test_numbers_of_one_word_and_of_several_seed_as_numpy_has_it():
    for key in ((0, 0), (5, 2**32 - 1), (1, 2**32), (2**70, 3)):
        expected = np.random.SeedSequence((7, 3, *key)).generate_state(4)
        assert (generator(7, "mask", *key).bit_generator.seed_seq.generate_state(4) == expected).all()
