"""The reduction against SciPy's singular values, and its filter against a loop over classes and features."""

import doctest
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from measures import reduction as module
from measures.reduction import reduce
from run.errors import NotFinite, UserError

ROUNDING = 1e-6  # activations are float32, whose means and differences are rounded to 6e-8 of their size


def layer(num_samples, d, decay, seed=0, offset=3.0, noise=1e-3):
    """Activations (N, d) in float32 with singular values j^-decay, 200 of them, white noise and an offset."""
    generator = torch.Generator().manual_seed(seed)
    num = min(200, num_samples, d)
    U = torch.linalg.qr(torch.randn(num_samples, num, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, num, generator=generator, dtype=torch.float64)).Q
    A = U * torch.arange(1, num + 1, dtype=torch.float64) ** -decay @ V.T * num_samples**0.5
    return (A + noise * torch.randn(num_samples, d, generator=generator) + offset).float()


def svd(A):
    """U, S, Vᵀ of the centred matrix, and E."""
    A = A.double().numpy()
    U, S, Vt = scipy.linalg.svd(A - A.mean(0), full_matrices=False)
    return U, S, Vt, np.cumsum(S**2) / np.sum(S**2)


def signed(U, S, Vt):
    """Scores and components with the largest entry of each component above zero."""
    signs = np.sign(Vt[np.arange(len(Vt)), np.abs(Vt).argmax(1)])
    return U * S * signs, Vt * signs[:, None]


def test_docstring():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("shape", [(300, 80), (80, 300)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_exact_reduction_is_the_singular_value_decomposition(shape, energy):
    A = layer(*shape, decay=0.7)
    U, S, Vt, E = svd(A)
    k = int(np.argmax(energy < E)) + 1
    reduced = reduce(A, energy)
    assert reduced.scores.shape == (len(A), k) and reduced.energies[-1] > energy
    scores, components = signed(U[:, :k], S[:k], Vt[:k])
    np.testing.assert_allclose(reduced.singular_values, S[:k], rtol=ROUNDING)
    np.testing.assert_allclose(reduced.energies, E[:k], rtol=ROUNDING)
    np.testing.assert_allclose(reduced.mean, A.double().mean(0), rtol=ROUNDING)
    # Directions with neighbouring singular values, 1% apart here, mix by rounding over that gap.
    np.testing.assert_allclose(reduced.components, components, atol=1e-3)
    np.testing.assert_allclose(reduced.scores, scores, atol=1e-3 * S[0])
    np.testing.assert_allclose(reduced.scores @ reduced.components, U[:, :k] * S[:k] @ Vt[:k], atol=1e-4 * S[0])


def test_pca_says_how_much_each_direction_explains():
    from sklearn.decomposition import PCA

    A = layer(200, 30, decay=1.0)
    reduced, pca = reduce(A, 0.95), PCA(0.95, svd_solver="full").fit(A.double().numpy())
    np.testing.assert_allclose(reduced.explained_variance, pca.explained_variance_, rtol=ROUNDING)
    np.testing.assert_allclose(reduced.explained_variance_ratio, pca.explained_variance_ratio_, rtol=ROUNDING)


@pytest.mark.parametrize(("decay", "energy"), [(1.0, 0.9), (0.5, 0.5), (0.3, 0.3)])
def test_a_sketch_finds_as_many_directions_as_there_are_and_their_singular_values(monkeypatch, decay, energy):
    A = layer(700, 600, decay, noise=1e-2)
    _, S, Vt, E = svd(A)
    k = int(np.argmax(energy < E)) + 1
    monkeypatch.setattr(module, "EXACT_LIMIT", 100)
    reduced = reduce(A, energy)
    assert reduced.scores.shape[1] == k
    np.testing.assert_allclose(reduced.singular_values, S[:k], rtol=1e-5)  # stops when S² would change by 2e-5
    overlap = np.linalg.svd(reduced.components.numpy() @ Vt[:k].T, compute_uv=False)
    assert overlap.min() > 0.999  # the squared sine of what is left is the change of S² over the gap beside k, 1%


def test_how_much_singular_values_would_yet_change_is_the_rest_of_a_geometric_series():
    spaces = [torch.tensor([2.0, 1.0 - 0.1**i]).double() for i in (1, 2, 3)]
    assert module.left_to_change(spaces) == pytest.approx(0.001, rel=0.02)  # of 0.999 to 1, relative to each
    assert module.left_to_change([spaces[0]] * 3) == 0
    assert module.left_to_change(spaces[::-1]) == module.left_to_change(spaces[:2]) == math.inf
    assert module.left_to_change([spaces[0][:1], *spaces[1:]]) == math.inf  # one of them had no second one yet


def test_no_digit_of_the_mean_is_lost_where_it_is_taken_off_in_float32():
    generator = torch.Generator().manual_seed(0)
    A = (torch.randn(500, 40, generator=generator) * torch.logspace(-2, 2, 40) + 1e4).float()
    centred = module.without_mean(A)
    exact = A.double() - centred.mean
    torch.testing.assert_close(centred.matrix.double(), exact, rtol=2.4e-7, atol=0)  # two roundings
    assert float(centred.energy) == pytest.approx(float(exact.square().sum()), rel=1e-6)


def test_a_sketch_depends_on_its_seed_alone_and_stops_at_the_most_directions(monkeypatch):
    monkeypatch.setattr(module, "EXACT_LIMIT", 100)
    A = layer(800, 700, decay=0.0, noise=1.0)
    first, second = reduce(A, 0.9, max_directions=20, seed=1), reduce(A, 0.9, max_directions=20, seed=1)
    assert torch.equal(first.scores, second.scores)
    assert first.scores.shape[1] == 20 and first.energies[-1] < 0.9
    # White noise has the flattest spectrum that there is: a change of 1e-5 may recur many times.
    np.testing.assert_allclose(first.singular_values, svd(A)[1][:20], rtol=1e-3)
    assert reduce(A, 0.01, max_directions=20).scores.shape[1] < 20


def test_singular_values_of_white_noise_end_at_the_edges_of_marchenko_and_pastur():
    num_samples, d = 2000, 500
    A = torch.randn(num_samples, d, generator=torch.Generator().manual_seed(0))
    variances = reduce(A, 1 - 1e-9).explained_variance
    low, high = ((1 + sign * (d / num_samples) ** 0.5) ** 2 for sign in (-1, 1))
    # The outermost eigenvalue fluctuates by N^(-2/3), 0.6%.
    assert variances[0] == pytest.approx(high, rel=0.03) and variances[-1] == pytest.approx(low, rel=0.05)


def test_orthogonal_directions_scores_of_mean_0_and_a_positive_largest_entry():
    reduced = reduce(layer(150, 60, decay=0.5), 0.95)
    k = len(reduced.singular_values)
    V = reduced.components
    torch.testing.assert_close(V @ V.T, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(
        reduced.scores.T @ reduced.scores, reduced.singular_values.square().diag(), atol=1e-4, rtol=0
    )
    assert reduced.scores.mean(0).abs().max() < ROUNDING * reduced.singular_values[0]
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_an_offset_of_all_activations_changes_nothing(offset):
    A = layer(200, 50, decay=1.0, offset=0.0)
    shifted = reduce(A.double() + offset, 0.95)
    expected = reduce(A.double(), 0.95)
    np.testing.assert_allclose(shifted.singular_values, expected.singular_values, rtol=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("filter_class", [None, 2])
def test_the_filter_keeps_what_fires_on_average_in_some_class(threshold, filter_class):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 40, generator=generator) * torch.linspace(0, 1, 40) * (torch.arange(40) % 3 > 0)
    y = torch.arange(60) % 4
    classes = range(4) if filter_class is None else [filter_class]
    expected = [any(A[y == c, j].abs().mean() > threshold for c in classes) for j in range(40)]
    reduced = reduce(A, 0.9, threshold, y, filter_class=filter_class)
    assert reduced.kept.tolist() == expected
    assert reduced.components.shape[1] == len(reduced.mean) == sum(expected)


def test_what_never_fires_changes_no_score():
    A = layer(100, 30, decay=0.5)
    with_dead = torch.cat([A[:, :10], torch.zeros(100, 5), A[:, 10:]], 1)
    assert torch.equal(reduce(with_dead).scores, reduce(A).scores)


def test_arrays_of_any_shape_give_arrays():
    A = layer(50, 24, decay=0.5)
    found = reduce(A.numpy().reshape(50, 2, 3, 4), labels=np.arange(50) % 2)
    assert all(isinstance(part, np.ndarray) for part in found)
    np.testing.assert_array_equal(found.scores, reduce(A).scores.numpy())


@pytest.mark.parametrize(
    ("A", "options", "told"),
    [
        (torch.randn(9, 4), {"energy": 1.0}, "energy 1.0 is not allowed"),
        (torch.randn(9, 4), {"threshold": 99.0}, "none is left"),
        (torch.zeros(9, 4), {}, "none is left"),
        (torch.full((9, 4), 0.1), {}, "same activations"),
        (torch.randn(9), {}, "their shape is"),
        (torch.randn(9, 4), {"labels": torch.zeros(8)}, "There are 9 samples, and labels of shape"),
        (torch.randn(9, 4), {"labels": torch.zeros(9), "filter_class": 3}, "no sample of class 3"),
    ],
)
def test_what_cannot_be_reduced_is_one_sentence(A, options, told):
    with pytest.raises(UserError, match=told):
        reduce(A, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error(value):
    A = torch.randn(9, 4)
    A[3, 2] = value
    with pytest.raises(NotFinite):
        reduce(A)


def test_activations_of_a_network_outside_of_no_grad_are_reduced_alike():
    A = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    with_graph = A.clone().requires_grad_() * 1
    assert torch.equal(reduce(with_graph).scores, reduce(A).scores)
    assert not reduce(with_graph).scores.requires_grad
