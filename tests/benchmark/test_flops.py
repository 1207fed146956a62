"""The counter of floating-point operations against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data2vec_train.encoders.attention import attention
from data2vec_train.plan.flops import count_flops, flops_by_operation


def forward_and_backward(module, *shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    module = module.to(device)
    return count_flops(lambda: module(x)), count_flops(lambda: module(x).sum().backward())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_grouped_convolution_takes_the_same_work_forward_and_for_each_gradient(groups, device):
    conv = nn.Conv1d(32, 48, 5, padding=2, groups=groups)
    by_hand = 2 * 3 * 20 * 48 * (32 // groups) * 5  # 3 rows of 20 positions, 48 outputs, each of 32 / groups x 5 inputs
    assert forward_and_backward(conv, 3, 32, 20, device=device) == (by_hand, 3 * by_hand)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_convolution_over_patches(device):
    conv = nn.Conv2d(3, 8, 4, stride=4)
    by_hand = 2 * 2 * (4 * 6) * 8 * (3 * 4 * 4)
    assert forward_and_backward(conv, 2, 3, 16, 24, device=device) == (by_hand, 3 * by_hand)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_convolution(groups):
    conv = nn.ConvTranspose1d(8, 12, 4, stride=2, groups=groups)
    by_hand = 2 * 3 * 10 * 8 * (12 // groups) * 4  # each of 10 inputs meets the whole kernel
    assert forward_and_backward(conv, 3, 8, 10, device="cpu") == (by_hand, 3 * by_hand)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_without_a_gradient_for_its_input(device):
    layer, x = nn.Linear(7, 11).to(device), torch.zeros(2, 5, 7, device=device)
    assert count_flops(lambda: layer(x)) == 2 * 10 * 7 * 11
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 10 * 7 * 11


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_the_same_whatever_computes_it(backend, masked, device):
    q, k, v = (torch.zeros(2, 4, 30, 16, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 30, dtype=torch.bool, device=device) if masked else None

    def forward():
        return attention(q, k, v, backend=backend, key_mask=mask)

    one_product = 2 * 2 * 4 * 30 * 30 * 16
    assert count_flops(forward) == 2 * one_product
    assert count_flops(lambda: forward().sum().backward()) == 6 * one_product


def test_the_counts_of_operations_have_their_names():
    x = torch.zeros(4, 8)
    found = flops_by_operation(lambda: F.relu(x @ x.T))
    assert found == {"aten.mm": 2 * 4 * 8 * 4}


def test_nothing_but_additions_counts_nothing():
    assert count_flops(lambda: torch.zeros(3) + 1) == 0


def test_modules_under_no_grad_may_see_views_of_tensors_with_gradient():
    layer = nn.Sequential(nn.Conv1d(4, 4, 1))
    tokens = nn.Linear(4, 4)(torch.zeros(2, 3, 4))

    def teach():
        with torch.no_grad():
            layer(tokens.mT)

    assert count_flops(teach) == 2 * 2 * 3 * 4 * 4
