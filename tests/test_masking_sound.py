"""Masks on grids of time x mel against 2,000 draws of EAT (`eat_mask_statistics.json`).

A mean over as many masks of ours may differ from the recorded one by 4 standard errors, as in `test_masking.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import data2vec_train.objective.masking as masking
from data2vec_train.objective.masking import InverseBlockMasker

RECORDED = json.loads((Path(__file__).parent / "eat_mask_statistics.json").read_text())["cases"]


@pytest.fixture(scope="module", params=RECORDED)
def drawn(request) -> tuple[np.ndarray, np.ndarray, dict]:
    """Kept patches (n, time, mel), how many the squares alone had kept, and the recording."""
    case = RECORDED[request.param]
    masker = InverseBlockMasker(
        hidden_fraction=case["mask_prob"],
        adjust_fraction=case["mask_prob_adjust"],
        block_patches=case["mask_length"],
    )
    before, original = [], masking._with_count

    def spy(chosen, *args):
        before.append(int(chosen.sum()))
        return original(chosen, *args)

    rng = np.random.default_rng(0)
    columns = case["grid_mel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_with_count", spy)
        # As the encoder of spectrograms says it: the rows follow from the number of tokens.
        masks = np.stack([masker(case["L"], (None, columns), rng) for _ in range(case["n"])])
    return ~masks.reshape(case["n"], case["grid_time"], columns), np.array(before), case


def assert_same_mean(values: np.ndarray, recorded: float, std: float | None = None) -> None:
    """Of one value for each mask."""
    error = (values.std() if std is None else std) / np.sqrt(len(values))
    assert abs(values.mean() - recorded) <= 4 * error, f"{values.mean():.4f}, recorded {recorded:.4f}"


def assert_same_ratio(amounts: np.ndarray, counts: np.ndarray, recorded: float) -> None:
    """Of sums over masks; the standard error is that of the delta method."""
    ratio = amounts.sum() / counts.sum()
    error = (amounts - ratio * counts).std() / counts.mean() / np.sqrt(len(counts))
    assert abs(ratio - recorded) < 4 * error, f"{ratio:.4f}, recorded {recorded:.4f}"


def assert_same_probability(kept: np.ndarray, recorded: float) -> None:
    assert_same_mean(kept, recorded, std=np.sqrt(recorded * (1 - recorded)))


def test_exactly_the_recorded_number_is_kept(drawn):
    kept, _, case = drawn
    assert np.unique(kept.sum(axis=(1, 2))).tolist() == case["kept_count"] == [case["target_kept"]]
    assert 1 - kept.mean() == pytest.approx(case["masked_frac"], rel=1e-12)


def test_as_many_squares_are_trimmed_and_filled(drawn):
    _, before, case = drawn
    assert_same_mean(before, case["kept_before_fix_mean"])
    assert before.std() == pytest.approx(case["kept_before_fix_std"], rel=0.1)
    assert before.max() <= case["n_block_draws"] * case["mask_length"] ** 2
    assert_same_probability(before > case["target_kept"], case["share_rows_trimmed"])
    assert_same_probability(before < case["target_kept"], case["share_rows_filled"])


def test_kept_patches_hang_together_as_much(drawn):
    kept, _, case = drawn
    padded = np.pad(kept, ((0, 0), (1, 1), (1, 1))).astype(int)
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    count = kept.sum(axis=(1, 2))
    assert_same_ratio((around * kept).sum(axis=(1, 2)), count, case["kept_4neighbours_mean"])
    assert_same_ratio(((around == 0) & kept).sum(axis=(1, 2)), count, case["kept_isolated_frac"])
    labels = [ndimage.label(mask)[0] for mask in kept]
    components = np.array([label.max() for label in labels])
    assert_same_mean(components, case["components_mean"])
    assert_same_ratio(count, components, case["component_size_mean"])
    largest = np.array([np.bincount(label.ravel())[1:].max() for label in labels])
    assert_same_mean(largest, case["largest_component_mean"])


def test_what_is_hidden_is_as_long_in_time_and_as_high_in_mel(drawn):
    kept, _, case = drawn
    hidden = ~kept
    for name, axis in (("time", 1), ("mel", 2)):
        shifted = np.pad(hidden, [(0, 0), *((1, 0) if place == axis else (0, 0) for place in (1, 2))])
        starts = hidden & ~shifted[:, : hidden.shape[1], : hidden.shape[2]]
        mean = case[f"hidden_run_along_{name}_mean"]
        assert_same_ratio(hidden.sum(axis=(1, 2)), starts.sum(axis=(1, 2)), mean)
    assert_same_mean(hidden.all(axis=2).mean(axis=1), case["time_columns_fully_hidden_frac"])


def test_kept_patches_lie_where_the_original_puts_them(drawn):
    kept, _, case = drawn
    time, mel = case["grid_time"] // 2, case["grid_mel"] // 2
    assert_same_probability(kept[:, 0, 0], case["p_kept_corner"])
    assert_same_probability(kept[:, 0, mel], case["p_kept_first_time_mid_mel"])
    assert_same_probability(kept[:, time, 0], case["p_kept_mid_time_first_mel"])
    assert_same_probability(kept[:, time, -1], case["p_kept_mid_time_last_mel"])
    assert_same_probability(kept[:, time, mel], case["p_kept_center"])
    for row, recorded in enumerate(case["p_kept_per_mel_row"]):
        assert_same_mean(kept[:, :, row].mean(axis=1), recorded)
    for column, recorded in enumerate(case["p_kept_first_8_time"][: case["grid_time"]]):
        assert_same_mean(kept[:, column].mean(axis=1), recorded)
