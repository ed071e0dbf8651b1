"""Groups that activations fall into, found without the labels, and how far they are the classes.

Letters: N samples, d dimension of a layer's flattened activations, k directions, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from measures.reduction import MAX_DIRECTIONS, Matrix, reduce
from measures.similarity import alignment, mean_over_pairs
from run.errors import UserError

NOISE = -1  # the label of samples in no cluster
MIN_CLUSTER_SIZE = 50
NEAR = 1e-3  # of the largest norm: nearer points ‖x‖² - 2xᵀy + ‖y‖² tells apart to fewer than 9 digits


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
    """HDBSCAN's cluster of each point, int64 (N,), -1 for noise: the labels that scikit-learn gives.

    The steps are scikit-learn's, but the search for neighbours is by products of matrices: in 64 directions, where its
    tree leaves nothing out, that is ten times faster, and the whole three times.
    """
    from sklearn.metrics import DistanceMetric

    X = np.ascontiguousarray(points, np.float64)
    try:
        from sklearn.cluster._hdbscan._tree import tree_to_labels
        from sklearn.cluster._hdbscan.hdbscan import _process_mst, mst_from_data_matrix
    except ImportError:  # they are private: another version may name them otherwise
        from sklearn.cluster import HDBSCAN

        whole = HDBSCAN(min_cluster_size=min_cluster_size, min_samples=min_cluster_size, copy=True)
        return whole.fit_predict(X).astype(np.int64)
    edges = mst_from_data_matrix(X, core_distances(X, min_cluster_size), DistanceMetric.get_metric("euclidean"))
    labels, _ = tree_to_labels(_process_mst(edges), min_cluster_size)
    return labels.astype(np.int64)


def core_distances(X: np.ndarray, num: int) -> np.ndarray:
    """The distance of each point to its `num`-th nearest, itself counted, (N,)."""
    from sklearn.neighbors import NearestNeighbors

    centred = X - X.mean(0)
    search = NearestNeighbors(n_neighbors=num, algorithm="brute").fit(centred)
    last = search.kneighbors(centred, return_distance=False)[:, -1]
    core = np.sqrt(np.square(np.ascontiguousarray((X - X[last]).T)).sum(0))  # added up one by one, as in scikit-learn
    if core.min() < NEAR * np.linalg.norm(centred, axis=1).max():
        search = NearestNeighbors(n_neighbors=num, algorithm="kd_tree").fit(X)
        core = np.ascontiguousarray(search.kneighbors(X)[0][:, -1])
    return core


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
