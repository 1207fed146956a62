"""Precision and compiled blocks on a GPU, against eager float32 that is multiplied exactly.

Bands: TF32 keeps 10 bits, float16 10, bfloat16 7. The loss is a mean over thousands of errors, so that its own error is
a few units in the last of these bits.
"""

import pytest
import torch

from data2vec_train.training.precision import (
    FP8_CAPABILITY,
    ScaledHalf,
    choose_precision,
    compile_blocks,
    trainer_precision,
    use_float8,
)
from tests import test_module
from tests.pairs import PAIRS, batch_of, config_of, model_of, module_of, take_step
from tests.test_module import Trace, data_of, trainer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
BANDS = {"32-tf32": 5e-3, "16-mixed": 5e-3, "bf16-mixed": 2e-2}
HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@pytest.fixture(autouse=True)
def exact_again():
    trainer_precision("32-true")
    yield
    trainer_precision("32-true")
    torch._dynamo.reset()


def loss_of(model, batch, precision: str) -> torch.Tensor:
    trainer_precision(precision)
    torch.manual_seed(1)
    with torch.autocast("cuda", dtype=HALF.get(precision), enabled=precision in HALF):
        output = model(batch)
    assert {x.dtype for x in (output.loss, output.targets, output.predictions)} == {torch.float32}
    return output.loss


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", list(BANDS))
@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_losses_are_those_of_float32(composed, modality, objective, precision, compiled):
    # No dropout and no noise: compiled code draws other random numbers.
    noise = ["objective.decoder.noise_std=0"] if objective == "data2vec2" else []
    cfg = config_of(composed, modality, objective, *noise)
    model = model_of(cfg).cuda().eval()
    batch = batch_of(cfg, model).to("cuda")
    exact = loss_of(model, batch, "32-true")
    if compiled:
        vary = cfg.modality.batching is not None
        compile_blocks(model, how=True, device="cuda", lengths_vary=vary, backend="inductor")
    torch.testing.assert_close(loss_of(model, batch, precision), exact, rtol=BANDS[precision], atol=0)
    torch.testing.assert_close(loss_of(model, batch, "32-true"), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compiled", [False, True, "graphs"], ids=["eager", "compiled", "graphs"])
def test_ten_steps_in_bfloat16_end_near_those_in_float32(composed, compiled):
    """In images, whose batches have one shape; weights, moments and teacher are float32."""
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        cfg = config_of(composed, "vision", "data2vec2", "objective.decoder.noise_std=0")
        model = model_of(cfg)
        batch = batch_of(cfg, model).to("cuda")
        module, optimizer = module_of(model.cuda(), fused=True)
        if precision == "bf16-mixed":
            compile_blocks(model, how=compiled, device="cuda", lengths_vary=False, backend="inductor")
        for _ in range(10):
            take_step(module, optimizer, batch, dtype=HALF.get(precision, torch.float32))
        losses[precision] = module.step_result.metrics["train/loss"]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        moments = [value for state in optimizer.state.values() for value in state.values()]
        assert {moment.dtype for moment in moments} == {torch.float32}
    torch.testing.assert_close(losses["bf16-mixed"], losses["32-true"], rtol=3e-2, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_that_is_too_high_falls_and_steps_then_count(tmp_path, fused):
    plugin, trace = ScaledHalf("cuda"), Trace()
    plugin.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**22)
    module = test_module.module_of(test_module.objective(2), fused=fused)
    start = test_module.objective(2)
    trainer = trainer_of(tmp_path, steps=12, accelerator="gpu", plugins=[plugin], callbacks=[trace])
    trainer.fit(module, datamodule=data_of(2, tmp_path, batch=8))
    assert plugin.scaler.get_scale() < 2.0**21
    first, last = trace.students[0], trace.students[-1]
    for name, value in test_module.weights(start.student).items():
        assert torch.equal(first[name].cpu(), value), name  # the first step was passed over
    assert any(not torch.equal(last[name], first[name]) for name in first)
    assert all(value.isfinite().all() for value in last.values())
    assert {value.dtype for value in trace.teachers[-1].values()} == {torch.float32}


def test_auto_knows_this_gpu():
    expected = "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "32-true"
    assert choose_precision("auto", "cuda") == expected


def test_float8_trains_and_renames_nothing(composed):
    pytest.importorskip("torchao", reason="needs the package torchao")
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("needs compute capability 8.9")
    cfg = config_of(composed, "vision", "data2vec2", "size.dim=64", "objective.decoder.noise_std=0")
    losses = []
    for float8 in (False, True):
        model = model_of(cfg)
        names = list(model.state_dict())
        batch = batch_of(cfg, model, (1,) * 16).to("cuda")
        module, optimizer = module_of(model.cuda(), fused=True)
        if float8:
            use_float8(model.student)
            compile_blocks(model, how=True, device="cuda", lengths_vary=False, backend="inductor")
        for _ in range(3):
            take_step(module, optimizer, batch, dtype=torch.bfloat16)
        assert list(model.state_dict()) == names
        losses.append(module.step_result.metrics["train/loss"])
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-2, atol=0)
