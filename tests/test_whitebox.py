"""The layers of white-box networks: each against a case solved by hand, its limits, and a slow computation."""

import math

import pytest
import torch
from torch import nn

from whitebox import GroupMean, Scale, SoftMaxPool


def units(batch, number, seed=0):
    return torch.randn(batch, number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_max_pool_by_hand():
    u = torch.tensor([[0.0, math.log(3), 7.0, 7.0]], dtype=torch.float64)  # p = (1/4, 3/4) and (1/2, 1/2)
    torch.testing.assert_close(SoftMaxPool(2)(u), torch.tensor([[0.75 * math.log(3), 7.0]], dtype=torch.float64))


def test_soft_max_pool_equals_a_loop_over_groups():
    u, temperature = units(5, 12), 0.3
    slow = torch.empty(5, 3, dtype=torch.float64)
    for i in range(5):
        for group in range(3):
            members = [u[i, 4 * group + j].item() for j in range(4)]
            weights = [math.exp(value / temperature) for value in members]
            slow[i, group] = sum(w * value for w, value in zip(weights, members, strict=True)) / sum(weights)
    torch.testing.assert_close(SoftMaxPool(3, temperature)(u), slow)


def test_soft_max_pool_lies_between_mean_and_maximum_and_reaches_both():
    u = units(50, 12)
    groups = u.view(50, 3, 4)
    mean, maximum = groups.mean(-1), groups.amax(-1)
    for temperature in (0.1, 1.0, 10.0):
        value = SoftMaxPool(3, temperature)(u)
        assert (value >= mean).all() and (value <= maximum).all()
    torch.testing.assert_close(SoftMaxPool(3, 1e-4)(u), maximum)  # gaps of 1e-2 are 100 temperatures
    torch.testing.assert_close(SoftMaxPool(3, 1e8)(u), mean, rtol=0, atol=1e-6)


def test_soft_max_pool_adds_what_is_added_to_all_units():
    u = units(4, 6)
    torch.testing.assert_close(SoftMaxPool(2)(u + 5), SoftMaxPool(2)(u) + 5)


def test_soft_max_pools_gradient():
    """∂out/∂u_j = p_j (1 + (u_j - out) / T), from differentiating p; and in float64 against finite differences."""
    u, temperature = units(3, 6).requires_grad_(), 0.7
    out = SoftMaxPool(2, temperature)(u)
    (gradient,) = torch.autograd.grad(out.sum(), u, retain_graph=True)
    groups = u.view(3, 2, 3)
    p = (groups / temperature).softmax(-1)
    torch.testing.assert_close(gradient, (p * (1 + (groups - out[..., None]) / temperature)).view(3, 6))
    assert torch.autograd.gradcheck(SoftMaxPool(2, temperature), (u,))


def test_group_mean_by_hand():
    torch.testing.assert_close(GroupMean(2)(torch.tensor([[1.0, 3.0, 4.0, 8.0]])), torch.tensor([[2.0, 6.0]]))


@pytest.mark.parametrize("layer", [SoftMaxPool(4), GroupMean(4)])
def test_groups_that_do_not_divide_the_units_are_refused(layer):
    with pytest.raises(ValueError, match="10 units cannot be divided into 4 groups"):
        layer(torch.zeros(1, 10))


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="above 0"):
        SoftMaxPool(2, temperature)


def test_scale_starts_at_one_and_learns():
    scale, x = Scale(), torch.tensor([2.0, -3.0])
    assert torch.equal(scale(x), x)
    scale(x).sum().backward()
    assert scale.factor.grad == -1
    with torch.no_grad():
        scale.factor.fill_(7)
    nn.Sequential(scale)[0].reset_parameters()
    assert scale.factor == 1
