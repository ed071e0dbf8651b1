"""The pure function: what it reads where the answer is known, and that nothing but the heads' seeds decides it."""

import doctest
import math
import random
import tracemalloc
import warnings
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import main
from datasets import conditional_entropies, decodable_labels, digit_entropies
from measures import decodable_information as module
from measures.decodable_information import decodable_information, numbered_at_random, sufficiency
from measures.engines import ENGINES, SGD, Adam
from measures.heads import Budget, head_epochs, parts
from networks import MLP, CIFARNet, MNISTNet, Network
from run.errors import UserError

# float64 has an eps of 2e-16, but a bias before batch norm has rounding for a gradient, which Adam divides by 1e-8.
ROUNDING = {"rtol": 1e-7, "atol": 1e-8}
# That bias itself, which changes no output: sums of 16 terms of size 3 round by 1e-14, divided by 1e-8 that is 1e-6 of
# a rate, and the rates add up to 0.04; times 20 for what sums of another order may do.
TENSORS = {"rtol": 1e-7, "atol": 1e-6}


class Chain(Network):
    """A network of the given blocks, every one but the last two measured unless told otherwise."""

    def __init__(self, *blocks: nn.Module, layers: tuple[str, ...] | None = None) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)
        self.sequence = tuple(self._modules)
        self.layers = layers or self.sequence[:-1]


class Constant(nn.Module):
    """A layer that carries nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """0.5 everywhere, as a saturated or dead layer gives."""
        return torch.full_like(x, 0.5)


class Look(nn.Module):
    """A layer that passes on a part of its input."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        """Some of the columns."""
        return x[:, self.columns]


def data(num_samples: int = 90, num_classes: int = 3, dimension: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs (N, d) in float64 and labels whose classes are of different sizes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    labels[: num_samples // 4] = 0
    return torch.randn(num_samples, dimension, generator=generator, dtype=torch.float64), labels


def convolutional() -> tuple[Network, Tensor, Tensor]:
    """A small convolutional network with batch norm that has been used, and data for it."""
    torch.manual_seed(0)
    network = Chain(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.GELU()),
        nn.Linear(5, 3),
    ).double()
    x, labels = data(60, dimension=36)
    x = x.view(60, 1, 6, 6)
    network(x)
    return network, x, labels


def mlp(**options) -> MLP:
    """A small network in float64."""
    torch.manual_seed(0)
    return MLP((6,), 3, **{"widths": (5, 4, 4), "nonlinearity": "tanh", **options}).double()


BUDGET = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 16}


def assert_same_curves(a, b, **tolerance) -> None:
    """Every head's curve equal, bit for bit unless told otherwise."""
    assert a.curves.keys() == b.curves.keys()
    for layer, curve in a.curves.items():
        torch.testing.assert_close(curve, b.curves[layer], **(tolerance or {"rtol": 0, "atol": 0}))


# What it reads


def test_untrained_heads_on_zeros_are_solved_by_hand():
    # Four samples of class 0, two of class 1: digits 00, 01, 10, 11 and 00, 01. Heads that see zeros say the digit's
    # frequencies, which are (4/6, 2/6) for the first and (1/2, 1/2) for the second.
    network = Chain(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    nn.init.zeros_(network.block0.weight), nn.init.zeros_(network.block0.bias)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    result = decodable_information(network, torch.ones(6, 2).double(), labels, 2, **BUDGET | {"epochs": 0})
    expected = torch.tensor([math.log(3) - 2 / 3 * math.log(2), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(result.digit_entropies, expected)
    torch.testing.assert_close(result.curves["block0"][0], expected)
    assert result.loss["block0"] == pytest.approx(expected.mean().item())
    # The class leaves log 2 of the first digit in class 0 and nothing in class 1, log 2 of the second in both. Heads
    # that do not even know the class have I(Y_k; Y) less: log 3 - 4/3 log 2 and nothing.
    known = torch.tensor([2 / 3 * math.log(2), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(result.conditional_entropies, known)
    assert result.minimality["block0"] == pytest.approx((4 / 3 * math.log(2) - math.log(3)) / 2)


def test_the_entropies_of_the_worked_example_are_those_of_the_docstring():
    (example,) = doctest.DocTestFinder(recurse=False).find(conditional_entropies, globs=vars(datasets).copy())
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example).failed == 0


def conditional_entropies_slowly(digits: list[list[int]], labels: list[int]) -> list[float]:
    """Σ_c (n_c / N) H(Y_k | Y = c), class by class and value by value, with Python's numbers."""
    entropies = []
    for column in zip(*digits, strict=True):
        entropy = 0.0
        for c in set(labels):
            values = [digit for digit, label in zip(column, labels, strict=True) if label == c]
            p = [count / len(values) for count in Counter(values).values()]
            entropy += len(values) / len(labels) * -sum(q * math.log(q) for q in p)
        entropies.append(entropy)
    return entropies


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_what_the_class_leaves_equals_a_slow_computation(num_classes):
    _, labels = data(200, num_classes)
    digits = numbered_at_random(labels, num_classes, seed=5)
    entropies = conditional_entropies(digits, labels, num_classes)
    expected = conditional_entropies_slowly(digits.tolist(), labels.tolist())
    assert entropies.tolist() == pytest.approx(expected, abs=1e-12)  # sums of 100 terms below 3, with an eps of 2e-16
    assert (entropies < digit_entropies(digits, num_classes)).any()


def test_classes_of_equal_size_leave_the_whole_entropy():
    labels = torch.arange(4).repeat(25)
    digits = numbered_at_random(labels, 4, seed=0)
    # The same counts in other groups: equal up to the rounding of float64.
    torch.testing.assert_close(conditional_entropies(digits, labels, 4), digit_entropies(digits, 4), rtol=1e-13, atol=0)


def test_what_the_class_leaves_does_not_depend_on_the_numbering():
    _, labels = data(200)
    entropies = [conditional_entropies(numbered_at_random(labels, 3, seed), labels, 3) for seed in range(3)]
    in_order = conditional_entropies(decodable_labels(labels, 3), labels, 3)
    assert all(torch.equal(in_order, other) for other in entropies)  # only counts go in


def test_samples_are_numbered_within_their_class_each_once_in_the_seeds_order():
    _, labels = data(200)
    numbers = [
        (numbered_at_random(labels, 3, seed) * torch.tensor([81, 27, 9, 3, 1])[-5:]).sum(1) for seed in (0, 0, 1)
    ]
    for c in range(3):
        members = (labels == c).nonzero()[:, 0]
        assert numbers[0][members].sort().values.tolist() == list(range(len(members)))
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])


def test_a_samples_place_in_the_file_tells_nothing(monkeypatch):
    # One pixel for each third of a class's samples in the file, as light or a scribe may change: in the file's order
    # that is the first digit itself.
    labels = torch.arange(3).repeat_interleave(243)
    x = F.one_hot(decodable_labels(labels, 3)[:, 0], 3).double()
    network = Chain(nn.Identity(), nn.Linear(3, 3)).double()
    budget = {"epochs": 100, "learning_rate": 0.1, "batch_size": 729, "heads": [("block0", 0)]}

    def read() -> float:
        result = decodable_information(network, x, labels, 3, **budget)
        return (result.conditional_entropies[0] - result.curves["block0"][-1, 0]).item()

    # A fit to N samples of nothing gains a chi-square of (3 - 1)² degrees of freedom, divided by 2 N: 4 on average,
    # above 30 in one of 10⁵ orders.
    assert 0 <= read() < 30 / (2 * 729)
    monkeypatch.setattr(module, "numbered_at_random", lambda labels, num_classes, seed: decodable_labels(labels, 3))
    assert read() > 0.9 * math.log(3)  # Adam goes some 2 units for each logit, which leaves a few hundredths


def test_the_numbering_is_the_runs_and_not_the_epochs(monkeypatch):
    network, x, labels = mlp(), *data()
    given = []
    number = module.numbered_at_random
    monkeypatch.setattr(module, "numbered_at_random", lambda *a: given.append(number(*a)) or given[-1])
    for seed, epoch in ((0, 0), (0, 7), (1, 0)):
        decodable_information(network, x, labels, 3, **BUDGET | {"epochs": 0}, seed=seed, epoch=epoch)
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2])


def test_a_layer_that_carries_nothing_leaves_the_whole_entropy():
    x, labels = data(400)
    torch.manual_seed(0)
    network = Chain(Constant(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3)).double()
    result = decodable_information(
        network, x, labels, 3, layers=["block0"], epochs=60, learning_rate=1e-2, batch_size=50
    )
    # Nothing can be read, so CE >= H exactly. What is left above is the noise of minibatches on a bias b: the loss is
    # quadratic there, and Adam, whose rate ends at 1e-4, leaves b within some 1e-2 of its optimum: 1e-4 nats.
    entropy = result.digit_entropies.mean().item()
    assert entropy - 1e-12 <= result.loss["block0"] < entropy + 1e-4
    assert (result.curves["block0"][-1] >= result.digit_entropies - 1e-12).all()


def test_a_layer_that_knows_the_class_alone_reads_zero_whatever_the_sizes_of_classes():
    _, labels = data(300)
    network = Chain(nn.Identity(), nn.Linear(3, 3)).double()
    result = decodable_information(
        network, F.one_hot(labels, 3).double(), labels, 3, epochs=200, learning_rate=0.3, batch_size=300
    )
    # The optimum is H(Y_k | Y), and heads come to it from above. A class that lacks a value of the digit has it at
    # infinity: with the 13 units that Adam can go in these steps (the sum of the rates), e^-13 N is what is left, and
    # 1e-4 is far above it.
    left = result.curves["block0"][-1] - result.conditional_entropies
    assert (left >= -1e-12).all() and (left < 1e-4).all()
    assert -1e-4 < result.minimality["block0"] <= 1e-12
    # Against H(Y_k) it would read this much, most of it of the top digit.
    assert (result.digit_entropies - result.conditional_entropies)[0] > 0.1


def test_a_linear_decoder_approaches_the_convex_optimum_from_below():
    x, labels = data(200)
    network = Chain(nn.Identity(), nn.Linear(6, 3)).double()
    budget = {"epochs": 200, "learning_rate": 3e-2, "batch_size": 200}
    result = decodable_information(network, x, labels, 3, **budget)
    for k, digit in enumerate(numbered_at_random(labels, 3, seed=0).T):
        if len(digit.unique()) < 3:
            continue  # without samples of a value the optimum is at infinity
        best = least_cross_entropy(x, digit)
        # Adam on full batches ends at a rate of 3e-4, well inside the quadratic neighbourhood of the optimum.
        assert best - 1e-9 <= result.curves["block0"][-1, k] < best + 1e-4


def least_cross_entropy(x: Tensor, digit: Tensor) -> float:
    """The lowest mean cross-entropy of a linear classifier, by L-BFGS in float64."""
    weight, bias = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, digit)
        loss.backward()
        return loss

    solver.step(closure)
    return closure().item()


@pytest.mark.parametrize("engine", ENGINES)
def test_heads_learn_what_a_loop_written_down_plainly_learns(engine):
    network, x, labels = mlp(), *data()
    budget = Budget(epochs=3, learning_rate=1e-2, batch_size=16, seed=3, epoch=2)
    result, start = (
        decodable_information(
            network, x, labels, 3, **BUDGET | {"epochs": epochs}, seed=3, epoch=2, keep_states=True, engine=engine
        )
        for epochs in (3, 0)
    )
    h, digit = network.feature_extractor(x)["hidden2"].detach(), numbered_at_random(labels, 3, seed=3)[:, 1]
    _, head = deepcopy(network).get_encoder_decoder("hidden2")
    head.load_state_dict(start.states["hidden2", 1])
    optimizer = torch.optim.Adam(head.parameters())
    losses, step = [F.cross_entropy(head(h), digit).item()], 0
    for head_epoch in range(3):
        for rows in budget.order(head_epoch, 90).split(16):
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.01 ** (step / 18)
            optimizer.zero_grad()
            F.cross_entropy(head(h[rows]), digit[rows]).backward()
            optimizer.step()
            step += 1
        losses.append(F.cross_entropy(head(h), digit).item())
    torch.testing.assert_close(result.curves["hidden2"][:, 1].tolist(), losses, **ROUNDING)
    for name, value in result.states["hidden2", 1].items():
        torch.testing.assert_close(value, head.state_dict()[name], **ROUNDING)


@pytest.mark.parametrize(("ours", "torchs"), [(Adam, torch.optim.Adam), (SGD, partial(torch.optim.SGD, momentum=0.9))])
def test_the_optimizers_are_those_of_torch(ours, torchs):
    torch.manual_seed(0)
    values = torch.randn(20, dtype=torch.float64)
    gradients, reference = torch.zeros_like(values), values.clone().requires_grad_()
    optimizer, other = ours(values, gradients), torchs([reference], lr=1e-2)
    for _ in range(10):
        gradients.normal_()
        reference.grad = gradients.clone()
        optimizer.update(1e-2), other.step()
    torch.testing.assert_close(values, reference.detach(), **ROUNDING)


# Only seed, epoch, layer and digit decide


NETWORKS = {
    "tanh": lambda: (mlp(), *data()),
    "batch norm": lambda: (mlp(batch_norm=True, nonlinearity="relu"), *data()),
    "gelu": lambda: (mlp(nonlinearity="gelu"), *data()),
    "convolutional": convolutional,
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_all_engines_give_the_same_numbers(kind, optimizer):
    network, x, labels = NETWORKS[kind]()
    run = partial(decodable_information, network, x, labels, 3, **BUDGET, optimizer=optimizer, keep_states=True)
    loop, mapped, fastest = run(engine="loop"), run(engine="vmap"), run()
    for other in (mapped, fastest):
        assert_same_curves(loop, other, **ROUNDING)
        for head, state in loop.states.items():
            torch.testing.assert_close(state, other.states[head], **TENSORS)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_head_gets_what_it_would_get_alone(kind):
    network, x, labels = NETWORKS[kind]()
    together = decodable_information(network, x, labels, 3, **BUDGET)
    for layer, curve in together.curves.items():
        for k in range(curve.shape[1]):
            alone = decodable_information(network, x, labels, 3, **BUDGET, heads=[(layer, k)])
            torch.testing.assert_close(alone.curves[layer][:, k], curve[:, k], **ROUNDING)
            assert torch.stack(list(alone.curves.values())).isfinite().sum() == BUDGET["epochs"] + 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_leaving_out_layers_changes_no_number(kind):
    network, x, labels = NETWORKS[kind]()
    every = decodable_information(network, x, labels, 3, **BUDGET)
    some = decodable_information(network, x, labels, 3, **BUDGET, layers=network.layers[1:])
    assert tuple(some.curves) == network.layers[1:]
    for layer, curve in some.curves.items():
        torch.testing.assert_close(curve, every.curves[layer], **ROUNDING)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("cache_bytes", [0, 90 * 5 * 8, 90 * 16 * 8 * 8])
def test_activations_that_are_computed_again_give_the_same_numbers(kind, cache_bytes):
    network, x, labels = NETWORKS[kind]()
    assert_same_curves(
        decodable_information(network, x, labels, 3, **BUDGET, cache_bytes=cache_bytes),
        decodable_information(network, x, labels, 3, **BUDGET),
        **ROUNDING,
    )


def test_all_layers_share_a_forward_pass_whether_activations_are_kept_or_not():
    network, x, labels = mlp(), *data()
    seen = []
    network.hidden1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    decodable_information(network, x, labels, 3, **BUDGET, cache_bytes=10**6)
    kept, seen[:] = sum(seen), []
    decodable_information(network, x, labels, 3, **BUDGET, cache_bytes=0)
    assert kept == 2 + 90  # two samples to see the shapes with
    assert sum(seen) == 2 + 90 * (3 + 4)  # three head epochs and four evaluations


def test_the_same_seed_gives_the_same_numbers_and_every_epoch_its_own():
    network, x, labels = mlp(), *data()
    first, again, other_epoch, other_seed = (
        decodable_information(network, x, labels, 3, **BUDGET, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert_same_curves(first, again)
    assert (first.curves["hidden1"] != other_epoch.curves["hidden1"]).all()
    assert (first.curves["hidden1"] != other_seed.curves["hidden1"]).all()


def test_dropout_is_drawn_per_head_and_step():
    network = Chain(nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Dropout(0.3)), nn.Linear(5, 3)).double()
    x, labels = data()
    together = decodable_information(network, x, labels, 3, **BUDGET)
    torch.manual_seed(7)
    alone = decodable_information(network, x, labels, 3, **BUDGET, heads=[("block0", 1)])
    assert (alone.curves["block0"][:, 1] == together.curves["block0"][:, 1]).all()
    without = Chain(network.block0, network.block1[0], network.block2)
    without = decodable_information(without, x, labels, 3, **BUDGET)
    assert (without.curves["block0"][1:] != together.curves["block0"][1:]).all()


def test_a_single_sample_left_over_joins_the_last_batch():
    assert parts(33, 16) == [slice(0, 16), slice(16, 33)]
    assert parts(34, 16)[-1] == slice(32, 34)
    assert parts(1, 16) == [slice(0, 1)]
    assert len(parts(3, 1)) == 3
    x, labels = data(33)
    curves = decodable_information(mlp(batch_norm=True), x, labels, 3, **BUDGET).curves
    assert torch.stack(list(curves.values())).isfinite().all()


# What it leaves alone


@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_leaves_no_trace(engine):
    network, x, labels = mlp(batch_norm=True), *data()
    network(x).sum().backward()
    network.hidden2.eval()
    modes = [module.training for module in network.modules()]
    before = deepcopy(network.state_dict())
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    inputs = x.clone()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    decodable_information(network, x, labels, 3, **BUDGET, engine=engine)
    assert [module.training for module in network.modules()] == modes
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(x, inputs)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_decoder_that_writes_into_its_input_spoils_nothing():
    x, labels = data()
    torch.manual_seed(0)
    blocks = nn.Linear(6, 5), nn.Linear(5, 3)
    writing = Chain(blocks[0], nn.Sequential(nn.ReLU(inplace=True)), blocks[1], layers=("block0",)).double()
    plain = Chain(blocks[0], nn.Sequential(nn.ReLU()), blocks[1], layers=("block0",))
    for engine in ENGINES:
        written, read = (
            decodable_information(network, x, labels, 3, **BUDGET, engine=engine) for network in (writing, plain)
        )
        assert_same_curves(written, read)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_diverging_head_is_named_and_alone(engine, monkeypatch):
    network, x, labels = mlp(), *data()
    reset, calls = MLP.reset, []

    def explode(self, module):
        """A reset that gives the fifth head weights without bounds."""
        reset(self, module)
        calls.append(None)
        if len(calls) == 5:
            nn.init.constant_(module.output.weight, torch.inf)

    healthy = decodable_information(network, x, labels, 3, **BUDGET, engine=engine)
    monkeypatch.setattr(MLP, "reset", explode)
    with pytest.warns(UserWarning, match="hidden2 digit 0") as record:
        result = decodable_information(network, x, labels, 3, **BUDGET, engine=engine)
    assert len(record) == 1
    assert healthy.curves["hidden1"].shape[1] == 4
    assert result.curves["hidden2"][:, 0].isnan().all()
    result.curves["hidden2"][:, 0] = healthy.curves["hidden2"][:, 0]
    assert_same_curves(result, healthy)


# What it accepts


def test_copied_heads_start_from_the_networks_own_decoder():
    network, x, labels = mlp(), *data()
    result = decodable_information(network, x, labels, 3, **BUDGET | {"epochs": 0}, init="copy", keep_states=True)
    expected = F.cross_entropy(network(x), numbered_at_random(labels, 3, seed=0)[:, 2]).item()
    for layer, curve in result.curves.items():
        assert curve[0, 2].item() == pytest.approx(expected, rel=1e-12)
        _, decoder = network.get_encoder_decoder(layer)
        torch.testing.assert_close(result.states[layer, 0], decoder.state_dict(), rtol=0, atol=0)


def test_heads_without_a_last_bias_start_at_the_digits_frequencies_too():
    torch.manual_seed(0)
    network = CIFARNet((3, 25, 25), 3)
    nn.init.zeros_(network.group3.norm2.bias)
    x, labels = torch.zeros(20, 3, 25, 25), data(20)[1]
    result = decodable_information(network, x, labels, 3, **BUDGET | {"epochs": 0}, layers=["pool"])
    # The activations are not zero, but the scale of 1/9 keeps the logits of one constant activation near the prior.
    network.pool.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    result = decodable_information(network, x, labels, 3, **BUDGET | {"epochs": 0}, layers=["pool"])
    torch.testing.assert_close(result.curves["pool"][0], result.digit_entropies, rtol=1e-6, atol=0)  # float32


def test_flat_decoders_of_a_convolutional_network_share_products_with_the_layers_before():
    torch.manual_seed(0)
    network, labels = MNISTNet((1, 12, 12), 3).double(), data(40)[1]
    x = torch.randn(40, 1, 12, 12, dtype=torch.float64)
    fastest, loop = (decodable_information(network, x, labels, 3, **BUDGET, engine=e) for e in (None, "loop"))
    assert_same_curves(fastest, loop, **ROUNDING)


def test_activations_in_half_precision_are_trained_on_in_single_precision():
    network, x, labels = mlp().float(), *data()
    with torch.autocast("cpu", torch.bfloat16):
        result = decodable_information(network, x.float(), labels, 3, **BUDGET, keep_states=True)
    assert {value.dtype for state in result.states.values() for value in state.values()} == {torch.float32}
    full = decodable_information(network, x.float(), labels, 3, **BUDGET)
    assert_same_curves(result, full, rtol=2e-2, atol=0)  # bfloat16 has 8 bits


def test_steps_become_the_whole_epochs_that_hold_them():
    assert [head_epochs(100, 20, steps=steps) for steps in (1, 5, 6, 10, 11)] == [1, 1, 2, 2, 3]
    assert head_epochs(10, 20, steps=7) == 7  # a small training set: one batch is an epoch
    assert head_epochs(41, 20, steps=4) == 2  # the sample left over joins the last batch
    network, x, labels = mlp(), *data()
    by_steps, by_epochs = (
        decodable_information(network, x, labels, 3, learning_rate=1e-2, batch_size=16, **length)
        for length in ({"steps": 13}, {"epochs": 3})
    )
    assert_same_curves(by_steps, by_epochs)


def test_a_training_set_of_any_size_gets_its_steps():
    network, x, labels = mlp(), *data()
    for num_samples in (20, 90):
        told = []
        decodable_information(
            network, x[:num_samples], labels[:num_samples], 3, steps=12, learning_rate=1e-2, batch_size=16,
            progress=lambda *counts, told=told: told.append(counts),
        )  # fmt: skip
        assert len(told) >= 12


class Largest(TorchDispatchMode):
    """Sees how many elements the largest tensor has that anything makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """What torch does, looked at."""
        made = function(*args, **(kwargs or {}))
        for thing in made if isinstance(made, tuple | list) else [made]:
            if isinstance(thing, Tensor):
                self.elements = max(self.elements, thing.numel())
        return made


def test_a_hundred_million_head_epochs_start_training_at_once_in_little_memory():
    class Started(Exception):
        """The tenth step is done."""

    def stop_soon(done: int, total: int) -> None:
        assert total == 6 * 10**8
        if done == 10:
            raise Started

    network, x, labels = mlp(), *data()
    tracemalloc.start()
    try:
        with Largest() as largest, pytest.raises(Started):
            decodable_information(network, x, labels, 3, **BUDGET | {"epochs": 10**8}, progress=stop_soon)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest.elements < 10**5  # 12 heads' weights and 90 samples' activations are some thousands
    assert peak < 10**8  # bytes that Python allocated: a list of the head epochs would be 8 · 10⁸


def test_user_errors_are_named():
    network, x, labels = mlp(), *data()
    with pytest.raises(UserError, match="no index to decode"):
        decodable_information(network, x[:3], torch.tensor([0, 1, 2]), 3, **BUDGET)
    with pytest.raises(UserError, match="adam, sgd"):
        decodable_information(network, x, labels, 3, **BUDGET, optimizer="newton")
    with pytest.raises(UserError, match="reset, copy"):
        decodable_information(network, x, labels, 3, **BUDGET, init="keep")
    for length in ({}, {"epochs": 3, "steps": 10}):
        with pytest.raises(UserError, match="one of the two"):
            decodable_information(network, x, labels, 3, learning_rate=1e-2, batch_size=16, **length)
    with pytest.raises(UserError, match="4 outputs per sample"):
        decodable_information(network, x, labels, 4, **BUDGET)


def test_progress_counts_every_step():
    network, x, labels = mlp(), *data()
    told = []
    decodable_information(network, x, labels, 3, **BUDGET, progress=lambda *counts: told.append(counts))
    assert told == [(i, 18) for i in range(1, 19)]


def test_sufficiency_is_what_the_network_reads_of_the_class():
    labels = torch.tensor([0, 0, 0, 1])
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert sufficiency(0.1, labels, 3) == pytest.approx(entropy - 0.1)


# In a run


TINY = ["-w", "6", "4", "-e", "1", "--no-nc", "--no-plots", "--quiet", "--accelerator", "cpu"]


def warnings_of(argv: list[str]) -> list[str]:
    """What a run has to say against its DIB."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert main.main([*TINY, *argv]) == 0
    return [str(warning.message) for warning in given if "DIB" in str(warning.message) or "dib" in str(warning.message)]


def test_a_run_notes_how_many_heads_it_trained_and_how_long(in_an_empty_folder):
    for argv, steps, epochs in ((["--dib-steps", "61"], 61, 31), (["--dib-epochs", "40"], None, 40)):
        assert main.main([*TINY, "--limit", "200", *argv]) == 0
        run = max(Path("lightning_logs").iterdir())
        hparams = yaml.safe_load((run / "hparams.yaml").read_text())
        assert hparams["dib_steps"] == steps
        about = hparams["provenance"]
        assert about["dib_head_epochs"] == epochs
        last = (run / "dib.csv").read_text().splitlines()[-1].split(",")
        assert last[2:4] == [str(about["dib_heads"] - 1), str(epochs)]


def test_heads_that_trained_too_short_are_told_once_with_their_layers(in_an_empty_folder):
    (told,) = warnings_of(["--dib-steps", "1", "--dib-lr", "1e-6", "-e", "2"])  # as reset: worse than no layer
    assert "too short" in told and "hidden1, hidden2" in told and "--dib-steps" in told


def test_heads_of_layers_that_tell_nothing_are_not_told_to_train_longer(in_an_empty_folder, monkeypatch):
    forward = torch.tanh
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: forward(0 * x))
    assert warnings_of(["-lr", "1e-9"]) == []


@pytest.mark.parametrize("argv", [[], ["--measure", "run/checkpoints/last.ckpt"]])
def test_too_few_samples_for_dib_are_told_before_a_folder_is_made(argv, in_an_empty_folder, capsys):
    assert main.main([*TINY, "--no-dib", "--log-dir", ".", "--name", "run"]) == 0
    assert main.main([*TINY, "--dib", "--limit", "1", "--log-dir", "logs", *argv]) == 2
    told = capsys.readouterr().err
    assert "--limit" in told and "--no-dib" in told and "1 training sample" in told and told.count("\n") == 1
    assert not Path("logs").exists()
    assert main.main([*TINY, "--no-dib", "--limit", "1", "--log-dir", "logs", *argv]) == 0


def test_a_run_from_before_minimality_had_its_zero_is_told_where_the_columns_change(in_an_empty_folder):
    argv = ["--dib-epochs", "30", "--name", "old", "--limit", "200", "--schedule", "constant", "--warmup", "0"]
    assert warnings_of(argv) == []
    path = Path("lightning_logs/old/hparams.yaml")
    hparams = yaml.safe_load(path.read_text())
    del hparams["provenance"]["dib_head_epochs"]
    path.write_text(yaml.safe_dump(hparams))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert main.main(["--resume", str(path.parent), "-e", "2", "--quiet"]) == 0
    assert any("epoch 2" in str(w.message) and "something else" in str(w.message) for w in given)
