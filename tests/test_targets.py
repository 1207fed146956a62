import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data2vec_train.objective.data2vec import std_over_rows
from data2vec_train.objective.targets import TargetBuilder, normalise

RECORDED = json.loads((Path(__file__).parent / "statistics.json").read_text())["target_ops"]
X = torch.sin(0.7 * torch.arange(24)).view(2, 4, 3)  # the recorded input


def builder(layer_norms=(), mean_norms=(), *, k=1, reference_padding=False) -> TargetBuilder:
    return TargetBuilder(
        target_layer="ffn",
        top_k_layers=k,
        layer_norms=layer_norms,
        mean_norms=mean_norms,
        reference_padding=reference_padding,
    )


@pytest.mark.parametrize(("norm", "recorded"), [("instance", "instance_norm_over_T"), ("layer", "layer_norm_over_D")])
def test_norms_equal_the_originals(norm, recorded):
    wanted = torch.tensor(RECORDED[recorded]).view_as(X)
    torch.testing.assert_close(builder([norm])([X]), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(builder([], [norm])([X]), wanted, rtol=0, atol=1e-6)


def test_batch_norm_is_over_samples_and_time():
    torch.testing.assert_close(builder(["batch"])([X]), F.batch_norm(X.mT, None, None, training=True).mT)


def test_std_metric_equals_the_original():
    predictions = torch.cos(0.3 * torch.arange(24)).view(8, 3)
    assert std_over_rows(predictions).item() == pytest.approx(RECORDED["std_metric_pred"], rel=1e-6)


def test_std_metric_of_equal_rows_is_the_floor():
    assert std_over_rows(torch.randn(1, 5).expand(9, 5)).item() == pytest.approx(1e-3, rel=1e-3)


def test_layers_are_normalised_before_they_are_averaged():
    layers = [X, 100 * X.roll(1, dims=1) ** 2]
    mean = (F.instance_norm(layers[0].mT) + F.instance_norm(layers[1].mT)).mT / 2
    wanted = F.layer_norm(mean, (3,))
    torch.testing.assert_close(builder(["instance"], ["layer"], k=2)(layers), wanted)


def test_norms_apply_in_the_given_order():
    first, other = builder(["instance", "layer"])([X]), builder(["layer", "instance"])([X])
    torch.testing.assert_close(first, F.layer_norm(F.instance_norm(X.mT).mT, (3,)))
    torch.testing.assert_close(other, F.instance_norm(F.layer_norm(X, (3,)).mT).mT)


def test_without_norms_targets_are_the_plain_mean_in_float32():
    layers = [X.bfloat16(), (2 * X).bfloat16()]
    targets = builder(k=2)(layers)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, (layers[0].float() + layers[1].float()) / 2)


def test_the_layers_are_not_changed():
    layer = X.clone()
    builder(["instance"], ["layer"])([layer])
    assert torch.equal(layer, X)


# ---------------------------------------------------------------------------------------------------------- padding

LENGTHS = (6, 4, 2)


@pytest.fixture
def padded() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two layers of three samples with large numbers where there is padding."""
    torch.manual_seed(0)
    real = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    layers = [torch.randn(3, 6, 5) * scale + 3 for scale in (1.0, 4.0)]
    return [torch.where(real[..., None], layer, torch.tensor(1e4)) for layer in layers], real


@pytest.mark.parametrize(
    ("layer_norms", "mean_norms"),
    [(["instance"], []), (["instance"], ["layer"]), (["layer"], ["instance"]), ([], ["instance"])],
)
def test_targets_of_a_padded_sample_are_those_of_the_sample_alone(padded, layer_norms, mean_norms):
    layers, real = padded
    build = builder(layer_norms, mean_norms, k=2)
    together = build(layers, real)
    for sample, length in enumerate(LENGTHS):
        alone = build([layer[sample : sample + 1, :length] for layer in layers])
        torch.testing.assert_close(together[sample, :length], alone[0], rtol=1e-5, atol=1e-5)


def test_batch_norm_counts_real_positions_only(padded):
    layers, real = padded
    together = builder(["batch"], k=2)(layers, real)
    rows = [layer[real] for layer in layers]  # each (12, D)
    wanted = sum(F.batch_norm(x, None, None, training=True) for x in rows) / 2
    torch.testing.assert_close(together[real], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_reference_padding_lets_padding_in(padded, norm):
    layers, real = padded
    as_the_originals = builder([norm], k=2, reference_padding=True)(layers, real)
    torch.testing.assert_close(as_the_originals, builder([norm], k=2)(layers))
    assert (as_the_originals - builder([norm], k=2)(layers, real))[real].abs().max() > 0.1


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_an_all_true_mask_changes_nothing(norm):
    torch.testing.assert_close(builder([norm])([X], torch.ones(2, 4, dtype=torch.bool)), builder([norm])([X]))


@pytest.mark.parametrize("norms", [["instance"], ["batch"], ["instance", "layer"]])
def test_constant_channels_give_finite_targets(norms):
    assert normalise(torch.full((2, 4, 3), 7.0), norms).abs().max() == 0


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("layer_norms", "mean_norms"), [(["instance"], []), ([], ["instance"])])
def test_a_single_position_has_no_instance_norm(layer_norms, mean_norms):
    with pytest.raises(ValueError, match="at least two positions"):
        builder(layer_norms, mean_norms)([X[:, :1]])
    builder(["layer"])([X[:, :1]])


@pytest.mark.parametrize("given", [1, 3])
def test_another_number_of_layers_than_k_is_refused(given):
    with pytest.raises(ValueError, match=f"last 2 layers, got {given}"):
        builder(k=2)([X] * given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer": "attention"}, "got 'attention'"),
        ({"top_k_layers": 0}, "at least 1, got 0"),
        ({"layer_norms": ["group"]}, "got 'group'"),
        ({"mean_norms": ["none"]}, "got 'none'"),
    ],
)
def test_unknown_settings_are_refused(change, message):
    good = {"target_layer": "ffn", "top_k_layers": 1, "layer_norms": [], "mean_norms": [], "reference_padding": False}
    with pytest.raises(ValueError, match=message):
        TargetBuilder(**good | change)
