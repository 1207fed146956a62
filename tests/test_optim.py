import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from data2vec_train.encoders.positions import ALiBi
from data2vec_train.encoders.vision import VisionEncoder
from data2vec_train.encoders.waveform import WaveformEncoder
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.objective.decoders import LinearDecoder
from data2vec_train.objective.targets import TargetBuilder
from data2vec_train.objective.teacher import tau_at
from data2vec_train.training.module import Data2VecModule
from data2vec_train.training.optim import (
    CosineSchedule,
    PolynomialSchedule,
    TriStageSchedule,
    adamw,
    layered_adamw,
    parameter_groups,
    set_lr,
)

RECORDED = json.loads((Path(__file__).parent / "statistics.json").read_text())


def number(name: str, text: str, default: float | None = None) -> float:
    found = re.search(rf"\b{name}=([0-9.e-]+)", text)
    assert found or default is not None, f"no {name} in {text!r}"
    return float(found.group(1)) if found else default


def schedule(key: str):
    """The schedule that a key of the `lr` table describes; original defaults for what it leaves out."""
    if "tri_stage" in key:
        fractions = [float(part) for part in re.search(r"\(([^)]*)\)", key).group(1).split(",")]
        assert sum(fractions) == pytest.approx(1)
        last = re.search(r"(\S+) 400k$", key)
        lr = float(last.group(1)) if last else number("lr", key)
        steps = 400_000 if last else int(number("max", key))
        return TriStageSchedule(
            lr=lr,
            start_factor=0.01,
            final_factor=number("final", key, 0.01),
            warmup_steps=round(fractions[0] * steps),
            hold_steps=round(fractions[1] * steps),
            max_steps=steps,
        )
    common = {
        "lr": number("lr", key),
        "warmup_steps": int(number("warmup", key)),
        "max_steps": int(number("max", key)),
    }
    if "polynomial" in key:
        return PolynomialSchedule(end_lr=0.0, power=1.0, **common)
    assert "cosine" in key
    least = number("min", key, 0.0)  # fine-tuning starts its warm-up there too
    return CosineSchedule(start_lr=least, min_lr=least, **common)


def test_all_recorded_schedules_are_checked():
    assert (len(RECORDED["lr"]), sum(map(len, RECORDED["lr"].values()))) == (12, 158)


@pytest.mark.parametrize("key", RECORDED["lr"])
def test_learning_rates_equal_the_originals(key):
    at = schedule(key)
    for finished, recorded in RECORDED["lr"][
        key
    ].items():  # at key n: the rate of update n + 1, n updates being finished
        assert at(int(finished)) == pytest.approx(recorded, rel=1e-9, abs=1e-15), f"after {finished} updates"


@pytest.mark.parametrize("key", RECORDED["ema_decay"])
def test_teacher_decay_equals_the_originals(key):
    case = RECORDED["ema_decay"][key]
    assert len(case["decay"]) == 17
    for finished, recorded in case["decay"].items():
        tau = tau_at(int(finished), start=case["start"], end=case["end"], anneal_steps=case["anneal_end_step"])
        assert tau == pytest.approx(recorded, rel=1e-9, abs=1e-15), f"after {finished} updates"
        # 1 - tau is what moves the teacher: there 1e-9 of tau is coarse.
        assert 1 - tau == pytest.approx(1 - recorded, rel=1e-6, abs=1e-15), f"after {finished} updates"


@pytest.mark.parametrize(
    ("at", "last"),
    [
        (CosineSchedule(lr=1.0, start_lr=0.0, min_lr=0.25, warmup_steps=3, max_steps=10), 0.25),
        (TriStageSchedule(lr=1.0, start_factor=0.1, final_factor=0.5, warmup_steps=3, hold_steps=2, max_steps=10), 0.5),
        (PolynomialSchedule(lr=1.0, end_lr=0.125, power=2.0, warmup_steps=3, max_steps=10), 0.125),
    ],
)
def test_schedules_peak_after_warm_up_and_stay_at_their_end(at, last):
    rates = [at(step) for step in range(15)]
    assert max(rates) == rates[3] == 1.0
    assert rates[:4] == sorted(set(rates[:4]))
    assert rates[10:] == pytest.approx([last] * 5)


@pytest.mark.parametrize(
    "at",
    [
        CosineSchedule(lr=1.0, start_lr=0.0, min_lr=0.0, warmup_steps=0, max_steps=4),
        CosineSchedule(lr=1.0, start_lr=0.0, min_lr=0.0, warmup_steps=4, max_steps=4),
        TriStageSchedule(lr=1.0, start_factor=0.1, final_factor=0.5, warmup_steps=0, hold_steps=4, max_steps=4),
        PolynomialSchedule(lr=1.0, end_lr=0.0, power=1.0, warmup_steps=4, max_steps=4),
    ],
)
def test_phases_of_no_length_are_allowed(at):
    assert all(0 <= at(step) <= 1 for step in range(6))


# ----------------------------------------------------------------------------------------------------- weight decay


def objective() -> Data2Vec:
    encoder = VisionEncoder(
        image_px=4,
        patch_px=2,
        channels=1,
        dim=4,
        depth=2,
        prenet_depth=0,
        num_heads=2,
        ffn_dim=8,
        norm_first=True,
        final_norm=True,
        norm_eps=1e-6,
        activation="gelu",
        positions="none",
        relative_bias="shared",
        class_token=True,
        mask_token=True,
        qkv_bias="qv",
        layer_scale=0.1,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        drop_path=0.0,
        init="beit",
        activation_checkpointing=False,
        attention="eager",
    )
    return Data2Vec(
        encoder=encoder,
        decoder=LinearDecoder(dim=4, init_std=None),
        targets=TargetBuilder(
            target_layer="block", top_k_layers=2, layer_norms=["layer"], mean_norms=[], reference_padding=False
        ),
        mask_mode="replace",
        masks_per_sample=1,
        loss_beta=2.0,
        channel_reduction="mean",
        class_token_weight=0.0,
        tau_start=0.9,
        tau_end=0.9,
        tau_anneal_steps=0,
        share_embeddings=False,
        copied=[],
    )


def names_in(groups: list[dict], model: nn.Module, weight_decay: float) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] == weight_decay for p in group["params"]}


BLOCK_MATRICES = ("attention.qkv.weight", "attention.out.weight", "ffn.fc1.weight", "ffn.fc2.weight")


def test_weight_decay_applies_to_matrices_the_mask_token_and_the_position_table():
    model = objective()
    modules = [model.student, model.decoder]
    groups = parameter_groups(modules, weight_decay=0.05, decay_all=False, no_decay=model.student.no_decay)
    blocks = {f"student.transformer.blocks.{layer}.{name}" for layer in range(2) for name in BLOCK_MATRICES}
    own = {"student.embedder.project.weight", "student.mask_token", "student.relative_biases.0.table"}
    assert names_in(groups, model, 0.05) == blocks | own | {"decoder.project.weight"}
    exempt = names_in(groups, model, 0.0)
    assert "student.class_token" in exempt
    assert {
        "student.embedder.project.bias",
        "student.transformer.blocks.0.norm1.weight",
        "student.transformer.blocks.0.attention.q_bias",
        "student.transformer.blocks.1.scale2",
        "student.final_norm.weight",
    } <= exempt
    trained = {name for name, _ in model.named_parameters() if not name.startswith("teacher.")}
    assert names_in(groups, model, 0.05) | exempt == trained


@pytest.mark.parametrize(("decay_all", "decay"), [(False, 0.0), (True, 0.1)])
def test_the_scale_of_alibi_does_not_decay(decay_all, decay):
    # Spec section 7, row 3; it has five axes, so that only its name says so, which within a model is longer.
    encoder = nn.Module()
    encoder.alibi = ALiBi(num_heads=4, num_scales=1)
    model = nn.ModuleDict({"encoder": encoder})
    options = {"weight_decay": 0.1, "decay_all": decay_all, "no_decay": WaveformEncoder.no_decay}
    layered = layered_adamw(
        model, block_of=lambda name: 0, lr=1.0, betas=(0.9, 0.98), eps=1e-6, fused=False, layer_decay=1.0, **options
    )
    for groups in (parameter_groups([encoder], **options), parameter_groups([model], **options), layered.param_groups):
        assert [(group["params"], group["weight_decay"]) for group in groups] == [([encoder.alibi.scale], decay)]


def test_decay_all_puts_everything_into_one_group():
    model = objective()
    groups = parameter_groups(
        [model.student, model.decoder], weight_decay=0.05, decay_all=True, no_decay=model.student.no_decay
    )
    assert len(groups) == 1
    assert groups[0]["weight_decay"] == 0.05
    assert len(groups[0]["params"]) == len([*model.student.parameters(), *model.decoder.parameters()])


def test_frozen_parameters_are_in_no_group():
    linear = nn.Linear(2, 2)
    linear.weight.requires_grad_(False)
    groups = parameter_groups([linear], weight_decay=0.1, decay_all=False, no_decay=frozenset())
    assert [group["params"] for group in groups] == [[linear.bias]]


def test_the_teacher_is_in_no_group_of_the_optimizer():
    model = objective()

    def make(modules, *, no_decay):
        options = {"lr": 1.0, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}
        return adamw(modules, no_decay=no_decay, decay_all=False, fused=False, **options)

    module = Data2VecModule(objective=model, optimizer=make, schedule=lambda step: 1.0, seed=0, log_every_n_steps=1)
    optimizer = module.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*model.student.parameters(), *model.decoder.parameters()]}
    assert not trained & {id(p) for p in model.teacher.parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def test_set_lr_respects_the_scale_of_a_group():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr_scale": 0.5}], lr=9.0)
    set_lr(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0]


def test_an_optimizer_that_goes_on_keeps_its_own_settings():
    def optimizer(weight_decay: float, eps: float):
        options = {"decay_all": False, "fused": False, "no_decay": frozenset(), "betas": (0.9, 0.999)}
        return adamw([layer], lr=0.1, weight_decay=weight_decay, eps=eps, **options)

    layer = nn.Linear(3, 2)
    first = optimizer(0.05, 1e-8)
    layer(torch.ones(1, 3)).sum().backward()
    first.step()
    again = optimizer(0.3, 1e-5)
    again.load_state_dict(first.state_dict())
    assert [(group["weight_decay"], group["eps"]) for group in again.param_groups] == [(0.3, 1e-5), (0.0, 1e-5)]
    for parameter in layer.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
