"""One training step of each pair on a GPU, where torch raises an error when the host waits for the device.

`tests/test_no_sync.py` says the same of the meta device, and runs everywhere.
"""

import pytest
import torch

from data2vec_train.training.precision import compile_blocks
from tests.pairs import PAIRS, batch_of, config_of, model_of, module_of, take_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def strict():
    """Switch the errors on; what has to be built first may wait."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_the_host_does_not_wait_in_a_step(composed, strict, modality, objective, dtype, compiled):
    cfg = config_of(composed, modality, objective)
    model = model_of(cfg)
    batch = batch_of(cfg, model).to("cuda")
    module, optimizer = module_of(model.cuda(), fused=True)
    if compiled:
        vary = cfg.modality.batching is not None
        compile_blocks(model, how=True, device="cuda", lengths_vary=vary, backend="inductor")
    for _ in range(2):  # compiles, and makes the optimizer's state
        take_step(module, optimizer, batch, dtype=dtype)
    strict()
    take_step(module, optimizer, batch, dtype=dtype)
    torch.cuda.set_sync_debug_mode("default")
    assert module.step_result.skip_step.device.type == "cuda"
    assert not module.step_result.skip_step
