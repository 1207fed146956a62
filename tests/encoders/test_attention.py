"""All attention backends against the formula and each other, on what a CPU can run; the rest is in tests/gpu."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data2vec_train.batch import Masks
from data2vec_train.encoders import attention as module
from data2vec_train.encoders.attention import attention, fastest, padding_as_sequences
from data2vec_train.encoders.backends import NAMES, Case, able, refusal
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.encoders.positions import ALiBi, LinearBias, RelativeBias, RelativePositionBias
from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.transformer import Transformer
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.errors import ConfigError

pytestmark = [
    pytest.mark.usefixtures("flex_on_cpu"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Query by query, from the formula."""
    out = torch.empty(*q.shape[:3], v.shape[3])
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        allowed = (
            torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b, i] if mask.dim() == 3 else mask[b]
        )
        keys = allowed.nonzero()[:, 0]
        logits = k[b, h, keys] @ q[b, h, i] / q.shape[3] ** 0.5
        if bias is not None:
            logits = logits + bias.expand(*q.shape[:3], -1)[b, h, i, keys]
        out[b, h, i] = (logits.exp() / logits.exp().sum()) @ v[b, h, keys]
    return out


MASKS = {
    "no padding": None,
    "padding at the end": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    "padding anywhere": torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]]).bool(),
    "per query": torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)).gt(0.4) | torch.eye(5).bool(),
}


def biases() -> dict[str, RelativeBias | LinearBias | None]:
    relative = RelativePositionBias(grid=(2, 2), num_heads=3, num_prefix_tokens=1)
    larger = RelativePositionBias(grid=(3, 4), num_heads=3, num_prefix_tokens=1)
    with torch.no_grad():
        relative.table.normal_()
        larger.table.normal_()
    positions = torch.tensor([[0, 1, 4, 5, 9], [0, 2, 3, 4, 5]])
    return {
        "no bias": None,
        "relative": relative(),
        "relative, dropped": RelativeBias(larger.table, larger.index, kept=positions),
        "linear": ALiBi(num_heads=3, num_scales=1)(torch.arange(5)[None])[0],
        "linear, dropped": ALiBi(num_heads=3, num_scales=1)(positions)[0],
    }


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("which", biases())
def test_attention_equals_the_formula(backend, mask, which):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()  # (B, H, S, Dh)
    bias, key_mask = biases()[which], MASKS[mask]
    if backend == "flash" and bias is not None:
        with pytest.raises(ConfigError, match=r"attention=flash: .* no position bias; choose one of eager, sdpa"):
            attention(q, k, v, backend=backend, key_mask=key_mask, bias=bias)
        return
    out = attention(q, k, v, backend=backend, key_mask=key_mask, bias=bias)
    wanted = one_by_one(q, k, v, key_mask, None if bias is None else bias.dense())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["no padding", "padding at the end"])
@pytest.mark.parametrize("which", ["no bias", "relative", "relative, dropped", "linear"])
def test_flex_compiles(which, mask):
    """On a CPU the forward pass; for a linear bias of dropped positions torch 2.14 writes C++ that is none."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 16).unbind()
    bias, key_mask = biases()[which], MASKS[mask]
    with torch.no_grad():
        compiled = torch.compile(lambda q, k, v: module.BACKENDS["flex"](q, k, v, key_mask, bias, 0.0), fullgraph=True)
        wanted = one_by_one(q, k, v, key_mask, None if bias is None else bias.dense())
        torch.testing.assert_close(compiled(q, k, v), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [name for name, bias in biases().items() if bias is not None])
def test_a_bias_is_the_same_number_by_number(which):
    bias = biases()[which]
    whole = bias.dense()
    for row, head, query, key in itertools.product(range(2), range(3), range(5), range(5)):
        number = bias.at(*map(torch.tensor, (row, head, query, key)))
        assert number == whole[row if len(whole) > 1 else 0, head, query, key]


# -------------------------------------------------------------------------------------------------- in the encoders

SIZES = {
    "dim": 16,
    "depth": 3,
    "num_heads": 2,
    "ffn_dim": 32,
    "prenet_depth": 0,
    "norm_eps": 1e-6,
    "activation": "gelu",
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "drop_path"), 0.0),
    "activation_checkpointing": False,
}


def vision(attention: str, *, first: bool, relative_bias: str, dim: int) -> VisionEncoder:
    return VisionEncoder(
        image_px=[6, 8],
        patch_px=2,
        channels=1,
        norm_first=first,
        final_norm=first,
        positions="none" if first else "sincos",
        relative_bias=relative_bias,
        class_token=True,
        mask_token=first,
        qkv_bias="qv" if first else "qkv",
        layer_scale=0.5 if first else None,
        init="beit" if first else "bert",
        attention=attention,
        **SIZES | {"dim": dim},
    )


def audio(attention: str, *, alibi: str, dim: int) -> WaveformEncoder:
    return WaveformEncoder(
        channels=1,
        conv_dim=4,
        conv_kernel=[4],
        conv_stride=[4],
        conv_bias=False,
        conv_activation="gelu",
        position_kernel=3,
        position_depth=1,
        position_groups=2,
        alibi=alibi,
        mask_token=alibi == "none",
        reference_padding=False,
        embed_gradient=1.0,
        conv_as_matmul=True,
        input_dropout=0.0,
        layer_drop=0.0,
        attention=attention,
        **SIZES | {"dim": dim},
    )


def text(attention: str, *, dim: int) -> TextEncoder:
    return TextEncoder(
        vocab_size=20,
        max_tokens=12,
        pad_id=1,
        num_token_types=0,
        layer_drop=0.0,
        attention=attention,
        **SIZES | {"dim": dim},
    )


ENCODERS = {
    "vision 1.0": (lambda name, dim: vision(name, dim=dim, first=True, relative_bias="shared"), "replace"),
    "vision 1.0, all biases": (lambda name, dim: vision(name, dim=dim, first=True, relative_bias="both"), "replace"),
    "vision 2.0": (lambda name, dim: vision(name, dim=dim, first=False, relative_bias="none"), "drop"),
    "vision 2.0, a bias per layer": (
        lambda name, dim: vision(name, dim=dim, first=False, relative_bias="per_layer"),
        "drop",
    ),
    "audio 1.0": (lambda name, dim: audio(name, dim=dim, alibi="none"), "replace"),
    "audio 2.0": (lambda name, dim: audio(name, dim=dim, alibi="shared"), "drop"),
    "audio 2.0, ALiBi per layer": (lambda name, dim: audio(name, dim=dim, alibi="per_layer"), "drop"),
    "text 1.0": (lambda name, dim: text(name, dim=dim), "corrupt"),
    "text 2.0": (lambda name, dim: text(name, dim=dim), "drop"),
}


def inputs_of(which: str) -> Tensor:
    torch.manual_seed(3)
    if which.startswith("vision"):
        return torch.randn(2, 1, 6, 8)
    return torch.randn(2, 48) if which.startswith("audio") else torch.randint(4, 20, (2, 12))


def run(
    which: str,
    backend: str,
    *,
    padded: bool,
    device: str = "cpu",
    dim: int = SIZES["dim"],
    prepare: Callable[[ModalityEncoder], None] = lambda encoder: None,
) -> tuple[ModalityEncoder, dict[str, Tensor]]:
    """Outputs at real positions and gradients, by name; the same numbers on every device."""
    make, mode = ENCODERS[which]
    torch.manual_seed(0)
    encoder = make(backend, dim).train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    real = None
    if padded:
        real = torch.ones(2, 12, dtype=torch.bool)
        real[1, 8:] = False
    masked = torch.rand(2, 2, 12).argsort(dim=2) < 5
    masked &= real[:, None] if padded else True
    masks = Masks.from_masked(masked, real)
    encoder, masks = encoder.to(device), masks.to(device)
    real = None if real is None else real.to(device)
    prepare(encoder)
    tokens, _ = encoder.embed(inputs_of(which).to(device))
    tokens = tokens.repeat_interleave(2, dim=0) if mode == "corrupt" else tokens
    output = encoder.contextualize(tokens, real, masks=masks, mode=mode, target_layer="ffn", top_k_layers=2)
    kept = torch.ones(4, 12, dtype=torch.bool, device=device) if real is None else real.repeat_interleave(2, dim=0)
    if mode == "drop":
        kept = kept.gather(1, masks.visible)
    results = {"prefix": output.prefix, "tokens": output.tokens[kept]}
    results |= {f"layer {number}": layer[kept] for number, layer in enumerate(output.layers)}
    sum(value.square().sum() for value in results.values()).backward()
    results |= {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    return encoder, {name: value.detach() for name, value in results.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in found.items():
        # A key's bias has no gradient: what there is, is rounding.
        largest = max(float(wanted[name].abs().max()), 1.0) if wanted[name].numel() else 1.0
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("which", ENCODERS)
def test_backends_agree_in_outputs_and_gradients(which, padded):
    encoder, wanted = run(which, "eager", padded=padded)
    has_bias = getattr(encoder, "alibi", None) is not None or len(getattr(encoder, "relative_biases", ()))
    for backend in NAMES[1:]:
        if backend == "flash" and has_bias:
            continue
        _, found = run(which, backend, padded=padded)
        assert_same(found, wanted)


def test_flex_never_makes_the_whole_bias(monkeypatch):
    for kind in (RelativeBias, LinearBias):
        monkeypatch.setattr(kind, "dense", lambda self: pytest.fail("the whole bias was made"))
    run("vision 1.0", "flex", padded=False)
    run("audio 2.0", "flex", padded=True)


def test_a_shared_bias_is_made_once_for_all_blocks(monkeypatch):
    made, original = [], LinearBias.dense
    monkeypatch.setattr(LinearBias, "dense", lambda self: made.append(1) or original(self))
    run("audio 2.0", "sdpa", padded=False)
    assert len(made) == 1


# ---------------------------------------------------------------------------------------- what a backend cannot do


def case(**changes: object) -> Case:
    nothing = dict.fromkeys(("bias", "padding", "per_query", "dropout"), False)
    return Case(**({"device": "cuda", "dtype": "bfloat16", "head_dim": 64} | nothing | changes))


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("flash", {"bias": True}, "no position bias"),
        ("flash", {"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ("flash", {"head_dim": 20}, "multiple of 8 up to 256, not 20"),
        ("flash", {"head_dim": 512}, "256, not 512"),
        ("flash", {"padding": True, "per_query": True}, "between queries"),
        ("flash", {"padding": True, "dropout": True}, "without padding"),
        ("flash", {"device": "cpu", "dropout": True}, "without padding"),
        ("flash", {"device": "mps"}, "no kernel for mps"),
    ],
)
def test_what_a_backend_cannot_do_is_a_sentence(backend, changes, reason):
    assert reason in refusal(backend, case(**changes))
    assert backend not in able(case(**changes))


def test_on_a_gpu_all_backends_can_do_plain_attention():
    assert able(case()) == list(NAMES)


def test_flex_is_refused_without_a_gpu_and_with_dropout(monkeypatch):
    monkeypatch.undo()
    assert "GPU" in refusal("flex", case(device="cpu"))
    assert "dropout" in refusal("flex", case(dropout=True))
    with pytest.raises(ConfigError, match="attention=flex: it has no backward pass without a GPU; choose one of eager"):
        attention(*torch.randn(3, 1, 2, 4, 8).unbind(), backend="flex")


def test_a_gpu_kernel_for_sequences_computes_padded_attention(monkeypatch):
    """The packing alone, with attention over each sequence by hand in place of the kernel."""

    def by_hand(q, k, v, query_edges, key_edges, max_queries, max_keys):
        out = torch.full_like(q, torch.nan)
        edges = zip(
            query_edges.tolist(), query_edges[1:].tolist(), key_edges.tolist(), key_edges[1:].tolist(), strict=False
        )
        for q0, q1, k0, k1 in edges:
            assert q1 - q0 <= max_queries
            assert k1 - k0 <= max_keys
            logits = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * q.shape[2] ** -0.5
            out[q0:q1] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[k0:k1])
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_hand)
    for num_queries in (5, 3):
        q, (k, v) = torch.randn(2, 3, num_queries, 4), torch.randn(2, 2, 3, 5, 4).unbind()
        for name in ("padding at the end", "padding anywhere"):
            out = module._flash_with_padding(q, k, v, MASKS[name])
            torch.testing.assert_close(out, one_by_one(q, k, v, MASKS[name], None), rtol=1e-5, atol=1e-5)


def test_sequences_end_where_rows_end():
    queries, keys, order = padding_as_sequences(torch.tensor([[True, False, True], [True, True, True]]), 2)
    assert queries.tolist() == [0, 2, 2, 4, 4]
    assert keys.tolist() == [0, 2, 3, 6, 6]
    assert order.tolist() == [[0, 2, 1], [0, 1, 2]]


# ------------------------------------------------------------------------------------------------------ the fastest


def test_auto_measures_once_for_each_shape_and_says_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(module, "_fastest", {})
    monkeypatch.setattr(module, "_measure", lambda backend, *arguments: {"sdpa": 0.002}.get(backend, 0.004))
    caplog.set_level("INFO")

    def choose(length: int, **options: object) -> str:
        return fastest(
            torch.randn(2, length, 8), **({"num_heads": 2, "key_mask": None, "bias": None, "dropout_p": 0.0} | options)
        )

    assert [choose(16), choose(15), choose(9), choose(17)] == ["sdpa"] * 4
    assert len(caplog.messages) == 2  # 9 to 16, and 17
    assert "attention: sdpa for 2 x 16 tokens, 2 heads, float32, forward: eager 4.00 ms, sdpa 2.00 ms" in caplog.text
    caplog.clear()
    choose(16, bias=biases()["linear"])
    assert re.search("not flash: .* no position bias", caplog.text)


def test_auto_computes_what_the_backend_it_takes_computes(monkeypatch):
    monkeypatch.setattr(module, "_fastest", {})
    for which in ("vision 1.0", "audio 2.0", "text 1.0"):
        encoder, found = run(which, "auto", padded=which == "audio 2.0")
        _, wanted = run(which, "eager", padded=which == "audio 2.0")
        assert isinstance(encoder.transformer, Transformer)
        assert_same(found, wanted)
    assert module._fastest
