"""The LightningModule: it decides when things happen; the algorithm is in `objective/data2vec.py`."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data2vec_train.batch import Batch
from data2vec_train.data.seeding import torch_seed
from data2vec_train.encoders.base import EncoderOutput
from data2vec_train.encoders.transformer import Transformer
from data2vec_train.objective.data2vec import Data2Vec, Data2VecOutput, relative_std, std_over_rows
from data2vec_train.system.constraints import require
from data2vec_train.training.distributed import shard
from data2vec_train.training.optim import Schedule, set_lr
from data2vec_train.training.step_result import MicroBatches, Samples, StepResult
from data2vec_train.weights.weights import check_tensors

# A power of two: dividing by it and multiplying by it again changes no bit.
UNIT = 2.0**14


class TrainingModule(L.LightningModule):
    """What pretraining and fine-tuning share: gradients of a whole step, clipping, the learning rate, the log.

    Args:
        schedule: finished steps -> learning rate.
        seed: of the run; all randomness of a step follows from (seed, step) alone.
        log_every_n_steps: optimizer steps between logged steps.

    `step_result` is the result of the optimizer step that the latest batch completed; None in the middle of an
    accumulation.
    """

    def __init__(self, *, schedule: Schedule, seed: int, log_every_n_steps: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.seed = seed
        self.log_every_n_steps = log_every_n_steps
        self.step_result: StepResult | None = None
        self._micro_batches = MicroBatches()  # of the current step

    def seed_step(self) -> None:
        """Make dropout and noise of this micro-batch follow from (seed, step, its number among those of the step)."""
        number = len(self._micro_batches.counts) * self.trainer.world_size + self.global_rank
        torch.manual_seed(torch_seed(self.seed, "step", self.trainer.global_step, number, 0))
        if self.trainer.accumulate_grad_batches * self.trainer.world_size > 1:
            # All batches of a step skip the same blocks: processes wait for each other at every block they run.
            for transformer in self._with_layer_drop:
                transformer.layer_seed = torch_seed(self.seed, "step", self.trainer.global_step, 0, 1)

    @cached_property
    def _with_layer_drop(self) -> list[Transformer]:
        return [child for child in self.modules() if isinstance(child, Transformer) and child.layer_drop]

    @property
    def has_unused_parameters(self) -> bool:
        """Whether there are steps in which some parameters get no gradient."""
        return True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a state that training cannot continue from.

        Raises:
            ConfigError: weights or moments of the optimizer that are not finite floating-point numbers.
        """
        state, where = checkpoint["state_dict"], str(self.trainer.ckpt_path)
        own = {name: tensor.dtype for name, tensor in self.state_dict().items()}
        check_tensors({name: tensor for name, tensor in state.items() if name in own}, own, where)
        for optimizer in checkpoint.get("optimizer_states", ()):
            for number, moments in optimizer["state"].items():
                tensors = {
                    f"{name} of parameter {number}": value for name, value in moments.items() if torch.is_tensor(value)
                }
                check_tensors(tensors, {name: tensor.dtype for name, tensor in tensors.items()}, f"{where}, optimizer")

    def accumulate(
        self, loss: Tensor, count: int, samples: Samples, *, terms: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of a micro-batch, weighted for `on_before_optimizer_step`; the step logs the mean of all of them.

        Args:
            loss: (), mean over `count` hidden tokens or examples.
            count: number of hidden tokens, or of examples.
            samples: ids (B,), or names, for the message if the loss is not finite.
            terms: summands of the loss, each (), to be logged as well.
        """
        self.step_result = None
        self._micro_batches.add(loss.detach(), count, samples)
        if self.logs_this_step:
            named = {f"train/loss_{name}": term.detach() for name, term in (terms or {}).items()}
            self._micro_batches.add_losses({"train/loss": loss.detach()} | named)
        return loss * (count / self._unit())

    def _unit(self) -> float:
        """The count that weights are relative to: the first micro-batch's, or a constant with several processes."""
        return UNIT if self.trainer.world_size > 1 else self._micro_batches.counts[0]

    def measure(self, values: dict[str, Tensor]) -> None:
        """Add other values () of a micro-batch of a logged step; the step logs their mean."""
        self._micro_batches.add_values(values, share=1 / self.trainer.accumulate_grad_batches)

    def set_loss_scale(self, scale: Tensor) -> None:
        """Store the factor () float32 of this step's loss; its gradients have been unscaled already."""
        self._micro_batches.loss_scale = scale.clone()  # the scaler changes it in place

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Scale the gradient to that of the mean over all hidden tokens (or examples) of the step.

        Counts of micro-batches may differ, and Lightning takes their plain mean over the step and over processes. Each
        was weighted by its count relative to a unit, so that one factor remains. With one process it is known on the
        host, and it is 1 if counts are equal.
        """
        factor: Tensor | float
        count = sum(self._micro_batches.counts)
        if self.trainer.world_size == 1:
            factor = self.trainer.accumulate_grad_batches * self._unit() / count
        else:
            total = torch.full((), float(count), device=self.device)  # filled on the device: the host does not wait
            dist.all_reduce(total)
            self._micro_batches.count_everywhere = total
            factor = self.trainer.accumulate_grad_batches * self.trainer.world_size * UNIT / total
        if isinstance(factor, Tensor) or factor != 1.0:
            torch._foreach_mul_(gradients(optimizer), factor)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over all gradients, log the norm, and make the optimizer skip a step that is not finite.

        Raises:
            ConfigError: the clipping is not by norm.
        """
        require(gradient_clip_algorithm=gradient_clip_algorithm)
        norm = torch.nn.utils.get_total_norm(gradients(optimizer))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if self.logs_this_step:
            self._micro_batches.add_values({"train/grad_norm": norm}, share=1.0)
        self.check_finite(optimizer, norm)

    def check_finite(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Decide whether to skip this step; if so, the optimizer leaves weights, moments and step counts unchanged."""
        step = self._micro_batches
        loss = torch.as_tensor(step.loss, device=norm.device)
        infinite = (~torch.isfinite(torch.stack([norm + loss, loss]))).float()
        if self.trainer.world_size > 1:
            dist.all_reduce(infinite, dist.ReduceOp.MAX)
        skip_step, loss_is_infinite = infinite
        step.skip_step = step.non_finite = skip_step > 0
        if step.loss_scale is not None:
            # The float16 loss scale is found by trial: an overflow counts as non-finite only at the lowest scale.
            step.non_finite = (loss_is_infinite > 0) | (step.skip_step & (step.loss_scale <= 1))
        if skip_step.device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False):
            # The fused optimizer reads the flag on the device, so that the host does not wait for it.
            optimizer.grad_scale, optimizer.found_inf = None, skip_step
        elif step.skip_step:
            optimizer.zero_grad(set_to_none=True)  # optimizers skip parameters without gradient

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """One optimizer step with the learning rate of the schedule; Lightning calls this with any accumulation."""
        number = self.trainer.global_step + 1  # Lightning counts a step when this method has returned
        lr = self.schedule(number - 1)
        set_lr(optimizer, lr)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step, self._micro_batches = self._micro_batches, MicroBatches()
        metrics: dict[str, Tensor | float] = {"train/lr": lr} | self.after_optimizer_step(number, step.skip_step)
        self.step_result = StepResult(
            step=number,
            metrics=step.metrics(self.trainer.world_size) | metrics if self.logs_after(number) else {},
            skip_step=step.skip_step,
            non_finite=step.non_finite,
            loss_scale=step.loss_scale,
            samples=tuple(step.samples),
        )

    def after_optimizer_step(self, step: int, skip_step: Tensor) -> dict[str, float]:
        """Update what follows the weights, such as the teacher; returns values to log."""
        return {}

    @property
    def logs_this_step(self) -> bool:
        """Whether the current step is logged."""
        return self.logs_after(self.trainer.global_step + 1)

    def logs_after(self, step: int) -> bool:
        """Whether optimizer step number `step` (1, 2, ...) is logged."""
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
        self._feature_std: Tensor | None = None  # () of the current step, if it is logged
        objective.teacher.register_forward_hook(self._watch_features)

    def configure_model(self) -> None:
        """With `strategy=fsdp`, shard the weights."""
        if self.device_mesh is not None:
            shard(self.objective, self.device_mesh["data_parallel"])

    @property
    def has_unused_parameters(self) -> bool:
        """Whether layer drop may skip blocks; all other parameters get a gradient."""
        return bool(self._with_layer_drop)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, weighted by its number of hidden tokens (see `on_before_optimizer_step`)."""
        self.seed_step()
        self._feature_std = None
        output: Data2VecOutput = self.objective(batch)
        terms = output.terms if len(output.terms) > 1 else None
        loss = self.accumulate(output.loss, batch.masks.hidden.numel(), batch.ids, terms=terms)
        if self.logs_this_step:
            everywhere = self.trainer.world_size > 1
            values = {"train/feature_std": self._feature_std}
            values["train/target_std"] = std_over_rows(output.targets, everywhere=everywhere)
            values["train/prediction_std"] = std_over_rows(output.predictions.detach(), everywhere=everywhere)
            self.measure(values)
        return loss

    def _watch_features(self, teacher: nn.Module, inputs: object, outputs: tuple[EncoderOutput, Tensor | None]) -> None:
        """In logged steps, measure the teacher's last layer before the norms of the targets."""
        if self._trainer is not None and self.training and self.logs_this_step:
            encoded, token_mask = outputs
            self._feature_std = relative_std(encoded.layers[-1], token_mask)

    def after_optimizer_step(self, step: int, skip_step: Tensor) -> dict[str, float]:
        """Update the teacher.

        A later hook would be too late: checkpoint callbacks run before it and would save a teacher that is one step
        behind.
        """
        return {"train/tau": self.objective.step_teacher(step, skip_step=skip_step)}

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of student and decoder; the teacher has no trainable parameters."""
        return self.make_optimizer(
            [self.objective.student, self.objective.decoder], no_decay=self.objective.student.no_decay
        )


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of all parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
