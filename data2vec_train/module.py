"""The LightningModule: it only says when things happen. What happens is in `data2vec.py`."""

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from data2vec_train.data.seeding import torch_seed
from data2vec_train.data2vec import Data2Vec, Data2VecOutput, std_over_rows
from data2vec_train.encoders.base import Batch
from data2vec_train.errors import ConfigError
from data2vec_train.optim import Schedule, set_lr


class TrainingModule(L.LightningModule):
    """What pretraining and fine-tuning share: gradients of a whole step, clipping, the learning rate, the log.

    Args:
        schedule: finished steps -> learning rate.
        seed: of the run; what is random in a step follows from (seed, step) alone.
        log_every_n_steps: how often `measured` is filled.
    """

    def __init__(self, *, schedule: Schedule, seed: int, log_every_n_steps: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.seed = seed
        self.log_every_n_steps = log_every_n_steps
        self.measured: dict[str, Tensor | float] = {}  # of the last logged step; tensors until somebody reads them
        self._counts: list[int] = []  # hidden tokens, or samples, of each micro-batch since the last optimizer step

    def seed_step(self) -> None:
        """Make dropout and noise of this micro-batch follow from (seed, step)."""
        torch.manual_seed(torch_seed(self.seed, "step", self.trainer.global_step, len(self._counts), self.global_rank))

    def weighted(self, loss: Tensor, count: int) -> Tensor:
        """The mean loss of a micro-batch over `count` things, weighted for `on_before_optimizer_step`."""
        self._counts.append(count)
        return loss * (count / self._counts[0])

    def measure(self, values: dict[str, Tensor]) -> None:
        """Keep what is logged of this step, the mean over its micro-batches; after `weighted`."""
        if not self.logs_after(self.trainer.global_step + 1):
            return
        before = self.measured if len(self._counts) > 1 else {}
        share = 1 / self.trainer.accumulate_grad_batches
        self.measured = {name: before.get(name, 0.0) + share * value for name, value in values.items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient that of the mean over all that the step has seen.

        Micro-batches may count differently and Lightning takes their plain mean. Each was weighted with its count
        relative to the first; what remains is one factor, known on the host, and 1 when counts are equal.
        """
        factor = self.trainer.accumulate_grad_batches * self._counts[0] / sum(self._counts)
        self._counts.clear()
        if factor != 1.0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over all gradients, and keep the norm for the log.

        Raises:
            ConfigError: another clipping than by norm is asked for.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ConfigError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm}: only 'norm' is supported")
        if gradient_clip_val or self.logs_after(self.trainer.global_step + 1):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))
            self.measured["train/grad_norm"] = norm

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """One optimizer step with the learning rate of the schedule; Lightning calls this whatever the accumulation."""
        lr = self.schedule(self.trainer.global_step)
        set_lr(optimizer, lr)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.measured["train/lr"] = lr

    def logs_after(self, step: int) -> bool:
        """Whether the step that ends with so many finished ones is logged."""
        return step == 1 or step % self.log_every_n_steps == 0 or step == self.trainer.max_steps


class Data2VecModule(TrainingModule):
    """Training of a `Data2Vec` objective.

    Args:
        objective: student, teacher, decoder and loss.
        optimizer: makes the optimizer from the modules to train, such as `optim.adamw`.
        schedule, seed, log_every_n_steps: see `TrainingModule`.
    """

    def __init__(
        self,
        *,
        objective: Data2Vec,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        seed: int,
        log_every_n_steps: int,
    ) -> None:
        super().__init__(schedule=schedule, seed=seed, log_every_n_steps=log_every_n_steps)
        self.objective = objective
        self.make_optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, weighted by its number of hidden tokens (see `on_before_optimizer_step`)."""
        self.seed_step()
        output: Data2VecOutput = self.objective(batch)
        loss = self.weighted(output.loss, batch.masks.hidden.numel())
        if self.logs_after(self.trainer.global_step + 1):
            values = {"train/loss": output.loss.detach()}
            if len(output.terms) > 1:
                values |= {f"train/loss_{name}": term.detach() for name, term in output.terms.items()}
            values["train/target_std"] = std_over_rows(output.targets)
            values["train/prediction_std"] = std_over_rows(output.predictions.detach())
            self.measure(values)
        return loss

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """One optimizer step, and directly after it one step of the teacher.

        Moving the teacher in a later hook would be too late: checkpoint callbacks run before it and would save a
        teacher that is one step behind.
        """
        finished = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        self.measured["train/tau"] = self.objective.step_teacher(finished + 1)

    def configure_optimizers(self) -> Optimizer:
        """The teacher has no trainable parameters and is in no group."""
        return self.make_optimizer(
            [self.objective.student, self.objective.decoder], no_decay=self.objective.student.no_decay
        )
