"""The encoder of spectrograms: grids of any length on the trunk of images."""

import pytest
import torch

from data2vec_train.batch import Masks
from data2vec_train.encoders.spectrogram import PatchCount, SpectrogramEncoder
from data2vec_train.testing import check_encoder


def sound(**changes) -> SpectrogramEncoder:
    options = {
        "mel_bins": 32,
        "patch": 8,
        "max_frames": 80,
        "dim": 24,
        "depth": 2,
        "prenet_depth": 0,
        "num_heads": 4,
        "ffn_dim": 48,
        "norm_eps": 1e-6,
        "activation": "gelu",
        "class_token": True,
        "mask_token": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }
    torch.manual_seed(0)
    return SpectrogramEncoder(**options | changes)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_contract_of_an_encoder(class_token):
    check_encoder(sound(class_token=class_token), torch.randn(3, 32, 64), mode="drop", variable_length=True)


def test_the_contract_with_a_mask_token():
    check_encoder(sound(mask_token=True), torch.randn(3, 32, 64), mode="replace", variable_length=True)


def test_tokens_are_patches_in_time_then_mel():
    """Patch (t, m) looks at frames 8 t to 8 t + 7 and mel bins 8 m to 8 m + 7, and is token 4 t + m."""
    encoder, inputs = sound(), torch.zeros(1, 32, 40)
    before, _ = encoder.embed(inputs)
    inputs[0, 8:16, 16:24] = 1.0
    after, _ = encoder.embed(inputs)
    changed = (before != after).any(dim=-1)[0].nonzero()[:, 0].tolist()
    assert changed == [2 * 4 + 1]
    kernel = encoder.embedder.project.weight[:, 0]  # (D, time, mel)
    inputs = torch.randn(1, 32, 8)
    expected = torch.einsum("fs,dsf->d", inputs[0, 24:], kernel) + encoder.embedder.project.bias
    torch.testing.assert_close(encoder.embed(inputs)[0][0, 3], expected)


def test_longer_inputs_go_on_with_the_formula():
    """Positions are the same whether they were kept or are computed."""
    inputs = torch.randn(2, 32, 160)
    torch.testing.assert_close(sound(max_frames=40)(inputs).tokens, sound(max_frames=160)(inputs).tokens)


def test_the_positions_are_no_weights():
    assert not any("positions" in name for name in sound().state_dict())


def test_frames_that_fill_no_patch_are_left_out():
    encoder, inputs = sound(), torch.randn(1, 32, 47)
    assert encoder.token_count(47) == 5 * 4
    torch.testing.assert_close(encoder(inputs).tokens, encoder(inputs[..., :40]).tokens)


def test_a_patch_is_real_when_all_its_frames_are():
    mask = torch.arange(40) < torch.tensor([[40], [31]])
    _, tokens = sound().embed(torch.randn(2, 32, 40), mask)
    assert tokens.sum(dim=1).tolist() == [20, 12]
    assert bool((tokens[1, :12]).all())


def test_the_class_token_sees_no_padding():
    encoder, short = sound(), torch.randn(1, 32, 40)
    padded = torch.cat([short, torch.full((1, 32, 24), 9.0)], dim=-1)
    mask = (torch.arange(64) < 40)[None]
    torch.testing.assert_close(encoder(padded, mask).prefix, encoder(short).prefix)


def test_dropped_tokens_take_their_positions_with_them():
    encoder, inputs = sound(), torch.randn(1, 32, 40)
    tokens, _ = encoder.embed(inputs)
    hidden = torch.zeros(1, 1, 20, dtype=torch.bool)
    hidden[..., :8] = True
    seen = encoder.contextualize(tokens, masks=Masks.from_masked(hidden), mode="drop").tokens
    alone = encoder.contextualize(tokens[:, 8:]).tokens  # the same patches at the beginning
    assert seen.shape == alone.shape
    assert not torch.allclose(seen, alone, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mel_bins": 36}, "36 bins cannot be cut into patches of 8"),
        ({"max_frames": 7}, "7 frames are fewer than a patch has"),
        ({"dim": 22}, "divisible by 4"),
    ],
)
def test_sizes_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        sound(**{"num_heads": 2} | changes)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="32 mel bins"):
        sound().embed(torch.randn(1, 1, 40, 32))
    with pytest.raises(ValueError, match="too few for a patch of 8"):
        sound().embed(torch.randn(1, 32, 7))


def test_loader_workers_get_a_count_and_no_encoder():
    assert sound().token_count == PatchCount(patch=8, columns=4)
