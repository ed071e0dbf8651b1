"""What `--look` looks at: a network's loss, activations, parameters, their gradients, Jacobians and Hessians.

    from utils import look
    H = look(network, x, y, "hess(loss, theta)")
    H.top(5)

Letters: N samples, n and m dimensions of layers, p parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from measures.derivatives import Loss, Parameters, View, cross_entropy
from measures.operators import (
    DENSE,
    PROBES,
    STEPS,
    TOLERANCE,
    TRACE_PROBES,
    Density,
    Estimate,
    Pairs,
    Rectangular,
    Symmetric,
)  # fmt: skip
from measures.spectra import matrix_figures, nmf, pca, power_law, singular_values
from run.errors import NotFinite, UserError
from run.expressions import SHORT, Expression, parse

MOST_ROWS = 4096  # the shorter side of a matrix up to which all its singular values are computed


class Wanted(NamedTuple):
    """What figures to compute of a quantity.

    `top` and `bottom` eigenpairs, each to a residual of `tolerance`; matrices up to `dense` rows exactly;
    `trace_probes` random vectors for trace and Frobenius norm, and `probes` of `steps` products for the density, with 0
    of them the one that the search for eigenpairs saw. `parts`: {"pca": k, "nmf": k}; `tail` the power law of weights'
    spectra; `keep` also eigenvectors and matrices.
    """

    top: int = 5
    bottom: int = 1
    dense: int = DENSE
    tolerance: float = TOLERANCE
    trace_probes: int = TRACE_PROBES
    probes: int = PROBES
    steps: int = STEPS
    parts: Mapping[str, int] = {}
    tail: bool = False
    keep: bool = False
    seed: int = 0


Figures = dict[str, float]
Found = tuple[Figures, dict[str, Tensor]]  # figures by statistic, and arrays


def look(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    expression: str,
    *,
    loss: Loss = cross_entropy,
    dense: int = DENSE,
    seed: int = 0,
) -> Quantity:
    """A quantity of any network on samples x (N, …) with labels y (N,), as an object to ask.

    `expression` is as after `--look`: `loss`, `f(LAYER)`, `theta(NAME)`, `grad(A, B)`, `hess(A, B)`; the docs have the
    whole language. `loss(logits, y)` is that of each sample, (N,). Where they make sense, the object has

    - `matrix()`, `matvec(v)`: it as a matrix, and its product with a vector
    - `top(k)`, `bottom(k)`: eigenvalues, eigenvectors, residuals; of what is not symmetric, singular values
    - `trace()`, `density()`, `norms()`
    - `figures()`: all of the program's figures of it

    The network is looked at in eval mode, in the precision of its parameters, and left as it was.

    >>> network = nn.Linear(3, 2)
    >>> nn.init.zeros_(network.weight), nn.init.zeros_(network.bias)
    (Parameter containing:
    tensor([[0., 0., 0.],
            [0., 0., 0.]], requires_grad=True), Parameter containing:
    tensor([0., 0.], requires_grad=True))
    >>> H = look(network, torch.eye(3), torch.tensor([0, 1, 0]), "hess(loss, f(output))")
    >>> H.matrix()  # diag(p) - p pᵀ
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]], dtype=torch.float64)
    """
    parsed = parse(expression)
    if isinstance(parsed, str):
        if parsed not in ("jacobian", "hessian", "ntk"):
            raise UserError(f"{parsed} means several quantities: look at one of them, as {SHORT[parsed]}")
        parsed = parse(SHORT[parsed])
    if len(x) != len(y) or not len(x):
        raise UserError(f"a label is needed for each sample, and there are {len(y)} for {len(x)}")
    return quantity(View(network, x, y, loss=loss), parsed, Wanted(dense=dense, seed=seed))


def quantity(view: View, expression: Expression, wanted: Wanted) -> Quantity:
    """What an expression means of a network on some samples."""
    view.check(expression)
    made = _quantity(view, expression, wanted)
    made.dtype = view.dtype
    return made


def _quantity(view: View, expression: Expression, wanted: Wanted) -> Quantity:
    of, at = expression.of, expression.at
    if not expression.derivative:
        if of.kind == "loss":
            return Number(expression, *view.loss_and_accuracy())
        if of.kind == "f":
            return Rows(expression, view.activations(of, expression), of.name)
        parameters = view.parameters(of, expression)
        return Vector(expression, parameters.values, parameters.matrix_shape)
    if expression.derivative == "grad":
        if at[0].kind == "f":
            if of.kind == "loss":
                return Rows(expression, view.sample_gradients(of, at[0], expression), at[0].name)
            return Jacobians.of_layers(view, expression)
        parameters = view.parameters(at[0], expression)
        if of.kind == "loss":
            return Vector(expression, view.gradient(of, parameters), parameters.matrix_shape)
        return Kernel(expression, view.kernel(of, parameters, expression), wanted)
    if at[0].kind == "f":
        return SampleHessians.of_layer(view, expression, wanted)
    rows, columns = view.parameters(at[0], expression), view.parameters(at[-1], expression)
    if len(at) == 1 or (list(rows.tensors), rows.index) == (list(columns.tensors), columns.index):
        return Hessian.of_parameters(view, expression, rows, wanted)
    return Block.of_parameters(view, expression, rows, columns, wanted)


def average(quantities: Sequence[Quantity]) -> Quantity:
    """The average of the same quantity of several networks, each in turn."""
    made = type(quantities[0]).mean_of(quantities)
    made.dtype = quantities[0].dtype
    return made


class Quantity:
    """A quantity of a network that can be asked for its figures; what it cannot answer it refuses in a sentence.

    `dtype` is the precision of the network from which it was computed.
    """

    dtype = torch.float32

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    @classmethod
    def mean_of(cls, quantities: Sequence[Quantity]) -> Quantity:
        raise NotImplementedError

    def found(self, wanted: Wanted) -> Found:
        """Figures and arrays."""
        raise NotImplementedError

    def figures(self, wanted: Wanted | None = None) -> Figures:
        """All figures of it, by the names that they have in `metrics.csv`."""
        return self.found(wanted or Wanted())[0]

    def matrix(self) -> Tensor:
        raise self._without("matrix")

    def matvec(self, v: Tensor) -> Tensor:
        raise self._without("product with a vector")

    def top(self, k: int = 5) -> Pairs | Tensor:
        raise self._without("eigenvalues or singular values")

    def bottom(self, k: int = 1) -> Pairs:
        raise self._without("least eigenvalues")

    def trace(self) -> Estimate:
        raise self._without("trace")

    def density(self) -> Density:
        raise self._without("spectral density")

    def norms(self) -> Figures:
        raise self._without("norms")

    def _without(self, what: str) -> UserError:
        return UserError(f"{self.expression} has no {what}")


class Number(Quantity):
    """The mean loss and, beside it, the accuracy."""

    def __init__(self, expression: Expression, loss: float, accuracy: float) -> None:
        super().__init__(expression)
        self.loss, self.accuracy = loss, accuracy

    @classmethod
    def mean_of(cls, quantities: Sequence[Number]) -> Number:
        num = len(quantities)
        loss, accuracy = (math.fsum(getattr(q, name) for q in quantities) / num for name in ("loss", "accuracy"))
        return cls(quantities[0].expression, loss, accuracy)

    def found(self, wanted: Wanted) -> Found:
        return {"loss": self.loss, "accuracy": self.accuracy}, {}


class Vector(Quantity):
    """Parameters or a gradient with respect to them: numbers in a row (p,); of one tensor also a matrix (out, rest)."""

    def __init__(self, expression: Expression, values: Tensor, matrix_shape: tuple[int, int] | None) -> None:
        super().__init__(expression)
        self.values, self.matrix_shape = finite(values, expression), matrix_shape

    @classmethod
    def mean_of(cls, quantities: Sequence[Vector]) -> Vector:
        first = quantities[0]
        return cls(first.expression, torch.stack([q.values for q in quantities]).mean(0), first.matrix_shape)

    def matrix(self) -> Tensor:
        if self.matrix_shape is None:
            raise self._without("matrix: it is no single tensor of at least two dimensions")
        return self.values.view(self.matrix_shape)

    def top(self, k: int = 5) -> Tensor:
        return singular_values(self.matrix())[:k]

    def norms(self) -> Figures:
        values = self.values.double()
        return {"norm": float(torch.linalg.vector_norm(values)), "zeros": float((values == 0).double().mean())}

    def found(self, wanted: Wanted) -> Found:
        figures, arrays = self.norms(), {}
        if self.matrix_shape is not None and not self.expression.norms_only:
            more, arrays = figures_of_matrix(self.matrix(), wanted, self.dtype)
            figures |= more
            if wanted.tail and self.expression.of.kind == "theta":
                figures["tail_exponent"] = power_law(arrays["singular_values"].double().square()).exponent
        if wanted.keep:
            arrays["values"] = self.values
        return figures, arrays


class Rows(Quantity):
    """Activations, or gradients with respect to them, a row for each sample (N, n)."""

    def __init__(self, expression: Expression, values: Tensor, layer: str) -> None:
        super().__init__(expression)
        self.values, self.layer = finite(values, expression), layer

    @classmethod
    def mean_of(cls, quantities: Sequence[Rows]) -> Rows:
        first = quantities[0]
        return cls(first.expression, torch.stack([q.values for q in quantities]).mean(0), first.layer)

    def matrix(self) -> Tensor:
        return self.values

    def top(self, k: int = 5) -> Tensor:
        return singular_values(self.values)[:k]

    def norms(self) -> Figures:
        """`norm` of the mean row, `sample_norm` the rows' mean norm, `snr` ‖mean‖² / mean ‖row - mean‖², `zeros`."""
        rows = self.values.double()
        mean = rows.mean(0)
        noise = float((rows - mean).square().sum(1).mean())
        return {
            "norm": float(torch.linalg.vector_norm(mean)),
            "sample_norm": float(torch.linalg.vector_norm(rows, dim=1).mean()),
            "snr": float(mean.square().sum()) / noise if noise else math.nan,
            "zeros": float((rows == 0).double().mean()),
        }

    def found(self, wanted: Wanted) -> Found:
        figures, arrays = self.norms(), {}
        if not self.expression.norms_only and min(self.values.shape) <= MOST_ROWS:
            more, arrays = figures_of_matrix(self.values, wanted, self.dtype)
            figures |= more
        return figures, arrays


class Jacobians(Quantity):
    """The derivative of a layer by an earlier one, of each sample (n × m), and its mean over the samples."""

    def __init__(self, expression: Expression, mean: Tensor, singular: Tensor | None) -> None:
        super().__init__(expression)
        self.mean = finite(mean, expression)
        self.singular = singular  # values of each sample, (N, min(n, m))

    @classmethod
    def of_layers(cls, view: View, expression: Expression) -> Jacobians:
        n, m = (view.size_of(name, expression) for name in (expression.of, expression.at[0]))
        mean = torch.zeros(n, m, dtype=torch.float64, device=view.device)
        singular = torch.zeros(len(view), min(n, m), dtype=torch.float64, device=view.device)
        for part, J in view.jacobians(expression.of, expression.at[0], expression):
            mean += finite(J, expression).double().sum(0)
            singular[part] = singular_values(J)
        return cls(expression, view.total(mean) / len(view), view.total(singular))

    @classmethod
    def mean_of(cls, quantities: Sequence[Jacobians]) -> Jacobians:
        return cls(quantities[0].expression, torch.stack([q.mean for q in quantities]).mean(0), None)

    def matrix(self) -> Tensor:
        """The mean over the samples."""
        return self.mean

    def matvec(self, v: Tensor) -> Tensor:
        return self.mean @ v.to(self.mean)

    def top(self, k: int = 5) -> Tensor:
        return singular_values(self.mean)[:k]

    def norms(self) -> Figures:
        return {"fro": float(torch.linalg.matrix_norm(self.mean)), "spectral": float(self.top(1))}

    def found(self, wanted: Wanted) -> Found:
        figures, arrays = figures_of_matrix(self.mean, wanted, self.dtype)
        if self.singular is not None:
            arrays["sample_singular_values"] = self.singular
            figures |= {
                "sample_fro": float(torch.linalg.vector_norm(self.singular, dim=1).mean()),
                "sample_spectral": float(self.singular[:, 0].mean()),
                "sample_smallest": float(self.singular[:, -1].mean()),
            }
        return figures, arrays


class Hessian(Quantity):
    """A symmetric matrix of second derivatives, known by its products."""

    def __init__(self, expression: Expression, operator: Symmetric) -> None:
        super().__init__(expression)
        self.operator = operator

    @classmethod
    def of_parameters(cls, view: View, expression: Expression, at: Parameters, wanted: Wanted) -> Hessian:
        product = view.curvature(expression.of, at, at).product
        options = {"dtype": view.dtype, "device": view.device, "dense": wanted.dense, "seed": wanted.seed}
        return cls(expression, Symmetric(product, at.size, **options))

    @classmethod
    def mean_of(cls, quantities: Sequence[Hessian]) -> Hessian:
        operators = [q.operator for q in quantities]
        first = operators[0]

        def product(v: Tensor) -> Tensor:
            return torch.stack([operator.matvec(v) for operator in operators]).mean(0)

        options = {"dtype": first.dtype, "device": first.device, "dense": first.dense, "seed": first.seed}
        return Hessian(quantities[0].expression, Symmetric(product, first.size, **options))

    def matrix(self) -> Tensor:
        return self.operator.matrix()

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)

    def top(self, k: int = 5, tol: float = TOLERANCE) -> Pairs:
        return self.operator.top(k, tol)

    def bottom(self, k: int = 1, tol: float = TOLERANCE) -> Pairs:
        return self.operator.bottom(k, tol)

    def trace(self, probes: int = TRACE_PROBES) -> Estimate:
        return self.operator.trace(probes)

    def density(self, steps: int = STEPS, probes: int = PROBES) -> Density:
        return self.operator.density(steps, probes)

    def norms(self) -> Figures:
        return self.operator.norms()

    def found(self, wanted: Wanted) -> Found:
        operator = self.operator
        top, bottom = self.extremes(wanted)
        figures = {f"eig{i}": float(value) for i, value in enumerate(top.values, 1)}
        figures["residual"] = float(top.residuals.max())
        trace, fro = operator.trace_and_fro(wanted.trace_probes, operator.space)
        figures |= {"trace": trace.value, "trace_error": trace.error, "fro": fro.value}
        arrays = {"eigenvalues": top.values}
        if wanted.bottom:
            figures |= {f"min{i}": float(value) for i, value in enumerate(bottom.values, 1)}
            arrays["least_eigenvalues"] = bottom.values
        if operator.is_dense():
            arrays["eigenvalues"] = operator.pairs().values
            sigma = arrays["eigenvalues"].abs().sort(descending=True).values
            ranks = matrix_figures(sigma, operator.shape, torch.finfo(self.dtype).eps)
            figures |= {name: value for name, value in ranks.items() if name not in figures}
            add_parts(operator.matrix(), wanted, figures, arrays)
        density = operator.density(wanted.steps, wanted.probes) if wanted.probes else operator.seen()
        arrays |= {"density_nodes": density.nodes, "density_weights": density.weights}
        if wanted.keep:
            arrays["eigenvectors"] = top.vectors
            if operator.is_dense():
                arrays["matrix"] = operator.matrix()
        return figures, arrays

    def extremes(self, wanted: Wanted) -> tuple[Pairs, Pairs]:
        """The top and bottom eigenpairs that are wanted, computed once."""
        if not hasattr(self, "_extremes"):
            top, bottom = (min(k, self.operator.size) for k in (wanted.top, wanted.bottom))
            self._extremes = self.operator.extremes(top, bottom, wanted.tolerance)
        return self._extremes


class SampleHessians(Hessian):
    """Each sample's Hessian with respect to its own activations (n × n): the mean over samples, and their spectra."""

    def __init__(self, expression: Expression, operator: Symmetric, eigenvalues: Tensor | None) -> None:
        super().__init__(expression, operator)
        self.eigenvalues = eigenvalues  # of each sample, (N, n)

    @classmethod
    def of_layer(cls, view: View, expression: Expression, wanted: Wanted) -> SampleHessians:
        of, at = expression.of, expression.at[0]
        n = view.size_of(at, expression)
        options = {"dtype": view.dtype, "device": view.device, "dense": wanted.dense, "seed": wanted.seed}
        if n > wanted.dense:
            return cls(expression, Symmetric(view.mean_sample_product(of, at), n, **options), None)
        mean = torch.zeros(n, n, dtype=torch.float64, device=view.device)
        eigenvalues = torch.zeros(len(view), n, dtype=torch.float64, device=view.device)
        for part, H in view.sample_hessians(of, at, expression):
            mean += H.double().sum(0)
            eigenvalues[part] = torch.linalg.eigvalsh(finite(H, expression).double()).flip(1)
        operator = symmetric_of(view.total(mean) / len(view), wanted)
        return cls(expression, operator, view.total(eigenvalues))

    def found(self, wanted: Wanted) -> Found:
        figures, arrays = super().found(wanted)
        if self.eigenvalues is not None:
            arrays["sample_eigenvalues"] = self.eigenvalues
            figures |= {
                "sample_largest": float(self.eigenvalues[:, 0].mean()),
                "sample_trace": float(self.eigenvalues.sum(1).mean()),
            }
        return figures, arrays


class Kernel(Hessian):
    """The empirical neural tangent kernel K = J Jᵀ (Nn × Nn) of the samples' outputs, sample by sample."""

    def __init__(self, expression: Expression, matrix: Tensor, wanted: Wanted) -> None:
        self.values = finite(matrix, expression)
        super().__init__(expression, symmetric_of(matrix, wanted))

    @classmethod
    def mean_of(cls, quantities: Sequence[Kernel]) -> Kernel:
        mean = torch.stack([q.values for q in quantities]).mean(0)
        return cls(quantities[0].expression, mean, Wanted(dense=quantities[0].operator.dense))


class Block(Quantity):
    """A block of a Hessian off its diagonal, ∂²/∂θ_a ∂θ_b (p_a × p_b), known by its products."""

    def __init__(self, expression: Expression, operator: Rectangular) -> None:
        super().__init__(expression)
        self.operator = operator

    @classmethod
    def of_parameters(
        cls, view: View, expression: Expression, rows: Parameters, columns: Parameters, wanted: Wanted
    ) -> Block:
        curvature = view.curvature(expression.of, rows, columns)
        options = {"dtype": view.dtype, "device": view.device, "dense": wanted.dense, "seed": wanted.seed}
        shape = rows.size, columns.size
        return cls(expression, Rectangular(curvature.product, curvature.transposed, shape, **options))

    @classmethod
    def mean_of(cls, quantities: Sequence[Block]) -> Block:
        operators = [q.operator for q in quantities]

        def mean(method: str) -> Callable[[Tensor], Tensor]:
            return lambda v: torch.stack([getattr(operator, method)(v) for operator in operators]).mean(0)

        first = operators[0]
        options = {"dtype": first.dtype, "device": first.device, "dense": first.dense, "seed": first.seed}
        return cls(quantities[0].expression, Rectangular(mean("matvec"), mean("rmatvec"), first.shape, **options))

    def matrix(self) -> Tensor:
        return self.operator.matrix()

    def matvec(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v)

    def top(self, k: int = 5, tol: float = TOLERANCE) -> Tensor:
        return self.operator.top(k, tol)

    def norms(self) -> Figures:
        return self.operator.norms()

    def found(self, wanted: Wanted) -> Found:
        operator = self.operator
        if operator.is_dense():
            return figures_of_matrix(operator.matrix(), wanted, self.dtype)
        sigma = operator.top(min(wanted.top, *operator.shape), wanted.tolerance)
        figures = {f"sv{i}": float(value) for i, value in enumerate(sigma, 1)}
        fro = operator.fro(wanted.trace_probes)
        figures |= {"fro": fro.value, "fro_error": fro.error, "spectral": float(sigma[0])}
        return figures, {"singular_values": sigma}


def share_in(vectors: Tensor, v: Tensor) -> float:
    """‖P v‖² / ‖v‖² of a vector (p,), P the projection onto orthonormal vectors (k, p); nan of zeros."""
    v = v.double()
    energy = float(v @ v)
    return float((vectors.double() @ v).square().sum()) / energy if energy else math.nan


def symmetric_of(matrix: Tensor, wanted: Wanted) -> Symmetric:
    """A matrix that is there already, as what is known by its products."""
    options = {"dtype": matrix.dtype, "device": matrix.device, "seed": wanted.seed}
    size = len(matrix)
    dense = size if size <= MOST_ROWS else wanted.dense
    return Symmetric(matrix.__matmul__, size, dense=dense, matrix=matrix, **options)


def figures_of_matrix(A: Tensor, wanted: Wanted, dtype: torch.dtype) -> Found:
    """Figures and singular values of a matrix that was computed in a precision."""
    sigma = singular_values(A)
    figures = matrix_figures(sigma, tuple(A.shape), torch.finfo(dtype).eps)
    figures |= {f"sv{i}": float(value) for i, value in enumerate(sigma[: wanted.top], 1)}
    arrays = {"singular_values": sigma}
    add_parts(A, wanted, figures, arrays)
    if wanted.keep:
        arrays["matrix"] = A
    return figures, arrays


def add_parts(A: Tensor, wanted: Wanted, figures: Figures, arrays: dict[str, Tensor]) -> None:
    """What `--look-parts` asks for of a matrix."""
    for kind, k in wanted.parts.items():
        parts = pca(A, min(k, *A.shape)) if kind == "pca" else nmf(A, k, wanted.seed % 2**32)
        figures[f"{kind}_error"] = parts.error
        arrays |= {f"{kind}_components": parts.components, f"{kind}_scores": parts.scores}
        if kind == "pca":
            figures |= {f"pca_share{i}": float(share) for i, share in enumerate(parts.shares, 1)}


def finite(values: Tensor, expression: Expression) -> Tensor:
    """The same, if all of it is finite."""
    if not values.isfinite().all():
        raise NotFinite(f"{expression} has values that are infinite or nan.")
    return values.detach()
