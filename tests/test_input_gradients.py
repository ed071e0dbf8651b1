"""Scores of input gradients: cases by hand, slow versions, invariances, and gradients against finite differences."""

import math

import pytest
import torch
from torch import nn

from measures import input_gradients as module
from measures.input_gradients import agreement, first_filters, high_frequencies, white_roughness
from networks import NETWORKS
from utils import input_gradients, roughness, separation, stability

LINEAR, CLASSES = 6, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_gradients(n=7, units=4, shape=(2, 6, 5)):
    return torch.randn(n, units, *shape, generator=generator(), dtype=torch.float64)


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    norms = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / norms if norms else 0.0


def test_the_gradients_of_a_linear_network_are_its_rows_and_perfectly_stable():
    network = nn.Sequential(nn.Flatten(), nn.Linear(LINEAR, CLASSES))
    g = input_gradients(network, torch.randn(9, 1, 2, 3))
    assert g.shape == (9, CLASSES, 1, 2, 3) and not g.requires_grad
    assert all(torch.equal(sample.flatten(1), network[1].weight.detach()) for sample in g)
    torch.testing.assert_close(stability(g), torch.ones(CLASSES).double(), rtol=0, atol=1e-14)  # rounding of 9 sums


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradients_of_every_network_are_those_of_finite_differences(name):
    """Central differences in float64, of every class along one direction; steps too small to cross many kinks."""
    torch.manual_seed(0)
    size = {"ResNet": 8, "ConvNeXt": 8}.get(name, 32)  # the smallest that they take, to be quick
    network = NETWORKS[name]((3, size, size), 4).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
    x, v = torch.randn(2, 2, 3, size, size, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        expected = (network.eval()(x + h * v) - network(x - h * v)) / (2 * h)
    g = input_gradients(network.train(), x)
    assert g.shape == (2, 4, 3, size, size)
    found = (g * v[:, None]).flatten(2).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


def test_looking_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    g = [input_gradients(network, torch.ones(3, 1, 4, 4)) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected) and torch.equal(*g)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [part.training for part in network] == [True, False, True, True, True] and network.training
    flags = [parameter.requires_grad for parameter in network.parameters()]
    assert flags == [False, *[True] * (len(flags) - 1)] and all(p.grad is None for p in network.parameters())


def test_units_are_those_chosen_of_a_layer_and_of_a_map_the_neuron_in_the_middle():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 2)).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    g = input_gradients(network, x, layer="0", units=torch.tensor([3, 1]))
    expected = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    expected[:, :, 1:4, 1:4] = network[0].weight.detach()[[3, 1]]
    torch.testing.assert_close(g, expected.expand(4, -1, -1, -1, -1), rtol=0, atol=0)
    after = input_gradients(network, x, layer="1")
    is_on = network[0](x)[:, :, 1, 1] > 0
    assert is_on.any() and not is_on.all()
    assert torch.equal(after.flatten(2).abs().sum(-1) > 0, is_on)


def test_a_unit_that_does_not_depend_on_the_input_has_a_gradient_of_zero():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(1), torch.ones(len(x))], 1)

    g = input_gradients(Constant(), torch.ones(3, 2))
    assert torch.equal(g[:, 0], torch.ones(3, 2)) and not g[:, 1].any()
    assert stability(g).tolist() == pytest.approx([1, 0], abs=1e-14)


def test_stability_is_the_mean_cosine_over_pairs_of_different_inputs():
    g = some_gradients()
    for unit, found in enumerate(stability(g).tolist()):
        pairs = [cosine(g[i, unit], g[j, unit]) for i in range(7) for j in range(7) if i != j]
        assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-11)


def test_a_zero_gradient_counts_as_a_cosine_of_zero():
    g = torch.ones(4, 1, 3)
    g[0] = 0
    assert float(stability(g)) == pytest.approx(3 * 2 / (4 * 3), abs=1e-14)  # 6 of 12 ordered pairs have cosine 1
    assert float(separation(g.transpose(0, 1))) == pytest.approx(1 - 6 / 12, abs=1e-14)
    assert float(stability(torch.zeros(4, 1, 3))) == 0
    assert math.isnan(float(stability(torch.ones(1, 1, 3))))


def test_stability_of_opposite_and_of_unrelated_gradients():
    g = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])[:, None]
    assert float(stability(g)) == -1
    unrelated = torch.randn(64, 50, 3000, generator=generator())
    # A cosine has variance 1/3000, and the mean over units that of 2016 pairs each: standard deviation 6e-5.
    assert abs(float(stability(unrelated).mean())) < 5 * math.sqrt(1 / 3000 / 2016 / 50)


def test_separation_is_one_less_the_mean_cosine_between_classes():
    g = some_gradients()
    pairs = [cosine(g[i, c], g[i, k]) for i in range(7) for c in range(4) for k in range(4) if c != k]
    assert float(separation(g)) == pytest.approx(1 - sum(pairs) / len(pairs), rel=1e-12)
    alike = g[:, :1].expand(-1, 4, *g.shape[2:])
    assert float(separation(alike)) == pytest.approx(0, abs=1e-14)
    assert float(separation(g - g.mean(1, keepdim=True))) > 1


def test_agreement_is_the_cosine_of_the_means_and_of_raw_gradients():
    g, other = some_gradients(), some_gradients(5) + 1
    for unit, found in enumerate(agreement(g, other).tolist()):
        assert found == pytest.approx(cosine(g[:, unit].mean(0), other[:, unit].mean(0)), rel=1e-11)
    assert agreement(0 * g, other).tolist() == [0] * 4


def test_scores_do_not_depend_on_the_length_of_gradients():
    g = some_gradients()
    scaled = g * torch.rand(7, 4, 1, 1, 1, generator=generator(1), dtype=torch.float64).mul(9).exp()
    for score in (stability, separation, roughness):
        torch.testing.assert_close(score(scaled), score(g), rtol=1e-12, atol=1e-12)
    small = (1e-30 * g).float()  # its squares are beyond float32
    torch.testing.assert_close(stability(small), stability(g), rtol=0, atol=1e-6)


def slow_roughness(image):
    """By the definition: a sum over pixels for each frequency."""
    _, height, width = image.shape
    high = total = 0.0
    for u in range(-(height // 2), (height + 1) // 2):
        for v in range(-(width // 2), (width + 1) // 2):
            energy = 0.0
            for plane in image.tolist():
                waves = [
                    value * complex(math.cos(angle), -math.sin(angle))
                    for i, row in enumerate(plane)
                    for j, value in enumerate(row)
                    for angle in [2 * math.pi * (u * i / height + v * j / width)]
                ]
                energy += abs(sum(waves)) ** 2
            total += energy
            high += energy if math.hypot(u / height, v / width) > 0.25 else 0.0
    return high / total


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 6, 9), (1, 1, 4)])
def test_roughness_is_that_of_a_transform_by_its_definition(shape):
    image = torch.randn(shape, generator=generator(), dtype=torch.float64)
    assert float(roughness(image)) == pytest.approx(slow_roughness(image), rel=1e-11, abs=1e-14)


def test_roughness_of_stripes_is_that_of_their_period():
    """At half of Nyquist's frequency, a period of 4 pixels, nothing lies above it; a period of 3 does."""
    place = torch.arange(12, dtype=torch.float64)
    for period, expected in ((12, 0), (4, 0), (3, 1), (2, 1)):
        stripes = (2 * math.pi * place / period).cos().expand(1, 12, 12)
        assert float(roughness(stripes)) == pytest.approx(expected, abs=1e-14)
        assert float(roughness(stripes.mT)) == pytest.approx(expected, abs=1e-14)
    assert float(roughness(torch.ones(3, 5, 5))) == pytest.approx(0, abs=1e-14)
    assert roughness(torch.zeros(2, 1, 5, 5)).isnan().all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (5, 12)])
def test_white_noise_is_as_rough_on_average_as_the_share_of_high_frequencies(height, width):
    found = roughness(torch.randn(2000, 1, height, width, generator=generator()))
    error = float(found.std()) / 2000**0.5
    assert abs(float(found.mean()) - white_roughness(height, width)) < 4 * error


def test_the_share_of_high_frequencies_tends_to_a_square_without_a_disc():
    assert white_roughness(2000, 2000) == pytest.approx(1 - math.pi / 16, abs=1e-4)
    slow = [[math.hypot(u / 5, v / 12) > 0.25 for v in (*range(6), *range(-6, 0))] for u in (0, 1, 2, -2, -1)]
    assert high_frequencies(5, 12).tolist() == slow


def test_filters_are_the_first_convolutions_or_the_rows_of_the_first_linear_map():
    expected = {"MLP": (512, 3, 32, 32), "MNISTNet": (24, 3, 5, 5), "CIFARNet": (24, 3, 2, 2), "ResNet": (64, 3, 3, 3)}
    for name, shape in expected.items():
        assert first_filters(NETWORKS[name]((3, 32, 32), 10), (3, 32, 32)).shape == shape
    assert first_filters(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), (4,)).shape == (2, 4)
    assert first_filters(nn.Tanh(), (4,)) is None and first_filters(nn.Linear(5, 2), (4,)) is None


def test_the_examples_in_the_docstrings_hold():
    import doctest

    assert doctest.testmod(module).failed == 0
