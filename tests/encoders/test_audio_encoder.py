"""The speech encoder: lengths, positions, ALiBi, padding, and the contract of all encoders."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data2vec_train.batch import Masks
from data2vec_train.encoders.positions import ALiBi, ConvPositions, alibi_slopes
from data2vec_train.encoders.waveform import ConvLayer, ConvLengths, WaveformEncoder, multiply_convolutions
from data2vec_train.testing import check_encoder

RECORDED = json.loads((Path(__file__).parents[1] / "statistics.json").read_text())
WAV2VEC = ConvLengths((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))


def audio(**changes) -> WaveformEncoder:
    torch.manual_seed(0)
    options = {
        "channels": 1,
        "conv_dim": 16,
        "conv_kernel": [10, 3, 2],
        "conv_stride": [5, 2, 2],
        "dim": 32,
        "depth": 3,
        "prenet_depth": 1,
        "num_heads": 4,
        "ffn_dim": 64,
        "conv_bias": False,
        "conv_activation": "gelu",
        "norm_eps": 1e-5,
        "activation": "gelu",
        "position_kernel": 19,
        "position_depth": 5,
        "position_groups": 4,
        "alibi": "shared",
        "mask_token": False,
        "reference_padding": False,
        "embed_gradient": 1.0,
        "conv_as_matmul": True,
        "input_dropout": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "layer_drop": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }
    return WaveformEncoder(**options | changes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("replace", {"alibi": "none", "mask_token": True}),
        ("drop", {"alibi": "shared"}),
        ("drop", {"alibi": "per_layer"}),
        ("drop", {"alibi": "none", "position_kernel": 4}),
        ("drop", {"alibi": "none", "dropout": 0.1, "input_dropout": 0.1, "drop_path": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_the_contract(mode, options, attention):
    check_encoder(audio(attention=attention, **options), torch.randn(3, 800), mode=mode, variable_length=True)


def test_the_contract_with_19_channels_and_other_strides():
    encoder = audio(channels=19, conv_dim=[8, 16], conv_kernel=[4, 4], conv_stride=[4, 2])
    check_encoder(encoder, torch.randn(2, 19, 300), mode="drop", variable_length=True)


def test_reference_padding_lets_padding_into_real_frames_as_the_originals_do():
    encoder = audio(alibi="none", mask_token=True, reference_padding=True)
    with pytest.raises(AssertionError, match="a padded sample differs from the same one alone"):
        check_encoder(encoder, torch.randn(3, 800), mode="replace", variable_length=True)


def test_the_number_of_frames_is_the_originals():
    for samples, frames in RECORDED["conv_out_length"].items():
        assert WAV2VEC(int(samples)) == frames
        assert WAV2VEC(torch.tensor([int(samples), 100])).tolist() == [frames, 0]
    assert WAV2VEC(399) == 0


def test_alibi_slopes_and_bias_are_the_originals():
    for heads, slopes in RECORDED["alibi_slopes"].items():
        torch.testing.assert_close(alibi_slopes(int(heads)), torch.tensor(slopes), rtol=0, atol=1e-7)
    small = RECORDED["alibi_small"]
    bias = ALiBi(num_heads=small["heads"], num_scales=1)(torch.arange(small["T"])[None])[0].dense()[0]
    torch.testing.assert_close(bias, torch.tensor(small["bias"]), rtol=0, atol=1e-7)


def test_alibi_measures_distances_before_anything_was_dropped():
    alibi = ALiBi(num_heads=2, num_scales=1)
    whole = alibi(torch.arange(6)[None])[0].dense()[0]  # (H, 6, 6)
    kept = torch.tensor([[0, 2, 5]])
    torch.testing.assert_close(alibi(kept)[0].dense()[0], whole[:, kept[0]][:, :, kept[0]])


def test_a_negative_alibi_scale_counts_as_zero():
    alibi = ALiBi(num_heads=2, num_scales=1)
    with torch.no_grad():
        alibi.scale[0, 0, 0] = -1.0
    bias = alibi(torch.arange(4)[None])[0].dense()[0]
    assert not bias[0].any()
    assert bias[1].any()


def test_positions_see_hidden_frames_as_zeros():
    encoder = audio().eval()
    tokens = torch.randn(1, 12, 32)
    masked = torch.zeros(1, 1, 12, dtype=torch.bool)
    masked[0, 0, [2, 3, 7]] = True
    output = encoder.contextualize(tokens, None, masks=Masks.from_masked(masked), mode="drop")
    zeroed = tokens.masked_fill(masked[:, 0, :, None], 0.0)
    by_hand = (zeroed + encoder.positions(zeroed, None))[:, ~masked[0, 0]]
    bias = encoder.alibi(torch.arange(12)[~masked[0, 0]][None])[0]
    x = encoder.input_norm(by_hand)
    for block in encoder.transformer.blocks:
        x, _ = block(x, None, bias, backend="eager")
    torch.testing.assert_close(output.tokens, x)


def test_a_position_layer_is_convolution_norm_and_gelu_and_an_even_kernel_keeps_the_length():
    positions = ConvPositions(dim=8, kernel=4, depth=1, groups=2, reference_padding=False)
    x = torch.randn(2, 9, 8)
    conv = positions.convolutions[0]
    full = F.conv1d(x.mT, conv.weight, conv.bias, padding=2, groups=2)
    assert full.shape[-1] == 10
    torch.testing.assert_close(positions(x, None), F.gelu(F.layer_norm(full[..., :9].mT, (8,))))


def test_layer_drop_skips_whole_blocks_in_training_only():
    encoder = audio(layer_drop=0.5, depth=8)
    tokens = torch.randn(1, 12, 32)
    counts = []
    for _ in range(40):
        counts.append(len(encoder.contextualize(tokens, None, target_layer="ffn", top_k_layers=8).layers))
    assert 2.5 < sum(counts) / len(counts) < 5.5  # 4 expected, standard error 0.22
    assert len(encoder.eval().contextualize(tokens, None, target_layer="ffn", top_k_layers=8).layers) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_stride": [5, 2]}, "layers, and conv_stride has 2"),
        ({"alibi": "sometimes"}, "alibi: expected one of"),
        ({"prenet_depth": 3}, "prenet_depth"),
        ({"position_groups": 5}, "5 groups cannot share the width"),
        ({"layer_drop": 1.0}, "layer_drop"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        audio(**changes)


@pytest.mark.parametrize("inputs", [torch.randn(2, 3, 800), torch.randn(2, 12)])
def test_inputs_that_do_not_fit_are_refused(inputs):
    with pytest.raises(ValueError, match=r"channels|too few"):
        audio().embed(inputs)


@pytest.mark.parametrize(("kernel", "stride"), [(10, 5), (3, 2), (2, 2), (5, 3), (7, 2), (2, 3)])
@pytest.mark.parametrize("samples", [30, 31, 32, 33, 34])
def test_a_convolution_as_matrix_products_is_that_convolution(kernel, stride, samples):
    """In float64, where the order of the sums does not show: in float32 it takes up to 1.5e-5 on some processors."""
    results = []
    for as_matmul in (False, True):
        torch.manual_seed(0)
        layer = ConvLayer(3, 5, kernel=kernel, stride=stride, bias=True, activation="gelu", as_matmul=as_matmul)
        layer.double()
        x = torch.randn(2, samples, 3, requires_grad=True, dtype=torch.float64)
        out = layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for tensor, other in zip(*results, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


def test_a_front_end_that_was_built_as_convolutions_becomes_matrix_products():
    encoder, waves = audio(conv_as_matmul=False), torch.randn(2, 800)
    expected = encoder(waves).tokens
    multiply_convolutions(torch.nn.ModuleDict({"a model around it": encoder}))
    assert all(layer.as_matmul for layer in encoder.embedder.features)
    torch.testing.assert_close(encoder(waves).tokens, expected, rtol=1e-5, atol=1e-5)


def test_the_front_end_norms_in_float32():
    encoder = audio().to(torch.bfloat16)
    tokens, _ = encoder.embed(1000 * torch.randn(2, 800, dtype=torch.bfloat16))
    assert tokens.dtype == torch.bfloat16
    assert torch.isfinite(tokens).all()
