"""The LightningModule of fine-tuning, and the callback that evaluates it."""

import math
import time
from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from data2vec_train.errors import CollapseError
from data2vec_train.finetune.base import Examples, HeadTask, Meter
from data2vec_train.finetune.data import FinetuneData
from data2vec_train.system.clock import seconds_since
from data2vec_train.training.module import TrainingModule
from data2vec_train.training.optim import Schedule
from data2vec_train.training.precision import in_float32
from data2vec_train.weights.base import PretrainedModel


class FinetuneModule(TrainingModule):
    """Trains an encoder with a head.

    Args:
        model: one of the twelve models with a head.
        task: the task of the head.
        optimizer: makes the optimizer, such as `optim.layered_adamw`.
        encoder_frozen_steps: optimizer steps before the encoder is trained too; None = it stays frozen.
        front_end_frozen: whether `front_end` stays frozen.
        decay_embeddings: whether layer-wise decay applies to embeddings too; the original 2.0 code excludes them
            (ALGORITHM.md 7, row 22).
        schedule, seed, log_every_n_steps: see `TrainingModule`.
    """

    def __init__(
        self,
        *,
        model: PretrainedModel,
        task: HeadTask,
        optimizer: Callable[..., Optimizer],
        encoder_frozen_steps: int | None,
        front_end_frozen: bool,
        decay_embeddings: bool,
        schedule: Schedule,
        seed: int,
        log_every_n_steps: int,
    ) -> None:
        super().__init__(schedule=schedule, seed=seed, log_every_n_steps=log_every_n_steps)
        self.model = model
        self.task = task
        self.make_optimizer = optimizer
        self.encoder_frozen_steps = encoder_frozen_steps
        self.front_end_frozen = front_end_frozen
        self.decay_embeddings = decay_embeddings
        self._learns: bool | None = None  # whether the encoder is trained at this step

    def on_fit_start(self) -> None:
        """Set training mode: weights are loaded in evaluation mode, and Lightning does not change the mode."""
        self.model.train()

    def on_train_batch_start(self, batch: Examples, batch_idx: int) -> None:
        """Unfreeze the encoder once `encoder_frozen_steps` steps have passed."""
        wait = self.encoder_frozen_steps
        self._set_learning(wait is not None and self.trainer.global_step >= wait)

    def _set_learning(self, learns: bool) -> None:
        if learns == self._learns:
            return
        self._learns = learns
        self.model.get_encoder().requires_grad_(learns)
        if self.front_end_frozen:
            front_end(self.model).requires_grad_(False)

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, weighted by its number of examples."""
        self.seed_step()
        loss, _ = self.task.loss(self.model, batch)
        return self.accumulate(loss, len(batch), batch.keys)

    def configure_optimizers(self) -> Optimizer:
        """An optimizer of all parameters that are trained at some step; always frozen ones are in no group."""
        self._learns = None
        self._set_learning(self.encoder_frozen_steps is not None)
        encoder = self.model.get_encoder()
        return self.make_optimizer(self.model, block_of=self._block_of, no_decay=encoder.no_decay)

    def _block_of(self, name: str) -> int:
        """The number of layers above the layer that a parameter belongs to."""
        _, inside, rest = name.partition("encoder.")
        depth = self.model.get_encoder().depth
        if not inside or not rest:
            return 0
        if rest.startswith("transformer.blocks."):
            return depth - int(rest.split(".")[2])
        is_input = rest.startswith(
            ("embedder.", "positions.", "class_token", "mask_token", "learned_pos", "input_norm")
        )
        return depth + 1 if is_input and self.decay_embeddings else 0


def front_end(model: PretrainedModel) -> torch.nn.Module:
    """The module that `front_end_frozen` freezes: for speech the convolutions, otherwise the whole embedder."""
    embedder = model.get_encoder().embedder
    return embedder.features if hasattr(embedder, "features") else embedder


class Evaluation(L.Callback):
    """Scores the model on the test examples every n steps and at the end.

    Results are in `metrics` (the latest, by metric name) and `best`.

    Args:
        every_n_steps: optimizer steps between evaluations.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float | int] = {}  # scores and the step of the best evaluation
        self.measured_at = -1
        self.seconds = 0.0  # spent on evaluation; not counted as training time

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: FinetuneModule, *_: object) -> None:
        """Evaluate every `every_n_steps` steps and at the last step."""
        step = trainer.global_step
        data: FinetuneData = trainer.datamodule
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if not due or step == self.measured_at or data.test_set is None:
            return
        self.measured_at = step
        started = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            loss, meter = evaluate(pl_module.model, pl_module.task, in_float32(data.test_batches()))
        scores = meter.compute() | ({} if loss is None else {"loss": loss})
        self.metrics = {f"test/{name}": value for name, value in scores.items()}
        task = pl_module.task
        if not self.best or _rank(task, scores) > _rank(task, self.best):
            self.best = scores | {"step": step}
        self.seconds += seconds_since(started)
        # For the checkpoint callback; the loggers get their row from the monitor.
        pl_module.log_dict(self.metrics, logger=False)

    @property
    def best_step(self) -> int | None:
        """The step of the best scores so far."""
        return self.best.get("step")

    def state_dict(self) -> dict:
        """Latest and best results."""
        return {"metrics": self.metrics, "best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the latest and best results."""
        self.metrics, self.best = state_dict["metrics"], state_dict["best"]


def _rank(task: HeadTask, scores: dict[str, float | int]) -> tuple[float, float]:
    """Sort key, higher is better; equal scores, such as a word error rate of 1 early on, by loss; NaN is worst."""
    score = -scores[task.metric] if task.lower_is_better else scores[task.metric]
    return (-math.inf if math.isnan(score) else score), -scores.get("loss", math.inf)


@torch.no_grad()
def evaluate(model: PretrainedModel, task: HeadTask, batches: Iterable[Examples]) -> tuple[float | None, Meter]:
    """Mean loss over all examples (None without labels), and a meter that holds the scores; in evaluation mode.

    Raises:
        CollapseError: outputs are not finite.
    """
    was_training = model.training
    meter = task.meter()
    total, count = 0.0, 0
    try:
        for batch in batches:
            model.eval()
            moved = batch.to(model.device)
            loss, outputs = task.loss(model, moved)
            if not all(bool(x.isfinite().all()) for x in outputs.values() if isinstance(x, Tensor)):
                raise CollapseError(
                    "outputs for test records are not finite: training diverged. Try a lower optimizer.lr"
                )
            counted = task.counted(batch)
            if loss is not None and counted:
                total, count = total + float(loss) * counted, count + counted
            meter.update(outputs, moved)
    finally:
        model.train(was_training)
    return (total / count if count else None), meter
