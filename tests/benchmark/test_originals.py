"""The originals beside ours, where they are installed; see `bench/originals.py` for where they come from."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data2vec_train.batch import Batch
from data2vec_train.benchmark import originals
from data2vec_train.benchmark.originals import original_step
from data2vec_train.benchmark.published import RECIPES, base_batch, base_config, base_objective, base_update
from data2vec_train.benchmark.steps import StepArm, Update, our_step
from data2vec_train.errors import ConfigError
from data2vec_train.objective.data2vec import Data2Vec

PAIRS = tuple(RECIPES)
SMALL = ["size.dim=32", "size.depth=3", "size.num_heads=4", "size.ffn_dim=64", "size.conv_dim=16"]
SMALL += ["objective.targets.top_k_layers=2"]
SMALL_PAIR = {
    "vision": ["modality.image_px=32", "modality.patch_px=8"],
    "audio": [],
    "text": ["modality.block_tokens=32"],
    "data2vec": [],
    "data2vec2": ["objective.decoder.channels=32"],
}
LENGTH = {"vision": 0, "audio": 6000, "text": 24}


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def ours(pair: tuple[str, str]) -> tuple[Data2Vec, Batch, Update]:
    """A tiny objective whose teacher differs from its student, with a batch and an optimizer's numbers."""
    modality, objective = pair
    overrides = [*SMALL, *SMALL_PAIR[modality], *SMALL_PAIR[objective]]
    if pair == ("vision", "data2vec2"):
        overrides.append("modality.encoder.prenet_depth=1")
    cfg = base_config(modality, objective, *overrides)
    model = base_objective(cfg)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model, base_batch(cfg, model, samples=2, length=LENGTH[modality]), base_update(cfg)


@pytest.fixture
def installed(pair: tuple[str, str]) -> None:
    """Skips before anything is built."""
    if pair == ("vision", "data2vec"):
        pytest.importorskip("modeling_cyclical", reason="the folder beit of data2vec_vision is not on PYTHONPATH")
    else:
        pytest.importorskip("fairseq", reason="fairseq is not installed (pip install fairseq-fixed)")


@pytest.fixture
def original(pair: tuple[str, str], installed: None, ours: tuple[Data2Vec, Batch, Update]) -> Callable[[], StepArm]:
    """Makes the original with the weights of `ours`."""
    model, batch, update = ours
    return lambda: original_step(*pair, ours=copy.deepcopy(model), batch=batch, update=update)


def with_gradients(arm: StepArm) -> tuple[float, dict[str, Tensor]]:
    loss = arm.loss()
    loss.backward()
    return loss.item(), arm.gradients()


def test_loss_and_gradients_equal_the_originals(original, ours) -> None:
    expected_loss, expected = with_gradients(original())
    loss, found = with_gradients(our_step(*ours))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(found) == set(expected)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    compared = 0
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        if size > 1e-7 * largest:  # the gradient of a key's bias is zero; what is there is rounding
            compared += 1
            assert (found[name] - gradient).abs().max().item() <= 1e-4 * size, name
    assert compared > 0.8 * len(expected)


def test_teacher_after_an_update_equals_the_originals(original, ours) -> None:
    theirs, arm = original(), our_step(*ours)
    before = {name: tensor.clone() for name, tensor in arm.teacher().items()}
    for side in (theirs, arm):
        side.average()
    expected, found = theirs.teacher(), arm.teacher()
    # Fixed positions are a weight of theirs that never changes; our speech teacher has a mask vector without a use.
    assert set(expected) - set(found) <= {"student.positions"}
    assert set(found) - set(expected) <= {"student.mask_token"}
    shared = set(expected) & set(found)
    for name in shared:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    assert any((found[name] - before[name]).abs().max() > 2e-6 for name in shared)


def test_an_original_equals_itself(original) -> None:
    (first_loss, first), (second_loss, second) = with_gradients(original()), with_gradients(original())
    assert first_loss == second_loss
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_originals_update_moves_student_and_teacher(original) -> None:
    arm = original()
    weights = {name: p.detach().clone() for name, p in arm.model.named_parameters() if p.requires_grad}
    teacher = {name: tensor.detach().clone() for name, tensor in arm.teacher().items()}
    with_gradients(arm)
    arm.update()
    assert not arm.gradients()
    now = dict(arm.model.named_parameters())
    assert all(not torch.equal(now[name], tensor) for name, tensor in weights.items() if tensor.std() > 0)
    assert any(not torch.equal(tensor, teacher[name]) for name, tensor in arm.teacher().items())


def test_our_step_moves_student_and_teacher(ours) -> None:
    model, batch, _ = ours
    arm = our_step(*ours)
    loss, gradients = with_gradients(arm)
    assert loss == model(batch).loss.item()
    assert math.isfinite(loss)
    assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
    student = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    teacher = {name: tensor.detach().clone() for name, tensor in arm.teacher().items()}
    arm.update()
    assert not arm.gradients()
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], tensor) for name, tensor in student.items() if tensor.std() > 0)
    assert any(not torch.equal(tensor, teacher[name]) for name, tensor in arm.teacher().items())


def test_an_original_that_is_absent_is_one_sentence(pair, ours, monkeypatch) -> None:
    for name in ("fairseq", "fairseq.examples", "modeling_cyclical"):
        monkeypatch.setitem(originals.sys.modules, name, None)
    for name in [module for module in originals.sys.modules if module.startswith("examples.data2vec")]:
        monkeypatch.delitem(originals.sys.modules, name)
    model, batch, update = ours
    with pytest.raises(ConfigError, match=r"cannot be imported .* only this comparison is left out"):
        original_step(*pair, ours=model, batch=batch, update=update)


def test_what_the_originals_need_leaves_no_trace(ours) -> None:
    import dataclasses

    import numpy as np

    strict = dataclasses.dataclass
    with originals._older_libraries():
        assert np.float is float
        assert dataclasses.dataclass is not strict
    assert dataclasses.dataclass is strict
    assert not hasattr(np, "float")
