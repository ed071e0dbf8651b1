"""CKA and the alignment of classes against their definitions."""

import doctest
import math

import numpy as np
import pytest
import torch

from measures import similarity as module
from measures.similarity import alignment, cka, cka_matrix, mean_over_pairs
from run.errors import UserError

KERNEL = 1e-4  # kernels are products in float32, a mean of 65,536 of them rounds to far less


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hsic(K, L):
    """Song et al. 2012, equation 5, word for word."""
    n = len(K)
    K, L = (X - np.diag(np.diag(X)) for X in (K, L))
    one = np.ones(n)
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + middle - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))


def definition(x, y):
    K, L = (z.double().numpy() @ z.double().numpy().T for z in (x, y))
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def test_docstring():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("batch_size", [120, 500])
def test_cka_of_all_samples_at_once_is_its_definition(batch_size):
    x = normal(120, 8)
    y = x[:, :5] + 0.5 * normal(120, 5, seed=1)
    assert cka(x, y, batch_size) == pytest.approx(definition(x, y), rel=KERNEL)


def test_cka_in_batches_is_the_ratio_of_means_over_them():
    x, y = normal(90, 6), normal(90, 6).relu()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(module.seed_from("cka", 0)))
    sums = np.zeros(3)
    for part in order.tensor_split(3):
        K, L = (z[part].double().numpy() @ z[part].double().numpy().T for z in (x, y))
        sums += hsic(K, L), hsic(K, K), hsic(L, L)
    assert cka(x, y, 30) == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=KERNEL)


def test_cka_of_a_layer_with_itself_rotated_scaled_and_shifted_is_1():
    x = normal(300, 20)
    rotation = torch.linalg.qr(normal(20, 20, seed=1)).Q
    for other in (x, -0.01 * x @ rotation, x + 1e3):
        assert cka(x, other) == pytest.approx(1, abs=1e-3)  # at 1e3 float32 keeps x to 6e-5


def test_cka_of_independent_features_is_0_on_average():
    found = [cka(normal(200, 50, seed=i), normal(200, 50, seed=100 + i)) for i in range(20)]
    assert abs(np.mean(found)) < 5 * np.std(found) / math.sqrt(20) and min(found) < 0


def test_batches_of_a_file_with_one_class_after_another_hold_all_classes():
    means = 10 * normal(4, 8, seed=2)
    x = means[torch.arange(400) // 100] + normal(400, 8)
    y = means[torch.arange(400) // 100] + normal(400, 8, seed=1)
    assert cka(x, y, 100) == pytest.approx(definition(x, y), abs=0.02) and cka(x, y, 100) > 0.9


def test_a_matrix_of_layers_is_symmetric_with_ones_and_pairs_as_cka():
    layers = [normal(150, 10), normal(150, 10).relu(), normal(150, 3, seed=1)]
    matrix = cka_matrix(layers)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert float(matrix[0, 1]) == pytest.approx(cka(layers[0], layers[1]), rel=1e-12)


def test_activations_of_a_network_outside_of_no_grad_are_compared_alike():
    x, y = normal(60, 8), normal(60, 5, seed=1)
    with_graph = [x.clone().requires_grad_() * 1, y.clone().requires_grad_() * 1]
    assert cka(*with_graph) == cka(x, y)
    labels = torch.arange(60) % 2
    assert torch.equal(alignment(with_graph[0], labels), alignment(x, labels))


def test_cka_of_a_constant_layer_is_not_defined():
    assert math.isnan(cka(torch.ones(20, 3), normal(20, 3)))


@pytest.mark.parametrize(("x", "y"), [(normal(3, 2), normal(3, 2)), (normal(9, 2), normal(8, 2))])
def test_what_has_no_cka_is_one_sentence(x, y):
    with pytest.raises(UserError, match="CKA"):
        cka(x, y)


def aligned(A, y, k):
    """The definition: mean squared cosine of the principal angles of SciPy."""
    import scipy.linalg

    bases = []
    for c in range(int(y.max()) + 1):
        h = A[y == c].double().numpy()
        bases.append(np.linalg.svd(h - h.mean(0), full_matrices=False)[2][:k].T)
    cosines = [[np.cos(scipy.linalg.subspace_angles(V, W)) for W in bases] for V in bases]
    return np.mean(np.square(cosines), axis=2)


@pytest.mark.parametrize("d", [30, 400])
def test_alignment_is_the_mean_squared_cosine_of_principal_angles(d):
    A, y = normal(400, d) * torch.arange(1, d + 1) ** -0.5, torch.arange(400) % 3
    np.testing.assert_allclose(alignment(A, y, 5), aligned(A, y, 5), atol=1e-5)


def test_alignment_of_large_classes_is_the_same_from_a_sketch(monkeypatch):
    A, y = normal(400, 300) * torch.arange(1, 301) ** -0.5, torch.arange(400) % 2
    monkeypatch.setattr(module, "SMALL_CLASS", 50)
    np.testing.assert_allclose(alignment(A, y, 5), aligned(A, y, 5), atol=1e-4)  # S² changed by less than 1e-6


def test_alignment_of_one_subspace_is_1_and_of_random_ones_k_over_d():
    A = normal(200, 40) * (torch.arange(40) < 4)
    assert alignment(A, torch.arange(200) % 2, 4)[0, 1] == pytest.approx(1, abs=1e-6)
    found = mean_over_pairs(alignment(normal(2000, 40), torch.arange(2000) % 10, 8))
    assert found == pytest.approx(8 / 40, rel=0.1)  # 45 pairs whose shares spread by a tenth each


def test_classes_without_directions_have_no_alignment():
    A = torch.cat([normal(20, 6), torch.ones(5, 6)])
    found = alignment(A, torch.tensor([0] * 10 + [2] * 10 + [3] * 5))
    assert found[1].isnan().all() and found[3].isnan().all()
    assert found[0, 2] == pytest.approx(1)  # ten samples in six dimensions span all of them
    assert mean_over_pairs(found) == pytest.approx(1) and math.isnan(mean_over_pairs(found[:1, :1]))
