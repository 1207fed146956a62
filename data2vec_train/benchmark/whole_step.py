"""A whole pretraining step, ours and the original's: teacher, forward, backward, clipping, optimizer, EMA."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data2vec_train.batch import Batch
from data2vec_train.benchmark.agreement import gradients_agree, outputs_agree
from data2vec_train.benchmark.context import Arithmetic, Bench
from data2vec_train.benchmark.measurements import Agreement, Arm, Case
from data2vec_train.benchmark.steps import StepArm
from data2vec_train.benchmark.timing import timed
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec
from data2vec_train.plan.dry_run import step_flops
from data2vec_train.plan.flops import count_flops

OURS, ORIGINAL = "ours", "original"
# Our step with plain attention and without compilation: in float32, or in the configured precision.
FP32, EAGER = "fp32", "eager"
PARTS = ("teacher, inside forward", "forward", "backward", "clipping and optimizer", "EMA")


class StepRun:
    """One program's step, ready to run: a call is one whole step."""

    def __init__(self, arm: StepArm, batch: Batch, arithmetic: Arithmetic) -> None:
        self.arm, self.batch, self.arithmetic = arm, batch, arithmetic

    def __call__(self) -> None:
        """Loss, gradients, update."""
        self.forward().backward()
        self.arm.update()

    def forward(self) -> Tensor:
        """The loss, in the arm's arithmetic."""
        with self.arithmetic.autocast():
            return self.arm.loss()

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and gradients, copied, without an update."""
        loss = self.forward()
        loss.backward()
        found = {name: gradient.clone() for name, gradient in self.arm.gradients().items()}
        self.arm.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}, found


def measure_step(
    bench: Bench,
    *,
    name: str,
    make: Callable[[str], Callable[[], StepRun]],
    beside: list[str],
    loss_tolerance: float,
) -> Iterator[Case]:
    """One case that compares whole steps, and one with the parts of our step.

    Args:
        bench: how to measure.
        name: name of the model and its inputs.
        make: name of an arm -> a picklable function that builds it.
        beside: more arms, of `FP32` and `EAGER`; without the original program, ratios are relative to the first.
        loss_tolerance: largest difference of losses, as a fraction.
    """
    names = [ORIGINAL] * ("fairseq" in bench.peers) + [*beside, OURS]
    case = Case("step", name, None, [Arm(arm_name) for arm_name in names])
    runs: dict[str, StepRun] = {}
    for arm in case.arms:
        try:
            runs[arm.name] = bench.build(arm, make(arm.name))
        except ConfigError as error:
            arm.refused = str(error)
    case.reference = next((arm_name for arm_name in runs if arm_name != OURS), None)
    expected = runs[case.reference or OURS].results()
    for arm in (arm for arm in case.arms if arm.name in runs):
        run = runs[arm.name]
        arm.agreements = _agreements(
            expected, run.results(), bench.tolerance, loss_tolerance, is_itself=arm.name == case.reference
        )
        batch = run.batch
        rows, masks_per_sample, tokens = batch.masks.masked.shape
        arm.items = {"samples": rows, "masks": rows * masks_per_sample, "tokens": rows * tokens}
        arm.flops = count_flops(run) if arm.name == ORIGINAL else _flops(run)
    yield bench.time(case, runs)
    yield _parts(bench, f"{name}, parts of our step", runs[OURS])


def _flops(run: StepRun) -> int:
    """FLOPs of our step, counted on the meta device: FLOP counters cannot see into compiled code."""
    model = copy.deepcopy(run.arm.model).to("meta")
    return sum(step_flops(model, run.batch.to("meta"), low=torch.bfloat16, gpu=True).values())


def _agreements(
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    found: tuple[dict[str, Tensor], dict[str, Tensor]],
    tolerance: float,
    loss_tolerance: float,
    *,
    is_itself: bool,
) -> list[Agreement]:
    suffix = " of the reference and of the reference again" if is_itself else ""
    allowed = loss_tolerance * abs(float(expected[0]["loss"]))
    return [
        outputs_agree(expected[0], found[0], what=f"losses{suffix}", atol=allowed),
        gradients_agree(expected[1], found[1], what=f"gradients{suffix}", share=tolerance),
    ]


def _parts(bench: Bench, name: str, run: StepRun) -> Case:
    """Each part in turn within one step; the teacher, which is part of the forward pass, also by itself."""
    case = Case("step", name, None, [Arm(part) for part in PARTS])
    ours: Data2Vec = run.arm.model
    batch = run.batch

    def compute_targets() -> None:
        with run.arithmetic.autocast():
            ours.compute_targets(batch, embedded)

    for _ in range(bench.effort.rounds):
        with torch.no_grad(), run.arithmetic.autocast():
            embedded = ours.student.embed(batch.inputs, batch.attention_mask)
        losses: list[Tensor] = []
        steps = (
            compute_targets,
            lambda losses=losses: losses.append(run.forward()),
            lambda losses=losses: losses.pop().backward(),
            run.arm.optimise,
            run.arm.average,
        )
        for arm, step in zip(case.arms, steps, strict=True):
            wall, cpu = timed(step, calls=1, device=bench.device)
            arm.seconds.append(wall)
            arm.cpu_seconds.append(cpu)
    teacher, *rest = (sum(arm.seconds) for arm in case.arms)
    case.notes.append(f"the teacher takes {teacher / sum(rest):.0%} of a step")
    return case
