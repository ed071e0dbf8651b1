import math

import pytest
import torch

from measures.operators import SECOND_LOOK, Rectangular, Symmetric
from run.errors import NotFinite, UserError


def of_values(values, dtype=torch.float64, dense=0, seed=0):
    """The symmetric matrix with these eigenvalues, in a random basis, and its dense form."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64,
                                       generator=torch.Generator().manual_seed(seed)))  # fmt: skip
    H = (Q * values) @ Q.T
    A = H.to(dtype)
    return Symmetric(lambda v: A @ v, len(values), dtype=dtype, dense=dense), H


SPIKED = torch.cat([torch.tensor([9.0, 7.0, 4.0]), torch.linspace(-1, 1, 297)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_and_bottom_are_those_of_the_dense_matrix(dtype):
    operator, H = of_values(SPIKED, dtype)
    exact = torch.linalg.eigvalsh(H).flip(0)
    top, bottom = operator.top(3), operator.bottom(2, tol=1e-4)
    # an eigenvalue's error is the square of the residual over the gap: (1e-3 · 9)² / 2 at most, 5e-6 of the largest
    torch.testing.assert_close(top.values, exact[:3], rtol=0, atol=1e-5 * 9)
    torch.testing.assert_close(bottom.values, exact[-2:].flip(0), rtol=0, atol=1e-3)
    for found in (top, bottom):
        vectors = found.vectors.double()
        true = torch.linalg.vector_norm(vectors @ H - found.values[:, None] * vectors, dim=1) / 9
        # what is reported is true, up to rounding of the products
        torch.testing.assert_close(true, found.residuals, rtol=0.01, atol=2e-6)
        assert (found.residuals <= 1e-3).all()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-5)


def test_both_ends_from_one_search_are_those_of_two_and_take_fewer_products():
    one, _ = of_values(SPIKED)
    two, _ = of_values(SPIKED)
    top, bottom = one.extremes(3, 2)
    largest, least = two.top(3), two.bottom(2)
    # each within its residual, 1e-3 of the largest
    torch.testing.assert_close(top.values, largest.values, rtol=0, atol=1e-3 * 9)
    torch.testing.assert_close(bottom.values, least.values, rtol=0, atol=1e-3 * 9)
    assert (bottom.values[0] <= bottom.values[1]) and (torch.cat([top.residuals, bottom.residuals]) <= 1e-3).all()
    assert one.num_products < two.num_products
    copies, _ = of_values([5.0] * 2 + [0.5] * 100 + [-3.0] * 3)
    top, bottom = copies.extremes(3, 4)
    assert top.values.tolist() == pytest.approx([5, 5, 0.5], abs=1e-5)
    assert bottom.values.tolist() == pytest.approx([-3, -3, -3, 0.5], abs=1e-5)
    few, _ = of_values([2.0, 1.0, -1.0])
    top, bottom = few.extremes(3, 2)
    assert top.values.tolist() == pytest.approx([2, 1, -1]) and bottom.values.tolist() == pytest.approx([-1, 1])


def test_an_eigenvalue_with_copies_is_found_as_often_as_it_is_there():
    operator, _ = of_values([5.0] * 3 + [4.0] * 2 + [0.5] * 200)
    assert operator.top(6).values.tolist() == pytest.approx([5, 5, 5, 4, 4, 0.5], abs=1e-5)


def test_a_copy_is_found_among_others_of_its_size():
    """As an untrained MLP has them."""
    outliers = [0.589, 0.589, 0.562, 0.515, 0.501, 0.493, 0.478, 0.441, 0.427, 0.403]
    values = torch.cat([torch.tensor(outliers), torch.linspace(-1, 1, 5000) ** 3 * 0.27]).double()
    for seed in range(5):
        operator = Symmetric(lambda v: values * v, len(values), dtype=torch.float64, dense=0, seed=seed)
        assert operator.top(5).values.tolist() == pytest.approx(outliers[:5], abs=1e-5)


def test_the_second_look_ends_as_soon_as_a_copy_would_have_been_seen():
    values = torch.cat([torch.tensor([90.0, 80.0, 70.0]), torch.linspace(-1, 1, 2997)])
    operator = Symmetric(lambda v: values.to(v) * v, len(values), dtype=torch.float64, dense=0)
    assert operator.top(3).values.tolist() == pytest.approx([90, 80, 70], abs=1e-3)
    assert 0 < operator.num_products - operator.space.size < SECOND_LOOK / 2


def test_all_eigenvalues_of_a_matrix_with_few_different_ones():
    operator, _ = of_values([3.0, 2.0, 2.0, 1.0, 1.0, 0.0])
    assert operator.top(6).values.tolist() == pytest.approx([3, 2, 2, 1, 1, 0], abs=1e-9)


def test_up_to_the_dense_limit_everything_is_exact():
    operator, H = of_values(SPIKED, dense=300)
    exact = torch.linalg.eigvalsh(H).flip(0)
    torch.testing.assert_close(operator.top(4).values, exact[:4])
    torch.testing.assert_close(operator.bottom(2).values, exact[-2:].flip(0))
    assert operator.trace() == (pytest.approx(float(SPIKED.sum())), 0.0)
    assert operator.fro().value == pytest.approx(float(SPIKED.norm()))
    density = operator.density()
    torch.testing.assert_close(density.nodes[0], exact)
    assert operator.num_products == 300  # and built once


def test_trace_and_norm_lie_within_their_errors():
    operator, _ = of_values(SPIKED)
    trace, fro = operator.trace_and_fro(100)
    assert trace.error > 0  # beyond four standard errors lies one estimate in 16,000
    assert abs(trace.value - float(SPIKED.sum())) < 4 * trace.error
    assert abs(fro.value - float(SPIKED.norm())) < 4 * fro.error


def test_a_trace_beside_known_eigenvectors_is_surer():
    operator, _ = of_values(SPIKED)
    operator.top(3)
    plain, deflated = operator.trace(50), operator.trace(50, operator.space)
    assert deflated.error < plain.error / 1.5
    assert abs(deflated.value - float(SPIKED.sum())) < 4 * deflated.error


def test_the_density_is_exact_with_as_many_steps_as_different_eigenvalues():
    values = torch.tensor([4.0] * 10 + [1.0] * 30 + [-2.0] * 60)
    operator, _ = of_values(values)
    density = operator.density(steps=3, probes=3)
    torch.testing.assert_close(density.nodes, torch.tensor([[4.0, 1.0, -2.0]] * 3, dtype=torch.float64))
    torch.testing.assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_densitys_moments_are_those_of_the_eigenvalues():
    operator, _ = of_values(SPIKED)
    density = operator.density(steps=30, probes=20)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(20, dtype=torch.float64))
    mean, square = density.moments()
    assert abs(mean.value - float(SPIKED.mean())) < 4 * mean.error
    assert abs(square.value - float(SPIKED.square().mean())) < 4 * square.error


def test_the_wigner_semicircle_is_seen():
    """Quantiles of the density of a random symmetric matrix are those of the semicircle."""
    n = 1500
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A = (A + A.T) / math.sqrt(2 * n)  # semicircle on [-2, 2]
    density = Symmetric(lambda v: A @ v, n, dtype=torch.float64, dense=0).density(60, 5)
    share = float((density.weights * (density.nodes.abs() < 1)).sum(1).mean())
    assert share == pytest.approx(1 / 3 + math.sqrt(3) / (2 * math.pi), abs=0.04)  # 0.609; a node has about 1/60


def test_the_search_for_eigenvalues_has_seen_the_density():
    operator, _ = of_values(SPIKED)
    operator.top(3)
    before = operator.num_products
    seen = operator.seen()
    assert operator.num_products == before
    torch.testing.assert_close(seen.weights.sum(1), torch.ones(1, dtype=torch.float64))
    assert float(seen.nodes.max()) == pytest.approx(9, abs=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    one, two, three = (of_values(SPIKED)[0] for _ in range(3))
    three.seed = 1
    assert one.trace(5) == two.trace(5) != three.trace(5)


def test_what_cannot_be_is_refused():
    operator, _ = of_values([1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="has 3 eigenvalues, not 4"):
        operator.top(4)
    with pytest.raises(UserError, match=r"a matrix of 3 rows is not built: at most 0 \(--look-dense\)"):
        operator.matrix()
    with pytest.raises(NotFinite, match="infinite or nan"):
        Symmetric(lambda v: v * math.nan, 3, dense=0).top(1)


def test_a_matrix_of_zeros_has_eigenvalues_0():
    operator = Symmetric(lambda v: 0 * v, 50, dense=0)
    assert operator.top(2).values.tolist() == [0, 0]
    assert operator.trace(3).value == 0 and operator.density(5, 2).weights.sum().item() == 2


def test_singular_values_of_a_rectangle_known_by_products():
    B = torch.randn(40, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    B[:, 0] *= 20
    exact = torch.linalg.svdvals(B)
    for A in (B, B.T.contiguous()):
        options = {"dtype": torch.float64}
        iterative = Rectangular(lambda v, A=A: A @ v, lambda u, A=A: A.T @ u, tuple(A.shape), dense=0, **options)
        dense = Rectangular(lambda v, A=A: A @ v, lambda u, A=A: A.T @ u, tuple(A.shape), **options)
        torch.testing.assert_close(dense.matrix(), A)
        torch.testing.assert_close(dense.top(4), exact[:4])
        torch.testing.assert_close(iterative.top(4, 1e-6), exact[:4], rtol=1e-8, atol=0)
        assert abs(iterative.fro(100).value - float(exact.norm())) < 4 * iterative.fro(100).error
