"""The LightningModule of fine-tuning, and the callback that scores it."""

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
    """Training of an encoder with a head on it.

    Args:
        model: one of the twelve.
        task: what its head is for.
        optimizer: makes the optimizer, such as `optim.layered_adamw`.
        encoder_frozen_steps: optimizer steps before the encoder learns too; None = it never does.
        front_end_frozen: whether what turns inputs into tokens never learns (speech: the convolutions).
        decay_embeddings: whether layer-wise decay slows embeddings too; the originals of 2.0 leave them out
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
        self._learns: bool | None = None  # whether the encoder does at this step

    def on_fit_start(self) -> None:
        """Lightning leaves the mode of a module as it finds it, and weights come in evaluation mode."""
        self.model.train()

    def on_train_batch_start(self, batch: Examples, batch_idx: int) -> None:
        """Let the encoder learn from the step on that is set."""
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
        """Everything that will learn at some step; what never does is in no group."""
        self._learns = None
        self._set_learning(self.encoder_frozen_steps is not None)
        encoder = self.model.get_encoder()
        return self.make_optimizer(self.model, block_of=self._block_of, no_decay=encoder.no_decay)

    def _block_of(self, name: str) -> int:
        """How many layers lie above the one that a parameter is in."""
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
    """What stays fixed with `front_end_frozen`: of speech the convolutions, else all that makes tokens."""
    embedder = model.get_encoder().embedder
    return embedder.features if hasattr(embedder, "features") else embedder


class Evaluation(L.Callback):
    """Scores the model on the test examples every n steps and at the end.

    Results land in `metrics` (the latest, by metric name) and `best`.

    Args:
        every_n_steps: optimizer steps between evaluations.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float | int] = {}  # scores and the step of the best evaluation
        self.measured_at = -1
        self.seconds = 0.0  # spent here, which is not training time

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: FinetuneModule, *_: object) -> None:
        """Measure when it is time."""
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
        """When the best scores so far were measured."""
        return self.best.get("step")

    def state_dict(self) -> dict:
        """Latest and best results."""
        return {"metrics": self.metrics, "best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        """See `state_dict`."""
        self.metrics, self.best = state_dict["metrics"], state_dict["best"]


def _rank(task: HeadTask, scores: dict[str, float | int]) -> tuple[float, float]:
    """Higher is better. Among equal scores, such as a word error rate of 1 early on, the lower loss; NaN is worst."""
    score = -scores[task.metric] if task.lower_is_better else scores[task.metric]
    return (-math.inf if math.isnan(score) else score), -scores.get("loss", math.inf)


@torch.no_grad()
def evaluate(model: PretrainedModel, task: HeadTask, batches: Iterable[Examples]) -> tuple[float | None, Meter]:
    """Mean loss over the batches' examples, None without labels; and a meter that has seen them. In evaluation mode.

    Raises:
        CollapseError: outputs that are not finite.
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
