"""Probes during training: is the encoder better than it was before training, and better than no encoder at all?

Three rows are measured in the same run with the same code on the same samples: the untrained encoder, the raw input,
and the current encoder. Features are pooled over the tokens of the last block's output.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from data2vec_train.batch import Batch
from data2vec_train.data.datamodule import DataModule
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.errors import CollapseError
from data2vec_train.features.embedding import pool
from data2vec_train.features.measures import knn_accuracy, linear_accuracy, rankme
from data2vec_train.features.r2 import held_out_r2
from data2vec_train.system.clock import seconds_since
from data2vec_train.system.constraints import checked
from data2vec_train.training.precision import in_float32, uncompiled

Pooling = Literal["mean", "mean_std"]
RawFeatures = Callable[[Tensor, Tensor | None], np.ndarray]  # (inputs, attention_mask) -> (B, F)


@dataclass(frozen=True)
class Labelled:
    """Features (n, D) with classes (n,)."""

    features: np.ndarray
    labels: np.ndarray | None


class ProbeCallback(L.Callback):
    """Measures kNN, linear probe, RankMe and the pretext task before training, every n steps and at the end.

    Results are in `metrics` (the latest, by metric name) and `summary` (for summary.json).

    Args:
        every_n_steps: optimizer steps between measurements.
        neighbours: number of neighbours of the kNN probe.
        l2: penalty of the linear probe.
        rank_samples: number of samples for RankMe.
        pooling: "mean" of a sample's tokens, or "mean_std", the mean and the standard deviation (2 D features).
        raw: features of the input itself, the baseline of the probes.
        raw_name: name of these features in reports.
        note: remark on the probe of this data for reports; None = none.

    Raises:
        ConfigError: an unknown pooling.
    """

    @checked
    def __init__(
        self,
        *,
        every_n_steps: int,
        neighbours: int,
        l2: float,
        rank_samples: int,
        pooling: Pooling,
        raw: RawFeatures,
        raw_name: str,
        note: str | None,
    ) -> None:
        self.pooling: Pooling = pooling
        self.raw = raw
        self.raw_name = raw_name
        self.note = note
        self.every_n_steps = every_n_steps
        self.neighbours = neighbours
        self.l2 = l2
        self.rank_samples = rank_samples
        self.metrics: dict[str, float] = {}
        self.accuracies: dict[str, dict[str, float]] = {"knn": {}, "linear": {}}
        self.ranks: dict[str, float] = {}
        self.r2: dict[str, float | int] = {}
        self.best: dict[str, float | int] = {}  # highest kNN accuracy and its step
        self.samples: dict[str, int] = {}  # numbers of usable samples
        self.measured_at = -1
        self.seconds = 0.0  # spent here, which is not training time

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the baselines; a resumed run keeps those of its first start."""
        self.measured_at = trainer.global_step
        if self.ranks:
            return
        start = time.perf_counter()
        data: DataModule = trainer.datamodule
        if data.test_set is not None:
            raw = [raw_input(self.raw, data.evaluation_batches(subset)) for subset in (data.fit_set, data.test_set)]
            self._score("raw_input", *raw)
        self._measure(trainer, pl_module.objective.student, "untrained")
        self._measure_r2(trainer, pl_module, "untrained")
        self.seconds += seconds_since(start)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Measure every n steps and at the last step."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self.measured_at:
            self.measured_at = step
            start = time.perf_counter()
            self._measure(trainer, pl_module.objective.student, "trained")
            self._measure_r2(trainer, pl_module, "trained")
            accuracy = self.accuracies["knn"].get("trained")
            if accuracy is not None and accuracy > self.best.get("knn", -1):
                self.best = {"knn": accuracy, "step": step}
            if step == trainer.max_steps:
                teacher = pl_module.objective.teacher
                embedder = pl_module.objective.student if teacher.share_embeddings else None
                self._measure(trainer, teacher.encoder, "teacher", embedder=embedder)
            self.seconds += seconds_since(start)
            # For the checkpoint callback; the monitor passes a row to the loggers.
            pl_module.log_dict(self.metrics, logger=False)

    def _measure(
        self, trainer: L.Trainer, encoder: ModalityEncoder, which: str, *, embedder: ModalityEncoder | None = None
    ) -> None:
        data: DataModule = trainer.datamodule
        how = {"pooling": self.pooling, "embedder": embedder}
        with uncompiled(), trainer.precision_plugin.forward_context():
            if data.test_set is not None:
                fit = encode(encoder, in_float32(data.evaluation_batches(data.fit_set)), **how)
                test = encode(encoder, in_float32(data.evaluation_batches(data.test_set)), **how)
                self._score(which, fit, test)
                self.ranks[which] = rankme(test.features[: self.rank_samples])
            else:
                subset = data.training_subset(self.rank_samples)
                if subset is None:
                    return
                self.ranks[which] = rankme(encode(encoder, in_float32(data.evaluation_batches(subset)), **how).features)
        if which != "teacher":
            self.metrics["probe/rankme"] = self.ranks[which]

    def _measure_r2(self, trainer: L.Trainer, pl_module: L.LightningModule, which: str) -> None:
        data: DataModule = trainer.datamodule
        if data.held_out_set is None:
            return
        with uncompiled(), trainer.precision_plugin.forward_context():
            batches = in_float32(data.evaluation_batches(data.held_out_set, masked=True))
            r2, tokens, samples = held_out_r2(pl_module.objective, batches, device=pl_module.device)
        self.r2 |= {which: r2, "samples": samples, "tokens": tokens}
        self.metrics["heldout/r2"] = r2

    def _score(self, which: str, fit: Labelled, test: Labelled) -> None:
        self.samples = {"fit_samples": len(fit.labels), "test_samples": len(test.labels)}
        arrays = (fit.features, fit.labels, test.features, test.labels)
        self.accuracies["knn"][which] = knn_accuracy(*arrays, neighbours=self.neighbours)
        self.accuracies["linear"][which] = linear_accuracy(*arrays, l2=self.l2)
        if which in ("untrained", "trained"):
            self.metrics |= {f"probe/{name}": values[which] for name, values in self.accuracies.items()}

    @property
    def best_step(self) -> int | None:
        """The step with the highest kNN accuracy so far; None without labels."""
        return self.best.get("step")

    @property
    def summary(self) -> dict:
        """`rankme` and `probe` as they appear in summary.json; `probe` is None without labels."""
        rank = self.ranks.get("trained", self.ranks.get("untrained"))
        probe = None
        if self.accuracies["knn"]:
            probe = {name: dict(values) for name, values in self.accuracies.items()}
            pooling = {"mean": "mean over tokens", "mean_std": "mean and deviation over tokens"}[self.pooling]
            probe |= {"weights": "student", "pooling": pooling, "raw_input_name": self.raw_name, "note": self.note}
            probe |= self.samples
        return {
            "rankme": rank,
            "rankme_untrained": self.ranks.get("untrained"),
            "r2": dict(self.r2) or None,
            "probe": probe,
        }

    def state_dict(self) -> dict:
        """Baselines and latest results, so that a resumed run keeps its own baselines."""
        return {
            "accuracies": self.accuracies,
            "ranks": self.ranks,
            "r2": self.r2,
            "metrics": self.metrics,
            "best": self.best,
            "samples": self.samples,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore baselines and latest results."""
        self.accuracies, self.ranks = state_dict["accuracies"], state_dict["ranks"]
        renamed = {"heldout/explained": "heldout/r2"}  # name in older checkpoints -> name now
        self.metrics = {renamed.get(name, name): value for name, value in state_dict["metrics"].items()}
        self.r2 = state_dict["r2"] if "r2" in state_dict else state_dict["explained"]
        self.best = state_dict["best"]
        self.samples = state_dict.get("samples", {})  # older checkpoints lack it


def raw_input(raw: RawFeatures, batches: Iterable[Batch]) -> Labelled:
    """The input itself as features."""
    pairs = [(raw(batch.inputs, batch.attention_mask), batch.labels.numpy()) for batch in batches]
    return Labelled(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))


@torch.no_grad()
def encode(
    encoder: ModalityEncoder, batches: Iterable[Batch], *, pooling: Pooling, embedder: ModalityEncoder | None = None
) -> Labelled:
    """Pooled features of every sample, in evaluation mode, float32; for `embedder` see `token_features`.

    Raises:
        CollapseError: features that are not finite.
    """
    features, labels = [], []
    for tokens, token_mask, batch in token_features(encoder, batches, embedder):
        features.append(pool(tokens, token_mask, pooling).cpu().numpy())
        labels.append(None if batch.labels is None else batch.labels.numpy())
    if not all(np.isfinite(part).all() for part in features):
        raise CollapseError("the encoder's features are not finite: training diverged. Try a lower optimizer.lr")
    with_labels = all(part is not None for part in labels)
    return Labelled(np.concatenate(features), np.concatenate(labels) if with_labels else None)


@torch.no_grad()
def token_features(
    encoder: ModalityEncoder, batches: Iterable[Batch], embedder: ModalityEncoder | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Batch]]:
    """Yield (tokens (B, T, D) float32, their mask (B, T) or None, batch) in evaluation mode.

    A teacher without embeddings of its own needs the student as `embedder`. Modes are restored afterwards.
    """
    device = next(encoder.parameters()).device
    embedder = embedder or encoder
    modes = [(module, module.training) for module in (encoder, embedder)]
    try:
        for batch in batches:
            encoder.eval()
            embedder.eval()
            moved = batch.to(device)
            tokens, token_mask = embedder.embed(moved.inputs, moved.attention_mask)
            yield encoder.contextualize(tokens, token_mask).tokens.float(), token_mask, batch
    finally:
        for module, was_training in modes:
            module.train(was_training)
