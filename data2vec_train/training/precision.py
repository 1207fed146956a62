"""Precision and compilation of a training step.

precision.trainer   forward and backward      weights, targets, loss, optimizer, teacher
32-true             float32                   float32
32-tf32             float32, rounded to TF32  float32
bf16-mixed          bfloat16                  float32
16-mixed            float16, scaled loss      float32
fp8-mixed           float8 and bfloat16       float32
auto                bf16-mixed where the hardware multiplies bfloat16 fast, else 32-true
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.transformer import blocks_of
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.system.constraints import require
from data2vec_train.training.module import TrainingModule

log = logging.getLogger(__name__)

Compile = bool | Literal["auto", "graphs"]
T = TypeVar("T")

# Compute capability of the first NVIDIA GPUs whose tensor cores support the type.
BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def device_type(accelerator: str) -> str:
    """The device type that Lightning's `accelerator` selects on this machine: "cuda", "mps" or "cpu"."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def choose_precision(wanted: str, device: str) -> str:
    """The precision that `precision.trainer` selects on a "cuda", "mps" or "cpu" device; logs the choice of "auto".

    The choice depends on what the hardware reports and not on a measurement, so that a run that continues makes the
    same choice.

    Raises:
        ConfigError: the device does not support the precision.
    """
    if wanted == "auto":
        fast, reason = _multiplies_bfloat16_fast(device)
        chosen = "bf16-mixed" if fast else "32-true"
        log.info("precision: %s, chosen by auto (%s)", chosen, reason)
        return chosen
    least = {"32-tf32": BF16_CAPABILITY, "fp8-mixed": FP8_CAPABILITY}.get(wanted)
    if least is not None and device == "cuda" and _capability() < least:
        raise ConfigError(
            f"precision.trainer={wanted} needs compute capability {_dotted(least)}, and this GPU has "
            f"{_dotted(_capability())}; choose precision=auto, fp16 or fp32"
        )
    require(precision=wanted, device=device)
    if wanted.startswith("bf16"):
        fast, reason = _multiplies_bfloat16_fast(device)
        if not fast:
            log.warning("precision: %s will be slow here (%s); precision=auto chooses 32-true", wanted, reason)
    return wanted


def _multiplies_bfloat16_fast(device: str) -> tuple[bool, str]:
    if device == "cuda":
        fast = _capability() >= BF16_CAPABILITY
        return fast, f"a GPU of compute capability {_dotted(_capability())}{'' if fast else ', bfloat16 needs 8.0'}"
    if device == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return True, "a CPU with bfloat16 instructions"
        return False, "a CPU without bfloat16 instructions, where bfloat16 was 47 to 62 times slower than float32"
    return False, f"bfloat16 was not measured on {device}"


def _capability() -> tuple[int, int]:
    """The lowest compute capability of all visible GPUs."""
    return min(torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count()))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def trainer_precision(chosen: str) -> dict[str, Any]:
    """Arguments of Lightning's Trainer: `precision`, or the plugin that takes its place.

    Also sets the precision of float32 matrix products in the whole process: TF32 if chosen, else full.
    """
    tf32 = chosen == "32-tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if chosen == "16-mixed":
        return {"plugins": [ScaledHalf("cuda")]}
    return {"precision": {"32-tf32": "32-true", "fp8-mixed": "bf16-mixed"}.get(chosen, chosen)}


def in_float32(batches: Iterable[T]) -> Iterator[T]:
    """Yield batches that are made without autocast, which worker processes and their decoders would inherit."""
    with torch.autocast("cpu", enabled=False):
        iterator = iter(batches)
    while True:
        with torch.autocast("cpu", enabled=False):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class ScaledHalf(MixedPrecision):
    """Float16 with a scaled loss, whose gradients are unscaled before the module clips and checks them.

    Lightning leaves unscaling to fused optimizers: clipping would then see scaled gradients, and torch's scaler would
    decide whether to skip the step, instead of the module.
    """

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device)

    def optimizer_step(
        self, optimizer: Optimizer, model: TrainingModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Backward, unscale, check, step, and update the scale; the host does not wait for the device."""
        result = closure()
        self.scaler.unscale_(optimizer)
        model.set_loss_scale(self.scaler._get_scale_async())
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        self.scaler.update()
        return result


def use_float8(encoder: ModalityEncoder) -> None:
    """Let the linear layers of the blocks multiply in float8; names and types of their weights do not change.

    The projection to queries, keys and values stays in bfloat16, because attention reads its weights directly.
    """
    from torchao.float8 import convert_to_float8_training

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and not layer.in_features % 16 and not layer.out_features % 16

    for block in blocks_of(encoder):
        convert_to_float8_training(block, module_filter_fn=fits)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled blocks


def compile_blocks(objective: Data2Vec, *, how: Compile, device: str, lengths_vary: bool, backend: str) -> None:
    """Compile every block of student and teacher, in place, so that names in checkpoints do not change.

    Blocks and not the whole model, since layer drop decides on the host which blocks run; equal blocks share their
    compiled code.

    Args:
        objective: before it is sharded.
        how: True, False, "auto" = on GPUs, or "graphs" = as True, and recorded as CUDA graphs.
        device: "cuda", "mps" or "cpu".
        lengths_vary: lengths vary between batches; if not, every shape is compiled separately.
        backend: of `torch.compile`.

    Raises:
        ConfigError: graphs without an NVIDIA GPU, or with lengths that vary.
    """
    if how == "graphs" and (device != "cuda" or lengths_vary):
        reason = "an NVIDIA GPU" if device != "cuda" else "batches of one shape, and here lengths vary"
        raise ConfigError(f"compile=graphs needs {reason}; choose compile=true or compile=false")
    if not how or (how == "auto" and device != "cuda"):
        return
    # Compiled code of earlier runs in this process (a sweep) is useless and counts against the limit.
    torch.compiler.reset()
    # DDP's gradient buckets would split blocks; blocks are small enough to overlap communication without that.
    settings = torch._dynamo.config
    settings.optimize_ddp = False
    # Each drop-path rate is compiled separately, for student and teacher.
    blocks = [*blocks_of(objective.student), *blocks_of(objective.teacher)]
    settings.recompile_limit = max(settings.recompile_limit, 4 * len(blocks))
    mode = "reduce-overhead" if how == "graphs" else None
    if how == "graphs":
        objective.register_forward_pre_hook(_begin_graphs)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=None if lengths_vary else False, mode=mode, backend=backend)
    log.info("compile: %d blocks, in the first steps", len(blocks))


def _begin_graphs(module: nn.Module, inputs: object) -> None:
    """Allow CUDA graphs to overwrite the outputs of the last forward pass."""
    torch.compiler.cudagraph_mark_step_begin()


def uncompiled() -> AbstractContextManager:
    """Run without compilation: for batches outside training steps, whose other shapes are not worth compiling."""
    return torch.compiler.set_stance("force_eager")
