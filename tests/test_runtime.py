"""Precision and compiled blocks: how a step is computed changes nothing of what it computes."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from data2vec_train.errors import ConfigError
from data2vec_train.training import precision as runtime
from data2vec_train.training.precision import (
    ScaledHalf,
    choose_precision,
    compile_blocks,
    device_type,
    in_float32,
    trainer_precision,
    uncompiled,
    use_float8,
)
from tests import test_module
from tests.pairs import PAIRS, batch_of, config_of, model_of
from tests.test_module import Trace, data_of, trainer_of, weights

# ---------------------------------------------------------------------------------------------------------- precision


@pytest.fixture
def machine(monkeypatch):
    """A machine that says of itself what a test wants."""

    def make(*, capability: tuple[int, int] = (8, 0), amx: bool = False, avx512_bf16: bool = False) -> None:
        monkeypatch.setattr(runtime, "_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)

    return make


@pytest.mark.parametrize(
    ("device", "hardware", "chosen"),
    [
        ("cuda", {"capability": (9, 0)}, "bf16-mixed"),
        ("cuda", {"capability": (8, 0)}, "bf16-mixed"),
        ("cuda", {"capability": (7, 5)}, "32-true"),
        ("cpu", {"amx": True}, "bf16-mixed"),
        ("cpu", {"avx512_bf16": True}, "bf16-mixed"),
        ("cpu", {}, "32-true"),
        ("mps", {"capability": (9, 0), "amx": True}, "32-true"),
    ],
)
def test_auto_is_bf16_where_the_hardware_multiplies_it_and_says_why(machine, caplog, device, hardware, chosen):
    machine(**hardware)
    with caplog.at_level(logging.INFO):
        assert choose_precision("auto", device) == chosen
    [line] = caplog.messages
    assert line.startswith(f"precision: {chosen}, chosen by auto (")


def test_bf16_that_was_asked_for_is_kept_and_called_slow_where_it_is(machine, caplog):
    machine()
    assert choose_precision("bf16-mixed", "cpu") == "bf16-mixed"
    assert "47 to 62 times slower" in caplog.text
    caplog.clear()
    machine(amx=True)
    assert choose_precision("bf16-mixed", "cpu") == "bf16-mixed"
    assert not caplog.text


@pytest.mark.parametrize(
    ("wanted", "device", "capability", "said"),
    [
        ("16-mixed", "cpu", (9, 0), "needs a GPU, and this run is on the CPU; choose precision=auto"),
        ("16-mixed", "mps", (9, 0), "needs a GPU"),
        ("32-tf32", "cpu", (9, 0), "needs a GPU"),
        ("32-tf32", "cuda", (7, 5), "needs compute capability 8.0, and this GPU has 7.5"),
        ("fp8-mixed", "cuda", (8, 0), "needs compute capability 8.9, and this GPU has 8.0"),
    ],
)
def test_what_the_device_cannot_is_one_sentence(machine, wanted, device, capability, said):
    machine(capability=capability)
    with pytest.raises(ConfigError, match=said):
        choose_precision(wanted, device)


def test_float8_names_the_package_that_is_missing(machine, monkeypatch):
    machine(capability=(9, 0))
    monkeypatch.setattr("data2vec_train.system.constraints.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package torchao: pip install 'data2vec-train\[fp8\]'"):
        choose_precision("fp8-mixed", "cuda")


def test_float8_is_offered_the_linear_layers_of_the_students_blocks(composed, monkeypatch):
    """With a stand-in for torchao, which tests do not install, that lists what it would convert."""
    converted = []

    def convert(module, *, module_filter_fn):
        converted.extend(child for name, child in module.named_modules() if module_filter_fn(child, name))

    stand_in = ModuleType("torchao.float8")
    stand_in.convert_to_float8_training = convert
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    model = model_of(config_of(composed, "vision", "data2vec2"))
    use_float8(model.student)
    inside = [child for child in model.student.transformer.modules() if isinstance(child, nn.Linear)]
    assert len(inside) == 2 * 4  # qkv, out, fc1, fc2
    assert {id(linear) for linear in converted} == {id(linear) for linear in inside}


@pytest.mark.parametrize(
    ("accelerator", "cuda", "device"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_the_device_is_the_one_that_lightning_takes(monkeypatch, accelerator, cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_type(accelerator) == device


def test_float32_is_exact_unless_tf32_was_chosen():
    try:
        assert trainer_precision("32-tf32") == {"precision": "32-true"}
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert trainer_precision("32-true") == {"precision": "32-true"}  # the next member of a sweep
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert trainer_precision("fp8-mixed") == {"precision": "bf16-mixed"}
    finally:
        trainer_precision("32-true")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_half_precision_keeps_targets_loss_weights_and_gradients_in_float32(composed, modality, objective, dtype):
    cfg = config_of(composed, modality, objective)
    model = model_of(cfg)
    batch = batch_of(cfg, model)
    torch.manual_seed(1)
    exact = model(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        output = model(batch)
    output.loss.backward()
    assert {x.dtype for x in (output.loss, output.targets, output.predictions)} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    # bfloat16 keeps 8 bits: a loss is a mean over thousands of errors of that size.
    torch.testing.assert_close(output.loss, exact.loss, rtol=2e-2, atol=0)
    assert not torch.equal(output.loss, exact.loss), "nothing was computed in half precision"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_loader_computes_for_a_probe_stays_float32(num_workers):
    """Workers are started within the autocast of the probe, and inherit it."""

    class Products(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.ones(2, 2) @ torch.ones(2, 2)

    def types(wrap):
        loader = torch.utils.data.DataLoader(Products(), num_workers=num_workers)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [(batch.dtype, (batch @ batch).dtype) for batch in wrap(loader)]

    assert types(iter) == [(torch.bfloat16, torch.bfloat16)] * 2
    assert types(in_float32) == [(torch.float32, torch.bfloat16)] * 2


# ------------------------------------------------------------------------------------------------------- scaled float16


class Scales(Trace):
    def __init__(self) -> None:
        super().__init__()
        self.scales, self.results = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.results.append(pl_module.step_result)


def fit_half(folder, *, steps: int, scale: float, spoil=None, **options):
    """Float16 on the CPU, which the program leaves to GPUs, through the same plugin."""
    plugin, trace = ScaledHalf("cpu"), Scales()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    module = test_module.module_of(test_module.objective(2), fused=True)
    if spoil is not None:
        module.on_after_backward = lambda: spoil(module)
    trainer = trainer_of(folder, steps=steps, plugins=[plugin], callbacks=[trace], **options)
    trainer.fit(module, datamodule=data_of(2, folder, batch=8))
    return module, trace


def test_steps_with_a_scaled_loss_are_those_without(tmp_path):
    """Also clipped ones: the norm is that of the gradient, not of the scaled one."""
    norms = []
    for scale in (1.0, 1024.0):
        module, trace = fit_half(tmp_path, steps=3, scale=scale, gradient_clip_val=0.5)
        norms.append(torch.stack([metrics["train/grad_norm"] for metrics in (trace.metrics[0], trace.metrics[2])]))
    exact = Trace()
    test_module.fit(2, tmp_path, steps=3, callbacks=[exact], gradient_clip_val=0.5)
    expected = torch.stack([metrics["train/grad_norm"] for metrics in (exact.metrics[0], exact.metrics[2])])
    assert expected.min() > 0.5, "nothing was clipped"
    torch.testing.assert_close(norms[1], norms[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(norms[1], expected, rtol=2e-2, atol=0)
    for name, value in exact.students[-1].items():
        torch.testing.assert_close(weights(module.objective.student)[name], value, rtol=2e-2, atol=2e-3)


def test_a_scale_that_is_too_high_falls_until_steps_count_and_is_nobodys_fault(tmp_path):
    _, trace = fit_half(tmp_path, steps=12, scale=2.0**22)
    passed = [bool(result.skip_step) for result in trace.results].index(False)
    assert 2 <= passed <= 10
    assert trace.scales[:passed] == [2.0 ** (21 - number) for number in range(passed)]
    assert [float(result.loss_scale) for result in trace.results[:2]] == [2.0**22, 2.0**21]
    assert not any(result.non_finite for result in trace.results)
    start = weights(test_module.objective(2).student)
    for step in range(passed):
        for name, value in trace.students[step].items():
            assert torch.equal(value, start[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in trace.students[passed].items())
    frozen, moved = trace.teachers[passed - 1], trace.teachers[passed]
    assert all(torch.equal(value, trace.teachers[0][name]) for name, value in frozen.items())
    assert any(not torch.equal(value, frozen[name]) for name, value in moved.items())


def test_gradients_that_are_infinite_at_every_scale_are_a_fault_once_it_is_one(tmp_path):
    def spoil(module):
        next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")

    _, trace = fit_half(tmp_path, steps=5, scale=4.0, spoil=spoil)
    assert all(result.skip_step for result in trace.results)
    assert trace.scales == [2.0, 1.0, 0.5, 0.25, 0.125]
    assert [bool(result.non_finite) for result in trace.results] == [False, False, True, True, True]


# ------------------------------------------------------------------------------------------------------ compiled blocks


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outcome(model, batches, *, seed: int = 3) -> list[torch.Tensor]:
    """Losses of some batches, and the gradients of their sum."""
    model.zero_grad()
    found = []
    for number, batch in enumerate(batches):
        torch.manual_seed(seed + number)
        loss = model(batch).loss
        loss.backward()
        found.append(loss.detach())
    return [*found, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_compiled_blocks_have_no_break_and_give_the_same_loss_and_gradients(
    composed, fresh_compiler, modality, objective
):
    """Traced and differentiated as for a GPU, and run by the same kernels as before."""
    cfg = config_of(composed, modality, objective, "modality.encoder.dropout=0.1")
    model = model_of(cfg)
    lengths_vary = cfg.modality.batching is not None
    batches = [batch_of(cfg, model, lengths, seed=n) for n, lengths in enumerate([(40, 77, 128), (50, 90, 111)])]
    names = list(model.state_dict())
    plain = outcome(model, batches)
    compile_blocks(model, how=True, device="cpu", lengths_vary=lengths_vary, backend="aot_eager")
    compiled = outcome(model, batches)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 2  # student and teacher
    assert list(model.state_dict()) == names
    for tensor, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5)


def test_blocks_of_one_shape_are_compiled_once_for_student_and_teacher(composed, fresh_compiler):
    cfg = config_of(composed, "vision", "data2vec2", "modality.encoder.drop_path=0")
    model = model_of(cfg)
    compile_blocks(model, how=True, device="cpu", lengths_vary=False, backend="eager")
    for seed in range(3):
        outcome(model, [batch_of(cfg, model, seed=seed)])
    assert counters["stats"]["unique_graphs"] == 2


def test_lengths_that_vary_are_compiled_for_all_lengths(composed, fresh_compiler):
    cfg = config_of(composed, "audio", "data2vec2", "modality.encoder.drop_path=0", "modality.encoder.layer_drop=0.2")
    model = model_of(cfg)
    compile_blocks(model, how=True, device="cpu", lengths_vary=True, backend="eager")
    shapes = [(40, 77, 128), (50, 60, 111), (33, 55), (100, 120, 90, 44), (35, 82), (70, 75, 80, 85, 90), (99, 101)]
    outcome(model, [batch_of(cfg, model, lengths) for lengths in shapes[:4]])
    before = counters["stats"]["unique_graphs"]
    outcome(model, [batch_of(cfg, model, lengths) for lengths in shapes[4:]])
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_runs_of_a_sweep_do_not_use_up_the_compilations_of_later_ones(composed, fresh_compiler):
    for run in range(12):
        cfg = config_of(composed, "vision", "data2vec2", f"modality.encoder.dropout={0.01 * run}")
        model = model_of(cfg)
        compile_blocks(model, how=True, device="cpu", lengths_vary=False, backend="eager")
        outcome(model, [batch_of(cfg, model)])


def test_probes_do_not_compile(composed, fresh_compiler):
    cfg = config_of(composed, "vision", "data2vec2")
    model = model_of(cfg)
    compile_blocks(model, how=True, device="cpu", lengths_vary=False, backend="eager")
    with uncompiled(), torch.no_grad():
        model.student(batch_of(cfg, model).inputs)
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_activation_checkpointing_changes_no_gradient(composed, fresh_compiler, modality, objective, compiled):
    results = []
    for checkpointing in (False, True):
        cfg = config_of(
            composed,
            modality,
            objective,
            f"modality.encoder.activation_checkpointing={checkpointing}",
            "modality.encoder.dropout=0.1",
        )
        model = model_of(cfg)
        if compiled:
            compile_blocks(model, how=True, device="cpu", lengths_vary=False, backend="eager")
        results.append(outcome(model, [batch_of(cfg, model)]))
    for tensor, other in zip(*results, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("how", "device", "compiles"), [(False, "cuda", 0), ("auto", "cpu", 0), ("auto", "cuda", 1)])
def test_auto_compiles_on_gpus_only(composed, how, device, compiles):
    model = model_of(config_of(composed, "vision", "data2vec2"))
    compile_blocks(model, how=how, device=device, lengths_vary=False, backend="eager")
    assert all((block._compiled_call_impl is not None) == bool(compiles) for block in runtime.blocks_of(model))


@pytest.mark.parametrize(("device", "lengths_vary"), [("cpu", False), ("cuda", True)])
def test_graphs_need_a_gpu_and_one_shape(composed, device, lengths_vary):
    model = model_of(config_of(composed, "vision", "data2vec2"))
    with pytest.raises(ConfigError, match="compile=graphs needs .*; choose compile=true or compile=false"):
        compile_blocks(model, how="graphs", device=device, lengths_vary=lengths_vary, backend="eager")
