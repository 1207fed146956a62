"""Maskers against 2,000 draws of the original programs (`statistics.json`).

A mean of 2,000 masks of ours may differ from the recorded one by 4 standard errors, 4 * std / sqrt(2000). That the
recorded value is itself an estimate from 2,000 draws is not allowed for.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import data2vec_train.masking as masking
from data2vec_train.masking import BlockMasker, InverseBlockMasker, RandomMasker

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


@pytest.mark.parametrize(("hidden_fraction", "kept"), [(0.48, 266), (0.5, 256)])  # of 512, spec 3.6
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
