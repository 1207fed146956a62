"""A training step on the meta device: nothing is computed, but all allocations are counted.

The algorithm and the layers are those of training, with forward, backward and recomputation. `DeviceArithmetic`
corrects what the meta device does differently from a GPU: autocast, the fused attention kernels, dropout masks of one
byte. `Allocations` counts as an allocator does, so the peak includes temporary buffers.

Not counted: allocations inside kernels (workspaces of cuBLAS and cuDNN), and savings by a compiler's fusion.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data2vec_train.batch import Batch, Masks
from data2vec_train.encoders import attention, transformer
from data2vec_train.encoders.attention import Bias, case_of
from data2vec_train.encoders.backends import Case, able, refusal
from data2vec_train.encoders.transformer import blocks_of
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.plan.flops import count_flops
from data2vec_train.system.compat import private

TorchDispatchMode = private("torch.utils._python_dispatch:TorchDispatchMode")
tree_leaves, tree_map = (private(f"torch.utils._pytree:{name}") for name in ("tree_leaves", "tree_map"))

GPU_BLOCK = 512  # bytes; PyTorch's allocator for GPUs rounds up to it
FRONT_END, TEACHER, BLOCKS, DECODER = "front end", "teacher", "blocks", "decoder"
LOSS, COPIES = "targets and loss", "low-precision weights"

# Functions that autocast runs in half precision (_LOWERED), and on GPUs in single precision (_RAISED): the subset of
# its lists (torch/csrc, autocast_mode.h) that encoders and decoders may call.
_LOWERED = {"linear", "conv1d", "conv2d", "conv3d", "bmm", "mm", "matmul", "__matmul__", "__rmatmul__", "addmm"}
_LOWERED |= {"baddbmm", "einsum", "scaled_dot_product_attention"}
_RAISED = {"layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "sum", "prod", "cumsum", "cumprod"}
_RAISED |= {"smooth_l1_loss", "mse_loss", "l1_loss", "exp", "log", "pow", "rsqrt", "norm"}


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors created while the mode is active: `live` now, `peak` since `peak` was last set.

    Args:
        existing: tensors that exist already and are not counted.
        block: sizes are rounded up to a multiple of this many bytes.

    Attributes:
        part: the part that new tensors are assigned to.
    """

    def __init__(self, *, existing: Iterable[Tensor], block: int) -> None:
        super().__init__()
        self.block = block
        self.live = 0
        self.peak = 0
        self.part = LOSS
        self._existing = {_address(tensor) for tensor in existing}
        self._parts: dict[int, str] = {}  # address of a storage -> part
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref] = {}  # their callbacks run when a storage is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._watch(made)
        return result

    def _watch(self, tensor: Tensor) -> None:
        address, storage = _address(tensor), tensor.untyped_storage()
        if address in self._watched or address in self._existing:
            return
        size = math.ceil(storage.nbytes() / self.block) * self.block
        self._parts[address], self._sizes[address] = self.part, size
        self._watched[address] = weakref.ref(storage, lambda _: self._forget(address))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        del self._watched[address], self._parts[address]
        self.live -= self._sizes.pop(address)

    def rebook(self, tensors: Iterable[Tensor], part: str) -> None:
        """Assign tensors to another part."""
        self._parts |= {address: part for tensor in tensors if (address := _address(tensor)) in self._parts}

    def by_part(self) -> dict[str, int]:
        """Part -> bytes of its live tensors."""
        sums: dict[str, int] = {}
        for address, part in self._parts.items():
            sums[part] = sums.get(part, 0) + self._sizes[address]
        return sums


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class DeviceArithmetic(TorchFunctionMode):
    """Makes the meta device choose dtypes and kernels as a GPU or a CPU does.

    Args:
        low: dtype of autocast, None = off.
        gpu: whether the planned device is a GPU.
    """

    def __init__(self, *, low: torch.dtype | None, gpu: bool) -> None:
        super().__init__()
        self.low = low
        self.gpu = gpu
        self.copies: dict[int, Tensor] | None = {}  # id of a trained weight -> low-precision copy; None = no copies

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.low is not None and name in _LOWERED:
            args, kwargs = tree_map(partial(self._cast, dtype=self.low), (args, kwargs))
        elif self.low is not None and self.gpu and name in _RAISED:
            args, kwargs = tree_map(partial(self._cast, dtype=torch.float32), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _attend(*args, gpu=self.gpu, **kwargs)
        if name == "dropout" and self.gpu:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, *, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
        return self.copies[id(value)]


def _dropout(x: Tensor, *, p: float, training: bool, **_: bool) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *, gpu: bool
) -> Tensor:
    """The kernel that `scaled_dot_product_attention` chooses."""
    kernels = torch.ops.aten
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
    if not gpu and (dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    if not gpu:
        return kernels._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=attn_mask)[0]
    if attn_mask is None and q.dtype != torch.float32:
        return kernels._scaled_dot_product_flash_attention(q, k, v, dropout_p, False)[0]
    if attn_mask is not None:
        if width := -attn_mask.shape[-1] % 8:  # the kernel reads rows of eight numbers
            attn_mask = F.pad(attn_mask, (0, width))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return kernels._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Attention backends that have no kernel for the meta device


@contextmanager
def _planned_attention(*, low: torch.dtype | None, gpu: bool) -> Iterator[None]:
    """Make backends refuse what they would refuse on the planned device, and replace those without a meta kernel."""
    device = "cuda" if gpu else "cpu"

    def choose(
        like: Tensor, *, num_heads: int, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
    ) -> str:
        head_dim = like.shape[-1] // num_heads
        case = case_of(device, low or like.dtype, head_dim, key_mask=key_mask, bias=bias, dropout_p=dropout_p)
        return next((name for name in able(case) if name in ("flash", "flex")), "sdpa")

    def refuse(backend: str, case: Case) -> str | None:
        return refusal(backend, replace(case, device=device))

    kernels = {"flash": partial(_flash, gpu=gpu), "flex": _flex} if gpu else {}
    places = [(attention, "refusal", refuse), (attention, "BACKENDS", attention.BACKENDS | kernels)]
    places.append((transformer, "fastest", choose))
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, other in places:
        setattr(module, name, other)
    try:
        yield
    finally:
        for (module, name, _), original in zip(places, before, strict=True):
            setattr(module, name, original)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: None, dropout_p: float, *, gpu: bool
) -> Tensor:
    if key_mask is not None:  # copies of keys and values, with real ones moved to the front
        order = key_mask.int().argsort(dim=1, descending=True, stable=True)[:, None, :, None].expand_as(k)
        k, v = k.gather(2, order), v.gather(2, order)
    return _attend(q, k, v, dropout_p=dropout_p, gpu=gpu)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Bias | Tensor | None, dropout_p: float
) -> Tensor:
    """Stores what FlashAttention stores, in any precision: its result, and one number for each query."""
    mixed = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]
    if bias is None:
        return mixed
    return _Learned.apply(mixed, bias.learned if isinstance(bias, Bias) else bias)


class _Learned(torch.autograd.Function):
    """Identity whose backward allocates a gradient of the bias's size."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, learned: Tensor) -> Tensor:
        ctx.save_for_backward(learned)
        return mixed.view_as(mixed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.empty_like(ctx.saved_tensors[0])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def resized(batch: Batch, *, samples: int, masks_per_sample: int) -> Batch:
    """A batch on the meta device like `batch`, with another number of samples and of masks per sample."""
    was_samples, was_masks_per_sample, num_tokens = batch.masks.masked.shape
    rows = samples * masks_per_sample

    def like(tensor: Tensor | None, *shape: int) -> Tensor | None:
        return None if tensor is None else torch.empty(shape, dtype=tensor.dtype, device="meta")

    def same(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else like(tensor, samples, *tensor.shape[1:])

    masks, visible = batch.masks, batch.masks.visible
    return replace(
        batch.to("meta"),
        inputs=same(batch.inputs),
        attention_mask=same(batch.attention_mask),
        masks=Masks(
            masked=like(masks.masked, samples, masks_per_sample, num_tokens),
            hidden=like(masks.hidden, round(len(masks.hidden) / (was_samples * was_masks_per_sample) * rows)),
            visible=None if visible is None else like(visible, rows, visible.shape[1]),
        ),
        corrupted=None
        if batch.corrupted is None
        else like(batch.corrupted, samples, masks_per_sample, batch.corrupted.shape[-1]),
        teacher_inputs=same(batch.teacher_inputs),
        teacher_attention_mask=same(batch.teacher_attention_mask),
        ids=same(batch.ids),
        labels=same(batch.labels),
    )


def tensors_of(record: Batch | Masks | nn.Module | torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of a batch, the weights and buffers of a module, or the state of an optimizer."""
    if isinstance(record, nn.Module):
        return [*record.parameters(), *record.buffers()]
    if isinstance(record, torch.optim.Optimizer):
        return [tensor for state in record.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    fields = [getattr(record, field.name) for field in dataclasses.fields(record)]
    nested = [tensor for field in fields if isinstance(field, Masks) for tensor in tensors_of(field)]
    return [field for field in fields if isinstance(field, Tensor)] + nested


# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass(frozen=True)
class StepMemory:
    """Bytes that forward and backward of one micro-batch allocate, without weights and inputs.

    Attributes:
        held: part -> bytes kept for the backward pass at the end of the forward pass.
        forward_peak: maximum during the forward pass, where the gradients of the previous step still exist.
        backward_peak: maximum during the backward pass, including new gradients.
        gradients: bytes of all gradients.
    """

    held: dict[str, int]
    forward_peak: int
    backward_peak: int
    gradients: int

    @property
    def activations(self) -> int:
        """Bytes of everything that the backward pass needs."""
        return sum(self.held.values())


def step_memory(
    objective: Data2Vec, batch: Batch, *, low: torch.dtype | None, gpu: bool, accumulates: bool
) -> StepMemory:
    """Run forward and backward on the meta device.

    Args:
        objective: on the meta device.
        batch: on the meta device.
        low: dtype of autocast, None = off.
        gpu: count as a GPU allocates; otherwise as a CPU.
        accumulates: gradients of earlier micro-batches exist already, and new ones are added to them.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if accumulates else None
    gradients = [parameter.grad for parameter in trained if accumulates]
    existing = [*tensors_of(objective), *gradients, *tensors_of(batch)]
    allocations = Allocations(existing=existing, block=GPU_BLOCK if gpu else 1)
    arithmetic = DeviceArithmetic(low=low, gpu=gpu)
    with allocations, _planned_attention(low=low, gpu=gpu):
        with arithmetic, _parts(objective, partial(_booked, allocations)):
            loss = objective(batch).loss
        # Autocast frees its copies of trained weights here; those that the backward pass needs stay alive.
        allocations.rebook(arithmetic.copies.values(), COPIES)
        arithmetic.copies = None
        held = allocations.by_part()
        forward_peak, allocations.peak = allocations.peak, allocations.live
        _backward(objective, loss, arithmetic)
    made = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    for parameter in trained:
        parameter.grad = None
    return StepMemory(held, forward_peak, allocations.peak, made)


def _booked(allocations: Allocations, part: str, call: Callable[[], Any]) -> Any:
    """The result of a call; its tensors are assigned to `part`."""
    before, allocations.part = allocations.part, part
    result = call()
    allocations.part = before
    return result


@contextmanager
def _parts(objective: Data2Vec, around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Route the calls of each part through `around(part, call)`."""
    student = objective.student
    places = [
        (student, "embed", FRONT_END),
        (student, "contextualize", BLOCKS),
        (objective, "compute_targets", TEACHER),
    ]
    places.append((objective.decoder, "forward", DECODER))
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(_wrapped(owner, name, partial(around, part)))
        yield


@contextmanager
def _wrapped(owner: nn.Module, name: str, around: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    method = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(lambda: method(*args, **kwargs)))
    try:
        yield
    finally:
        delattr(owner, name)


def _backward(objective: Data2Vec, loss: Tensor, arithmetic: DeviceArithmetic) -> None:
    """The backward pass; recomputed blocks use the same arithmetic as in the forward pass."""

    def again(call: Callable[[], Any]) -> Any:
        with arithmetic:
            return call()

    with ExitStack() as stack:
        for block in blocks_of(objective.student):
            stack.enter_context(_wrapped(block, "forward", again))
        torch.autograd.backward(loss)


def step_flops(objective: Data2Vec, batch: Batch, *, low: torch.dtype | None, gpu: bool) -> dict[str, int]:
    """Part, and "backward" -> floating-point operations of one micro-batch on the meta device.

    With activation checkpointing, "backward" includes the recomputation.
    """
    counts = dict.fromkeys((FRONT_END, TEACHER, BLOCKS, DECODER), 0)

    def count(part: str, call: Callable[[], Any]) -> Any:
        results: list[Any] = []
        inside = sum(counts.values())
        flops = count_flops(lambda: results.append(call()))
        counts[part] += flops - (sum(counts.values()) - inside)
        return results[0]

    def step() -> None:
        arithmetic = DeviceArithmetic(low=low, gpu=gpu)
        with arithmetic, _parts(objective, count):
            loss = objective(batch).loss
        arithmetic.copies = None
        _backward(objective, loss, arithmetic)

    with _planned_attention(low=low, gpu=gpu):
        total = count_flops(step)
    objective.zero_grad(set_to_none=True)
    return counts | {"backward": total - sum(counts.values())}
