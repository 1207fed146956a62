"""Probes during training: is the encoder better than it was before training, and better than no encoder at all?

Three rows are measured in the same run with the same code on the same samples: the untrained encoder, the raw input,
and the encoder as it is now. Features are the mean over the patch tokens of the last block's output.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import Batch, ModalityEncoder
from data2vec_train.errors import CollapseError
from data2vec_train.probes.measures import knn_accuracy, linear_accuracy, rankme

RAW_INPUT_PX = 32


@dataclass(frozen=True)
class Labelled:
    """Features (n, D) with classes (n,)."""

    features: np.ndarray
    labels: np.ndarray | None


class ProbeCallback(L.Callback):
    """Measures kNN, linear probe and RankMe before training, every n steps and at the end.

    Results land in `metrics` (the latest, by metric name) and `summary` (for summary.json).

    Args:
        every_n_steps: optimizer steps between measurements.
        neighbours: of the kNN probe.
        l2: penalty of the linear probe.
        rank_samples: how many samples RankMe looks at.
    """

    def __init__(self, *, every_n_steps: int, neighbours: int, l2: float, rank_samples: int) -> None:
        self.every_n_steps = every_n_steps
        self.neighbours = neighbours
        self.l2 = l2
        self.rank_samples = rank_samples
        self.metrics: dict[str, float] = {}
        self.accuracies: dict[str, dict[str, float]] = {"knn": {}, "linear": {}}
        self.ranks: dict[str, float] = {}
        self.measured_at = -1
        self.seconds = 0.0  # spent here, which is not training time

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Baselines; on resuming, those of the first start are kept."""
        self.measured_at = trainer.global_step
        if self.ranks:
            return
        start = time.perf_counter()
        data: DataModule = trainer.datamodule
        if data.test_set is not None:
            raw = [raw_input(data.evaluation_batches(dataset)) for dataset in (data.fit_set, data.test_set)]
            self._score("raw_input", *raw)
        self._measure(trainer, pl_module.objective.student, "untrained")
        self.seconds += time.perf_counter() - start

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Measure when it is time."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self.measured_at:
            self.measured_at = step
            start = time.perf_counter()
            self._measure(trainer, pl_module.objective.student, "trained")
            if step == trainer.max_steps:
                self._measure(trainer, pl_module.objective.teacher.encoder, "teacher")
            self.seconds += time.perf_counter() - start
            # For the checkpoint callback; the loggers get their row from the monitor.
            pl_module.log_dict(self.metrics, logger=False)

    def _measure(self, trainer: L.Trainer, encoder: ModalityEncoder, which: str) -> None:
        data: DataModule = trainer.datamodule
        with trainer.precision_plugin.forward_context():
            if data.test_set is not None:
                fit = encode(encoder, data.evaluation_batches(data.fit_set))
                test = encode(encoder, data.evaluation_batches(data.test_set))
                self._score(which, fit, test)
                self.ranks[which] = rankme(test.features[: self.rank_samples])
            else:
                subset = data.training_subset(self.rank_samples)
                if subset is None:
                    return
                self.ranks[which] = rankme(encode(encoder, data.evaluation_batches(subset)).features)
        if which != "teacher":
            self.metrics["probe/rankme"] = self.ranks[which]

    def _score(self, which: str, fit: Labelled, test: Labelled) -> None:
        arrays = (fit.features, fit.labels, test.features, test.labels)
        self.accuracies["knn"][which] = knn_accuracy(*arrays, neighbours=self.neighbours)
        self.accuracies["linear"][which] = linear_accuracy(*arrays, l2=self.l2)
        if which in ("untrained", "trained"):
            self.metrics |= {f"probe/{name}": values[which] for name, values in self.accuracies.items()}

    @property
    def summary(self) -> dict:
        """`rankme` and `probe` as they appear in summary.json; `probe` is None without labels."""
        rank = self.ranks.get("trained", self.ranks.get("untrained"))
        probe = None
        if self.accuracies["knn"]:
            probe = {name: dict(values) for name, values in self.accuracies.items()}
            probe["weights"] = "student"
        return {"rankme": rank, "rankme_untrained": self.ranks.get("untrained"), "probe": probe}

    def state_dict(self) -> dict:
        """Baselines and latest results, so that a resumed run keeps its own baselines."""
        return {"accuracies": self.accuracies, "ranks": self.ranks, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict) -> None:
        """See `state_dict`."""
        self.accuracies, self.ranks = state_dict["accuracies"], state_dict["ranks"]
        self.metrics = state_dict["metrics"]


def raw_input(batches: Iterable[Batch]) -> Labelled:
    """The input itself as features, see `raw_pixels`."""
    pairs = [(raw_pixels(batch.inputs), batch.labels.numpy()) for batch in batches]
    return Labelled(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))


def raw_pixels(images: Tensor) -> np.ndarray:
    """Images (B, C, H, W) as rows of pixels; sides above 32 px are averaged down, distances would only get noisier."""
    size = [min(side, RAW_INPUT_PX) for side in images.shape[-2:]]
    return F.adaptive_avg_pool2d(images, size).flatten(1).numpy()


@torch.no_grad()
def encode(encoder: ModalityEncoder, batches: Iterable[Batch]) -> Labelled:
    """Mean patch feature of every sample, in evaluation mode, float32.

    Raises:
        CollapseError: features that are not finite.
    """
    features, labels = [], []
    for tokens, batch in patch_features(encoder, batches):
        features.append(tokens.mean(dim=1).cpu().numpy())
        labels.append(None if batch.labels is None else batch.labels.numpy())
    if not all(np.isfinite(part).all() for part in features):
        raise CollapseError("the encoder's features are not finite: training diverged. Try a lower optimizer.lr")
    with_labels = all(part is not None for part in labels)
    return Labelled(np.concatenate(features), np.concatenate(labels) if with_labels else None)


@torch.no_grad()
def patch_features(encoder: ModalityEncoder, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Batch]]:
    """Yield (patch tokens (B, T, D) float32, batch) for each batch; the encoder's mode is restored afterwards."""
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    try:
        for batch in batches:
            yield encoder(batch.inputs.to(device)).tokens.float(), batch
    finally:
        encoder.train(was_training)
