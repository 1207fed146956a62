"""Small layers: activations, stochastic depth and weight initialisation."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec_train.errors import ConfigError
from data2vec_train.system.constraints import require

_GELU_TANH = partial(F.gelu, approximate="tanh")
# The names are those of Hugging Face configs.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function called `name`; raises ConfigError if it does not exist."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} does not exist; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a row's branch with probability `rate` and scales up those of other rows."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        require(drop_path=rate)
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Branch (B, S, D) -> the same shape."""
        if not self.training or self.rate == 0.0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (kept.to(branch.dtype) / (1.0 - self.rate))


@torch.no_grad()
def init_bert(module: nn.Module, *, std: float = 0.02) -> None:
    """N(0, std) for every linear and embedding weight, zero biases; convolutions keep torch's default.

    Source: fairseq's BERT initialisation, as used by data2vec 2.0 (ALGORITHM.md 3.4).
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)


@torch.no_grad()
def init_beit(module: nn.Module, *, std: float = 0.02) -> None:
    """N(0, std) truncated at one sigma for linear and convolution weights, zero biases.

    Source: the BEiT code that data2vec 1.0 vision builds on (ALGORITHM.md 2.3).
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(child.weight, std=std, a=-std, b=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


@torch.no_grad()
def scale_down_by_depth(blocks: nn.ModuleList) -> None:
    """Divide each block's output projections by sqrt(2 * layer), layers counted from 1 (BEiT, ALGORITHM.md 2.3)."""
    for layer, block in enumerate(blocks, start=1):
        block.attention.out.weight.div_(math.sqrt(2.0 * layer))
        block.ffn.fc2.weight.div_(math.sqrt(2.0 * layer))
