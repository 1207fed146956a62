"""Maskers against 2,000 draws of the original programs (`statistics.json`).

A mean of 2,000 masks of ours may differ from the recorded one by 4 standard errors, 4 * std / sqrt(2000). That the
recorded value is itself an estimate from 2,000 draws is not allowed for.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import data2vec_train.objective.masking as masking
from data2vec_train.objective.masking import (
    Block1dMasker,
    BlockMasker,
    InverseBlockMasker,
    RandomMasker,
    SpanMasker,
    TokenCorruption,
)

RECORDED = json.loads((Path(__file__).parent / "statistics.json").read_text())
DRAWS = 2000
V1 = {"n120_min16_max196": 120, "n75_min16_max196": 75, "n75_min16_maxNone": 75}
BEIT = BlockMasker(hidden_fraction=120 / 196, min_block_fraction=16 / 196, min_aspect=0.3)
INVERSE = InverseBlockMasker(hidden_fraction=0.8, adjust_fraction=0.07, block_patches=3)
RANDOM = RandomMasker(hidden_fraction=0.48)


def draw(masker, grid: tuple[int, int], seed: int = 0, count: int = DRAWS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([masker(grid[0] * grid[1], grid, rng) for _ in range(count)]).reshape(count, *grid)


def assert_same_mean(ours: float, recorded: float, std: float) -> None:
    assert abs(ours - recorded) < 4 * std / np.sqrt(DRAWS), f"{ours:.4f}, recorded {recorded:.4f}"


def assert_same_probability(ours: np.ndarray, recorded: float) -> None:
    assert ours.shape == (DRAWS,)
    assert_same_mean(ours.mean(), recorded, np.sqrt(recorded * (1 - recorded)))


def ratio_and_std(amounts: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum(amounts) / sum(counts) over masks, and the std per mask that gives its standard error (delta method)."""
    ratio = amounts.sum() / counts.sum()
    return ratio, (amounts - ratio * counts).std() / counts.mean()


def neighbours(kept: np.ndarray) -> np.ndarray:
    padded = np.pad(kept, ((0, 0), (1, 1), (1, 1))).astype(int)
    return padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]


# ---------------------------------------------------------------------------------------------------- 1.0, rectangles


@pytest.fixture(scope="module", params=V1)
def blocks(request) -> tuple[np.ndarray, dict]:
    masker = BlockMasker(hidden_fraction=V1[request.param] / 196, min_block_fraction=16 / 196, min_aspect=0.3)
    return draw(masker, (14, 14)), RECORDED["v1_vision_block"][request.param]


def test_block_masks_hide_as_many_patches_as_the_original(blocks):
    hidden, recorded = blocks
    counts = hidden.sum(axis=(1, 2))
    assert counts.max() == recorded["count_max"]
    assert_same_mean(counts.mean(), recorded["count_mean"], recorded["count_std"])
    assert counts.std() == pytest.approx(recorded["count_std"], rel=0.2)
    assert_same_probability(counts == recorded["count_max"], recorded["share_exact"])


def test_block_masks_lie_where_the_original_puts_them(blocks):
    hidden, recorded = blocks
    assert_same_probability(hidden[:, 0, 0], recorded["prob_map_corner"])
    assert_same_probability(hidden[:, 7, 7], recorded["prob_map_center"])
    # The four corners are alike: a block that never touches an edge shows in one of them.
    for row, column in ((0, -1), (-1, 0), (-1, -1)):
        assert_same_probability(hidden[:, row, column], recorded["prob_map_corner"])


def test_block_masks_have_runs_of_the_original_length(blocks):
    hidden, recorded = blocks
    starts = hidden & ~np.pad(hidden, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    length, std = ratio_and_std(hidden.sum(axis=(1, 2)), starts.sum(axis=(1, 2)))
    assert_same_mean(length, recorded["horizontal_run_len_mean"], std)
    columns = hidden & ~np.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # height and width are drawn alike
    length, std = ratio_and_std(hidden.sum(axis=(1, 2)), columns.sum(axis=(1, 2)))
    assert_same_mean(length, recorded["horizontal_run_len_mean"], std)


# ------------------------------------------------------------------------------------------------ 2.0, squares stay


@pytest.fixture(scope="module", params=RECORDED["v2_vision_block2d"])
def squares(request) -> tuple[np.ndarray, np.ndarray, dict]:
    """Kept patches, how many the squares alone had kept, and the recording."""
    recorded = RECORDED["v2_vision_block2d"][request.param]
    masker = InverseBlockMasker(
        hidden_fraction=recorded["mask_prob"],
        adjust_fraction=recorded["mask_prob_adjust"],
        block_patches=recorded["mask_length"],
    )
    before, original = [], masking._with_count

    def spy(chosen, *args):
        before.append(int(chosen.sum()))
        return original(chosen, *args)

    side = int(np.sqrt(recorded["L"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_with_count", spy)
        return ~draw(masker, (side, side)), np.array(before), recorded


def test_squares_keep_exactly_the_recorded_number(squares):
    kept, _, recorded = squares
    assert np.unique(kept.sum(axis=(1, 2))).tolist() == recorded["kept_count"]


def test_squares_are_trimmed_and_filled_as_often_as_in_the_original(squares):
    _, before, recorded = squares
    (count,) = recorded["kept_count"]
    assert_same_mean(before.mean(), recorded["kept_before_fix_mean"], recorded["kept_before_fix_std"])
    assert before.max() <= recorded["n_block_draws"] * recorded["mask_length"] ** 2
    assert_same_probability(before > count, recorded["share_rows_trimmed"])
    assert_same_probability(before < count, recorded["share_rows_filled"])


def test_kept_patches_have_as_many_neighbours_as_in_the_original(squares):
    kept, _, recorded = squares
    mean, std = ratio_and_std((neighbours(kept) * kept).sum(axis=(1, 2)), kept.sum(axis=(1, 2)))
    assert_same_mean(mean, recorded["kept_4neighbours_mean"], std)


def test_kept_patches_lie_where_the_original_puts_them(squares):
    kept, _, recorded = squares
    middle = kept.shape[1] // 2
    assert_same_probability(kept[:, 0, 0], recorded["p_kept_corner"])
    assert_same_probability(kept[:, -1, -1], recorded["p_kept_corner"])
    assert_same_probability(kept[:, 0, middle], recorded["p_kept_edge_mid"])
    assert_same_probability(kept[:, middle, middle], recorded["p_kept_center"])


# ----------------------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize(("hidden_fraction", "kept"), [(0.48, 266), (0.5, 256)])  # of 512, ALGORITHM.md 3.6
def test_random_masks_keep_the_published_number(hidden_fraction, kept):
    masker = RandomMasker(hidden_fraction=hidden_fraction)
    rng = np.random.default_rng(0)
    masks = np.stack([masker(512, None, rng) for _ in range(50)])
    assert set((~masks).sum(axis=1)) == {kept}


def test_random_masks_treat_all_positions_alike():
    rng = np.random.default_rng(0)
    hidden = np.stack([RandomMasker(hidden_fraction=0.75)(16, None, rng) for _ in range(DRAWS)])
    assert abs(hidden.mean(axis=0) - 0.75).max() < 4 * np.sqrt(0.75 * 0.25 / DRAWS)


# -------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("masker", [BEIT, INVERSE, RANDOM])
def test_a_mask_is_a_function_of_the_generator_alone(masker):
    first = draw(masker, (14, 14), seed=1, count=3)
    np.random.default_rng(5).random()
    draw(masker, (14, 14), seed=2, count=2)  # no state is left behind
    np.random.seed(7)  # noqa: NPY002 - the global generator must not matter
    assert np.array_equal(first, draw(masker, (14, 14), seed=1, count=3))
    assert not np.array_equal(first, draw(masker, (14, 14), seed=2, count=3))
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("masker", [BEIT, INVERSE, RANDOM])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (1, 9), (3, 3), (4, 4), (2, 14), (14, 2), (5, 30), (7, 7)])
def test_any_grid_gets_something_hidden_and_something_visible(masker, grid):
    masks = draw(masker, grid, count=40)
    counts = masks.sum(axis=(1, 2))
    assert masks.dtype == bool
    assert counts.min() >= 1
    assert counts.max() <= grid[0] * grid[1] - 1
    if masker.constant_count:
        assert len(set(counts)) == 1


def test_squares_are_squares_on_a_wide_grid():
    """One square: around an inner centre 3 x 3 patches stay, at whatever aspect; rows and columns are not swapped."""
    masker = InverseBlockMasker(hidden_fraction=1 - 9 / 80, adjust_fraction=0.001, block_patches=3)
    whole = 0
    for kept in ~draw(masker, (4, 20), count=100):
        rows, columns = np.nonzero(kept)
        if np.ptp(rows) == 2 and np.ptp(columns) == 2:
            whole += 1
    # 2 of 4 rows and 18 of 20 columns are inner: 45 % of the centres; the others are filled up at random.
    assert abs(whole / 100 - 0.45) < 4 * np.sqrt(0.45 * 0.55 / 100)


def test_every_patch_can_be_the_centre_of_a_square():
    """One square of one patch: what stays visible is the centre."""
    masker = InverseBlockMasker(hidden_fraction=0.85, adjust_fraction=0.001, block_patches=1)
    kept = ~draw(masker, (2, 5), count=300)
    assert set(kept.sum(axis=(1, 2))) == {1}
    assert (kept.mean(axis=0) > 0.03).all()  # 0.1 wanted, the standard error is 0.017


def test_blocks_cover_all_columns_of_a_wide_grid():
    hidden = draw(BlockMasker(hidden_fraction=0.5, min_block_fraction=0.05, min_aspect=0.3), (6, 24), count=200)
    assert hidden.any(axis=0).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda f: BlockMasker(hidden_fraction=f, min_block_fraction=0.1, min_aspect=0.3),
        lambda f: InverseBlockMasker(hidden_fraction=f, adjust_fraction=0.1, block_patches=3),
        lambda f: RandomMasker(hidden_fraction=f),
    ],
)
def test_hiding_nothing_or_everything_is_refused(make, fraction):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        make(fraction)


@pytest.mark.parametrize("masker", [BEIT, INVERSE])
def test_block_maskers_refuse_sequences(masker):
    with pytest.raises(ValueError, match=f"{type(masker).__name__} needs a grid of 10 tokens"):
        masker(10, None, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------- 1.0 speech and text, spans


def spans(**changes) -> SpanMasker:
    options = {"nominal_fraction": 0.65, "span_tokens": 10, "min_spans": 1, "starts": "inside", "equalise_by": "count"}
    return SpanMasker(**options | changes)


TEXT = spans(nominal_fraction=0.35, span_tokens=4, min_spans=0, starts="anywhere", equalise_by="none")


def batches(masker, lengths: list[int], count: int, seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [masker.equalise([masker(length, None, rng) for length in lengths], rng) for _ in range(count)]


def number_of_runs(hidden: np.ndarray) -> np.ndarray:
    return (np.diff(hidden.astype(int), axis=1, prepend=0) == 1).sum(axis=1)


def assert_same_spans(hidden: np.ndarray, recorded: dict, independent: int) -> None:
    """`independent` rows or batches: equalised rows of a batch hide equally many, and count once."""
    scale = np.sqrt(DRAWS / independent)
    assert_same_mean(hidden.mean(), recorded["frac_mean"], recorded["frac_std"] * scale)
    assert_same_mean(
        number_of_runs(hidden).mean(), recorded["runs_per_sample_mean"], recorded["runs_per_sample_std"] * scale
    )
    length, std = ratio_and_std(hidden.sum(axis=1), number_of_runs(hidden))
    assert_same_mean(length, recorded["run_len_mean"], std * scale)
    for position, share in [*enumerate(recorded["p_first5"]), *enumerate(recorded["p_last5"], start=-5)]:
        # The same position of different rows is drawn independently, but for the common count.
        assert_same_mean(hidden[:, position].mean(), share, np.sqrt(share * (1 - share)) * (1 if share else 0) + 1e-12)


@pytest.mark.parametrize("case", RECORDED["v1_audio_span"]["cases"])
def test_speech_spans_are_the_originals(case):
    recorded = RECORDED["v1_audio_span"]["cases"][case]
    rows = int(case.partition("_B")[2])
    hidden = np.array([mask for batch in batches(spans(), [recorded["T"]] * rows, DRAWS // rows) for mask in batch])
    assert_same_spans(hidden, recorded, DRAWS // rows)
    if rows == 1:
        assert min(run_lengths(hidden)) == recorded["run_len_min"] == 10
    assert not hidden[:, -1].any()  # ALGORITHM.md 7, row 13


def run_lengths(hidden: np.ndarray) -> np.ndarray:
    edges = np.diff(np.pad(hidden.astype(int), ((0, 0), (1, 1))), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def test_rows_of_a_padded_batch_hide_equally_many_with_the_originals_rule():
    recorded = RECORDED["v1_audio_span_padded"]
    counts = np.array(
        [[mask.sum() for mask in batch] for batch in batches(spans(), recorded["config"]["lengths"], 500)]
    )
    assert (counts == counts[:, :1]).all()
    # Four standard errors of 500 batches; the recording has no deviation of its own, so ours stands in.
    assert abs(counts.mean() - recorded["count_mean"][0]) < 4 * counts[:, 0].std() / np.sqrt(500)


def test_rows_of_a_padded_batch_without_a_rule_are_as_recorded():
    recorded = RECORDED["v1_audio_span_padded_no_same"]
    lengths = recorded["config"]["lengths"]
    drawn = batches(spans(equalise_by="none"), lengths, 500)
    counts = np.array([[mask.sum() for mask in batch] for batch in drawn])
    for row, wanted in enumerate(recorded["count_mean"]):
        assert abs(counts[:, row].mean() - wanted) < 4 * counts[:, row].std() / np.sqrt(500)


def test_equalising_by_fraction_is_the_same_without_padding_and_starves_no_long_row():
    assert all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(
            batches(spans(equalise_by="fraction"), [499] * 8, 1)[0], batches(spans(), [499] * 8, 1)[0], strict=True
        )
    )
    lengths = [499, 400, 300, 250]
    for batch in batches(spans(equalise_by="fraction"), lengths, 50):
        shares = [mask.mean() for mask in batch]
        assert max(shares) - min(shares) < 1 / 250
    shares = np.array([[m.mean() for m in batch] for batch in batches(spans(equalise_by="fraction"), lengths, 500)])
    assert shares[:, 0].mean() > 0.42  # the original leaves this row 0.246


@pytest.mark.parametrize("case", RECORDED["v1_text_span"]["cases"])
def test_text_spans_are_the_originals(case):
    recorded = RECORDED["v1_text_span"]["cases"][case]
    hidden = draw(TEXT, (1, recorded["T"]))[:, 0]
    assert_same_spans(hidden, recorded, DRAWS)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 11, 12, 25])
@pytest.mark.parametrize("masker", [spans(), spans(equalise_by="fraction"), TEXT], ids=["count", "fraction", "text"])
def test_short_rows_hide_something_and_show_something(masker, length):
    for batch in batches(masker, [length, 2 * length], 50):
        for mask in batch:
            assert 0 < mask.sum() < len(mask)


# ------------------------------------------------------------------------------------------------------ 2.0 speech

BLOCKS_1D = {name: case for name, case in RECORDED["v2_audio_block1d"]["cases"].items() if "T" in case}


def block1d(size: str) -> Block1dMasker:
    config = RECORDED["v2_audio_block1d"]["config"][size]
    return Block1dMasker(
        hidden_fraction=config["mask_prob"],
        adjust_fraction=config["mask_prob_adjust"],
        span_tokens=config["mask_length"],
    )


@pytest.mark.parametrize("case", BLOCKS_1D)
def test_speech_blocks_are_the_originals(case, monkeypatch):
    recorded = BLOCKS_1D[case]
    before, original = [], masking._with_count
    monkeypatch.setattr(
        masking, "_with_count", lambda chosen, *rest: before.append(chosen.mean()) or original(chosen, *rest)
    )
    # More draws than were recorded: the tolerance then is for the recording's error alone.
    hidden = draw(block1d(case.partition("_")[0]), (1, recorded["T"]), count=4 * DRAWS)[:, 0]
    assert np.unique(hidden.sum(axis=1)).tolist() == [recorded["target_count"]]
    coverage = recorded["before_count_fix"]
    assert_same_mean(np.mean(before), coverage["frac_mean"], coverage["frac_std"])
    assert_same_mean(number_of_runs(hidden).mean(), recorded["runs_per_sample_mean"], recorded["runs_per_sample_std"])
    for position, share in [*enumerate(recorded["p_first5"]), *enumerate(recorded["p_last5"], start=-5)]:
        assert_same_mean(hidden[:, position].mean(), share, np.sqrt(share * (1 - share)))


@pytest.mark.parametrize("case", RECORDED["v2_text_random"]["cases"])
def test_text_positions_are_as_many_as_the_originals(case):
    recorded = RECORDED["v2_text_random"]["cases"][case]
    hidden = draw(RandomMasker(hidden_fraction=recorded["mask_ratio"]), (1, recorded["L"]))[:, 0]
    assert np.unique(hidden.sum(axis=1)).tolist() == [recorded["masked"]]
    share = recorded["masked"] / recorded["L"]
    for position in (0, 1, 255, -1):
        assert_same_probability(hidden[:, position], share)


@pytest.mark.parametrize("fraction", [0.3, 0.48, 0.5, 0.55, 0.8])
def test_longer_rows_never_hide_fewer_so_that_padding_can_fill_up_shorter_ones(fraction):
    rng = np.random.default_rng(0)
    for masker in (
        RandomMasker(hidden_fraction=fraction),
        Block1dMasker(hidden_fraction=fraction, adjust_fraction=0.05, span_tokens=5),
    ):
        counts = [int(masker(length, None, rng).sum()) for length in range(2, 600)]
        assert counts == sorted(counts)
        visible = [length - count for length, count in enumerate(counts, start=2)]
        assert visible == sorted(visible)


@pytest.mark.parametrize("masker", [spans(), TEXT, block1d("base"), RANDOM], ids=["speech", "text", "block", "random"])
def test_a_sequence_mask_is_a_pure_function_of_its_generator_and_needs_two_tokens(masker):
    first, second = (masker(50, None, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second)
    if masker is not RANDOM:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            masker(1, None, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------ corruption


def corruption(random_fraction: float = 0.1, keep_fraction: float = 0.1) -> TokenCorruption:
    return TokenCorruption(
        mask_id=99,
        vocab_size=100,
        special_ids=[0, 1, 2, 3],
        random_fraction=random_fraction,
        keep_fraction=keep_fraction,
    )


def test_80_10_10_and_only_masked_positions_count_as_hidden():
    ids = np.full(20_000, 50)
    chosen = np.arange(20_000) % 2 == 0
    corrupted, hidden = corruption()(ids, chosen, np.random.default_rng(0))
    assert np.array_equal(hidden, corrupted == 99)
    assert np.array_equal(corrupted[~chosen], ids[~chosen])
    assert hidden.sum() / chosen.sum() == pytest.approx(0.8, abs=0.016)  # 4 standard errors of 10,000
    kept = (corrupted == 50) & chosen
    assert kept.sum() / chosen.sum() == pytest.approx(0.1, abs=0.012)
    others = corrupted[chosen & ~hidden & ~kept]
    assert set(others) <= set(range(4, 99)) - {50}
    assert len(set(others)) > 80


def test_without_diversions_every_hidden_token_becomes_the_mask_token():
    ids, chosen = np.arange(10, 30), np.arange(20) < 7
    corrupted, hidden = corruption(0.0, 0.0)(ids, chosen, np.random.default_rng(0))
    assert np.array_equal(hidden, chosen)
    assert (corrupted[:7] == 99).all()
    assert np.array_equal(corrupted[7:], ids[7:])
    assert np.array_equal(ids, np.arange(10, 30))  # the caller's array is not touched


def test_something_is_left_to_predict():
    for seed in range(50):
        _, hidden = corruption(0.45, 0.5)(np.full(5, 50), np.array([1, 0, 0, 0, 0], bool), np.random.default_rng(seed))
        assert hidden.sum() == 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.0), (0.0, 1.2)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="shares that leave something"):
        corruption(*shares)
