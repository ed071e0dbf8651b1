"""The rank figures against NumPy's singular values, of matrices that are centred here, independently."""

import doctest
import math

import numpy as np
import pytest
import torch
from two_ranks import on_two_ranks

from measures import rank as module
from measures.rank import rank
from run.errors import UserError

SQUARED = 1e-9  # float64 sums of products; σ² of 1e-6 and more relative to σ_1² keep six digits beyond these nine


def ranks(h, y, batch_size=64, **options):
    batches = list(zip(h.split(batch_size), y.split(batch_size), strict=True))
    return rank(lambda x: {"layer": x}, batches, int(y.max()) + 1, **options)["layer"]


def figures(matrix, tolerance):
    sigma = np.linalg.svd(matrix, compute_uv=False)
    p = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
    return {
        "numerical": np.sum(sigma > tolerance * sigma[0]),
        "stable": np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2,
        "effective": np.exp(-np.sum(p * np.log(p))),
    }


def definition(h, y, tolerance):
    h, y = h.double().numpy(), y.numpy()
    M = np.stack([h[y == c].mean(0) - h.mean(0) for c in np.unique(y)], axis=1)
    of_means = figures(M, tolerance)
    return figures(h - h.mean(0), tolerance) | {f"means_{name}": value for name, value in of_means.items()}


def layer(num_samples=200, d=50, decay=0.0, num_classes=5, seed=0):
    """Activations (N, d) in float64 with singular values j^-decay and a mean of their own, and labels."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(num_samples, d, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(h - h.mean(0), full_matrices=False)
    sigma = torch.arange(1, len(Vh) + 1, dtype=torch.float64) ** -decay
    y = torch.arange(num_samples) % num_classes
    return (U * sigma) @ Vh + torch.randn(d, generator=generator, dtype=torch.float64), y


TALL, WIDE = (200, 50), (50, 200)  # HᵀH is the smaller product, or HHᵀ


@pytest.mark.parametrize("shape", [TALL, WIDE, (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_exact_figures_equal_those_of_the_singular_values(shape, decay, cache_bytes):
    h, y = layer(*shape, decay)
    expected = definition(h, y, tolerance=1e-3)
    # N × N: the rows sum to 0, so one σ is noise of 1e-8 σ_1 in the product, cut there and here.
    assert ranks(h, y, tolerance=1e-3, batch_size=16, cache_bytes=cache_bytes) == pytest.approx(expected, rel=1e-7)


def test_hand_solved_case_and_docstring():
    assert doctest.testmod(module).failed == 0
    # Four points ±2 e1, ±1 e2: σ² = 8 and 2, p = 2/3 and 1/3.
    h = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = ranks(h, torch.tensor([0, 0, 1, 1]))
    entropy = 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)
    assert found["numerical"] == 2
    assert found["stable"] == pytest.approx(10 / 8, rel=SQUARED)
    assert found["effective"] == pytest.approx(math.exp(entropy), rel=SQUARED)
    assert found["means_numerical"] == 0 and math.isnan(found["means_stable"])  # both class means are 0


def rotated(h):
    return h @ torch.linalg.qr(torch.randn(h.shape[1], h.shape[1], dtype=torch.float64)).Q


@pytest.mark.parametrize(
    "transformed",
    [rotated, lambda h: 1e6 * h, lambda h: h + torch.linspace(-9, 9, h.shape[1])],
    ids=["rotation", "scale", "shift"],
)
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_figures_are_invariant_under(transformed, shape):
    h, y = layer(*shape, decay=1.0)
    assert ranks(transformed(h), y) == pytest.approx(ranks(h, y), rel=SQUARED)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("exact_limit", [4096, 16])
def test_figures_depend_neither_on_the_batch_size_nor_on_the_order_of_samples(shape, exact_limit):
    h, y = layer(*shape, decay=1.0)
    expected = pytest.approx(ranks(h, y, exact_limit=exact_limit), rel=SQUARED)
    order = torch.randperm(len(h))
    assert ranks(h[order], y[order], exact_limit=exact_limit) == expected
    for batch_size in (1, 7, 200):
        assert ranks(h, y, batch_size, exact_limit=exact_limit) == expected


@pytest.mark.parametrize("shape", [(2000, 300), (300, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_the_activations_type_does_not_count_as_rank(shape, dtype):
    num_samples, d = shape
    h = torch.randn(num_samples, 7, dtype=torch.float64) @ torch.randn(7, d, dtype=torch.float64)
    found = ranks(h.to(dtype), torch.arange(num_samples) % 10)
    assert found["numerical"] == 7 and found["means_numerical"] == 7


def test_the_default_tolerance_is_numpys_for_float32():
    h, y = layer(300, 40, decay=3.0)  # σ from 1 down to 40^-3 = 1.6e-5; the tolerance is 300 eps32 = 3.6e-5
    centred = h.float() - h.float().mean(0)
    assert ranks(h.float(), y)["numerical"] == np.linalg.matrix_rank(centred.numpy())


def test_class_means_have_rank_of_at_most_the_classes_present_less_one():
    h, y = layer(200, 50, num_classes=5)
    assert ranks(h, y)["means_numerical"] == 4
    assert ranks(h, 3 * y)["means_numerical"] == 4  # of 13 classes, 8 without samples


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_constant_layer_has_rank_0_and_no_stable_or_effective_rank(shape):
    found = ranks(torch.full(shape, 0.1), torch.arange(shape[0]) % 5)
    assert found["numerical"] == found["means_numerical"] == 0
    assert all(math.isnan(found[name]) for name in ("stable", "effective", "means_stable", "means_effective"))


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    h, y = layer()
    h[3, 4] = math.inf
    with pytest.raises(UserError, match="layer layer"):
        ranks(h, y)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_data_that_do_not_repeat_themselves_are_an_error(shape):
    h, y = layer(*shape)
    batches = zip(h.split(16), y.split(16), strict=True)
    with pytest.raises(RuntimeError, match="repeat"):
        rank(lambda x: {"layer": x}, batches, 5, cache_bytes=0)


# Folding: 600 × 900 activations into 200 buckets. The bounds are those of the docstring.
BUCKETS = 200


def folded_and_exact(decay, seed, **options):
    h, y = layer(600, 900, decay)
    return ranks(h, y, exact_limit=BUCKETS, seed=seed, **options), ranks(h, y, **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decay", [1.0, 1.5, 2.0])
def test_folded_figures_of_decaying_spectra_are_within_the_stated_error(decay, seed):
    folded, exact = folded_and_exact(decay, seed, tolerance=1e-2)
    deviation = math.sqrt(2 / BUCKETS)
    assert exact["stable"] / folded["stable"] == pytest.approx(1, abs=4 * deviation)  # ‖H‖_2² is what is estimated
    too_low = 0.25 if exact["effective"] <= BUCKETS / 5 else 0.5
    if exact["effective"] <= BUCKETS / 2:
        assert 1 - too_low < folded["effective"] / exact["effective"] < 1.02
    # A tenth, and the one σ by which a count of ten or so may differ with the estimate of σ_1.
    assert folded["numerical"] == pytest.approx(exact["numerical"], abs=1 + 0.1 * exact["numerical"])


@pytest.mark.parametrize("seed", range(4))
def test_the_folded_stable_rank_of_a_flat_spectrum_is_too_low_by_no_more_than_stated(seed):
    h, y = layer(600, 900)
    h = (h - h.mean(0)) @ torch.randn(900, 8, dtype=torch.float64) @ torch.randn(8, 900, dtype=torch.float64)
    folded, exact = ranks(h, y, exact_limit=BUCKETS, seed=seed), ranks(h, y)
    worst = 2 * math.sqrt(exact["stable"] / BUCKETS) + 4 * math.sqrt(2 / BUCKETS)
    assert folded["numerical"] == exact["numerical"] == 8
    assert -worst < folded["stable"] / exact["stable"] - 1 < worst


def test_folding_is_decided_by_its_seed_and_leaves_class_means_alone():
    (folded, exact), (again, _), (other, _) = (folded_and_exact(1.0, seed) for seed in (0, 0, 1))
    assert folded == again != other
    assert all(folded[name] == exact[name] for name in folded if name.startswith("means_"))


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("exact_limit", [4096, 16])
def test_two_ranks_with_unequal_shares_find_what_one_finds_and_reduce_equally_often(shape, exact_limit):
    h, y = layer(*shape, decay=1.0, num_classes=5)
    shares = [(h[:15], y[:15]), (h[15:], y[15:])]
    found, calls = on_two_ranks(
        lambda both: ranks(*shares[both.index], 8, tolerance=1e-3, exact_limit=exact_limit, ranks=both)
    )
    expected = ranks(h, y, tolerance=1e-3, exact_limit=exact_limit)
    # 1e-7: one rank may use HHᵀ where two use HᵀH, and the zeros of both are cut at 1e-7 σ_1.
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-7)
    assert calls[0] == calls[1]
