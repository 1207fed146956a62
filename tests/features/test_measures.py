import numpy as np
import pytest

from data2vec_train.features.measures import knn_accuracy, linear_accuracy, nearest, rankme

CLASSES = 4


def features(*, gap: float, per_class: int = 40, dim: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), per_class)
    centres = gap * np.eye(dim)[:CLASSES]
    # A common offset: features of real networks have one, and it must not matter.
    return (centres[labels] + rng.normal(size=(len(labels), dim)) + 20).astype(np.float32), labels


@pytest.fixture(params=["knn", "linear"])
def accuracy(request):
    if request.param == "knn":
        return lambda *arrays: knn_accuracy(*arrays, neighbours=10)
    return lambda *arrays: linear_accuracy(*arrays, l2=1.0)


def test_separable_classes_are_told_apart(accuracy):
    assert accuracy(*features(gap=12), *features(gap=12, seed=1)) == 1.0


def test_features_that_say_nothing_are_at_chance(accuracy):
    measured = accuracy(*features(gap=0, per_class=100), *features(gap=0, per_class=250, seed=1))
    assert abs(measured - 1 / CLASSES) < 4 * np.sqrt(0.25 * 0.75 / 1000)


def test_accuracy_lies_between_for_overlapping_classes(accuracy):
    assert 0.4 < accuracy(*features(gap=2), *features(gap=2, seed=1)) < 0.9


def test_wrong_labels_of_the_test_set_count_as_errors(accuracy):
    fit, fit_labels = features(gap=12)
    test, labels = features(gap=12, seed=1)
    labels[: len(labels) // 4] = (labels[: len(labels) // 4] + 1) % CLASSES
    assert accuracy(fit, fit_labels, test, labels) == 0.75


def test_more_neighbours_than_samples_and_a_single_class_are_no_errors():
    fit, labels = features(gap=12, per_class=2)
    assert 0 <= knn_accuracy(fit, labels, fit, labels, neighbours=1000) <= 1
    zeros = np.zeros_like(labels)
    assert linear_accuracy(fit, zeros, fit, zeros, l2=1.0) == 1.0
    assert linear_accuracy(fit, zeros, fit, labels, l2=1.0) == 1 / CLASSES


def test_knn_votes_are_weighted_by_cosine_similarity():
    """One neighbour in the same direction outweighs two at nearly a right angle. The mean of `fit` is zero."""
    angles = np.deg2rad([0, 80, 85, 180, 260, 265])
    fit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.array([0, 1, 1, 2, 3, 3])
    query = np.array([[5.0, 0.0]])  # its length does not matter
    assert np.abs(fit.mean(axis=0)).max() < 1e-12
    assert knn_accuracy(fit, labels, query, np.array([0]), neighbours=3) == 1.0


def test_linear_probe_standardises():
    """The class is in a direction that hardly varies: without standardisation the penalty would hide it."""
    fit, labels = features(gap=12)
    test, test_labels = features(gap=12, seed=1)
    scale = np.array([1e-4] * CLASSES + [100.0] * 4)
    assert linear_accuracy(fit * scale, labels, test * scale, test_labels, l2=1.0) == 1.0


def test_a_larger_penalty_gives_another_classifier():
    arrays = *features(gap=2, per_class=10), *features(gap=2, per_class=200, seed=1)
    assert linear_accuracy(*arrays, l2=1e-3) != linear_accuracy(*arrays, l2=1e3)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rankme_of_orthogonal_directions_is_their_number(rank):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(200, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(32, rank)))
    assert rankme((left @ right.T).astype(np.float32)) == pytest.approx(rank, rel=1e-3)


def test_rankme_by_hand():
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    wanted = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(wanted, rel=1e-6)


def test_rankme_of_random_low_rank_features_is_about_the_rank():
    rng = np.random.default_rng(0)
    assert 6.5 < rankme(rng.normal(size=(500, 8)) @ rng.normal(size=(8, 64))) <= 8.001


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_rankme_of_constant_features_is_one(value):
    assert rankme(np.full((50, 8), value, dtype=np.float32)) == pytest.approx(1, abs=1e-3)


def test_nearest_by_hand():
    """Centred, the gallery points to the four sides; lengths do not matter, and ties keep the gallery's order."""
    gallery = np.array([[9.0, 5.0], [5.0, 6.0], [4.0, 5.0], [2.0, 4.0]])  # mean (5, 5)
    assert gallery.mean(axis=0).tolist() == [5.0, 5.0]
    query = np.array([[6.0, 5.0], [5.0, 105.0]])
    assert nearest(query, gallery, 4).tolist() == [[0, 1, 3, 2], [1, 0, 2, 3]]
    assert nearest(query, gallery, 2).tolist() == [[0, 1], [1, 0]]
