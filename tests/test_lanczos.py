"""Krylov spaces against dense matrices, and what they rule out against eigenvalues that they have not seen."""

import math

import pytest
import torch
from test_operators import SPIKED, of_values

from measures.lanczos import PRECISE, Lanczos, Limits, quadrature
from measures.operators import Density


def grown(product, start, steps, dtype=torch.float64):
    space = Lanczos(product, start, dtype)
    while space.size < steps and space.step():
        pass
    return space


def random(size, seed=0):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_no_false_copies_of_a_large_eigenvalue():
    """Without orthogonalisation a Lanczos basis of this length finds 1000 several times."""
    operator, _ = of_values([1000.0, *torch.linspace(0, 1, 199).tolist()], torch.float32)
    space = Lanczos(operator.matvec, torch.ones(200), torch.float32)
    while space.size < 120 and space.step():
        pass
    assert int((space.ritz()[0] > 500).sum()) == 1


def test_a_small_basis_is_restarted_and_finds_the_same(monkeypatch):
    operator, H = of_values(torch.linspace(0, 1, 400) ** 2)
    space = Lanczos(operator.matvec, operator._start(0), torch.float64)
    for _ in range(600):
        space.step()
        if space.size >= 25:
            space.restart(10)
    exact = torch.linalg.eigvalsh(H).flip(0)[:3]
    theta, _, residuals = space.ritz()
    assert (residuals[:3] < 1e-6).all()
    torch.testing.assert_close(theta[:3], exact, rtol=0, atol=1e-10)


def test_what_a_space_knows_of_trace_and_norm_is_that_of_the_matrix_in_it():
    operator, H = of_values(SPIKED)
    operator.extremes(3, 1)
    Q = operator.space.basis
    trace, square = operator.space.known()
    assert trace == pytest.approx(float((Q @ H @ Q.T).trace()))
    assert square == pytest.approx(float((H @ Q.T).square().sum()))


def test_a_space_restarted_at_both_ends_keeps_them():
    operator, H = of_values(torch.linspace(-1, 1, 400) ** 3)
    space = Lanczos(operator.matvec, operator._start(0), torch.float64)
    for _ in range(600):
        space.step()
        if space.size >= 40:
            space.restart(9, 7)
    exact = torch.linalg.eigvalsh(H).flip(0)
    theta, _, residuals = space.ritz()
    assert (residuals[[0, 1, -2, -1]] < 1e-6).all()
    torch.testing.assert_close(theta[[0, 1, -2, -1]], exact[[0, 1, -2, -1]], rtol=0, atol=1e-10)
    Q = space.basis
    assert space.known() == pytest.approx((float((Q @ H @ Q.T).trace()), float((H @ Q.T).square().sum())))


def test_quadrature_of_a_krylov_space_by_hand():
    """From (1, 1)/√2, diag(1, 3) has T = [[2, 1], [1, 2]]: nodes 3 and 1 with weights 1/2."""
    d = torch.tensor([1.0, 3.0], dtype=torch.float64)
    space = Lanczos(lambda v: d * v, torch.ones(2, dtype=torch.float64), torch.float64)
    while space.step():
        pass
    torch.testing.assert_close(space.T, torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    nodes, weights = quadrature(space)
    assert Density(nodes[None], weights[None]).moments()[0].value == pytest.approx(2)
    assert nodes.tolist() == pytest.approx([3, 1]) and weights.tolist() == pytest.approx([0.5, 0.5])


def test_a_basis_is_orthogonal_to_a_hundred_roundings_in_float32_too():
    values = torch.cat([torch.tensor([50.0, 40.0, 30.0]), torch.linspace(-1, 1, PRECISE)])
    space = grown(lambda v: values * v, random(len(values)).float(), 40, torch.float32)
    assert space.basis.dtype == torch.float32
    Q = space.basis.double()
    products = Q @ Q.T
    assert (products - products.diagonal().diag()).abs().max() < 100 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(products.diagonal(), torch.ones(40).double(), rtol=1e-4, atol=0)  # sums of float32
    # QHQᵀ is what the steps have put together, to the same rounding of the largest eigenvalue
    torch.testing.assert_close((Q * values.double()) @ Q.T, space.T, rtol=0, atol=100 * 50 * 1.2e-7)


def test_limits_lie_past_what_is_counted_and_a_margin():
    values = torch.tensor([5.0, 4.0, 1.0, -2.0])
    assert Limits.beyond(values, 2, 1, 0.5) == (-2.5, 4.5)
    assert Limits.beyond(values, 0, 0, 0.5) == (-math.inf, math.inf)  # nothing is looked for
    assert Limits.beyond(values, 5, 5, 0.5) == (math.inf, -math.inf)  # anything is
    assert Limits(-2.5, 4.5).passed(values) == (True, False)


@pytest.mark.parametrize("weight", [1e-9, 1e-3, 0.0])
def test_where_the_rest_keeps_the_narrowed_limits_no_eigenvalue_lies_beyond_the_old(weight):
    """One that the start hardly has, 1.5 beside 2 and 1, is seen in the rest of the matrix while it is not found."""
    values = torch.cat([torch.tensor([2.0, 1.5, 1.0]), torch.linspace(-0.5, 0.5, 197)]).double()
    start = random(200)
    start[1] = weight * start.norm()
    limits, kept = Limits(-math.inf, 1.01), set()
    for steps in range(6, 40):
        space = grown(lambda v: values * v, start, steps)
        basis = torch.linalg.qr(space.basis.T, mode="complete").Q[:, steps:]  # (n, n - m)
        largest = torch.linalg.eigvalsh(basis.T * values @ basis)[-1]
        theta = space.ritz()[0]
        if theta[1] > 1.01:
            break  # it is found
        narrowed = space.narrowed(limits, 1, 0)
        assert narrowed.upper < limits.upper
        assert largest > narrowed.upper  # as there is an eigenvalue beyond the old limits
        # without that one the limits are kept as soon as the space has seen what there is
        others = grown(lambda v: values * v * (values != 1.5), start, steps)
        basis = torch.linalg.qr(others.basis.T, mode="complete").Q[:, steps:]
        rest = torch.linalg.eigvalsh(basis.T * (values * (values != 1.5)) @ basis)[-1]
        kept.add(bool(rest < others.narrowed(limits, 1, 0).upper))
    assert True in kept


def test_an_eigenvalue_has_at_most_the_share_of_the_start_that_is_said():
    values = torch.cat([torch.tensor([3.0]), torch.linspace(-1, 1, 199)]).double()
    for share in (1e-4, 1e-8, 1e-16):
        start = random(200)
        start[0] = 0
        start[0] = math.sqrt(share) * start.norm()
        for steps in range(1, 12):
            space = grown(lambda v: values * v, start, steps)
            if space.ritz()[0][0] < 2.9:
                assert space.share_at_most(3.0) >= share / (1 + share) * (1 - 1e-6)
                assert space.share_at_most(3.0) <= space.share_at_most(2.95)
    assert space.share_at_most(0.0) == 1
    # by hand: from (1, 1)/√2, diag(1, -1) has T = [[0]] and β = 1 after a step: at 2 at most (1/2)²
    d = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert grown(lambda v: d * v, torch.ones(2, dtype=torch.float64), 1).share_at_most(2.0) == pytest.approx(0.25)


def test_a_random_direction_has_little_of_an_eigenvector_as_seldom_as_is_said():
    """P(χ² < ε) ≤ sqrt(2 ε / π), which is nearly reached: 0.080 for ε = 0.01."""
    directions = torch.randn(20_000, 100, generator=torch.Generator().manual_seed(0))
    shares = directions[:, 0].square() / directions.square().sum(1)
    seldom = float((shares < 0.01 / 100).double().mean())
    assert seldom == pytest.approx(math.sqrt(2 * 0.01 / math.pi), abs=4 * math.sqrt(0.08 / 20_000))
