"""What a matrix is like, from its singular values or eigenvalues: its ranks, norms, parts, and the tail's power law.

Letters: A a matrix (n × m), σ_1 ≥ σ_2 ≥ … its singular values, λ eigenvalues, k parts.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from run.errors import UserError

FLOAT32_EPS = torch.finfo(torch.float32).eps
FLOAT64_EPS = torch.finfo(torch.float64).eps
LEAST_TAIL = 5  # values that a power law is fitted to
NMF_STEPS = 500


def default_tolerance(size: int, dtype: torch.dtype) -> float:
    """Relative to σ_1: what rounding to float32 leaves in a matrix of this size, or to a coarser type."""
    return max(size * FLOAT32_EPS, torch.finfo(dtype).eps)


def ranks_of(squares: Tensor, energy: Tensor, tolerance: float, vanishes: bool) -> dict[str, float]:
    """Numerical, stable and effective rank from the σ² in ascending order and ‖·‖_F²."""
    if vanishes:
        return {"numerical": 0.0, "stable": math.nan, "effective": math.nan}
    largest = squares[-1]
    sigma = resolved(squares).sqrt()
    p = sigma / sigma.sum()
    return {
        "numerical": float((sigma > tolerance * sigma[-1]).sum()),
        "stable": float(energy / largest),
        "effective": float(torch.exp(torch.special.entr(p).sum())),
    }


def resolved(squares: Tensor) -> Tensor:
    """The σ² in ascending order, with 0 for those that are nothing but rounding errors of the largest."""
    return torch.where(squares > len(squares) * FLOAT64_EPS * squares[-1], squares, 0)


def spectrum(squares: Tensor) -> Tensor:
    """The singular values in descending order, float32, from their squares in ascending order."""
    return resolved(squares).sqrt().flip(0).float()


def singular_values(A: Tensor) -> Tensor:
    """All singular values of a matrix (or of each of a batch of them), descending, float64.

    From float32 or coarser by AAᵀ or AᵀA, whichever is smaller: that resolves σ down to 1e-8 σ_1, finer than the
    numbers.
    """
    if A.dtype == torch.float64:
        return torch.linalg.svdvals(A)
    A = A.double()
    squares = torch.linalg.eigvalsh(A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A)
    return squares.clamp(min=0).sqrt().flip(-1)


def matrix_figures(sigma: Tensor, shape: tuple[int, int], eps: float = FLOAT32_EPS) -> dict[str, float]:
    """Ranks and norms of a matrix of this shape from all its singular values, in descending order.

    - `rank`: the numerical one, how many σ exceed max(shape) eps σ_1; eps is that of the numbers the matrix came from
    - `stable_rank` ‖A‖_F² / σ_1², `effective_rank` exp(entropy of σ / Σ σ), `participation` (Σ λ)² / Σ λ² of λ = σ²
    - `condition` σ_1 / σ_r, r the numerical rank
    - `fro`, `spectral`, `nuclear`: the norms sqrt(Σ σ²), σ_1, Σ σ

    Of a matrix of zeros the rank and the norms are 0, the rest nan.

    >>> figures = matrix_figures(torch.tensor([2.0, 1.0, 0.0]), (3, 3))
    >>> figures["rank"], figures["stable_rank"], figures["condition"], figures["nuclear"]
    (2.0, 1.25, 2.0, 3.0)
    """
    sigma = sigma.double()
    squares, largest = sigma.square(), sigma[0]
    norms = {"fro": float(squares.sum().sqrt()), "spectral": float(largest), "nuclear": float(sigma.sum())}
    if not largest > 0:
        undefined = ("stable_rank", "effective_rank", "participation", "condition")
        return {"rank": 0.0 if largest == 0 else math.nan, **dict.fromkeys(undefined, math.nan), **norms}
    rank = int((sigma > max(shape) * eps * largest).sum())
    p = sigma / sigma.sum()
    lam = squares / squares[0]
    return {
        "rank": float(rank),
        "stable_rank": float(lam.sum()),
        "effective_rank": float(torch.exp(torch.special.entr(p).sum())),
        "participation": float(lam.sum().square() / lam.square().sum()),
        "condition": float(largest / sigma[rank - 1]),
        **norms,
    }


class Tail(NamedTuple):
    """A power law p(λ) ∝ λ^-exponent of the `num` values from `start` on; `distance` is Kolmogorov-Smirnov's."""

    exponent: float
    start: float
    num: int
    distance: float


def power_law(values: Tensor) -> Tail:
    """The power law of the values' tail, by maximum likelihood (Clauset, Shalizi & Newman 2009).

    For each candidate start s among the values, with the n values x ≥ s, exponent = 1 + n / Σ log(x / s); the start is
    the one whose law is nearest to the values in Kolmogorov-Smirnov distance. nan with fewer than five values.
    """
    x = values[values > 0].double().sort().values.cpu()
    best = Tail(math.nan, math.nan, 0, math.inf)
    for i in range(len(x) - LEAST_TAIL + 1):
        tail = x[i:]
        logs = (tail / tail[0]).log().sum()
        if logs <= 0:
            continue
        n = len(tail)
        exponent = 1 + n / float(logs)
        law = 1 - (tail / tail[0]) ** (1 - exponent)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())
        if distance < best.distance:
            best = Tail(exponent, float(tail[0]), n, distance)
    return best if best.num else Tail(math.nan, math.nan, 0, math.nan)


class Parts(NamedTuple):
    """A ≈ scores @ components, k parts; PCA's with the mean, and shares of the variance, NMF's with the error."""

    scores: Tensor  # (n, k)
    components: Tensor  # (k, m)
    mean: Tensor  # (m,)
    shares: Tensor  # (k,) of the variance, of PCA
    error: float  # ‖A - mean - scores components‖_F / ‖A - mean‖_F


def pca(A: Tensor, k: int) -> Parts:
    """Principal components of a matrix's rows; in each, the largest entry is positive."""
    A = A.double()
    mean = A.mean(0)
    U, S, Vt = torch.linalg.svd(A - mean, full_matrices=False)
    U, S, Vt = U[:, :k], S, Vt[:k]
    signs = Vt.gather(1, Vt.abs().argmax(1, keepdim=True)).sign()
    energy = S.square().sum()
    shares = S[:k].square() / energy
    error = math.sqrt(max(0.0, 1 - float(shares.sum()))) if energy > 0 else math.nan
    return Parts(U * S[:k] * signs.T, Vt * signs, mean, shares, error)


def nmf(A: Tensor, k: int, seed: int = 0) -> Parts:
    """Non-negative factors of a matrix without negative numbers, by scikit-learn; `error` is that of reconstruction."""
    if (A < 0).any():
        raise UserError(f"nmf needs a matrix without negative numbers, and the least here is {float(A.min()):.3g}")
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    if k > min(A.shape):
        raise UserError(f"nmf:{k} of a matrix of {A.shape[0]} × {A.shape[1]}: at most {min(A.shape)} parts")
    model = NMF(k, init="nndsvda", random_state=seed, max_iter=NMF_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how far it came is what `error` says
        W = torch.from_numpy(model.fit_transform(A.double().cpu().numpy()))
    H = torch.from_numpy(model.components_)
    norm = float(torch.linalg.matrix_norm(A.double()))
    error = float(torch.linalg.matrix_norm(A.double().cpu() - W @ H)) / norm if norm else math.nan
    return Parts(W, H, torch.zeros(A.shape[1], dtype=torch.float64), torch.full((k,), math.nan), error)
