"""Clusters of activations: how they agree with the classes, what was kept of activations, and who resembles whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from figures import kept_clusters as kept
from figures.axes import MAX_NAMES, chosen_epochs, log_axis, log_ticks_on, matrix, thin
from figures.layerwise import over_epochs, share_over_epochs
from figures.pages import grid, layer_legend, legend_below, legend_beside, new_page, styled
from figures.runs import SPLITS, Run
from figures.settings import Comparison, Setting, compare
from figures.style import NothingToDraw, kind_color, layer_colors, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGREEMENT = ("coverage", "purity", "purity_all", "homogeneity", "ami")
KEPT = ("clusters/directions", "clusters/alignment", "cka")
MAX_MATRICES = 6  # layers whose alignment, or maps, a page shows
MAX_MAPS = 3  # epochs
NO_MAPS = "There are no maps; main.py makes them with --clusters --tsne."


@styled
def clusters_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How the clusters of every layer agree with the classes, over the epochs: coverage beside purity."""
    measures = [f"clusters/{name}/{split}" for split in reversed(SPLITS) for name in AGREEMENT]
    return grid(runs, "Clusters and classes over epochs", measures, share_over_epochs, legend=layer_legend)


@styled
def directions_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How many directions hold the energy, how alike the classes' subspaces are, and a layer and the next one."""
    measures = [f"{name}/{split}" for split in reversed(SPLITS) for name in KEPT]
    return grid(runs, "Directions and similarity over epochs", measures, over_epochs, legend=layer_legend)


@styled
def singular_values(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None) -> Figure:
    """The decay of each layer's singular values S_i / S_1, up to the directions kept, at the first and last epoch."""
    split = split or kept.split_of(runs, "clusters/directions")
    draw = _Decay(epochs, split)
    title = f"Singular values, {split} set"
    figure = grid(runs, title, [f"clusters/directions/{split}"], draw, height=2.6, legend=layer_legend)
    legend_below(figure, draw.styles())
    return figure


@styled
def alignment_of_classes(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None
) -> Figure:
    """Classes × classes: how alike the subspaces are in which they vary. A row per layer, a column per epoch.

    By default of at most six layers, the last among them, at the first epoch and the last. Means over the runs of one
    setting: of several settings, the first.
    """
    split = split or kept.split_of(runs, "clusters/alignment")
    comparison = compare(runs)
    setting = _first_with(comparison, f"clusters/alignment/{split}")
    shown = chosen_epochs(kept.epochs_of(setting), epochs, 2, np.linspace)
    layers = thin(
        [layer for layer in setting.layers if kept.have(setting, shown, f"alignment/{split}/{layer}")], MAX_MATRICES
    )
    if not layers:
        raise NothingToDraw(kept.NOT_THERE)
    heading = comparison.heading_of(setting, f"Alignment of classes, {split} set")
    figure, axes = new_page(len(layers), len(shown), heading, width=2.6, height=2.1)
    for row, layer in zip(axes, layers, strict=True):
        for ax, epoch in zip(row, shown, strict=True):
            mesh = matrix(ax, kept.mean(setting, epoch, f"alignment/{split}/{layer}"))
            ax.set_title(f"{plain(layer)}, epoch {epoch}", loc="left")
            _label_outer(ax, axes, "class", "class")
    figure.colorbar(mesh, ax=axes, label="mean squared cosine of principal angles", fraction=0.05, aspect=30)
    return figure


@styled
def cka_of_layers(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None) -> Figure:
    """Layers × layers: linear CKA, a row per setting (mean over its runs), a column per epoch (first and last)."""
    split = split or kept.split_of(runs, "cka")
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if setting.has(f"cka/{split}")]
    shown = {setting: chosen_epochs(kept.epochs_of(setting), epochs, 2, np.linspace) for setting in settings}
    settings = [setting for setting in settings if kept.have(setting, shown[setting], f"cka/{split}")]
    if not settings:
        raise NothingToDraw(kept.NOT_THERE)
    lacking = len(comparison.settings) - len(settings)
    num_columns = max(len(shown[setting]) for setting in settings)
    heading = comparison.heading(f"CKA of layers, {split} set", sums_up=False, lacking=lacking)
    figure, axes = new_page(len(settings), num_columns, heading, width=3.6, height=3.4)
    for row, setting in zip(axes, settings, strict=True):
        for ax, epoch in zip(row, shown[setting], strict=False):
            mesh = matrix(ax, kept.mean(setting, epoch, f"cka/{split}"), kept.layers_in(setting, epoch))
            ax.set_title("\n".join(filter(None, [plain(comparison.name(setting), 40), f"epoch {epoch}"])), loc="left")
            _label_outer(ax, axes, "layer", "layer")
        for ax in row[len(shown[setting]) :]:
            ax.set_axis_off()
    figure.colorbar(mesh, ax=axes, label="linear CKA, debiased", fraction=0.05, aspect=25)
    return figure


@styled
def tsne_maps(
    runs: Run | Sequence[Run],
    epochs: Sequence[int] | None = None,
    split: str | None = None,
    color: Literal["class", "cluster"] = "class",
) -> Figure:
    """Samples on maps by t-SNE, colored by their class or their cluster. A row per layer, a column per epoch.

    By default of at most six layers, at three epochs. Crosses are samples whose class the network gets wrong; what is
    in no cluster is grey. A picture only: t-SNE keeps neighbours, neither distances nor sizes. Of one run: the first
    that has maps.
    """
    split = split or kept.split_of(runs, "clusters/directions", NO_MAPS)
    comparison = compare(runs)
    run, setting = _first_with_maps(comparison, split)
    shown = chosen_epochs(kept.kept_epochs([run]), epochs, MAX_MAPS, np.linspace)
    layers = thin(setting.layers, MAX_MATRICES)
    heading = f"t-SNE by {color}, {split} set · {setting.label} · {run.folder.resolve().name}"
    figure, axes = new_page(len(layers), len(shown), heading, width=2.4, height=2.2)
    for column, epoch in zip(axes.T, shown, strict=True):
        common = [f"{name}/{split}" for name in ("mapped", "labels", "predictions")]
        wanted = common + [f"{name}/{split}/{layer}" for name in ("map", "clusters") for layer in layers]
        found, _ = kept.read(run, epoch, wanted)
        mapped, labels, predictions = (found[name] for name in common)
        for ax, layer in zip(column, layers, strict=True):
            kinds = labels if color == "class" else found[f"clusters/{split}/{layer}"]
            is_wrong = (labels != predictions)[mapped]
            _map(ax, found[f"map/{split}/{layer}"], kinds[mapped], is_wrong)
            ax.set_title(f"{plain(layer)}, epoch {epoch}", loc="left")
            _label_outer(ax, axes, "t-SNE 1", "t-SNE 2")
    _kind_legend(figure, color, int(labels.max()) + 1)
    return figure


tsne_maps.variants = {f"tsne_by_{color}": {"color": color} for color in ("class", "cluster")}


def _first_with_maps(comparison: Comparison, split: str) -> tuple[Run, Setting]:
    for setting in comparison.settings:
        for run in setting.runs:
            epochs = kept.kept_epochs([run])
            if epochs and kept.read(run, epochs[-1], (f"mapped/{split}",))[0]:
                return run, setting
    raise NothingToDraw(NO_MAPS)


def _label_outer(ax: Axes, axes: np.ndarray, x: str, y: str) -> None:
    """Labels at the left and the lower end of a page alone."""
    ax.set(xlabel=x if ax in axes[-1] else "", ylabel=y if ax in axes[:, 0] else "")


def _map(ax: Axes, places: np.ndarray, kinds: np.ndarray, is_wrong: np.ndarray) -> None:
    colors = np.array([kind_color(kind) for kind in kinds])
    ax.scatter(*places[~is_wrong].T, s=3, c=colors[~is_wrong], linewidths=0)
    ax.scatter(*places[is_wrong].T, s=12, c=colors[is_wrong], marker="x", linewidths=0.8)
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.grid(False)


def _kind_legend(figure: Figure, color: str, num_classes: int) -> None:
    from matplotlib.lines import Line2D

    style = {"linestyle": "", "marker": "o", "markersize": 4}
    kinds = range(min(num_classes, MAX_NAMES)) if color == "class" else ()
    handles = [Line2D([], [], color=kind_color(kind), label=f"class {kind}", **style) for kind in kinds]
    if color == "cluster":
        handles.append(Line2D([], [], color=kind_color(-1), label="in no cluster", **style))
    handles.append(Line2D([], [], color="0.3", label="wrong", **style | {"marker": "x"}))
    legend_beside(figure, handles)


class _Decay:
    """Draws the singular values of one setting: dashed at the first of the epochs, else without a break."""

    def __init__(self, epochs: Sequence[int] | None, split: str) -> None:
        self.epochs, self.split = epochs, split
        self.drawn: dict[str, str] = {}

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        shown = chosen_epochs(kept.epochs_of(setting), self.epochs, 2, np.linspace)
        for epoch in shown:
            line = "--" if epoch == shown[0] and len(shown) > 1 else "-"
            self.drawn[f"epoch {epoch}"] = line
            for layer, color in layer_colors(setting).items():
                found = kept.of_runs(setting, epoch, f"singular_values/{self.split}/{layer}")
                if found:
                    S = found[0]  # of the first run: others keep another number of directions
                    ax.plot(np.arange(1, len(S) + 1), S / S[0], line, color=color)
        ax.set_xscale("log")
        log_axis(ax)
        log_ticks_on(ax.xaxis)
        ax.set(xlabel="direction i", ylabel="S_i / S_1")

    def styles(self) -> list:
        from matplotlib.lines import Line2D

        return [Line2D([], [], color="0.3", linestyle=line, label=name) for name, line in self.drawn.items()]


def _first_with(comparison: Comparison, measure: str) -> Setting:
    return next(setting for setting in comparison.settings if setting.has(measure))
