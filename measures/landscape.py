"""The loss around a network: along directions, over the plane of two of them, and around the path of its training.

Letters: p parameters, θ all of them as one vector, v a direction (p,), L(θ) the mean loss of some samples, g its
gradient, H its Hessian, K networks.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from measures.derivatives import Parameters, View
from measures.layers import example_of
from measures.quantities import Hessian, Wanted, quantity
from measures.spectra import pca
from measures.viewing import Viewing
from run.errors import NotFinite, UserError, WrongFlag
from run.expressions import Expression, Name
from run.seeds import seed_from

if TYPE_CHECKING:
    from run.console import Console
    from run.run_folder import RunFolder

LOSS, THETA = Name("loss"), Name("theta")
GRADIENT, HESSIAN = Expression(LOSS, "grad", (THETA,)), Expression(LOSS, "hess", (THETA,))
SPAN, STEPS, MAP_STEPS = 1.0, 41, 21
PATH_NUMBERS = 10**8  # of the parameters of all networks of a path: 0.8 GB
LEAST_PATH = 3  # networks that span a plane
MARGIN = 0.1  # of the path's extent, on either side of it
FLAT = 1e-12  # of the variance: a path with less of it beside a line is one


class Landscape(Viewing):
    """Logs the loss L(θ + α v) around the network along directions v, on the samples that `Viewing` sees.

    Directions are `eig1` and `eig2`, unit eigenvectors of the Hessian's two largest eigenvalues, `gradient`, the unit
    gradient, each turned so that the loss does not fall at first; and `random`, see `random_direction`. A gradient of
    zeros is none, and left out. Columns:

    - `landscape/loss` and `landscape/accuracy` of the network itself
    - `landscape/DIRECTION/slope` gᵀv and `…/curvature` vᵀHv
    - `landscape/DIRECTION/rise`: (L(θ + span v) + L(θ - span v)) / 2 - L(θ), which for a parabola is
      span² vᵀHv / 2

    Arrays: `alphas` (steps,), even and symmetric, 0 in the middle, and there the loss is that of the network to the
    bit; `DIRECTION/losses`, `…/accuracies` and `…/parabola` L(θ) + α gᵀv + α² vᵀHv / 2; `map/alphas` and `map/losses`,
    L(θ + α_i eig1 + α_j eig2) in row i and column j.

    Of several networks together: the plane of the first two principal components of their parameters, through the last
    one, which batch norm's statistics are of. Columns `landscape/path/share1` and `share2`, of the variance; arrays
    `path` (K, 2), where they lie, `path_losses` (K,) their own, and `map/alphas1`, `map/alphas2`, `map/losses`.
    """

    name = "landscape"

    def __init__(
        self,
        *,
        span: float = SPAN,
        steps: int = STEPS,
        map_steps: int = MAP_STEPS,
        wanted: Wanted | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.span, self.steps, self.map_steps, self.wanted = span, steps, map_steps, wanted or Wanted()

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Landscape:
        """The measure as the run's flags want it."""
        return cls(
            samples=args.look_samples,
            span=args.landscape_span,
            steps=args.landscape_steps,
            map_steps=args.landscape_map,
            wanted=Wanted(dense=args.look_dense, tolerance=args.look_tolerance),
            **common | {"sets": (args.look_set,)},
        )

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse networks in which a sample's loss depends on the others."""
        try:
            View(network, example_of(network, shape), torch.zeros(2, dtype=torch.int64))
        except UserError as error:
            raise WrongFlag(f"argument --landscape: {error}") from None

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The columns, of the samples of the set."""
        view, _ = self.view_of(trainer, pl_module)
        seed = pl_module.hparams.get("seed")
        wanted = self.wanted._replace(seed=seed_from("look", seed))
        loss, accuracy = view.loss_and_accuracy()
        if not math.isfinite(loss):
            raise NotFinite("the loss of the samples is infinite or nan.")
        hessian = quantity(view, HESSIAN, wanted)
        gradient = quantity(view, GRADIENT, wanted).values.double()
        directions = directions_of(view, hessian, gradient, wanted, seed)
        alphas = symmetric(self.span, self.steps)
        values = {"landscape/loss": loss, "landscape/accuracy": accuracy}
        self.arrays = {"alphas": alphas}
        for name, v in directions.items():
            slope, curvature = float(gradient @ v), float(v @ hessian.matvec(v).double())
            losses, accuracies = around(view, v[None], alphas[:, None]).cpu().T
            rise = float(losses[0] + losses[-1]) / 2 - loss
            values |= {f"landscape/{name}/slope": slope, f"landscape/{name}/curvature": curvature}
            values[f"landscape/{name}/rise"] = rise
            self.arrays |= {f"{name}/losses": losses, f"{name}/accuracies": accuracies}
            self.arrays[f"{name}/parabola"] = loss + alphas * slope + alphas.square() * curvature / 2
        if self.map_steps and "eig2" in directions:
            alphas = symmetric(self.span, self.map_steps)
            self.arrays |= {"map/alphas": alphas}
            self.arrays["map/losses"] = plane(view, directions["eig1"], directions["eig2"], alphas, alphas)
        self.settings = {"samples": len(view), "dtype": str(view.dtype), "directions": list(directions)}
        return values

    def measure_average(self, trainer: Trainer, modules: Sequence[LightningModule]) -> dict[str, float]:
        """The plane of the networks' path, and the loss over it."""
        if not self.map_steps:
            return {}
        if len(modules) < LEAST_PATH:
            return self._without_path(f"a plane takes {LEAST_PATH} networks, and there are {len(modules)}")
        thetas, losses, sources = [], [], []
        for module in modules:  # one at a time
            view, _ = self.view_of(trainer, module)
            thetas.append(parameters_of(view).values.double().cpu())
            losses.append(view.loss_and_accuracy()[0])
            sources.append(module.source)
            numbers = len(thetas[0]) * len(modules)
            if numbers > PATH_NUMBERS:
                return self._without_path(f"{numbers:,} parameters are more than the {PATH_NUMBERS:,} that are held")
        thetas = torch.stack(thetas)  # (K, p)
        if not thetas.isfinite().all():
            return self._without_path("parameters are infinite or nan")
        parts = pca(thetas, 2)
        if not parts.shares[1:].sum() > FLAT:
            return self._without_path("the networks lie on a line")
        path = (thetas - thetas[-1]) @ parts.components.T  # (K, 2)
        alphas = [spanning(coordinates, self.map_steps) for coordinates in path.T]
        self.arrays = {
            "path": path,
            "path_losses": torch.tensor(losses, dtype=torch.float64),
            "map/alphas1": alphas[0],
            "map/alphas2": alphas[1],
            "map/losses": plane(view, *parts.components, *alphas),
        }
        self.settings = {"samples": len(view), "dtype": str(view.dtype), "networks": sources}
        return {f"landscape/path/share{i}": float(share) for i, share in enumerate(parts.shares, 1)}

    def _without_path(self, why: str) -> dict[str, float]:
        warnings.warn(f"landscape: {why}: the map around the path is left out.", stacklevel=2)
        return {}


def parameters_of(view: View) -> Parameters:
    """All of them."""
    return view.parameters(THETA, HESSIAN)


def directions_of(
    view: View, hessian: Hessian, gradient: Tensor, wanted: Wanted, seed: int | None
) -> dict[str, Tensor]:
    """The directions by name, (p,) each, float64."""
    directions = {}
    top = hessian.top(min(2, len(gradient)), wanted.tolerance)
    for i, vector in enumerate(top.vectors.double(), 1):
        v = vector / torch.linalg.vector_norm(vector)
        directions[f"eig{i}"] = -v if gradient @ v < 0 else v
    norm = torch.linalg.vector_norm(gradient)
    if norm > 0:
        directions["gradient"] = gradient / norm
    return directions | {"random": random_direction(parameters_of(view), seed_from("landscape", seed))}


def random_direction(at: Parameters, seed: int) -> Tensor:
    """Gaussian, each filter scaled to the norm of the network's own filter (Li et al. 2018), (p,), float64.

    A filter is what a tensor has at one first index: of a linear map the weights of a neuron. Tensors of a single
    dimension, biases and those of batch norm, get 0. The draw depends on the seed alone, the norms on the network.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for tensor in at.tensors.values():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        parts.append(drawn * norms_of_filters(tensor) / norms_of_filters(drawn) if tensor.dim() > 1 else 0 * drawn)
    return at.flat(parts)


def norms_of_filters(tensor: Tensor) -> Tensor:
    """Of each first index, (out, 1, …), float64."""
    return torch.linalg.vector_norm(tensor.detach().double(), dim=tuple(range(1, tensor.dim())), keepdim=True)


def symmetric(span: float, steps: int) -> Tensor:
    """An odd number of even steps from -span to span, float64: each with its negative, and 0 exactly.

    >>> symmetric(1.0, 5).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    half = steps // 2
    return torch.arange(-half, half + 1, dtype=torch.float64) / half * span


def spanning(coordinates: Tensor, steps: int) -> Tensor:
    """Even steps from before the least of the coordinates to beyond the largest, 0 exactly one of them.

    >>> spanning(torch.tensor([-10.0, 5.0, 0.0]), 5).tolist()
    [-12.0, -6.0, 0.0, 6.0, 12.0]
    """
    low, high = min(0.0, float(coordinates.min())), max(0.0, float(coordinates.max()))
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    step = (high - low) / (steps - 2)
    return (torch.arange(steps, dtype=torch.float64) - math.ceil(-low / step)) * step


def plane(view: View, v: Tensor, w: Tensor, alphas: Tensor, betas: Tensor) -> Tensor:
    """L(θ + α_i v + β_j w) in row i and column j, float64."""
    points = torch.cartesian_prod(alphas, betas)
    return around(view, torch.stack([v, w]), points)[:, 0].reshape(len(alphas), len(betas)).cpu()


def around(view: View, V: Tensor, points: Tensor) -> Tensor:
    """Mean loss and accuracy, (S, 2), at θ + Σ_j c_j v_j for each of the points c (S, k), with directions V (k, p).

    The network keeps its parameters: it is called with others in their place. Where all c are 0 it is called as it is.
    """
    at = parameters_of(view)
    moves = [at.split(v.to(view.device, view.dtype)) for v in V]

    def logits(part: slice) -> Iterator[Tensor]:
        x = view.x[part]
        for c in points.tolist():
            if any(c):
                moved = {name: tensor.detach() for name, tensor in at.tensors.items()}
                for factor, move in zip(c, moves, strict=True):
                    moved = {name: torch.add(moved[name], d, alpha=factor) for name, d in zip(moved, move, strict=True)}
                yield torch.func.functional_call(view.network, moved, (x,))
            else:
                yield view.network(x)

    return view.losses_and_accuracies(len(points), logits)
