"""NC1 against its definition.

`definition` is the float64 brute force: d × d covariances and a pseudo-inverse. Its own error is about eps64 times
λ_max / λ_min of Σ_B, at most 1e-8 in the cases below, so relative agreement within 1e-6 tests us, not it.
"""

import doctest
import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import on_two_ranks

import datasets
from classifier import Classifier
from main import main
from measures import neural_collapse as module
from measures.neural_collapse import equiseparation, nc1_of_labelings, neural_collapse, permuted
from run.checkpoints import read_checkpoint
from run.errors import UserError

PINV_CUT = 1e-12  # relative to λ_max: between the rounding errors of zero eigenvalues and the smallest real ones


def definition(h, y):
    """tr(Σ_W Σ_B⁺), term by term."""
    h, y = h.flatten(1).double().numpy(), y.numpy()
    classes = np.unique(y)
    mu_c = np.stack([h[y == c].mean(0) for c in classes])
    M = (mu_c - h.mean(0)).T
    r = h - mu_c[np.searchsorted(classes, y)]
    sigma_b, sigma_w = M @ M.T / len(classes), r.T @ r / len(h)
    return np.trace(sigma_w @ np.linalg.pinv(sigma_b, rcond=PINV_CUT, hermitian=True))


def nc1(h, y, num_classes=None, batch_size=64, **options):
    batches = list(zip(h.split(batch_size), y.split(batch_size), strict=True))
    num_classes = num_classes or int(y.max()) + 1
    return neural_collapse(lambda x: {"layer": x}, batches, num_classes, **options)["layer"]


def clusters(num_samples=600, num_classes=10, d=64, within=1.0, between=1.0, seed=0):
    """Gaussian clusters of equal size (N, d) in float64, and their labels, in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(num_samples) % num_classes)[torch.randperm(num_samples, generator=generator)]
    means = between * torch.randn(num_classes, d, generator=generator, dtype=torch.float64)
    return means[y] + within * torch.randn(num_samples, d, generator=generator, dtype=torch.float64), y


def near_collapsed():
    return clusters(within=1e-3)


def offset():
    h, y = clusters()
    return h + 1e4, y


def more_classes_than_dimensions():
    return clusters(num_samples=2000, num_classes=100, d=64)


def class_means_of_rank_4():
    """Deviations of equal and opposite pairs, so that no noise raises the rank of the means."""
    means = torch.randint(-8, 9, (10, 4)).double() @ torch.randint(-8, 9, (4, 64)).double()
    deviations = torch.randint(-64, 65, (30, 64)) / 64
    deviations = torch.cat([deviations, -deviations])
    return (means[:, None] + deviations).flatten(0, 1), torch.arange(10).repeat_interleave(60)


def class_mean_eigenvalues_over_six_decades():
    """d = 2048: a cut that grew with d would drop the smallest eigenvalues."""
    d, num_classes = 2048, 8
    basis = torch.linalg.qr(torch.randn(d, num_classes, dtype=torch.float64)).Q
    means = basis.T * torch.logspace(0, -3, num_classes, dtype=torch.float64)[:, None]  # λ from 1 to 1e-6
    deviations = 1e-3 * torch.randn(20, d, dtype=torch.float64)
    deviations = torch.cat([deviations, -deviations])
    return (means[:, None] + deviations).flatten(0, 1), torch.arange(num_classes).repeat_interleave(40)


def imbalanced():
    h, y = clusters(num_samples=820, num_classes=2)
    keep = torch.cat([torch.where(y == 0)[0][:400], torch.where(y == 1)[0][:10]])
    return h[keep], y[keep]


def classes_without_samples():
    h, y = clusters(num_classes=7)
    return h, y + 2 + 3 * (y > 3)  # of 14 classes, the first two, three in the middle and the last are absent


CASES = [
    near_collapsed,
    offset,
    more_classes_than_dimensions,
    class_means_of_rank_4,
    class_mean_eigenvalues_over_six_decades,
    imbalanced,
    classes_without_samples,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nc1_of_float32_activations_equals_its_definition(case):
    torch.manual_seed(0)
    h, y = case()
    h = h.float()
    assert nc1(h, y, num_classes=int(y.max()) + 2) == pytest.approx(definition(h, y), rel=1e-6)


def test_float32_activations_with_an_offset_of_1e4_give_nc1_within_their_resolution():
    h, y = offset()
    # float32 resolves 1e4 to 1e-3, an error of variance 1e-6 / 12 beside the unit variance.
    assert nc1(h.float(), y) == pytest.approx(definition(h, y), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(3, 60),
    num_classes=st.integers(2, 12),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_nc1_equals_its_definition_for_any_shape(num_samples, num_classes, shape, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(num_samples, *shape, generator=generator)
    y = torch.randint(num_classes, (num_samples,), generator=generator)
    if len(y.unique()) < 2:
        y[0] = (y[0] + 1) % num_classes
    value = nc1(h, y, num_classes, batch_size)
    # The absolute part: where each class has one sample, NC1 is 0 and both sides are squares of rounding errors.
    assert value == pytest.approx(definition(h, y), rel=1e-6, abs=1e-12)
    assert value >= 0


def test_nc1_of_a_simplex_has_its_closed_form_and_so_do_the_docstrings_examples():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 5


def test_nc1_is_zero_when_activations_equal_their_class_mean():
    y = torch.arange(60) % 5
    h = torch.eye(5)[y]
    # Not exactly: 0 is a sum of squared rounding errors of relative size eps64.
    assert 0 <= nc1(h, y) < 1e-28


def test_permuted_labels_of_isotropic_activations_give_the_closed_form():
    """E[NC1] = (N - C)(C - 1)/(d - C) where every direction varies alike."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 5
    values = torch.tensor([nc1(torch.randn(200, 40, generator=generator), y) for _ in range(1000)])
    standard_error = float(values.std() / math.sqrt(1000))
    assert standard_error < 0.15
    assert float(values.mean()) == pytest.approx((200 - 5) * (5 - 1) / (40 - 5), abs=4 * standard_error)


def labelled_twice(h, y, permuted_y, batch_size=64, **options):
    both = torch.stack([y, permuted_y], 1)
    batches = list(zip(h.split(batch_size), both.split(batch_size), strict=True))
    return nc1_of_labelings(lambda x: {"layer": x}, batches, int(y.max()) + 1, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_chance_level_is_the_definition_under_permuted_labels_from_the_same_passes(case):
    torch.manual_seed(0)
    h, y = case()
    chance_y = permuted(y, 0, "test")
    assert not torch.equal(chance_y, y) and torch.equal(chance_y.bincount(), y.bincount())
    of_labels, of_permuted = labelled_twice(h, y, chance_y)
    assert of_labels["layer"] == pytest.approx(definition(h, y), rel=1e-6)
    assert of_permuted["layer"] == pytest.approx(definition(h, chance_y), rel=1e-6)


def test_directions_that_vary_unequally_have_another_chance_level_than_the_closed_form():
    h, y = clusters(between=0.0)
    h = h * torch.logspace(0, -2, h.shape[1], dtype=torch.float64)
    _, chance = labelled_twice(h, y, permuted(y, 0, "test"))
    assert chance["layer"] > 3 * (600 - 10) * (10 - 1) / (64 - 10)


def test_a_second_labeling_takes_no_second_forward_pass_and_changes_nothing():
    h, y = clusters()
    asked = []
    batches = list(zip(h.split(64), torch.stack([y, y.flip(0)], 1).split(64), strict=True))
    [of_labels, _] = nc1_of_labelings(lambda x: {"layer": asked.append(1) or x}, batches, 10, cache_bytes=0)
    assert len(asked) == 2 * len(batches)
    assert of_labels["layer"] == pytest.approx(nc1(h, y), rel=INVARIANT)


@pytest.mark.parametrize("num_classes", [3, 40], ids=["few classes", "many classes"])
def test_labels_of_no_class_are_an_error_also_in_the_second_labeling(num_classes):
    h, y = clusters(num_classes=num_classes)
    wrong = y.clone()
    wrong[5] = num_classes
    with pytest.raises(UserError, match=f"labels outside 0 to {num_classes - 1}"):
        labelled_twice(h, y, wrong)


def test_the_permutation_is_decided_by_its_purpose_alone():
    y = torch.arange(1000) % 7
    assert torch.equal(permuted(y, 3, "train"), permuted(y, 3, "train"))
    assert not torch.equal(permuted(y, 3, "train"), permuted(y, 3, "test"))
    assert not torch.equal(permuted(y, 3, "train"), permuted(y, 4, "train"))


def test_a_run_logs_the_chance_level_of_each_set_the_same_for_every_batch_size(in_an_empty_folder, monkeypatch):
    argv = ["-e", "1", "--limit", "150", "--no-dib", "--no-plots", "--quiet", "--precision", "64-true"]
    assert main([*argv, "--name", "whole"]) == 0
    monkeypatch.setattr("batches.EVALUATION_VALUES", 12 * 64)  # batches of 64
    assert main([*argv, "--name", "parts"]) == 0
    whole, parts = (pd.read_csv(f"lightning_logs/{name}/metrics.csv") for name in ("whole", "parts"))
    columns = [f"nc1_chance/{split}/hidden{i}" for split in ("train", "test") for i in range(1, 6)]
    np.testing.assert_allclose(whole[columns], parts[columns], rtol=1e-9)  # float64, times Σ_B's condition
    path = "lightning_logs/whole/checkpoints/last.ckpt"
    network = Classifier.from_checkpoint(read_checkpoint(path), path, (12,), 2, double=True).network.eval()
    split = datasets.load("SZT", limit=150).test
    h = network.feature_extractor(2 * split.inputs.double() - 1)["hidden1"].detach()
    expected = definition(h, permuted(split.labels, 0, "test"))
    assert whole["nc1_chance/test/hidden1"].iloc[-1] == pytest.approx(expected, rel=1e-6)


INVARIANT = 1e-9  # float64 activations: rounding, amplified by Σ_B's condition number of some hundreds


def rotated(h):
    return h @ torch.linalg.qr(torch.randn(h.shape[1], h.shape[1], dtype=torch.float64)).Q


@pytest.mark.parametrize(
    "transformed",
    [rotated, lambda h: 1e6 * h, lambda h: 1e-30 * h, lambda h: h + torch.linspace(-9, 9, h.shape[1])],
    ids=["rotation", "scale", "tiny scale", "shift"],
)
def test_nc1_is_invariant_under(transformed):
    h, y = clusters()
    assert nc1(transformed(h), y) == pytest.approx(nc1(h, y), rel=INVARIANT)


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_nc1_does_not_depend_on_the_batch_size(batch_size):
    h, y = clusters()
    assert nc1(h, y, batch_size=batch_size) == pytest.approx(nc1(h, y), rel=INVARIANT)


def test_nc1_does_not_depend_on_the_order_of_samples_or_the_names_of_classes():
    h, y = clusters()
    order, names = torch.randperm(len(h)), torch.randperm(10)
    assert nc1(h[order], names[y[order]]) == pytest.approx(nc1(h, y), rel=INVARIANT)


@pytest.mark.parametrize("num_classes", [10, 40], ids=["few classes", "many classes"])
def test_wide_layers_worked_on_in_pieces_give_the_same(monkeypatch, num_classes):
    h, y = clusters(num_classes=num_classes)
    whole = nc1(h, y)
    monkeypatch.setitem(module.pieces.__globals__["PIECE_ELEMENTS"], "cpu", 600)
    assert nc1(h, y) == pytest.approx(whole, rel=INVARIANT)


@pytest.mark.parametrize("cache_bytes", [0, 64 * 64 * 4 * 3])
def test_nc1_is_the_same_bits_whatever_is_kept_in_memory(cache_bytes):
    h, y = clusters()
    assert nc1(h.float(), y, cache_bytes=cache_bytes) == nc1(h.float(), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_converted_before_any_sum(dtype):
    h, y = clusters()
    h = h.to(dtype)
    assert nc1(h, y) == nc1(h.double(), y)


class Products(TorchDispatchMode):
    """Collects the types that matrix products work in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__ or "bmm" in func.__name__:
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_classes", [10, 40], ids=["few classes", "many classes"])
def test_every_product_is_float64_so_that_tf32_and_autocast_reach_none(num_classes):
    h, y = clusters(num_classes=num_classes)
    with Products() as products:
        expected = nc1(h.bfloat16(), y)
    assert products.dtypes == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert nc1(h.bfloat16(), y) == expected


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(), [str(warning.message) for warning in caught]


def test_layers_whose_class_means_coincide_are_nan_with_one_warning_that_names_them():
    h, y = clusters()
    dead = {"zero": torch.zeros(600, 8), "constant": torch.full((600, 8), 0.1), "live": h}
    rounding = 0.1 * (1 + 1e-8 * torch.randn(600, 8, dtype=torch.float64))  # below what float32 resolves
    batches = [(torch.arange(600), y)]
    values, messages = warned(lambda: neural_collapse(lambda i: dead | {"rounding": rounding}, batches, 10))
    assert [layer for layer, value in values.items() if math.isnan(value)] == ["zero", "constant", "rounding"]
    assert values["live"] == pytest.approx(definition(h, y), rel=1e-6)
    assert len(messages) == 1
    assert all(layer in messages[0] for layer in ("zero", "constant", "rounding")) and "live" not in messages[0]


def test_a_single_class_gives_nan_with_one_warning():
    h, _ = clusters()
    value, messages = warned(lambda: nc1(h, torch.full((600,), 3), num_classes=10))
    assert math.isnan(value) and len(messages) == 1 and "fewer than two classes" in messages[0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("num_classes", [10, 40], ids=["few classes", "many classes"])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(value, num_classes):
    h, y = clusters(num_classes=num_classes)
    broken = h.clone()
    broken[17, 3] = value
    with pytest.raises(UserError, match="layer broken"):
        neural_collapse(lambda i: {"good": h[i], "broken": broken[i]}, [(torch.arange(600), y)], num_classes)


def test_data_that_do_not_repeat_themselves_are_an_error_unless_all_is_kept():
    h, y = clusters()
    with pytest.raises(RuntimeError, match="repeat"):
        neural_collapse(lambda x: {"layer": x}, zip(h.split(64), y.split(64), strict=True), 10, cache_bytes=0)
    once = neural_collapse(lambda x: {"layer": x}, zip(h.split(64), y.split(64), strict=True), 10)
    assert once["layer"] == nc1(h, y)


def test_two_ranks_with_unequal_shares_find_what_one_finds_and_reduce_equally_often():
    h, y = clusters()
    shares = [(h[:100], y[:100]), (h[100:], y[100:])]  # 2 and 8 batches
    values, calls = on_two_ranks(lambda ranks: nc1(*shares[ranks.index], num_classes=10, ranks=ranks))
    assert values[0] == values[1] == pytest.approx(nc1(h, y), rel=INVARIANT)
    assert calls[0] == calls[1]


A_MILLION_DIMENSIONS = """
import torch
from measures.neural_collapse import neural_collapse
torch.manual_seed(0)
batches = [(torch.randn(8, 1, 1), torch.arange(8 * i, 8 * i + 8) % 10) for i in range(5)]
wide = torch.randn(1, 10, 100_000)
value = neural_collapse(lambda x: {"wide": x + wide}, batches, 10, cache_bytes=0)["wide"]
# getrusage would count the peak of the process that started this one as well.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(value, int(peak) / 2**20)  # in KiB there
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_million_dimensions_and_ten_classes_fit_into_two_gigabytes():
    command = [sys.executable, "-c", A_MILLION_DIMENSIONS]
    value, gigabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(value) > 0
    assert float(gigabytes) < 2


def test_a_line_in_log_nc1_has_r_of_minus_one_and_its_slope():
    r, slope = equiseparation([math.exp(3 - 0.65 * layer) for layer in range(6)])
    assert r == pytest.approx(-1, abs=1e-12) and slope == pytest.approx(-0.65, abs=1e-12)  # float64 rounding


def test_equiseparation_is_pearsons_r_and_the_least_squares_slope():
    values = np.exp(np.random.default_rng(0).normal(size=7))
    r, slope = equiseparation(values)
    assert r == pytest.approx(np.corrcoef(np.arange(7), np.log(values))[0, 1], abs=1e-12)  # float64 rounding
    assert slope == pytest.approx(np.polyfit(np.arange(7), np.log(values), 1)[0], abs=1e-12)


def test_equiseparation_leaves_out_what_has_no_logarithm_but_keeps_the_other_layers_places():
    assert equiseparation([8.0, math.nan, 2.0, 0.0, math.inf, 0.25]) == pytest.approx((-1, -math.log(2)), abs=1e-12)


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 1.0], [2.0, math.nan, 1.0, 0.0]])
def test_equiseparation_of_fewer_than_three_layers_is_nan(values):
    assert all(math.isnan(figure) for figure in equiseparation(values))


def test_equiseparation_of_equal_values_has_slope_0_and_no_r():
    r, slope = equiseparation([2.0, 2.0, 2.0, 2.0])
    assert math.isnan(r) and slope == 0
