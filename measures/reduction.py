"""Activations without features that never fire, reduced to the directions that carry most of their energy.

Letters: N samples, d dimension of a layer's flattened activations, C classes, k directions, l columns of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from measures.means import add_to_classes, class_members
from run.errors import NotFinite, UserError
from run.seeds import seed_from

if TYPE_CHECKING:
    import numpy as np

Matrix = TypeVar("Matrix", Tensor, "np.ndarray")

FLOAT64_EPS = torch.finfo(torch.float64).eps
EXACT_LIMIT = 2000  # min(N, d) up to which the Gram matrix is decomposed: seconds on two CPU cores, and 32 MB
MAX_DIRECTIONS = 256  # of a sketch: its cost grows with them, and neighbours lose their meaning
BLOCK = 32  # columns by which a sketch grows
POWERS = 8  # blocks that a sketch may have beside twice the directions looked for
CONVERGED = 2e-5  # relative change of S² that all further blocks would make, by the last two
ROW_ELEMENTS = 2**18  # of rows copied to float64 at once: 2 MB, which a CPU's cache holds
PRODUCT_ELEMENTS = 2**20  # the same for products, which are faster of more rows


class Reduced(NamedTuple):
    """What `reduce` returns, in float64 but for `kept`; as arrays where it was given an array.

    `svd` and `pca` are two names of it: the latter's figures are `explained_variance` and its ratio.
    """

    scores: Tensor  # (N, k), U_k diag(S_k): the coordinates of the samples
    components: Tensor  # (k, d'), rows of Vᵀ: the directions, over the d' features kept
    mean: Tensor  # (d',)
    singular_values: Tensor  # (k,), descending
    energies: Tensor  # (k,), E_1 … E_k
    kept: Tensor  # (d,), which features were looked at

    @property
    def explained_variance(self) -> Tensor:
        """S² / (N - 1), (k,)."""
        return self.singular_values**2 / (len(self.scores) - 1)

    @property
    def explained_variance_ratio(self) -> Tensor:
        """S² / Σ S², (k,)."""
        return self.singular_values**2 / self.singular_values[0] ** 2 * self.energies[0]


def reduce(
    activations: Matrix,
    energy: float = 0.9,
    threshold: float = 0.0,
    labels: Matrix | None = None,
    *,
    filter_class: int | None = None,
    max_directions: int | None = None,
    seed: int = 0,
) -> Reduced:
    """The samples in the fewest principal directions that hold more than `energy` of the whole.

    A (N × d) are the activations, flattened. Feature j is kept if in at least one class the mean of |A_ij| over the
    class's samples exceeds `threshold`; without labels all samples are one class, and `filter_class` looks at one
    alone. By default only what never fires goes.

    With mu the column means, A - mu = U S Vᵀ and E_k = Σ_{i≤k} S_i² / Σ S_i²: k is the first with E_k > `energy`, or
    `max_directions` if that is less; the scores are U_k diag(S_k). Of each direction the entry of the largest size is
    positive.

    Where min(N, d) ≤ 2000, this is exact, from the eigenvectors of the Gram matrix in float64. Beyond, it is a
    randomised sketch: the block Krylov space of 32 random columns (Musco & Musco 2015), which holds what power
    iterations would give, grows until the k values found will not change by more than 10⁻⁵, or to 2 k columns and 8
    blocks for k = `max_directions` (256 by default). Where these are not enough `energies[-1]` stays
    below. Singular values are within 10⁻⁴ of the exact ones, those of white noise, which hardly differ, within 0.2%.
    What is random depends on `seed` alone.

    >>> A = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    >>> reduced = reduce(A, energy=0.8)  # S² = 18 and 2
    >>> reduced.scores.round(decimals=9).flatten().tolist(), reduced.kept.tolist()
    ([3.0, -3.0, 0.0, 0.0], [True, True, False])
    >>> reduced.energies.round(decimals=9).tolist()
    [0.9]
    """
    if not 0 < energy < 1:
        raise UserError(f"energy {energy} is not allowed: it must lie above 0 and below 1.")
    A = matrix(activations)  # (N, d)
    kept = fires(A, threshold, None if labels is None else labels_of(labels, A), filter_class)
    if not kept.any():
        raise UserError(f"No feature's mean size exceeds the threshold {threshold:g} in any class: none is left.")
    centred = without_mean(A, kept)
    found = directions(centred, energy, max_directions, seed)
    reduced = Reduced(found.scores, found.components, centred.mean, found.singular_values, found.energies, kept)
    return reduced if isinstance(activations, Tensor) else Reduced(*(part.numpy() for part in reduced))


def matrix(activations: Matrix) -> Tensor:
    """Activations (N, …) as a matrix (N, d), of which nothing is differentiated."""
    A = torch.as_tensor(activations).detach()
    if A.ndim < 2 or not A.numel():
        raise UserError(f"Activations must be a matrix, samples × features; their shape is {tuple(A.shape)}.")
    return A.flatten(1)


def labels_of(labels: Matrix, A: Tensor) -> Tensor:
    """Labels (N,) of the samples of A, where A is."""
    y = torch.as_tensor(labels).to(A.device).long()
    if y.shape != A.shape[:1]:
        raise UserError(f"There are {len(A)} samples, and labels of shape {tuple(y.shape)}.")
    if y.min() < 0:
        raise UserError(f"Labels are counted from 0; there is {int(y.min())}.")
    return y


def fires(A: Tensor, threshold: float, labels: Tensor | None, filter_class: int | None = None) -> Tensor:
    """Which features (d,) have a mean |A_ij| above the threshold in at least one class, or in that one."""
    y = A.new_zeros(len(A), dtype=torch.long) if labels is None else labels
    if filter_class is not None:
        A, y = A[y == filter_class], y.new_zeros(int((y == filter_class).sum()))
        if not len(A):
            raise UserError(f"There is no sample of class {filter_class}, by which features are chosen.")
    num_classes = int(y.max()) + 1
    if threshold == 0:  # a mean of sizes is above 0 where one of them is
        fired = torch.zeros_like(A[0], dtype=torch.bool)
        for rows in row_blocks(A):
            fired |= (rows != 0).any(0)
            if fired.all():
                break
        return fired
    sums = A.new_zeros(num_classes, A.shape[1], dtype=torch.float64)
    counts = y.bincount(minlength=num_classes).clamp(min=1)
    start = 0
    for rows in row_blocks(A):
        of_rows = y[start : start + len(rows)]
        add_to_classes(sums, rows.abs(), of_rows, class_members(of_rows, num_classes))
        start += len(rows)
    return (sums / counts[:, None] > threshold).any(0)


class Centred(NamedTuple):
    """A - mu (N, d) in float32 at least; mu (d,) and, summed up from rows, the energy ‖A - mu‖_F² in float64."""

    matrix: Tensor
    mean: Tensor
    energy: Tensor


def without_mean(A: Tensor, kept: Tensor | None = None) -> Centred:
    """Activations (N, d) without their mean, of the features kept. What their type does not tell apart is zero."""
    mu = sum(rows.sum(0, dtype=torch.float64) for rows in row_blocks(A)) / len(A)  # (d,)
    if not mu.isfinite().all():
        raise NotFinite("Activations are infinite or nan.")
    columns = None if kept is None or kept.all() else kept.nonzero().flatten()
    mu = mu if columns is None else mu[columns]
    dtype = torch.promote_types(A.dtype, torch.float32)
    centred, energy = A.new_empty(len(A), len(mu), dtype=dtype), mu.new_zeros(())
    rounded = mu.to(dtype)
    remainder = (mu - rounded).to(dtype)  # taken off by itself, so that no digit of mu is lost
    num_rows = max(1, ROW_ELEMENTS // A.shape[1])
    for rows, into in zip(A.split(num_rows), centred.split(num_rows), strict=True):
        rows = rows if columns is None else rows.index_select(1, columns)
        torch.sub(rows.to(dtype), rounded, out=into)
        into -= remainder
        energy += torch.linalg.vecdot(into, into).sum(dtype=torch.float64)
    eps = torch.finfo(A.dtype if A.is_floating_point() else dtype).eps
    if energy <= len(A) * (eps * torch.linalg.vector_norm(mu)) ** 2:
        centred, energy = centred.zero_(), energy.zero_()
    return Centred(centred, mu, energy)


def row_blocks(A: Tensor, elements: int = ROW_ELEMENTS) -> Iterator[Tensor]:
    """Rows of A (N, d) in blocks small enough for working copies in float64."""
    return iter(A.split(max(1, elements // A.shape[1])))


class Directions(NamedTuple):
    """Principal directions: scores (N, k), components (k, d), and S_i and E_i of each."""

    scores: Tensor
    components: Tensor
    singular_values: Tensor
    energies: Tensor


def directions(
    of: Centred, energy: float, limit: int | None, seed: int = 0, exact_limit: int | None = None
) -> Directions:
    """As many of a centred matrix (N, d) as exceed this share of its energy, or `limit`."""
    centred, total = of.matrix, of.energy
    if not total > 0:
        raise UserError("All samples have the same activations: there is no direction in which they differ.")
    if min(centred.shape) <= (exact_limit or EXACT_LIMIT):
        U, squares, V = exact(centred)
    else:
        U, squares, V = sketch(centred, energy, total, limit or MAX_DIRECTIONS, seed)
    energies = squares.cumsum(0) / total
    k = min(first_above(energies, energy), limit or len(squares))
    sigma = squares[:k].sqrt()
    if U is None:
        components = V[:, :k].T
        scores = torch.cat([rows.double() @ components.T for rows in row_blocks(centred, PRODUCT_ELEMENTS)])
    else:
        scores = U[:, :k] * sigma
        components = product(U[:, :k], centred) / sigma[:, None] if V is None else V[:, :k].T
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()  # (k, 1)
    return Directions(scores * signs.T, components * signs, sigma, energies[:k])


def first_above(energies: Tensor, energy: float) -> int:
    """The first k with E_k > energy; where there is none, all."""
    return min(int((energies <= energy).sum()) + 1, len(energies))


def exact(centred: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """All singular values squared, descending, above rounding; and U or V, whichever the Gram matrix gives."""
    num_samples, d = centred.shape
    blocks = row_blocks(centred if d <= num_samples else centred.T, PRODUCT_ELEMENTS)
    gram = centred.new_zeros(min(num_samples, d), min(num_samples, d), dtype=torch.float64)
    for block in blocks:
        block = block.double()
        gram.addmm_(block.T, block)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rank = int((squares > len(gram) * FLOAT64_EPS * squares[0]).sum())
    squares, vectors = squares[:rank], vectors[:, :rank]
    return (None, squares, vectors) if d <= num_samples else (vectors, squares, None)


def sketch(centred: Tensor, energy: float, total: Tensor, limit: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first k of U (N, k), S² and V (d, k), where k is the first with enough energy, or `limit`.

    From the Krylov space of a random block Ω of 32 columns, AΩ, (AAᵀ)AΩ, (AAᵀ)²AΩ, …, which grows until those k
    singular values stay as they are, or to 2 `limit` columns and 8 blocks.
    Products with A are made in the activations' own precision, what is made of them is float64.
    """
    generator = torch.Generator().manual_seed(seed_from("sketch", seed))  # on the CPU: all devices draw the same
    omega = torch.randn(centred.shape[1], BLOCK, generator=generator, dtype=torch.float64)
    most = min(2 * limit + POWERS * BLOCK, *centred.shape)
    Q = centred.new_empty(len(centred), most, dtype=torch.float64)
    B = centred.new_empty(most, centred.shape[1], dtype=torch.float64)  # Qᵀ A
    gram = Q.new_empty(most, most)  # B Bᵀ
    Z, num, spaces = omega.to(centred), 0, []
    while True:
        new = slice(num, min(num + BLOCK, most))
        Q[:, new] = beside(centred @ Z[:, : new.stop - num], Q[:, :num])
        block = Q[:, new].T.to(centred) @ centred
        B[new], num = block, new.stop
        gram[:num, new] = B[:num] @ B[new].T
        gram[new, :num] = gram[:num, new].T
        squares, W = leading(gram[:num, :num], limit)
        k = first_above(squares.cumsum(0) / total, energy)
        spaces = [*spaces[-2:], squares]
        if num == most or left_to_change([each[:k] for each in spaces]) <= CONVERGED:
            break
        Z = torch.linalg.qr(block.T).Q
    squares, W = squares[:k], W[:, :k]
    return Q[:, :num] @ W, squares, B[:num].T @ W / squares.sqrt()


def left_to_change(spaces: Sequence[Tensor]) -> float:
    """How much S² (k,) of the last of three growing spaces would yet change, relative to each, at most.

    As in a geometric series, whose ratio the two changes between them have: for Krylov spaces it rather falls.
    """
    if len({len(squares) for squares in spaces}) > 1 or len(spaces) < 3:
        return math.inf
    before, last = (float(((b - a).abs() / b).max()) for a, b in pairwise(spaces))
    if last == 0:
        return 0.0
    return last**2 / (before - last) if last < before else math.inf


def beside(Y: Tensor, Q: Tensor) -> Tensor:
    """Orthonormal columns that span what Y (N, l) has beside the span of Q, in float64."""
    Y = Y.double()
    for _ in range(2):  # twice is enough to be orthogonal to rounding
        Y = torch.linalg.qr(Y - Q @ (Q.T @ Y)).Q
    return Y


def leading(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k eigenvalues of B Bᵀ (l, l), above rounding, and their vectors (l, k): S² and U of B."""
    squares, W = torch.linalg.eigh(gram)
    squares, W = squares.flip(0), W.flip(1)
    k = min(k, int((squares > len(gram) * FLOAT64_EPS * squares[0]).sum()))
    return squares[:k], W[:, :k]


def product(U: Tensor, centred: Tensor) -> Tensor:
    """Uᵀ A, (k, d), in float64."""
    total = U.new_zeros(U.shape[1], centred.shape[1])
    start = 0
    for rows in row_blocks(centred, PRODUCT_ELEMENTS):
        total.addmm_(U[start : start + len(rows)].T, rows.double())
        start += len(rows)
    return total
