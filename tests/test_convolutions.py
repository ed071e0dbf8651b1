"""Bilinear convolutions against torch's own, to the second derivative."""

import pytest
import torch
from torch import nn

from measures.convolutions import BilinearConvolutions, Convolution, Geometry
from measures.derivatives import View
from run.expressions import parse

LAYERS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "2d": (nn.Conv2d(3, 4, 3, bias=False), (3, 8, 8)),
    "2d, strides": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (3, 9, 8)),
    "2d, groups": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 6)),
    "2d, circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 4, 4, 4)),
}


def derivatives(layer, x):
    """Output, first derivatives of a cubic of it by input, weight and bias, and second ones in a direction."""
    inputs = [x, *layer.parameters()]
    y = layer(x)
    first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    along = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
    return [y, *first, *torch.autograd.grad(along, inputs)]


@pytest.mark.parametrize("name", LAYERS)
def test_all_derivatives_are_those_of_torchs_convolution(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = derivatives(layer, x)
    with BilinearConvolutions():
        mine = derivatives(layer, x)
    made_by = [mine[0].grad_fn, *(node for node, _ in mine[0].grad_fn.next_functions)]
    assert "ConvolutionBackward" in [type(node).__name__ for node in made_by]  # torch's own has a number at its end
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)  # float64: 1e-7


def test_a_third_derivative_too():
    x, W = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 4, 4), (3, 2, 2, 2)))

    def convolved(x, W):
        return Convolution.apply(x, W, Geometry.of(2, padding=1))

    def gradient(x, W):
        [found] = torch.autograd.grad(convolved(x, W).pow(3).sum(), [x], create_graph=True)
        return found

    assert torch.autograd.gradcheck(gradient, (x, W)) and torch.autograd.gradgradcheck(gradient, (x, W))


def test_what_is_no_batch_or_pads_by_a_word_is_left_to_torch():
    layer = nn.Conv2d(2, 3, 3, padding="same")
    x = torch.randn(4, 2, 5, 5)
    with BilinearConvolutions():
        assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"
        assert layer(x[0]).shape == (3, 5, 5)
        assert nn.ConvTranspose2d(2, 3, 3)(x).shape == (4, 3, 7, 7)


def test_products_with_a_hessian_make_no_convolution_with_kernels_as_large_as_images():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3))
    view = View(network, torch.randn(6, 1, 8, 8), torch.arange(6) % 3)
    at = view.parameters(parse("theta").of, parse("theta"))
    curvature = view.curvature(parse("loss").of, at, at)
    v = torch.randn(at.size)
    curvature.product(v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        curvature.product(v)
    called = {event.key for event in profile.key_averages()}
    assert "aten::convolution_backward" in called and "aten::_convolution_double_backward" not in called


def test_a_convolution_that_a_network_maps_over_samples_is_torchs():
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def mapped(x):
        return torch.vmap(lambda sample: layer(sample[None])[0])(x)

    with BilinearConvolutions():
        torch.testing.assert_close(mapped(x), layer(x))
        assert torch.autograd.grad(mapped(x).pow(3).sum(), [x], create_graph=True)[0].requires_grad


def test_products_with_a_hessian_are_in_full_precision_whatever_the_caller_computes_in():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 3))
    view = View(network, torch.randn(6, 1, 8, 8), torch.arange(6) % 3)
    at = view.parameters(parse("theta").of, parse("theta"))
    curvature, v = view.curvature(parse("loss").of, at, at), torch.randn(at.size)
    expected = curvature.product(v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(curvature.product(v), expected)
