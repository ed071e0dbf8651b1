"""The layers of white-box networks: each against a case solved by hand, its limits, and a slow computation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from warps import rotated, shares_of, tilted
from whitebox import (
    AugMax,
    GlobalMaxPool,
    GroupMean,
    GumbelConv2d,
    IterNorm,
    PadTo,
    Parallel,
    PercentileNorm,
    PerspectiveConv2d,
    PositiveConv2d,
    ProjectiveConv2d,
    Prototypes,
    Scale,
    ScaledConv2d,
    ShiftNorm,
    SoftMaxPool,
    Variants,
)  # fmt: skip


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


BRANCHES = [nn.Identity(), nn.Tanh()]


@pytest.mark.parametrize("layer", [SoftMaxPool(3), GroupMean(3), Parallel(BRANCHES, 3), Parallel(BRANCHES, pool=1.0)])
def test_of_maps_every_place_is_taken_by_itself(layer):
    x = image(2, 6, 4, 5)
    places = torch.stack([layer(place) for place in x.flatten(2).unbind(2)], 2)
    torch.testing.assert_close(layer(x), places.unflatten(2, (4, 5)))


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


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_positive_convolution_starts_and_stays_at_least_zero_and_computes_as_conv2d():
    torch.manual_seed(0)
    layer = PositiveConv2d(3, 4, 3).double()
    assert layer.weight.min() == 0 and 0.3 < (layer.weight > 0).double().mean() < 0.7  # half of torch's default
    x = image(2, 3, 6, 6)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).sum().backward()
    optimizer.step()
    assert layer.weight.min() < 0
    layer.constrain()
    assert layer.weight.min() == 0 and (layer.bias != 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_gumbel_convolution_that_chooses_all_channels_is_conv2d_exactly(training):
    layer = GumbelConv2d(3, 4, 3, padding=1, topk=3).train(training)
    x = image(2, 3, 6, 6).float()
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_each_place_of_a_gumbel_kernel_has_exactly_topk_channels(topk):
    torch.manual_seed(0)
    layer = GumbelConv2d(5, 4, 3, topk=topk)
    for training in (True, False):
        mask = layer.train(training).mask()
        assert torch.equal((mask.detach() != 0).sum(1), torch.full((4, 3, 3), topk))
        assert torch.equal(mask.detach().unique(), torch.tensor([0.0, 1.0]) if topk < 5 else torch.tensor([1.0]))
    largest = layer.logits.topk(topk, dim=1).indices  # without noise
    assert torch.equal(layer.mask().gather(1, largest), torch.ones_like(largest, dtype=torch.float32))


def test_gumbel_noise_chooses_with_the_probabilities_of_the_softmax():
    """The Gumbel-max theorem: argmax(a + g) is j with probability softmax(a)_j."""
    torch.manual_seed(0)
    layer = GumbelConv2d(3, 20_000, 1)
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.0, 1.0, 2.0])[None, :, None, None])
    shares = layer.mask().detach().mean((0, 2, 3))
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()  # 5 standard errors


def test_gumbel_gradient_is_that_of_the_softmax_straight_through():
    """d mask_i / d a_j = p_i (1[i = j] − p_j) / tau, though the mask is one-hot."""
    layer = GumbelConv2d(3, 1, 1, tau=0.5).double()
    torch.manual_seed(0)
    mask = layer.mask().flatten()
    torch.manual_seed(0)
    layer.hard = False
    p = layer.mask().detach().flatten()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0, dtype=torch.float64))
    for i in range(3):
        (gradient,) = torch.autograd.grad(mask[i], layer.logits, retain_graph=True)
        expected = p[i] * (torch.eye(3, dtype=torch.float64)[i] - p) / 0.5
        torch.testing.assert_close(gradient.flatten(), expected)


def test_a_low_temperature_makes_the_soft_choice_hard():
    torch.manual_seed(0)
    layer = GumbelConv2d(6, 8, 2, tau=1e-3, hard=False)
    assert (layer.mask().amax(1) > 0.99).double().mean() > 0.95


def test_augmax_with_flips_is_exactly_invariant_and_at_least_what_the_image_gives():
    units = nn.Sequential(nn.Conv2d(3, 5, 3), GlobalMaxPool(), nn.Flatten())
    layer, x = AugMax(["flip"], units), image(4, 3, 8, 8).float()
    assert torch.equal(layer(x), layer(x.flip(3)))
    assert torch.equal(layer(x), torch.maximum(units(x), units(x.flip(3))))


def test_augmax_turns_both_ways_and_mirrors_each():
    x = image(1, 1, 6, 6)
    copies = list(AugMax(["flip", "rot90"], nn.Identity()).copies(x))
    turned = [x, x.rot90(1, (2, 3)), x.rot90(-1, (2, 3))]  # exact at right angles
    expected = [copy for one in turned for copy in (one, one.flip(3))]
    assert len(copies) == len(expected)
    for one in expected:  # but for interpolation at places off by rounding
        assert sum(torch.allclose(one, copy, atol=1e-9, rtol=0) for copy in copies) == 1


def test_variants_are_what_augmax_takes_the_maximum_of():
    units = nn.Sequential(nn.Conv2d(3, 5, 3), GlobalMaxPool(), nn.Flatten())
    layer, x = Variants(["flip", "rot20"], units), image(4, 3, 8, 8).float()
    mirrored, order = layer(x.flip(3)), [1, 0, 5, 4, 3, 2]  # turned to the other side
    assert layer(x).shape == (4, 6, 5) and torch.equal(layer(x)[:, 0], units(x))
    assert torch.equal(mirrored, layer(x)[:, order])
    whole = AugMax(["flip", "rot20"], units)
    assert torch.equal(whole(x), layer(x).amax(1)) and torch.equal(whole(x), whole(x.flip(3)))


@pytest.mark.parametrize("name", ["rot", "rot0", "rot180", "turn", "rotx"])
def test_an_unknown_transform_is_refused(name):
    with pytest.raises(ValueError, match="flip and rotD"):
        AugMax([name], nn.Identity())


def test_branches_side_by_side_keep_a_groups_units_together():
    one, two = nn.Identity(), nn.Flatten()
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert Parallel([one, two], num_groups=2)(x).tolist() == [[1, 2, 1, 2, 3, 4, 3, 4]]
    assert torch.equal(Parallel([one, two], pool=1.0)(x), x)  # the soft maximum of equal values


def test_iternorm_whitens_and_its_running_matrix_serves_in_eval_mode():
    torch.manual_seed(0)
    mixing = torch.eye(6, dtype=torch.float64) + 0.2 * image(6, 6)
    x = (image(4000, 6, seed=1) @ mixing + 3).view(400, 10, 6).transpose(1, 2)[..., None]  # (B, C, H, W)
    norm = IterNorm(6, iterations=10).double()
    for y in (norm(x), [norm(x) for _ in range(200)] and norm.eval()(x)):
        flat = y.detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)
        # ε of 1e-5 against a least eigenvalue of the covariance above 0.05
        torch.testing.assert_close(flat @ flat.T / 4000, torch.eye(6, dtype=torch.float64), atol=1e-3, rtol=0)


def test_iternorms_first_iterate_by_hand():
    """P_1 = (3 I − Σ / tr Σ) / 2, over the root of the trace."""
    x = image(50, 2)
    norm = IterNorm(2, iterations=1, eps=0.0).double()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / 50
    P = (3 * torch.eye(2, dtype=torch.float64) - covariance / covariance.trace()) / 2
    torch.testing.assert_close(norm(x), centred @ P / covariance.trace().sqrt())


def test_iternorm_in_mixed_precision_computes_in_float32():
    x = image(20, 3, 4, 4).bfloat16()
    mixed, full = IterNorm(3), IterNorm(3)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = mixed.train(training)(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, full.train(training)(x.float()).bfloat16())
    for name, value in mixed.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]) and value.dtype == torch.float32


@pytest.mark.parametrize(("features", "groups"), [(120, 2), (64, 1), (7, 1), (130, 5)])
def test_iternorm_divides_channels_into_groups_of_at_most_64(features, groups):
    assert IterNorm(features).num_groups == groups


def test_percentile_norm_keeps_the_top_share_of_each_unit_as_batch_norm_gives_it():
    x = image(10, 3, 4, 5)
    norm, plain = PercentileNorm(3, percent=25).double(), nn.BatchNorm2d(3).double()
    y, whole = norm(x), plain(x)
    kept = y != 0
    assert kept.transpose(0, 1).flatten(1).sum(1).tolist() == [50] * 3
    assert torch.equal(y[kept], whole[kept])
    for c in range(3):
        assert whole[:, c][kept[:, c]].min() > whole[:, c][~kept[:, c]].max()
    assert (norm.running_bound > 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [IterNorm, PercentileNorm, ShiftNorm])
def test_norms_of_several_networks_run_at_once_as_one_by_one(kind):
    """As DIB's heads do; torch warns of what it cannot do at once."""
    norms, x = [kind(3).double() for _ in range(2)], image(5, 3, 4, 4)
    with torch.no_grad():
        norms[1].bias.fill_(2)
    states = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    together = torch.vmap(lambda state: torch.func.functional_call(kind(3).double(), state, (x,)))(stacked)
    torch.testing.assert_close(together, torch.stack([norm(x) for norm in norms]))
    for name, value in stacked.items():
        if "running" in name:
            torch.testing.assert_close(value, torch.stack([norm.state_dict()[name] for norm in norms]))


def test_shift_norm_is_batch_norm_whose_scale_stays_one():
    x = image(10, 3, 4, 5)
    norm, plain = ShiftNorm(3).double(), nn.BatchNorm2d(3).double()
    with torch.no_grad():
        for layer in (norm, plain):
            layer.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    assert torch.autograd.gradgradcheck(norm, (x[:2, :, :2, :2].clone().requires_grad_(),))


@pytest.mark.parametrize(
    "layer",
    [ScaledConv2d(2, 3, 5), PerspectiveConv2d(2, 3, 5), ProjectiveConv2d(2, 3, 5)],
    ids=lambda x: type(x).__name__,
)
def test_convolutions_through_views_give_the_maximum_over_the_views(layer):
    layer, x = layer.double(), image(2, 2, 9, 9)
    kernels = [kernel.detach() for kernel in layer.views()]
    assert all(kernel.shape == (3, 2, 5, 5) for kernel in kernels)
    slow = torch.stack([F.conv2d(x, kernel, layer.bias) for kernel in kernels]).amax(0)
    torch.testing.assert_close(layer(x), slow)
    layer(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_the_plain_views_are_the_kernel_itself():
    scaled, warped = ScaledConv2d(2, 3, 5, scales=(1.0,)).double(), PerspectiveConv2d(2, 3, 5, num_views=1).double()
    for layer in (scaled, warped):
        torch.testing.assert_close(next(layer.views()), layer.weight)


def test_a_kernel_drawn_half_as_large_has_its_outer_places_at_half_the_distance():
    layer = ScaledConv2d(1, 1, 3, scales=(0.5,)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 0]]))
    # Places lie at -2/3, 0, 2/3 of [-1, 1] and are looked up at twice that, beyond ±1: halfway to the zeros outside.
    row = next(layer.views())[0, 0, 1]
    torch.testing.assert_close(row, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("degrees", [15.0, -15.0, 130.0])
def test_rotated_images_are_those_of_grid_sample_also_where_they_are_no_squares(degrees):
    x = image(2, 3, 7, 12)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[c, -s * 7 / 12, 0], [s * 12 / 7, c, 0]], dtype=torch.float64).expand(2, -1, -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    torch.testing.assert_close(rotated(x, degrees), F.grid_sample(x, grid, align_corners=False))


@pytest.mark.parametrize("size", [(4, 6), (3, 5, 4)])
def test_warped_kernels_are_those_of_grid_sample_within_and_beyond_the_border(size):
    kernel = image(1, 2, *size)
    grid = 1.5 * image(1, *size, len(size), seed=1)
    shares = shares_of(grid, size)
    expected = F.grid_sample(kernel, grid, align_corners=False)
    torch.testing.assert_close((kernel.flatten(2) @ shares.mT).view_as(kernel), expected)


@pytest.mark.parametrize("kind", [ScaledConv2d, PerspectiveConv2d, ProjectiveConv2d])
def test_in_mixed_precision_views_are_those_of_float32(kind):
    layer, x = kind(2, 3, 5), image(2, 2, 9, 9).float()
    kernels = list(layer.views())
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([F.conv2d(x, kernel, layer.bias) for kernel in kernels]).amax(0)
        assert torch.equal(layer(x), expected) and expected.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [ScaledConv2d, PerspectiveConv2d, ProjectiveConv2d])
def test_convolutions_through_views_can_be_differentiated_twice(kind):
    layer, x = kind(1, 1, 2).double(), image(1, 1, 3, 3).requires_grad_()
    start = torch.Generator().manual_seed(1)
    values = [torch.randn(p.shape, generator=start, dtype=p.dtype).requires_grad_() for p in layer.parameters()]

    def outputs(x, *values):
        return torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), values, strict=True)), x)

    assert torch.autograd.gradgradcheck(outputs, (x, *values))
    assert torch.autograd.gradgradcheck(lambda x: rotated(x, 15.0).square(), x)


def test_a_tilted_kernel_turns_about_its_axis():
    axis = torch.tensor([math.cos(0.7), math.sin(0.7), 0.0])
    rotation = torch.tensor(tilted(0.7, 0.5))[:, :3]
    torch.testing.assert_close(rotation @ axis, axis)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(rotation) == pytest.approx(1)
    assert (rotation.trace() - 1) / 2 == pytest.approx(math.cos(0.5))


def test_padding_brings_small_images_to_the_size_and_leaves_large_ones():
    x = torch.ones(1, 1, 28, 33)
    assert PadTo(32)(x).shape == (1, 1, 32, 33)
    assert torch.equal(PadTo(32)(x)[:, :, 2:30], x) and PadTo(32)(x)[:, :, :2].sum() == 0
    assert PadTo(8)(x).shape == x.shape


def test_prototypes_equal_a_loop_over_classes_prototypes_and_parts():
    torch.manual_seed(0)
    head, x = Prototypes(4, 2, num_prototypes=3, num_parts=2).double(), image(3, 4, 2, 2)
    slow = torch.empty(3, 2, dtype=torch.float64)
    for i in range(3):
        for c in range(2):
            values = []
            for prototype in range(3):
                rows = [2 * (3 * c + prototype) + part for part in range(2)]
                fits = [
                    max(
                        (head.parts.weight[row, :, 0, 0] @ x[i, :, a, b] + head.parts.bias[row]).item()
                        for a in range(2)
                        for b in range(2)
                    )
                    for row in rows
                ]
                values.append(sum(fits) / 2)
            weights = [math.exp(value) for value in values]
            slow[i, c] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(head(x), slow)
    torch.testing.assert_close(head(x.amax((2, 3))), head(x.amax((2, 3), keepdim=True)))
