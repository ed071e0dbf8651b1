import math

import pytest
import torch

from measures.spectra import matrix_figures, nmf, pca, power_law, singular_values
from run.errors import UserError


def test_figures_of_a_matrix_solved_by_hand():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    figures = matrix_figures(singular_values(A), A.shape)
    p = [3 / 6, 2 / 6, 1 / 6]
    assert figures == pytest.approx(
        {
            "rank": 3,
            "stable_rank": 14 / 9,
            "effective_rank": math.exp(-sum(q * math.log(q) for q in p)),
            "participation": 14**2 / (81 + 16 + 1),
            "condition": 3,
            "fro": math.sqrt(14),
            "spectral": 3,
            "nuclear": 6,
        }
    )


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_figures_equal_what_torch_says_of_the_matrix(shape, dtype):
    A = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    A[:, 0] = A[:, 1]  # one dimension less
    figures = matrix_figures(singular_values(A), shape, torch.finfo(dtype).eps)
    assert figures["rank"] == int(torch.linalg.matrix_rank(A))
    B = A.double()
    assert figures["fro"] == pytest.approx(float(torch.linalg.matrix_norm(B)), rel=1e-12)
    assert figures["nuclear"] == pytest.approx(float(torch.linalg.matrix_norm(B, "nuc")), rel=1e-6)
    assert figures["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(B, 2)), rel=1e-12)


def test_a_matrix_of_zeros_has_rank_and_norms_0_and_the_rest_undefined():
    figures = matrix_figures(torch.zeros(3), (3, 4))
    assert [figures[name] for name in ("rank", "fro", "spectral", "nuclear")] == [0, 0, 0, 0]
    assert all(math.isnan(figures[name]) for name in ("stable_rank", "effective_rank", "participation", "condition"))


def test_singular_values_of_a_batch_are_those_of_each():
    A = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    # both in float64, from AAᵀ: rounding of σ² relative to σ_1², 1e-16, against σ_3 / σ_1 of at least 0.1
    torch.testing.assert_close(singular_values(A), torch.linalg.svdvals(A.double()), rtol=1e-10, atol=0)


def test_a_power_law_is_found_again():
    # 20,000 values of exponent 2.5 by its quantiles, above a body that follows no power law
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tail = 2.0 * (1 - u) ** (-1 / 1.5)
    subset = tail[::20]
    found = power_law(torch.cat([subset, torch.linspace(0.1, 1.9, 300, dtype=torch.float64)]))
    assert found.exponent == pytest.approx(2.5, abs=0.1)  # standard error 1.5 / sqrt(1000) = 0.05
    assert found.start == pytest.approx(2.0, rel=0.15)


def test_the_power_law_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    found = power_law(x)
    assert found.num == 5 and found.exponent == pytest.approx(1 + 5 / (10 * math.log(2)))


def test_no_power_law_of_four_values():
    assert math.isnan(power_law(torch.tensor([1.0, 2.0, 3.0, 4.0])).exponent)


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA

    A = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts, other = pca(A, 3), PCA(3, svd_solver="full").fit(A.numpy())
    torch.testing.assert_close(parts.shares, torch.from_numpy(other.explained_variance_ratio_))
    torch.testing.assert_close(parts.components.abs(), torch.from_numpy(other.components_).abs())
    rebuilt = parts.mean + parts.scores @ parts.components
    error = torch.linalg.matrix_norm(A - rebuilt) / torch.linalg.matrix_norm(A - A.mean(0))
    assert parts.error == pytest.approx(float(error))
    assert (parts.components.gather(1, parts.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_nmf_finds_factors_of_a_product_of_factors():
    generator = torch.Generator().manual_seed(0)
    W, H = torch.rand(20, 2, generator=generator), torch.rand(2, 15, generator=generator)
    parts = nmf(W @ H, 2)
    assert parts.error < 0.01 and (parts.scores >= 0).all() and (parts.components >= 0).all()
    assert nmf(W @ H, 1).error > parts.error


def test_nmf_refuses_negative_numbers_and_too_many_parts():
    with pytest.raises(UserError, match="without negative numbers, and the least here is -1"):
        nmf(torch.tensor([[1.0, -1.0]]), 1)
    with pytest.raises(UserError, match="nmf:3 of a matrix of 2 × 4: at most 2"):
        nmf(torch.ones(2, 4), 3)
