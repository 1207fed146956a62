"""Arithmetic of plans: what a training step needs on some hardware, what would fit, how long a run takes.

    allocated   weights + teacher + optimizer + gradients + activations + inputs + working memory + workspaces
                (+ buckets of DDP, + gathered weights of FSDP)
    needed      allocated + gaps between tensors + what CUDA takes for itself
    seconds     micro-batches x FLOPs / (matmul rate x utilisation) + bytes of optimizer and teacher / bandwidth

All bytes but the reserve come from a dry run. Working memory is what exists at the worst moment besides that which is
named: buffers of the teacher's pass and of the backward pass. Time of messages between devices is not in it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from data2vec_train.batch import Batch
from data2vec_train.encoders.transformer import Transformer, blocks_of
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.plan.dry_run import StepMemory, resized, step_flops, step_memory, tensors_of

GIB = 2**30
MOST_SAMPLES = 1 << 20  # more than this is not looked for


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device; see `configs/hardware`."""

    name: str
    gpu: bool
    memory_gib: float
    devices: int
    tflops: Mapping[str, float | None]
    bandwidth_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Memory that no dry run sees; see `configs/plan.yaml`."""

    workspace_gib: float
    context_gib: float
    fragmentation: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What can be changed so that a run fits.

    Attributes:
        samples: of a micro-batch on one device.
        masks_per_sample: M.
        low: type of autocast, None = off.
        checkpointing: blocks are computed again in the backward pass.
        strategy: "single", "ddp" or "fsdp".
        devices: altogether.
        accumulate: micro-batches of a step.
    """

    samples: int
    masks_per_sample: int
    low: torch.dtype | None
    checkpointing: bool
    strategy: str
    devices: int
    accumulate: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and the dry run that they come from."""

    parts: dict[str, int]
    fragmentation: int
    context: int
    step: StepMemory

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What the device has to have."""
        return self.allocated + self.fragmentation + self.context


class Planner:
    """Answers what training `objective` takes.

    Args:
        objective: on the meta device.
        batch: a few samples, to have their shapes.
        optimizer: of the objective, with the state that it has after a step.
        hardware: one device.
        reserve: what is added.
    """

    def __init__(
        self,
        *,
        objective: Data2Vec,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        hardware: Hardware,
        reserve: Reserve,
    ) -> None:
        self.objective = objective
        self.memory = cache(self._memory)
        self.batch = batch
        self.hardware = hardware
        self.reserve = reserve
        self.weights = _bytes(objective.student, objective.decoder)
        self.teacher = _bytes(objective.teacher)
        self.moments = sum(one.nbytes for one in tensors_of(optimizer))
        self.transformers = [one for one in objective.student.modules() if isinstance(one, Transformer)]
        for transformer in self.transformers:
            transformer.layer_drop = 0.0  # the worst case: no block is skipped
        objective.train()

    def _like(self, setup: Setup, samples: int) -> Batch:
        """Makes the objective as the setup has it, and a batch for it."""
        self.objective.masks_per_sample = setup.masks_per_sample
        for transformer in self.transformers:
            transformer.activation_checkpointing = setup.checkpointing
        return resized(self.batch, samples=samples, masks_per_sample=setup.masks_per_sample)

    def _memory(self, setup: Setup) -> Memory:
        """Of one device."""
        batch = self._like(setup, setup.samples)
        accumulates = setup.accumulate > 1
        step = step_memory(self.objective, batch, low=setup.low, gpu=self.hardware.gpu, accumulates=accumulates)
        inputs = sum(one.nbytes for one in tensors_of(batch))
        # The gradients of the step before are still there in the forward pass, of this one in the backward pass.
        peak = max(step.gradients + step.forward_peak, step.backward_peak + (step.gradients if accumulates else 0))
        shards = setup.devices if setup.strategy == "fsdp" else 1
        parts = {
            "student and decoder": self.weights // shards,
            "teacher": self.teacher // shards,
            "optimizer": self.moments // shards,
            "gradients": step.gradients // shards,
            "activations": step.activations,
            "inputs": inputs,
            "working memory": peak - step.gradients - step.activations,
        }
        if setup.strategy == "ddp":
            parts["buckets for messages"] = step.gradients
        if setup.strategy == "fsdp":
            parts["gathered weights"] = self._gathered
        workspace, context = (self.reserve.workspace_gib, self.reserve.context_gib) if self.hardware.gpu else (0, 0)
        parts["workspaces"] = round(workspace * GIB)
        of_step = parts["activations"] + parts["inputs"] + parts["working memory"]
        return Memory(parts, round(self.reserve.fragmentation * of_step), round(context * GIB), step)

    @cached_property
    def _gathered(self) -> int:
        """Whole weights under FSDP: two blocks, the second being fetched, and what belongs to no block."""
        blocks = [_bytes(one) for one in blocks_of(self.objective.student)]
        return self.weights - sum(blocks) + 2 * max(blocks, default=0)

    def flops(self, setup: Setup) -> dict[str, int]:
        """Part -> floating-point operations of one sample."""
        return step_flops(self.objective, self._like(setup, 1), low=setup.low, gpu=self.hardware.gpu)

    def seconds(self, setup: Setup, *, flops_per_sample: int, tflops: float, utilisation: float) -> float:
        """Of one optimizer step."""
        compute = setup.accumulate * setup.samples * flops_per_sample / (tflops * 1e12 * utilisation)
        trained = sum(one.nbytes for one in self.objective.parameters() if one.requires_grad)
        # Weights and moments are read and written, gradients read; the teacher is read and written, the student read.
        moved = 3 * trained + 2 * self.moments + 3 * self.teacher
        shards = setup.devices if setup.strategy == "fsdp" else 1
        return compute + moved / shards / (self.hardware.bandwidth_gb_s * 1e9)

    @property
    def limit(self) -> int:
        """Bytes of the device."""
        return round(self.hardware.memory_gib * GIB)


def largest_that_fits(needed: Callable[[int], int], limit: int, *, near: int) -> int:
    """The largest n with needed(n) <= limit, 0 when there is none.

    Args:
        needed: grows, and almost linearly.
        limit: see above.
        near: where to begin, at least 1.
    """
    low, high = 0, MOST_SAMPLES + 1  # fits, does not
    at, before = near, 2 * near
    while high - low > 1:
        size = needed(at)
        low, high = (max(low, at), high) if size <= limit else (low, min(high, at))
        slope = (needed(before) - size) / (before - at)
        guess = at + math.floor((limit - size) / max(slope, 1))
        before, at = at, min(max(guess, low + 1), high - 1)
    return low


def _bytes(*modules: torch.nn.Module) -> int:
    return sum(one.nbytes for module in modules for one in tensors_of(module))
