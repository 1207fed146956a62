import pytest
import torch
import torch.nn.functional as F

from data2vec_train.objective.decoders import Conv2dDecoder, LinearDecoder, MLPDecoder, scatter_tokens

GRID = (3, 4)
HIDDEN = torch.tensor([[0, 1, 2, 5, 6, 7, 10, 11], [0, 2, 3, 4, 5, 8, 9, 10]])  # of 12 positions, two rows
VISIBLE = torch.tensor([[3, 4, 8, 9], [1, 6, 7, 11]])
FLAT = (HIDDEN + 12 * torch.arange(2)[:, None]).flatten()


def conv(*, dim=4, channels=4, depth=2, kernel=3, groups=2, residual=True, noise_std=0.0, **options) -> Conv2dDecoder:
    torch.manual_seed(0)
    fixed = {"projection_layers": 1, "input_dropout": 0.0, "init_std": None, "reference_padding": False} | options
    return Conv2dDecoder(
        dim=dim,
        channels=channels,
        depth=depth,
        kernel=kernel,
        groups=groups,
        residual=residual,
        noise_std=noise_std,
        **fixed,
    )


def run(decoder, tokens, *, visible=VISIBLE) -> torch.Tensor:
    return decoder(tokens, hidden=FLAT, visible=visible, num_tokens=12, grid=GRID, attention_mask=None)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------- scatter_tokens


def test_scattering_returns_every_token_to_its_place(tokens):
    full = scatter_tokens(tokens, visible=VISIBLE, num_tokens=12, noise_std=0.0)
    wanted = torch.zeros(2, 12, 4)
    for row in range(2):
        for rank, position in enumerate(VISIBLE[row].tolist()):
            wanted[row, position] = tokens[row, rank]
    assert torch.equal(full, wanted)


def test_noise_is_fresh_at_each_call_and_has_the_given_std(tokens):
    torch.manual_seed(0)
    visible = torch.zeros(2, 0, dtype=torch.int64)
    first, other = (scatter_tokens(tokens[:, :0], visible=visible, num_tokens=5000, noise_std=0.01) for _ in range(2))
    assert (first != other).all()
    for noise in (first, other):  # 40,000 numbers: the std is known to 0.4 %
        assert noise.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(noise.mean().item()) < 4 * 0.01 / 200


def test_noise_stays_away_from_visible_tokens_and_gets_no_gradient(tokens):
    tokens.requires_grad_()
    full = scatter_tokens(tokens, visible=VISIBLE, num_tokens=12, noise_std=5.0)
    assert torch.equal(full.gather(1, VISIBLE[..., None].expand(-1, -1, 4)), tokens)
    full.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_noise_has_the_type_of_the_tokens(tokens):
    assert scatter_tokens(tokens.bfloat16(), visible=VISIBLE, num_tokens=12, noise_std=0.01).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------- linear and MLP


def test_linear_and_mlp_predict_hidden_rows_only():
    torch.manual_seed(0)
    tokens = torch.randn(2, 12, 4)
    linear, mlp = LinearDecoder(dim=4, init_std=None), MLPDecoder(dim=4, ratio=2, init_std=None)
    rows = torch.cat([tokens[0][HIDDEN[0]], tokens[1][HIDDEN[1]]])
    weight, bias = linear.project.weight, linear.project.bias
    torch.testing.assert_close(run(linear, tokens, visible=None), rows @ weight.T + bias)
    first, _, second = mlp.project
    assert first.weight.shape == (8, 4)
    wanted = F.gelu(rows @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(run(mlp, tokens, visible=None), wanted)


# ----------------------------------------------------------------------------------------------------- convolutions


def by_hand(decoder: Conv2dDecoder, full: torch.Tensor, *, residual: list[bool]) -> torch.Tensor:
    """Spec 3.5 with explicit zero padding: k // 2 before, the rest after."""
    image = full.view(2, *GRID, -1).permute(0, 3, 1, 2)
    for layer, add in zip(decoder.convolutions, residual, strict=True):
        kernel = layer.kernel_size[0]
        before, after = kernel // 2, kernel - 1 - kernel // 2
        padded = F.pad(image, (before, after, before, after))
        out = F.conv2d(padded, layer.weight, layer.bias, groups=layer.groups)
        mean = out.mean(dim=1, keepdim=True)
        std = (out.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
        out = F.gelu((out - mean) / std)
        image = image + out if add else out
    rows = image.permute(0, 2, 3, 1).reshape(2, 12, -1)
    return decoder.project(torch.cat([rows[0][HIDDEN[0]], rows[1][HIDDEN[1]]]))


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_convolutions_equal_the_formula_for_odd_and_even_kernels(tokens, kernel):
    decoder = conv(kernel=kernel)
    full = scatter_tokens(tokens, visible=VISIBLE, num_tokens=12, noise_std=0.0)
    predictions = run(decoder, tokens)
    assert predictions.shape == (16, 4)
    torch.testing.assert_close(predictions, by_hand(decoder, full, residual=[True, True]), rtol=1e-4, atol=1e-5)


def test_residual_only_where_widths_agree(tokens):
    decoder = conv(channels=8, depth=3)
    full = scatter_tokens(tokens, visible=VISIBLE, num_tokens=12, noise_std=0.0)
    torch.testing.assert_close(
        run(decoder, tokens), by_hand(decoder, full, residual=[False, True, True]), rtol=1e-4, atol=1e-5
    )


def test_residual_can_be_switched_off(tokens):
    decoder = conv(residual=False)
    full = scatter_tokens(tokens, visible=VISIBLE, num_tokens=12, noise_std=0.0)
    torch.testing.assert_close(run(decoder, tokens), by_hand(decoder, full, residual=[False, False]))


def test_projection_has_one_or_two_layers():
    assert [tuple(p.shape) for p in conv(channels=8).project.parameters()] == [(4, 8), (4,)]
    shapes = [tuple(p.shape) for p in conv(channels=8, projection_layers=2).project.parameters()]
    assert shapes == [(16, 8), (16,), (4, 16), (4,)]
    with pytest.raises(ValueError, match="1 or 2, got 3"):
        conv(projection_layers=3)


def test_a_full_set_of_tokens_needs_no_noise():
    """Mask mode "replace": nothing was dropped."""
    torch.manual_seed(0)
    full = torch.randn(2, 12, 4)
    decoder = conv(noise_std=7.0)
    torch.testing.assert_close(run(decoder, full, visible=None), by_hand(decoder, full, residual=[True, True]))


def test_decoder_noise_is_on_in_evaluation_too_and_differs_between_calls(tokens):
    """As in the originals: noise is an input, no regularisation."""
    decoder = conv(noise_std=1.0).eval()
    assert (run(decoder, tokens) != run(decoder, tokens)).any()


def test_input_dropout_acts_in_training_only(tokens):
    decoder = conv(input_dropout=0.5)
    torch.manual_seed(0)
    assert (run(decoder, tokens) != run(decoder, tokens)).any()
    decoder.eval()
    assert torch.equal(run(decoder, tokens), run(decoder, tokens))


def test_which_decoders_restore_dropped_tokens():
    assert [d.restores_dropped for d in (LinearDecoder, MLPDecoder, Conv2dDecoder)] == [False, False, True]
