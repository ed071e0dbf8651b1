"""A network's loss, activations and parameters as functions of each other, and their derivatives on given samples.

Letters: N samples, B of a chunk, C classes, p parameters, n dimension of a layer's flattened activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from measures.convolutions import BilinearConvolutions
from measures.layers import CALL, blocks_of, hookable_layers, perhaps_layers, shapes_of_layers, traced
from measures.passes import untouched
from run.errors import UserError
from run.expressions import INPUT, OUTPUT, Expression, ExpressionError, Name
from run.memory import free_memory
from run.ranks import ALONE, Ranks

CHUNK = 256  # samples of a pass whose graph is dropped at once
CHUNK_BYTES = 2**30  # of the graph of a chunk
CPU_CHUNK, CPU_CHUNK_BYTES = 128, 2**25  # samples and bytes beyond which larger chunks are no faster on CPUs
GRAPH_SHARE = 0.4  # of free memory that kept graphs may take
TRIAL = 8  # samples whose graph tells how large one is
JACOBIAN = 2**24  # numbers of Jacobians held at once
LARGEST = 2**28  # numbers of any matrix

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, C), labels (B,) → (B,)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample, (B,)."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


class Parameters(NamedTuple):
    """Some of a network's parameter tensors as one vector (p,); of a single tensor perhaps one part, by index."""

    tensors: dict[str, Tensor]
    index: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return sum(self._part(tensor).numel() for tensor in self.tensors.values())

    @property
    def values(self) -> Tensor:
        """The parameters themselves."""
        return self.flat([tensor.detach() for tensor in self.tensors.values()])

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """(out, rest) of a single tensor with at least two dimensions; None of anything else."""
        parts = [self._part(tensor) for tensor in self.tensors.values()]
        if len(parts) != 1 or parts[0].dim() < 2 or not parts[0].numel():
            return None
        return parts[0].shape[0], parts[0].numel() // parts[0].shape[0]

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector from what each tensor has."""
        return torch.cat([self._part(part).reshape(-1) for part in parts])

    def split(self, v: Tensor) -> list[Tensor]:
        """What each tensor has of a vector; zero where the index leaves something out."""
        if not self.index:
            tensors = self.tensors.values()
            pieces = v.split([tensor.numel() for tensor in tensors])
            return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
        [tensor] = self.tensors.values()
        part = torch.zeros_like(tensor, requires_grad=False)
        part[self.index] = v.view_as(part[self.index])
        return [part]

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor[self.index]


class View:
    """A network at rest on N samples (x, y): it and all its parameters can be differentiated, nothing of it changes.

    Batch norm uses its running statistics. The loss of one sample is `loss(logits, y)`, that of all its mean. Only
    every num-th chunk is computed on each of several `ranks`, and their sums added.
    """

    def __init__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        chunk: int | None = None,
        keeps_graphs: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.network, self.loss, self.chunk, self.keeps_graphs, self.ranks = network, loss, chunk, keeps_graphs, ranks
        parameter = next(network.parameters(), x)
        self.device, self.dtype = parameter.device, parameter.dtype
        self.x, self.y = x.to(self.device, self.dtype), y.to(self.device)
        self._gradients: dict[Name, dict[str, Tensor]] = {}
        self.refuse_mixing()

    def __len__(self) -> int:
        return len(self.x)

    def of(self, index: Tensor) -> View:
        """The same network on some of the samples."""
        index = index.to(self.device)
        options = {"loss": self.loss, "chunk": self.chunk, "keeps_graphs": self.keeps_graphs, "ranks": self.ranks}
        return View(self.network, self.x[index], self.y[index], **options)

    def refuse_mixing(self) -> None:
        """Refuse networks in which a sample's output depends on the others, even in eval mode."""
        for name, part in self.network.named_modules():
            if isinstance(part, _NormBase) and part.running_mean is None and "Batch" in type(part).__name__:
                raise UserError(
                    f"{name} normalises by the batch even in eval mode (it has no running statistics): what a network "
                    "does to one sample then depends on the others, and derivatives of one have no meaning"
                )

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, derivatives can be taken; afterwards modes, `requires_grad`, random state are as they were."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        with ExitStack() as stack:
            stack.enter_context(untouched(self.network))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(exact_convolutions())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(True)
                yield
            finally:
                for parameter, requires_grad in flags:
                    parameter.requires_grad_(requires_grad)

    # Names

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The layers that `f` can name, with the shape of one sample's activations."""
        with self.at_rest(), torch.no_grad():
            shapes = {INPUT: tuple(self.x.shape[1:])}
            names = list(dict.fromkeys([*hookable_layers(self.network), *blocks_of(self.network)]))
            shapes |= shapes_of_layers(self.network, self.x[:1], names)
            shapes[OUTPUT] = tuple(self.network(self.x[:1]).shape[1:])
        return shapes

    def check(self, expression: Expression) -> None:
        """Refuse, with a mark under the place, names and indices that this network has not."""
        for name in (expression.of, *expression.at):
            if name.kind == "f":
                self.shape_of(name, expression)
            elif name.kind == "theta":
                self.parameters(name, expression)
        of = expression.of
        if expression.derivative == "hess" and of.kind == "f" and self.size_of(of, expression) > 1:
            shape = self.shapes[of.name]
            raise self.mistake(f"hess is of a number: {of} has {self.size_of(of, expression)}, give as many indices as "
                               f"{of.name} has dimensions: {len(shape)}", of, expression)  # fmt: skip
        if expression.derivative and expression.at[0].kind == "f" and of.kind == "f":
            self._refuse_independent(of, expression.at[0], expression)

    def _refuse_independent(self, of: Name, at: Name, expression: Expression) -> None:
        with self.at_rest():
            _, found = self.run(slice(0, 1), [of, at])
            value, h = found[of.name].sum(), found[at.name]
            depends = value.requires_grad and torch.autograd.grad(value, [h], allow_unused=True)[0] is not None
        if not depends or of.name == at.name:
            raise self.mistake(f"{of} does not depend on {at}: it comes after it, or beside it", at, expression)

    def shape_of(self, name: Name, expression: Expression) -> tuple[int, ...]:
        """The shape of one sample's `f(LAYER)[INDEX]`."""
        shape = self.shapes.get(name.name)
        if shape is None:
            shape = self._shape_of_container(name, expression)
        if len(name.index) > len(shape):
            raise self.mistake(f"{name.name} has {len(shape)} dimension(s), not {len(name.index)}", name, expression)
        for i, length in zip(name.index, shape, strict=False):
            if i >= length:
                raise self.mistake(f"index {i} is beyond the last, {length - 1}", name, expression)
        return shape[len(name.index) :]

    def _shape_of_container(self, name: Name, expression: Expression) -> tuple[int, ...]:
        calls = [layer for layer in self.shapes if layer.partition(CALL)[0] == name.name]
        if calls:
            raise self.mistake(f"{name.name} runs {len(calls)} times: say {' or '.join(calls)}", name, expression)
        modules = dict(self.network.named_modules())
        if name.name in modules and name.name:
            with self.at_rest(), torch.no_grad():
                found = shapes_of_layers(self.network, self.x[:1], [name.name])
            if name.name in found:
                self.shapes[name.name] = found[name.name]
                return found[name.name]
            raise self.mistake(f"{name.name} does not return one tensor once", name, expression)
        raise self.mistake(f"there is no layer {name.name!r}{perhaps_layers(name.name, self.shapes)}", name, expression)

    def size_of(self, name: Name, expression: Expression) -> int:
        return math.prod(self.shape_of(name, expression))

    def parameters(self, name: Name, expression: Expression) -> Parameters:
        """The parameters that `theta(NAME)[INDEX]` means: of a tensor, a module, or of all that a pattern matches."""
        tensors = {key: value for key, value in self.network.named_parameters() if value.is_floating_point()}
        chosen = {key: tensors[key] for key in tensors if _means(name.name, key)}
        if not chosen:
            modules = [
                key for key, part in self.network.named_modules() if key and next(part.parameters(), None) is not None
            ]
            close = perhaps_layers(name.name, [*tensors, *modules])
            raise self.mistake(f"no parameter is called {name.name!r}{close}", name, expression)
        if name.index:
            if len(chosen) > 1:
                names = ", ".join(chosen)
                raise self.mistake(f"an index needs one tensor, and {name.name} has {names}", name, expression)
            [(key, tensor)] = chosen.items()
            if len(name.index) > tensor.dim():
                raise self.mistake(f"{key} has {tensor.dim()} dimension(s), not {len(name.index)}", name, expression)
            for i, length in zip(name.index, tensor.shape, strict=False):
                if i >= length:
                    raise self.mistake(f"index {i} is beyond the last, {length - 1}", name, expression)
        return Parameters(chosen, name.index)

    @staticmethod
    def mistake(message: str, name: Name, expression: Expression) -> ExpressionError:
        return ExpressionError(message, expression.text or str(expression), name.place)

    # Passes

    def chunks(self, size: int = CHUNK) -> Iterator[slice]:
        """The samples of this rank, in slices."""
        size = min(size, self.chunk or size)
        starts = range(0, len(self), size)
        for start in starts[self.ranks.index :: self.ranks.num]:
            yield slice(start, min(start + size, len(self)))

    def run(self, part: slice, names: Sequence[Name]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of some samples, and the layers of these names, within the graph."""
        layers = list(dict.fromkeys(name.name for name in names if name.kind == "f"))
        x = self.x[part].detach()
        if layers:
            x = x.clone().requires_grad_(True)
        inner = [layer for layer in layers if layer not in (INPUT, OUTPUT)]
        logits, found = traced(self.network, x, inner)
        return logits, found | {INPUT: x, OUTPUT: logits}

    def samplewise(self, of: Name, logits: Tensor, found: dict[str, Tensor], part: slice) -> Tensor:
        """The loss of each sample (B,), or its activations (B, n) of the named layer."""
        if of.kind == "loss":
            return self.loss(logits, self.y[part])
        return indexed(found[of.name], of.index)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self.ranks.sum(tensor)

    def loss_and_accuracy(self) -> tuple[float, float]:
        """Means over the samples."""
        [means] = self.losses_and_accuracies(1, lambda part: [self.network(self.x[part])]).tolist()
        return tuple(means)

    def losses_and_accuracies(self, num: int, logits: Callable[[slice], Iterable[Tensor]]) -> Tensor:
        """Mean loss and accuracy over the samples, (num, 2), of each of so many ways to make logits of some of them."""
        sums = torch.zeros(num, 2, dtype=torch.float64, device=self.device)
        with self.at_rest(), torch.no_grad():
            for part in self.chunks():
                for i, made in enumerate(logits(part)):
                    right = (made.argmax(1) == self.y[part]).double()
                    sums[i] += torch.stack([self.loss(made, self.y[part]).double().sum(), right.sum()])
        return self.total(sums) / len(self)

    def activations(self, of: Name, expression: Expression) -> Tensor:
        """`f(LAYER)[INDEX]` of all samples, (N, n)."""
        size = self.size_of(of, expression)
        self.refuse_large(expression)
        rows = torch.zeros(len(self), size, dtype=self.dtype, device=self.device)
        with self.at_rest(), torch.no_grad():
            for part in self.chunks():
                _, found = self.run(part, [of])
                rows[part] = indexed(found[of.name], of.index)
        return self.total(rows)

    def gradient(self, of: Name, at: Parameters) -> Tensor:
        """The gradient of the mean over the samples of `of`, a number of each, (p,)."""
        if of not in self._gradients:  # of all tensors at once: who asks for one asks for others
            tensors = dict(self.network.named_parameters())
            sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
            with self.at_rest():
                for part in self.chunks():
                    logits, found = self.run(part, [of])
                    value = self.samplewise(of, logits, found, part).sum()
                    for name, gradient in zip(tensors, gradients(value, list(tensors.values())), strict=True):
                        sums[name] += gradient
            self._gradients[of] = {name: self.total(total) / len(self) for name, total in sums.items()}
        return at.flat([self._gradients[of][name] for name in at.tensors])

    def sample_gradients(self, of: Name, at: Name, expression: Expression) -> Tensor:
        """The gradient of each sample's `of` with respect to its own activations, (N, n)."""
        size = self.size_of(at, expression)
        self.refuse_large(expression)
        rows = torch.zeros(len(self), size, dtype=self.dtype, device=self.device)
        with self.at_rest():
            for part in self.chunks():
                logits, found = self.run(part, [of, at])
                value = self.samplewise(of, logits, found, part).sum()
                rows[part] = self._rows(value, found[at.name], at)
        return self.total(rows)

    def jacobians(self, of: Name, at: Name, expression: Expression) -> Iterator[tuple[slice, Tensor]]:
        """Of this rank's samples, chunk by chunk, each one's derivative of one layer by another, (B, n, n')."""
        n, m = self.size_of(of, expression), self.size_of(at, expression)
        self.refuse_large(expression)
        with self.at_rest():
            for part in self.chunks(max(1, min(CHUNK, JACOBIAN // (n * m)))):
                logits, found = self.run(part, [of, at])
                values = self.samplewise(of, logits, found, part)
                rows = [self._rows(column.sum(), found[at.name], at, keep=True) for column in values.T]
                yield part, torch.stack(rows, 1)

    def sample_hessians(self, of: Name, at: Name, expression: Expression) -> Iterator[tuple[slice, Tensor]]:
        """Likewise each sample's Hessian with respect to its own activations, (B, n, n)."""
        n = self.size_of(at, expression)
        with self.at_rest():
            for part in self.chunks(max(1, min(CHUNK, JACOBIAN // n**2))):
                first, h = self._first_derivative(part, of, at)
                rows = [self._rows(column.sum(), h, at, keep=True) for column in first.T]
                H = torch.stack(rows, 1)
                yield part, (H + H.mT) / 2

    def mean_sample_product(self, of: Name, at: Name) -> Callable[[Tensor], Tensor]:
        """v → (mean over samples of their Hessians) v."""

        def product(v: Tensor) -> Tensor:
            total = torch.zeros(len(v), dtype=torch.float64, device=self.device)
            with self.at_rest():
                for part in self.chunks():
                    first, h = self._first_derivative(part, of, at)
                    total += self._rows((first @ v.to(first)).sum(), h, at).double().sum(0)
            return (self.total(total) / len(self)).to(v)

        return product

    def _first_derivative(self, part: slice, of: Name, at: Name) -> tuple[Tensor, Tensor]:
        """(B, n), with its graph, and the activations themselves."""
        logits, found = self.run(part, [of, at])
        value = self.samplewise(of, logits, found, part).sum()
        h = found[at.name]
        return indexed(gradients(value, [h], graph=True)[0], at.index), h

    @staticmethod
    def _rows(value: Tensor, h: Tensor, at: Name, keep: bool = False) -> Tensor:
        """The gradient of a sum over samples by their activations, (B, n): each sample's own."""
        if not value.requires_grad:  # it is constant, as the first derivative of what is linear
            return indexed(torch.zeros_like(h), at.index)
        return indexed(gradients(value, [h], keep=keep)[0], at.index)

    def kernel(self, of: Name, at: Parameters, expression: Expression) -> Tensor:
        """K = J Jᵀ (Nn, Nn) of the Jacobian J (Nn, p) of all samples' outputs by parameters, sample by sample."""
        n = self.size_of(of, expression)
        self.refuse_large(expression)
        J = self.parameter_jacobian(of, at, n).detach().double()
        return J @ J.T

    def parameter_jacobian(self, of: Name, at: Parameters, n: int) -> Tensor:
        """J (Nn, p), every sample's outputs by parameters, by `vmap` over samples of reverse mode over outputs."""
        traced_network = Traced(self.network, of)
        tensors = {f"network.{name}": tensor.detach() for name, tensor in at.tensors.items()}

        def outputs(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(traced_network, tensors, (x[None],))[0]

        jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))
        J = torch.zeros(len(self), n, at.size, dtype=self.dtype, device=self.device)
        with self.at_rest():
            for part in self.chunks(max(1, min(CHUNK, JACOBIAN // (n * at.size)))):
                parts = jacobian(tensors, self.x[part].detach()).values()  # (B, n, *tensor) each
                parts = [p[(slice(None), slice(None), *at.index)].reshape(*p.shape[:2], -1) for p in parts]
                J[part] = torch.cat(parts, 2)
        return self.total(J).flatten(0, 1)

    def refuse_large(self, expression: Expression, num_samples: int | None = None) -> None:
        """Refuse what takes more numbers than are held at once: of so many samples, or of those here."""
        num = len(self) if num_samples is None else num_samples
        of, *at = (self._length(name, expression) for name in (expression.of, *expression.at))
        kinds = expression.derivative, expression.of.kind, *(name.kind for name in expression.at)
        matrices = {
            ("", "f"): [(num, of)],
            ("grad", "loss", "f"): [(num, *at)],
            ("grad", "f", "f"): [(of, *at)],
            ("grad", "f", "theta"): [(num, of, *at), (num, of, num, of)],  # J, and K = J Jᵀ
        }
        for factors in matrices.get(kinds, []):
            if math.prod(factors) > LARGEST:
                raise UserError(
                    f"{expression} takes {' × '.join(map(str, factors))} numbers, and at most 2^28 are held: lower "
                    "--look-samples, or look at fewer outputs or parameters"
                )

    def _length(self, name: Name, expression: Expression) -> int:
        if name.kind == "loss":
            return 1
        return self.size_of(name, expression) if name.kind == "f" else self.parameters(name, expression).size

    def curvature(self, of: Name, rows: Parameters, columns: Parameters) -> Curvature:
        """The Hessian of the mean of `of`, or a block of it, by its products."""
        return Curvature(self, of, rows, columns)


class Traced(nn.Module):
    """A network whose output is that of one of its layers, or a part of it, (B, n)."""

    def __init__(self, network: nn.Module, of: Name) -> None:
        super().__init__()
        self.network, self.name, self.index = network, of.name, of.index

    def forward(self, x: Tensor) -> Tensor:
        logits, found = traced(self.network, x, [] if self.name == OUTPUT else [self.name])
        return indexed(found.get(self.name, logits), self.index)


class Curvature:
    """∂²/∂rows ∂columns of the mean over a view's samples of a number of each: products with vectors.

    The graph of the first derivative is built once for each chunk of samples and kept, so that a product is one
    backward pass. Where the graphs do not fit into memory, they are built anew for every product. On CPUs a chunk is
    small where the graph is large: memory of the size of a few images' activations is used again and again.
    """

    def __init__(self, view: View, of: Name, rows: Parameters, columns: Parameters) -> None:
        self.view, self.of, self.rows, self.columns = view, of, rows, columns
        self.tensors = rows.tensors | columns.tensors
        size = self._graph_bytes()
        free = free_memory(view.device)
        mine = -(-len(view) // view.ranks.num)
        most = CHUNK_BYTES // max(size, 1)
        if view.device.type == "cpu":
            most = min(most, max(CPU_CHUNK, CPU_CHUNK_BYTES // max(size, 1)))
        self.chunk = max(1, min(mine, most))
        self.is_kept = view.keeps_graphs and size * mine <= GRAPH_SHARE * free
        self._graphs: list[dict[str, Tensor]] | None = None

    def product(self, v: Tensor) -> Tensor:
        """(rows,) from a vector (columns,)."""
        return self._product(v, self.columns, self.rows)

    def transposed(self, u: Tensor) -> Tensor:
        """(columns,) from a vector (rows,)."""
        return self._product(u, self.rows, self.columns)

    def _product(self, v: Tensor, from_: Parameters, to: Parameters) -> Tensor:
        view = self.view
        parts = from_.split(v.to(view.dtype))
        total = None
        exact = torch.autocast(view.device.type, enabled=False)  # a caller's would reach backward passes too
        with required(self.tensors.values()), torch.enable_grad(), exact_convolutions(), exact:
            for gradient in self._gradients():
                sources = [(g, part) for g, part in zip((gradient[name] for name in from_.tensors), parts, strict=True)
                           if g.requires_grad]  # else it is constant  # fmt: skip
                if sources:
                    outputs, vectors = zip(*sources, strict=True)
                    share = to.flat(gradients(outputs, list(to.tensors.values()), vectors, keep=self.is_kept))
                    total = share if total is None else total.add_(share)
        return view.total(v.new_zeros(to.size, dtype=view.dtype) if total is None else total)

    def _gradients(self) -> Iterator[dict[str, Tensor]]:
        """The gradient of each chunk's share of the mean, with its graph, by tensor."""
        if self._graphs is not None:
            yield from self._graphs
            return
        graphs = []
        for part in self.view.chunks(self.chunk):
            gradient = self._gradient(part)
            yield gradient
            if self.is_kept:
                graphs.append(gradient)
            del gradient
        if self.is_kept:
            self._graphs = graphs

    def _gradient(self, part: slice) -> dict[str, Tensor]:
        with self.view.at_rest(), BilinearConvolutions():
            logits, found = self.view.run(part, [self.of])
            value = self.view.samplewise(self.of, logits, found, part).sum() / len(self.view)
            return dict(zip(self.tensors, gradients(value, list(self.tensors.values()), graph=True), strict=True))

    def _graph_bytes(self) -> int:
        """About how much memory the graph of one sample takes."""
        there = (*self.view.network.parameters(), *self.view.network.buffers(), self.view.x, self.view.y)
        own = {tensor.untyped_storage().data_ptr() for tensor in there}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        num = min(TRIAL, len(self.view))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = self._gradient(slice(0, num))
        del graph
        return -(-sum(seen.values()) // num)


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    *,
    graph: bool = False,
    keep: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros where an output does not depend on an input."""
    options = {"create_graph": graph, "retain_graph": graph or keep, "materialize_grads": True}
    return list(torch.autograd.grad(outputs, inputs, grad_outputs=vectors, **options))


def indexed(h: Tensor, index: tuple[int, ...]) -> Tensor:
    """The part of each sample's activations at an index, flattened, (B, n)."""
    return h[(slice(None), *index)].reshape(len(h), -1)


@contextmanager
def required(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, these tensors require gradients."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside, convolutions on GPUs are computed in float32 throughout, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _means(pattern: str, name: str) -> bool:
    """Whether a name or pattern means a parameter: it, a module that holds it, or all where there is none."""
    return (
        not pattern
        or fnmatchcase(name, pattern)
        or any(fnmatchcase(name[:i], pattern) for i, letter in enumerate(name) if letter == ".")
    )
