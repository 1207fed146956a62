"""Arithmetic of plans: the memory of a training step on some hardware, what fits, how long a run takes.

    allocated   weights + teacher + optimizer + gradients + activations + inputs + working memory + workspaces
                (+ buckets of DDP, + gathered weights of FSDP)
    needed      allocated + fragmentation + memory of the CUDA context
    seconds     micro-batches x FLOPs / (matmul rate x utilisation) + bytes of optimizer and teacher / bandwidth

All bytes except the reserve come from a dry run. Working memory is everything else that exists at the peak: buffers of
the teacher's forward pass and of the backward pass. Communication between devices is not included in the time.
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
MOST_SAMPLES = 1 << 20  # upper limit of the search


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device; see `configs/hardware` for the units."""

    name: str
    gpu: bool
    memory_gib: float
    devices: int
    tflops: Mapping[str, float | None]
    bandwidth_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Memory that a dry run cannot count; see `configs/plan.yaml`."""

    workspace_gib: float
    context_gib: float
    fragmentation: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings that can be changed to make a run fit.

    Attributes:
        samples: samples of a micro-batch on one device.
        masks_per_sample: M.
        low: dtype of autocast, None = off.
        checkpointing: whether blocks are recomputed in the backward pass.
        strategy: "single", "ddp" or "fsdp".
        devices: total number of devices.
        accumulate: micro-batches per step.
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
    """Bytes on one device, and the dry run that they are computed from."""

    parts: dict[str, int]
    fragmentation: int
    context: int
    step: StepMemory

    @property
    def allocated(self) -> int:
        """The value that `torch.cuda.max_memory_allocated` would return."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """The memory that the device must have."""
        return self.allocated + self.fragmentation + self.context


class Planner:
    """Memory and time of training `objective`.

    Args:
        objective: on the meta device.
        batch: a few samples, which give the shapes.
        optimizer: the optimizer of the objective, with its state after one step.
        hardware: one device.
        reserve: memory to add.
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
        self.moments = sum(tensor.nbytes for tensor in tensors_of(optimizer))
        self.transformers = [module for module in objective.student.modules() if isinstance(module, Transformer)]
        for transformer in self.transformers:
            transformer.layer_drop = 0.0  # the worst case: no block is skipped
        objective.train()

    def _like(self, setup: Setup, samples: int) -> Batch:
        """Apply the setup to the objective, and make a batch for it."""
        self.objective.masks_per_sample = setup.masks_per_sample
        for transformer in self.transformers:
            transformer.activation_checkpointing = setup.checkpointing
        return resized(self.batch, samples=samples, masks_per_sample=setup.masks_per_sample)

    def _memory(self, setup: Setup) -> Memory:
        """Memory of one device."""
        batch = self._like(setup, setup.samples)
        accumulates = setup.accumulate > 1
        step = step_memory(self.objective, batch, low=setup.low, gpu=self.hardware.gpu, accumulates=accumulates)
        inputs = sum(tensor.nbytes for tensor in tensors_of(batch))
        # Gradients of the previous step still exist in the forward pass, those of this step in the backward pass.
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
        """Bytes of gathered weights under FSDP: two blocks, one of them prefetched, and all weights outside blocks."""
        blocks = [_bytes(block) for block in blocks_of(self.objective.student)]
        return self.weights - sum(blocks) + 2 * max(blocks, default=0)

    def flops(self, setup: Setup) -> dict[str, int]:
        """Part -> floating-point operations of one sample."""
        return step_flops(self.objective, self._like(setup, 1), low=setup.low, gpu=self.hardware.gpu)

    def seconds(self, setup: Setup, *, flops_per_sample: int, tflops: float, utilisation: float) -> float:
        """Duration of one optimizer step."""
        compute = setup.accumulate * setup.samples * flops_per_sample / (tflops * 1e12 * utilisation)
        trained = sum(parameter.nbytes for parameter in self.objective.parameters() if parameter.requires_grad)
        # Weights and moments are read and written, gradients read; the teacher is read and written, the student read.
        moved = 3 * trained + 2 * self.moments + 3 * self.teacher
        shards = setup.devices if setup.strategy == "fsdp" else 1
        return compute + moved / shards / (self.hardware.bandwidth_gb_s * 1e9)

    @property
    def limit(self) -> int:
        """Memory of the device in bytes."""
        return round(self.hardware.memory_gib * GIB)


def largest_that_fits(needed: Callable[[int], int], limit: int, *, near: int) -> int:
    """The largest n with needed(n) <= limit, or 0.

    Args:
        needed: an increasing, almost linear function.
        limit: see above.
        near: first n to try, at least 1.
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
    return sum(tensor.nbytes for module in modules for tensor in tensors_of(module))
