"""A whole pretraining step that can be timed and compared: forward with teacher, backward, update."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data2vec_train.batch import Batch
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.training.module import gradients
from data2vec_train.training.optim import adamw


@dataclass(frozen=True, kw_only=True)
class Update:
    """Settings of the optimizer, the same for every arm; `clip_norm` None = compute the norm but do not clip."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None


@dataclass(frozen=True)
class StepArm:
    """One program's training step: `loss`, its backward, and `update`.

    Gradients and teacher weights have our names, so that arms can be compared.
    """

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]  # () mean over masked tokens, as ours; runs student and teacher forward
    optimise: Callable[[], None]  # clip, optimizer step, clear gradients
    average: Callable[[], None]  # one EMA step of the teacher
    gradients: Callable[[], dict[str, Tensor]]
    teacher: Callable[[], dict[str, Tensor]]  # the teacher's weights, by the student's names

    def update(self) -> None:
        """Everything after the backward pass."""
        self.optimise()
        self.average()


def our_step(ours: Data2Vec, batch: Batch, update: Update) -> StepArm:
    """The step of this program, as in `training/module.py`."""
    ours.train()
    optimizer = adamw(
        [ours.student, ours.decoder],
        no_decay=ours.student.no_decay,
        lr=update.lr,
        betas=update.betas,
        eps=update.eps,
        weight_decay=update.weight_decay,
        decay_all=False,
        fused=True,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = Steps()

    def optimise() -> None:
        norm = torch.nn.utils.get_total_norm(gradients(optimizer))
        if update.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, update.clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return StepArm(
        name="ours",
        model=ours,
        loss=lambda: ours(batch).loss,
        optimise=optimise,
        average=lambda: ours.step_teacher(count.next()),
        gradients=lambda: {name: p.grad for name, p in ours.named_parameters() if p.grad is not None},
        teacher=lambda: {f"student.{name}": p for name, p in ours.teacher.encoder.named_parameters()},
    )


class Steps:
    """Counts optimizer steps, because the teacher's decay depends on the step number."""

    def __init__(self) -> None:
        self.finished = 0

    def next(self) -> int:
        """The number of the step that has just ended."""
        self.finished += 1
        return self.finished
