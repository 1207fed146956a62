"""The text encoder: positions around padding, initial weights, and the contract of all encoders."""

import pytest
import torch

from data2vec_train.encoders.text import TextEncoder
from data2vec_train.testing import check_encoder


def text(**changes) -> TextEncoder:
    torch.manual_seed(0)
    options = {
        "vocab_size": 50,
        "max_tokens": 40,
        "pad_id": 1,
        "dim": 32,
        "depth": 3,
        "prenet_depth": 0,
        "num_heads": 4,
        "ffn_dim": 64,
        "num_token_types": 0,
        "norm_eps": 1e-5,
        "activation": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "layer_drop": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }
    return TextEncoder(**options | changes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["corrupt", "drop"])
def test_the_contract(mode, attention):
    ids = torch.randint(4, 50, (3, 40))
    check_encoder(text(attention=attention, dropout=0.1), ids, mode=mode, variable_length=True)


def test_positions_count_real_tokens_from_the_one_behind_the_padding_id():
    embedder = text().embedder
    assert embedder.positions.num_embeddings == 42
    ids = torch.tensor([[5, 6, 7, 1], [5, 1, 6, 7]])
    real = ids != 1
    x = embedder(ids, real)
    token, position = embedder.tokens.weight, embedder.positions.weight
    by_hand = embedder.norm(token[7] + position[4])  # the third real token of each row
    torch.testing.assert_close(x[0, 2], by_hand)
    torch.testing.assert_close(x[1, 3], by_hand)
    assert not x[~real].any()
    torch.testing.assert_close(embedder(ids[:1, :3], None)[0], x[0, :3])


def test_padding_rows_start_at_zero_and_other_weights_as_in_bert():
    encoder = text(vocab_size=5000)
    assert not encoder.embedder.tokens.weight[1].any()
    assert not encoder.embedder.positions.weight[1].any()
    assert encoder.embedder.tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert encoder.transformer.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("changes", "message"), [({"pad_id": 50}, "pad_id=50"), ({"prenet_depth": 3}, "prenet_depth")])
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        text(**changes)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="41 tokens"):
        text().embed(torch.full((1, 41), 5))
