"""Every attention backend compared with the plain one: shapes, padding, position bias, forward and backward."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec_train.benchmark.agreement import gradients_agree, outputs_agree
from data2vec_train.benchmark.context import Bench
from data2vec_train.benchmark.measurements import Arm, Case
from data2vec_train.encoders.attention import BACKENDS, Bias, attention
from data2vec_train.encoders.positions import LinearBias, RelativeBias, alibi_slopes, relative_position_index
from data2vec_train.errors import ConfigError
from data2vec_train.plan.flops import count_flops

REFERENCE = "eager"
PADDED_SHARE = 0.3  # fraction of padding in the last half of the rows


def measure_attention(
    bench: Bench,
    *,
    shapes: list[list[int]],
    key_mask: list[bool],
    bias: list[str],
    backward: list[bool],
    names: list[str] | None,
) -> Iterator[Case]:
    """One case for each combination of shape (batch, heads, length, head width), bias, mask and backward pass."""
    names = [REFERENCE, *(name for name in names or BACKENDS if name != REFERENCE)]
    for shape, masked, kind, trained in itertools.product(shapes, key_mask, bias, backward):
        inputs = Inputs.draw(shape, masked=masked, kind=kind, trained=trained, bench=bench)
        words = ["x".join(map(str, shape))]
        words += (
            ["padded"] * masked
            + [f"{kind} bias"] * (kind != "none")
            + ["forward and backward" if trained else "forward"]
        )
        case = Case("attention", ", ".join(words), REFERENCE, [Arm(name) for name in names])
        runs: dict[str, Callable[[], object]] = {}
        expected = inputs.results(REFERENCE)
        flops = count_flops(lambda inputs=inputs: inputs.run(REFERENCE))
        for arm in case.arms:
            try:
                found = inputs.results(arm.name)
            except ConfigError as error:
                arm.refused = str(error)
                continue
            suffix = " of the reference and of the reference again" if arm.name == REFERENCE else ""
            arm.agreements = [outputs_agree(expected[0], found[0], what=f"outputs{suffix}", atol=bench.tolerance)]
            if trained:
                check = gradients_agree(expected[1], found[1], what=f"gradients{suffix}", share=bench.tolerance)
                arm.agreements.append(check)
            arm.items, arm.flops = {"tokens": shape[0] * shape[2]}, flops
            runs[arm.name] = lambda inputs=inputs, name=arm.name: inputs.run(name)
        yield bench.time(case, runs)


@dataclass
class Inputs:
    """Queries, keys, values, mask and bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    bias: Bias | None
    weights: Tensor | None  # gradient of the outputs; None = forward only

    @classmethod
    def draw(cls, shape: list[int], *, masked: bool, kind: str, trained: bool, bench: Bench) -> "Inputs":
        """Random inputs of a shape (batch, heads, length, head width)."""
        rows, heads, length, _ = shape
        generator = torch.Generator().manual_seed(0)

        def noise(*sizes: int) -> Tensor:
            made = torch.randn(sizes, generator=generator).to(bench.device, bench.arithmetic.dtype)
            return made.requires_grad_(trained)

        q, k, v = (noise(*shape) for _ in range(3))
        lengths = torch.full((rows,), length)
        lengths[rows // 2 :] = max(1, round((1 - PADDED_SHARE) * length))
        key_mask = (torch.arange(length) < lengths[:, None]).to(bench.device) if masked else None
        weights = noise(*shape).detach() if trained else None
        if trained and masked:  # outputs at padding are undefined
            weights = weights * key_mask[:, None, :, None]
        bias = _bias(kind, heads, length, generator=generator, trained=trained, device=bench.device)
        return cls(q, k, v, key_mask, bias, weights)

    def run(self, backend: str) -> Tensor:
        """One pass; gradients of the previous pass are discarded."""
        with torch.set_grad_enabled(self.weights is not None):
            output = attention(self.q, self.k, self.v, backend=backend, key_mask=self.key_mask, bias=self.bias)
        if self.weights is not None:
            for leaf in self._leaves().values():
                leaf.grad = None
            output.backward(self.weights)
        return output.detach()

    def results(self, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Output at real positions, and gradients."""
        output = self.run(backend)
        if self.key_mask is not None:
            output = output.masked_fill(~self.key_mask[:, None, :, None], 0.0)
        return {"output": output}, {name: leaf.grad for name, leaf in self._leaves().items() if leaf.grad is not None}

    def _leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": None if self.bias is None else self.bias.learned}
        return {name: leaf for name, leaf in named.items() if leaf is not None}


def _bias(
    kind: str, heads: int, length: int, *, generator: torch.Generator, trained: bool, device: torch.device
) -> Bias | None:
    """The bias of an image encoder, on a square grid if possible, or of a speech encoder."""
    if kind == "relative":
        side = math.isqrt(length - 1)
        grid = (side, side) if side * side == length - 1 else (1, length - 1)
        index = relative_position_index(grid, 1)
        table = torch.randn(int(index.max()) + 1, heads, generator=generator).to(device)
        return RelativeBias(table.requires_grad_(trained), index.to(device))
    if kind == "linear":
        positions = torch.arange(length, device=device)[None]
        return LinearBias(alibi_slopes(heads).to(device).requires_grad_(trained), positions)
    return None
