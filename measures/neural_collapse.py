"""Neural collapse: how small the variation within classes is, next to that between their means (NC1).

Letters: N samples, B batch, C classes, R labelings, d dimension of a layer's flattened activations, L layers.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from measures.means import Means, centred, check_same_counts, class_members, class_sums, pieces
from measures.measure import Measure
from measures.passes import Activations, Features, joined
from run.ranks import ALONE, Ranks
from run.seeds import seed_from

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
    [nc1] = nc1_of_labelings(features, batches, num_classes, cache_bytes, ranks)
    return nc1


def nc1_of_labelings(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    cache_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """NC1 as `neural_collapse` has it, of the same activations under each of R labelings: y is (B, R).

    One labeling more costs no pass more: where activations take time, it is nearly free. A warning tells where NC1 is
    not defined under the first of them.
    """
    activations = Activations(features, batches, cache_bytes)
    sums, counts = class_sums(activations, num_classes, ranks)
    counts = counts.view(-1, num_classes)  # (R, C)
    means = {layer: centred(sums.pop(layer).view(*counts.shape, -1), counts) for layer in list(sums)}
    num_present = (counts > 0).sum(1)  # (R,)
    projections = class_mean_projections(means, num_present)
    totals, counts_again = projected_variation(activations, projections, counts)
    check_same_counts(counts, ranks.sum(counts_again))
    nc1 = ranks.sum(torch.stack(list(totals.values()))) * num_present / counts.sum(1)  # (L, R)
    is_defined = ~torch.stack([mean.coincide for mean in means.values()]) & (num_present > 1)  # (L, R)
    warn_undefined([layer for layer, is_ in zip(means, is_defined[:, 0], strict=True) if not is_], int(num_present[0]))
    return [dict(zip(means, column, strict=True)) for column in nc1.where(is_defined, math.nan).T.tolist()]


class Projection:
    """From activations to κ_j / λ_j of every labeling, `(h - mu) @ W.T - offsets[y]`; W's rows for dropped j are zero.

    V and the eigenvalues' inverses are (R, C, C) and (R, C).
    """

    def __init__(self, mean: Means, V: Tensor, inverse: Tensor) -> None:
        self.mu = mean.mu[0]  # of all labelings, up to rounding
        W = (V * inverse[:, None]).mT @ mean.M  # (R, C, d)
        self.offsets = mean.M @ W.mT  # (R, C, C), the projected mu_c - mu
        self.W = W.flatten(0, 1)

    def variation(self, h: Tensor, y: Tensor) -> Tensor:
        """Sum of (κ_j / λ_j)² over j and over the samples of a batch, h (B, d) and y (B, R), by labeling: (R,)."""
        kappa = torch.cat([-offsets[labels] for offsets, labels in zip(self.offsets, y.T, strict=True)], 1)  # (B, R C)
        for columns in pieces(h):
            kappa.addmm_(h[:, columns] - self.mu[columns], self.W[:, columns].T)
        return kappa.square_().view(len(h), len(self.offsets), -1).sum((0, 2))


def class_mean_projections(means: dict[str, Means], num_present: Tensor) -> dict[str, Projection]:
    """Each layer's projections onto the spans of its class means; the eigenproblems are solved all at once."""
    gram = torch.stack([mean.M @ mean.M.mT for mean in means.values()])  # (L, R, C, C)
    eigenvalues, V = torch.linalg.eigh(gram)
    keep = eigenvalues > CUT * num_present[:, None] * eigenvalues[..., -1:]
    rank = torch.arange(gram.shape[-1], 0, -1, device=gram.device)  # from C down to 1, as the order is ascending
    keep &= rank < num_present[:, None]  # M's rank is below C
    inverse = torch.where(keep, 1 / eigenvalues, 0)  # (L, R, C)
    return {layer: Projection(mean, V[i], inverse[i]) for i, (layer, mean) in enumerate(means.items())}


def projected_variation(
    activations: Activations, projections: dict[str, Projection], counts: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Every layer's sums of (κ_j / λ_j)² over all samples, (R,), and this pass's class counts, (R, C) as `counts`."""
    num_labelings, num_classes = counts.shape
    totals = {layer: projection.mu.new_zeros(num_labelings) for layer, projection in projections.items()}
    counts_again = torch.zeros_like(counts)
    for batch, y in joined(activations):
        y = y.view(len(y), -1)  # (B, R)
        counts_again += class_members(y, num_classes).sum(1).view_as(counts)
        for layer, projection in projections.items():
            totals[layer] += projection.variation(batch[layer], y)
        del batch  # its memory is the next one's
    return totals, counts_again


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


def permuted(labels: Tensor, *purpose: int | str) -> Tensor:
    """The labels (N,) in a random order that the purpose decides, the same on every device: they tell nothing."""
    generator = torch.Generator().manual_seed(seed_from("nc1 chance", *purpose))
    return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]


class NeuralCollapse(Measure):
    """Logs NC1 of every measured layer, `nc1/SET/LAYER`, and its fall over depth, `equiseparation/SET/{r,slope}`.

    Beside it stands its chance level, `nc1_chance/SET/LAYER`: NC1 of the same activations when the labels are permuted,
    by the run's seed and in every epoch alike. Layers compare only next to it, and no formula gives it: for isotropic
    activations it is (N - C)(C - 1)/(d - C), which real ones miss by orders of magnitude. It takes the data module's
    `Batches`; with batches of one's own there is none.
    """

    name = "nc1"

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Both sets' NC1 in this epoch."""
        values = {}
        features, hparams = self.features(trainer, pl_module), pl_module.hparams
        for split in self.sets:
            batches = self.shown(with_permuted(self.batches(trainer, split), hparams.seed, split), split)
            nc1, *chance = nc1_of_labelings(
                features, batches, hparams.num_classes, self.cache_bytes, Ranks.of(trainer)
            )  # fmt: skip
            r, slope = equiseparation(list(nc1.values()))
            values |= {f"nc1/{split}/{layer}": value for layer, value in nc1.items()}
            values |= {f"equiseparation/{split}/r": r, f"equiseparation/{split}/slope": slope}
            for of_permuted in chance:
                values |= {f"nc1_chance/{split}/{layer}": value for layer, value in of_permuted.items()}
        return values


def with_permuted(batches: Any, *purpose: int | str) -> Any:
    """The same samples with two labels each, (B, 2), its own and a permuted one; foreign batches as they are."""
    if not hasattr(batches, "relabelled"):
        return batches
    labels = batches.labels
    return batches.relabelled(torch.stack([labels, permuted(labels, *purpose)], 1))
