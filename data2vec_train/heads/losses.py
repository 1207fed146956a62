"""Losses that heads of several modalities share."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def infer_problem_type(labels: Tensor, num_labels: int) -> ProblemType:
    """The problem type if none is given: one output = regression, integer labels = one class each, else several."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(logits: Tensor, labels: Tensor, *, problem_type: ProblemType) -> Tensor:
    """Mean squared error, cross entropy or binary cross entropy of logits (B, C) and labels -> ().

    Labels are (B,) class numbers, (B,) or (B, 1) values to regress, or (B, C) probabilities. -100 marks a sample
    without a class.

    Raises:
        ValueError: another problem type.
    """
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    raise ValueError(
        f"problem_type is regression, single_label_classification or multi_label_classification, got {problem_type!r}"
    )


def connectionist_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_frames: Tensor | None,
    blank_id: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    """CTC loss of logits (B, T, V) and labels (B, U) -> (), in float32.

    Args:
        logits: unnormalised.
        labels: ids; -100 and `blank_id` are padding.
        num_frames: (B,) real frames of each row, None = all.
        blank_id: id of the blank.
        reduction: "sum", "mean" or "none", see `torch.nn.functional.ctc_loss`.
        zero_infinity: the loss of a row with more labels than its frames can express is 0 instead of infinity.

    Raises:
        ValueError: a label that is not in the vocabulary.
    """
    if int(labels.max()) >= logits.shape[-1]:
        raise ValueError(f"label {int(labels.max())} is not in the vocabulary of {logits.shape[-1]} symbols")
    if num_frames is None:
        num_frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
    real = (labels >= 0) & (labels != blank_id)
    scores = logits.log_softmax(dim=-1, dtype=torch.float32).transpose(0, 1)  # (T, B, V)
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            scores,
            labels.masked_select(real),
            num_frames.long(),
            real.sum(dim=-1),
            blank=blank_id,
            reduction=reduction,
            zero_infinity=zero_infinity,
        )


def additive_margin_loss(logits: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float) -> Tensor:
    """Additive-margin softmax of embeddings (B, D) against class vectors (D, C), both normalised -> ().

    Source: arXiv:1801.05599; scale 30 and margin 0.4 in Hugging Face's x-vector head.
    """
    cosines = F.normalize(logits, dim=1) @ F.normalize(weight, dim=0)  # (B, C)
    own = F.one_hot(labels.flatten(), weight.shape[1]).bool()
    return F.cross_entropy(scale * torch.where(own, cosines - margin, cosines), labels.flatten())


def question_answering_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean cross entropy of both ends of the answer: logits (B, S), positions (B,); positions beyond S are ignored."""
    size = start_logits.shape[1]
    losses = [
        F.cross_entropy(logits, positions.reshape(-1).clamp(0, size), ignore_index=size)
        for logits, positions in ((start_logits, starts), (end_logits, ends))
    ]
    return sum(losses) / 2
