"""One page of what `python -m measures.clusters svd|pca FILE LAYER` finds in a file of activations.

Letters: N samples, k directions, C classes, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import MAX_NAMES, log_axis, log_ticks_on, matrix
from figures.pages import legend_beside, new_page, remove, styled
from figures.style import OKABE_ITO, kind_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE = -1  # the cluster of samples that are in none


@styled
def clusters_of_layer(
    title: str,
    figures: Mapping[str, float],
    arrays: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    with_variance: bool = False,
) -> Figure:
    """Singular values, the first two scores by class and by cluster, how classes and clusters share samples, alignment.

    `figures` and `arrays` are those of `measures.grouping.of_layer`, `labels` (N,) the classes. `with_variance` adds
    the share of the variance that each direction explains.
    """
    figure, axes = new_page(2, 3, f"{title} · {in_words(figures)}", width=3.0, height=2.5)
    (decay, by_class, by_cluster), (shared, aligned, variance) = axes
    S = arrays["singular_values"]
    decay.plot(np.arange(1, len(S) + 1), S / S[0], color=OKABE_ITO[0], marker="o" if len(S) == 1 else "")
    decay.set(xscale="log", xlabel="direction i", ylabel="S_i / S_1", title="Singular values")
    log_axis(decay)
    log_ticks_on(decay.xaxis)
    for ax, name, kinds in ((by_class, "class", labels), (by_cluster, "cluster", arrays["clusters"])):
        _scatter(ax, arrays["scores"], kinds)
        ax.set_title(f"Scores by {name}")
    shares, rows = classes_in_clusters(arrays["clusters"], labels)
    matrix(shared, shares, rows, list(range(shares.shape[1])))
    shared.set(xlabel="class", ylabel="cluster", aspect="auto", title="Share of a class in each cluster")
    mesh = matrix(aligned, arrays["alignment"])
    aligned.set(xlabel="class", ylabel="class", title="Alignment of classes")
    figure.colorbar(mesh, ax=[shared, aligned], fraction=0.05, aspect=25)
    if with_variance:
        _explained(variance, S, figures["energy"])
    else:
        remove([variance])
    legend_beside(figure, _kinds(shares.shape[1], has_noise=NOISE in arrays["clusters"]))
    return figure


def in_words(figures: Mapping[str, float]) -> str:
    """The directions, and the clusters with their coverage beside their purity."""
    parts = [
        f"{figures['directions']:.0f} directions of {figures['features']:.0f} features",
        f"{100 * figures['energy']:.1f}% of the energy",
        f"{figures['num_clusters']:.0f} clusters",
        f"coverage {figures['coverage']:.3f}",
        f"purity {figures['purity']:.3f}, noise as wrong {figures['purity_all']:.3f}",
        f"AMI {figures['ami']:.3f}",
    ]
    return " · ".join(parts)


def classes_in_clusters(clusters: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The share of each class's samples that lie in each cluster, (K, C), with noise (K + 1, C); and the rows' names.

    A class without samples has nan.
    """
    names = [*range(clusters.max() + 1), *([NOISE] if NOISE in clusters else [])]
    counts = np.array([np.bincount(labels[clusters == name], minlength=labels.max() + 1) for name in names])
    sizes = counts.sum(0)
    return counts / np.where(sizes, sizes, np.nan), ["none" if name == NOISE else str(name) for name in names]


def _scatter(ax: Axes, scores: np.ndarray, kinds: np.ndarray) -> None:
    """The first two scores of each sample; a single one is drawn against the sample's number."""
    x, y = (scores[:, 0], scores[:, 1]) if scores.shape[1] > 1 else (scores[:, 0], np.arange(len(scores)))
    ax.scatter(x, y, s=3, c=[kind_color(kind) for kind in kinds], linewidths=0)
    ax.set(xlabel="score 1", ylabel="score 2" if scores.shape[1] > 1 else "sample")


def _explained(ax: Axes, S: np.ndarray, energy: float) -> None:
    shares = S**2 / (S**2).sum() * energy
    directions = np.arange(1, len(S) + 1)
    marker = "o" if len(S) == 1 else ""
    ax.plot(directions, shares, color=OKABE_ITO[0], marker=marker, label="of a direction")
    ax.plot(directions, shares.cumsum(), color=OKABE_ITO[1], marker=marker, label="of all up to it")
    ax.set(xscale="log", xlabel="direction i", ylabel="share", ylim=(-0.03, 1.03), title="Explained variance")
    log_ticks_on(ax.xaxis)
    ax.legend()


def _kinds(num_classes: int, *, has_noise: bool) -> list:
    from matplotlib.lines import Line2D

    style = {"linestyle": "", "marker": "o", "markersize": 4}
    handles = [Line2D([], [], color=kind_color(c), label=str(c), **style) for c in range(min(num_classes, MAX_NAMES))]
    noise = [Line2D([], [], color=kind_color(NOISE), label="in no cluster", **style)] if has_noise else []
    return [Line2D([], [], linestyle="", label="class, cluster"), *handles, *noise]
