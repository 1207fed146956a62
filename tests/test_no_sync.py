"""The host never waits for the device in a training step.

Tensors on torch's meta device have shapes and no values, so that whatever makes the host read one fails: `.item()`,
`bool(tensor)`, indexing with a mask, `nonzero`, a copy to the host. Copies from the host are listed by `Transfers`. A
step that runs there, from the batch to the teacher's update, and lists none waits on no device.
`tests/gpu/test_no_sync.py` has the same step on a real one.
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pairs import PAIRS, batch_of, config_of, model_of, module_of, take_step


class Transfers(TorchDispatchMode):
    """Lists copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor) and source.device != result.device:
            self.found.append(f"{func} {tuple(source.shape)} from {source.device} to {result.device}")
        return result


@pytest.fixture
def fused_on_meta(monkeypatch):
    """AdamW's fused step has a meta kernel, which AdamW does not ask for."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])


@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_no_step_reads_a_value_of_the_device_or_sends_one(composed, fused_on_meta, modality, objective):
    terms = ["objective.class_token_weight=0.01"] if (modality, objective) == ("vision", "data2vec2") else []
    cfg = config_of(composed, modality, objective, *terms)
    model = model_of(cfg)
    batch = batch_of(cfg, model).to("meta")
    module, optimizer = module_of(model.to("meta"), fused=True)
    with Transfers() as transfers:
        for _ in range(2):
            take_step(module, optimizer, batch)
    assert not transfers.found
    assert module.step_result.skip_step.device.type == "meta"
    assert {"train/loss", "train/grad_norm", "train/tau"} <= set(module.step_result.metrics)


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x > 0 or x],
)
def test_what_makes_the_host_wait_fails_there(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


@pytest.mark.parametrize(
    "send", [lambda: torch.ones(3).to("meta"), lambda: torch.empty(3, device="meta").copy_(torch.ones(3))]
)
def test_copies_from_the_host_are_listed(send):
    with Transfers() as transfers:
        send()
    assert len(transfers.found) == 1
