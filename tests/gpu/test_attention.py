"""All attention backends on a GPU, in the encoders of `tests/encoders/test_attention.py` and by themselves.

In float32 they agree to 1e-5, outputs and gradients. bfloat16 keeps 7 bits: one product is wrong by 2^-8 of itself, and
a sum of many by about as much of its largest terms. Eight times that is allowed, against float32 of the same numbers.
"""

import pytest
import torch
from torch import Tensor

from data2vec_train.encoders import attention as module
from data2vec_train.encoders.attention import attention
from data2vec_train.encoders.backends import NAMES
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.positions import ALiBi, RelativePositionBias
from data2vec_train.encoders.transformer import Block
from tests.encoders.test_attention import ENCODERS, assert_same, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
BF16_BAND = 8 * 2**-8
LENGTHS = (197, 150, 1, 64)  # real positions of each row


@pytest.fixture(autouse=True)
def exact():
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch._dynamo.reset()
    module._compiled.cache_clear()


def has_bias(encoder: ModalityEncoder) -> bool:
    return getattr(encoder, "alibi", None) is not None or len(getattr(encoder, "relative_biases", ())) > 0


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("which", ENCODERS)
def test_encoders_agree_in_float32(which, padded):
    _, wanted = run(which, "eager", padded=padded, device="cuda", dim=32)
    for backend in ("sdpa", "flex"):
        _, found = run(which, backend, padded=padded, device="cuda", dim=32)
        assert_same(found, wanted)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(4, 3, 197, 64, generator=generator).to("cuda", dtype).requires_grad_() for _ in range(3)
    ]  # (B, H, S, Dh)


def padding() -> Tensor:
    return (torch.arange(197) < torch.tensor(LENGTHS)[:, None]).cuda()


def bias_of(name: str):
    if name == "relative":
        maker = RelativePositionBias(grid=(14, 14), num_heads=3, num_prefix_tokens=1).cuda()
        with torch.no_grad():
            maker.table.copy_(torch.randn(maker.table.shape, generator=torch.Generator().manual_seed(1)))
        return maker, maker()
    maker = ALiBi(num_heads=3, num_scales=1).cuda()
    return maker, maker(torch.arange(197, device="cuda")[None])[0]


def results(backend: str, dtype: torch.dtype, *, padded: bool, bias: str | None) -> dict[str, Tensor]:
    """Output at real positions and gradients, from numbers that bfloat16 has."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs(torch.bfloat16))
    maker, made = (None, None) if bias is None else bias_of(bias)
    mask = padding() if padded else None
    out = attention(q, k, v, backend=backend, key_mask=mask, bias=made)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).cuda()
    real = padding()[:, None, :, None] if padded else torch.ones((), dtype=torch.bool, device="cuda")
    out = out.float().masked_fill(~real, 0.0)
    (out * weights).sum().backward()
    found = {"output": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}
    if maker is not None:
        found |= {name: parameter.grad for name, parameter in maker.named_parameters()}
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.mark.parametrize("bias", [None, "relative", "linear"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("backend", NAMES)
def test_bfloat16_is_near_float32(backend, padded, bias):
    if backend == "flash" and bias is not None:
        pytest.skip("flash supports no position bias")
    wanted = results("eager", torch.float32, padded=padded, bias=bias)
    found = results(backend, torch.bfloat16, padded=padded, bias=bias)
    for name, tensor in wanted.items():
        worst, largest = float((found[name] - tensor).abs().max()), float(tensor.abs().max())
        assert worst <= BF16_BAND * largest, f"{name}: {worst / largest:.2g} of the largest"


def test_flash_takes_padding_through_the_kernel_for_sequences(monkeypatch):
    import torch.nn.attention.varlen as varlen

    calls, original = [], varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *arguments: calls.append(1) or original(*arguments))
    results("flash", torch.bfloat16, padded=True, bias=None)
    assert calls == [1]
    results("flash", torch.bfloat16, padded=False, bias=None)
    assert calls == [1]


@pytest.mark.parametrize("which", ["vision 1.0", "audio 2.0", "text 2.0"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_compiled_blocks_compute_what_plain_ones_compute(which, backend):
    def compiled(encoder: ModalityEncoder) -> None:
        blocks = [module for module in encoder.modules() if isinstance(module, Block)]
        assert blocks
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)

    _, wanted = run(which, "eager", padded=which != "vision 1.0", device="cuda", dim=32)
    _, found = run(which, backend, padded=which != "vision 1.0", device="cuda", dim=32, prepare=compiled)
    assert_same(found, wanted)


def test_compiled_flash_takes_padding_in_bfloat16():
    def compiled(encoder: ModalityEncoder) -> None:
        for block in encoder.modules():
            if isinstance(block, Block):
                block.compile(fullgraph=True, dynamic=False)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        encoder, wanted = run("text 2.0", "flash", padded=True, device="cuda", dim=32)
        _, found = run("text 2.0", "flash", padded=True, device="cuda", dim=32, prepare=compiled)
    assert not has_bias(encoder)
    for name in ("tokens", "layer 0", "layer 1"):
        torch.testing.assert_close(found[name].float(), wanted[name].float(), rtol=0, atol=0.1, msg=name)
