"""What one optimizer step produced, and the sums over micro-batches that it is computed from."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

Samples = Tensor | tuple[str, ...]  # the samples of one micro-batch: ids (B,) int64, or names


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step produced.

    Tensors are on the module's device; reading one makes the host wait for the step.

    Args:
        step: number of the optimizer step; the first of a run is 1.
        metrics: logged values by their name in metrics.csv: () float32, or a number. Empty if the step is not logged.
            `train/loss` and `train/loss_<term>` are the optimized loss and its terms: means over all hidden tokens
            (fine-tuning: examples) of all micro-batches and processes. `train/grad_norm` is the norm of the loss's
            gradient before clipping. The rest are means over micro-batches and processes.
        skip_step: () bool, the same on all processes: loss or gradient is not finite on one of them, so that optimizer
            and teacher skip the step.
        non_finite: () bool: `skip_step`, and a lower loss scale would not help. Without float16 it is `skip_step`.
        loss_scale: () float32, factor of the loss in the backward pass; None without float16.
        samples: what this process trained on, by micro-batch.
    """

    step: int
    metrics: dict[str, Tensor | float]
    skip_step: Tensor
    non_finite: Tensor
    loss_scale: Tensor | None
    samples: tuple[Samples, ...]


@dataclass
class MicroBatches:
    """Sums over the micro-batches of this process since the last optimizer step, and the flags of that step.

    Args:
        counts: hidden tokens, or examples, of each micro-batch.
        samples: of each micro-batch.
        loss: sum of the mean losses of the micro-batches, to check that all are finite.
        losses: of a logged step, sums of the losses, each weighted with its count relative to the first.
        values: of a logged step, means over micro-batches.
        count_everywhere: () float32, sum of `counts` over all processes; None with one process.
        loss_scale, skip_step, non_finite: see `StepResult`.
    """

    counts: list[int] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    loss: Tensor | float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    count_everywhere: Tensor | None = None
    loss_scale: Tensor | None = None
    skip_step: Tensor | None = None
    non_finite: Tensor | None = None

    def add(self, loss: Tensor, count: int, samples: Samples) -> None:
        """Add a micro-batch with its mean loss () over `count` tokens or examples."""
        self.counts.append(count)
        self.samples.append(samples)
        self.loss = self.loss + loss

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Add mean losses () of the latest micro-batch."""
        weight = self.counts[-1] / self.counts[0]
        self.losses = {name: self.losses.get(name, 0.0) + weight * loss for name, loss in losses.items()}

    def add_values(self, values: dict[str, Tensor], *, share: float) -> None:
        """Add values () of one micro-batch with weight `share`, the same for all micro-batches of the step."""
        sums = {name: self.values.get(name, 0.0) + share * value for name, value in values.items()}
        self.values = self.values | sums

    def metrics(self, world_size: int) -> dict[str, Tensor]:
        """The means of a logged step over micro-batches and processes; every process must call this."""
        share_of_first = self.counts[0] / sum(self.counts)
        losses = {name: loss * share_of_first for name, loss in self.losses.items()}
        if world_size == 1:
            return losses | self.values
        # Exactly 1 where counts are equal, so that weighting then changes no bit.
        weight = sum(self.counts) * world_size / self.count_everywhere
        values = {name: loss * weight for name, loss in losses.items()} | self.values
        sums = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(sums)
        return dict(zip(values, sums / world_size, strict=True))
