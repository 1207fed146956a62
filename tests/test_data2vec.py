import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data2vec_train.batch import Batch, Masks
from data2vec_train.encoders.base import EncoderOutput, ModalityEncoder, apply_mask
from data2vec_train.encoders.text import TextEncoder
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec, relative_std, std_over_rows
from data2vec_train.objective.decoders import Conv2dDecoder, Decoder, LinearDecoder
from data2vec_train.objective.masking import BlockMasker, InverseBlockMasker
from data2vec_train.objective.targets import TargetBuilder, normalise
from data2vec_train.training.optim import adamw

RECORDED = json.loads((Path(__file__).parent / "statistics.json").read_text())["target_ops"]
X = torch.sin(0.7 * torch.arange(24)).view(2, 4, 3)  # (B, T, D), as recorded
GRID = (4, 6)


def objective(encoder: ModalityEncoder, decoder: Decoder, **changes) -> Data2Vec:
    target_options = {
        "target_layer": "ffn",
        "top_k_layers": 1,
        "layer_norms": [],
        "mean_norms": [],
        "reference_padding": False,
    }
    options = {
        "mask_mode": "replace",
        "masks_per_sample": 1,
        "loss_beta": 0.0,
        "channel_reduction": "sum_over_sqrt_dim",
        "class_token_weight": 0.0,
        "tau_start": 0.9,
        "tau_end": 0.9,
        "tau_anneal_steps": 0,
        "share_embeddings": False,
        "copied": [],
    }
    targets = TargetBuilder(**target_options | changes.pop("targets", {}))
    return Data2Vec(encoder=encoder, decoder=decoder, targets=targets, **options | changes)


# ----------------------------------------------------------------------------------------------------- loss by hand


class GivenLayers(ModalityEncoder):
    """Its layers are its inputs, its class token is one vector per row."""

    def __init__(self, dim: int, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.dim, self.depth, self.prenet_depth, self.num_prefix_tokens, self.grid = dim, 1, 0, num_prefix_tokens, None
        self.row_prefix = nn.Parameter(torch.zeros(1, 1, dim))

    def embed(self, inputs, attention_mask):
        return inputs, attention_mask

    def contextualize(self, tokens, attention_mask, *, masks=None, mode="replace", target_layer=None, top_k_layers=0):
        layers = [tokens] * top_k_layers
        if masks is not None:
            tokens, _ = apply_mask(tokens, attention_mask, masks=masks, mode="replace", mask_token=torch.zeros(1))
        rows = torch.arange(len(tokens))[:, None, None] + self.row_prefix
        return EncoderOutput(prefix=rows, tokens=tokens, layers=layers)


class GivenPredictions(Decoder):
    """Answers with rows of a fixed tensor (N, T, D)."""

    restores_dropped = True

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers)

    def forward(self, tokens, *, hidden, visible, num_tokens, grid, attention_mask):
        return self.answers.flatten(0, 1)[hidden]


@pytest.mark.parametrize(
    ("reduction", "beta", "norm", "recorded"),
    [
        ("sum_over_sqrt_dim", 0.0, "instance", "mse_sum_over_sqrtD_per_pos"),
        ("sum", 4.0, "layer", "smooth_l1_beta4_scale1"),
        ("mean", 2.0, "layer", "smooth_l1_beta2_mean"),
    ],
)
def test_losses_equal_the_originals(reduction, beta, norm, recorded):
    model = objective(
        GivenLayers(3),
        GivenPredictions(torch.cos(0.3 * torch.arange(24)).view(2, 4, 3)),
        loss_beta=beta,
        channel_reduction=reduction,
        targets={"layer_norms": [norm]},
    )
    output = model(Batch(inputs=X, masks=Masks.from_masked(torch.ones(2, 1, 4, dtype=torch.bool))))
    assert output.loss.item() == pytest.approx(RECORDED[recorded], rel=1e-6)


MASKED = torch.tensor([[[1, 0, 0, 1], [0, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 1, 0]]]).bool()  # (B=2, M=2, T=4), 8 hidden


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["sum_over_sqrt_dim", "mean", "sum"])
def test_loss_by_hand_over_two_masks(reduction, beta):
    answers = torch.cos(0.3 * torch.arange(48)).view(4, 4, 3)  # (N, T, D)
    model = objective(
        GivenLayers(3), GivenPredictions(answers), masks_per_sample=2, loss_beta=beta, channel_reduction=reduction
    )
    output = model(Batch(inputs=X, masks=Masks.from_masked(MASKED)))
    scale = {"sum_over_sqrt_dim": 1 / math.sqrt(3), "mean": 1 / 3, "sum": 1.0}[reduction]
    total, rows, targets = 0.0, [], []
    for sample in range(2):
        for view in range(2):
            for position in range(4):
                if not MASKED[sample, view, position]:
                    continue
                rows.append(answers[2 * sample + view, position])
                targets.append(X[sample, position])
                for d in (rows[-1] - targets[-1]).abs().tolist():
                    total += d * d if beta == 0 else 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    assert len(rows) == 8
    assert output.loss.item() == pytest.approx(scale * total / 8, rel=1e-5)
    assert torch.equal(output.predictions, torch.stack(rows))
    torch.testing.assert_close(output.targets, torch.stack(targets))
    assert set(output.terms) == {"regression"}


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_class_token_term_by_hand(beta):
    """Class token of row n is (n, n, n); compared with the mean target over all positions, mean over rows."""
    model = objective(
        GivenLayers(3),
        GivenPredictions(torch.zeros(4, 4, 3)),
        masks_per_sample=2,
        class_token_weight=2.56,
        loss_beta=beta,
        mask_mode="drop",  # GivenLayers ignores it: `drop` needs equal counts, these masks have none
    )
    output = model(Batch(inputs=X, masks=Masks.from_masked(MASKED)))
    total = 0.0
    for row in range(4):
        for d in (X[row // 2].mean(dim=0) - row).abs().tolist():
            total += d * d if beta == 0 else 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    assert output.terms["class_token"].item() == pytest.approx(2.56 * total / math.sqrt(3) / 4, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(term.item() for term in output.terms.values()), rel=1e-6)
    output.terms["class_token"].backward()
    assert model.student.row_prefix.grad.abs().max() > 0


@pytest.mark.parametrize("reference_padding", [False, True])
def test_the_class_token_is_compared_with_the_mean_over_real_positions(reference_padding):
    inputs = torch.randn(2, 4, 3)
    real = torch.tensor([[True, True, True, True], [True, True, False, False]])
    masked = torch.zeros(2, 1, 4, dtype=torch.bool)
    masked[:, :, 0] = True
    model = objective(
        GivenLayers(3),
        GivenPredictions(torch.zeros(2, 4, 3)),
        class_token_weight=1.0,
        targets={"reference_padding": reference_padding},
    )
    batch = Batch(inputs=inputs, attention_mask=real, masks=Masks.from_masked(masked, real))
    top_k_layers = inputs[1] if reference_padding else inputs[1, :2]
    means = torch.stack([inputs[0].mean(dim=0), top_k_layers.mean(dim=0)])
    rows = torch.arange(2.0)[:, None].expand(2, 3)
    expected = (rows - means).square().sum(dim=1).mean() / math.sqrt(3)
    torch.testing.assert_close(model(batch).terms["class_token"], expected)


def test_relative_std_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[3.0, 2.0], [3.0, 0.0]]])  # two samples of two positions
    torch.testing.assert_close(relative_std(x), (x.var(dim=0).mean() / x.square().mean()).sqrt())
    assert relative_std(x[:1].expand(3, -1, -1)) == 0
    assert relative_std(x[:1]).isnan()
    assert relative_std(torch.zeros(2, 2, 2)) == 0


def test_relative_std_leaves_padding_out():
    x = torch.randn(3, 5, 4)
    real = torch.arange(5) < torch.tensor([5, 3, 3])[:, None]
    garbage = torch.where(real[..., None], x, 1e3)
    torch.testing.assert_close(relative_std(garbage, real), relative_std(x, real))
    torch.testing.assert_close(relative_std(x, torch.ones(3, 5, dtype=torch.bool)), relative_std(x))


def test_the_norms_of_targets_hide_what_relative_std_shows():
    alike = torch.randn(1, 6, 8) * 0.01 + 1 + 1e-4 * torch.randn(4, 6, 8)
    assert relative_std(alike) < 1e-3
    assert std_over_rows(normalise(alike, ["instance"]).flatten(0, 1)) > 0.9


@pytest.mark.parametrize("training", [False, True])
def test_shared_embeddings_reach_the_teacher_as_the_student_has_them_dropout_included(training):
    text = {"vocab_size": 20, "max_tokens": 8, "pad_id": 1, "num_token_types": 0, "dim": 16, "depth": 1}
    text |= {"prenet_depth": 0, "num_heads": 2, "ffn_dim": 32, "norm_eps": 1e-5, "activation": "gelu", "dropout": 0.5}
    text |= dict.fromkeys(["attention_dropout", "activation_dropout", "drop_path", "layer_drop"], 0.0)
    encoder = TextEncoder(**text, activation_checkpointing=False, attention="eager")
    model = objective(encoder, LinearDecoder(dim=16, init_std=None), share_embeddings=True).train(training)
    ids = torch.randint(2, 20, (2, 6))
    masked = torch.zeros(2, 1, 6, dtype=torch.bool)
    masked[:, :, 1:3] = True
    embedded = model.student.embed(ids, None)
    dropped = float((embedded[0] == 0).float().mean())
    assert (0.3 < dropped < 0.7) if training else dropped == 0
    y = model.compute_targets(Batch(inputs=ids, masks=Masks.from_masked(masked)), embedded)
    with torch.no_grad():
        teacher = model.teacher.encoder.contextualize(*embedded, target_layer="ffn", top_k_layers=1)
    torch.testing.assert_close(y, teacher.layers[0])  # nothing else drops out in the teacher


def test_the_last_prefix_token_is_the_class_token():
    encoder = GivenLayers(3)
    plain = encoder.contextualize

    def two(*args, **kw):
        output = plain(*args, **kw)
        return EncoderOutput(torch.cat([output.prefix + 100, output.prefix], dim=1), output.tokens, output.layers)

    model = objective(encoder, GivenPredictions(torch.zeros(2, 4, 3)), class_token_weight=1.0)
    batch = Batch(inputs=X, masks=Masks.from_masked(MASKED[:, :1]))
    alone = model(batch).terms["class_token"]
    model.student.contextualize = two
    assert torch.equal(model(batch).terms["class_token"], alone)


def test_a_batch_without_the_right_number_of_masks_is_refused():
    model = objective(GivenLayers(3), GivenPredictions(torch.zeros(4, 4, 3)), masks_per_sample=3)
    for masks in (None, Masks.from_masked(MASKED)):
        with pytest.raises(ValueError, match="3 masks per sample"):
            model(Batch(inputs=X, masks=masks))


# -------------------------------------------------------------------------------------------------- vision, 1.0 and 2.0


def vision(version: int, *, attention: str = "sdpa", **changes) -> Data2Vec:
    torch.manual_seed(0)
    first = version == 1
    encoder = VisionEncoder(
        image_px=[8, 12],
        patch_px=2,
        channels=1,
        dim=16,
        depth=3,
        prenet_depth=0,
        num_heads=2,
        ffn_dim=32,
        norm_first=first,
        final_norm=first,
        norm_eps=1e-6,
        activation="gelu",
        positions="none" if first else "sincos",
        relative_bias="shared" if first else "none",
        class_token=True,
        mask_token=first,
        qkv_bias="qv" if first else "qkv",
        layer_scale=0.1 if first else None,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        drop_path=0.0,
        init="beit" if first else "bert",
        activation_checkpointing=False,
        attention=attention,
    )
    if first:
        decoder = LinearDecoder(dim=16, init_std=None)
        norms = {"target_layer": "block", "top_k_layers": 2, "layer_norms": ["layer"], "mean_norms": ["layer"]}
        options = {"loss_beta": 2.0, "channel_reduction": "mean"}
    else:
        decoder = Conv2dDecoder(
            dim=16,
            channels=16,
            depth=2,
            kernel=3,
            groups=4,
            residual=True,
            projection_layers=1,
            input_dropout=0.0,
            noise_std=0.01,
            init_std=None,
            reference_padding=False,
        )
        norms = {"top_k_layers": 3, "layer_norms": ["instance"], "mean_norms": ["layer"]}
        options = {"mask_mode": "drop", "masks_per_sample": 4, "class_token_weight": 0.1}
    return objective(encoder, decoder, targets=norms, **options | changes)


def vision_batch(model: Data2Vec, count: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    if model.mask_mode == "drop":
        masker = InverseBlockMasker(hidden_fraction=0.75, adjust_fraction=0.1, block_patches=2)
    else:
        masker = BlockMasker(hidden_fraction=0.6, min_block_fraction=0.1, min_aspect=0.3)
    masked = np.stack([[masker(24, GRID, rng) for _ in range(model.masks_per_sample)] for _ in range(count)])
    noise = torch.Generator().manual_seed(1)
    # Patches of an image resemble each other, so that there is something to predict hidden ones from.
    inputs = torch.randn(count, 1, 2, 2, generator=noise).repeat(1, 1, 4, 6)
    inputs += 0.3 * torch.randn(count, 1, 8, 12, generator=noise)
    return Batch(inputs=inputs, masks=Masks.from_masked(torch.from_numpy(masked)))


def optimizer_of(model: Data2Vec, lr: float) -> torch.optim.Optimizer:
    return adamw(
        [model.student, model.decoder],
        no_decay=model.student.no_decay,
        lr=lr,
        betas=[0.9, 0.98],
        eps=1e-8,
        weight_decay=0.01,
        decay_all=False,
        fused=True,  # the plain CPU version reads its step counter with .item()
    )


def train(model: Data2Vec, batch: Batch, steps: int, lr: float = 3e-3) -> list[float]:
    optimizer, losses = optimizer_of(model, lr), []
    for step in range(1, steps + 1):
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.step_teacher(step)
        losses.append(output.loss.item())
    return losses


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_overfit_one_batch(version):
    """The teacher stands still, so that the loss has one meaning throughout."""
    model = vision(version, tau_start=1.0, tau_end=1.0, class_token_weight=0.0)
    batch = vision_batch(model)
    targets = model(batch).targets
    constant = model.scale * model._error(targets.mean(dim=0).expand_as(targets), targets).sum().item() / len(targets)
    losses = train(model, batch, 60, lr=1e-2)
    assert constant < losses[0]
    assert np.mean(losses[-5:]) < 0.35 * constant  # the loss of the best answer that looks at nothing


@pytest.mark.parametrize("version", [1, 2])
def test_training_with_a_moving_teacher_stays_alive(version):
    model = vision(version)
    losses = train(model, vision_batch(model), 40)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < losses[0]


@pytest.mark.parametrize("version", [1, 2])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(version):
    model = vision(version)
    model(vision_batch(model)).loss.backward()
    trained = dict(model.student.named_parameters(prefix="student"))
    trained |= dict(model.decoder.named_parameters(prefix="decoder"))
    without = {name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()}
    assert without == set()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_targets_carry_no_gradient_to_shared_embeddings():
    """With shared embeddings the teacher starts from student tokens: the only path into them is the prediction."""
    model = vision(2, share_embeddings=True)
    batch = vision_batch(model)
    embedded = model.student.embed(batch.inputs)
    assert embedded[0].requires_grad
    assert not model.compute_targets(batch, embedded).requires_grad


@pytest.mark.parametrize("version", [1, 2])
def test_teacher_sees_the_whole_input_once_per_sample(version):
    model = vision(version)
    shapes = []
    model.teacher.encoder.transformer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    batch = vision_batch(model)
    output = model(batch)
    assert shapes == [(4, 1 + 24, 16)]
    masks = Masks.from_masked(batch.masks.masked.roll(1, dims=0))
    other = model.compute_targets(Batch(inputs=batch.inputs, masks=masks), model.student.embed(batch.inputs))
    rows = other.repeat_interleave(model.masks_per_sample, dim=0).flatten(0, 1)
    torch.testing.assert_close(rows[batch.masks.hidden], output.targets)


def test_a_bfloat16_student_gets_float32_targets_and_loss():
    model = vision(2)
    model.student.bfloat16()
    model.decoder.bfloat16()
    batch = vision_batch(model)
    exact = vision(2)(batch)
    output = model(replace(batch, inputs=batch.inputs.bfloat16()))
    assert {output.loss.dtype, output.predictions.dtype, output.targets.dtype} == {torch.float32}
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    output.loss.backward()
    model.step_teacher(1)
    assert {parameter.dtype for parameter in model.teacher.parameters()} == {torch.float32}


def test_step_teacher_uses_the_annealed_decay():
    model = vision(2, tau_start=0.5, tau_end=0.9, tau_anneal_steps=4)
    before = model.teacher.encoder.class_token.clone()
    with torch.no_grad():
        model.student.class_token += 1
    assert model.step_teacher(3) == pytest.approx(0.8)
    torch.testing.assert_close(model.teacher.encoder.class_token, before + 0.2)
    assert [model.step_teacher(step) for step in (4, 5, 100)] == [0.9, 0.9, 0.9]


# ------------------------------------------------------------------------------------------------- construction errors


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (1, {"mask_mode": "drop"}, "LinearDecoder sees one token at a time"),
        (1, {"mask_mode": "shuffle"}, "got 'shuffle'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(version, change, message):
    with pytest.raises(ConfigError, match=message):
        vision(version, **change)


def test_more_target_layers_than_blocks_are_refused():
    encoder = GivenLayers(3)
    encoder.depth, encoder.prenet_depth = 6, 2
    decoder = GivenPredictions(torch.zeros(2, 4, 3))
    objective(encoder, decoder, targets={"top_k_layers": 4})
    with pytest.raises(ConfigError, match="top_k_layers: expected a number from 1 to 4, .* got 5"):
        objective(encoder, decoder, targets={"top_k_layers": 5})


def test_a_class_token_weight_needs_a_class_token():
    encoder, decoder = GivenLayers(3, num_prefix_tokens=0), GivenPredictions(torch.zeros(2, 4, 3))
    objective(encoder, decoder, class_token_weight=0.0)
    with pytest.raises(ConfigError, match="no class token"):
        objective(encoder, decoder, class_token_weight=0.1)


# ---------------------------------------------------------------------------------------------------------- corrupt


class TokenEncoder(ModalityEncoder):
    """Token ids (B, T) -> embedding -> one mixing layer; remembers what it embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.depth, self.prenet_depth, self.num_prefix_tokens, self.grid = 8, 1, 0, 0, None
        self.embedder = nn.Embedding(12, 8)
        self.mix = nn.Linear(6, 6)
        self.ffn = nn.Linear(8, 8)
        self.embedded: list[torch.Tensor] = []

    def embed(self, inputs, attention_mask):
        self.embedded.append(inputs)
        return self.embedder(inputs), attention_mask

    def contextualize(self, tokens, attention_mask, *, masks=None, mode="replace", target_layer=None, top_k_layers=0):
        if masks is not None:
            tokens, attention_mask = apply_mask(tokens, attention_mask, masks=masks, mode=mode, mask_token=None)
        x = tokens + F.gelu(self.mix(tokens.mT)).mT
        ffn = self.ffn(x)
        return EncoderOutput(prefix=x[:, :0], tokens=x + ffn, layers=[ffn] * top_k_layers)


@pytest.mark.parametrize("share", [False, True])
def test_a_corrupt_batch_trains_and_the_student_sees_only_the_corrupted_ids(share):
    torch.manual_seed(0)
    model = objective(
        TokenEncoder(),
        LinearDecoder(dim=8, init_std=None),
        mask_mode="corrupt",
        masks_per_sample=2,
        share_embeddings=share,
        tau_start=1.0,
        tau_end=1.0,
        targets={"layer_norms": ["layer"]},
    )
    ids = torch.randint(0, 11, (3, 6))
    masked = torch.rand(3, 2, 6).argsort(dim=2) < 2
    corrupted = torch.where(masked, 11, ids[:, None])  # (B, M, T)
    batch = Batch(inputs=ids, masks=Masks.from_masked(masked), corrupted=corrupted)
    predictions = model(batch).predictions
    assert torch.equal(model.student.embedded[-1], corrupted.flatten(0, 1))
    # What was at hidden positions reaches the student in no way.
    output = model.student.contextualize(model.student.embedder(corrupted.flatten(0, 1)), None)
    wanted = model.decoder.project(output.tokens.flatten(0, 1)[masked.flatten()])
    torch.testing.assert_close(predictions, wanted)
    losses = train(model, batch, 60)
    assert losses[-1] < 0.35 * losses[0]


# ---------------------------------------------------------------------------------------------------- host and device


class Recorder(TorchDispatchMode):
    """Names of what makes the host wait for a device, or makes shapes depend on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique2")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else []
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or name in self.WAITING:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_recorder_notices_waiting():
    x = torch.arange(4.0)
    with Recorder() as recorder:
        x.sum().item()
        x[x > 1]
        bool((x > 1).any())
        torch.masked_select(x, x > 1)
    assert len(recorder.waits) >= 4


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_training_step_never_waits_for_the_device(version, attention):
    model = vision(version, attention=attention)
    batch, optimizer = vision_batch(model), optimizer_of(model, lr=3e-3)
    train(model, batch, 1)
    with Recorder() as recorder:
        loss = model(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        model.step_teacher(2)
    assert recorder.calls > 100
    assert recorder.waits == []
