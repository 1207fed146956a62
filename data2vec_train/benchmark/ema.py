"""The teacher's update and the optimizer's step, compared with plain loops over parameters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from data2vec_train.benchmark.agreement import outputs_agree
from data2vec_train.benchmark.context import Bench
from data2vec_train.benchmark.encoder import CLASS
from data2vec_train.benchmark.measurements import Arm, Case
from data2vec_train.encoders.base import ModalityEncoder
from data2vec_train.objective.teacher import EMATeacher
from data2vec_train.weights.convert import CLASSES

LOOP, OURS = "a loop over parameters", "ours"
LR, TAU = 1e-3, 0.999


def measure_ema(bench: Bench, *, size: dict[str, Any], image_px: int, patch_px: int) -> Iterator[Case]:
    """Two cases, on an image encoder: the teacher's EMA and the optimizer's step."""
    config = CLASSES[CLASS["vision"]].config_class(
        hidden_size=size["dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        intermediate_size=size["ffn_dim"],
        image_size=image_px,
        patch_size=patch_px,
        out_indices=list(range(min(4, size["depth"]))),
    )
    encoder = CLASSES[CLASS["vision"]](config).get_encoder().to(bench.device)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    yield _teachers(bench, encoder, f"EMA of {count / 1e6:.1f} M weights")
    yield _optimizers(bench, encoder, f"AdamW on {count / 1e6:.1f} M weights")


def _teachers(bench: Bench, student: ModalityEncoder, name: str) -> Case:
    ours = EMATeacher(student, share_embeddings=False, copied=[])
    plain = copy.deepcopy(ours)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # make the student differ from its teachers
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.02)

    @torch.no_grad()
    def loop() -> None:
        for mine, other in zip(plain.encoder.parameters(), student.parameters(), strict=True):
            mine.mul_(TAU).add_(other, alpha=1 - TAU)

    runs: dict[str, Callable[[], object]] = {LOOP: loop, OURS: lambda: ours.update(student, TAU)}
    for run in runs.values():
        run()
    states = {LOOP: dict(plain.encoder.named_parameters()), OURS: dict(ours.encoder.named_parameters())}
    return _timed(
        bench, Case("ema", name, LOOP), runs, states, count=sum(parameter.numel() for parameter in student.parameters())
    )


def _optimizers(bench: Bench, encoder: nn.Module, name: str) -> Case:
    kinds = {LOOP: {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    runs: dict[str, Callable[[], object]] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for kind, options in kinds.items():
        model = copy.deepcopy(encoder)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        runs[kind] = AdamW(model.parameters(), lr=LR, **options).step
        runs[kind]()
        states[kind] = dict(model.named_parameters())
    return _timed(
        bench, Case("ema", name, LOOP), runs, states, count=sum(parameter.numel() for parameter in encoder.parameters())
    )


def _timed(
    bench: Bench, case: Case, runs: dict[str, Callable[[], object]], states: dict[str, dict[str, Tensor]], *, count: int
) -> Case:
    for name, found in states.items():
        check = outputs_agree(states[case.reference], found, what="weights after one step", atol=bench.tolerance)
        agreements = [] if name == case.reference else [check]
        case.arms.append(Arm(name, agreements=agreements, items={"weights": count}))
    return bench.time(case, runs)
