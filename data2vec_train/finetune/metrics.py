"""Scores of predictions, from torchmetrics if it has them; fractions of 1 unless documented otherwise.

torchmetrics is imported when a score is computed: the import takes a second.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_VECTORS = 2000  # an equal error rate compares all their pairs: two million


def transcript_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Word and letter error rates, `wer` and `cer`: errors / number of words or letters in the references."""
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    pair = (list(predictions), list(references))
    return {"wer": float(word_error_rate(*pair)), "cer": float(char_error_rate(*pair))}


def classification_scores(predictions: Sequence[int], references: Sequence[int], num_classes: int) -> dict[str, float]:
    """`accuracy`, `f1` (two classes: of the second; more: the mean over classes) and `matthews`, the correlation."""
    from torchmetrics.functional.classification import (
        binary_f1_score,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    found, wanted = torch.as_tensor(np.asarray(predictions)), torch.as_tensor(np.asarray(references))
    if num_classes == 2:
        f1 = binary_f1_score(found, wanted)
    else:
        f1 = multiclass_f1_score(found, wanted, num_classes, average="macro")
    return {
        "accuracy": float((found == wanted).float().mean()),
        "f1": float(f1),
        "matthews": float(multiclass_matthews_corrcoef(found, wanted, num_classes)),
    }


def multilabel_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """`f1` over all pairs of sample and label (micro); `accuracy`: the fraction of samples with all labels correct."""
    from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

    found, wanted = torch.as_tensor(predictions), torch.as_tensor(references).long()
    count = wanted.shape[1]
    return {
        "accuracy": float(multilabel_exact_match(found, wanted, count)),
        "f1": float(multilabel_f1_score(found, wanted, count, average="micro")),
    }


def regression_scores(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Correlations `pearson` and `spearman`, and `mse`, the mean squared error, in squared units of the label."""
    from torchmetrics.functional import mean_squared_error, pearson_corrcoef, spearman_corrcoef

    found, wanted = (torch.tensor(list(values), dtype=torch.float64) for values in (predictions, references))
    mse = float(mean_squared_error(found, wanted))
    if len(found) < 2 or min(found.std(), wanted.std()) == 0:  # the correlation with a constant is undefined
        return {"pearson": float("nan"), "spearman": float("nan"), "mse": mse}
    # Both are standardised: torchmetrics returns NaN with a warning if a standard deviation is below 1e-4.
    unit = ((values - values.mean()) / values.std() for values in (found, wanted))
    return {"pearson": float(pearson_corrcoef(*unit)), "spearman": float(spearman_corrcoef(found, wanted))} | {
        "mse": mse
    }


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first, end, type) of the entities in tags of the form B-x, I-x, O, as counted by the CoNLL script.

    An I-x without a B-x or I-x before it starts an entity.
    """
    found = set()
    start, kind = 0, None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == kind
        if kind is not None and not continues:
            found.add((start, place, kind))
            kind = None
        if prefix in ("B", "I") and not continues:
            start, kind = place, name
    return found


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`entity_f1`: harmonic mean of precision and recall; an entity counts if its span and type are correct."""
    right = found = wanted = 0
    for predicted, reference in zip(predictions, references, strict=True):
        ours, theirs = entities(predicted), entities(reference)
        right, found, wanted = right + len(ours & theirs), found + len(ours), wanted + len(theirs)
    return {"entity_f1": 2 * right / max(found + wanted, 1)}


def answer_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's `exact_match` and `f1` (of words), each the best over the reference answers."""
    from torchmetrics.functional.text import squad

    found = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(predictions)]
    wanted = [
        {"answers": {"text": list(texts), "answer_start": [0] * len(texts)}, "id": str(number)}
        for number, texts in enumerate(references)
    ]
    return {name: float(value) / 100 for name, value in squad(found, wanted).items()}


def equal_error_rate(vectors: np.ndarray, labels: np.ndarray) -> float:
    """The error rate at the threshold where false acceptance and false rejection are equal, over pairs of recordings.

    Args:
        vectors: (n, D) of length 1; of more than `MAX_VECTORS`, an evenly spaced subset is used.
        labels: (n,) speakers.

    Returns:
        The rate, or NaN without a pair of one speaker or without a pair of two speakers.
    """
    from torchmetrics.functional.classification import binary_eer

    if len(vectors) > MAX_VECTORS:
        rows = np.linspace(0, len(vectors) - 1, MAX_VECTORS).astype(np.int64)
        vectors, labels = vectors[rows], labels[rows]
    first, second = np.triu_indices(len(vectors), k=1)
    same = torch.from_numpy(labels[first] == labels[second])
    if not len(same) or bool(same.all()) or not bool(same.any()):
        return float("nan")
    cosines = torch.from_numpy((vectors @ vectors.T)[first, second])
    # torchmetrics treats scores outside [0, 1] as logits.
    return float(binary_eer(((cosines + 1) / 2).clamp(0, 1).double(), same.long()))


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """`miou`: mean intersection over union over classes that occur in references or predictions; and `accuracy`.

    Args:
        confusion: (C, C) counts of pixels; rows are references, columns predictions.
    """
    right = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
    present = union > 0
    return {
        "miou": float((right[present] / union[present]).mean()),
        "accuracy": float(right.sum() / confusion.sum().clamp(min=1)),
    }
