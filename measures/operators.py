"""Large matrices known by their products alone: eigenpairs, trace and spectral density of symmetric ones.

Letters: H the symmetric matrix (n × n), λ eigenvalues, m Lanczos steps, θ Ritz values, P probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from measures.lanczos import Lanczos, Limits, Product, ends, quadrature
from run.errors import NotFinite, UserError
from run.memory import free_memory
from run.seeds import seed_from

DENSE = 2000  # rows up to which a matrix is built and solved exactly
TOLERANCE = 1e-3  # of residuals ‖Hv - λv‖, relative to the largest |λ|
STEPS, PROBES, TRACE_PROBES = 80, 5, 100
SECOND_LOOK = 8  # steps at most from another start, in case an eigenvalue has copies
MOST_STEPS = 3000  # of one search for eigenpairs
BASIS_SHARE = 0.25  # of free memory that Lanczos vectors may take
TOGETHER = 2**24  # numbers of probes that are drawn at a time


class Pairs(NamedTuple):
    """Eigenvalues (k,), their eigenvectors in rows (k, n), and ‖Hv - λv‖ / |λ|_max of each."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Estimate(NamedTuple):
    """A number estimated from random probes, and its standard error."""

    value: float
    error: float


class Density(NamedTuple):
    """The spectral density Σ_j w_j δ(λ - θ_j) by each probe: nodes and weights (P, m); weights sum to 1 over j."""

    nodes: Tensor
    weights: Tensor

    def moments(self) -> tuple[Estimate, Estimate]:
        """The mean and the mean square of the eigenvalues, each with the standard error over probes."""
        return tuple(estimate((self.weights * self.nodes**power).sum(1)) for power in (1, 2))


def estimate(samples: Tensor) -> Estimate:
    """Their mean, and its standard error; nan from a single one."""
    samples = samples.double()
    error = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
    return Estimate(float(samples.mean()), error)


class Symmetric:
    """A symmetric matrix H (n × n) of which only products Hv are known.

    Up to `dense` rows it is built from n products and everything is exact; beyond, eigenpairs come from Lanczos'
    method, trace and density from random probes, which `seed` draws.
    """

    def __init__(
        self, product: Product, size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        dense: int = DENSE, seed: int = 0, matrix: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.product, self.size, self.dtype, self.device = product, size, dtype, torch.device(device)
        self.dense, self.seed = dense, seed
        self.num_products = 0
        self._matrix = None if matrix is None else (matrix + matrix.T).double() / 2
        self._pairs: Pairs | None = None  # of the whole matrix
        self.space: Lanczos | None = None  # of the last search for eigenpairs

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def matvec(self, v: Tensor) -> Tensor:
        """Hv of a vector (n,)."""
        self.num_products += 1
        return self.product(v.to(self.device, self.dtype))

    def is_dense(self) -> bool:
        """Whether it is small enough to be built."""
        return self.size <= self.dense

    def matrix(self) -> Tensor:
        """H itself, made exactly symmetric, float64."""
        if not self.is_dense() and self._matrix is None:
            raise UserError(f"a matrix of {self.size} rows is not built: at most {self.dense} (--look-dense)")
        if self._matrix is None:
            eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
            H = torch.stack([self.matvec(row) for row in eye]).double()
            if not H.isfinite().all():
                raise NotFinite("the matrix has values that are infinite or nan.")
            self._matrix = (H + H.T) / 2
        return self._matrix

    def pairs(self) -> Pairs:
        """All eigenpairs, descending, of a matrix that is small enough."""
        if self._pairs is None:
            values, vectors = torch.linalg.eigh(self.matrix())
            residuals = torch.linalg.vector_norm(self.matrix() @ vectors - vectors * values, dim=0)
            residuals = residuals / values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            self._pairs = Pairs(values.flip(0), vectors.T.flip(0), residuals.flip(0))
        return self._pairs

    def top(self, k: int = 5, tol: float = TOLERANCE) -> Pairs:
        """The k largest eigenvalues with their vectors, each up to ‖Hv - λv‖ ≤ tol |λ|_max.

        Lanczos' method with every vector orthogonal to all others. It finds an eigenvalue with several eigenvectors
        once; so it then looks a second time, orthogonally to what it found, whether there is more of that size.
        """
        self._refuse_more(k)
        return self.extremes(k, 0, tol)[0]

    def bottom(self, k: int = 1, tol: float = TOLERANCE) -> Pairs:
        """The k least eigenvalues, ascending, likewise."""
        self._refuse_more(k)
        return self.extremes(0, k, tol)[1]

    def extremes(self, top: int, bottom: int, tol: float = TOLERANCE) -> tuple[Pairs, Pairs]:
        """Both from one search, which takes no more products than the end that converges last."""
        found = self.pairs() if self.is_dense() else self._searched(top, bottom, tol)
        least = slice(len(found.values) - bottom, None)
        return Pairs(*(part[:top] for part in found)), Pairs(*(part[least].flip(0) for part in found))

    def trace(self, probes: int = TRACE_PROBES, deflate: Lanczos | None = None) -> Estimate:
        """The sum of the eigenvalues; beyond `dense` rows by Hutchinson's estimate from random signs, zᵀHz.

        The part of the trace in the space `deflate` is known, and the probes are made orthogonal to it: what is left
        to estimate varies less. After a search for eigenpairs, `space` is such a one.
        """
        if self.is_dense():
            return Estimate(float(self.matrix().diagonal().sum()), 0.0)
        return self._probed(probes, deflate)[0]

    def fro(self, probes: int = TRACE_PROBES, deflate: Lanczos | None = None) -> Estimate:
        """‖H‖_F, likewise from ‖Hz‖²."""
        if self.is_dense():
            return Estimate(float(torch.linalg.matrix_norm(self.matrix())), 0.0)
        square = self._probed(probes, deflate)[1]
        return root_of(square)

    def trace_and_fro(self, probes: int = TRACE_PROBES, deflate: Lanczos | None = None) -> tuple[Estimate, Estimate]:
        """Both from the same probes."""
        if self.is_dense():
            return self.trace(), self.fro()
        trace, square = self._probed(probes, deflate)
        return trace, root_of(square)

    def density(self, steps: int = STEPS, probes: int = PROBES) -> Density:
        """The spectral density by stochastic Lanczos quadrature; exact, with all weights 1/n, up to `dense` rows."""
        if self.is_dense():
            values = self.pairs().values[None]
            return Density(values, torch.full_like(values, 1 / self.size))
        found = [quadrature(self._grown(self._signs("density", i), steps)) for i in range(probes)]
        most = max(len(nodes) for nodes, _ in found)
        padded = [(torch.cat([n, n[-1:].expand(most - len(n))]), torch.cat([w, w.new_zeros(most - len(w))]))
                  for n, w in found]  # fmt: skip
        return Density(torch.stack([n for n, _ in padded]), torch.stack([w for _, w in padded]))

    def seen(self) -> Density:
        """The density as the search for the largest eigenvalues saw it, from one probe: for free, and rough."""
        if self.is_dense():
            return self.density()
        is_usable = self.space is not None and self.space.is_whole
        nodes, weights = quadrature(self.space if is_usable else self._grown(self._start(0), STEPS))
        return Density(nodes[None], weights[None])

    def norms(self) -> dict[str, float]:
        """The Frobenius norm and the spectral norm, the largest |λ|."""
        largest, least = self.extremes(1, 1)
        spectral = max(abs(float(largest.values)), abs(float(least.values)))
        return {"fro": self.fro().value, "spectral": spectral}

    def _refuse_more(self, k: int) -> None:
        if not 1 <= k <= self.size:
            raise UserError(f"a matrix of {self.size} rows has {self.size} eigenvalues, not {k} (--look-top)")

    def _searched(self, top: int, bottom: int, tol: float) -> Pairs:
        """Eigenpairs, descending, that begin with the `top` largest and end with the `bottom` least of all."""
        self.space = Lanczos(self.matvec, self._start(0), self.dtype)
        found = self._converged(self.space, top, bottom, tol)
        look = 1
        while len(found.values) < self.size > self.space.size:
            limits = Limits.beyond(found.values, top, bottom, tol * float(found.values.abs().max()))
            other, more = self._second_look(limits, found, look, top, bottom)
            if not any(more):
                break
            found = joined(found, self._converged(other, *more, tol, float(found.values.abs().max())))
            look += 1
        return found

    def _second_look(
        self, limits: Limits, found: Pairs, look: int, top: int, bottom: int
    ) -> tuple[Lanczos, tuple[bool, bool]]:
        """A space orthogonal to what was found, and whether it has more beyond the limits: at its upper, its lower end.

        The first time this is looked for orthogonally to all vectors of the search. There, nothing is large but copies
        and what the search has nearly overlooked, so that few steps are enough to see that there are none.
        """
        against, narrowed = found.vectors, limits
        if look == 1:
            against, narrowed = self.space.basis, self.space.narrowed(limits, top, bottom)
        other = Lanczos(self.matvec, self._start(look), self.dtype, against)
        more = False, False
        while not any(more) and other.size < SECOND_LOOK and other.step():
            theta, S, _ = other.ritz()
            more = limits.passed(theta)
            if other.would_show(narrowed):
                break
        if look == 1 and any(more):
            start = other.vectors(S[:, ends(other.size, *more)]).sum(0)
            other = Lanczos(self.matvec, start, self.dtype, found.vectors)
        return other, more

    def _converged(self, space: Lanczos, top: int, bottom: int, tol: float, scale: float = 0.0) -> Pairs:
        """Ritz pairs of both ends of a space, grown until their residuals are small enough, or it is exhausted."""
        num = top + bottom
        room = max(4 * num + 20, int(BASIS_SHARE * free_memory(self.device)) // (8 * self.size))
        for _ in range(MOST_STEPS):
            goes_on = space.step()
            theta, S, residuals = space.ritz()
            wanted = ends(space.size, top, bottom)
            largest = max(float(theta.abs().max()), float(scale), torch.finfo(torch.float64).tiny)
            enough = space.size >= num and bool((residuals[wanted] <= tol * largest).all())
            if enough or not goes_on:
                return Pairs(theta[wanted], space.vectors(S[:, wanted]), residuals[wanted] / largest)
            if space.size >= room:
                space.restart(*(2 * k + 5 if k else 0 for k in (top, bottom)))  # at most half of the room
        raise UserError(
            f"{num} eigenvalues did not converge to {tol:g} in {MOST_STEPS} steps: ask for less (--look-top)"
        )

    def _probed(self, probes: int, deflate: Lanczos | None) -> tuple[Estimate, Estimate]:
        """tr H and ‖H‖_F²."""
        traces, squares = [], []
        for z in self._probes(probes, deflate):
            Hz = self.matvec(z).double()
            traces.append(z.double() @ Hz)
            squares.append(Hz @ Hz)
        known = (0.0, 0.0) if deflate is None else deflate.known()
        estimates = estimate(torch.stack(traces).cpu()), estimate(torch.stack(squares).cpu())
        return tuple(Estimate(e.value + part, e.error) for e, part in zip(estimates, known, strict=True))

    def _probes(self, num: int, deflate: Lanczos | None) -> Iterator[Tensor]:
        """Vectors of random signs without what lies in a space: of many at a time, which reads the space but once."""
        together = max(1, TOGETHER // self.size)
        for first in range(0, num, together):
            Z = torch.stack([self._signs("trace", i) for i in range(first, min(first + together, num))])
            if deflate is not None:
                Q = deflate.basis
                Z -= ((Z.to(Q) @ Q.T) @ Q).to(Z)
            yield from Z

    def _grown(self, start: Tensor, steps: int) -> Lanczos:
        space = Lanczos(self.matvec, start, self.dtype)
        while space.size < steps and space.step():
            pass
        return space

    def _start(self, i: int) -> Tensor:
        """A random vector for the i-th search: unlike one of signs, in no small space by chance."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, "start", i))
        start = torch.rand(self.size, generator=generator, dtype=torch.float64) - 0.5
        return start.to(self.device, self.dtype)

    def _signs(self, purpose: str, i: int) -> Tensor:
        """A vector of random signs, the same on every device."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, purpose, i))
        signs = 2 * torch.randint(2, (self.size,), generator=generator, dtype=torch.int8) - 1
        return signs.to(self.device, self.dtype)


def joined(found: Pairs, more: Pairs) -> Pairs:
    """Both in one, descending."""
    order = torch.cat([found.values, more.values]).argsort(descending=True)
    return Pairs(*(torch.cat([a, b])[order.to(a.device)] for a, b in zip(found, more, strict=True)))


def root_of(square: Estimate) -> Estimate:
    """sqrt of an estimate, its error to first order."""
    root = math.sqrt(square.value)
    return Estimate(root, square.error / (2 * root) if root else 0.0)


class Rectangular:
    """A matrix B (n × m) of which only products Bv and Bᵀu are known."""

    def __init__(
        self, product: Product, transposed: Product, shape: tuple[int, int], *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", dense: int = DENSE, seed: int = 0,
    ) -> None:  # fmt: skip
        self.product, self.transposed, self.shape = product, transposed, shape
        self.dtype, self.device, self.dense, self.seed = dtype, torch.device(device), dense, seed
        self._matrix: Tensor | None = None

    def matvec(self, v: Tensor) -> Tensor:
        """Bv of a vector (m,)."""
        return self.product(v.to(self.device, self.dtype))

    def rmatvec(self, u: Tensor) -> Tensor:
        """Bᵀu of a vector (n,)."""
        return self.transposed(u.to(self.device, self.dtype))

    def is_dense(self) -> bool:
        """Whether it is small enough to be built: by one product for each row, or column, of the shorter side."""
        return min(self.shape) <= self.dense and math.prod(self.shape) <= 16 * self.dense**2

    def matrix(self) -> Tensor:
        """B itself, float64."""
        n, m = self.shape
        if not self.is_dense():
            raise UserError(f"a matrix of {n} × {m} is not built: at most {self.dense} rows or columns (--look-dense)")
        if self._matrix is None:
            eye = torch.eye(min(n, m), dtype=self.dtype, device=self.device)
            products = torch.stack([(self.rmatvec if n <= m else self.matvec)(row) for row in eye]).double()
            self._matrix = products if n <= m else products.T
        return self._matrix

    def top(self, k: int = 5, tol: float = TOLERANCE) -> Tensor:
        """The k largest singular values, descending; beyond `dense` rows those whose squares BᵀB or BBᵀ has."""
        if self.is_dense():
            return torch.linalg.svdvals(self.matrix())[:k]
        return self._gram().top(k, tol).values.clamp(min=0).sqrt()

    def fro(self, probes: int = TRACE_PROBES) -> Estimate:
        """‖B‖_F; beyond `dense` rows from random probes."""
        if self.is_dense():
            return Estimate(float(torch.linalg.matrix_norm(self.matrix())), 0.0)
        return root_of(self._gram().trace(probes))

    def norms(self) -> dict[str, float]:
        """The Frobenius norm and the spectral norm."""
        return {"fro": self.fro().value, "spectral": float(self.top(1))}

    def _gram(self) -> Symmetric:
        n, m = self.shape

        def product(v: Tensor) -> Tensor:
            return self.rmatvec(self.matvec(v)) if m <= n else self.matvec(self.rmatvec(v))

        options = {"dtype": self.dtype, "device": self.device, "dense": 0, "seed": self.seed}
        return Symmetric(product, min(n, m), **options)
