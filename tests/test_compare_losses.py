"""The tool for refactorings says which step differs first, and nothing where none does."""

import pytest

from tests.compare_losses import TIMES, first_difference


def rows(*losses, **more):
    return [{"step": str(step), "train/loss": loss, **more} for step, loss in enumerate(losses)]


def test_equal_runs_differ_in_nothing():
    assert first_difference(rows("1.0", "0.5"), rows("1.0", "0.5"), ignored=TIMES) is None


def test_times_are_not_compared():
    old, new = rows("1.0", **{"train/data_wait": "0.1"}), rows("1.0", **{"train/data_wait": "0.9"})
    assert first_difference(old, new, ignored=TIMES) is None


@pytest.mark.parametrize(
    ("new", "answer"),
    [
        (rows("1.0", "0.5000000001"), "step 1 differs: train/loss was 0.5, is 0.5000000001"),
        (rows("1.0"), "2 rows were logged, now 1"),
        (rows("1.0", "0.5", extra="1"), "only one of the two logs extra"),
        ([], "nothing was logged"),
    ],
)
def test_the_first_difference_is_named(new, answer):
    assert first_difference(rows("1.0", "0.5"), new, ignored=TIMES) == answer
