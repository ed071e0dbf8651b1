"""Neural collapse: how small the variation within classes is, next to that between their means (NC1).

Letters: N samples, B batch, C classes, d dimension of a layer's flattened activations, L layers.
"""

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from measures import (
    Activations,
    Features,
    Means,
    Measure,
    check_same_counts,
    class_means,
    class_members,
    joined,
    pieces,
)
from ranks import ALONE, Ranks

CUT = 10 * torch.finfo(torch.float64).eps  # times C: eigenvalues below it are rounding errors of larger ones


def neural_collapse(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    cache_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """NC1 = tr(Σ_W Σ_B⁺) of every layer that `features` gives: 0 when each class has collapsed to its mean.

    With activations h (flattened), N samples in all, class means mu_c and the mean over all samples mu:
    M = [mu_1 - mu, …, mu_C - mu], Σ_B = M Mᵀ / C and Σ_W = (1/N) Σ_c,i (h_ci - mu_c)(h_ci - mu_c)ᵀ. C counts
    the classes present. `nan`, with one warning, where NC1 is not defined: fewer than two classes, or class
    means that coincide up to float32's resolution.

    No d × d matrix is formed. One pass over the data gives M; with MᵀM = V diag(λ) Vᵀ, a second one gives
    NC1 = (C / N) Σ_c,i Σ_j (κ_j / λ_j)², κ = Vᵀ Mᵀ (h_ci - mu_c). Of the λ_j, at most C - 1 are not rounding
    errors, and only those above 10 C eps64 λ_max: the others are left out. All sums and products are float64.

    Args:
        features: from a batch x to {layer: activations}; put the network into eval mode before.
        batches: gives the same pairs (x, y) each time it is iterated, y integers below `num_classes`.
        cache_bytes: for activations kept between the passes (default: a quarter of free memory). What does
            not fit is computed twice, to the same result.
        ranks: the processes that each have a share of the data; all get the values of the whole.

    Class means on a simplex of radius s, deviations ± a along every axis: NC1 = (C - 1)² a² / (d s²).

    >>> C, d, s, a = 10, 16, 3.0, 0.2
    >>> simplex = (torch.eye(C, d) - torch.eye(d)[:C].mean(0)) * s * math.sqrt(C / (C - 1))
    >>> x = torch.cat([mean + sign * a * torch.eye(d) for mean in simplex for sign in (1, -1)])
    >>> y = torch.arange(C).repeat_interleave(2 * d)
    >>> batches = list(zip(x.split(64), y.split(64)))
    >>> nc1 = neural_collapse(lambda x: {"input": x, "doubled": 2 * x}, batches, C)
    >>> round(nc1["input"], 6), round(nc1["doubled"], 6)
    (0.0225, 0.0225)
    """
    activations = Activations(features, batches, cache_bytes)
    means, counts = class_means(activations, num_classes, ranks)
    num_present = int((counts > 0).sum())
    projections = class_mean_projections(means, num_present)
    totals, counts_again = projected_variation(activations, projections, num_classes)
    check_same_counts(counts, ranks.sum(counts_again))
    totals = ranks.sum(torch.stack(list(totals.values()))) * num_present / counts.sum()
    nc1 = dict(zip(means, totals.tolist(), strict=True))
    undefined = [layer for layer, mean in means.items() if mean.coincide or num_present < 2]
    warn_undefined(undefined, num_present)
    return nc1 | dict.fromkeys(undefined, math.nan)


class Projection:
    """From activations to κ_j / λ_j, `(h - mu) @ W.T - offsets[y]`; W's rows for dropped j are zero."""

    def __init__(self, mean: Means, V: Tensor, inverse: Tensor) -> None:
        self.mu = mean.mu
        self.W = (V * inverse).T @ mean.M  # (C, d)
        self.offsets = mean.M @ self.W.T  # (C, C), the projected mu_c - mu

    def variation(self, h: Tensor, y: Tensor) -> Tensor:
        """Sum of (κ_j / λ_j)² over j and over the samples of a batch (B, d)."""
        kappa = -self.offsets[y]  # (B, C)
        for columns in pieces(h):
            kappa.addmm_(h[:, columns] - self.mu[columns], self.W[:, columns].T)
        return kappa.square_().sum()


def class_mean_projections(means: dict[str, Means], num_present: int) -> dict[str, Projection]:
    """Each layer's projection onto the span of its class means; the eigenproblems are solved all at once."""
    gram = torch.stack([mean.M @ mean.M.T for mean in means.values()])  # (L, C, C)
    eigenvalues, V = torch.linalg.eigh(gram)
    keep = eigenvalues > CUT * num_present * eigenvalues[:, -1:]
    keep[:, : eigenvalues.shape[1] - num_present + 1] = False  # in ascending order: M's rank is below C
    inverse = torch.where(keep, 1 / eigenvalues, 0)  # (L, C)
    return {layer: Projection(mean, V[i], inverse[i, None]) for i, (layer, mean) in enumerate(means.items())}


def projected_variation(
    activations: Activations, projections: dict[str, Projection], num_classes: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Every layer's sum of (κ_j / λ_j)² over all samples, and the class counts (C,) of this pass."""
    totals = {layer: projection.mu.new_zeros(()) for layer, projection in projections.items()}
    counts = next(iter(totals.values())).new_zeros(num_classes, dtype=torch.int64)
    for batch, y in joined(activations):
        counts += class_members(y, num_classes).sum(1)
        for layer, projection in projections.items():
            totals[layer] += projection.variation(batch[layer], y)
        del batch  # its memory is the next one's
    return totals, counts


def warn_undefined(layers: list[str], num_present: int) -> None:
    if layers:
        reason = "the class means coincide" if num_present > 1 else "fewer than two classes have samples"
        warnings.warn(f"NC1 is not defined for layer {', '.join(layers)}: {reason}.", stacklevel=3)


def equiseparation(nc1: Sequence[float]) -> tuple[float, float]:
    """Pearson's r and the slope of log NC1 (natural) over the layers' positions in `nc1`, first layer first.

    The law of equi-separation (He & Su, PNAS 2023): in a trained network log NC1 falls along a line, r = -1.
    Values that are not finite or not above zero are left out; with fewer than three left, both are nan.

    >>> r, slope = equiseparation([8.0, 4.0, math.nan, 1.0])
    >>> round(r, 6), round(slope / math.log(2), 6)
    (-1.0, -1.0)
    """
    points = [(i, math.log(value)) for i, value in enumerate(nc1) if 0 < value < math.inf]
    if len(points) < 3:  # a line through two points always fits
        return math.nan, math.nan
    x, z = np.array(points).T
    x, z = x - x.mean(), z - z.mean()
    r = x @ z / math.sqrt((x @ x) * (z @ z)) if z.any() else math.nan
    return float(r), float(x @ z / (x @ x))


def chance_level(num_samples: int, num_classes: int, dimension: int) -> float:
    """E[NC1] = (N - C)(C - 1) / (d - C) when labels tell nothing about isotropic activations; nan if d <= C.

    Layers of different dimension compare only next to it.

    >>> round(chance_level(200, 5, 40), 2)
    22.29
    """
    if dimension <= num_classes:
        return math.nan
    return (num_samples - num_classes) * (num_classes - 1) / (dimension - num_classes)


class NeuralCollapse(Measure):
    """Logs NC1 of every measured layer, `nc1/SET/LAYER`, and its fall over depth, `equiseparation/SET/{r,slope}`."""

    name = "nc1"

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Both sets' NC1 in this epoch."""
        values = {}
        features = self.features(trainer, pl_module)
        for split in self.sets:
            batches = self.shown(self.batches(trainer, split), split)
            nc1 = neural_collapse(features, batches, pl_module.hparams.num_classes, self.cache_bytes, Ranks.of(trainer))
            r, slope = equiseparation(list(nc1.values()))
            values |= {f"nc1/{split}/{layer}": value for layer, value in nc1.items()}
            values |= {f"equiseparation/{split}/r": r, f"equiseparation/{split}/slope": slope}
        return values
