"""Contract tests for encoders: check on a small instance what the algorithm, the loader and the probes rely on.

    from data2vec_train.testing import check_encoder

    def test_my_encoder_keeps_the_contract():
        check_encoder(MyEncoder(...), torch.randn(3, 19, 1000), mode="drop", variable_length=True)

Failures are AssertionErrors that name the broken rule. Shape letters as in `encoders.base`.
"""

import copy
import pickle
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from data2vec_train.batch import Masks
from data2vec_train.encoders.base import EncoderOutput, MaskMode, ModalityEncoder, TargetLayer
from data2vec_train.objective.masking import RandomMasker

VIEWS = 2


def check_encoder(
    encoder: ModalityEncoder, inputs: Tensor, *, mode: MaskMode, variable_length: bool, atol: float = 1e-5
) -> None:
    """Check one encoder against the contract of `ModalityEncoder`.

    Args:
        encoder: a small one; only its gradients change.
        inputs: (B, ...) real inputs, at least two different ones, long enough for 8 tokens.
        mode: the mask mode it is trained with. In mode "corrupt" the inputs are masked before the encoder, so hiding is
            not checked.
        variable_length: whether inputs may differ in their last axis, with padding and an attention mask.
        atol: allowed difference between values that should be equal.

    Raises:
        AssertionError: a rule is broken; the message names it and the size of the difference.
    """
    was_training = encoder.training
    try:
        encoder.eval()
        _check_attributes(encoder)
        with torch.no_grad():
            tokens = _check_embed(encoder, inputs)
            masks = _masks(encoder, len(inputs), tokens.shape[1])
            _check_outputs(encoder, tokens, masks, mode)
            _check_taps(encoder, tokens)
            if mode != "corrupt":
                _check_hiding(encoder, tokens, masks, mode, atol)
            if variable_length:
                _check_padding(encoder, inputs, mode, atol)
        _check_copies(encoder, inputs, atol)
        _check_backward(encoder, inputs, masks, mode)
    finally:
        encoder.train(was_training)


def _check_attributes(encoder: ModalityEncoder) -> None:
    for name in ("embedder", "dim", "depth", "prenet_depth", "num_prefix_tokens", "grid", "token_count"):
        assert hasattr(encoder, name), f"the encoder has no attribute {name}; see ModalityEncoder"
    assert isinstance(encoder.embedder, torch.nn.Module), "embedder must be a module: all weights that embed uses"
    assert 0 <= encoder.prenet_depth < encoder.depth, "prenet_depth must leave at least one block"
    parameters = {name for name, _ in encoder.named_parameters()}
    unknown = sorted(encoder.no_decay - parameters)
    # An option may remove such parameters, but then it removes all of them.
    assert not unknown or not (encoder.no_decay & parameters), f"no_decay names no parameters: {unknown}"
    size = len(pickle.dumps(encoder.token_count))
    assert size < 10_000, f"token_count is sent to loader processes and must hold no weights; pickled: {size} bytes"


def _check_embed(encoder: ModalityEncoder, inputs: Tensor) -> Tensor:
    assert len(inputs) >= 2, "give at least two inputs"
    tokens, token_mask = encoder.embed(inputs, None)
    expected = (len(inputs), encoder.token_count(inputs.shape[-1]), encoder.dim)
    assert tuple(tokens.shape) == expected, f"embed gives {tuple(tokens.shape)}; token_count and dim give {expected}"
    assert token_mask is None, "embed must return no attention mask if it gets none"
    assert tokens.shape[1] >= 8, f"{tokens.shape[1]} tokens are too few to check; give longer inputs"
    assert torch.isfinite(tokens).all(), "embed gives values that are not finite"
    return tokens


def _masks(encoder: ModalityEncoder, count: int, num_tokens: int) -> Masks:
    masker, rng = RandomMasker(hidden_fraction=0.5), np.random.default_rng(0)
    rows = [[masker(num_tokens, encoder.grid, rng) for _ in range(VIEWS)] for _ in range(count)]
    return Masks.from_masked(torch.from_numpy(np.array(rows)))


def _contextualize(
    encoder: ModalityEncoder, tokens: Tensor, masks: Masks | None, mode: MaskMode, mask: Tensor | None = None
) -> EncoderOutput:
    if mode == "corrupt" and masks is not None:  # each mask has its own inputs
        tokens = tokens.repeat_interleave(VIEWS, dim=0)
    return encoder.contextualize(tokens, mask, masks=masks, mode=mode)


def _check_outputs(encoder: ModalityEncoder, tokens: Tensor, masks: Masks, mode: MaskMode) -> None:
    count, num_tokens, dim = tokens.shape
    for rows, hidden, length in (
        (count, None, num_tokens),
        (count * VIEWS, masks, masks.visible.shape[1] if mode == "drop" else num_tokens),
    ):
        output = _contextualize(encoder, tokens, hidden, mode)
        what = "whole inputs" if hidden is None else f"masks in mode {mode}"
        assert tuple(output.tokens.shape) == (rows, length, dim), (
            f"contextualize with {what} gives tokens {tuple(output.tokens.shape)}, expected {(rows, length, dim)}"
        )
        prefix = (rows, encoder.num_prefix_tokens, dim)
        assert tuple(output.prefix.shape) == prefix, (
            f"contextualize with {what} gives a prefix {tuple(output.prefix.shape)}, expected {prefix}"
        )
        assert torch.isfinite(output.tokens).all(), f"contextualize with {what} gives values that are not finite"
        again = _contextualize(encoder, tokens, hidden, mode)
        assert torch.equal(output.tokens, again.tokens), f"evaluation with {what} differs from call to call"


def _check_taps(encoder: ModalityEncoder, tokens: Tensor) -> None:
    top_k_layers = encoder.depth - encoder.prenet_depth
    for target_layer in get_args(TargetLayer):
        layers = encoder.contextualize(tokens, None, target_layer=target_layer, top_k_layers=top_k_layers).layers
        assert len(layers) == top_k_layers, (
            f"target_layer={target_layer}, top_k_layers={top_k_layers} gives {len(layers)} layers"
        )
        for layer in layers:
            assert layer.shape == tokens.shape, f"a target layer is {tuple(layer.shape)}, tokens {tuple(tokens.shape)}"
        fewer = encoder.contextualize(tokens, None, target_layer=target_layer, top_k_layers=1).layers
        assert torch.equal(fewer[0], layers[-1]), (
            f"target_layer={target_layer}: top_k_layers=1 must give the last layer"
        )
    assert not encoder.contextualize(tokens, None).layers, "without a target layer no layers are expected"


def _check_hiding(encoder: ModalityEncoder, tokens: Tensor, masks: Masks, mode: MaskMode, atol: float) -> None:
    single = Masks.from_masked(masks.masked[:, :1])  # one mask, so that token and row are the same
    hidden = single.masked[:, 0, :, None]  # (B, T, 1)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
    before = _contextualize(encoder, tokens, single, mode).tokens
    after = _contextualize(encoder, torch.where(hidden, noise, tokens), single, mode).tokens
    worst = float((before - after).abs().max())
    assert worst <= atol, f"hidden tokens change the student's output, by up to {worst:.2g}"
    other = _contextualize(encoder, torch.where(hidden, tokens, noise), single, mode).tokens
    assert not torch.allclose(before, other, atol=atol), "visible tokens have no influence on the output"


def _check_padding(encoder: ModalityEncoder, inputs: Tensor, mode: MaskMode, atol: float) -> None:
    full = inputs.shape[-1]
    short = next((n for n in range(full - 1, 1, -1) if encoder.token_count(n) <= 0.7 * encoder.token_count(full)), None)
    assert short is not None, "token_count does not grow with the length, so lengths cannot vary"
    attention_mask = torch.ones(len(inputs), full, dtype=torch.bool, device=inputs.device)
    attention_mask[0, short:] = False
    alone, _ = encoder.embed(inputs[:1, ..., :short], None)
    padded, token_mask = encoder.embed(inputs, attention_mask)
    count = alone.shape[1]
    assert token_mask is not None, "embed must give the attention mask at token rate"
    assert token_mask.shape == padded.shape[:2], f"the token mask is {tuple(token_mask.shape)}"
    assert int(token_mask[0].sum()) == count, f"a sample of {count} tokens has {int(token_mask[0].sum())} when padded"
    assert bool(token_mask[1:].all()), "a sample without padding lost tokens"
    reference = encoder.contextualize(alone, None).tokens[0]
    measured = encoder.contextualize(padded, token_mask).tokens[0, :count]
    worst = float((reference - measured).abs().max())
    assert worst <= atol, f"a padded sample differs from the same one alone by up to {worst:.2g}"
    masked = torch.zeros(len(inputs), 1, padded.shape[1], dtype=torch.bool)
    masked[:, 0, :count:2] = True
    masked[1:, 0, ::2] = True
    both = Masks.from_masked(masked, token_mask.cpu())
    lone = Masks.from_masked(masked[:1, :, :count])
    reference = encoder.contextualize(alone, None, masks=lone, mode=mode).tokens[0]
    measured = encoder.contextualize(padded, token_mask, masks=both, mode=mode).tokens[0, : len(reference)]
    worst = float((reference - measured).abs().max())
    assert worst <= atol, f"with masks a padded sample differs from the same one alone by up to {worst:.2g}"


def _check_copies(encoder: ModalityEncoder, inputs: Tensor, atol: float) -> None:
    twin = copy.deepcopy(encoder)  # as the teacher is
    twin.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        worst = float((encoder(inputs).tokens - twin(inputs).tokens).abs().max())
    assert worst <= atol, f"a copy gives other features, by up to {worst:.2g}"


def _check_backward(encoder: ModalityEncoder, inputs: Tensor, masks: Masks, mode: MaskMode) -> None:
    encoder.zero_grad()
    tokens, _ = encoder.embed(inputs, None)
    output = _contextualize(encoder, tokens, masks, mode)
    weights = torch.randn(output.tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens)
    ((output.tokens * weights).sum() + output.prefix.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient in mode {mode}: it is never used"
            assert torch.isfinite(parameter.grad).all(), f"{name} gets a gradient that is not finite"
    encoder.zero_grad()
