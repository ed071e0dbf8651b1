"""Clusters: do a layer's activations fall into groups, found without the labels, and are the groups the classes?

Letters: N samples, d dimension of a layer's flattened activations, k directions, C classes, L layers.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from measures.measure import Measure
from measures.reduction import MAX_DIRECTIONS, Matrix, reduce
from measures.samples import Chosen, activations_of, labels_in, stratified
from measures.similarity import alignment, cka_matrix, mean_over_pairs
from run.errors import UserError, WrongFlag
from run.ranks import Ranks
from run.seeds import seed_from

if TYPE_CHECKING:
    from datasets import Dataset
    from run.console import Console
    from run.run_folder import RunFolder

NOISE = -1  # the label of samples in no cluster
SAMPLES = 10_000
MIN_CLUSTER_SIZE = 50


class Grouping(NamedTuple):
    """Clusters, and how they stand to the classes: what `cluster` returns."""

    labels: Matrix  # (N,), the cluster of each sample, -1 for noise
    num_clusters: int
    coverage: float
    purity: float
    purity_all: float
    homogeneity: float
    completeness: float
    ami: float

    @property
    def figures(self) -> dict[str, float]:
        """All but the labels, by their names."""
        return {name: float(value) for name, value in self._asdict().items() if name != "labels"}


def cluster(scores: Matrix, labels: Matrix, min_cluster_size: int = MIN_CLUSTER_SIZE) -> Grouping:
    """The clusters in which samples with these scores (N, k) lie, held against their classes (N,).

    HDBSCAN (Campello, Moulavi & Sander 2013) finds clusters of at least `min_cluster_size` samples where they are
    dense; `min_samples` is the same, the sample itself counted. What belongs to none is noise. With n_kc the number of
    samples of class c in cluster k:

    - num_clusters, and coverage: the share of samples that lie in one
    - purity: Σ_k max_c n_kc / Σ_kc n_kc, the share of the clustered samples that have their cluster's most frequent
      class; nan without clusters. High where few points are clustered at all: read it beside coverage
    - purity_all: Σ_k max_c n_kc / N, where noise counts as wrong
    - homogeneity: 1 - H(C|K) / H(C), and completeness: 1 - H(K|C) / H(K), with noise as a cluster of its own
    - ami: the mutual information of classes and clusters, adjusted so that chance gives 0; noise as above

    >>> scores = torch.cat([torch.randn(60, 2), torch.randn(60, 2) + 100])
    >>> grouping = cluster(scores, torch.arange(120) // 60)
    >>> grouping.num_clusters, grouping.purity
    (2, 1.0)
    """
    points = np.asarray(torch.as_tensor(scores).detach().cpu())
    classes = np.asarray(torch.as_tensor(labels).cpu())
    if points.ndim != 2 or classes.shape != points.shape[:1]:
        raise UserError(f"There are scores of shape {points.shape} and labels of shape {classes.shape}.")
    if not np.isfinite(points).all():
        raise UserError("The scores are infinite or nan.")
    if len(points) < min_cluster_size:
        raise UserError(f"There are {len(points)} samples, fewer than the {min_cluster_size} of a cluster.")
    found = hdbscan(points, min_cluster_size)
    of_kind = torch.from_numpy(found).to(scores.device) if isinstance(scores, Tensor) else found
    return Grouping(of_kind, **agreement(found, classes))


def hdbscan(points: np.ndarray, min_cluster_size: int) -> np.ndarray:
    """HDBSCAN's cluster of each point, int64 (N,), -1 for noise."""
    from sklearn.cluster import HDBSCAN

    method = HDBSCAN(min_cluster_size=min_cluster_size, min_samples=min_cluster_size, copy=True)
    return method.fit_predict(points.astype(np.float64)).astype(np.int64)


def agreement(clusters: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """What `cluster` says of clusters (N,), -1 for noise, and classes (N,)."""
    from sklearn.metrics import adjusted_mutual_info_score, completeness_score, homogeneity_score

    counts = contingency(clusters[clusters != NOISE], classes[clusters != NOISE])
    clustered, of_majority = counts.sum(), counts.max(1).sum() if counts.size else 0
    return {
        "num_clusters": len(counts),
        "coverage": float(clustered / len(classes)),
        "purity": float(of_majority / clustered) if clustered else math.nan,
        "purity_all": float(of_majority / len(classes)),
        "homogeneity": float(homogeneity_score(classes, clusters)),
        "completeness": float(completeness_score(classes, clusters)),
        "ami": float(adjusted_mutual_info_score(classes, clusters)),
    }


def contingency(clusters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How many samples each cluster has of each class, those that occur."""
    names, k = np.unique(clusters, return_inverse=True)
    kinds, c = np.unique(classes, return_inverse=True)
    return np.bincount(k * len(kinds) + c, minlength=len(names) * len(kinds)).reshape(len(names), len(kinds))


class Recipe(NamedTuple):
    """The numbers by which activations become clusters: the flags of the same names."""

    act_threshold: float = 0.0
    filter_class: int | None = None
    energy: float = 0.9
    max_directions: int = MAX_DIRECTIONS
    min_cluster_size: int = MIN_CLUSTER_SIZE


def of_layer(A: Tensor, y: Tensor, recipe: Recipe, num_classes: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A layer's figures by name, and arrays, from its activations (N, d) and the labels (N,)."""
    reduced = reduce(
        A,
        recipe.energy,
        recipe.act_threshold,
        y,
        filter_class=recipe.filter_class,
        max_directions=recipe.max_directions,
    )
    scores = reduced.scores.float().cpu()  # clustered as they are kept
    grouping = cluster(scores, y, recipe.min_cluster_size)
    aligned = alignment(A, y, num_classes=num_classes)
    figures = {
        "features": float(reduced.kept.sum()),
        "directions": float(scores.shape[1]),
        "energy": float(reduced.energies[-1]),
        **grouping.figures,
        "alignment": mean_over_pairs(aligned),
    }
    arrays = {
        "scores": scores,
        "singular_values": reduced.singular_values.cpu(),
        "clusters": grouping.labels.to(torch.int32),
        "alignment": aligned,
    }
    return figures, arrays


class Clusters(Measure):
    """Logs how every measured layer's activations fall into clusters, `clusters/FIGURE/SET/LAYER`, and layers' CKA.

    The figures are those of `cluster`, after `reduce`; beside them `features`, how many passed the filter,
    `directions`, the k kept, with the `energy` that they hold, and `alignment`, its mean over pairs of classes.
    `cka/SET/LAYER` is the similarity of a layer and the next measured one. The samples are the same in every epoch: at
    most `samples` of a set, stratified by class from the run's seed.

    Kept as arrays: by layer its scores, singular values, clusters, and alignment of classes; by set the CKA of all
    layers, and the samples' indices and labels.
    """

    name = "clusters"

    def __init__(self, *, samples: int = SAMPLES, recipe: Recipe | None = None, **common: Any) -> None:
        super().__init__(**{"sets": ("test",)} | common)
        self.samples, self.recipe = samples, recipe or Recipe()
        self._has_told = False  # where the directions do not hold the energy

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Clusters:
        """The measure with the recipe of the run's flags."""
        recipe = Recipe(**{name: getattr(args, name) for name in Recipe._fields})
        return cls(samples=args.cluster_samples, recipe=recipe, **{**common, "sets": args.cluster_sets})

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """Nothing; refuses a class that there is not, and fewer samples than a cluster needs."""
        if args.filter_class is not None and args.filter_class >= dataset.num_classes:
            raise WrongFlag(
                f"argument --filter-class: {args.filter_class} is no class: they are 0 to {dataset.num_classes - 1}"
            )
        for split in args.cluster_sets:
            num = min(args.cluster_samples, len(getattr(dataset, split).labels))
            if num < args.min_cluster_size:
                raise WrongFlag(
                    f"argument --min-cluster-size: a cluster of {args.min_cluster_size} needs as many samples, and "
                    f"there are {num} of the {split} set (--cluster-samples, --limit)"
                )
        return {}

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The figures of the sets' samples in this epoch."""
        values, self.arrays = {}, {}
        self.settings = {**self.recipe._asdict(), "samples": self.samples, "layers": []}
        for split in self.sets:
            values |= self._measure_set(trainer, pl_module, split)
        return values

    def _measure_set(self, trainer: Trainer, pl_module: LightningModule, split: str) -> dict[str, float]:
        ranks, hparams = Ranks.of(trainer), pl_module.hparams
        batches = self.batches(trainer, split)
        labels = labels_in(batches)
        index = stratified(labels, self.samples, seed_from("cluster samples", hparams.get("seed"), split))
        chosen = self.shown(Chosen(batches, index, ranks), split)
        activations = activations_of(self.features(trainer, pl_module), chosen, len(index), ranks)
        layers, y = list(activations), labels[index.to(labels.device)].cpu()
        alike = cka_matrix(list(activations.values()))
        found = shared_among(ranks, activations, y, self.recipe, hparams.num_classes)
        self._tell_low_energy(found)
        values = {
            f"clusters/{name}/{split}/{layer}": value
            for layer, (figures, _) in found.items()
            for name, value in figures.items()
        }
        values |= {f"cka/{split}/{layer}": float(alike[i, i + 1]) for i, layer in enumerate(layers[:-1])}
        for layer, (_, arrays) in found.items():
            self.arrays |= {f"{name}/{split}/{layer}": array for name, array in arrays.items()}
        self.arrays |= {f"cka/{split}": alike, f"index/{split}": index, f"labels/{split}": y}
        self.settings["layers"] = layers
        return values

    def _tell_low_energy(self, found: Mapping[str, tuple[dict[str, float], dict]]) -> None:
        low = {layer: figures["energy"] for layer, (figures, _) in found.items()}
        low = {layer: energy for layer, energy in low.items() if energy <= self.recipe.energy}
        if low and not self._has_told:
            self._has_told = True
            layers = ", ".join(f"{layer} ({energy:.2f})" for layer, energy in low.items())
            warnings.warn(
                f"{self.recipe.max_directions} directions (--max-directions) hold less than the energy "
                f"{self.recipe.energy:g} (--energy) of {layers}.",
                stacklevel=2,
            )


def shared_among(
    ranks: Ranks, activations: dict[str, Tensor], y: Tensor, recipe: Recipe, num_classes: int
) -> dict[str, tuple[dict[str, float], dict[str, Tensor]]]:
    """Every layer's figures and arrays, on all ranks, each of which makes some; frees the activations meanwhile.

    A mistake that one of them meets ends all of them.
    """
    layers, mine, error = list(activations), {}, None
    for i, layer in enumerate(layers):
        A = activations.pop(layer)
        if i % ranks.num != ranks.index or error:
            continue
        try:
            mine[layer] = of_layer(A, y, recipe, num_classes)
        except UserError as mistake:
            error = type(mistake)(f"layer {layer}: {mistake}")
    results = ranks.from_first(ranks.gathered((mine, error)))
    for _, error in results:
        if error:
            raise error
    merged = {layer: found for part, _ in results for layer, found in part.items()}
    return {layer: merged[layer] for layer in layers}
