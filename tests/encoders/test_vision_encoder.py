import math

import pytest
import torch

from data2vec_train.batch import Masks
from data2vec_train.encoders.vision import VisionEncoder

FAMILIES = {
    "1.0": {
        "norm_first": True,
        "final_norm": True,
        "positions": "none",
        "relative_bias": "shared",
        "mask_token": True,
        "qkv_bias": "qv",
        "layer_scale": 0.5,
        "init": "beit",
    },
    "2.0": {
        "norm_first": False,
        "final_norm": False,
        "positions": "sincos",
        "relative_bias": "none",
        "mask_token": True,  # not in the papers' 2.0; here both families go through both mask modes
        "qkv_bias": "qkv",
        "layer_scale": None,
        "init": "bert",
    },
}
BIASED = FAMILIES["2.0"] | {"relative_bias": "per_layer"}


def build(family: dict, *, randomise: bool = True, **changes) -> VisionEncoder:
    torch.manual_seed(0)
    options = {
        "image_px": [6, 8],  # 3 x 4 patches
        "patch_px": 2,
        "channels": 2,
        "dim": 8,
        "depth": 3,
        "prenet_depth": 1,
        "num_heads": 2,
        "ffn_dim": 16,
        "norm_eps": 1e-6,
        "activation": "gelu",
        "class_token": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "drop_path": 0.0,
        "activation_checkpointing": False,
        "attention": "sdpa",
    }
    encoder = VisionEncoder(**options | family | changes)
    if randomise:  # large weights, so that nothing hides behind an initialisation near zero
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return encoder


def images(count: int = 2, **shape) -> torch.Tensor:
    size = {"channels": 2, "height": 6, "width": 8} | shape
    return torch.randn(count, *size.values(), generator=torch.Generator().manual_seed(3))


def random_masks(samples: int, masks_per_sample: int, num_tokens: int = 12, hidden: int = 7) -> Masks:
    drawn = torch.rand(samples, masks_per_sample, num_tokens, generator=torch.Generator().manual_seed(4))
    return Masks.from_masked(drawn.argsort(dim=2) < hidden)


@pytest.fixture(params=FAMILIES)
def family(request) -> dict:
    return FAMILIES[request.param]


@pytest.fixture(params=["eager", "sdpa"])
def backend(request) -> str:
    return request.param


def with_masks(encoder: VisionEncoder, inputs: torch.Tensor, masks: Masks, mode: str, **options):
    tokens, token_mask = encoder.embed(inputs)
    return encoder.contextualize(tokens, token_mask, masks=masks, mode=mode, **options)


# ------------------------------------------------------------------------------------------------------------ hiding


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_hidden_inputs_cannot_change_any_output(family, backend, mode):
    encoder, inputs, masks = build(family, attention=backend), images(), random_masks(2, 1)
    pixels = masks.masked.view(2, 1, 3, 4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (B, 1, H, W)
    noise = 10 * torch.randn(inputs.shape)
    before = with_masks(encoder, inputs, masks, mode, target_layer="block", top_k_layers=3)
    hidden_changed = with_masks(encoder, inputs + noise * pixels, masks, mode, target_layer="block", top_k_layers=3)
    assert torch.equal(before.tokens, hidden_changed.tokens)
    assert torch.equal(before.prefix, hidden_changed.prefix)
    assert all(torch.equal(a, b) for a, b in zip(before.layers, hidden_changed.layers, strict=True))
    visible_changed = with_masks(encoder, inputs + noise * ~pixels, masks, mode)
    assert (before.tokens - visible_changed.tokens).abs().max() > 0.1  # the test can see something at all


def test_hidden_places_hold_the_mask_token_and_keep_their_position(family):
    encoder, masks = build(family), random_masks(2, 3)
    seen = []
    encoder.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with_masks(encoder, images(), masks, "replace")
    tokens, _ = encoder.embed(images())
    rows = tokens.repeat_interleave(3, dim=0)
    rows[masks.masked.flatten(0, 1)] = encoder.mask_token[0, 0]
    if encoder.positions is not None:
        rows = rows + encoder.positions
    wanted = encoder.input_norm(torch.cat([encoder.class_token.expand(6, -1, -1), rows], dim=1))
    torch.testing.assert_close(seen[0], wanted)


def by_hand(encoder: VisionEncoder, inputs: torch.Tensor, row: int, masks: Masks) -> torch.Tensor:
    """One row through the blocks, only the visible tokens, the bias looked up pair by pair: (E + V, D)."""
    tokens = encoder.embed(inputs)[0][row // masks.masked.shape[1]]
    if encoder.positions is not None:
        tokens = tokens + encoder.positions[0]
    kept = [position for position, hidden in enumerate(masks.masked.flatten(0, 1)[row].tolist()) if not hidden]
    x = torch.cat([encoder.class_token[0], tokens[kept]])[None]
    x = encoder.input_norm(x)
    places = [None] + [(position // 4, position % 4) for position in kept]  # on the 3 x 4 grid
    modules = list(encoder.relative_biases)
    for layer, block in enumerate(encoder.transformer.blocks):
        bias = None
        if modules:
            table = modules[layer if len(modules) > 1 else 0].table  # (5 * 7 + 3, H)
            bias = torch.zeros(1, 2, len(places), len(places))
            for q, query in enumerate(places):
                for k, key in enumerate(places):
                    if query is None or key is None:
                        index = 35 + (2 if query is key else 0 if query is None else 1)
                    else:
                        index = (query[0] - key[0] + 2) * 7 + query[1] - key[1] + 3
                    bias[0, :, q, k] = table[index]
        x, _ = block(x, None, bias, backend="eager")
    return encoder.final_norm(x)[0]


@pytest.mark.parametrize("which", ["1.0", "2.0", "2.0 with a bias per layer"])
def test_dropping_equals_encoding_the_visible_tokens_only(which, backend):
    encoder = build(FAMILIES.get(which, BIASED), attention=backend)
    masks = random_masks(2, 2)
    output = with_masks(encoder, images(), masks, "drop")
    assert output.tokens.shape == (4, 5, 8)
    for row in range(4):
        wanted = by_hand(encoder, images(), row, masks)
        torch.testing.assert_close(output.prefix[row], wanted[:1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.tokens[row], wanted[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_a_view_among_others_equals_its_mask_alone(family, backend, mode):
    encoder, inputs, masks = build(family, attention=backend), images(3), random_masks(3, 4)
    together = with_masks(encoder, inputs, masks, mode).tokens.unflatten(0, (3, 4))
    for view in range(4):
        mask = Masks.from_masked(masks.masked[:, view : view + 1])
        alone = with_masks(encoder, inputs, mask, mode).tokens
        torch.testing.assert_close(together[:, view], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_masks_that_hide_nothing_change_nothing(family, mode):
    encoder, inputs = build(family), images()
    masks = Masks.from_masked(torch.zeros(2, 1, 12, dtype=torch.bool))
    torch.testing.assert_close(with_masks(encoder, inputs, masks, mode).tokens, encoder(inputs).tokens)


def test_dropping_needs_equal_counts_and_replacing_a_mask_token(family):
    ragged = Masks.from_masked(torch.arange(12) < torch.tensor([3, 4])[:, None, None])
    with pytest.raises(ValueError, match="same number of tokens in every row"):
        with_masks(build(family), images(), ragged, "drop")
    with pytest.raises(ValueError, match="mask_token: true"):
        with_masks(build(family, mask_token=False), images(), ragged, "replace")


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_padded_tokens_cannot_change_real_ones(family, backend, mode):
    encoder, masks = build(family, attention=backend), random_masks(2, 2, hidden=4)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 9:] = False
    tokens, _ = encoder.embed(images())
    changed = torch.where(real[..., None], tokens, tokens + 5)
    first, other = (
        encoder.contextualize(x, real, masks=masks, mode=mode).tokens.unflatten(0, (2, 2)) for x in (tokens, changed)
    )
    kept = real[:, None].expand(2, 2, 12)
    if mode == "drop":
        kept = kept.flatten(0, 1).gather(1, masks.visible).unflatten(0, (2, 2))
    assert not kept.all()
    torch.testing.assert_close(first[kept], other[kept], rtol=1e-5, atol=1e-5)
    unmasked = encoder.contextualize(tokens, None, masks=masks, mode=mode).tokens.unflatten(0, (2, 2))
    assert (unmasked[kept] - first[kept]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- target layers


@pytest.mark.parametrize("target_layer", ["ffn", "block"])
@pytest.mark.parametrize("top_k_layers", [1, 2, 3])
def test_target_layers_are_the_last_layers_lowest_first_without_the_class_token(family, target_layer, top_k_layers):
    encoder, recorded = build(family), []
    for block in encoder.transformer.blocks:
        source = block.ffn.fc2 if target_layer == "ffn" else block
        source.register_forward_hook(lambda _, __, out: recorded.append(out if target_layer == "ffn" else out[0]))
    tokens, _ = encoder.embed(images())
    output = encoder.contextualize(tokens, target_layer=target_layer, top_k_layers=top_k_layers)
    assert len(output.layers) == top_k_layers
    for layer, wanted in zip(output.layers, recorded[3 - top_k_layers :], strict=True):
        assert layer.shape == (2, 12, 8)
        assert torch.equal(layer, wanted[:, 1:])


def test_block_tap_of_the_last_layer_is_the_output_before_the_final_norm(family):
    encoder = build(family)
    tokens, _ = encoder.embed(images())
    output = encoder.contextualize(tokens, target_layer="block", top_k_layers=1)
    assert torch.equal(encoder.final_norm(output.layers[0]), output.tokens)
    assert torch.equal(output.layers[0], output.tokens) == (not family["norm_first"])


def test_without_a_tap_no_layers_are_kept(family):
    assert build(family)(images()).layers == []


# ------------------------------------------------------------------------------------------------- backends, memory


def gradients(encoder: VisionEncoder, inputs: torch.Tensor, masks: Masks, mode: str, real=None):
    tokens, _ = encoder.embed(inputs)
    output = encoder.contextualize(tokens, real, masks=masks, mode=mode, target_layer="ffn", top_k_layers=2)
    loss = output.tokens.square().sum() + output.prefix.sum() + sum(layer.sum() for layer in output.layers)
    loss.backward()
    return output, {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict, other: dict) -> None:
    assert set(found) == set(other)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_activation_checkpointing_gives_equal_gradients(family, mode, monkeypatch):
    """With dropout and drop path on: the recomputation has to draw the same numbers."""
    from data2vec_train.encoders import transformer

    used, original = [], transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *args, **kw: used.append(1) or original(*args, **kw))
    results = []
    for checkpointing in (False, True):
        encoder = build(family, activation_checkpointing=checkpointing, dropout=0.2, drop_path=0.3).train()
        torch.manual_seed(5)
        results.append(gradients(encoder, images(), random_masks(2, 2), mode))
    assert len(used) == 3
    torch.testing.assert_close(results[0][0].tokens, results[1][0].tokens, rtol=0, atol=0)
    assert_same_gradients(results[0][1], results[1][1])


def test_drop_path_grows_with_depth_drops_whole_rows_and_is_off_in_evaluation(family):
    encoder = build(family, drop_path=0.4)
    assert [block.drop_path.rate for block in encoder.transformer.blocks] == pytest.approx([0.0, 0.2, 0.4])
    encoder.eval()
    assert torch.equal(encoder(images()).tokens, encoder(images()).tokens)
    assert torch.equal(encoder(images()).tokens, build(family, drop_path=0.0).eval()(images()).tokens)
    encoder.train()
    assert (encoder(images(8)).tokens != encoder(images(8)).tokens).any()
    torch.manual_seed(0)
    branch = encoder.transformer.blocks[2].drop_path(torch.ones(2000, 3, 2))
    assert (branch == branch[:, :1, :1]).all()
    kept = branch[:, 0, 0] > 0
    assert abs(kept.float().mean() - 0.6) < 4 * math.sqrt(0.24 / 2000)
    torch.testing.assert_close(branch[kept], torch.full_like(branch[kept], 1 / 0.6))


# ---------------------------------------------------------------------------------------------- positions and shapes


@pytest.mark.parametrize("size", [[6, 8], [8, 4], 4])
def test_sincos_positions_equal_the_formula(size):
    """First half of the width: column; second half: row; each [sin(p w_k), cos(p w_k)], w_k = 10000^(-k/(D/4))."""
    encoder = build(FAMILIES["2.0"], image_px=size)
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns, quarter = height // 2, width // 2, 2
    assert encoder.grid == (rows, columns)
    for token in range(rows * columns):
        wanted = []
        for place in (token % columns, token // columns):
            angles = [place * 10000 ** (-k / quarter) for k in range(quarter)]
            wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert encoder.positions[0, token].tolist() == pytest.approx(wanted, abs=1e-6)


def test_patches_are_in_row_major_order():
    encoder = build(FAMILIES["2.0"])
    inputs = torch.zeros(1, 2, 6, 8)
    inputs[0, :, 2:4, 6:8] = 1  # second row, last column: patch 7
    tokens, _ = encoder.embed(inputs)
    changed = (tokens[0] - encoder.embedder.project.bias).abs().amax(dim=1) > 1e-3
    assert changed.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    ("image_px", "patch_px", "channels", "grid"),
    [([6, 8], 2, 5, (3, 4)), (28, 14, 3, (2, 2)), ([42, 14], 14, 1, (3, 1))],
)
def test_any_shape_number_of_channels_and_patch(family, image_px, patch_px, channels, grid):
    encoder = build(family, image_px=image_px, patch_px=patch_px, channels=channels)
    height, width = (image_px, image_px) if isinstance(image_px, int) else image_px
    output = encoder(images(channels=channels, height=height, width=width))
    assert encoder.grid == grid
    assert output.tokens.shape == (2, grid[0] * grid[1], 8)
    assert output.prefix.shape == (2, 1, 8)
    assert output.tokens.isfinite().all()


@pytest.mark.parametrize("shape", [{"height": 8, "width": 6}, {"height": 7}])
def test_an_image_of_another_size_is_refused(family, shape):
    with pytest.raises(ValueError, match="8"):
        build(family).embed(images(**shape))


def test_without_a_class_token_there_is_no_prefix(family):
    encoder = build(family, class_token=False)
    output = with_masks(encoder, images(), random_masks(2, 2), "drop", target_layer="ffn", top_k_layers=2)
    assert output.prefix.shape == (4, 0, 8)
    assert output.tokens.shape == output.layers[0].shape == (4, 5, 8)
    assert encoder.num_prefix_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": 7}, "7"),
        ({"image_px": [6, 7]}, "7"),
        ({"prenet_depth": 3}, "from 0 to below depth=3, got 3"),
        ({"prenet_depth": -1}, "got -1"),
        ({"num_heads": 3}, "dim=8 cannot be split into 3 heads"),
        ({"positions": "rotary"}, "positions: expected one of .* got 'rotary'"),
        ({"relative_bias": "all"}, "relative_bias: expected one of .* got 'all'"),
        ({"init": "zeros"}, "init: expected one of .* got 'zeros'"),
        ({"qkv_bias": "k"}, "got 'k'"),
        ({"attention": "flash9"}, "'flash9' does not exist; choose one of eager, sdpa"),
        ({"drop_path": 1.0}, "got 1.0"),
        ({"positions": "sincos", "dim": 6}, "divisible by 4, got 6"),
    ],
)
def test_what_cannot_be_built_is_refused(family, change, message):
    with pytest.raises(ValueError, match=message):
        build(family, **change)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_base_has_86_million_parameters(name):
    """Counted by hand from ALGORITHM.md 2.3 and 3.4."""
    dim, ffn, depth, tokens = 768, 3072, 12, 196
    block = 3 * dim * dim + dim * dim + dim + 2 * dim * ffn + ffn + dim + 2 * 2 * dim
    block += 2 * dim + 2 * dim if name == "1.0" else 3 * dim  # q and v biases, two layer scales; or q, k and v biases
    rest = 3 * 16 * 16 * dim + dim + dim + 2 * dim  # patches, class token, one norm outside the blocks
    if name == "1.0":
        rest += dim + ((2 * 14 - 1) ** 2 + 3) * 12  # mask token, position table
    with torch.device("meta"):
        encoder = build(
            FAMILIES[name] | {"mask_token": name == "1.0"},
            randomise=False,
            image_px=224,
            patch_px=16,
            channels=3,
            dim=dim,
            depth=depth,
            num_heads=12,
            ffn_dim=ffn,
        )
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == depth * block + rest
    assert count == pytest.approx(86e6, rel=0.01)
    assert encoder.grid[0] * encoder.grid[1] == tokens


def test_beit_initialisation_is_cut_at_one_sigma_and_scaled_down_by_depth():
    encoder = build(FAMILIES["1.0"], randomise=False, dim=32, ffn_dim=64)
    assert encoder.mask_token.abs().max() <= 0.02
    assert encoder.embedder.project.weight.abs().max() <= 0.02
    for layer, block in enumerate(encoder.transformer.blocks, start=1):
        for weight in (block.attention.out.weight, block.ffn.fc2.weight):
            assert weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.02)
        assert block.ffn.fc1.weight.abs().max().item() == pytest.approx(0.02, rel=0.02)
        assert (block.scale1 == 0.5).all()
    assert (encoder.relative_biases[0].table == 0).all()


def test_bert_initialisation_has_the_published_widths():
    encoder = build(FAMILIES["2.0"], randomise=False, dim=32, ffn_dim=64, depth=4)
    weights = torch.cat([block.ffn.fc1.weight.flatten() for block in encoder.transformer.blocks])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (32 + 2 * 2 * 2))  # Xavier on the flattened kernel
    assert encoder.embedder.project.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert encoder.class_token.std().item() == pytest.approx(1.0, rel=0.5)
