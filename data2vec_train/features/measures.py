"""Quality measures of frozen features: nearest neighbours, a linear classifier, and effective rank, without labels.

The linear probe standardises features with the statistics of the fitting set. Nearest neighbours only centre them:
scaling up directions of small variance adds noise to the distances (raw pixels lose 4 points that way).
"""

import logging
import warnings

import numpy as np

log = logging.getLogger(__name__)

MAX_ITERATIONS = 2000  # of the linear probe; the slowest case measured, 5,000 raw photographs of 32 px, took 440


def knn_accuracy(
    fit: np.ndarray, fit_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, neighbours: int
) -> float:
    """Share of test samples that `knn_hits` classifies correctly; same arguments."""
    return float(knn_hits(fit, fit_labels, test, test_labels, neighbours=neighbours).mean())


def knn_hits(
    fit: np.ndarray, fit_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, neighbours: int
) -> np.ndarray:
    """(m,) bool: whether a vote of the nearest fitting samples, weighted by cosine similarity, gives the right class.

    Args:
        fit: (n, D) features.
        fit_labels: (n,) classes.
        test: (m, D).
        test_labels: (m,).
        neighbours: number of voting samples.
    """
    from sklearn.neighbors import KNeighborsClassifier

    mean = fit.mean(axis=0)
    model = KNeighborsClassifier(min(neighbours, len(fit)), metric="cosine", weights=_similarity)
    return model.fit(fit - mean, fit_labels).predict(test - mean) == test_labels


def linear_accuracy(
    fit: np.ndarray, fit_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, l2: float
) -> float:
    """Share of test samples that `linear_hits` classifies correctly; same arguments."""
    return float(linear_hits(fit, fit_labels, test, test_labels, l2=l2).mean())


def linear_hits(
    fit: np.ndarray, fit_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, l2: float
) -> np.ndarray:
    """(m,) bool: whether multinomial logistic regression on standardised features gives the right class.

    It minimises the sum of the loss over fitting samples plus l2/2 * |weights|^2. Shapes as in `knn_hits`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if len(np.unique(fit_labels)) < 2:
        return test_labels == fit_labels[0]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / l2, max_iter=MAX_ITERATIONS))
    # One thread, since the matrices are small: on a busy machine a second thread made the fit ten times slower.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # logged below
        model.fit(fit, fit_labels)
        if model[-1].n_iter_.max() >= MAX_ITERATIONS:
            log.warning("the linear probe stopped after %d iterations without converging", MAX_ITERATIONS)
        return model.predict(test) == test_labels


def standard_error(accuracy: float, records: int) -> float:
    """Standard error of `accuracy` measured on `records` samples, by the binomial distribution."""
    return float(np.sqrt(accuracy * (1 - accuracy) / max(records, 1)))


def rankme(features: np.ndarray) -> float:
    """Effective rank of features (n, D): exp of the entropy of the normalised singular values, between 1 and D.

    Near 1 = all samples have nearly the same direction. Source: RankMe (arXiv:2210.02885), equation 2.
    """
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = singular / max(singular.sum(), 1e-12) + 1e-12
    return float(np.exp(-(share * np.log(share)).sum()))


def nearest(query: np.ndarray, gallery: np.ndarray, count: int) -> np.ndarray:
    """Indices (q, count) of the gallery features most similar to each query by cosine, after centring."""
    mean = gallery.mean(axis=0)
    query, gallery = _unit(query - mean), _unit(gallery - mean)
    return np.argsort(-(query @ gallery.T), axis=1, kind="stable")[:, :count]


def _similarity(distance: np.ndarray) -> np.ndarray:
    return np.clip(1 - distance, 1e-6, None)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
