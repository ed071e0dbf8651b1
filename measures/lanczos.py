"""Lanczos' method: the Krylov space of a symmetric matrix that is known by its products alone.

Letters: H the matrix (n × n), m steps, Q the basis (m × n), T = QHQᵀ, θ Ritz values, β and q length and direction of
what is left of the last product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from run.errors import NotFinite

PRECISE = 2**16  # numbers in a vector up to which vectors are float64
CANCELLED = 0.7  # what is left of a vector's length at least, if rounding is to play no role
SHRUNK = 0.01  # of the largest product, what is left at least if rounding is to grow no more than a hundredfold
GROWTH, GROWTH_ELEMENTS = 32, 2**26  # vectors for which room is made at a time: more if they are short
MISSED = 0.02  # chance of overlooking a copy at which they end before

Product = Callable[[Tensor], Tensor]


class Limits(NamedTuple):
    """What lies between them need not be found."""

    lower: float
    upper: float

    @classmethod
    def beyond(cls, values: Tensor, top: int, bottom: int, margin: float) -> Limits:
        """Past the `top` largest and `bottom` least of these values, descending; past nothing where there are fewer."""
        above, below = [math.inf, *values.tolist()], [-math.inf, *values.flip(0).tolist()]
        upper = above[top] + margin if top < len(above) else -math.inf
        lower = below[bottom] - margin if bottom < len(below) else math.inf
        return cls(lower, upper)

    def passed(self, theta: Tensor) -> tuple[bool, bool]:
        """Whether the largest of these values, descending, lies above them, and the least below."""
        return float(theta[0]) > self.upper, float(theta[-1]) < self.lower


class Lanczos:
    """The Krylov space of H from a start vector, orthogonal to the rows of `against`, one more vector by each `step`.

    All vectors are made orthogonal to all others, to rounding: without that, eigenvalues come in false copies. It is
    done to two at a time, which reads the basis once for both, unless so little is left of a product that rounding
    would grow more than a hundredfold till the next. T is kept as a full matrix, so that a restart is nothing but a
    change of basis to the Ritz vectors that matter.
    """

    def __init__(self, product: Product, start: Tensor, dtype: torch.dtype, against: Tensor | None = None) -> None:
        self.product, self.dtype = product, dtype
        self.basis_dtype = torch.float64 if len(start) <= PRECISE else dtype
        self.against = None if against is None else against.to(self.basis_dtype)
        self.Q = start.new_empty(0, len(start), dtype=self.basis_dtype)
        self.size = 0  # of Q that is filled
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.coupling = torch.zeros(0, dtype=torch.float64)  # QHq of the next vector q
        [self.next] = self._orthogonal(start.to(self.basis_dtype, copy=True)[None], self.basis)
        self.beta = float(torch.linalg.vector_norm(self.next))
        self.next /= self.beta
        self.scale = 0.0  # of the largest product so far
        self.is_orthogonal = True  # the next vector, to rounding
        self.is_whole = True  # the start vector is still the first of the basis

    def step(self) -> bool:
        """One product more. False, and none, where the space holds all that the start vector can reach."""
        if self.is_exhausted():
            return False
        self._append(self.next)
        w = self.product(self.next.to(self.dtype)).to(self.basis_dtype)
        length = float(torch.linalg.vector_norm(w))
        if not math.isfinite(length):
            raise NotFinite("a product with the matrix is infinite or nan.")
        self.scale = max(self.scale, length)
        column = torch.cat([self.coupling, (self.next @ w).double().cpu()[None]])
        T = torch.zeros(self.size, self.size, dtype=torch.float64)
        T[:-1, :-1] = self.T
        T[:, -1] = T[-1, :] = column
        self.T = T
        self._go_on(w, column)
        return True

    def _go_on(self, w: Tensor, column: Tensor) -> None:
        """The next vector: what is left of a product, of which the basis holds `column`."""
        is_restarted = bool(column[:-2].any())
        first = 0 if is_restarted else max(self.size - 2, 0)
        r = torch.addmv(w, self.basis[first:].T, column[first:].to(w), alpha=-1)
        self.beta = float(torch.linalg.vector_norm(r))
        waits = self.is_orthogonal and not is_restarted and self.beta >= SHRUNK * self.scale
        if not waits:
            r = self._orthogonal_with_last(r)
            self.beta = float(torch.linalg.vector_norm(r))
        self.is_orthogonal = not waits
        self.coupling = torch.zeros_like(column)
        self.coupling[-1] = self.beta
        self.next = r.div_(self.beta) if self.beta else r

    def _append(self, vector: Tensor) -> None:
        if self.size == len(self.Q):
            more = max(GROWTH, GROWTH_ELEMENTS // len(vector))
            grown = self.Q.new_empty(self.size + more, len(vector))
            grown[: self.size] = self.Q
            self.Q = grown
        self.Q[self.size] = vector
        self.size += 1

    @property
    def basis(self) -> Tensor:
        return self.Q[: self.size]

    def is_exhausted(self) -> bool:
        """Whether what is left of a product beside the space is nothing but rounding."""
        eps = torch.finfo(self.dtype).eps
        return self.size > 0 and (self.beta <= 10 * eps * self.scale or self.size >= self._room())

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """θ in descending order, their vectors' coefficients (columns), and ‖Hv - θv‖ of each."""
        theta, S = torch.linalg.eigh(self.T)
        return theta.flip(0), S.flip(1), (self.beta * S[-1].abs()).flip(0)

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Ritz vectors in rows, from their coefficients in columns."""
        return coefficients.T.to(self.basis) @ self.basis

    def known(self) -> tuple[float, float]:
        """tr QHQᵀ and ‖HQᵀ‖_F² of the space, whatever has converged in it: HQᵀ is QᵀT and one vector of length β."""
        return float(self.T.trace()), float(self.T.square().sum()) + self.beta**2

    def narrowed(self, limits: Limits, top: int, bottom: int) -> Limits:
        """Limits for R, the matrix orthogonally to the space: if R keeps them, H keeps the old, but for what is found.

        Found are its first `top` and last `bottom` Ritz values. With Θ the others, c their residuals and q the next
        vector, H beside what is found is [[Θ, c qᵀ], [q cᵀ, R]]. An x > Θ is above all its eigenvalues if it is above
        those of R + q qᵀ Σ c² / (x - θ), Schur's complement: hence if R < x - Σ c² / (x - θ). Below likewise.
        """
        theta, _, residuals = (part[top : self.size - bottom] for part in self.ritz())
        return Limits(*(x - float((residuals.square() / (x - theta)).sum()) for x in limits))

    def share_at_most(self, x: float) -> float:
        """Of |start|² how much can lie in eigenvectors of an eigenvalue at x or further out; 1 where x is not outside.

        p_m, the orthonormal polynomial of the start's spectral measure, has |p_m(x)| = Π |x - θ_i| / β_i, which grows
        outside of all θ, and ∫ p_m² = 1: an eigenvalue λ there has at most the share p_m(λ)^-2.
        """
        theta = self.ritz()[0]
        if theta[-1] <= x <= theta[0]:
            return 1.0
        betas = torch.cat([self.T.diagonal(1), self.T.new_tensor([self.beta])])
        return float((betas / (x - theta)).prod().square())

    def would_show(self, limits: Limits) -> bool:
        """Whether an eigenvalue beyond the limits would have been seen from a random start, but for a chance of MISSED.

        In n dimensions a random direction has less than ε / n of an eigenvector with a chance of sqrt(2 ε / π) at most.
        """
        theta = self.ritz()[0]
        least = MISSED**2 * math.pi / 2 / self._room()
        is_outside = limits.lower < theta[-1] and theta[0] < limits.upper
        return bool(is_outside) and all(self.share_at_most(x) <= least for x in limits)

    def restart(self, largest: int, least: int = 0) -> None:
        """Keep so many Ritz vectors of both ends alone, and go on from where it was."""
        theta, S, _ = self.ritz()
        kept = ends(self.size, largest, least)
        self.Q[: len(kept)] = self.vectors(S[:, kept])
        self.T, self.size, self.is_whole = torch.diag(theta[kept]), len(kept), False
        self.coupling = self.beta * S[-1, kept]

    def _orthogonal_with_last(self, r: Tensor) -> Tensor:
        """The vector made orthogonal, and before it the last one of the basis, if it is not."""
        if self.is_orthogonal:
            return self._orthogonal(r[None], self.basis)[0]
        last, r = self._orthogonal(torch.stack([self.basis[-1], r]), self.basis[:-1])
        self.basis[-1] = last
        return r.sub_(last, alpha=float(last @ r))

    def _orthogonal(self, W: Tensor, basis: Tensor) -> Tensor:
        """These rows without what lies in a basis and in `against`; again where rounding may have left some."""
        for _ in range(3):
            lengths = torch.linalg.vector_norm(W, dim=1)
            for rows in (self.against, basis):
                if rows is not None and len(rows):
                    W.addmm_(W @ rows.T, rows, alpha=-1)
            if (torch.linalg.vector_norm(W, dim=1) > CANCELLED * lengths).all():
                break
        return W

    def _room(self) -> int:
        return self.Q.shape[1] - (0 if self.against is None else len(self.against))


def ends(size: int, top: int, bottom: int) -> list[int]:
    """The places of the first `top` and the last `bottom` of so many, each once."""
    return sorted({*range(min(top, size)), *range(max(size - bottom, 0), size)})


def quadrature(space: Lanczos) -> tuple[Tensor, Tensor]:
    """Nodes (descending) and weights of the density that the start vector of a space sees."""
    theta, S, _ = space.ritz()
    return theta, S[0].square()
